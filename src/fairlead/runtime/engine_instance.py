"""The gateway's end of a replica process with an engine: any number of requests at once, each with a consumer of its own."""

import asyncio
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from fairlead.backends.base import Kind as BackendKind
from fairlead.core.errors import FairleadError, InvalidRequest, LoadError, QueueFull, ShuttingDown, TooLarge, Unavailable
from fairlead.core.generation import Delta, EngineInfo, EngineStats, KvShare, Prompt
from fairlead.core.specs import ModelSpec
from fairlead.observe.metrics import add_stats, counted
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.lives import Life, ReplicaProcess, describe_exit
from fairlead.runtime.wire import BROKEN_EXIT, HUNG_EXIT, Buffer, Frame, Generation, Kind, WireError, error_of

log = structlog.get_logger("fairlead.runtime")

SLEEP_SECONDS = 60.0
"""That an engine may take to give its memory back: on a CUDA device its weights are copied first."""
RECENT = 64
"""Requests that the rate of completions is taken from."""
LONGEST_RETRY = 60.0


class Consumer(Protocol):
    """Where the pieces of one answer go. Called from the event loop only."""

    def respond(self, delta: Delta) -> None: ...

    def close(self, error: FairleadError | None) -> None:
        """Once, at the end; not after a cancellation."""


