"""What windows come to: the counts and tests of a rollout, hard breakers, and the outcome of a measurement."""

from collections.abc import Callable

from msgspec.structs import replace

from fairlead.control.rollout_state import (
    Counted,
    FeedbackSum,
    Measured,
    Member,
    Outcome,
    PairCount,
    Phase,
    Rollout,
    Test,
)
from fairlead.control.sequential import Counts, CountTest, Interval, MeanTest, QuantileTest, Scores, rate_interval, surely_above
from fairlead.core.rollout import Breakers, MetricRule
from fairlead.core.window import Histogram, Tally, Window

_TIMES: dict[str, Callable[[Tally], Histogram]] = {
    "latency": lambda tally: tally.latency,
    "ttft": lambda tally: tally.first,
    "tpot": lambda tally: tally.per_token,
}
_COUNTS: dict[str, Callable[[Tally], int]] = {
    "error_rate": lambda tally: tally.errors,
    "nonfinite_rate": lambda tally: tally.nonfinite,
}
_NOTHING = Tally()
_SURE = 14.0
"""A hard breaker is wrong less than once in a million looks: exp(-14)."""


def new_test(rule: MetricRule, alpha: float) -> Test:
    name, _, which = rule.name.partition("_p")
    if rule.name.startswith("feedback:"):
        return MeanTest(alpha=alpha, tolerance=rule.tolerance, low=rule.low, high=rule.high, higher_is_better=rule.higher_is_better)
    if name in _TIMES:
        return QuantileTest.new(alpha=alpha, q=int(which) / 100, tolerance=rule.tolerance)
    return CountTest(alpha=alpha, tolerance=rule.tolerance)


def taken_in(rollout: Rollout, event: Measured) -> Rollout:
    """With what came, in the counts of the breakers, the tests and the measurement."""
    step = rollout.current
    counted, tests = dict(rollout.counted), dict(rollout.tests)
    compared, num_requests = dict(rollout.measurement.compared), rollout.measurement.requests
    for member in rollout.members:
        window = (event.windows or {}).get(member.model) or Window(model=member.model, begin=0.0, end=0.0)
        # What a gateway gave out by the shares of the step before is not this step's.
        is_tested = step is not None and window.begin >= rollout.step_began + rollout.policy.initial_delay
        pairs = event.pairs.get(member.model, PairCount()) if step and step.shadow else PairCount()
        champion, candidate = window.of(str(member.champion)), window.of(str(member.candidate))
        counted[member.model] = _recount(rollout, member.model, champion, candidate, pairs, is_tested=is_tested)
        if member.model in tests:
            tests[member.model] = _tested(rollout, member, window, event, compares=is_tested and bool(step and step.share))
        if step and member.champion:
            old, num_pairs = compared.get(member.model, (0, 0)), pairs.num_pairs + pairs.num_failed
            new = (num_pairs, num_pairs) if step.shadow else (champion.requests, candidate.requests) if is_tested else (0, 0)
            compared[member.model] = (old[0] + new[0], old[1] + new[1])
            num_requests += champion.requests + candidate.requests
    seen = rollout.measurement.seen or event.windows is not None
    incomplete = rollout.measurement.incomplete or event.incomplete
    measurement = replace(rollout.measurement, compared=compared, requests=num_requests, seen=seen, incomplete=incomplete)
    return replace(rollout, counted=counted, tests=tests, measurement=measurement)


def _recount(rollout: Rollout, model: str, champion: Tally, candidate: Tally, pairs: PairCount, *, is_tested: bool) -> Counted:
    old, is_split, num_pairs = rollout.counted[model], rollout.current is not None, pairs.num_pairs + pairs.num_failed
    if _is_calm(old, rollout.policy.breakers):
        old = replace(old, recent_requests=0, recent_errors=0, recent_champion_requests=0, recent_champion_errors=0)
    return replace(
        old,
        requests=old.requests + (champion.requests + candidate.requests if is_split else 0),
        candidate=old.candidate + (candidate.requests if is_split else 0),
        nonfinite=old.nonfinite + candidate.nonfinite,
        champion_nonfinite=old.champion_nonfinite + champion.nonfinite,
        champion_requests=old.champion_requests + champion.requests,
        champion_errors=old.champion_errors + champion.errors,
        step_answers=old.step_answers + num_pairs + (candidate.requests if is_tested else 0),
        recent_requests=old.recent_requests + candidate.requests + num_pairs,
        recent_errors=old.recent_errors + candidate.errors + pairs.num_failed,
        recent_champion_requests=old.recent_champion_requests + champion.requests,
        recent_champion_errors=old.recent_champion_errors + champion.errors,
        pairs=old.pairs + num_pairs,
        pairs_agree=old.pairs_agree + pairs.num_agree,
        pairs_failed=old.pairs_failed + pairs.num_failed,
    )


