"""A replica process with an engine: many requests at once behind one socket.

The event loop has the main thread: it reads frames and writes what steps gave. The engine has a thread of its own, and
hands over once a step.
"""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog
import uvloop

from fairlead.backends import import_backend
from fairlead.backends.base import Engine, EngineBackend
from fairlead.core.errors import FairleadError
from fairlead.core.generation import Delta, EngineStats
from fairlead.observe.logs import journal
from fairlead.runtime.profiling import SelfPortrait
from fairlead.runtime.wire import (
    BROKEN_EXIT,
    HUNG_EXIT,
    MAX_MESSAGE_CHARS,
    Answer,
    Buffer,
    Connection,
    Frame,
    Kind,
    Load,
    Ready,
    WireError,
    name_of,
)

log = structlog.get_logger("fairlead.replica")

STATS_SECONDS = 0.5
"""Between two STATS while the engine is busy."""
IDLE_STATS_SECONDS = 0.05
"""After one, before another that says that the engine has become idle: short requests would each bring one."""
END_SECONDS = 5.0
"""How long a running step may take to end when the engine is closed."""
SWITCH_SECONDS = 0.0005
"""How soon the thread that computes lets the one that reads and writes have the interpreter."""


def load_engine(load: Load) -> tuple[Engine, Frame, list[Buffer]]:
    """The engine, and the READY that tells of it. Raises what the backend raises."""
    backend = import_backend(load.backend)
    assert isinstance(backend, EngineBackend)
    engine = backend.load_engine(Path(load.artefact), load.spec, load.threads, load.version, load.kv)
    return engine, Frame(Kind.READY, ready=Ready(platform=load.backend.name, engine=engine.info)), []


def serve_engine(load: Load, engine: Engine, sock: socket.socket) -> int:
    """Answer until the gateway is done with us. Returns the exit code."""
    sys.setswitchinterval(SWITCH_SECONDS)
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    replica = EngineReplica(load.spec.name, engine, load.backend.bounds(load.spec).step_timeout, load.threads)
    code: int = loop.run_until_complete(replica.run(sock))
    return code


