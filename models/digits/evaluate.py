"""How many pictures show what their prompts ask, as an independent classifier of real digits sees them.

    python -m models.digits.evaluate --num 40 --sheet /tmp/digits.png

A plain loop of diffusers' parts, without Fairlead's engine.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from models.digits.captions import WORDS
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import CLIPTextModel, CLIPTokenizer

from fairlead.cli.demo_models.digits import GUIDANCE, MODEL, NUM_STEPS
from fairlead.cli.demo_models.digits.judge import colours, train_judge
from fairlead.cli.demo_models.digits.pictures import COLOURS, PIXELS, as_pixels

FORMS = ("{digit}", "a {word}", "the digit {digit}", "a handwritten {word}", "draw me a {colour} {word}", "the number {digit} in {colour}")


def asked(num: int) -> list[tuple[int, str, str]]:
    """`num` prompts for each digit: (digit, colour or "", prompt)."""
    prompts = []
    for digit in range(10):
        for form, colour in itertools.islice(zip(itertools.cycle(FORMS), itertools.cycle(COLOURS), strict=False), num):
            prompt = form.format(digit=digit, word=WORDS[digit], colour=colour)
            prompts.append((digit, colour if "{colour}" in form else "", prompt))
    return prompts


@torch.inference_mode()
def paint(
    prompts: Sequence[str],
    *,
    folder: Path = MODEL,
    num_steps: int = NUM_STEPS,
    guidance: float = GUIDANCE,
    scheduler: str = "DDIMScheduler",
) -> np.ndarray:
    """A picture for each, uint8 [N, 32, 32, 3]; the n-th has seed n."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    steps = getattr(diffusers, scheduler).from_pretrained(folder / "scheduler")
    ids_BT = tokenizer([*prompts, *([""] * len(prompts))], padding="max_length", truncation=True, return_tensors="pt").input_ids
    words_BTD = text_encoder(ids_BT).last_hidden_state
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(len(prompts))]
    steps.set_timesteps(num_steps)
    latents = torch.cat(noise) * steps.init_noise_sigma
    for timestep in steps.timesteps:
        both = steps.scale_model_input(torch.cat([latents, latents]), timestep)
        with_text, without = unet(both, timestep, words_BTD).sample.chunk(2)
        latents = steps.step(without + guidance * (with_text - without), timestep, latents).prev_sample
    return as_pixels(vae.decode(latents / vae.config.scaling_factor).sample)


def evaluate(
    folder: Path, *, num: int = 20, num_steps: int = NUM_STEPS, guidance: float = GUIDANCE, scheduler: str = "DDIMScheduler"
) -> np.ndarray:
    """Tells the score, and gives the pictures: a row for each digit."""
    wanted = asked(num)
    began = time.perf_counter()
    prompts = [prompt for _, _, prompt in wanted]
    pixels = paint(prompts, folder=folder, num_steps=num_steps, guidance=guidance, scheduler=scheduler)
    took = time.perf_counter() - began
    judge = train_judge()
    right = judge.digits(pixels) == [digit for digit, _, _ in wanted]
    in_colour = [seen == colour for (_, colour, _), seen in zip(wanted, colours(pixels), strict=True) if colour]
    table = Table("digit", "right", title=f"{len(wanted)} pictures in {took:.1f} s")
    for digit in range(10):
        table.add_row(str(digit), f"{right[digit * num : (digit + 1) * num].sum()} of {num}")
    table.add_row("all", f"{right.mean():.1%}")
    table.add_row("colours", f"{np.mean(in_colour):.1%}" if in_colour else "")
    table.add_row("the judge, on unseen real digits", f"{judge.accuracy:.1%}")
    Console().print(table)
    return pixels.reshape(10, num, PIXELS, PIXELS, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--num", type=int, default=20, help="pictures of each digit")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--scheduler", default="DDIMScheduler", help="a scheduler of diffusers")
    parser.add_argument("--sheet", type=Path, help="a PNG to show them all in")
    options = parser.parse_args()
    rows = evaluate(options.folder, num=options.num, num_steps=options.steps, guidance=options.guidance, scheduler=options.scheduler)
    if options.sheet:
        Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(10 * PIXELS, -1, 3)).save(options.sheet)


if __name__ == "__main__":
    main()
