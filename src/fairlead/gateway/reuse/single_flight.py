"""Identical requests under way at the same time are computed once; everybody gets the whole answer, the late ones too.

    member = flights.board(key)         the first one leads, the others wait for it
    leader:   compute(...) | compute_stream(...) once it was admitted, or give_up() if it was not: then the next one leads
    joiner:   attach(sink, lead)        called back for every response; or, if the leader gave up, to lead
              await begun(...)          True: follow; False: lead
    anybody:  attach(sink) | follow()   the answer from its beginning
              leave()

The computation belongs to all members alike: it goes on while one of them is there, and stops when the last has left. Whoever
leads only differs in having been admitted: its hold and its turn are given back when the computation ends (`ended`), not
when its client leaves. Everything is called from the event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from math import inf

import structlog

from fairlead.core.errors import Cancelled, FairleadError, ModelError, TimeoutExpired, Unavailable
from fairlead.core.request import Response, Sink, Ticket
from fairlead.gateway.reuse.response_cache import copy_of, num_bytes

log = structlog.get_logger("fairlead.gateway")

MAX_BYTES = 8 << 20
"""Of an answer: what is kept for those that come later or read slowly."""

Ended = Callable[[FairleadError | None], None]


class Flights:
    """Those under way."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._flights: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def board(self, key: bytes) -> "Member":
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight(self, key)
        return Member(flight)

    def remove(self, flight: "Flight") -> None:
        """Nobody joins it any more."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]


class Flight:
    """One computation: the sink of whatever answers."""

    def __init__(self, flights: Flights, key: bytes) -> None:
        self.flights = flights
        self.key = key
        self.members: list[Member] = []
        """In the order in which they came."""
        self.responses: list[Response] = []
        """Without those that were dropped, the first `num_dropped`."""
        self.num_dropped = 0
        self.num_bytes = 0
        self.begun = False
        self.ended = False
        self.error: FairleadError | None = None
        self.cancel: Callable[[], object] | None = None
        self.tell_end: Ended | None = None

    @property
    def num_responses(self) -> int:
        return self.num_dropped + len(self.responses)

    # From what computes

    def respond(self, response: Response) -> None:
        if self.ended:
            return
        self.responses.append(response)
        self.num_bytes += num_bytes(response)
        for member in tuple(self.members):
            member.tell(response)
        if self.num_bytes > self.flights.max_bytes:
            self.flights.remove(self)
            self.trim()

    def close(self, error: FairleadError | None) -> None:
        if self.ended:
            return
        self.ended = True
        self.error = error
        self.flights.remove(self)
        for member in tuple(self.members):
            member.tell_end(error)
        if self.tell_end is not None:
            self.tell_end(error)

    def trim(self) -> None:
        """Drop what everybody here has read; who is too far behind is cut off."""
        while self.num_bytes > self.flights.max_bytes and self.responses:
            oldest = self.num_dropped
            for member in tuple(self.members):
                if member.at == oldest and self.num_responses > oldest + 1:
                    member.cut()
            if any(member.at == oldest for member in self.members):
                return  # one response alone is larger: whoever reads it has it anyhow
            self.num_bytes -= num_bytes(self.responses.pop(0))
            self.num_dropped += 1

    # From its members

    def left(self, member: "Member", led: bool) -> None:
        if self.ended:
            return
        if not self.members:
            self.ended = True
            self.flights.remove(self)
            if self.cancel is not None:
                self.cancel()
            if self.tell_end is not None:
                self.tell_end(Cancelled("everybody left"))
        elif led and not self.begun:
            self.members[0].promote()


class Member:
    """One request that wants the answer of a flight."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        self.leads = not flight.members
        self.at = 0.0
        """How many responses it has read; infinitely many where it is called back."""
        self.left = False
        self._sink: Sink | None = None
        self._lead: Callable[[], None] | None = None
        self._changed: asyncio.Event | None = None
        self._cut = False
        flight.members.append(self)

    # The leader

    def compute(self, start: Callable[[Sink], Ticket], ended: Ended | None = None) -> None:
        """`start` begins the computation. It may be over when it returns."""
        flight = self._begin(ended)
        ticket = start(flight)
        flight.cancel = ticket.cancel
        if flight.ended and not flight.members:  # everybody left while it began
            ticket.cancel()

    def compute_stream(self, responses: AsyncGenerator[Response, None], ended: Ended | None = None) -> None:
        """Read by a task of its own: what cancels this request must not cancel the others'."""
        flight = self._begin(ended)
        task = asyncio.get_running_loop().create_task(_read(responses, flight))
        flight.cancel = task.cancel

    def give_up(self) -> None:
        """It was refused before it began: that is no answer for the others."""
        self.leave()

    def _begin(self, ended: Ended | None) -> Flight:
        flight = self.flight
        assert self.leads and not flight.begun
        flight.begun = True
        flight.tell_end = ended
        for member in flight.members:
            member.wake()
        return flight

    # Anybody

    def attach(self, sink: Sink, lead: Callable[[], None] | None = None) -> None:
        """Called back with what was answered already, at once, and with what comes. `lead`: called, once, if this one leads now."""
        if self._cut:
            self.leave()
            sink.close(_too_slow())
            return
        self._lead = lead
        self.at = inf
        flight = self.flight
        for response in tuple(flight.responses):
            if self.left:
                return
            sink.respond(copy_of(response))
        self._sink = sink
        if flight.ended and not self.left:
            self.tell_end(flight.error)

    async def begun(self, timeout: float) -> bool:
        """Whether the leader computes, so that there is something to follow; False: this one leads now. Raises TimeoutExpired."""
        try:
            async with asyncio.timeout(timeout):
                while not (self.leads or self.flight.begun):
                    await self._wait()
        except TimeoutError:
            self.leave()
            raise TimeoutExpired("the identical request that is computed first waited too long for its turn") from None
        except asyncio.CancelledError:
            self.leave()
            raise
        return not self.leads

    async def follow(self) -> AsyncGenerator[Response, None]:
        """Raises what the computation failed with. Closing it leaves."""
        flight, at = self.flight, 0
        try:
            while True:
                while at < flight.num_responses and not self._cut:
                    response = flight.responses[at - flight.num_dropped]
                    at += 1
                    self.at = at
                    yield copy_of(response)
                if self._cut:
                    raise _too_slow()
                if flight.ended:
                    if flight.error is not None:
                        raise flight.error.saying(flight.error.message)
                    return
                if flight.num_bytes > flight.flights.max_bytes:
                    flight.trim()
                await self._wait()
        finally:
            self.leave()

    def leave(self) -> None:
        """Its client left, or has all of it."""
        if not self.left:
            self.left = True
            self._sink = None
            self.flight.members.remove(self)
            led, self.leads = self.leads, False
            self.flight.left(self, led)

    # From the flight

    def tell(self, response: Response) -> None:
        if self._sink is not None:
            self._sink.respond(copy_of(response))
        else:
            self.wake()

    def tell_end(self, error: FairleadError | None) -> None:
        sink = self._sink
        if sink is None:
            self.wake()
            return
        self.leave()
        sink.close(error if error is None else error.saying(error.message))

    def promote(self) -> None:
        self.leads = True
        self.at = 0.0
        lead, self._lead, self._sink = self._lead, None, None
        if lead is not None:
            lead()
        else:
            self.wake()

    def cut(self) -> None:
        self._cut = True
        self.at = inf
        self.wake()

    def wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    async def _wait(self) -> None:
        if self._changed is None:
            self._changed = asyncio.Event()
        self._changed.clear()
        await self._changed.wait()


def _too_slow() -> Unavailable:
    return Unavailable("the answer was read too slowly to be shared with others: try again")


async def _read(responses: AsyncGenerator[Response, None], flight: Flight) -> None:
    error: FairleadError | None = Cancelled("everybody left")
    try:
        async with aclosing(responses):
            async for response in responses:
                flight.respond(response)
        error = None
    except FairleadError as failure:
        error = failure
    except Exception:
        log.exception("request_failed")
        error = ModelError("internal error")
    finally:
        flight.close(error)
