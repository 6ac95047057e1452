"""From a request to its place and to another one, over fake places in virtual time and an empty model repository."""

import asyncio
from collections import Counter
from contextlib import aclosing
from itertools import cycle
from random import Random

import numpy as np
import pytest

from fairlead.core.caller import Caller
from fairlead.core.errors import (
    Cancelled,
    ConfigError,
    InvalidRequest,
    LimitExceeded,
    ModelError,
    NotFound,
    QueueFull,
    ReplicaDied,
    ShuttingDown,
    TimeoutExpired,
    Unavailable,
)
from fairlead.core.policy import Breaker, DegradeStep, GatewaySettings, ModelPolicy, QueueSettings, RoutingSettings, Upstream
from fairlead.core.request import Raw, Request
from fairlead.core.routes import Routes
from fairlead.core.timeline import Timeline
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.routing.fake import FakePlace, VirtualTime
from fairlead.gateway.routing.fallbacks import check_fallbacks, unknown_fallbacks
from fairlead.observe.counts import Counts
from fairlead.observe.metrics import Metrics
from fairlead.observe.table import TABLE
from fairlead.runtime.repository import ModelRepository, RepositorySettings
from fairlead.runtime.upstream.errors import UpstreamGone

CHAT = "/v1/chat/completions"


class Sink:
    def __init__(self) -> None:
        self.responses = []
        self.closed = False
        self.error = None

    def respond(self, response) -> None:
        assert not self.closed
        self.responses.append(response)

    def close(self, error) -> None:
        assert not self.closed
        self.closed, self.error = True, error

    @property
    def by(self):
        """Which place answered: fakes call themselves their version."""
        return self.responses[0].version


class House:
    """A dispatch and its surroundings."""

    def __init__(self, places, *, allowed=lambda caller, model: True, **policies) -> None:
        self.time = VirtualTime()
        self.places = places
        for each in self.all:
            each.time = self.time
        self.settings = GatewaySettings(models={name: ModelPolicy(routing=policy) for name, policy in policies.items()})
        self.counts = Counts()
        self.repository = ModelRepository(RepositorySettings(sources=()), Metrics())
        self.dispatch = Dispatch(
            self.repository,
            lambda: self.settings,
            lambda model: self.places.get(model, ()),
            self.counts,
            allowed=allowed,
            clock=self.time.clock,
            random=Random(7).random,
            later=self.time.later,
        )

    @property
    def all(self):
        return [place for places in self.places.values() for place in places]

    def submit(self, request):
        sink = Sink()
        sink.ticket = self.dispatch.submit(request, sink)
        return sink

    def ask(self, request):
        """Submit, and let time pass until everything is over."""
        sink = self.submit(request)
        self.time.advance_to_end()
        assert sink.closed and all(not each.in_flight for each in self.all)
        return sink

    async def stream(self, request):
        async with aclosing(self.dispatch.infer(request)) as responses:
            return [response async for response in responses]

    def count(self, name, *labels):
        assert f"fairlead_gateway_{name}_total" in TABLE
        return self.counts.get(f"fairlead_gateway_{name}_total", *labels)

    def loads(self):
        """What dispatch believes to be under way."""
        for known in self.dispatch._known.values():
            for each in known.choices.all():
                yield each.load.in_flight, each.load.prompts, each.load.answers


def places(*names, **fields):
    return [FakePlace(VirtualTime(), name, **fields) for name in names]


def chat(prompt="", *, model="m", **fields):
    return Request(model=model, raw=Raw(path=CHAT, body=b"{}", prompt_chars=len(prompt), prefix=prompt.encode(), max_tokens=8), **fields)


def tensors(model="m", **fields):
    return Request(model=model, raw=Raw(path="/infer", body=b"", num_rows=1), **fields)


def gone():
    return UpstreamGone("the server hung up")


