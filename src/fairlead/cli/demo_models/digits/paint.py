"""Pictures of digits by Fairlead's engine, all in one batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fairlead.cli.demo_models.digits import GUIDANCE, MODEL, NUM_STEPS
from fairlead.cli.demo_models.digits.pictures import PIXELS
from fairlead.core.generation import Delta, Paint
from fairlead.core.pictures import check, decode_image
from fairlead.core.specs import DiffusionSpec
from fairlead.diffusion.decoder import DecoderHere
from fairlead.diffusion.engine import DiffusionEngine
from fairlead.diffusion.load import load_family
from fairlead.diffusion.scheduler import Scheduler

BATCH_TOKENS = 1 << 15


def paint(prompts: Sequence[str], *, folder: Path = MODEL, first_seed: int = 0) -> np.ndarray:
    """A picture for each prompt, uint8 [N, 32, 32, 3], of seeds that follow one another."""
    family = load_family(folder, DiffusionSpec(num_steps=NUM_STEPS, guidance=GUIDANCE))
    scheduler = Scheduler(max_num_seqs=len(prompts), max_batch_tokens=BATCH_TOKENS, max_waiting=len(prompts))
    engine = DiffusionEngine(family, scheduler, DecoderHere(family, "digits"))
    for id, prompt in enumerate(prompts):
        engine.add(id, check(Paint(text=prompt, seed=first_seed + id), family.info), None, priority=0, deadline=0.0)
    pixels = np.empty((len(prompts), PIXELS, PIXELS, 3), np.uint8)
    while engine.has_work:
        for id, answer in engine.step():
            assert isinstance(answer, Delta), answer
            if answer.picture is not None:
                pixels[id] = decode_image(answer.picture.data, "picture", PIXELS, PIXELS)
    return pixels
