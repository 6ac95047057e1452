"""What the HTTP apps share: JSON answers and errors, bodies within limits, event streams, health."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fairlead.api.compression import content_encoding, decompress
from fairlead.api.status import CLIENT_LEFT, INTERNAL, http_status, told
from fairlead.core import policy
from fairlead.core.errors import FairleadError, InvalidRequest, TooLarge, Unsupported

T = TypeVar("T")
Serve = Callable[[Request], Awaitable[Any]]
"""Answers one request with a Starlette response, or anything else that is an ASGI app."""

log = structlog.get_logger(__name__)


JSON = "application/json"
_ANYTHING = re.compile(r"/v1/\{\w+\}")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, JSON)


def error_response(error: FairleadError, headers: Mapping[str, str] | None = None) -> Response:
    headers = {**(headers or {}), **told(error)}
    if isinstance(error, TooLarge):
        # What is left of the body is not worth reading.
        headers["Connection"] = "close"
    return json_response({"error": error.message}, http_status(error), headers)


Admit = Callable[[Request, policy.Scope | None], Awaitable[None]]
"""Puts the caller into the scope. Raises where it may not do what needs such a scope; None: anyone may."""


class Shape(Protocol):
    """How one protocol says what is wrong where none of its operations does: before it has the request, or because it fails."""

    def refusal(self, request: Request, error: HTTPException) -> Response: ...

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> Response: ...

    def content(self, error: FairleadError) -> tuple[int, str, bytes]:
        """(status, media type, body)."""


Shapes = Mapping[str, Shape]
"""By the prefix of the path; elsewhere it is KServe's `{"error": ...}`."""


def shape_of(shapes: Shapes, path: str) -> Shape | None:
    return next((shape for prefix, shape in shapes.items() if path.startswith(prefix)), None)


def json_app(
    routes: Iterable[tuple[str, str, Serve, policy.Scope | None]],
    shapes: Shapes | None = None,
    admit: Admit | None = None,
    unknown: Callable[[Request, HTTPException], None] | None = None,
) -> ASGIApp:
    """An app of (method, path, serve, scope) whose every error has the shape for its path. `unknown`: told of what none of them serves."""
    shapes = shapes or {}

    def admitted(path: str, serve: Serve, scope: policy.Scope | None, shape: Shape | None) -> Serve:
        async def endpoint(request: Request) -> Any:
            request.scope["fairlead.route"] = path
            if admit is not None:
                try:
                    await admit(request, scope)
                except FairleadError as error:
                    # What may be left of the body is not worth reading.
                    return shaped(shape, error, {"Connection": "close"} if has_body(request) else {})
            return await serve(request)

        return _no_surprises(endpoint, shape)

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if unknown is not None and "fairlead.route" not in request.scope:
            unknown(request, error)
        shape = shape_of(shapes, request.url.path)
        if shape is not None:
            return shape.refusal(request, error)
        return json_response({"error": error.detail}, error.status_code, error.headers)

    table = [(method, path, admitted(path, serve, scope, shape_of(shapes, path))) for method, path, serve, scope in routes]
    return JsonApp(table, refuse)


def shaped(shape: Shape | None, error: FairleadError, headers: Mapping[str, str]) -> Response:
    return error_response(error, headers) if shape is None else shape.response(error, headers)


class _Any(Route):
    """Whose path could be any: with another method it is unknown."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, child) if match is Match.FULL else (Match.NONE, {})


class JsonApp(Starlette):
    """A path without parameters is looked up: the router tries its patterns one after the other, which for the last of
    them costs more than the answer."""

    def __init__(self, table: list[tuple[str, str, Serve]], refuse: Callable[[Request, Exception], Response]) -> None:
        routes = [(_Any if _ANYTHING.fullmatch(path) else Route)(path, serve, methods=[method]) for method, path, serve in table]
        super().__init__(routes=routes, exception_handlers={HTTPException: refuse})
        self.router.redirect_slashes = False
        self.refuse = refuse
        self.exact = {(method, path): serve for method, path, serve in table if "{" not in path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serve = self.exact.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if serve is None:
            await super().__call__(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await serve(request)
        except HTTPException as error:
            response = self.refuse(request, error)
        await response(scope, receive, send)


def _no_surprises(serve: Serve, shape: Shape | None) -> Serve:
    async def endpoint(request: Request) -> Any:
        try:
            return await serve(request)
        except FairleadError as error:
            return shaped(shape, error, {})
        except HTTPException:
            raise
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except Exception:
            log.exception("request_failed", method=request.method, path=request.url.path)
            return shaped(shape, INTERNAL, {})

    return endpoint


def has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


def place(request: Request) -> tuple[str, str]:
    """(model, version) of the path, version "" for the default; one that is not a number makes it an unknown path."""
    version = request.path_params.get("version", "")
    if version and not (version.isascii() and version.isdigit()):
        raise HTTPException(404)
    return request.path_params["model"], version


async def read_body(request: Request, limit: int) -> bytes:
    """The body, decompressed. Raises TooLarge, before reading where Content-Length already says so."""
    try:
        encoding = content_encoding(request.headers.get("content-encoding", ""))
    except Unsupported as error:
        raise HTTPException(501, error.message, {"Accept-Encoding": "gzip, deflate"}) from None
    too_large = TooLarge(f"request body exceeds the limit of {limit} bytes for {request.url.path}")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    body = b"".join(chunks)
    return await asyncio.to_thread(decompress, body, encoding, limit) if encoding else body


def decode_json(body: bytes, type_: type[T]) -> T:
    """Raises InvalidRequest naming the field."""
    try:
        return msgspec.json.decode(body, type=type_)
    except RecursionError:
        raise InvalidRequest("JSON nesting depth exceeds maximum allowed limit (100)") from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"request body: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"request body is not JSON: {error}") from None


async def while_connected(scope: Scope, receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, which is cancelled when the client leaves: None."""
    departure = scope.get("fairlead.departure")
    if departure is None:
        return await _watched(receive, work)
    if departure.gone:
        work.close()
        return None
    task = asyncio.current_task()
    assert task is not None
    departure.leave = task.cancel
    try:
        return await work
    except asyncio.CancelledError:
        if not departure.gone:
            raise
        task.uncancel()
        return None
    finally:
        departure.leave = None


