"""gRPC's own rules: framing, compression, deadlines, metadata, statuses."""

import asyncio
import gzip
import zlib

import grpc
import grpc.aio
import h2.events
import numpy as np
import pytest
import pytest_asyncio
from tritonclient.grpc import service_pb2 as pb

from tests.api.grpc.gates import GATES, close_gates, reached
from tests.api.grpc.served import INFER, STREAM_INFER, framed, only, request, row, served

pytestmark = pytest.mark.asyncio(loop_scope="module")
IDENTITY = request("identity", x=row(1, 2)).SerializeToString()
LIMIT = 1 << 20
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    close_gates()
    async with served(tmp_path_factory.mktemp("models") / "m", "identity", "gated", "failing", max_message_bytes=LIMIT) as running:
        yield running


async def raw(port, data: bytes, path: str = INFER, **more: str):
    """The answer to bytes that need not be a message."""
    peer = await port.peer()
    stream = peer.h2.get_next_available_stream_id()
    peer.h2.send_headers(stream, peer.headers(path, **more), end_stream=not data)
    for at in range(0, len(data), 16_000):
        peer.h2.send_data(stream, data[at : at + 16_000], end_stream=at + 16_000 >= len(data))
    await peer.flush()
    answer = await peer.answer(stream)
    peer.close()
    return answer


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
async def test_compressed_requests_are_read(port, encoding):
    plain = request("identity", x=np.zeros((1, 5000), np.float32)).SerializeToString()
    squeeze = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[encoding]
    answer = await raw(port, framed(squeeze(plain), encoding != "identity"), grpc_encoding=encoding)
    assert only(answer.response) == [0] * 5000
    # An encoding may be announced and not used.
    assert only((await raw(port, framed(plain), grpc_encoding=encoding)).response) == [0] * 5000


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_grpcio_may_compress(port, compression):
    x = np.arange(200_000, dtype=np.float32)[None] % 7
    assert only(await port.infer(request("identity", x=x), compression=compression)) == x[0].tolist()


async def test_a_large_compressed_message_is_inflated_beside_the_loop(port):
    noise = np.frombuffer(np.random.default_rng(0).bytes(200_000), np.uint8).astype(np.float32)[None]
    answer = await raw(port, framed(gzip.compress(request("identity", x=noise).SerializeToString(), 1), 1), grpc_encoding="gzip")
    assert only(answer.response) == noise[0].tolist()


@pytest.mark.parametrize(
    ("data", "more", "status", "says"),
    [
        (b"", {}, 13, "the request ended before its message was complete"),
        (b"\0\0", {}, 13, "the request ended before its message was complete"),
        (framed(IDENTITY)[:-1], {}, 13, "the request ended before its message was complete"),
        (framed(IDENTITY) * 2, {}, 13, "a unary call has one message"),
        (framed(IDENTITY, 2), {}, 13, "a message has the flag 2"),
        (framed(IDENTITY, 1), {}, 13, "a message is compressed, and grpc-encoding does not say how"),
        (framed(IDENTITY, 1), {"grpc_encoding": "gzip"}, 3, "does not decompress"),
        (framed(gzip.compress(IDENTITY, mtime=0)[:-9], 1), {"grpc_encoding": "gzip"}, 3, "does not decompress"),
        (framed(gzip.compress(IDENTITY, mtime=0) * 2, 1), {"grpc_encoding": "gzip"}, 3, "extra bytes"),
        (framed(gzip.compress(bytes(2 * LIMIT), mtime=0), 1), {"grpc_encoding": "gzip"}, 8, f"larger than {LIMIT} bytes"),
        (framed(gzip.compress(bytes(LIMIT + 1), mtime=0), 1), {"grpc_encoding": "gzip"}, 8, f"larger than {LIMIT} bytes"),
        (framed(IDENTITY), {"grpc_encoding": "snappy"}, 12, "grpc-encoding 'snappy' is not supported"),
        (framed(bytes(LIMIT + 1)), {}, 8, f"Received message larger than max ({LIMIT + 1} vs. {LIMIT})"),
        (b"\0\xff\xff\xff\xff", {}, 8, f"Received message larger than max ({2**32 - 1} vs. {LIMIT})"),
        (framed(IDENTITY), {"grpc_timeout": "soon"}, 13, "malformed grpc-timeout: 'soon'"),
        (framed(IDENTITY), {"grpc_timeout": "123456789S"}, 13, "malformed grpc-timeout"),
        (framed(b"\x0a\x05ab"), {}, 3, "it is truncated"),
    ],
)
async def test_what_is_no_message_is_refused(port, data, more, status, says):
    answer = await raw(port, data, **more)
    assert (answer.status, says in answer.message) == (str(status), True), answer
    assert len(answer.heads) == 1  # trailers only
    if status == 12:
        assert answer.heads[0]["grpc-accept-encoding"] == "identity,deflate,gzip"


