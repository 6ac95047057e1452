"""Windows: how the requests of watched models ended, by the version that traffic gave them."""

import asyncio

import ml_dtypes
import numpy as np
import pytest

from fairlead.core.errors import ModelError
from fairlead.core.generation import Usage
from fairlead.core.policy import ModelPolicy, RoutingSettings
from fairlead.core.routes import Routes
from fairlead.core.watch import Watch
from fairlead.core.window import bucket_of
from fairlead.gateway import watch
from fairlead.gateway.watch import finite
from tests.gateway.house import ACME, Played, asking, caller, policies, rows, say, tensor_model, turns

both = pytest.mark.parametrize("form", ["submit", "infer"])
ONE_IN_TWO = Routes({"double": (("1", 0.5), ("2", 0.5))})


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def to_chat_2(front):
    front.dispatch.routes = Routes({"chat": (("1", 0.0), ("2", 1.0))})
    second = Played("chat", version="2")
    front.repository.serve(second)
    return second


def window_of(front, model="double"):
    (found,) = [each for each in front.gateway.watches.take(2000.0) if each.model == model]
    return found


def broken(inputs):
    raise ModelError("out of order")


# Counting


@both
async def test_requests_are_counted_for_the_version_that_traffic_gave_them(house):
    front = house()
    front.repository.serve(tensor_model("double", lambda inputs: {"y": inputs["x"] * 2}, version="2"))
    front.dispatch.routes = ONE_IN_TWO
    front.gateway.watches.set({"double": Watch()})
    clients = [await front.answer(rows(1.0)) for _ in range(60)]
    answered = [client.responses[0].version for client in clients]
    window = window_of(front)
    assert {version: window.of(version).requests for version in window.tallies} == {
        version: answered.count(version) for version in ("1", "2")
    }
    assert sum(sum(window.of(version).latency.values()) for version in window.tallies) == 60


@both
async def test_a_model_with_one_version_is_counted_too(house):
    front = house()
    front.gateway.watches.set({"double": Watch()})
    for _ in range(3):
        await front.answer(rows(1.0))
    assert window_of(front).of("1").requests == 3


@both
async def test_nobody_counts_what_nobody_watches_any_more(house):
    front = house()
    front.gateway.watches.set({"double": Watch()})
    await front.answer(rows(1.0))
    front.gateway.watches.set({})
    await front.answer(rows(1.0))
    assert front.gateway.watches.take(2000.0) == []
    front.gateway.watches.set({"double": Watch()})
    await front.answer(rows(1.0))
    assert window_of(front).of("1").requests == 1


@both
async def test_a_request_that_names_its_version_was_not_given_it_by_chance(house):
    front = house()
    front.gateway.watches.set({"double": Watch()})
    await front.answer(rows(1.0, version="1"))
    assert window_of(front).tallies == {}


@both
async def test_classes_of_service_are_told_apart(house):
    front = house(policies(classes={"gold": 5, "standard": 1}))
    front.gateway.watches.set({"double": Watch()})
    gold = caller(qos_class="gold", classes=("standard",))
    await front.answer(rows(1.0, caller=gold))
    await front.answer(rows(1.0, caller=gold, qos_class="standard"))
    await front.answer(rows(1.0, caller=ACME))
    window = window_of(front)
    assert {name: tally.requests for name, tally in window.tallies["1"].items()} == {"gold": 1, "standard": 2}


@both
async def test_a_window_is_taken_once(house):
    front = house()
    front.gateway.watches.set({"double": Watch()})
    await front.answer(rows(1.0))
    first = window_of(front)
    second = front.gateway.watches.take(2001.0)[0]
    assert first.of("1").requests == 1 and first.end == 2000.0
    assert second.tallies == {} and (second.begin, second.end) == (2000.0, 2001.0)


async def test_another_rollout_begins_a_new_window_and_the_same_one_goes_on(house):
    front = house()
    watches = front.gateway.watches
    watches.set({"double": Watch(rollout="a")})
    await front.answer(rows(1.0))
    watches.set({"double": Watch(rollout="a", feedback=True)})
    assert window_of(front).of("1").requests == 1
    await front.answer(rows(1.0))
    watches.set({"double": Watch(rollout="b")})
    assert window_of(front).tallies == {}


# How they end


