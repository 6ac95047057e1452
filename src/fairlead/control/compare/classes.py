"""Classes: labels, and probabilities of classes."""

import numpy as np
from msgspec import Struct, field

from fairlead.control.compare.spread import add, psi_of
from fairlead.control.compare.verdict import FAR, SAME, Verdict

MAX_CLASSES = 256
OTHER = "(other)"
"""Of classes beyond so many."""
NUM_BINS = 10
"""Of confidence."""


class Classes(Struct, kw_only=True, omit_defaults=True):
    """One output of labels or of probabilities, one for each row."""

    num: int = 0
    """Rows."""
    num_same: int = 0
    champion: dict[str, int] = field(default_factory=dict)
    """Class → how often it was the first choice."""
    candidate: dict[str, int] = field(default_factory=dict)
    champion_confidence: dict[int, int] = field(default_factory=dict)
    """Of the first choice: tenths → count."""
    candidate_confidence: dict[int, int] = field(default_factory=dict)
    confidence: float = 0.0
    """Sum of the candidate's minus the champion's."""

    def add_labels(self, champion: np.ndarray, candidate: np.ndarray) -> Verdict:
        if champion.shape != candidate.shape:
            return Verdict(False, FAR, f"shape {list(candidate.shape)} instead of {list(champion.shape)}")
        return self._rows([name_of(each) for each in champion.reshape(-1)], [name_of(each) for each in candidate.reshape(-1)])

    def add_probabilities(self, champion: np.ndarray, candidate: np.ndarray) -> Verdict:
        if champion.shape != candidate.shape:
            return Verdict(False, FAR, f"shape {list(candidate.shape)} instead of {list(champion.shape)}")
        ours, theirs = champion.reshape(-1, champion.shape[-1]), candidate.reshape(-1, candidate.shape[-1])
        sure, as_sure = ours.max(axis=1), theirs.max(axis=1)
        add(self.champion_confidence, binned(sure))
        add(self.candidate_confidence, binned(as_sure))
        self.confidence += float(np.nansum(as_sure.astype(np.float64) - sure))
        verdict = self._rows([str(each) for each in ours.argmax(axis=1)], [str(each) for each in theirs.argmax(axis=1)])
        if verdict.agree:
            return verdict
        return Verdict(False, float(np.nan_to_num(np.abs(theirs.astype(np.float64) - ours), nan=1.0).max()), verdict.note)

    def _rows(self, ours: list[str], theirs: list[str]) -> Verdict:
        different = [(one, other) for one, other in zip(ours, theirs, strict=True) if one != other]
        self.num += len(ours)
        self.num_same += len(ours) - len(different)
        for counts, names in ((self.champion, ours), (self.candidate, theirs)):
            for name in names:
                bump(counts, name, 1)
        if not different:
            return SAME
        return Verdict(False, len(different) / len(ours), f"class {different[0][1]} instead of {different[0][0]}")

    def merge(self, other: "Classes") -> None:
        self.num += other.num
        self.num_same += other.num_same
        self.confidence += other.confidence
        for counts, more in ((self.champion, other.champion), (self.candidate, other.candidate)):
            for name, count in more.items():
                bump(counts, name, count)
        add(self.champion_confidence, other.champion_confidence)
        add(self.candidate_confidence, other.candidate_confidence)

    def describe(self) -> dict[str, object]:
        num = max(self.num, 1)
        found: dict[str, object] = {
            "rows": self.num,
            "same": self.num_same / num,
            "psi": psi_of(self.champion, self.candidate),
            "champion": dict(self.champion),
            "candidate": dict(self.candidate),
        }
        if self.champion_confidence:
            found["confidence_shift"] = self.confidence / num
            found["confidence_psi"] = psi_of(self.champion_confidence, self.candidate_confidence)
        return found


class Calibration(Struct, kw_only=True, omit_defaults=True):
    """One version's answers, held against what was true."""

    num: int = 0
    num_right: int = 0
    """The first choice was it; of numbers none."""
    squares: float = 0.0
    """Sum of (probability of what was true - 1)², or of a number's (answer - truth)²."""
    distance: float = 0.0
    """Sum of |answer - truth|, of numbers."""
    bins: dict[int, tuple[int, float, int]] = field(default_factory=dict)
    """Tenths of confidence → how many, the sum of their confidence, how many were right."""

    def add_row(self, answer: np.ndarray, truth: float) -> None:
        """`answer`: probabilities of classes, of which `truth` is an index, or one number."""
        self.num += 1
        if answer.size == 1:
            value = float(answer[0])
            self.squares += (value - truth) ** 2
            self.distance += abs(value - truth)
            if 0.0 <= value <= 1.0 and truth in (0.0, 1.0):
                self._bin(max(value, 1.0 - value), (value >= 0.5) == bool(truth))
            return
        index = int(truth)
        self.squares += (1.0 - (float(answer[index]) if 0 <= index < answer.size else 0.0)) ** 2
        self._bin(float(answer.max()), int(answer.argmax()) == index)

    def _bin(self, confidence: float, right: bool) -> None:
        self.num_right += right
        at = min(int(confidence * NUM_BINS), NUM_BINS - 1)
        num, total, num_right = self.bins.get(at, (0, 0.0, 0))
        self.bins[at] = num + 1, total + confidence, num_right + right

    def merge(self, other: "Calibration") -> None:
        self.num += other.num
        self.num_right += other.num_right
        self.squares += other.squares
        self.distance += other.distance
        for at, (num, total, num_right) in other.bins.items():
            own = self.bins.get(at, (0, 0.0, 0))
            self.bins[at] = own[0] + num, own[1] + total, own[2] + num_right

    def describe(self) -> dict[str, object]:
        if not self.num:
            return {"labels": 0}
        found: dict[str, object] = {"labels": self.num, "mean_square": self.squares / self.num}
        if self.bins:
            found["accuracy"] = self.num_right / self.num
            num = sum(each[0] for each in self.bins.values())
            found["calibration_error"] = sum(abs(total - right) for _, total, right in self.bins.values()) / num
        else:
            found["mean_distance"] = self.distance / self.num
        return found


def probabilities(array: np.ndarray) -> bool:
    """Whether rows of it are probabilities of classes."""
    if array.ndim < 2 or array.shape[-1] < 2 or not array.size:
        return False
    values = array.reshape(-1, array.shape[-1])[:256].astype(np.float64)
    return bool((values >= -1e-6).all() and (np.abs(values.sum(axis=1) - 1.0) < 1e-3).all())


def name_of(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def bump(counts: dict[str, int], name: str, by: int) -> None:
    if name not in counts and len(counts) >= MAX_CLASSES:
        name = OTHER
    counts[name] = counts.get(name, 0) + by


def binned(confidence: np.ndarray) -> dict[int, int]:
    values = np.nan_to_num(confidence.astype(np.float64), nan=0.0)
    found, counts = np.unique(np.clip((values * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1), return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
