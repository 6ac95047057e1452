"""HTTP/1.1 for the data port: `infer` on a short path of its own, everything else through uvicorn's ASGI cycle.

A request for `/v2/models/NAME[/versions/N]/infer` becomes an `Exchange`: no scope, no task, no coroutine.
    head → [body] → decode → repository.submit → respond → written
Requests on one connection are answered one after the other, whichever path each takes.
"""

import asyncio
import math
import re
import ssl as tls
from collections import deque
from email.utils import formatdate
from http import HTTPStatus
from socket import socket
from time import perf_counter, time
from typing import Any, Protocol
from urllib.parse import unquote

import httptools
import msgspec
import numpy as np
import structlog
import uvicorn
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from fairlead.api.compression import Inflater, accepted_encoding, compress, content_encoding
from fairlead.api.kserve.codec import (
    JSON_FORM,
    LARGE_JSON_BYTES,
    Data,
    Form,
    Pace,
    TooSlow,
    decode,
    decode_raw,
    encode,
    head_size,
    message_of,
    pace,
    with_labels,
)
from fairlead.api.offload import Offload
from fairlead.api.status import http_status
from fairlead.core.errors import Cancelled, FairleadError, InvalidRequest, ModelError, TooLarge, Unavailable, Unsupported
from fairlead.core.request import Request, Response, Sink
from fairlead.core.specs import ModelSpec
from fairlead.observe.access import AccessLog, new_request_id

log = structlog.get_logger("fairlead.http")

INFER = re.compile(rb"/v2/models/([^/]+)(?:/versions/([0-9]+))?/infer")
SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
SANE_TRACE = re.compile(rb"[\x21-\x7e]{1,256}")
MAX_HEAD_BYTES = 64 << 10
DIRECT_ABOVE = 64 << 10
"""Bytes of a body still to come for which it pays to read them past the parser."""
ALIGNMENT = 64
MAX_ROUTES = 4096
MAX_WAITING = 16
"""Requests on one connection behind the one being answered."""
SWEEP_SECONDS = 1.0
LINGER_SECONDS = 2.0
"""How long a refused client may go on sending before it is cut off: closing at once would destroy the refusal on its way."""
MIN_RATE = 1024
"""Bytes per second below which a request comes in too slowly."""
SMALL_INFLATED_BYTES = 256 << 10
COMPRESS_ABOVE = 1024
COMPRESS_INLINE_BELOW = 32 << 10
JOIN_BELOW = 64 << 10
"""Responses beyond this are written from their parts, without a copy."""
CLIENT_LEFT = 499

# which part of a message comes next on a connection
IDLE, HEAD, BODY = 0, 1, 2
INTERNAL = ModelError("internal error")

_json = msgspec.json.Encoder()
_reasons = {status.value: status.phrase for status in HTTPStatus}


class _Version(Protocol):
    @property
    def spec(self) -> ModelSpec: ...


class _Ticket(Protocol):
    def cancel(self) -> None: ...


class Repository(Protocol):
    """What of the model repository serves `infer`."""

    def submit(self, request: Request, sink: Sink) -> _Ticket: ...

    def find(self, name: str, version: str = "") -> _Version: ...


