"""gRPC over HTTP/2: messages, deadlines, compression, statuses (the gRPC over HTTP2 protocol description).

A service is a table of methods; a method sees a Call and whole messages, and nothing of HTTP/2.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from struct import Struct as Layout
from typing import Any, TypeVar, cast
from urllib.parse import quote

import structlog
from msgspec import Struct

from fairlead.api.compression import decompress
from fairlead.api.doorkeeper import Doorkeeper, may, refuse_twice
from fairlead.api.grpc import http2
from fairlead.api.grpc.headers import Headers
from fairlead.api.grpc.http2 import Buffer, Connection, Limits, Stream, literal
from fairlead.api.offload import Offload
from fairlead.api.status import INTERNAL, GrpcStatus, grpc_end_of, grpc_status, told
from fairlead.core.caller import ANYONE, Caller
from fairlead.core.errors import FairleadError, ShuttingDown
from fairlead.core.policy import Scope
from fairlead.core.timeline import Timeline, parse_traceparent
from fairlead.gateway.ends import ended
from fairlead.observe.access import SANE_ID, SANE_TRACE, new_request_id
from fairlead.observe.finished import Finished

T = TypeVar("T")
log = structlog.get_logger("fairlead.grpc")

PREFIX = Layout(">BI")
SMALL_BYTES = 16_384
"""Messages up to here are copied out of what the socket gave; of larger ones views are kept."""
PIECE_BYTES = 4_096
INLINE_INFLATE_BYTES = 4_096
"""Compressed messages above this are inflated in a thread: deflate makes at most a thousand bytes of one."""
MAX_INBOX = 16
"""Messages of a streaming call that wait to be taken, before its window closes."""
INBOX_ENTRY_BYTES = 128
"""What an empty message costs while it waits."""
MAX_STATUS_MESSAGE = 2_048
"""Bytes, which may become three each; clients refuse header lists above 8 KiB."""
UNQUOTED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
MAX_TIMEOUT = 10 * 365 * 86_400.0
TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
ENCODINGS = frozenset({b"gzip", b"deflate"})

_CONTENT_TYPE = b"\x0f\x10\x10application/grpc"
HEAD = b"\x88" + _CONTENT_TYPE + b"\x00\x0cx-request-id"
"""`:status: 200`, `content-type`, and the name of the field whose value comes next."""
OK_TRAILERS = literal(b"grpc-status", b"0")
ACCEPT_ENCODING = literal(b"grpc-accept-encoding", b"identity,deflate,gzip")


class Unary(Struct, frozen=True):
    """Answers from a callback: `start(call, message)` returns at once; `call.finish` or `call.fail` follows, now or later."""

    start: Callable[["Call", Buffer], None]
    scope: Scope | None = Scope.INFER
    """What the caller's key must be for; None: anyone may call, without one too."""


class Awaited(Struct, frozen=True):
    """A unary method that has to wait for something: a coroutine that returns the answer."""

    run: Callable[["Call", Buffer], Coroutine[Any, Any, bytes]]
    scope: Scope | None = Scope.INFER


class Streaming(Struct, frozen=True):
    """Takes messages with `call.next_message` and answers with `call.send`, until it returns."""

    run: Callable[["Call"], Coroutine[Any, Any, None]]
    scope: Scope | None = Scope.INFER


Method = Unary | Awaited | Streaming


class Head(Struct):
    """What the header block of a request says."""

    method: Method | None
    metadata: dict[bytes, bytes]
    fields: Headers = []
    """The same as it came, with what comes twice."""
    request_id: str = ""
    trace: str = ""
    path: str = ""
    """"" for a method that is not known."""
    timeout: float = 0.0
    encoding: str = ""
    """How messages are compressed that say they are."""
    fault: tuple[GrpcStatus, str] | None = None
    refusal: bytes = b""
    """The header block that answers what is no gRPC at all."""