async def test_a_message_that_is_refused_early_ends_the_stream_for_the_client_too(port):
    peer = await port.peer()
    stream = await peer.ask(bytes(3), ended=False)
    peer.h2.send_data(stream, b"\0\xff\xff\xff\xff")
    await peer.flush()
    assert (await peer.answer(stream)).status == "8"
    assert (await peer.wait_for(h2.events.StreamReset, stream)).error_code == 0
    await peer.send_raw(0, 1, stream, b"what was already under way")
    assert only((await peer.answer(await peer.ask(IDENTITY))).response) == [1, 2]
    peer.close()


@pytest.mark.parametrize("path", ["/inference.GRPCInferenceService/Guess", "/", "/nothing"])
async def test_unknown_methods_are_unimplemented(port, path):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await port.infer(b"", path)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == f"unknown method {path}"


async def test_what_is_not_grpc_is_told_in_http(port):
    peer = await port.peer()
    for more, status in (({"content-type": "application/json"}, "415"), ({"content-type": "application/grpcweb"}, "415")):
        stream = peer.h2.get_next_available_stream_id()
        peer.h2.send_headers(stream, peer.headers(**more), end_stream=True)
        await peer.flush()
        assert (await peer.answer(stream)).heads == [{":status": status}]
    stream = peer.h2.get_next_available_stream_id()
    head = [(name, value if name != ":method" else "GET") for name, value in peer.headers()]
    peer.h2.send_headers(stream, head, end_stream=True)
    await peer.flush()
    assert (await peer.answer(stream)).heads == [{":status": "405", "allow": "POST"}]
    peer.close()


@pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"])
async def test_content_types_of_grpc(port, kind):
    answer = await raw(port, framed(IDENTITY), **{"content-type": kind})
    assert answer.heads[0]["content-type"] == "application/grpc"
    assert only(answer.response) == [1, 2]


