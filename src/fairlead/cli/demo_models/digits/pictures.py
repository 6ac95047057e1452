"""Handwritten digits of scikit-learn, drawn anew in ink on white paper: coloured, and each time a little different."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PIXELS = 32
SHAPE = 14
"""Pixels a side of a digit, once it is in the middle and of one size."""
COLOURS = {
    "black": (24, 24, 32),
    "red": (214, 39, 40),
    "orange": (245, 140, 20),
    "green": (40, 150, 60),
    "blue": (35, 90, 210),
    "purple": (140, 60, 180),
}
SIZES = {"small": 0.55, "medium": 0.8, "large": 1.0}
"""Of the picture's height, how much the digit fills."""
HELD_OUT = 0.25
SEED = 7

_SIDE = 10
"""Of the originals' 8 pixels, with a frame of paper around them."""
_DETAIL = 12
_FAINT, _FULL = 0.3, 0.65
"""Grey that is still paper, and grey that is all ink: between them lies the stroke's soft edge."""


def originals() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits to learn from, digits held out, and what each of them shows; a digit is [1, 120, 120] from 0 (paper) to 1 (ink)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts: list[np.ndarray] = train_test_split(data.images, data.target, test_size=HELD_OUT, random_state=SEED, stratify=data.target)
    x, x_out, y, y_out = (torch.from_numpy(part) for part in parts)
    return _enlarged(x), _enlarged(x_out), y, y_out


def _enlarged(images_N88: Tensor) -> Tensor:
    framed = functional.pad(images_N88[:, None].float() / 16, [(_SIDE - 8) // 2] * 4)
    return functional.interpolate(framed, size=(_SIDE * _DETAIL,) * 2, mode="bicubic", align_corners=False)


def draw(digits: Tensor, colours: Sequence[str], sizes: Sequence[str], *, generator: torch.Generator) -> Tensor:
    """Pictures [N, 3, 32, 32] from -1 to 1, each digit turned, slanted, stretched and moved at random."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(digits), generator=generator)

    scale = torch.tensor([SIZES[size] for size in sizes]) * between(0.94, 1.06)
    wide, turn, slant = scale * between(0.92, 1.1), between(-0.12, 0.12), between(-0.08, 0.08)
    free = 0.05 + 0.3 * (1 - scale)
    # The grid leads from the picture to the original: it divides by what the digit is to grow by.
    cos, sin = torch.cos(turn), torch.sin(turn)
    across, down = free * between(-1, 1), free * between(-1, 1)
    rows = [cos / wide, (sin + slant) / wide, across / wide, -sin / scale, cos / scale, down / scale]
    grid = functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(digits), 1, PIXELS, PIXELS], align_corners=False)
    grey = functional.grid_sample(digits, grid, align_corners=False)
    ink = ((grey - _FAINT) / (_FULL - _FAINT)).clamp(0, 1)
    ink = ink * ink * (3 - 2 * ink)
    colour = torch.tensor([COLOURS[name] for name in colours], dtype=torch.float32)[:, :, None, None] / 127.5 - 1
    return 1 + ink * (colour - 1)


def ink_of(pictures: Tensor) -> Tensor:
    """How much of each pixel is ink, in whatever colour: [N, 1, H, W] from 0 to 1, of pictures from -1 to 1."""
    ink = (1 - pictures.amin(1, keepdim=True)) / 2
    # Paper that is not quite white is paper.
    return (ink / ink.amax((2, 3), keepdim=True).clamp_min(0.25) - 0.15).clamp_min(0) / 0.85


def shape_of(ink: Tensor) -> Tensor:
    """A digit's shape, wherever in its picture it is and however large: [N, SHAPE * SHAPE]."""
    at = (2 * torch.arange(PIXELS) + 1) / PIXELS - 1
    y, x = (axis.flatten() for axis in torch.meshgrid(at, at, indexing="ij"))
    weight = ink.flatten(1) / ink.flatten(1).sum(1, keepdim=True).clamp_min(1e-6)
    middle_x, middle_y = weight @ x, weight @ y
    spread = ((weight @ (x * x + y * y)) - middle_x * middle_x - middle_y * middle_y).clamp_min(1e-3).sqrt()
    # Twice the spread either way holds a digit whole.
    reach = 2 * spread[:, None] * ((2 * torch.arange(SHAPE) + 1) / SHAPE - 1)
    columns, rows = middle_x[:, None] + reach, middle_y[:, None] + reach
    grid = torch.stack([columns[:, None, :].expand(-1, SHAPE, -1), rows[:, :, None].expand(-1, -1, SHAPE)], 3)
    return functional.grid_sample(ink, grid, align_corners=False).flatten(1)


def as_pixels(pictures: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    pixels: Any = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.asarray(pixels)


def from_pixels(pixels: np.ndarray) -> Tensor:
    """The reverse: [N, 3, H, W] from -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