def read_head(methods: dict[bytes, Method], headers: Headers) -> Head:
    """Raises http2.Malformed."""
    pseudo, fields = http2.check_request(headers)
    path = pseudo[b":path"]
    head = Head(methods.get(path), fields, [field for field in headers if not field[0].startswith(b":")])
    content_type = fields.get(b"content-type", b"")
    if content_type != b"application/grpc" and not content_type.startswith((b"application/grpc+", b"application/grpc;")):
        head.refusal = literal(b":status", b"415")
    elif pseudo[b":method"] != b"POST":
        head.refusal = literal(b":status", b"405") + literal(b"allow", b"POST")
    request_id = fields.get(b"x-request-id", b"")
    if SANE_ID.fullmatch(request_id):
        head.request_id = request_id.decode()
    trace = fields.get(b"traceparent", b"")
    if SANE_TRACE.fullmatch(trace):
        head.trace = trace.decode()
    encoding = fields.get(b"grpc-encoding", b"identity")
    timeout = fields.get(b"grpc-timeout")
    if timeout is not None:
        match = TIMEOUT.fullmatch(timeout)
        if match is None:
            head.fault = GrpcStatus.INTERNAL, f"malformed grpc-timeout: {timeout.decode('ascii', 'replace')!r}"
        else:
            head.timeout = max(min(int(match[1]) * SECONDS[match[2]], MAX_TIMEOUT), 1e-9)
    if encoding in ENCODINGS:
        head.encoding = encoding.decode()
    elif encoding != b"identity":
        head.fault = GrpcStatus.UNIMPLEMENTED, f"grpc-encoding {encoding.decode('ascii', 'replace')!r} is not supported"
    if head.method is not None:
        head.path = path.decode()
    else:
        head.fault = GrpcStatus.UNIMPLEMENTED, f"unknown method {path.decode('utf-8', 'replace')}"
    return head


class Calls(Struct, kw_only=True):
    """What all calls of a server share."""

    methods: dict[bytes, Method]
    finished: Finished
    offload: Offload
    max_message_bytes: int
    limits: Limits
    doorkeeper: Doorkeeper | None = None
    """None: nobody is asked who they are."""


