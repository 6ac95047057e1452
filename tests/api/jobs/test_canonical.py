"""`/v1/jobs` over a real port: hand in, look, wait, watch, cancel; and everything that is refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator

from fairlead.core.policy import Scope
from tests.api.http_fake import Wire
from tests.api.jobs.served import Studio, in_base64, picture, studio
from tests.api.keyed import SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG: dict[str, Any] = {"model": "slow", "input": {"prompt": "a long way", "num_steps": 200, "preview_steps": 2}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    async with studio(tmp_path_factory.mktemp("jobs")) as running:
        yield running


def problem(answer: httpx2.Response) -> tuple[int, str]:
    """(status, detail) of a refusal in the shape of RFC 9457."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert body["status"] == answer.status_code and body["title"]
    return answer.status_code, body["detail"]


def fields(answer: httpx2.Response) -> list[str]:
    return [each["field"] for each in answer.json().get("errors", [])]


# Handing in


async def test_a_job_from_its_submission_to_its_picture(home: Studio) -> None:
    answer = await home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "a seven", "seed": 7}, "metadata": {"for": "me"}})
    job = answer.json()
    assert (answer.status_code, job["status"], answer.headers["location"]) == (202, "queued", f"/v1/jobs/{job['id']}")
    assert (job["model"], job["kind"], job["metadata"], job["tries"]) == ("painter", "paint", {"for": "me"}, 0)
    assert job["position"] >= 0 and job["started"] is None and job["result"] is None and job["error"] is None

    done = await home.ended(job["id"])
    assert (done["status"], done["version"], done["tries"], done["position"]) == ("complete", "1", 1, None)
    assert done["created"] <= done["started"] <= done["ended"] < done["expires"]
    assert done["usage"]["num_steps"] == 4 and done["usage"]["megapixels"] == pytest.approx(64 * 64 / 1e6)
    (made,) = done["result"]["pictures"]
    assert (made["width"], made["height"], made["seed"], made["mode"], made["content_type"]) == (64, 64, 7, "exact", "image/png")
    file = await home.http.get(made["url"])  # without a key
    assert (file.status_code, file.headers["content-type"], len(file.content)) == (200, "image/png", made["num_bytes"])
    for name, path in (("get", ""), ("cancel", "/cancel"), ("events", "/events")):
        assert done["urls"][name] == f"{home.url}/v1/jobs/{job['id']}{path}"


@pytest.mark.parametrize("prefer", ["wait", "wait=20", "respond-async, wait=20", 'Wait="20"', "wait=20;foo=1"])
async def test_prefer_wait_answers_with_the_end(home: Studio, prefer: str) -> None:
    answer = await home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "a seven"}}, prefer=prefer)
    assert (answer.status_code, answer.json()["status"]) == (200, "complete")
    assert answer.headers["preference-applied"] == ("wait=60" if prefer == "wait" else "wait=20")


async def test_prefer_wait_has_an_end_and_the_job_goes_on(home: Studio) -> None:
    answer = await home.post("/v1/jobs", LONG, prefer="wait=0.05")
    job = answer.json()
    assert (answer.status_code, job["ended"]) == (202, None)
    assert (await home.post(f"/v1/jobs/{job['id']}/cancel")).status_code == 200


async def test_several_prefer_headers_are_one(home: Studio) -> None:
    headers = [("authorization", f"Bearer {home.key.secret}"), ("prefer", "handling=strict"), ("prefer", "wait=20")]
    body = json.dumps({"model": "painter", "input": {"prompt": "x"}}).encode()
    assert (await home.http.post("/v1/jobs", content=body, headers=headers)).status_code == 200


@pytest.mark.parametrize("prefer", ["wait=soon", "wait=-1", "wait=nan", "wait=1e9", "wait="])
async def test_a_wait_that_is_no_number_is_refused_before_a_job_is_made(home: Studio, prefer: str) -> None:
    before = await home.latest()
    answer = await home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "x"}}, prefer=prefer)
    if prefer == "wait=":
        assert answer.status_code == 200  # RFC 7240: an empty value is none
        return
    assert problem(answer) == (400, "`Prefer: wait=` takes a number of seconds")
    assert await home.latest() == before