# Another place


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (gone(), "unavailable"),
        (QueueFull("full"), "busy"),
        (ShuttingDown("draining"), "busy"),
        (ReplicaDied("died"), "replica-died"),
        (429, "busy"),
        (500, "upstream-error"),
        (503, "upstream-error"),
    ],
)
async def test_what_another_place_may_do_better_is_asked_there(failure, reason):
    a, b = places("a", "b")
    house = House({"m": [a, b]}, m=RoutingSettings(retry_budget=1.0))
    for place in (a, b):
        place.num_pieces = 2
    bad = {"status": failure} if isinstance(failure, int) else {"fails": failure}
    for name, value in bad.items():
        setattr(a, name, value)
    answers = [house.ask(chat()) for _ in range(20)]
    assert {sink.by for sink in answers} == {"b"} and all(sink.error is None for sink in answers)
    retried = [sink for sink in answers if sink.responses[0].headers == {"x-fairlead-attempts": "2"}]
    assert len(retried) == len(a.asked) == house.count("retries", "m", reason) > 0
    # and the same for streams
    streams = [await house.stream(chat()) for _ in range(20)]
    assert all([each.version for each in stream] == ["b", "b"] for stream in streams)
    assert all(not any(load) for load in house.loads())


@pytest.mark.parametrize(
    "failure",
    [
        InvalidRequest("no"),
        ModelError("its code raised"),
        NotFound("no such version"),
        TimeoutExpired("too late"),
        LimitExceeded("enough", reason="tokens", retry_after=1.0),
        Cancelled("left"),
    ],
)
async def test_what_is_wrong_with_the_request_is_told_and_not_tried_again(failure):
    a, b = places("a", "b")
    a.fails = b.fails = failure
    house = House({"m": [a, b]})
    assert type(house.ask(chat()).error) is type(failure)
    with pytest.raises(type(failure)):
        await house.stream(chat())
    assert len(a.asked) + len(b.asked) == 2


async def test_an_upstreams_answer_of_4xx_is_passed_on_as_it_is():
    a, b = places("a", "b", seconds=0.1)
    a.status = b.status = 422
    house = House({"m": [a, b]})
    sink = house.ask(chat())
    assert [each.status for each in sink.responses] == [422] and sink.error is None
    assert len(a.asked) + len(b.asked) == 1


async def test_the_last_error_is_what_the_caller_gets():
    a, b = places("a", "b")
    a.status, b.status = 503, 502
    house = House({"m": [a, b]})
    sink = house.ask(chat())
    assert [each.status for each in sink.responses] == [house.all[("a", "b").index(sink.by)].status]
    assert sink.error is None and sink.responses[0].headers["x-fairlead-attempts"] == "2"
    b.status, b.fails = 200, gone()
    assert isinstance(house.ask(chat()).error, UpstreamGone) or sink.responses[0].status == 503


async def test_after_the_first_byte_there_is_no_second_try():
    a, b = places("a", "b")
    house = House({"m": [a, b]})
    for place in (a, b):
        place.fails, place.fails_after = ReplicaDied("cut off"), 2
    sink = house.ask(chat())
    assert len(sink.responses) == 2 and isinstance(sink.error, ReplicaDied)
    heard = []
    with pytest.raises(ReplicaDied):
        async with aclosing(house.dispatch.infer(chat())) as responses:
            while True:
                heard.append(await anext(responses))
    assert len(heard) == 2 and len(a.asked) + len(b.asked) == 2
    assert all(not any(load) for load in house.loads())


async def test_one_server_is_asked_again_after_a_pause_for_it_may_be_many():
    (a,) = places("a")
    house = House({"m": [a]})
    a.fails = gone()
    sink = house.submit(chat())
    assert not sink.closed and len(a.asked) == 1
    a.fails = None
    house.time.advance(0.01)
    assert not sink.closed, "not at once"
    house.time.advance(0.1)
    assert sink.by == "a" and sink.responses[0].headers["x-fairlead-attempts"] == "2"
    # the same for a stream
    a.fails = gone()
    task = asyncio.ensure_future(house.stream(chat()))
    await house.time.elapse(0.01)
    a.fails = None
    await house.time.elapse(0.1)
    assert [each.version for each in await task] == ["a"]


