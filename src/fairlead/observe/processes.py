"""CPU and memory of this server's own process and of its replica processes, life after life."""

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

import psutil
from msgspec import Struct

from fairlead.observe.metrics import Sample

READ_SECONDS = 2.0

Key = tuple[str, str, str]
"""(model, version, replica)."""


class Reading(NamedTuple):
    """Of one process at one moment."""

    created: float
    """With the pid it tells one process from the next that has its number."""
    cpu_seconds: float
    rss_bytes: int


def read_process(pid: int) -> Reading | None:
    """None where it is gone. Blocks for some 0.1 ms."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            return Reading(process.create_time(), times.user + times.system, process.memory_info().rss)
    except psutil.Error:
        return None


class Usage(Struct):
    """Of one replica."""

    pid: int = 0
    """0 while no process runs."""
    created: float = 0.0
    past_seconds: float = 0.0
    """CPU time of the lives before."""
    cpu_seconds: float = 0.0
    """Of this one."""
    rss_bytes: int = 0
    cpu_percent: float = 0.0
    """Of one core, between the last two readings."""
    read_at: float = 0.0

    @property
    def total_seconds(self) -> float:
        return self.past_seconds + self.cpu_seconds

    def take(self, pid: int, reading: Reading | None, now: float) -> None:
        """`reading`: None where no process runs."""
        if reading is None or (pid, reading.created) != (self.pid, self.created):
            # what it used since it was read last, before it died, is lost: READ_SECONDS of it at most
            self.past_seconds += self.cpu_seconds
            self.pid, self.created, self.cpu_seconds, self.rss_bytes, self.cpu_percent = 0, 0.0, 0.0, 0, 0.0
        if reading is not None:
            if self.pid and now > self.read_at:
                self.cpu_percent = 100 * (reading.cpu_seconds - self.cpu_seconds) / (now - self.read_at)
            self.pid, self.created = pid, reading.created
            self.cpu_seconds, self.rss_bytes = reading.cpu_seconds, reading.rss_bytes
        self.read_at = now


class Processes:
    """Read every READ_SECONDS, in a thread."""

    def __init__(
        self,
        pids: Callable[[], Iterable[tuple[Key, int | None]]],
        read: Callable[[int], Reading | None] = read_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pids`: of the replicas, None of one that has no process now."""
        self.replicas: dict[Key, Usage] = {}
        self.own = Usage()
        self._pids = pids
        self._read = read
        self._clock = clock
        self._self = psutil.Process()
        self._numbers: dict[str, float] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.look()
            await asyncio.sleep(READ_SECONDS)

    async def look(self) -> None:
        pids = dict(self._pids())
        readings, own, numbers = await asyncio.to_thread(self._read_all, pids)
        now = self._clock()
        self.own.take(self._self.pid, own, now)
        self._numbers = numbers
        for key in [key for key in self.replicas if key not in pids]:
            del self.replicas[key]
        for key, pid in pids.items():
            self.replicas.setdefault(key, Usage()).take(pid or 0, readings[key], now)

    def _read_all(self, pids: Mapping[Key, int | None]) -> tuple[dict[Key, Reading | None], Reading | None, dict[str, float]]:
        return {key: self._read(pid) if pid else None for key, pid in pids.items()}, self._read(self._self.pid), self._own_numbers()

    def _own_numbers(self) -> dict[str, float]:
        numbers = {
            "process_virtual_memory_bytes": float(self._self.memory_info().vms),
            "process_start_time_seconds": self._self.create_time(),
        }
        with suppress(AttributeError, psutil.Error):  # not on every platform
            numbers["process_open_fds"] = self._self.num_fds()
            numbers["process_max_fds"] = self._self.rlimit(psutil.RLIMIT_NOFILE)[0]
        return numbers

    def samples(self) -> Iterator[Sample]:
        version = platform.python_version()
        yield "python_info", (version, platform.python_implementation(), *platform.python_version_tuple()), 1
        if self.own.pid:
            yield "process_cpu_seconds_total", (), self.own.total_seconds
            yield "process_resident_memory_bytes", (), self.own.rss_bytes
        for name, value in self._numbers.items():
            yield name, (), value
        for key, usage in list(self.replicas.items()):
            if usage.read_at:
                yield "fairlead_replica_cpu_seconds_total", key, usage.total_seconds
            if usage.pid:
                yield "fairlead_replica_resident_memory_bytes", key, usage.rss_bytes