async def test_the_same_idempotency_key_gives_the_same_job(home: Studio) -> None:
    body = {"model": "painter", "input": {"prompt": "once"}}
    first = await home.post("/v1/jobs", body, idempotency_key="k-1")
    again = await home.post("/v1/jobs", body, idempotency_key="k-1", prefer="wait=20")
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
    assert (again.status_code, again.json()["status"]) == (200, "complete")

    other = await home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "twice"}}, idempotency_key="k-1")
    assert problem(other)[0] == 422
    for change in ({"metadata": {"a": "b"}}, {"total_seconds": 5}, {"retention_seconds": 5}):
        assert problem(await home.post("/v1/jobs", body | change, idempotency_key="k-1"))[0] == 422
    theirs = await home.post("/v1/jobs", body, idempotency_key="k-1", key=home.other)
    assert theirs.status_code == 202 and theirs.json()["id"] != first.json()["id"]


@pytest.mark.parametrize("key", ["x" * 256, "a\x01b", "tab\tin it"])
async def test_an_idempotency_key_that_cannot_be_kept_is_refused(home: Studio, key: str) -> None:
    async with asyncio.timeout(SECONDS):
        connection = Wire(*await asyncio.open_connection("127.0.0.1", home.port))
        body = json.dumps({"model": "painter", "input": {"prompt": "x"}}).encode()
        head = f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {home.key.secret}\r\nidempotency-key: {key}\r\n"
        await connection.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status, headers, answer = await connection.receive()
        await connection.close()
    assert (status, headers["content-type"]) == (400, "application/problem+json")
    if "\x01" not in key:  # which the parser of HTTP takes for no header at all
        assert "`Idempotency-Key` may have 255 printable characters" in answer.decode()


# Other models


async def test_a_language_model_an_embedding_and_tensors(home: Studio) -> None:
    chat = {"model": "chat", "input": {"messages": [{"role": "user", "content": "two words"}], "max_tokens": 8}}
    answer = (await home.post("/v1/jobs", chat, prefer="wait=20")).json()
    assert (answer["kind"], answer["result"]["choices"][0]["text"]) == ("generate", "two words")
    assert answer["usage"]["completion_tokens"] == 2
    answer = (await home.post("/v1/jobs", {"model": "chat@1", "input": {"prompt": "two words"}}, prefer="wait=20")).json()
    assert answer["result"]["choices"][0]["finish_reason"] in ("stop", "length")
    answer = (await home.post("/v1/jobs", {"model": "chat", "input": {"input": "two words"}}, prefer="wait=20")).json()
    assert (answer["kind"], answer["status"]) == ("embed", "complete")
    assert answer["result"]["choices"][0]["embedding"]
    tensors = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["loud"]}]}
    answer = (await home.post("/v1/jobs", {"model": "shout", "input": tensors}, prefer="wait=20")).json()
    assert answer["result"]["outputs"] == [{"name": "loud", "datatype": "BYTES", "shape": [1, 1], "data": ["LOUD"]}]


# Lists


async def test_the_list_is_read_page_by_page_and_filtered(home: Studio) -> None:
    made = [(await home.submit(input={"prompt": f"page {n}"}))["id"] for n in range(5)]
    for job in made:
        await home.ended(job)
    found: list[str] = []
    path = "/v1/jobs?limit=2&model=painter"
    while len(found) < 5:
        page = (await home.get(path)).json()
        found += [job["id"] for job in page["jobs"]]
        path = f"/v1/jobs?limit=2&model=painter&before={page['next']}"
    assert found[:5] == made[::-1]
    complete = (await home.get("/v1/jobs?status=complete&limit=200")).json()["jobs"]
    assert {job["status"] for job in complete} == {"complete"} and set(made) <= {job["id"] for job in complete}
    assert all(job["result"] is None for job in complete)  # read the job itself
    assert (await home.get("/v1/jobs?status=queued,active&model=shout")).json() == {"jobs": [], "next": None}
    assert (await home.get("/v1/jobs?model=nobody")).json()["jobs"] == []


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", "`limit`"),
        ("limit=201", "`limit`"),
        ("limit=-1", "`limit`"),
        ("limit=ten", "`limit`"),
        ("limit=1000000000000000000000", "`limit`"),
        ("status=done", "`status`"),
        ("status=", "`status`"),
        ("before=yesterday", "`before`"),
        ("before=%00", "`before`"),
        ("before=job_", "`before`"),
        ("tenant=other", "'tenant'"),
    ],
)
async def test_a_list_that_cannot_be_read_is_refused(home: Studio, query: str, named: str) -> None:
    status, detail = problem(await home.get(f"/v1/jobs?{query}"))
    assert status == 400 and detail.startswith(named)


