"""Which requests' traces are kept. It is decided when all of a request is known: its end and its time count as much as chance."""

from collections.abc import Iterable
from math import floor, inf, log2

from fairlead.core.timeline import Timeline
from fairlead.core.tracing import TraceSettings

WHY = ("parent", "chance", "error", "slow")
"""Its caller keeps it, too; a share of all; we failed; it was slow."""
IMPORTANT = ("error", "slow")
BURST_SECONDS = 2.0
MAX_MODELS = 512
LEAST = 256
"""Requests of a model, before which none of them is called one of the slowest."""
EVERY = 8
"""Of the later ones so many are one that counts: to count takes longer than to compare."""
MANY = 4096
"""From here on the older ones count half."""
LOOK_EVERY = 64
STEPS = 4
"""Buckets in which a time doubles."""


class Sampler:
    def __init__(self, settings: TraceSettings) -> None:
        self.settings = settings
        self._times: dict[tuple[str, str], Times] = {}
        self._rate = Rate(settings.max_per_second)

    def choose(self, timelines: Iterable[Timeline], now: float) -> tuple[list[tuple[Timeline, str]], int]:
        """Those that are kept, and why; how many more would be, were they not too many."""
        rate, kept, beyond = self._rate, [], 0
        rate.flow(now)
        for timeline in timelines:
            why = self.why(timeline)
            if not why:
                continue
            if rate.take(important=why in IMPORTANT):
                kept.append((timeline, why))
            else:
                beyond += 1
        return kept, beyond

    def why(self, timeline: Timeline) -> str:
        """One of WHY; "": it is not kept."""
        settings, outcome = self.settings, timeline.outcome
        if outcome == "failure":
            return "error"
        seconds = timeline.ended - timeline.arrived
        if outcome == "success" and settings.slowest and self._one_of_the_slowest(timeline, seconds):
            return "slow"
        if 0.0 < settings.slow <= seconds:
            return "slow"
        if settings.sample == 1.0 and not timeline.traceparent:
            return "chance"
        timeline.sample = settings.sample  # of one that the gateway never saw
        if not timeline.sampled:
            return ""
        return "parent" if timeline.parent_id else "chance"

    def _one_of_the_slowest(self, timeline: Timeline, seconds: float) -> bool:
        key = timeline.model, timeline.protocol
        times = self._times.get(key)
        if times is None:
            if len(self._times) >= MAX_MODELS:
                del self._times[next(iter(self._times))]
            times = self._times[key] = Times()
        times.seen += 1
        if times.total < LEAST or not times.seen % EVERY:
            times.add(seconds, self.settings.slowest)
        return seconds > times.limit


class Times:
    """How long a model's latest requests took, in steps."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.seen = 0
        self.total = 0
        """Of `counts`."""
        self.limit = inf
        """What takes longer is one of the slowest."""

    def add(self, seconds: float, share: float) -> None:
        step = floor(log2(max(seconds, 1e-6)) * STEPS)
        self.counts[step] = self.counts.get(step, 0) + 1
        self.total += 1
        if self.total >= LEAST and self.total % LOOK_EVERY == 0:
            self._look(share)

    def _look(self, share: float) -> None:
        if self.total >= MANY:
            self.counts = {step: number // 2 for step, number in self.counts.items() if number > 1}
            self.total = sum(self.counts.values())
        left = share * self.total
        for step in sorted(self.counts, reverse=True):
            left -= self.counts[step]
            if left < 0:
                self.limit = 2.0 ** ((step + 1) / STEPS)
                return


class Rate:
    """At most so many a second, over BURST_SECONDS."""

    def __init__(self, per_second: float) -> None:
        """0: any number."""
        self.per_second = per_second
        self.size = max(per_second * BURST_SECONDS, 2.0)
        self.left = self.size
        self._at: float | None = None

    def flow(self, now: float) -> None:
        if self._at is not None:
            self.left = min(self.size, self.left + max(now - self._at, 0.0) * self.per_second)
        self._at = now

    def take(self, *, important: bool) -> bool:
        """The last half is for what is important."""
        if not self.per_second:
            return True
        if self.left - 1.0 < (0.0 if important else self.size / 2) - 1e-9:
            return False
        self.left -= 1.0
        return True
