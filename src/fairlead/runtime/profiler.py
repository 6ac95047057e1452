"""Looks at one model of a running server for some seconds: what its processes do, and what its requests wait for."""

import asyncio
import gzip
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from msgspec import Struct

from fairlead.core.errors import FairleadError, Unavailable
from fairlead.observe.finished import Finished
from fairlead.observe.profile import pyspy
from fairlead.observe.profile.kernels import read_in_child
from fairlead.observe.profile.layers import LayerSums
from fairlead.observe.profile.memory import measure
from fairlead.observe.profile.orders import ProfileOrder, ReplicaProfile
from fairlead.observe.profile.result import Kind, ProcessProfile, Profile
from fairlead.observe.profile.stacks import Stacks, StackSampler, hottest, parsed, written
from fairlead.runtime.lives import ReplicaProcess
from fairlead.runtime.repository import ModelRepository
from fairlead.store.transactions import Conflict

log = structlog.get_logger("fairlead.observe")

MAX_PROCESSES = 8
"""Of one model: more are not looked at."""
TORCH_SECONDS = 1.0
"""A step has hundreds of operators: longer records would be too large to look at, and to end one takes as long as it did."""
MEMORY_SECONDS = 0.5
MAX_MEMORY_POINTS = 400
MAX_TRACE_BYTES = 24 << 20
"""Compressed, of each process."""
SLACK_SECONDS = 60.0
"""Beyond its time, for those who answer."""


class Wanted(Struct, frozen=True, kw_only=True):
    model: str
    version: str = ""
    seconds: float = 10.0
    kinds: tuple[Kind, ...] = ("cpu", "torch", "memory")
    rate: int = 100
    """Samples in a second."""
    native: bool = False
    """Functions of C and C++, too."""
    shapes: bool = False
    actor: str = ""
    """Who asked, for the log."""


class Profiler:
    """One at a time. Called from the event loop only."""

    def __init__(self, repository: ModelRepository, finished: Finished, probe: Callable[[int], Awaitable[str]] = pyspy.probe) -> None:
        """`probe`: why the stacks of a process cannot be read from outside; "" where they can."""
        self._repository = repository
        self._probe = probe
        self._finished = finished
        self._running = ""

    async def look(self, wanted: Wanted) -> Profile:
        """Raises NotFound, Conflict."""
        if self._running:
            raise Conflict(f"model '{self._running}' is being profiled: one at a time")
        version = self._repository.find(wanted.model, wanted.version)
        self._running = wanted.model
        sums = LayerSums(version.name, wanted.version)
        self._finished.flush()
        log.info(
            "profiling", model=wanted.model, version=version.version, seconds=wanted.seconds, what=list(wanted.kinds), actor=wanted.actor
        )
        began = time.time()
        try:
            with tempfile.TemporaryDirectory(prefix="fairlead-profile-") as folder:
                look = _Look(wanted, [each for each in version.processes if each.ready], Path(folder), self._probe)
                async with asyncio.timeout(wanted.seconds + 3 * SLACK_SECONDS):
                    await look.prepare()
                    self._finished.listeners.append(sums)
                    try:
                        await look.watch()
                        self._finished.flush()
                    finally:
                        self._finished.listeners.remove(sums)
                    await look.record()
        except TimeoutError:
            raise Unavailable(f"looking at model '{wanted.model}' took more than {wanted.seconds + 3 * SLACK_SECONDS:g} s") from None
        finally:
            self._running = ""
        return Profile(
            model=version.name,
            version=version.version,
            began=began,
            seconds=wanted.seconds,
            kinds=list(wanted.kinds),
            answer=sums.answer(),
            processes=list(look.profiles.values()),
            notes=list(dict.fromkeys(look.notes)),
        )


