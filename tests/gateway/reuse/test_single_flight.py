"""Who gets what of an answer that several wait for, and what happens when some of them leave."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fairlead.core.errors import Cancelled, FairleadError, ModelError, TimeoutExpired, Unavailable
from fairlead.core.request import Response, Sink
from fairlead.gateway.reuse.single_flight import Flights, Member
from tests.gateway.reuse.questions import delta


class Reader:
    """A client that is called back."""

    def __init__(self) -> None:
        self.text = ""
        self.ends: list[FairleadError | None] = []

    def respond(self, response: Response) -> None:
        assert not self.ends and response.delta is not None
        self.text += response.delta.text
        response.delta.text = "mine now"  # it may do so

    def close(self, error: FairleadError | None) -> None:
        self.ends.append(error)


class Model:
    """Answers what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.sink: Sink | None = None
        self.num_started = 0
        self.cancelled = False

    def start(self, sink: Sink) -> "Model":
        self.sink, self.cancelled = sink, False
        self.num_started += 1
        return self

    def cancel(self) -> None:
        assert not self.cancelled
        self.cancelled = True

    def say(self, *texts: str) -> None:
        assert self.sink is not None
        for text in texts:
            self.sink.respond(delta(text))

    def end(self, error: FairleadError | None = None) -> None:
        assert self.sink is not None
        self.sink.close(error)


async def text_of(member: Member) -> str:
    text = ""
    async with aclosing(member.follow()) as responses:
        async for response in responses:
            assert response.delta is not None
            text += response.delta.text
    return text


async def turns(number: int = 5) -> None:
    """Let everybody do what they can."""
    for _ in range(number):
        await asyncio.sleep(0)


def board(flights: Flights, number: int) -> list[tuple[Member, Reader]]:
    return [(flights.board(b"k"), Reader()) for _ in range(number)]


def led(flights: Flights, model: Model, ended: Callable[[FairleadError | None], None] | None = None) -> tuple[Member, Reader]:
    member, reader = flights.board(b"k"), Reader()
    assert member.leads
    member.compute(model.start, ended)
    member.attach(reader)
    return member, reader


# Called back


def test_identical_requests_are_computed_once_and_the_late_ones_get_all_of_it():
    flights, model = Flights(), Model()
    _, first = led(flights, model)
    model.say("Hel")
    late, second = flights.board(b"k"), Reader()
    assert not late.leads
    late.attach(second)
    assert second.text == "Hel"
    model.say("lo")
    model.end()
    assert (first.text, second.text, first.ends, second.ends) == ("Hello", "Hello", [None], [None])
    assert model.num_started == 1 and len(flights) == 0
    assert flights.board(b"k").leads  # the next is a request of its own


def test_other_requests_are_computed_on_their_own():
    flights = Flights()
    assert flights.board(b"k").leads and flights.board(b"l").leads


def test_an_answer_that_is_there_at_once_reaches_everybody():
    flights = Flights()
    (leader, first), (_, second) = board(flights, 2)

    def start(sink: Sink) -> Model:
        sink.respond(delta("done"))
        sink.close(None)
        return Model()

    flights._flights[b"k"].members[1].attach(second)
    leader.compute(start)
    leader.attach(first)
    assert (first.text, second.text, first.ends, second.ends) == ("done", "done", [None], [None])


def test_the_leader_may_leave_and_the_others_still_get_their_answer():
    flights, model, ends = Flights(), Model(), []
    leader, first = led(flights, model, ends.append)
    other, second = flights.board(b"k"), Reader()
    other.attach(second)
    model.say("Hel")
    leader.leave()
    assert not model.cancelled and ends == []
    model.say("lo")
    model.end()
    assert (first.text, second.text, second.ends, ends) == ("Hel", "Hello", [None], [None])
    assert first.ends == []  # it left: nobody is there to be told


def test_the_last_to_leave_stops_the_computation():
    flights, model, ends = Flights(), Model(), []
    leader, _ = led(flights, model, ends.append)
    other, second = flights.board(b"k"), Reader()
    other.attach(second)
    leader.leave()
    other.leave()
    assert model.cancelled and isinstance(ends[0], Cancelled) and len(flights) == 0
    model.say("too late")
    model.end(Cancelled("stopped"))
    assert second.text == "" and len(ends) == 1
    other.leave()  # twice is once


def test_an_error_is_told_to_all_each_its_own_copy():
    flights, model = Flights(), Model()
    _, first = led(flights, model)
    other, second = flights.board(b"k"), Reader()
    other.attach(second)
    error = ModelError("it broke")
    model.say("half")
    model.end(error)
    for reader in (first, second):
        assert isinstance(reader.ends[0], ModelError) and reader.ends[0].message == "it broke" and reader.ends[0] is not error
    assert first.ends[0] is not second.ends[0]


