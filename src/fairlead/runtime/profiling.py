"""A replica process that is looked at: it looks at itself, where nobody else may or can, and goes on computing."""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from fairlead.observe.profile.orders import ProfileOrder, ReplicaProfile
from fairlead.observe.profile.recorder import TorchRecorder, device_memory
from fairlead.observe.profile.stacks import StackSampler, written

log = structlog.get_logger("fairlead.replica")

TURN_SECONDS = 30.0
"""How long the thread that computes may take to come to the next order."""

Soon = Callable[[Callable[[], None]], None]
"""Has something done in the thread that computes, between two of its steps."""


class SelfPortrait:
    """Carries out one ProfileOrder after the other. In the event loop of a replica process."""

    def __init__(self, soon: Soon, answer: Callable[[ReplicaProfile], None]) -> None:
        self._soon = soon
        self._answer = answer
        self._task: asyncio.Task[None] | None = None

    def begin(self, order: ProfileOrder) -> None:
        if self._task is not None:
            self._answer(ReplicaProfile(notes=["it is being looked at already"]))
            return
        self._task = asyncio.get_running_loop().create_task(self._look(order))
        self._task.add_done_callback(self._looked)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("not_profiled", exc_info=error)
            self._answer(ReplicaProfile(notes=[f"{type(error).__name__}: {error}"[:500]]))

    async def _look(self, order: ProfileOrder) -> None:
        until = time.perf_counter() + order.seconds
        found = ReplicaProfile()
        sampler = StackSampler() if order.stacks else None
        if sampler is not None:
            sampler.start()
        try:
            if order.torch_seconds:
                await self._record(order, found)
            await asyncio.sleep(max(until - time.perf_counter(), 0.0))
        finally:
            if sampler is not None:
                await asyncio.to_thread(sampler.stop)
        if sampler is not None:
            found.stacks, found.num_samples = written(sampler.stacks), sampler.num_samples
        if "torch" in sys.modules:
            found.device_memory = device_memory()
        self._answer(found)

    async def _record(self, order: ProfileOrder, found: ReplicaProfile) -> None:
        if "torch" not in sys.modules:
            found.notes.append("nothing in this process uses torch: there are no kernels to tell")
            return
        recorder = TorchRecorder(shapes=order.shapes, allocations=order.allocations)
        try:
            await self._in_turn(recorder.start)
            await asyncio.sleep(order.torch_seconds)
            await self._in_turn(recorder.stop)
        except TimeoutError:
            found.notes.append(f"the thread that computes did not come to its end of a step within {TURN_SECONDS:g} s")
            return
        name = f"trace-{os.getpid()}.json"
        await asyncio.to_thread(recorder.write, str(Path(order.folder) / name))
        found.trace, found.trace_seconds = name, recorder.seconds

    async def _in_turn(self, work: Callable[[], None]) -> None:
        """Raises TimeoutError, and what `work` raises."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if not done.done():
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

        def run() -> None:
            error: Exception | None = None
            try:
                work()
            except Exception as failure:
                error = failure
            loop.call_soon_threadsafe(settle, error)

        self._soon(run)
        async with asyncio.timeout(TURN_SECONDS):
            await done
