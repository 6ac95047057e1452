"""Work that would hold up the event loop, done elsewhere.

Parsing JSON holds the GIL, so large JSON goes to another process; zlib and copying give it up, so they go to threads.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from fairlead.api.status import INTERNAL
from fairlead.core.errors import FairleadError, Unavailable

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Offload:
    """A bounded number of pieces of work in flight; processes and threads start when first needed.

    `done(result, error)` is called from the event loop, exactly once unless `close` comes first.
    """

    def __init__(self, *, num_processes: int = 1, num_threads: int = 2, max_in_flight: int = 32) -> None:
        self.max_in_flight = max_in_flight
        self.num_in_flight = 0
        self.num_broken = 0
        """Processes that died and were replaced."""
        self._num_processes = num_processes
        self._num_threads = num_threads
        self._processes: ProcessPoolExecutor | None = None
        self._threads: ThreadPoolExecutor | None = None

    def in_process(self, done: Callable[[T | None, FairleadError | None], None], function: Callable[..., T], *args: Any) -> None:
        """Raises Unavailable when too much is in flight. Arguments and result are pickled."""
        if self._processes is None:
            # a fork of a process with threads may deadlock
            context = multiprocessing.get_context("spawn")
            self._processes = ProcessPoolExecutor(self._num_processes, mp_context=context, initializer=_start_process)
        try:
            self._start(self._processes, done, function, args)
        except BrokenExecutor:
            self._replace(self._processes)
            raise _broken() from None

    def in_thread(self, done: Callable[[T | None, FairleadError | None], None], function: Callable[..., T], *args: Any) -> None:
        """Raises Unavailable when too much is in flight."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="offload")
        self._start(self._threads, done, function, args)

    def close(self) -> None:
        for executor in (self._processes, self._threads):
            if executor is not None:
                executor.shutdown(wait=False, cancel_futures=True)
        self._processes = self._threads = None

    def _start(self, executor: Executor, done: Callable[..., None], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self.num_in_flight >= self.max_in_flight:
            raise Unavailable(f"{self.max_in_flight} large bodies are being converted already")
        loop = asyncio.get_running_loop()

        def finished(future: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, future)

        def settle(future: Future[Any]) -> None:
            self.num_in_flight -= 1
            if future.cancelled():
                done(None, Unavailable("the server is stopping"))
                return
            error = future.exception()
            if error is None:
                done(future.result(), None)
            elif isinstance(error, FairleadError):
                done(None, error)
            elif isinstance(error, BrokenExecutor):
                self._replace(executor)
                done(None, _broken())
            else:
                log.error("offload_failed", exc_info=error)
                done(None, INTERNAL)

        executor.submit(function, *args).add_done_callback(finished)
        self.num_in_flight += 1

    def _replace(self, broken: Executor) -> None:
        # everything that was in flight reports the same death
        if broken is self._processes:
            self._processes = None
            self.num_broken += 1
            log.warning("json_process_died", num_broken=self.num_broken)
            broken.shutdown(wait=False)


def _broken() -> Unavailable:
    return Unavailable("the process for large JSON ended unexpectedly; a new one starts")


def _start_process() -> None:
    """Runs in the new process: leave Ctrl-C to the server, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
