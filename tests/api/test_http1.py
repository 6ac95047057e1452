"""The data port as a connection sees it: order, framing, limits, deadlines, leaving and draining."""

import asyncio
import json
import socket
import struct

import numpy as np
import pytest
import uvloop

from fairlead.api.http_server import HttpServer
from tests.api.http_fake import Lines, Models, echo_app, post, question, serving, until, wire, zoo

GET = b"GET /some/path HTTP/1.1\r\nhost: test\r\n\r\n"


@pytest.fixture
async def models():
    return zoo()


@pytest.fixture
async def server(models):
    async with serving(models) as server:
        yield server


def data_of(response):
    status, _, body = response
    assert status == 200, body
    return json.loads(body)["outputs"][0]["data"]


async def held(wire, count):
    """The bodies of `count` responses, in order."""
    return [json.loads((await wire.receive())[2]) for _ in range(count)]


# Order


async def test_requests_of_both_kinds_share_a_connection(server):
    async with wire(server) as connection:
        for number in range(3):
            await connection.send(post(question([float(number)])))
            assert data_of(await connection.receive()) == [float(number)]
            await connection.send(GET)
            assert json.loads((await connection.receive())[2]) == {"method": "GET", "path": "/some/path", "size": 0}
            await connection.send(post(b"x" * number, "/v2/other"))
            assert json.loads((await connection.receive())[2])["size"] == number


async def test_pipelined_requests_are_answered_in_order(server):
    requests, expected = [], []
    for number in range(40):
        if number % 3 == 0:
            requests.append(post(question([float(number)])))
            expected.append(number)
        elif number % 3 == 1:
            requests.append(post(b"y" * number, f"/{number}"))
            expected.append(f"/{number}")
        else:
            requests.append(post(b"{", "/v2/models/fp32/infer"))
            expected.append("error")
    async with wire(server) as connection:
        await connection.send(b"".join(requests))
        answers = await held(connection, 40)
    assert [
        each["path"] if "path" in each else "error" if "error" in each else each["outputs"][0]["data"][0] for each in answers
    ] == expected


async def test_a_slow_answer_holds_back_the_ones_after_it(models):
    gate = models.gate("slow")
    async with serving(models) as server, wire(server) as connection:
        await connection.send(post(question([1.0]), "/v2/models/slow/infer") + post(question([2.0])) + GET)
        await asyncio.wait_for(gate.entered.wait(), 20)
        assert models.submitted[-1].model == "slow"
        gate.open.set()
        answers = await held(connection, 3)
    assert [answers[0]["outputs"][0]["data"], answers[1]["outputs"][0]["data"], answers[2]["path"]] == [[1.0], [2.0], "/some/path"]


async def test_many_bad_requests_behind_a_slow_one_are_each_told(models):
    gate = models.gate("slow")
    async with serving(models) as server, wire(server) as connection:
        await connection.send(post(question([1.0]), "/v2/models/slow/infer") + post(b"{") * 1500)
        await asyncio.wait_for(gate.entered.wait(), 20)
        gate.open.set()
        assert (await connection.receive())[0] == 200
        for _ in range(1500):
            assert (await connection.receive())[0] == 400


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_request_may_be_split_anywhere(server, chunked):
    body = question([3.0])
    request = post(body, x_request_id="whole")
    if chunked:
        framed = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\ntrailer: x\r\n\r\n"
        request = b"POST /v2/models/fp32/infer HTTP/1.1\r\nhost: t\r\nx-request-id: whole\r\ntransfer-encoding: chunked\r\n\r\n" + framed
    async with wire(server) as connection:
        connection.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(request)):
            await connection.send(request[at : at + 1])
            await asyncio.sleep(0)
        status, headers, answer = await connection.receive()
        assert headers["x-request-id"] == "whole"
        assert data_of((status, headers, answer)) == [3.0]
        for at in range(0, len(request), 5):
            await connection.send(request[:at])
            await asyncio.sleep(0)
            await connection.send(request[at:] + request)
            assert data_of(await connection.receive()) == [3.0]
            assert data_of(await connection.receive()) == [3.0]


