"""Statistics that may be looked at as often as one likes: the chance of a false alarm is bounded over all looks together.

Three kinds of test compare a candidate with the champion that serves beside it, at the same time:

* `CountTest`: how many of the requests ended badly. Given how many requests each version had in a span, and how many of both ended
  badly, the candidate's part of them is hypergeometric if it is no worse, whatever the rate is and does from span to span. The
  likelihood ratio of Fisher's noncentral hypergeometric against it, multiplied over spans, is a test martingale; by Ville's
  inequality it ever reaches 1/alpha with probability alpha at most.
* `QuantileTest`: how many of the answers were slower than the champion's own quantile of the time before; then as above.
* `MeanTest`: scores within bounds, by empirical-Bernstein confidence sequences (Waudby-Smith and Ramdas, 2023).

`rate_interval` and `quantile_interval` are time-uniform, too (the beta mixture of Robbins; Howard and Ramdas, 2022): for reports.
"""

import math
from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from fairlead.core.window import GROWTH, Histogram, add, edge_of, num_above, quantile_bucket

ODDS = (1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""What the alternative may be, in multiples of what is tolerated: a mixture, because nobody knows how bad a candidate is."""
_PRIOR = (0.10, 0.20, 0.30, 0.20, 0.10, 0.06, 0.04)
_LOG_ODDS = np.log(np.array(ODDS))
_LOG_PRIOR = np.log(np.array(_PRIOR))
_LOG_2 = math.log(2.0)
MOST_GAIN = 1.0
"""Of one span, in log e: what happened at one time is not believed alone. A part of an e-value that is cut off makes it no larger."""
LEAST_SPAN = 20
"""Requests of both versions, after which a span is counted. Less is put together with what comes next: one request alone tells nothing."""


class Interval(Struct, frozen=True):
    """A value and where it may lie; None: nothing is known."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    num: int = 0
    """Observations."""


class Counts(Struct, frozen=True, array_like=True):
    """Requests of both versions, and those that ended badly."""

    champion: int = 0
    champion_bad: int = 0
    candidate: int = 0
    candidate_bad: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.champion + other.champion,
            self.champion_bad + other.champion_bad,
            self.candidate + other.candidate,
            self.candidate_bad + other.candidate_bad,
        )

    @property
    def can_be_compared(self) -> bool:
        return self.champion > 0 and self.candidate > 0 and self.champion + self.candidate >= LEAST_SPAN


class CountTest(Struct, frozen=True, kw_only=True, tag="counts"):
    """Whether the candidate's odds of a bad end are more than 1 + `tolerance` times the champion's."""

    alpha: float
    tolerance: float = 0.0
    log_e: tuple[tuple[float, ...], ...] = ((0.0,) * len(ODDS),)
    """A row a start (see `restarted`), a column an alternative."""
    waiting: dict[str, Counts] = field(default_factory=dict)
    """By class of service: what was not compared yet."""
    seen: Counts = Counts()

    def observed(self, spans: Mapping[str, Counts]) -> Self:
        """With what came, by class. It is compared later, together with what comes until then."""
        waiting, seen = dict(self.waiting), self.seen
        for qos_class, counts in spans.items():
            seen += counts
            waiting[qos_class] = waiting.get(qos_class, Counts()) + counts
        return replace(self, waiting=waiting, seen=seen)

    def compared(self) -> Self:
        """Each class is compared with itself only, since a version may be given more of one class by chance.

        Requests that fail together (a replica stands still for a second) are not as many witnesses as they are requests: what one span
        can gain is bounded, so that it takes several.
        """
        log_e, waiting = np.array(self.log_e), dict(self.waiting)
        for qos_class, counts in self.waiting.items():
            # When to compare depends on how many requests there were, never on how they ended: that would be peeking.
            if counts.can_be_compared:
                del waiting[qos_class]
                log_e = log_e + np.minimum(log_ratios(counts, 1.0 + self.tolerance), MOST_GAIN)
        return replace(self, log_e=tuple(map(tuple, log_e.tolist())), waiting=waiting)

    def restarted(self) -> Self:
        """From here a second test runs beside those from before, on a part of alpha that was kept for it.

        A candidate that did well for long has gathered so much in its favour that a later failure would take as long to be believed. Before the first span nothing needs to be begun anew.
        """
        if not any(any(row) for row in self.log_e):
            return replace(self, waiting={})
        return replace(self, log_e=(*self.log_e, (0.0,) * len(ODDS)), waiting={})

    @property
    def log_evidence(self) -> float:
        """The logarithm of the e-value. Start number n has the weight 2^-n; the part of those to come stands at 1."""
        rows = np.array(self.log_e) + _LOG_PRIOR - _LOG_2 * np.arange(1, len(self.log_e) + 1)[:, None]
        return _log_sum(np.append(rows.ravel(), -_LOG_2 * len(self.log_e)))

    @property
    def evidence(self) -> float:
        """0: none; 1: enough."""
        return min(max(self.log_evidence / -math.log(self.alpha), 0.0), 1.0)

    @property
    def worse(self) -> bool:
        return self.log_evidence >= -math.log(self.alpha)

    @property
    def known(self) -> bool:
        return self.seen.champion > 0 and self.seen.candidate > 0

    def intervals(self, alpha: float) -> tuple[Interval, Interval]:
        """The champion's and the candidate's rate."""
        seen = self.seen
        return rate_interval(seen.champion_bad, seen.champion, alpha), rate_interval(seen.candidate_bad, seen.candidate, alpha)