def _tested(rollout: Rollout, member: Member, window: Window, event: Measured, *, compares: bool) -> dict[str, Test]:
    """`compares`: this window's requests were split by the step's share. Else the champion's times are learned from."""
    champion, candidate = window.tallies.get(str(member.champion), {}), window.tallies.get(str(member.candidate), {})
    both = [(each, champion.get(each) or _NOTHING, candidate.get(each) or _NOTHING) for each in {**champion, **candidate}]
    tests = dict(rollout.tests[member.model])
    for rule in member.metrics:
        test = tests[rule.name]
        if isinstance(test, MeanTest):
            name = rule.name.removeprefix("feedback:")
            sums = {each.version: each for each in event.feedback.get(member.model, ()) if each.name == name}
            one, two = (sums.get(str(each)) or FeedbackSum("", name) for each in (member.champion, member.candidate))
            tests[rule.name] = test.observed(Scores(one.num, one.total, one.squares), Scores(two.num, two.total, two.squares))
        elif isinstance(test, QuantileTest):
            times = _TIMES[rule.name.partition("_p")[0]]
            if compares:
                tests[rule.name] = test.observed({each: (times(one), times(two)) for each, one, two in both})
            elif champion and rollout.phase is not Phase.PROMOTED:
                for _, tally, _ in both:
                    test = test.learned(times(tally))
                tests[rule.name] = test
        elif compares and both:
            bad = _COUNTS[rule.name]
            tests[rule.name] = test.observed({each: Counts(one.requests, bad(one), two.requests, bad(two)) for each, one, two in both})
    return tests


def fired_breaker(rollout: Rollout, event: Measured) -> tuple[str, str] | None:
    """The member, and why a hard breaker fires."""
    breakers = rollout.policy.breakers
    for member in rollout.members:
        counted, deaths = rollout.counted[member.model], event.restarts.get(member.model, 0)
        if deaths >= breakers.restarts:
            return member.model, f"its replicas died {deaths} times on one server"
        if counted.nonfinite >= breakers.nonfinite and not counted.champion_nonfinite:
            return member.model, f"NaN or infinity in {counted.nonfinite} of its answers, and in none of the champion's"
        num, errors, usual = counted.recent_requests, counted.recent_errors, _usual_rate(counted)
        if num < breakers.min_requests or errors < breakers.error_rate * num or usual >= breakers.error_rate / 2:
            continue
        if surely_above(errors, num, usual, _SURE):
            return member.model, f"{errors} of its last {num} answers are errors"
    return None


def _is_calm(counted: Counted, breakers: Breakers) -> bool:
    """The breaker of errors has seen enough, and it is fine: it looks at what comes from here."""
    num = counted.recent_requests
    return num >= breakers.min_requests and counted.recent_errors < breakers.error_rate * num


def _usual_rate(counted: Counted) -> float:
    """The champion's errors: what hits both at the same time is not the candidate's fault. Never 0, since nobody knows that."""
    usual = (counted.champion_errors + 1) / (counted.champion_requests + 20)
    return max(usual, (counted.recent_champion_errors + 1) / (counted.recent_champion_requests + 20))


def outcome_of(rollout: Rollout, worse: tuple[str, str] | None) -> Outcome:
    if not rollout.measurement.seen:
        return Outcome.ERROR
    if worse is not None and rollout.kind != "experiment":
        return Outcome.FAILED
    if rollout.measurement.incomplete or any(
        not champion or not candidate for champion, candidate in rollout.measurement.compared.values()
    ):
        return Outcome.INCONCLUSIVE
    return Outcome.SUCCESSFUL


def worse_of(rollout: Rollout) -> tuple[str, str] | None:
    """The member, and in what it is worse than its champion."""
    for member in rollout.members:
        for rule in member.metrics:
            test = rollout.tests.get(member.model, {}).get(rule.name)
            if test is not None and test.worse:
                champion, candidate = test.intervals(rollout.policy.alpha)
                ours, theirs = _shown(rule.name, candidate.value), _shown(rule.name, champion.value)
                return member.model, f"{rule.name} is worse: {ours}, the champion's {theirs}"
        if member.champion and rollout.counted[member.model].pairs:
            agreement = agreement_of(rollout, member.model)
            if (agreement.high or 0.0) < rollout.policy.shadow.min_agreement:
                return member.model, f"its outputs are others: {agreement.value:.1%} of {agreement.num} pairs agree"
    return None


def agreement_of(rollout: Rollout, model: str) -> Interval:
    counted = rollout.counted[model]
    return rate_interval(counted.pairs_agree, counted.pairs, rollout.policy.alpha)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    if name.startswith("feedback:"):
        return f"{value:.4g}"
    return f"{value:.2%}" if name in _COUNTS else f"{value * 1000:.4g} ms"
