"""A process that serves one loaded model: started, watched, and started again whenever it dies."""

import asyncio
import os
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from fairlead.backends.base import Kind as BackendKind
from fairlead.core.errors import FairleadError, LoadError, ReplicaDied, ShuttingDown, Unavailable
from fairlead.core.logs import Levels
from fairlead.core.specs import ModelSpec
from fairlead.observe.profile.orders import ProfileOrder, ReplicaProfile
from fairlead.runtime.forkserver import ForkServer, Process
from fairlead.runtime.printed import Printed
from fairlead.runtime.slab import Slab, create_slab
from fairlead.runtime.wire import Buffer, Connection, Frame, Kind, Load, WireError

log = structlog.get_logger("fairlead.runtime")

FIRST_DELAY = 0.1
LONGEST_DELAY = 30.0
HEALTHY_SECONDS = 60.0
LOAD_SECONDS = 300.0
CLOSE_SECONDS = 5.0
EXIT_SECONDS = 1.0
"""How long to wait, after a socket's end, to be told how its process ended."""


def restart_delay(previous: float, lived: float) -> float:
    """Seconds to wait before a dead process is started again, given the delay before (0: none) and how long it was ready."""
    if previous == 0.0 or lived >= HEALTHY_SECONDS:
        return FIRST_DELAY
    return min(2 * previous, LONGEST_DELAY)


def describe_exit(status: int | None) -> str:
    """As part of a sentence, e.g. "signal 9"."""
    if status is None:
        return "its exit code is unknown"
    return f"signal {-status}" if status < 0 else f"exit code {status}"


class Life:
    """One life of the process: its socket, its slabs, its end."""

    def __init__(self, model: str, on_lost: Callable[["Life"], None], version: str = "") -> None:
        loop = asyncio.get_running_loop()
        self.model = model
        self.version = version
        self.printed: Printed | None = None
        self.process: Process | None = None
        self.requests: Slab | None = None
        self.responses: Slab | None = None
        self.loaded: asyncio.Future[tuple[Frame, Buffer]] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.since = 0.0
        """When it became ready."""
        self.connection = Connection(f"model '{model}'", self._first_frame, self._end)
        self._on_lost = on_lost

    async def load(self, load: Load, forkserver: ForkServer, modules: Sequence[str], slab_bytes: int) -> tuple[Frame, Buffer]:
        """Start the process and have it load; its READY or ERROR. Raises LoadError where it ends without either."""
        ours, theirs = socket.socketpair()
        descriptors = [theirs.detach()]
        printed = self.printed = Printed(self.model, self.version)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: self.connection, sock=ours)
            if slab_bytes and hasattr(os, "memfd_create"):
                descriptors.append(create_slab(slab_bytes, "fairlead requests"))
                descriptors.append(create_slab(slab_bytes, "fairlead responses"))
                self.requests, self.responses = Slab(descriptors[1], writer=True), Slab(descriptors[2], writer=False)
                self.connection.slab = self.requests
            self.process = await forkserver.spawn([*descriptors, printed.theirs], modules, mark=printed.mark)
            printed.pid = self.process.pid
        finally:
            for fd in descriptors:
                os.close(fd)
            printed.handed_over()
        self.process.exited.add_done_callback(self._exited)
        self.connection.send(Frame(Kind.LOAD, load=load))
        ends: set[asyncio.Future[Any]] = {self.loaded, self.lost}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not self.loaded.done():
            raise LoadError(f"model '{self.model}': its process ended while loading it ({describe_exit(await self.exit_status())})")
        return self.loaded.result()

    async def exit_status(self) -> int | None:
        if self.process is None:
            return None
        await asyncio.wait({self.process.exited}, timeout=EXIT_SECONDS)
        return self.process.exited.result() if self.process.exited.done() else None

    def kill(self, forkserver: ForkServer) -> None:
        """Whatever it is doing."""
        process = self.process
        if process is not None and not forkserver.kill(process):
            orphaned = process.exited.done() and process.exited.result() is None  # its fork server died before it
            if orphaned and not self.lost.done():  # it has not hung up, so the pid is still its own
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        self.connection.abort()

    def _first_frame(self, frame: Frame, body: Buffer) -> None:
        if frame.kind not in (Kind.READY, Kind.ERROR) or self.loaded.done():
            raise WireError(f"unexpected {frame.kind.name}")
        self.loaded.set_result((frame, body))

    def _exited(self, exited: "asyncio.Future[int | None]") -> None:
        # Its last words may still be in the socket. And a grandchild that keeps the socket open must not hide the death
        if exited.result() is not None and not self.lost.done():
            timer = asyncio.get_running_loop().call_later(EXIT_SECONDS, self.connection.abort)
            self.lost.add_done_callback(lambda _: timer.cancel())

    def _end(self) -> None:
        self.requests = self.responses = self.connection.slab = None  # unmapped now, not when the garbage collector comes
        if self.printed is not None:
            self.printed.close(after=EXIT_SECONDS)
        self.lost.set_result(None)
        self._on_lost(self)


