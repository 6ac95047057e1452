"""One `infer` request over HTTP/1.1 and its answer, on a path of its own: no scope, no task, no coroutine.

head → [body] → decode → gateway.submit → respond → written
"""

from collections.abc import Mapping
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import structlog

from fairlead.api.compression import Inflater, accepted_encoding, compress, content_encoding
from fairlead.api.doorkeeper import is_signed, joined, may, refuse_twice, see
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
    num_rows,
    pace,
    with_labels,
)
from fairlead.api.openai.errors import OpenAIErrors, decode_body, no_such_model, openai_status
from fairlead.api.openai.passing import BODIES, Peek, peek, raw_of
from fairlead.api.status import CLIENT_LEFT, INTERNAL, http_status, told
from fairlead.api.web import JSON, Shape, framed
from fairlead.core.caller import ANYONE, Caller, Envelope
from fairlead.core.errors import Cancelled, FairleadError, InvalidRequest, ModelError, Unavailable, Unsupported
from fairlead.core.policy import Scope
from fairlead.core.request import Pausable, Raw, Request, Response, Ticket
from fairlead.core.specs import ModelSpec
from fairlead.core.timeline import SANE_STATE, Timeline, parse_traceparent
from fairlead.gateway.ends import ended
from fairlead.gateway.identity.identity import may_use
from fairlead.observe.access import SANE_ID, SANE_TRACE, new_request_id

if TYPE_CHECKING:
    from fairlead.api.http1 import DataProtocol

log = structlog.get_logger("fairlead.http")

OPENAI = OpenAIErrors()

DIRECT_BYTES = 64 << 10
"""Of a body still to come: from here on it pays to read them past the parser."""
ALIGNMENT = 64
SMALL_INFLATED_BYTES = 256 << 10
COMPRESS_BYTES = 1 << 10
"""Smaller answers are not worth compressing."""
INLINE_COMPRESS_BYTES = 32 << 10
"""From here on a thread compresses."""
INFER_PATH = "/v2/models/{model}/infer"
REFUSED_THERE = ModelError("the upstream refuses")
JOIN_BYTES = 64 << 10
"""From here on answers are written from their parts, without a copy."""

_json = msgspec.json.Encoder()
_reasons = {status.value: status.phrase for status in HTTPStatus}


