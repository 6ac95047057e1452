"""Stable Diffusion 1, 2 and XL, and any pipeline of their form: a UNet, and guidance by a second row without the text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fairlead.core.errors import LoadError
from fairlead.core.generation import Paint
from fairlead.diffusion.family import Inputs, State
from fairlead.diffusion.schedulers import DENOISING
from fairlead.diffusion.stepped import Conditioning, Parts, Stepped, Traits
from fairlead.diffusion.vae import Vae, from_uint8


class StableDiffusion(Stepped):
    """A UNet of 9 channels is one that only paints into pictures: it sees the mask and what is left."""

    schedulers = DENOISING
    model_name = "unet"
    needs = ("unet", "scheduler", "text_encoder", "tokenizer")

    @classmethod
    def traits(cls, model: Any, vae: Vae) -> Traits:
        config, size = model.config, model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if config.in_channels not in (vae.num_channels, 2 * vae.num_channels + 1):
            raise LoadError(f"unet/config.json: {config.in_channels} channels for {vae.num_channels} of a picture are of no known use")
        return Traits(
            width=width * vae.factor,
            height=height * vae.factor,
            multiple=vae.factor if vae.factor > 1 else 2 ** (len(config.block_out_channels) - 1),
            has_negative=config.time_cond_proj_dim is None,
            only_inpaints=config.in_channels != vae.num_channels,
        )

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.is_xl = hasattr(parts.pipe, "text_encoder_2")
        self.only_inpaints = "text" not in parts.info.inputs
        self.embeds_guidance = parts.model.config.time_cond_proj_dim is not None

    def guided(self, request: Paint) -> bool:
        return not self.embeds_guidance and super().guided(request)

    def condition(self, request: Paint, guided: bool) -> Conditioning:
        with_text = self.embedded(request, "text")
        if guided and self.is_xl and not request.negative and self.parts.pipe.config.force_zeros_for_empty_prompt:
            rows = [{name: torch.zeros_like(tensor) for name, tensor in with_text.items()}, with_text]
        else:
            rows = [self.embedded(request, "negative"), with_text] if guided else [with_text]
        conditioning = {name: torch.cat([row[name] for row in rows]) for name in with_text}
        if self.is_xl:
            conditioning["time_ids"] = self.time_ids(request, len(rows))
        if self.embeds_guidance:
            pipe, model = self.parts.pipe, self.parts.model
            scale = torch.tensor([(request.guidance or 0.0) - 1])
            embedded = pipe.get_guidance_scale_embedding(scale, embedding_dim=model.config.time_cond_proj_dim)
            conditioning["timestep_cond"] = embedded.to(self.device, self.dtype)
        return conditioning

    def readers(self) -> dict[Any, int]:
        return {self.parts.pipe.tokenizer: self.parts.pipe.tokenizer.model_max_length}

    def embed(self, text: str) -> Conditioning:
        pipe = self.parts.pipe
        found = pipe.encode_prompt(text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"text": found[0], "pooled": found[2]} if self.is_xl else {"text": found[0]}

    def time_ids(self, request: Paint, num_rows: int) -> torch.Tensor:
        pipe, size = self.parts.pipe, (request.height, request.width)
        width = pipe.text_encoder_2.config.projection_dim
        ids: Any = pipe._get_add_time_ids(size, (0, 0), size, dtype=self.dtype, text_encoder_projection_dim=width)
        return ids.to(self.device).repeat(num_rows, 1)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, states: Sequence[State]) -> torch.Tensor:
        if self.only_inpaints:
            latents = torch.cat([latents, conditioning["around"]], dim=1)
        more = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]} if self.is_xl else None
        return self.parts.model(
            latents,
            timesteps,
            encoder_hidden_states=conditioning["text"],
            timestep_cond=conditioning.get("timestep_cond"),
            added_cond_kwargs=more,
            return_dict=False,
        )[0]

    def paint_into(self, state: State, inputs: Inputs, image: torch.Tensor | None, noise: torch.Tensor) -> None:
        if not self.only_inpaints:
            super().paint_into(state, inputs, image, noise)
            return
        assert inputs.mask is not None
        kept = torch.from_numpy(np.less(inputs.mask, 128).astype(np.float32))
        left = self.parts.vae.encode(from_uint8(inputs.image) * kept, state.generator).to(self.device, self.dtype)
        around = torch.cat([self.mask(inputs, noise), left], dim=1)
        state.conditioning["around"] = around.repeat(len(state.conditioning["text"]), 1, 1, 1)
