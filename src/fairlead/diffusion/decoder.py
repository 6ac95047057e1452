"""From finished latents to files, off the step loop: pictures that are done do not hold up those that are not."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Full, Queue
from typing import Any, Protocol

import numpy as np
import structlog
from msgspec import Struct

from fairlead.core.errors import ModelError
from fairlead.core.generation import Picture
from fairlead.core.pictures import CONTENT_TYPES, encode
from fairlead.diffusion.family import Family, State
from fairlead.observe.nvtx import ranged

log = structlog.get_logger("fairlead.diffusion")

MAX_TOGETHER = 8
"""Pictures that are decoded together."""


class Decoded(Struct, frozen=True):
    id: int
    """Of the picture, as it was put."""
    picture: Picture | ModelError
    seconds: float
    """Its share of the time that it took."""


class Decoder(Protocol):
    """Where the engine puts finished pictures, and takes them as files."""

    def put(self, id: int, state: State) -> None: ...

    def take(self) -> list[Decoded]:
        """What was decoded meanwhile."""

    @property
    def has_any(self) -> bool:
        """Whether `take` would find anything."""

    def seconds(self) -> float:
        """How long it decodes already; 0: it does not."""


class DecoderHere:
    """Implements `Decoder` in the caller's thread."""

    def __init__(self, family: Family, model: str) -> None:
        """`model`: as files are to name it."""
        self.family = family
        self.model = model
        self._decoded: deque[Decoded] = deque()

    def put(self, id: int, state: State) -> None:
        self.decode([(id, state)])

    def take(self) -> list[Decoded]:
        return [self._decoded.popleft() for _ in range(len(self._decoded))]

    @property
    def has_any(self) -> bool:
        return bool(self._decoded)

    def seconds(self) -> float:
        return 0.0

    @ranged("decode")
    def decode(self, finished: Sequence[tuple[int, State]]) -> None:
        """Together; one after the other where that fails, so that only the one at fault does."""
        started = time.perf_counter()
        states = [state for _, state in finished]
        try:
            pixels = self.family.decode(states)
            pictures: list[Picture | ModelError] = [self._file(*each) for each in zip(states, pixels, strict=True)]
        except Exception as error:
            if len(finished) > 1:
                for each in finished:
                    self.decode([each])
                return
            log.error("a picture could not be decoded", model=self.model, exc_info=error)
            pictures = [ModelError(f"the model could not decode this picture: {type(error).__name__}: {error}")]
        seconds = (time.perf_counter() - started) / len(finished)
        self._decoded += [Decoded(id, picture, seconds) for (id, _), picture in zip(finished, pictures, strict=True)]

    def _file(self, state: State, pixels: np.ndarray) -> Picture:
        """The text of the request is the caller's own, and is not written into the file."""
        request = state.request
        assert request.seed is not None and request.num_steps is not None and request.guidance is not None
        told: dict[str, Any] = {
            "seed": request.seed,
            "model": self.model,
            "mode": request.mode,
            "num_steps": request.num_steps,
            "guidance": request.guidance,
            "scheduler": request.scheduler,
        }
        if request.strength is not None:
            told["strength"] = request.strength
        if request.loras:
            told["loras"] = {lora.name: lora.scale for lora in request.loras}
        height, width, _ = pixels.shape
        return Picture(
            data=encode(pixels, request.format, quality=request.quality, metadata=told),
            content_type=CONTENT_TYPES[request.format],
            width=width,
            height=height,
            seed=request.seed,
            mode=request.mode,
            num_steps=request.num_steps,
            guidance=request.guidance,
            scheduler=request.scheduler,
        )


class DecoderThread(DecoderHere):
    """Implements `Decoder` in a thread of its own, pictures that wait together."""

    def __init__(self, family: Family, model: str, *, capacity: int) -> None:
        """`capacity`: pictures that may wait."""
        super().__init__(family, model)
        self._waiting: Queue[tuple[int, State] | None] = Queue(capacity)
        self._started = 0.0

    def put(self, id: int, state: State) -> None:
        """Waits where the decoder is far behind."""
        self._waiting.put((id, state))

    def seconds(self) -> float:
        started = self._started
        return time.perf_counter() - started if started else 0.0

    def start(self, *, wanted: Callable[[int], bool], wake: Callable[[], None]) -> None:
        """`wanted`: whether anybody still waits for a picture; `wake`: tells the engine that there is something to take."""
        threading.Thread(target=self._run, args=(wanted, wake), name="decoder", daemon=True).start()

    def close(self) -> None:
        with suppress(Full):  # then it ends with the process
            self._waiting.put_nowait(None)

    def _run(self, wanted: Callable[[int], bool], wake: Callable[[], None]) -> None:
        while (first := self._waiting.get()) is not None:
            finished = [first]
            while len(finished) < MAX_TOGETHER and self._waiting.queue and self._waiting.queue[0] is not None:
                finished += [each for each in [self._waiting.get()] if each is not None]
            finished = [each for each in finished if wanted(each[0])]
            if finished:
                self._started = time.perf_counter()
                self.decode(finished)
                self._started = 0.0
                wake()
