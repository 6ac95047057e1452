"""Which digit a picture shows, and in what colour: learned in a second or two from real digits alone."""

from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from torch.nn import functional

from fairlead.cli.demo_models.digits.pictures import COLOURS, SEED, SIZES, draw, from_pixels, ink_of, originals

DRAWN = 4
"""Times that each digit is drawn to learn from."""


class Judge(Struct, frozen=True):
    classifier: Any
    accuracy: float
    """On pictures of digits held out of its training, and of the image model's."""

    def digits(self, pixels: np.ndarray) -> np.ndarray:
        """Of uint8 [N, 32, 32, 3], what each shows."""
        return np.asarray(self.classifier.predict(_features(from_pixels(pixels))))


def train_judge() -> Judge:
    from sklearn.svm import SVC

    generator = torch.Generator().manual_seed(SEED)
    digits, held_out, shown, shown_held_out = originals()

    def drawn(some: torch.Tensor) -> np.ndarray:
        colours, sizes = (list(islice(cycle(names), len(some))) for names in (COLOURS, SIZES))
        return _features(draw(some, colours, sizes, generator=generator))

    classifier = SVC(C=10, gamma=0.02).fit(drawn(digits.repeat(DRAWN, 1, 1, 1)), shown.repeat(DRAWN).numpy())
    right = classifier.predict(drawn(held_out)) == shown_held_out.numpy()
    return Judge(classifier, float(np.mean(right)))


def _features(pictures: torch.Tensor) -> np.ndarray:
    """The ink in 16x16 pixels, moved to the middle and brought to one size."""
    ink = ink_of(pictures)
    weight = ink.flatten(1) / ink.flatten(1).sum(1, keepdim=True).clamp_min(1e-6)
    at = torch.linspace(-1, 1, ink.shape[-1])
    y, x = (axis.flatten() for axis in torch.meshgrid(at, at, indexing="ij"))
    middle_x, middle_y = weight @ x, weight @ y
    spread = ((weight @ (x * x + y * y)) - middle_x**2 - middle_y**2).clamp_min(1e-3).sqrt() / 0.5
    none = torch.zeros_like(spread)
    grid = functional.affine_grid(
        torch.stack([spread, none, middle_x, none, spread, middle_y], 1).view(-1, 2, 3), [len(ink), 1, 16, 16], align_corners=False
    )
    # Paper outside of the picture.
    return np.asarray(functional.grid_sample(ink, grid, align_corners=False).flatten(1).numpy())


def colours(pixels: np.ndarray) -> list[str]:
    """The name of the ink of each picture: the nearest to its darkest eighth."""
    names, inks = list(COLOURS), np.array(list(COLOURS.values()), np.float64)
    found = []
    for picture in pixels.reshape(len(pixels), -1, 3).astype(np.float64):
        inked = picture[np.argsort(picture.min(1))[: len(picture) // 32]].mean(0)
        found.append(names[int(np.argmin(((inks - inked) ** 2).sum(1)))])
    return found
