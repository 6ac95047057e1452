"""Who in this process waits for news of a job; and what a runner here knows of it before the store does."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fairlead.core.generation import Progress


class Changes:
    """Lives in the event loop."""

    def __init__(self) -> None:
        self.progress: dict[str, Progress] = {}
        """Of the jobs that run here."""
        self.submitted = asyncio.Event()
        """There may be something to lease."""
        self.abort: Callable[[str], None] = lambda _: None
        """Stops a job if it runs here."""
        self.deliver: Callable[[], None] = lambda: None
        """A webhook may be due."""
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def tell(self, job: str) -> None:
        for event in self._waiting.get(job, ()):
            event.set()

    def tell_all(self) -> None:
        """Anything may have changed."""
        for job in list(self._waiting):
            self.tell(job)

    @contextmanager
    def listen(self, job: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change from now on."""
        event = asyncio.Event()
        self._waiting.setdefault(job, set()).add(event)
        try:
            yield event
        finally:
            waiting = self._waiting[job]
            waiting.discard(event)
            if not waiting:
                del self._waiting[job]
