"""FLUX.1: a transformer over packed latents, flow matching, guidance as an input of the model."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fairlead.core.generation import Paint
from fairlead.diffusion.family import State
from fairlead.diffusion.schedulers import FLOW
from fairlead.diffusion.sd3 import Flow
from fairlead.diffusion.stepped import Conditioning, Parts, Traits
from fairlead.diffusion.vae import Vae

T5_TOKENS = 512
"""That the second text encoder reads, as diffusers calls it."""
LATENTS = 128
"""A side: what FLUX.1 was trained for, and its configuration does not tell."""
FEW_STEPS = 4
"""Usual for a checkpoint without guidance, which was distilled to need no more."""
KEPT_SIZES = 64
"""Of pictures whose tokens' places are kept."""


class Flux(Flow):
    schedulers = {"flow_euler": FLOW["flow_euler"]}

    @classmethod
    def traits(cls, model: Any, vae: Vae) -> Traits:
        guidance = model.config.guidance_embeds
        size = LATENTS * vae.factor
        return Traits(
            width=size,
            height=size,
            multiple=2 * vae.factor,
            num_steps=0 if guidance else FEW_STEPS,
            has_guidance=guidance,
            has_negative=False,
        )

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.positions = lru_cache(KEPT_SIZES)(self._positions)
        """Made once: to copy them to a device waits for what it computes."""

    def _positions(self, height: int, width: int) -> torch.Tensor:
        side = 2 * self.parts.vae.factor
        found: torch.Tensor = self.parts.pipe._prepare_latent_image_ids(1, height // side, width // side, self.device, self.dtype)
        return found

    def guided(self, request: Paint) -> bool:
        return False

    def condition(self, request: Paint, guided: bool) -> Conditioning:
        conditioning = dict(self.embedded(request, "text"))
        if self.parts.model.config.guidance_embeds:
            conditioning["guidance"] = torch.tensor([request.guidance], dtype=torch.float32, device=self.device)
        return conditioning

    def readers(self) -> dict[Any, int]:
        return {self.parts.pipe.tokenizer_2: T5_TOKENS}

    def embed(self, text: str) -> Conditioning:
        found, pooled, _ = self.parts.pipe.encode_prompt(text, device=self.device, max_sequence_length=T5_TOKENS)
        return {"text": found, "pooled": pooled}

    def set_timesteps(self, scheduler: Any, request: Paint) -> None:
        assert request.num_steps is not None
        own = scheduler.config.get("use_flow_sigmas", False)
        sigmas = None if own else np.linspace(1.0, 1 / request.num_steps, request.num_steps)
        scheduler.set_timesteps(request.num_steps, sigmas=sigmas, mu=self.shift(request, 2 * self.parts.vae.factor, 1.15))

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        return self.parts.pipe._pack_latents(latents, *latents.shape)

    def unpacked(self, latents: torch.Tensor, request: Paint) -> torch.Tensor:
        return self.parts.pipe._unpack_latents(latents, request.height, request.width, self.parts.vae.factor)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, states: Sequence[State]) -> torch.Tensor:
        request = states[0].request
        assert request.width is not None and request.height is not None
        return self.parts.model(
            hidden_states=latents,
            timestep=timesteps.to(self.dtype) / 1000,
            guidance=conditioning.get("guidance"),
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=conditioning["text"],
            txt_ids=torch.zeros(conditioning["text"].shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self.positions(request.height, request.width),
            return_dict=False,
        )[0]