async def test_no_retries_where_none_are_wanted():
    a, b = places("a", "b")
    a.fails = b.fails = gone()
    house = House({"m": [a, b]}, m=RoutingSettings(retries=0))
    assert isinstance(house.ask(chat()).error, UpstreamGone)
    assert len(a.asked) + len(b.asked) == 1


async def test_an_outage_does_not_double_the_load():
    a, b = places("a", "b")
    a.fails = b.fails = gone()
    house = House({"m": [a, b]}, m=RoutingSettings(breaker=Breaker(failures=10_000, error_rate=1.0, min_requests=10_000)))
    for _ in range(500):
        house.ask(chat())
        house.time.advance(0.01)
    assert len(a.asked) + len(b.asked) <= 500 + 50 + 3


async def test_a_request_that_was_with_two_replicas_when_they_died_goes_no_further():
    four = places("a", "b", "c", "d")
    for place in four:
        place.fails = ReplicaDied("died")
    house = House({"m": four, "other": places("x")}, m=RoutingSettings(retries=3, fallback=("other",)))
    assert isinstance(house.ask(chat()).error, ReplicaDied)
    assert sum(len(place.asked) for place in four) == 2 and not house.places["other"][0].asked


async def test_a_retry_has_no_more_time_than_was_left():
    a, b = places("a", "b", seconds=0.3)
    a.fails = b.fails = gone()
    house = House({"m": [a, b]}, m=RoutingSettings(retries=5))
    request = chat(timeout=0.5)
    sink = house.ask(request)
    assert isinstance(sink.error, UpstreamGone)
    first, second = sorted((*a.asked, *b.asked), key=lambda each: -each.timeout)
    assert first is request and second.timeout == pytest.approx(0.2) and request.timeout == 0.5
    assert house.time.now <= 1000.6 + 1e-6, "after the second there was no time for a third"


async def test_a_caller_who_leaves_stops_everything():
    a, b = places("a", "b", seconds=1.0)
    house = House({"m": [a, b]})
    sink = house.submit(chat())
    sink.ticket.cancel()
    assert isinstance(sink.error, Cancelled) and a.num_cancelled + b.num_cancelled == 1
    # in the pause before a retry
    house = House({"m": places("a")})
    house.all[0].fails = gone()
    sink = house.submit(chat())
    sink.ticket.cancel()
    sink.ticket.cancel()
    house.time.advance_to_end()
    assert isinstance(sink.error, Cancelled) and len(house.all[0].asked) == 1
    assert all(not any(load) for load in house.loads())


async def test_closing_a_stream_cancels_it_at_its_place():
    (a,) = places("a", seconds=0.0)
    a.num_pieces, a.fails_after = 3, 3
    house = House({"m": [a, *places("b")]})
    async with aclosing(house.dispatch.infer(chat())) as responses:
        await anext(responses)
    assert all(not any(load) for load in house.loads())


# Which place


async def test_work_is_shared_by_weight():
    a, b = places("a", seconds=1.0), places("b", seconds=1.0, weight=3.0)
    house = House({"m": [*a, *b]}, m=RoutingSettings(temperature=0.0))
    for _ in range(40):
        house.submit(chat("x" * 100))
    assert len(a[0].asked) == 10 and len(b[0].asked) == 30


async def test_a_place_that_is_not_ready_gets_nothing_unless_none_is():
    a, b = places("a", "b")
    a.ready = False
    house = House({"m": [a, b]})
    assert {house.ask(chat()).by for _ in range(10)} == {"b"}
    b.ready = False
    assert house.ask(chat()).by in ("a", "b")


async def test_the_same_beginning_goes_to_the_same_place_unless_that_has_much_more_to_do():
    house = House({"m": places("a", "b", "c", seconds=1.0)}, m=RoutingSettings(temperature=0.01))
    talks = [f"conversation {n} " * 100 for n in range(6)]
    homes = [house.ask(chat(talk)).by for talk in talks]
    assert [house.ask(chat(talk + " and more")).by for talk in talks] == homes
    sinks = [house.submit(chat(talks[0])) for _ in range(100)]
    house.time.advance_to_end()
    assert len({sink.by for sink in sinks}) == 3


