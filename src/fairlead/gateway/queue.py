"""The waiting line before one model, as a pure state machine: whose turn it is, and who is not let in.

Who goes next is decided in three steps. The band: a higher priority always goes first. Then the tenant, among those of the
band: the one with the least attained service, divided by its weight. Then the request, among those of the tenant: the one
that expires first, which is the oldest where none has a deadline of its own.

    offer(item, now)          its turn now, or it waits (perhaps in the place of another), or Shed is raised
    done(item, served, now)   it was answered: the requests whose turn it is now
    leave(item, now)          the caller left, wherever the request is: the requests whose turn it is now
    expire(now)               those that waited too long, taken out
    next_expiry()             when to call that

Service is counted in units of work (tokens, rows, steps). What a tenant was served fades with `half_life`: instead of making
every tenant's count smaller all the time, what is added grows by 2^(time / half_life), which orders them just the same.

A request is charged its estimate when its turn comes, and what it really was when it is done. A tenant that had nothing
waiting is lifted to the band's `level`, so that it has neither saved credit while it was away nor everything before it that
the others were served since they came (start-time fair queueing; the lift of CFS and VTC).

Nothing here waits or knows the time, and everything is called from the event loop.
"""

import heapq
from collections.abc import Sequence
from itertools import count
from math import exp2, inf

from msgspec import Struct

from fairlead.core.errors import Shed
from fairlead.core.generation import Usage
from fairlead.core.policy import DegradeStep, QueueSettings

OUTPUT_WEIGHT = 2.0
"""A token of an answer against one of a prompt."""
MIN_WORK = 1.0
"""Of a request, in units: one that costs nothing could be repeated for ever at the others' expense."""
MEMORY = 0.99
"""Of the service rate: it is that of the last hundred requests or so."""
MAX_EXPONENT = 256.0
"""Half-lives after which the counts are made small again: far from what a float can hold."""
MAX_GONE = 64
"""Entries of requests that have left, which a heap may hold beside those that matter."""
IN_FLIGHT_SHARE = 0.5
"""What is left of the requests under way, on average, when one more begins to wait."""
SAMPLED = 8
"""One of so many waiting requests, or of fewer, tells how right the predictions are."""
LEAST_SURPRISE, MOST_SURPRISE = 0.25, 4.0
SURPRISED = 0.02
"""How much one of them does (the geometric mean of the last fifty or so counts)."""


def served_work(usage: Usage | None, num_rows: int = 1) -> float:
    """What an answer was, in units: tokens, or of pictures megapixels times steps, where it has usage; else rows. Tokens from a
    prefix cache cost nothing."""
    if usage is None:
        return float(num_rows)
    if usage.num_pictures:
        return usage.num_steps * usage.megapixels / usage.num_pictures
    return usage.prompt_tokens - usage.cached_tokens + OUTPUT_WEIGHT * usage.completion_tokens


class Waiting:
    """A request as the line sees it. Subclass it to carry the request itself.

    `waiting` and `running` say where it is; neither: not in the line (any more).
    """

    __slots__ = (
        "arrived",
        "deadline",
        "expected",
        "expires",
        "flow",
        "priority",
        "running",
        "since",
        "tenant",
        "waiting",
        "weight",
        "work",
    )

    def __init__(
        self, *, tenant: str, priority: int = 0, weight: float = 1.0, work: float = 1.0, deadline: float = 0.0, arrived: float = 0.0
    ) -> None:
        self.tenant = tenant
        self.priority = priority
        self.weight = weight
        self.work = work if work > MIN_WORK else MIN_WORK
        """Estimated, in units."""
        self.deadline = deadline
        """When its turn must have come; 0: `max_wait` after it arrived."""
        self.arrived = arrived
        self.expires = 0.0
        self.expected = 0.0
        """Seconds, where it is one of those by which the predictions are corrected."""
        self.since = 0.0
        """When it began to wait; then, when its turn came."""
        self.waiting = False
        self.running = False
        self.flow: _Flow | None = None


class Offered(Struct, frozen=True):
    turn: bool
    """Now; else it waits."""
    evicted: Waiting | None = None
    """Who must be refused because it took its place."""


TURN = Offered(turn=True)
WAITS = Offered(turn=False)


