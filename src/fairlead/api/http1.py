"""HTTP/1.1 for the data port: `infer` becomes an `Exchange`, everything else goes through uvicorn's ASGI cycle.

Requests on one connection are answered one after the other, whichever path each takes.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

import httptools
import structlog
import uvicorn
from uvicorn._types import ASGI3Application, ASGISendEvent
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from fairlead.api.doorkeeper import Acquaintance
from fairlead.api.exchange import DIRECT_BYTES, Exchange
from fairlead.api.status import INTERNAL, LateRequest, LongHead
from fairlead.core.errors import FairleadError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from fairlead.api.http_server import HttpServer, Route

log = structlog.get_logger("fairlead.http")

MAX_HEAD_BYTES = 64 << 10
MAX_WAITING = 16
"""Requests on one connection behind the one being answered."""
LINGER_SECONDS = 2.0
"""How long a refused client may go on sending before it is cut off: closing at once would destroy the refusal on its way."""
MIN_RATE = 1024
"""Bytes per second below which a request comes in too slowly."""

# which part of a message comes next on a connection
IDLE, HEAD, BODY = 0, 1, 2


class BodyReader(asyncio.BufferedProtocol):
    """Stands in for the connection's protocol while the rest of a large body is read, without a copy, to where it belongs."""

    def __init__(self, exchange: Exchange, rest: memoryview) -> None:
        self.exchange = exchange
        self.rest = rest
        self.connection_lost = exchange.protocol.connection_lost  # type: ignore[method-assign]
        self.pause_writing = exchange.protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = exchange.protocol.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.rest

    def buffer_updated(self, nbytes: int) -> None:
        protocol = self.exchange.protocol
        protocol.heard = perf_counter()
        protocol.num_bytes += nbytes
        self.rest = self.rest[nbytes:]
        if self.exchange.hold(nbytes) and not self.rest:
            protocol.read_again()
            protocol.on_message_complete()


class Departure:
    """Tells an ASGI app at once that its client has left: `leave`, if set, is called then."""

    __slots__ = ("gone", "leave")

    def __init__(self) -> None:
        self.gone = False
        self.leave: Callable[[], None] | None = None

    def now(self) -> None:
        self.gone = True
        if self.leave is not None:
            self.leave()


class Parting:
    """The transport as an ASGI cycle has it: what closes it lets the client read what was said."""

    __slots__ = ("is_closing", "protocol", "write")

    def __init__(self, protocol: "DataProtocol") -> None:
        self.protocol = protocol
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        self.protocol.part(linger=self.protocol.stage == BODY)