# Watching


async def events_of(home: Studio, job: str) -> list[tuple[str, dict[str, Any]]]:
    answer = await home.get(f"/v1/jobs/{job}/events")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = []
    for event in answer.text.strip().split("\n\n"):
        kind, data = event.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_events_tell_of_each_change_until_the_end(home: Studio) -> None:
    job = await home.submit(model="slow", input={"prompt": "x", "num_steps": 40, "preview_steps": 1})
    events = await events_of(home, job["id"])
    assert events[-1][0] == "complete" and events[-1][1]["result"]["pictures"]
    assert all(kind == data["status"] for kind, data in events)
    steps = [data["progress"]["step"] for kind, data in events if kind == "active" and data["progress"]]
    assert steps == sorted(steps) and set(steps) - {0, 40}
    assert all(one != other for one, other in pairwise(events))
    previews = [data["progress"]["preview"] for _, data in events if data["progress"] and data["progress"].get("preview")]
    assert previews and previews[0].startswith("data:image/jpeg;base64,")
    assert [kind for kind, _ in await events_of(home, job["id"])] == ["complete"]


async def test_whoever_watches_may_leave_and_the_job_goes_on(home: Studio) -> None:
    job = await home.submit(model="slow", input={"prompt": "x", "num_steps": 10})
    headers = {"authorization": f"Bearer {home.key.secret}", "x-request-id": "watcher-who-leaves"}
    async with home.http.stream("GET", f"/v1/jobs/{job['id']}/events", headers=headers) as answer:
        async for _ in answer.aiter_lines():
            break
    (line,) = await home.lines("watcher-who-leaves")
    assert (line["status"], line["error"]) == (499, "the client left")
    assert (await home.ended(job["id"]))["status"] == "complete"
    assert len(await home.lines("watcher-who-leaves")) == 1


async def test_whoever_waits_may_leave_and_the_job_goes_on(home: Studio) -> None:
    body = json.dumps({"model": "slow", "input": {"prompt": "left alone", "num_steps": 10}}).encode()
    connection = Wire(*await asyncio.open_connection("127.0.0.1", home.port))
    head = f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {home.key.secret}\r\nprefer: wait=30\r\nx-request-id: waiter-who-leaves\r\n"
    await connection.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    job = await home.newest(model="slow")
    await connection.close()
    (line,) = await home.lines("waiter-who-leaves")
    assert (line["status"], line["model"], line["error"]) == (499, "slow", "the client left")
    assert (await home.ended(job["id"]))["status"] == "complete"


# Cancelling


