"""Prompts that would overrule the operator's."""

import time

import pytest

from fairlead.core.errors import Filtered
from fairlead.core.generation import Chat, Generate, Message
from fairlead.core.policy import FilterPolicy
from fairlead.core.request import Request
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.filters.injection import THRESHOLD, injection
from tests.gateway.filters.attacks import ATTACKS, BENIGN

score = injection()


def test_how_many_are_recognised_is_as_the_docs_say() -> None:
    missed = [text for text in ATTACKS if score(text) < THRESHOLD]
    wrong = [text for text in BENIGN if score(text) >= THRESHOLD]
    assert (len(ATTACKS), len(BENIGN)) == (60, 60)
    assert len(missed) == 6, missed
    assert len(wrong) == 2, wrong


def ask(*messages: tuple[str, str]) -> Request:
    return Request(model="m", prompt=Generate(chat=Chat(messages=[Message(role=role, content=content) for role, content in messages])))


def test_the_operator_may_say_what_a_user_may_not() -> None:
    block = Filters.of(FilterPolicy(injection="block"))
    block.check(ask(("system", ATTACKS[0]), ("user", "hello")))
    for role in ("user", "tool", "assistant"):
        with pytest.raises(Filtered) as refused:
            block.check(ask(("user", "hello"), (role, ATTACKS[0])))
        assert refused.value.rule == "injection"
        assert "joke" not in refused.value.message


def test_where_it_is_only_to_be_told_of_the_request_passes() -> None:
    request = ask(("user", ATTACKS[0]))
    checked = Filters.of(FilterPolicy(injection="flag")).check(request)
    assert checked.request is request
    assert checked.flagged == ("injection",)


@pytest.mark.parametrize(
    "unit", ["ignore ", "ignore all ", "ignore your previous ", "repeat your system ", "aWdub3Jl", "A", "send ", "игнорируй все "]
)
def test_hostile_texts_cost_time_in_proportion_to_their_length(unit: str) -> None:
    def seconds(size: int) -> float:
        text = (unit * (size // len(unit) + 1))[:size]
        best = 1e9
        for _ in range(2):
            start = time.perf_counter()
            score(text)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(64_000) / max(seconds(8_000), 1e-4) < 32
