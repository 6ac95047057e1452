"""Train the small image model on handwritten digits and captions, on one thread of a CPU: first the VAE, then what paints its latents.

    python -m models.digits.train

Takes three quarters of an hour. A VAE that the folder holds already is kept. Ends with the score of `models.digits.evaluate`.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from models.digits.captions import Caption, caption
from models.digits.evaluate import evaluate
from models.digits.tokenizer import END, START, make_tokenizer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from fairlead.cli.demo_models.digits import FOLDER, GUIDANCE, NUM_STEPS
from fairlead.cli.demo_models.digits.pictures import COLOURS, PIXELS, SIZES, draw, ink_of, originals

SEED = 1
BATCH = 64
VAE_RATE, DECODER_RATE, TEXT_RATE, PAINTER_RATE = 4e-3, 3e-3, 3e-3, 2e-3
"""Peaks of the learning rates."""
INK_WEIGHT = 8.0
"""How much more an error in the ink weighs than one in the paper, for the decoder's last lessons."""
LATENT_NOISE = 4e-3
"""Weight of the KL divergence: how much noise the decoder is to bear."""
TEXT_STEPS = 400
TIMES_DRAWN = 40
"""Latents of each digit, drawn differently each time."""
WITHOUT_TEXT = 0.1
"""The part of the pictures that is learned without a caption, for classifier-free guidance."""
AVERAGED_STEPS = 300
"""The weights that are kept are a mean of those of about so many last steps."""
TEXT_WIDTH = 64
FACTOR, LATENT_CHANNELS = 4, 4


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PIXELS,
        mid_block_add_attention=False,
    )


def make_text_encoder(tokenizer: Any) -> CLIPTextModel:
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PIXELS // FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=8.5e-4,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
        rescale_betas_zero_snr=False,
    )