async def test_a_session_stays_while_its_place_is_there_and_of_two_tenants_each_has_its_own():
    house = House({"m": places("a", "b", "c")}, m=RoutingSettings(sticky="session"))
    homes = {n: house.ask(chat(session=f"s{n}")).by for n in range(60)}
    assert len(set(homes.values())) == 3
    assert all(house.ask(chat(session=f"s{n}")).by == homes[n] for n in range(60))
    other = {n: house.ask(chat(session=f"s{n}", caller=Caller(tenant="other"))).by for n in range(60)}
    assert other != homes
    house.all[0].ready = False
    moved = {n for n in range(60) if house.ask(chat(session=f"s{n}")).by != homes[n]}
    assert moved == {n for n in range(60) if homes[n] == "a"}


# Circuits


async def test_a_place_that_fails_is_left_out_and_comes_back_when_it_is_well():
    a, b = places("a", "b")
    house = House({"m": [a, b]}, m=RoutingSettings(breaker=Breaker(failures=3, open_seconds=5.0)))
    a.fails = gone()
    for _ in range(30):
        assert house.ask(chat()).by == "b"
    assert len(a.asked) == 3 and house.count("breaker_opened", "m", "a", "failures") == 1
    house.time.advance(5.0)
    for _ in range(10):
        house.ask(chat())
    assert len(a.asked) == 4 and house.count("breaker_opened", "m", "a", "trial") == 1
    a.fails = None
    house.time.advance(10.0)
    assert {house.ask(chat()).by for _ in range(20)} == {"a", "b"}


async def test_where_all_are_left_out_all_are_asked():
    a, b = places("a", "b")
    house = House({"m": [a, b]}, m=RoutingSettings(retries=0, breaker=Breaker(failures=1)))
    a.fails = b.fails = gone()
    for _ in range(10):
        house.ask(chat())
    a.fails = b.fails = None
    assert {house.ask(chat()).by for _ in range(20)} == {"a", "b"}


async def test_a_slow_place_is_left_out():
    slow, *fast = places("slow", "a", "b")
    house = House({"m": [slow, *fast]}, m=RoutingSettings(breaker=Breaker(latency_factor=4.0, min_requests=5)))
    for place in fast:
        place.seconds = 0.1
    slow.seconds = 0.5
    for _ in range(200):
        house.submit(chat())
        house.time.advance(0.11)
    assert house.count("breaker_opened", "m", "slow", "latency") == 1


async def test_a_busy_server_is_not_a_broken_one():
    a, b = places("a", "b")
    a.status = 429
    house = House({"m": [a, b]}, m=RoutingSettings(retry_budget=1.0, breaker=Breaker(failures=2)))
    for _ in range(50):
        house.ask(chat())
    assert len(a.asked) > 10


# Hedging

HEDGE = RoutingSettings(hedge_after=0.2, hedge_budget=1.0)


async def test_a_request_of_tensors_that_takes_long_is_sent_to_a_second_place():
    slow, fast = places("slow", seconds=5.0), places("fast", seconds=0.1)
    house = House({"m": [*slow, *fast]}, m=HEDGE)
    sinks = []
    for _ in range(20):
        sinks.append((house.time.now, house.submit(tensors())))
        house.time.advance(0.31)
        assert sinks[-1][1].closed, "nobody waits longer than 0.31 seconds"
    assert {sink.by for _, sink in sinks} == {"fast"}
    hedged = [sink for _, sink in sinks if "x-fairlead-attempts" in sink.responses[0].headers]
    assert len(hedged) == slow[0].num_cancelled == house.count("hedges", "m", "won") > 0
    assert house.time.num_timers == 0 and all(not any(load) for load in house.loads())


