"""The words of a rollout: its whole state, what can happen to it, and what follows. `control.rollout` says how."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Literal

from msgspec import Struct, field

from fairlead.control.sequential import CountTest, MeanTest, QuantileTest
from fairlead.core.rollout import MetricRule, RolloutPolicy, Step
from fairlead.core.window import Window


class Phase(StrEnum):
    VALIDATING = "validating"
    LOADING = "loading"
    PROGRESSING = "progressing"
    PAUSED = "paused"
    PROMOTED = "promoted"
    COMPLETE = "complete"
    ABORTED = "aborted"


ENDED = frozenset((Phase.COMPLETE, Phase.ABORTED))

Kind = Literal["canary", "shadow", "experiment"]
"""canary: ends with a promotion. shadow: ends with a finding about the outputs, the champion stays. experiment: shares are
fixed until somebody says `promote` or `abort`; metrics are reported and only breakers act."""


class Outcome(StrEnum):
    """Of one measurement."""

    SUCCESSFUL = "successful"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    """Nothing came that could be compared."""
    ERROR = "error"
    """It could not be made."""


class Pause(StrEnum):
    """Why a rollout is paused."""

    COMMAND = "command"
    NO_DATA = "no-data"
    """It goes on by itself when there is something to compare."""
    PATIENCE = "patience"
    HOLD = "hold"
    """The step is done; `resume` begins the next one."""


class Member(Struct, frozen=True, kw_only=True):
    """One model of a rollout. Versions are the registry's numbers; in windows they are strings of these."""

    model: str
    champion: int = 0
    """0: there is none; the candidate gets everything as soon as it is loaded, and is compared with nothing."""
    candidate: int
    metrics: tuple[MetricRule, ...] = ()
    """The policy's, or `default_metrics`."""


class Past(Struct, frozen=True, kw_only=True):
    """One entry of a rollout's history: it was so from `began` until the next entry."""

    began: float
    phase: Phase
    step: int = -1
    """From 0; -1: none."""
    share: float = 0.0
    shadow: float = 0.0
    reason: str = ""


class Counted(Struct, frozen=True, kw_only=True):
    """Of one member, what is counted beside the tests."""

    requests: int = 0
    """Of both versions, that control split, since shares were given out."""
    candidate: int = 0
    """Of these: the candidate's."""
    nonfinite: int = 0
    """The candidate's answers with NaN or infinity ..."""
    champion_nonfinite: int = 0
    champion_errors: int = 0
    """... and what the champion did since the rollout began, requests of before the split included."""
    champion_requests: int = 0
    step_answers: int = 0
    """Of the candidate in this step (of a shadow: pairs)."""
    recent_requests: int = 0
    """Of the candidate, since the breaker of errors last found nothing ..."""
    recent_errors: int = 0
    recent_champion_requests: int = 0
    """... and of the champion in the same time."""
    recent_champion_errors: int = 0
    pairs: int = 0
    """Of shadow steps."""
    pairs_agree: int = 0
    pairs_failed: int = 0


class Measurement(Struct, frozen=True, kw_only=True):
    """The one under way: what came since it began."""

    began: float = 0.0
    compared: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Model → requests of champion and candidate (of a shadow: pairs, twice)."""
    requests: int = 0
    """All that control could have split."""
    seen: bool = False
    """A window could be had."""
    incomplete: bool = False
    """Of some servers none could."""


Test = CountTest | QuantileTest | MeanTest


class Rollout(Struct, frozen=True, kw_only=True):
    """The whole state. It survives JSON: who decides may change between two ticks."""

    id: str
    kind: Kind
    members: tuple[Member, ...]
    policy: RolloutPolicy
    policy_name: str
    actor: str
    created: float
    phase: Phase
    phase_began: float
    step: int = 0
    """Of `policy.steps`; as many as there are steps: all are done."""
    step_began: float = 0.0
    waited_since: float = 0.0
    """The policy's patience counts from here: the beginning of the step, or the last `resume`."""
    split_began: float = 0.0
    """When the first step began."""
    counted: dict[str, Counted] = field(default_factory=dict)
    """By model."""
    tests: dict[str, dict[str, Test]] = field(default_factory=dict)
    """Model → metric."""
    measurement: Measurement = Measurement()
    last: Outcome | None = None
    """Of the last measurement of this step."""
    num_failed: int = 0
    num_inconclusive: int = 0
    """In a row."""
    num_idle: int = 0
    """Requests during these."""
    num_errors: int = 0
    """In a row."""
    pause: Pause | None = None
    """Why, while it is paused."""
    promoted: bool = False
    reason: str = ""
    """Of the phase: why it is paused, aborted or complete."""
    ended: float | None = None
    history: tuple[Past, ...] = ()

    @property
    def current(self) -> Step | None:
        """The step whose shares are given out."""
        return self.policy.steps[self.step] if self.phase in (Phase.PROGRESSING, Phase.PAUSED) else None

    @property
    def exposure(self) -> dict[str, object]:
        """Of all requests since the first step, how many the candidates answered."""
        requests = sum(counted.requests for counted in self.counted.values())
        candidate = sum(counted.candidate for counted in self.counted.values())
        return {"requests": requests, "candidate_requests": candidate, "exposure": candidate / requests if requests else 0.0}


