"""Black Forest Labs' shape, as their clients use it: submit with `x-key`, poll the URL that came back, fetch the sample."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx2
import msgspec
import pytest
import pytest_asyncio
from msgspec import Struct

from fairlead.jobs.fake_receiver import FakeReceiver
from tests.api.jobs.served import Studio, in_base64, picture, studio
from tests.api.keyed import SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILTERS = "  models:\n    painter: {filters: {deny: [forbidden]}}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    async with studio(tmp_path_factory.mktemp("bfl"), extra=FILTERS) as running:
        yield running


class Generated(Struct):
    """As ComfyUI's BFLFluxProGenerateResponse."""

    id: str
    polling_url: str


class Polled(Struct):
    """As ComfyUI's BFLFluxStatusResponse."""

    id: str
    status: Literal["Task not found", "Pending", "Request Moderated", "Content Moderated", "Ready", "Error", "Generating"]
    result: dict[str, Any] | None = None
    progress: float | None = None


class Client:
    def __init__(self, home: Studio) -> None:
        self.http = home.http
        self.headers = {"x-key": home.key.secret}

    async def submit(self, model: str, **body: Any) -> httpx2.Response:
        return await self.http.post(f"/v1/{model}", json=body, headers=self.headers)

    async def poll(self, url: str) -> AsyncIterator[Polled]:
        """Every state that is seen, to the last."""
        async with asyncio.timeout(SECONDS):
            while True:
                answer = await self.http.get(url, headers=self.headers)
                assert answer.status_code == 200, answer.text
                polled = msgspec.json.decode(answer.content, type=Polled)
                yield polled
                if polled.status not in ("Pending", "Generating"):
                    return
                await asyncio.sleep(0.01)

    async def result(self, answer: httpx2.Response) -> Polled:
        assert answer.status_code == 200, answer.text
        *_, last = [each async for each in self.poll(answer.json()["polling_url"])]
        return last


def details(answer: httpx2.Response) -> list[list[str]]:
    assert answer.status_code == 422, answer.text
    return [each["loc"] for each in answer.json()["detail"]]


async def test_a_picture_from_its_submission_to_its_sample(home: Studio) -> None:
    client = Client(home)
    answer = await client.submit("painter", prompt="a seven", width=128, height=64, seed=5, output_format="png", safety_tolerance=6)
    made = msgspec.json.decode(answer.content, type=Generated)
    assert set(answer.json()) == {"id", "polling_url", "output_mp"} and answer.json()["output_mp"] == pytest.approx(0.0082)
    assert made.polling_url == f"{home.url}/v1/get_result?id={made.id}"
    last = await client.result(answer)
    assert (last.status, last.progress) == ("Ready", 1.0)
    assert last.result is not None and (last.result["prompt"], last.result["seed"]) == ("a seven", 5)
    assert last.result["duration"] == pytest.approx(last.result["end_time"] - last.result["start_time"], abs=0.01)
    file = await home.http.get(last.result["sample"])
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")


async def test_states_progress_and_previews_on_the_way(home: Studio) -> None:
    client = Client(home)
    answer = await client.submit("slow", prompt="x", steps=40)
    seen = [each async for each in client.poll(answer.json()["polling_url"])]
    states = [each.status for each in seen]
    assert states == sorted(states, key=["Pending", "Generating", "Ready"].index) and states[-1] == "Ready"
    shares = [each.progress for each in seen if each.progress is not None]
    assert shares == sorted(shares) and any(0 < share < 1 for share in shares)


async def test_a_picture_from_a_picture(home: Studio) -> None:
    client = Client(home)
    given = in_base64(picture(96, 64))
    answer = await client.submit("painter", prompt="x", input_image=given, mask=in_base64(picture(96, 64)), strength=0.9)
    last = await client.result(answer)
    assert last.status == "Ready"
    job = await home.ended(last.id)
    (made,) = job["result"]["pictures"]
    assert (made["width"], made["height"], made["content_type"]) == (96, 64, "image/jpeg")


