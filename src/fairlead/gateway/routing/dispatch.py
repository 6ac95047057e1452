"""From an admitted request to the place that computes it, and to another one where that fails."""

import asyncio
import random as random_module
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

import structlog
from msgspec import Struct, structs

from fairlead.core.caller import Caller
from fairlead.core.errors import Cancelled, FairleadError, ModelError, Unavailable
from fairlead.core.policy import GatewaySettings
from fairlead.core.request import Pausable, Request, Response, Sink, Ticket
from fairlead.core.routes import Routes, Shares
from fairlead.gateway.routing.balance import Size
from fairlead.gateway.routing.onlooker import Look, Onlooker
from fairlead.gateway.routing.places import Attempt, Candidate, Place, places_of
from fairlead.gateway.routing.trip import Choices, Instead, Trip
from fairlead.gateway.routing.verdicts import verdict_of_status
from fairlead.observe.counts import Counts
from fairlead.runtime.repository import ModelRepository

log = structlog.get_logger("fairlead.routing")

MAX_MODELS = 4096
"""Models whose choices are kept."""


class Timer(Protocol):
    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], object]], Timer]
"""Call something after so many seconds."""


class Dispatch:
    """Called from the event loop only."""

    def __init__(
        self,
        repository: ModelRepository,
        settings: Callable[[], GatewaySettings],
        upstreams: Callable[[str], Sequence[Place]],
        counts: Counts,
        *,
        allowed: Callable[[Caller, str], bool],
        clock: Callable[[], float] = time.perf_counter,
        random: Callable[[], float] = random_module.random,
        later: Later | None = None,
    ) -> None:
        """`upstreams`: a model's places on other servers, asked anew when the settings are another object.
        `allowed`: whether a caller may be answered by a model. `later`: None for the event loop's."""
        self.counts = counts
        self.clock = clock
        self.random = random
        self._repository = repository
        self._settings = settings
        self._upstreams = upstreams
        self._allowed = allowed
        self._later = later
        self._known: dict[str, _Known] = {}
        self.routes = Routes()
        """Traffic that control publishes, by assigning it anew; it goes before `traffic` of the settings."""
        self.looks_of: list[Callable[[str], Look | None]] = []
        """Who looks at a model's requests. Whoever gives other answers than before calls `look_again`."""

    def splits(self, model: str) -> bool:
        """Several versions may answer a request that names none."""
        return bool(self._look(model).choices.shares)

    def knows(self, model: str) -> bool:
        return self._repository.known(model) or bool(self._upstreams(model))

    # Requests

    def submit(self, request: Request, sink: Sink, instead: Instead | None = None) -> Ticket:
        """For a request with one response. Errors go to the sink, possibly before this returns. `instead`: asked before a fallback is."""
        known = self._known.get(request.model)
        repository = self._repository
        # As `_look`, written out: this runs on every request
        if (
            known is None
            or known.changed is not repository.readiness_changed
            or known.settings is not self._settings()
            or known.routes is not self.routes
        ):
            known = self._learn(request.model)
        if known.direct or repository.stopping:
            return repository.submit(request, sink)
        if known.looks:
            return self._submit_looked_at(known, request, sink, instead)
        flight = _Flight(self, Trip(self, known.choices, request, self.clock(), instead), sink)
        flight.send()
        return flight

    def _submit_looked_at(self, known: "_Known", request: Request, sink: Sink, instead: Instead | None) -> Ticket:
        trip = None if known.choices.direct else Trip(self, known.choices, request, self.clock(), instead)
        if not request.version:  # no chance gave it that one
            version = (trip is not None and trip.version) or known.choices.default
            for look in known.looks:
                onlooker = look.begin(request, version, trip)
                if onlooker is not None:
                    onlooker.sink, sink = sink, onlooker
        if trip is None:
            return self._repository.submit(request, sink)
        flight = _Flight(self, trip, sink)
        flight.send()
        return flight

    def infer(self, request: Request, instead: Instead | None = None) -> AsyncGenerator[Response, None]:
        """The responses. Raises FairleadError; closing it cancels."""
        known = self._look(request.model)
        if known.direct or self._repository.stopping:
            return self._repository.infer(request)
        trip = None if known.choices.direct else Trip(self, known.choices, request, self.clock(), instead)
        responses = self._repository.infer(request) if trip is None else self._stream(trip)
        if not known.looks or request.version:
            return responses
        version = (trip is not None and trip.version) or known.choices.default
        onlookers = [onlooker for look in known.looks if (onlooker := look.begin(request, version, trip)) is not None]
        return _looked_at(responses, onlookers) if onlookers else responses

    async def _stream(self, trip: Trip) -> AsyncGenerator[Response, None]:
        while True:
            attempt = trip.send(self.clock(), Attempt)
            if isinstance(attempt, FairleadError):
                pause = trip.nobody(attempt, self.clock())
                if pause is None:
                    raise attempt
                continue
            begun = False
            try:
                async with aclosing(attempt.candidate.place.infer(trip.request)) as responses:
                    async for response in responses:
                        if not begun:
                            pause = trip.first(attempt, response, self.clock())
                            if pause is not None:
                                break
                            begun = True
                        yield response
                    else:
                        return
            except FairleadError as error:
                pause = trip.failed(attempt, error, self.clock(), alone=not begun)
                if pause is None:
                    raise
            finally:
                attempt.over(self.clock())
            assert pause is not None
            if pause:
                await self._sleep(pause)

    async def _sleep(self, seconds: float) -> None:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end() -> None:
            if not over.done():
                over.set_result(None)

        timer = self.call_later(seconds, end)
        try:
            await over
        finally:
            timer.cancel()

    def call_later(self, seconds: float, then: Callable[[], object]) -> Timer:
        return (self._later or asyncio.get_running_loop().call_later)(seconds, then)

    def look_again(self) -> None:
        """`looks_of` is asked anew, for each model on its next request."""
        self.routes = structs.replace(self.routes)

    # What a trip asks

    def fallback(self, request: Request, name: str) -> Choices | None:
        """The choices of a model that may answer instead; None where it may not, or is not there."""
        if not self.knows(name) or not self._allowed(request.caller, name):
            return None
        return self._look(name).choices

    def missing(self, request: Request) -> FairleadError:
        """Why nobody can be asked."""
        try:
            self._repository.find(request.model, request.version)
        except FairleadError as error:
            return error
        return Unavailable(f"no place of model '{request.model}' takes requests now")

    # What may answer

    def _look(self, name: str) -> "_Known":
        known = self._known.get(name)
        if (
            known is not None
            and known.changed is self._repository.readiness_changed
            and known.settings is self._settings()
            and known.routes is self.routes
        ):
            return known
        return self._learn(name)

    def _learn(self, name: str) -> "_Known":
        """Find out what may answer for a model. What is known of places that remain is kept."""
        repository, settings = self._repository, self._settings()
        before = self._known.pop(name, None)
        policy = settings.model(name)
        choices = Choices(name, policy.routing, None if before is None else before.choices)
        loaded = repository.versions(name)
        choices.versions = {each: choices.adopt(places_of(repository.find(name, each))) for each in loaded}
        choices.default = repository.find(name).version if loaded else ""
        choices.remotes = choices.adopt(self._upstreams(name))
        shares = _shares_of(name, self.routes.shares.get(name) or tuple(policy.traffic.items()), loaded)
        # One version that gets everything, and would without being named: nothing is split.
        choices.shares = () if [version for version, share in shares if share] == [choices.default] else shares
        choices.sticky = self.routes.sticky.get(name, "session")
        choices.fallback = tuple(each for each in policy.routing.fallback if each != name)
        choices.settle()
        looks = tuple(look for each in self.looks_of if (look := each(name)) is not None)
        known = _Known(choices, choices.direct and not looks, looks, repository.readiness_changed, settings, self.routes)
        if repository.known(name) or choices.remotes:
            if len(self._known) >= MAX_MODELS:
                del self._known[next(iter(self._known))]
            self._known[name] = known
        else:
            choices.label = ""
        return known