class _Flow:
    """What one tenant has in one band."""

    __slots__ = ("attained", "band", "entry", "items", "num_running", "num_waiting", "pending", "tenant", "weight", "work")

    def __init__(self, band: "_Band", tenant: str) -> None:
        self.band = band
        self.tenant = tenant
        self.weight = 1.0
        self.attained = 0.0
        """Service by weight, in the band's growing units, with the estimates of what is under way."""
        self.pending = 0.0
        """Those estimates."""
        self.items: list[tuple[float, int, Waiting]] = []
        """A heap by expiry."""
        self.num_waiting = 0
        self.num_running = 0
        self.work = 0.0
        """Of those waiting."""
        self.entry = 0
        """The number of its entry in the band's heap: others with its name are out of date."""


class _Band:
    """All requests of one priority."""

    __slots__ = ("flows", "heap", "level", "priority", "surprise", "sweep_at", "waiting", "work")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.flows: dict[str, _Flow] = {}
        self.heap: list[tuple[float, int, _Flow]] = []
        """Tenants with something waiting, by attained service."""
        self.waiting: dict[Waiting, None] = {}
        """In order of arrival."""
        self.work = 0.0
        self.level = 0.0
        """What the tenant that went last had been served by then: where a tenant begins that comes (back)."""
        self.sweep_at = 256
        self.surprise = 1.0
        """Waits against what they seemed to be: more than 1 where others come meanwhile whose turn is sooner."""

    def learn(self, item: Waiting, waited: float) -> None:
        if item.expected:
            ratio = min(max(waited / item.expected, LEAST_SURPRISE), MOST_SURPRISE)
            self.surprise *= (ratio / self.surprise) ** SURPRISED

    def least(self) -> _Flow:
        heap = self.heap
        while heap[0][1] != heap[0][2].entry:
            heapq.heappop(heap)
        return heap[0][2]

    def start_level(self) -> float:
        return min(self.level, self.least().attained) if self.waiting else self.level