class QuantileTest(Struct, frozen=True, kw_only=True, tag="quantile"):
    """Whether more of the candidate's times than of the champion's lie above the champion's quantile, by a tolerance for the candidate.

    Where the line is drawn was known before the times that are compared: it is the champion's quantile of the step before.
    """

    alpha: float
    q: float
    tolerance: float = 0.0
    line: int = -1
    """Bucket; -1: not known yet."""
    above: CountTest
    recent: Histogram = field(default_factory=dict)
    """The champion's since the line was drawn."""
    champion: Histogram = field(default_factory=dict)
    candidate: Histogram = field(default_factory=dict)

    @classmethod
    def new(cls, *, alpha: float, q: float, tolerance: float) -> Self:
        return cls(alpha=alpha, q=q, tolerance=tolerance, above=CountTest(alpha=alpha))

    @property
    def least(self) -> int:
        """So many times of the champion say where its quantile is."""
        return max(100, math.ceil(5.0 / (1.0 - self.q)))

    def learned(self, champion: Histogram) -> Self:
        """From times of the champion that are not compared."""
        recent = _sum(self.recent, champion)
        return replace(self, recent=recent)._drawn() if self.line < 0 else replace(self, recent=recent)

    def observed(self, spans: Mapping[str, tuple[Histogram, Histogram]]) -> Self:
        """By class: times of the champion and of the candidate."""
        own, others = _sum(*(each for each, _ in spans.values())), _sum(*(each for _, each in spans.values()))
        new = replace(self, champion=_sum(self.champion, own), candidate=_sum(self.candidate, others))
        if self.line < 0:
            return new.learned(own)
        far = self.line + math.ceil(math.log1p(self.tolerance) / math.log(GROWTH) - 1e-9)
        counts = {
            qos_class: Counts(sum(one.values()), num_above(one, self.line), sum(two.values()), num_above(two, far))
            for qos_class, (one, two) in spans.items()
        }
        return replace(new, above=self.above.observed(counts), recent=_sum(self.recent, own))

    def restarted(self) -> Self:
        return replace(self, above=self.above.restarted())._drawn()

    def compared(self) -> Self:
        return replace(self, above=self.above.compared())

    def _drawn(self) -> Self:
        if sum(self.recent.values()) < self.least:
            return self
        return replace(self, line=quantile_bucket(self.recent, self.q), recent={})

    @property
    def evidence(self) -> float:
        return self.above.evidence

    @property
    def worse(self) -> bool:
        return self.above.worse

    @property
    def known(self) -> bool:
        return self.above.known

    def intervals(self, alpha: float) -> tuple[Interval, Interval]:
        """The champion's and the candidate's quantile, in seconds."""
        return quantile_interval(self.champion, self.q, alpha), quantile_interval(self.candidate, self.q, alpha)


