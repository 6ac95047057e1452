"""Places without a model and time that passes only when told to: for tests of whatever chooses among places."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from heapq import heappop, heappush
from itertools import count

from fairlead.core.errors import Cancelled, FairleadError
from fairlead.core.request import Request, Response, Sink


class VirtualTime:
    """A clock and its timers."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self._order = count()
        self._timers: list[tuple[float, int, VirtualTimer]] = []

    def clock(self) -> float:
        return self.now

    def later(self, seconds: float, then: Callable[[], object]) -> "VirtualTimer":
        timer = VirtualTimer(then)
        heappush(self._timers, (self.now + seconds, next(self._order), timer))
        return timer

    @property
    def num_timers(self) -> int:
        """That will still go off."""
        return sum(timer.then is not None for _, _, timer in self._timers)

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass; what is due then happens, each at its time."""
        until = self.now + seconds
        while self._timers and self._timers[0][0] <= until:
            self.now, _, timer = heappop(self._timers)
            timer.go_off()
        self.now = until

    def advance_to_end(self) -> None:
        """Until nothing more will happen."""
        while self._timers:
            self.advance(self._timers[0][0] - self.now)

    async def elapse(self, seconds: float) -> None:
        """As `advance`, and coroutines that wait for it go on in between."""
        until = self.now + seconds
        await _settle()
        while self._timers and self._timers[0][0] <= until:
            self.advance(self._timers[0][0] - self.now)
            await _settle()
        self.now = until


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class VirtualTimer:
    def __init__(self, then: Callable[[], object]) -> None:
        self.then: Callable[[], object] | None = then

    def cancel(self) -> None:
        self.then = None

    def go_off(self) -> None:
        if (then := self.then) is not None:
            self.then = None
            then()


class FakePlace:
    """Answers after `seconds`, or fails as it is told to."""

    def __init__(self, time: VirtualTime, id: str = "a", *, seconds: float = 0.0, weight: float = 1.0, remote: bool = True) -> None:
        self.time = time
        self.id = id
        self.remote = remote
        self.weight = weight
        self.ready = True
        self.in_flight = 0
        self.seconds = seconds
        """Until it answers; 0: before `submit` returns."""
        self.num_pieces = 1
        self.fails: FairleadError | None = None
        self.fails_after = 0
        """Pieces."""
        self.status = 200
        self.asked: list[Request] = []
        self.num_cancelled = 0

    def submit(self, request: Request, sink: Sink) -> "FakeTicket":
        self.asked.append(request)
        self.in_flight += 1
        ticket = FakeTicket(self, request, sink)
        if seconds := self.seconds_of(request):
            ticket.timer = self.time.later(seconds, ticket.answer)
        else:
            ticket.answer()
        return ticket

    def seconds_of(self, request: Request) -> float:
        """For places whose answers take as long as what they are asked."""
        return self.seconds

    async def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        channel = _Channel()
        ticket = self.submit(request, channel)
        try:
            while (response := await channel.next()) is not None:
                yield response
        finally:
            ticket.cancel()


class FakeTicket:
    def __init__(self, place: FakePlace, request: Request, sink: Sink) -> None:
        self.place = place
        self.request = request
        self.sink = sink
        self.done = False
        self.timer: VirtualTimer | None = None

    def answer(self) -> None:
        place, request = self.place, self.request
        num_pieces = place.num_pieces if place.fails is None else place.fails_after
        for _ in range(num_pieces):
            if not self.done:
                answer = Response(model=request.model, version=place.id, raw=b"{}", status=place.status, id=request.id)
                self.sink.respond(answer)
        self._close(None if place.fails is None else _another(place.fails))

    def cancel(self) -> None:
        if not self.done:
            self.place.num_cancelled += 1
            if self.timer is not None:
                self.timer.cancel()
            self._close(Cancelled("request was cancelled"))

    def _close(self, error: FairleadError | None) -> None:
        if not self.done:
            self.done = True
            self.place.in_flight -= 1
            self.sink.close(error)


def _another(error: FairleadError) -> FairleadError:
    """The same failure once more: one error for many requests would be one death."""
    other = error.__class__.__new__(error.__class__, *error.args)
    other.__dict__.update(error.__dict__)
    return other


class _Channel:
    """A sink that an async iterator reads."""

    def __init__(self) -> None:
        self._responses: deque[Response] = deque()
        self._closed: asyncio.Future[FairleadError | None] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()

    def respond(self, response: Response) -> None:
        self._responses.append(response)
        self._changed.set()

    def close(self, error: FairleadError | None) -> None:
        self._closed.set_result(error)
        self._changed.set()

    async def next(self) -> Response | None:
        while not self._responses:
            if self._closed.done():
                if (error := self._closed.result()) is not None:
                    raise error
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._responses.popleft()
