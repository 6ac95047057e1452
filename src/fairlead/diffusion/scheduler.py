"""The step scheduler of pictures: which of them begin, and which of them compute the next step together.

    waiting ── admit ──► running ── done ──► decoding ── drop ──► gone          drop: from anywhere
       ▲                   │
       └──── displaced ────┘   its state stays as it is: it goes on where it was

A better priority goes first, always. Among tenants of one priority, the one that was computed least goes first, in latent tokens
times steps; then, of its shapes the one that was: neither a tenant nor a size of pictures stands in the way of another. Pictures
of one tenant and shape go in the order in which they would end if they were computed side by side (the virtual finish of fair
queueing, Demers, Keshav and Shenker 1989): equal ones in the order in which they came, one of few steps before what is left of one
of many, and no stream of short ones holds up a long one for ever. The first picture chooses the group; others of its group join it,
in the same order, while the forward has room.
"""

import math
from bisect import insort
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping

from fairlead.core.errors import QueueFull

Order = tuple[float, float, int]
Line = tuple[str, Hashable]
"""Tenant and shape."""


class Row:
    """A picture, as far as its turn depends on it."""

    __slots__ = (
        "arrived",
        "deadline",
        "decoding",
        "group",
        "id",
        "line",
        "num_steps",
        "num_tokens",
        "priority",
        "request",
        "started",
        "tag",
        "tenant",
    )

    def __init__(
        self,
        id: int,
        request: int,
        *,
        tenant: str,
        shape: Hashable,
        priority: int,
        arrived: float,
        deadline: float,
        num_tokens: int,
        num_steps: int,
    ) -> None:
        """`shape`: what can be told of its group before it is encoded; `num_tokens`: an estimate until then; `num_steps`: to compute;
        `deadline`: to begin, inf for none."""
        self.id = id
        self.request = request
        self.tenant = tenant
        self.line: Line = (tenant, shape)
        self.priority = priority
        self.arrived = arrived
        self.deadline = deadline
        self.num_tokens = num_tokens
        self.num_steps = num_steps
        self.group: Hashable = None
        """Known when it is encoded."""
        self.started = False
        """It was admitted once."""
        self.decoding = False
        self.tag = 0.0

    @property
    def order(self) -> Order:
        """In its line."""
        return (self.tag, self.arrived, self.id)


class Served:
    """What each of several that share was given, from a common beginning. One that comes (again) has no claim to what others were
    given meanwhile, and what it was given ahead of them is remembered until they have caught up."""

    def __init__(self) -> None:
        self._amounts: dict[Hashable, float] = {}
        self._numbers: Counter[Hashable] = Counter()
        """Of the pictures of each that has any."""

    def __getitem__(self, name: Hashable) -> float:
        return self._amounts[name]

    def __contains__(self, name: Hashable) -> bool:
        return name in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def enter(self, name: Hashable) -> None:
        if name not in self._numbers:
            self._amounts[name] = max(self._amounts.get(name, 0.0), self._floor(0.0))
        self._numbers[name] += 1

    def leave(self, name: Hashable) -> None:
        self._numbers[name] -= 1
        if not self._numbers[name]:
            del self._numbers[name]
            floor = self._floor(math.inf)
            self._amounts = {each: amount for each, amount in self._amounts.items() if each in self._numbers or amount > floor}

    def add(self, name: Hashable, amount: float) -> None:
        self._amounts[name] += amount

    def _floor(self, default: float) -> float:
        return min((self._amounts[name] for name in self._numbers), default=default)