async def test_a_binary_body_in_many_parts_is_put_together(server, models):
    array = np.arange(300_000, dtype=np.float32).reshape(1, -1)
    text = json.dumps(
        {"inputs": [{"name": "input", "shape": array.shape, "datatype": "FP32", "parameters": {"binary_data_size": array.nbytes}}]}
    ).encode()
    text += b" " * (3 - len(text) % 4)  # so that the tensor does not fall on a multiple of four by itself
    request = post(text + array.tobytes(), "/v2/models/fp32/infer?verbose=1", inference_header_content_length=str(len(text)))
    request = request.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\naccept-encoding: gzip\r\n", 1)
    async with wire(server) as connection:
        for at in range(0, len(request), 100_003):
            await connection.send(request[at : at + 100_003])
        status, headers, _ = await connection.receive()
        assert (status, headers["content-encoding"]) == (200, "gzip")
    arrived = models.submitted[-1].inputs["input"]
    assert np.array_equal(arrived, array)
    assert arrived.flags.aligned
    assert not arrived.flags.writeable
    assert server.receiving_bytes == 0


async def test_a_streaming_wish_goes_to_the_app(server):
    async with wire(server) as connection:
        await connection.send(post(b"{}", accept="text/event-stream"))
        assert json.loads((await connection.receive())[2])["path"] == "/v2/models/fp32/infer"
        await connection.send(post(question(), accept="application/json"))
        assert data_of(await connection.receive()) == [1.0, 2.0]


@pytest.mark.parametrize(
    "path", ["/v2/models/fp32/infer/", "/v2/models/fp32/versions/x/infer", "/v2/models//infer", "/v2/models/a/b/infer", "/infer"]
)
async def test_other_paths_go_to_the_app(server, path):
    async with wire(server) as connection:
        await connection.send(post(b"{}", path))
        assert json.loads((await connection.receive())[2])["path"] == path


async def test_an_absolute_url_is_understood(server):
    async with wire(server) as connection:
        await connection.send(post(question(), "http://somewhere:8000/v2/models/fp32/versions/1/infer?x=y"))
        assert data_of(await connection.receive()) == [1.0, 2.0]


# Framing


async def test_old_clients_and_those_that_say_so_are_left_after_the_answer(server):
    for request in (
        post(question(), version="1.0"),
        post(question(), version="1.0", connection="keep-alive"),
        post(question(), connection="close"),
        GET.replace(b"1.1", b"1.0"),
    ):
        async with wire(server) as connection:
            await connection.send(request)
            status, headers, _ = await connection.receive()
            assert (status, headers["connection"]) == (200, "close")
            assert await connection.ended() == b""


