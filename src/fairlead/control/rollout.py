"""How a candidate becomes the champion, or not: a pure state machine. Time is an argument; who acts is somebody else.

    begin() ─► validating ─► loading ─► progressing ◄─► paused
                   │            │            │             │      promote, or the end of the last step
                   │            │            ├─────────────┴────► promoted ─► complete
                   └────────────┴────────────┴─────────────┬─────────┘ a hard breaker, `rollback`
                                                           ▼
                                                        aborted

| phase       | what serves | what ends it |
|---|---|---|
| validating  | the champion; gates run | Validated |
| loading     | the champion; every server loads the candidate | Loaded, or `load_seconds` |
| progressing | both, by the step's share (or the champion, and copies go to the candidate) | steps, tests, breakers, commands |
| paused      | as before; no step is taken, breakers and tests go on | `resume`, `promote`, `abort`; breakers, tests |
| promoted    | the candidate; the champion before is kept loaded | `rollback_seconds`, breakers, `rollback` |
| complete    | the candidate (of a shadow: the champion) | |
| aborted     | the champion | |

A rollout of several members (an ensemble and its parts) goes through all of this as one: each metric is tested for each member,
and what is wrong with one returns all.
"""

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from fairlead.control.measuring import agreement_of, fired_breaker, new_test, outcome_of, taken_in, worse_of
from fairlead.control.rollout_report import describe
from fairlead.control.rollout_state import (
    ENDED,
    Action,
    Command,
    Counted,
    Event,
    FeedbackSum,
    Kind,
    Loaded,
    Measured,
    Measurement,
    Member,
    Note,
    Outcome,
    PairCount,
    Past,
    Pause,
    Phase,
    Promote,
    Publish,
    Reject,
    Release,
    Return,
    Rollout,
    Validated,
)
from fairlead.core.errors import InvalidRequest
from fairlead.core.rollout import MetricRule, RolloutPolicy
from fairlead.store.transactions import Conflict

__all__ = [
    "ENDED",
    "Action",
    "Command",
    "Event",
    "FeedbackSum",
    "Kind",
    "Loaded",
    "Measured",
    "Member",
    "Note",
    "Outcome",
    "PairCount",
    "Pause",
    "Phase",
    "Promote",
    "Publish",
    "Reject",
    "Release",
    "Return",
    "Rollout",
    "Validated",
    "advance",
    "begin",
    "default_metrics",
    "describe",
    "standing",
]

MAX_HISTORY = 200
"""Entries; the oldest are forgotten."""
EXPECTED = 10.0
"""So many requests of the candidate should have come where none came, before that is worth a pause."""


def default_metrics(is_language_model: bool) -> tuple[MetricRule, ...]:
    """What is compared where a policy names no metrics. Why 5% are tolerated: docs/rollouts.md."""
    times = ("ttft_p99", "tpot_p99") if is_language_model else ("latency_p99",)
    return (
        MetricRule(name="error_rate", tolerance=0.05),
        MetricRule(name="nonfinite_rate"),
        *(MetricRule(name=name, tolerance=0.05) for name in times),
    )


def begin(
    id: str,
    *,
    kind: Kind,
    members: Sequence[Member],
    policy: RolloutPolicy,
    policy_name: str,
    actor: str,
    now: float,
    validated: bool = False,
    reason: str = "",
) -> tuple[Rollout, tuple[Action, ...]]:
    """`validated`: all members have passed their gates. Raises InvalidRequest where the policy does not fit the kind."""
    _check(kind, members, policy, policy_name)
    compared = [member for member in members if member.champion]
    alpha = policy.alpha / max(sum(len(member.metrics) for member in compared), 1)
    phase = Phase.VALIDATING if policy.validate and not validated else Phase.LOADING
    rollout = Rollout(
        id=id,
        kind=kind,
        members=tuple(members),
        policy=policy,
        policy_name=policy_name,
        actor=actor,
        created=now,
        phase=phase,
        phase_began=now,
        counted={member.model: Counted() for member in members},
        tests={member.model: {rule.name: new_test(rule, alpha) for rule in member.metrics} for member in compared},
        history=(Past(began=now, phase=phase, reason=reason),),
    )
    subject = ", ".join(f"{member.model}@{member.candidate}" for member in members)
    note = Note("rollout.start", reason, actor, {"kind": kind, "policy": policy_name, "candidates": subject})
    return rollout, (note,) if phase is Phase.VALIDATING else (Publish(), note)


