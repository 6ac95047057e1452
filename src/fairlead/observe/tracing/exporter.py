"""From requests that are kept to a collector, in a thread of its own. Whatever the collector does, no request waits for it."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from threading import Event, Thread

import structlog
from msgspec import Struct

from fairlead.core.timeline import Timeline
from fairlead.observe.tracing.encoding import Resource, encoded
from fairlead.observe.tracing.outlets import Outlet
from fairlead.observe.tracing.spans import Span

MOST = 512
"""Requests in one export."""
SLICE = 4
"""Requests that are encoded at a stretch: the event loop, which needs Python's lock, waits no longer than that takes."""
PAUSE = 0.0005

log = structlog.get_logger("fairlead.traces")

Ended = Callable[[str, int], None]
"""(outcome, number of requests): exported, failed, dropped. Called in the exporter's thread."""


class Kept(Struct):
    """A request to be exported."""

    timeline: Timeline
    offset: float
    """The wall clock's time at the performance counter's zero, when it ended: a clock that is set later moves no span."""
    why: str


Build = Callable[[Sequence[Kept]], Iterable[Sequence[Span]]]
"""The spans of some requests, a few at a time."""


class Exporter:
    def __init__(self, outlet: Outlet, resource: Resource, build: Build, ended: Ended, *, max_queue: int, interval: float) -> None:
        self.outlet = outlet
        self.resource = resource
        self.build = build
        self.ended = ended
        self.max_queue = max_queue
        self.interval = interval
        self._waiting: deque[Kept] = deque()
        self._stopping = Event()
        self._down = False
        self._thread = Thread(target=self._run, name="traces", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, kept: Kept) -> bool:
        """Whether there was room for it."""
        if len(self._waiting) >= self.max_queue:
            return False
        self._waiting.append(kept)
        return True

    def stop(self, seconds: float) -> None:
        """Blocking: what waits is exported, as far as it is within so long."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        left = len(self._waiting)
        self._waiting.clear()
        self.outlet.close()
        if left:
            log.warning("traces_lost", requests=left, note="the collector did not take them before the server stopped")
            self.ended("dropped", left)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stopping.wait(self.interval)
            while self._waiting:
                self._export(self._take())

    def _take(self) -> list[Kept]:
        some: list[Kept] = []
        with suppress(IndexError):  # `stop` may take the rest meanwhile
            while len(some) < MOST:
                some.append(self._waiting.popleft())
        return some

    def _export(self, some: Sequence[Kept]) -> None:
        try:
            error = self.outlet.send(self.resource.export(self._encoded(some)))
        except Exception as failure:
            log.exception("traces_not_encoded")
            error = repr(failure)
        self.ended("failed" if error else "exported", len(some))
        if error and not self._down:
            log.warning("traces_not_exported", error=error, note="said once, until they are again")
        elif self._down and not error:
            log.info("traces_exported_again")
        self._down = bool(error)

    def _encoded(self, some: Sequence[Kept]) -> list[bytes]:
        parts: list[bytes] = []
        for number, spans in enumerate(self.build(some), 1):
            parts += [encoded(span) for span in spans]
            if number % SLICE == 0 and not self._stopping.is_set():
                time.sleep(PAUSE)
        return parts