async def test_the_first_answer_counts_and_the_other_is_cancelled():
    a, b = places("a", "b", seconds=0.3)
    house = House({"m": [a, b]}, m=HEDGE)
    sink = house.submit(tensors())
    house.time.advance(0.25)
    assert a.in_flight == b.in_flight == 1
    house.time.advance(0.06)
    assert sink.closed and len(sink.responses) == 1 and a.in_flight == b.in_flight == 0
    assert house.count("hedges", "m", "lost") == 1 and a.num_cancelled + b.num_cancelled == 1


async def test_a_hedged_request_fails_only_when_both_do():
    a, b = places("a", "b")
    house = House({"m": [a, b]}, m=RoutingSettings(hedge_after=0.2, hedge_budget=1.0, temperature=0.0, retries=0))
    a.seconds, a.status, b.seconds = 0.3, 503, 0.3
    house.dispatch.random = lambda: 0.0  # a first
    sink = house.submit(tensors())
    house.time.advance(0.4)
    assert not sink.closed, "a failed, b is being asked"
    house.time.advance(0.2)
    assert sink.by == "b" and sink.responses[0].status == 200
    b.fails = gone()
    sink = house.ask(tensors())
    assert isinstance(sink.error, UpstreamGone) and house.count("hedges", "m", "failed") == 1


async def test_hedges_keep_to_their_budget():
    a, b = places("a", "b", seconds=1.0)
    house = House({"m": [a, b]}, m=RoutingSettings(hedge_after=0.2, hedge_budget=0.05))
    for _ in range(200):
        house.submit(tensors())
        house.time.advance(0.02)
    house.time.advance_to_end()
    assert 10 <= len(a.asked) + len(b.asked) - 200 <= 11


async def test_prompts_and_streams_are_not_hedged():
    a, b = places("a", "b", seconds=1.0)
    house = House({"m": [a, b]}, m=HEDGE)
    house.ask(chat())
    assert len(a.asked) + len(b.asked) == 1 and house.time.num_timers == 0


async def test_a_caller_who_leaves_a_hedged_request_leaves_both():
    a, b = places("a", "b", seconds=1.0)
    house = House({"m": [a, b]}, m=HEDGE)
    sink = house.submit(tensors())
    house.time.advance(0.5)
    sink.ticket.cancel()
    assert a.num_cancelled == b.num_cancelled == 1 and isinstance(sink.error, Cancelled)
    assert all(not any(load) for load in house.loads()) and house.time.num_timers == 0


# Other models


async def test_where_a_model_fails_its_fallbacks_are_asked_in_turn_and_the_answer_says_so():
    house = House(
        {"m": places("a"), "second": places("b"), "third": places("c")},
        m=RoutingSettings(fallback=("unknown", "second", "third")),
    )
    a, b, _ = house.all
    assert house.ask(chat()).responses[0].headers == {}
    a.fails = gone()
    sink = house.ask(chat())
    assert sink.by == "b" and sink.responses[0].headers == {"x-fairlead-attempts": "2", "x-fairlead-fallback": "second"}
    assert house.count("fallbacks", "m", "second") == 1
    b.status = 500
    (response,) = await house.stream(chat())
    assert response.version == "c" and response.headers == {"x-fairlead-attempts": "3", "x-fairlead-fallback": "third"}
    assert all(each.model == "third" for each in house.all[2].asked)


async def test_a_model_that_is_left_out_is_not_waited_for():
    house = House({"m": places("a"), "second": places("b")}, m=RoutingSettings(fallback=("second",), breaker=Breaker(failures=2)))
    a, _ = house.all
    a.fails, a.seconds = gone(), 5.0
    for _ in range(2):
        house.ask(chat())
    began = house.time.now
    assert house.ask(chat()).by == "b" and house.time.now == began


async def test_a_fallback_that_the_caller_may_not_use_is_not_used():
    house = House(
        {"m": places("a"), "secret": places("b")},
        allowed=lambda caller, model: caller.tenant == "boss" or model != "secret",
        m=RoutingSettings(fallback=("secret",), breaker=Breaker(failures=1)),
    )
    house.all[0].fails = gone()
    for _ in range(3):
        assert isinstance(house.ask(chat()).error, UpstreamGone)
    assert house.ask(chat(caller=Caller(tenant="boss"))).by == "b"