class _Known(Struct, frozen=True, eq=False):
    """What may answer for a model, as of these."""

    choices: Choices
    direct: bool
    """There is nothing to choose, and nobody looks."""
    looks: tuple[Look, ...]
    changed: asyncio.Event
    """The repository replaces it when something is loaded or unloaded."""
    settings: GatewaySettings
    routes: Routes


async def _looked_at(responses: AsyncGenerator[Response, None], onlookers: Sequence[Onlooker]) -> AsyncGenerator[Response, None]:
    error: FairleadError | None = Cancelled("the client left")
    try:
        async with aclosing(responses):
            async for response in responses:
                for onlooker in onlookers:
                    onlooker.saw(response)
                yield response
        error = None
    except FairleadError as failure:
        error = failure
        raise
    except Exception:
        error = ModelError("internal error")
        raise
    finally:
        for onlooker in onlookers:
            onlooker.ended(error)


def _shares_of(name: str, shares: Shares, loaded: Sequence[str]) -> Shares:
    """Those of the versions that are loaded, where any is: the others' requests go to them."""
    there = tuple((version, share) for version, share in shares if version in loaded)
    if not loaded or len(there) == len(shares):
        return shares
    log.warning("traffic_to_missing_version", model=name, versions=[version for version, _ in shares if version not in loaded])
    return there if any(share > 0 for _, share in there) else ()


class _Sent(Attempt):
    """An attempt in the callback form: the sink of its place."""

    __slots__ = ("flight", "ticket")

    def __init__(self, flight: "_Flight", candidate: Candidate, size: Size, overlap: int, now: float) -> None:
        super().__init__(candidate, size, overlap, now)
        self.flight = flight
        self.ticket: Ticket | None = None

    def respond(self, response: Response) -> None:
        flight = self.flight
        if self is flight.winner:
            flight.sink.respond(response)
        elif self in flight.live:
            flight.first(self, response)

    def close(self, error: FairleadError | None) -> None:
        self.flight.closed(self, error)


