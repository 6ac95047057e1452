"""An image engine without a model: pictures of one colour, which comes from the seed and the text.

The in-memory twin of an image model, for tests of everything around one. Tests register it with `BACKENDS[KIND.name] = KIND`;
no artefact is ever detected as it. `parameters` of its model.yaml: `step_seconds` (how long a step takes), `num_steps`, `size`
(of a picture by default). The `diffusion` section bounds it as it does a real one. Words of a text that it obeys:

| word | does |
|---|---|
| !unsafe | a picture of pure red, for a check of pictures to find |
| !raise | the step fails on this request, and on no other |
| !crash | the process ends with exit code 7 |
| !hang | a step that never ends |
| !break | the engine gives itself up |
"""

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
from msgspec import structs

from fairlead.backends.base import Engine, EngineBackend, Kind
from fairlead.backends.engine_thread import Answer, EngineThread, When, model_at
from fairlead.core.errors import ModelError, QueueFull, TimeoutExpired, Unsupported
from fairlead.core.generation import Delta, EngineInfo, EngineStats, ImageInfo, KvShare, Paint, Phase, Picture, Progress, Prompt, Usage
from fairlead.core.pictures import CONTENT_TYPES, Pixels, check, decode_image, encode, num_computed, preview, random_seed, seed_of
from fairlead.core.specs import Isolation, ModelSpec
from fairlead.observe.metrics import Histogram
from fairlead.observe.table import SECONDS

KIND = Kind(
    name="fake_painter",
    module="fairlead.backends.fake_painter",
    requires=(),
    extra="",
    isolation=Isolation.PROCESS,
    files=(),
    engine=True,
    section="diffusion",
    parameters=True,
)
COMMANDS = frozenset({"!raise", "!crash", "!hang", "!break"})
CRASH_EXIT = 7
MULTIPLE = 8
PREVIEW_PIXELS = 16
UNSAFE = (255, 0, 0)
GREY = 128


class FakePainterBackend(EngineBackend):
    def load_engine(self, artefact: Path, spec: ModelSpec, threads: int, version: str = "", kv: KvShare | None = None) -> Engine:
        return PainterThread(FakePainter(spec, model_at(spec, version)))


BACKEND = FakePainterBackend()


class PainterThread(EngineThread):
    def __init__(self, painter: "FakePainter") -> None:
        super().__init__(painter, EngineInfo(tasks=("paint",), architecture="FakePainter", image=painter.info))
        self.painter = painter

    def read(self, prompt: Prompt) -> "_Painting":
        if not isinstance(prompt, Paint):
            raise Unsupported("this model makes pictures: it takes no other prompt")
        paint = check(prompt, self.painter.info)
        return _Painting(paint if paint.seed is not None else structs.replace(paint, seed=random_seed()))

    def add(self, work: int, read: "_Painting", when: When) -> None:
        self.painter.add(work, read, when)


class _Painting:
    """A request, from its arrival on."""

    def __init__(self, paint: Paint) -> None:
        assert paint.width is not None and paint.height is not None
        self.paint = paint
        self.num_steps = num_computed(paint)
        self.ground = decode_image(paint.image, "image", paint.width, paint.height).mean(axis=(0, 1)) if paint.image else None
        self.when: When = {"priority": 0, "arrived": 0.0, "deadline": 0.0}
        self.step = 0
        self.seconds = 0.0
        self.began = 0.0

    def phases(self, denoised: float, now: float) -> list[Phase]:
        """As an engine tells them."""
        arrived = self.when["arrived"]
        began = max(self.began, arrived) - arrived
        return [
            Phase("waiting", 0.0, began),
            Phase("encode", began, 0.0),
            Phase("denoise", began, denoised - arrived - began, self.num_steps * self.paint.n, max_seqs=self.paint.n),
            Phase("decode", denoised - arrived, now - denoised),
        ]

    def colour(self, index: int) -> np.ndarray:
        """Of picture `index`, uint8 [3]; a given picture's own colour shines through as far as `strength` lets it."""
        if "!unsafe" in self.paint.text.split():
            return np.array(UNSAFE, np.uint8)
        names = [lora.name for lora in self.paint.loras]
        drawn = np.frombuffer(crc32(f"{seed_of(self.paint, index)} {self.paint.text} {names}".encode()).to_bytes(4), np.uint8)[:3]
        share = self.paint.strength or 1.0
        return drawn if self.ground is None else (share * drawn + (1 - share) * self.ground).astype(np.uint8)


