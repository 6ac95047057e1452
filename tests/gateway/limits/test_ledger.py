"""Holding and settling, in memory."""

import gc
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.core.errors import LimitExceeded
from fairlead.core.policy import Amounts, Limits, Rule, Unit, rules_of
from fairlead.gateway.limits.headers import FAR
from fairlead.gateway.limits.ledger import NOTHING_HELD, Hold, Limiter
from fairlead.gateway.limits.meter import Standing, Subject, rate_of
from tests.gateway.limits.model import Model
from tests.gateway.limits.traffic import RULES, START, SUBJECTS, Event, events, used_of

NOON = 1_772_366_400.0
"""2026-03-01T12:00:00Z."""


def tenant(limits: Limits, name: str = "acme") -> tuple[Subject, ...]:
    return (Subject(f"tenant:{name}", rules_of(limits)),)


def tokens(number: float) -> Amounts:
    return {Unit.REQUESTS: 1.0, Unit.TOKENS: number}


def standing(limiter: Limiter, subjects: tuple[Subject, ...], now: float) -> Standing:
    (found,) = limiter.standings(subjects, now)
    return found


def refused(limiter: Limiter, subjects: tuple[Subject, ...], amounts: Amounts, now: float) -> LimitExceeded:
    with pytest.raises(LimitExceeded) as caught:
        limiter.hold(subjects, amounts, now)
    return caught.value


def used(limiter: Limiter, subjects: tuple[Subject, ...], amounts: Amounts, now: float) -> None:
    """A request that uses just what it held, at once."""
    limiter.hold(subjects, amounts, now).settle(amounts, now)


# Stories


def test_a_bucket_is_full_at_first_and_fills_all_the_time():
    limiter, acme = Limiter(), tenant({"requests_per_minute": 60})
    holds = [limiter.hold(acme, tokens(0), NOON) for _ in range(60)]
    error = refused(limiter, acme, tokens(0), NOON)
    assert (error.reason, error.retry_after) == ("limit-requests", pytest.approx(1.0))
    assert error.message == "the tenant's limit of 60 requests per minute is reached: try again in 1.0 s"
    for hold in holds:
        hold.settle(tokens(0), NOON)
    used(limiter, acme, tokens(0), NOON + 1)
    refused(limiter, acme, tokens(0), NOON + 1)


def test_an_overview_tells_of_everybody_what_is_spent_and_held_now():
    limiter, acme, zoo = Limiter(), tenant({"requests_per_minute": 60}), tenant({"tokens_per_day": 100}, "zoo")
    used(limiter, acme, tokens(0), NOON)
    limiter.hold(zoo, tokens(40), NOON)
    told = {each.subject: (each.rule.unit, each.spent, each.held, each.remaining) for each in limiter.overview(NOON + 0.5)}
    assert told == {"tenant:acme": (Unit.REQUESTS, 0.5, 0.0, 59.5), "tenant:zoo": (Unit.TOKENS, 0.0, 40.0, 60.0)}


def test_what_was_held_too_much_comes_back_when_the_request_settles():
    limiter, acme = Limiter(), tenant({"tokens_per_minute": 1000})
    hold = limiter.hold(acme, tokens(900), NOON)
    refused(limiter, acme, tokens(200), NOON)
    hold.settle(tokens(150), NOON)
    assert standing(limiter, acme, NOON).remaining == 850
    used(limiter, acme, tokens(850), NOON)


def test_long_requests_do_not_block_a_bucket_that_flows_meanwhile():
    limiter, acme = Limiter(), tenant({"requests_per_second": 10})
    under_way = [limiter.hold(acme, tokens(0), NOON + second / 10) for second in range(100)]
    assert all(hold.headers for hold in under_way)


def test_what_time_gave_back_is_not_given_back_twice():
    limiter, acme = Limiter(), tenant({"tokens_per_minute": 600})
    first = limiter.hold(acme, tokens(600), NOON)
    used(limiter, acme, tokens(300), NOON + 30)  # half of the first has flowed off
    first.release(NOON + 30)
    used(limiter, acme, tokens(300), NOON + 30)
    assert refused(limiter, acme, tokens(1), NOON + 30).retry_after == pytest.approx(0.1)


def test_a_request_that_outlives_its_window_gives_nothing_back_that_others_hold():
    limiter, acme = Limiter(), tenant({"tokens_per_minute": 600})
    old = limiter.hold(acme, tokens(600), NOON)
    young = limiter.hold(acme, tokens(600), NOON + 60)
    old.release(NOON + 60)
    assert standing(limiter, acme, NOON + 60).held == 600
    young.release(NOON + 60)
    assert standing(limiter, acme, NOON + 60).held == 0


