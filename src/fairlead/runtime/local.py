"""An execution slot in this process: for libraries that release the GIL while they compute.

A batch that computes faster than a thread wakes up is computed in the event loop itself. At 64 connections
that halves the cost of a small tree model; for a larger model it would freeze everyone else, so what was
measured of the model decides (`execution: auto`), and the declared `execution: inline|thread` overrules.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np
import structlog

from fairlead.backends import Executable
from fairlead.core.errors import FairleadError, LoadError, ModelError, Unsupported
from fairlead.core.request import Request
from fairlead.core.specs import Execution
from fairlead.core.tensors import Tensors
from fairlead.runtime.instances import Done, Stream

log = structlog.get_logger("fairlead.runtime")

INLINE_BELOW = 0.001
"""Seconds: a model whose batches take less computes in the event loop (`execution: auto`)."""
THREAD_ABOVE = 0.002
"""Seconds: one whose batches take more moves to a thread. Between the two it stays where it is."""
SMOOTHING = 0.1

_Job = tuple[list[Tensors], frozenset[str] | None, Done]


def gather(inputs: list[Tensors]) -> Tensors:
    """The rows of all requests under one another."""
    first = inputs[0]
    if len(inputs) == 1:
        return first
    return {name: np.concatenate([each[name] for each in inputs]) for name in first}


def choose_inline(inline: bool, seconds: float) -> bool:
    """Where the next batch computes, given where the last did and the smoothed batch time."""
    return seconds < (THREAD_ABOVE if inline else INLINE_BELOW)


class LocalInstance:
    """Implements `Instance` on an Executable of its own (or a shareable one)."""

    ready = True
    down = ""
    restarts = 0

    def __init__(self, executable: Executable, model: str, execution: Execution) -> None:
        if executable.streams or inspect.iscoroutinefunction(executable.infer):
            raise LoadError(f"model '{model}' is asynchronous or streams: it needs `isolation: process`")
        self.executable = executable
        self.model = model
        self.gather_seconds = 0.0
        self.compute_seconds = 0.0
        self.smoothed_seconds = 0.0
        self._auto = execution is Execution.AUTO
        self.inline = execution is Execution.INLINE
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # holds one job at most: an instance runs one batch at a time
        self._thread: threading.Thread | None = None

    def run(self, inputs: list[Tensors], outputs: frozenset[str] | None, done: Done, requests: Sequence[Request]) -> None:
        if self.inline:
            result, error = self._compute(inputs, outputs)
            self._measured()
            done(result, error)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"fairlead-{self.model}", daemon=True)
            self._thread.start()
        self._jobs.put((inputs, outputs, done))

    def stream(self, request: Request, stream: Stream, credit: int) -> None:
        stream.close(Unsupported(f"model '{self.model}' does not stream"))

    def grant(self, credit: int) -> None:
        """Nothing streams here."""

    def cancel(self) -> None:
        """Nothing streams here."""

    async def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join, 30.0)
        self.executable.close()

    def _measured(self) -> None:
        seconds = self.compute_seconds
        self.smoothed_seconds += (seconds - self.smoothed_seconds) * (SMOOTHING if self.smoothed_seconds else 1.0)
        if self._auto:
            self.inline = choose_inline(self.inline, self.smoothed_seconds)

    def _compute(self, inputs: list[Tensors], outputs: frozenset[str] | None) -> tuple[Tensors | None, FairleadError | None]:
        started = time.perf_counter()
        try:
            batch = gather(inputs)
            self.gather_seconds = (computing := time.perf_counter()) - started
            result = self.executable.infer(batch, outputs)
            self.compute_seconds = time.perf_counter() - computing
        except FairleadError as error:
            return None, error
        except Exception as error:
            log.exception("model failed", model=self.model)
            return None, ModelError(f"model '{self.model}' failed: {type(error).__name__}: {error}")
        return result, None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            inputs, outputs, done = job
            result, error = self._compute(inputs, outputs)
            try:
                self._loop.call_soon_threadsafe(self._finish, done, result, error)
            except RuntimeError:  # the loop has ended: nobody is waiting
                return
            del job, inputs, outputs, done, result

    def _finish(self, done: Done, result: Tensors | None, error: FairleadError | None) -> None:
        self._measured()
        done(result, error)
