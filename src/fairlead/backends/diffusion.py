"""Image models: the engine of pictures on a thread of its own, with a reader before it and a decoder behind it."""

import time
from pathlib import Path
from typing import NamedTuple

import structlog
import torch
from msgspec import structs

from fairlead.backends.base import Deliver, EngineBackend
from fairlead.backends.engine_thread import EngineThread, When, model_at
from fairlead.core.errors import LoadError, Unsupported
from fairlead.core.generation import EngineInfo, KvShare, Paint, Prompt
from fairlead.core.pictures import check, decode_image, decode_mask, random_seed
from fairlead.core.specs import DiffusionSpec, ModelSpec
from fairlead.diffusion.decoder import DecoderThread
from fairlead.diffusion.engine import DiffusionEngine
from fairlead.diffusion.family import Family, Inputs
from fairlead.diffusion.load import load_family
from fairlead.diffusion.scheduler import Scheduler

log = structlog.get_logger("fairlead.diffusion")


class DiffusionBackend(EngineBackend):
    def load_engine(self, artefact: Path, spec: ModelSpec, threads: int, version: str = "", kv: KvShare | None = None) -> "DiffusionThread":
        started = time.perf_counter()
        device = spec.instances.device
        if device.partition(":")[0] == "cuda" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise LoadError(f"`device: {device}` is not there: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices")
        family = load_family(artefact, spec.diffusion, device=device, threads=threads)
        for line in family.explain:
            log.info("explain", model=spec.name, chosen=line)
        log.info("engine loaded", model=spec.name, seconds=round(time.perf_counter() - started, 2))
        return DiffusionThread(family, spec.diffusion, model_at(spec, version))


BACKEND = DiffusionBackend()


class Asked(NamedTuple):
    paint: Paint
    inputs: Inputs | None


class DiffusionThread(EngineThread):
    """What its reader does is decode the pictures that others are to begin from."""

    def __init__(self, family: Family, spec: DiffusionSpec, model: str) -> None:
        self.family = family
        self.decoder = DecoderThread(family, model, capacity=2 * spec.max_num_seqs)
        scheduler = Scheduler(max_num_seqs=spec.max_num_seqs, max_batch_tokens=spec.max_batch_tokens, max_waiting=spec.max_waiting)
        self.engine = DiffusionEngine(family, scheduler, self.decoder, breathe=self.breathe)
        info = EngineInfo(tasks=("paint",), architecture=family.info.family, image=family.info, explain=family.explain)
        super().__init__(self.engine, info)

    def run(self, deliver: Deliver) -> None:
        self.decoder.start(wanted=self.engine.wanted, wake=self.notify)
        try:
            super().run(deliver)
        finally:
            self.decoder.close()

    def step_seconds(self) -> float:
        return max(super().step_seconds(), self.decoder.seconds())

    def read(self, prompt: Prompt) -> Asked:
        if not isinstance(prompt, Paint):
            raise Unsupported("this model makes pictures: it takes no other prompt")
        paint = check(prompt, self.family.info)
        assert paint.width is not None and paint.height is not None
        inputs = None
        if paint.image:
            mask = decode_mask(paint.mask, "mask", paint.width, paint.height) if paint.mask else None
            inputs = Inputs(decode_image(paint.image, "image", paint.width, paint.height), mask)
        seed = random_seed() if paint.seed is None else paint.seed
        return Asked(structs.replace(paint, seed=seed), inputs)

    def add(self, work: int, read: Asked, when: When) -> None:
        self.engine.add(work, read.paint, read.inputs, **when)
