"""Another server as a place of a model: requests go there as they came, answers come back as they are."""

import asyncio
import datetime
import ipaddress
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fairlead.core.caller import Envelope
from fairlead.core.errors import Cancelled, ConfigError, FairleadError, InvalidRequest, QueueFull, ReplicaDied, Unavailable, Unsupported
from fairlead.core.generation import Usage
from fairlead.core.policy import Upstream
from fairlead.core.request import Raw, Request, Response
from fairlead.core.timeline import Timeline, parse_traceparent
from fairlead.runtime.upstream.client import MAX_PROBE_BYTES
from fairlead.runtime.upstream.errors import UpstreamCut, UpstreamFull, UpstreamGone
from fairlead.runtime.upstream.fake import Fake, Received, Script, text_of
from fairlead.runtime.upstream.place import BUFFER_BYTES, MAX_EVENT_BYTES, UpstreamPlace, UpstreamTicket

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def place_of(url: str, **options: Any) -> AsyncIterator[UpstreamPlace]:
    place = UpstreamPlace("ours", Upstream(url=url, **options))
    try:
        yield place
    finally:
        await place.close()
        assert place.in_flight == 0
        assert not place.pool.connections


@asynccontextmanager
async def upstream(script: Script | None = None, **options: Any) -> AsyncIterator[tuple[Fake, UpstreamPlace]]:
    fake = await Fake(script).start()
    try:
        async with place_of(fake.url, **options) as place:
            yield fake, place
    finally:
        await fake.stop()


def chat(*, model: str = "ours", version: str = "", stream: bool = False, body: dict[str, Any] | None = None, **fields: Any) -> Request:
    asked = {"model": model, "messages": [{"role": "user", "content": "hello"}]} | ({"stream": True} if stream else {}) | (body or {})
    raw = Raw(path=CHAT, body=json.dumps(asked).encode(), stream=stream, prompt_chars=40)
    return Request(model=model, version=version, raw=raw, **fields)


async def ask(place: UpstreamPlace, request: Request) -> list[Response]:
    async with aclosing(place.infer(request)) as responses:
        return [response async for response in responses]


async def one(place: UpstreamPlace, request: Request) -> Response:
    (response,) = await ask(place, request)
    return response


def last(fake: Fake) -> Received:
    return fake.received[-1]