async def test_an_old_client_gets_a_stream_without_chunks(models):
    async def streaming_app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for piece in (b"data: one\n\n", b"", b"data: two\n\n"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with serving(models, streaming_app) as server:
        for version, rest in (
            (b"1.0", b"data: one\n\ndata: two\n\n"),
            (b"1.1", b"b\r\ndata: one\n\n\r\nb\r\ndata: two\n\n\r\n0\r\n\r\n"),
        ):
            async with wire(server) as connection:
                await connection.send(b"GET /some/path HTTP/%b\r\nhost: test\r\nconnection: close\r\n\r\n" % version)
                status, headers, _ = await connection.receive()
                assert (status, headers["connection"], "transfer-encoding" in headers) == (200, "close", version == b"1.1")
                assert await connection.ended() == rest
            async with wire(server) as connection:
                await connection.send(GET.replace(b"GET", b"HEAD").replace(b"1.1", version))
                status, headers, _ = await connection.receive(head=True)
                assert (status, headers.get("connection")) == (200, "close" if version == b"1.0" else None)
                if version == b"1.0":
                    assert await connection.ended() == b""


async def test_what_follows_connection_close_is_not_served(server, models):
    async with wire(server) as connection:
        await connection.send(post(question(), connection="close") + post(question()))
        assert (await connection.receive())[0] == 200
        assert await connection.ended() == b""
    assert len(models.submitted) == 1


async def test_a_careful_client_is_told_to_continue_or_not_to(models):
    async with serving(models, max_body_bytes=1000) as server:
        for path in ("/v2/models/fp32/infer", "/other"):
            async with wire(server) as connection:
                head, body = post(question(), path, expect="100-continue").split(b"\r\n\r\n")
                await connection.send(head + b"\r\n\r\n")
                assert (await connection.receive())[0] == 100
                await connection.send(body)
                assert (await connection.receive())[0] == 200
        async with wire(server) as connection:
            await connection.send(b"POST /v2/models/fp32/infer HTTP/1.1\r\nhost: t\r\nexpect: 100-continue\r\ncontent-length: 1001\r\n\r\n")
            assert (await connection.receive())[0] == 413


async def test_an_upgrade_is_ignored_and_the_body_read(server):
    async with wire(server) as connection:
        for path in ("/v2/models/fp32/infer", "/other"):
            request = post(question(), path, connection="Upgrade, HTTP2-Settings", upgrade="h2c", http2_settings="AAMAAABkAAQAAP__")
            await connection.send(request + request)
            for _ in range(2):
                status, _, body = await connection.receive()
                assert status == 200
                assert b'"size": %d' % len(question()) in body or b"outputs" in body


async def test_a_head_request_has_no_body(server):
    async with wire(server) as connection:
        await connection.send(GET.replace(b"GET", b"HEAD") + post(question()))
        status, headers, _ = await connection.receive(head=True)
        assert (status, int(headers["content-length"]) > 0) == (200, True)
        assert data_of(await connection.receive()) == [1.0, 2.0]


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT there:80 HTTP/1.1\r\nhost: there\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v2/models/fp32/infer HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v2/models/fp32/infer HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /v2/models/fp32/infer HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST /v2/models/fp32/infer HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nabc",
        b"POST /v2/models/fp32/infer HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /other HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v2/models/\xff\xfe/infer HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_an_error_in_json(server, request_):
    async with wire(server) as connection:
        await connection.send(request_)
        status, headers, body = await connection.receive()
        assert status in (400, 501)
        assert headers["content-type"] == "application/json"
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]


async def test_an_error_in_the_pipeline_comes_in_its_turn(models):
    gate = models.gate("slow")
    async with serving(models) as server, wire(server) as connection:
        await connection.send(post(question([1.0]), "/v2/models/slow/infer") + b"what is this?\r\n\r\n")
        await asyncio.wait_for(gate.entered.wait(), 20)
        gate.open.set()
        assert data_of(await connection.receive()) == [1.0]
        assert (await connection.receive())[0] == 400
        assert await connection.ended() == b""


async def test_an_app_may_answer_before_the_body_is_there(server):
    async with wire(server) as connection:
        head, body = post(b"z" * 100_000, "/early").split(b"\r\n\r\n")
        await connection.send(head + b"\r\n\r\n" + body[:10])
        assert json.loads((await connection.receive())[2])["path"] == "/early"
        await connection.send(body[10:] + post(question()))
        assert data_of(await connection.receive()) == [1.0, 2.0]


async def test_an_app_that_fails_answers_in_json(server):
    async with wire(server) as connection:
        await connection.send(post(b"", "/raise") + GET)
        status, _, body = await connection.receive()
        assert (status, json.loads(body)) == (500, {"error": "internal error"})
        assert (await connection.receive())[0] == 200


# Headers of the answer


async def test_request_ids_and_traces_pass_through(server):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with wire(server) as connection:
        await connection.send(post(question(), x_request_id="abc-1", traceparent=trace))
        _, headers, _ = await connection.receive()
        assert (headers["x-request-id"], headers["traceparent"]) == ("abc-1", trace)
        await connection.send(post(b"{", x_request_id="abc-2"))
        assert (await connection.receive())[1]["x-request-id"] == "abc-2"
        seen = set()
        for insane in ("", "a b", "x" * 129, "\xff"):
            await connection.send(post(question(), x_request_id=insane))
            seen.add((await connection.receive())[1]["x-request-id"])
        assert len(seen) == 4
        assert seen.isdisjoint(("", "a b", "x" * 129))
    assert server.finished.lines[0]["trace"] == trace


