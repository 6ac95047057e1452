"""A model with slots, tenants that ask it, and a waiting line, on a virtual clock."""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from fairlead.core.errors import Shed
from fairlead.core.policy import QueueSettings
from fairlead.gateway.queue import TURN, WAITS, Offered, Waiting


class Line(Protocol):
    """What FairQueue and Fifo share."""

    num_waiting: int
    num_in_flight: int

    def offer(self, item: Waiting, now: float) -> Offered: ...
    def done(self, item: Waiting, served: float | None, now: float) -> Sequence[Waiting]: ...
    def expire(self, now: float) -> list[Waiting]: ...
    def next_expiry(self) -> float | None: ...


class Fifo:
    """First come, first served, with the same bounds."""

    def __init__(self, settings: QueueSettings, max_in_flight: int) -> None:
        self.settings = settings
        self.max_in_flight = max_in_flight
        self.num_in_flight = 0
        self.items: deque[Waiting] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self.items)

    def offer(self, item: Waiting, now: float) -> Offered:
        if self.num_in_flight < self.max_in_flight:
            self.num_in_flight += 1
            return TURN
        if len(self.items) >= self.settings.max_requests:
            raise Shed("full", reason="queue-full", retry_after=1.0)
        self.items.append(item)
        return WAITS

    def done(self, item: Waiting, served: float | None, now: float) -> Sequence[Waiting]:
        if self.items:
            return [self.items.popleft()]
        self.num_in_flight -= 1
        return ()

    def expire(self, now: float) -> list[Waiting]:
        expired = []
        while self.items and self.items[0].arrived + self.settings.max_wait <= now:
            expired.append(self.items.popleft())
        return expired

    def next_expiry(self) -> float | None:
        return self.items[0].arrived + self.settings.max_wait if self.items else None


class Asked(Waiting):
    """A simulated request, and what became of it."""

    __slots__ = ("began", "ended", "outcome", "predicted", "real")

    def __init__(self, *, real: float, **fields: object) -> None:
        super().__init__(**fields)  # type: ignore[arg-type]
        self.real = real
        """Its work as it turns out."""
        self.predicted = 0.0
        """What the line said at the door."""
        self.began = self.ended = 0.0
        self.outcome = ""
        """served, expired, evicted, queue-full, predicted-wait; "" at the end: not yet."""

    @property
    def waited(self) -> float:
        return self.began - self.arrived


Draw = Callable[[random.Random], float]


@dataclass(kw_only=True)
class Tenant:
    name: str
    weight: float = 1.0
    priority: int = 0
    work: Draw = lambda _: 1.0
    rate: float = 0.0
    """Requests per second, Poisson."""
    backlog: int = 0
    """So many are always in the line or under way: each that ends is followed by another."""
    bursts: Sequence[tuple[float, int]] = ()
    """(when, how many at once)."""
    begins: float = 0.0
    ends: float = float("inf")
    patience: float = 0.0
    """Seconds until the deadline of its requests; 0: none."""
    estimate: Draw = lambda _: 1.0
    """What the estimate is, times the real work."""

    def ask(self, now: float, random: random.Random) -> Asked:
        real = self.work(random)
        deadline = now + self.patience if self.patience else 0.0
        work = real * self.estimate(random)
        return Asked(tenant=self.name, weight=self.weight, priority=self.priority, real=real, work=work, deadline=deadline, arrived=now)

    def arrivals(self, until: float, random: random.Random) -> Iterator[float]:
        """Those that depend on nothing but time."""
        yield from (self.begins for _ in range(self.backlog))
        for when, number in self.bursts:
            yield from (when for _ in range(number))
        at = self.begins
        while self.rate and (at := at + random.expovariate(self.rate)) < min(until, self.ends):
            yield at


@dataclass
class Run:
    asked: list[Asked] = field(default_factory=list)
    busy_seconds: float = 0.0
    """Of all slots together."""

    def of(self, tenant: str, outcome: str = "served") -> list[Asked]:
        return [item for item in self.asked if item.tenant == tenant and item.outcome == outcome]

    def waits(self, tenant: str) -> list[float]:
        return sorted(item.waited for item in self.of(tenant))

    def served(self, tenant: str, begins: float = 0.0, ends: float = float("inf")) -> float:
        """Work that was given its turn in that time."""
        return sum(item.real for item in self.asked if item.tenant == tenant and item.outcome == "served" and begins <= item.began < ends)


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def simulate(
    line: Line,
    tenants: Sequence[Tenant],
    *,
    slots: int,
    until: float,
    seed: int = 0,
    seconds: Callable[[Asked, random.Random], float] = lambda item, _: item.real,
    began: Callable[[Asked, float], None] = lambda *_: None,
) -> Run:
    """Everything that happens before `until`. `seconds`: how long a request holds its slot; `began` is told of every turn."""
    rng = random.Random(seed)
    run, numbers, by_name = Run(), count(), {tenant.name: tenant for tenant in tenants}
    events: list[tuple[float, int, Tenant | Asked | None]] = []
    for tenant in tenants:
        for at in tenant.arrivals(until, rng):
            heapq.heappush(events, (at, next(numbers), tenant))

    def begin(item: Waiting, now: float) -> None:
        assert isinstance(item, Asked)
        lasts = seconds(item, rng)
        item.began, item.ended, item.outcome = now, now + lasts, "served"
        run.busy_seconds += min(lasts, until - now)
        heapq.heappush(events, (item.ended, next(numbers), item))
        began(item, now)

    def gone(item: Waiting, outcome: str, now: float) -> None:
        assert isinstance(item, Asked)
        item.outcome, item.ended = outcome, now
        tenant = by_name[item.tenant]
        if tenant.backlog and now < tenant.ends:  # not at once: that would be for ever in no time
            heapq.heappush(events, (now + 0.01, next(numbers), tenant))

    def arrive(tenant: Tenant, now: float) -> None:
        item = tenant.ask(now, rng)
        run.asked.append(item)
        predict = getattr(line, "predicted_wait", None)
        item.predicted = predict(item.priority, item.tenant, item.weight, now) if predict else 0.0
        try:
            offered = line.offer(item, now)
        except Shed as shed:
            gone(item, shed.reason, now)
            return
        if offered.evicted is not None:
            gone(offered.evicted, "evicted", now)
        if offered.turn:
            begin(item, now)

    while events:
        expiry = line.next_expiry()
        if expiry is not None and expiry < events[0][0]:
            now, event = expiry, None
        else:
            now, _, event = heapq.heappop(events)
        if now > until:
            break
        if event is None:
            for item in line.expire(now):
                gone(item, "expired", now)
        elif isinstance(event, Tenant):
            arrive(event, now)
        else:
            for item in line.done(event, event.real, now):
                begin(item, now)
            tenant = by_name[event.tenant]
            if tenant.backlog and now < tenant.ends:
                arrive(tenant, now)
        # A slot is never free while somebody waits.
        assert not line.num_waiting or line.num_in_flight >= slots
    return run