class Arm(Struct, frozen=True):
    """Scores of one version, brought to [0, 1], and what the confidence sequence keeps of them."""

    num: int = 0
    total: float = 0.0
    squares: float = 0.0
    weight: float = 0.0
    """Sum of lambda."""
    weighted: float = 0.0
    """Sum of lambda times score."""
    spread: float = 0.0
    """Sum of psi(lambda) times (score - mean before)²."""

    def with_batch(self, num: int, total: float, squares: float, *, log_term: float) -> "Arm":
        """`num` more. The bet on them (lambda) depends on those before, never on themselves."""
        mean = (0.5 + self.total) / (self.num + 1)
        variance = (0.25 + self.squares - 2 * mean * self.total + self.num * mean * mean) / (self.num + 1)
        end = self.num + num
        bet = min(0.5, math.sqrt(2.0 * log_term / (max(variance, 1e-6) * end * math.log1p(end))))
        around = max(squares - 2 * mean * total + num * mean * mean, 0.0)
        return Arm(
            end,
            self.total + total,
            self.squares + squares,
            self.weight + bet * num,
            self.weighted + bet * total,
            self.spread + (-math.log1p(-bet) - bet) * around,
        )

    def bounds(self, log_term: float) -> tuple[float, float, float]:
        """(lower, centre, upper)."""
        if not self.num:
            return 0.0, 0.5, 1.0
        centre, radius = self.weighted / self.weight, (log_term + self.spread) / self.weight
        return max(centre - radius, 0.0), centre, min(centre + radius, 1.0)


class MeanTest(Struct, frozen=True, kw_only=True, tag="mean"):
    """Whether the candidate's mean score is worse than the champion's by more than `tolerance`."""

    alpha: float
    tolerance: float = 0.0
    low: float = 0.0
    high: float = 1.0
    higher_is_better: bool = True
    champion: Arm = Arm()
    candidate: Arm = Arm()

    @property
    def _log_term(self) -> float:
        """Half of alpha for the champion's bound, half for the candidate's."""
        return math.log(2.0 / self.alpha)

    def observed(self, champion: "Scores", candidate: "Scores") -> Self:
        """`champion` and `candidate`: all that is known by now. What is new since the last time is one batch."""
        return replace(self, champion=self._grown(self.champion, champion), candidate=self._grown(self.candidate, candidate))

    def _grown(self, arm: Arm, scores: "Scores") -> Arm:
        num = scores.num - arm.num
        if num <= 0:
            return arm
        low, width = self.low, self.high - self.low
        total = (scores.total - scores.num * low) / width
        squares = (scores.squares - 2 * low * scores.total + scores.num * low * low) / (width * width)
        return arm.with_batch(num, total - arm.total, squares - arm.squares, log_term=self._log_term)

    @property
    def _lead(self) -> tuple[float, float]:
        """How far the candidate is ahead, at most, and by the centres: in parts of the whole range."""
        champion, candidate = self.champion.bounds(self._log_term), self.candidate.bounds(self._log_term)
        if self.higher_is_better:
            return candidate[2] - champion[0], candidate[1] - champion[1]
        return champion[2] - candidate[0], champion[1] - candidate[1]

    @property
    def worse(self) -> bool:
        return self.known and self._lead[0] < -self.tolerance / (self.high - self.low)

    @property
    def evidence(self) -> float:
        """How much of the way to `worse` is gone: 1 where the bounds no longer reach each other."""
        if not self.known:
            return 0.0
        most, centre = self._lead
        behind = -self.tolerance / (self.high - self.low) - centre
        return 1.0 if self.worse else min(max(behind / max(most - centre, 1e-12), 0.0), 1.0)

    @property
    def known(self) -> bool:
        return self.champion.num > 0 and self.candidate.num > 0

    def compared(self) -> Self:
        return self

    def restarted(self) -> Self:
        return self

    def intervals(self, alpha: float) -> tuple[Interval, Interval]:
        """The champion's and the candidate's mean, at the test's own alpha: what they were weighted for."""
        return self._interval(self.champion), self._interval(self.candidate)

    def _interval(self, arm: Arm) -> Interval:
        if not arm.num:
            return Interval()
        low, width = self.low, self.high - self.low
        lower, _, upper = arm.bounds(self._log_term)
        return Interval(low + width * arm.total / arm.num, low + width * lower, low + width * upper, arm.num)