def test_a_leader_that_is_refused_hands_over_to_the_next():
    flights, model = Flights(), Model()
    (leader, _), (second, reader), (third, last) = board(flights, 3)
    asked: list[str] = []
    second.attach(reader, lambda: asked.append("second"))
    third.attach(last, lambda: asked.append("third"))
    leader.give_up()
    assert asked == ["second"] and second.leads and reader.ends == [] and len(flights) == 1
    second.give_up()  # it has no budget either
    assert asked == ["second", "third"]
    third.compute(model.start)
    third.attach(last)
    model.say("hi")
    model.end()
    assert (last.text, last.ends, reader.ends) == ("hi", [None], [])


def test_a_leader_that_is_alone_and_refused_leaves_nothing_behind():
    flights = Flights()
    flights.board(b"k").give_up()
    assert len(flights) == 0


def test_a_joiner_that_leaves_before_it_began_is_not_asked_to_lead():
    flights = Flights()
    (leader, _), (second, _), (third, _) = board(flights, 3)
    second.leave()
    leader.give_up()
    assert third.leads and not second.leads


def test_a_reader_that_leaves_while_it_is_told_stops_there():
    flights, model = Flights(), Model()
    _, first = led(flights, model)
    other = flights.board(b"k")

    class Leaving(Reader):
        def respond(self, response: Response) -> None:
            super().respond(response)
            other.leave()

    leaving = Leaving()
    model.say("a", "b")
    other.attach(leaving)
    model.say("c")
    model.end()
    assert (leaving.text, leaving.ends, first.text) == ("a", [], "abc")


# Iterated


async def test_iterators_replay_and_then_follow():
    flights, model = Flights(), Model()
    leader = flights.board(b"k")
    leader.compute(model.start)
    model.say("Hel")
    reading = [asyncio.create_task(text_of(member)) for member in (leader, flights.board(b"k"))]
    await turns()
    model.say("lo")
    late = asyncio.create_task(text_of(flights.board(b"k")))
    await turns()
    model.end()
    assert await asyncio.gather(*reading, late) == ["Hello"] * 3


async def chatter(texts: list[str], gate: asyncio.Event, closed: list[str]) -> AsyncGenerator[Response, None]:
    try:
        for text in texts:
            yield delta(text)
            await gate.wait()
    finally:
        closed.append("closed")


async def test_a_stream_is_read_once_for_all_and_goes_on_without_its_leader():
    flights, gate, closed, ends = Flights(), asyncio.Event(), [], []
    leader = flights.board(b"k")
    leader.compute_stream(chatter(["a", "b", "c"], gate, closed), ends.append)
    reading = asyncio.create_task(text_of(leader))
    other = asyncio.create_task(text_of(flights.board(b"k")))
    await turns()
    reading.cancel()  # as a door does whose client left
    with pytest.raises(asyncio.CancelledError):
        await reading
    gate.set()
    assert await other == "abc"
    await turns()
    assert (closed, ends) == (["closed"], [None])


async def test_a_stream_that_nobody_reads_any_more_is_closed():
    flights, gate, closed, ends = Flights(), asyncio.Event(), [], []
    leader = flights.board(b"k")
    leader.compute_stream(chatter(["a", "b"], gate, closed), ends.append)
    async with aclosing(leader.follow()) as responses:
        await anext(responses)
    await turns()
    assert closed == ["closed"] and len(ends) == 1 and isinstance(ends[0], Cancelled) and len(flights) == 0


async def test_a_stream_whose_readers_leave_before_it_began_does_not_begin():
    flights, gate, closed = Flights(), asyncio.Event(), []
    leader = flights.board(b"k")
    leader.compute_stream(chatter(["a"], gate, closed))
    leader.leave()
    await turns()
    gc.collect()
    assert closed == [] and len(flights) == 0


async def test_what_a_stream_fails_with_is_raised_for_all():
    async def failing() -> AsyncGenerator[Response, None]:
        yield delta("half")
        raise Unavailable("gone")

    flights = Flights()
    leader, other = flights.board(b"k"), flights.board(b"k")
    leader.compute_stream(failing())
    for result in await asyncio.gather(text_of(leader), text_of(other), return_exceptions=True):
        assert isinstance(result, Unavailable) and result.message == "gone"


async def test_a_bug_in_a_stream_ends_it_for_all_without_details():
    async def broken() -> AsyncGenerator[Response, None]:
        yield delta("half")
        raise RuntimeError("secret")

    flights = Flights()
    leader = flights.board(b"k")
    leader.compute_stream(broken())
    with pytest.raises(ModelError, match="^internal error$"):
        await text_of(leader)


async def test_a_joiner_waits_until_the_leader_computes_or_it_leads_itself():
    flights, model = Flights(), Model()
    leader, second, third = (flights.board(b"k") for _ in range(3))
    waiting = [asyncio.create_task(member.begun(10.0)) for member in (second, third)]
    await turns()
    leader.give_up()
    assert await waiting[0] is False and second.leads
    second.compute(model.start)
    assert await waiting[1] is True
    reading = asyncio.create_task(text_of(third))
    await turns()
    model.say("x")
    model.end()
    assert await reading == "x"
    assert await flights.board(b"k").begun(0.0) is False