class ReplicaProcess(ABC):
    """One model in a process of its own, life after life. What it computes is the subclass's business."""

    def __init__(
        self,
        spec: ModelSpec,
        artefact: Path,
        kind: BackendKind,
        threads: int,
        forkserver: ForkServer,
        on_change: Callable[[], None],
        *,
        slab_bytes: int,
        version: str = "",
    ) -> None:
        """`on_change`: called when `ready` or `down` changes after `start`.

        `slab_bytes`: bound of the memory shared with the process, for each direction; 0 sends everything by the socket.
        """
        self.model = spec.name
        self.ready = False
        self.restarts = 0
        """Attempts to start it again after a death."""
        self.down = ""
        """Why it cannot be started again; "" while nothing failed."""
        self._load = Load(spec, str(artefact), kind, threads, version)
        self._preload = kind.preload
        self._forkserver = forkserver
        self._on_change = on_change
        self._slab_bytes = slab_bytes
        self._load_seconds = 0.0
        self._life: Life | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        life = self._life
        return life.process.pid if life is not None and life.process is not None and not life.lost.done() else None

    async def start(self, deadline: float = LOAD_SECONDS) -> None:
        """Load in a new process within `deadline` seconds; a restart has as long. After `close`: once more. Raises LoadError."""
        self._closing, self.down = False, ""
        self._load_seconds = deadline
        await self._start_life()
        self._keeper = asyncio.get_running_loop().create_task(self._keep_alive())

    async def close(self) -> None:
        """Let what runs end, end the process; kill it where that takes more than CLOSE_SECONDS."""
        self._closing, self.ready = True, False
        await self._leave_alone()
        if (life := self._life) is not None:
            if life.loaded.done():
                self._stop_running()
                life.connection.send(Frame(Kind.CLOSE))
                await asyncio.wait({life.lost}, timeout=CLOSE_SECONDS)
            life.kill(self._forkserver)
            await life.exit_status()
            self._life = None
        self._fail_running(ShuttingDown(f"model '{self.model}' was unloaded before it answered"))

    async def _leave_alone(self) -> None:
        """Nobody starts it again from here on."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})

    def set_levels(self, levels: Levels) -> None:
        """Which lines its process writes."""
        if (life := self._life) is not None and life.loaded.done():
            life.connection.send(Frame(Kind.LEVELS, levels=levels))

    async def profile(self, order: ProfileOrder, timeout: float) -> ReplicaProfile:
        """What its process sees of itself. Raises Unavailable where it does not answer."""
        life = self._life
        if life is None or not self.ready:
            raise Unavailable("its process is not there")
        answer: asyncio.Future[ReplicaProfile] = asyncio.get_running_loop().create_future()

        def on_frame(frame: Frame, body: Buffer) -> None:
            if frame.kind is not Kind.PROFILED or frame.profile is None:
                self._on_frame(frame, body)
            elif not answer.done():
                answer.set_result(frame.profile)

        # Left there where it gives no answer: a late one is no error
        life.connection.on_frame = on_frame
        life.connection.send(Frame(Kind.PROFILE, order=order))
        ends: set[asyncio.Future[Any]] = {answer, life.lost}
        await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Unavailable("its process died" if life.lost.done() else f"its process gave no answer within {timeout:g} s")
        life.connection.on_frame = self._on_frame
        return answer.result()

    # What the subclass knows

    exits: Mapping[int, str] = {}
    """What exit codes of its own mean."""

    @abstractmethod
    def _stop_running(self) -> None:
        """Have what runs end early, as far as it can."""

    @abstractmethod
    def _learn(self, life: Life, frame: Frame, body: Buffer) -> None:
        """Take what READY tells. Raises WireError."""

    @abstractmethod
    def _on_frame(self, frame: Frame, body: Buffer) -> None:
        """Take any later frame. Raises WireError."""

    @abstractmethod
    def _fail_running(self, error: FairleadError) -> None:
        """The process is gone: all that it was computing ends with `error`."""

    def _not_ready(self) -> FairleadError:
        if self._closing:
            return ShuttingDown(f"model '{self.model}' is unloading")
        return Unavailable(f"model '{self.model}' is being started again")

    # Lives

    async def _start_life(self) -> None:
        """Raises LoadError."""
        life = self._life = Life(self.model, self._lost, self._load.version)
        levels = self._forkserver.levels
        try:
            async with asyncio.timeout(self._load_seconds):
                frame, body = await life.load(self._load, self._forkserver, self._preload, self._slab_bytes)
            if frame.kind is Kind.ERROR:
                raise LoadError(frame.message)
            if self._closing:
                raise LoadError(f"model '{self.model}' was unloaded while it loaded")
            self._learn(life, frame, body)
        except BaseException as error:
            life.kill(self._forkserver)
            self._life = None
            if isinstance(error, TimeoutError):
                raise LoadError(f"model '{self.model}' did not load within {self._load_seconds:g} s") from None
            if isinstance(error, (Unavailable, WireError, OSError)):
                raise LoadError(f"model '{self.model}': its process cannot be started: {error}") from error
            raise
        life.since = time.monotonic()
        life.connection.on_frame = self._on_frame
        if self._forkserver.levels is not levels:  # changed since it was forked
            self.set_levels(self._forkserver.levels)
        self.ready = not life.lost.done()

    def _lost(self, life: Life) -> None:
        if life is self._life and self.ready:
            self.ready = False
            self._on_change()

    async def _keep_alive(self) -> None:
        delay = 0.0
        while (life := self._life) is not None:
            await asyncio.wait({life.lost})  # awaiting it directly would cancel it together with this task
            lived = time.monotonic() - life.since
            life.kill(self._forkserver)  # if it was hung up on, it may live
            code = await life.exit_status()
            status = self.exits.get(code or 0) or describe_exit(code)
            log.error("replica died", model=self.model, pid=life.process.pid if life.process else None, status=status)
            self._fail_running(ReplicaDied(f"model '{self.model}' died ({status}) while computing this request"))
            while not self.ready:
                delay = restart_delay(delay, lived)
                await asyncio.sleep(delay)
                self.restarts += 1
                try:
                    await self._start_life()
                except LoadError as error:
                    lived = 0.0
                    self.down = error.message
                    self._on_change()
                    log.error("replica cannot be started again", model=self.model, reason=error.message, restarts=self.restarts)
            self.down = ""
            log.info("replica started again", model=self.model, pid=self.pid, restarts=self.restarts)
            self._on_change()
