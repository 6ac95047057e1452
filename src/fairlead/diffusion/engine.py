"""The engine of pictures: requests in, what became of them out, one `step` at a time.

admit → encode → pick → denoise → step → decode. It has no clock of its own, and no thread but the decoder's, so that a test drives it
step by step; `fairlead.backends.diffusion` gives it a thread.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import count

import structlog
import torch
from msgspec import structs

from fairlead.core.errors import Cancelled, FairleadError, ModelError, TimeoutExpired
from fairlead.core.generation import Delta, EngineStats, Paint, Phase, Progress, Usage
from fairlead.core.pictures import num_computed, preview, seed_of
from fairlead.diffusion.decoder import Decoder
from fairlead.diffusion.family import Family, Inputs, State
from fairlead.diffusion.scheduler import Row, Scheduler
from fairlead.observe.metrics import Histogram
from fairlead.observe.nvtx import ranged
from fairlead.observe.table import SECONDS

log = structlog.get_logger("fairlead.diffusion")

MAX_FAILURES = 16
"""Failed steps with no good one between them after which the engine gives itself up: it is not the requests' fault."""
TOKEN_SIZE = 16
"""Pixels a side of a latent token, as most pipelines have it: an estimate, until a picture is encoded."""

Answer = tuple[int, Delta | FairleadError]


class EngineBroken(Exception):
    """Step after step failed, whatever was computed."""


class _Picture:
    """One of the n that a request asked for."""

    __slots__ = ("index", "num_counted", "row", "seconds", "state", "work")

    def __init__(self, work: "_Work", index: int, row: Row) -> None:
        self.work = work
        self.index = index
        self.row = row
        self.state: State | None = None
        """From its admission on."""
        self.num_counted = 0
        """Steps that are in the books."""
        self.seconds = 0.0
        """Its share of the time that was computed."""


class _Work:
    """One request."""

    __slots__ = (
        "arrived", "began", "denoised", "encoded", "id", "inputs", "max_pictures", "num_left", "num_steps", "paint", "pictures", "pixels",
        "slowest", "started",
    )  # fmt: skip

    def __init__(self, id: int, paint: Paint, inputs: Inputs | None, arrived: float) -> None:
        self.id = id
        self.paint = paint
        self.inputs = inputs
        self.pictures: list[_Picture] = []
        self.num_left = paint.n
        self.num_steps = 0
        self.pixels = 0
        self.started = False
        self.arrived = arrived
        self.began = self.encoded = self.denoised = 0.0
        """When its first picture began, when the first one's prompt was encoded, and when the last one's last step was computed."""
        self.max_pictures = 0
        """The most that shared one of its steps."""
        self.slowest = 0.0
        """Seconds of its slowest step."""

    def phases(self, now: float) -> list[Phase]:
        return [
            Phase("waiting", 0.0, self.began - self.arrived),
            Phase("encode", self.began - self.arrived, self.encoded - self.began),
            Phase(
                "denoise",
                self.encoded - self.arrived,
                self.denoised - self.encoded,
                self.num_steps,
                max_seqs=self.max_pictures,
                slowest=self.slowest,
            ),
            Phase("decode", self.denoised - self.arrived, now - self.denoised),
        ]

    def usage(self) -> Usage:
        seconds = sum(picture.seconds for picture in self.pictures)
        return Usage(megapixels=self.pixels / 1e6, num_pictures=self.paint.n, num_steps=self.num_steps, compute_seconds=seconds)


