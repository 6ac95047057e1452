"""An execution slot in a process of its own: for code that holds the GIL, may crash, or must give its memory back."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from fairlead.backends.base import Kind as BackendKind
from fairlead.backends.base import RequestContext
from fairlead.core import errors
from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    InvalidRequest,
    LoadError,
    ModelError,
    ReplicaDied,
    ShuttingDown,
    TooLarge,
    Unavailable,
)
from fairlead.core.request import Request
from fairlead.core.specs import ModelSpec, TensorSpec
from fairlead.core.tensors import Tensors
from fairlead.runtime.forkserver import ForkServer, Process
from fairlead.runtime.instances import Done, Stream
from fairlead.runtime.slab import SLAB_BYTES, Slab, create_slab
from fairlead.runtime.wire import Buffer, Connection, Frame, Kind, Load, WireError, pack, unpack

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


class _Life:
    """One life of the process: its socket, its slabs, its end."""

    def __init__(self, model: str, on_lost: Callable[["_Life"], None]) -> None:
        loop = asyncio.get_running_loop()
        self.model = model
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
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: self.connection, sock=ours)
            if slab_bytes and hasattr(os, "memfd_create"):
                descriptors.append(create_slab(slab_bytes, "fairlead requests"))
                descriptors.append(create_slab(slab_bytes, "fairlead responses"))
                self.requests, self.responses = Slab(descriptors[1], writer=True), Slab(descriptors[2], writer=False)
                self.connection.slab = self.requests
            self.process = await forkserver.spawn(descriptors, modules)
        finally:
            for fd in descriptors:
                os.close(fd)
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
        self.lost.set_result(None)
        self._on_lost(self)


class ProcessInstance:
    """Implements `Instance` on a replica process, which it starts again whenever it dies."""

    def __init__(
        self,
        spec: ModelSpec,
        artefact: Path,
        kind: BackendKind,
        threads: int,
        forkserver: ForkServer,
        on_change: Callable[[], None],
        *,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        """`on_change`: called when `ready` or `down` changes after `start`.

        `slab_bytes`: bound of the memory shared with the process, for each direction; 0 sends everything by the socket.
        """
        self.model = spec.name
        self.ready = False
        self.restarts = 0
        """Attempts to start it again after a death."""
        self.down = ""
        self.gather_seconds = 0.0
        self.compute_seconds = 0.0
        self.platform = ""
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.batches = self.streams = False
        self.example: Tensors | None = None
        self._load = Load(spec, str(artefact), kind.name, threads)
        self._preload = kind.preload
        self._forkserver = forkserver
        self._on_change = on_change
        self._slab_bytes = slab_bytes
        self._load_seconds = 0.0
        self._life: _Life | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self._work = 0
        self._done: Done | None = None  # of the running batch
        self._stream: Stream | None = None  # the running stream's consumer
        self._cancelled = False

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        life = self._life
        return life.process.pid if life is not None and life.process is not None and not life.lost.done() else None

    async def start(self, deadline: float = LOAD_SECONDS) -> None:
        """Load in a new process within `deadline` seconds; a restart has as long. Raises LoadError."""
        self._load_seconds = deadline
        await self._start_life()
        self._keeper = asyncio.get_running_loop().create_task(self._keep_alive())

    # Instance

    def run(self, inputs: list[Tensors], outputs: frozenset[str] | None, done: Done, requests: Sequence[Request] = ()) -> None:
        """`requests`: those that `inputs` belong to, for models that look at more than inputs."""
        if not self.ready:
            done(None, self._not_ready())
            return
        started = time.perf_counter()
        self._done = done
        if (error := self._submit(Kind.INFER, inputs, outputs, requests, 0)) is not None:
            self._done = None
            done(None, error)
        self.gather_seconds = time.perf_counter() - started

    def stream(self, request: Request, stream: Stream, credit: int) -> None:
        if not self.ready:
            stream.close(self._not_ready())
            return
        self._stream, self._cancelled = stream, False
        outputs = None if request.outputs is None else frozenset(request.outputs)
        if (error := self._submit(Kind.STREAM, [request.inputs], outputs, (request,), credit)) is not None:
            self._stream = None
            stream.close(error)

    def grant(self, credit: int) -> None:
        if self._stream is not None and self._life is not None:
            self._life.connection.send(Frame(Kind.GRANT, work=self._work, credit=credit, freed=_received(self._life)))

    def cancel(self) -> None:
        if self._stream is not None and self._life is not None and not self._cancelled:
            self._cancelled = True
            self._life.connection.send(Frame(Kind.CANCEL, work=self._work))

    async def close(self) -> None:
        """Let the running batch end, stop the running stream, end the process; kill it where that takes more than CLOSE_SECONDS."""
        self._closing, self.ready = True, False
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if (life := self._life) is not None:
            if life.loaded.done():
                self.cancel()
                life.connection.send(Frame(Kind.CLOSE))
                await asyncio.wait({life.lost}, timeout=CLOSE_SECONDS)
            life.kill(self._forkserver)
            await life.exit_status()
            self._life = None
        self._fail_running(ShuttingDown(f"model '{self.model}' was unloaded before it answered"))

    # To and from the process

    def _submit(
        self, kind: Kind, inputs: list[Tensors], outputs: frozenset[str] | None, requests: Sequence[Request], credit: int
    ) -> FairleadError | None:
        life = self._life
        assert life is not None
        self._work += 1
        frame = Frame(kind, work=self._work, freed=_received(life), credit=credit)
        if outputs is not None:
            frame.outputs = list(outputs)
        if any(request.id or request.trace or request.parameters for request in requests):
            frame.requests = [RequestContext(r.id, r.trace, r.parameters, r.num_rows) for r in requests]
        try:
            frame.tensors, body = pack(inputs, life.requests)
            life.connection.send(frame, body)
        except WireError as error:
            return TooLarge(f"request for model '{self.model}': {error}")
        except (TypeError, ValueError, OverflowError) as error:
            return InvalidRequest(f"request cannot be passed to model '{self.model}': {error}")
        return None

    def _on_frame(self, frame: Frame, body: Buffer) -> None:
        life, done, stream = self._life, self._done, self._stream
        assert life is not None
        if frame.work != self._work or (done is None and stream is None):
            raise WireError(f"{frame.kind.name} for {frame.work}, which does not run")
        if frame.kind is Kind.RESPONSE:
            outputs = unpack(frame.tensors, body, life.responses, copy=True)
            if done is not None:
                self._done = None
                self.compute_seconds = frame.seconds
                done(outputs, None)
            elif stream is not None and not self._cancelled:
                stream.respond(outputs)
        elif frame.kind is Kind.ERROR:
            kind = getattr(errors, frame.error, None)
            self._fail_running((kind if isinstance(kind, type) and issubclass(kind, FairleadError) else ModelError)(frame.message))
        elif frame.kind is Kind.END and stream is not None:
            self._stream = None
            stream.close(Cancelled("request was cancelled") if self._cancelled else None)
        else:
            raise WireError(f"unexpected {frame.kind.name}")

    def _fail_running(self, error: FairleadError) -> None:
        done, stream = self._done, self._stream
        self._done = self._stream = None
        if done is not None:
            done(None, error)
        if stream is not None:
            stream.close(Cancelled("request was cancelled") if self._cancelled else error)

    def _not_ready(self) -> FairleadError:
        if self._closing:
            return ShuttingDown(f"model '{self.model}' is unloading")
        return Unavailable(f"model '{self.model}' is being started again")

    # Lives

    async def _start_life(self) -> None:
        """Raises LoadError."""
        life = self._life = _Life(self.model, self._lost)
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
        self.ready = not life.lost.done()

    def _learn(self, life: _Life, frame: Frame, body: Buffer) -> None:
        ready = frame.ready
        if ready is None:
            raise WireError("READY without what is ready")
        self.platform, self.batches, self.streams = ready.platform, ready.batches, ready.streams
        self.inputs, self.outputs = ready.inputs, ready.outputs
        example = unpack(frame.tensors, body, life.responses, copy=True)
        self.example = example if ready.has_example else None

    def _lost(self, life: _Life) -> None:
        if life is self._life and self.ready:
            self.ready = False
            self._on_change()

    async def _keep_alive(self) -> None:
        delay = 0.0
        while (life := self._life) is not None:
            await asyncio.wait({life.lost})  # awaiting it directly would cancel it together with this task
            lived = time.monotonic() - life.since
            life.kill(self._forkserver)  # if it was hung up on, it may live
            status = describe_exit(await life.exit_status())
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


def _received(life: _Life) -> int:
    return life.responses.received if life.responses is not None else 0