def test_what_flowed_off_a_hold_pays_for_what_its_request_used_and_no_more():
    limiter, acme = Limiter(), tenant({"tokens_per_minute": 600})
    hold = limiter.hold(acme, tokens(600), NOON)
    assert standing(limiter, acme, NOON + 30).held == pytest.approx(300)
    hold.settle(tokens(400), NOON + 30)
    assert standing(limiter, acme, NOON + 30).spent == pytest.approx(100)
    hold = limiter.hold(acme, tokens(500), NOON + 30)
    assert standing(limiter, acme, NOON + 70).held == pytest.approx(200)
    hold.settle(tokens(5), NOON + 70)
    assert standing(limiter, acme, NOON + 70).spent == 0


def test_who_used_more_than_held_waits_until_that_has_flowed_off():
    limiter, acme = Limiter(), tenant({"tokens_per_minute": 600})
    limiter.hold(acme, tokens(100), NOON).settle(tokens(700), NOON)
    assert standing(limiter, acme, NOON).remaining == 0
    assert refused(limiter, acme, tokens(0), NOON + 9).retry_after == pytest.approx(1.0)
    limiter.hold(acme, tokens(0), NOON + 10.01)


def test_an_amount_that_nobody_could_estimate_is_charged_and_refuses_the_next():
    limiter, acme = Limiter(), tenant({"compute_seconds_per_minute": 6})
    for hold in [limiter.hold(acme, {Unit.COMPUTE_SECONDS: 0.0}, NOON) for _ in range(2)]:
        hold.settle({Unit.COMPUTE_SECONDS: 4.0}, NOON)
    error = refused(limiter, acme, {Unit.COMPUTE_SECONDS: 0.0}, NOON)
    assert (error.reason, error.retry_after) == ("limit-compute-seconds", pytest.approx(20.0))
    limiter.hold(acme, tokens(5), NOON)  # has nothing to do with that rule


def test_a_budget_begins_anew_with_the_calendar_day_in_utc():
    limiter, acme = Limiter(), tenant({"tokens_per_day": 1000})
    used(limiter, acme, tokens(1000), NOON)
    error = refused(limiter, acme, tokens(1), NOON + 3600)
    assert (error.reason, error.retry_after) == ("budget-tokens", 11 * 3600)
    assert error.message == "the tenant's budget of 1000 tokens per day is used up: it begins anew in 11 h"
    limiter.hold(acme, tokens(1000), NOON + 12 * 3600)


def test_a_budget_of_which_the_rest_is_only_held_says_to_try_again_soon():
    limiter, acme = Limiter(), tenant({"money_per_month": 10})
    dear = limiter.hold(acme, {Unit.MONEY: 8.0}, NOON)
    error = refused(limiter, acme, {Unit.MONEY: 3.0}, NOON)
    assert (error.reason, error.retry_after) == ("budget-money", 1.0)
    dear.release(NOON)
    used(limiter, acme, {Unit.MONEY: 3.0}, NOON)


def test_the_prompts_that_came_in_one_request_are_one_request_under_way() -> None:
    limiter, acme = Limiter(), tenant({"concurrent": 1})
    holds = [limiter.hold(acme, {Unit.REQUESTS: float(number == 0), Unit.TOKENS: 5.0}, NOON) for number in range(10)]
    assert refused(limiter, acme, tokens(1), NOON).reason == "limit-concurrent"
    for hold in holds:
        hold.settle({Unit.TOKENS: 5.0}, NOON)
    limiter.hold(acme, tokens(1), NOON)


def test_requests_under_way_are_bounded_and_their_end_makes_room():
    limiter, acme = Limiter(), tenant({"concurrent": 2})
    first = limiter.hold(acme, tokens(5), NOON)
    second = limiter.hold(acme, tokens(5), NOON)
    error = refused(limiter, acme, tokens(5), NOON)
    assert (error.reason, error.retry_after) == ("limit-concurrent", 1.0)
    assert error.message == "the tenant has 2 requests under way, as many as it may: try again when one has ended"
    first.settle(tokens(5), NOON + 9)
    third = limiter.hold(acme, tokens(5), NOON + 9)
    second.release(NOON + 9)
    third.release(NOON + 9)
    assert standing(limiter, acme, NOON + 9).remaining == 2


