"""The last finished requests, the last failed ones and the slowest of each model: what `fairlead explain` looks at."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heappush, heapreplace, nlargest
from itertools import chain, count
from statistics import median
from time import perf_counter
from typing import Literal

import msgspec
from msgspec import structs

from fairlead.core.recent import RequestSettings
from fairlead.core.timeline import MAX_EVENTS, BatchNote, Details, Event, Phases, Timeline

MAX_MODELS = 200
"""Whose slowest requests are kept."""
GENERATIONS = 2
"""Parts of the time that the slowest are of, beside the one that passes: what was slow is forgotten part by part."""
MAX_EARLY = 100
FEW = 5
"""Requests of a model below which its median says nothing."""

Kind = Literal["recent", "failed", "slow"]
Slowest = list[tuple[float, int, Timeline]]
"""A heap: (seconds, number, timeline)."""


class Recent:
    """A listener of `Finished`. Bounded in every way: so many timelines, of so many models."""

    def __init__(self, settings: RequestSettings | None = None, clock: Callable[[], float] = perf_counter) -> None:
        self.settings = settings or RequestSettings()
        self.clock = clock
        self._recent: deque[Timeline | bytes] = deque(maxlen=self.settings.keep)
        self._failed: deque[Timeline] = deque(maxlen=self.settings.failed)
        self._slow: deque[dict[str, Slowest]] = deque([{}], maxlen=GENERATIONS + 1)
        self._began = clock()
        """The generation that passes."""
        self._numbers = count()
        self._early: dict[str, Event] = {}
        """By job, what came before its end was heard of."""

    def __call__(self, timelines: Sequence[Timeline]) -> None:
        self._turn(self.clock())
        keep, slow = self.settings.slow, self._slow[-1]
        self._recent.extend([packed(each) if _is_plain(each) else each for each in timelines])
        for timeline in timelines:
            if self._early and timeline.protocol == "job" and (event := self._early.pop(timeline.job, None)) is not None:
                timeline.events.append(event)
            if timeline.outcome == "failure":
                self._failed.append(timeline)
            if not timeline.model or timeline.outcome == "refused" or not keep:
                continue  # who was refused at once was not slow, and may have named any model
            seconds = timeline.ended - timeline.arrived
            slowest = slow.get(timeline.model)
            if slowest is None:
                if len(slow) >= MAX_MODELS:
                    continue
                slowest = slow[timeline.model] = []
            if len(slowest) < keep:
                heappush(slowest, (seconds, next(self._numbers), timeline))
            elif seconds > slowest[0][0]:
                heapreplace(slowest, (seconds, next(self._numbers), timeline))

    def _turn(self, now: float) -> None:
        """Begin another generation, where this one is over."""
        length = self.settings.slow_seconds / GENERATIONS
        passed = int((now - self._began) / length)
        if passed > 0:
            for _ in range(min(passed, GENERATIONS + 1)):
                self._slow.append({})
            self._began += passed * length

    def listed(self, kind: Kind = "recent", *, model: str = "", limit: int = 100) -> list[Timeline]:
        """Newest first; of slow ones the slowest first."""
        if kind == "slow":
            return self.slowest(model, limit)
        found = map(whole, reversed(self._recent)) if kind == "recent" else reversed(self._failed)
        return [each for each, _ in zip((each for each in found if not model or each.model == model), range(limit), strict=False)]

    def slowest(self, model: str = "", limit: int = 20) -> list[Timeline]:
        now = self.clock()
        self._turn(now)
        since = now - self.settings.slow_seconds
        heaps = chain.from_iterable((each.values() if not model else (each.get(model, []),)) for each in self._slow)
        return [each for _, _, each in nlargest(limit, (each for heap in heaps for each in heap if each[2].ended >= since))]

    def find(self, id: str) -> Timeline | None:
        """By its request id, its trace id, or the id of its job; of several the newest, and of a job the one that computed it."""
        found: Timeline | None = None
        for each in self._all():
            known = each.request_id == id or each.job == id or (each.traced and each.trace_id == id)
            if known and (found is None or _rank(each) > _rank(found)):
                found = each
        return found

    def afterwards(self, job: str, at: float, name: str, details: Details) -> None:
        """What came of a job after its end: the one thing that is written into a timeline then."""
        for each in reversed(self._recent):
            if type(each) is Timeline and each.job == job and each.protocol == "job":
                if len(each.events) < MAX_EVENTS:
                    each.events.append((at, name, details))
                return
        if len(self._early) >= MAX_EARLY:
            del self._early[next(iter(self._early))]
        self._early[job] = (at, name, details)

    def _all(self) -> Iterator[Timeline]:
        yield from map(whole, self._recent)
        yield from self._failed
        for generation in self._slow:
            for slowest in generation.values():
                for _, _, timeline in slowest:
                    yield timeline

    def related(self, to: Timeline, limit: int) -> list[Timeline]:
        """Others of the same request id, or of the same job: who handed it in, other tries."""
        found = {_key(each): each for each in self._all() if each.request_id == to.request_id or (to.job and each.job == to.job)}
        found.pop(_key(to), None)
        return sorted(found.values(), key=lambda each: each.arrived)[-limit:]

    def median_seconds(self, like: Timeline) -> float | None:
        """Of recent requests of its model and kind that went well; None where there are too few."""
        seconds = [
            each.seconds
            for each in map(whole, self._recent)
            if each.model == like.model and each.kind == like.kind and each.protocol == like.protocol and each.outcome == "success"
        ]
        return median(seconds) if len(seconds) >= FEW else None


# Tensor requests come by the thousands. As they are, two thousand of them are more than a processor's caches hold, and each
# request would push another one's memory out: a tenth of its time. Packed they are a fifth of that.

NOTES = {"batched": BatchNote, "engine": Phases}
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def _is_plain(timeline: Timeline) -> bool:
    """A tensor request that went well: nothing is written into it any more, and little is known of it."""
    return timeline.kind == "infer" and timeline.outcome == "success" and not timeline.job and timeline.usage is None


def packed(timeline: Timeline) -> bytes:
    """Of one that has no usage."""
    return _encode(structs.astuple(timeline))


def whole(kept: Timeline | bytes) -> Timeline:
    if isinstance(kept, Timeline):
        return kept
    timeline = Timeline(*_decode(kept))
    timeline.finish_reasons = tuple(timeline.finish_reasons)
    timeline.events = [
        (at, name, msgspec.convert(details, NOTES[name]) if name in NOTES else details) for at, name, details in timeline.events
    ]
    return timeline


def _key(timeline: Timeline) -> tuple[str, str, float]:
    return timeline.request_id, timeline.protocol, timeline.arrived


def _rank(timeline: Timeline) -> tuple[bool, float]:
    return timeline.protocol == "job", timeline.ended