class EngineReplica:
    """States: open → closing (CLOSE came: what runs may end) → ended."""

    def __init__(self, name: str, engine: Engine, step_timeout: float, threads: int = 1) -> None:
        self.name = name
        self.engine = engine
        self.step_timeout = step_timeout
        self.threads = threads
        self._works: set[int] = set()
        """What must still be answered."""
        self._interval = min(STATS_SECONDS, step_timeout / 4)
        self._timer: asyncio.TimerHandle | None = None
        self._told_at = self._looked_at = 0.0
        self._step_seconds = 0.0
        """How long this process has run since the running step began; a process that was stopped meanwhile did not."""
        self._closing = False
        self._ended = asyncio.Event()
        self._code = 0
        self._thread = threading.Thread(target=self._compute, name="engine", daemon=True)
        self._returned = asyncio.Event()
        self._connection = Connection("gateway", self._on_frame, self._ended.set)
        self._portrait = SelfPortrait(engine.between_steps, lambda found: self._connection.send(Frame(Kind.PROFILED, profile=found)))

    async def run(self, sock: socket.socket) -> int:
        """Until the gateway says CLOSE or is gone, or the engine fails. Returns the exit code."""
        self._loop = asyncio.get_running_loop()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        await self._loop.create_unix_connection(lambda: self._connection, sock=sock)
        self._thread.start()
        await self._ended.wait()
        self._portrait.close()
        self.engine.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._returned.wait()
        if self._timer is not None:
            self._timer.cancel()
        signal.setitimer(signal.ITIMER_PROF, 0)
        return self._code

    def _on_frame(self, frame: Frame, body: Buffer) -> None:
        match frame.kind:
            case Kind.GENERATE if frame.generation is not None and frame.work not in self._works and not self._closing:
                asked, now = frame.generation, time.perf_counter()
                self._works.add(frame.work)
                deadline = now + asked.timeout if asked.timeout else 0.0
                self.engine.submit(frame.work, asked.prompt, priority=asked.priority, arrived=now - asked.age, deadline=deadline)
                self._watch()
            case Kind.CANCEL:
                if frame.work in self._works:  # else its end has crossed the wire with this
                    self._works.remove(frame.work)
                    self.engine.cancel(frame.work)
                    self._end_if_done()
            case Kind.SLEEP | Kind.WAKE:
                self.engine.between_steps(partial(self._turn, frame.kind))
            case Kind.PROFILE if frame.order is not None:
                self._portrait.begin(frame.order)
            case Kind.LEVELS:
                journal().set_levels(frame.levels)
            case Kind.CLOSE:
                self._closing = True
                self._end_if_done()
            case _:
                raise WireError(f"unexpected {frame.kind.name}")

    def _end_if_done(self) -> None:
        if self._closing and not self._works:
            self._ended.set()

    # What the engine gives

    def _compute(self) -> None:
        """The engine's thread."""
        error: BaseException | None = None
        try:
            self.engine.run(lambda answers: self._in_loop(self._deliver, answers))
        except BaseException as failure:
            error = failure
        self._in_loop(self._engine_returned, error)

    def _in_loop(self, call, argument) -> None:  # type: ignore[no-untyped-def]
        with suppress(RuntimeError):  # the loop is closed: nobody waited for this step any longer
            self._loop.call_soon_threadsafe(call, argument)

    def _deliver(self, given: list[tuple[int, Delta | FairleadError]]) -> None:
        answers = []
        for work, answer in given:
            if work not in self._works:  # cancelled meanwhile
                continue
            if isinstance(answer, FairleadError):
                answers.append(Answer(work, None, name_of(answer), answer.message[:MAX_MESSAGE_CHARS]))
            else:
                answers.append(Answer(work, answer))
            if not isinstance(answer, Delta) or answer.usage is not None:
                self._works.remove(work)
        if answers:
            self._send(answers)
        if not self._works and self._loop.time() - self._told_at >= IDLE_STATS_SECONDS:
            self._tell()
        self._end_if_done()

    def _send(self, answers: list[Answer]) -> None:
        """In one frame; in several where it would be too large."""
        try:
            self._connection.send(Frame(Kind.DELTAS, answers=answers))
        except WireError as error:
            half = len(answers) // 2
            if half:
                self._send(answers[:half])
                self._send(answers[half:])
                return
            (answer,) = answers
            if answer.work in self._works:
                self._works.remove(answer.work)
                self.engine.cancel(answer.work)
            self._send([Answer(answer.work, None, "ModelError", f"model '{self.name}' gave an answer that is too large: {error}")])

    def _engine_returned(self, error: BaseException | None) -> None:
        self._returned.set()
        if not self._ended.is_set():
            log.error("engine gave up: its process ends", model=self.name, exc_info=error)
            self._code = BROKEN_EXIT
            self._ended.set()

    # Sleep

    def _turn(self, kind: Kind) -> None:
        """In the engine's thread."""
        answer = Frame(Kind.END)
        try:
            self.engine.sleep() if kind is Kind.SLEEP else self.engine.wake()
        except Exception as error:
            log.error("engine cannot do as it is told", model=self.name, order=kind.name, exc_info=error)
            answer = Frame(Kind.ERROR, message=f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS])
        self._in_loop(self._turned, answer)

    def _turned(self, answer: Frame) -> None:
        self._tell()
        self._connection.send(answer)

    # Watching it

    def _watch(self) -> None:
        """Look at the engine now and then until it is idle."""
        if self._timer is None:
            self._looked_at = self._loop.time()
            self._timer = self._loop.call_later(self._interval, self._look)
            # A step that holds the interpreter's lock keeps this loop from looking: then the kernel ends the process. It
            # counts processor time, which a process that is stopped does not use.
            signal.setitimer(signal.ITIMER_PROF, self.threads * (self.step_timeout + 4 * self._interval))

    def _look(self) -> None:
        self._timer = None
        since = self._loop.time() - self._looked_at
        seconds = self.engine.step_seconds()
        ran = min(since, 2 * self._interval)  # longer: the process was stopped, or the machine
        self._step_seconds = self._step_seconds + ran if seconds > since else min(seconds, ran)
        if self._step_seconds > self.step_timeout:
            stack = "".join(traceback.format_stack(sys._current_frames()[self._thread.ident or 0]))
            log.error("step hung: its process ends", model=self.name, seconds=round(seconds, 1), stack=stack)
            os._exit(HUNG_EXIT)
        stats = self._tell()
        if self._works or stats.num_running or stats.num_waiting:
            self._watch()
        else:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _tell(self) -> EngineStats:
        self._told_at = self._loop.time()
        stats = self.engine.stats()
        self._connection.send(Frame(Kind.STATS, stats=stats))
        return stats
