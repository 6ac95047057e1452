"""Bodies for models that other servers compute: through the whole gateway, over real sockets, byte for byte."""

import asyncio
import gc
import gzip
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx2
import numpy as np
import pytest
import pytest_asyncio

from fairlead.gateway.routing.places import Attempt
from fairlead.gateway.routing.trip import Trip
from fairlead.gateway.visit import Visit
from fairlead.runtime.upstream.fake import Fake, Received, Script
from fairlead.runtime.upstream.place import UpstreamTicket
from tests.api.http_fake import Wire, until
from tests.api.keyed import House, chat, house, row, wire_to

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
GATEWAY = """\
  models:
    far-chat: {{upstreams: [{{url: '{far}', key: theirs}}]}}
    far-named: {{upstreams: [{{url: '{far}', model: other}}]}}
    far-tensor: {{upstreams: [{{url: '{far}', protocol: kserve}}]}}
    nowhere: {{upstreams: [{{url: 'http://127.0.0.1:1'}}]}}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Fake]:
    fake = await Fake().start()
    yield fake
    await fake.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(running: Fake, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    gateway = GATEWAY.format(far=running.url)
    async with house(tmp_path_factory.mktemp("house"), auth="required: false", gateway=gateway) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def far(running: Fake) -> Fake:
    """The other server, as it behaves where it is not told otherwise."""
    running.script = Script(chunks=12)
    running.received.clear()
    return running


@asynccontextmanager
async def direct(fake: Fake) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=fake.url, timeout=20) as client:
        yield client


def asks(far: Fake) -> list[Received]:
    """What came there, but for the looks at its health."""
    return [each for each in far.received if each.method == "POST"]


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def asked(path: str, body: bytes, version: str = "1.1", **headers: str) -> bytes:
    """A whole request; header names with _ for -."""
    fields = {"host": "test", "content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = f"POST {path} HTTP/{version}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"{head}\r\n".encode("latin-1") + body


def chunked(path: str, body: bytes, size: int = 100) -> bytes:
    """The same in chunks."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return f"POST {path} HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n".encode() + framed + b"0\r\n\r\n"


async def answered(connection: Wire) -> tuple[int, dict[str, str], bytes]:
    """The next answer, however its end is told: by a length, by chunks, or by the connection's."""
    async with asyncio.timeout(20):
        text = (await connection.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = text.rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        if headers.get("transfer-encoding") != "chunked":
            length = int(headers.get("content-length", -1))
            rest = connection.reader.readexactly(length) if length >= 0 else connection.reader.read()
            return int(line.split()[1]), headers, await rest
        body = b""
        while size := int(await connection.reader.readuntil(b"\r\n"), 16):
            body += (await connection.reader.readexactly(size + 2))[:-2]
        await connection.reader.readexactly(2)
        return int(line.split()[1]), headers, body


def events_of(body: bytes) -> list[Any]:
    """The data of server-sent events."""
    datas = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event.startswith(b"data: ")]
    return [data.decode() if data == b"[DONE]" else json.loads(data) for data in datas]


# What goes there and what comes back


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("far-chat", seed=7, unheard_of=[1, {"a": None}])),
        ("/v1/completions", {"model": "far-chat", "prompt": "once upon", "max_tokens": 5}),
        ("/v1/embeddings", {"model": "far-chat", "input": ["a", "b"]}),
    ],
)
async def test_a_body_goes_on_as_it_came_and_so_does_its_answer(home: House, far: Fake, path: str, body: dict[str, Any]) -> None:
    content = b" " + encoded(body) + b"\n"
    headers = {"content-type": "application/json", "x-request-id": "mine", "authorization": "Bearer sk-mine", "cookie": "a=b"}
    response = await home.http.post(path, content=content, headers=headers)
    got = asks(far)[-1]
    assert (got.method, got.target, json.loads(got.body)) == ("POST", path, body)
    for value in (b'[1, {"a": null}]', b'[{"role": "user", "content": "some words to say"}]', b'["a", "b"]', b'"once upon"'):
        assert (value in got.body) == (value in content)  # below the top level nothing is taken apart
    assert (got.headers["authorization"], got.headers["x-request-id"]) == ("Bearer theirs", "mine")
    assert "cookie" not in got.headers
    async with direct(far) as client:
        expected = await client.post(path, content=content)
    assert response.status_code == 200
    assert without_id(response.json()) == without_id(expected.json())
    assert bytes_without_id(response.content) == bytes_without_id(expected.content)
    assert response.headers["x-request-id"] == "mine" and "x-upstream-secret" not in response.headers