async def _watched(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The same where the server does not tell by itself who left."""
    task = asyncio.create_task(work)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if not watcher.done():
            raise
        return None
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class ErrorShape(Protocol):
    """How a protocol says that something went wrong."""

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> Response: ...

    def event(self, error: FairleadError) -> bytes:
        """As the data of a server-sent event."""


class PlainErrors:
    """KServe's: `{"error": "..."}`."""

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> Response:
        return error_response(error, headers)

    def event(self, error: FairleadError) -> bytes:
        return msgspec.json.encode({"error": error.message})


Ended = Callable[[int, str], None]
"""Told once how an answer ended: its status (CLIENT_LEFT where nobody waited for it) and what went wrong, "" if nothing."""


def framed(data: bytes, name: str = "") -> bytes:
    """A server-sent event."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


class EventStream:
    """Server-sent events, framed, each on its way as soon as it is there.

    An error before the first event is an ordinary error answer with its status; a later one is the last event.
    The events' generator is closed at the end, and when the client leaves.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        ended: Ended,
        headers: Mapping[str, str],
        errors: ErrorShape | None = None,
        error_event: str = "",
    ) -> None:
        """`error_event`: the name of the event that tells of an error."""
        self.events = events
        self.ended = ended
        self.headers = headers
        self.line: Any = None
        self.errors = errors or PlainErrors()
        self.error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, message = 503, "the server stopped"
        self.line = scope.get("fairlead.line", self.line)
        try:
            end = await while_connected(scope, receive, self._talk(send))
            status, message, answer = end or LEFT
            if answer is not None:
                await answer(scope, receive, send)
        finally:
            self.ended(status, message)

    async def _talk(self, send: Send) -> tuple[int, str, Response | None]:
        """Send the events. Returns how it ended, with an answer where an error came in place of the first event."""
        started = False
        try:
            async with aclosing(self.events) as events:
                async for event in events:
                    if not started:
                        await self._start(send)
                        started = True
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except FairleadError as error:
            failure = error
        except OSError:
            return LEFT
        except Exception:
            log.exception("stream_failed")
            failure = INTERNAL
        else:
            if not started:
                await self._start(send)
            await send({"type": "http.response.body", "body": b""})
            return 200, "", None
        if not started:
            answer = self.errors.response(failure, self.headers)
            return answer.status_code, failure.message, answer
        await send({"type": "http.response.body", "body": framed(self.errors.event(failure), self.error_event)})
        return http_status(failure), failure.message, None

    async def _start(self, send: Send) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "content-type"}  # which another server's had
        named = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        if self.line is not None:
            self.line.timeline.first_at = time.perf_counter()
        await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM_HEADERS, *named]})


LEFT = (CLIENT_LEFT, "the client left", None)

EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of the nginx family buffer without it.
    (b"x-accel-buffering", b"no"),
]


class Readiness(Protocol):
    @property
    def ready(self) -> bool: ...

    @property
    def stopping(self) -> bool: ...


def _not_ready(state: Readiness) -> str:
    return "Server exiting" if state.stopping else "Server is not ready"


def live_response() -> Response:
    return json_response({"live": True})


def ready_response(state: Readiness) -> Response:
    return json_response({"ready": True}) if state.ready else json_response({"ready": False, "error": _not_ready(state)}, 503)


def health_response(state: Readiness) -> Response:
    """Live and ready in one."""
    if state.ready:
        return json_response({"live": True, "ready": True})
    return json_response({"live": True, "ready": False, "error": _not_ready(state)}, 503)