async def test_a_model_that_is_not_there_falls_back_and_a_version_that_is_named_does_not():
    house = House({"small": places("a")}, **{"big-*": RoutingSettings(fallback=("small",))})
    sink = house.ask(chat(model="big-7"))
    assert sink.by == "a" and sink.responses[0].headers == {"x-fairlead-fallback": "small"}
    assert house.count("fallbacks", "", "small") == 1, "names that anybody may invent are no label"
    with pytest.raises(NotFound):
        await house.stream(chat(model="big-7", version="3"))
    for n in range(10):
        house.ask(chat(model=f"big-{n}"))
    assert set(house.dispatch._known) == {"small"}


async def test_a_model_error_is_another_models_chance():
    house = House({"m": places("a", "b"), "second": places("c")}, m=RoutingSettings(fallback=("second",)))
    house.all[0].fails = house.all[1].fails = ModelError("its code raised")
    assert house.ask(chat()).by == "c" and len(house.all[0].asked) + len(house.all[1].asked) == 1


def test_a_fallback_that_leads_back_is_refused():
    def settings(*fallback):
        return GatewaySettings(models={"m": ModelPolicy(routing=RoutingSettings(fallback=fallback))})

    check_fallbacks(settings("a", "b"))
    with pytest.raises(ConfigError, match="names the model itself"):
        check_fallbacks(settings("a", "m"))
    with pytest.raises(ConfigError, match="names a model twice"):
        check_fallbacks(settings("a", "b", "a"))
    with pytest.raises(ConfigError, match=r"`gateway.models.m.queue.degrade\[0\].model` names the model itself"):
        check_fallbacks(GatewaySettings(models={"m": ModelPolicy(queue=QueueSettings(degrade=(DegradeStep(wait_above=1, model="m"),)))}))


def test_fallbacks_that_nobody_computes_are_named():
    steps = (DegradeStep(wait_above=1, max_tokens=5), DegradeStep(wait_above=2, model="smal"), DegradeStep(wait_above=3, model="far"))
    policy = ModelPolicy(routing=RoutingSettings(fallback=("here", "far", "nowhere")), queue=QueueSettings(degrade=steps))
    settings = GatewaySettings(models={"m-*": policy, "far": ModelPolicy(upstreams=(Upstream(url="http://127.0.0.1:1"),))})
    assert list(unknown_fallbacks(settings, {"here"}.__contains__)) == [
        ("gateway.models.m-*.routing.fallback", "nowhere"),
        ("gateway.models.m-*.queue.degrade[1].model", "smal"),
    ]


# What is known


async def test_unknown_models_are_the_repositorys_to_refuse():
    house = House({})
    assert not house.dispatch.knows("m")
    assert isinstance(house.ask(chat()).error, NotFound)
    with pytest.raises(NotFound):
        await house.stream(chat())


async def test_a_changed_configuration_counts_from_the_next_request_on_and_known_places_stay_known():
    a, b = places("a", "b")
    house = House({"m": [a, b]}, m=RoutingSettings(temperature=0.0, breaker=Breaker(failures=1)))
    assert house.dispatch.knows("m")
    a.fails = gone()
    for _ in range(5):
        house.ask(chat())
    assert len(a.asked) == 1
    (c,) = places("c")
    c.time = house.time
    house.places = {"m": [a, c]}
    house.settings = GatewaySettings(models={"m": ModelPolicy(routing=RoutingSettings(breaker=Breaker(failures=1)))})
    assert {house.ask(chat()).by for _ in range(10)} == {"c"} and len(a.asked) == 1


async def test_traffic_of_an_upstream_names_the_version_there():
    (a,) = places("a")
    house = House({"m": [a]})
    house.dispatch.routes = Routes({"m": (("7", 0.5), ("8", 0.5))})
    for _ in range(20):
        house.ask(tensors())
    assert {each.version for each in a.asked} == {"7", "8"}
    a.asked.clear()
    for _ in range(5):
        house.ask(tensors(session="mine"))
    assert len({each.version for each in a.asked}) == 1
    house.dispatch.routes = Routes()
    house.ask(tensors())
    assert a.asked[-1].version == ""


