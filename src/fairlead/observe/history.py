"""The last hour of a server in numbers, for those who look at it now: rates, latencies, and what was busy.

Requests are counted as they end, into bins of BIN_SECONDS. What is shown of the moment is the last WINDOW_BINS of them, and each
POINT_BINS make one point of the hour. All of it is bounded: by time, and by the number of models that are told apart.
Time is handed in by whoever calls `tick`.
"""

import math
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct, field

from fairlead.core.timeline import Timeline

BIN_SECONDS = 2.0
WINDOW_BINS = 5
POINT_BINS = 3
NUM_POINTS = 600
POINT_SECONDS = BIN_SECONDS * POINT_BINS
NUM_SPARKS = 30
"""Points of the small line beside a model."""
MAX_MODELS = 64
"""Whose hour is kept: the latest that had requests."""
MAX_REASONS = 64
FASTEST = 1e-5
PER_DOUBLING = 8
"""Buckets of a latency's doubling: a quantile is right to within 5%."""
NUM_BUCKETS = 30 * PER_DOUBLING
_bounds = [FASTEST * 2 ** (n / PER_DOUBLING) for n in range(NUM_BUCKETS)]
_BOUNDS = np.array(_bounds)
FEW = 50
"""Latencies that are put into their buckets faster one by one."""
OTHER = "other"
NOBODY = ""
"""Stands for all models that are not there."""
SERIES = ("requests", "errors", "refused", "p50", "p95", "p99", "in_flight", "waiting", "tokens", "cost", "kv", "cpu", "rss")
MODEL_SERIES = ("requests", "errors", "refused", "p50", "p95", "p99", "in_flight", "waiting", "tokens", "kv")


class Gauge(NamedTuple):
    """What is true of a model, or of the server, at the moment; None: nobody counts it."""

    in_flight: int | None = None
    waiting: int = 0
    tokens: int | None = None
    """Generated since the start."""
    kv: float | None = None
    """Used, of all."""
    cpu: float = 0.0
    """Cores."""
    rss: int = 0
    """Bytes."""


class Tally(Struct):
    """What ended within a bin."""

    requests: int = 0
    errors: int = 0
    refused: int = 0
    tokens: int = 0
    cost: float = 0.0
    busy_seconds: float = 0.0
    """All that requests took, together."""
    answered: list[float] = field(default_factory=list)
    """Seconds that each of those took which were answered; put into buckets when the bin is over, all at once."""
    buckets: Counter[int] = field(default_factory=Counter)

    def close(self) -> None:
        if len(self.answered) < FEW:
            self.buckets.update(map(bucket, self.answered))
        else:
            places, numbers = np.unique(np.searchsorted(_BOUNDS, self.answered), return_counts=True)
            self.buckets.update(dict(zip(places.tolist(), numbers.tolist(), strict=True)))
        self.answered = []

    def merge(self, other: "Tally") -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.refused += other.refused
        self.tokens += other.tokens
        self.cost += other.cost
        self.busy_seconds += other.busy_seconds
        self.buckets.update(other.buckets)


def bucket(seconds: float) -> int:
    return bisect_left(_bounds, seconds)


def quantiles(buckets: Mapping[int, int], wanted: Sequence[float]) -> list[float | None]:
    """The middle, on a logarithmic scale, of the bucket that each lies in. `wanted` rises."""
    total, found, seen = sum(buckets.values()), list[float | None](), 0
    if not total:
        return [None] * len(wanted)
    ordered = iter(sorted(buckets.items()))
    place, count = next(ordered)
    for quantile in wanted:
        while seen + count < quantile * total:
            seen += count
            place, count = next(ordered)
        found.append(FASTEST * 2 ** ((place - 0.5) / PER_DOUBLING))
    return found


class Bin(Struct):
    total: Tally = field(default_factory=Tally)
    """Of all models, once it is over."""
    models: dict[str, Tally] = field(default_factory=dict)
    """NOBODY's too."""
    reasons: Counter[str] = field(default_factory=Counter)
    generated: Counter[str] = field(default_factory=Counter)
    """Tokens that engines here made meanwhile, by model: requests under way count too."""
    gauge: Gauge = Gauge()
    gauges: Mapping[str, Gauge] = {}


