"""How values are spread: counts in buckets whose edges are the same everywhere, so that they add up exactly. And how two spreads differ."""

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

Spread = dict[int, int]
"""Bucket → count. Bucket 0 holds what is next to nothing, n and -n hold x and -x; each is 2% wider than the one before."""
GROWTH = 1.02
LEAST = 1e-9
MAX_BUCKET = 10_000
FEW = 32
"""Values up to which plain Python is quicker."""
_WIDTH = math.log(GROWTH)
NUM_BINS = 10
K = TypeVar("K", bound=Hashable)


def spread(values: np.ndarray) -> Spread:
    """Of finite values; others are not counted."""
    if values.size <= FEW:
        found: Spread = {}
        for value in values.reshape(-1).tolist():
            if math.isfinite(value):
                size = 0 if abs(value) <= LEAST else min(math.ceil(math.log(abs(value) / LEAST) / _WIDTH), MAX_BUCKET)
                bucket = int(math.copysign(size, value))
                found[bucket] = found.get(bucket, 0) + 1
        return found
    values = np.asarray(values, np.float64).reshape(-1)
    values = values[np.isfinite(values)]
    sizes = np.abs(values)
    with np.errstate(divide="ignore"):
        buckets = np.where(sizes <= LEAST, 0.0, np.ceil(np.log(sizes / LEAST) / _WIDTH))
    buckets = np.sign(values) * np.minimum(buckets, MAX_BUCKET)
    numbers, counts = np.unique(buckets.astype(np.int64), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def add(into: dict[K, int], other: Mapping[K, int]) -> None:
    for key, count in other.items():
        into[key] = into.get(key, 0) + count


def ks(ours: Spread, theirs: Spread) -> float | None:
    """Kolmogorov and Smirnov's distance: the most by which the shares of what is at most x differ. None: one of them is empty."""
    total, other = sum(ours.values()), sum(theirs.values())
    if not total or not other:
        return None
    most = below = below_other = 0.0
    for bucket in sorted(ours.keys() | theirs.keys()):
        below += ours.get(bucket, 0) / total
        below_other += theirs.get(bucket, 0) / other
        most = max(most, abs(below - below_other))
    return most


def psi(ours: Spread, theirs: Spread) -> float | None:
    """The population stability index, in bins that hold a tenth of `ours` each."""
    total = sum(ours.values())
    if not total or not theirs:
        return None
    bins: list[int] = []
    """The last bucket of each."""
    seen = 0
    for bucket in sorted(ours):
        seen += ours[bucket]
        if seen >= total * (len(bins) + 1) / NUM_BINS and len(bins) < NUM_BINS - 1:
            bins.append(bucket)
    binned: list[dict[int, int]] = []
    for each in (ours, theirs):
        counts: dict[int, int] = {}
        for bucket, count in each.items():
            at = int(np.searchsorted(bins, bucket))
            counts[at] = counts.get(at, 0) + count
        binned.append(counts)
    return psi_of(binned[0], binned[1])


def psi_of(ours: Mapping[K, int], theirs: Mapping[K, int]) -> float | None:
    """Of what is counted by kind. Half a count stands for none, so that few of them do not make it infinite."""
    total, other = sum(ours.values()), sum(theirs.values())
    if not total or not other:
        return None
    index = 0.0
    for key in ours.keys() | theirs.keys():
        share, share_other = max(ours.get(key, 0), 0.5) / total, max(theirs.get(key, 0), 0.5) / other
        index += (share_other - share) * math.log(share_other / share)
    return index
