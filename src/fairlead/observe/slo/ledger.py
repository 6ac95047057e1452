"""What came of the requests, by objective: in this process for alerts, and by the hour for a store that servers share.

Spans are measured by a clock that only goes on, so that nothing is lost, and nothing fires, when somebody sets the time. Only the
hours of the store are the calendar's.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec import Struct

from fairlead.core.slo import Objective, judge
from fairlead.core.timeline import Timeline
from fairlead.observe.counts import Counts
from fairlead.observe.slo.burn import HOUR, STANDARD_WINDOW, Events, spans_of
from fairlead.observe.slo.ring import Ring

MAX_KNOWN = 2048
"""Pairs of model and class whose objectives are remembered: strangers may name any model."""
MAX_HOURS = 168
"""That wait for a store which does not answer. What is older is left out of it."""
MAX_OWN_HOURS = 75_000
"""Remembered: those of 100 objectives in 30 days."""
FINE, COARSE = 60.0, HOUR
"""Seconds of a bucket, of an objective for 30 days."""


class Hour(NamedTuple):
    """What one server counted of one objective in one hour."""

    slo: str
    digest: str
    hour: int
    """Its first second."""
    good: int
    bad: int


class Counted(Struct):
    """Of one objective."""

    objective: Objective
    digest: str
    fine: Ring
    coarse: Ring
    good: int = 0
    """Of the batch that is being judged."""
    bad: int = 0
    others: Sequence[tuple[float, int, int]] = ()
    """Of other servers and earlier lives: (until when, good, bad) by this process's clock."""

    def within(self, seconds: float, now: float) -> Events:
        """Short spans know this process only; long ones all that the store told of."""
        fine = self.fine
        if seconds <= fine.width * 360.5:
            return fine.within(seconds, now)
        own = self.coarse.within(seconds, now)
        theirs = [(good, bad) for until, good, bad in self.others if until > now - seconds]
        return Events(own.good + sum(good for good, _ in theirs), own.bad + sum(bad for _, bad in theirs))


class Reading(NamedTuple):
    """How an objective stands."""

    objective: Objective
    events: Events
    """Of its window."""
    burn: dict[float, float]
    """Seconds of a span → how fast the budget burnt in it."""
    enough: bool
    """Whether anything can be said."""

    @property
    def attained(self) -> float | None:
        return self.events.good / self.events.total if self.events.total else None

    @property
    def budget_left(self) -> float:
        """Share of the budget; less than 0: overspent."""
        return 1.0 - self.events.burn(self.objective)


class Ledger:
    """Lives in the event loop. `now`: of a clock that only goes on; `wall`: seconds since 1970."""

    def __init__(self, objectives: Iterable[Objective], counts: Counts) -> None:
        self._counts = counts
        self.counted = {each.name: _begun(each) for each in objectives}
        self._known: dict[tuple[str, ...], list[Counted]] = {}
        self._hours: dict[tuple[str, int], tuple[int, int]] = {}
        """What this process counted in each hour, the one that was counted in last at the end: its sum is needed when the clock goes back."""
        self._unwritten: set[tuple[str, int]] = set()
        for name in self.counted:
            for outcome in ("good", "bad"):
                counts.add("fairlead_slo_events_total", name, outcome, by=0)  # so that rates begin at 0

    def add(self, timelines: Sequence[Timeline], now: float, wall: float) -> None:
        known = self._known
        for timeline in timelines:
            for counted in known.get((timeline.model, timeline.qos_class)) or self._concerned(timeline.model, timeline.qos_class):
                judgement = judge(timeline, counted.objective)
                if judgement == "good":
                    counted.good += 1
                elif judgement == "bad":
                    counted.bad += 1
        for name, counted in self.counted.items():
            if counted.good or counted.bad:
                good, bad, counted.good, counted.bad = counted.good, counted.bad, 0, 0
                self.record(name, good, bad, now, wall)

    def record(self, name: str, good: int, bad: int, now: float, wall: float) -> None:
        counted = self.counted[name]
        counted.fine.add(good, bad, now)
        counted.coarse.add(good, bad, now)
        self._remember((name, int(wall // HOUR * HOUR)), good, bad)
        for outcome, number in (("good", good), ("bad", bad)):
            if number:
                self._counts.add("fairlead_slo_events_total", name, outcome, by=number)

    def _remember(self, hour: tuple[str, int], good: int, bad: int) -> None:
        before = self._hours.pop(hour, (0, 0))
        self._hours[hour] = (before[0] + good, before[1] + bad)  # the last one now
        self._unwritten.add(hour)
        if len(self._hours) > MAX_OWN_HOURS:
            oldest = next(iter(self._hours))
            del self._hours[oldest]
            self._unwritten.discard(oldest)

    def _concerned(self, *key: str) -> list[Counted]:
        """Of a model and a class."""
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            found = self._known[key] = [each for each in self.counted.values() if each.objective.concerns(*key)]
        return found

    def read(self, name: str, now: float) -> Reading:
        counted = self.counted[name]
        objective = counted.objective
        events = counted.within(objective.window, now)
        burn = {span: counted.within(span, now).burn(objective) for span in spans_of(objective)}
        return Reading(objective, events, burn, events.total >= objective.min_events)

    # The store

    def unwritten(self) -> list[Hour]:
        """What the store does not have yet: whole sums of this process's hours, so that writing one twice changes nothing."""
        return [Hour(name, self.counted[name].digest, hour, *self._hours[name, hour]) for name, hour in sorted(self._unwritten)]

    def written(self, hours: Iterable[Hour]) -> None:
        """These are kept. What was counted meanwhile is still to be written."""
        for hour in hours:
            key = (hour.slo, hour.hour)
            if self._hours.get(key) == (hour.good, hour.bad):
                self._unwritten.discard(key)

    def give_up(self) -> int:
        """Forget the oldest hours beyond the bound. Returns how many."""
        hours = sorted({hour for _, hour in self._unwritten})
        dropped = set(hours[: max(len(hours) - MAX_HOURS, 0)])
        for key in [key for key in self._unwritten if key[1] in dropped]:
            self._unwritten.discard(key)
            del self._hours[key]
        return len(dropped)

    def hear(self, hours: Iterable[Hour], now: float, wall: float) -> None:
        """All that others counted, in place of what was heard before. Hours that have not come yet are a wrong clock's."""
        heard: dict[str, list[tuple[float, int, int]]] = {name: [] for name in self.counted}
        for slo, digest, hour, good, bad in hours:
            counted = self.counted.get(slo)
            if counted is not None and counted.digest == digest and hour <= wall:
                heard[slo].append((now - (wall - (hour + HOUR)), good, bad))
        for name, rows in heard.items():
            self.counted[name].others = rows


def digest_of(objective: Objective) -> str:
    """What is counted; another target or window leaves it as it is."""
    words = (objective.model, objective.qos_class, objective.kind, f"{objective.threshold:g}")
    return hashlib.blake2b("\0".join(words).encode(), digest_size=8).hexdigest()


def _begun(objective: Objective) -> Counted:
    scale = objective.window / STANDARD_WINDOW
    return Counted(objective, digest_of(objective), Ring(FINE * scale, 361), Ring(COARSE * scale, 721))