class Ended:
    """A sink that waits for the end."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.end: asyncio.Future[FairleadError | None] = asyncio.get_running_loop().create_future()

    def respond(self, response: Response) -> None:
        self.responses.append(response)

    def close(self, error: FairleadError | None) -> None:
        self.end.set_result(error)


# What goes there


async def test_an_answer_comes_back_as_it_is_and_its_usage_is_read() -> None:
    async with upstream() as (fake, place):
        response = await one(place, chat(id="7"))
        assert response.raw is not None
        answer = json.loads(response.raw)
        assert answer["model"] == "ours"
        assert answer["choices"][0]["message"]["content"] == text_of(64)
        assert response.usage == Usage(prompt_tokens=answer["usage"]["prompt_tokens"], completion_tokens=64)
        assert (response.status, response.model, response.id) == (200, "ours", "7")
        assert response.headers == {"content-type": "application/json"}
        assert last(fake).target == CHAT


async def test_the_callers_credentials_never_reach_the_upstream_its_own_key_does() -> None:
    headers = {
        b"authorization": b"Bearer callers",
        b"x-api-key": b"callers",
        b"cookie": b"a=b",
        b"accept": b"application/json",
        b"te": b"x",
    }
    envelope = Envelope(method="POST", target=CHAT, scheme="http", authority="front", headers=headers)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with upstream(key="upstreams") as (fake, place):
        request = chat(envelope=envelope, id="id-1", trace=trace)
        assert request.raw is not None
        request.raw.accept = "application/json"
        await one(place, request)
        sent = last(fake).headers
    assert sent.pop("content-length").isdigit()
    assert sent.pop("user-agent").startswith("fairlead/")
    assert sent.pop("host") == fake.url.removeprefix("http://")
    assert sent == {
        "authorization": "Bearer upstreams",
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "traceparent": trace,
        "x-request-id": "id-1",
    }


async def test_a_traced_request_goes_on_as_part_of_the_span_of_its_try() -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    timeline = Timeline("id-1", "http", time.perf_counter(), traceparent=trace, tracestate="vendor=1", sample=1.0)
    sent: list[str] = []
    async with upstream() as (fake, place):
        for attempt in (1, 2):
            timeline.note(time.perf_counter(), "sent", {"place": place.id, "version": "", "attempt": attempt})
            await one(place, chat(trace=trace, timeline=timeline))
            sent.append(last(fake).headers["traceparent"])
            assert last(fake).headers["tracestate"] == "vendor=1"
    assert sent == [timeline.context(1), timeline.context(2)]
    assert len({timeline.span_id, *(parse_traceparent(each)[1] for each in sent)}) == 3  # type: ignore[index]


async def test_an_upstream_may_call_the_model_by_another_name() -> None:
    async with upstream() as (fake, place), place_of(fake.url, model="org/theirs") as renaming:
        await one(place, chat(model="ours", version="3"))
        assert json.loads(last(fake).body)["model"] == "ours@3"
        await one(renaming, chat(model="ours"))
        assert json.loads(last(fake).body)["model"] == "org/theirs"


async def test_a_degraded_request_asks_the_upstream_for_less() -> None:
    async with upstream() as (_, place):
        request = chat(body={"max_tokens": 60})
        assert request.raw is not None
        request.raw.max_tokens = 5
        response = await one(place, request)
        assert response.usage is not None
        assert response.usage.completion_tokens == 5


@pytest.mark.parametrize("id", ["a\r\nx-evil: 1", "a b", "\x00", "ä", "x" * 300])
async def test_an_id_that_no_header_can_carry_stays_here(id: str) -> None:
    async with upstream() as (fake, place):
        assert (await one(place, chat(id=id))).id == id
        assert "x-request-id" not in last(fake).headers
        assert "x-evil" not in last(fake).headers


@pytest.mark.parametrize("path", ["/v1/chat completions", "/v1/a\r\nx: y", "/v1/ä"])
async def test_a_path_that_would_be_another_request_is_refused(path: str) -> None:
    async with upstream() as (fake, place):
        with pytest.raises(InvalidRequest, match="path"):
            await one(place, Request(model="ours", raw=Raw(path=path, body=b"{}")))
        assert fake.num_requests == 0


async def test_a_request_that_did_not_come_in_the_upstreams_protocol_is_refused_with_advice() -> None:
    async with upstream() as (_, place), upstream(protocol="kserve") as (_, tensors):
        with pytest.raises(Unsupported, match="only be asked over HTTP"):
            await one(place, Request(model="ours"))
        with pytest.raises(Unsupported, match=r"ask it at /v1/\.\.\."):
            await one(place, Request(model="ours", raw=Raw(path="/infer", body=b"{}")))
        with pytest.raises(Unsupported, match="ask it at /v2/models/ours/infer"):
            await one(tensors, chat())


# Streams


def events_of(responses: list[Response]) -> list[Any]:
    told = b"".join(response.raw or b"" for response in responses)
    lines = [line[6:] for line in told.splitlines() if line.startswith(b"data: ")]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("split", [0, 1, 7, 100])
async def test_a_stream_comes_in_whole_events_and_tells_its_usage_last(split: int, newline: Any) -> None:
    async with upstream(script=Script(chunks=5, split=split, newline=newline)) as (fake, place):
        responses = await ask(place, chat(stream=True, body={"stream_options": {"include_usage": True}}))
        assert all(response.raw and response.raw.endswith((b"\n\n", b"\r\n\r\n")) for response in responses)
        events = events_of(responses)
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == text_of(5)
        assert events[-1]["usage"]["completion_tokens"] == 5
        assert responses[-1].usage == Usage(prompt_tokens=events[-1]["usage"]["prompt_tokens"], completion_tokens=5)
        assert responses[0].headers == {"content-type": "text/event-stream; charset=utf-8"}
        assert all(not response.headers for response in responses[1:])
        assert fake.num_open == 0


@pytest.mark.parametrize("split", [0, 40])
async def test_usage_that_only_the_gateway_asked_for_is_read_and_not_passed_on(split: int) -> None:
    async with upstream(script=Script(chunks=5, split=split)) as (fake, place):
        responses = await ask(place, chat(stream=True))
        assert json.loads(last(fake).body)["stream_options"] == {"include_usage": True}
        assert all(event["choices"] and not event["usage"] for event in events_of(responses))
        assert responses[-1].usage is not None
        assert responses[-1].usage.completion_tokens == 5


async def test_an_upstream_that_tells_no_usage_is_billed_by_its_events_and_the_length_of_the_prompt() -> None:
    async with upstream(script=Script(chunks=5, usage=False)) as (fake, place):
        responses = await ask(place, chat(stream=True))
        assert responses[-1].usage == Usage(prompt_tokens=10, completion_tokens=8)  # role, 5 words, finish, [DONE]
        whole = await one(place, chat())
        assert whole.usage == Usage(prompt_tokens=10, completion_tokens=len(whole.raw or b"") // 4)
        request = Request(model="ours", raw=Raw(path="/v1/embeddings", body=b'{"input":"hello"}', prompt_chars=5, max_tokens=0))
        assert (await one(place, request)).usage == Usage(prompt_tokens=2)
        fake.script = Script()
        assert (await one(place, request)).usage == Usage(prompt_tokens=2)
        assert json.loads(last(fake).body) == {"input": "hello", "model": "ours"}


async def test_a_caller_who_leaves_stops_the_upstream_and_pays_for_what_came() -> None:
    async with upstream(script=Script(chunks=1000, pace=0.005)) as (fake, place):
        async with aclosing(place.infer(chat(stream=True))) as responses:
            await anext(responses)
            second = await anext(responses)
        await fake.until(lambda: fake.num_left == 1)
        assert second.usage is not None
        assert second.usage.completion_tokens >= 2
        assert place.in_flight == 0


async def test_a_slow_reader_holds_the_upstream_back() -> None:
    async with upstream(script=Script(chunks=60_000)) as (fake, place):
        async with aclosing(place.infer(chat(stream=True))) as responses:
            first = await anext(responses)
            (connection,) = fake.connections
            await paused(connection)
            assert place.in_flight == 1
            rest = [response async for response in responses]
        assert len(events_of([first, *rest])) == 60_002
        assert max(len(response.raw or b"") for response in rest) < 16 * BUFFER_BYTES
        assert len(place.pool.idle) == 1


async def paused(connection: Any) -> None:
    async with asyncio.timeout(10):
        while not connection.writing.paused:
            await asyncio.sleep(0.001)


async def test_a_server_that_answers_a_stream_in_one_piece_is_passed_on_in_one_piece() -> None:
    async with upstream(script=Script(fault="whole", chunks=3)) as (_, place):
        response = await one(place, chat(stream=True))
        assert response.headers == {"content-type": "application/json"}
        assert json.loads(response.raw or b"")["choices"][0]["message"]["content"] == text_of(3)
        assert response.usage is not None and response.usage.completion_tokens == 3
    async with upstream(protocol="kserve") as (_, place):
        request = tensors(b'{"inputs":[]}')
        assert request.raw is not None
        request.raw.stream = True
        assert (await one(place, request)).raw == b'{"model_name":"ours","model_version":"1","outputs":[]}'


# Answers that are errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 403, 404, 422, 429, 500, 503])
async def test_an_error_comes_back_with_its_status_and_body_and_costs_nothing(status: int, stream: bool) -> None:
    async with upstream(script=Script(fault="status", status=status, retry_after="7")) as (_, place):
        response = await one(place, chat(stream=stream))
        assert response.status == status
        assert json.loads(response.raw or b"")["error"]["message"] == f"told to answer {status}"
        assert response.headers == {"content-type": "application/json", "retry-after": "7"}
        assert response.usage == Usage()


async def test_what_an_upstream_says_about_our_key_is_not_the_callers_business() -> None:
    async with upstream(script=Script(fault="status", status=401), key="secret") as (_, place):
        with pytest.raises(UpstreamGone, match="does not accept this server's key") as caught:
            await one(place, chat())
        assert "401" in caught.value.detail


async def test_a_redirect_is_not_followed() -> None:
    async with upstream(script=Script(fault="redirect")) as (_, place):
        with pytest.raises(UpstreamGone, match="redirect"):
            await one(place, chat())


# Answers that do not come


async def test_an_upstream_that_cannot_be_reached_is_gone_and_the_caller_does_not_read_its_address() -> None:
    fake = await Fake().start()
    await fake.stop()
    async with place_of(fake.url) as place:
        with pytest.raises(UpstreamGone, match="cannot be reached") as caught:
            await one(place, chat())
        assert str(fake.port) not in caught.value.message
        assert str(fake.port) in caught.value.detail
        assert isinstance(caught.value, Unavailable)


async def test_a_host_that_nobody_knows_is_gone() -> None:
    async with place_of("http://upstream.invalid:1234") as place:
        with pytest.raises(UpstreamGone, match="cannot be reached"):
            await one(place, chat())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("reset", "closed the connection"),
        ("garbage", "not HTTP/1.1"),
        ("excess", "more than it was asked"),
        ("cut", "closed the connection"),
        ("headers", "too long headers"),
    ],
)
async def test_whatever_goes_wrong_before_anything_was_passed_on_may_be_tried_elsewhere(fault: Any, message: str) -> None:
    async with upstream(script=Script(fault=fault, times=1)) as (fake, place):
        with pytest.raises(UpstreamGone, match=message):
            await one(place, chat())
        fake.script = Script()
        assert (await one(place, chat())).status == 200


async def test_an_upstream_that_stays_silent_is_given_up() -> None:
    async with upstream(script=Script(fault="hang"), timeout=0.05) as (fake, place):
        with pytest.raises(UpstreamGone, match="did not answer in time"):
            await one(place, chat())
        await fake.until(lambda: fake.num_left == 1)


async def test_an_upstream_that_falls_silent_in_the_middle_is_given_up() -> None:
    async with upstream(script=Script(pace=5.0), timeout=0.05) as (_, place):
        with pytest.raises(UpstreamCut, match="did not answer in time"):
            await ask(place, chat(stream=True))


@pytest.mark.parametrize("split", [0, 30])
async def test_a_stream_that_breaks_off_ends_after_a_whole_event_with_an_error(split: int) -> None:
    async with upstream(script=Script(fault="cut", after=3, split=split)) as (_, place):
        end = Ended()
        place.submit(chat(stream=True), end)
        error = await end.end
        assert isinstance(error, UpstreamCut)
        assert "its answer ends here" in error.message
        told = b"".join(response.raw or b"" for response in end.responses)
        assert told.endswith(b"\n\n")
        assert told.count(b"data: ") == 3
        assert isinstance(error, ReplicaDied)


async def test_a_connection_that_the_upstream_closed_meanwhile_is_replaced_unnoticed() -> None:
    async with upstream(script=Script(fault="stale")) as (fake, place):
        for _ in range(3):
            assert (await one(place, chat())).status == 200
        assert (fake.num_connections, fake.num_requests) == (3, 5)
        fake.script = Script(fault="reset")
        with pytest.raises(UpstreamGone, match="closed the connection"):
            await one(place, chat())
        assert fake.num_requests == 7  # once over the old connection, once over a new one, and no more


async def test_an_upstream_that_restarted_is_found_again() -> None:
    fake = await Fake().start()
    async with place_of(fake.url) as place:
        await one(place, chat())
        await fake.stop()
        fake = await Fake().start(fake.port)
        assert (await one(place, chat())).status == 200
        await fake.stop()


async def test_an_event_without_an_end_is_cut_off() -> None:
    async with upstream(script=Script(fault="endless", times=1, chunks=1)) as (fake, place):
        with pytest.raises(UpstreamGone, match=f"sent an event longer than {MAX_EVENT_BYTES} bytes"):
            await ask(place, chat(stream=True))
        await fake.until(lambda: fake.num_left == 1)
        assert len(events_of(await ask(place, chat(stream=True)))) == 3


async def test_an_event_in_many_pieces_costs_no_more_than_one_in_few() -> None:
    async with place_of("http://127.0.0.1:1") as place:
        end = Ended()
        ticket = UpstreamTicket(place, chat(stream=True), end)
        ticket.status, ticket.headers = 200, {b"content-type": b"text/event-stream"}
        place.in_flight += 1
        event = b"data: " + b"x" * (MAX_EVENT_BYTES - 8) + b"\n\n"
        begun = time.thread_time()
        for at in range(0, len(event), 100):
            ticket.received(event[at : at + 100], False)
        ticket.received(b"", True)
        assert time.thread_time() - begun < 5.0  # put together anew for each piece it takes minutes
        assert await end.end is None
        assert b"".join(response.raw or b"" for response in end.responses) == event


async def test_a_stream_may_end_twice() -> None:
    async with upstream(script=Script(fault="twice", times=1, chunks=3)) as (_, place):
        told = b"".join(response.raw or b"" for response in await ask(place, chat(stream=True)))
        assert told.count(b"data: [DONE]\n\n") == 2
        assert (await one(place, chat())).status == 200


async def test_a_probe_is_not_read_without_end() -> None:
    names = tuple(f"model-{number:04}" for number in range(2_000))
    async with upstream(script=Script(models=names)) as (fake, place):
        status, body = await place.get("/v1/models")
        assert (status, len(json.loads(body)["data"])) == (200, 2_000)
        fake.script = Script(models=tuple(name + "x" * 500 for name in names) * 5)
        with pytest.raises(UpstreamGone) as refused:
            await place.get("/v1/models")
        assert f"answers a probe with more than {MAX_PROBE_BYTES} bytes" in refused.value.detail


async def test_interim_answers_are_skipped() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, place_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as place:
        response = await one(place, chat())
        assert (response.status, response.raw, response.headers) == (200, b"{}", {})


async def test_an_answer_may_end_with_its_connection() -> None:
    async with upstream(script=Script(http_1_0=True)) as (fake, place):
        for _ in range(2):
            response = await one(place, chat())
            assert json.loads(response.raw or b"")["usage"]["completion_tokens"] == 64
        assert fake.num_connections == 2


# Connections


async def test_connections_are_used_again() -> None:
    async with upstream(script=Script(chunks=3)) as (fake, place):
        for number in range(10):
            await ask(place, chat(stream=number % 2 == 1))
        assert fake.num_connections == 1
        await asyncio.gather(*(ask(place, chat()) for _ in range(8)))
        assert fake.num_connections <= 9


async def test_an_upstream_is_given_no_more_requests_at_once_than_it_may_have() -> None:
    async with upstream(script=Script(fault="hang"), max_in_flight=2) as (fake, place):
        ends = [Ended() for _ in range(3)]
        tickets = [place.submit(chat(), end) for end in ends]
        error = await ends[2].end
        assert isinstance(error, UpstreamFull)
        assert isinstance(error, QueueFull)
        assert place.in_flight == 2
        await fake.until(lambda: fake.num_requests == 2)
        tickets[0].cancel()
        assert isinstance(await ends[0].end, Cancelled)
        assert place.in_flight == 1
        await fake.until(lambda: fake.num_left == 1)


async def test_a_request_that_is_cancelled_before_it_is_connected_is_never_sent() -> None:
    async with upstream() as (fake, place):
        end = Ended()
        place.submit(chat(), end).cancel()
        assert isinstance(await end.end, Cancelled)
        assert (await one(place, chat())).status == 200
        assert fake.num_requests == 1


async def test_a_ticket_that_is_done_cannot_be_cancelled() -> None:
    async with upstream() as (_, place):
        end = Ended()
        ticket = place.submit(chat(), end)
        assert await end.end is None
        ticket.cancel()
        assert len(end.responses) == 1
        assert len(place.pool.idle) == 1


async def test_what_is_under_way_fails_when_the_place_is_closed() -> None:
    async with upstream(script=Script(pace=0.01)) as (fake, place):
        begun, waiting, connecting = Ended(), Ended(), Ended()
        place.submit(chat(stream=True), begun)
        await fake.until(lambda: fake.num_requests == 1)
        fake.script = Script(fault="hang")
        place.submit(chat(), waiting)
        await fake.until(lambda: fake.num_requests == 2)
        place.submit(chat(), connecting)
        await place.close()
        assert isinstance(await begun.end, UpstreamCut if begun.responses else UpstreamGone)
        assert isinstance(await waiting.end, UpstreamGone)
        assert isinstance(await connecting.end, UpstreamGone)
        with pytest.raises(UpstreamGone, match="taken out of service"):
            await one(place, chat())


# Health


async def test_a_place_is_ready_as_long_as_its_server_answers_anything_but_5xx() -> None:
    fake = await Fake().start()
    async with place_of(fake.url) as openai, place_of(fake.url, protocol="kserve") as kserve:
        assert openai.ready
        assert await openai.check()
        assert await kserve.check()
        assert [received.target for received in fake.received] == ["/health", "/v2/health/ready"]
        await fake.stop()
        assert not await openai.check()
        assert str(fake.port) in openai.down
        assert not openai.ready
        fake = await Fake().start(fake.port)
        assert await openai.check()
        assert openai.down == ""
        await fake.stop()


# Tensors


def tensors(body: bytes, *, version: str = "", header_length: str = "", path: str = "/infer") -> Request:
    kind = "application/octet-stream" if header_length else "application/json"
    return Request(model="ours", version=version, raw=Raw(path=path, body=body, content_type=kind, header_length=header_length))


async def test_tensors_in_json_pass_as_they_came() -> None:
    async with upstream(protocol="kserve") as (fake, place), place_of(fake.url, protocol="kserve", model="a b/c") as renaming:
        body = b'{ "id":"9", "inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1.50]}] }'
        response = await one(place, tensors(body))
        assert last(fake).body == body
        assert last(fake).target == "/v2/models/ours/infer"
        assert json.loads(response.raw or b"")["outputs"][0]["data"] == [1.5]
        assert response.usage is None
        await one(place, tensors(body, version="2"))
        assert last(fake).target == "/v2/models/ours/versions/2/infer"
        await one(renaming, tensors(body, version="../x"))
        assert last(fake).target == "/v2/models/a%20b%2Fc/versions/..%2Fx/infer"


async def test_binary_tensors_pass_as_they_came() -> None:
    head = b'{"inputs":[{"name":"x","shape":[65536],"datatype":"UINT8","parameters":{"binary_data_size":65536}}]}'
    data = bytes(range(256)) * 256
    async with upstream(protocol="kserve") as (fake, place):
        response = await one(place, tensors(memoryview(head + data), header_length=str(len(head))))  # type: ignore[arg-type]
        assert last(fake).body == head + data
        assert last(fake).headers["content-type"] == "application/octet-stream"
        length = int(response.headers["inference-header-content-length"])
        assert response.raw is not None
        assert response.raw[length:] == data
        assert response.headers["content-type"] == "application/octet-stream"
        with pytest.raises(InvalidRequest, match="must be a number"):
            await one(place, tensors(head, header_length="1\r\nx: y"))


# Addresses


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("10.0.0.7:8000", "must be a URL"),
        ("ftp://host", "must be a URL"),
        ("http://", "must be a URL"),
        ("http://host:99999", "Port out of range"),
        ("http://user:pass@host", "`key` is for its key"),
        ("http://host/?a=b", "neither a password, a query"),
        ("https://host/v1/", "leave out /v1"),
        ("http://host/a b", "must escape"),
        ("http://a..b", "no name of a host"),
    ],
)
async def test_a_url_that_cannot_be_meant_is_refused_without_telling_its_password(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        UpstreamPlace("ours", Upstream(url=url))
    assert "pass@" not in caught.value.message


async def test_a_key_that_no_header_can_carry_is_refused_without_telling_it() -> None:
    with pytest.raises(ConfigError, match="characters that no header can") as caught:
        UpstreamPlace("ours", Upstream(url="http://host", key="se\ncret"))
    assert "cret" not in caught.value.message


async def test_a_url_may_have_a_path_of_its_own() -> None:
    async with upstream() as (fake, _), place_of(f"{fake.url}/team/a/") as place:
        assert place.id == f"{fake.url}/team/a"
        assert (await one(place, chat())).status == 404
        assert last(fake).target == "/team/a/v1/chat/completions"


# TLS


def certificate(folder: Path, host: str = "localhost") -> tuple[Path, Path]:
    """(certificate, key) files, signed by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.2"))])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return files


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_upstreams_certificate_is_verified(new_loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)

    async def story() -> None:
        fake = await Fake(Script(chunks=3)).start(tls=context)
        try:
            async with place_of(fake.url) as place:
                with pytest.raises(UpstreamGone, match="cannot be reached") as caught:
                    await one(place, chat())
                assert "CERTIFICATE_VERIFY_FAILED" in caught.value.detail.upper()
            monkeypatch.setenv("SSL_CERT_FILE", str(cert))
            async with place_of(fake.url) as place:
                assert (await one(place, chat())).status == 200
                assert len(events_of(await ask(place, chat(stream=True)))) == 5
                assert await place.check()
            async with place_of(fake.url.replace("localhost", "127.0.0.1")) as place:
                with pytest.raises(UpstreamGone, match="cannot be reached"):
                    await one(place, chat())
        finally:
            await fake.stop()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(story())


def test_all_of_it_holds_on_uvloop_too() -> None:
    """Whose transports behave differently at their ends."""

    async def stories() -> None:
        await test_an_answer_comes_back_as_it_is_and_its_usage_is_read()
        await test_a_stream_comes_in_whole_events_and_tells_its_usage_last(7, "\n")
        await test_a_caller_who_leaves_stops_the_upstream_and_pays_for_what_came()
        await test_a_slow_reader_holds_the_upstream_back()
        await test_an_upstream_that_cannot_be_reached_is_gone_and_the_caller_does_not_read_its_address()
        await test_whatever_goes_wrong_before_anything_was_passed_on_may_be_tried_elsewhere("garbage", "not HTTP")
        await test_an_upstream_that_stays_silent_is_given_up()
        await test_a_stream_that_breaks_off_ends_after_a_whole_event_with_an_error(0)
        await test_a_connection_that_the_upstream_closed_meanwhile_is_replaced_unnoticed()
        await test_an_answer_may_end_with_its_connection()
        await test_a_request_that_is_cancelled_before_it_is_connected_is_never_sent()
        await test_what_is_under_way_fails_when_the_place_is_closed()
        await test_binary_tensors_pass_as_they_came()

    uvloop.run(stories())
