"""Alerts beside those of objectives: one row each, for this process and for Prometheus. docs/runbooks has a page for each.

Where a row has a `watch`, the server itself looks; the others are Prometheus's alone, because one process does not see them.
"""

from collections import deque
from collections.abc import Iterator, Mapping

from msgspec import Struct

from fairlead.core.slo import Severity
from fairlead.observe.slo.board import Sighting

MAX_SUBJECTS = 500
"""Of one signal."""
BURN = "FairleadBudgetBurn"
"""The alert of objectives."""

Signals = Mapping[str, Mapping[str, float]]
"""Signal → subject (a model's version, a place; "" for the server) → its value now. A counter's only grows."""


class Growth(Struct, frozen=True):
    """A counter has grown by `at_least` in the last `seconds`."""

    signal: str
    seconds: float
    at_least: float = 1.0


class Above(Struct, frozen=True):
    signal: str
    limit: float = 0.0


class Below(Struct, frozen=True):
    signal: str
    limit: float


class Share(Struct, frozen=True):
    """Of what the counter `of` has grown by in the last `seconds`, and at least `at_least`, more than `above` was `signal`'s."""

    signal: str
    of: str
    seconds: float
    above: float
    at_least: float = 20.0


Watch = Growth | Above | Below | Share


class Rule(Struct, frozen=True, kw_only=True):
    name: str
    severity: Severity
    summary: str
    """{subject} stands for what it is about, {value} for how it stands."""
    expr: str
    """For Prometheus."""
    labels: tuple[str, ...] = ()
    """Of the expression, which say what it is about."""
    pending: float = 0.0
    """Seconds that it must be so."""
    watch: Watch | None = None


def grew(counter: str, span: str, at_least: int = 1) -> str:
    """A counter's series may begin with its first event, which `increase` does not see."""
    return f"increase({counter}[{span}]) >= {at_least} or ({counter} >= {at_least} unless {counter} offset {span})"


SHED = 'fairlead_gateway_refused_total{reason=~"queue-full|predicted-wait|queue-timeout|evicted"}'
STORE = (
    "fairlead_usage_failed_writes_total",
    "fairlead_control_store_failures_total",
    'fairlead_auth_refresh_failures_total{source="store"}',
    "fairlead_slo_store_failures_total",
)

RULES = (
    Rule(
        name="FairleadDown",
        severity="page",
        summary="{subject} cannot be scraped",
        expr='up{job="fairlead"} == 0',
        labels=("instance",),
        pending=60.0,
    ),
    Rule(
        name="FairleadReplicaCrashLoop",
        severity="page",
        summary="replicas of {subject} died {value} times in 15 minutes",
        expr=grew("fairlead_instance_restarts_total", "15m", 3),
        labels=("model", "version"),
        watch=Growth("restarts", 900.0, 3),
    ),
    Rule(
        name="FairleadModelNotLoaded",
        severity="ticket",
        summary="{subject} could not be loaded",
        expr=grew('fairlead_model_loads_total{outcome="failure"}', "15m"),
        labels=("model",),
        watch=Above("not_loaded"),
    ),
    Rule(
        name="FairleadStoreUnreachable",
        severity="page",
        summary="the store does not answer",
        expr=" or ".join(grew(each, "90s") for each in STORE),
        labels=("instance",),
        pending=120.0,  # more than the span: what failed once and went well the next time wakes nobody
        watch=Growth("store_failures", 90.0),
    ),
    Rule(
        name="FairleadUsageLost",
        severity="ticket",
        summary="{value} records of requests or of the audit log were lost",
        expr=grew('fairlead_usage_records_total{outcome=~"dropped|refused"}', "10m"),
        labels=("instance",),
        watch=Growth("usage_lost", 600.0),
    ),
    Rule(
        name="FairleadKvExhausted",
        severity="ticket",
        summary="{subject} has hardly any KV memory left, and requests wait for it",
        expr='fairlead_kv_blocks_free / (fairlead_kv_blocks > 0) < 0.02 and on (instance, model, version) fairlead_sequences{state="waiting"} > 0',
        labels=("model", "version"),
        pending=300.0,
        watch=Below("kv_free", 0.02),
    ),
    Rule(
        name="FairleadPreemptionStorm",
        severity="ticket",
        summary="{subject} started {value} sequences again in 5 minutes",
        expr="increase(fairlead_preemptions_total[5m]) > 300",
        labels=("model", "version"),
        pending=120.0,
        watch=Growth("preemptions", 300.0, 300),
    ),
    Rule(
        name="FairleadShedding",
        severity="ticket",
        summary="more than 5% of the requests for {subject} are turned away, because too many wait",
        expr=(
            f"sum by (model) (rate({SHED}[5m])) / (sum by (model) (rate({SHED}[5m])) + "
            f"(sum by (model) (rate(fairlead_requests_total[5m])) or 0 * sum by (model) (rate({SHED}[5m])))) > 0.05 "
            f"and sum by (model) (increase({SHED}[5m])) > 5"
        ),
        labels=("model",),
        pending=120.0,
        watch=Share("shed", "asked", 300.0, 0.05, 100),
    ),
    Rule(
        name="FairleadDiskFull",
        severity="page",
        summary="the disk of the data folder is nearly full: {value} free",
        expr="fairlead_disk_free_ratio < 0.05",
        labels=("instance",),
        pending=120.0,
        watch=Below("disk_free", 0.05),
    ),
    Rule(
        name="FairleadPlaceLeftOut",
        severity="ticket",
        summary="{subject} fails so often that it gets no requests",
        expr=grew("fairlead_gateway_breaker_opened_total", "10m"),
        labels=("model", "place"),
        watch=Growth("breakers", 600.0),
    ),
    Rule(
        name="FairleadRedisGone",
        severity="ticket",
        summary="Redis, where limits are shared, stopped answering",
        expr=grew("fairlead_limits_redis_outages_total", "10m"),
        labels=("instance",),
        watch=Growth("redis_outages", 600.0),
    ),
    Rule(
        name="FairleadEventLoopBlocked",
        severity="ticket",
        summary="the event loop is late by {value} s: every request waits so long",
        expr="fairlead_event_loop_lag_max_seconds > 0.5",
        labels=("instance",),
        pending=120.0,
        watch=Above("loop_lag", 0.5),
    ),
    Rule(
        name="FairleadTelemetryDropped",
        severity="ticket",
        summary="{value} traced requests were not exported: the collector is away, or slow",
        expr=grew('fairlead_traces_total{outcome=~"dropped|failed"}', "10m"),
        labels=("instance",),
        watch=Growth("traces_dropped", 600.0),
    ),
    Rule(
        name="FairleadAlertsUndelivered",
        severity="ticket",
        summary="{value} calls that tell of alerts were given up",
        expr=grew('fairlead_alert_calls_total{outcome=~"failed|dropped"}', "15m"),
        labels=("instance",),
        watch=Growth("alerts_lost", 900.0),
    ),
    Rule(
        name="FairleadJobsFailing",
        severity="ticket",
        summary="more than a fifth of the jobs of {subject} fail",
        expr=(
            'sum by (model) (increase(fairlead_jobs_total{status="failed"}[15m])) '
            "/ sum by (model) (increase(fairlead_jobs_total[15m])) > 0.2 and sum by (model) (increase(fairlead_jobs_total[15m])) >= 10"
        ),
        labels=("model",),
        pending=60.0,
        watch=Share("jobs_failed", "jobs", 900.0, 0.2, 10),
    ),
    Rule(
        name="FairleadJobsStuck",
        severity="ticket",
        summary="a job waits for longer than an hour",
        expr='max(fairlead_unfinished_jobs_oldest_seconds{status="queued"}) > 3600',
        pending=600.0,
    ),
    Rule(
        name="FairleadRolloutAborted",
        severity="ticket",
        summary="a rollout of {subject} was taken back",
        expr=grew('fairlead_rollouts_total{outcome="aborted"}', "15m"),
        labels=("model",),
        watch=Growth("rollouts_aborted", 900.0),
    ),
)