def test_a_request_that_no_rule_can_ever_serve_is_told_so():
    limiter, acme = Limiter(), tenant({"tokens_per_minute": 1000})
    error = refused(limiter, acme, tokens(1001), NOON)
    assert (error.reason, error.retry_after, error.headers["x-should-retry"]) == ("limit-tokens", FAR, "false")
    assert error.message == (
        "this request may need 1001 where the tenant is allowed 1000 tokens per minute: ask for less, or have the limit raised"
    )
    assert refused(limiter, tenant({"concurrent": 0}, "none"), tokens(1), NOON).message == "the tenant may have no requests under way"
    assert refused(limiter, tenant({"requests_per_day": 0}, "no"), tokens(1), NOON).headers["x-should-retry"] == "false"


def test_a_hold_is_all_or_nothing_over_all_subjects():
    limiter = Limiter()
    subjects = (*tenant({"tokens_per_minute": 1000, "concurrent": 9}), Subject("model:chat", rules_of({"tokens_per_minute": 100})))
    refused(limiter, subjects, tokens(200), NOON)
    assert [each.held for each in limiter.standings(subjects, NOON)] == [0, 0, 0]
    error = refused(limiter, subjects, tokens(2000), NOON)
    assert "the tenant" in error.message or "the model" in error.message


def test_of_several_rules_that_refuse_the_one_that_takes_longest_is_named():
    limiter, acme = Limiter(), tenant({"requests_per_second": 1, "requests_per_hour": 1})
    used(limiter, acme, tokens(1), NOON)
    assert refused(limiter, acme, tokens(1), NOON).retry_after == pytest.approx(3600)


def test_settling_twice_or_after_a_release_does_nothing():
    limiter, acme = Limiter(), tenant({"tokens_per_day": 1000})
    hold = limiter.hold(acme, tokens(100), NOON)
    hold.release(NOON)
    hold.settle(tokens(100), NOON)
    hold.release(NOON)
    assert standing(limiter, acme, NOON).remaining == 1000


def test_one_that_failed_by_the_callers_fault_counts_as_a_request_only():
    limiter, acme = Limiter(), tenant({"tokens_per_day": 1000, "requests_per_day": 10})
    limiter.hold(acme, tokens(100), NOON).settle({Unit.REQUESTS: 1.0}, NOON)
    assert [each.spent for each in limiter.standings(acme, NOON)] == [0, 1]


def test_a_hold_that_everybody_forgot_comes_back():
    limiter, acme = Limiter(), tenant({"concurrent": 1})
    forgotten = limiter.hold(acme, tokens(1), NOON)
    del forgotten
    gc.collect()
    assert standing(limiter, acme, NOON).remaining == 1
    limiter.hold(acme, tokens(1), NOON)


def test_no_rules_no_cost():
    limiter = Limiter()
    hold = limiter.hold((Subject("tenant:acme", ()), Subject("model:m", ())), tokens(1), NOON)
    assert hold is NOTHING_HELD
    assert hold.headers == {}
    hold.settle(tokens(1), NOON)
    hold.release(NOON)
    assert len(limiter) == 0


def test_rules_that_change_under_way_keep_what_was_counted():
    limiter = Limiter()
    hold = limiter.hold(tenant({"tokens_per_minute": 1000, "tokens_per_day": 5000}), tokens(600), NOON)
    raised = tenant({"tokens_per_minute": 2000, "tokens_per_day": 5000, "concurrent": 3})
    assert [each.remaining for each in limiter.standings(raised, NOON)] == [1400, 4400, 3]
    hold.settle(tokens(600), NOON)
    lowered = tenant({"tokens_per_minute": 100, "tokens_per_day": 500})
    minute, day = limiter.standings(lowered, NOON)
    assert (minute.spent, day.spent) == (100, 600)  # the bucket is as empty as it can be, the budget's spending stays
    assert minute.reset == pytest.approx(60)


def test_idle_subjects_are_forgotten_and_those_with_something_to_remember_are_not():
    limiter = Limiter()
    rules = rules_of({"requests_per_second": 100, "tokens_per_month": 1e6})
    spender = limiter.hold((Subject("key:spender", rules),), tokens(10), NOON)
    spender.settle(tokens(10), NOON)
    under_way = limiter.hold((Subject("key:busy", rules),), {Unit.ROWS: 1.0}, NOON)
    for number in range(2000):
        used(limiter, (Subject(f"key:{number}", rules),), {Unit.REQUESTS: 1.0}, NOON + number)
    assert len(limiter) < 20
    assert standing(limiter, (Subject("key:spender", rules[1:]),), NOON).spent == 10
    under_way.settle(tokens(7), NOON + 2000)
    assert standing(limiter, (Subject("key:busy", rules[1:]),), NOON + 2000).spent == 7


