"""Embeddings: how they point."""

import numpy as np
from msgspec import Struct, field

from fairlead.control.compare.spread import Spread, add
from fairlead.control.compare.verdict import FAR, SAME, Verdict
from fairlead.core.rollout import ShadowRules

LEAST_SIZE = 16
"""Components, from which on rows of length 1 are taken for embeddings."""


class Vectors(Struct, kw_only=True, omit_defaults=True):
    num: int = 0
    cosine: float = 0.0
    """Sum."""
    least: float = 1.0
    distances: Spread = field(default_factory=dict)
    """1 - cosine, in thousandths, rounded up."""

    def add(self, champion: np.ndarray, candidate: np.ndarray, rules: ShadowRules) -> Verdict:
        """Rows of vectors."""
        if champion.shape != candidate.shape:
            return Verdict(False, FAR, f"{candidate.shape[-1]} components instead of {champion.shape[-1]}")
        ours, theirs = champion.astype(np.float64), candidate.astype(np.float64)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        dots = (ours * theirs).sum(axis=1)
        cosines = np.where(lengths > 0, dots / np.where(lengths > 0, lengths, 1.0), (ours == theirs).all(axis=1))
        cosines = np.nan_to_num(np.clip(cosines, -1.0, 1.0), nan=-1.0)
        least = float(cosines.min())
        self.num += len(cosines)
        self.cosine += float(cosines.sum())
        self.least = min(self.least, least)
        found, counts = np.unique(np.ceil((1.0 - cosines) * 1000 - 1e-6).astype(np.int64), return_counts=True)
        add(self.distances, dict(zip(found.tolist(), counts.tolist(), strict=True)))
        return SAME if least >= rules.min_cosine else Verdict(False, 1.0 - least, f"cosine {least:.4f}")

    def merge(self, other: "Vectors") -> None:
        self.num += other.num
        self.cosine += other.cosine
        self.least = min(self.least, other.least)
        add(self.distances, other.distances)

    def describe(self) -> dict[str, object]:
        return {"vectors": self.num, "mean_cosine": self.cosine / max(self.num, 1), "least_cosine": self.least, "p95_cosine": self._p95()}

    def _p95(self) -> float | None:
        """What 95 of 100 are above."""
        seen = 0
        for bucket in sorted(self.distances):
            seen += self.distances[bucket]
            if seen >= 0.95 * self.num:
                return 1.0 - bucket / 1000
        return None


def unit_vectors(array: np.ndarray) -> bool:
    """Whether rows of it are embeddings, as most models give them: of length 1."""
    if array.ndim != 2 or array.shape[-1] < LEAST_SIZE or not array.size:
        return False
    return bool((np.abs(np.linalg.norm(array[:256].astype(np.float64), axis=1) - 1.0) < 1e-3).all())