async def test_what_is_moderated_and_what_fails(home: Studio) -> None:
    client = Client(home)
    last = await client.result(await client.submit("painter", prompt="something forbidden"))
    assert (last.status, last.result) == ("Request Moderated", None)
    last = await client.result(await client.submit("painter", prompt="!raise"))
    assert (last.status, last.result) == ("Error", None)
    body = (await home.get(f"/v1/get_result?id={last.id}")).json()
    assert body["details"]["reason"] == "model-error"
    job = await home.submit(model="slow", input={"prompt": "x", "num_steps": 200})
    await home.post(f"/v1/jobs/{job['id']}/cancel")
    assert [each async for each in client.poll(f"/v1/get_result?id={job['id']}")][-1].status == "Error"


async def test_a_result_of_another_face_is_told_too_and_says_nothing_of_its_notes(home: Studio) -> None:
    job = await home.ended((await home.submit(metadata={"prompt": "mine"}))["id"])
    body = (await home.get(f"/v1/get_result?id={job['id']}")).json()
    assert (body["status"], body["result"]["prompt"]) == ("Ready", "")
    words = await home.submit(model="chat", input={"prompt": "some words"})
    answer = await home.get(f"/v1/get_result?id={words['id']}")
    assert (answer.status_code, answer.json()["status"]) == (404, "Task not found")


@pytest.mark.parametrize("id", ["nothing", "%00", "job_" + "0" * 32, "x" * 5000])
async def test_a_task_that_is_not_there(home: Studio, id: str) -> None:
    answer = await home.get(f"/v1/get_result?id={id}")
    assert (answer.status_code, answer.json()["status"], answer.json()["result"]) == (404, "Task not found", None)


async def test_a_webhook_is_signed_with_the_secret_that_came(home: Studio) -> None:
    async with FakeReceiver() as receiver:
        client = Client(home)
        answer = await client.submit("painter", prompt="x", webhook_url=receiver.url, webhook_secret="their secret")
        body = answer.json()
        assert (body["status"], body["webhook_url"]) == ("Pending", receiver.url) and body["polling_url"]
        await receiver.until(lambda: bool(receiver.received))
        (call,) = receiver.received
        told = json.loads(call.body)
        assert (told["id"], told["status"]) == (body["id"], "Ready") and told["result"]["sample"]
        assert any(hmac.new(b"their secret", call.body, hashlib.sha256).hexdigest() in value for value in call.headers.values())
        log = (await home.get(f"/v1/jobs/{body['id']}/deliveries")).json()["deliveries"]
        assert [each["event"] for each in log] == ["complete"]
        theirs = await home.get(f"/v1/jobs/{body['id']}/deliveries", key=home.other)
        assert theirs.status_code == 404
        assert (await home.post(f"/v1/deliveries/{log[0]['id']}/replay", key=home.other)).status_code == 404


