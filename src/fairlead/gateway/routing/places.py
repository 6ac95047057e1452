"""The places that can compute a request, all of one shape: local versions, replicas of engines, other servers."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol
from weakref import ref

from msgspec import Struct

from fairlead.core.errors import FairleadError
from fairlead.core.policy import Breaker
from fairlead.core.request import Request, Response, Sink, Ticket
from fairlead.gateway.routing.balance import Load, Prefixes, Size
from fairlead.gateway.routing.breaker import Circuit
from fairlead.gateway.routing.verdicts import DIED, Verdict
from fairlead.runtime.engine_instance import EngineInstance
from fairlead.runtime.engine_version import EngineVersion
from fairlead.runtime.external.version import ExternalVersion
from fairlead.runtime.version import Version


class Place(Protocol):
    """Where requests of one model are computed. Everything is called from the event loop."""

    @property
    def id(self) -> str:
        """The same after a restart, and different from those of the model's other places."""

    @property
    def remote(self) -> bool:
        """Another server: it takes requests as they came (`Request.raw`)."""

    @property
    def ready(self) -> bool:
        """It takes requests now."""

    @property
    def weight(self) -> float:
        """Of two places, one of weight 2 gets twice the work."""

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """One response goes to the sink. Errors do, too, possibly before this returns."""

    def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        """The responses. Raises FairleadError; closing it cancels."""


class VersionPlace(Struct, frozen=True):
    """A version whose own batcher feeds its instances: one place, however many they are."""

    version: Version
    id: str
    remote: bool = False
    weight: float = 1.0

    @property
    def ready(self) -> bool:
        return self.version.ready

    def submit(self, request: Request, sink: Sink) -> Ticket:
        return self.version.submit(request, sink)

    def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        return self.version.infer(request)


class InstancePlace(Struct, frozen=True):
    """One replica of an engine: each has a prefix cache of its own. `remote`: it is somebody else's."""

    version: EngineVersion
    instance: EngineInstance
    id: str
    remote: bool = False
    weight: float = 1.0

    @property
    def ready(self) -> bool:
        return self.version.takes(self.instance)

    def submit(self, request: Request, sink: Sink) -> Ticket:
        return self.version.submit(request, sink, self.instance)

    def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        return self.version.infer(request, self.instance)


def places_of(version: Version) -> list[Place]:
    """The places of a loaded version."""
    name = f"{version.name}@{version.version}"
    if isinstance(version, EngineVersion):
        remote = isinstance(version, ExternalVersion)
        return [InstancePlace(version, instance, f"{name}#{n}", remote) for n, instance in enumerate(version.instances)]
    return [VersionPlace(version, name)]


def takes(place: Place, request: Request) -> bool:
    """Whether a place can read the request: other servers take it as it came, models here what was read of it, and engines of others both."""
    if place.remote and isinstance(place, InstancePlace):
        return True
    if place.remote:
        return request.raw is not None
    return request.raw is None or request.prompt is not None or bool(request.inputs)


class Candidate:
    """A place, and what dispatch knows of it."""

    __slots__ = ("_last_error", "circuit", "load", "number", "place", "prefixes")

    def __init__(self, place: Place, number: int, prefixes: Prefixes, policy: Breaker) -> None:
        self.place = place
        self.number = number
        """Its bit in `prefixes`."""
        self.prefixes = prefixes
        self.circuit = Circuit(policy)
        self.load = Load()
        self._last_error: ref[FairleadError] | None = None

    def failed(self, now: float, verdict: Verdict, error: FairleadError | None, *, trial: bool) -> None:
        """A request failed there by its fault."""
        if error is not None:
            # One death fails all that was under way with one and the same error: it is one failure.
            known = self._last_error is not None and self._last_error() is error
            self._last_error = ref(error)
            if known and not trial:
                return
        if verdict is DIED and not self.place.remote:
            self.prefixes.forget(self.number)
        self.circuit.failed(now, trial=trial)


class Attempt:
    """One request at one place, from the moment when it is sent. Every attempt ends once, by `over`."""

    __slots__ = ("_prompt", "answered", "candidate", "sent_at", "size", "trial")

    def __init__(self, candidate: Candidate, size: Size, overlap: int, now: float) -> None:
        self.candidate = candidate
        self.size = size
        self.sent_at = now
        self.trial = candidate.circuit.sent(now)
        self.answered = False
        self._prompt: int | None = max(size.prompt - overlap, 0)
        """Its tokens that count as load; None: it is over."""
        load = candidate.load
        load.in_flight += 1
        load.prompts += self._prompt
        load.answers += size.answer

    def first(self, now: float, others: Callable[[], Sequence[float]]) -> None:
        """An answer began: the place works, and the prompt is computed."""
        self.answered = True
        self.candidate.circuit.succeeded(now, now - self.sent_at, trial=self.trial, others=others)
        if self._prompt:
            self.candidate.load.prompts -= self._prompt
            self._prompt = 0

    def outrun(self, now: float) -> None:
        """Another place, asked later, answered before it."""
        self.answered = True
        self.candidate.circuit.outrun(now, trial=self.trial)

    def over(self, now: float, verdict: Verdict | None = None, error: FairleadError | None = None) -> None:
        """It ended: with a failure, or (None) because all was said or nobody wants it any more."""
        if self._prompt is None:
            return
        candidate = self.candidate
        candidate.load.in_flight -= 1
        candidate.load.prompts -= self._prompt
        candidate.load.answers -= self.size.answer
        self._prompt = None
        trial = self.trial and not self.answered
        # Whether a local place can be asked is told by `ready`, and by nothing else sooner.
        if verdict is not None and verdict.failed and (candidate.place.remote or verdict is DIED):
            candidate.failed(now, verdict, error, trial=trial)
        elif verdict is not None and verdict.well and trial:
            candidate.circuit.succeeded(now, now - self.sent_at, trial=True, others=list)
        else:
            candidate.circuit.returned(trial=trial)