async def test_budgets_are_restored_from_the_usage_records_at_start():
    limiter, acme = Limiter(), tenant({"tokens_per_month": 1000, "tokens_per_day": 1000})
    await limiter.restore("tenant:acme", Unit.TOKENS, "month", 900, NOON)
    await limiter.restore("tenant:acme", Unit.TOKENS, "day", 100, NOON)
    assert [each.remaining for each in limiter.standings(acme, NOON)] == [100, 900]
    await limiter.restore("tenant:acme", Unit.TOKENS, "month", 950, NOON)
    assert refused(limiter, acme, tokens(60), NOON).reason == "budget-tokens"
    # What was said of a period that has ended meanwhile counts no more
    await limiter.restore("tenant:late", Unit.TOKENS, "day", 100, NOON)
    assert limiter.standings(tenant({"tokens_per_day": 1000}, "late"), NOON + 86400)[0].remaining == 1000


def test_a_clock_that_is_set_back_neither_fills_nor_blocks_a_bucket():
    limiter, acme = Limiter(), tenant({"requests_per_minute": 1})
    used(limiter, acme, tokens(1), NOON)
    for _ in range(200):  # callers that read the clock in another order than they come
        refused(limiter, acme, tokens(1), NOON + 0.4)
        refused(limiter, acme, tokens(1), NOON)
    assert refused(limiter, acme, tokens(1), NOON).retry_after == pytest.approx(59.6)
    refused(limiter, acme, tokens(1), NOON - 3600)
    limiter.hold(acme, tokens(1), NOON - 3600 + 60)


# Properties


@dataclass
class Run:
    """Events happen to a limiter, and the model with it."""

    limiter: Limiter = field(default_factory=Limiter)
    model: Model = field(default_factory=lambda: Model(RULES, START))
    now: float = START
    open: list[tuple[int, Hold, Amounts]] = field(default_factory=list)
    num_holds: int = 0
    last: LimitExceeded | None = None

    def step(self, event: Event) -> tuple[int, Amounts, Amounts | None] | None:
        """(hold, what it held, what it used) where one ends."""
        self.last = None
        if event.what == "wait":
            self.now += event.seconds
        elif event.what == "hold":
            self.num_holds += 1
            admitted = self.model.hold(self.num_holds, event.amounts, self.now)
            try:
                self.open.append((self.num_holds, self.limiter.hold(SUBJECTS, event.amounts, self.now), event.amounts))
            except LimitExceeded as e:
                self.last = e
            assert admitted == (self.last is None)
        elif self.open:
            number, hold, held = self.open.pop(event.index % len(self.open))
            used = used_of(event, held) if event.what == "settle" else None
            self.model.end(number, used, self.now)
            if used is not None:
                hold.settle(used, self.now)
            elif event.what == "release":
                hold.release(self.now)
            del hold
            return number, held, used
        return None

    def meters(self) -> dict[str, tuple[float, float]]:
        return {meter.rule.name: (meter.spent, meter.held) for meter in self.model.meters}


def limiter_meters(limiter: Limiter, now: float) -> dict[str, tuple[float, float]]:
    limiter.hold((), {}, now)  # what was dropped is released by the next event
    return {
        meter.rule.name: (meter.spent, meter.held)
        for subject in SUBJECTS[:2]
        if subject.name in limiter._accounts
        for meter in limiter._accounts[subject.name].meters
    }


@settings(max_examples=100, deadline=None)
@given(events)
def test_it_counts_as_the_model_that_keeps_every_hold_apart(happening):
    run = Run()
    for event in happening:
        run.step(event)
        expected = run.meters()
        for name, (spent, held) in limiter_meters(run.limiter, run.now).items():
            assert (spent, held) == (pytest.approx(expected[name][0], abs=1e-6), pytest.approx(expected[name][1], abs=1e-6)), name


@settings(max_examples=100, deadline=None)
@given(events)
def test_no_rule_is_overdrawn_by_more_than_what_requests_under_way_used_beyond_their_holds(happening):
    run = Run()
    excess = dict.fromkeys((rule.name for rule in RULES), 0.0)
    """Since somebody was last admitted."""
    for event in happening:
        admitted = run.num_holds
        ended = run.step(event)
        if event.what == "hold" and run.num_holds > admitted and run.last is None:
            excess = dict.fromkeys(excess, 0.0)
        if ended is not None and ended[2] is not None:
            for rule in RULES:
                if rule.unit is not None:
                    excess[rule.name] += max(0.0, ended[2].get(rule.unit, 0.0) - ended[1].get(rule.unit, 0.0))
        for rule in RULES:
            spent, held = limiter_meters(run.limiter, run.now).get(rule.name, (0.0, 0.0))
            assert spent + held <= rule.amount + excess[rule.name] + 1e-6


