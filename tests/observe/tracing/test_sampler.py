"""Which traces are kept."""

from typing import Any

import pytest

from fairlead.core.timeline import Timeline
from fairlead.core.tracing import TraceSettings
from fairlead.observe.tracing.sampler import LEAST, Rate, Sampler
from tests.observe.tracing.timelines import CALLERS, NOT_SAMPLED, timeline

FAST = 0.01


def sampler(**settings: float) -> Sampler:
    return Sampler(TraceSettings(endpoint="http://c", **settings))  # type: ignore[arg-type]


def ended(sample: float, **said: Any) -> Timeline:
    return timeline(sample=sample, **said)


def test_chance_keeps_the_share_that_was_asked_for_and_decides_by_the_trace_id() -> None:
    one, other = sampler(sample=0.25, slowest=0.0), sampler(sample=0.25, slowest=0.0)
    requests = [ended(0.25) for _ in range(4000)]

    kept = [bool(one.why(each)) for each in requests]

    assert 800 < sum(kept) < 1200
    assert kept == [bool(other.why(each)) for each in requests]  # another server of the same share decides the same


@pytest.mark.parametrize("sample", [0.0, 1.0])
def test_all_and_none_are_exact(sample: float) -> None:
    decide = sampler(sample=sample, slowest=0.0)
    assert {decide.why(ended(sample)) for _ in range(500)} == {"chance" if sample else ""}


def test_a_callers_decision_goes_before_chance() -> None:
    assert sampler(sample=0.0).why(ended(0.0, traceparent=CALLERS)) == "parent"
    assert sampler(sample=1.0).why(ended(1.0, traceparent=NOT_SAMPLED)) == ""


def test_what_failed_or_was_slow_is_kept_even_where_its_caller_does_not_keep_it() -> None:
    decide = sampler(sample=0.0, slow=1.5)
    assert decide.why(ended(0.0, traceparent=NOT_SAMPLED, outcome="failure")) == "error"
    assert decide.why(ended(0.0, traceparent=NOT_SAMPLED, seconds=1.5)) == "slow"
    assert decide.why(ended(0.0, seconds=1.4)) == ""
    assert decide.why(ended(0.0, outcome="refused")) == ""  # a storm of 429 says nothing


def test_the_slowest_of_each_model_are_kept() -> None:
    decide = sampler(sample=0.0)
    for number in range(3000):
        decide.why(ended(0.0, model="quick", seconds=FAST * (1 + number % 7 / 20)))
        decide.why(ended(0.0, model="slow", seconds=2.0 + number % 7 / 20))

    assert decide.why(ended(0.0, model="quick", seconds=0.2)) == "slow"
    assert decide.why(ended(0.0, model="quick", seconds=FAST)) == ""
    assert decide.why(ended(0.0, model="slow", seconds=2.2)) == ""


def test_a_model_that_became_slow_is_not_kept_whole_for_ever() -> None:
    decide = sampler(sample=0.0)
    for _ in range(5000):
        decide.why(ended(0.0, seconds=FAST))

    kept = [decide.why(ended(0.0, seconds=1.0)) for _ in range(5000)]

    assert kept[0] == "slow" and set(kept[-1000:]) == {""}


def test_of_a_model_that_is_hardly_known_nothing_is_slow() -> None:
    decide = sampler(sample=0.0)
    assert {decide.why(ended(0.0, seconds=10.0**number)) for number in range(4)} == {""}
    assert LEAST > 4


def test_models_that_are_remembered_are_bounded() -> None:
    decide = sampler(sample=0.0)
    for number in range(3000):
        decide.why(ended(0.0, model=f"m{number}"))
    assert len(decide._times) <= 512


def test_no_more_than_so_many_a_second_and_half_of_it_for_what_matters() -> None:
    decide = sampler(max_per_second=10.0)

    by_chance, beyond = decide.choose([ended(1.0) for _ in range(100)], 0.0)
    errors, _ = decide.choose([ended(1.0, outcome="failure") for _ in range(100)], 0.0)

    assert (len(by_chance), beyond, len(errors)) == (10, 90, 10)
    assert decide.choose([ended(1.0, outcome="failure")], 0.0)[0] == []
    assert len(decide.choose([ended(1.0, outcome="failure")], 0.2)[0]) == 1


def test_a_rate_does_not_mind_a_clock_that_goes_back_and_none_is_none() -> None:
    rate = Rate(5.0)
    for now in (10.0, 3.0, 3.1, 3.2):
        rate.flow(now)
        assert rate.take(important=True)
    unbounded = Rate(0.0)
    assert all(unbounded.take(important=False) for _ in range(1000))
