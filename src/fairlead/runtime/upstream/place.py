"""One upstream of one model, as the router sees it: a place like a local replica."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable
from functools import partial
from urllib.parse import quote

import structlog

from fairlead.core.errors import Cancelled, FairleadError, InvalidRequest, Unsupported
from fairlead.core.generation import Usage
from fairlead.core.policy import Upstream
from fairlead.core.request import Pausable, Raw, Request, Response, Sink
from fairlead.runtime.upstream.bodies import SEPARATOR_BYTES, num_events, openai_body, tells_usage, usage_of, usage_of_events, whole_events
from fairlead.runtime.upstream.client import Address, Exchange, Pool, fixed_headers
from fairlead.runtime.upstream.errors import UpstreamCut, UpstreamFull, UpstreamGone

log = structlog.get_logger("fairlead.gateway")

MAX_ANSWER_BYTES = 256 << 20
"""Of an answer that is passed on in one piece."""
MAX_EVENT_BYTES = 8 << 20
"""Of one server-sent event."""
BUFFER_BYTES = 64 << 10
"""Of a stream's answer, waiting for a slow reader; then the upstream is read no further."""
ANSWERING_SECONDS = 5.0
MAX_STARTS = 64
"""Beginnings of requests that are kept ready."""
CHARS_PER_TOKEN = 4
"""Where an upstream does not say how many tokens there were."""
DONE = b": end\n\n"
"""A comment, which readers of events skip."""

EMBEDDINGS = "/v1/embeddings"
NOTHING = Usage()
_PATH = re.compile(r"/[!-~]*")
_VALUE = re.compile(r"[ -~]{1,1024}")
_WORD = re.compile(r"[!-~]{1,256}")
_PASSED_ON = (
    (b"content-type", "content-type"),
    (b"inference-header-content-length", "inference-header-content-length"),
    (b"content-encoding", "content-encoding"),
    (b"retry-after", "retry-after"),
    (b"openai-processing-ms", "openai-processing-ms"),
)
HEALTH = {"openai": ("/health", "/healthz"), "kserve": ("/v2/health/ready",)}


class UpstreamPlace:
    """Everything is called from the event loop."""

    remote = True

    def __init__(self, model: str, upstream: Upstream, *, versioned: bool = True) -> None:
        """`versioned`: it is told which version is asked for, as `NAME@VERSION`. Raises ConfigError."""
        address = Address(upstream.url)
        self.id = address.url
        self.model = model
        self.upstream = upstream
        self.ready = True
        """Until a check says otherwise."""
        self.down = ""
        """Why it is not ready, for the operator."""
        self.weight = upstream.weight
        self.in_flight = 0
        self.pool = Pool(address, model, connect_timeout=upstream.connect_timeout, timeout=upstream.timeout)
        self.openai = upstream.protocol == "openai"
        self.name = upstream.model or model
        self.versioned = versioned
        self._prefix = address.prefix if self.openai else f"{address.prefix}/v2/models/{quote(self.name, safe='')}"
        self.fixed = fixed_headers(address, upstream.key)
        self._starts: dict[tuple[str, str, str], str] = {}

    def submit(self, request: Request, sink: Sink) -> "UpstreamTicket":
        """Responses as they come, then the end. Errors go to the sink, possibly before this returns."""
        ticket = UpstreamTicket(self, request, sink)
        try:
            if self.in_flight >= self.upstream.max_in_flight:
                raise UpstreamFull(f"the server that computes model '{self.model}' is busy with {self.in_flight} requests")
            ticket.compose()
        except FairleadError as error:
            ticket.done = True
            sink.close(error)
            return ticket
        self.in_flight += 1
        self.pool.send(ticket)
        return ticket

    def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        """One response, or as many as there are. Closing the iterator cancels the request, at the upstream too."""
        return responses_of(partial(self.submit, request))

    async def check(self) -> bool:
        """Ask for its health and set `ready`: any answer but 5xx will do, for many a server has no such path."""
        down = ""
        try:
            status = 404
            for path in HEALTH[self.upstream.protocol]:
                if status == 404:
                    status, _ = await self.get(path)
            if status >= 500:
                down = f"{self.id} answers {status} when asked for its health"
        except UpstreamGone as error:
            down = error.detail
        self._turned(not down, down)
        return self.ready

    @property
    def answering(self) -> bool:
        """Bytes of an answer came within the last seconds: whatever it says of its health, it works."""
        pool = self.pool
        return any(
            isinstance(each.exchange, UpstreamTicket) and each.heard and each.num_silent * pool.check_seconds < ANSWERING_SECONDS
            for each in pool.connections
        )

    async def get(self, path: str) -> tuple[int, bytes]:
        """(status, body). Raises UpstreamGone, where the body is longer than a few MiB too."""
        return await self.pool.get(f"GET {self.pool.address.prefix}{path} HTTP/1.1\r\n{self.fixed}\r\n".encode("latin-1"))

    async def close(self) -> None:
        """What is under way fails."""
        await self.pool.close()

    def start(self, version: str, raw: Raw) -> str:
        """The first lines of a request. Raises Unsupported, or InvalidRequest."""
        asked = (version, raw.path, raw.content_type)
        found = self._starts.get(asked)
        if found is None:
            kind = raw.content_type if _VALUE.fullmatch(raw.content_type) else "application/json"
            found = f"POST {self._target(version, raw)} HTTP/1.1\r\n{self.fixed}content-type: {kind}\r\n"
            if len(self._starts) >= MAX_STARTS:
                self._starts.clear()
            self._starts[asked] = found
        return found

    def _target(self, version: str, raw: Raw) -> str:
        path = raw.path
        if self.openai != path.startswith("/v1/"):
            wanted = "/v1/..." if self.openai else f"/v2/models/{self.model}/infer"
            raise Unsupported(f"model '{self.model}' is computed by a server of another protocol: ask it at {wanted}")
        if not _PATH.fullmatch(path):
            raise InvalidRequest("the path of the request holds characters that must be escaped")
        versions = f"/versions/{quote(version, safe='')}" if version and not self.openai else ""
        return f"{self._prefix}{versions}{path}"

    def _turned(self, ready: bool, down: str) -> None:
        if ready != self.ready:
            if ready:
                log.info("upstream_ready", model=self.model, upstream=self.id)
            else:
                log.warning("upstream_down", model=self.model, upstream=self.id, reason=down)
        self.ready, self.down = ready, down


