"""A rollout as people are told of it."""

from msgspec import to_builtins

from fairlead.control.measuring import agreement_of
from fairlead.control.rollout_state import Member, Phase, Rollout, Test
from fairlead.core.rollout import MetricRule


def describe(rollout: Rollout, now: float) -> dict[str, object]:
    """For people, as JSON: see docs/rollouts.md."""
    step = rollout.current
    return {
        "id": rollout.id,
        "kind": rollout.kind,
        "phase": rollout.phase.value,
        "reason": rollout.reason,
        "pause": rollout.pause.value if rollout.pause else None,
        "policy": rollout.policy_name,
        "actor": rollout.actor,
        "created": rollout.created,
        "ended": rollout.ended,
        "step": rollout.step + 1 if step else 0,
        "steps": len(rollout.policy.steps),
        "share": step.share if step else 1.0 if rollout.promoted and rollout.phase is not Phase.ABORTED else 0.0,
        "shadow": step.shadow if step else 0.0,
        "hold": step.hold if step else False,
        "step_seconds": now - rollout.step_began if step else 0.0,
        "least_seconds": step.seconds if step else 0.0,
        "least_answers": step.min_requests if step else 0,
        "eta_seconds": _eta(rollout, now),
        "last": rollout.last.value if rollout.last else None,
        "num_failed": rollout.num_failed,
        "num_inconclusive": rollout.num_inconclusive,
        "num_errors": rollout.num_errors,
        **rollout.exposure,
        "members": [_described(rollout, member) for member in rollout.members],
        "history": to_builtins(rollout.history),
    }


def _described(rollout: Rollout, member: Member) -> dict[str, object]:
    counted = rollout.counted[member.model]
    told: dict[str, object] = {
        "model": member.model,
        "champion": member.champion,
        "candidate": member.candidate,
        "requests": counted.requests,
        "candidate_requests": counted.candidate,
        "step_answers": counted.step_answers,
        "metrics": [_compared(rollout, rule, rollout.tests[member.model][rule.name]) for rule in member.metrics if member.champion],
    }
    if counted.pairs:
        told["pairs"] = {"failed": counted.pairs_failed, "agreement": to_builtins(agreement_of(rollout, member.model))}
    return told


def _compared(rollout: Rollout, rule: MetricRule, test: Test) -> dict[str, object]:
    """Each of the two intervals at alpha / 2, so that both hold, and so does that of the difference."""
    champion, candidate = test.intervals(rollout.policy.alpha / 2)
    difference: dict[str, float | None] = {"value": None, "low": None, "high": None}
    if champion.value is not None and candidate.value is not None:
        difference["value"] = candidate.value - champion.value
    if candidate.low is not None and champion.high is not None:
        difference["low"] = candidate.low - champion.high
    if candidate.high is not None and champion.low is not None:
        difference["high"] = candidate.high - champion.low
    return {
        "name": rule.name,
        "tolerance": rule.tolerance,
        "champion": to_builtins(champion),
        "candidate": to_builtins(candidate),
        "difference": difference,
        "evidence": round(test.evidence, 4),
        "verdict": "worse" if test.worse else "holds" if test.known else "unknown",
    }


def _eta(rollout: Rollout, now: float) -> float | None:
    """Seconds until the promotion; once promoted, until the champion before is let go. None: nobody can say."""
    policy, step = rollout.policy, rollout.current
    if rollout.phase is Phase.PROMOTED:
        return max(rollout.phase_began + policy.rollback_seconds - now, 0.0)
    if step is None or rollout.phase is Phase.PAUSED or any(each.hold for each in policy.steps[rollout.step :]):
        return None
    seconds = max(now - rollout.split_began, 1e-9)
    compared = [rollout.counted[member.model] for member in rollout.members if member.champion]
    rate = min(counted.requests for counted in compared) / seconds
    answers, passed, total = min(counted.step_answers for counted in compared), now - rollout.step_began, 0.0
    for each in policy.steps[rollout.step :]:
        lacking = max(each.min_requests - answers, 0)
        if lacking and not rate:
            return None
        total += max(each.seconds - passed, lacking / (rate * (each.share or each.shadow)) if lacking else 0.0, 0.0)
        answers, passed = 0, 0.0
    return total