async def test_the_same_idempotency_key(home: Studio) -> None:
    first = await home.post("/v1/painter", {"prompt": "once"}, idempotency_key="bfl-1")
    again = await home.post("/v1/painter", {"prompt": "once"}, idempotency_key="bfl-1")
    assert first.json()["id"] == again.json()["id"]
    other = await home.post("/v1/painter", {"prompt": "twice"}, idempotency_key="bfl-1")
    assert details(other) == [["body"]]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"prompt": "x", "width": 65}, "width"),
        ({"prompt": "x", "height": 0}, "height"),
        ({"prompt": "x", "width": "64"}, "width"),
        ({"prompt": "x", "width": 4096, "height": 4096}, "width"),
        ({"prompt": "x", "steps": 0}, "steps"),
        ({"prompt": "x", "steps": 51}, "steps"),
        ({"prompt": "x", "guidance": -1}, "guidance"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 1 << 64}, "seed"),
        ({"prompt": "x", "strength": 0.5}, "strength"),
        ({"prompt": "x", "output_format": "gif"}, "output_format"),
        ({"prompt": "x", "safety_tolerance": 2}, "safety_tolerance"),
        ({"prompt": "x", "prompt_upsampling": True}, "prompt_upsampling"),
        ({"prompt": "x", "raw": True}, "raw"),
        ({"prompt": "x", "aspect_ratio": "16:9"}, "aspect_ratio"),
        ({"prompt": "x", "input_image_2": in_base64(picture())}, "input_image_2"),
        ({"prompt": "x", "input_image": "https://example.com/x.png"}, "input_image"),
        ({"prompt": "x", "input_image": "no base64"}, "input_image"),
        ({"prompt": "x", "input_image": in_base64(b"GIF89a")}, "input_image"),
        ({"prompt": "x", "input_image": in_base64(picture(kind="JPEG")[:-40])}, "input_image"),
        ({"prompt": "x", "mask": in_base64(picture())}, "mask"),
        ({"prompt": "x", "webhook_secret": "x"}, "webhook_secret"),
        ({"prompt": "x", "webhook_url": "http://127.0.0.2/"}, "webhook_url"),
        ({"prompt": "x", "webhook_url": "http://169.254.169.254/latest/meta-data"}, "webhook_url"),
        ({"prompt": "x", "webhook_url": "ftp://example.com/"}, "webhook_url"),
    ],
)
async def test_a_body_that_is_wrong_is_refused_by_name(home: Studio, body: dict[str, Any], named: str) -> None:
    before = await home.latest()
    assert details(await home.post("/v1/painter", body)) == [["body", named]]
    assert await home.latest() == before


async def test_bodies_that_are_none(home: Studio) -> None:
    for body in (b"", b"x", b"[" * 100_000, b'{"prompt": "\xff"}'):
        assert details(await home.post("/v1/painter", body)) == [["body"]]
    large = await home.post("/v1/painter", b'{"prompt": "' + b"x" * (5 << 20) + b'"}')
    assert large.status_code == 413
    assert details(await home.get("/v1/get_result")) == [["body", "id"]]


async def test_a_model_that_makes_no_pictures(home: Studio) -> None:
    for model in ("chat", "identity"):
        assert details(await home.post(f"/v1/{model}", {"prompt": "x"})) == [["body", "model"]]
    answer = await home.post("/v1/painter@9", {"prompt": "x"})
    assert (answer.status_code, set(answer.json())) == (404, {"detail"})
    assert (await home.post("/v1/painter@1", {"prompt": "x"})).status_code == 200


async def test_who_asks_must_say_who(home: Studio) -> None:
    for path in ("/v1/painter", "/v1/secret", "/v1/nobody"):
        answer = await home.http.post(path, json={"prompt": "x"}, headers={"x-request-id": path[4:]})
        assert (answer.status_code, answer.json()) == (401, {"detail": "Not authenticated"})
        assert [line["status"] for line in await home.lines(path[4:])] == [401]
    assert (await home.http.get("/v1/get_result?id=x")).json() == {"detail": "Not authenticated"}
    both = {"x-key": home.key.secret, "x-api-key": home.other.secret}
    assert (await home.http.post("/v1/painter", json={"prompt": "x"}, headers=both)).status_code == 401


async def test_every_other_path_is_unknown_as_it_was_before(home: Studio) -> None:
    """Its path could be any: nobody shall notice."""

    def unknown(answer: httpx2.Response) -> str:
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["code"] == "unknown_url"
        return answer.text

    for method in ("GET", "DELETE", "PUT", "HEAD"):
        answer = await home.ask(method, "/v1/whatever")
        assert answer.status_code == 404
        if method != "HEAD":
            unknown(answer)
    unknown(await home.get("/v1/painter"))
    nobody = unknown(await home.post("/v1/nobody", {"prompt": "x"}))
    hidden = unknown(await home.post("/v1/secret", {"prompt": "x"}))
    assert hidden.replace("secret", "nobody") == nobody
    unknown(await home.post("/v1/models", {"prompt": "x"}))
    unknown(await home.post("/v1/completion", {"prompt": "x"}))
    assert (await home.get("/v1/completions")).status_code == 405
    assert (await home.post("/v1/chat", b"not even JSON")).status_code == 422  # here that is a model
