"""Pictures of the same prompt and seed."""

import io

import numpy as np
from msgspec import Struct
from PIL import Image

from fairlead.control.compare.verdict import FAR, SAME, Verdict
from fairlead.core.generation import Picture
from fairlead.core.rollout import ShadowRules

SIDE = 256
"""Pixels of the longer side, at which they are compared."""
MAX_PIXELS = 64 << 20
WINDOW = 8
"""Pixels of the side of what is compared at once."""
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class Pictures(Struct, kw_only=True, omit_defaults=True):
    num: int = 0
    similarity: float = 0.0
    """Sum."""
    least: float = 1.0

    def add(self, champion: Picture, candidate: Picture, rules: ShadowRules) -> Verdict:
        """Raises OSError for a file that cannot be read."""
        self.num += 1
        if (champion.width, champion.height) != (candidate.width, candidate.height):
            self.least = min(self.least, 0.0)
            return Verdict(False, FAR, f"{candidate.width} x {candidate.height} pixels instead of {champion.width} x {champion.height}")
        if champion.data == candidate.data:
            self.similarity += 1.0
            return SAME
        found = similarity(pixels(champion.data), pixels(candidate.data))
        self.similarity += found
        self.least = min(self.least, found)
        return SAME if found >= rules.min_similarity else Verdict(False, 1.0 - found, f"structural similarity {found:.3f}")

    def merge(self, other: "Pictures") -> None:
        self.num += other.num
        self.similarity += other.similarity
        self.least = min(self.least, other.least)

    def describe(self) -> dict[str, object]:
        return {"pictures": self.num, "mean_similarity": self.similarity / max(self.num, 1), "least_similarity": self.least}


def pixels(data: bytes) -> np.ndarray:
    """Height x width x RGB. Raises OSError."""
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise OSError("the picture is too large to be compared")
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        return np.asarray(small, np.float64)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004) over windows of 8 x 8, mean of the colours: 1 for the same picture."""
    if one.shape[0] < WINDOW or one.shape[1] < WINDOW:
        return 1.0 if np.array_equal(one, other) else 0.0
    mean, mean_other = means(one), means(other)
    square, square_other, product = mean * mean, mean_other * mean_other, mean * mean_other
    variance, variance_other = means(one * one) - square, means(other * other) - square_other
    covariance = means(one * other) - product
    top = (2 * product + C1) * (2 * covariance + C2)
    return float((top / ((square + square_other + C1) * (variance + variance_other + C2))).mean())


def means(image: np.ndarray) -> np.ndarray:
    """Of every window."""
    sums = np.zeros((image.shape[0] + 1, image.shape[1] + 1, image.shape[2]))
    sums[1:, 1:] = image.cumsum(axis=0).cumsum(axis=1)
    windows: np.ndarray = sums[WINDOW:, WINDOW:] - sums[:-WINDOW, WINDOW:] - sums[WINDOW:, :-WINDOW] + sums[:-WINDOW, :-WINDOW]
    return windows / (WINDOW * WINDOW)