async def test_a_job_is_cancelled_while_it_runs_while_it_waits_and_after(home: Studio) -> None:
    running = await home.submit(**LONG)
    await home.until(running["id"], "active")
    answer = await home.post(f"/v1/jobs/{running['id']}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "aborting")
    ended = await home.ended(running["id"])
    assert (ended["status"], ended["error"]["reason"], ended["error"]["retryable"]) == ("aborted", "cancelled", False)
    assert ended["result"] is None

    answer = await home.post(f"/v1/jobs/{running['id']}/cancel")
    assert (answer.status_code, answer.json()) == (200, ended)
    done = await home.ended((await home.submit())["id"])
    answer = await home.post(f"/v1/jobs/{done['id']}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "complete")


async def test_a_start_deadline(home: Studio) -> None:
    ahead = [await home.submit(**LONG) for _ in range(24)]  # as many as run at once of a tenant
    late = await home.submit(start_seconds=0.2)
    ended = await home.ended(late["id"])
    assert (ended["status"], ended["error"]["reason"], ended["error"]["retryable"], ended["tries"]) == ("aborted", "expired", True, 0)
    for job in ahead:
        await home.post(f"/v1/jobs/{job['id']}/cancel")
    slow = await home.submit(**LONG, total_seconds=0.5)
    ended = await home.ended(slow["id"])
    assert (ended["status"], ended["error"]["reason"]) == ("failed", "timeout")


# Others


async def test_another_tenants_job_is_not_there(home: Studio) -> None:
    job = (await home.ended((await home.submit())["id"]))["id"]
    nobodys = "job_" + "0" * 32
    for method, path in (
        ("GET", "/v1/jobs/{}"),
        ("GET", "/v1/jobs/{}/events"),
        ("POST", "/v1/jobs/{}/cancel"),
        ("GET", "/v1/jobs/{}/deliveries"),
        ("GET", "/v1/predictions/{}"),
        ("POST", "/v1/predictions/{}/cancel"),
        ("GET", "/v1/get_result?id={}"),
    ):
        theirs = await home.ask(method, path.format(job), key=home.other)
        unknown = await home.ask(method, path.format(nobodys), key=home.other)
        assert theirs.status_code == unknown.status_code == 404, path
        assert theirs.text.replace(job, nobodys) == unknown.text
    assert job not in (await home.get("/v1/jobs?limit=200", key=home.other)).text
    assert job not in (await home.get("/v1/predictions", key=home.other)).text
    assert (await home.get(f"/v1/jobs/{job}")).json()["status"] == "complete"


@pytest.mark.parametrize("job", ["nothing", "job_1", "%00", "job_%00", "x" * 5000, "%FF%FE", "../../etc/passwd"])
async def test_what_is_no_id_is_no_job(home: Studio, job: str) -> None:
    for method, path in (("GET", f"/v1/jobs/{job}"), ("POST", f"/v1/jobs/{job}/cancel"), ("GET", f"/v1/jobs/{job}/events")):
        assert (await home.ask(method, path)).status_code == 404, path


async def test_a_model_that_the_caller_may_not_use_is_as_one_that_is_not_there(home: Studio) -> None:
    hidden = await home.post("/v1/jobs", {"model": "secret", "input": {"prompt": "x"}})
    unknown = await home.post("/v1/jobs", {"model": "nobody", "input": {"prompt": "x"}})
    assert problem(hidden)[0] == problem(unknown)[0] == 404
    assert hidden.text.replace("secret", "nobody") == unknown.text
    assert (await home.post("/v1/jobs", {"model": "painter@9", "input": {"prompt": "x"}})).status_code == 404


async def test_who_asks_must_say_who_and_may(home: Studio) -> None:
    assert problem(await home.http.post("/v1/jobs", content=b"{}"))[0] == 401
    reader = home.new_key(Scope.ADMIN)
    answer = await home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "x"}}, key=reader, x_request_id="no-scope")
    assert problem(answer)[0] == 403
    (line,) = await home.lines("no-scope")
    assert line["status"] == 403


