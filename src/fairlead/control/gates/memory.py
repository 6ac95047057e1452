"""How much memory it takes, and whether that ever ends."""

import asyncio
import gc
import os
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import psutil
from msgspec import Struct

from fairlead.control.checks import MemoryRule
from fairlead.control.gates.asking import drive
from fairlead.control.gates.report import Verdict, failed, passed, skipped, unknown
from fairlead.control.gates.trial import Trial

NUM_POINTS = 20
"""How often it is measured while requests are answered ..."""
NUM_SETTLING = 5
"""... of which the first ones do not count: caches fill."""
NOISE_BYTES = 512 << 10
"""A process's memory moves by so much without a reason."""
PEAK_SECONDS = 0.1


class Held(Struct, frozen=True):
    """What was measured, beyond an empty process."""

    loaded: int
    peak: int
    points: list[tuple[int, int]]
    """(requests answered, bytes)."""


async def memory(trial: Trial) -> Verdict:
    rule = trial.rules.memory
    if rule is None:
        return skipped("checks.yaml has no `memory`")
    requests = trial.questions()
    if not requests:
        return skipped("there is no question: give golden examples, a data set, or `warmup` in model.yaml")
    version, empty = trial.candidate, trial.empty_bytes
    until = time.perf_counter() + rule.seconds
    loaded = peak = trial.measure() - empty
    points: list[tuple[int, int]] = []
    answered = 0
    for _ in range(NUM_POINTS):
        seen: list[int] = []
        watching = asyncio.create_task(_watch(trial.measure, seen))
        try:
            driven = await drive(
                version,
                requests,
                num=rule.requests // NUM_POINTS,
                concurrency=rule.concurrency,
                until=until,
                seconds=trial.rules.request_seconds,
            )
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        if driven.errors:
            return failed(f"{driven.errors} of {driven.num} requests are not answered: {driven.error}")
        gc.collect()
        answered += driven.num
        points.append((answered, trial.measure() - empty))
        peak = max(peak, points[-1][1], *(each - empty for each in seen), 0)
        if time.perf_counter() >= until:
            break
    return judged(rule, Held(loaded, peak, points))


def judged(rule: MemoryRule, held: Held) -> Verdict:
    details = {"loaded_bytes": held.loaded, "peak_bytes": held.peak, "requests": held.points[-1][0], "points": held.points}
    if rule.max_bytes is not None and held.peak > rule.max_bytes:
        return failed(f"it takes {_mib(held.peak)}, more than {_mib(rule.max_bytes)}", **details)
    points = held.points[NUM_SETTLING:]
    if len(points) < NUM_SETTLING:
        return unknown(
            f"{held.points[-1][0]} requests within {rule.seconds:g} s are too few to tell growth: give more `seconds`", **details
        )
    each = growth_of(points)
    details["growth_bytes"] = round(growth := each * 1000)
    if growth > rule.growth_bytes and each * (points[-1][0] - points[0][0]) > NOISE_BYTES:
        return failed(f"it grows by {_mib(growth)} in 1,000 requests, more than {_mib(rule.growth_bytes)}", **details)
    return passed(f"it takes {_mib(held.peak)} at most, and grows by {_mib(max(growth, 0))} in 1,000 requests", **details)


def growth_of(points: list[tuple[int, int]]) -> float:
    """Bytes a request, in the half in which it grew less: a leak goes on, a jump happens once."""
    middle = len(points) // 2
    return min(_slope(points[: middle + 1]), _slope(points[middle:]))


def _slope(points: list[tuple[int, int]]) -> float:
    """The median of the slopes between all pairs, which a single odd measurement hardly moves (Theil and Sen)."""
    slopes = [
        (later[1] - point[1]) / (later[0] - point[0])
        for index, point in enumerate(points)
        for later in points[index + 1 :]
        if later[0] > point[0]
    ]
    return float(np.median(slopes)) if slopes else 0.0


def tree_bytes() -> int:
    """Of this process and all below it; what they share counts once, where the system tells (PSS)."""
    own = psutil.Process(os.getpid())
    total = 0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):  # it ended meanwhile
            full = process.memory_full_info()
            total += getattr(full, "pss", 0) or full.rss
    return total


async def _watch(measure: Callable[[], int], seen: list[int]) -> None:
    while True:
        await asyncio.sleep(PEAK_SECONDS)
        seen.append(await asyncio.to_thread(measure))


def _mib(size: float) -> str:
    return f"{size / (1 << 20):.1f} MiB"
