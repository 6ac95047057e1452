"""What may happen to limits, for hypothesis to choose from."""

from typing import Literal, NamedTuple

from hypothesis import strategies as st

from fairlead.core.policy import Amounts, Unit, rules_of
from fairlead.gateway.limits.meter import Subject

START = 1_772_323_199.0
"""A second before a month's end, 2026-02-28T23:59:59Z."""
RULES = rules_of(
    {
        "requests_per_minute": 6,
        "tokens_per_second": 400,
        "tokens_per_minute": 1000,
        "tokens_per_day": 5000,
        "money_per_month": 4,
        "compute_seconds_per_hour": 30,
        "concurrent": 4,
    }
)
SUBJECTS = (Subject("tenant:acme", RULES[:4]), Subject("key:k1", RULES[4:]), Subject("model:free", ()))


class Event(NamedTuple):
    what: Literal["wait", "hold", "settle", "release", "drop"]
    seconds: float = 0.0
    amounts: Amounts = {}
    index: int = 0
    factor: float = 1.0
    """Of what was held, how much is used."""


_amounts = st.builds(
    lambda tokens, money: {Unit.REQUESTS: 1.0, Unit.TOKENS: tokens, Unit.MONEY: money, Unit.COMPUTE_SECONDS: 0.0},
    st.sampled_from([0.0, 10.0, 100.0, 333.0, 400.0]),
    st.sampled_from([0.0, 0.1, 0.7]),
)
_end = {"index": st.integers(0, 9), "factor": st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.0, 1.7])}
_event = st.one_of(
    st.builds(Event, st.just("hold"), amounts=_amounts),
    st.builds(Event, st.just("hold"), amounts=_amounts),
    st.builds(Event, st.just("wait"), seconds=st.sampled_from([0.001, 0.1, 0.25, 1.0, 5.0, 20.0, 61.0, 7200.0, 90000.0])),
    st.builds(Event, st.just("settle"), **_end),
    st.builds(Event, st.sampled_from(["release", "drop"]), index=st.integers(0, 9)),
)
events = st.lists(_event, max_size=40)


def used_of(event: Event, held: Amounts) -> Amounts:
    used = {unit: amount * event.factor for unit, amount in held.items()}
    return used | {Unit.REQUESTS: 1.0, Unit.COMPUTE_SECONDS: event.factor * 3}