# What is wrong with a body


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": {"prompt": "x"}}, "model"),
        ({"model": "painter"}, "input"),
        ({"model": 5, "input": {}}, "model"),
        ({"model": "painter", "input": "x"}, "input"),
        ({"model": "painter", "input": {}}, "input.prompt"),
        ({"model": "painter", "input": {"prompt": 5}}, "input.prompt"),
        ({"model": "painter", "input": {"prompt": "x", "colour": "red"}}, "input.colour"),
        ({"model": "painter", "input": {"prompt": "x", "model": "secret"}}, "input.model"),
        ({"model": "painter", "input": {"prompt": "x"}, "speed": 1}, "speed"),
        ({"model": "painter", "input": {"prompt": "x", "width": 65}}, "input.width"),
        ({"model": "painter", "input": {"prompt": "x", "height": 4}}, "input.height"),
        ({"model": "painter", "input": {"prompt": "x", "width": 0}}, "input.width"),
        ({"model": "painter", "input": {"prompt": "x", "width": -64}}, "input.width"),
        ({"model": "painter", "input": {"prompt": "x", "width": 4096, "height": 4096}}, "input.width"),
        ({"model": "painter", "input": {"prompt": "x", "width": 64.5}}, "input.width"),
        ({"model": "painter", "input": {"prompt": "x", "n": 17}}, "input.n"),
        ({"model": "painter", "input": {"prompt": "x", "num_steps": 51}}, "input.num_steps"),
        ({"model": "painter", "input": {"prompt": "x", "num_steps": 0}}, "input.num_steps"),
        ({"model": "painter", "input": {"prompt": "x", "seed": -1}}, "input.seed"),
        ({"model": "painter", "input": {"prompt": "x", "seed": 1 << 64}}, "input.seed"),
        ({"model": "painter", "input": {"prompt": "x", "guidance": 1000}}, "input.guidance"),
        ({"model": "painter", "input": {"prompt": "x", "scheduler": "magic"}}, "input.scheduler"),
        ({"model": "painter", "input": {"prompt": "x", "mode": "balanced"}}, "input.mode"),
        ({"model": "painter", "input": {"prompt": "x", "mode": "fast"}}, "input.mode"),
        ({"model": "painter", "input": {"prompt": "x", "format": "gif"}}, "input.format"),
        ({"model": "painter", "input": {"prompt": "x", "quality": 0}}, "input.quality"),
        ({"model": "painter", "input": {"prompt": "x", "loras": [{"name": "nobody"}]}}, "input.loras"),
        ({"model": "painter", "input": {"prompt": "x", "loras": [{"name": "ink", "scale": 9}]}}, "input.loras[0].scale"),
        ({"model": "painter", "input": {"prompt": "x" * 32_001}}, "input.prompt"),
        ({"model": "painter", "input": {"prompt": "x", "strength": 0.5}}, "input.strength"),
        ({"model": "painter", "input": {"prompt": "x", "mask": in_base64(picture())}}, "input.mask"),
        ({"model": "painter", "input": {"prompt": "x", "image": "no base64!"}}, "input.image"),
        ({"model": "painter", "input": {"prompt": "x", "image": "https://example.com/a.png"}}, "input.image"),
        ({"model": "painter", "input": {"prompt": "x", "image": "data:text/html;base64,PGI+"}}, "input.image"),
        ({"model": "painter", "input": {"prompt": "x", "image": "data:image/png,plain"}}, "input.image"),
        ({"model": "painter", "input": {"prompt": "x", "image": in_base64(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}}, "input.image"),
        ({"model": "painter", "input": {"prompt": "x", "image": in_base64(picture()[:-20])}}, "input.image"),
        ({"model": "painter", "input": {"prompt": "x", "image": in_base64(picture() + b"PK\x03\x04")}}, "input.image"),
        ({"model": "painter", "input": {"prompt": "x"}, "metadata": {"a": 5}}, "metadata[...]"),
        ({"model": "painter", "input": {"prompt": "x"}, "metadata": {"a": "x" * 513}}, "metadata[...]"),
        ({"model": "painter", "input": {"prompt": "x"}, "metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"model": "painter", "input": {"prompt": "x"}, "start_seconds": 0}, "start_seconds"),
        ({"model": "painter", "input": {"prompt": "x"}, "total_seconds": "5"}, "total_seconds"),
        ({"model": "painter", "input": {"prompt": "x"}, "webhook": "http://example.com"}, "webhook"),
        ({"model": "painter", "input": {"prompt": "x"}, "webhook": {"url": "http://127.0.0.2:9999/"}}, "webhook.url"),
        ({"model": "painter", "input": {"prompt": "x"}, "webhook": {"url": "http://169.254.169.254/latest"}}, "webhook.url"),
        ({"model": "painter", "input": {"prompt": "x"}, "webhook": {"url": "http://[::1]:9999/"}}, "webhook.url"),
        ({"model": "painter", "input": {"prompt": "x"}, "webhook": {"url": "file:///etc/passwd"}}, "webhook.url"),
        ({"model": "painter", "input": {"prompt": "x"}, "webhook": {"url": "http://a.example/", "events": ["done"]}}, "webhook.events[0]"),
        ({"model": "chat", "input": {}}, "input"),
        ({"model": "chat", "input": {"messages": [{"role": "user", "content": "x"}], "stream": True}}, "input.stream"),
        ({"model": "chat", "input": {"messages": [{"role": "user", "content": "x"}], "logprobs": True}}, "input.logprobs"),
        ({"model": "chat", "input": {"prompt": ["a", "b"]}}, "input.prompt"),
        ({"model": "chat", "input": {"prompt": "a", "echo": True}}, "input.echo"),
        ({"model": "chat", "input": {"input": "a", "encoding_format": "base64"}}, "input.encoding_format"),
        ({"model": "count", "input": {"inputs": [{"name": "n", "datatype": "INT32", "shape": [1], "data": [2]}]}}, "model"),
    ],
)
async def test_a_body_that_is_wrong_is_refused_by_name_and_makes_no_job(home: Studio, body: dict[str, Any], field: str) -> None:
    before = await home.latest()
    answer = await home.post("/v1/jobs", body)
    status, detail = problem(answer)
    assert status in (400, 413, 501), detail
    assert fields(answer) == [field], detail
    assert detail.startswith(f"`{field}`")
    assert await home.latest() == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"nothing", 400),
        (b'{"model": "painter", "input": {"prompt": "x"}', 400),
        (b'{"model": "painter", "input": {"prompt": "\xff"}}', 400),
        (b'{"model": "painter", "input": {"prompt": "\\ud800"}}', 400),
        (b'{"model": "painter", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"model": "painter", "input": {"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}}", 400),
        (b'{"model": "painter", "input": {"prompt": "' + b"x" * (5 << 20) + b'"}}', 413),
    ],
)
async def test_a_body_that_is_no_body(home: Studio, body: bytes, status: int) -> None:
    assert problem(await home.post("/v1/jobs", body))[0] == status