class DiffusionEngine:
    """Denoising steps of many pictures, batched. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        family: Family,
        scheduler: Scheduler,
        decoder: Decoder,
        *,
        clock: Callable[[], float] = time.perf_counter,
        breathe: Callable[[list[Answer]], bool] | None = None,
    ) -> None:
        """`breathe`: hands over what there is within a step that computes many, obeys what was asked meanwhile, and tells whether to
        stop."""
        self.family = family
        self.scheduler = scheduler
        self.decoder = decoder
        self.clock = clock
        self.breathe = breathe
        self._works: dict[int, _Work] = {}
        self._pictures: dict[int, _Picture] = {}  # by row
        self._ids = count()
        self._suspects: deque[set[Row]] = deque()
        """While not empty: groups of pictures of a step that failed, tried one group after another."""
        self._failures = 0
        self._fence: torch.cuda.Event | None = None
        self._stats = EngineStats()
        self._finished: Counter[str] = Counter()
        self._queue_time, self._step_time = Histogram(SECONDS), Histogram(SECONDS)

    # Requests

    def add(
        self,
        id: int,
        paint: Paint,
        inputs: Inputs | None = None,
        *,
        priority: int = 0,
        arrived: float | None = None,
        deadline: float = 0.0,
    ) -> None:
        """Queue a request that was held against `family.info` and has a seed. Its answer comes out of `step` as Deltas under `id`,
        the last with `usage`, or as one error. `arrived`, `deadline`: on the engine's clock; 0 is no deadline. `priority`: smaller
        goes first. Raises QueueFull."""
        assert paint.width is not None and paint.height is not None and paint.guidance is not None
        arrived = self.clock() if arrived is None else arrived
        work = _Work(id, paint, inputs, arrived)
        guided = self.family.info.has_negative and paint.guidance > 1  # by a second row: some models take guidance as an input
        num_tokens = (1 + guided) * -(-paint.width // TOKEN_SIZE) * -(-paint.height // TOKEN_SIZE)
        for index in range(paint.n):
            row = Row(
                next(self._ids),
                id,
                tenant=paint.tenant,
                shape=(paint.width, paint.height, guided, paint.loras, paint.mode),
                priority=priority,
                arrived=arrived,
                deadline=deadline or float("inf"),
                num_tokens=num_tokens,
                num_steps=num_computed(paint),
            )
            work.pictures.append(_Picture(work, index, row))
        self.scheduler.add([picture.row for picture in work.pictures])
        self._works[id] = work
        self._pictures |= {picture.row.id: picture for picture in work.pictures}

    def abort(self, id: int) -> None:
        """Forget a request; nothing more comes out for it."""
        if (work := self._works.get(id)) is not None:
            self._end(work, "abort")

    def wanted(self, row: int) -> bool:
        """Whether anybody still waits for a picture. From any thread."""
        return row in self._pictures

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.decoder.has_any

    # Steps

    @ranged("step")
    def step(self) -> list[Answer]:
        """Compute one step and return what it gave. Raises EngineBroken where no step succeeds any more."""
        now = self.clock()
        answers: list[Answer] = []
        self._collect(answers)
        for row in self.scheduler.expired(now):
            if row.request in self._works:  # not gone with another picture
                self._fail(self._works[row.request], TimeoutExpired("Request timeout expired"), answers)
        if not self._suspects:
            for row in self.scheduler.admit():
                if row.id in self._pictures:
                    self._start(self._pictures[row.id], now, answers)
        batch = self._pick()
        if batch:
            self._compute(batch, answers)
        return answers

    def _start(self, picture: _Picture, now: float, answers: list[Answer]) -> None:
        """It may have been admitted before: then it goes on."""
        work, row = picture.work, picture.row
        if picture.state is not None:
            return
        if not work.started:
            work.started = True
            work.began = self.clock()
            self._queue_time.observe(max(now - row.arrived, 0.0))
            for other in work.pictures:
                other.row.deadline = float("inf")
        began = self.clock()
        paint = structs.replace(work.paint, seed=seed_of(work.paint, picture.index), n=1)
        try:
            state = picture.state = self.family.encode(paint, work.inputs)
        except Exception as error:
            self._fail(work, self._failure(error), answers)
            return
        state.between = lambda: self._between(picture)
        now = self.clock()
        picture.seconds += now - began
        work.encoded = work.encoded or now
        self.scheduler.encoded(row, group=state.group, num_tokens=state.num_tokens, num_steps=len(state.timesteps))

    def _pick(self) -> list[Row]:
        while self._suspects:
            batch = self.scheduler.pick(self._suspects[0])
            if batch:
                return batch
            self._suspects.popleft()  # all of them are gone, or have shown that they can compute
        return self.scheduler.pick()

    @ranged("denoise")
    def _compute(self, batch: list[Row], answers: list[Answer]) -> None:
        began = self.clock()
        pictures = [self._pictures[row.id] for row in batch]
        states = [picture.state for picture in pictures if picture.state is not None]
        assert len(states) == len(batch)
        try:
            predictions = self.family.denoise(states)
        except Exception as error:
            self._isolate(pictures, error, answers)
            return
        self._failures = 0
        moved: list[_Picture] = []
        for picture, state, prediction in zip(pictures, states, predictions, strict=True):
            if picture.work.id not in self._works:  # gone with another picture of its request, or while it was computed
                continue
            try:
                self.family.step(state, prediction)
                self._check(state)
                self._tell(picture, state, answers)
            except Exception as error:
                self._stats.num_failed_steps += 1
                self._fail(picture.work, self._failure(error), answers)
            else:
                moved.append(picture)
        self._pace(states[0])
        seconds, num_tokens = self.clock() - began, sum(row.num_tokens for row in batch)
        self._stats.num_steps += 1
        self._step_time.observe(seconds)
        moved = [picture for picture in moved if picture.work.id in self._works]
        self._count(moved)
        for picture in moved:
            picture.seconds += seconds * picture.row.num_tokens / num_tokens
            picture.work.denoised = began + seconds
            picture.work.max_pictures = max(picture.work.max_pictures, len(batch))
            picture.work.slowest = max(picture.work.slowest, seconds)
            if picture.state is not None and picture.state.done:
                self.scheduler.done(picture.row)
                self.decoder.put(picture.row.id, picture.state)
        if self._suspects:  # they have shown that they can compute
            self._suspects[0].difference_update(batch)

    def _count(self, moved: list[_Picture]) -> None:
        """Steps that they have computed."""
        self.scheduler.commit([picture.row for picture in moved])
        for picture in moved:
            assert picture.state is not None
            num_steps = picture.state.step - picture.num_counted
            picture.num_counted = picture.state.step
            picture.work.num_steps += num_steps
            self._stats.num_denoising_steps += num_steps

    def _check(self, state: State) -> None:
        """Once, at the end: a look at a device's memory waits for what it computes."""
        if state.done and not torch.isfinite(state.latents).all():
            raise ModelError("the model's numbers overflowed on this picture: it has no finite pixels")

    def _tell(self, picture: _Picture, state: State, answers: list[Answer]) -> None:
        every, num_steps = state.request.preview_steps, len(state.timesteps)
        progress = Progress(step=state.step, num_steps=num_steps)
        if every and state.step % every == 0 and (pixels := self.family.preview(state)) is not None:
            progress = structs.replace(progress, preview=preview(pixels))
        answers.append((picture.work.id, Delta(index=picture.index, progress=progress)))

    def _between(self, picture: _Picture) -> bool:
        """A step was done of a picture whose steps are all in one `denoise`. Returns whether to stop."""
        work, state, answers = picture.work, picture.state, list[Answer]()
        if work.id in self._works and state is not None and state.step > picture.num_counted:
            self._tell(picture, state, answers)
            self._count([picture])
        closing = self.breathe(answers) if self.breathe is not None else False
        return closing or work.id not in self._works

    def _pace(self, state: State) -> None:
        """A device computes later than it is told to: it may be behind by one step, so that a cancellation is heeded within the
        next, and the time of a step is a step's."""
        if not state.latents.is_cuda:
            return
        if self._fence is not None:
            self._fence.synchronize()
        self._fence = torch.cuda.Event()
        self._fence.record()

    # The end of a picture

    def _collect(self, answers: list[Answer]) -> None:
        """What the decoder has finished."""
        for decoded in self.decoder.take():
            picture = self._pictures.get(decoded.id)
            if picture is None:  # cancelled meanwhile
                continue
            work = picture.work
            if isinstance(decoded.picture, ModelError):
                self._stats.num_quarantined += 1
                self._fail(work, decoded.picture, answers)
                continue
            picture.seconds += decoded.seconds
            picture.state = None
            self._forget(picture)
            self._stats.num_pictures += 1
            work.num_left -= 1
            work.pixels += decoded.picture.width * decoded.picture.height
            delta = Delta(index=picture.index, picture=decoded.picture, finish_reason="stop")
            self._finished["stop"] += 1
            if not work.num_left:
                delta.usage = work.usage()
                delta.phases = work.phases(self.clock())
                del self._works[work.id]
            answers.append((work.id, delta))

    def _forget(self, picture: _Picture) -> None:
        self.scheduler.drop(picture.row)
        del self._pictures[picture.row.id]
        for group in self._suspects:
            group.discard(picture.row)

    def _end(self, work: _Work, reason: str) -> None:
        del self._works[work.id]
        for picture in work.pictures:
            if picture.row.id in self._pictures:
                self._forget(picture)
                self._finished[reason] += 1

    # Failure

    def _isolate(self, pictures: list[_Picture], error: Exception, answers: list[Answer]) -> None:
        """A forward failed. Its pictures are tried again in halves until the one that cannot be computed stands alone."""
        batch = [picture.row for picture in pictures]
        if self._suspects:
            self._suspects[0].difference_update(batch)
        if isinstance(error, Cancelled):  # between steps, because nobody waits for it any more
            return
        if isinstance(error, FairleadError) and len(batch) == 1:  # a family's own word
            self._fail(pictures[0].work, self._failure(error), answers)
            return
        self._stats.num_failed_steps += 1
        self._failures += 1
        log.error("step failed", pictures=len(batch), tokens=sum(row.num_tokens for row in batch), exc_info=error)
        if self._failures >= MAX_FAILURES:
            raise EngineBroken(f"{self._failures} steps failed one after another, the last with {type(error).__name__}: {error}") from error
        if len(batch) == 1:
            self._fail(pictures[0].work, self._failure(error), answers)
            return
        half = len(batch) // 2
        self._suspects.extendleft([set(batch[half:]), set(batch[:half])])

    def _failure(self, error: Exception) -> FairleadError:
        """What the caller is told."""
        if isinstance(error, ModelError) or not isinstance(error, FairleadError):
            self._stats.num_quarantined += 1
        if isinstance(error, FairleadError):
            return error
        log.error("request failed", exc_info=error)
        return ModelError(f"the model failed on this request: {type(error).__name__}: {error}")

    def _fail(self, work: _Work, error: FairleadError, answers: list[Answer]) -> None:
        if work.id in self._works:
            self._end(work, "error")
            answers.append((work.id, error))

    def stats(self) -> EngineStats:
        return structs.replace(
            self._stats,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_preemptions=self.scheduler.num_preemptions,
            num_cached_steps=self.family.num_cached,
            finished=dict(self._finished),
            queue_time=(list(self._queue_time.counts), self._queue_time.sum),
            step_time=(list(self._step_time.counts), self._step_time.sum),
            recovering=any(self._suspects),
        )
