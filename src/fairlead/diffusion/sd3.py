"""Stable Diffusion 3: a transformer, flow matching, guidance by a second row without the text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from fairlead.core.generation import Paint
from fairlead.diffusion.family import State
from fairlead.diffusion.schedulers import FLOW
from fairlead.diffusion.stepped import Conditioning, Stepped, Traits
from fairlead.diffusion.vae import Vae

T5_TOKENS = 256
"""That the third text encoder reads, as diffusers calls it."""


class Flow(Stepped):
    """What flow-matching families share."""

    schedulers = FLOW
    model_name = "transformer"
    needs = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def first_step(self, request: Paint) -> int:
        assert request.num_steps is not None and request.strength is not None
        return int(request.num_steps - request.num_steps * request.strength)

    def shift(self, request: Paint, side: int, max_shift: float) -> float:
        """Of timesteps towards noise: the more tokens, each of `side` pixels a side, the more."""
        assert request.width is not None and request.height is not None
        config = self.parts.pipe.scheduler.config
        shift: float = calculate_shift(
            (request.height // side) * (request.width // side),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", max_shift),
        )
        return shift


class StableDiffusion3(Flow):
    @classmethod
    def traits(cls, model: Any, vae: Vae) -> Traits:
        size = model.config.sample_size * vae.factor
        return Traits(width=size, height=size, multiple=vae.factor * model.config.patch_size)

    def condition(self, request: Paint, guided: bool) -> Conditioning:
        rows = [self.embedded(request, field) for field in (("negative", "text") if guided else ("text",))]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def readers(self) -> dict[Any, int]:
        pipe = self.parts.pipe
        long = {pipe.tokenizer_3: T5_TOKENS} if pipe.text_encoder_3 is not None else {}
        return {pipe.tokenizer: pipe.tokenizer_max_length, **long}

    def embed(self, text: str) -> Conditioning:
        found = self.parts.pipe.encode_prompt(
            text, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"text": found[0], "pooled": found[2]}

    def set_timesteps(self, scheduler: Any, request: Paint) -> None:
        side = self.parts.vae.factor * self.parts.model.config.patch_size
        shifted = scheduler.config.get("use_dynamic_shifting", False)
        scheduler.set_timesteps(request.num_steps, **({"mu": self.shift(request, side, 1.16)} if shifted else {}))

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, states: Sequence[State]) -> torch.Tensor:
        return self.parts.model(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]
