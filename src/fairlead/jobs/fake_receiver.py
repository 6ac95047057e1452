"""A receiver of webhooks for tests: a real server on loopback that answers as it was told."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from aiohttp import web
from msgspec import Struct

CHUNK = b"x" * (64 << 10)


class Reply(Struct, frozen=True, kw_only=True):
    """How one call is answered."""

    status: int = 200
    headers: dict[str, str] = {}
    chunks: int = 0
    """Of 64 KiB each, in the body."""
    hang: bool = False
    """Never, or not before `release`."""
    body_hangs: bool = False
    """Status and headers come, the body does not."""


class Received(Struct, frozen=True):
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


class FakeReceiver:
    """Answers with the replies in their order, then with 200."""

    def __init__(self, replies: Iterable[Reply] = ()) -> None:
        self.replies = deque(replies)
        self.received: list[Received] = []
        self.num_open = 0
        """Calls that have no answer yet."""
        self.num_sent_bytes = 0
        """Of bodies, as far as they were taken."""
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._changed = asyncio.Event()
        self._release = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def __aenter__(self) -> "FakeReceiver":
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        self.release()
        await self._runner.cleanup()

    def release(self) -> None:
        """Answer those that hang."""
        self._release.set()

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait for something to have happened here."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.path_qs, headers, await request.read()))
        reply = self.replies.popleft() if self.replies else Reply()
        self.num_open += 1
        self._changed.set()
        try:
            if reply.hang:
                await self._release.wait()
            return await self._answer(request, reply)
        finally:
            self.num_open -= 1
            self._changed.set()

    async def _answer(self, request: web.Request, reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        with suppress(ConnectionResetError):  # the caller may have had enough
            await response.prepare(request)
            if reply.body_hangs:
                await self._release.wait()
            for _ in range(reply.chunks):
                await response.write(CHUNK)
                self.num_sent_bytes += len(CHUNK)
            await response.write_eof()
        return response
