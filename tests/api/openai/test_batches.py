"""Batches by OpenAI's own SDK: a file of requests in, files of answers out, whatever happens to the servers meanwhile."""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio
from starlette.responses import Response as HttpResponse

from fairlead.api.doorkeeper import CALLER
from fairlead.api.openai import batch_runner
from fairlead.api.openai.batch_objects import MAX_LINE_BYTES, checked_line, decoded, encode
from fairlead.api.openai.batch_runner import BatchRunner
from fairlead.core.caller import Caller
from fairlead.core.errors import InvalidRequest, LimitExceeded, Unauthenticated
from fairlead.core.policy import BatchSettings
from fairlead.observe.counts import Counts
from fairlead.store.batches import BatchRow
from tests.api.openai.responses_served import SECONDS, Keeping, client_of, keeping

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENDED = ("completed", "failed", "expired", "cancelled")


class Identity:
    """Who handed in a batch, as long as it may."""

    def __init__(self) -> None:
        self.revoked = False
        self.asked: list[BatchRow] = []

    def __call__(self, row: BatchRow) -> Caller:
        self.asked.append(row)
        if self.revoked:
            raise Unauthenticated("the key was revoked")
        return Caller(tenant=row.tenant)


class Desk:
    """A server that takes batches, and the client of one tenant."""

    def __init__(self, place: Keeping, client: openai.AsyncOpenAI, runner: BatchRunner, identity: Identity) -> None:
        self.place, self.client, self.runner, self.identity = place, client, runner, identity

    async def upload(self, *lines: Any) -> str:
        data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
        return (await self.client.files.create(file=("in.jsonl", data), purpose="batch")).id

    async def hand_in(self, *lines: Any, endpoint: str = "/v1/chat/completions") -> Any:
        file = await self.upload(*lines)
        return await self.client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h")

    async def ended(self, id: str, runner: BatchRunner | None = None) -> Any:
        """Once it has: the test runs the runner."""
        async with asyncio.timeout(SECONDS):
            while (batch := await self.client.batches.retrieve(id)).status not in ENDED:
                await (runner or self.runner).once()
                await asyncio.sleep(0.01)
        return batch

    async def until(self, id: str, num_done: int, runner: BatchRunner) -> None:
        async with asyncio.timeout(SECONDS):
            while len(await asyncio.to_thread(self.place.store.batches.done, id)) < num_done:
                await runner.once()
                await asyncio.sleep(0.01)

    async def lines(self, file: str | None) -> list[Any]:
        assert file is not None
        content = await self.client.files.content(file)
        return [json.loads(line) for line in content.text.splitlines()]


