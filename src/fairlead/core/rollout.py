"""How versions come to serve, as the operator says it: policies of rollouts, and the settings of control."""

import re
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Part = Annotated[float, Meta(gt=0.0, lt=1.0)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]

METRIC = re.compile(r"error_rate|nonfinite_rate|(?:latency|ttft|tpot)_p(?:50|75|90|95|99)|feedback:[A-Za-z0-9_.-]{1,64}")
"""`ttft`: time to the first token or piece; `tpot`: time per output token."""


class Step(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One step of a rollout: so much traffic, for so long, until so much is known."""

    share: Share = 0.0
    """Of the requests that name no version: answered by the candidate."""
    shadow: Share = 0.0
    """Of the requests that the champion answers: copied to the candidate, whose answer is compared and thrown away."""
    seconds: Seconds = 60.0
    """At least so long."""
    min_requests: Count = 0
    """At least so many answers of the candidate (of a shadow: pairs that were compared)."""
    hold: bool = False
    """Stay until somebody says `resume` (the next step), `promote` or `abort`: for experiments, and for an approval by hand."""

    def __post_init__(self) -> None:
        if (self.share > 0) == (self.shadow > 0):
            raise ValueError("a step has either a `share` or a `shadow` share, greater than 0")


class MetricRule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing in which the candidate must not be worse than the champion at the same time."""

    name: str
    """error_rate, nonfinite_rate, latency_p50 ... latency_p99, ttft_pNN, tpot_pNN, feedback:NAME."""
    tolerance: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    """By how much of itself it may be worse: 0.05 is 5%. Of feedback: absolutely, in its own unit."""
    higher_is_better: bool = True
    """Of feedback only."""
    low: float = 0.0
    """Least value of feedback."""
    high: float = 1.0
    """Greatest value of feedback."""

    def __post_init__(self) -> None:
        if not METRIC.fullmatch(self.name):
            raise ValueError(
                f"`{self.name}` is no metric: error_rate, nonfinite_rate, latency_pNN, ttft_pNN, tpot_pNN (50, 75, 90, 95, 99) or feedback:NAME"
            )
        if self.low >= self.high:
            raise ValueError("`low` must be less than `high`")


class Breakers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ends a rollout at once, without statistics."""

    restarts: Positive = 3
    """Deaths of the candidate's replicas on one server."""
    error_rate: Share = 0.5
    """Of the candidate's answers, from `min_requests` on, where the champion's is less than half of that."""
    min_requests: Positive = 20
    nonfinite: Positive = 1
    """Answers of the candidate with NaN or infinity, while the champion gave none."""
    load_seconds: Annotated[float, Meta(gt=0)] = 900.0
    """Until every server has the candidate ready."""


class ShadowRules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a shadow's pairs must come to."""

    min_agreement: Share = 0.95
    """Share of the pairs that agree; its confidence bound is compared, not the mean. What agrees is said by kind in docs/shadow.md."""
    rtol: Seconds = 1e-2
    """Of numbers: |a - b| <= atol + rtol * |a| agrees."""
    atol: Seconds = 1e-3
    min_cosine: Annotated[float, Meta(ge=-1.0, le=1.0)] = 0.99
    """Of embeddings."""
    min_similarity: Annotated[float, Meta(ge=-1.0, le=1.0)] = 0.9
    """Of pictures (structural similarity)."""
    score: bool = False
    """Of texts: both versions say how likely the champion's answer is, at the price of another request to each. Without it, only texts
    at temperature 0 are compared."""
    max_logprob_drop: Annotated[float, Meta(ge=0.0)] = 0.1
    """Of texts that were sampled, with `score`: nats by which a token of the champion's answer may be less likely to the candidate."""
    max_in_flight: Positive = 4
    """Copies under way at once on one server; what comes meanwhile is not copied."""
    timeout: Annotated[float, Meta(gt=0)] = 30.0
    """Seconds for one copy."""


STANDARD_STEPS = (
    Step(share=0.01, seconds=60.0, min_requests=50),
    Step(share=0.05, seconds=300.0, min_requests=5000),
    Step(share=0.25, seconds=300.0, min_requests=5000),
    Step(share=0.5, seconds=300.0, min_requests=5000),
)
"""5,000 answers at 5% find twice as many errors as 1%, and a p99 that is 38% up, in 98 of 100 rollouts: benchmarks/rollout."""


class RolloutPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a candidate becomes the champion."""

    steps: tuple[Step, ...] = STANDARD_STEPS
    """In order; after the last one it gets everything."""
    metrics: tuple[MetricRule, ...] | None = None
    """None: error_rate and nonfinite_rate, and latency_p99, or of language models ttft_p99 and tpot_p99."""
    alpha: Part = 0.05
    """Chance that a candidate which is no worse is rolled back, over the whole rollout however often it is looked at."""
    interval: Annotated[float, Meta(gt=0)] = 10.0
    """Seconds of one measurement: each is successful, failed, inconclusive or an error."""
    initial_delay: Seconds = 0.0
    """Seconds after a step begins that are not measured."""
    failure_limit: Count = 0
    """Failed measurements that are put up with."""
    inconclusive_limit: Positive = 30
    """Measurements in a row that tell nothing (no requests came): then the rollout pauses."""
    error_limit: Positive = 4
    """Measurements in a row that could not be made: then the rollout is aborted."""
    patience: Seconds = 86_400.0
    """Seconds after which a step that still lacks its sample pauses the rollout; 0: never."""
    rollback_seconds: Seconds = 3600.0
    """How long the champion before is kept loaded after a promotion, for an instant return; during it the hard breakers go on."""
    sticky: Literal["session", "tenant", "request"] = "session"
    """What keeps to one version: a session (of requests that name none, each by itself), a tenant, or nothing."""
    breakers: Breakers = Breakers()
    shadow: ShadowRules = ShadowRules()
    validate: bool = True
    """Gates come first, unless the version has passed them."""

    def __post_init__(self) -> None:
        shares = [step.share for step in self.steps if step.share]
        if shares != sorted(shares):
            raise ValueError("the `share` of a step is never less than that of the one before")
        names = [rule.name for rule in self.metrics or ()]
        if len(set(names)) < len(names):
            raise ValueError("each of `metrics` is named once")


QUICK = RolloutPolicy(
    steps=(Step(share=0.05, seconds=30.0, min_requests=50), Step(share=0.5, seconds=60.0, min_requests=500)), interval=5.0
)
DIRECT = RolloutPolicy(steps=())
"""All at once, after the gates. The hard breakers watch it through the rollback window."""


class RegistrySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where versions are kept, and which of them may serve."""

    url: str = ""
    """A folder or any fsspec URL for the artefacts. "": a folder beside the store's file."""
    max_bytes: Positive = 64 << 30
    """Of one version's artefacts."""
    signed_only: bool = False
    """Only versions that one of `trusted_keys` signed may serve."""
    trusted_keys: dict[str, str] = field(default_factory=dict)
    """Name → Ed25519 public key in PEM."""


class ControlSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Registry, validation and rollouts."""

    enabled: bool = True
    decide: bool = True
    """Whether this server may decide on rollouts (one at a time does, by a lease); else it only follows what others decide."""
    tick_seconds: Annotated[float, Meta(gt=0, le=10)] = 1.0
    """How often decisions are made, and windows sent to who decides."""
    lease_seconds: Annotated[float, Meta(ge=1)] = 5.0
    """How long who decides may be silent before another one takes over."""
    registry: RegistrySettings = RegistrySettings()
    policies: dict[str, RolloutPolicy] = field(default_factory=dict)
    """By name, beside `standard`, `quick` and `direct`, which may be replaced."""
    models: dict[str, str] = field(default_factory=dict)
    """Model, or a pattern → its policy, where a rollout names none; else `standard`."""
    feedback_seconds: Seconds = 604_800.0
    """How long a request's version is remembered for feedback on it."""

    def policy(self, name: str) -> RolloutPolicy | None:
        """None: there is none of that name."""
        return self.policies.get(name) or {"standard": RolloutPolicy(), "quick": QUICK, "direct": DIRECT}.get(name)

    def policy_of(self, model: str) -> str:
        """The name of a model's policy."""
        return self.models.get(model) or next((each for pattern, each in self.models.items() if fnmatchcase(model, pattern)), "standard")

    def __post_init__(self) -> None:
        for model, name in self.models.items():
            if self.policy(name) is None:
                raise ValueError(f"policy `{name}` of `{model}` is not one of `policies`")
