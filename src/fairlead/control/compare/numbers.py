"""Numbers: the outputs of regressions, and scores."""

import numpy as np
from msgspec import Struct, field

from fairlead.control.compare.spread import Spread, add, ks, psi, spread
from fairlead.control.compare.verdict import FAR, SAME, Verdict
from fairlead.core.rollout import ShadowRules

MAX_VALUES = 1024
"""Of one answer that are spread: every n-th of more."""


class Numbers(Struct, kw_only=True, omit_defaults=True):
    """One output of floats."""

    num: int = 0
    """Values."""
    num_close: int = 0
    difference: float = 0.0
    """Sum of candidate minus champion."""
    distance: float = 0.0
    """Sum of |candidate - champion|."""
    most: float = 0.0
    """The greatest of them."""
    champion: Spread = field(default_factory=dict)
    candidate: Spread = field(default_factory=dict)

    def add(self, champion: np.ndarray, candidate: np.ndarray, rules: ShadowRules) -> Verdict:
        if champion.shape != candidate.shape:
            return Verdict(False, FAR, f"shape {list(candidate.shape)} instead of {list(champion.shape)}")
        ours, theirs = np.asarray(champion, np.float64).reshape(-1), np.asarray(candidate, np.float64).reshape(-1)
        both = np.isfinite(ours) & np.isfinite(theirs)
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        with np.errstate(invalid="ignore"):
            apart = np.where(both, np.abs(theirs - ours), np.where(same, 0.0, np.inf))
            allowed = rules.atol + rules.rtol * np.where(both, np.abs(ours), 0.0)
        close = apart <= allowed
        self.num += ours.size
        self.num_close += int(close.sum())
        self.difference += float((theirs[both] - ours[both]).sum())
        self.distance += float(apart[both].sum())
        self.most = max(self.most, float(apart[both].max(initial=0.0)))
        step = -(-max(ours.size, 1) // MAX_VALUES)
        add(self.champion, spread(ours[::step]))
        add(self.candidate, spread(theirs[::step]))
        if close.all():
            return SAME
        at = int(np.argmax(np.where(close, 0.0, np.minimum(apart / np.maximum(allowed, 1e-12), FAR))))
        distance = min(float(apart[at] / max(float(allowed[at]), 1e-12)), FAR)
        return Verdict(False, distance, f"{theirs[at]:.6g} instead of {ours[at]:.6g}" + (f" at {at}" if ours.size > 1 else ""))

    def merge(self, other: "Numbers") -> None:
        self.num += other.num
        self.num_close += other.num_close
        self.difference += other.difference
        self.distance += other.distance
        self.most = max(self.most, other.most)
        add(self.champion, other.champion)
        add(self.candidate, other.candidate)

    def describe(self) -> dict[str, object]:
        num = max(self.num, 1)
        return {
            "values": self.num,
            "close": self.num_close / num,
            "mean_difference": self.difference / num,
            "mean_distance": self.distance / num,
            "max_distance": self.most,
            "psi": psi(self.champion, self.candidate),
            "ks": ks(self.champion, self.candidate),
        }
