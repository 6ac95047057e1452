"""The sleep of a version with an engine: its KV memory goes back to the budget, a request wakes it again. At level 1 its processes
stay, with its weights in the host's memory; at level 2 they end.

| state | requests | leaves it |
|---|---|---|
| awake | are computed | by `sleep`, or after `idle_seconds` |
| falling asleep | wait, those that run end | when its processes have done so |
| asleep | wake it and wait; with `wake: manual` they are refused | by `wake`, or a request; `sleep` at level 2 ends processes that stayed |
| waking | wait | when it is loaded; asleep again where it cannot be |
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from enum import StrEnum
from typing import Any, Protocol

import structlog

from fairlead.core.errors import FairleadError, QueueFull, ShuttingDown, TimeoutExpired, Unavailable, Unsupported
from fairlead.core.specs import SleepSpec
from fairlead.runtime.kv_budget import Holding

log = structlog.get_logger("fairlead.runtime")

MAX_PARKED = 1024
"""Requests that may wait for one version to wake."""
RETRY_SECONDS = 5.0
"""After a failure to wake, in which requests do not try again."""


class State(StrEnum):
    AWAKE = "awake"
    FALLING = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


class Process(Protocol):
    async def sleep(self) -> None:
        """Give back what it can without ending."""

    async def wake(self) -> None:
        """Be ready again, whether it stayed or has ended. Raises LoadError."""

    async def close(self) -> None:
        """End."""


class Parked(Protocol):
    """A request that waits for the version to wake."""

    def resume(self) -> None: ...

    def refuse(self, error: FairleadError) -> None: ...


def due(idle_since: float, idle_seconds: float, now: float) -> float:
    """Seconds until what is idle falls asleep; 0: it should by now."""
    return max(idle_since + idle_seconds - now, 0.0)


class Sleep:
    """Called from the event loop only."""

    def __init__(
        self,
        spec: SleepSpec,
        model: str,
        processes: Sequence[Process],
        holding: Holding | None,
        *,
        light: bool,
        settle: Callable[[float], Awaitable[None]],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`light`: it may sleep at level 1. `settle`: returns when no request runs; those that so many seconds cut off have failed. `on_change`: called when it
        has fallen asleep, or has woken."""
        self.spec = spec
        self.model = model
        self.state = State.AWAKE
        self.level = 0
        """At which it sleeps; 0: it is awake."""
        self.wakes = 0
        self.refused = ""
        """Why it could not be woken the last time; "" where that went well."""
        self.idle_since: float | None = clock()
        """None: a request runs."""
        self._processes = processes
        self._holding = holding
        self._light = light
        self._num_bytes = 0 if holding is None else holding.num_bytes
        self._settle = settle
        self._on_change = on_change
        self._clock = clock
        self._retry_at = 0.0
        self._turn = asyncio.Lock()
        self._parked: dict[Parked, asyncio.TimerHandle] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waking: asyncio.Task[None] | None = None
        self._closed = False
        if holding is not None and spec.idle_seconds:
            holding.sleeper = self

    @property
    def awake(self) -> bool:
        return self.state is State.AWAKE

    @property
    def takes_requests(self) -> bool:
        """They are parked, where it is not awake."""
        return self.spec.wake == "request" or self.state in (State.AWAKE, State.WAKING)

    # What is asked for

    def check(self, level: int) -> None:
        """Raises Unsupported where it cannot sleep at this level."""
        if level == 1 and not self._light:
            raise Unsupported(
                f"model '{self.model}' cannot sleep at `level` 1: it has no KV memory that it could give back; `level` 2 ends its process"
            )

    async def sleep(self, timeout: float, level: int = 0) -> None:
        """Let what runs end within `timeout` seconds, then sleep. `level` 0: as `sleep.level` says. Nothing where it sleeps as deep.
        Raises Unsupported, or ShuttingDown where it is unloaded meanwhile."""
        self.check(level)
        self._check_open()
        await self._done(self._task(self._fall_asleep(timeout, level or self.spec.level)))

    async def doze(self) -> None:
        """The same at `sleep.level`, where no request runs; nothing where one does."""
        self._check_open()
        await self._done(self._task(self._fall_asleep(0.0, self.spec.level, unasked=True)))

    async def wake(self) -> None:
        """Have it compute again. Nothing where it is awake. Raises LoadError, or ShuttingDown where it is unloaded meanwhile."""
        self._check_open()
        await self._done(self._begin_waking())

    async def close(self) -> None:
        """It is unloaded: whatever goes on ends, and nothing begins."""
        self._closed = True
        self._disarm()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._refuse_all(ShuttingDown(f"model '{self.model}' was unloaded before it answered"))

    # From the version

    def park(self, request: Parked, timeout: float) -> None:
        """Have a request wait, and see that it is woken for it. `timeout`: of the request itself, 0 for none. Raises Unavailable."""
        if not self.takes_requests:
            raise Unavailable(f"model '{self.model}' is {self.state}: `fairlead models wake {self.model}` wakes it")
        if self.state is State.ASLEEP and (left := self._retry_at - self._clock()) > 0:
            raise _later(f"model '{self.model}' is asleep and cannot be woken: {self.refused}", left)
        if len(self._parked) >= MAX_PARKED:
            raise QueueFull(f"model '{self.model}' is {self.state}, and {MAX_PARKED} requests wait for it")
        wait = self.spec.wait_seconds
        error: Unavailable = _later(f"model '{self.model}' did not wake within {wait:g} s", RETRY_SECONDS)
        if 0 < timeout < wait:
            wait, error = timeout, TimeoutExpired("Request timeout expired")
        self._parked[request] = asyncio.get_running_loop().call_later(wait, self._expire, request, error)
        if self.state is State.ASLEEP:
            self._begin_waking()

    def leave(self, request: Parked) -> None:
        """It was cancelled."""
        if (timer := self._parked.pop(request, None)) is not None:
            timer.cancel()

    def busy(self) -> None:
        self.idle_since = None

    def idle(self) -> None:
        """Its last request ended."""
        self.idle_since = self._clock()
        self._arm()

    # Falling asleep

    def _arm(self) -> None:
        if (
            self.spec.idle_seconds
            and self._timer is None
            and self.state is State.AWAKE
            and self.idle_since is not None
            and not self._closed
        ):
            seconds = due(self.idle_since, self.spec.idle_seconds, self._clock())
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self.idle_since is not None and not due(self.idle_since, self.spec.idle_seconds, self._clock()):
            self._task(self._fall_asleep(0.0, self.spec.level, unasked=True))
        else:
            self._arm()

    async def _fall_asleep(self, timeout: float, level: int, *, unasked: bool = False) -> None:
        async with self._turn:
            if self.state is State.ASLEEP and self.level < level:
                await self._end_processes()
                log.info("model fell asleep deeper", model=self.model, sleep_level=level)
            if self.state is not State.AWAKE or (unasked and self.idle_since is None):
                return
            self.state = State.FALLING
            self._disarm()
            try:
                await self._settle(timeout)
                self.level = level
                await asyncio.gather(*(process.sleep() if level == 1 else process.close() for process in self._processes))
            finally:
                self.state = State.ASLEEP
            if self._holding is not None:
                self._num_bytes, self._holding.num_bytes = self._holding.num_bytes, 0
            self._on_change()
            log.info("model fell asleep", model=self.model, sleep_level=level, kv_bytes=self._num_bytes)
        if self._parked:
            self._begin_waking()

    # Waking

    def _begin_waking(self) -> asyncio.Task[None]:
        if self._waking is None or self._waking.done():
            self._waking = self._task(self._wake())
        return self._waking

    async def _wake(self) -> None:
        async with self._turn:
            if self.state is State.AWAKE:
                return
            self.state = State.WAKING
            began = self._clock()
            try:
                await self._start()
                self.state, self.level, self.refused, self.idle_since = State.AWAKE, 0, "", self._clock()
            except Exception as error:
                self.refused = error.message if isinstance(error, FairleadError) else f"{type(error).__name__}: {error}"
                self._retry_at = self._clock() + RETRY_SECONDS
                log.error("model cannot be woken", model=self.model, reason=self.refused)
                self._refuse_all(_later(f"model '{self.model}' is asleep and cannot be woken: {self.refused}", RETRY_SECONDS))
                raise
            finally:
                if self.state is State.WAKING:
                    self.state = State.ASLEEP
            self.wakes += 1
            self._on_change()
            log.info("model woke", model=self.model, seconds=round(self._clock() - began, 3), waiting=len(self._parked))
        for request in list(self._parked):
            self.leave(request)
            request.resume()
        self._arm()

    async def _start(self) -> None:
        """Raises LoadError."""
        if self._holding is not None:
            await self._holding.take(self._num_bytes)
        try:
            await asyncio.gather(*(process.wake() for process in self._processes))
        except BaseException:
            await self._end_processes()
            if self._holding is not None:
                self._holding.num_bytes = 0
            raise

    async def _end_processes(self) -> None:
        await asyncio.gather(*(process.close() for process in self._processes))
        self.level = 2

    def _expire(self, request: Parked, error: FairleadError) -> None:
        del self._parked[request]
        request.refuse(error)

    def _refuse_all(self, error: FairleadError) -> None:
        for request in list(self._parked):
            self.leave(request)
            request.refuse(error)

    async def _done(self, task: asyncio.Task[None]) -> None:
        """It goes on where the one who asked leaves. Raises ShuttingDown where it was ended, and what it raises."""
        await asyncio.wait({task})
        if task.cancelled():
            raise ShuttingDown(f"model '{self.model}' was unloaded meanwhile")
        task.result()

    def _check_open(self) -> None:
        """Raises ShuttingDown."""
        if self._closed:
            raise ShuttingDown(f"model '{self.model}' is unloading")

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=f"sleep-{self.model}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, FairleadError):
            log.error("sleep or wake failed", model=self.model, exc_info=error)


def _later(message: str, seconds: float) -> Unavailable:
    error = Unavailable(message)
    error.retry_after = max(seconds, 1.0)
    return error