class Exchange:
    """One infer request and its answer; the sink of the former is the latter."""

    # Defaults stand on the class: setting two dozen attributes per request would cost more than reading its headers.
    request_id = ""
    trace = ""
    id = ""
    head = ""
    headers: dict[bytes, bytes] = {}
    fields: list[tuple[bytes, bytes]] = []
    """The same as they came, with those that come twice."""
    target = b""
    caller: Caller | None = ANYONE
    """None: still to be learned."""
    signed_by = ""
    qos_class = ""
    session = ""
    unproved = False
    """It carries a signature, which is held against the body once that is here."""
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
    ticket: Ticket | None = None
    error: FairleadError | None = None
    continue_expected = False
    waiting = False
    """Others on this connection are answered first."""
    complete = False
    """The whole body is here."""
    answered = False
    response_complete = False
    disconnected = False

    peeked: Peek
    path = ""
    """Of a body of the OpenAI protocol, for a model that may be another server's."""
    route = INFER_PATH
    shape: Shape | None = None
    """Of errors; None: KServe's."""
    streaming = False
    """The answer is being written piece by piece."""

    def __init__(self, protocol: "DataProtocol", model: str, version: str, *, keep_alive: bool, path: str = "") -> None:
        self.protocol = protocol
        self.server = protocol.http
        self.model = model
        self.version = version
        self.keep_alive = keep_alive
        self.timeline = Timeline("", "http", protocol.heard)
        if path:
            self.path, self.shape = path, OPENAI

    # Coming in

    def read_headers(self, headers: dict[bytes, bytes]) -> None:
        """The few that matter. Raises FairleadError."""
        self.headers, self.fields, self.target = headers, self.protocol.headers, self.protocol.url
        if b"x-request-id" in headers and SANE_ID.fullmatch(headers[b"x-request-id"]):
            self.request_id = headers[b"x-request-id"].decode("ascii")
        if b"traceparent" in headers and SANE_TRACE.fullmatch(headers[b"traceparent"]):
            self.trace = headers[b"traceparent"].decode("ascii")
            if parse_traceparent(self.trace) is not None:
                self.timeline.traceparent = self.trace
                if SANE_STATE.fullmatch(headers.get(b"tracestate", b"")):
                    self.timeline.tracestate = headers[b"tracestate"].decode("ascii")
        doorkeeper = self.server.doorkeeper
        if doorkeeper is not None:
            refuse_twice(self.fields, headers)
            protocol = self.protocol
            self.caller = doorkeeper.caller_again(headers, protocol.peer, protocol.certificate, protocol.acquaintance)
            self.unproved = is_signed(headers)
            if self.caller is not None and not self.unproved:
                may(self.caller, Scope.INFER, "")
        if b"x-fairlead-class" in headers:
            self.qos_class = headers[b"x-fairlead-class"].decode("latin-1")
        if b"x-fairlead-session" in headers:
            self.session = headers[b"x-fairlead-session"].decode("latin-1")
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

    def room_for_rest(self) -> memoryview | None:
        """Where to read what is still to come of a body that announced its length; None where that does not pay."""
        body = self.body or b""
        if self.path or type(body) is not bytes or self.num_body_bytes - len(body) < DIRECT_BYTES or not self.hold(len(body)):
            return None
        pad = self.pad = self._padding()
        # not a bytearray, whose zeros would be written first
        self.body = buffer = memoryview(np.empty(pad + self.num_body_bytes, np.uint8))  # type: ignore[arg-type]
        start = pad + len(body)
        buffer[pad:start] = body
        return buffer[start:]

    def _padding(self) -> int:
        return -int(self.head) % ALIGNMENT if self.head.isdigit() and len(self.head) < 20 else 0

    def refuse(self, error: FairleadError) -> None:
        """Answer with an error without reading what is left of the body; the connection ends with it."""
        self.error = error
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
            if self.path and not self.model and not self._is_elsewhere(data):
                self.protocol.to_app(self)
            elif self.caller is None or self.unproved:
                self._introduce(data)
            elif self.encoding:
                self._inflate(data)
            else:
                self._decode(data)
        except FairleadError as error:
            self._fail(error)
        except Exception:
            log.exception("request_failed", model=self.model)
            self._fail(INTERNAL)

    def _is_elsewhere(self, data: Data) -> bool:
        """Whether another server computes the model that the body names. What cannot be read is the app's to complain of."""
        elsewhere = self.server.elsewhere
        assert elsewhere is not None
        try:
            self.peeked = peek(bytes(data))
        except InvalidRequest:
            return False
        model, _, version = self.peeked.model.partition("@")
        if not elsewhere.passes(model, version) or elsewhere.falls_back(model):
            return False
        self.model, self.version = model, version
        return True

    def take_body(self) -> bytes:
        body = self.body
        data = b"" if body is None else bytes(body) if type(body) is bytes else bytes(memoryview(body)[self.pad :])
        self._release()
        return data

    def _introduce(self, data: Data) -> None:
        """Find out who calls, where that takes more than a look at the head; and run again."""

        async def introduced() -> None:
            doorkeeper, protocol = self.server.doorkeeper, self.protocol
            assert doorkeeper is not None
            try:
                if self.caller is None:
                    self.caller = await doorkeeper.learn(self.headers, protocol.peer, protocol.certificate)
                if self.unproved:
                    self.unproved = False
                    self.signed_by = await doorkeeper.prove(self._envelope(data), self.caller)
                may(self.caller, Scope.INFER, self.signed_by)
            except FairleadError as error:
                if not self.response_complete:
                    self._fail(error)
            except Exception:
                log.exception("request_failed", model=self.model)
                if not self.response_complete:
                    self._fail(INTERNAL)
            else:
                if not self.response_complete:
                    self.run()

        task = self.protocol.loop.create_task(introduced())
        self.protocol.tasks.add(task)
        task.add_done_callback(self.protocol.tasks.discard)

    def _envelope(self, body: Data) -> Envelope:
        protocol = self.protocol
        return Envelope(
            method="POST",
            target=self.target.decode("latin-1"),
            scheme=protocol.scheme or "http",
            authority=self.headers.get(b"host", b"").decode("latin-1").lower(),
            headers=joined(self.fields),
            body=body if type(body) is bytes else memoryview(body),
        )

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
        if self._is_remote():
            self._pass(data)
            return
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

    def _pass(self, data: Data) -> None:
        """To a model of which no version is here: as it came."""
        assert self.caller is not None
        if self.path:
            raw = raw_of(self.peeked, self.path, bytes(data), self._accept())
            if not may_use(self.caller, self.model):
                decode_body(bytes(data), BODIES[self.path])  # for a model that is not there, this is complained of first
                raise no_such_model(self.model)
            self.session = self.session or self.peeked.session
            self.request_id = self.request_id or new_request_id()
            priority = self.peeked.priority or 0
            self._submit(Request(model=self.model, version=self.version, raw=raw, id=self.request_id, priority=priority), JSON_FORM)
            return
        kind = self.headers.get(b"content-type", b"application/json").decode("latin-1")
        rows = num_rows(data, head_size(self.head, len(data)) if self.head else None)
        raw = Raw(path="/infer", body=bytes(data), content_type=kind, accept=self._accept(), header_length=self.head, num_rows=rows)
        self._submit(Request(model=self.model, version=self.version, raw=raw, num_rows=rows), JSON_FORM)

    def _accept(self) -> str:
        return self.headers.get(b"accept", b"").decode("latin-1")

    def _is_remote(self) -> bool:
        if self.path:
            return True  # else it would be the app's
        elsewhere = self.server.elsewhere
        if elsewhere is None or not elsewhere.remote(self.model):
            return False
        assert self.caller is not None
        return may_use(self.caller, self.model)  # one that is hidden goes the way of those that are not there

    def _spec(self) -> ModelSpec:
        inference = self.server.inference
        assert inference is not None and self.caller is not None
        see(self.caller, self.model)
        return inference.find(self.model, self.version).spec

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
        timeline = self.timeline
        timeline.bytes_in = self.num_body_bytes or (0 if self.body is None else len(self.body) - self.pad)
        timeline.events.append((perf_counter(), "decoded", None))  # as `note`, which costs a call
        if form.classes:
            form = with_labels(form, self._spec())
        self.form = form
        self.request = request
        request.trace = self.trace
        request.timeline = timeline
        request.arrived = timeline.arrived
        assert self.caller is not None
        request.caller = self.caller
        request.signed_by = self.signed_by
        request.qos_class = self.qos_class
        request.session = self.session
        self.request_id = self.request_id or new_request_id()
        request.log_id = self.request_id
        if b"cache-control" in self.headers:
            request.envelope = self._envelope(b"")
        self._release()
        inference = self.server.inference
        assert inference is not None
        ticket = inference.submit(request, self)
        if not self.response_complete:
            self.ticket = ticket

    # Going out: the sink

    def respond(self, response: Response) -> None:
        if self.response_complete:
            return
        if self.streaming:
            if response.usage is not None:
                self.timeline.usage = response.usage  # of all of it so far
            piece = response.raw
            if piece:
                self._write_piece(piece)
            return
        if self.answered:
            return
        self.answered = True
        self.version = response.version
        if response.headers:
            self.extra += head_lines(response.headers)
        if response.raw is not None:
            self.timeline.usage = response.usage
            raw = self.request.raw if self.request is not None else None
            if raw is not None and raw.stream and response.status == 200:
                self._begin_stream(response.raw)
            else:
                self._write_raw(response.raw, response.status)
            return
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
        if self.streaming:
            self._end_stream(error)
        elif error is not None:
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
        self.timeline.events.append((perf_counter(), "encoded", None))
        parts, head = encoded
        size = 0
        for part in parts:
            size += len(part)
        if self.accept_encoding and size >= COMPRESS_BYTES and (encoding := accepted_encoding(self.accept_encoding)):
            self._compress(parts, size, head, encoding)
        else:
            self._write(parts, size, head, "")

    def _compress(self, parts: list[Data], size: int, head: int | None, encoding: str) -> None:
        if size < INLINE_COMPRESS_BYTES:
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
        kind += self.extra
        start = self._head(200, kind, size)
        self.timeline.bytes_out = size
        transport = self.protocol.transport
        if size < JOIN_BYTES:
            transport.write(b"".join((start, *parts)))
        else:
            transport.writelines((start, *parts))
        self._finish(200, None)

    def pause(self) -> None:
        """The client reads slowly."""
        if self.streaming and isinstance(self.ticket, Pausable):
            self.ticket.pause()

    def resume(self) -> None:
        if self.streaming and isinstance(self.ticket, Pausable):
            self.ticket.resume()

    def _begin_stream(self, piece: bytes) -> None:
        """Head and first piece together: apart, the second would wait for the first one's acknowledgement."""
        self.streaming = True
        self.timeline.first_at = perf_counter()
        self.timeline.bytes_out = len(piece)
        head = self._head(200, f"{self.extra}cache-control: no-cache\r\nx-accel-buffering: no\r\n", -1)
        self.protocol.transport.write(b"%b%x\r\n%b\r\n" % (head, len(piece), piece))

    def _write_piece(self, piece: bytes) -> None:
        self.timeline.bytes_out += len(piece)
        self.protocol.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _end_stream(self, error: FairleadError | None) -> None:
        if error is not None:
            self._write_piece(framed(OPENAI.event(error)))
        self.protocol.transport.write(b"0\r\n\r\n")
        self._finish(200 if error is None else openai_status(error), error)

    def _write_raw(self, body: bytes, status: int) -> None:
        """Another server's answer; its headers say what it is."""
        if not self.request_id:
            self.request_id = new_request_id()
        self.timeline.bytes_out = len(body)
        self.protocol.transport.write(self._head(status, self.extra, len(body)) + body)
        self._finish(status, None if status < 400 else REFUSED_THERE)

    def _head(self, status: int, kind: str, size: int) -> bytes:
        if self.trace:
            kind += f"traceparent: {self.trace}\r\n"
        protocol = self.protocol
        if not self.keep_alive or (self.server.draining and not protocol.pipeline and not protocol.stage):
            self.keep_alive = False
            kind += "connection: close\r\n"
        line = self.server.ok_line if status == 200 else f"HTTP/1.1 {status} {_reasons.get(status, '')}\r\ndate: {self.server.date}\r\n"
        length = "transfer-encoding: chunked" if size < 0 else f"content-length: {size}"
        return f"{line}x-request-id: {self.request_id}\r\n{kind}{length}\r\n\r\n".encode("latin-1")

    def _fail(self, error: FairleadError) -> None:
        if self.disconnected:
            self._finish(CLIENT_LEFT, error)
            return
        if not self.request_id:
            self.request_id = new_request_id()
        if self.streaming:
            self._end_stream(error)
            return
        message = error.message
        if self.shape is not None:
            status, media_type, body = self.shape.content(error)
        else:
            message = message_of(error, self.id)
            status, media_type, body = http_status(error), JSON, _json.encode({"error": message})
        kind = f"content-type: {media_type}\r\n{self.extra}{head_lines(told(error))}"
        self.protocol.transport.write(self._head(status, kind, len(body)) + body)
        self._finish(status, error, message)

    def disconnect(self) -> None:
        """The client left."""
        self.disconnected = True
        if self.ticket is not None:
            self.ticket.cancel()
        if not self.response_complete:
            self._fail(Cancelled("the client left"))

    def _finish(self, status: int, error: FairleadError | None, message: str = "") -> None:
        """`message`: what was said of the error, where those are other words than its own."""
        self.response_complete = True
        self.ticket = None
        timeline, protocol = self.timeline, self.protocol
        if self.request is not None:
            timeline.rows = self.request.num_rows
            self.request = None  # an idle connection keeps no tensors
        protocol.idle_since = now = perf_counter()
        timeline.request_id = self.request_id or new_request_id()
        timeline.path = self.path or self.route
        timeline.model, timeline.version = self.model, self.version
        if error is None:
            timeline.end(now, status, "", "success", "")
        else:
            outcome, reason = ended(error) if error is not REFUSED_THERE else ("failure", "upstream-error")
            timeline.end(now, status, message or error.message, outcome, reason)
        self.server.finished.add(timeline)
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


def head_lines(headers: Mapping[str, str]) -> str:
    """Values come from us and from upstreams' names: none may end a line."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
