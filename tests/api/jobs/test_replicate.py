"""Replicate's predictions, asked by Replicate's own client; and what it would never send."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio
import replicate
from replicate.exceptions import ModelError, ReplicateError

from fairlead.core.pictures import read_header
from fairlead.jobs.fake_receiver import FakeReceiver
from tests.api.http_fake import Wire
from tests.api.jobs.served import Studio, in_base64, picture, studio
from tests.api.keyed import SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

os.environ.setdefault("REPLICATE_POLL_INTERVAL", "0.02")
FILTERS = "  models:\n    painter: {filters: {deny: [forbidden]}}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    async with studio(tmp_path_factory.mktemp("replicate"), extra=FILTERS) as running:
        yield running


@pytest.fixture
def client(home: Studio) -> replicate.Client:
    return replicate.Client(api_token=home.key.secret, base_url=home.url, timeout=SECONDS)


def details(answer: httpx2.Response) -> list[list[str]]:
    assert answer.status_code == 422, answer.text
    return [each["loc"] for each in answer.json()["detail"]]


def asked(**more: Any) -> dict[str, Any]:
    return {"version": "painter", "input": {"prompt": "x", **more}}


@pytest.mark.parametrize("ref", ["fairlead/painter", "fairlead/painter:painter@1"])
async def test_run_gives_links_to_the_files(home: Studio, client: replicate.Client, ref: str) -> None:
    """Links over https are FileOutputs there; over plain http they stay what they are."""
    output = await asyncio.to_thread(client.run, ref, input={"prompt": "a seven", "num_outputs": 2, "seed": 3})
    assert len(output) == 2
    assert (await home.http.get(output[1])).content.startswith(b"\x89PNG")


async def test_run_in_the_event_loop(home: Studio, client: replicate.Client) -> None:
    output = await client.async_run("fairlead/painter", input={"prompt": "a seven", "output_format": "webp"})
    assert (await home.http.get(output[0])).content[8:12] == b"WEBP"


async def test_a_run_that_fails_says_why(client: replicate.Client) -> None:
    with pytest.raises(ModelError, match="model-error"):
        await asyncio.to_thread(client.run, "fairlead/painter", input={"prompt": "!raise"})
    with pytest.raises(ModelError, match="NSFW content detected"):
        await asyncio.to_thread(client.run, "fairlead/painter", input={"prompt": "something forbidden"})
    with pytest.raises(ReplicateError, match="there is no model"):
        await asyncio.to_thread(client.run, "fairlead/nobody", input={"prompt": "x"})


async def test_a_prediction_from_its_creation_to_its_files(client: replicate.Client) -> None:
    made = await client.predictions.async_create(version="painter@1", input={"prompt": "a seven", "seed": 3})
    assert (made.status, made.model, made.version, made.output) == ("starting", "fairlead/painter", "painter@1", None)
    assert made.input == {"prompt": "a seven", "seed": 3}
    await made.async_wait()
    assert (made.status, made.error) == ("succeeded", None)
    assert made.metrics is not None and made.metrics["predict_time"] >= 0
    assert made.created_at <= made.started_at <= made.completed_at  # type: ignore[operator]
    found = await client.predictions.async_get(made.id)
    assert (found.id, found.status) == (made.id, "succeeded")
    page = await client.predictions.async_list()
    assert page.results[0].id == made.id and page.results[0].output is not None


async def test_progress_is_read_from_the_logs(client: replicate.Client) -> None:
    made = await client.models.predictions.async_create(("fairlead", "slow"), input={"prompt": "x", "num_inference_steps": 40})
    seen = []
    async with asyncio.timeout(SECONDS):
        while made.status not in ("succeeded", "failed", "canceled"):
            await asyncio.sleep(0.02)
            await made.async_reload()
            seen.append((made.status, made.progress))
    assert made.status == "succeeded"
    assert made.progress is not None and (made.progress.current, made.progress.total, made.progress.percentage) == (40, 40, 1.0)
    steps = [progress.current for status, progress in seen if status == "processing" and progress is not None]
    assert steps == sorted(steps) and steps


async def test_cancel(client: replicate.Client) -> None:
    made = await client.predictions.async_create(version="slow", input={"prompt": "x", "num_inference_steps": 200})
    await made.async_cancel()
    await made.async_wait()
    assert made.status == "canceled"
    cancelled = await client.predictions.async_cancel(made.id)
    assert cancelled.status == "canceled"
    done = await client.predictions.async_create(version="painter", input={"prompt": "x"}, wait=20)
    assert (await client.predictions.async_cancel(done.id)).status == "succeeded"


async def test_waiting(home: Studio, client: replicate.Client) -> None:
    assert (await client.predictions.async_create(version="painter", input={"prompt": "x"}, wait=True)).status == "succeeded"
    made = await client.predictions.async_create(version="slow", input={"prompt": "x", "num_inference_steps": 200}, wait=1)
    assert made.status == "starting"  # its client takes anything else for the end
    await made.async_cancel()
    answer = await home.post("/v1/predictions", asked(), prefer="wait=now")
    assert answer.status_code == 422


async def test_models_and_versions(client: replicate.Client) -> None:
    model = await client.models.async_get("fairlead/painter")
    assert (model.owner, model.name) == ("fairlead", "painter")
    assert model.latest_version is not None and model.latest_version.id == "painter@1"
    version = await model.versions.async_get("painter@1")
    inputs = version.openapi_schema["components"]["schemas"]["Input"]["properties"]
    assert inputs["num_inference_steps"]["default"] == 4 and inputs["guidance_scale"]["default"] == 7.5
    assert (await model.versions.async_get("painter")).id == "painter@1"
    for owner, name in (("fairlead", "secret"), ("fairlead", "nobody"), ("somebody", "painter")):
        with pytest.raises(ReplicateError) as refused:
            await client.models.async_get(owner, name)
        assert refused.value.status == 404
    for version_id in ("painter@9", "slow@1"):
        with pytest.raises(ReplicateError):
            await model.versions.async_get(version_id)


async def test_a_picture_from_a_picture(home: Studio, client: replicate.Client) -> None:
    given = "data:image/png;base64," + in_base64(picture(96, 64))
    output = await client.async_run("fairlead/painter", input={"prompt": "x", "image": given, "prompt_strength": 0.9})
    assert read_header((await home.http.get(output[0])).content, "output").width == 96


async def test_a_webhook(home: Studio, client: replicate.Client) -> None:
    async with FakeReceiver() as receiver:
        made = await client.predictions.async_create(
            version="painter", input={"prompt": "x"}, webhook=receiver.url, webhook_events_filter=["completed"]
        )
        await receiver.until(lambda: bool(receiver.received))
        told = json.loads(receiver.received[0].body)
        assert (told["id"], told["status"]) == (made.id, "succeeded") and told["output"]
        secret = await client.webhooks.default.async_secret()
        replicate.webhook.Webhooks.validate(
            headers=receiver.received[0].headers, body=receiver.received[0].body.decode(), secret=secret, tolerance=60
        )
    assert (await client.webhooks.default.async_secret()).key.startswith("whsec_")


async def test_pages(home: Studio, client: replicate.Client) -> None:
    other = replicate.Client(api_token=home.other.secret, base_url=home.url, timeout=SECONDS)
    made = {(await other.predictions.async_create(version="painter", input={"prompt": "x"})).id for _ in range(101)}
    await home.post("/v1/jobs", {"model": "chat", "input": {"prompt": "some words"}}, key=home.other)
    page = await other.predictions.async_list()
    assert len(page.results) == 100 and page.next
    rest = await other.predictions.async_list(page.next)
    assert {each.id for each in [*page.results, *rest.results]} == made and rest.next is None
    assert details(await home.get("/v1/predictions?cursor=%00")) == [["body", "cursor"]]


async def test_jobs_of_other_faces(home: Studio) -> None:
    job = await home.ended((await home.submit(metadata={"input": "no JSON"}))["id"])
    told = (await home.get(f"/v1/predictions/{job['id']}")).json()
    assert (told["status"], told["input"]) == ("succeeded", None) and told["output"]
    assert (await home.get("/v1/predictions")).status_code == 200
    words = await home.submit(model="chat", input={"prompt": "some words"})
    assert (await home.get(f"/v1/predictions/{words['id']}")).status_code == 404
    assert (await home.post(f"/v1/predictions/{words['id']}/cancel")).status_code == 404


async def test_idempotency(home: Studio) -> None:
    first = await home.post("/v1/predictions", asked(), idempotency_key="replicate-1")
    again = await home.post("/v1/predictions", asked(), idempotency_key="replicate-1")
    assert first.status_code == again.status_code == 201 and first.json()["id"] == again.json()["id"]
    assert first.headers["location"] == f"{home.url}/v1/predictions/{first.json()['id']}"
    assert (await home.post("/v1/predictions", asked(seed=1), idempotency_key="replicate-1")).status_code == 422


async def test_whoever_waits_may_leave_and_the_prediction_goes_on(home: Studio) -> None:
    body = json.dumps({"version": "slow", "input": {"prompt": "x", "num_inference_steps": 10}}).encode()
    connection = Wire(*await asyncio.open_connection("127.0.0.1", home.port))
    head = f"POST /v1/predictions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {home.key.secret}\r\nprefer: wait\r\nx-request-id: left\r\n"
    before = await home.latest()
    await connection.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    async with asyncio.timeout(SECONDS):
        while (job := await home.latest()) == before:
            await asyncio.sleep(0.01)
    await connection.close()
    (line,) = await home.lines("left")
    assert (line["status"], line["error"]) == (499, "the client left")
    assert (await home.ended(job))["status"] == "complete"


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({}, ["input"]),
        ({"input": {"prompt": "x"}}, ["version"]),
        ({"version": "painter", "input": {}}, ["input", "prompt"]),
        ({"version": "painter", "input": "x"}, ["input"]),
        (asked(prompt=1), ["input", "prompt"]),
        (asked(width=65), ["input", "width"]),
        (asked(width="64"), ["input", "width"]),
        (asked(width=4096, height=4096), ["input", "width"]),
        (asked(num_outputs=17), ["input", "num_outputs"]),
        (asked(num_outputs=0), ["input", "num_outputs"]),
        (asked(num_inference_steps=51), ["input", "num_inference_steps"]),
        (asked(num_inference_steps=0), ["input", "num_inference_steps"]),
        (asked(guidance_scale=-1), ["input", "guidance_scale"]),
        (asked(scheduler="K_EULER"), ["input", "scheduler"]),
        (asked(output_format="gif"), ["input", "output_format"]),
        (asked(output_quality=0), ["input", "output_quality"]),
        (asked(seed=-1), ["input", "seed"]),
        (asked(prompt_strength=0.5), ["input", "prompt_strength"]),
        (asked(mask=in_base64(picture())), ["input", "mask"]),
        (asked(image="https://example.com/x.png"), ["input", "image"]),
        (asked(image="data:text/html;base64,PGI+"), ["input", "image"]),
        (asked(image=in_base64(b"<svg/>")), ["input", "image"]),
        (asked(image=in_base64(picture()[:-4])), ["input", "image"]),
        (asked(aspect_ratio="1:1"), ["input", "aspect_ratio"]),
        (asked(go_fast=True), ["input", "go_fast"]),
        ({**asked(), "stream": True}, ["stream"]),
        ({**asked(), "webhook": "http://127.0.0.2/"}, ["webhook"]),
        ({**asked(), "webhook": "http://169.254.169.254/"}, ["webhook"]),
        ({**asked(), "webhook": "http://example.com/", "webhook_events_filter": ["logs"]}, ["webhook_events_filter"]),
        ({**asked(), "webhook_events_filter": ["completed"]}, ["webhook_events_filter"]),
        ({**asked(), "hardware": "gpu"}, ["hardware"]),
        ({"version": "chat", "input": {"prompt": "x"}}, ["model"]),
    ],
)
async def test_a_body_that_is_wrong_is_refused_by_name(home: Studio, body: dict[str, Any], loc: list[str]) -> None:
    before = await home.latest()
    assert details(await home.post("/v1/predictions", body)) == [["body", *loc]]
    assert await home.latest() == before


async def test_what_is_not_offered(home: Studio) -> None:
    assert "Cancel-After" in (await home.post("/v1/predictions", asked(), cancel_after="1m")).text
    for version in ("nobody", "secret", "somebody/painter", "painter@9", "fairlead/painter:9", "@", "/"):
        answer = await home.post("/v1/predictions", {"version": version, "input": {"prompt": "x"}})
        assert (answer.status_code, set(answer.json())) == (404, {"detail"}), version
    hidden, unknown = [await home.get(f"/v1/models/fairlead/{name}") for name in ("secret", "nobody")]
    assert hidden.text.replace("secret", "nobody") == unknown.text
    for body in (b"", b"{", b"[" * 100_000, b'{"version": "\xff"}'):
        assert (await home.post("/v1/predictions", body)).status_code == 422
    assert (await home.post("/v1/predictions", b"x" * (5 << 20))).status_code == 413
    answer = await home.http.get("/v1/models/fairlead/painter")
    assert (answer.status_code, set(answer.json())) == (401, {"detail"})
    answer = await home.http.post("/v1/predictions", json={})
    assert (answer.status_code, set(answer.json())) == (401, {"detail"})