@both
async def test_an_error_is_counted_and_has_no_latency(house):
    front = house()
    front.repository.serve(tensor_model("double", broken))
    front.gateway.watches.set({"double": Watch()})
    await front.refusal(rows(1.0))
    tally = window_of(front).of("1")
    assert (tally.requests, tally.errors, tally.latency) == (1, 1, {})


@both
async def test_an_error_is_the_chosen_versions_although_a_fallback_answered(house):
    front = house(policies(double=ModelPolicy(routing=RoutingSettings(fallback=("same",)))))
    front.repository.serve(tensor_model("double", broken), tensor_model("same", lambda inputs: {"y": inputs["x"]}))
    front.gateway.watches.set({"double": Watch(), "same": Watch()})
    client = await front.answer(rows(1.0))
    assert client.headers["x-fairlead-fallback"] == "same"
    windows = {window.model: window for window in front.gateway.watches.take(2000.0)}
    tally = windows["double"].of("1")
    assert (tally.requests, tally.errors, tally.latency) == (1, 1, {})
    assert windows["same"].tallies == {}


@both
async def test_a_caller_that_leaves_is_no_answer(house):
    front = house()
    front.gateway.watches.set({"chat": Watch()})
    client = front.ask(say("hello"))
    (await front.chat.next()).say("I")
    await turns()
    await client.leave()
    tally = window_of(front, "chat").of("1")
    assert (tally.requests, tally.cancelled) == (0, 1)


@both
async def test_an_answer_that_was_broken_off_is_an_error(house):
    front = house()
    front.gateway.watches.set({"chat": Watch()})
    client = front.ask(say("hello"))
    asked = await front.chat.next()
    asked.say("I")
    asked.fail(ModelError("out of memory"))
    await client.end()
    assert window_of(front, "chat").of("1").errors == 1


@both
async def test_pieces_tell_the_time_to_the_first_and_of_each_after_it(house):
    front = house()
    clock = front.dispatch.clock = Clock()
    second = to_chat_2(front)
    front.gateway.watches.set({"chat": Watch()})
    client = front.ask(say("hello"))
    asked = await second.next()
    clock.now += 0.5
    asked.say("I")
    await turns()
    clock.now += 0.2
    asked.say("am")
    await turns()
    clock.now += 0.4
    asked.end("here", usage=Usage(prompt_tokens=5, completion_tokens=4))
    await client.end()
    tally = window_of(front, "chat").of("2")
    assert tally.first == {bucket_of(0.5): 1}
    assert tally.per_token == {bucket_of(0.2): 1}  # 0.6 s for the three after the first
    assert list(tally.latency.values()) == [1] and abs(next(iter(tally.latency)) - bucket_of(1.1)) <= 1


@both
async def test_an_answer_that_comes_at_once_has_no_first_piece(house):
    front = house()
    clock = front.dispatch.clock = Clock()
    front.gateway.watches.set({"chat": Watch()})
    client = front.ask(say("hello", stream=False))
    asked = await front.chat.next()
    clock.now += 1.0
    asked.end(usage=Usage(prompt_tokens=5, completion_tokens=10))
    await client.end()
    tally = window_of(front, "chat").of("1")
    assert (tally.first, tally.per_token) == ({}, {bucket_of(0.1): 1})


# NaN and infinity


@both
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_answers_that_are_no_numbers_are_counted(house, value):
    front = house()
    front.repository.serve(tensor_model("double", lambda inputs: {"y": inputs["x"] * value}))
    front.gateway.watches.set({"double": Watch()})
    await front.answer(rows(1.0, 2.0))
    tally = window_of(front).of("1")
    assert (tally.requests, tally.errors, tally.nonfinite) == (1, 0, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (1, 1), (3, 5), (100, 3), (3, watch.LOOKED_AT)])
def test_what_is_finite(dtype, shape):
    array = np.zeros(shape, dtype)
    assert finite(array)
    for value in (np.nan, np.inf, -np.inf):
        spoiled = array.copy()
        spoiled.reshape(-1)[0] = value
        assert not finite(spoiled)
    if array.ndim == 2:
        assert finite(array.T) and not finite(spoiled.T)


def test_numbers_whose_squares_overflow_are_finite():
    assert finite(np.full((2, 3), 1e30, np.float32)) and finite(np.full((50, 3), 1e30, np.float32))
    assert finite(np.full((2, 3), 1e308)) and finite(np.full((50, 3), 1e308))
    assert finite(np.zeros((0, 3), np.float32))