class Exchange:
    """One infer request and its answer; the sink of the former is the latter."""

    # Defaults stand on the class: setting two dozen attributes per request would cost more than reading its headers.
    request_id = ""
    trace = ""
    id = ""
    head = ""
    encoding = ""
    accept_encoding = ""
    extra = ""
    body: Data | None = None
    num_body_bytes = 0
    """As announced; 0 when it comes in chunks."""
    pad = 0
    """Bytes before the body so that the first tensor after its JSON is aligned."""
    held_bytes = 0
    request: Request | None = None
    form = JSON_FORM
    ticket: _Ticket | None = None
    error: FairleadError | None = None
    status = 0
    continue_expected = False
    waiting = False
    """Others on this connection are answered first."""
    complete = False
    """The whole body is here."""
    answered = False
    response_complete = False
    disconnected = False

    def __init__(self, protocol: "DataProtocol", model: str, version: str, *, keep_alive: bool) -> None:
        self.protocol = protocol
        self.server = protocol.http
        self.model = model
        self.version = version
        self.keep_alive = keep_alive
        self.arrived = protocol.heard

    # Coming in

    def read_headers(self, headers: dict[bytes, bytes]) -> None:
        """The few that matter. Raises FairleadError."""
        if b"x-request-id" in headers and SANE_ID.fullmatch(headers[b"x-request-id"]):
            self.request_id = headers[b"x-request-id"].decode("ascii")
        if b"traceparent" in headers and SANE_TRACE.fullmatch(headers[b"traceparent"]):
            self.trace = headers[b"traceparent"].decode("ascii")
        if b"inference-header-content-length" in headers:
            self.head = headers[b"inference-header-content-length"].decode("latin-1")
        if b"accept-encoding" in headers:
            self.accept_encoding = headers[b"accept-encoding"].decode("latin-1")
        if b"content-encoding" in headers:
            try:
                self.encoding = content_encoding(headers[b"content-encoding"].decode("latin-1"))
            except Unsupported:
                self.extra = "accept-encoding: gzip, deflate\r\n"
                raise
        if b"expect" in headers:
            self.continue_expected = headers[b"expect"].lower() == b"100-continue"

    def extend(self, part: bytes) -> None:
        """One more part of a body that comes in several."""
        body = self.body
        size = len(part)
        if type(body) is not bytearray:
            assert body is not None
            self.pad = self._padding()
            self.body = body = bytearray(self.pad) + body
            size += len(body) - self.pad
        if self.waiting:
            self.protocol.flow.pause_reading()
        if self.hold(size):
            body += part

    def hold(self, size: int) -> bool:
        """Count so many more bytes; false if that was too much, and the request refused."""
        server = self.server
        if self.held_bytes + size > server.max_body_bytes:
            self.refuse(server.too_large())
        elif server.receiving_bytes + size > server.max_receiving_bytes:
            self.refuse(server.too_much())
        else:
            server.receiving_bytes += size
            self.held_bytes += size
            return True
        return False

    def read_directly(self) -> "BodyReader | None":
        """A reader for what is still to come of a body that announced its length."""
        body = self.body or b""
        if type(body) is not bytes or self.num_body_bytes - len(body) < DIRECT_ABOVE or not self.hold(len(body)):
            return None
        pad = self.pad = self._padding()
        # not a bytearray, whose zeros would be written first
        self.body = buffer = memoryview(np.empty(pad + self.num_body_bytes, np.uint8))  # type: ignore[arg-type]
        start = pad + len(body)
        buffer[pad:start] = body
        return BodyReader(self, buffer[start:])

    def _padding(self) -> int:
        return -int(self.head) % ALIGNMENT if self.head.isdigit() and len(self.head) < 20 else 0

    def refuse(self, error: FairleadError, status: int = 0) -> None:
        """Answer with an error without reading what is left of the body; the connection ends with it."""
        self.error, self.status = error, status
        self.keep_alive = False
        self.protocol.deaf = True
        self.protocol.read_again()
        self._release()
        if not self.waiting:
            self._fail(error)

    def start(self) -> None:
        """The requests before this one are answered."""
        self.waiting = False
        self.protocol.running = self
        if self.error is not None:
            self._fail(self.error)
        elif self.complete:
            self.run()
        elif self.continue_expected:
            self.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def run(self) -> None:
        """The whole request is here."""
        body = self.body
        if body is None:
            body = b""
        try:
            if len(body) > self.server.max_body_bytes + self.pad:
                raise self.server.too_large()
            data: Data = body if type(body) is bytes else memoryview(body).toreadonly()[self.pad :]
            if self.encoding:
                self._inflate(data)
            else:
                self._decode(data)
        except FairleadError as error:
            self._fail(error)
        except Exception:
            log.exception("request_failed", model=self.model)
            self._fail(INTERNAL)

    def _inflate(self, data: Data) -> None:
        inflater = Inflater(data, self.encoding, self.server.max_body_bytes)
        if inflater.step(SMALL_INFLATED_BYTES):
            self._decode(inflater.finish())
        else:
            self.server.offload.in_thread(self._inflated, inflater.finish)

    def _inflated(self, body: bytes | None, error: FairleadError | None) -> None:
        if self.response_complete:
            return
        if error is not None:
            self._fail(error)
            return
        assert body is not None
        self.body, self.pad, self.encoding = body, 0, ""
        self.run()

    def _decode(self, data: Data) -> None:
        head = head_size(self.head, len(data)) if self.head else None
        model, version = self.model, self.version
        if head == 0:
            self._submit(*decode_raw(data, model, version, self._spec()))
        elif (len(data) if head is None else head) > LARGE_JSON_BYTES:
            self.server.offload.in_process(self._decoded, decode, bytes(data), head, model, version, True)
        else:
            try:
                request, form = decode(data, head, model, version)
            except TooSlow:
                self.server.offload.in_thread(self._decoded, decode, data, head, model, version, True)
            else:
                self._submit(request, form)

    def _spec(self) -> ModelSpec:
        repository = self.server.repository
        assert repository is not None
        return repository.find(self.model, self.version).spec

    def _decoded(self, decoded: tuple[Request, Form] | None, error: FairleadError | None) -> None:
        if self.response_complete:
            return
        try:
            if error is not None:
                raise error
            assert decoded is not None
            self._submit(*decoded)
        except FairleadError as failure:
            self._fail(failure)
        except Exception:
            log.exception("request_failed", model=self.model)
            self._fail(INTERNAL)

    def _submit(self, request: Request, form: Form) -> None:
        self.id = request.id
        if form.classes:
            form = with_labels(form, self._spec())
        self.form = form
        self.request = request
        request.trace = self.trace
        request.arrived = self.arrived
        self._release()
        repository = self.server.repository
        assert repository is not None
        ticket = repository.submit(request, self)
        if not self.response_complete:
            self.ticket = ticket

    # Going out: the sink

    def respond(self, response: Response) -> None:
        if self.response_complete or self.answered:
            return
        self.answered = True
        self.version = response.version
        form = self.form
        assert self.request is not None
        names = self.request.outputs
        try:
            where = pace(response, form)
            if where is Pace.LOOP:
                self._encoded(encode(response, form, names), None)
            elif where is Pace.THREAD:
                self.server.offload.in_thread(self._encoded, encode, response, form, names)
            else:
                self.server.offload.in_process(self._encoded, encode, response, form, names)
        except FairleadError as error:
            self._fail(error)
        except Exception:
            log.exception("response_failed", model=self.model)
            self._fail(INTERNAL)

    def close(self, error: FairleadError | None) -> None:
        if self.response_complete:
            return
        if error is not None:
            self._fail(error)
        elif not self.answered:
            self._fail(ModelError(f"model '{self.model}' gave no response"))

    def _encoded(self, encoded: tuple[list[Data], int | None] | None, error: FairleadError | None) -> None:
        if self.response_complete:
            return
        if error is not None:
            self._fail(error)
            return
        assert encoded is not None
        parts, head = encoded
        size = 0
        for part in parts:
            size += len(part)
        if self.accept_encoding and size >= COMPRESS_ABOVE and (encoding := accepted_encoding(self.accept_encoding)):
            self._compress(parts, size, head, encoding)
        else:
            self._write(parts, size, head, "")

    def _compress(self, parts: list[Data], size: int, head: int | None, encoding: str) -> None:
        if size < COMPRESS_INLINE_BELOW:
            body = compress(parts, encoding)
            self._write([body], len(body), head, encoding)
            return

        def compressed(body: bytes | None, error: FairleadError | None) -> None:
            if self.response_complete:
                return
            if body is None:
                assert error is not None
                self._fail(error)
            else:
                self._write([body], len(body), head, encoding)

        try:
            self.server.offload.in_thread(compressed, compress, parts, encoding)
        except Unavailable:
            self._write(parts, size, head, "")  # it is only a wish

    def _write(self, parts: list[Data], size: int, head: int | None, encoding: str) -> None:
        if not self.request_id:
            self.request_id = new_request_id()
        if head is None:
            kind = "content-type: application/json\r\n"
        else:
            kind = f"content-type: application/octet-stream\r\ninference-header-content-length: {head}\r\n"
        if encoding:
            kind += f"content-encoding: {encoding}\r\nvary: accept-encoding\r\n"
        start = self._head(200, kind, size)
        transport = self.protocol.transport
        if size < JOIN_BELOW:
            transport.write(b"".join((start, *parts)))
        else:
            transport.writelines((start, *parts))
        self._finish(200, "")

    def _head(self, status: int, kind: str, size: int) -> bytes:
        if self.trace:
            kind += f"traceparent: {self.trace}\r\n"
        protocol = self.protocol
        if not self.keep_alive or (self.server.draining and not protocol.pipeline and not protocol.stage):
            self.keep_alive = False
            kind += "connection: close\r\n"
        line = self.server.ok_line if status == 200 else f"HTTP/1.1 {status} {_reasons.get(status, '')}\r\ndate: {self.server.date}\r\n"
        return f"{line}x-request-id: {self.request_id}\r\n{kind}content-length: {size}\r\n\r\n".encode("latin-1")

    def _fail(self, error: FairleadError) -> None:
        if self.disconnected:
            self._finish(CLIENT_LEFT, error.message)
            return
        if not self.request_id:
            self.request_id = new_request_id()
        message = message_of(error, self.id)
        body = _json.encode({"error": message})
        kind = f"content-type: application/json\r\n{self.extra}"
        if isinstance(error, Unavailable):
            kind += f"retry-after: {math.ceil(error.retry_after)}\r\n"
        status = self.status or http_status(error)
        self.protocol.transport.write(self._head(status, kind, len(body)) + body)
        self._finish(status, message)

    def disconnect(self) -> None:
        """The client left."""
        self.disconnected = True
        if self.ticket is not None:
            self.ticket.cancel()
        if not self.response_complete:
            self._fail(Cancelled("the client left"))

    def _finish(self, status: int, error: str) -> None:
        self.response_complete = True
        self.ticket = None
        rows = self.request.num_rows if self.request is not None else 0
        self.request = None  # an idle connection keeps no tensors
        protocol = self.protocol
        protocol.idle_since = now = perf_counter()
        self.server.access_log.add("http", self.request_id, self.trace, self.model, self.version, status, now - self.arrived, rows, error)
        self._release()
        if self.disconnected:
            return
        if not self.keep_alive:
            protocol.part(linger=not self.complete)
        elif protocol.pipeline or protocol.flow.read_paused:
            protocol.proceed()

    def _release(self) -> None:
        """Let go of the body; the request's arrays hold what they need of it."""
        self.body = None
        if self.held_bytes:
            self.server.receiving_bytes -= self.held_bytes
            self.held_bytes = 0


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
        self.num_bytes = 0
        """Of the message that comes in, beyond its first read."""
        self.unsent_bytes = 0
        self.unsent_since = 0.0

    # From the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        if len(self.connections) > self.http.max_connections:
            self._exchange_error(Unavailable(f"the server has {self.http.max_connections} connections already"))

    def data_received(self, data: bytes) -> None:
        self.heard = perf_counter()
        if self.deaf:
            return
        if self.stage:
            self.num_bytes += len(data)
            if self.num_bytes > (MAX_HEAD_BYTES if self.stage == HEAD else self.http.max_wire_bytes):
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
        self.deaf = True
        self.cycle = None
        self.reader = None
        super().connection_lost(exc)
        self.http.disconnected()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.flow.pause_reading()
        self.unsent_bytes = self.transport.get_write_buffer_size()
        self.unsent_since = perf_counter()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.flow.resume_reading()
        if self.stalled:
            self.stalled = False
            self.proceed()

    def _read_directly(self, exchange: Exchange) -> None:
        """Leave the parser out of the rest of a large body."""
        if exchange.num_body_bytes < DIRECT_ABOVE or exchange.waiting or self.deaf or self.flow.read_paused or self.transport.is_closing():
            return
        self.reader = exchange.read_directly()
        if self.reader is not None:
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

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.stage == HEAD:  # else it trails a chunked body
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
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
        if route is not None and parser.get_method() == b"POST" and b"text/event-stream" not in headers.get(b"accept", b""):
            keep_alive = parser.should_keep_alive() and (b"connection" not in headers or parser.get_http_version() != "1.0")
            exchange = Exchange(self, route[0], route[1], keep_alive=keep_alive)
            exchange.num_body_bytes = num_body_bytes
            self._enqueue(exchange)
            try:
                exchange.read_headers(headers)
                if num_body_bytes > http.max_body_bytes:
                    raise http.too_large()
                if num_body_bytes > JOIN_BELOW and num_body_bytes + http.receiving_bytes > http.max_receiving_bytes:
                    raise http.too_much()
            except FairleadError as error:
                exchange.refuse(error)
                return
            if exchange.continue_expected and not exchange.waiting:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif num_body_bytes > http.max_body_bytes:
            self._exchange_error(http.too_large())
        else:
            self._begin_cycle(headers)

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
        if not self.transport.is_closing():
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
        self.expect_100_continue = headers.get(b"expect", b"").lower() == b"100-continue"
        self.num_cycle_bytes = 0
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()
        if self.http.draining:
            self.cycle.keep_alive = False

    def _cycle_body(self, body: bytes) -> None:
        self.num_cycle_bytes += len(body)
        if self.num_cycle_bytes > self.http.max_body_bytes:
            self.reject(self.http.too_large())
        else:
            super().on_body(body)

    # Refusals

    def _exchange_error(self, error: FairleadError, status: int = 0) -> None:
        """Answer with an error, in turn."""
        exchange = Exchange(self, "", "", keep_alive=False)
        self._enqueue(exchange)
        exchange.refuse(error, status)

    def reject(self, error: FairleadError, status: int = 0) -> None:
        """What comes in is no request that could be served: say so in turn, and listen no more."""
        if self.deaf:
            return
        cycle = self.cycle
        if self.stage != BODY:
            self._exchange_error(error, status)
        elif type(cycle) is Exchange:
            cycle.refuse(error, status)
        elif cycle.response_started:
            # its answer is on the way or gone: there is no place for another
            self.deaf = True
            self.transport.close()
        else:
            self.deaf = True
            cycle.disconnected = True
            cycle.message_event.set()
            self.cycle = exchange = Exchange(self, "", "", keep_alive=False)
            if self.pipeline:
                exchange.waiting = True
                self.pipeline[0] = exchange, None
            else:
                self.running = exchange
            exchange.refuse(error, status)

    def send_400_response(self, msg: str) -> None:
        self.reject(InvalidRequest(msg))

    def _too_long(self) -> None:
        if self.stage == HEAD:
            self.reject(InvalidRequest(f"request line and headers are longer than {MAX_HEAD_BYTES} bytes"), 431)
        else:
            self.reject(self.http.too_large())

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
        if linger and self.transport.can_write_eof() and not self.transport.is_closing():
            self.flow.discard()
            self.linger_until = perf_counter() + LINGER_SECONDS
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
                self.reject(InvalidRequest(f"the request's head did not come within {http.head_timeout:g} s"), 408)
        elif self.stage == BODY:
            if now - self.heard > http.body_timeout or now - self.began > http.body_timeout + self.num_bytes / MIN_RATE:
                self.reject(InvalidRequest("the request's body came too slowly"), 408)
        elif now - self.idle_since > http.keep_alive and self.idle:
            self.transport.close()


