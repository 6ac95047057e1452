"""KV memory of one server's engines: bytes of each device, promised to engines when they are loaded, and given back.

On CPU a pool becomes memory page by page as it is used, so that what the engines took does not show in what is free: what
counts is what was promised.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import psutil

from fairlead.core.cgroups import cgroup_free_bytes
from fairlead.core.errors import LoadError, ShuttingDown
from fairlead.core.generation import KvShare
from fairlead.core.specs import ModelSpec

SHARE_OF_FREE = 0.5
"""Of the memory that is free when the first engine is loaded: the budget of a CPU that was given none."""
SHARE_OF_LEFT = 0.5
"""What an engine may take for itself of what is left; one sequence of its whole context may take all of it."""


class Sleeper(Protocol):
    """What may give its memory back, so that another has it."""

    idle_since: float | None
    """None: a request runs there."""

    @property
    def awake(self) -> bool: ...

    async def doze(self) -> None:
        """Fall asleep, where nothing runs."""


class Holding:
    """What one loaded version holds on a device, all its replicas together. Called from the event loop only."""

    def __init__(self, budget: "KvBudget", holder: str, device: str, num_bytes: int) -> None:
        self.holder = holder
        self.device = device
        self.num_bytes = num_bytes
        """0 while it sleeps."""
        self.sleeper: Sleeper | None = None
        """Of a version that falls asleep by itself."""
        self._budget = budget

    async def take(self, num_bytes: int) -> None:
        """Again, what was given back; others that are idle fall asleep for it. Raises LoadError."""
        await self._budget.take(self, num_bytes)

    def forget(self) -> None:
        """It is unloaded."""
        if self in self._budget.holdings:
            self._budget.holdings.remove(self)


def to_yield(lacking: int, idle: Sequence[tuple[float, int]]) -> list[int]:
    """Which of (idle since, bytes) make room for `lacking` bytes, the longest idle first; none where all of them would not."""
    chosen: list[int] = []
    if lacking <= 0 or lacking > sum(num_bytes for _, num_bytes in idle):
        return chosen
    for number in sorted(range(len(idle)), key=lambda number: idle[number][0]):
        chosen.append(number)
        lacking -= idle[number][1]
        if lacking <= 0:
            break
    return chosen


def share_of(total: int, holdings: Sequence[Holding], *, device: str, count: int, declared: int) -> KvShare:
    """Of each of `count` replicas of a model, of a budget of `total` bytes. `declared`: what its model.yaml says that each
    takes; 0: nothing. Raises LoadError where there is not as much."""
    left = max(total - sum(each.num_bytes for each in holdings), 0)
    if declared * count > left:
        wanted = f"{count} x " * (count > 1) + f"`llm.kv_cache_bytes` of {mib(declared)}"
        raise LoadError(f"there is no KV memory for it: it takes {wanted}, and of {told(device, total, holdings)}")
    why = f"half of what is left of {told(device, total, holdings)}" + f", for {count} instances" * (count > 1)
    return KvShare(int(left * SHARE_OF_LEFT) // count, left // count, why)


def told(device: str, total: int, holdings: Iterable[Holding]) -> str:
    """Who holds what, as part of a sentence."""
    held: dict[str, int] = defaultdict(int)
    for each in holdings:
        held[each.holder] += each.num_bytes
    taken = ", ".join(f"{holder} {mib(num)}" for holder, num in sorted(held.items()) if num)
    return f"`models.kv_cache_bytes.{device}`, {mib(total)}, " + (f"others hold {taken}" if taken else "nobody holds any")


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def free_bytes() -> int:
    """Memory that is free on this machine, or in the container that this process is in."""
    available, left = psutil.virtual_memory().available, cgroup_free_bytes()
    return int(available if left is None else min(available, left))


class KvBudget:
    """Called from the event loop only."""

    def __init__(self, declared: Mapping[str, int] | None = None, free: Callable[[], int] = free_bytes) -> None:
        """`declared`: bytes by device; `cuda` goes for every CUDA device. A CPU without takes a share of what is free; a CUDA
        device without has no budget here: its engines look at what the device has left."""
        self._declared = dict(declared or {})
        self._free = free
        self.holdings: list[Holding] = []
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def total(self, device: str) -> int:
        """0: none is known."""
        if device not in self._declared and device == "cpu":
            self._declared[device] = int(self._free() * SHARE_OF_FREE)
        return self._declared.get(device) or self._declared.get(device.partition(":")[0], 0)

    @property
    def devices(self) -> Iterable[str]:
        """That engines were loaded on, or that were given a budget."""
        return sorted({*self._declared, *(each.device for each in self.holdings)})

    def turn(self, device: str) -> asyncio.Lock:
        """Held while an engine is loaded and nobody knows yet what it takes: the next one is told what is left then."""
        return self._turns[named(device)]

    def share(self, spec: ModelSpec) -> KvShare | None:
        """What each replica of a model may take; None where no budget is known. Raises LoadError."""
        device = named(spec.instances.device)
        total = self.total(device)
        if not total:
            return None
        return share_of(total, self._on(device), device=device, count=spec.instances.count, declared=spec.llm.kv_cache_bytes)

    def hold(self, holder: str, device: str, num_bytes: int) -> Holding:
        """Book what an engine that was loaded did take."""
        holding = Holding(self, holder, named(device), num_bytes)
        self.holdings.append(holding)
        return holding

    async def take(self, holding: Holding, num_bytes: int) -> None:
        device, total = holding.device, self.total(holding.device)
        async with self.turn(device):
            idle = [
                (each.sleeper, each.sleeper.idle_since, each.num_bytes)
                for each in self._on(device)
                if total and each.sleeper is not None and each.sleeper.awake and each.sleeper.idle_since is not None
            ]
            for number in to_yield(num_bytes - self.left(device), [(since, held) for _, since, held in idle]):
                with suppress(ShuttingDown):  # then it has given its memory back, or will
                    await idle[number][0].doze()
            if total and num_bytes > self.left(device):
                raise LoadError(f"there is no KV memory for it: it takes {mib(num_bytes)}, and of {told(device, total, self._on(device))}")
            holding.num_bytes = num_bytes

    def left(self, device: str) -> int:
        return self.total(device) - sum(each.num_bytes for each in self._on(device))

    def _on(self, device: str) -> list[Holding]:
        return [each for each in self.holdings if each.device == device]


def named(device: str) -> str:
    return "cuda:0" if device == "cuda" else device