class EngineInstance(ReplicaProcess):
    """Passes requests to the engine's process, and the pieces of their answers to their consumers."""

    def __init__(
        self,
        spec: ModelSpec,
        artefact: Path,
        kind: BackendKind,
        threads: int,
        forkserver: ForkServer,
        on_change: Callable[[], None],
        *,
        version: str = "",
        kv: KvShare | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`kv`: the KV memory that its engine may take."""
        super().__init__(spec, artefact, kind, threads, forkserver, on_change, slab_bytes=0, version=version)
        self._load.kv = kv
        self.info: EngineInfo | None = None
        """Known once it is loaded."""
        bounds, hung = kind.bounds(spec), f"a step took longer than `{kind.section}.step_timeout`"
        self.exits = {HUNG_EXIT: hung, -signal.SIGPROF: hung, BROKEN_EXIT: "step after step failed"}
        self.max_in_flight = bounds.max_num_seqs + bounds.max_waiting
        self._clock = clock
        self._work = 0
        self._consumers: dict[int, Consumer] = {}
        self._turned: asyncio.Future[Frame] | None = None
        """While the engine falls asleep, or wakes."""
        self._completions: deque[float] = deque(maxlen=RECENT)
        self._stats = EngineStats()
        self._past = EngineStats()

    @property
    def num_in_flight(self) -> int:
        return len(self._consumers)

    @property
    def kv_bytes(self) -> int:
        """That its engine took."""
        return 0 if self.info is None else self.info.num_kv_blocks * self.info.kv_block_bytes

    @property
    def recovering(self) -> bool:
        """A step failed, and the engine looks for the request that it failed on."""
        return self._stats.recovering

    @property
    def stats(self) -> EngineStats:
        """Of now, as last told; its counts are those of all its lives."""
        return add_stats(counted(self._past), self._stats)

    def submit(self, prompt: Prompt, consumer: Consumer, *, priority: int, age: float, timeout: float) -> int:
        """Send a request to the engine; returns its work's number. Times are seconds: since it arrived, and that it may
        still wait for its start (0: any). Raises Unavailable, QueueFull, TooLarge or InvalidRequest."""
        if not self.ready:
            raise self._not_ready()
        if len(self._consumers) >= self.max_in_flight:
            raise self._full(f"model '{self.model}' has {len(self._consumers)} requests at once already")
        life = self._life
        assert life is not None
        self._work += 1
        generation = Generation(prompt, priority, age, timeout)
        try:
            life.connection.send(Frame(Kind.GENERATE, work=self._work, generation=generation))
        except WireError as error:
            raise TooLarge(f"request for model '{self.model}': {error}") from None
        except OverflowError as error:  # a number beyond 64 bits
            raise InvalidRequest(f"request cannot be passed to model '{self.model}': {error}") from None
        if not self._consumers:
            self._completions.clear()  # the rate is that of the time in which there is work
        self._consumers[self._work] = consumer
        return self._work

    def cancel(self, work: int) -> None:
        """Its consumer hears nothing more, and its memory is free after the running step."""
        if self._consumers.pop(work, None) is not None and self._life is not None:
            self._life.connection.send(Frame(Kind.CANCEL, work=work))

    def retry_after(self) -> float:
        """Seconds in which an eighth of what may be in flight ends, at the rate of the latest completions."""
        if len(self._completions) < 2:
            return Unavailable.retry_after
        rate = (len(self._completions) - 1) / max(self._clock() - self._completions[0], 1e-3)
        return min(max(self.max_in_flight / 8 / rate, 1.0), LONGEST_RETRY)

    # Sleep

    async def sleep(self) -> None:
        """Have the engine give its KV memory back, while its process stays. One that is not there, or does not do it, is ended;
        one that dies asleep is not started again before `wake`."""
        await self._leave_alone()
        ready, self.ready = self.ready, False
        try:
            if not ready:
                raise Unavailable("its process is not there")
            await self._turn(Kind.SLEEP, SLEEP_SECONDS)
        except FairleadError as error:
            log.warning("engine cannot sleep: its process ends", model=self.model, reason=error.message)
            await self.close()
        else:
            self._keeper = asyncio.get_running_loop().create_task(self._see_it_die())

    async def wake(self) -> None:
        """Have it ready again: its process where that sleeps, else another one. Raises LoadError."""
        await self._leave_alone()
        if self._life is None or self._life.lost.done():
            await self.close()
            await self.start(self._load_seconds)
            return
        await self._turn(Kind.WAKE, self._load_seconds)
        self.ready = not self._life.lost.done()
        self._keeper = asyncio.get_running_loop().create_task(self._keep_alive())

    async def _turn(self, kind: Kind, seconds: float) -> None:
        """Raises LoadError where it is not done within so many seconds."""
        life = self._life
        assert life is not None
        turned = self._turned = asyncio.get_running_loop().create_future()
        life.connection.send(Frame(kind))
        await asyncio.wait({turned, life.lost}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        self._turned = None
        if not turned.done():
            why = "its process died" if life.lost.done() else f"its engine gave no answer within {seconds:g} s"
            raise LoadError(f"model '{self.model}': {why}")
        if (answer := turned.result()).kind is Kind.ERROR:
            raise LoadError(f"model '{self.model}': {answer.message}")

    async def _see_it_die(self) -> None:
        """The process that sleeps."""
        life = self._life
        assert life is not None
        await asyncio.wait({life.lost})
        life.kill(self._forkserver)
        log.error("replica died asleep", model=self.model, status=describe_exit(await life.exit_status()))

    # To and from the process

    def _learn(self, life: Life, frame: Frame, body: Buffer) -> None:
        if frame.ready is None or frame.ready.engine is None:
            raise WireError("READY without what is ready")
        self.info = frame.ready.engine
        taken, kv = self.kv_bytes, self._load.kv
        self._load.kv = KvShare(taken, taken, "" if kv is None else kv.why) if taken else kv  # another life has as much

    def _on_frame(self, frame: Frame, body: Buffer) -> None:
        if frame.kind is Kind.STATS and frame.stats is not None:
            self._stats = frame.stats
            return
        if frame.kind in (Kind.END, Kind.ERROR) and self._turned is not None and not self._turned.done():
            self._turned.set_result(frame)
            return
        if frame.kind is not Kind.DELTAS:
            raise WireError(f"unexpected {frame.kind.name}")
        for answer in frame.answers:
            if not 0 < answer.work <= self._work:
                raise WireError(f"answer to {answer.work}, which was not asked")
            consumer = self._consumers.get(answer.work)
            if consumer is None:  # cancelled while this was under way
                continue
            if (delta := answer.delta) is not None:
                consumer.respond(delta)
                if delta.usage is None:
                    continue
                error = None
            else:
                error = error_of(answer.error, answer.message)
                if isinstance(error, QueueFull):
                    error = self._full(answer.message)
            if self._consumers.pop(answer.work, None) is not None:
                self._completions.append(self._clock())
                consumer.close(error)

    def _full(self, message: str) -> QueueFull:
        error = QueueFull(message)
        error.retry_after = self.retry_after()
        return error

    def _not_ready(self) -> FairleadError:
        if self.down and not self._closing:
            return Unavailable(f"model '{self.model}' is not available: {self.down}")
        return super()._not_ready()

    def _stop_running(self) -> None:
        error = ShuttingDown(f"model '{self.model}' was unloaded before it answered")
        for work, consumer in list(self._consumers.items()):
            self.cancel(work)
            consumer.close(error)

    def _fail_running(self, error: FairleadError) -> None:
        self._past, self._stats = self.stats, EngineStats()
        consumers, self._consumers = self._consumers, {}
        for consumer in consumers.values():
            consumer.close(error)
