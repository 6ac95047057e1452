"""An engine's threads: requests are read in one, so that a long text or a large picture holds up no step, and wait for the other,
which computes the steps, to take them. What may take long to read has a thread of its own, so that it holds up no other request."""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypedDict

import structlog

from fairlead.backends.base import Deliver
from fairlead.core.errors import FairleadError, InvalidRequest, QueueFull, ShuttingDown, TimeoutExpired, Unsupported
from fairlead.core.generation import Delta, EngineInfo, EngineStats, Prompt
from fairlead.core.specs import ModelSpec

log = structlog.get_logger("fairlead.engine")

Answer = tuple[int, Delta | FairleadError]

NO_LIGHT_SLEEP = "this engine has no KV memory to give back"
MAX_SLOW = 64
"""Requests that may wait for the thread of those that take long to read."""


class When(TypedDict):
    """As `backends.base.Engine.submit` takes it."""

    priority: int
    arrived: float
    deadline: float


class Steps(Protocol):
    """What computes: driven by one caller at a time."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def step(self) -> list[Answer]: ...

    def abort(self, id: int, /) -> None: ...

    def stats(self) -> EngineStats: ...


class EngineThread(ABC):
    """Implements `backends.base.Engine` over something that computes step by step."""

    def __init__(self, steps: Steps, info: EngineInfo) -> None:
        self.steps = steps
        self.info = info
        self._prompts: SimpleQueue[tuple[int, Prompt, When] | None] = SimpleQueue()
        self._slow_prompts: SimpleQueue[tuple[int, Prompt, When] | None] = SimpleQueue()
        self._inbox: deque[Callable[[], None]] = deque()
        self._woken = threading.Event()
        self._closing = False
        self._step_started = 0.0
        self._answers: list[Answer] = []  # without a step: of the engine's thread alone
        self._live: set[int] = set()
        """Works from their submission to their end; every thread looks and discards, none but the event loop's adds."""

    @abstractmethod
    def read(self, prompt: Prompt) -> Any:
        """In a reader's thread: the prompt in the form that `add` takes, or a Delta that answers it without a step.
        Raises FairleadError."""

    def takes_long(self, prompt: Prompt) -> bool:
        """In the event loop: whether `read` may take more than a few milliseconds beside what the prompt's length takes."""
        return False

    @abstractmethod
    def add(self, work: int, read: Any, when: When) -> None:
        """In the engine's thread: queue what `read` gave. Raises FairleadError."""

    # From the event loop

    def submit(self, work: int, prompt: Prompt, *, priority: int, arrived: float, deadline: float) -> None:
        self._live.add(work)
        when: When = {"priority": priority, "arrived": arrived, "deadline": deadline}
        if not self.takes_long(prompt):
            self._prompts.put((work, prompt, when))
        elif self._slow_prompts.qsize() < MAX_SLOW:
            self._slow_prompts.put((work, prompt, when))
        else:
            full = QueueFull(f"{MAX_SLOW} requests wait to be read, and no more may")
            self.between_steps(partial(self._take, work, full, when))

    def cancel(self, work: int) -> None:
        self._live.discard(work)
        self.between_steps(partial(self.steps.abort, work))

    def close(self) -> None:
        self._closing = True
        self.notify()

    def notify(self) -> None:
        """There may be work again. From any thread."""
        self._woken.set()

    def stats(self) -> EngineStats:
        return self.steps.stats()

    def step_seconds(self) -> float:
        started = self._step_started
        return time.perf_counter() - started if started else 0.0

    def between_steps(self, work: Callable[[], None]) -> None:
        self._inbox.append(work)
        self.notify()

    # In the engine's thread

    def sleep(self) -> None:
        raise Unsupported(NO_LIGHT_SLEEP)

    def wake(self) -> None:
        raise Unsupported(NO_LIGHT_SLEEP)

    def run(self, deliver: Deliver) -> None:
        self._deliver = deliver
        queues = (self._prompts, self._slow_prompts)
        for queue, name in zip(queues, ("reader", "slow reader"), strict=True):
            threading.Thread(target=self._read_all, args=(queue,), name=name, daemon=True).start()
        try:
            self._compute()
        finally:
            for queue in queues:
                queue.put(None)
        deliver([(work, ShuttingDown("the model was unloaded before it answered")) for work in list(self._live)])

    def _compute(self) -> None:
        while True:
            self._woken.clear()
            self._obey()
            if self.steps.has_work and not self._closing:
                self._step_started = time.perf_counter()
                self._answers += self.steps.step()
                self._step_started = 0.0
            self._hand_over()
            if self._closing:
                return
            if not self.steps.has_work and not self._inbox:
                self._woken.wait()

    def _hand_over(self) -> None:
        answers = [answer for answer in self._answers if answer[0] in self._live]  # not cancelled during the step
        self._answers = []
        for work, answer in answers:
            if isinstance(answer, FairleadError) or answer.usage is not None:
                self._live.discard(work)
        if answers:
            self._deliver(answers)

    def breathe(self, answers: list[Answer]) -> bool:
        """Within a long step, from the engine's thread: hand over what there is, and heed what was asked meanwhile. Returns whether the
        engine is being closed."""
        self._step_started = time.perf_counter()
        self._obey()
        self._answers += answers
        self._hand_over()
        return self._closing

    def _obey(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _take(self, work: int, read: Any, when: When) -> None:
        """Queue a request, or pass on an answer that needs no step."""
        if work not in self._live:  # cancelled while it was read
            return
        if isinstance(read, (Delta, FairleadError)):
            self._answers.append((work, read))
            return
        try:
            self.add(work, read, when)
        except Exception as error:
            self._answers.append((work, _refusal(error)))

    # In the readers' threads

    def _read_all(self, prompts: "SimpleQueue[tuple[int, Prompt, When] | None]") -> None:
        while (asked := prompts.get()) is not None:
            work, prompt, when = asked
            if work not in self._live or self._closing:
                continue
            try:
                if 0 < when["deadline"] < time.perf_counter():
                    raise TimeoutExpired("Request timeout expired")
                read = self.read(prompt)
            except Exception as error:
                read = _refusal(error)
            self.between_steps(partial(self._take, work, read, when))
            del read  # what it holds (an adapter, say) is let go when the request ends, not when the next one comes


def model_at(spec: ModelSpec, version: str) -> str:
    """As files name it: `digits@3`."""
    return f"{spec.name}@{version}" if version else spec.name


def _refusal(error: Exception) -> FairleadError:
    """What the caller is told of a prompt that could not be taken."""
    if isinstance(error, FairleadError):
        return error.with_traceback(None)  # whose frames hold what was read
    log.error("request failed before it was queued", exc_info=error)
    return InvalidRequest(f"the prompt cannot be read: {type(error).__name__}: {error}")