async def test_every_request_leaves_one_line_in_the_access_log(server):
    async with wire(server) as connection:
        await connection.send(post(question()) + post(question(request_id="7")[:-1]) + post(question(), "/v2/models/nobody/infer"))
        for _ in range(3):
            await connection.receive()
    lines = server.finished.lines
    assert [(line["model"], line["version"], line["status"], line["rows"]) for line in lines] == [
        ("fp32", "1", 200, 1),
        ("fp32", "", 400, 0),
        ("nobody", "", 404, 1),
    ]
    assert lines[0]["error"] == ""
    assert "not found" in lines[2]["error"]
    assert [(line["outcome"], line["reason"]) for line in lines] == [
        ("success", ""),
        ("refused", "invalid-request"),
        ("refused", "not-found"),
    ]
    timeline = lines[0]["timeline"]
    assert timeline.bytes_in == len(question()) and timeline.bytes_out > 0
    assert next(name for _, name, _ in timeline.events) == "decoded" and timeline.events[-1][1] == "encoded"
    assert len({line["request_id"] for line in lines}) == 3


# Limits


@pytest.mark.parametrize("path", ["/v2/models/fp32/infer", "/other"])
async def test_a_body_that_announces_too_much_is_refused_unread(models, path):
    async with serving(models, max_body_bytes=1000) as server, wire(server) as connection:
        await connection.send(f"POST {path} HTTP/1.1\r\nhost: t\r\ncontent-length: 1001\r\n\r\n".encode())
        status, headers, body = await connection.receive()
        assert (status, headers["connection"]) == (413, "close")
        assert "limit of 1000 bytes" in json.loads(body)["error"]
        assert await connection.ended() == b""