class _Look:
    """One time. First what costs little, then torch's records: they slow everything down, and would be most of what is seen."""

    def __init__(self, wanted: Wanted, replicas: list[ReplicaProcess], folder: Path, probe: Callable[[int], Awaitable[str]]) -> None:
        self.probe = probe
        self.wanted = wanted
        self.folder = folder
        self.unread = ""
        """Why py-spy cannot read stacks."""
        self.notes: list[str] = []
        self.replicas = {pid: each for each in replicas[:MAX_PROCESSES] if (pid := each.pid) is not None}
        self.profiles = {os.getpid(): ProcessProfile(os.getpid(), "server")}
        self.profiles |= {pid: ProcessProfile(pid, f"replica {number}") for number, pid in enumerate(self.replicas)}
        if len(replicas) > MAX_PROCESSES:
            self.notes.append(f"{len(replicas)} processes compute for this model: only the first {MAX_PROCESSES} were looked at")
        if not self.replicas and "torch" in wanted.kinds:
            self.notes.append("this model computes in the server's own process: there is no process of its own whose kernels could be told")

    async def prepare(self) -> None:
        """Who may read the stacks of processes."""
        self.unread = await self.probe(os.getpid()) if "cpu" in self.wanted.kinds else ""
        if self.unread:
            self.notes.append(
                f"stacks are those that each process sees of itself, without native code and the lock's holder: {self.unread}"
            )

    async def watch(self) -> None:
        jobs: list[Awaitable[object]] = [asyncio.sleep(self.wanted.seconds)]
        if "cpu" in self.wanted.kinds and self.unread:
            jobs.append(self._sample_here())
            jobs += [self._ask(pid, ProfileOrder(seconds=self.wanted.seconds, stacks=True)) for pid in self.replicas]
        elif "cpu" in self.wanted.kinds:
            jobs += [self._record(pid) for pid in self.profiles]
            jobs += [self._record_lock(pid) for pid in self.profiles]
        if "memory" in self.wanted.kinds:
            jobs.append(self._follow_memory())
        await asyncio.gather(*jobs)
        for profile in self.profiles.values():
            profile.top = await asyncio.to_thread(hottest, parsed(profile.stacks))

    async def record(self) -> None:
        """One replica's kernels after the other's: they are of one kind."""
        if "torch" not in self.wanted.kinds:
            return
        seconds = min(TORCH_SECONDS, self.wanted.seconds)
        order = ProfileOrder(
            seconds=seconds,
            torch_seconds=seconds,
            shapes=self.wanted.shapes,
            allocations="memory" in self.wanted.kinds,
            folder=str(self.folder),
        )
        for pid in self.replicas:
            await self._ask(pid, order)

    async def _ask(self, pid: int, order: ProfileOrder) -> None:
        profile = self.profiles[pid]
        try:
            found = await self.replicas[pid].profile(order, order.seconds + SLACK_SECONDS)
        except FairleadError as error:
            self.notes.append(f"{profile.name}: {error.message}")
            return
        if order.stacks:
            profile.sampler, profile.stacks, profile.num_samples = "in-process", found.stacks, found.num_samples
        profile.device_memory = found.device_memory
        self.notes += [f"{profile.name}: {note}" for note in found.notes]
        if found.trace:
            await self._read_trace(profile, found)

    async def _read_trace(self, profile: ProcessProfile, found: ReplicaProfile) -> None:
        path = self.folder / Path(found.trace).name
        profile.kernel_seconds = found.trace_seconds
        try:
            profile.kernels = await read_in_child(path)
        except (OSError, ValueError, TimeoutError) as error:
            self.notes.append(f"{profile.name}: the trace cannot be read: {error}")
        data = await asyncio.to_thread(lambda: gzip.compress(path.read_bytes(), compresslevel=3) if path.exists() else b"")
        if len(data) <= MAX_TRACE_BYTES:
            profile.trace = data
        else:
            self.notes.append(f"{profile.name}: the trace of {len(data) >> 20} MiB was not kept: look for a shorter time")

    async def _record(self, pid: int) -> None:
        profile, wanted = self.profiles[pid], self.wanted
        try:
            found = await pyspy.record(pid, wanted.seconds, rate=wanted.rate, native=wanted.native)
        except pyspy.PySpyError as error:
            self.notes.append(f"{profile.name}: {error}")
            return
        profile.sampler, profile.stacks, profile.num_samples = "py-spy", written(found.stacks), found.num_samples

    async def _record_lock(self, pid: int) -> None:
        profile, wanted = self.profiles[pid], self.wanted
        try:
            found = await pyspy.record(pid, wanted.seconds, rate=wanted.rate, gil=True)
        except pyspy.PySpyError as error:
            self.notes.append(f"{profile.name}: who holds the interpreter's lock is not known: {error}")
            return
        profile.gil_share = min(round(found.num_samples / (wanted.rate * max(round(wanted.seconds), 1)), 4), 1.0)

    async def _sample_here(self) -> None:
        profile = self.profiles[os.getpid()]
        sampler = StackSampler(self.wanted.rate)
        sampler.start()
        try:
            await asyncio.sleep(self.wanted.seconds)
        finally:
            await asyncio.to_thread(sampler.stop)
        stacks: Stacks = sampler.stacks
        profile.sampler, profile.stacks, profile.num_samples = "in-process", written(stacks), sampler.num_samples

    async def _follow_memory(self) -> None:
        began = time.perf_counter()
        interval = max(MEMORY_SECONDS, self.wanted.seconds / MAX_MEMORY_POINTS)
        while (at := time.perf_counter() - began) < self.wanted.seconds:
            for pid, point in (await asyncio.to_thread(measure, self.profiles, at)).items():
                self.profiles[pid].memory.append(point)
            await asyncio.sleep(interval)
