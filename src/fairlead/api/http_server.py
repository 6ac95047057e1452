"""The data port: listening, routes of `infer`, limits over all connections, and their end."""

import asyncio
import re
import ssl as tls
from collections.abc import Callable
from email.utils import formatdate
from socket import socket
from time import perf_counter, time
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

import httptools
import msgspec
import structlog
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from fairlead.api.doorkeeper import Doorkeeper
from fairlead.api.http1 import DataProtocol
from fairlead.api.offload import Offload
from fairlead.api.status import INTERNAL
from fairlead.api.web import JSON, Shape, Shapes, shape_of
from fairlead.core.errors import InvalidRequest, TooLarge, Unavailable
from fairlead.core.request import Inference
from fairlead.observe.finished import Finished
from fairlead.runtime.version import Version

log = structlog.get_logger("fairlead.http")

PASSED_ON = frozenset((b"/v1/chat/completions", b"/v1/completions", b"/v1/embeddings"))
"""What goes on to other servers without the app, where one of them computes the model."""
INFER = re.compile(rb"/v2/models/([^/]+)(?:/versions/([0-9]+))?/infer")
Larger = Callable[[bytes, bytes], int]
"""Method and path → how many bytes its body may have; 0: no more than others."""
MAX_ROUTES = 4096
SWEEP_SECONDS = 1.0


class Route(NamedTuple):
    """What is served without the app: `infer` of a model, or (`path`) a body whose model may be another server's."""

    model: str
    version: str
    path: str = ""


class Elsewhere(Protocol):
    @property
    def any_remote(self) -> bool:
        """Other servers compute some models."""

    def remote(self, model: str) -> bool:
        """No version of it is here, but other servers compute it."""

    def passes(self, model: str, version: str) -> bool:
        """They, or engines of others, take its bodies as they came."""

    def falls_back(self, model: str) -> bool:
        """A model that is here may answer in its place: then its bodies are read by the app."""


class Models(Inference, Protocol):
    """What serves `infer`."""

    def find(self, name: str, version: str = "") -> Version:
        """Raises NotFound."""


class HttpServer:
    """The data port. Idle connections, slow senders and slow readers are found by one sweep a second."""

    def __init__(
        self,
        inference: Models | None,
        app: ASGIApp,
        finished: Finished,
        *,
        doorkeeper: Doorkeeper | None = None,
        elsewhere: Elsewhere | None = None,
        shapes: Shapes | None = None,
        prefix: bytes = b"",
        max_body_bytes: int = 64 << 20,
        larger: Larger | None = None,
        max_receiving_bytes: int = 512 << 20,
        max_connections: int = 10_000,
        keep_alive: float = 300.0,
        head_timeout: float = 15.0,
        body_timeout: float = 30.0,
        write_timeout: float = 60.0,
        offload: Offload | None = None,
    ) -> None:
        self.inference = inference
        """None for a port that offers no `infer`: then all goes through the app."""
        self.doorkeeper = doorkeeper
        """None: nobody is asked who they are."""
        self.elsewhere = elsewhere
        """Which models other servers compute; None: none."""
        self.shapes = shapes or {}
        self.prefix = prefix
        """Of the paths of `infer`."""
        """Of errors that come before the app, or in its place."""
        self.finished = finished
        self.max_body_bytes = max_body_bytes
        self.max_receiving_bytes = max_receiving_bytes
        """Bodies being received over all connections."""
        self.larger = larger
        """Bodies that may be larger than that, because the app reads them as they come."""
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
            _answers_in_json(app, self.shapes),
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
        self._routes: dict[bytes, Route | None] = {}

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

    def route(self, url: bytes) -> Route | None:
        """Raises InvalidRequest for what is no URL."""
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
        match = INFER.fullmatch(path, len(self.prefix)) if self.inference is not None and path.startswith(self.prefix) else None
        route = None if match is None else Route(unquote(match[1].decode("ascii")), (match[2] or b"").decode("ascii"))
        if path in PASSED_ON and self.elsewhere is not None:
            route = Route("", "", path.decode("ascii"))
        if len(url) <= 512:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            self._routes[url] = route
        return route

    def shape_of(self, url: bytes) -> Shape | None:
        """How errors look at what a request line names; of one that is no URL, its beginning says."""
        try:
            path = httptools.parse_url(url).path or b""
        except httptools.HttpParserInvalidURLError:
            path = url
        return shape_of(self.shapes, path.decode("latin-1"))

    def body_bound(self, method: bytes, url: bytes) -> int:
        """Bytes that a body for the app may have."""
        return (self.larger and self.larger(method, url.partition(b"?")[0])) or self.max_body_bytes

    def too_large(self, bound: int = 0) -> TooLarge:
        return TooLarge(f"request body exceeds the limit of {bound or self.max_body_bytes} bytes")

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


def _answers_in_json(app: ASGIApp, shapes: Shapes) -> ASGIApp:
    """The app, with an answer in JSON where it fails to give any."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, sending)
        except Exception:
            if started:
                raise
            log.exception("request_failed", path=scope.get("path"))
            shape = shape_of(shapes, scope.get("path", ""))
            status, media_type, body = (
                (500, JSON, msgspec.json.encode({"error": INTERNAL.message})) if shape is None else shape.content(INTERNAL)
            )
            headers = [(b"content-type", media_type.encode()), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})

    return guarded