class Points:
    """The hour of one thing: a ring for each series. What nobody knew is a NaN."""

    __slots__ = ("rings",)

    def __init__(self, names: Iterable[str]) -> None:
        self.rings = {name: array("f", (math.nan for _ in range(NUM_POINTS))) for name in names}

    def put(self, place: int, values: Mapping[str, float | None]) -> None:
        for name, ring in self.rings.items():
            value = values[name]
            ring[place] = math.nan if value is None else value

    def read(self, name: str, places: Iterable[int]) -> list[float | None]:
        ring = self.rings[name]
        return [None if math.isnan(value := ring[place]) else float(f"{value:.4g}") for place in places]


class Read(NamedTuple):
    """What the server is asked at each tick."""

    server: Gauge
    models: Mapping[str, Gauge]
    """Of those where there is something to tell."""


class History:
    """A listener of `Finished`, whose owner calls `tick` every BIN_SECONDS."""

    def __init__(self, read: Callable[[], Read], known: Callable[[str], bool] = lambda _: True) -> None:
        """`known`: whether a model is served here or elsewhere: other names are anybody's, and are not told apart."""
        self._read = read
        self._known = known
        self._bin = Bin()
        self._bins: deque[Bin] = deque(maxlen=max(WINDOW_BINS, POINT_BINS))
        self._num_bins = 0
        self._at = array("d", (0.0 for _ in range(NUM_POINTS)))
        self._num_points = 0
        self._server = Points(SERIES)
        self._models: dict[str, Points] = {}
        """In the order of their last requests."""
        self._hours: deque[Counter[str]] = deque(maxlen=NUM_POINTS)
        self._hour: Counter[str] = Counter()
        """Reasons."""
        self._told: dict[str, int] = {}
        """Tokens that each model's engines have told of."""

    def __call__(self, timelines: Sequence[Timeline]) -> None:
        models = self._bin.models
        for timeline in timelines:
            name = timeline.model
            if not name and not timeline.kind:
                continue  # nothing was asked of a model
            tally = models.get(name)
            if tally is None:
                tally = self._tally(name)
            seconds, outcome = timeline.ended - timeline.arrived, timeline.outcome
            tally.requests += 1
            tally.busy_seconds += seconds
            if outcome == "success":
                tally.answered.append(seconds)
            elif outcome != "cancelled":
                self._failed(tally, timeline)
            if timeline.cost:
                tally.cost += timeline.cost
            if timeline.usage is not None and name not in self._told:  # else its engine tells
                tally.tokens += timeline.usage.completion_tokens

    def _tally(self, name: str) -> Tally:
        models = self._bin.models
        if not name or not self._known(name):
            name = NOBODY
        tally = models.get(name)
        if tally is None:
            tally = models[name] = Tally()
        return tally

    def _failed(self, tally: Tally, timeline: Timeline) -> None:
        if timeline.outcome == "failure":
            tally.errors += 1
        else:
            tally.refused += 1
        reasons, reason = self._bin.reasons, timeline.reason or timeline.outcome
        reasons[reason if reason in reasons or len(reasons) < MAX_REASONS else OTHER] += 1

    def tick(self, now: float) -> None:
        """A bin is over. `now`: seconds since 1970, which is shown and nothing else."""
        done, self._bin = self._bin, Bin()
        for tally in done.models.values():
            tally.close()
            done.total.merge(tally)
        server, models = self._read()
        done.gauge, done.gauges = server, models
        for name, gauge in models.items():
            if gauge.tokens is not None:
                # An engine that begins anew counts from nothing.
                done.generated[name] = max(gauge.tokens - self._told.get(name, gauge.tokens), 0)
        self._told = {name: gauge.tokens for name, gauge in models.items() if gauge.tokens is not None}
        self._bins.append(done)
        self._num_bins += 1
        if self._num_bins % POINT_BINS == 0:
            self._point(now)

    # What happens now

    def totals(self) -> dict[str, float | None]:
        """By the names of SERIES: each second's, but for gauges and quantiles."""
        return self._values(list(self._bins)[-WINDOW_BINS:])

    def busiest(self, most: int) -> list[dict[str, Any]]:
        """The models with most requests, then most that are under way."""
        bins = list(self._bins)[-WINDOW_BINS:]
        sums: dict[str, int] = {}
        for each in bins:
            for name, tally in each.models.items():
                if name != NOBODY:
                    sums[name] = sums.get(name, 0) + tally.requests
            for name, gauge in each.gauges.items():
                if gauge.in_flight or gauge.waiting:
                    sums.setdefault(name, 0)
        ahead = sorted(sums, key=lambda name: (-sums[name], name))[:most]
        if len(ahead) < most:  # the latest that had any, so that a table of a quiet server does not empty at once
            ahead += [name for name in reversed(self._models) if name not in sums][: most - len(ahead)]
        places = self._places()[-NUM_SPARKS:]
        shown = []
        for name in ahead:
            points = self._models.get(name)
            spark = [] if points is None else points.read("requests", places)
            shown.append({"model": name, **self._model_values(name, bins), "spark": spark})
        return shown

    def model(self, name: str) -> dict[str, float | None]:
        return self._model_values(name, list(self._bins)[-WINDOW_BINS:])

    def reasons(self) -> list[dict[str, Any]]:
        """Why requests failed or were refused in this hour, the most frequent first."""
        bins = list(self._bins)[-WINDOW_BINS:]
        now = sum((each.reasons for each in bins), Counter[str]())
        hour = self._hour + self._bin.reasons
        length = _length(len(bins))
        return [{"reason": reason, "rate": now[reason] / length, "hour": number} for reason, number in hour.most_common(MAX_REASONS + 1)]

    # The hour

    def series(self, model: str = "") -> dict[str, Any]:
        """Of the server, or of one model: {step, at, series}. A model that had no requests of late has no points."""
        places = self._places()
        points, names = (self._models.get(model), MODEL_SERIES) if model else (self._server, SERIES)
        if points is None:
            places = []
        return {
            "step": POINT_SECONDS,
            "at": [round(self._at[place], 1) for place in places],
            "series": {name: [] if points is None else points.read(name, places) for name in names},
        }

    def _places(self) -> list[int]:
        """Of the rings, from the oldest to the newest."""
        num = min(self._num_points, NUM_POINTS)
        return [place % NUM_POINTS for place in range(self._num_points - num, self._num_points)]

    def _point(self, now: float) -> None:
        bins = list(self._bins)[-POINT_BINS:]
        place = self._num_points % NUM_POINTS
        self._num_points += 1
        self._at[place] = now
        self._server.put(place, self._values(bins))
        for name in [name for each in bins for name in each.models if name != NOBODY]:
            points = self._models.pop(name, None)
            if points is None:
                if len(self._models) >= MAX_MODELS:
                    del self._models[next(iter(self._models))]
                points = Points(MODEL_SERIES)
            self._models[name] = points  # last
        for name, points in self._models.items():
            points.put(place, self._model_values(name, bins))
        if len(self._hours) == NUM_POINTS:
            self._hour -= self._hours[0]
        new = sum((each.reasons for each in bins), Counter[str]())
        self._hours.append(new)
        self._hour += new

    def _values(self, bins: Sequence[Bin]) -> dict[str, float | None]:
        tally = Tally()
        for each in bins:
            tally.merge(each.total)
        gauge, gauges = (bins[-1].gauge, bins[-1].gauges) if bins else (Gauge(), {})
        for name, of_model in gauges.items():
            if of_model.in_flight is not None:
                tally.busy_seconds -= sum(each.models[name].busy_seconds for each in bins if name in each.models)
        generated = sum(sum(each.generated.values()) for each in bins)
        shown = _shown(tally, gauge, generated, len(bins))
        under_way = sum(of_model.in_flight or 0 for of_model in gauges.values()) + (shown["in_flight"] or 0.0)
        return {**shown, "in_flight": round(under_way, 2), "cost": tally.cost / _length(len(bins)), "cpu": gauge.cpu, "rss": gauge.rss}

    def _model_values(self, name: str, bins: Sequence[Bin]) -> dict[str, float | None]:
        tally = Tally()
        for each in bins:
            if name in each.models:
                tally.merge(each.models[name])
        gauge = bins[-1].gauges.get(name, Gauge()) if bins else Gauge()
        return _shown(tally, gauge, sum(each.generated[name] for each in bins), len(bins))


def _length(num_bins: int) -> float:
    return max(num_bins, 1) * BIN_SECONDS


def _shown(tally: Tally, gauge: Gauge, generated: int, num_bins: int) -> dict[str, float | None]:
    length = _length(num_bins)
    p50, p95, p99 = quantiles(tally.buckets, (0.5, 0.95, 0.99))
    return {
        "requests": tally.requests / length,
        "errors": tally.errors / length,
        "refused": tally.refused / length,
        "p50": p50,
        "p95": p95,
        "p99": p99,
        # Where nobody counts those that are under way: so many were, on average.
        "in_flight": round(max(tally.busy_seconds, 0.0) / length, 2) if gauge.in_flight is None else gauge.in_flight,
        "waiting": gauge.waiting,
        "tokens": (tally.tokens + generated) / length,
        "kv": gauge.kv,
    }