class FairQueue:
    def __init__(self, settings: QueueSettings, max_in_flight: int) -> None:
        """`max_in_flight`: requests that have their turn at once; 0: any number, so that nobody waits."""
        self.max_requests = settings.max_requests
        self.max_wait = settings.max_wait
        self.shed_wait = settings.shed_wait or settings.max_wait
        self.half_life = settings.half_life
        self.max_in_flight = max_in_flight
        self.num_waiting = 0
        self.num_in_flight = 0
        self._num_flows = 0
        """Tenants with something waiting."""
        self._bands: list[_Band] = []
        """The highest priority first."""
        self._by_priority: dict[int, _Band] = {}
        self._numbers = count(1)
        self._expiring: list[tuple[float, int, Waiting]] = []
        self._sampling = 0
        self._epoch: float | None = None
        # Of the requests done lately, each fading: how many, their estimated work, the seconds that they held their turns
        self._done = 0.0
        self._done_work = 0.0
        self._done_seconds = 0.0
        self.configure(settings)

    def configure(self, settings: QueueSettings) -> None:
        """From now on. Those who wait keep their places and the moments at which they expire. (`max_in_flight`: see `resize`.)"""
        self.max_requests = settings.max_requests
        self.max_wait = settings.max_wait
        self.shed_wait = settings.shed_wait or settings.max_wait
        if settings.half_life != self.half_life:
            self.half_life = settings.half_life
            self._shrink(inf)  # what was counted at another growth cannot be compared: all begin anew
            self._epoch = None

    def offer(self, item: Waiting, now: float) -> Offered:
        """Raises Shed where it is not let in."""
        limit = self.max_in_flight
        if not limit:
            item.running = True
            item.since = now
            self.num_in_flight += 1
            return TURN
        band = self._by_priority.get(item.priority) or self._new_band(item.priority)
        if self.num_in_flight < limit:  # then nobody waits
            flow = band.flows.get(item.tenant) or self._new_flow(band, item.tenant, now)
            flow.attained = max(flow.attained, band.level)
            self._start(item, flow, now)
            return TURN
        evicted = self._make_room(item, band, now) if self.num_waiting else None
        item.expected = self._seconds_before(band, item.tenant, item.weight, now) if self._sampled() else 0.0
        self._wait(item, band.flows.get(item.tenant) or self._new_flow(band, item.tenant, now), now)
        return WAITS if evicted is None else Offered(turn=False, evicted=evicted)

    def done(self, item: Waiting, served: float | None, now: float) -> Sequence[Waiting]:
        """It had its turn and is over. `served`: units, as they turned out; None: not known, by the time that it took."""
        assert item.running
        seconds = now - item.since
        self._done = self._done * MEMORY + 1.0
        self._done_work = self._done_work * MEMORY + item.work
        self._done_seconds = self._done_seconds * MEMORY + seconds
        return self._end(item, served, seconds, now)

    def leave(self, item: Waiting, now: float) -> Sequence[Waiting]:
        if item.waiting:
            self._take_out(item)
        elif item.running:
            return self._end(item, None, now - item.since, now)
        return ()

    def expire(self, now: float) -> list[Waiting]:
        expired: list[Waiting] = []
        heap = self._expiring
        while heap and (heap[0][0] <= now or not heap[0][2].waiting):
            item = heapq.heappop(heap)[2]
            if item.waiting:
                self._take_out(item)
                self._by_priority[item.priority].learn(item, now - item.since)
                expired.append(item)
        return expired

    def next_expiry(self) -> float | None:
        heap = self._expiring
        while heap and not heap[0][2].waiting:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def resize(self, max_in_flight: int, now: float) -> Sequence[Waiting]:
        """Those whose turn it is because there is more room. With less room nobody loses a turn."""
        self.max_in_flight = max_in_flight
        return self._turns(now)

    def drop_all(self) -> list[Waiting]:
        """Every waiting request, taken out: the model or the server is going away."""
        dropped = [item for band in self._bands for item in band.waiting]
        for item in dropped:
            self._take_out(item)
        return dropped

    @property
    def free(self) -> bool:
        """It would be one more request's turn at once."""
        return not self.max_in_flight or self.num_in_flight < self.max_in_flight

    @property
    def has_room(self) -> bool:
        """One more may wait, in nobody's place."""
        return self.num_waiting < self.max_requests

    def waiting_by_priority(self) -> dict[int, int]:
        return {band.priority: len(band.waiting) for band in self._bands}

    def predicted_wait(self, priority: int, tenant: str, weight: float, now: float) -> float:
        """Seconds until the turn of one more request would come; 0 while nothing is known."""
        if self.free:
            return 0.0
        band = self._by_priority.get(priority) or self._new_band(priority)
        return self._seconds_before(band, tenant, weight, now) * band.surprise

    def retry_after(self, item: Waiting, now: float) -> float:
        """Seconds after which one that was refused may be let in: when what is before it now is done."""
        return max(1.0, self.predicted_wait(item.priority, item.tenant, item.weight, now))

    # Turns

    def _turns(self, now: float) -> Sequence[Waiting]:
        if not self.num_waiting:
            return ()
        started = []
        while self.num_waiting and (self.num_in_flight < self.max_in_flight or not self.max_in_flight):
            band = next(band for band in self._bands if band.waiting)
            flow = band.least()
            items = flow.items
            while not items[0][2].waiting:
                heapq.heappop(items)
            item = heapq.heappop(items)[2]
            self._forget(item, flow)
            band.learn(item, now - item.since)
            self._start(item, flow, now)
            started.append(item)
        return started

    def _start(self, item: Waiting, flow: _Flow, now: float) -> None:
        band = flow.band
        served = flow.attained - flow.pending
        band.level = max(band.level, served)
        charge = item.work / item.weight * self._scale(now)
        flow.attained += charge
        flow.pending += charge
        flow.num_running += 1
        self.num_in_flight += 1
        item.flow = flow
        item.since = now
        item.running = True
        if flow.num_waiting:
            self._enter(flow)

    def _end(self, item: Waiting, served: float | None, seconds: float, now: float) -> Sequence[Waiting]:
        item.running = False
        self.num_in_flight -= 1
        flow = item.flow
        if flow is not None:
            if served is None:
                served = min(item.work, seconds * self._done_work / self._done_seconds) if self._done_seconds else item.work
            # At the growth of the moment when it was charged, so that a correct estimate changes nothing.
            unit = self._scale(item.since) / item.weight
            flow.num_running -= 1
            flow.pending = flow.pending - item.work * unit if flow.num_running else 0.0
            if served != item.work:
                flow.attained += (max(served, MIN_WORK) - item.work) * unit
                if flow.num_waiting:
                    self._enter(flow)
        return self._turns(now) if self.num_waiting else ()

    # The line

    def _wait(self, item: Waiting, flow: _Flow, now: float) -> None:
        band = flow.band
        if not flow.num_waiting:
            flow.attained = max(flow.attained, band.start_level())
            self._enter(flow)
            self._num_flows += 1
        flow.weight = item.weight
        flow.num_waiting += 1
        flow.work += item.work
        band.work += item.work
        band.waiting[item] = None
        self.num_waiting += 1
        item.flow = flow
        item.since = now
        item.waiting = True
        item.expires = self._expires(item)
        entry = (item.expires, next(self._numbers), item)
        heapq.heappush(flow.items, entry)
        heapq.heappush(self._expiring, entry)
        if len(flow.items) > 2 * flow.num_waiting + MAX_GONE:
            flow.items = _waiting_only(flow.items)
        if len(self._expiring) > 2 * self.num_waiting + MAX_GONE:
            self._expiring = _waiting_only(self._expiring)

    def _expires(self, item: Waiting) -> float:
        latest = item.arrived + self.max_wait
        return min(item.deadline, latest) if item.deadline else latest

    def _take_out(self, item: Waiting) -> None:
        """From the middle of its tenant's heap, where its entry stays until it comes up."""
        flow = item.flow
        assert flow is not None
        self._forget(item, flow)

    def _forget(self, item: Waiting, flow: _Flow) -> None:
        band = flow.band
        item.waiting = False
        self.num_waiting -= 1
        flow.num_waiting -= 1
        del band.waiting[item]
        if flow.num_waiting:
            flow.work -= item.work
        else:
            flow.work = 0.0
            flow.entry = 0
            self._num_flows -= 1
            flow.items.clear()
        band.work = band.work - item.work if band.waiting else 0.0

    def _enter(self, flow: _Flow) -> None:
        """Its place in the band's heap, anew."""
        flow.entry = next(self._numbers)
        heap = flow.band.heap
        heapq.heappush(heap, (flow.attained, flow.entry, flow))
        if len(heap) > 2 * len(flow.band.flows) + MAX_GONE:
            heap[:] = [entry for entry in heap if entry[1] == entry[2].entry]
            heapq.heapify(heap)

    # Who is let in

    def _make_room(self, item: Waiting, band: _Band, now: float) -> Waiting | None:
        """The request that loses its place to this one, taken out. Raises Shed."""
        limit = min(self.shed_wait, item.deadline - now) if item.deadline else self.shed_wait
        # Everything that can be before it, first: that is quick, and mostly enough.
        surprise = band.surprise
        if self._seconds(self._work_above(item.priority) + band.work) * surprise > limit:
            expires = self._expires(item) if item.deadline else None
            wait = self._seconds_before(band, item.tenant, item.weight, now, expires) * surprise
            if wait > limit:
                raise Shed(
                    f"its turn would come in about {wait:.1f} seconds, which is longer than it may wait: try again later",
                    reason="predicted-wait",
                    retry_after=max(1.0, wait - limit),
                )
        if self.num_waiting < self.max_requests:
            return None
        victim = self._sheddable(item.priority) or self._over_its_share(item, band)
        if victim is None:
            raise Shed(
                f"{self.num_waiting} requests are waiting for this model, which is as many as may: try again later",
                reason="queue-full",
                retry_after=self.retry_after(item, now),
            )
        self._take_out(victim)
        return victim

    def _sheddable(self, priority: int) -> Waiting | None:
        """The newest of the lowest band, if that is negative and lower."""
        for band in reversed(self._bands):
            if band.priority >= 0 or band.priority >= priority:
                return None
            if band.waiting:
                return next(reversed(band.waiting))
        return None

    def _over_its_share(self, item: Waiting, band: _Band) -> Waiting | None:
        """The newest of the tenant that has the most waiting here or below, if that is more than this tenant would have.

        Without it, one tenant that fills the line would keep out all others, whatever their turn.
        """
        mine = band.flows.get(item.tenant)
        num_mine = mine.num_waiting if mine is not None else 0
        if num_mine and (num_mine + 1) * self._num_flows > self.max_requests:
            return None  # quickly: this is what a flood meets
        flows = (flow for each in self._bands if each.priority <= item.priority for flow in each.flows.values())
        longest = max(flows, key=lambda flow: flow.num_waiting, default=None)
        if longest is None or longest.num_waiting <= num_mine + 1:
            return None
        return max((entry for entry in longest.items if entry[2].waiting), key=lambda entry: entry[1])[2]

    # How long

    def _seconds_before(self, band: _Band, tenant: str, weight: float, now: float, expires: float | None = None) -> float:
        """As it seems from what is here: the work before a request, at the rate at which work was done lately, and until a turn is free.

        `expires`: where it would stand among its tenant's own; None: behind them.
        """
        ahead = self._work_above(band.priority)
        if band.waiting:
            ahead += self._work_before(band, tenant, weight, self._scale(now), expires)
        return self._seconds(ahead)

    def _sampled(self) -> bool:
        """Rarer where it costs more."""
        self._sampling += 1
        if self._sampling < max(SAMPLED, self._num_flows // 4):
            return False
        self._sampling = 0
        return True

    def _seconds(self, work: float) -> float:
        if not self._done_seconds:
            return 0.0
        slot_seconds = work * self._done_seconds / self._done_work + IN_FLIGHT_SHARE * self._done_seconds / self._done
        return slot_seconds / self.max_in_flight

    def _work_above(self, priority: int) -> float:
        work = 0.0
        for band in self._bands:
            if band.priority <= priority:
                break
            work += band.work
        return work

    def _work_before(self, band: _Band, tenant: str, weight: float, scale: float, expires: float | None) -> float:
        """What the band does before a new request: its tenant's own, and the others' until they have been served as much."""
        flow = band.flows.get(tenant)
        own, level = 0.0, band.start_level()
        if flow is not None:
            own, level = flow.work, max(level, flow.attained)
            if flow.num_waiting:
                level = flow.attained
            if expires is not None:
                own = sum(item.work for at, _, item in flow.items if item.waiting and at <= expires)
        level += own * scale / weight
        ahead = own
        for attained, number, other in band.heap:
            if attained < level and number == other.entry and other is not flow:
                ahead += min(other.work, (level - attained) * other.weight / scale)
        return ahead

    # What grows, and what is forgotten

    def _scale(self, moment: float) -> float:
        """How much service of that moment weighs."""
        epoch = self._epoch
        if epoch is None:
            epoch = self._epoch = moment
        exponent = (moment - epoch) / self.half_life
        if exponent > MAX_EXPONENT:
            self._shrink(exponent)
            self._epoch = moment
            return 1.0
        return exp2(exponent)

    def _shrink(self, exponent: float) -> None:
        factor = exp2(-exponent)
        for band in self._bands:
            band.level *= factor
            for flow in band.flows.values():
                flow.attained *= factor
                flow.pending *= factor
            band.heap = [(flow.attained, number, flow) for _, number, flow in band.heap if number == flow.entry]
            heapq.heapify(band.heap)

    def _new_band(self, priority: int) -> _Band:
        band = self._by_priority[priority] = _Band(priority)
        self._bands = sorted((*self._bands, band), key=lambda each: -each.priority)
        return band

    def _new_flow(self, band: _Band, tenant: str, now: float) -> _Flow:
        if len(band.flows) >= band.sweep_at:
            self._sweep(band, now)
        flow = band.flows[tenant] = _Flow(band, tenant)
        return flow

    def _sweep(self, band: _Band, now: float) -> None:
        """Forget the tenants that are away and would begin at the level anyhow, or of whose service less than a unit is left."""
        scale = self._scale(now)
        band.flows = {
            tenant: flow
            for tenant, flow in band.flows.items()
            if flow.num_waiting or flow.num_running or (flow.attained > band.level and flow.attained > scale)
        }
        band.sweep_at = max(256, 2 * len(band.flows))


def _waiting_only(heap: list[tuple[float, int, Waiting]]) -> list[tuple[float, int, Waiting]]:
    kept = [entry for entry in heap if entry[2].waiting]
    heapq.heapify(kept)
    return kept


def degradation(steps: Sequence[DegradeStep], qos_class: str, predicted_wait: float) -> DegradeStep | None:
    """The step with the greatest `wait_above` that applies, alone: what an earlier one does must be said again."""
    applying = [step for step in steps if predicted_wait > step.wait_above and ("*" in step.classes or qos_class in step.classes)]
    return max(applying, key=lambda step: step.wait_above, default=None)