class Painter(nn.Module):
    """The reader of captions and the denoiser, trained together."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = make_unet()

    def forward(self, noisy: Tensor, timesteps: Tensor, ids_BT: Tensor) -> Tensor:
        words_BTD = self.text_encoder(ids_BT).last_hidden_state
        prediction: Tensor = self.unet(noisy, timesteps, words_BTD).sample
        return prediction


# The loop


def learn(module: nn.Module, loss_of: Callable[[], Tensor], *, name: str, num_steps: int, rate: float) -> nn.Module:
    """Adam with a warm-up and a cosine to zero. Returns a mean of the last weights."""
    mean = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
    began = time.perf_counter()
    with Progress(*columns) as progress:
        size = sum(parameter.numel() for parameter in module.parameters()) / 1e6
        bar = progress.add_task(f"{name}, {size:.2f}M", total=num_steps, state="")
        smooth = 0.0
        for step in range(num_steps):
            done = step / num_steps
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, done / 0.03 + 0.01) * 0.5 * (1.0 + math.cos(math.pi * done))
            loss = loss_of()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            _approach(mean, module, 1 / min(step + 1, AVERAGED_STEPS))
            smooth += (loss.item() - smooth) / min(step + 1, 50)
            progress.update(bar, completed=step + 1, state=f"loss {smooth:.4f}")
            if (step + 1) % 100 == 0:
                progress.console.print(f"{name}: step {step + 1}  loss {smooth:.4f}  {(time.perf_counter() - began) / 60:.1f} min")
    return mean


@torch.no_grad()
def _approach(mean: nn.Module, module: nn.Module, share: float) -> None:
    for kept, new in zip(mean.parameters(), module.parameters(), strict=True):
        kept.lerp_(new, share)


def order(number: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of the numbers below it: each once, in any order, and again."""
    while True:
        yield from torch.randperm(number, generator=generator)[: number // BATCH * BATCH].split(BATCH)


# What is learned


def train_vae(num_steps: int) -> AutoencoderKL:
    """Pictures to latents of a 12th of their numbers, and back."""
    rng, generator = Random(SEED), torch.Generator().manual_seed(SEED)
    digits, *_ = originals()
    vae, batches = make_vae(), order(len(digits), generator)

    def loss() -> Tensor:
        rows = next(batches)
        pictures = draw(digits[rows], *_inks(rng, len(rows)), generator=generator)
        latents = vae.encode(pictures).latent_dist
        drawn = vae.decode(latents.sample(generator)).sample
        return functional.mse_loss(drawn, pictures) + LATENT_NOISE * latents.kl().mean() / latents.mean[0].numel()

    mean = learn(vae, loss, name="vae", num_steps=num_steps, rate=VAE_RATE)
    assert isinstance(mean, AutoencoderKL)
    train_decoder(mean, num_steps)
    with torch.inference_mode():
        pictures = draw(digits, *_inks(rng, len(digits)), generator=generator)
        spread = mean.encode(pictures).latent_dist.mean.std()
    mean.register_to_config(scaling_factor=round(1 / float(spread), 4))
    return mean


def train_decoder(vae: AutoencoderKL, num_steps: int) -> None:
    """The decoder alone, of latents that stay as they are: most of a picture is paper, so that the two together learn the hues of the ink last."""
    rng, generator = Random(SEED), torch.Generator().manual_seed(SEED)
    digits, *_ = originals()
    decoder, batches = nn.Sequential(vae.post_quant_conv, vae.decoder), order(len(digits), generator)

    def loss() -> Tensor:
        rows = next(batches)
        pictures = draw(digits[rows], *_inks(rng, len(rows)), generator=generator)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.sample(generator)
        return ((1 + INK_WEIGHT * ink_of(pictures)) * (decoder(latents) - pictures) ** 2).mean()

    mean = learn(decoder, loss, name="decoder", num_steps=num_steps, rate=DECODER_RATE)
    decoder.load_state_dict(mean.state_dict())


def _inks(rng: Random, num: int) -> tuple[list[str], list[str]]:
    return rng.choices(tuple(COLOURS), k=num), rng.choices(tuple(SIZES), weights=(1, 3, 1), k=num)


def train_text_encoder(tokenizer: Any) -> CLIPTextModel:
    """What captions say: their mean over the tokens tells digit, colour and size. A painter learns much faster from words it knows."""
    rng, encoder = Random(SEED), make_text_encoder(tokenizer)
    reader = nn.ModuleDict({"encoder": encoder, "said": nn.Linear(TEXT_WIDTH, 10 + len(COLOURS) + len(SIZES))})

    def loss() -> Tensor:
        digits = [rng.randrange(10) for _ in range(BATCH)]
        captions = [caption(digit, rng) for digit in digits]
        said = reader["said"](encoder(_ids(tokenizer, [each.text for each in captions])).last_hidden_state.mean(1))
        truths = (
            digits,
            [list(COLOURS).index(each.colour) for each in captions],
            [list(SIZES).index(each.size) for each in captions],
        )
        parts = said.split((10, len(COLOURS), len(SIZES)), dim=1)
        return torch.stack([functional.cross_entropy(part, torch.tensor(truth)) for part, truth in zip(parts, truths, strict=True)]).sum()

    mean = learn(reader, loss, name="text", num_steps=TEXT_STEPS, rate=TEXT_RATE)
    assert isinstance(mean, nn.ModuleDict)
    return mean["encoder"]


def train_painter(vae: AutoencoderKL, tokenizer: Any, scheduler: DDIMScheduler, num_steps: int) -> Painter:
    rng, generator = Random(SEED + 1), torch.Generator().manual_seed(SEED + 1)
    latents, captions = latents_of(vae, rng, generator)
    painter, batches = Painter(train_text_encoder(tokenizer)), order(len(latents), generator)

    def loss() -> Tensor:
        rows = next(batches)
        texts = ["" if rng.random() < WITHOUT_TEXT else captions[row].text for row in rows.tolist()]
        clean, noise = latents[rows], torch.randn(latents[rows].shape, generator=generator)
        # One timestep from each of B equal stretches: their mean wanders less than that of B drawn freely.
        part = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timesteps = (part * len(scheduler.betas)).long()
        noisy, velocity = scheduler.add_noise(clean, noise, timesteps), scheduler.get_velocity(clean, noise, timesteps)
        return functional.mse_loss(painter(noisy, timesteps, _ids(tokenizer, texts)), velocity)

    mean = learn(painter, loss, name="painter", num_steps=num_steps, rate=PAINTER_RATE)
    assert isinstance(mean, Painter)
    return mean


@torch.no_grad()
def latents_of(vae: AutoencoderKL, rng: Random, generator: torch.Generator) -> tuple[Tensor, list[Caption]]:
    digits, _, shown, _ = originals()
    latents, captions = [], []
    for _ in range(TIMES_DRAWN):
        asked = [caption(digit, rng) for digit in shown.tolist()]
        pictures = draw(digits, [each.colour for each in asked], [each.size for each in asked], generator=generator)
        latents.append(vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor)
        captions += asked
    return torch.cat(latents), captions


def _ids(tokenizer: Any, texts: list[str]) -> Tensor:
    ids_BT: Tensor = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids_BT


# The folder


def save(painter: Painter, tokenizer: Any, scheduler: DDIMScheduler, folder: Path) -> None:
    """A Stable Diffusion pipeline in the form of diffusers, float16, beside the VAE."""
    half = copy.deepcopy(painter).half()
    half.unet.save_pretrained(folder / "unet")
    half.text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder.parent / "model.yaml").write_text(f"diffusion: {{num_steps: {NUM_STEPS}, guidance: {GUIDANCE}}}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-steps", type=int, default=700, help="of the whole VAE, and as many more of its decoder")
    parser.add_argument("--steps", type=int, default=5000, help="of the painter")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the model (default: the package's)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    folder = options.out / "1"
    if not (folder / "vae").exists():
        vae = train_vae(options.vae_steps)
        vae.half().save_pretrained(folder / "vae")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    torch.manual_seed(SEED)
    tokenizer, scheduler = make_tokenizer(), make_scheduler()
    save(train_painter(vae, tokenizer, scheduler, options.steps), tokenizer, scheduler, folder)
    evaluate(folder)


if __name__ == "__main__":
    main()
