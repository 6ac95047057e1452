"""What the HTTP apps share: JSON answers and errors, bodies within limits, event streams, health."""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fairlead.api.status import http_status
from fairlead.core.errors import FairleadError, InvalidRequest, TooLarge, Unavailable

T = TypeVar("T")
Serve = Callable[[Request], Awaitable[Any]]
"""Answers one request with a Starlette response, or anything else that is an ASGI app."""

log = structlog.get_logger(__name__)
INTERNAL = FairleadError("internal error")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def error_response(error: FairleadError) -> Response:
    headers = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, TooLarge):
        # What is left of the body is not worth reading.
        headers["Connection"] = "close"
    return json_response({"error": error.message}, http_status(error), headers)


def json_app(routes: list[tuple[str, str, Serve]]) -> Starlette:
    """An app of (method, path, serve) whose every error is JSON `{"error": ...}`."""
    app = Starlette(
        routes=[Route(path, _no_surprises(serve), methods=[method]) for method, path, serve in routes],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    return app


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return json_response({"error": error.detail}, error.status_code, error.headers)


def _no_surprises(serve: Serve) -> Serve:
    async def endpoint(request: Request) -> Any:
        try:
            return await serve(request)
        except FairleadError as error:
            return error_response(error)
        except (HTTPException, ClientDisconnect):
            raise
        except Exception:
            log.exception("request_failed", method=request.method, path=request.url.path)
            return error_response(INTERNAL)

    return endpoint


async def read_body(request: Request, limit: int) -> bytes:
    """Raises TooLarge, before reading where Content-Length already says so."""
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
    return b"".join(chunks)


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


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, which is cancelled when the client leaves: None."""
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


class EventStream:
    """Server-sent events, each on its way as soon as it is there.

    An error before the first event is an ordinary error answer with its status; a later one is an event.
    The events' generator is closed at the end, and when the client leaves.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = await while_connected(receive, self._talk(send))
        if error is not None:
            await error_response(error)(scope, receive, send)

    async def _talk(self, send: Send) -> FairleadError | None:
        """Send the events. Returns the error that came in place of the first."""
        started = False
        try:
            async with aclosing(self.events) as events:
                async for event in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEAD})
                        started = True
                    await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        except FairleadError as error:
            failure = error
        except OSError:
            return None  # the client left
        except Exception:
            log.exception("stream_failed")
            failure = INTERNAL
        else:
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEAD})
            await send({"type": "http.response.body", "body": b""})
            return None
        if not started:
            return failure
        event = b"data: " + msgspec.json.encode({"error": failure.message}) + b"\n\n"
        await send({"type": "http.response.body", "body": event})
        return None


EVENT_STREAM_HEAD = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of the nginx family buffer without it.
    (b"x-accel-buffering", b"no"),
]


class Readiness(Protocol):
    ready: bool
    stopping: bool


def not_ready(state: Readiness) -> str:
    return "Server exiting" if state.stopping else "Server is not ready"


def live_response() -> Response:
    return json_response({"live": True})


def ready_response(state: Readiness) -> Response:
    return json_response({"ready": True}) if state.ready else json_response({"ready": False, "error": not_ready(state)}, 503)


def health_response(state: Readiness) -> Response:
    """Live and ready in one."""
    if state.ready:
        return json_response({"live": True, "ready": True})
    return json_response({"live": True, "ready": False, "error": not_ready(state)}, 503)