class Call(Stream):
    """One RPC. Services use the methods down to `send`; `model`, `version` and `num_rows` are for the access log."""

    __slots__ = (
        "_have", "_inbox", "_message", "_need", "_parts", "_prefix", "_room", "_streaming", "_task", "_timer", "_wake",
        "answer_metadata", "arrived", "caller", "calls", "cancel", "done", "head", "head_sent", "leaving", "loop", "model", "num_rows", "quiet",
        "request_id", "timeline", "trace", "version",
    )  # fmt: skip

    def __init__(self, calls: Calls, connection: Connection, number: int, head: Head, loop: asyncio.AbstractEventLoop) -> None:
        # Stream's fields, set here because this runs on every request
        self.connection = connection
        self.number = number
        self.ended = False
        self.receive_left = calls.limits.stream_window_bytes
        self.send_left = connection.peer_window
        self.queue = None
        self.queued_bytes = 0
        self.trailers = None
        self.stalled = False

        self.calls = calls
        self.loop = loop
        self.head = head
        self.arrived = time.perf_counter()
        self.request_id = head.request_id or new_request_id()
        self.trace = head.trace
        self.timeline = self.new_timeline(self.arrived)
        self.model = ""
        self.version = ""
        self.num_rows = 0
        self.caller: Caller | None = ANYONE
        """None: still to be learned."""
        self.answer_metadata = b""
        """Header fields of the answer, beside gRPC's own."""
        self.quiet = False
        """The method writes the access log itself, unless the call fails by itself."""
        self.done = False
        """The answer is complete, or nobody waits for it."""
        self.cancel: Callable[[], object] | None = None
        """Stops the work when the client leaves or its deadline passes."""
        self.head_sent = False
        self.leaving = False
        """The server stops: a stream is not to wait for more."""
        self._streaming = False
        self._need = -1
        self._parts: list[bytes | bytearray | memoryview] | None = None
        self._message: tuple[int, Buffer] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """The stream is open."""
        head = self.head
        if head.refusal:
            self.done = True
            self.connection.send_headers(self, head.refusal, ended=True)
            self._log(GrpcStatus.UNKNOWN, "not a gRPC request")
            return
        if head.fault is not None:
            self.fail(*head.fault)
            return
        if head.timeout:
            self._timer = self.loop.call_later(head.timeout, self._deadline)
        assert head.method is not None
        if self.calls.doorkeeper is not None and head.method.scope is not None:
            try:
                self._who(self.calls.doorkeeper, head.method.scope)
            except FairleadError as error:
                self.fail_with(error)
                return
        if type(head.method) is Streaming:
            self._streaming = True
            self._inbox: deque[tuple[int, Buffer]] = deque()
            self._wake: asyncio.Future[None] | None = None
            self._room: asyncio.Future[None] | None = None
            self._prefix = b""
            self._start(self._stream(head.method), self._end_stream)

    # What services use

    @property
    def metadata(self) -> dict[bytes, bytes]:
        return self.head.metadata

    def new_timeline(self, arrived: float) -> Timeline:
        head = self.head
        timeline = Timeline(self.request_id, "grpc", arrived)
        timeline.path = head.path
        if head.trace and parse_traceparent(head.trace) is not None:
            timeline.traceparent = head.trace
        return timeline

    def tell(self, headers: Mapping[str, str]) -> None:
        """Further fields of the answer's head, while that is not sent."""
        self.answer_metadata += b"".join(literal(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items())

    def finish(self, parts: list[Buffer]) -> None:
        """Answer a unary call with one message. Nothing happens if the call is over."""
        if self.done:
            return
        self._over()
        size = sum([len(part) for part in parts])
        self.timeline.bytes_out = size
        self.connection.send_whole(self, self._head_block(), [PREFIX.pack(0, size), *parts], size + 5, OK_TRAILERS)
        self._log(GrpcStatus.OK, "")

    def fail(self, status: GrpcStatus, message: str) -> None:
        """End the call with an error. Nothing happens if the call is over."""
        if self.done:
            return
        self._over()
        self._stop()
        message = message.encode(errors="replace")[:MAX_STATUS_MESSAGE].decode(errors="ignore")
        self.model = self.model[:MAX_STATUS_MESSAGE]
        trailers = literal(b"grpc-status", b"%d" % status) + literal(b"grpc-message", quote(message, safe=UNQUOTED).encode())
        if status == GrpcStatus.UNIMPLEMENTED:
            trailers += ACCEPT_ENCODING
        if self.head_sent:
            self.connection.send_end(self, trailers)
        else:
            self.connection.send_headers(self, self._head_block() + trailers, ended=True)
        self._log(status, message)

    def refuse(self, error: FairleadError, message: str) -> None:
        """End the call with an error of ours, and what the caller is told beside it."""
        self.tell(told(error))
        timeline = self.timeline
        if not timeline.outcome:
            timeline.outcome, timeline.reason = ended(error)
        self.fail(grpc_status(error), message)

    def fail_with(self, error: Exception) -> None:
        """End the call with what was raised; what is no error of ours is a bug, and told to the log only."""
        if isinstance(error, Broken):
            self.fail(error.status, error.message)
        elif isinstance(error, FairleadError):
            self.refuse(error, error.message)
        else:
            log.error("request_failed", request_id=self.request_id, model=self.model, exc_info=error)
            self.fail(GrpcStatus.INTERNAL, INTERNAL.message)

    def in_thread(self, function: Callable[..., T], *arguments: Any, **named: Any) -> "asyncio.Future[T]":
        """Work that would hold up the event loop. Raises Unavailable if there is too much of it."""
        future: asyncio.Future[T] = self.loop.create_future()

        def done(result: T | None, error: FairleadError | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(cast(T, result))

        self.calls.offload.in_thread(done, partial(function, *arguments, **named))
        return future

    async def next_message(self) -> Buffer | None:
        """The next message of a streaming call; None at the client's end. Raises what is wrong with it."""
        while not self._inbox:
            if self.ended:
                if self._need >= 0 or self._prefix:
                    raise Broken(GrpcStatus.INTERNAL, "the stream ended inside a message")
                return None
            if self.leaving:
                raise ShuttingDown("Server is stopping, the stream has ended")
            self._wake = self.loop.create_future()
            await self._wake
        flag, message = self._inbox.popleft()
        self.connection.buffered_bytes -= len(message) + INBOX_ENTRY_BYTES
        if len(self._inbox) < MAX_INBOX and not self.done:
            self.connection.replenish(self)
        return await self._inflate(message) if flag else message

    async def pause(self, event: asyncio.Event) -> None:
        """Wait for an event in a streaming call that takes no further message, not longer than the server runs."""
        self._wake = self.loop.create_future()
        waiting = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait((self._wake, waiting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()

    def write(self, parts: list[Buffer]) -> None:
        """Send one message of a streaming call without waiting; for those who await `room` before they take on more."""
        if self.done:
            return
        if not self.head_sent:
            self.head_sent = True
            self.connection.send_headers(self, self._head_block())
        size = sum([len(part) for part in parts])
        self.connection.send_data(self, [PREFIX.pack(0, size), *parts], size + 5)

    async def room(self) -> None:
        """Wait until the client's windows have let all messages pass."""
        while self.queued_bytes and not self.done:
            if self._room is None:
                self._room = self.loop.create_future()
            await asyncio.shield(self._room)

    async def send(self, parts: list[Buffer]) -> None:
        """Send one message of a streaming call, at the pace of the client's reading."""
        self.write(parts)
        await self.room()

    # What the connection calls

    def received(self, data: bytes, start: int, stop: int, ended: bool) -> None:
        if self.done:
            return
        if ended and self._parts is None and not self._streaming and stop - start >= 5:
            flag, size = PREFIX.unpack_from(data, start)
            if not flag and size == stop - start - 5 and size <= self.calls.max_message_bytes:
                self._begin_unary(data[start + 5 : stop] if size <= SMALL_BYTES else memoryview(data)[start + 5 : stop])
                return
        self.stalled = False
        try:
            self._assemble(data, start, stop)
        except Broken as error:
            self.fail(error.status, error.message)
            return
        if self._streaming:
            if len(self._inbox) < MAX_INBOX:
                self.connection.replenish(self)
            if self._inbox or ended:
                self._wake_up()
            return
        if not ended:
            self.connection.replenish(self)
        elif self._message is None or self._need >= 0 or self._prefix:
            self.fail(GrpcStatus.INTERNAL, "the request ended before its message was complete")
        else:
            flag, message = self._message
            self._message = None
            self.connection.buffered_bytes -= len(message)
            if not flag:
                self._begin_unary(message)
            else:
                self._start(self._inflate(message), self._begin_unary)

    def waits(self) -> bool:
        if self.ended:
            return False
        return not self._streaming or (len(self._inbox) < MAX_INBOX and (self._need >= 0 or self._prefix != b""))

    def expired(self) -> None:
        if self.queued_bytes:
            self.connection.reset(self, http2.ErrorCode.CANCEL)
        else:
            self.fail(GrpcStatus.DEADLINE_EXCEEDED, "the rest of the request did not come in time")

    def drained(self) -> None:
        if self._room is not None:
            self._room.set_result(None)
            self._room = None

    def leave(self) -> None:
        self.leaving = True
        if self._streaming:
            self._wake_up()

    def lost(self) -> None:
        if self.done:
            return
        self._over()
        self._stop()
        self._log(GrpcStatus.CANCELLED, "the client cancelled the call, or is gone")

    # Messages

    def _assemble(self, data: bytes, start: int, stop: int) -> None:
        """Cut what comes into messages. Raises Broken."""
        connection = self.connection
        if self._parts is None:
            self._parts, self._prefix, self._have = [], b"", 0
        while start < stop:
            if self._need < 0:
                take = min(5 - len(self._prefix), stop - start)
                self._prefix += data[start : start + take]
                start += take
                if len(self._prefix) < 5:
                    return
                flag, self._need = PREFIX.unpack(self._prefix)
                if flag > 1:
                    raise Broken(GrpcStatus.INTERNAL, f"a message has the flag {flag}, which gRPC does not know")
                if flag and not self.head.encoding:
                    raise Broken(GrpcStatus.INTERNAL, "a message is compressed, and grpc-encoding does not say how")
                if self._need > self.calls.max_message_bytes:
                    raise Broken(
                        GrpcStatus.RESOURCE_EXHAUSTED, f"Received message larger than max ({self._need} vs. {self.calls.max_message_bytes})"
                    )
            take = min(self._need - self._have, stop - start)
            if take:
                self._keep(data, start, start + take)
                start += take
                self._have += take
                connection.buffered_bytes += take
                if connection.buffered_bytes > connection.limits.max_buffered_bytes:
                    raise Broken(GrpcStatus.RESOURCE_EXHAUSTED, "too many bytes of incomplete requests on one connection")
            if self._have == self._need:
                self._whole()

    def _keep(self, data: bytes, start: int, stop: int) -> None:
        parts = self._parts
        assert parts is not None
        if stop - start >= PIECE_BYTES:
            parts.append(memoryview(data)[start:stop])
        elif parts and type(parts[-1]) is bytearray:
            # A small view would hold on to all that came with it.
            parts[-1] += data[start:stop]
        else:
            parts.append(bytearray(data[start:stop]))

    def _whole(self) -> None:
        parts, size, flag = self._parts, self._need, self._prefix[0]
        assert parts is not None
        if size <= SMALL_BYTES:
            message: Buffer = b"".join(parts)
        else:
            # The last tensor of the message ends where the message ends; most are multiples of 16 bytes, and this puts them at one.
            padding = -size % 16
            message = memoryview(b"".join((bytes(padding), *parts)))[padding:]
        self._parts, self._prefix, self._need, self._have = [], b"", -1, 0
        if self._streaming:
            self._inbox.append((flag, message))
            self.connection.buffered_bytes += INBOX_ENTRY_BYTES
        elif self._message is None:
            self._message = flag, message
        else:
            raise Broken(GrpcStatus.INTERNAL, "a unary call has one message")

    def _drop(self) -> None:
        """Give back what the connection counts of messages that nobody will take."""
        held = 0
        if self._parts is not None:
            held += self._have
            self._parts, self._have = [], 0
        if self._message is not None:
            held += len(self._message[1])
            self._message = None
        if self._streaming:
            held += sum(len(message) + INBOX_ENTRY_BYTES for _, message in self._inbox)
            self._inbox.clear()
        self.connection.buffered_bytes -= held

    # The work

    def _who(self, doorkeeper: Doorkeeper, scope: Scope) -> None:
        """Raises Unauthenticated or Forbidden."""
        head = self.head
        refuse_twice(head.fields, head.metadata)
        self.caller = doorkeeper.caller(head.metadata, self.connection.peer, self.connection.certificate)
        if self.caller is not None:
            may(self.caller, scope, "")

    def ask_again(self) -> None:
        """For each message of a long stream: the key may be revoked by now. Raises Unauthenticated."""
        doorkeeper, method = self.calls.doorkeeper, self.head.method
        if doorkeeper is None or method is None or method.scope is None:
            return
        caller = doorkeeper.caller(self.head.metadata, self.connection.peer, self.connection.certificate)
        if caller is not None:  # else its issuer's keys are being read anew: it was proved before
            self.caller = caller

    async def _learn(self) -> None:
        doorkeeper, method, connection = self.calls.doorkeeper, self.head.method, self.connection
        assert doorkeeper is not None and method is not None and method.scope is not None
        self.caller = await doorkeeper.learn(self.head.metadata, connection.peer, connection.certificate)
        may(self.caller, method.scope, "")

    async def _stream(self, method: Streaming) -> None:
        if self.caller is None:
            await self._learn()
        await method.run(self)

    def _begin_unary(self, message: Buffer) -> None:
        method = self.head.method
        if self.caller is None:
            self._start(self._learn(), lambda _: self._begin_unary(message))
            return
        if type(method) is Unary:
            try:
                method.start(self, message)
            except Exception as error:
                self.fail_with(error)
        else:
            assert type(method) is Awaited
            self._start(method.run(self, message), self._end_awaited)

    def _end_awaited(self, answer: bytes) -> None:
        self.finish([answer])

    def _start(self, work: Coroutine[Any, Any, Any], end: Callable[[Any], None]) -> None:
        self._task = self.loop.create_task(self._run(work, end))
        self.cancel = self._task.cancel

    async def _run(self, work: Coroutine[Any, Any, Any], end: Callable[[Any], None]) -> None:
        try:
            result = await work
        except Exception as error:
            self.cancel = None  # There is nothing left to stop.
            self.fail_with(error)
        else:
            self.cancel = None
            end(result)

    async def _inflate(self, message: Buffer) -> bytes:
        arguments = message, self.head.encoding, self.calls.max_message_bytes
        if len(message) <= INLINE_INFLATE_BYTES:
            return decompress(*arguments)
        return await self.in_thread(decompress, *arguments)

    def _end_stream(self, _: None) -> None:
        if not self.done:
            self._over()
            if not self.head_sent:
                self.connection.send_headers(self, self._head_block())
            self.connection.send_end(self, OK_TRAILERS)
            self._log(GrpcStatus.OK, "")

    def _deadline(self) -> None:
        self.fail(GrpcStatus.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _over(self) -> None:
        self.done = True
        if self._timer is not None:
            self._timer.cancel()
        if self._parts is not None or self._streaming:
            self._drop()
        if self._streaming:
            self._wake_up()
            self.drained()

    def _stop(self) -> None:
        """Stop the work that is under way, unless it is what stops."""
        cancel, self.cancel = self.cancel, None
        if cancel is not None:
            cancel()

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _head_block(self) -> bytes:
        id = self.request_id.encode()
        return HEAD + bytes((len(id),)) + id + self.answer_metadata

    def _log(self, status: GrpcStatus, error: str) -> None:
        if not self.quiet or (error and status is not GrpcStatus.CANCELLED):
            timeline = self.timeline
            timeline.model, timeline.version, timeline.rows = self.model, self.version, self.num_rows
            timeline.end(time.perf_counter(), status, error, *grpc_end_of(status))
            self.calls.finished.add(timeline)


class Broken(Exception):
    """A message that gRPC itself refuses."""

    def __init__(self, status: GrpcStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