def used_in_any_stretch(rule: Rule, spans: list[tuple[float, float]]) -> None:
    """Of (time, used within the hold): no stretch of time has more than the rule allows."""
    for first, _ in spans:
        for last, _ in spans:
            if last >= first:
                used = sum(amount for time, amount in spans if first <= time <= last)
                assert used <= rule.amount + rate_of(rule) * (last - first) + 1e-6


@settings(max_examples=100, deadline=None)
@given(events)
def test_what_is_used_in_any_stretch_of_time_fits_the_amount_and_what_flowed_off(happening):
    run = Run()
    begun: dict[int, float] = {}
    spans: dict[str, list[tuple[float, float]]] = {rule.name: [] for rule in RULES}
    for event in happening:
        ended = run.step(event)
        if run.open and run.open[-1][0] not in begun:
            begun[run.open[-1][0]] = run.now
        if ended is not None and ended[2] is not None:
            for rule in RULES:
                if rule.unit is not None:
                    within = min(ended[1].get(rule.unit, 0.0), ended[2].get(rule.unit, 0.0))
                    spans[rule.name].append((begun[ended[0]], within))
    for rule in RULES:
        if rate_of(rule):
            used_in_any_stretch(rule, spans[rule.name])


@settings(max_examples=100, deadline=None)
@given(events, st.integers(0, 39), st.floats(0, 1))
def test_a_released_hold_leaves_no_more_than_if_it_had_never_been(happening, when, how_long):
    """And just as much, where no other was under way."""
    run, twin = Run(), Limiter()
    twins: dict[int, Hold] = {}
    extra: Hold | None = None
    until = when + int(how_long * (len(happening) - when))
    alone = True
    for number, event in enumerate(happening):
        if number == when:
            try:
                extra = run.limiter.hold(SUBJECTS, {Unit.REQUESTS: 1.0, Unit.TOKENS: 50.0, Unit.MONEY: 0.3}, run.now)
            except LimitExceeded:
                return
            alone = not run.open
        if extra is not None and number == until:
            extra.release(run.now)
            extra = None
        if event.what == "wait":
            run.now += event.seconds
        elif event.what == "hold":
            try:
                hold = run.limiter.hold(SUBJECTS, event.amounts, run.now)
            except LimitExceeded:
                continue
            alone = alone and extra is None
            run.num_holds += 1
            run.open.append((run.num_holds, hold, event.amounts))
            twins[run.num_holds] = twin.hold(SUBJECTS, event.amounts, run.now)
        elif run.open:
            index, hold, held = run.open.pop(event.index % len(run.open))
            for each in (hold, twins.pop(index)):
                if event.what == "settle":
                    each.settle(used_of(event, held), run.now)
                else:
                    each.release(run.now)
    if extra is not None:
        extra.release(run.now)
    for ours, without in zip(run.limiter.standings(SUBJECTS, run.now), twin.standings(SUBJECTS, run.now), strict=True):
        assert ours.spent + ours.held >= without.spent + without.held - 1e-6
        if alone:
            assert (ours.spent, ours.held) == (pytest.approx(without.spent, abs=1e-6), pytest.approx(without.held, abs=1e-6))


@settings(max_examples=100, deadline=None)
@given(events)
def test_the_time_to_try_again_is_the_truth(happening):
    """Not earlier; and not later, unless others end."""
    run = Run()
    for event in happening:
        run.step(event)
        error = run.last
        if error is not None and error.reason.startswith("limit-") and error.reason != "limit-concurrent" and error.retry_after < FAR:
            before, after = run.now + error.retry_after * 0.999 - 1e-3, run.now + error.retry_after + 1e-3
            assert still_refused(run, event.amounts, max(run.now, before)) or error.retry_after < 1e-2
            assert still_refused(run, event.amounts, after) in (None, "limit-concurrent", "budget-tokens", "budget-money")
            return
        assert error is None or math.isfinite(error.retry_after)


def still_refused(run: Run, amounts: Amounts, now: float) -> str | None:
    try:
        run.limiter.hold(SUBJECTS, amounts, now).release(now)
    except LimitExceeded as e:
        return e.reason
    return None
