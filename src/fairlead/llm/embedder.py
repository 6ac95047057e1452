"""The embedding engine: texts that wait are computed together, within a token budget."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import structlog

from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, QueueFull, TimeoutExpired
from fairlead.core.generation import Delta, EngineStats, Phase, Usage
from fairlead.observe.metrics import Histogram
from fairlead.observe.nvtx import ranged
from fairlead.observe.table import SECONDS

log = structlog.get_logger("fairlead.llm")

Answer = tuple[int, Delta | FairleadError]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts as one row of tokens, for a model that scores."""

    ids: list[int]
    types: list[int]
    """0 for the tokens of the first text, 1 for those of the second, where the tokenizer tells them apart."""
    raw: bool
    """The score before the model's activation."""

    def __len__(self) -> int:
        return len(self.ids)


class Computes(Protocol):
    """What makes vectors of texts: a PoolingModel of token ids, a ScoringModel of Pairs."""

    dimensions: int

    def check(self, text: Any, /) -> None:
        """Raises InvalidRequest."""

    def embed(self, texts: Any, /) -> np.ndarray:
        """[len(texts), dimensions]."""


class _Waiting:
    __slots__ = ("arrived", "deadline", "dimensions", "id", "ids", "priority")

    def __init__(self, id: int, ids: list[int] | Pair, dimensions: int | None, arrived: float, priority: int, deadline: float) -> None:
        self.id = id
        self.ids = ids
        self.dimensions = dimensions
        self.arrived = arrived
        self.priority = priority
        self.deadline = deadline


class EmbeddingEngine:
    """Same surface as the generating engine: `add`, `abort`, `step`. Not thread-safe: one caller at a time.

    A model that scores takes pairs in place of texts.
    """

    def __init__(
        self,
        model: Computes,
        *,
        max_batch_tokens: int,
        max_waiting: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.max_batch_tokens = max_batch_tokens
        self.max_waiting = max_waiting
        self.clock = clock
        self.recovering = False
        self._waiting: deque[_Waiting] = deque()
        self._num_tokens = self._num_steps = self._num_failed_steps = self._num_quarantined = 0
        self._finished: Counter[str] = Counter()
        self._queue_time, self._step_time = Histogram(SECONDS), Histogram(SECONDS)

    def add(
        self,
        id: int,
        ids: list[int] | Pair,
        dimensions: int | None,
        *,
        arrived: float | None = None,
        priority: int = 0,
        deadline: float = 0.0,
    ) -> None:
        """Queue one text. `arrived`, `deadline`: on the engine's clock; 0 is no deadline. `priority`: smaller goes first.

        Raises InvalidRequest, or QueueFull.
        """
        size = self.model.dimensions
        if dimensions is not None and dimensions > size:
            raise InvalidRequest(f"`dimensions` must be at most {size}, the length of this model's vectors, not {dimensions}")
        self.model.check(ids)
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests are waiting already")
        now = self.clock() if arrived is None else arrived
        self._waiting.append(_Waiting(id, ids, dimensions, now, priority, deadline or float("inf")))

    def abort(self, id: int) -> None:
        for waiting in self._waiting:
            if waiting.id == id:
                self._waiting.remove(waiting)
                self._finished["abort"] += 1
                return

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def step(self) -> list[Answer]:
        """Compute the texts that come first, as many as the budget holds."""
        now = self.clock()
        answers: list[Answer] = []
        batch: list[_Waiting] = []
        tokens = 0
        left: deque[_Waiting] = deque()
        for waiting in sorted(self._waiting, key=lambda w: (w.priority, w.arrived)):
            if waiting.deadline <= now:
                answers.append((waiting.id, TimeoutExpired("Request timeout expired")))
                self._finished["error"] += 1
            elif not left and (not batch or tokens + len(waiting.ids) <= self.max_batch_tokens):
                batch.append(waiting)
                tokens += len(waiting.ids)
            else:
                left.append(waiting)
        self._waiting = left
        if batch:
            for waiting in batch:
                self._queue_time.observe(now - waiting.arrived)
            self._compute(batch, now, answers)
            self._num_steps += 1
            self._step_time.observe(self.clock() - now)
        return answers

    @ranged("embed")
    def _compute(self, batch: list[_Waiting], began: float, answers: list[Answer]) -> None:
        """A batch that fails is tried again in halves, down to the one that cannot be computed."""
        try:
            vectors = self.model.embed([waiting.ids for waiting in batch])
            if not np.isfinite(vectors).all():
                raise ValueError("the vector holds values that are not finite")
        except Exception as error:
            self._num_failed_steps += 1
            log.error("step failed", sequences=len(batch), exc_info=error)
            if len(batch) > 1:
                half = len(batch) // 2
                self._compute(batch[:half], began, answers)
                self._compute(batch[half:], began, answers)
                return
            self._num_quarantined += 1
            self._finished["error"] += 1
            answers.append((batch[0].id, ModelError(f"the model failed on this request: {type(error).__name__}: {error}")))
            return
        seconds = self.clock() - began
        for waiting, vector in zip(batch, vectors, strict=True):
            if waiting.dimensions is not None:
                vector = vector[: waiting.dimensions]
                vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
            self._num_tokens += len(waiting.ids)
            self._finished["stop"] += 1
            data = vector.astype("<f4").tobytes()
            num_tokens, waited = len(waiting.ids), began - waiting.arrived
            phases = [Phase("waiting", 0.0, waited), Phase("prefill", waited, seconds, 1, num_tokens, len(batch), seconds)]
            usage = Usage(prompt_tokens=num_tokens)
            answers.append((waiting.id, Delta(vector=data, finish_reason="stop", usage=usage, phases=phases)))

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=len(self._waiting),
            num_prompt_tokens=self._num_tokens,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            num_quarantined=self._num_quarantined,
            finished=dict(self._finished),
            queue_time=(list(self._queue_time.counts), self._queue_time.sum),
            step_time=(list(self._step_time.counts), self._step_time.sum),
        )
