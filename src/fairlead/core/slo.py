"""What a service promises, as the operator says it; what becomes of one request under such a promise; and who is told."""

import base64
import binascii
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from fairlead.core.timeline import Timeline

Kind = Literal["availability", "latency", "time_to_first_token", "inter_token"]
Severity = Literal["page", "ticket"]
Judgement = Literal["good", "bad"]

DAY = 86_400.0
ANY = ("", "*")
"""Names that stand for all models."""

OURS = frozenset(
    {
        "queue-full",
        "predicted-wait",
        "queue-timeout",
        "evicted",
        "upstream-full",
        "upstream-gone",
        "artifact-store",
        "limits-unreachable",
        "redis-gone",
        "unavailable",
        "draining",
    }
)
"""Reasons of refusals that this server answers for: it had no room, or something that it leans on was away."""
CALLERS = frozenset(
    {
        "unauthenticated",
        "forbidden",
        "not-found",
        "not-stored",
        "invalid-request",
        "unsupported",
        "filtered",
        "abuse",
        "queued-jobs",
        "queued-batches",
        "stored-files",
        "background-responses",
        "too-many-signatures",
        "logins",
    }
)
"""Reasons that the caller answers for, beside limits and budgets, which begin with `limit-` and `budget-`."""
WRONG_REQUEST = (400, 413, 422)
"""Statuses by which another server says that its caller asked for what cannot be."""


class Objective(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One promise: so many of these requests are good, in each span of `window_days`."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$(?!\n)")]
    model: Annotated[str, Meta(max_length=256)] = ""
    """A name or a pattern such as `llama-*`; "" and `*`: all models."""
    qos_class: Annotated[str, Meta(max_length=128)] = field(default="", name="class")
    """Class of service; "": all."""
    kind: Kind = "availability"
    target: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.999
    """Share of the requests that must be good."""
    threshold: Annotated[float, Meta(ge=0.0)] = 0.0
    """Seconds that a good request takes at most; not of availability."""
    window_days: Annotated[float, Meta(ge=7, le=90)] = 30.0
    """That the budget is for. The windows of alerts are in proportion to it."""
    min_events: Annotated[int, Meta(ge=1)] = 100
    """Requests in an alert's longer window below which nothing can be said."""
    min_bad: Annotated[int, Meta(ge=1)] = 5
    """Bad requests in it below which nobody is woken."""
    severities: tuple[Severity, ...] = ("page", "ticket")
    """Alerts that it may raise."""

    def __post_init__(self) -> None:
        if (self.kind == "availability") == (self.threshold > 0):
            raise ValueError(
                "`threshold` is not of availability, where the kind of end counts"
                if self.threshold
                else f"`{self.kind}` needs a `threshold` in seconds"
            )

    @property
    def window(self) -> float:
        """Seconds."""
        return self.window_days * DAY

    @property
    def budget(self) -> float:
        """Share of the requests that may be bad."""
        return 1.0 - self.target

    def concerns(self, model: str, qos_class: str) -> bool:
        of_model = self.model in ANY or self.model == model or fnmatchcase(model, self.model)
        return of_model and self.qos_class in ("", qos_class)


def judge(timeline: Timeline, objective: Objective) -> Judgement | None:
    """What a request is to an objective that concerns its model and class; None: it does not count.

    | the request | availability | latency, time_to_first_token, inter_token |
    |---|---|---|
    | asked nothing of a model, or is a job's (which has time, and is tried again) | | |
    | its client left | | |
    | refused, and its caller answers for it: CALLERS, limits, budgets | | |
    | refused, and the server answers for it: OURS, or a reason that is new | bad | |
    | failed; but not where another server says that the request is wrong: WRONG_REQUEST | bad | |
    | answered | good | good or bad by `threshold`; not where there is nothing to measure: no pieces, or one token |

    Speed is measured of answers only, so that one outage does not use up two budgets.
    """
    if not timeline.kind or timeline.protocol == "job":
        return None
    outcome = timeline.outcome
    if objective.kind == "availability":
        if outcome == "success":
            return "good"
        if outcome == "failure":
            return None if timeline.reason == "upstream-error" and timeline.status in WRONG_REQUEST else "bad"
        return "bad" if outcome == "refused" and not _is_callers(timeline.reason) else None
    seconds = measured(timeline, objective.kind) if outcome == "success" else None
    return None if seconds is None else "good" if seconds <= objective.threshold else "bad"


def _is_callers(reason: str) -> bool:
    return reason in CALLERS or reason.startswith(("limit-", "budget-"))


def measured(timeline: Timeline, kind: Kind) -> float | None:
    """Seconds; None where there is nothing to measure."""
    if kind == "latency":
        return max(timeline.ended - timeline.arrived, 0.0)
    if not timeline.first_at:
        return None
    if kind == "time_to_first_token":
        return max(timeline.first_at - timeline.arrived, 0.0)
    tokens = 0 if timeline.usage is None else timeline.usage.completion_tokens
    return max(timeline.ended - timeline.first_at, 0.0) / (tokens - 1) if tokens > 1 else None


class AlertWebhook(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who is called when an alert begins to fire, and when it is over."""

    url: Annotated[str, Meta(min_length=1, max_length=2048)]
    format: Literal["json", "slack", "pagerduty"] = "json"
    """`json` is signed as Standard Webhooks wants it."""
    secret: str = ""
    """Of `json`: `whsec_` and 24 to 64 bytes in base64. Of `pagerduty`: the integration's routing key."""
    severities: Annotated[tuple[Severity, ...], Meta(min_length=1)] = ("page", "ticket")

    def __post_init__(self) -> None:
        if self.format == "json":
            try:
                num_bytes = len(base64.b64decode(self.secret.removeprefix("whsec_"), validate=True))
            except (binascii.Error, ValueError):
                num_bytes = 0
            if not 24 <= num_bytes <= 64:
                raise ValueError("`secret` must be `whsec_` and 24 to 64 bytes in base64")
        elif (self.format == "pagerduty") != bool(self.secret):
            raise ValueError("`pagerduty` needs its routing key as `secret`" if not self.secret else "`slack` takes no `secret`")


class AlertSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    webhooks: Annotated[tuple[AlertWebhook, ...], Meta(max_length=16)] = ()
    every: Annotated[float, Meta(ge=1.0, le=60.0)] = 10.0
    """Seconds between two looks at objectives and rules."""
    timeout: Annotated[float, Meta(gt=0, le=60.0)] = 15.0
    """Seconds that a receiver has for one call."""
    retries: Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(max_length=16)] = (5.0, 30.0, 120.0, 600.0, 1800.0)
    """Seconds between the tries; a tenth more or less by chance."""
    runbooks: str = "docs/runbooks"
    """Where the pages of docs/runbooks are: alerts link to `RUNBOOKS/NAME.md`."""


class IncidentSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    on_page: bool = False
    """An alert that pages begins an incident."""
    folder: str = ""
    """Where archives are kept; "": beside the store's file, or in the user's data folder."""
    sample_seconds: Annotated[float, Meta(ge=1.0, le=300.0)] = 15.0
    """Between two samples of the metrics."""
    before_seconds: Annotated[float, Meta(ge=0.0, le=3600.0)] = 600.0
    """Of metrics that are kept all the time, so that an incident's beginning is in its archive."""
    max_bytes: Annotated[int, Meta(ge=1 << 20)] = 256 << 20
    """Of one archive, before it is compressed."""
    keep: Annotated[int, Meta(ge=1, le=1000)] = 50
    """Archives; the oldest go first."""
