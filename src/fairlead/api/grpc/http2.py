"""HTTP/2 for a server of gRPC: one asyncio protocol per connection (RFC 9113, with HPACK by RFC 7541).

A Connection knows frames, windows and limits; what a stream is about, its subclass of Stream knows.

Sizes and numbers that a peer controls are all bounded (Limits). What is a fault of one stream resets that stream,
what is a fault of the connection ends it with GOAWAY. A peer that makes no progress is dropped after
`stall_seconds` to twice that: the tick marks what waits for the peer, and finds it still marked the next time.
"""

import asyncio
import re
import socket
from collections import deque
from collections.abc import Mapping
from enum import IntEnum
from struct import Struct as Layout
from typing import Any, Protocol, cast

from msgspec import Struct

from fairlead.api.grpc.headers import HeaderDecoder, Headers, TooLong, Undecodable

Buffer = bytes | memoryview

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER = Layout(">HBBBI")
SETTING = Layout(">HI")
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HAS_PRIORITY = 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = range(1, 7)
MAX_WINDOW = 2**31 - 1
MAX_STREAM_ID = 2**31 - 1
DEFAULT_WINDOW = 65_535
KNOWN_BLOCKS = 128
"""Header blocks remembered per connection."""
JOIN_BYTES = 65_536
"""Writes up to this size are joined into one piece, larger ones are gathered by the kernel."""
WRITE_BUFFER_BYTES = 1 << 20
DRAIN_PING = b"fairlead"
LEAVE_SECONDS = 1.0
"""How long the peer may take to hear that the server leaves."""
LINGER_SECONDS = 2.0
"""How long what a refused peer still sends is read and dropped."""
NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
CONNECTION_FIELDS = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})
PSEUDO_FIELDS = frozenset({b":method", b":scheme", b":path", b":authority"})


class ErrorCode(IntEnum):
    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class Limits(Struct, frozen=True, kw_only=True):
    """What one connection may cost."""

    max_streams: int = 1024
    max_header_bytes: int = 32_768
    """Of one request, decoded, counted as RFC 7541 does; the encoded block may not be longer either."""
    max_frame_bytes: int = 1 << 20
    stream_window_bytes: int = 4 << 20
    connection_window_bytes: int = 64 << 20
    max_buffered_bytes: int = 256 << 20
    """Of requests that are incomplete or not yet taken."""
    max_pending_bytes: int = 256 << 20
    """Of answers that the peer does not take; beyond, new streams are refused."""
    max_nuisance: int = 10_000
    """Points per tick for frames that cost the server more than the peer: 1 for PING, PRIORITY, CONTINUATION,
    empty DATA and frames on closed streams, 10 for SETTINGS and a stream that is reset; an answer takes back 10."""
    stall_seconds: float = 30.0
    """Without progress on something that waits for the peer."""
    idle_seconds: float = 3600.0
    """Without any stream."""


class Fault(Exception):
    """The peer broke the rules in a way that ends the connection."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Malformed(Exception):
    """A request whose header block decodes, but breaks RFC 9113 8.1.1."""


class Door(Protocol):
    """What connections share: who reads requests, and who writes at the end of the loop's turn."""

    limits: Limits

    def read_head(self, headers: Headers) -> Any:
        """What a header block means to streams; remembered for the same block. Raises Malformed."""

    def open(self, connection: "Connection", number: int, head: Any) -> "Stream": ...

    def connected(self, connection: "Connection") -> None: ...

    def disconnected(self, connection: "Connection") -> None: ...

    def write_soon(self, connection: "Connection") -> None:
        """Call `connection.flush()` at the end of this turn of the loop."""


