"""Whole rollouts on the virtual clock: traffic with errors, latencies and labels, split as the rollout publishes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from fairlead.control.rollout import (
    ENDED,
    Action,
    FeedbackSum,
    Loaded,
    Measured,
    Member,
    Phase,
    Publish,
    Return,
    advance,
    begin,
    default_metrics,
)
from fairlead.core.rollout import MetricRule, RolloutPolicy
from fairlead.core.window import GROWTH, Tally, Window, bucket_of, edge_of

CHAMPION, CANDIDATE = 6, 7
DAY = 86_400.0


@dataclass(frozen=True)
class Kind:
    """Requests of one class of service."""

    name: str = "standard"
    part: float = 1.0
    errors: float = 0.01
    median: float = 0.02
    sigma: float = 0.5
    """Of the logarithm of the latency."""


@dataclass(frozen=True)
class Fault:
    """In what the candidate differs."""

    errors: float = 1.0
    """Times the champion's."""
    latency: float = 1.0
    """All of it, so many times."""
    tail: float = 1.0
    """The p99 only, so many times: from the p95 on latencies are drawn out."""
    from_share: float = 0.0
    """Not before it has such a share of the traffic: it fails under load."""
    nonfinite: float = 0.0
    deaths_per_second: float = 0.0
    score: float = 0.0
    """Added to the mean score."""
    only: str = ""
    """This class only."""


@dataclass(frozen=True)
class Scenario:
    name: str
    rate: float = 100.0
    """Requests a second."""
    kinds: tuple[Kind, ...] = (Kind(),)
    fault: Fault = Fault()
    drift: float = 0.0
    """Errors go up and down by this part of themselves, within 20 minutes, and latencies by a quarter of that."""
    labels: float = 0.0
    """Part of the requests whose score comes back, 5 minutes later."""
    tenants: int = 0
    """Errors come from a tenth of so many tenants, who each keep to one version. 0: every request by itself."""
    stalls: float = 0.0
    """Part of the seconds in which one version stands still: all its requests are slow then. The same part for both."""
    tick: float = 10.0
    policy: RolloutPolicy = field(default_factory=RolloutPolicy)
    limit: float = DAY


@dataclass(frozen=True)
class Ran:
    rolled_back: bool
    promoted: bool
    exposure: float
    seconds: float
    """Since the first step began."""
    step: int
    """From 0, at the decision."""
    reason: str


def simulate(scenario: Scenario, seed: int) -> Ran:
    return Simulation(scenario, np.random.default_rng(seed)).run()