async def test_a_joiner_does_not_wait_for_ever():
    flights = Flights()
    leader, second = flights.board(b"k"), flights.board(b"k")
    with pytest.raises(TimeoutExpired):
        await second.begun(0.0)
    leader.give_up()
    assert len(flights) == 0


async def test_a_joiner_that_is_cancelled_while_it_waits_has_left():
    flights = Flights()
    leader, second = flights.board(b"k"), flights.board(b"k")
    waiting = asyncio.create_task(second.begun(10.0))
    await turns()
    waiting.cancel()
    await asyncio.wait([waiting])
    leader.give_up()
    assert len(flights) == 0 and not second.leads


async def test_a_slow_reader_holds_nobody_back_and_is_cut_off_when_too_much_waits_for_it():
    flights, model = Flights(max_bytes=10_000), Model()
    leader, reader = led(flights, model)
    slow = flights.board(b"k")
    async with aclosing(slow.follow()) as responses:
        model.say("x" * 1000)
        await anext(responses)
        for _ in range(100):
            model.say("x" * 1000)
        flight = leader.flight
        assert flight.num_bytes <= 10_000 and len(flight.responses) <= 10
        assert len(reader.text) == 101_000
        with pytest.raises(Unavailable, match="too slowly"):
            while True:
                await anext(responses)
    assert flights.board(b"k").leads  # its beginning is gone: others get one of their own
    model.end()
    assert reader.ends == [None]


async def test_a_reader_that_keeps_up_gets_an_answer_of_any_length():
    flights, model = Flights(max_bytes=10_000), Model()
    leader = flights.board(b"k")
    leader.compute(model.start)
    length = 0
    async with aclosing(leader.follow()) as responses:
        for _ in range(200):
            model.say("x" * 1000)
            response = await anext(responses)
            assert response.delta is not None
            length += len(response.delta.text)
        assert leader.flight.num_bytes <= 10_000
    assert length == 200_000 and model.cancelled


async def test_one_response_of_any_size_reaches_everybody():
    flights, model = Flights(max_bytes=100), Model()
    leader, second = flights.board(b"k"), flights.board(b"k")
    reading = [asyncio.create_task(text_of(member)) for member in (leader, second)]
    leader.compute(model.start)
    await turns()
    model.say("x" * 5000)
    model.end()
    assert [len(text) for text in await asyncio.gather(*reading)] == [5000, 5000]


class AnyOrder(RuleBasedStateMachine):
    """Members come, lead, leave; the model speaks and ends. Everybody who stayed has the whole answer, from one computation."""

    def __init__(self) -> None:
        super().__init__()
        self.flights = Flights()
        self.model = Model()
        self.here: dict[Member, Reader] = {}
        self.said = ""
        self.computing = False
        self.num_ends = 0

    def ended(self, _: FairleadError | None) -> None:
        self.num_ends += 1

    @rule()
    def come(self) -> None:
        member, reader = self.flights.board(b"k"), Reader()
        self.here[member] = reader
        if not member.leads:
            member.attach(reader, lambda: None)

    def leader(self) -> Member | None:
        return next((member for member in self.here if member.leads), None)

    @precondition(lambda self: not self.computing and self.leader() is not None)
    @rule(admitted=st.booleans())
    def decide(self, admitted: bool) -> None:
        leader = self.leader()
        assert leader is not None
        if not admitted:
            del self.here[leader]
            leader.give_up()
            return
        self.computing, self.said = True, ""
        leader.compute(self.model.start, self.ended)
        leader.attach(self.here[leader])

    @precondition(lambda self: self.computing)
    @rule(text=st.sampled_from(["a", "b"]))
    def say(self, text: str) -> None:
        self.said += text
        self.model.say(text)

    @precondition(lambda self: self.computing)
    @rule(fails=st.booleans())
    def end(self, fails: bool) -> None:
        self.computing = False
        self.model.end(ModelError("no") if fails else None)
        for reader in self.here.values():
            assert reader.text == self.said
            assert len(reader.ends) == 1 and (reader.ends[0] is not None) is fails
        self.here.clear()

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(list(self.here)))
        del self.here[member]
        member.leave()
        if self.computing and not self.here:
            assert self.model.cancelled
            self.computing = False

    @invariant()
    def in_step(self) -> None:
        assert self.num_ends + self.computing == self.model.num_started
        assert len(self.flights) == (1 if self.here else 0)
        if self.computing:
            assert not self.model.cancelled
            assert all(reader.text == self.said and not reader.ends for reader in self.here.values())
        elif self.here:
            assert sum(member.leads for member in self.here) == 1


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