def _parser(protocol: DataProtocol) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(protocol)
    # what follows `connection: close` is dropped rather than an error in place of the answer
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


class HttpServer:
    """The data port. Idle connections, slow senders and slow readers are found by one sweep a second."""

    def __init__(
        self,
        repository: Repository | None,
        app: ASGI3Application,
        access_log: AccessLog,
        *,
        max_body_bytes: int = 64 << 20,
        max_receiving_bytes: int = 512 << 20,
        max_connections: int = 10_000,
        keep_alive: float = 300.0,
        head_timeout: float = 15.0,
        body_timeout: float = 30.0,
        write_timeout: float = 60.0,
        offload: Offload | None = None,
    ) -> None:
        self.repository = repository
        """None for a port that offers no `infer`: then all goes through the app."""
        self.access_log = access_log
        self.max_body_bytes = max_body_bytes
        self.max_receiving_bytes = max_receiving_bytes
        """Bodies being received over all connections."""
        self.max_wire_bytes = 2 * max_body_bytes + MAX_HEAD_BYTES
        """A body with the frames of its chunks."""
        self.max_connections = max_connections
        self.keep_alive = keep_alive
        self.head_timeout = head_timeout
        self.body_timeout = body_timeout
        self.write_timeout = write_timeout
        self.offload = offload or Offload()
        self.receiving_bytes = 0
        self.draining = False
        self.port = 0
        self.ok_line = self.date = ""
        self._config = uvicorn.Config(
            _answers_in_json(app),
            http=DataProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._routes: dict[bytes, tuple[str, str] | None] = {}

    async def listen(
        self, host: str = "127.0.0.1", port: int = 8000, *, sock: socket | None = None, ssl: tls.SSLContext | None = None
    ) -> None:
        """Raises OSError where the address is taken or not ours."""
        loop = asyncio.get_running_loop()
        if not self._config.loaded:
            self._config.load()
        address: dict[str, Any] = {"sock": sock} if sock is not None else {"host": host, "port": port}
        self._server = await loop.create_server(lambda: DataProtocol(self._config, self._state, {}, self), **address, ssl=ssl, backlog=2048)
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._sweep()

    @property
    def num_connections(self) -> int:
        return len(self._state.connections)

    async def drain(self, timeout: float = 30.0) -> None:
        """Accept nothing new, let what is in flight finish, close everything; after the timeout cut it off."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        self.disconnected()
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
                if self._state.tasks:
                    await asyncio.wait(self._state.tasks)
        except TimeoutError:
            log.warning("drain_timeout", num_connections=self.num_connections, num_tasks=len(self._state.tasks))
            tasks = list(self._state.tasks)
            for connection in list(self._state.connections):
                connection.transport.abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._empty.wait()
        finally:
            if self._sweeper is not None:
                self._sweeper.cancel()
            self.offload.close()

    def disconnected(self) -> None:
        if self.draining and not self._state.connections:
            self._empty.set()

    def route(self, url: bytes) -> tuple[str, str] | None:
        """(model, version) where the URL is one of `infer`. Raises InvalidRequest for what is no URL."""
        try:
            return self._routes[url]
        except KeyError:
            pass
        try:
            path = httptools.parse_url(url).path
        except httptools.HttpParserInvalidURLError:
            raise InvalidRequest("the request line has no valid URL") from None
        if path is None or not path.isascii():
            raise InvalidRequest("the request line has no path of ASCII characters")
        match = None if self.repository is None else INFER.fullmatch(path)
        route = None if match is None else (unquote(match[1].decode("ascii")), (match[2] or b"").decode("ascii"))
        if len(url) <= 512:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            self._routes[url] = route
        return route

    def too_large(self) -> TooLarge:
        return TooLarge(f"request body exceeds the limit of {self.max_body_bytes} bytes")

    def too_much(self) -> Unavailable:
        return Unavailable(f"bodies of {self.max_receiving_bytes} bytes are being received already")

    def _sweep(self) -> None:
        self.date = formatdate(time(), usegmt=True)
        self.ok_line = f"HTTP/1.1 200 OK\r\ndate: {self.date}\r\n"
        self._state.default_headers = [(b"date", self.date.encode())]
        now = perf_counter()
        for connection in list(self._state.connections):
            assert isinstance(connection, DataProtocol)
            connection.sweep(now)
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)


def _answers_in_json(app: ASGI3Application) -> ASGI3Application:
    """The app, with an answer in JSON where it fails to give any."""

    async def guarded(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        started = False

        async def sending(message: ASGISendEvent) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, sending)
        except Exception:
            if started:
                raise
            log.exception("request_failed", path=scope.get("path"))
            body = _json.encode({"error": INTERNAL.message})
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 500, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})

    return guarded
