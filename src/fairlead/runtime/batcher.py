"""Dynamic batching as a pure state machine: which requests run together, and when.

The semantics are Triton's (core/src/dynamic_batch_scheduler.cc). Nothing here waits, computes or knows the
time: events come in with `now`, decisions go out, so the same code runs on a virtual clock.

    add(entry, now)       it waits, or QueueFull is raised
    expire(now)           the entries whose policy is REJECT and whose time is up; DELAY moves them back
    take(now, ...)        the batch that a free instance should run now, or None to wait for more
    finish(batch)         the batches whose answers may leave now (in order, where order is promised)
    cancel(entry)         True if it was waiting and is gone
    wake_at(...)          when to ask again though nothing happened

| close reason | the batch was closed because |
|---|---|
| full      | it has max_batch_size rows |
| preferred | its rows are a preferred size, the largest that the queue reaches |
| size      | the next request's rows would not fit |
| shape     | the next request's shapes or set of inputs differ |
| delay     | the oldest member waited max_queue_delay |
| deadline  | waiting longer would let a member time out |
| idle      | an instance was free and the policy is not to wait |
| single    | the model does not batch |
| retry     | its batch failed: each member gets a try of its own |
"""

import heapq
from collections import deque
from collections.abc import Hashable, Iterator
from enum import StrEnum
from itertools import count

from fairlead.core.errors import FairleadError, QueueFull
from fairlead.core.specs import BatchingSpec, QueuePolicy, TimeoutAction
from fairlead.core.tensors import Tensors
from fairlead.core.timeline import BatchNote

DEADLINE_MARGIN = 0.001
"""Seconds before a member's time-out at which a waiting batch closes, at the least."""


class CloseReason(StrEnum):
    FULL = "full"
    PREFERRED = "preferred"
    SIZE = "size"
    SHAPE = "shape"
    DELAY = "delay"
    DEADLINE = "deadline"
    IDLE = "idle"
    SINGLE = "single"
    RETRY = "retry"


class Entry:
    """A waiting request as the batcher sees it. Subclass it to carry the request itself."""

    __slots__ = ("arrived", "expires", "nbytes", "priority", "rows", "signature", "waiting")

    def __init__(self, *, rows: int = 1, nbytes: int = 0, signature: Hashable = None, priority: int = 0, timeout: float = 0.0) -> None:
        self.rows = rows
        self.nbytes = nbytes
        self.signature = signature
        """Equal for requests that may share a batch: the shapes without their first dimension, the inputs' names."""
        self.priority = priority
        self.expires = timeout
        """Before `add`: the request's own timeout in seconds, 0 for none; after: the moment it runs out, 0 for never."""
        self.arrived = 0.0
        self.waiting = False


class Batch:
    __slots__ = ("close_reason", "entries", "error", "finished", "note", "number", "outputs", "rows", "started", "wanted")

    def __init__(self, entries: list[Entry], rows: int, close_reason: CloseReason, number: int) -> None:
        self.entries = entries
        self.rows = rows
        self.close_reason = close_reason
        self.number = number
        """Counts up in the order of dispatch."""
        self.finished = False
        # Kept here by who runs it:
        self.note: BatchNote | None = None
        """As its members' timelines have it."""
        self.started = 0.0
        self.wanted: frozenset[str] | None = None
        """Names of the outputs that a member asked for; None for all."""
        self.outputs: Tensors | None = None
        self.error: FairleadError | None = None


class _Level:
    """One priority level: those in time, then those that are late but not refused (DELAY)."""

    __slots__ = ("delayed", "gone", "policy", "queue", "size")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.queue: deque[Entry] = deque()
        self.delayed: deque[Entry] = deque()
        self.size = 0
        self.gone = 0
        """Cancelled or moved entries still in the deques: removed when they surface, or when they are many."""