def without_id(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "id"}


def bytes_without_id(answer: bytes) -> bytes:
    return re.sub(rb'"id":"[^"]*"', b"", answer)


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("script", [{}, {"split": 7}, {"newline": "\r\n"}, {"usage": False}])
async def test_a_stream_goes_on_as_it_comes(home: House, far: Fake, path: str, options: Any, script: dict[str, Any]) -> None:
    far.script = Script(chunks=12, **script)
    body = {**chat("far-chat", stream=True), "prompt": "once upon"} | ({"stream_options": options} if options else {})
    response = await home.http.post(path, json=body)
    async with direct(far) as client:
        expected = await client.post(path, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"]
    newline = script.get("newline", "\n").encode()
    said = [event for event in response.content.replace(newline, b"\n").split(b"\n\n") if event.startswith(b"data: ")]
    wanted = [event for event in expected.content.replace(newline, b"\n").split(b"\n\n") if event.startswith(b"data: ")]
    if options is not None or script == {"usage": False}:
        assert said == wanted
    else:  # the usage was asked for by us: what is told of it is not told on
        assert [each["choices"] for each in events_of(b"\n\n".join(said))[:-1]] == [
            each["choices"] for each in events_of(b"\n\n".join(wanted))[:-1]
        ]
        assert not any(each.get("usage") for each in events_of(b"\n\n".join(said))[:-1])
        assert said[-1] == wanted[-1] == b"data: [DONE]"


async def test_a_model_with_another_name_there_is_renamed_in_the_body(home: House, far: Fake) -> None:
    response = await home.http.post(CHAT, json=chat("far-named"))
    assert response.status_code == 200
    assert json.loads(asks(far)[-1].body)["model"] == "other"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
async def test_what_the_other_server_refuses_is_passed_on_byte_for_byte(home: House, far: Fake, status: int, stream: bool) -> None:
    far.script = Script(fault="status", status=status)
    for path, body in ((CHAT, chat("far-chat", stream=stream)), ("/v2/models/far-tensor/infer", row())):
        response = await home.http.post(path, json=body)
        async with direct(far) as client:
            expected = await client.post(path, json=body)
        assert (response.status_code, response.content) == (status, expected.content)
        assert response.headers["content-type"] == expected.headers["content-type"]


async def test_that_it_does_not_know_us_is_no_business_of_the_caller(home: House, far: Fake) -> None:
    far.script = Script(fault="status", status=401)
    response = await home.http.post(CHAT, json=chat("far-chat"))
    assert response.status_code == 503 and "www-authenticate" not in response.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_its_own_limits_are_passed_on_with_when_to_come_again(home: House, far: Fake, stream: bool) -> None:
    far.script = Script(fault="status", status=429, retry_after="7")
    response = await home.http.post(CHAT, json=chat("far-chat", stream=stream))
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.json()["error"]["message"] == "told to answer 429"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_byte_is_tried_again(home: House, far: Fake, stream: bool) -> None:
    far.script = Script(chunks=3, fault="reset", times=1)
    response = await home.http.post(CHAT, json=chat("far-chat", stream=stream))
    assert response.status_code == 200
    assert len(asks(far)) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_is_not_there_is_unavailable_in_the_protocol_s_shape(home: House, far: Fake, stream: bool) -> None:
    response = await home.http.post(CHAT, json=chat("nowhere", stream=stream))
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    assert int(response.headers["retry-after"]) >= 1 and response.headers["x-fairlead-reason"]


# Streams and their readers


async def test_a_stream_that_is_cut_ends_with_an_event_that_says_so(home: House, far: Fake) -> None:
    far.script = Script(chunks=12, fault="cut", after=4)
    async with wire_to(home) as connection:
        await connection.send(asked(CHAT, encoded(chat("far-chat", stream=True))))
        status, _, body = await answered(connection)
        assert status == 200
        *events, last = events_of(body)
        assert [each["choices"][0]["delta"].get("content") for each in events] == ["", "fairleads ", "guide ", "mooring "]
        assert last["error"]["type"] == "server_error" and "far-chat" in last["error"]["message"]
        far.script = Script(chunks=1)
        await connection.send(asked(CHAT, encoded(chat("far-chat"))))
        assert (await answered(connection))[0] == 200  # the connection goes on


async def test_an_answer_that_is_cut_is_a_bad_one(home: House, far: Fake) -> None:
    far.script = Script(fault="cut")
    response = await home.http.post(CHAT, json=chat("far-chat"))
    assert response.status_code >= 500
    assert response.json()["error"]["type"] == "server_error"


async def test_a_reader_who_does_not_read_holds_up_the_other_server_and_not_this_one_s_memory(home: House, far: Fake) -> None:
    far.script = Script(chunks=60_000)
    before = far.num_open
    connection = Wire(*await asyncio.open_connection("127.0.0.1", home.port, limit=1 << 12))
    connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    await connection.send(asked(CHAT, encoded(chat("far-chat", stream=True, max_tokens=60_000))))
    ours = home.server.http._state.connections

    def all_wait() -> bool:
        return any(each.flow.write_paused for each in ours) and any(each.writing and each.writing.paused for each in far.connections)

    await until(all_wait)
    assert sum(each.transport.get_write_buffer_size() for each in ours) < 2 << 20
    (theirs,) = [each.writing for each in far.connections if each.writing is not None]
    assert theirs.at < 60_000
    _, _, body = await answered(connection)
    assert body.count(b"data: ") == 60_000 + 3
    await connection.close()
    await until(lambda: far.num_open == before)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_other_server(home: House, far: Fake, stream: bool) -> None:
    far.script = Script(chunks=1000, pace=0.01) if stream else Script(fault="hang")
    left = far.num_left
    async with wire_to(home) as connection:
        await connection.send(asked(CHAT, encoded(chat("far-chat", stream=stream, max_tokens=1000))))
        if stream:
            await connection.reader.readuntil(b"guide ")
        else:
            await until(lambda: asks(far))
    await until(lambda: far.num_left == left + 1)


async def test_the_same_of_tensors(home: House, far: Fake) -> None:
    far.script = Script(fault="hang")
    left = far.num_left
    async with wire_to(home) as connection:
        await connection.send(asked("/v2/models/far-tensor/infer", encoded(row())))
        await until(lambda: asks(far))
    await until(lambda: far.num_left == left + 1)


async def test_the_same_through_the_app(home: House, far: Fake) -> None:
    far.script = Script(chunks=1000, pace=0.01)
    left = far.num_left
    for stream in (True, False):
        far.received.clear()
        far.script = Script(chunks=1000, pace=0.01) if stream else Script(fault="hang")
        packed = gzip.compress(encoded(chat("far-chat", stream=stream, max_tokens=1000)))
        async with wire_to(home) as connection:
            await connection.send(asked(CHAT, packed, content_encoding="gzip"))
            if stream:
                await connection.reader.readuntil(b"guide ")
            else:
                await until(lambda: asks(far))
        left += 1
        await until(partial(far_left, far, left))


def far_left(far: Fake, number: int) -> bool:
    return far.num_left == number


async def test_head_and_first_event_come_together_and_each_further_event_at_once(home: House, far: Fake) -> None:
    far.script = Script(chunks=3, pace=0.02)
    async with wire_to(home) as connection:
        await connection.send(asked(CHAT, encoded(chat("far-chat", stream=True))))
        first = await connection.reader.read(1 << 16)
        assert first.startswith(b"HTTP/1.1 200 OK") and b"data: " in first and b"[DONE]" not in first
        await connection.reader.readuntil(b"0\r\n\r\n")


# How requests come in


VARIANTS = {
    "whole": lambda path, body: asked(path, body),
    "chunked": chunked,
    "one byte a chunk": lambda path, body: chunked(path, body, 1),
    "with a query": lambda path, body: asked(path + "?api-version=1", body),
    "HTTP/1.0": lambda path, body: asked(path, body, "1.0"),
    "compressed": lambda path, body: asked(path, gzip.compress(body), content_encoding="gzip"),
    "an odd type": lambda path, body: asked(path, body, content_type="text/plain"),
}
BODIES = {
    "there": (CHAT, chat("far-chat")),
    "there, with events": (CHAT, chat("far-chat", stream=True)),
    "here": (CHAT, chat("chat")),
    "here, with events": (CHAT, chat("chat", stream=True)),
    "nowhere": (CHAT, chat("nobody")),
    "embeddings here": ("/v1/embeddings", {"model": "chat", "input": "a b"}),
    "tensors there": ("/v2/models/far-tensor/infer", row()),
    "tensors here": ("/v2/models/identity/infer", row()),
}


def told(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, Any]:
    """What an answer says, without what is another each time."""
    status, headers, body = answer
    changing = ("id", "created")
    if headers["content-type"].startswith("text/event-stream"):
        *events, last = events_of(body)  # how many words one of them has depends on the moment
        deltas = [each["choices"][0] for each in events if each["choices"]]
        return status, ("".join(each["delta"].get("content", "") for each in deltas), deltas[-1]["finish_reason"], last)
    return status, {name: value for name, value in json.loads(body).items() if name not in changing}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BODIES)