def chat(id: str, text: str, **more: Any) -> dict[str, Any]:
    body = {"model": "talker", "messages": [{"role": "user", "content": text}], **more}
    return {"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    specs = {"talker": "llm: {max_model_len: 64}", "slow": "parameters: {step_seconds: 0.005, max_model_len: 100000}"}
    async with keeping(folder / "models", f"sqlite:///{folder}/fairlead.db", **specs) as running:
        yield running


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(batch_runner, "FLUSH_SECONDS", 0.02)


async def desk_of(place: Keeping, tenant: str, **settings: Any) -> Any:
    identity = Identity()
    url, runner = await place.add_batches(BatchSettings(**settings), identity)
    return client_of(url, tenant), runner, identity


@pytest_asyncio.fixture(loop_scope="module")
async def desk(place, request):
    manager, runner, identity = await desk_of(place, request.node.name)
    async with manager as client:
        yield Desk(place, client, runner, identity)
    await runner.stop(SECONDS)


async def test_a_batch_of_chats(desk):
    batch = await desk.hand_in(*(chat(f"line-{n}", f"number {n}") for n in range(40)), chat("wrong", "x", temperature=9))
    assert (batch.status, batch.object, batch.completion_window) == ("validating", "batch", "24h")
    done = await desk.ended(batch.id)
    counts = done.request_counts
    assert (done.status, counts.total, counts.completed, counts.failed, done.model) == ("completed", 41, 40, 1, "talker")
    answers = await desk.lines(done.output_file_id)
    assert [line["custom_id"] for line in answers] == [f"line-{n}" for n in range(40)]
    assert [line["response"]["body"]["choices"][0]["message"]["content"] for line in answers] == [f"number {n}" for n in range(40)]
    assert {line["response"]["status_code"] for line in answers} == {200}
    (wrong,) = await desk.lines(done.error_file_id)
    assert (wrong["custom_id"], wrong["response"]["status_code"], wrong["response"]["body"]["error"]["param"]) == (
        "wrong",
        400,
        "temperature",
    )
    assert (done.usage.output_tokens, done.usage.total_tokens) == (80, 80 + done.usage.input_tokens)


@pytest.mark.parametrize(
    ("endpoint", "body", "kind"),
    [
        ("/v1/completions", {"model": "talker", "prompt": "to be"}, "text_completion"),
        ("/v1/embeddings", {"model": "talker", "input": "to be"}, "list"),
        ("/v1/responses", {"model": "talker", "input": "to be"}, "response"),
    ],
)
async def test_other_endpoints(desk, endpoint, body, kind):
    batch = await desk.hand_in({"custom_id": "a", "method": "POST", "url": endpoint, "body": body}, endpoint=endpoint)
    done = await desk.ended(batch.id)
    (line,) = await desk.lines(done.output_file_id)
    assert line["response"]["body"]["object"] == kind
    assert (done.error_file_id, done.usage.input_tokens) == (None, line["response"]["body"]["usage"].get("input_tokens", 2))


async def test_lines_are_asked_in_the_class_of_batches_and_in_their_callers_name(desk):
    batch = await desk.hand_in(chat("a", "x"))
    await desk.ended(batch.id)
    (row,) = desk.identity.asked
    caller = desk.runner._caller(row)
    assert (row.tenant, caller.tenant, caller.qos_class) == (row.tenant, row.tenant, "batch")


@pytest.mark.parametrize(
    ("lines", "said", "number"),
    [
        ([b"nonsense"], "is no request", 1),
        ([chat("a", "x"), b"", chat("a", "y")], "not the only one", 3),
        ([{**chat("a", "x"), "url": "/v1/embeddings"}], "endpoint", 1),
        ([{**chat("a", "x"), "method": "GET"}], "is no request", 1),
        ([{**chat("a", "x"), "more": 1}], "unknown field", 1),
        ([{**chat("", "x")}], "custom_id", 1),
        ([chat("a", "x", stream=True)], "body.stream", 1),
        ([b"[" * 5000], "is no request", 1),
        ([b"\xff"], "is no request", 1),
        ([b"", b"  "], "no lines", None),
    ],
)
async def test_a_file_that_cannot_be_asked(desk, lines, said, number):
    batch = await desk.ended((await desk.hand_in(*lines)).id)
    assert batch.status == "failed" and said in batch.errors.data[0].message and batch.errors.data[0].line == number
    assert (batch.output_file_id, batch.request_counts.completed) == (None, 0)


async def test_a_model_whose_name_is_none(desk):
    batch = await desk.ended((await desk.hand_in(chat("a", "x", model=5), chat("b", "x"))).id)
    assert (batch.status, batch.model, batch.request_counts.completed, batch.request_counts.failed) == ("completed", "talker", 1, 1)


async def test_a_file_that_was_being_read_when_its_server_stopped_is_read_anew(desk):
    batch = await desk.hand_in(chat("a", "x"), chat("b", "y"))
    store, runner = desk.place.store.batches, desk.runner
    (row,) = store.lease("another", 9, now=time.time(), lease_until=time.time() + SECONDS)
    half = decoded(row.body)
    half.request_counts.total = 1
    assert store.put(row.id, "another", encode(half))
    store.release("another")
    done = await desk.ended(batch.id, runner)
    assert (done.status, done.request_counts.total) == ("completed", 2)


async def test_a_line_that_is_too_long_is_not_read():
    with pytest.raises(InvalidRequest, match="more than"):
        checked_line(b"[" * (MAX_LINE_BYTES + 1), "/v1/chat/completions")


async def test_too_many_lines(place):
    manager, runner, identity = await desk_of(place, "many", max_lines=2)
    async with manager as client:
        desk = Desk(place, client, runner, identity)
        batch = await desk.ended((await desk.hand_in(*(chat(str(n), "x") for n in range(3)))).id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "too_many_lines")


def stuck_after(runner: BatchRunner, num_lines: int) -> None:
    """Its doors answer so many, and then nobody."""
    doors = dict(runner.doors)
    left = [None] * num_lines

    async def serve(http: Any) -> Any:
        if not left:
            await asyncio.Event().wait()
        left.pop()
        return await doors["/v1/chat/completions"](http)

    runner.doors = {**doors, "/v1/chat/completions": serve}


async def test_what_was_answered_before_a_crash_is_not_asked_again(place):
    manager, first, identity = await desk_of(place, "crash", max_lines_active=2, lease_seconds=1.0)
    _, second, again = await desk_of(place, "crash", max_lines_active=2)
    stuck_after(first, 3)
    async with manager as client:
        desk = Desk(place, client, first, identity)
        batch = await desk.hand_in(*(chat(str(n), f"number {n}") for n in range(10)))
        await desk.until(batch.id, 3, first)
        for run in first._runs.values():  # as if it had died: nothing more is written, and its lease is not renewed
            run.lost = True
        for task in first._tasks:
            task.cancel()
        done = await desk.ended(batch.id, second)
        assert (done.status, done.request_counts.completed, len(again.asked)) == ("completed", 10, 7)
        assert [line["custom_id"] for line in await desk.lines(done.output_file_id)] == [str(n) for n in range(10)]
        assert done.usage.output_tokens == 20
        await second.stop(SECONDS)


async def test_a_server_that_stops_hands_its_batches_over_at_once(place):
    manager, first, identity = await desk_of(place, "handed", max_lines_active=2, lease_seconds=1000.0)
    _, second, again = await desk_of(place, "handed")
    stuck_after(first, 1)
    async with manager as client:
        desk = Desk(place, client, first, identity)
        batch = await desk.hand_in(*(chat(str(n), "x") for n in range(5)))
        await desk.until(batch.id, 1, first)
        await first.stop(SECONDS)
        done = await desk.ended(batch.id, second)
        assert (done.status, done.request_counts.completed, len(again.asked)) == ("completed", 5, 4)
        await second.stop(SECONDS)


async def test_a_line_that_finds_no_room_is_asked_again(desk):
    doors, refusals = dict(desk.runner.doors), [429, 503]

    async def serve(http: Any) -> Any:
        if refusals:
            return HttpResponse(status_code=refusals.pop(), headers={"retry-after": "0"})
        return await doors["/v1/chat/completions"](http)

    desk.runner.doors = {**doors, "/v1/chat/completions": serve}
    done = await desk.ended((await desk.hand_in(chat("a", "x"))).id)
    assert (done.status, done.request_counts.completed, refusals) == ("completed", 1, [])


async def test_a_cancelled_batch_keeps_what_was_answered(desk):
    lines = [chat("quick", "x"), *(chat(str(n), "!forever on", model="slow") for n in range(3))]
    batch = await desk.hand_in(*lines)
    await desk.until(batch.id, 1, desk.runner)
    assert (await desk.client.batches.cancel(batch.id)).status == "cancelling"
    done = await desk.ended(batch.id)
    assert (done.status, done.request_counts.completed, done.cancelled_at is not None) == ("cancelled", 1, True)
    assert [line["custom_id"] for line in await desk.lines(done.output_file_id)] == ["quick"]
    assert (await desk.client.batches.cancel(batch.id)).status == "cancelled"


async def test_a_batch_that_is_late_has_expired(place):
    manager, runner, identity = await desk_of(place, "late", window_seconds=3.0)
    async with manager as client:
        desk = Desk(place, client, runner, identity)
        batch = await desk.hand_in(chat("quick", "x"), chat("never", "!forever on", model="slow"))
        done = await desk.ended(batch.id)
        assert (done.status, done.request_counts.failed) == ("expired", 2 - done.request_counts.completed)
        (*_, never) = await desk.lines(done.error_file_id)
        assert (never["custom_id"], never["error"]["code"], never["response"]) == ("never", "batch_expired", None)


async def test_a_runner_ends_when_it_is_cancelled_in_the_moment_in_which_a_batch_comes(monkeypatch):
    looked = asyncio.Event()

    async def once(runner: BatchRunner) -> None:
        looked.set()

    monkeypatch.setattr(BatchRunner, "once", once)
    runner = BatchRunner(None, BatchSettings(), {}, lambda row: None, tuple, lambda model: False, Counts())
    task = asyncio.create_task(runner.run())
    await looked.wait()
    await asyncio.sleep(0)  # now it waits
    runner.look()
    task.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_key_that_was_revoked_asks_nothing_more(desk):
    batch = await desk.hand_in(chat("a", "x"))
    desk.identity.revoked = True
    done = await desk.ended(batch.id)
    assert (done.status, done.errors.data[0].message) == ("failed", "the key was revoked")


async def test_an_input_that_was_deleted(desk):
    batch = await desk.hand_in(chat("a", "x"))
    await desk.client.files.delete(batch.input_file_id)
    assert (await desk.ended(batch.id)).status == "failed"


# Signed requests


async def test_a_model_that_takes_signed_requests_alone(desk):
    sealed = [chat("a", "x"), chat("b", "x", model="sealed")]
    batch = await desk.ended((await desk.hand_in(*sealed)).id)
    (error,) = batch.errors.data
    assert (batch.status, error.code, error.line, error.param) == ("failed", "signature_required", 2, "model")
    assert "'sealed'" in error.message and batch.request_counts.completed == 0


@pytest.mark.parametrize("signed", ["upload", "wish", "both"])
async def test_lines_are_signed_where_their_file_and_their_batch_were(desk, signed):
    async def serve(http: Any) -> Any:
        seen.append(http.scope[CALLER][1])
        return HttpResponse(b"{}")

    seen: list[str] = []
    desk.runner.doors = {"/v1/chat/completions": serve}
    by = {"x-signed-by": "k1"}
    data = json.dumps(chat("a", "x", model="sealed")).encode()
    file = await desk.client.files.create(file=("in.jsonl", data), purpose="batch", extra_headers=by if signed != "wish" else {})
    wish = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = await desk.client.batches.create(**wish, extra_headers=by if signed != "upload" else {})
    done = await desk.ended(batch.id)
    assert (done.status, seen) == (("completed", ["k1"]) if signed == "both" else ("failed", []))


# Files and bounds


async def test_files_that_a_batch_makes_are_kept_as_long_as_it_says(desk):
    file = await desk.upload(chat("a", "x"), chat("b", "x", temperature=9))
    batch = await desk.client.batches.create(
        input_file_id=file,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    done = await desk.ended(batch.id)
    for made in (done.output_file_id, done.error_file_id):
        found = await desk.client.files.retrieve(made)
        assert found.expires_at - found.created_at == 3600


async def test_every_request_for_files_and_batches_is_counted_before_its_body_is_read(place):
    asked: list[str] = []

    @asynccontextmanager
    async def count(caller: Caller) -> Any:
        asked.append(caller.tenant)
        if len(asked) == 4:
            raise LimitExceeded("the key's limit of 3 requests per minute is reached", reason="limit-requests", retry_after=7.0)
        yield {"x-ratelimit-remaining-requests": str(3 - len(asked))}

    identity = Identity()
    url, runner = await place.add_batches(BatchSettings(), identity, count)
    async with client_of(url, "counted") as client:
        desk = Desk(place, client, runner, identity)
        batch = await desk.hand_in(chat("a", "x"))
        raw = await client.batches.with_raw_response.retrieve(batch.id)
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError, match="3 requests per minute") as error:
            await client.files.create(file=("in.jsonl", b"x" * (4 << 20)), purpose="batch")
        assert (error.value.response.headers["retry-after"], asked) == ("7", ["counted"] * 4)
        assert (await desk.ended(batch.id)).status == "completed"


async def test_batches_and_their_lines_are_counted(desk):
    doors, busy = dict(desk.runner.doors), [503]

    async def serve(http: Any) -> Any:
        return HttpResponse(status_code=busy.pop(), headers={"retry-after": "0"}) if busy else await doors["/v1/chat/completions"](http)

    desk.runner.doors = {**doors, "/v1/chat/completions": serve}
    await desk.ended((await desk.hand_in(chat("a", "x"), chat("b", "x", temperature=9))).id)
    counts = {(labels[0], number) for name, labels, number in desk.runner.counts.samples() if name == "fairlead_api_batch_lines_total"}
    assert counts == {("answered", 1), ("refused", 1), ("postponed", 1)}
    assert desk.runner.counts.get("fairlead_api_batches_total", "completed") == 1


async def test_files(desk):
    text = "größer\n" * 300_000  # of several parts
    file = await desk.client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(text.encode()), "batch")
    assert (await desk.client.files.content(file.id)).text == text
    short = await desk.client.files.create(
        file=("short.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert 3500 < short.expires_at - time.time() < 3700
    assert [each.id async for each in desk.client.files.list(limit=1)] == [short.id, file.id]
    assert [each.id async for each in desk.client.files.list(order="asc", purpose="batch")] == [file.id, short.id]
    assert (await desk.client.files.delete(file.id)).deleted
    for asked in (desk.client.files.retrieve(file.id), desk.client.files.content(file.id), desk.client.files.delete(file.id)):
        with pytest.raises(openai.NotFoundError):
            await asked


async def test_batches_are_listed_by_pages(desk):
    ids = [(await desk.hand_in(chat("a", "x"))).id for _ in range(3)]
    assert [batch.id async for batch in desk.client.batches.list(limit=2)] == ids[::-1]


async def test_tenants_know_nothing_of_each_other(desk, place):
    batch = await desk.hand_in(chat("a", "secret"))
    manager, runner, _ = await desk_of(place, "other")
    async with manager as other:
        for asked in (
            other.batches.retrieve(batch.id),
            other.batches.cancel(batch.id),
            other.files.retrieve(batch.input_file_id),
            other.files.content(batch.input_file_id),
            other.files.delete(batch.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                await asked
        with pytest.raises(openai.BadRequestError) as error:
            await other.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h")
        assert error.value.param == "input_file_id"
        assert [each async for each in other.batches.list()] == [] == [each async for each in other.files.list()]
    await runner.stop(SECONDS)


async def test_bounds(place):
    manager, runner, identity = await desk_of(place, "bounds", tenant_batches=1, tenant_bytes=300, max_file_bytes=250)
    async with manager as client:
        desk = Desk(place, client, runner, identity)
        with pytest.raises(openai.APIStatusError) as error:
            await desk.upload(chat("a", "x" * 250))
        assert error.value.param == "file"
        await desk.hand_in(chat("a", "x"))
        with pytest.raises(openai.RateLimitError):
            await desk.upload(chat("a", "x" * 100))
        file = await desk.upload(b"")
        with pytest.raises(openai.RateLimitError):
            await client.batches.create(input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h")


@pytest.mark.parametrize(
    ("purpose", "more", "param"),
    [("assistants", {}, "purpose"), ("batch", {"extra_body": {"x": "1"}}, "x"), ("batch", {"extra_query": {"x": "1"}}, "x")],
)
async def test_uploads_that_are_wrong(desk, purpose, more, param):
    with pytest.raises(openai.BadRequestError) as error:
        await desk.client.files.create(file=("a", b"{}"), purpose=purpose, **more)
    assert error.value.param == param


async def test_a_form_of_characters_that_nothing_can_write(desk):
    parts = b'--b\r\ncontent-disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    data = parts % (b"purpose", b"", b"batch") + parts % (b"file", b'; filename="\\ud800"', b"{}") + b"--b--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b; charset=unicode_escape", "authorization": "Bearer acme"}
    async with httpx2.AsyncClient(timeout=SECONDS) as http:
        answer = await http.post(f"{desk.client.base_url}files", content=data, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_wishes_that_are_wrong(desk):
    file = await desk.upload(chat("a", "x"))
    for wrong, param in (
        ({"endpoint": "/v1/images/edits"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file_0"}, "input_file_id"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
    ):
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h", **wrong}
        with pytest.raises(openai.BadRequestError) as error:
            await desk.client.batches.create(**body)
        assert error.value.param == param
