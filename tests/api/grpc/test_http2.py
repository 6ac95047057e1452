"""HTTP/2 at its edges: small windows, large answers, rules broken and resources abused."""

import asyncio

import h2.errors
import h2.events
import numpy as np
import pytest
import pytest_asyncio
from h2.errors import ErrorCodes

from fairlead.api.grpc.http2 import Limits
from tests.api.grpc.gates import GATES, close_gates
from tests.api.grpc.served import INFER, STREAM_INFER, Served, count, framed, only, request, row, served

pytestmark = pytest.mark.asyncio(loop_scope="module")
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
IDENTITY = request("identity", x=row(1, 2)).SerializeToString()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    close_gates()
    async with served(tmp_path_factory.mktemp("models") / "m", "identity", "count", "gated") as running:
        yield running


def block(peer, *, path: str = INFER, **more: str) -> bytes:
    """A header block of a request."""
    return peer.h2.encoder.encode(peer.headers(path, **more))


async def works(peer) -> bool:
    return only((await peer.answer(await peer.ask(IDENTITY))).response) == [1, 2]


# Windows


async def test_a_window_of_one_byte_is_respected(port):
    peer = await port.peer(initial_window=1)
    stream = await peer.ask(IDENTITY)
    await peer.wait_for(h2.events.DataReceived, stream)
    answer = await peer.answer(stream)
    sizes = [len(event.data) for event in peer.events if isinstance(event, h2.events.DataReceived)]
    assert set(sizes) == {1}
    assert only(answer.response) == [1, 2]
    peer.close()


async def test_a_large_answer_waits_for_the_connection_window_and_leaves_in_frames_that_the_peer_takes(port):
    peer = await port.peer()
    x = np.arange(100_000, dtype=np.float32)[None]
    stream = await peer.ask(request("identity", x=x).SerializeToString())
    held = 0
    while held < 65_535:  # h2 counts the window too, and would raise if the server went beyond
        await peer.read()
        held = sum(len(event.data) for event in peer.events if isinstance(event, h2.events.DataReceived))
    assert await works_beside(port)
    peer.h2.increment_flow_control_window(1 << 20)
    peer.h2.increment_flow_control_window(1 << 20, stream)
    await peer.flush()
    answer = await peer.answer(stream, give_back=False)
    assert only(answer.response) == x[0].tolist()
    assert max(len(event.data) for event in peer.events if isinstance(event, h2.events.DataReceived)) <= 16_384
    peer.close()


async def works_beside(port: Served) -> bool:
    return only(await port.infer(request("identity", x=row(3)))) == [3]


async def test_a_change_of_the_initial_window_moves_open_streams(port):
    peer = await port.peer(initial_window=0)
    stream = await peer.ask(IDENTITY)
    await peer.wait_for(h2.events.ResponseReceived, stream)
    peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    await peer.flush()
    assert only((await peer.answer(stream)).response) == [1, 2]
    peer.close()


async def test_streams_share_the_window_in_turn(port):
    peer = await port.peer(initial_window=1 << 20)
    peer.h2.increment_flow_control_window(1 << 20)
    await peer.flush()
    x = np.zeros((1, 50_000), np.float32)
    streams = [await peer.ask(request("identity", x=x).SerializeToString()) for _ in range(3)]
    for stream in streams:
        assert len((await peer.answer(stream)).response.raw_output_contents[0]) == x.nbytes
    peer.close()


async def test_a_request_larger_than_all_windows_gets_more_room_as_it_comes(port):
    x = np.arange(3_000_000, dtype=np.float32)[None]
    assert np.array_equal(np.frombuffer((await port.infer(request("identity", x=x))).raw_output_contents[0], np.float32), x[0])


async def test_padding_counts_and_is_dropped(port):
    peer = await port.peer()
    stream = peer.h2.get_next_available_stream_id()
    peer.h2.send_headers(stream, peer.headers())
    data = framed(IDENTITY)
    peer.h2.send_data(stream, data[:7], pad_length=200)
    peer.h2.send_data(stream, b"", pad_length=0)
    peer.h2.send_data(stream, data[7:], pad_length=3, end_stream=True)
    await peer.flush()
    assert only((await peer.answer(stream)).response) == [1, 2]
    peer.close()