class Unframed:
    """What an ASGI cycle sends to a client of HTTP/1.0, which knows no chunks: an answer of unknown length ends with the connection."""

    __slots__ = ("cycle", "lengthless", "send")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.cycle = cycle
        self.send = cycle.send
        self.lengthless = False

    async def __call__(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self.lengthless = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if self.lengthless:
                self.cycle.chunked_encoding = False
        elif message["type"] == "http.response.body" and self.lengthless:
            self.cycle.expected_content_length = len(message.get("body", b""))
        await self.send(message)


class Flow(FlowControl):
    """Reads on only while little waits on this connection: neither requests nor answers pile up.

    Something may wait, because only one who reads notices that the client left.
    """

    def __init__(self, transport: asyncio.Transport, pipeline: deque[Any]) -> None:
        super().__init__(transport)
        self.pipeline = pipeline

    def resume_reading(self) -> None:
        if len(self.pipeline) < MAX_WAITING and not self.write_paused and not self._transport.is_closing():
            super().resume_reading()

    def discard(self) -> None:
        """Read whatever waits: nobody wants what comes."""
        super().resume_reading()


class DataProtocol(HttpToolsProtocol):
    """One connection. `cycle` is the message that comes in, `running` the one being answered."""

    cycle: Any
    flow: Flow
    pipeline: deque[tuple[Any, Any]]

    def __init__(self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], http: "HttpServer") -> None:
        super().__init__(config, server_state, app_state)
        self.http = http
        self.peer = ""
        self.url = b""
        self.certificate: Mapping[str, Any] | None = None
        """Of a client over TLS that showed one; verified."""
        self.acquaintance = Acquaintance()
        self.running: Any = None
        self.stage = IDLE
        self.deaf = False
        """Nothing more is wanted from this client."""
        self.stalled = False
        """The next request waits until the client has read its answers."""
        self.proceeding = False
        self.upgrading = False
        self.reader: BodyReader | None = None
        self.heard = self.began = self.idle_since = perf_counter()
        self.linger_until = 0.0
        self.num_cycle_bytes = 0
        self.max_bytes = http.max_body_bytes
        """Of the body that comes in."""
        self.num_bytes = 0
        """Of the message that comes in, beyond its first read."""
        self.num_read = 0
        """By the latest read."""
        self.unsent_bytes = 0
        self.unsent_since = 0.0

    # From the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peer = self.client[0] if self.client else ""
        self.certificate = transport.get_extra_info("peercert") or None
        self.flow = Flow(transport, self.pipeline)
        if len(self.connections) > self.http.max_connections:
            self._exchange_error(Unavailable(f"the server has {self.http.max_connections} connections already"))

    def data_received(self, data: bytes) -> None:
        self.heard = perf_counter()
        if self.deaf:
            return
        self.num_read = len(data)
        if self.stage:
            self.num_bytes += len(data)
            # a body comes with the frames of its chunks
            if self.num_bytes > (MAX_HEAD_BYTES if self.stage == HEAD else 2 * self.max_bytes + MAX_HEAD_BYTES):
                self._too_long()
                return
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    if not self.upgrading:  # CONNECT, which is answered by now
                        self.deaf = True
                        return
                    data = self._without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError:
            if not self.deaf:
                log.exception("connection_failed")
                self.reject(INTERNAL)
        except httptools.HttpParserError as error:
            self.reject(InvalidRequest(f"not an HTTP/1.1 request: {error}"))
        else:
            if self.stage == BODY and type(self.cycle) is Exchange:
                self._read_directly(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        waiting = [cycle for cycle, _ in self.pipeline]
        self.pipeline.clear()
        for cycle in (self.running, *waiting):
            if cycle is None or cycle.response_complete:
                continue
            if type(cycle) is Exchange:
                cycle.disconnect()
            else:
                cycle.disconnected = True
                cycle.message_event.set()
                cycle.scope["fairlead.departure"].now()
        self.deaf = True
        self.cycle = None
        self.reader = None
        super().connection_lost(exc)
        self.http.disconnected()

    def pause_writing(self) -> None:
        super().pause_writing()
        if type(self.running) is Exchange:
            self.running.pause()
        self.flow.pause_reading()
        self.unsent_bytes = self.transport.get_write_buffer_size()
        self.unsent_since = perf_counter()

    def resume_writing(self) -> None:
        super().resume_writing()
        if type(self.running) is Exchange:
            self.running.resume()
        self.flow.resume_reading()
        if self.stalled:
            self.stalled = False
            self.proceed()

    def _read_directly(self, exchange: Exchange) -> None:
        """Leave the parser out of the rest of a large body."""
        if exchange.num_body_bytes < DIRECT_BYTES or exchange.waiting or self.deaf or self.flow.read_paused or self.transport.is_closing():
            return
        rest = exchange.room_for_rest()
        if rest is not None:
            self.reader = BodyReader(exchange, rest)
            self._let_read(self.reader)

    def read_again(self) -> None:
        """The direct reader is done: a new parser, for the old one never saw the body's end."""
        if self.reader is not None:
            self.reader = None
            self.parser = _parser(self)
            self._let_read(self)

    def _let_read(self, protocol: asyncio.BaseProtocol) -> None:
        transport = self.transport
        if transport.is_closing():
            return
        transport.set_protocol(protocol)
        if not self.flow.read_paused:
            # uvloop looks at the kind of protocol when it starts to read
            transport.pause_reading()
            transport.resume_reading()

    # From the parser

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.stage = HEAD
        self.began = self.heard
        self.num_bytes = 0
        self.max_bytes = self.http.max_body_bytes

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.stage == HEAD:  # else it trails a chunked body
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.num_read > MAX_HEAD_BYTES and self._num_head_bytes() > MAX_HEAD_BYTES and not self.deaf:
            self._too_long()
        if self.deaf:
            return
        self.stage = BODY
        headers = dict(self.headers)
        parser = self.parser
        if b"upgrade" in headers and parser.should_upgrade():
            self.upgrading = True
            return
        try:
            route = self.http.route(self.url)
        except InvalidRequest as error:
            self._exchange_error(error)
            return
        http, length = self.http, headers.get(b"content-length")
        num_body_bytes = int(length) if length is not None else 0
        if route is not None and parser.get_method() == b"POST" and self._fits(route, headers):
            keep_alive = parser.should_keep_alive() and (b"connection" not in headers or parser.get_http_version() != "1.0")
            exchange = Exchange(self, route.model, route.version, keep_alive=keep_alive, path=route.path)
            exchange.num_body_bytes = num_body_bytes
            self._enqueue(exchange)
            try:
                exchange.read_headers(headers)
                if num_body_bytes > http.max_body_bytes:
                    raise http.too_large()
                if num_body_bytes > DIRECT_BYTES and num_body_bytes + http.receiving_bytes > http.max_receiving_bytes:
                    raise http.too_much()
            except FairleadError as error:
                exchange.refuse(error)
                return
            if exchange.continue_expected and not exchange.waiting:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif num_body_bytes > (bound := http.body_bound(parser.get_method(), self.url)):
            self._exchange_error(http.too_large(bound))
        else:
            self.max_bytes = bound
            self._begin_cycle(headers)

    def _fits(self, route: "Route", headers: dict[bytes, bytes]) -> bool:
        """Whether an Exchange can serve it; else the app does."""
        if not route.path:
            return b"text/event-stream" not in headers.get(b"accept", b"")
        last, elsewhere = self.cycle, self.http.elsewhere
        return (
            elsewhere is not None
            and elsewhere.any_remote
            and (last is None or last.response_complete)
            and not self.flow.write_paused
            and b"content-encoding" not in headers
            and self.parser.get_http_version() == "1.1"
        )

    def to_app(self, exchange: Exchange) -> None:
        """A body that was read to the end, and is none to pass on."""
        body = exchange.take_body()
        exchange.response_complete = True
        self._begin_cycle(exchange.headers)
        self.cycle.waiting_for_100_continue = False
        if body:
            self._cycle_body(body)
        super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if self.deaf or self.upgrading:
            return
        if type(cycle) is not Exchange:
            self._cycle_body(body)
        elif cycle.body is None:
            cycle.body = body
        else:
            cycle.extend(body)

    def on_message_complete(self) -> None:
        if self.deaf or self.upgrading:
            return
        self.stage = IDLE
        cycle = self.cycle
        if not cycle.keep_alive:
            self.deaf = True
        if type(cycle) is not Exchange:
            super().on_message_complete()
            return
        cycle.complete = True
        if not cycle.waiting:
            cycle.run()

    # Order

    def _enqueue(self, exchange: Exchange) -> None:
        last, self.cycle = self.cycle, exchange
        if self.flow.write_paused and not self.pipeline and (last is None or last.response_complete):
            self.stalled = True
        elif last is None or last.response_complete:
            self.running = exchange
            return
        if len(self.pipeline) + 1 >= MAX_WAITING:
            self.flow.pause_reading()
        exchange.waiting = True
        self.pipeline.appendleft((exchange, None))

    def _start_asgi_task(self, cycle: Any, app: ASGI3Application) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """An ASGI cycle has ended."""
        self.idle_since = perf_counter()
        if not self.transport.is_closing() and not self.linger_until:
            self.proceed()

    def proceed(self) -> None:
        """The next request on this connection, if there is one; and the next, where that is answered at once."""
        if self.proceeding:
            return
        self.proceeding = True
        while not self.flow.write_paused:
            if not self.pipeline:
                self.flow.resume_reading()
                break
            cycle, app = self.pipeline.pop()
            self.flow.resume_reading()
            if type(cycle) is not Exchange:
                self._start_asgi_task(cycle, app)
                break
            cycle.start()
            if not (cycle.response_complete and cycle.keep_alive):
                break
        else:
            self.stalled = bool(self.pipeline)
        self.proceeding = False

    # The ASGI path

    def _begin_cycle(self, headers: dict[bytes, bytes]) -> None:
        url, listed = self.url, self.headers
        super().on_message_begin()
        self.url = url
        self.headers = listed
        self.scope["headers"] = listed
        self.scope["fairlead.departure"] = Departure()  # type: ignore[typeddict-unknown-key]
        if self.certificate is not None:
            self.scope["fairlead.certificate"] = self.certificate  # type: ignore[typeddict-unknown-key]
        self.expect_100_continue = headers.get(b"expect", b"").lower() == b"100-continue"
        self.num_cycle_bytes = 0
        super().on_headers_complete()
        self.cycle.transport = Parting(self)
        if self.scope["http_version"] != "1.1":
            self.cycle.send = Unframed(self.cycle)
        if self.pipeline:
            self.flow.resume_reading()
        if self.http.draining:
            self.cycle.keep_alive = False

    def _cycle_body(self, body: bytes) -> None:
        self.num_cycle_bytes += len(body)
        if self.num_cycle_bytes > self.max_bytes:
            self.reject(self.http.too_large(self.max_bytes))
        else:
            super().on_body(body)

    # Refusals

    def _exchange_error(self, error: FairleadError) -> None:
        """Answer with an error, in turn."""
        exchange = self._refusal()
        self._enqueue(exchange)
        exchange.refuse(error)

    def _refusal(self) -> Exchange:
        exchange = Exchange(self, "", "", keep_alive=False)
        exchange.route = ""
        exchange.shape = self.http.shape_of(self.url)
        return exchange

    def reject(self, error: FairleadError) -> None:
        """What comes in is no request that could be served: say so in turn, and listen no more."""
        if self.deaf:
            return
        cycle = self.cycle
        if self.stage != BODY:
            self._exchange_error(error)
        elif type(cycle) is Exchange:
            cycle.refuse(error)
        elif cycle.response_started:
            # its answer is on the way or gone: there is no place for another
            self.deaf = True
            self.transport.close()
        else:
            self.deaf = True
            cycle.disconnected = True
            cycle.message_event.set()
            cycle.scope["fairlead.departure"].now()
            self.cycle = exchange = self._refusal()
            if self.pipeline:
                exchange.waiting = True
                self.pipeline[0] = exchange, None
            else:
                self.running = exchange
            exchange.refuse(error)

    def send_400_response(self, msg: str) -> None:
        self.reject(InvalidRequest(msg))

    def _too_long(self) -> None:
        if self.stage == HEAD:
            self.reject(LongHead(f"request line and headers are longer than {MAX_HEAD_BYTES} bytes"))
        else:
            self.reject(self.http.too_large(self.max_bytes))

    def _num_head_bytes(self) -> int:
        return len(self.url) + sum([len(name) + len(value) + 4 for name, value in self.headers])

    def _without_upgrade(self, rest: bytes) -> bytes:
        """What to parse in place of a request that would upgrade to another protocol, for which the parser skipped the body."""
        self.upgrading = False
        self.stage = IDLE
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            kept = value
            if name == b"connection":
                kept = b", ".join(token for token in value.split(b",") if token.strip().lower() != b"upgrade")
            if name != b"upgrade" and kept:
                head += [name, b": ", kept, b"\r\n"]
        self.parser = _parser(self)
        return b"".join([*head, b"\r\n", rest])

    # The end

    def part(self, *, linger: bool) -> None:
        """Close once what was written is sent."""
        self.deaf = True
        if linger and not self.transport.is_closing():
            self.flow.discard()
            self.linger_until = perf_counter() + LINGER_SECONDS
            if self.transport.can_write_eof():
                self.transport.write_eof()
        else:
            self.transport.close()

    @property
    def idle(self) -> bool:
        return not self.stage and not self.pipeline and (self.running is None or self.running.response_complete)

    def shutdown(self) -> None:
        """Let what is in flight finish, then close."""
        if self.idle:
            self.transport.close()
        elif type(self.cycle) is not Exchange and self.cycle is not None:
            self.cycle.keep_alive = False

    def sweep(self, now: float) -> None:
        """Whatever has a deadline on this connection."""
        http = self.http
        if self.linger_until:
            if now > self.linger_until:
                self.transport.abort()
            return
        if self.flow.write_paused:
            unsent = self.transport.get_write_buffer_size()
            if unsent < self.unsent_bytes:
                self.unsent_bytes, self.unsent_since = unsent, now
            elif now - self.unsent_since > http.write_timeout:
                self.transport.abort()
        elif self.flow.read_paused:
            self.began = self.heard = now  # it is we who do not read
        elif self.stage == HEAD:
            if now - self.began > http.head_timeout:
                self.reject(LateRequest(f"the request's head did not come within {http.head_timeout:g} s"))
        elif self.stage == BODY:
            if now - self.heard > http.body_timeout or now - self.began > http.body_timeout + self.num_bytes / MIN_RATE:
                self.reject(LateRequest("the request's body came too slowly"))
        elif now - self.idle_since > http.keep_alive and self.idle:
            self.transport.close()


def _parser(protocol: DataProtocol) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(protocol)
    # what follows `connection: close` is dropped rather than an error in place of the answer
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
