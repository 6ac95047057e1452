"""Between pixels and latents: a pipeline's VAE, or nothing where the model computes pixels themselves."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

FIT_PICTURES, FIT_SIZE, FIT_COARSE = 8, 16, 4
"""Smooth pictures to fit previews to, their latents a side, and colours a side from which they are drawn."""


class Vae:
    """Encodes, decodes and previews for one pipeline."""

    factor: int
    """Pixels a side of one latent."""

    def __init__(self, module: Any, tiling_pixels: int) -> None:
        config = module.config
        self.module = module
        self.tiling_pixels = tiling_pixels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.num_channels = config.latent_channels
        self.projection: torch.Tensor | None = None
        """[channels + 1, 3]: RGB in [-1, 1] of a latent and a constant."""

    def encode(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Latents, [1, C, h, w], of pixels in [-1, 1], [1, 3, H, W]."""
        found = self.module.encode(pixels.to(self.module.device, self.module.dtype))
        latents = found.latent_dist.sample(generator) if hasattr(found, "latent_dist") else found.latents
        mean, std, scale = self._statistics(latents)
        return (latents - mean) * scale / std if std is not None else (latents - mean) * scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1]; above the threshold tile by tile, so that the decoder's own memory stays bounded."""
        mean, std, scale = self._statistics(latents)
        latents = latents * std / scale + mean if std is not None else latents / scale + mean
        latents = latents.to(self.module.device, self.module.dtype)
        if latents.shape[-1] * latents.shape[-2] * self.factor**2 > self.tiling_pixels and hasattr(self.module, "tiled_decode"):
            return self.module.tiled_decode(latents, return_dict=False)[0]
        return self.module.decode(latents, return_dict=False)[0]

    def _statistics(self, latents: torch.Tensor) -> tuple[Any, torch.Tensor | None, float]:
        """Mean, standard deviation and scale by which the model's latents differ from the VAE's."""
        config = self.module.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return getattr(config, "shift_factor", None) or 0.0, None, config.scaling_factor
        shaped = [torch.tensor(values).view(1, -1, 1, 1).to(latents.device, latents.dtype) for values in (mean, std)]
        return shaped[0], shaped[1], config.scaling_factor

    def fit(self) -> None:
        """The linear map from a latent to the mean colour of its pixels that is best for smooth pictures (least squares)."""
        generator = torch.Generator().manual_seed(0)
        side = FIT_SIZE * self.factor
        coarse = torch.rand(FIT_PICTURES, 3, FIT_COARSE, FIT_COARSE, generator=generator) * 2 - 1
        pixels = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
        latents = torch.cat([self.encode(picture[None], generator) for picture in pixels]).float().cpu()
        colours = F.avg_pool2d(pixels, self.factor).permute(0, 2, 3, 1).reshape(-1, 3)
        rows = latents.permute(0, 2, 3, 1).reshape(-1, self.num_channels)
        self.projection = torch.linalg.lstsq(_with_constant(rows), colours).solution

    def preview(self, latents: torch.Tensor) -> np.ndarray | None:
        """uint8 [h, w, 3], one pixel for each latent of [1, C, h, w]."""
        if self.projection is None:
            return None
        rows = latents[0].float().cpu().permute(1, 2, 0)
        return to_uint8((_with_constant(rows) @ self.projection).permute(2, 0, 1)[None])[0]


class PixelSpace(Vae):
    """No VAE: latents are the pixels."""

    def __init__(self, num_channels: int) -> None:
        self.module = None
        self.factor = 1
        self.num_channels = num_channels

    def encode(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return pixels.mean(1, keepdim=True) if self.num_channels == 1 else pixels

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.expand(-1, 3, -1, -1) if self.num_channels == 1 else latents

    def fit(self) -> None:
        pass

    def preview(self, latents: torch.Tensor) -> np.ndarray | None:
        return to_uint8(self.decode(latents))[0]


def _with_constant(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def to_uint8(pixels: torch.Tensor) -> list[np.ndarray]:
    """Of [B, 3, H, W] in [-1, 1] each picture, [H, W, 3], as diffusers rounds it."""
    shown = (pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return list((shown * 255).round().astype(np.uint8))


def from_uint8(image: np.ndarray) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1], laid out as diffusers does: convolutions choose their sums by it."""
    return torch.from_numpy(image[None].astype(np.float32) / 255.0).permute(0, 3, 1, 2) * 2.0 - 1.0


def noise_like(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Drawn on the CPU wherever the model is: a seed means the same picture on each device."""
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