class Scores(Struct, frozen=True):
    num: int = 0
    total: float = 0.0
    squares: float = 0.0


def log_ratios(counts: Counts, tolerated: float) -> np.ndarray:
    """Of each of ODDS: log of the likelihood of the candidate's part of the bad ends, against that of the odds that are tolerated.

    Of smaller odds than these the expected ratio is less than 1, because it grows with the candidate's part: valid for all of them.
    """
    bad = counts.champion_bad + counts.candidate_bad
    least, most = max(0, bad - counts.champion), min(bad, counts.candidate)
    if least == most:
        return np.zeros(len(ODDS))
    part = np.arange(least, most, dtype=np.float64)
    grows = np.log((counts.candidate - part) * (bad - part)) - np.log((part + 1) * (counts.champion - bad + part + 1))
    parts = np.append(part, most)
    log_weights = np.concatenate(([0.0], np.cumsum(grows + math.log(tolerated))))
    log_weights -= log_weights.max()
    tilted = log_weights + _LOG_ODDS[:, None] * (parts - counts.candidate_bad)
    top = tilted.max(axis=1)
    under = math.log(np.exp(log_weights).sum())
    return np.asarray(under - top - np.log(np.exp(tilted - top[:, None]).sum(axis=1)))


def rate_interval(num: int, of: int, alpha: float) -> Interval:
    """Of a rate: `num` of `of`. It holds at all times at once, with probability 1 - alpha."""
    if not of:
        return Interval()
    value, bound = num / of, -math.log(alpha)
    low = 0.0 if num == 0 else _edge(lambda p: _log_mixture(num, of, p) < bound, inside=value, outside=0.0)
    high = 1.0 if num == of else _edge(lambda p: _log_mixture(num, of, p) < bound, inside=value, outside=1.0)
    return Interval(value, low, high, of)


def quantile_interval(histogram: Histogram, q: float, alpha: float) -> Interval:
    """Of a quantile, in seconds. It holds at all times at once, with probability 1 - alpha."""
    num, bound = sum(histogram.values()), -math.log(alpha)
    if not num:
        return Interval()
    middle = q * num
    least = math.ceil(_edge(lambda count: _log_mixture(count, num, q) < bound, inside=middle, outside=0.0))
    most = math.floor(_edge(lambda count: _log_mixture(count, num, q) < bound, inside=middle, outside=float(num)))
    low = high = None
    seen = 0
    for bucket in sorted(histogram):
        seen += histogram[bucket]
        if low is None and seen >= least:
            low = edge_of(bucket - 1) if bucket > 0 else 0.0
        if seen > most:
            high = edge_of(bucket)
            break
    return Interval(edge_of(quantile_bucket(histogram, q)), low, high, num)


def surely_above(num: int, of: int, rate: float, log_chance: float) -> bool:
    """Whether so many would come with less than exp(-log_chance), were `rate` the true one (Chernoff)."""
    seen = num / of
    if seen <= rate:
        return False
    divergence = seen * math.log(seen / rate) + ((1 - seen) * math.log((1 - seen) / (1 - rate)) if seen < 1 else 0.0)
    return of * divergence >= log_chance


def _log_mixture(num: float, of: int, p: float) -> float:
    """Log of the likelihood of all rates, Beta(1/2, 1/2), against that of `p`."""
    bad, good = num, of - num
    if (p <= 0.0 and bad > 0) or (p >= 1.0 and good > 0):
        return math.inf
    mixed = math.lgamma(bad + 0.5) + math.lgamma(good + 0.5) - math.lgamma(of + 1.0) - math.log(math.pi)
    return mixed - (bad * math.log(p) if bad else 0.0) - (good * math.log1p(-p) if good else 0.0)


def _edge(holds: Callable[[float], bool], *, inside: float, outside: float) -> float:
    """Where between the two it stops to hold."""
    if holds(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return outside


def _sum(*histograms: Histogram) -> Histogram:
    total: Histogram = {}
    for histogram in histograms:
        add(total, histogram)
    return total


def _log_sum(values: np.ndarray) -> float:
    top = float(values.max())
    return top + math.log(float(np.exp(values - top).sum()))
