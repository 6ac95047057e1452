"""A replica process: one instance of one model behind one socket."""

import asyncio
import inspect
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog
import uvloop
from threadpoolctl import threadpool_limits

from fairlead.backends import import_backend
from fairlead.backends.base import Backend, Executable, requests
from fairlead.core.errors import Cancelled, FairleadError, ModelError
from fairlead.core.tensors import Tensors
from fairlead.observe.logs import journal
from fairlead.observe.nvtx import ranged
from fairlead.runtime.engine_replica import load_engine, serve_engine
from fairlead.runtime.profiling import SelfPortrait
from fairlead.runtime.slab import Slab
from fairlead.runtime.wire import (
    MAX_MESSAGE_CHARS,
    Buffer,
    Connection,
    Frame,
    Kind,
    Load,
    Ready,
    Receiver,
    WireError,
    encode_frame,
    name_of,
    pack,
    unpack,
)

log = structlog.get_logger("fairlead.replica")

END_SECONDS = 5.0
"""How long a running computation may take to notice that it is no longer wanted."""
T = TypeVar("T")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def serve(descriptors: Sequence[int]) -> int:
    """Load what the first frame says, then answer until the gateway is done with us. Returns the exit code.

    `descriptors`: the socket and, on the gateway's host, the slabs of requests and of responses.
    """
    sock = socket.socket(fileno=descriptors[0])
    sock.setblocking(True)
    inputs = outputs = None
    if len(descriptors) == 3:
        inputs, outputs = Slab(descriptors[1], writer=False), Slab(descriptors[2], writer=True)
        for fd in descriptors[1:]:
            os.close(fd)
    load = _first_frame(sock)
    if load is None:
        return 0
    # No event loop yet: loading may run one of its own, for the dry run of a coroutine
    if load.backend.engine:
        engine = _load(load, sock, load_engine)
        return 1 if engine is None else serve_engine(load, engine, sock)
    executable = _load(load, sock, lambda load: _load_executable(load, outputs))
    if executable is None:
        return 1
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(Replica(load.spec.name, executable, inputs, outputs).run(sock))
    finally:
        executable.close()
    return 0


def _first_frame(sock: socket.socket) -> Load | None:
    receiver = Receiver()
    while num := sock.recv_into(receiver.buffer()):
        for frame, _ in receiver.received(num):
            if frame.load is None:
                raise WireError(f"expected LOAD, got {frame.kind.name}")
            return frame.load
    return None


def _load(load: Load, sock: socket.socket, load_it: Callable[[Load], tuple[T, Frame, list[Buffer]]]) -> T | None:
    """Load and say so, or say why not. `load_it` gives what was loaded, and the READY that tells of it."""
    name = load.spec.name
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"fl {name}"[:15])
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(load.threads)
    threadpool_limits(load.threads)
    np.random.seed()  # not the fork server's, which its siblings have too
    body: list[Buffer] = []
    loaded: T | None = None
    try:
        loaded, answer, body = load_it(load)
        threadpool_limits(load.threads)  # the libraries that came with the model
    except FairleadError as error:
        answer = Frame(Kind.ERROR, error="LoadError", message=error.message)
    except Exception as error:
        log.exception("model failed to load", model=name)
        answer = Frame(Kind.ERROR, error="LoadError", message=f"model '{name}' failed to load: {_describe(error)}")
    sock.sendall(b"".join(encode_frame(answer, body)))
    return loaded


def _load_executable(load: Load, slab: Slab | None) -> tuple[Executable, Frame, list[Buffer]]:
    backend = import_backend(load.backend)
    assert isinstance(backend, Backend)
    executable = backend.load(Path(load.artefact), load.spec, load.threads)
    example = executable.example
    tensors, body = pack([example], slab) if example is not None else ([], [])
    told = Ready(
        platform=executable.platform,
        inputs=executable.inputs,
        outputs=executable.outputs,
        batches=executable.batches,
        streams=executable.streams,
        has_example=example is not None,
    )
    return executable, Frame(Kind.READY, tensors=tensors, ready=told), body


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + " ..."


