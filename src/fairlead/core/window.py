"""What the gateway tells control: outcomes of the requests of one model, by version and class, in a span of time."""

import math

from msgspec import Struct, field

GROWTH = 1.02
"""Each bucket of a histogram is so much wider than the one before: quantiles are right to 2%."""
LEAST = 1e-6
"""Seconds: the upper edge of bucket 0."""
_SCALE = 1.0 / math.log(GROWTH)
_SHIFT = -math.log(LEAST) * _SCALE

Histogram = dict[int, int]
"""Bucket → count. Edges are the same everywhere and always, so that histograms add up exactly."""


def bucket_of(seconds: float) -> int:
    return 0 if seconds <= LEAST else math.ceil(math.log(seconds) * _SCALE + _SHIFT)


def edge_of(bucket: int) -> float:
    """The upper edge, in seconds."""
    return float(LEAST * GROWTH**bucket)


def quantile_bucket(histogram: Histogram, q: float) -> int:
    """The bucket that holds the quantile; -1 of an empty histogram."""
    total = sum(histogram.values())
    if not total:
        return -1
    rank, seen = q * total, 0
    for bucket in sorted(histogram):
        seen += histogram[bucket]
        if seen >= rank:
            return bucket
    return max(histogram)


def num_above(histogram: Histogram, bucket: int) -> int:
    """Observations beyond the upper edge of a bucket."""
    return sum(count for each, count in histogram.items() if each > bucket)


def add(into: Histogram, other: Histogram) -> None:
    for bucket, count in other.items():
        into[bucket] = into.get(bucket, 0) + count


class Tally(Struct, kw_only=True):
    """Requests of one version and class that were given to it by chance: those that name a version are not among them."""

    requests: int = 0
    """That ended, well or badly; not those whose caller left."""
    errors: int = 0
    """Of `requests`: whatever the version did not answer well, whosever fault."""
    nonfinite: int = 0
    """Of `requests`: answers that hold NaN or infinity."""
    cancelled: int = 0
    latency: Histogram = field(default_factory=dict)
    """Seconds until the whole answer, of those that went well."""
    first: Histogram = field(default_factory=dict)
    """Seconds until the first piece, of answers in pieces."""
    per_token: Histogram = field(default_factory=dict)
    """Seconds of each token after the first, one entry an answer."""

    def add(self, other: "Tally") -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.nonfinite += other.nonfinite
        self.cancelled += other.cancelled
        add(self.latency, other.latency)
        add(self.first, other.first)
        add(self.per_token, other.per_token)


class Window(Struct, kw_only=True):
    """What happened in one span. Taken by control and begun anew; windows of several gateways add up."""

    model: str
    begin: float
    """Seconds since 1970."""
    end: float
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)
    """Version → class of service → what happened."""

    def tally(self, version: str, qos_class: str) -> Tally:
        """Made where there is none yet."""
        return self.tallies.setdefault(version, {}).setdefault(qos_class, Tally())

    def merge(self, other: "Window") -> None:
        self.begin, self.end = min(self.begin, other.begin), max(self.end, other.end)
        for version, classes in other.tallies.items():
            for qos_class, tally in classes.items():
                self.tally(version, qos_class).add(tally)

    def of(self, version: str) -> Tally:
        """All classes together."""
        total = Tally()
        for tally in self.tallies.get(version, {}).values():
            total.add(tally)
        return total