async def test_however_a_request_comes_in_the_answer_is_the_same(home: House, far: Fake, name: str, variant: str) -> None:
    path, body = BODIES[name]
    async with wire_to(home) as connection:
        await connection.send(asked(path, encoded(body)))
        expected = told(await answered(connection))
        await connection.send(VARIANTS[variant](path, encoded(body)))
        assert told(await answered(connection)) == expected
        if variant == "HTTP/1.0":
            assert await connection.ended() == b""
        else:
            await connection.send(asked(path, encoded(body)))
            assert told(await answered(connection)) == expected


@pytest.mark.parametrize("name", BODIES)
async def test_a_request_may_be_split_anywhere(home: House, far: Fake, name: str) -> None:
    path, body = BODIES[name]
    request = asked(path, encoded(body))
    async with wire_to(home) as connection:
        connection.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await connection.send(request)
        expected = told(await answered(connection))
        for each in (request, chunked(path, encoded(body), 9)):
            for at in range(0, len(each), 3):
                await connection.send(each[at : at + 3])
                await asyncio.sleep(0)
            assert told(await answered(connection)) == expected
            for at in range(1, len(each), 11):
                await connection.send(each[:at])
                await asyncio.sleep(0)
                await connection.send(each[at:])
                assert told(await answered(connection)) == expected