async def test_what_another_server_cannot_read_is_told_by_it():
    (a,) = places("a")
    a.fails = InvalidRequest("ask it over HTTP")
    house = House({"m": [a]})
    assert house.ask(Request(model="m", inputs={"x": np.zeros(1)})).error.message == "ask it over HTTP"


async def test_a_server_that_stops_takes_nothing_more():
    (a,) = places("a")
    house = House({"m": [a]})
    house.ask(chat())
    house.repository.stopping = True
    assert isinstance(house.ask(chat()).error, ShuttingDown) and len(a.asked) == 1


async def test_whatever_fails_every_request_ends_once_and_nothing_stays_counted():
    """Many requests over places that fail in every way at random; some callers leave."""
    random = Random(3)
    failures = [
        None,
        None,
        gone(),
        QueueFull("full"),
        ReplicaDied("died"),
        ModelError("raised"),
        InvalidRequest("no"),
        Unavailable("later"),
    ]
    house = House(
        {"m": places("a", "b", "c"), "n": places("d", "e")},
        m=RoutingSettings(retries=2, retry_budget=1.0, hedge_after=0.1, hedge_budget=1.0, fallback=("n",), breaker=Breaker(failures=3)),
        n=RoutingSettings(hedge_after=0.1),
    )
    sinks = []
    for kind, _ in zip(cycle((chat, tensors)), range(2000), strict=False):
        for place in house.all:
            place.seconds = random.choice((0.0, 0.01, 0.3))
            place.fails, place.status = random.choice(failures), random.choice((200, 200, 429, 503, 404))
            place.fails_after, place.ready = random.choice((0, 0, 1)), random.random() < 0.8
        sinks.append(house.submit(kind(timeout=random.choice((0.0, 0.2)))))
        if random.random() < 0.2:
            sinks[-1].ticket.cancel()
        house.time.advance(random.random() * 0.1)
    house.time.advance_to_end()
    assert all(sink.closed for sink in sinks)
    outcomes = Counter(type(sink.error).__name__ for sink in sinks)
    assert outcomes["NoneType"] > 300 and all(sink.responses for sink in sinks if sink.error is None)
    assert all(not place.in_flight for place in house.all) and all(not any(load) for load in house.loads())


# What is told of a request


def traced(request):
    request.timeline = Timeline("id", "http", 0.0)
    return request


def told(request):
    return [(name, *details.values()) for _, name, details in request.timeline.events]


async def test_a_timeline_tells_of_every_place_that_was_asked():
    a, b = places("a", "b")
    a.fails = gone()
    house = House({"m": [a], "n": [b]}, m=RoutingSettings(retries=0, fallback=("n",)))
    request = traced(chat())
    house.ask(request)
    assert told(request) == [("sent", "a", "", 1), ("failed", "a", "unavailable"), ("fallback", "n"), ("sent", "b", "", 2)]
    streamed = traced(chat())
    await house.stream(streamed)
    assert told(streamed) == told(request)


async def test_a_timeline_tells_of_a_retry_and_of_a_hedge():
    a, b = places("a", "b")
    a.status = b.status = 503
    house = House({"m": [a, b]}, m=RoutingSettings(retry_budget=1.0))
    request = traced(chat())
    house.ask(request)
    assert [name for name, *_ in told(request)] == ["sent", "failed", "retried", "sent", "failed"]
    slow, fast = places("slow", "fast", seconds=0.3)
    house = House({"m": [slow, fast]}, m=HEDGE)
    request = traced(tensors())
    house.ask(request)
    assert [name for name, *_ in told(request)] == ["sent", "sent", "hedged"]
    assert {each[1] for each in told(request)} == {"slow", "fast"}


async def test_what_nobody_asked_for_leaves_no_trace():
    (a,) = places("a")
    a.fails = gone()
    house = House({"m": [a]}, m=RoutingSettings(retries=0))
    request = chat()
    house.ask(request)
    assert request.timeline is None