# Events: what happened, or was asked for.


class Validated(Struct, frozen=True):
    """The gates have run for all members."""

    ok: bool
    reason: str = ""
    model: str = ""
    """The member that did not pass."""
    at_fault: bool = True
    """The version is; else its checks, its champion or the machine are, and it is not rejected."""


class Loaded(Struct, frozen=True):
    """Told at every tick while candidates are loading."""

    ready: bool
    """On every server that lives."""
    failed: str = ""
    """Why a candidate cannot be loaded."""
    model: str = ""
    """The member that failed."""


class FeedbackSum(Struct, frozen=True):
    """Of one (version, name), everything since the rollout began."""

    version: str
    name: str
    num: int = 0
    total: float = 0.0
    squares: float = 0.0


class PairCount(Struct, frozen=True):
    """Copies that came to an end since the last tick."""

    num_pairs: int = 0
    """The candidate answered."""
    num_agree: int = 0
    """Of these."""
    num_failed: int = 0
    """The candidate gave an error, where the champion had answered."""


class Measured(Struct, frozen=True, kw_only=True):
    """A tick, while loading (so that thresholds are known sooner), progressing, paused or promoted. Mappings go by model."""

    windows: Mapping[str, Window] | None
    """Merged over servers, since the last tick. None: could not be had. A model without a window had no requests."""
    incomplete: bool = False
    """A server that answers requests has told nothing: what speaks for the candidate is not enough then."""
    restarts: Mapping[str, int] = {}
    """Deaths of the candidate's replicas since the rollout began: the most on one server."""
    feedback: Mapping[str, Sequence[FeedbackSum]] = {}
    pairs: Mapping[str, PairCount] = {}


class Command(Struct, frozen=True, kw_only=True):
    """What somebody asks for. One that the phase does not admit raises Conflict and changes nothing."""

    kind: Literal["pause", "resume", "promote", "abort", "rollback"]
    """resume: goes on, of a step that holds with the next one. promote: everything to the candidate, now. abort: everything to
    the champion. rollback: the same, after a promotion too, while the champion before is kept."""
    actor: str
    reason: str = ""


Event = Validated | Loaded | Measured | Command


# Actions: for whoever acts, in this order. Doing one twice does no harm.


class Publish(Struct, frozen=True):
    """Of each member the candidate is wanted, with so much of the traffic."""

    share: float = 0.0
    shadow: float = 0.0


class Promote(Struct, frozen=True):
    """Of each member the candidate is the champion, and the champion before is kept loaded."""


class Return(Struct, frozen=True):
    """Everything goes to the champions (after a promotion: to those before it), candidates are unloaded."""


class Release(Struct, frozen=True):
    """The champions before the promotion may be unloaded."""


class Reject(Struct, frozen=True):
    """This version was found worse."""

    model: str
    version: int
    reason: str


class Note(Struct, frozen=True):
    """For the audit log."""

    action: str
    """rollout.start, rollout.validated, rollout.step, rollout.pause, rollout.resume, rollout.promote, rollout.abort,
    rollout.rollback, rollout.complete"""
    reason: str
    actor: str = ""
    """"": decided here, by the rollout itself."""
    details: dict[str, object] = {}


Action = Publish | Promote | Return | Release | Reject | Note