def test_what_is_no_float_is_finite():
    for array in (np.array([1, 2]), np.array([True]), np.array([b"nan"], object)):
        assert finite(array)


# Who answered which request


@both
async def test_feedback_can_be_told_apart(house):
    front = house()
    watches = front.gateway.watches
    watches.set({"double": Watch(rollout="r1", feedback=True)})
    await front.answer(rows(1.0, id="own-1"))
    await front.answer(rows(1.0, id="own-2", log_id="log-2"))
    await front.answer(rows(1.0, id="own-3", log_id="log-2", num_requests=0))  # a second prompt in one HTTP request
    await front.answer(rows(1.0, id="", log_id=""))
    found = watches.take_exposures()
    assert [(row.request_id, row.model, row.version, row.rollout) for row in found] == [
        ("own-1", "double", "1", "r1"),
        ("log-2", "double", "1", "r1"),
    ]
    assert watches.take_exposures() == []


@both
async def test_nobody_is_remembered_unless_asked_for_or_where_there_was_no_answer(house):
    front = house()
    watches = front.gateway.watches
    watches.set({"double": Watch()})
    await front.answer(rows(1.0, log_id="a"))
    front.repository.serve(tensor_model("double", broken))
    watches.set({"double": Watch(feedback=True)})
    await front.refusal(rows(1.0, log_id="b"))
    assert watches.take_exposures() == []


async def test_exposures_that_nobody_takes_are_bounded(house, monkeypatch):
    front = house()
    watches = front.gateway.watches
    monkeypatch.setattr(watch, "MAX_EXPOSURES", 2)
    watches._exposures = type(watches._exposures)(maxlen=2)
    watches.set({"double": Watch(feedback=True)})
    for name in "abc":
        await front.answer(rows(1.0, log_id=name))
    assert [row.request_id for row in watches.take_exposures()] == ["b", "c"] and watches.num_dropped == 1


# What keeps to one side


@both
async def test_sticky_tenants_sessions_and_nothing(house):
    front = house()
    front.repository.serve(tensor_model("double", lambda inputs: {"y": inputs["x"] * 2}, version="2"))
    shares = {"double": (("1", 0.5), ("2", 0.5))}

    async def versions(sticky, **fields):
        front.dispatch.routes = Routes(shares, {"double": sticky})
        return {(await front.answer(rows(1.0, **fields))).responses[0].version for _ in range(24)}

    assert len(await versions("tenant")) == 1
    assert len(await versions("tenant", session="a")) == 1
    assert len(await versions("session", session="a")) == 1
    assert len(await versions("session")) == 2
    assert len(await versions("request", session="a")) == 2
    tenants = [next(iter(await versions("tenant", caller=caller(f"t{n}")))) for n in range(12)]
    assert set(tenants) == {"1", "2"}


async def test_one_caller_is_on_the_same_side_of_every_model(house):
    front = house()
    front.repository.serve(
        tensor_model("double", lambda inputs: {"y": inputs["x"] * 2}, version="2"),
        tensor_model("triple", lambda inputs: {"y": inputs["x"] * 3}, version="5"),
        tensor_model("triple", lambda inputs: {"y": inputs["x"] * 3}, version="6"),
    )
    shares = {"double": (("1", 0.7), ("2", 0.3)), "triple": (("5", 0.7), ("6", 0.3))}
    front.dispatch.routes = Routes(shares, {"double": "tenant", "triple": "tenant"})
    sides = set()
    for n in range(30):
        who = caller(f"tenant-{n}")
        one = (await front.answer(rows(1.0, caller=who))).responses[0].version
        other = (await front.answer(rows(1.0, model="triple", caller=who))).responses[0].version
        sides.add((one, other))
    assert sides == {("1", "5"), ("2", "6")}


async def test_many_at_once_are_all_counted(house):
    front = house()
    front.gateway.watches.set({"double": Watch()})
    clients = [front.ask(rows(float(n)), form) for n in range(20) for form in ("submit", "infer")]
    await asyncio.gather(*(client.answer() for client in clients))
    assert window_of(front).of("1").requests == 40


@both
async def test_what_is_asked_of_an_unknown_model_is_counted_nowhere(house):
    front = house()
    front.gateway.watches.set({"nobody": Watch()})
    await front.refusal(asking("nobody", inputs={"x": np.zeros((1, 2), np.float32)}))
    assert front.gateway.watches.take(2000.0)[0].tallies == {}