class Scheduler:
    """Pure: it decides, the engine acts; time is an argument. Not thread-safe."""

    def __init__(self, *, max_num_seqs: int, max_batch_tokens: int, max_waiting: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_waiting = max_waiting
        self.num_preemptions = 0
        self._waiting: dict[tuple[int, Line], list[Row]] = {}
        """New ones, and displaced ones, in order."""
        self._num_displaced = 0
        self._next_deadline = math.inf
        """Not after the first of those that wait."""
        self._running: list[Row] = []
        """These, and the displaced, hold memory: at most twice `max_num_seqs` together."""
        self._requests: Counter[int] = Counter()
        """Requests that wait, by their pictures that do."""
        self._tenants = Served()
        self._lines: dict[str, Served] = {}
        """Of each tenant's shapes."""
        self._num_steps: dict[Line, int] = {}
        """In which it took part since it has any pictures: so many a picture had computed that was in all of them."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have pictures that have not begun."""
        return len(self._requests)

    @property
    def has_work(self) -> bool:
        """Whether `admit` or `pick` would find anything."""
        if any(not row.decoding for row in self._running):
            return True
        return bool(self._waiting) and len(self._running) < self.max_num_seqs

    # From arrival to the end

    def add(self, rows: Iterable[Row]) -> None:
        """The pictures of one request. Raises QueueFull."""
        if len(self._requests) >= self.max_waiting + self.max_num_seqs - len(self._running):  # of those, so many do not wait long
            raise QueueFull(f"{self.max_waiting} requests wait already")
        for row in rows:
            self._tenants.enter(row.tenant)
            self._lines.setdefault(row.tenant, Served()).enter(row.line)
            row.tag = self._num_steps.setdefault(row.line, 0) + row.num_steps
            self._wait(row)
            self._requests[row.request] += 1
            self._next_deadline = min(self._next_deadline, row.deadline)

    def expired(self, now: float) -> list[Row]:
        """Those that have not begun in time: the caller drops them."""
        if now <= self._next_deadline:
            return []
        fresh = [row for line in self._waiting.values() for row in line if not row.started]
        self._next_deadline = min((row.deadline for row in fresh if row.deadline >= now), default=math.inf)
        return [row for row in fresh if row.deadline < now]

    def admit(self) -> list[Row]:
        """Those that begin or go on now: as many as one forward could take, so that the running ones do not wait long for the encoder."""
        admitted: list[Row] = []
        num_tokens = 0
        seats: Counter[Hashable] = Counter(name for row in self._running for name in (row.tenant, row.line))
        while self._waiting:
            heads = (line[0] for line in self._waiting.values())
            row = min(heads, key=lambda row: (row.priority, seats[row.tenant], self._tenants[row.tenant], seats[row.line], self._turn(row)))
            if admitted and num_tokens + row.num_tokens > self.max_batch_tokens:
                break
            if len(self._running) >= self.max_num_seqs:
                worst = self._displaceable(row, admitted, seats)
                if worst is None:
                    break
                self._running.remove(worst)
                self._wait(worst)
                self.num_preemptions += 1
                seats.subtract((worst.tenant, worst.line))
            self._wait_no_more(row)
            self._running.append(row)
            seats.update((row.tenant, row.line))
            admitted.append(row)
            num_tokens += row.num_tokens
        return admitted

    def _displaceable(self, row: Row, admitted: Collection[Row], seats: Counter[Hashable]) -> Row | None:
        """Who makes way for `row` where the house is full. Nobody does so in turns: it makes the shares more equal, or, where they
        are no worse for it, the end sooner."""
        if not row.started and self._num_displaced >= self.max_num_seqs:
            return None
        able = [each for each in self._running if not each.decoding and each not in admitted]
        worst = max(able, key=lambda each: (each.priority, seats[each.tenant], seats[each.line], each.order), default=None)
        if worst is None or worst.priority < row.priority:
            return None
        if worst.priority > row.priority:
            return worst
        if worst.tenant != row.tenant:
            return worst if seats[worst.tenant] > seats[row.tenant] + 1 else None
        ahead = seats[worst.line] - seats[row.line]
        sooner = row.order < worst.order and (ahead > 0 or worst.line == row.line)
        return worst if ahead > 1 or sooner else None

    def _wait(self, row: Row) -> None:
        insort(self._waiting.setdefault((row.priority, row.line), []), row, key=lambda row: row.order)
        self._num_displaced += row.started

    def _wait_no_more(self, row: Row) -> None:
        line = self._waiting[row.priority, row.line]
        line.remove(row)
        if not line:
            del self._waiting[row.priority, row.line]
        self._num_displaced -= row.started
        if row.started:
            return
        row.started = True
        self._requests[row.request] -= 1
        if not self._requests[row.request]:
            del self._requests[row.request]

    def encoded(self, row: Row, *, group: Hashable, num_tokens: int, num_steps: int) -> None:
        """What is known of it now."""
        row.group, row.num_tokens, row.num_steps = group, num_tokens, num_steps

    def pick(self, only: Collection[Row] | None = None) -> list[Row]:
        """Those that compute the next step, of one group; `only` bounds the choice. Followed by `commit`, or by nothing."""
        rows = [row for row in self._running if not row.decoding and (only is None or row in only)]
        if len(rows) < 2:
            return rows
        first = min(rows, key=self._turn_of_all)
        batch, room = [first], self.max_batch_tokens - first.num_tokens
        ahead: Counter[Hashable] = Counter({first.tenant: first.num_tokens, first.line: first.num_tokens})
        joining: dict[tuple[int, Line], list[Row]] = {}
        for row in sorted(rows, key=lambda row: row.order, reverse=True):
            if row is not first and row.group == first.group and row.num_tokens <= room:
                joining.setdefault((row.priority, row.line), []).append(row)
        while joining:
            key = min(joining, key=lambda key: self._turn_of_all(joining[key][-1], ahead))
            row = joining[key].pop()
            if not joining[key]:
                del joining[key]
            if row.num_tokens <= room:
                batch.append(row)
                room -= row.num_tokens
                ahead.update({row.tenant: row.num_tokens, row.line: row.num_tokens})
        return batch

    def _turn(self, row: Row, ahead: Mapping[Hashable, int] = {}) -> tuple[float, Order]:
        """Among its tenant's."""
        return (self._lines[row.tenant][row.line] + ahead.get(row.line, 0), row.order)

    def _turn_of_all(self, row: Row, ahead: Mapping[Hashable, int] = {}) -> tuple[int, float, tuple[float, Order]]:
        return (row.priority, self._tenants[row.tenant] + ahead.get(row.tenant, 0), self._turn(row, ahead))

    def commit(self, batch: Iterable[Row]) -> None:
        """They have computed a step."""
        for row in batch:
            self._tenants.add(row.tenant, row.num_tokens)
            self._lines[row.tenant].add(row.line, row.num_tokens)
        for line in {row.line for row in batch}:
            self._num_steps[line] += 1

    def done(self, row: Row) -> None:
        """It computes no more steps, but its picture is not there yet."""
        row.decoding = True

    def drop(self, row: Row) -> None:
        """It is finished, or nobody wants it any more."""
        if row in self._running:
            self._running.remove(row)
        else:
            self._wait_no_more(row)
        self._tenants.leave(row.tenant)
        lines = self._lines[row.tenant]
        lines.leave(row.line)
        if row.line not in lines:
            del self._num_steps[row.line]
        if not lines:
            del self._lines[row.tenant]