class Replica:
    """Runs one batch or one stream at a time. What it receives is valid until it answered."""

    def __init__(self, name: str, executable: Executable, inputs: Slab | None, outputs: Slab | None) -> None:
        self.name = name
        self.executable = executable
        self._inputs = inputs
        self._outputs = outputs
        self._task: asyncio.Task[None] | None = None
        self._credit = 0
        self._credit_given = asyncio.Event()
        self._cancelled = False
        self._closing = False
        self._ended = asyncio.Event()
        self._connection = Connection("gateway", self._on_frame, self._ended.set)
        self._connection.slab = outputs
        self._portrait = SelfPortrait(lambda work: work(), lambda found: self._connection.send(Frame(Kind.PROFILED, profile=found)))

    async def run(self, sock: socket.socket) -> None:
        """Until the gateway says CLOSE or is gone."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self._connection, sock=sock)
        await self._ended.wait()
        self._portrait.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=END_SECONDS)

    def _on_frame(self, frame: Frame, body: Buffer) -> None:
        match frame.kind:
            case Kind.INFER:
                self._infer(frame, self._receive(frame, body))
            case Kind.STREAM:
                self._credit, self._cancelled = frame.credit, False
                stream = self._stream(frame, self._receive(frame, body))
                self._start(frame.work, stream, lambda _: self._connection.send(Frame(Kind.END, work=frame.work, freed=self._freed())))
            case Kind.GRANT:
                self._credit += frame.credit
                self._credit_given.set()
            case Kind.CANCEL:
                if self._task is not None:
                    self._cancelled = True
                    self._task.cancel()
            case Kind.PROFILE if frame.order is not None:
                self._portrait.begin(frame.order)
            case Kind.LEVELS:
                journal().set_levels(frame.levels)
            case Kind.CLOSE:
                self._closing = True
                if self._task is None:
                    self._ended.set()
            case _:
                raise WireError(f"unexpected {frame.kind.name}")

    def _receive(self, frame: Frame, body: Buffer) -> Tensors:
        if self._task is not None:
            raise WireError(f"{frame.kind.name} {frame.work} while another runs")
        requests.set(tuple(frame.requests))
        return unpack(frame.tensors, body, self._inputs, copy=False)

    def _start(self, work: int, computation: Coroutine[Any, Any, Any], answer: Callable[[Any], None]) -> None:
        self._task = asyncio.get_running_loop().create_task(computation)
        self._task.add_done_callback(lambda task: self._finish(work, task, answer))

    def _finish(self, work: int, task: asyncio.Task[Any], answer: Callable[[Any], None]) -> None:
        self._task = None
        try:
            if task.cancelled():  # possibly before its first line ran
                raise Cancelled("request was cancelled")
            answer(task.result())
        except (Exception, SystemExit) as error:
            self._fail(work, error)
        if self._closing:
            self._ended.set()

    @ranged("batch")
    def _infer(self, frame: Frame, inputs: Tensors) -> None:
        outputs = None if frame.outputs is None else frozenset(frame.outputs)
        started = time.perf_counter()

        def answer(result: Any) -> None:
            self._respond(frame.work, result, outputs, time.perf_counter() - started, last=True)

        try:
            result = self.executable.infer(inputs, outputs)
            if inspect.isawaitable(result):
                self._start(frame.work, self._wait(result), answer)
            else:
                answer(result)
        except (Exception, SystemExit) as error:
            self._fail(frame.work, error)

    async def _wait(self, result: Awaitable[Any]) -> Any:
        try:
            return await result
        except SystemExit as error:  # would end the loop
            raise ModelError(f"model '{self.name}' failed: {_describe(error)}") from None

    async def _stream(self, frame: Frame, inputs: Tensors) -> None:
        outputs = None if frame.outputs is None else frozenset(frame.outputs)
        try:
            await self._have_credit()
            async with aclosing(_responses(self.executable.infer(inputs, outputs))) as responses:
                async for tensors in responses:
                    if self._cancelled:  # a model that went on regardless
                        raise Cancelled("request was cancelled")
                    self._credit -= 1
                    self._respond(frame.work, tensors, outputs)
                    await self._have_credit()
        except SystemExit as error:  # would end the loop
            raise ModelError(f"model '{self.name}' failed: {_describe(error)}") from None

    async def _have_credit(self) -> None:
        await asyncio.sleep(0)  # a generator that never waits would keep CANCEL and GRANT from being read
        while self._credit <= 0:
            self._credit_given.clear()
            await self._credit_given.wait()

    # Answers

    def _respond(self, work: int, result: Any, outputs: frozenset[str] | None, seconds: float = 0.0, *, last: bool = False) -> None:
        if not isinstance(result, dict):
            raise ModelError(f"model '{self.name}' answered with {type(result).__name__} where a dict of arrays was expected")
        if outputs is not None:
            result = {name: array for name, array in result.items() if name in outputs}
        tensors, body = pack([result], self._outputs)
        frame = Frame(Kind.RESPONSE, work=work, tensors=tensors, freed=self._freed() if last else 0, seconds=seconds)
        try:
            self._connection.send(frame, body)
        except WireError as error:
            raise ModelError(f"model '{self.name}' gave an answer that is too large: {error}") from None

    def _fail(self, work: int, error: BaseException) -> None:
        if not isinstance(error, FairleadError):
            log.error("model failed", model=self.name, exc_info=error)
            error = ModelError(f"model '{self.name}' failed: {_describe(error)}")
        message = error.message[:MAX_MESSAGE_CHARS]
        self._connection.send(Frame(Kind.ERROR, work=work, error=name_of(error), message=message, freed=self._freed()))

    def _freed(self) -> int:
        return self._inputs.received if self._inputs is not None else 0


async def _responses(result: Any) -> AsyncGenerator[Tensors, None]:
    """Whatever form `Executable.infer` has, as one async generator; closing it closes what is underneath."""
    if inspect.isawaitable(result):
        result = await result
    if isinstance(result, dict):
        yield result
    elif hasattr(result, "__aiter__"):
        try:
            async for tensors in result:
                yield tensors
        finally:
            if hasattr(result, "aclose"):
                await result.aclose()
    else:
        try:
            for tensors in result:
                yield tensors
        finally:
            if hasattr(result, "close"):
                result.close()