class Stream:
    """One request and its answer. The connection owns these fields and calls these methods."""

    __slots__ = ("connection", "ended", "number", "queue", "queued_bytes", "receive_left", "send_left", "stalled", "trailers")

    def __init__(self, connection: "Connection", number: int) -> None:
        self.connection = connection
        self.number = number
        self.ended = False
        """The peer has sent all of its request."""
        self.receive_left = connection.limits.stream_window_bytes
        self.send_left = connection.peer_window
        self.queue: deque[Buffer] | None = None
        """DATA that waits for a window."""
        self.queued_bytes = 0
        self.trailers: bytes | None = None
        """What ends the answer once the queue is empty."""
        self.stalled = False

    def begin(self) -> None:
        """The stream is open; from here on it may be answered."""
        raise NotImplementedError

    def received(self, data: bytes, start: int, stop: int, ended: bool) -> None:
        """`data[start:stop]` of the request's body came; it was the last of it if `ended`."""
        raise NotImplementedError

    def waits(self) -> bool:
        """Whether the peer owes something before anything can go on."""
        raise NotImplementedError

    def expired(self) -> None:
        """The peer owed something for too long. Must end the stream."""
        raise NotImplementedError

    def drained(self) -> None:
        """All that was queued has been written."""
        raise NotImplementedError

    def leave(self) -> None:
        """The connection takes nothing new."""
        raise NotImplementedError

    def lost(self) -> None:
        """The peer reset the stream, or is gone. Nothing can be sent any more."""
        raise NotImplementedError


def frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    size = len(payload)
    return FRAME_HEADER.pack(size >> 8, size & 0xFF, kind, flags, number) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that is in no table, without Huffman coding; lengths below 16,384."""
    return b"\x00" + _length(name) + name + _length(value) + value


def _length(value: bytes) -> bytes:
    size = len(value)
    if size < 127:
        return bytes((size,))
    size -= 127
    return bytes((127, size)) if size < 128 else bytes((127, size & 0x7F | 0x80, size >> 7))


def check_request(headers: Headers) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """Pseudo-header fields and the others (repeated ones joined by a comma). Raises Malformed."""
    pseudo: dict[bytes, bytes] = {}
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        if name[:1] == b":":
            if fields or name in pseudo or name not in PSEUDO_FIELDS:
                raise Malformed(f"misplaced pseudo-header field {name!r}")
            pseudo[name] = value
            continue
        if name in CONNECTION_FIELDS or (name == b"te" and value != b"trailers") or NAME.fullmatch(name) is None:
            raise Malformed(f"illegal header field {name!r}")
        if b"\n" in value or b"\r" in value or b"\0" in value:
            raise Malformed(f"illegal value of header field {name!r}")
        fields[name] = fields[name] + b"," + value if name in fields else value
    if not pseudo.get(b":method") or not pseudo.get(b":scheme") or not pseudo.get(b":path"):
        raise Malformed("missing pseudo-header field")
    return pseudo, fields


class Connection(asyncio.Protocol):
    """One peer.

    States: greeting (until the peer's preface and SETTINGS) → open → leaving (GOAWAY sent, streams end) → closed.
    """

    def __init__(self, door: Door) -> None:
        self.door = door
        self.limits = limits = door.limits
        self.streams: dict[int, Stream] = {}
        self.last_number = 0
        # What comes
        self.tail = b""
        self.greeted = False
        self.settled = False
        self.block: bytearray | None = None
        """A header block whose CONTINUATIONs are still to come."""
        self.block_number = 0
        self.block_ended = False
        self.data_stream: Stream | None = None
        self.data_left = self.pad_left = 0
        """Of a DATA frame whose payload comes in pieces."""
        self.data_ended = False
        self.decoder = HeaderDecoder(limits.max_header_bytes)
        self.known: dict[bytes, Any] = {}
        self.receive_left = DEFAULT_WINDOW
        self.buffered_bytes = 0
        # What goes
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.peer = ""
        self.certificate: Mapping[str, Any] | None = None
        """Of a client over TLS that showed one; verified."""
        self.out: list[Buffer] = []
        self.out_bytes = 0
        self.in_turn = False
        """A flush is sure to follow."""
        self.paused = False
        self.blocked: dict[int, Stream] = {}
        """Streams with something to send that only the connection's window, or the transport, does not let pass."""
        self.pending_bytes = 0
        self.send_left = DEFAULT_WINDOW
        self.peer_window = DEFAULT_WINDOW
        self.peer_frame = 16_384
        # Health
        self.resets: deque[int] = deque(maxlen=limits.max_streams)
        """Streams of which the peer may not know yet that they are reset: what still comes of them is ignored."""
        self.nuisance = 0
        self.stuck = self.pause_stuck = False
        self.idle_ticks = 0
        self.leaving = self.left = self.closed = False
        self.ticker: asyncio.TimerHandle | None = None

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        address = transport.get_extra_info("peername")
        self.peer = address[0] if isinstance(address, tuple) else ""
        self.certificate = transport.get_extra_info("peercert") or None
        if (sock := transport.get_extra_info("socket")) is not None:
            # Whoever vanishes without a word while a stream is open is noticed at last.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limits = self.limits
        settings = (
            (MAX_CONCURRENT_STREAMS, limits.max_streams),
            (INITIAL_WINDOW_SIZE, limits.stream_window_bytes),
            (MAX_FRAME_SIZE, limits.max_frame_bytes),
            (MAX_HEADER_LIST_SIZE, limits.max_header_bytes),
        )
        self.transport.write(frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*setting) for setting in settings)))
        self._replenish()
        self._arm(limits.stall_seconds)
        self.door.connected(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self.ticker is not None:
            self.ticker.cancel()
        self._lose_streams()
        self.door.disconnected(self)

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        if self.tail:
            data = self.tail + data
            self.tail = b""
        in_turn, self.in_turn = self.in_turn, True
        try:
            at = self._consume(data) if self.greeted else self._greet(data)
        except Fault as fault:
            self.give_up(fault.code, fault.reason)
            return
        if at < len(data):
            self.tail = data[at:]
        elif self.stuck and self.block is None:
            self.stuck = False
        if not in_turn:
            self.in_turn = False
            if self.out:
                self.flush()

    def pause_writing(self) -> None:
        # Answers that the peer does not read must not pile up: it gets no more of them by asking.
        self.paused = True
        self.pause_stuck = False
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.paused = False
        if not self.closed:
            self.transport.resume_reading()
            self._unblock()

    # Frames

    def _greet(self, data: bytes) -> int:
        if data[:24] != PREFACE[: len(data)]:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "this port speaks gRPC: HTTP/2 with prior knowledge")
        if len(data) < 24:
            return 0
        self.greeted = True
        return 24 + self._consume(data[24:])

    def _consume(self, data: bytes) -> int:
        """Read all whole frames and all DATA; returns where the rest begins. Raises Fault."""
        at, end = 0, len(data)
        if self.data_left or self.pad_left:
            at = self._piece(data, 0, end)
        streams = self.streams
        while end - at >= 9:
            high, low, kind, flags, number = FRAME_HEADER.unpack_from(data, at)
            size = high << 8 | low
            start = at + 9
            if size > self.limits.max_frame_bytes:
                raise Fault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            if self.block is not None and kind != CONTINUATION:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted")
            if kind == DATA:
                at = start + size
                stream = streams.get(number)
                if stream is None or stream.ended or at > end or flags & PADDED or not self.settled:
                    at = self._data(data, start, end, size, flags, number & MAX_STREAM_ID)
                    if at < 0:
                        return start - 9
                    continue
                self.receive_left -= size
                stream.receive_left -= size
                if self.receive_left < self.limits.connection_window_bytes >> 1:
                    self._replenish()
                if stream.receive_left < 0:
                    self.reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
                    continue
                if flags & END_STREAM:
                    stream.ended = True
                    stream.received(data, start, at, True)
                elif size:
                    stream.received(data, start, at, False)
                else:
                    self._nuisance(1)
                continue
            if start + size > end:
                if size > self.limits.max_header_bytes + 256:
                    raise Fault(ErrorCode.ENHANCE_YOUR_CALM, f"a frame of type {kind} with {size} bytes")
                return at
            payload = data[start : start + size]
            at = start + size
            if kind == HEADERS and flags == END_HEADERS and self.settled:
                self._request(number & MAX_STREAM_ID, payload, False)
            else:
                self._frame(kind, flags, number & MAX_STREAM_ID, payload)
        return at

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if not self.settled and (kind != SETTINGS or flags & ACK):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "the preface lacks SETTINGS")
        size = len(payload)
        if kind == HEADERS:
            self._headers(flags, number, payload)
        elif kind == CONTINUATION:
            self._continuation(flags, number, payload)
        elif kind == WINDOW_UPDATE:
            if size != 4:
                raise Fault(ErrorCode.FRAME_SIZE_ERROR, "a WINDOW_UPDATE of a wrong size")
            self._window_update(number, int.from_bytes(payload, "big") & MAX_WINDOW)
        elif kind == RST_STREAM:
            if size != 4:
                raise Fault(ErrorCode.FRAME_SIZE_ERROR, "a RST_STREAM of a wrong size")
            self._check_not_idle(number)
            stream = self.streams.get(number)
            self._nuisance(10 if stream is not None else 1)
            if stream is not None:
                self._forget(stream)
                stream.lost()
                self._close_if_done()
        elif kind == SETTINGS:
            self._settings(flags, number, payload)
        elif kind == PING:
            if size != 8 or number:
                raise Fault(ErrorCode.FRAME_SIZE_ERROR if size != 8 else ErrorCode.PROTOCOL_ERROR, "a PING of a wrong size or on a stream")
            if not flags & ACK:
                self._nuisance(1)
                self.write(frame(PING, ACK, 0, payload))
            elif self.leaving and payload == DRAIN_PING:
                self._leave_for_good()
        elif kind == PRIORITY:
            if not number:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "PRIORITY without a stream")
            self._nuisance(1)
            if size != 5:
                self._reset(number, ErrorCode.FRAME_SIZE_ERROR)
        elif kind == GOAWAY:
            if number:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
            # It is about streams that a server opens, and there are none; the client closes when it is done.
        elif kind == PUSH_PROMISE:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a client does not push")
        else:
            self._nuisance(1)

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        start, stop = 0, len(payload)
        if flags & PADDED:
            if not payload:
                raise Fault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS without its padding")
            start, stop = 1, stop - payload[0]
        if flags & HAS_PRIORITY:
            start += 5
        if start > stop:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "HEADERS with more padding than payload")
        block = payload[start:stop]
        if flags & END_HEADERS:
            self._request(number, block, bool(flags & END_STREAM))
        else:
            self.block, self.block_number, self.block_ended = bytearray(block), number, bool(flags & END_STREAM)

    def _continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self.block is None or number != self.block_number:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of no header block")
        self._nuisance(1)
        self.block += payload
        if len(self.block) > self.limits.max_header_bytes:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "a header block that does not end")
        if flags & END_HEADERS:
            block, self.block = bytes(self.block), None
            self._request(number, block, self.block_ended)

    def _request(self, number: int, block: bytes, ended: bool) -> None:
        """A whole header block: a new stream, or the trailers of one."""
        head = self.known.get(block)
        if head is None:
            head = self._decode(block)
        if number <= self.last_number or not number & 1:
            stream = self.streams.get(number)
            if stream is None and number in self.resets:
                return
            if stream is None or stream.ended:
                raise Fault(ErrorCode.STREAM_CLOSED if number & 1 else ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {number}")
            if not ended:
                self.reset(stream, ErrorCode.PROTOCOL_ERROR)
                return
            # What a client may say after its last message means nothing in gRPC.
            stream.ended = True
            stream.received(b"", 0, 0, True)
            return
        self.last_number = number
        self.stuck = False
        if isinstance(head, Malformed):
            self._nuisance(10)
            self._reset(number, ErrorCode.PROTOCOL_ERROR)
        elif self.left or len(self.streams) >= self.limits.max_streams or self.pending_bytes > self.limits.max_pending_bytes:
            self._nuisance(10)
            self._reset(number, ErrorCode.REFUSED_STREAM)
        else:
            stream = self.streams[number] = self.door.open(self, number, head)
            stream.begin()
            if ended and not stream.ended:
                stream.ended = True
                stream.received(b"", 0, 0, True)

    def _decode(self, block: bytes) -> Any:
        """What a block means. The same bytes mean the same as long as the dynamic table does not change."""
        if len(block) > self.limits.max_header_bytes:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "a header block that is too long")
        generation = self.decoder.generation
        try:
            headers = self.decoder.decode(block)
        except TooLong:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "a header list that is too long") from None
        except Undecodable as error:
            raise Fault(ErrorCode.COMPRESSION_ERROR, f"a header block that does not decode: {error}") from None
        head: Any
        try:
            head = self.door.read_head(headers)
        except Malformed as error:
            head = error
        if generation != self.decoder.generation or len(self.known) >= KNOWN_BLOCKS:
            self.known.clear()
        if generation == self.decoder.generation:
            self.known[block] = head
        return head

    def _data(self, data: bytes, start: int, end: int, size: int, flags: int, number: int) -> int:
        """A DATA frame that is padded, in pieces, or for a stream that does not want it. Returns -1 to wait for more."""
        padding = 0
        if not self.settled:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "the preface lacks SETTINGS")
        if flags & PADDED:
            if not size:
                raise Fault(ErrorCode.FRAME_SIZE_ERROR, "DATA without its padding")
            if start == end:
                return -1
            padding = data[start] + 1
            if padding > size:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "DATA with more padding than payload")
            start += 1
        self._check_not_idle(number)
        self.receive_left -= size
        if self.receive_left < self.limits.connection_window_bytes >> 1:
            self._replenish()
        stream = self.streams.get(number)
        if stream is None:
            self._nuisance(1)
            if number not in self.resets:
                self._reset(number, ErrorCode.STREAM_CLOSED)
        else:
            stream.receive_left -= size
            if stream.ended or stream.receive_left < 0:
                self.reset(stream, ErrorCode.STREAM_CLOSED if stream.ended else ErrorCode.FLOW_CONTROL_ERROR)
                stream = None
            elif size == padding and not flags & END_STREAM:
                self._nuisance(1)
        self.data_stream = stream
        self.data_left, self.pad_left = size - padding, max(padding - 1, 0)
        self.data_ended = bool(flags & END_STREAM)
        self.stuck = False
        if not self.data_left:
            self._deliver(data, start, start)
        return self._piece(data, start, end)

    def _piece(self, data: bytes, at: int, end: int) -> int:
        """More of the payload of the DATA frame that is being read."""
        if self.data_left:
            stop = min(at + self.data_left, end)
            self.data_left -= stop - at
            self._deliver(data, at, stop)
            at = stop
        skip = 0 if self.data_left else min(self.pad_left, end - at)
        self.pad_left -= skip
        return at + skip

    def _deliver(self, data: bytes, start: int, stop: int) -> None:
        stream = self.data_stream
        if stream is None or self.streams.get(stream.number) is not stream:
            return
        ended = self.data_ended and not self.data_left
        if ended:
            stream.ended = True
        if ended or start < stop:
            stream.received(data, start, stop, ended)

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            raise Fault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a wrong size")
        if flags & ACK:
            return
        self._nuisance(10)
        for key, value in SETTING.iter_unpack(payload):
            if key == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "an initial window that is too large")
                change = value - self.peer_window
                self.peer_window = value
                for stream in self.streams.values():
                    stream.send_left += change
                    if stream.send_left > MAX_WINDOW:
                        raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
                    if stream.queue:
                        self.blocked[stream.number] = stream
            elif key == MAX_FRAME_SIZE:
                if not 16_384 <= value < 1 << 24:
                    raise Fault(ErrorCode.PROTOCOL_ERROR, "an impossible frame size")
                self.peer_frame = value
            elif key == ENABLE_PUSH and value > 1:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
        self.settled = True
        self.write(frame(SETTINGS, ACK, 0, b""))
        self._unblock()

    def _window_update(self, number: int, increment: int) -> None:
        if not number:
            if not increment:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "an empty WINDOW_UPDATE")
            self.send_left += increment
            if self.send_left > MAX_WINDOW:
                raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
            self._unblock()
            return
        self._check_not_idle(number)
        stream = self.streams.get(number)
        if stream is None:
            return
        if not increment or stream.send_left + increment > MAX_WINDOW:
            self.reset(stream, ErrorCode.FLOW_CONTROL_ERROR if increment else ErrorCode.PROTOCOL_ERROR)
            return
        stream.send_left += increment
        if stream.queue:
            self.blocked.pop(number, None)
            self._pump(stream)

    def _check_not_idle(self, number: int) -> None:
        if not number or number > self.last_number or not number & 1:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"a frame on stream {number}, which was never opened")

    def _nuisance(self, points: int) -> None:
        self.nuisance += points
        if self.nuisance > self.limits.max_nuisance:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that are of no use")

    # Windows of the peer's sending

    def _replenish(self) -> None:
        if self.receive_left < 0:
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the connection's window")
        more = self.limits.connection_window_bytes - self.receive_left
        self.receive_left += more
        self.write(frame(WINDOW_UPDATE, 0, 0, more.to_bytes(4, "big")))

    def replenish(self, stream: Stream) -> None:
        """Let the peer send more of a request; for the stream to call as it takes what came."""
        more = self.limits.stream_window_bytes - stream.receive_left
        if more > self.limits.stream_window_bytes >> 1 and not stream.ended:
            stream.receive_left += more
            self.write(frame(WINDOW_UPDATE, 0, stream.number, more.to_bytes(4, "big")))

    # Sending

    def write(self, data: bytes) -> None:
        """Frames that no window holds back."""
        self.out.append(data)
        self.out_bytes += len(data)
        self._soon()

    def _soon(self) -> None:
        if not self.in_turn:
            self.in_turn = True
            self.door.write_soon(self)

    def flush(self) -> None:
        """Hand over to the transport what this turn of the loop has to say."""
        self.in_turn = False
        out, size = self.out, self.out_bytes
        if not out or self.closed:
            return
        self.out, self.out_bytes = [], 0
        if size <= JOIN_BYTES:
            self.transport.write(b"".join(out))
        else:
            self.transport.writelines(out)

    def send_headers(self, stream: Stream, block: bytes, *, ended: bool = False) -> None:
        """A header block below 16 KiB. With `ended` it is all, or the end, of the answer."""
        self.write(frame(HEADERS, END_HEADERS | END_STREAM if ended else END_HEADERS, stream.number, block))
        if ended:
            self._finish(stream)

    def send_data(self, stream: Stream, parts: list[Buffer], size: int) -> None:
        """Part of an answer; it is queued where the peer's windows are too small. `size` is that of all parts."""
        if stream.queue is None:
            stream.queue = deque()
        stream.queue.extend(parts)
        stream.queued_bytes += size
        self.pending_bytes += size
        self._pump(stream)

    def send_end(self, stream: Stream, trailers: bytes) -> None:
        """End the answer once all its data is written."""
        stream.trailers = trailers
        if not stream.queue:
            self.send_headers(stream, trailers, ended=True)

    def send_whole(self, stream: Stream, block: bytes, parts: list[Buffer], size: int, trailers: bytes) -> None:
        """A whole answer: headers, data, trailers."""
        if size <= self.peer_frame and size <= self.send_left and size <= stream.send_left and not self.paused:
            self.send_left -= size
            number = stream.number.to_bytes(4, "big")
            ahead = len(block).to_bytes(3, "big") + b"\1\4" + number + block + size.to_bytes(3, "big") + b"\0\0" + number
            behind = len(trailers).to_bytes(3, "big") + b"\1\5" + number + trailers
            if size <= JOIN_BYTES:
                self.write(b"".join((ahead, *parts, behind)))
            else:
                self.out += (ahead, *parts)
                self.out_bytes += size
                self.write(behind)
            self._finish(stream)
        else:
            self.send_headers(stream, block)
            stream.trailers = trailers
            self.send_data(stream, parts, size)

    def _pump(self, stream: Stream) -> None:
        """Write what the windows let pass of a stream's queue."""
        queue = stream.queue
        assert queue is not None
        while queue:
            room = min(stream.send_left, self.send_left, self.peer_frame)
            if room <= 0 or self.paused:
                if stream.send_left > 0:
                    self.blocked[stream.number] = stream
                self._soon()
                return
            parts: list[Buffer] = []
            size = 0
            while queue and size < room:
                part = queue[0]
                length = len(part)
                if length <= room - size:
                    parts.append(queue.popleft())
                    size += length
                else:
                    view = memoryview(part)
                    parts.append(view[: room - size])
                    queue[0] = view[room - size :]
                    size = room
            self.out.append(FRAME_HEADER.pack(size >> 8, size & 0xFF, DATA, 0, stream.number))
            self.out += parts
            self.out_bytes += size
            stream.send_left -= size
            self.send_left -= size
            stream.queued_bytes -= size
            self.pending_bytes -= size
            stream.stalled = False
            if self.out_bytes > WRITE_BUFFER_BYTES:
                in_turn = self.in_turn
                self.flush()  # which may find the transport full, and pause
                self.in_turn = in_turn
        if stream.trailers is not None:
            self.send_headers(stream, stream.trailers, ended=True)
        else:
            self._soon()
            stream.drained()

    def _unblock(self) -> None:
        """Go on with what waits, each stream in its turn."""
        while self.blocked and not self.paused and self.send_left > 0:
            self._pump(self.blocked.pop(next(iter(self.blocked))))

    # Ends

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End a stream that cannot be answered."""
        self._reset(stream.number, code)
        self._forget(stream)
        stream.lost()
        self._close_if_done()

    def _reset(self, number: int, code: ErrorCode) -> None:
        self.resets.append(number)
        self.write(frame(RST_STREAM, 0, number, code.to_bytes(4, "big")))

    def _finish(self, stream: Stream) -> None:
        """The answer is complete."""
        if not stream.ended:
            # The rest of the request is not wanted.
            self._reset(stream.number, ErrorCode.NO_ERROR)
        self.nuisance = max(self.nuisance - 10, 0)
        self._forget(stream)
        self._close_if_done()

    def _forget(self, stream: Stream) -> None:
        self.streams.pop(stream.number, None)
        if stream.queue is not None:
            self.blocked.pop(stream.number, None)
            self.pending_bytes -= stream.queued_bytes
            stream.queued_bytes = 0
            stream.queue.clear()

    def _lose_streams(self) -> None:
        for stream in list(self.streams.values()):
            self._forget(stream)
            stream.lost()

    def leave(self) -> None:
        """Let what is under way end, take nothing new, then close."""
        if self.closed or self.leaving:
            return
        self.leaving = True
        if not self.greeted:
            self._close()
            return
        # Requests that crossed this message on the way are still served: the peer's answer to the PING came after them.
        self.write(frame(GOAWAY, 0, 0, _goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR)) + frame(PING, 0, 0, DRAIN_PING))
        self._arm(LEAVE_SECONDS)
        for stream in list(self.streams.values()):
            stream.leave()

    def _leave_for_good(self) -> None:
        if not self.left:
            self.left = True
            self.write(frame(GOAWAY, 0, 0, _goaway(self.last_number, ErrorCode.NO_ERROR)))
            self._close_if_done()

    def give_up(self, code: ErrorCode, reason: str) -> None:
        """The connection is beyond repair."""
        if self.closed:
            return
        self.left = self.leaving = True
        self._lose_streams()
        self.write(frame(GOAWAY, 0, 0, _goaway(self.last_number, code, reason)))
        self.flush()
        self.closed = True
        if self.transport.can_write_eof():
            # To close while the peer still sends would destroy what it has not read yet, the reason foremost.
            self.transport.write_eof()
            self._arm(LINGER_SECONDS)
        else:
            self.transport.close()

    def _close_if_done(self) -> None:
        if self.left and not self.streams:
            self._close()

    def _close(self) -> None:
        if not self.closed:
            self.flush()
            self.closed = True
            self.transport.close()

    def abort(self) -> None:
        self.closed = True
        self.transport.abort()

    # Time

    def _arm(self, seconds: float) -> None:
        if self.ticker is not None:
            self.ticker.cancel()
        self.ticker = asyncio.get_running_loop().call_later(seconds, self._tick)

    def _tick(self) -> None:
        """Drop what has waited for the peer since the tick before."""
        self._arm(self.limits.stall_seconds)
        if self.closed or (self.paused and self.pause_stuck):
            self.abort()
            return
        self.pause_stuck = self.paused
        self.nuisance = 0
        waits = not self.settled or self.tail != b"" or self.block is not None
        self.idle_ticks = self.idle_ticks + 1 if not self.streams else 0
        if waits and self.stuck:
            self.give_up(ErrorCode.ENHANCE_YOUR_CALM, "a frame that does not end")
            return
        self.stuck = waits
        if self.leaving and not self.left:
            self._leave_for_good()
        elif self.idle_ticks * self.limits.stall_seconds >= self.limits.idle_seconds:
            self.give_up(ErrorCode.NO_ERROR, "idle")
            return
        for stream in list(self.streams.values()):
            if not stream.queued_bytes and not stream.waits():
                continue
            if stream.stalled:
                stream.expired()
            else:
                stream.stalled = True


def _goaway(last: int, code: ErrorCode, reason: str = "") -> bytes:
    return last.to_bytes(4, "big") + code.to_bytes(4, "big") + reason.encode()
