"""Requests that have ended, on their way to everybody who wants to know: some at a time, and not on the hot path."""

from collections.abc import Callable, Sequence

import structlog

from fairlead.core.timeline import Details, Timeline

FLUSH_REQUESTS = 64
FLUSH_SECONDS = 0.2

log = structlog.get_logger("fairlead.observe")

Listener = Callable[[Sequence[Timeline]], None]
"""Takes requests in the order in which they ended. It must not keep them unless in a bounded place."""


class Finished:
    """The owner calls `flush` every FLUSH_SECONDS and at the end; so does whoever must know of the last ones now."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)
        self.afterwards: Callable[[str, float, str, Details], None] = _nobody
        """Told of what happens to a job after its end: (its id, when, one of EVENTS, details)."""
        self._waiting: list[Timeline] = []

    def add(self, timeline: Timeline) -> None:
        """Nothing is written into it after this."""
        self._waiting.append(timeline)
        if len(self._waiting) >= FLUSH_REQUESTS:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        timelines, self._waiting = self._waiting, []
        for listener in self.listeners:
            try:
                listener(timelines)
            except Exception:
                log.exception("not_observed", listener=getattr(listener, "__qualname__", repr(listener)))


def _nobody(job: str, at: float, name: str, details: Details) -> None:
    """Asked."""
