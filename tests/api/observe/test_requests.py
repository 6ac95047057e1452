"""What became of requests, as the administration tells it: stories over a whole server."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator

from fairlead.core.policy import Scope
from fairlead.jobs.fake_receiver import FakeReceiver, Reply
from tests.api.jobs.served import Studio, studio

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECONDS = 20.0
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


class Home:
    def __init__(self, studio: Studio, ops: httpx2.AsyncClient) -> None:
        self.studio = studio
        self.ops = ops

    async def explained(self, id: str) -> dict[str, Any]:
        """Once it has ended: some do a moment after their answer."""
        async with asyncio.timeout(SECONDS):
            while (answer := await self.ops.get(f"/admin/requests/{quote(id, safe='')}")).status_code == 404:
                await asyncio.sleep(0.01)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        request = found["request"]
        assert sum(phase["seconds"] for phase in request["phases"]) == pytest.approx(request["seconds"])
        return found

    async def list(self, **query: Any) -> list[dict[str, Any]]:
        answer = await self.ops.get("/admin/requests", params=query)
        assert answer.status_code == 200, answer.text
        requests: list[dict[str, Any]] = answer.json()["requests"]
        return requests


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Home]:
    async with studio(tmp_path_factory.mktemp("requests")) as running:
        key = running.new_key(Scope.ADMIN)
        base = f"http://127.0.0.1:{running.server.ops.port}"
        async with httpx2.AsyncClient(base_url=base, timeout=SECONDS, headers={"authorization": f"Bearer {key.secret}"}) as ops:
            yield Home(running, ops)


def names(found: dict[str, Any]) -> list[str]:
    return [step["name"] for step in found["steps"]]


def step(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in found["steps"] if each["name"] == name)


async def test_rows_that_share_a_batch(home: Home) -> None:
    await asyncio.gather(
        *(home.studio.post("/v2/models/identity/infer", ROW, x_request_id=f"row-{number}", traceparent=TRACE) for number in range(4))
    )
    found = await home.explained("row-2")
    request = found["request"]
    assert (request["protocol"], request["kind"], request["model"], request["version"]) == ("http", "infer", "identity", "1")
    assert (request["tenant"], request["status"], request["outcome"], request["rows"]) == ("acme", 200, "success", 1)
    assert (request["path"], request["trace_id"]) == ("/v2/models/{model}/infer", TRACE.split("-")[1])
    assert names(found)[:3] == ["arrived", "decoded", "admitted"]
    batch = step(found, "batched")["details"]
    assert batch["rows"] == batch["requests"] >= 1
    assert {"receive", "compute", "answer"} <= {share["name"] for share in found["shares"]}
    assert found["why"].startswith(f"{found['shares'][0]['share']:.0%} of its ")


async def test_a_chat_through_the_engine(home: Home) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "a b c d"}], "stream": True}
    answer = await home.studio.post("/v1/chat/completions", body, x_request_id="chat-1")
    assert answer.status_code == 200
    found = await home.explained("chat-1")
    request = found["request"]
    assert (request["kind"], request["path"], request["tokens_out"]) == ("generate", "/v1/chat/completions", 4)
    assert request["tokens_in"] > 0 and 0 < request["first_seconds"] <= request["seconds"]
    assert {"engine", "engine queue", "prefill", "decode", "first", "ended"} <= set(names(found))
    assert step(found, "decode")["details"]["num_tokens"] == 4


async def test_a_job_its_request_and_its_webhook(home: Home) -> None:
    async with FakeReceiver([Reply(status=204)]) as receiver:
        job = await home.studio.post(
            "/v1/jobs",
            {"model": "painter", "input": {"prompt": "a seven"}, "webhook": {"url": receiver.url}},
            x_request_id="handed-in",
        )
        id = job.json()["id"]
        await home.studio.ended(id)
        await receiver.until(lambda: len(receiver.received) == 1)
    found = await home.explained(id)
    async with asyncio.timeout(SECONDS):
        while "webhook" not in names(found):
            await asyncio.sleep(0.01)
            found = await home.explained(id)
    request = found["request"]
    assert (request["protocol"], request["job"], request["id"], request["kind"]) == ("job", id, "handed-in", "paint")
    assert (request["outcome"], request["tenant"]) == ("success", "acme")
    assert {"lease", "engine", "denoise", "decode picture", "stored", "webhook"} <= set(names(found))
    assert step(found, "lease")["details"] == {"attempt": 1} and step(found, "stored")["details"]["bytes"] > 0
    assert step(found, "webhook")["details"]["status"] == 204
    assert "denoise" in {share["name"] for share in found["shares"]}
    (door,) = found["related"]
    assert (door["protocol"], door["status"], door["job"], door["path"]) == ("http", 202, id, "/v1/jobs")


@pytest.mark.parametrize(
    ("id", "body", "status", "reason"),
    [
        ("bad-json", b"{", 400, "invalid-request"),
        ("bad-shape", b'{"inputs": 7}', 400, "invalid-request"),
        ("too-large", b" " * (5 << 20), 413, "invalid-request"),
    ],
)
async def test_a_body_that_cannot_be_read(home: Home, id: str, body: bytes, status: int, reason: str) -> None:
    answer = await home.studio.post("/v2/models/identity/infer", body, x_request_id=id)
    assert answer.status_code == status
    found = await home.explained(id)
    request = found["request"]
    assert (request["status"], request["outcome"], request["reason"], request["model"]) == (status, "refused", reason, "identity")
    assert "decoded" not in names(found) and [phase["name"] for phase in request["phases"]] == ["receive"]
    assert [line["outcome"] for line in await home.studio.lines(id)] == ["refused"]


async def test_one_that_nobody_serves_one_that_may_not_and_one_that_is_nowhere(home: Home) -> None:
    for id, path, model, status, reason in (
        ("nobody", "/v2/models/nobody/infer", "nobody", 404, "not-found"),
        ("hidden", "/v2/models/secret/infer", "secret", 404, "not-found"),
        ("nowhere", "/v2/nothing/of/ours", "", 404, "not-found"),
    ):
        assert (await home.studio.post(path, ROW, x_request_id=id)).status_code == status
        request = (await home.explained(id))["request"]
        assert (request["model"], request["outcome"], request["reason"]) == (model, "refused", reason)
        assert len(await home.studio.lines(id)) == 1, "one line whatever its end"
    answer = await home.studio.http.post("/v2/models/identity/infer", content=json.dumps(ROW), headers={"x-request-id": "keyless"})
    assert answer.status_code == 401
    assert (await home.explained("keyless"))["request"]["reason"] == "unauthenticated"


@pytest.mark.parametrize("id", ["<script>alert(1)</script>", "a/b?c=d&e#f", "100%2F", "'\"`;--", "../../etc"])
async def test_odd_ids_and_names_come_out_as_they_are(home: Home, id: str) -> None:
    model = "<img src=x onerror=alert(1)>"
    answer = await home.studio.post(f"/v2/models/{quote(model, safe='')}/infer", ROW, x_request_id=id)
    assert answer.status_code == 404
    answer = await home.ops.get(f"/admin/requests/{quote(id, safe='')}")
    assert answer.headers["content-type"] == "application/json"
    request = answer.json()["request"]
    assert (request["id"], request["model"]) == (id, model)


async def test_lists_are_of_a_kind_and_a_model(home: Home) -> None:
    await home.studio.post("/v2/models/identity/infer", ROW, x_request_id="listed")
    recent = await home.list(limit=1)
    assert [each["id"] for each in recent] == ["listed"]
    assert {each["model"] for each in await home.list(model="identity")} == {"identity"}
    slow = await home.list(kind="slow")
    assert slow and [each["seconds"] for each in slow] == sorted((each["seconds"] for each in slow), reverse=True)
    assert all(each["outcome"] == "failure" for each in await home.list(kind="failed"))
    assert (await home.ops.get("/admin/requests", params={"kind": "strange"})).status_code == 400


async def test_one_that_is_not_remembered_says_how_many_are(home: Home) -> None:
    answer = await home.ops.get("/admin/requests/never-was")
    assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"
    assert "the last 2000" in answer.json()["detail"]
    assert (await home.ops.get("/admin/requests/")).status_code == 404


async def test_only_administrators_read_them(home: Home) -> None:
    for path in ("/admin/requests", "/admin/requests/row-2"):
        mine = await home.ops.get(path, headers={"authorization": f"Bearer {home.studio.key.secret}"})
        assert mine.status_code == 403


async def test_answers_are_as_the_document_says(home: Home) -> None:
    document = (await home.ops.get("/admin/openapi.json")).json()
    for path, shown in (("/admin/requests", "/admin/requests"), ("/admin/requests/{request}", "/admin/requests/row-2")):
        content = document["paths"][path]["get"]["responses"]["200"]["content"]
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        Draft202012Validator(schema).validate((await home.ops.get(shown)).json())