class FakePainter:
    """Implements `backends.engine_thread.Steps`: every picture of every running request moves on by one step at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        model: str = "",
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`model`: as files are to name it; `clock`, `sleep`: of seconds, a virtual pair makes steps take no time."""
        wanted, parameters = spec.diffusion, spec.parameters
        size = parameters.get("size", 64)
        self.info = ImageInfo(
            family="fake",
            width=wanted.width or size,
            height=wanted.height or size,
            multiple=MULTIPLE,
            max_pixels=wanted.max_pixels,
            num_steps=wanted.num_steps or parameters.get("num_steps", 4),
            max_steps=wanted.max_steps,
            guidance=7.5 if wanted.guidance is None else wanted.guidance,
            schedulers=("euler", "ddim"),
            inputs=("text", "image", "mask"),
            loras=("ink",),
            modes=("exact", "turbo"),
        )
        self.model = model or spec.name
        self.max_num_seqs, self.max_waiting = wanted.max_num_seqs, wanted.max_waiting
        self.step_time: float = parameters.get("step_seconds", 0.0)
        self._clock, self._sleep = clock, sleep
        self._waiting: dict[int, _Painting] = {}
        self._running: dict[int, _Painting] = {}
        self._stats = EngineStats()
        self._finished: Counter[str] = Counter()
        self._queue_time, self._step_time = Histogram(SECONDS), Histogram(SECONDS)

    def add(self, work: int, painting: _Painting, when: When) -> None:
        """Raises QueueFull."""
        num_free = max(self.max_num_seqs - sum(each.paint.n for each in self._running.values()), 0)
        if len(self._waiting) >= self.max_waiting + num_free:
            raise QueueFull(f"{self.max_waiting} requests wait already")
        painting.when = when
        self._waiting[work] = painting

    def abort(self, work: int) -> None:
        waited, ran = self._waiting.pop(work, None), self._running.pop(work, None)
        self._finished["abort"] += waited is not None or ran is not None

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> list[Answer]:
        started = self._clock()
        self._sleep(self.step_time)
        answers: list[Answer] = []
        self._admit(started, answers)
        num_pictures = sum(painting.paint.n for painting in self._running.values())
        for work, painting in list(self._running.items()):
            try:
                _obey(painting.paint.text)
            except ModelError as error:
                self._stats.num_failed_steps += 1
                self._stats.num_quarantined += 1
                self._end(work, "error")
                answers.append((work, error))
                continue
            painting.step += 1
            painting.seconds += self.step_time * painting.paint.n / num_pictures
            self._stats.num_denoising_steps += painting.paint.n
            answers += [(work, delta) for delta in self._pieces(painting)]
            if painting.step == painting.num_steps:
                self._stats.num_pictures += painting.paint.n
                self._end(work, "stop")
        self._stats.num_steps += 1
        self._step_time.observe(self._clock() - started)
        return answers

    def _admit(self, now: float, answers: list[Answer]) -> None:
        for work, waits in list(self._waiting.items()):
            if (waits.when["deadline"] or math.inf) < now:
                del self._waiting[work]
                answers.append((work, TimeoutExpired("Request timeout expired")))
        while self._waiting:
            work = min(self._waiting, key=lambda work: (self._waiting[work].when["priority"], self._waiting[work].when["arrived"], work))
            num_running = sum(each.paint.n for each in self._running.values())
            if self._running and num_running + self._waiting[work].paint.n > self.max_num_seqs:
                break
            self._running[work] = self._waiting.pop(work)
            self._running[work].began = now
            self._queue_time.observe(max(now - self._running[work].when["arrived"], 0.0))

    def _end(self, work: int, reason: str) -> None:
        del self._running[work]
        self._finished[reason] += 1

    def _pieces(self, painting: _Painting) -> list[Delta]:
        """What a step gives: of each picture how far it is, at the end the pictures."""
        paint, step, every = painting.paint, painting.step, painting.paint.preview_steps
        pieces = []
        for index in range(paint.n):
            progress = Progress(step=step, num_steps=painting.num_steps)
            if every and step % every == 0:
                share = step / painting.num_steps
                seen = (share * painting.colour(index) + (1 - share) * GREY).astype(np.uint8)
                progress = structs.replace(progress, preview=preview(_filled(seen, PREVIEW_PIXELS, PREVIEW_PIXELS)))
            pieces.append(Delta(index=index, progress=progress))
        if step == painting.num_steps:
            denoised = self._clock()
            pieces += [Delta(index=index, picture=self._picture(painting, index), finish_reason="stop") for index in range(paint.n)]
            megapixels = sum(piece.picture.width * piece.picture.height for piece in pieces if piece.picture is not None) / 1e6
            pieces[-1].usage = Usage(
                megapixels=megapixels, num_pictures=paint.n, num_steps=painting.num_steps * paint.n, compute_seconds=painting.seconds
            )
            pieces[-1].phases = painting.phases(denoised, self._clock())
        return pieces

    def _picture(self, painting: _Painting, index: int) -> Picture:
        paint, seed = painting.paint, seed_of(painting.paint, index)
        assert paint.width is not None and paint.height is not None and paint.guidance is not None and paint.num_steps is not None
        told = {
            "seed": seed,
            "model": self.model,
            "mode": paint.mode,
            "num_steps": paint.num_steps,
            "guidance": paint.guidance,
            "scheduler": paint.scheduler,
        }
        pixels = _filled(painting.colour(index), paint.width, paint.height)
        return Picture(
            data=encode(pixels, paint.format, quality=paint.quality, metadata=told),
            content_type=CONTENT_TYPES[paint.format],
            width=paint.width,
            height=paint.height,
            seed=seed,
            mode=paint.mode,
            num_steps=paint.num_steps,
            guidance=paint.guidance,
            scheduler=paint.scheduler,
        )

    def stats(self) -> EngineStats:
        def told(histogram: Histogram) -> tuple[list[int], float]:
            return list(histogram.counts), histogram.sum

        return structs.replace(
            self._stats,
            num_running=sum(painting.paint.n for painting in list(self._running.values())),
            num_waiting=len(self._waiting),
            finished=dict(self._finished),
            queue_time=told(self._queue_time),
            step_time=told(self._step_time),
        )


def _filled(colour: np.ndarray, width: int, height: int) -> Pixels:
    return np.broadcast_to(colour, (height, width, 3)).astype(np.uint8)


def _obey(text: str) -> None:
    commands = COMMANDS.intersection(text.split())
    if "!raise" in commands:
        raise ModelError("the model failed on this request: it was asked to")
    if "!crash" in commands:
        os._exit(CRASH_EXIT)
    if "!hang" in commands:
        threading.Event().wait()
    if "!break" in commands:
        raise RuntimeError("it was asked to break")