def advance(rollout: Rollout, event: Event, now: float) -> tuple[Rollout, tuple[Action, ...]]:
    """What follows from an event. Of a rollout that has ended nothing does."""
    if isinstance(event, Command):
        return _commanded(rollout, event, now)
    if rollout.phase in ENDED:
        return rollout, ()
    match event:
        case Validated() if rollout.phase is Phase.VALIDATING:
            if event.ok:
                loading = _enter(rollout, Phase.LOADING, now, event.reason)
                return loading, (Publish(), Note("rollout.validated", event.reason))
            at_fault = event.model if event.at_fault else None
            return _back(rollout, now, f"did not pass its gates: {event.reason}", at_fault=at_fault)
        case Loaded() if rollout.phase is Phase.LOADING:
            if event.failed:
                return _back(rollout, now, f"cannot be loaded: {event.failed}", at_fault=event.model)
            if event.ready:
                return _step(rollout, 0, now)
            if now - rollout.phase_began >= rollout.policy.breakers.load_seconds:
                seconds = rollout.policy.breakers.load_seconds
                return _back(rollout, now, f"not ready on every server after {seconds:g} s", at_fault=None)
        case Measured() if rollout.phase is not Phase.VALIDATING:
            return _measured(rollout, event, now)
    return rollout, ()


def standing(rollout: Rollout) -> Publish | Promote | Return | Release:
    """What is wanted now: for a leader that took over, and does not know whether the last actions were done."""
    match rollout.phase:
        case Phase.LOADING:
            return Publish()
        case Phase.PROGRESSING | Phase.PAUSED:
            step = rollout.policy.steps[rollout.step]
            return Publish(step.share, step.shadow)
        case Phase.PROMOTED:
            return Promote()
        case Phase.COMPLETE if rollout.promoted:
            return Release()
    return Return()


def _check(kind: Kind, members: Sequence[Member], policy: RolloutPolicy, name: str) -> None:
    if not members or len({member.model for member in members}) < len(members):
        raise InvalidRequest("a rollout needs its models, each named once")
    for member in members:
        if member.candidate == member.champion:
            raise InvalidRequest(f"{member.model}@{member.candidate} is the champion already")
    has_shadow = any(step.shadow for step in policy.steps)
    if kind == "shadow" and not (policy.steps and all(step.shadow for step in policy.steps)):
        raise InvalidRequest(f"all steps of a shadow have a `shadow` share: policy `{name}` has others")
    if kind == "experiment" and not (len(policy.steps) == 1 and policy.steps[0].share and policy.steps[0].hold):
        raise InvalidRequest(f"an experiment has one step, with a `share` and `hold`: policy `{name}` has not")
    # A model's first version is compared with nothing: it takes no steps.
    if kind != "canary" or (has_shadow and any(member.champion for member in members)):
        for member in members:
            if not member.champion:
                raise InvalidRequest(f"`{member.model}` has no champion that {member.model}@{member.candidate} could be compared with")


# Moves from phase to phase.


def _enter(rollout: Rollout, phase: Phase, now: float, reason: str, *, pause: Pause | None = None, **more: Any) -> Rollout:
    step = rollout.policy.steps[rollout.step] if phase in (Phase.PROGRESSING, Phase.PAUSED) else None
    past = Past(
        began=now,
        phase=phase,
        step=rollout.step if step else -1,
        share=step.share if step else 0.0,
        shadow=step.shadow if step else 0.0,
        reason=reason,
    )
    return replace(
        rollout,
        phase=phase,
        phase_began=now,
        pause=pause,
        reason=reason,
        ended=now if phase in ENDED else None,
        history=(*rollout.history, past)[-MAX_HISTORY:],
        **more,
    )


