"""What keeps everybody waiting in one process: a busy event loop, a held interpreter, collections of garbage."""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from threading import Event, Thread

from fairlead.observe.metrics import Histogram, Sample
from fairlead.observe.table import SECONDS

LOOP_SECONDS = 0.1
GIL_SECONDS = 0.1
RECENT_SECONDS = 30.0
NUM_GENERATIONS = 3


class LoopLag:
    """How late the event loop comes to a timer. uvloop's have milliseconds: less than one is no lag."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.histogram = Histogram(SECONDS)
        self._clock = clock
        self._since = clock()
        self._max = self._max_before = 0.0

    @property
    def latest(self) -> float:
        """The greatest of the last RECENT_SECONDS, or a little more: up to twice as many."""
        return max(self._max, self._max_before)

    async def run(self) -> None:
        """For ever."""
        while True:
            due = self._clock() + LOOP_SECONDS
            await asyncio.sleep(LOOP_SECONDS)
            now = self._clock()
            self.note(max(now - due, 0.0), now)

    def note(self, late: float, now: float) -> None:
        self.histogram.observe(late)
        if now - self._since >= RECENT_SECONDS:
            self._since, self._max_before, self._max = now, self._max, 0.0
        self._max = max(self._max, late)

    def samples(self) -> Iterator[Sample]:
        yield "fairlead_event_loop_lag_seconds", (), self.histogram
        yield "fairlead_event_loop_lag_max_seconds", (), self.latest


class GilWait:
    """A thread that sleeps for a moment, again and again, and measures how late it gets the interpreter back.

    What it measures holds the scheduler's delay, too: on a machine with more threads that compute than cores that is not nothing.
    """

    def __init__(self) -> None:
        self.histogram = Histogram(SECONDS)
        self._stop = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        self._thread = Thread(target=self._run, name="fairlead-gil", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while True:
            due = time.perf_counter() + GIL_SECONDS
            if self._stop.wait(GIL_SECONDS):
                return
            self.histogram.observe(max(time.perf_counter() - due, 0.0))

    def samples(self) -> Iterator[Sample]:
        yield "fairlead_gil_wait_seconds", (), self.histogram


class GcPauses:
    """Each collection of garbage, by generation."""

    def __init__(self) -> None:
        self.histograms = [Histogram(SECONDS) for _ in range(NUM_GENERATIONS)]
        self._began = 0.0

    def start(self) -> None:
        gc.callbacks.append(self._called)

    def stop(self) -> None:
        if self._called in gc.callbacks:
            gc.callbacks.remove(self._called)

    def _called(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        elif self._began:
            self.histograms[info["generation"]].observe(time.perf_counter() - self._began)
            self._began = 0.0

    def samples(self) -> Iterator[Sample]:
        for generation, histogram in enumerate(self.histograms):
            yield "fairlead_gc_pause_seconds", (str(generation),), histogram
