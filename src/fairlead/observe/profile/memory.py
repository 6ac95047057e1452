"""How much memory processes have, over a while."""

from collections.abc import Iterable

import psutil
from msgspec import Struct


class MemoryPoint(Struct, array_like=True):
    at: float
    """Seconds since the beginning."""
    rss: int
    """Resident bytes."""
    uss: int
    """Of these, what no other process shares: what would be free without it."""


def measure(pids: Iterable[int], at: float) -> dict[int, MemoryPoint]:
    """Of those that are still there. Reads the kernel's page tables: in a thread."""
    found: dict[int, MemoryPoint] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            rss = process.memory_info().rss
        except psutil.Error:
            continue
        try:
            uss = process.memory_full_info().uss
        except psutil.Error:  # the kernel tells it those only who may look
            uss = 0
        found[pid] = MemoryPoint(round(at, 3), rss, uss)
    return found