async def test_frames_may_come_byte_by_byte(port):
    peer = await port.peer()
    stream = peer.h2.get_next_available_stream_id()
    peer.h2.send_headers(stream, [*peer.headers(), ("x-long", "y" * 300)], priority_weight=3)
    peer.h2.send_data(stream, framed(IDENTITY), pad_length=5, end_stream=True)
    for byte in peer.h2.data_to_send():
        peer.writer.write(bytes((byte,)))
        await asyncio.sleep(0)
    assert only((await peer.answer(stream)).response) == [1, 2]
    peer.close()


async def test_header_blocks_continue(port):
    peer = await port.peer()
    stream = peer.h2.get_next_available_stream_id()
    head = block(peer)
    await peer.send_raw(HEADERS, 0, stream, head[:5])
    await peer.send_raw(CONTINUATION, 0, stream, head[5:9])
    await peer.send_raw(CONTINUATION, 4, stream, head[9:])
    peer.h2.send_headers(stream, peer.headers())  # for the client's own state only
    peer.h2.clear_outbound_data_buffer()
    await peer.send_raw(DATA, 1, stream, framed(IDENTITY))
    assert only((await peer.answer(stream)).response) == [1, 2]
    peer.close()


async def test_trailers_of_a_client_end_its_request(port):
    peer = await port.peer()
    stream = await peer.ask(IDENTITY, ended=False)
    peer.h2.send_headers(stream, [("x-checksum", "1")], end_stream=True)
    await peer.flush()
    assert only((await peer.answer(stream)).response) == [1, 2]
    peer.close()


async def test_the_dynamic_table_of_the_peer_is_followed(port):
    peer = await port.peer()
    for i in range(40):
        answer = await peer.answer(await peer.ask(IDENTITY, x_request_id=f"request-{i % 3}", x_filler=str(i) * 200))
        assert answer.heads[0]["x-request-id"] == f"request-{i % 3}"
    peer.close()


async def test_pings_are_answered_and_unknown_frames_ignored(port):
    peer = await port.peer()
    await peer.send_raw(0xBE, 0xFF, 1, b"what is this")
    peer.h2.ping(b"12345678")
    await peer.flush()
    assert (await peer.wait_for(h2.events.PingAckReceived)).ping_data == b"12345678"
    await peer.send_raw(PRIORITY, 0, 1, bytes(5))
    assert await works(peer)
    peer.close()


async def test_answers_to_many_streams_leave_together(port):
    peer = await port.peer()
    streams = [await peer.ask(IDENTITY) for _ in range(100)]
    for stream in streams:
        assert only((await peer.answer(stream)).response) == [1, 2]
    peer.close()


# Rules broken


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", b"\x16\x03\x01"])
async def test_a_wrong_preface_ends_the_connection(port, start):
    reader, writer = await asyncio.open_connection("127.0.0.1", port.server.port)
    writer.write(start)
    async with asyncio.timeout(10):
        said = await reader.read()
    assert b"this port speaks gRPC" in said
    writer.close()
    await writer.wait_closed()