class Batcher:
    def __init__(self, spec: BatchingSpec) -> None:
        self.max_batch_size = spec.max_batch_size
        self.max_queue_delay = spec.max_queue_delay
        self.preferred = frozenset(spec.preferred_batch_sizes)
        self.largest_preferred = max(self.preferred, default=0)
        self.preserve_ordering = spec.preserve_ordering
        self.max_queue_rows = spec.max_queue_rows
        self.max_queue_bytes = spec.max_queue_bytes
        self.priority_levels = spec.priority_levels
        self.default_priority = spec.default_priority or (spec.priority_levels + 1) // 2
        numbers = range(1, spec.priority_levels + 1) if spec.priority_levels else (0,)
        policies = spec.priority_queue_policies
        self.levels = {number: _Level(policies.get(number, spec.queue_policy)) for number in numbers}
        self.num_requests = 0
        self.num_rows = 0
        self.num_bytes = 0
        self._expiring: list[tuple[float, int, Entry]] = []
        self._ticks = count()
        self._numbers = count()
        self._in_flight: deque[Batch] = deque()

    def add(self, entry: Entry, now: float) -> None:
        """Raises QueueFull if a bound of its level, or of all levels together, would be exceeded."""
        number = entry.priority
        if not 1 <= number <= self.priority_levels:
            # As in Triton: 0 and what lies beyond the levels mean the default.
            entry.priority = number = self.default_priority if self.priority_levels else 0
        level = self.levels[number]
        policy = level.policy
        if policy.max_queue_size and level.size >= policy.max_queue_size:
            raise QueueFull("Exceeds maximum queue size")
        if self.num_requests and (self.num_rows + entry.rows > self.max_queue_rows or self.num_bytes + entry.nbytes > self.max_queue_bytes):
            raise QueueFull("Exceeds maximum queue size")
        entry.arrived = now
        timeout = policy.default_timeout
        wished = entry.expires
        if wished and policy.allow_timeout_override:
            timeout = min(timeout, wished) if timeout else wished
        if timeout:
            entry.expires = now + timeout
            heapq.heappush(self._expiring, (entry.expires, next(self._ticks), entry))
        else:
            entry.expires = 0.0
        entry.waiting = True
        level.queue.append(entry)
        level.size += 1
        self.num_requests += 1
        self.num_rows += entry.rows
        self.num_bytes += entry.nbytes

    def cancel(self, entry: Entry) -> bool:
        """Take an entry out of the queue. False if it is not waiting (any more)."""
        if not entry.waiting:
            return False
        self._forget(entry)
        level = self.levels[entry.priority]
        level.gone += 1
        self._compact(level)
        return True

    def expire(self, now: float) -> list[Entry]:
        """The entries to refuse because their time is up; where the policy is DELAY they go behind the others."""
        refused: list[Entry] = []
        delayed: list[Entry] = []
        expiring = self._expiring
        while expiring and expiring[0][0] <= now:
            entry = heapq.heappop(expiring)[2]
            if not entry.waiting:
                continue
            level = self.levels[entry.priority]
            if level.policy.timeout_action is TimeoutAction.DELAY:
                entry.expires = 0.0
                delayed.append(entry)
            else:
                self._forget(entry)
                level.gone += 1
                refused.append(entry)
        for number in {entry.priority for entry in delayed}:
            level = self.levels[number]
            moved = [entry for entry in delayed if entry.priority == number]
            gone = set(map(id, moved))
            level.queue = deque(entry for entry in level.queue if entry.waiting and id(entry) not in gone)
            level.delayed.extend(moved)
        for number in {entry.priority for entry in refused}:
            self._compact(self.levels[number])
        return refused

    def take(self, now: float, predicted: float = 0.0) -> Batch | None:
        """The batch that a free instance should run now; None if there is nothing, or if waiting is better.

        `predicted`: seconds that a batch is expected to compute, so that it can start before a member's deadline.
        """
        if not self.num_requests:
            return None
        limit = self.max_batch_size
        if limit == 0:
            return self._close([next(self._walk())], CloseReason.SINGLE)
        picked: list[Entry] = []
        rows = 0
        num_preferred = 0
        reason: CloseReason | None = None
        preferred = self.preferred
        signature: Hashable = None
        for entry in self._walk():
            if not picked:
                signature = entry.signature
            elif entry.signature != signature:
                reason = CloseReason.SHAPE
                break
            elif rows + entry.rows > limit:
                reason = CloseReason.SIZE
                break
            picked.append(entry)
            rows += entry.rows
            if rows in preferred:
                num_preferred = len(picked)
            if rows >= limit:
                reason = CloseReason.FULL
                break
        late = self.max_queue_delay > 0 and now >= min(entry.arrived for entry in picked) + self.max_queue_delay
        if num_preferred and not late:
            whole = reason is CloseReason.FULL and num_preferred == len(picked)
            return self._close(picked[:num_preferred], CloseReason.FULL if whole else CloseReason.PREFERRED)
        if reason is None:
            if self.max_queue_delay == 0:
                reason = CloseReason.IDLE
            elif late or (self.largest_preferred and rows >= self.largest_preferred):
                reason = CloseReason.DELAY if late else CloseReason.PREFERRED
            elif self._must_start(picked, predicted) <= now:
                reason = CloseReason.DEADLINE
            else:
                return None
        return self._close(picked, reason)

    def finish(self, batch: Batch) -> list[Batch]:
        """The batches whose answers may be given now. Call once for every batch taken, whatever its outcome."""
        batch.finished = True
        if not self.preserve_ordering:
            return [batch]
        released = []
        while self._in_flight and self._in_flight[0].finished:
            released.append(self._in_flight.popleft())
        return released

    def wake_at(self, *, free: bool, predicted: float = 0.0) -> float | None:
        """The next moment at which `expire` or (with a free instance) `take` may decide differently; None: never."""
        while self._expiring and not self._expiring[0][2].waiting:
            heapq.heappop(self._expiring)
        wake = self._expiring[0][0] if self._expiring else None
        if free and self.num_requests and self.max_queue_delay:
            waiting = list(self._walk())
            close = min(min(entry.arrived for entry in waiting) + self.max_queue_delay, self._must_start(waiting, predicted))
            wake = close if wake is None else min(wake, close)
        return wake

    def drop_all(self) -> list[Entry]:
        """Every waiting entry, taken out: the version is going away."""
        dropped = list(self._walk())
        for entry in dropped:
            self._forget(entry)
        for level in self.levels.values():
            level.queue.clear()
            level.delayed.clear()
            level.gone = 0
        return dropped

    def _walk(self) -> Iterator[Entry]:
        """Waiting entries, highest level first, late ones last in their level."""
        for level in self.levels.values():
            if level.size:
                for entry in level.queue:
                    if entry.waiting:
                        yield entry
                for entry in level.delayed:
                    if entry.waiting:
                        yield entry

    def _close(self, entries: list[Entry], reason: CloseReason) -> Batch:
        rows = 0
        for entry in entries:
            rows += entry.rows
            self._forget(entry)
        for level in self.levels.values():
            for queue in (level.queue, level.delayed):
                while queue and not queue[0].waiting:
                    queue.popleft()
            if not level.size:
                level.gone = 0
        batch = Batch(entries, rows, reason, next(self._numbers))
        if self.preserve_ordering:
            self._in_flight.append(batch)
        return batch

    def _forget(self, entry: Entry) -> None:
        entry.waiting = False
        self.levels[entry.priority].size -= 1
        self.num_requests -= 1
        self.num_rows -= entry.rows
        self.num_bytes -= entry.nbytes

    def _compact(self, level: _Level) -> None:
        """Keep the memory of cancelled entries below that of the waiting ones."""
        if level.gone > 64 and level.gone > level.size:
            level.queue = deque(entry for entry in level.queue if entry.waiting)
            level.delayed = deque(entry for entry in level.delayed if entry.waiting)
            level.gone = 0

    @staticmethod
    def _must_start(entries: list[Entry], predicted: float) -> float:
        """When a batch of these must start for the first of their deadlines to be met."""
        margin = max(predicted, DEADLINE_MARGIN)
        return min((entry.expires - margin for entry in entries if entry.expires), default=float("inf"))