class Simulation:
    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        self.scenario, self.rng, self.now = scenario, rng, 0.0
        self.share = 0.0
        self.deaths = 0
        self.labels: list[tuple[float, int, int, float, float]] = []
        self.scores = {CHAMPION: [0, 0.0, 0.0], CANDIDATE: [0, 0.0, 0.0]}
        metrics = scenario.policy.metrics or default_metrics(False)
        if scenario.labels:
            metrics = (*metrics, MetricRule(name="feedback:score", tolerance=0.02))
        member = Member(model="m", champion=CHAMPION, candidate=CANDIDATE, metrics=metrics)
        self.rollout, _ = begin(
            "r", kind="canary", members=[member], policy=scenario.policy, policy_name="p", actor="sim", now=0.0, validated=True
        )
        if scenario.tenants:
            # Few tenants make most errors, and each of them keeps to one side of the split.
            self.sides = rng.random(scenario.tenants)
            self.faulty = np.zeros(scenario.tenants)
            self.faulty[: max(scenario.tenants // 10, 1)] = 10.0

    def tell(self, event: Measured | Loaded) -> None:
        self.rollout, actions = advance(self.rollout, event, self.now)
        for action in actions:
            self.act(action)

    def act(self, action: Action) -> None:
        match action:
            case Publish():
                self.share = action.share
            case Return():
                self.share = 0.0

    def run(self) -> Ran:
        while self.rollout.phase is Phase.LOADING and self.now < 60.0:
            window = self.window()
            self.tell(Measured(windows={"m": window}))
        self.tell(Loaded(True))
        began = self.now
        while self.rollout.phase not in (*ENDED, Phase.PROMOTED) and self.now - began < self.scenario.limit:
            window = self.window()
            restarts = {"m": self.deaths}
            self.tell(Measured(windows={"m": window}, restarts=restarts, feedback={"m": self.feedback()}))
        counted = self.rollout.counted["m"]
        return Ran(
            rolled_back=self.rollout.phase is Phase.ABORTED,
            promoted=self.rollout.promoted,
            exposure=counted.candidate / max(counted.requests, 1),
            seconds=self.now - began,
            step=self.rollout.step,
            reason=self.rollout.reason,
        )

    def window(self) -> Window:
        """What comes until the next tick."""
        scenario, rng = self.scenario, self.rng
        window = Window(model="m", begin=self.now, end=self.now + scenario.tick)
        swing = 1.0 + scenario.drift * math.sin(self.now / 1200.0 * 2 * math.pi)
        for kind in scenario.kinds:
            num = int(rng.poisson(scenario.rate * kind.part * scenario.tick))
            others = int(rng.binomial(num, self.share))
            for version, requests in ((CHAMPION, num - others), (CANDIDATE, others)):
                if requests:
                    fault = scenario.fault if version == CANDIDATE and scenario.fault.only in ("", kind.name) else Fault()
                    if self.share < fault.from_share:
                        fault = Fault()
                    window.tallies.setdefault(str(version), {})[kind.name] = self.tally(kind, requests, swing, fault)
        if scenario.tenants:
            self.cluster(window, swing)
        self.now += scenario.tick
        if self.share and scenario.fault.deaths_per_second:
            self.deaths += int(rng.poisson(scenario.fault.deaths_per_second * scenario.tick))
        if scenario.labels:
            self.label(window)
        return window

    def tally(self, kind: Kind, requests: int, swing: float, fault: Fault) -> Tally:
        scenario, rng = self.scenario, self.rng
        errors = int(rng.binomial(requests, min(kind.errors * swing * fault.errors, 1.0)))
        shift = round(math.log(1.0 + (swing - 1.0) / 4) / math.log(GROWTH))
        first, parts = latencies(kind, fault)
        num = requests - errors
        if num < len(parts):
            drawn, counts = np.unique(np.searchsorted(np.cumsum(parts), rng.random(num)), return_counts=True)
        else:
            every = rng.multinomial(num, parts)
            drawn = np.flatnonzero(every)
            counts = every[drawn]
        latency = dict(zip((drawn + (first + shift)).tolist(), counts.tolist(), strict=True))
        if scenario.stalls:
            slow = sum(int(rng.poisson(num / scenario.tick)) for _ in range(int(rng.binomial(int(scenario.tick), scenario.stalls))))
            if slow:
                bucket = bucket_of(kind.median * 20)
                latency[bucket] = latency.get(bucket, 0) + slow
        nonfinite = int(rng.binomial(requests, fault.nonfinite)) if fault.nonfinite else 0
        return Tally(requests=requests, errors=errors, nonfinite=nonfinite, latency=latency)

    def cluster(self, window: Window, swing: float) -> None:
        """Requests of tenants who each keep to one version, in place of those that were split one by one."""
        scenario, rng = self.scenario, self.rng
        for version, is_its in ((CHAMPION, self.sides >= self.share), (CANDIDATE, self.sides < self.share)):
            for kind in scenario.kinds:
                per_tenant = scenario.rate * kind.part * scenario.tick / scenario.tenants
                requests = rng.poisson(per_tenant, scenario.tenants)[is_its]
                if not requests.sum():
                    window.tallies.get(str(version), {}).pop(kind.name, None)
                    continue
                errors = rng.binomial(requests, np.minimum(kind.errors * swing * self.faulty[is_its], 1.0)).sum()
                tally = self.tally(kind, int(requests.sum()), swing, Fault())
                tally.errors = int(errors)
                window.tallies.setdefault(str(version), {})[kind.name] = tally

    def label(self, window: Window) -> None:
        for version in (CHAMPION, CANDIDATE):
            num = int(self.rng.binomial(window.of(str(version)).requests, self.scenario.labels))
            right = 0.9 + (self.scenario.fault.score if version == CANDIDATE else 0.0)
            total = float(self.rng.binomial(num, right))
            if num:
                self.labels.append((self.now + 300.0, version, num, total, total))
        while self.labels and self.labels[0][0] <= self.now:
            _, version, num, total, squares = self.labels.pop(0)
            self.scores[version] = [old + new for old, new in zip(self.scores[version], (num, total, squares), strict=True)]

    def feedback(self) -> Sequence[FeedbackSum]:
        return [FeedbackSum(str(version), "score", int(num), total, squares) for version, (num, total, squares) in self.scores.items()]


_known: dict[Any, tuple[int, np.ndarray]] = {}


def latencies(kind: Kind, fault: Fault) -> tuple[int, np.ndarray]:
    """(first bucket, the part of each bucket from there): lognormal, and what the fault makes of it."""
    key = (kind.median, kind.sigma, fault.latency, fault.tail)
    if key not in _known:
        normal = NormalDist()
        begins, full = normal.inv_cdf(0.95), normal.inv_cdf(0.99)
        z = np.linspace(-5.0, 5.5, 20_001)
        drawn_out = math.log(fault.tail) * np.clip((z - begins) / (full - begins), 0.0, 1.0)
        logs = math.log(kind.median * fault.latency) + kind.sigma * z + drawn_out
        first, last = bucket_of(math.exp(logs[0])), bucket_of(math.exp(logs[-1]))
        edges = np.log([edge_of(bucket) for bucket in range(first, last + 1)])
        at = np.interp(edges, logs, z)
        below = np.array([normal.cdf(each) for each in at])
        below[-1] = 1.0
        parts = np.diff(np.concatenate(([0.0], below)))
        _known[key] = first, parts / parts.sum()
    return _known[key]