def _step(rollout: Rollout, index: int, now: float, *, actor: str = "", reason: str = "") -> tuple[Rollout, tuple[Action, ...]]:
    """Begins a step; after the last one, or where there is nobody to compare with, ends the trial."""
    steps = rollout.policy.steps
    if index >= len(steps) or not any(member.champion for member in rollout.members):
        if rollout.kind == "shadow":
            return _shadow_ends(rollout, now, "the outputs agree")
        compared = any(member.champion for member in rollout.members)
        why = "all steps are done" if index else "its policy has no steps" if compared else "there is no champion to compare it with"
        return _promote(rollout, now, actor=actor, reason=reason or why)
    step = steps[index]
    rollout = replace(
        rollout,
        step=index,
        step_began=now,
        waited_since=now,
        split_began=rollout.split_began or now,
        counted={model: replace(counted, step_answers=0) for model, counted in rollout.counted.items()},
        tests={model: {name: test.restarted() for name, test in tests.items()} for model, tests in rollout.tests.items()},
        measurement=Measurement(began=now + rollout.policy.initial_delay),
        last=None,
        num_inconclusive=0,
        num_idle=0,
        num_errors=0,
    )
    what = f"{100 * step.share:.4g}% of the traffic" if step.share else f"copies of {100 * step.shadow:.4g}% of the traffic"
    note = Note("rollout.step", reason or what, actor, {"step": index + 1, "steps": len(steps), "share": step.share, "shadow": step.shadow})
    return _enter(rollout, Phase.PROGRESSING, now, reason), (Publish(step.share, step.shadow), note)


def _promote(rollout: Rollout, now: float, *, actor: str = "", reason: str) -> tuple[Rollout, tuple[Action, ...]]:
    rollout = _enter(rollout, Phase.PROMOTED, now, reason, promoted=True)
    actions: tuple[Action, ...] = (Promote(), Note("rollout.promote", reason, actor, rollout.exposure))
    if rollout.policy.rollback_seconds and any(member.champion for member in rollout.members):
        return rollout, actions
    rollout, more = _complete(rollout, now)
    return rollout, (*actions, *more)


def _complete(rollout: Rollout, now: float) -> tuple[Rollout, tuple[Action, ...]]:
    reason = "it serves, and nothing spoke against it" if rollout.policy.rollback_seconds else "it serves"
    return _enter(rollout, Phase.COMPLETE, now, reason), (Release(), Note("rollout.complete", reason))


def _shadow_ends(rollout: Rollout, now: float, reason: str) -> tuple[Rollout, tuple[Action, ...]]:
    return _enter(rollout, Phase.COMPLETE, now, reason), (Return(), Note("rollout.complete", reason))


def _back(
    rollout: Rollout, now: float, reason: str, *, at_fault: str | None, actor: str = "", action: str = "rollout.abort"
) -> tuple[Rollout, tuple[Action, ...]]:
    """Everything returns to the champions. `at_fault`: the member whose candidate is rejected; "": all of them; None: none."""
    rejected = [member for member in rollout.members if at_fault is not None and at_fault in (member.model, "")]
    if at_fault and len(rollout.members) > 1:
        reason = f"{at_fault}: {reason}"
    return _enter(rollout, Phase.ABORTED, now, reason), (
        Return(),
        *(Reject(member.model, member.candidate, reason) for member in rejected),
        Note(action, reason, actor, rollout.exposure),
    )


def _pause(rollout: Rollout, now: float, why: Pause, reason: str, actor: str = "") -> tuple[Rollout, tuple[Action, ...]]:
    return _enter(rollout, Phase.PAUSED, now, reason, pause=why), (Note("rollout.pause", reason, actor),)


def _resume(rollout: Rollout, now: float, reason: str, actor: str = "") -> tuple[Rollout, tuple[Action, ...]]:
    going_on = _enter(rollout, Phase.PROGRESSING, now, "", waited_since=now, num_inconclusive=0, num_idle=0)
    return going_on, (Note("rollout.resume", reason, actor),)


def _commanded(rollout: Rollout, command: Command, now: float) -> tuple[Rollout, tuple[Action, ...]]:
    """Raises Conflict."""
    phase, actor, reason = rollout.phase, command.actor, command.reason
    match command.kind:
        case "pause" if phase is Phase.PROGRESSING or rollout.pause is Pause.NO_DATA:
            return _pause(rollout, now, Pause.COMMAND, reason or f"paused by {actor}", actor)
        case "resume" if phase is Phase.PAUSED:
            if rollout.pause is Pause.HOLD:
                return _step(rollout, rollout.step + 1, now, actor=actor, reason=reason)
            return _resume(rollout, now, reason, actor)
        case "promote" if phase in (Phase.PROGRESSING, Phase.PAUSED):
            return _promote(rollout, now, actor=actor, reason=reason or f"promoted by {actor}")
        case "abort" if phase not in ENDED and phase is not Phase.PROMOTED:
            return _back(rollout, now, reason or f"aborted by {actor}", at_fault=None, actor=actor)
        case "rollback" if phase not in ENDED:
            return _back(rollout, now, reason or f"rolled back by {actor}", at_fault=None, actor=actor, action="rollout.rollback")
    advice = ": `rollback` returns to the version before" if command.kind == "abort" and phase is Phase.PROMOTED else ""
    raise Conflict(f"rollout {rollout.id} is {phase}: it cannot {command.kind}{advice}")