async def test_a_picture_of_a_thousand_megapixels_is_not_decoded(home: Studio) -> None:
    bomb = bytearray(picture(8, 8))
    bomb[16:24] = (65_000).to_bytes(4) + (65_000).to_bytes(4)
    answer = await home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "x", "image": in_base64(bytes(bomb))}})
    assert problem(answer)[0] == 413 and "65000x65000 pixels" in answer.text


async def test_a_picture_whose_inside_is_rotten_fails_its_job_only(home: Studio) -> None:
    rotten = picture(64, 64).replace(b"IDAT", b"IDAT", 1)
    at = rotten.index(b"IDAT") + 6
    body = {"prompt": "x", "image": in_base64(rotten[:at] + b"\0\0\0\0" + rotten[at + 4 :])}
    ended = await home.ended((await home.submit(input=body))["id"])
    assert (ended["status"], ended["error"]["reason"]) == ("failed", "invalid")
    assert "`image` cannot be decoded" in ended["error"]["message"]


async def test_each_end_is_one_line_of_the_access_log(home: Studio) -> None:
    for id, status, call in (
        ("one-good", 202, home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "x"}}, x_request_id="one-good")),
        ("one-bad", 400, home.post("/v1/jobs", {"model": "painter", "input": {}}, x_request_id="one-bad")),
        ("one-lost", 404, home.get("/v1/jobs/nothing", x_request_id="one-lost")),
        ("one-unseen", 404, home.get("/v1/jobs/nothing/events", x_request_id="one-unseen")),
    ):
        answer = await call
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, id)
        assert [line["status"] for line in await home.lines(id)] == [status]


async def test_a_url_that_is_none_of_ours(home: Studio) -> None:
    for method, path in (("DELETE", "/v1/jobs"), ("PUT", "/v1/jobs/job_1")):
        answer = await home.ask(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (405, "application/problem+json")


async def test_what_is_answered_is_as_the_document_says(home: Studio) -> None:
    document = (await home.get("/openapi.json")).json()

    def check(path: str, method: str, status: str, found: Any) -> None:
        content = document["paths"][path][method]["responses"][status]["content"]
        Draft202012Validator({**content["application/json"]["schema"], "components": document["components"]}).validate(found)

    done = await home.ended((await home.submit(input={"prompt": "x", "preview_steps": 1}))["id"])
    check("/v1/jobs/{job}", "get", "200", done)
    check("/v1/jobs", "post", "202", await home.submit())
    check("/v1/jobs", "get", "200", (await home.get("/v1/jobs")).json())
    check("/v1/get_result", "get", "200", (await home.get(f"/v1/get_result?id={done['id']}")).json())
    check("/v1/predictions/{prediction}", "get", "200", (await home.get(f"/v1/predictions/{done['id']}")).json())
    check("/v1/images/models", "get", "200", (await home.get("/v1/images/models")).json())
    check("/v1/models/{owner}/{model}", "get", "200", (await home.get("/v1/models/fairlead/painter")).json())
