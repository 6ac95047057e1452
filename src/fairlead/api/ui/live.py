"""What happens now, to everybody who looks: one snapshot every two seconds, made once however many there are."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from fairlead.api.web import framed
from fairlead.core.errors import Unauthenticated, Unavailable

BEAT_SECONDS = 5.0
"""Without a snapshot for so long, the stream says that it lives."""
BEAT = b"event: beat\ndata: {}\n\n"
OVER = b"event: over\ndata: {}\n\n"
"""The last one: who looks may not any more."""


class Live:
    def __init__(self, snapshot: Callable[[], dict[str, Any]], *, max_viewers: int) -> None:
        self._snapshot = snapshot
        self.max_viewers = max_viewers
        self.num_viewers = 0
        self.num_snapshots = 0
        self._event = b""
        self._news = asyncio.Event()
        """Another one for each snapshot."""
        self._stopped = False

    def publish(self) -> None:
        """There are new numbers."""
        if self.num_viewers:
            self._event = self._made()
            self._wake()

    def stop(self) -> None:
        """Everybody's stream ends."""
        self._stopped = True
        self._wake()

    async def view(self, allowed: Callable[[], object]) -> AsyncGenerator[bytes, None]:
        """One tab's stream. It ends when `allowed` raises Unauthenticated. Raises Unavailable where enough look already."""
        if self.num_viewers >= self.max_viewers:
            raise Unavailable(f"{self.max_viewers} tabs get live numbers already (`ui.max_viewers`)")
        if not self.num_viewers:
            self._event = self._made()  # nobody looked: the last one is old
        self.num_viewers += 1
        try:
            # Browsers begin anew after so many milliseconds where the stream breaks.
            yield b"retry: 3000\n" + self._event
            while not self._stopped:
                news = self._news
                try:
                    async with asyncio.timeout(BEAT_SECONDS):
                        await news.wait()
                    event = self._event
                except TimeoutError:
                    event = BEAT
                try:
                    allowed()
                except Unauthenticated:
                    yield OVER
                    return
                if not self._stopped:
                    yield event
        finally:
            self.num_viewers -= 1

    def _made(self) -> bytes:
        self.num_snapshots += 1
        return framed(msgspec.json.encode(self._snapshot()))

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