# Measurements.


def _measured(rollout: Rollout, event: Measured, now: float) -> tuple[Rollout, tuple[Action, ...]]:
    rollout = taken_in(rollout, event)
    if broken := fired_breaker(rollout, event):
        model, reason = broken
        return _back(rollout, now, reason, at_fault=model)
    if rollout.phase is Phase.PROMOTED and now - rollout.phase_began >= rollout.policy.rollback_seconds:
        return _complete(rollout, now)
    if rollout.phase in (Phase.PROGRESSING, Phase.PAUSED) and now - rollout.measurement.began >= rollout.policy.interval:
        return _concluded(rollout, now)
    return rollout, ()


def _concluded(rollout: Rollout, now: float) -> tuple[Rollout, tuple[Action, ...]]:
    """A measurement ends: its outcome, and what follows."""
    policy, kind = rollout.policy, rollout.kind
    compared = {model: {name: test.compared() for name, test in tests.items()} for model, tests in rollout.tests.items()}
    rollout = replace(rollout, tests=compared)
    worse = worse_of(rollout)
    outcome = outcome_of(rollout, worse)
    before, rollout = rollout.measurement, replace(rollout, last=outcome, measurement=Measurement(began=now))
    match outcome:
        case Outcome.ERROR:
            rollout = replace(rollout, num_errors=rollout.num_errors + 1)
            if rollout.num_errors >= policy.error_limit and kind != "experiment":
                return _back(rollout, now, f"could not be measured {rollout.num_errors} times in a row", at_fault=None)
            return rollout, ()
        case Outcome.INCONCLUSIVE:
            num, idle = rollout.num_inconclusive + 1, rollout.num_idle + before.requests
            rollout = replace(rollout, num_inconclusive=num, num_idle=idle, num_errors=0)
        case Outcome.FAILED | Outcome.SUCCESSFUL:
            rollout = replace(rollout, num_inconclusive=0, num_idle=0, num_errors=0)
    if outcome is Outcome.FAILED and worse is not None:
        rollout = replace(rollout, num_failed=rollout.num_failed + 1)
        if rollout.num_failed > policy.failure_limit:
            model, reason = worse
            return _shadow_ends(rollout, now, reason) if kind == "shadow" else _back(rollout, now, reason, at_fault=model)
    if rollout.phase is Phase.PROGRESSING:
        return _stepped(rollout, now)
    if outcome is Outcome.SUCCESSFUL and rollout.pause is Pause.NO_DATA:
        return _resume(rollout, now, "there is something to compare again")
    return rollout, ()


def _stepped(rollout: Rollout, now: float) -> tuple[Rollout, tuple[Action, ...]]:
    """Whether the step is done, or will not be."""
    policy, step = rollout.policy, rollout.policy.steps[rollout.step]
    if rollout.kind == "experiment":
        return rollout, ()
    if _is_done(rollout, now):
        if step.hold:
            return _pause(rollout, now, Pause.HOLD, f"step {rollout.step + 1} is done and holds: `resume`, `promote` or `abort`")
        return _step(rollout, rollout.step + 1, now)
    share = step.share or step.shadow
    if rollout.num_inconclusive >= policy.inconclusive_limit and (not rollout.num_idle or rollout.num_idle * share >= EXPECTED):
        return _pause(
            rollout, now, Pause.NO_DATA, f"nothing to compare in {rollout.num_inconclusive} measurements: it goes on when there is"
        )
    if policy.patience and now - rollout.waited_since >= policy.patience:
        return _pause(rollout, now, Pause.PATIENCE, f"step {rollout.step + 1} is not done after {policy.patience:g} s")
    return rollout, ()


def _is_done(rollout: Rollout, now: float) -> bool:
    step = rollout.policy.steps[rollout.step]
    if rollout.last is not Outcome.SUCCESSFUL or now - rollout.step_began < step.seconds:
        return False
    for member in rollout.members:
        if not member.champion:
            continue
        if rollout.counted[member.model].step_answers < step.min_requests:
            return False
        if step.shadow and (agreement_of(rollout, member.model).low or 0.0) < rollout.policy.shadow.min_agreement:
            return False
    return True