BROKEN = {
    "SETTINGS is not first": (None, [(PING, 0, 0, bytes(8))], ErrorCodes.PROTOCOL_ERROR),
    "SETTINGS on a stream": ("", [(SETTINGS, 0, 1, b"")], ErrorCodes.PROTOCOL_ERROR),
    "SETTINGS of a wrong size": ("", [(SETTINGS, 0, 0, b"12345")], ErrorCodes.FRAME_SIZE_ERROR),
    "an acknowledgement with a payload": ("", [(SETTINGS, 1, 0, bytes(6))], ErrorCodes.FRAME_SIZE_ERROR),
    "ENABLE_PUSH of 2": ("", [(SETTINGS, 0, 0, b"\0\2\0\0\0\2")], ErrorCodes.PROTOCOL_ERROR),
    "an initial window of 2**31": ("", [(SETTINGS, 0, 0, b"\0\4\x80\0\0\0")], ErrorCodes.FLOW_CONTROL_ERROR),
    "a frame size of 1": ("", [(SETTINGS, 0, 0, b"\0\5\0\0\0\1")], ErrorCodes.PROTOCOL_ERROR),
    "PING of a wrong size": ("", [(PING, 0, 0, b"1")], ErrorCodes.FRAME_SIZE_ERROR),
    "PING on a stream": ("", [(PING, 0, 1, bytes(8))], ErrorCodes.PROTOCOL_ERROR),
    "RST_STREAM of a wrong size": ("", [(RST_STREAM, 0, 1, b"1")], ErrorCodes.FRAME_SIZE_ERROR),
    "RST_STREAM of an idle stream": ("", [(RST_STREAM, 0, 1, bytes(4))], ErrorCodes.PROTOCOL_ERROR),
    "DATA on an idle stream": ("", [(DATA, 0, 1, b"x")], ErrorCodes.PROTOCOL_ERROR),
    "DATA on stream 0": ("", [(DATA, 0, 0, b"x")], ErrorCodes.PROTOCOL_ERROR),
    "DATA with more padding than payload": ("open", [(DATA, 8, 1, b"\x05x")], ErrorCodes.PROTOCOL_ERROR),
    "WINDOW_UPDATE of a wrong size": ("", [(WINDOW_UPDATE, 0, 0, b"1")], ErrorCodes.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of nothing": ("", [(WINDOW_UPDATE, 0, 0, bytes(4))], ErrorCodes.PROTOCOL_ERROR),
    "WINDOW_UPDATE of an idle stream": ("", [(WINDOW_UPDATE, 0, 7, b"\0\0\0\1")], ErrorCodes.PROTOCOL_ERROR),
    "a connection window beyond 2**31": ("", [(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff")], ErrorCodes.FLOW_CONTROL_ERROR),
    "PRIORITY without a stream": ("", [(PRIORITY, 0, 0, bytes(5))], ErrorCodes.PROTOCOL_ERROR),
    "PUSH_PROMISE": ("", [(PUSH_PROMISE, 4, 1, bytes(4))], ErrorCodes.PROTOCOL_ERROR),
    "GOAWAY on a stream": ("", [(GOAWAY, 0, 1, bytes(8))], ErrorCodes.PROTOCOL_ERROR),
    "HEADERS on an even stream": ("", [(HEADERS, 5, 2, b"\x82")], ErrorCodes.PROTOCOL_ERROR),
    "HEADERS on stream 0": ("", [(HEADERS, 5, 0, b"\x82")], ErrorCodes.PROTOCOL_ERROR),
    "HEADERS with more padding than payload": ("", [(HEADERS, 0xD, 1, b"\x09\x82")], ErrorCodes.PROTOCOL_ERROR),
    "a stream number used again": ("used", [(HEADERS, 5, 1, b"\x82")], ErrorCodes.STREAM_CLOSED),
    "CONTINUATION of nothing": ("", [(CONTINUATION, 4, 1, b"\x82")], ErrorCodes.PROTOCOL_ERROR),
    "CONTINUATION of another stream": ("", [(HEADERS, 0, 1, b"\x82"), (CONTINUATION, 4, 3, b"")], ErrorCodes.PROTOCOL_ERROR),
    "a header block interrupted": ("", [(HEADERS, 0, 1, b"\x82"), (PING, 0, 0, bytes(8))], ErrorCodes.PROTOCOL_ERROR),
    "a header block interrupted by DATA": ("open", [(HEADERS, 0, 3, b"\x82"), (DATA, 0, 1, b"")], ErrorCodes.PROTOCOL_ERROR),
    "a header block that is no HPACK": ("", [(HEADERS, 5, 1, b"\xff\xff\xff\xff\xff\xff\xff")], ErrorCodes.COMPRESSION_ERROR),
    "an index out of the table": ("", [(HEADERS, 5, 1, b"\xfe")], ErrorCodes.COMPRESSION_ERROR),
    "a truncated header block": ("", [(HEADERS, 5, 1, b"\x40\x0aabc")], ErrorCodes.COMPRESSION_ERROR),
    "a frame beyond the announced size": ("", [(DATA, 0, 1, bytes((1 << 20) + 1))], ErrorCodes.FRAME_SIZE_ERROR),
    "a large frame that is no DATA": ("", [(HEADERS, 4, 1, bytes(100_000))], ErrorCodes.ENHANCE_YOUR_CALM),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_rule_ends_the_connection_with_its_code(port, name):
    state, frames, code = BROKEN[name]
    peer = await port.peer() if state is not None else await _silent(port)
    if state == "open":
        await peer.ask(IDENTITY[:3], ended=False)
    elif state == "used":
        assert await works(peer)
    for frame in frames:
        await peer.send_raw(*frame)
    goodbye = await peer.goodbye()
    assert goodbye.code == code
    assert goodbye.reason
    peer.writer.write_eof()
    await peer.closed()
    peer.close()
    assert await works_beside(port)


async def _silent(port):
    """A peer that has said its preface without SETTINGS."""
    from tests.api.grpc.served import Peer

    peer = Peer(*await asyncio.open_connection("127.0.0.1", port.server.port))
    peer.h2.initiate_connection()
    peer.h2.clear_outbound_data_buffer()
    peer.writer.write(PREFACE)
    return peer


@pytest.mark.parametrize(
    "bad",
    [
        [("Content-Type", "application/grpc")],
        [("connection", "close")],
        [("te", "gzip")],
        [(":protocol", "websocket")],
        [("x-a", "b"), (":authority", "again")],
        [(":method", "POST")],
        [("bad name", "x")],
        [("x-newline", "a\nb")],
    ],
)
async def test_a_malformed_request_is_reset_and_the_connection_lives(port, bad):
    peer = await port.peer()
    stream = peer.h2.get_next_available_stream_id()
    peer.h2.send_headers(stream, peer.headers(), end_stream=True)
    peer.h2.clear_outbound_data_buffer()
    peer.h2.encoder.header_table_size = 0
    await peer.send_raw(HEADERS, 5, stream, peer.h2.encoder.encode([*peer.headers(), *bad]))
    event = await peer.wait_for(h2.events.StreamReset, stream)
    assert event.error_code == ErrorCodes.PROTOCOL_ERROR
    assert await works(peer)
    peer.close()


async def test_faults_of_one_stream_reset_it_alone(port):
    peer = await port.peer()
    faults = {
        ErrorCodes.FLOW_CONTROL_ERROR: (WINDOW_UPDATE, 0, b"\x7f\xff\xff\xff"),
        ErrorCodes.PROTOCOL_ERROR: (WINDOW_UPDATE, 0, bytes(4)),
    }
    for code, (kind, flags, payload) in faults.items():
        stream = await peer.ask(IDENTITY[:3], ended=False)
        await peer.send_raw(kind, flags, stream, payload)
        assert (await peer.answer(stream)).reset == code
    close_gates()
    stream = await peer.ask(request("gated", x=row(1)).SerializeToString())
    await peer.send_raw(DATA, 0, stream, b"more after the end")
    assert (await peer.answer(stream)).reset == ErrorCodes.STREAM_CLOSED
    GATES.opened.set()
    assert await works(peer)
    peer.close()


async def test_data_beyond_the_stream_window_is_a_fault(tmp_path):
    async with served(tmp_path / "m", limits=Limits(stream_window_bytes=1000)) as port:
        peer = await port.peer()
        stream = peer.h2.get_next_available_stream_id()
        await peer.send_raw(HEADERS, 4, stream, block(peer))
        peer.h2.send_headers(stream, peer.headers())
        peer.h2.clear_outbound_data_buffer()
        await peer.send_raw(DATA, 0, stream, bytes(1001))
        assert (await peer.answer(stream)).reset == ErrorCodes.FLOW_CONTROL_ERROR
        peer.close()


# Resources abused


async def test_a_rapid_reset_is_stopped(port):
    close_gates()
    peer = await port.peer()
    gated = request("gated", x=row(1)).SerializeToString()
    head = block(peer)
    frames = b""
    for number in range(1, 4001, 2):
        for kind, flags, payload in (
            (HEADERS, 4, head if number == 1 else block(peer)),
            (DATA, 1, framed(gated)),
            (RST_STREAM, 0, bytes(4)),
        ):
            frames += len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + payload
    peer.writer.write(frames)
    goodbye = await peer.goodbye()
    assert (goodbye.code, goodbye.reason) == (ErrorCodes.ENHANCE_YOUR_CALM, "too many frames that are of no use")
    GATES.opened.set()
    peer.close()
    assert await works_beside(port)


@pytest.mark.parametrize(
    "frame",
    [(PING, 0, 0, bytes(8)), (SETTINGS, 0, 0, b""), (PRIORITY, 0, 1, bytes(5)), (0xBE, 0, 0, b"")],
    ids=["PING", "SETTINGS", "PRIORITY", "unknown"],
)
async def test_a_flood_of_frames_that_mean_nothing_is_stopped(port, frame):
    peer = await port.peer()
    kind, flags, number, payload = frame
    wire = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + payload
    peer.writer.write(wire * 10_001)
    assert (await peer.goodbye()).code == ErrorCodes.ENHANCE_YOUR_CALM
    peer.close()


async def test_a_flood_of_empty_data_is_stopped(port):
    peer = await port.peer()
    stream = await peer.ask(IDENTITY[:3], ended=False)
    peer.writer.write((bytes((0, 0, 0, DATA, 0)) + stream.to_bytes(4, "big")) * 10_001)
    assert (await peer.goodbye()).code == ErrorCodes.ENHANCE_YOUR_CALM
    peer.close()


@pytest.mark.parametrize("piece", [b"", b"\x00\x01a\x01b" * 100])
async def test_a_header_block_that_does_not_end_is_stopped(port, piece):
    peer = await port.peer()
    await peer.send_raw(HEADERS, 0, 1, b"\x82")
    peer.writer.write((len(piece).to_bytes(3, "big") + bytes((CONTINUATION, 0, 0, 0, 0, 1)) + piece) * 10_001)
    assert (await peer.goodbye()).code == ErrorCodes.ENHANCE_YOUR_CALM
    peer.close()


async def test_a_header_list_that_swells_when_decoded_is_stopped(port):
    peer = await port.peer()
    big = b"\x40\x01a\x7f\xa1\x1e" + b"b" * 4000  # into the table once, then by a byte each
    await peer.send_raw(HEADERS, 5, 1, big + b"\xbe" * 100)
    assert (await peer.goodbye()).code == ErrorCodes.ENHANCE_YOUR_CALM
    peer.close()


async def test_streams_beyond_the_announced_number_are_refused(tmp_path):
    close_gates()
    async with served(tmp_path / "m", "gated", "identity", limits=Limits(max_streams=2)) as port:
        peer = await port.peer()
        gated = request("gated", x=row(1)).SerializeToString()
        first, second = await peer.ask(gated), await peer.ask(gated)
        await peer.wait_for(h2.events.RemoteSettingsChanged)
        await peer.send_raw(HEADERS, 5, 5, block(peer))
        await peer.send_raw(PING, 0, 0, bytes(8))
        data = b""
        while b"\0\0\4\3\0\0\0\0\5\0\0\0\7" not in data:  # RST_STREAM of stream 5, REFUSED_STREAM
            data += await asyncio.wait_for(peer.reader.read(4096), 10)
        GATES.opened.set()
        for stream in (first, second):
            while b"grpc-status\x010" not in data or data.count(b"grpc-status\x010") < 2:
                data += await asyncio.wait_for(peer.reader.read(4096), 10)
            assert stream
        peer.close()


async def test_requests_that_never_end_fill_no_more_than_their_bound(tmp_path):
    async with served(tmp_path / "m", "identity", limits=Limits(max_buffered_bytes=100_000)) as port:
        peer = await port.peer()
        x = request("identity", x=np.zeros((1, 15_000), np.float32)).SerializeToString()
        stay, fall = await peer.ask(x[:50_000], ended=False), None
        stream = peer.h2.get_next_available_stream_id()
        peer.h2.send_headers(stream, peer.headers())
        for _ in range(4):
            peer.h2.send_data(stream, b"\0\1\0\0\0" + bytes(16_000))
        await peer.flush()
        fall = await peer.answer(stream)
        assert (fall.status, fall.message) == ("8", "too many bytes of incomplete requests on one connection")
        assert stay
        peer.close()


async def test_a_peer_that_stalls_is_dropped(tmp_path):
    async with served(tmp_path / "m", "identity", "count", limits=Limits(stall_seconds=0.05)) as port:
        peer = await port.peer(initial_window=0)
        incomplete = await peer.ask(IDENTITY[:3], ended=False)
        untaken = await peer.ask(IDENTITY)
        answer = await peer.answer(incomplete)
        assert (answer.status, answer.message) == ("4", "the rest of the request did not come in time")
        assert (await peer.answer(untaken)).reset == ErrorCodes.CANCEL
        await peer.send_raw(HEADERS, 0, 9, b"\x82")  # and CONTINUATION never comes
        assert (await peer.goodbye()).reason == "a frame that does not end"
        peer.close()


async def test_somebody_who_says_nothing_is_sent_away(tmp_path):
    async with served(tmp_path / "m", limits=Limits(stall_seconds=0.05)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.server.port)
        async with asyncio.timeout(10):
            assert b"a frame that does not end" in await reader.read()
        writer.close()


async def test_an_idle_connection_is_closed_politely(tmp_path):
    async with served(tmp_path / "m", "identity", limits=Limits(stall_seconds=0.02, idle_seconds=0.1)) as port:
        peer = await port.peer()
        assert await works(peer)
        goodbye = await peer.goodbye()
        assert (goodbye.code, goodbye.reason) == (ErrorCodes.NO_ERROR, "idle")
        peer.close()


async def test_a_peer_that_does_not_read_is_read_no_more_and_dropped(tmp_path):
    async with served(tmp_path / "m", "identity", limits=Limits(stall_seconds=0.2)) as port:
        peer = await port.peer(initial_window=(1 << 31) - 1)
        peer.h2.increment_flow_control_window((1 << 31) - 1 - 65_535)
        await peer.flush()
        x = request("identity", x=np.zeros((1, 500_000), np.float32)).SerializeToString()
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionError):
                number = 1
                while True:
                    await peer.send_raw(HEADERS, 4, number, block(peer))
                    data = framed(x)
                    for at in range(0, len(data), 1 << 20):
                        await peer.send_raw(DATA, at + (1 << 20) >= len(data), number, data[at : at + (1 << 20)])
                    number += 2
        peer.writer.transport.abort()


async def test_flow_control_holds_back_the_model(port):
    peer = await port.peer()
    stream = await peer.ask(count(0, ballast=1000, tell=True).SerializeToString(), STREAM_INFER)
    await received(peer, 65_535)
    # The window is full. It goes on when there is room, and again only so far.
    peer.h2.increment_flow_control_window(200_000)
    peer.h2.increment_flow_control_window(200_000, stream)
    await peer.flush()
    await received(peer, 265_535)
    peer.h2.reset_stream(stream)
    await peer.flush()
    assert 200 < await port.counted() < 400
    peer.close()


async def received(peer, size: int) -> None:
    while sum(len(event.data) for event in peer.events if isinstance(event, h2.events.DataReceived)) < size:
        assert await peer.read()