async def test_pipelined_requests_of_all_kinds_are_answered_in_order(home: House, far: Fake) -> None:
    names = list(BODIES) * 4
    async with wire_to(home) as connection:
        expected = {}
        for name in BODIES:
            await connection.send(asked(BODIES[name][0], encoded(BODIES[name][1])))
            expected[name] = told(await answered(connection))
        await connection.send(b"".join(asked(BODIES[name][0], encoded(BODIES[name][1])) for name in names))
        for name in names:
            assert told(await answered(connection)) == expected[name], name


async def test_whoever_waits_for_100_continue_gets_it(home: House, far: Fake) -> None:
    for name, (path, body) in BODIES.items():
        content = encoded(body)
        request = asked(path, content, expect="100-continue")
        async with wire_to(home) as connection:
            await connection.send(request[: -len(content)])
            assert await connection.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n", name
            await connection.send(content)
            assert (await answered(connection))[0] in (200, 404)


async def test_a_body_that_cannot_be_read_is_complained_of_as_here(home: House, far: Fake) -> None:
    for body in (b"", b"{", b"[]", b'{"model": 7}', b'{"messages": []}', b"\xff\xfe"):
        response = await home.http.post(CHAT, content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert not asks(far)
    for wrong in ({"max_tokens": -1}, {"n": -1}):
        response = await home.http.post(CHAT, json=chat("far-chat", **{**wrong}) | wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(wrong)))
    assert not asks(far)


async def test_other_methods_of_the_same_paths_are_told_which_there_are(home: House, far: Fake) -> None:
    for method in ("GET", "PUT", "DELETE"):
        response = await home.http.request(method, CHAT)
        assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_supported")


async def test_a_body_above_the_limit_is_refused_and_the_client_reads_it(home: House, far: Fake) -> None:
    async with wire_to(home) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-length: {5 << 20}\r\n\r\n"
        await connection.send(head.encode())
        assert (await answered(connection))[0] == 413
    for path in (CHAT, "/v2/models/far-tensor/infer"):
        async with wire_to(home) as connection:
            connection.writer.write(chunked(path, bytes(5 << 20), 1 << 20))
            status, _, body = await answered(connection)
            assert status == 413 and b"limit" in body
    assert not asks(far)
    assert home.server.http.receiving_bytes == 0


