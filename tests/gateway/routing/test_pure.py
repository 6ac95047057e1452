"""Shares, budgets, circuits and costs: pure decisions on a virtual clock."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.core.generation import Chat, Embed, Generate, Message, Sampling, Score
from fairlead.core.policy import Breaker
from fairlead.core.request import Raw, Request
from fairlead.core.routes import Routes, unit
from fairlead.gateway.routing.balance import (
    BLOCK_ENDS,
    LONGEST_ANSWER,
    Load,
    Prefixes,
    Size,
    blocks_of,
    cost,
    overlap_of,
    pick,
    rendezvous,
    size_of,
)
from fairlead.gateway.routing.breaker import LONGEST_OPEN, Circuit, State
from fairlead.gateway.routing.budget import SECONDS, Budget
from fairlead.gateway.routing.sliding import Sliding

# Shares

SPLIT = Routes({"fraud": (("1", 0.7), ("2", 0.2), ("3", 0.1))})


def test_versions_get_their_shares():
    picked = Counter(SPLIT.pick("fraud", None, n / 1000) for n in range(1000))
    assert {version: round(number / 1000, 2) for version, number in picked.items()} == {"1": 0.7, "2": 0.2, "3": 0.1}
    picked = Counter(SPLIT.pick("fraud", b"session %d" % n, 0.5) for n in range(10_000))
    assert [round(picked[version] / 10_000, 1) for version in "123"] == [0.7, 0.2, 0.1]
    assert SPLIT.pick("other", None, 0.5) == ""


def test_a_session_stays_with_its_version_while_the_canary_grows():
    keys = [b"%d" % n for n in range(2000)]
    before = {key: Routes({"m": (("1", 0.95), ("2", 0.05))}).pick("m", key, 0.0) for key in keys}
    after = {key: Routes({"m": (("1", 0.9), ("2", 0.1))}).pick("m", key, 0.0) for key in keys}
    assert all(after[key] == "2" for key in keys if before[key] == "2")


@given(st.lists(st.integers(0, 10), min_size=1, max_size=5).filter(any), st.floats(0, 1, exclude_max=True))
def test_a_version_without_a_share_gets_nothing(parts, random):
    total = sum(parts)
    routes = Routes({"m": tuple((str(n), part / total) for n, part in enumerate(parts))})
    assert parts[int(routes.pick("m", None, random))] > 0


def test_shares_that_do_not_add_up_are_refused():
    for shares in ((("1", 0.5),), (("1", 1.5), ("2", -0.5))):
        with pytest.raises(ValueError, match="must be at least 0 and add up to 1"):
            Routes({"m": shares})


# Sums and budgets


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5)), max_size=60))
def test_sums_are_those_of_the_last_seconds(steps):
    sliding, now, added = Sliding(10.0, 1), 100.0, []
    for pause, amount in steps:
        now += pause
        sliding.turn(now)
        sliding.add(0, amount)
        added.append((now, amount))
        (total,) = sliding.totals
        assert (
            sum(each for at, each in added if at > now - 9.0 + 1e-6) <= total <= sum(each for at, each in added if at > now - 10.0 - 1e-6)
        )


@given(
    st.floats(0, 1), st.integers(0, 5), st.lists(st.tuples(st.floats(0, 2), st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=60)
)
def test_no_window_spends_more_than_its_share_of_the_requests_around_it(share, floor, steps):
    budget, now = Budget(share, floor), 50.0
    counted, spent = [], []
    for pause, requests, wanted in steps:
        now += pause
        for _ in range(requests):
            budget.count(now)
            counted.append(now)
        spent += [now for _ in range(wanted) if budget.spend(now)]
    for at in spent:
        # what it holds is told to a tenth of the window, and requests before the window allowed what was spent at its beginning
        in_window = sum(at - SECONDS * 0.9 + 1e-6 < each <= at for each in spent)
        assert in_window <= floor + share * sum(at - SECONDS - 1e-6 < each <= at for each in counted) + 1e-6
    if not share:
        assert not spent


def test_a_few_retries_are_always_allowed():
    budget = Budget(0.1, 3)
    assert [budget.spend(1.0) for _ in range(5)] == [True, True, True, False, False]
    assert budget.spend(1.0 + SECONDS)


# Circuits

POLICY = Breaker(failures=3, error_rate=0.5, min_requests=10, window=10.0, latency_factor=5.0, open_seconds=5.0)


def succeed(circuit, now, seconds=0.1, others=()):
    circuit.succeeded(now, seconds, trial=circuit.sent(now), others=lambda: others)


def fail(circuit, now):
    circuit.failed(now, trial=circuit.sent(now))


def test_failures_in_a_row_open_it_and_one_trial_closes_it():
    circuit = Circuit(POLICY)
    for _ in range(2):
        fail(circuit, 1.0)
    succeed(circuit, 1.0)
    for _ in range(2):
        fail(circuit, 1.0)
    assert circuit.state(1.0) is State.CLOSED
    fail(circuit, 1.0)
    assert circuit.state(1.0) is State.OPEN and circuit.why == "failures"
    assert not circuit.allows(5.9)
    assert circuit.state(6.0) is State.HALF_OPEN and circuit.allows(6.0)
    assert circuit.sent(6.0)
    assert not circuit.allows(6.0) and not circuit.sent(6.0), "one trial at a time"
    circuit.succeeded(6.1, 0.1, trial=True, others=list)
    assert circuit.state(6.1) is State.CLOSED and circuit.allows(6.1)


def test_each_failed_trial_doubles_the_time_up_to_a_minute():
    circuit, now, waits = Circuit(POLICY), 1.0, []
    for _ in range(3):
        fail(circuit, now)
    for _ in range(6):
        began = now
        while not circuit.allows(now):
            now += 0.5
        waits.append(now - began)
        fail(circuit, now)
    assert waits == [5.0, 10.0, 20.0, 40.0, LONGEST_OPEN, LONGEST_OPEN]
    now += LONGEST_OPEN
    succeed(circuit, now)
    for _ in range(3):
        fail(circuit, now)
    assert circuit.allows(now + 5.0), "after a success it begins anew"


def test_a_trial_without_a_verdict_makes_room_for_another():
    circuit = Circuit(POLICY)
    for _ in range(3):
        fail(circuit, 1.0)
    assert circuit.sent(6.0)
    circuit.returned(trial=True)
    assert circuit.allows(6.0)


def test_what_was_sent_before_it_opened_says_nothing():
    circuit = Circuit(POLICY)
    late = circuit.sent(1.0)
    for _ in range(3):
        fail(circuit, 1.0)
    circuit.succeeded(2.0, 1.0, trial=late, others=list)
    assert circuit.state(2.0) is State.OPEN
    circuit.failed(6.5, trial=late)
    assert circuit.state(6.5) is State.HALF_OPEN


def test_a_share_of_failures_opens_it_once_there_are_enough():
    circuit = Circuit(POLICY)
    for _ in range(4):
        fail(circuit, 1.0)
        succeed(circuit, 1.0)
    assert circuit.state(1.0) is State.CLOSED, "8 answers are too few"
    succeed(circuit, 1.0)
    fail(circuit, 1.0)
    assert circuit.state(1.0) is State.OPEN and circuit.why == "error-rate"


def test_one_far_slower_than_the_others_is_left_out():
    circuit = Circuit(POLICY)
    for tenth in range(20):
        succeed(circuit, 1.0 + tenth / 10, 1.0, others=(0.3, 0.3, 0.1))
    assert circuit.state(3.0) is State.CLOSED
    for tenth in range(40):
        succeed(circuit, 13.0 + tenth / 10, 1.6, others=(0.3, 0.3, 0.1))
    assert circuit.why == "latency" and circuit.opened == 1
    # its trial must be fast, too
    at = 13.0 + 40 / 10 + 5.0
    succeed(circuit, at, 1.6, others=(0.3,))
    assert circuit.why == "trial" and circuit.state(at) is State.OPEN


def test_one_that_is_outrun_again_and_again_is_left_out():
    circuit = Circuit(POLICY)
    for _ in range(5):
        succeed(circuit, 1.0)
    for _ in range(4):
        circuit.outrun(1.0, trial=False)
    assert circuit.state(1.0) is State.CLOSED, "never in a row, only by its share"
    circuit.outrun(1.0, trial=False)
    assert circuit.why == "latency"
    circuit.outrun(6.0, trial=circuit.sent(6.0))
    assert circuit.state(6.0) is State.OPEN and circuit.why == "trial"


def test_fast_answers_are_no_outliers():
    circuit = Circuit(POLICY)
    for tenth in range(100):
        succeed(circuit, 1.0 + tenth / 10, 0.04, others=(0.001, 0.001))
    assert circuit.state(11.0) is State.CLOSED


@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from(["send", "ok", "fail", "return"])), max_size=80))
def test_whatever_happens_one_trial_is_out_at_most_and_it_is_tried_again_in_the_end(steps):
    circuit, now = Circuit(POLICY), 10.0
    out: list[bool] = []
    for pause, step in steps:
        now += pause
        if step == "send":
            if circuit.allows(now):
                out.append(circuit.sent(now))
        elif out:
            trial = out.pop(0)
            if step == "ok":
                circuit.succeeded(now, 0.1, trial=trial, others=list)
            elif step == "fail":
                circuit.failed(now, trial=trial)
            else:
                circuit.returned(trial=trial)
        assert sum(out) <= 1
        if circuit.state(now) is State.OPEN:
            assert not circuit.allows(now) and circuit.allows(now + LONGEST_OPEN)
    for trial in out:
        circuit.returned(trial=trial)
    assert circuit.allows(now + LONGEST_OPEN)


# Costs


def test_sizes_are_told_from_the_request():
    text = Request(model="m", prompt=Generate(text="x" * 400, sampling=Sampling(max_tokens=10, n=2)))
    assert size_of(text) == Size(100, 20)
    chat = Request(model="m", prompt=Generate(chat=Chat(messages=[Message(role="user", content="x" * 40), Message(role="assistant")])))
    assert size_of(chat) == Size(10, LONGEST_ANSWER)
    assert size_of(Request(model="m", prompt=Generate(token_ids=[1, 2, 3]))) == Size(3, LONGEST_ANSWER)
    assert size_of(Request(model="m", prompt=Embed(text="x" * 40))) == Size(10, 1)
    assert size_of(Request(model="m", prompt=Score(text="x" * 30, pair="y" * 10))) == Size(10, 1)
    assert size_of(Request(model="m", num_rows=7)) == Size(0, 7)
    raw = Raw(path="/v1/chat/completions", body=b"", prompt_chars=400, max_tokens=100_000)
    assert size_of(Request(model="m", raw=raw)) == Size(100, LONGEST_ANSWER)
    assert size_of(Request(model="m", raw=Raw(path="/v1/embeddings", body=b"", prompt_chars=40))) == Size(10, 1)
    assert size_of(Request(model="m", raw=Raw(path="/infer", body=b"", num_rows=3))) == Size(0, 3)


def test_a_prompt_that_is_there_already_costs_less_and_a_heavier_place_has_more_room():
    idle, busy = Load(), Load()
    busy.prompts, busy.answers = 500, 100
    size = Size(1000, 100)
    assert cost(idle, size, 0, 1.0) == 1100 and cost(busy, size, 896, 1.0) == 804
    assert cost(idle, size, 2000, 1.0) == 100
    assert cost(busy, size, 0, 2.0) == 850


def test_nearly_equal_costs_share_and_clear_ones_do_not():
    randoms = [n / 1000 for n in range(1000)]
    assert Counter(pick([10.0, 10.0], 10.0, 0.0, r) for r in randoms) == {0: 500, 1: 500}
    assert Counter(pick([10.0, 11.0], 10.0, 0.0, r) for r in randoms) == {0: 1000}
    near = Counter(pick([10.0, 10.5], 10.0, 0.1, r) for r in randoms)
    assert 600 < near[0] < 650  # e^-0.5 to 1
    assert Counter(pick([10.0, 20.0], 10.0, 0.1, r) for r in randoms) == {0: 1000}


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=8), st.floats(0, 1e6), st.floats(0, 10), st.floats(0, 1, exclude_max=True))
def test_some_place_is_always_picked(costs, scale, temperature, random):
    assert 0 <= pick(costs, scale, temperature, random) < len(costs)


def test_a_place_that_goes_moves_only_its_own_keys():
    places = [(f"http://10.0.0.{n}:8000", 1.0) for n in range(5)]
    keys = [b"%d" % n for n in range(5000)]
    before = {key: places[rendezvous(key, places)] for key in keys}
    left = places[:2] + places[3:]
    moved = [key for key in keys if left[rendezvous(key, left)] != before[key]]
    assert {before[key] for key in moved} == {places[2]}
    counted = Counter(before.values())
    assert all(900 < counted[place] < 1100 for place in places)


def test_a_heavier_place_belongs_to_more_keys():
    counted = Counter(rendezvous(b"%d" % n, [("a", 1.0), ("b", 3.0)]) for n in range(4000))
    assert 2850 < counted[1] < 3150


def test_every_process_derives_the_same_number_from_a_key():
    assert unit(b"a session") == pytest.approx(0.80669, abs=1e-5)


# Prefixes


def ask(text="", salt="", **fields):
    return Request(model="m", prompt=Generate(text=text, salt=salt, **fields))


def test_the_longest_common_beginning_is_found():
    prefixes = Prefixes()
    common, a, b = "s" * 1000, "a" * 1000, "b" * 1000
    prefixes.record(blocks_of(ask(common + a)), 0)
    prefixes.record(blocks_of(ask(common + b)), 1)
    held = prefixes.held(blocks_of(ask(common + a + "more")))
    assert overlap_of(held, 0) == 1792 // 4 and overlap_of(held, 1) == 768 // 4 and overlap_of(held, 2) == 0
    assert prefixes.held(blocks_of(ask("other " + common))) == []


def test_prompts_of_another_salt_have_nothing_in_common():
    assert not set(blocks_of(ask("x" * 600, salt="one"))) & set(blocks_of(ask("x" * 600, salt="two")))
    assert len(blocks_of(ask("x" * 600))) == 2 and blocks_of(ask("x" * 255)) == []


def test_chats_token_ids_and_raw_bodies_have_beginnings_too():
    def chat(*contents, tools=()):
        messages = [Message(role="user", content=content) for content in contents]
        return blocks_of(Request(model="m", prompt=Generate(chat=Chat(messages=messages, tools=list(tools)))))

    assert chat("x" * 600, "y") == chat("x" * 600, "z" * 10) and len(chat("x" * 600)) == 2
    assert chat("x" * 600, tools=[{"name": "f"}])[0] != chat("x" * 600)[0]
    ids = blocks_of(Request(model="m", prompt=Generate(token_ids=list(range(130)))))
    assert len(ids) == 2
    assert len(blocks_of(Request(model="m", raw=Raw(path="", body=b"", prefix=b"x" * 600)))) == 2
    assert blocks_of(Request(model="m", prompt=Embed(text="x" * 600))) == [] and blocks_of(Request(model="m")) == []


def test_no_prompt_is_too_long():
    assert len(blocks_of(ask("x" * 1_000_000))) == len(BLOCK_ENDS)
    wide = Request(model="m", prompt=Generate(token_ids=[1 << 40, -1] * 100_000))
    assert len(blocks_of(wide)) == len(BLOCK_ENDS)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10), st.integers(0, 3)), max_size=60))
def test_memory_is_bounded_and_what_is_held_shrinks_along_the_prompt(steps):
    prefixes = Prefixes(max_blocks=40)
    for name, length, place in steps:
        blocks = [hash((name, n)) for n in range(length)]
        prefixes.record(blocks, place)
        held = prefixes.held(blocks)
        assert len(prefixes) <= 40 + 10 and overlap_of(held, place) == BLOCK_ENDS[length - 1] // 4
        assert all(later & ~earlier == 0 for earlier, later in pairwise(held))
    prefixes.forget(0)
    for name in range(31):
        assert overlap_of(prefixes.held([hash((name, 0))]), 0) == 0