class Watcher:
    """What the rules with a `watch` see. `now`: of a clock that only goes on."""

    def __init__(self, rules: tuple[Rule, ...] = RULES) -> None:
        self.rules = [rule for rule in rules if rule.watch is not None]
        spans: dict[str, float] = {}
        for watch in (rule.watch for rule in self.rules):
            if isinstance(watch, Growth | Share):
                for signal in (watch.signal, *((watch.of,) if isinstance(watch, Share) else ())):
                    spans[signal] = max(spans.get(signal, 0.0), watch.seconds)
        self._spans = spans
        self._past: dict[str, deque[tuple[float, Mapping[str, float]]]] = {signal: deque() for signal in spans}
        """Of each counter: (when, its values), the oldest first."""

    def look(self, signals: Signals, now: float) -> Iterator[Sighting]:
        signals = {name: dict(sorted(values.items())[:MAX_SUBJECTS]) for name, values in signals.items()}
        for name, span in self._spans.items():
            past = self._past[name]
            past.append((now, signals.get(name, {})))
            while len(past) > 1 and past[1][0] <= now - span:
                past.popleft()
        for rule in self.rules:
            yield from self._of(rule, signals, now)

    def _of(self, rule: Rule, signals: Signals, now: float) -> Iterator[Sighting]:
        watch = rule.watch
        assert watch is not None
        for subject, value in signals.get(watch.signal, {}).items():
            match watch:
                case Growth():
                    value = self._grown(watch.signal, subject, watch.seconds, now)
                    active = value >= watch.at_least
                case Above():
                    active = value > watch.limit
                case Below():
                    active = value < watch.limit
                case Share():
                    asked = self._grown(watch.of, subject, watch.seconds, now)
                    value = self._grown(watch.signal, subject, watch.seconds, now) / asked if asked else 0.0
                    active = asked >= watch.at_least and value > watch.above
            if active:
                yield Sighting(rule.name, rule.severity, subject, said(rule, subject, value), active, pending=rule.pending)

    def _grown(self, signal: str, subject: str, seconds: float, now: float) -> float:
        """What was not there at the first look began at 0, unless it may have been one of too many then."""
        past = self._past[signal]
        values = past[-1][1]
        before = next((each for at, each in past if at >= now - seconds), values)
        if subject not in before and len(before) >= MAX_SUBJECTS:
            return 0.0
        grown = values.get(subject, 0.0) - before.get(subject, 0.0)
        return max(grown, 0.0)


def said(rule: Rule, subject: str, value: float) -> str:
    shown = f"{value:.1%}" if isinstance(rule.watch, Below | Share) else f"{value:.3g}"
    return rule.summary.replace("{subject}", subject or "the server").replace("{value}", shown)