async def test_a_large_body_goes_there_whole(home: House, far: Fake) -> None:
    body = encoded(chat("far-chat") | {"messages": [{"role": "user", "content": "word " * 400_000}]})
    for request in (asked(CHAT, body), chunked(CHAT, body, 60_000), asked(CHAT, gzip.compress(body), content_encoding="gzip")):
        async with wire_to(home) as connection:
            connection.writer.write(request)
            assert (await answered(connection))[0] == 200
        assert json.loads(asks(far)[-1].body) == json.loads(body)
    assert home.server.http.receiving_bytes == 0


# Tensors


@pytest.mark.parametrize("path", ["/v2/models/far-tensor/infer", "/v2/models/far-tensor/versions/3/infer"])
async def test_tensors_in_json_go_on_as_they_came(home: House, far: Fake, path: str) -> None:
    content = b"  " + encoded({**row(), "id": "mine"})
    response = await home.http.post(path, content=content, headers={"content-type": "application/json"})
    got = asks(far)[-1]
    assert (got.target, got.body) == (path, content)
    async with direct(far) as client:
        expected = await client.post(path, content=content)
    assert (response.status_code, response.content) == (200, expected.content)


@pytest.mark.parametrize("width", [4, 50_000])
@pytest.mark.parametrize("packed", [False, True])
async def test_binary_tensors_go_on_as_they_came(home: House, far: Fake, width: int, packed: bool) -> None:
    array = np.arange(width, dtype=np.float32)
    tensor = {"name": "x", "shape": [1, width], "datatype": "FP32", "parameters": {"binary_data_size": array.nbytes}}
    head = encoded({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    body = head + array.tobytes()
    content = gzip.compress(body) if packed else body
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    headers |= {"content-encoding": "gzip"} if packed else {}
    response = await home.http.post("/v2/models/far-tensor/infer", content=content, headers=headers)
    assert response.status_code == 200
    got = asks(far)[-1]
    assert (got.body, got.headers["inference-header-content-length"]) == (body, str(len(head)))
    assert (got.headers["content-type"], got.headers.get("content-encoding")) == ("application/octet-stream", None)
    length = int(response.headers["inference-header-content-length"])
    assert json.loads(response.content[:length])["outputs"] == [tensor]
    assert response.content[length:] == array.tobytes()


async def test_a_model_of_another_protocol_is_asked_where_it_answers(home: House, far: Fake) -> None:
    response = await home.http.post("/v2/models/far-chat/infer", json=row())
    assert response.status_code == 501 and "/v1/..." in response.json()["error"]
    response = await home.http.post(CHAT, json=chat("far-tensor"))
    assert response.status_code == 400 and "/v2/models/far-tensor/infer" in response.json()["error"]["message"]
    assert not asks(far)


async def test_what_was_used_is_written_down(home: House, far: Fake) -> None:
    for body in (chat("far-chat"), chat("far-chat", stream=True)):
        assert (await home.http.post(CHAT, json=body)).status_code == 200
    async with asyncio.timeout(20):
        while True:
            records = (await home.ops.get("/admin/usage/records", params={"model": "far-chat", "limit": 2})).json()["records"]
            if len(records) == 2 and {each["output_tokens"] for each in records} == {8}:
                break
            await asyncio.sleep(0.02)
    assert {(each["kind"], each["outcome"]) for each in records} == {("generate", "success")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [{}, {"fault": "status", "status": 400}, {"fault": "status"}, {"fault": "cut"}, {"fault": "hang"}])
async def test_what_a_request_was_made_of_is_freed_without_the_garbage_collector(
    home: House, far: Fake, script: dict[str, Any], stream: bool
) -> None:
    """It would have to look at some thirty objects of each request, which takes a tenth as long as all else that is done here."""
    kinds = (Visit, Trip, Attempt, UpstreamTicket)
    far.script = Script(**script)
    gc.collect()
    gc.disable()
    try:
        async with wire_to(home) as connection:
            await connection.send(asked(CHAT, encoded(chat("far-chat", stream=stream))))
            if "hang" in script.values():
                await until(lambda: asks(far))
            else:
                await answered(connection)
        await until(lambda: not [each for each in gc.get_objects() if isinstance(each, kinds)])
    finally:
        gc.enable()