class UpstreamTicket(Exchange):
    """A request on its way through an upstream. `cancel` stops it at any stage, `pause` and `resume` are for slow readers."""

    done = False
    streams = False
    """The answer is passed on in pieces."""
    asked_usage = False
    """By us, not by the caller."""
    usage: Usage | None = None
    """As the upstream told it."""
    usage_untold = False
    """No response has carried it yet."""
    embeds = False
    prompt_tokens = 0
    """An estimate, until the upstream tells: it may never, and the caller may leave before it does."""
    num_events = 0
    """As many tokens of the answer, until then."""
    parts: list[bytes] | None = None
    """Received of an answer that is passed on in one piece."""
    rest: bytearray | None = None
    """Of a stream: the beginning of an event."""
    num_bytes = 0

    def __init__(self, place: UpstreamPlace, request: Request, sink: Sink) -> None:
        self.place = place
        self.request = request
        self.sink = sink

    def cancel(self) -> None:
        """The caller left. Its sink is closed with Cancelled unless it was already closed."""
        if not self.done:
            self.drop()
            self._close(Cancelled("request was cancelled"))

    def compose(self) -> None:
        """Write the request. Nothing of the caller's but the body, what kind it is, and who asks for which request. Raises FairleadError."""
        place, request = self.place, self.request
        raw = request.raw
        if raw is None:
            raise Unsupported(
                f"model '{place.model}' is computed by another server: it can only be asked over HTTP, as that server is ({place.upstream.protocol})"
            )
        start = place.start(request.version, raw)
        body = raw.body
        if place.openai:
            name = f"{place.name}@{request.version}" if request.version and place.versioned else place.name
            self.embeds = raw.path == EMBEDDINGS
            self.prompt_tokens = -(-raw.prompt_chars // CHARS_PER_TOKEN)
            max_tokens = None if self.embeds else raw.max_tokens
            body, self.asked_usage = openai_body(body, name, max_tokens=max_tokens, streams=raw.stream)
        lines = f"{start}content-length: {len(body)}\r\n"
        if raw.header_length:
            if not (raw.header_length.isascii() and raw.header_length.isdigit()):
                raise InvalidRequest("Inference-Header-Content-Length must be a number")
            lines += f"inference-header-content-length: {raw.header_length}\r\n"
        if request.id and _WORD.fullmatch(request.id):
            lines += f"x-request-id: {request.id}\r\n"
        trace = request.traceparent
        if trace and _WORD.fullmatch(trace):
            lines += f"traceparent: {trace}\r\n"
            if request.timeline is not None and request.timeline.tracestate:
                lines += f"tracestate: {request.timeline.tracestate}\r\n"
        if raw.accept and _VALUE.fullmatch(raw.accept):
            lines += f"accept: {raw.accept}\r\n"
        self.head = (lines + "\r\n").encode("ascii")
        self.body = body

    # From the connection

    def received(self, data: bytes, complete: bool) -> None:
        if self.streams:
            self._events(data, complete)
            return
        if not self.num_bytes and self._begins_stream():
            self.streams = True
            self._events(data, complete)
            return
        self.num_bytes += len(data)
        if not complete:
            if self.parts is None:
                self.parts = []
            self.parts.append(data)
            if self.num_bytes > MAX_ANSWER_BYTES:
                self.drop()
                self._close(UpstreamGone(f"the answer of model '{self.place.model}' is longer than {MAX_ANSWER_BYTES} bytes"))
        else:
            self._answer(data if self.parts is None else b"".join((*self.parts, data)))

    def failed(self, error: UpstreamGone | UpstreamCut) -> None:
        self._close(error)

    def _begins_stream(self) -> bool:
        raw = self.request.raw
        assert raw is not None
        kind = self.headers.get(b"content-type", b"")
        return raw.stream and self.status < 300 and kind.lower().startswith(b"text/event-stream")

    # To the sink

    def _answer(self, body: bytes) -> None:
        """A whole answer, good or bad."""
        place, status = self.place, self.status
        if 300 <= status < 400 or status in (401, 407):
            # Neither is about this caller: its text may even quote the key that we showed.
            what = "does not accept this server's key" if status > 400 else "has moved: it answers with a redirect"
            self._close(UpstreamGone(f"the server that computes model '{place.model}' {what}", f"{place.id} answers {status}"))
            return
        if place.openai and status < 300 and not (body.lstrip()[:1] == b"{" and body.rstrip()[-1:] == b"}"):
            self._close(place.pool.failure(self, "answered with something that is not JSON", repr(body[:64])))
            return
        request, usage = self.request, None
        if status >= 400:
            usage = NOTHING
        elif place.openai:
            answer = 0 if self.embeds else len(body) // CHARS_PER_TOKEN
            usage = usage_of(body) or Usage(prompt_tokens=self.prompt_tokens, completion_tokens=answer)
        self.sink.respond(
            Response(
                model=request.model, version=request.version, raw=body, status=status, usage=usage, headers=self._told(), id=request.id
            )
        )
        self._close(None)

    def _events(self, data: bytes, complete: bool) -> None:
        """As many whole events as there are: an answer that breaks off does so between two of them."""
        if self.rest or not (complete or data.endswith(b"\n\n")):
            data = self._whole(data, complete)
            if self.done:
                return
        if data:
            self.num_events += num_events(data)
            if tells_usage(data) and self.place.openai:
                usage, data = usage_of_events(data, drop=self.asked_usage)
                if usage is not None:
                    self.usage = usage
                    self.usage_untold = True
            if data:
                self._respond(data)
        if complete and not self.done:
            if self.usage_untold:
                self._respond(DONE)
            self._close(None)

    def _whole(self, data: bytes, complete: bool) -> bytes:
        """The events that are whole with `data`; the beginning of another one stays, and is not looked at again."""
        rest = self.rest
        if rest is None:
            rest = self.rest = bytearray()
        seen = max(len(rest) - SEPARATOR_BYTES, 0)
        rest += data
        end = len(rest) if complete else whole_events(rest, seen)
        if end:
            data = bytes(memoryview(rest)[:end])
            del rest[:end]
        if len(rest) > MAX_EVENT_BYTES:
            self.drop()
            self._close(self.place.pool.failure(self, f"sent an event longer than {MAX_EVENT_BYTES} bytes", "too long"))
        return data if end else b""

    def _respond(self, data: bytes) -> None:
        """Some of a stream."""
        usage = None
        if self.place.openai:
            usage = self.usage or Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.num_events)
            self.usage_untold = False
        request = self.request
        response = Response(model=request.model, version=request.version, raw=data, status=self.status, usage=usage, id=request.id)
        if not self.passed_on:
            self.passed_on = True
            response.headers = self._told()
        self.sink.respond(response)

    def _told(self) -> dict[str, str]:
        """What is passed on of the answer's headers."""
        headers = self.headers
        return {name: headers[key].decode("latin-1") for key, name in _PASSED_ON if key in headers}

    def _close(self, error: FairleadError | None) -> None:
        if not self.done:
            self.done = True
            self.parts = self.rest = None
            self.place.in_flight -= 1
            self.sink.close(error)


async def responses_of(submit: Callable[[Sink], Pausable]) -> AsyncGenerator[Response, None]:
    """What is submitted, as an async iterator. Closing it cancels."""
    channel = _Channel()
    channel.ticket = ticket = submit(channel)
    try:
        while (response := await channel.next()) is not None:
            yield response
    finally:
        ticket.cancel()


class _Channel:
    """A sink that an async iterator reads."""

    ticket: Pausable

    def __init__(self) -> None:
        self._responses: deque[Response] = deque()
        self._num_bytes = 0
        self._closed = False
        self._error: FairleadError | None = None
        self._reader: asyncio.Future[None] | None = None

    def respond(self, response: Response) -> None:
        self._responses.append(response)
        self._num_bytes += len(response.raw or b"")
        if self._num_bytes > BUFFER_BYTES:
            self.ticket.pause()
        self._wake()

    def close(self, error: FairleadError | None) -> None:
        self._closed, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> Response | None:
        """The next response, None at the end. Raises what the request failed with."""
        while not self._responses:
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        response = self._responses.popleft()
        self._num_bytes -= len(response.raw or b"")
        if self._num_bytes <= BUFFER_BYTES // 2:
            self.ticket.resume()
        return response
