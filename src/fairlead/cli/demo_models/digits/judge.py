"""Which digit a picture shows, and in what colour: learned in a second or two from real digits alone."""

from random import Random
from typing import Any

import numpy as np
import torch
from msgspec import Struct

from fairlead.cli.demo_models.digits.pictures import COLOURS, SEED, SIZES, draw, from_pixels, ink_of, originals, shape_of

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

    rng, generator = Random(SEED), torch.Generator().manual_seed(SEED)
    digits, held_out, shown, shown_held_out = originals()

    def drawn(some: torch.Tensor) -> np.ndarray:
        colours, sizes = (rng.choices(tuple(names), k=len(some)) for names in (COLOURS, SIZES))
        return _features(draw(some, colours, sizes, generator=generator))

    classifier = SVC(C=10, gamma=0.03).fit(drawn(digits.repeat(DRAWN, 1, 1, 1)), shown.repeat(DRAWN).numpy())
    right = classifier.predict(drawn(held_out)) == shown_held_out.numpy()
    return Judge(classifier, float(np.mean(right)))


def _features(pictures: torch.Tensor) -> np.ndarray:
    return np.asarray(shape_of(ink_of(pictures)).numpy())


def colours(pixels: np.ndarray) -> list[str]:
    """The name of the ink of each picture: the nearest to the darkest 32nd of its pixels."""
    names, inks = list(COLOURS), np.array(list(COLOURS.values()), np.float64)
    found = []
    for picture in pixels.reshape(len(pixels), -1, 3).astype(np.float64):
        inked = picture[np.argsort(picture.min(1))[: len(picture) // 32]].mean(0)
        found.append(names[int(np.argmin(((inks - inked) ** 2).sum(1)))])
    return found