class _Flight:
    """A request in the callback form: its attempts, of which the first that answers counts."""

    __slots__ = ("_dispatch", "_hedge", "_hedge_timer", "_pause_timer", "_trip", "done", "live", "sink", "winner")

    def __init__(self, dispatch: Dispatch, trip: Trip, sink: Sink) -> None:
        self._dispatch = dispatch
        self._trip = trip
        self.sink = sink
        self.live: list[_Sent] = []
        """Under way, and wanted: two of a hedged request, else one."""
        self.winner: _Sent | None = None
        self.done = False
        self._hedge: _Sent | None = None
        self._pause_timer: Timer | None = None
        self._hedge_timer: Timer | None = None
        after = trip.hedge_after
        if after:
            self._hedge_timer = dispatch.call_later(after, self.hedge)

    def send(self) -> None:
        now = self._dispatch.clock()
        sent = self._trip.send(now, partial(_Sent, self))
        if isinstance(sent, FairleadError):
            self._go_on(self._trip.nobody(sent, now), sent)
        else:
            self._submit(sent)

    def hedge(self) -> None:
        """It takes long: ask a second place too."""
        now = self._dispatch.clock()
        if self.done or self.winner is not None or len(self.live) != 1 or not self._trip.may_hedge(now):
            return
        sent = self._trip.send(now, partial(_Sent, self))
        if not isinstance(sent, FairleadError):
            self._hedge = sent
            self._trip.note(now, "hedged", {"place": sent.candidate.place.id})
            self._submit(sent)

    def _submit(self, sent: _Sent) -> None:
        self.live.append(sent)
        sent.ticket = sent.candidate.place.submit(self._trip.request, sent)
        if self.done:
            sent.ticket.cancel()  # the caller left meanwhile; else there is nothing left to cancel

    # From the places

    def first(self, sent: _Sent, response: Response) -> None:
        now = self._dispatch.clock()
        if len(self.live) > 1 and response.status >= 400 and not verdict_of_status(response.status).well:
            self.live.remove(sent)
            self._trip.lost(sent, response, now)
            return
        pause = self._trip.first(sent, response, now)
        if pause is not None:
            self.live.remove(sent)
            self._go_on(pause, None)
            return
        self._won(sent)
        self.sink.respond(response)

    def closed(self, sent: _Sent, error: FairleadError | None) -> None:
        now = self._dispatch.clock()
        sent.ticket = None  # each knows the other: only the garbage collector would free them
        if self.done or sent not in self.live:
            sent.over(now)
            return
        self.live.remove(sent)
        if error is None:
            if self.winner is None:
                self._won(sent)
            sent.over(now)
            self._end(None)
            return
        pause = self._trip.failed(sent, error, now, alone=self.winner is None and not self.live)
        if not self.live or self.winner is not None:
            self._go_on(pause, error)

    def _won(self, sent: _Sent) -> None:
        self.winner = sent
        if self._hedge is not None:
            self._trip.count_hedge("won" if sent is self._hedge else "lost")
        if self._hedge_timer is not None:
            others, self.live = [each for each in self.live if each is not sent], [sent]
            for each in others:
                self._trip.outrun(each, sent, self._dispatch.clock())
            self._stop(others)

    # Towards the end

    def _go_on(self, pause: float | None, error: FairleadError | None) -> None:
        if pause is None:
            self._end(error)
        elif pause:
            self._pause_timer = self._dispatch.call_later(pause, self.send)
        else:
            self.send()

    def _end(self, error: FairleadError | None) -> None:
        if self._hedge is not None and self.winner is None:
            self._trip.count_hedge("failed")
        self._stop(self._leave())
        self.sink.close(error)

    def cancel(self) -> None:
        """The caller left."""
        if not self.done:
            self._stop(self._leave())
            self.sink.close(Cancelled("request was cancelled"))

    def _leave(self) -> list[_Sent]:
        """Take nothing more. It lets go of its attempts, so that none of them waits for the garbage collector."""
        left, self.live, self.winner, self._hedge, self.done = self.live, [], None, None, True
        return left

    def pause(self) -> None:
        """The caller reads slowly."""
        if self.winner is not None and isinstance(self.winner.ticket, Pausable):
            self.winner.ticket.pause()

    def resume(self) -> None:
        if self.winner is not None and isinstance(self.winner.ticket, Pausable):
            self.winner.ticket.resume()

    def _stop(self, attempts: Sequence[_Sent]) -> None:
        """Give up what is under way there, and every further step."""
        for timer in (self._pause_timer, self._hedge_timer):
            if timer is not None:
                timer.cancel()
        for each in attempts:
            each.over(self._dispatch.clock())
            if each.ticket is not None:
                each.ticket.cancel()