async def test_a_deadline_ends_the_call_and_the_request(port):
    close_gates()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await port.infer(request("gated", x=row(1)), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    answer = await raw(port, framed(request("gated", x=row(2)).SerializeToString()), grpc_timeout="30m")
    assert (answer.status, answer.message) == ("4", "Deadline Exceeded")
    GATES.opened.set()
    assert only(await port.infer(request("gated", x=row(3)), timeout=20)) == [3]


async def test_a_call_that_is_cancelled_before_its_turn_is_never_computed(port):
    gates = close_gates()
    before = port.repository.statistics("gated")[0]["inference_count"]
    first = asyncio.create_task(port.infer(request("gated", x=row(1))))
    await reached(gates.entered)
    peer = await port.peer()
    stream = await peer.ask(request("gated", x=row(2)).SerializeToString(), x_request_id="waits")
    await peer.send_raw(6, 0, 0, b"is it in")
    await peer.wait_for(h2.events.PingAckReceived)
    peer.h2.reset_stream(stream)
    await peer.flush()
    while (line := await port.lines.next())["request_id"] != "waits":
        pass
    assert (line["status"], line["model"]) == (1, "gated")
    gates.opened.set()
    assert only(await first) == [1]
    assert port.repository.statistics("gated")[0]["inference_count"] == before + 1
    peer.close()


async def test_a_connection_that_is_lost_cancels_its_calls(port):
    gates = close_gates()
    first = asyncio.create_task(port.infer(request("gated", x=row(1))))
    await reached(gates.entered)
    peer = await port.peer()
    await peer.ask(request("gated", x=row(2)).SerializeToString(), x_request_id="leaves")
    await peer.send_raw(6, 0, 0, b"is it in")
    await peer.wait_for(h2.events.PingAckReceived)
    peer.writer.transport.abort()
    while (line := await port.lines.next())["request_id"] != "leaves":
        pass
    assert line["status"] == 1
    gates.opened.set()
    assert only(await first) == [1]


async def test_request_ids_and_traces_are_passed_on(port):
    while not port.lines.queue.empty():
        port.lines.queue.get_nowait()
    call = port.channel.unary_unary(INFER)(IDENTITY, metadata=[("x-request-id", "mine"), ("traceparent", TRACE)])
    await call
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"
    line = await port.lines.next()
    assert line.pop("seconds") > 0
    assert line.pop("timeline").bytes_in == len(IDENTITY)
    assert line == {
        "protocol": "grpc", "request_id": "mine", "trace": TRACE, "model": "identity", "version": "1", "status": 0, "rows": 1, "error": "",
        "outcome": "success", "reason": "", "path": "/inference.GRPCInferenceService/ModelInfer",
    }  # fmt: skip
    call = port.channel.unary_unary(INFER)(IDENTITY)
    await call
    made = dict(await call.initial_metadata())["x-request-id"]
    assert made == (await port.lines.next())["request_id"] != ""


@pytest.mark.parametrize("id", ["", "has spaces", "x" * 200])
async def test_a_request_id_that_is_no_id_is_replaced(port, id):
    answer = await raw(port, framed(IDENTITY), x_request_id=id)
    assert answer.heads[0]["x-request-id"] not in ("", id)


async def test_messages_of_errors_may_hold_anything(port):
    name = 'ä %41 \n\t "quoted" ' + "long" * 2000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await port.infer(request(name, x=row(1)))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details().startswith('Request for unknown model: \'ä %41 \n\t "quoted" long')


async def test_every_end_of_a_request_is_one_line_in_the_log(port):
    while not port.lines.queue.empty():
        port.lines.queue.get_nowait()
    for message in (request("identity", x=row(1, 2)), request("failing", x=row(1)), request("nobody", x=row(1)), request("identity")):
        try:
            await port.infer(message)
        except grpc.aio.AioRpcError as error:
            told = error.details()
        else:
            told = ""
        line = await port.lines.next()
        assert (line["model"], line["error"]) == (message.model_name, told)
        assert (line["status"] == 0) == (told == "")
    assert port.lines.queue.empty()
    assert port.lines.responses["grpc", 0] > 0


async def test_a_stream_that_ends_inside_a_message_fails(port):
    answer = await raw(port, framed(IDENTITY)[:-2], STREAM_INFER)
    assert (answer.status, answer.message) == ("13", "the stream ended inside a message")


async def test_a_stream_may_be_compressed_too(port):
    pieces = b"".join(framed(gzip.compress(IDENTITY), 1) if i % 2 else framed(IDENTITY) for i in range(6))
    answer = await raw(port, pieces, STREAM_INFER, grpc_encoding="gzip")
    assert answer.status == "0"
    seen = 0
    while answer.body:
        size = int.from_bytes(answer.body[1:5], "big")
        assert only(pb.ModelStreamInferResponse.FromString(answer.body[5 : 5 + size]).infer_response) == [1, 2]
        answer.body = answer.body[5 + size :]
        seen += 1
    assert seen == 6