@pytest.mark.parametrize("path", ["/v2/models/fp32/infer", "/other"])
async def test_chunks_are_counted(models, path):
    async with serving(models, max_body_bytes=100_000) as server, wire(server) as connection:
        await connection.send(f"POST {path} HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for _ in range(11):
            await connection.send(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        status, _, body = await connection.receive()
        assert status == 413, body
        assert server.receiving_bytes == 0


async def test_endless_frames_around_nothing_are_cut(models):
    async with serving(models, max_body_bytes=1000) as server, wire(server) as connection:
        await connection.send(b"POST /v2/models/fp32/infer HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n")
        await connection.send(b"1\r\nx\r\n0\r\n")
        for _ in range(40):
            await connection.send(b"trailer: x\r\n" * 1000)
            await asyncio.sleep(0)
        assert (await connection.receive())[0] == 413


async def test_a_head_without_end_is_cut(server):
    for endless in (b"x: y\r\n", b"y" * 100):
        async with wire(server) as connection:
            await connection.send(b"GET / HTTP/1.1\r\nlong: ")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                for _ in range(40_000):
                    await connection.send(endless)
                    await asyncio.sleep(0)
                    if not connection.reader._buffer and not connection.reader.at_eof():
                        continue
                    status, _, body = await connection.receive()
                    assert (status, "longer than" in json.loads(body)["error"]) == (431, True)
                    raise ConnectionResetError


async def test_what_all_uploads_hold_together_is_bounded(models):
    async with serving(models, max_body_bytes=1 << 20, max_receiving_bytes=1 << 20) as server:
        head = b"POST /v2/models/fp32/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 1000000\r\n\r\n"
        async with wire(server) as first, wire(server) as second, wire(server) as third:
            await first.send(head + b" " * 900_000)
            await until(lambda: server.receiving_bytes >= 900_000)
            await second.send(head)
            status, headers, body = await second.receive()
            assert (status, headers["retry-after"]) == (503, "1")
            assert "being received already" in json.loads(body)["error"]
            await third.send(post(question()))
            assert (await third.receive())[0] == 200
        await until(lambda: not server.receiving_bytes)


async def test_connections_are_bounded(models):
    async with serving(models, max_connections=2) as server, wire(server) as first, wire(server) as second:
        for connection in (first, second):
            await connection.send(GET)
            await connection.receive()
        async with wire(server) as third:
            status, _, body = await third.receive()
            assert (status, "2 connections" in json.loads(body)["error"]) == (503, True)
        await first.send(GET)
        assert (await first.receive())[0] == 200


async def test_answers_to_a_client_that_does_not_read_do_not_pile_up(models):
    count = 400
    async with serving(models) as server, wire(server) as connection:
        sending = asyncio.create_task(_send_all(connection.writer, post(question([0.1] * 4000)) * count))
        (protocol,) = await connections_of(server)
        await until(lambda: protocol.flow.write_paused)
        assert len(models.submitted) < count, "the server computed on for a client that reads nothing"
        assert protocol.flow.read_paused
        protocol.sweep(protocol.unsent_since + 59)
        for _ in range(count):
            assert (await connection.receive())[0] == 200
        await sending


async def test_a_client_that_never_reads_is_cut_off(models):
    async with serving(models) as server, wire(server) as connection:
        sending = asyncio.create_task(_send_all(connection.writer, post(question([0.1] * 4000)) * 400))
        (protocol,) = await connections_of(server)
        await until(lambda: protocol.flow.write_paused)
        protocol.sweep(protocol.unsent_since + 61)
        with pytest.raises(ConnectionError):
            await sending


async def _send_all(writer, data):
    for at in range(0, len(data), 65536):
        writer.write(data[at : at + 65536])
        await writer.drain()


# Deadlines: the sweep, asked at a time of the test's choosing


async def connections_of(server, count=1):
    await until(lambda: server.num_connections >= count)
    return list(server._state.connections)


async def test_idle_connections_are_closed_and_busy_ones_are_not(models):
    gate = models.gate("slow")
    async with serving(models, keep_alive=100) as server, wire(server) as idle, wire(server) as busy:
        await idle.send(GET)
        await idle.receive()
        await busy.send(post(question(), "/v2/models/slow/infer"))
        await asyncio.wait_for(gate.entered.wait(), 20)
        for connection in await connections_of(server, 2):
            connection.sweep(connection.heard + 50)
        await idle.send(GET)
        assert (await idle.receive())[0] == 200
        for connection in await connections_of(server, 2):
            connection.sweep(connection.heard + 101)
        assert await idle.ended() == b""
        gate.open.set()
        assert (await busy.receive())[0] == 200


@pytest.mark.parametrize(
    ("part", "seconds"),
    [
        (b"POST /v2/models/fp32/infer HT", 16),
        (b"POST /v2/models/fp32/infer HTTP/1.1\r\ncontent-length: 100\r\n\r\n123", 31),
        (b"POST /other HTTP/1.1\r\ncontent-length: 100\r\n\r\n123", 31),
    ],
)
async def test_a_request_that_does_not_come_to_an_end_is_refused(server, part, seconds):
    async with wire(server) as connection:
        await connection.send(part)
        (protocol,) = await connections_of(server)
        await until(lambda: protocol.stage)
        protocol.sweep(protocol.heard + seconds / 2)
        assert not protocol.deaf
        protocol.sweep(protocol.heard + seconds)
        status, headers, body = await connection.receive()
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["error"]


async def test_a_refused_client_that_goes_on_sending_is_cut_off(models):
    async with serving(models, max_body_bytes=1000) as server, wire(server) as connection:
        await connection.send(b"POST /v2/models/fp32/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 9999999\r\n\r\n")
        assert (await connection.receive())[0] == 413
        await connection.send(b"x" * 1000)
        (protocol,) = await connections_of(server)
        protocol.sweep(protocol.linger_until + 1)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                await connection.send(b"x" * 10_000)
                await asyncio.sleep(0.001)


# Leaving


async def test_a_client_that_leaves_cancels_its_request(models):
    gate = models.gate("slow")
    async with serving(models) as server:
        async with wire(server) as busy, wire(server) as connection:
            await busy.send(post(question([1.0]), "/v2/models/slow/infer"))
            await asyncio.wait_for(gate.entered.wait(), 20)
            await connection.send(post(question([2.0]), "/v2/models/slow/infer") + post(question([3.0])))
            await until(lambda: len(models.submitted) == 2)
            await connection.close()
            lines = await server.finished.wait(2)
            assert [(line["status"], line["outcome"]) for line in lines] == [(499, "cancelled")] * 2
            assert models.versions["slow"].batcher.num_requests == 0
            gate.open.set()
            assert data_of(await busy.receive()) == [1.0]
        assert len(models.submitted) == 2


async def test_a_reset_in_the_middle_of_a_body_leaves_nothing_behind(server):
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v2/models/fp32/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 9000000\r\n\r\n" + b" " * 1_000_000)
    await writer.drain()
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    lines = await server.finished.wait(1)
    assert lines[0]["status"] == 499
    assert server.receiving_bytes == 0
    assert server.num_connections == 0


# Draining


async def test_draining_finishes_what_is_in_flight_and_closes_the_rest():
    models = Models()
    gate = models.gate("slow")
    async with serving(models) as server, wire(server) as idle, wire(server) as busy, wire(server) as half:
        await idle.send(GET)
        await idle.receive()
        await busy.send(post(question(), "/v2/models/slow/infer"))
        head, body = post(question(), "/v2/models/slow/infer").split(b"\r\n\r\n")
        await half.send(head + b"\r\n\r\n" + body[:10])
        await asyncio.wait_for(gate.entered.wait(), 20)
        await until(lambda: any(connection.stage for connection in server._state.connections))
        draining = asyncio.create_task(server.drain(20))
        assert await idle.ended() == b""
        with pytest.raises(OSError):
            async with wire(server) as late:
                await late.send(GET)
                await late.receive()
                raise OSError
        await half.send(body[10:])
        gate.open.set()
        for connection in (busy, half):
            status, headers, _ = await connection.receive()
            assert (status, headers["connection"]) == (200, "close")
            assert await connection.ended() == b""
        await draining


async def test_draining_does_not_wait_for_ever():
    models = Models()
    gate = models.gate("slow")
    async with serving(models) as server, wire(server) as stuck, wire(server) as waiting:
        await stuck.send(post(question(), "/v2/models/slow/infer"))
        await waiting.send(b"POST /other HTTP/1.1\r\ncontent-length: 5\r\n\r\n")
        await asyncio.wait_for(gate.entered.wait(), 20)
        await connections_of(server, 2)
        await server.drain(0.05)
        assert server.num_connections == 0
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await stuck.receive()
        gate.open.set()


async def test_a_taken_port_is_an_os_error_and_another_can_be_tried(server, models):
    other = HttpServer(models, echo_app, Lines())
    with pytest.raises(OSError, match="address already in use"):
        await other.listen("127.0.0.1", server.port)
    await other.listen("127.0.0.1", 0)
    async with wire(other) as connection:
        await connection.send(GET)
        assert (await connection.receive())[0] == 200
    await other.drain(5)


async def test_a_port_without_a_repository_leaves_everything_to_its_app():
    async with serving(None) as server, wire(server) as connection:
        await connection.send(post(question()))
        assert json.loads((await connection.receive())[2])["path"] == "/v2/models/fp32/infer"


def test_uvloop_serves_the_same():
    async def story():
        models = zoo()
        gate = models.gate("slow")
        array = np.arange(200_000, dtype=np.float32).reshape(1, -1)
        text = json.dumps(
            {"inputs": [{"name": "input", "shape": array.shape, "datatype": "FP32", "parameters": {"binary_data_size": array.nbytes}}]}
        ).encode()
        text = text.replace(b'"inputs"', b'"parameters":{"binary_data_output":true},"inputs"')
        async with serving(models, max_body_bytes=1 << 20) as server:
            async with wire(server) as connection:
                large = post(text + array.tobytes(), inference_header_content_length=str(len(text)))
                await connection.send(large + GET + post(question()) + large)
                for kind in ("large", "app", "small", "large"):
                    status, headers, body = await connection.receive()
                    assert status == 200
                    if kind == "large":
                        assert body[int(headers["inference-header-content-length"]) :] == array.tobytes()
            async with wire(server) as connection:
                await connection.send(post(question(), "/v2/models/slow/infer"))
                await gate.entered.wait()
            await until(lambda: any(line["status"] == 499 for line in server.finished.lines))
            gate.open.set()
            async with wire(server) as connection:
                await connection.send(b"POST /v2/models/fp32/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 9999999\r\n\r\n" + b"x" * 500_000)
                assert (await connection.receive())[0] == 413
        assert server.num_connections == 0

    uvloop.run(asyncio.wait_for(story(), 30))
