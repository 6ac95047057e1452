"""One request's way through the places: which one is asked, and whether another one is after a failure. Acts on nothing itself."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count
from typing import Any, Protocol, TypeVar

import structlog
from msgspec import structs

from fairlead.core.errors import FairleadError, Unavailable
from fairlead.core.policy import RoutingSettings
from fairlead.core.request import Request, Response
from fairlead.core.routes import Shares, Sticky, pick_version
from fairlead.gateway.routing.balance import Prefixes, Size, blocks_of, cost, overlap_of, pick, rendezvous, size_of
from fairlead.gateway.routing.breaker import Circuit
from fairlead.gateway.routing.budget import Budget
from fairlead.gateway.routing.places import Attempt, Candidate, InstancePlace, Place, takes
from fairlead.gateway.routing.verdicts import DIED, Verdict, verdict_of, verdict_of_status
from fairlead.observe.counts import Counts

log = structlog.get_logger("fairlead.routing")

RETRY_FLOOR = 3
"""Retries in ten seconds that the budget always allows."""
HEDGE_FLOOR = 1
PAUSE = 0.05
"""Seconds before the same server is asked again, where there is no other; doubled each time."""
MAX_DEATHS = 1
"""A request that was with more replicas than this when they died may be what kills them."""
ONE = Size(0, 1)
A = TypeVar("A", bound=Attempt)
Instead = Callable[[str], bool]
"""Whether a request may go to this fallback now; if so, what it may take there is held for it."""


class Choices:
    """What may answer for one model."""

    def __init__(self, name: str, policy: RoutingSettings, before: "Choices | None" = None) -> None:
        """`before`: what was known of the model until now."""
        self.name = name
        self.label = name
        """Of the metrics: "" for a model that nobody knows, of which there may be any number."""
        self.policy = policy
        self.shares: Shares = ()
        self.sticky: Sticky = "session"
        """What keeps to one of `shares`."""
        self.versions: dict[str, tuple[Candidate, ...]] = {}
        """Loaded here."""
        self.default = ""
        self.remotes: tuple[Candidate, ...] = ()
        self.fallback: tuple[str, ...] = ()
        self.hedge_after = policy.hedge_after
        self.prefixes: Prefixes = Prefixes() if before is None else before.prefixes
        self.retries = Budget(policy.retry_budget, RETRY_FLOOR)
        self.hedges = Budget(policy.hedge_budget, HEDGE_FLOOR)
        self._before = [] if before is None else list(before.all())
        taken = {each.number for each in self._before}
        self._numbers = (number for number in count() if number not in taken)

    def all(self) -> Iterator[Candidate]:
        """Every place of every version."""
        yield from chain(*self.versions.values(), self.remotes)

    def adopt(self, places: Iterable[Place]) -> tuple[Candidate, ...]:
        """Candidates of places; of those that were known before, the same."""
        adopted = []
        for place in places:
            candidate = next((each for each in self._before if each.place == place), None)
            if candidate is None:
                candidate = Candidate(place, next(self._numbers), self.prefixes, self.policy.breaker)
            else:
                self._before.remove(candidate)
                if candidate.circuit.policy != self.policy.breaker:
                    candidate.circuit = Circuit(self.policy.breaker)
            adopted.append(candidate)
        return tuple(adopted)

    def settle(self) -> None:
        """All places are adopted: forget the others."""
        for gone in self._before:
            self.prefixes.forget(gone.number)
        self._before = []
        # A second computation of a whole answer would cost more than it saves.
        if any(isinstance(each.place, InstancePlace) for each in self.all()):
            self.hedge_after = 0.0

    @property
    def direct(self) -> bool:
        """There is nothing to choose, and nobody else to ask."""
        single = all(len(candidates) == 1 for candidates in self.versions.values())
        foreign = any(each.place.remote for candidates in self.versions.values() for each in candidates)
        return single and not foreign and not self.remotes and not self.shares and not self.fallback

    def version_of(self, request: Request, random: float) -> str:
        """The version that it names, or is given by the traffic; "" for the default."""
        if request.version or not self.shares:
            return request.version
        return pick_version(self.shares, key_of(request, self.sticky), random)

    def candidates(self, version: str) -> tuple[Candidate, ...]:
        """Other servers compete with the places here where nothing says which version, and stand in for one that is not here."""
        if not version:
            return self.versions.get(self.default, ()) + self.remotes
        return self.versions.get(version) or self.remotes


class Guide(Protocol):
    """What a trip asks of dispatch."""

    counts: Counts
    random: Callable[[], float]

    def fallback(self, request: Request, name: str) -> Choices | None:
        """The choices of a model that may answer instead; None where it may not, or is not there."""

    def missing(self, request: Request) -> FairleadError:
        """Why nobody can be asked."""


class Trip:
    """The state of one request: where it was sent, and what is left to try."""

    __slots__ = (
        "_asked",
        "_blocks",
        "_chain",
        "_deadline",
        "_deaths",
        "_guide",
        "_instead",
        "_size",
        "_tried",
        "_tries",
        "candidates",
        "choices",
        "num_attempts",
        "request",
        "version",
    )

    def __init__(self, guide: Guide, choices: Choices, request: Request, now: float, instead: Instead | None = None) -> None:
        self._guide = guide
        self._instead = instead
        self._asked = request
        self._chain = list(choices.fallback) if not request.version else []
        self._deadline = (request.arrived or now) + request.timeout if request.timeout else 0.0
        self._deaths = 0
        self._size: Size | None = None
        self._blocks: list[int] | None = None
        self.num_attempts = 0
        self._enter(choices, request)
        choices.retries.count(now)
        if choices.hedge_after:
            choices.hedges.count(now)

    def _enter(self, choices: Choices, request: Request) -> None:
        """Go to a model: the one asked for, or a fallback."""
        self.choices = choices
        version = self.version = choices.version_of(request, self._guide.random() if choices.shares else 0.0)
        candidates = choices.candidates(version)
        if len(candidates) > 1:  # where none of them can read it, one of them says so
            candidates = tuple([each for each in candidates if takes(each.place, request)]) or candidates
        self.candidates = candidates
        if version != request.version and self.candidates and self.candidates[0].place.remote:
            request = structs.replace(request, version=version)
        self.request = request
        """As it is sent."""
        self._tried: list[Candidate] = []
        self._tries = 0

    @property
    def fell_back(self) -> bool:
        """It was, or is, with another model than the one asked for."""
        return self.choices.name != self._asked.model

    # Sending

    def send(self, now: float, make: Callable[[Candidate, Size, int, float], A]) -> A | FairleadError:
        """The next attempt, counted as under way; an error where nobody can be asked."""
        among = self._untried(now) or self._last_resort()
        if not among:
            if self.candidates:
                return Unavailable(f"no place of model '{self.choices.name}' takes requests now")
            return self._guide.missing(self.request)
        if self.num_attempts and self._deadline:
            self.request = structs.replace(self.request, timeout=max(self._deadline - now, 1e-3), arrived=now)
        self.num_attempts += 1
        self._tries += 1
        chosen, size, overlap = self._choose(among)
        self._tried.append(chosen)
        self.note(now, "sent", {"place": chosen.place.id, "version": self.version, "attempt": self.num_attempts})
        return make(chosen, size, overlap, now)

    def note(self, now: float, name: str, details: Mapping[str, Any]) -> None:
        if self._asked.timeline is not None:
            self._asked.timeline.note(now, name, details)

    def _untried(self, now: float) -> list[Candidate]:
        """Where it may go next."""
        tried = self._tried
        return [each for each in self.candidates if each.place.ready and each.circuit.allows(now) and each not in tried]

    def _last_resort(self) -> list[Candidate]:
        """All are left out, not ready, or were tried: better any of them than none. Nobody, where another model can be asked."""
        if self._chain:
            return []
        tried = self._tried
        remotes = [each for each in self.candidates if each.place.remote]
        others = [each for each in self.candidates if each not in tried] or [each for each in remotes if each is not tried[-1]]
        others = others or remotes or list(self.candidates)
        return [each for each in others if each.place.ready] or others

    def _choose(self, among: Sequence[Candidate]) -> tuple[Candidate, Size, int]:
        """One of them, with the request's size and how many tokens of its prompt are there."""
        if len(self.candidates) == 1:
            return among[0], ONE, 0
        choices = self.choices
        policy = choices.policy
        size = self._size = self._size or size_of(self.request)
        if self._blocks is None:
            self._blocks = blocks_of(self.request) if policy.prefix_affinity else []
        blocks = self._blocks
        held = choices.prefixes.held(blocks) if blocks else []
        overlaps = [overlap_of(held, each.number) for each in among] if held else [0] * len(among)
        if len(among) == 1:
            index = 0
        elif policy.sticky == "session" and (session := session_of(self.request)) is not None:
            index = rendezvous(session, [(each.place.id, each.place.weight) for each in among])
        else:
            costs = [cost(each.load, size, overlap, each.place.weight) for each, overlap in zip(among, overlaps, strict=True)]
            index = pick(costs, size.prompt + size.answer, policy.temperature, self._guide.random())
        if blocks:
            choices.prefixes.record(blocks, among[index].number)
        return among[index], size, overlaps[index]

    # What came of it

    def first(self, attempt: Attempt, response: Response, now: float) -> float | None:
        """The first response came. None: it is the answer; else seconds after which to send the request once more."""
        if response.status >= 400:
            again = self._ended(attempt, verdict_of_status(response.status), None, now, True)
            if again is not None:
                return again
        else:
            opened = attempt.candidate.circuit.opened
            attempt.first(now, partial(self._latencies, attempt.candidate, now))
            self._note_opening(attempt.candidate, opened)
        self._asked.num_rows = self.request.num_rows
        if self.num_attempts > 1:
            response.headers["x-fairlead-attempts"] = str(self.num_attempts)
        if self.fell_back:
            response.headers["x-fairlead-fallback"] = self.choices.name
        return None

    def outrun(self, attempt: Attempt, winner: Attempt, now: float) -> None:
        """Another attempt answered first: that says something of its place where it began earlier."""
        if attempt.sent_at < winner.sent_at:
            opened = attempt.candidate.circuit.opened
            attempt.outrun(now)
            self._note_opening(attempt.candidate, opened)

    def lost(self, attempt: Attempt, response: Response, now: float) -> None:
        """An upstream's error came while another attempt is under way."""
        self._ended(attempt, verdict_of_status(response.status), None, now, False)

    def failed(self, attempt: Attempt, error: FairleadError, now: float, *, alone: bool) -> float | None:
        """It failed. Seconds after which to send the request once more; None: not at all.

        `alone`: no answer has begun, and no other attempt is under way.
        """
        return self._ended(attempt, verdict_of(error), error, now, alone)

    def nobody(self, error: FairleadError, now: float) -> float | None:
        """Nobody could be asked (`send`). As `failed`."""
        again = self._again(verdict_of(error), now)
        # No other model can be asked after all: now `send` finds a last resort.
        return 0.0 if again is None and self.candidates and not self._chain else again

    def _ended(self, attempt: Attempt, verdict: Verdict, error: FairleadError | None, now: float, may_go_on: bool) -> float | None:
        opened = attempt.candidate.circuit.opened
        attempt.over(now, verdict, error)
        self._note_opening(attempt.candidate, opened)
        if not verdict.well:
            self.note(now, "failed", {"place": attempt.candidate.place.id, "error": verdict.reason or type(error).__name__})
        if verdict is DIED:
            self._deaths += 1
        return self._again(verdict, now) if may_go_on else None

    def _again(self, verdict: Verdict, now: float) -> float | None:
        if self._deaths > MAX_DEATHS or (self._deadline and now >= self._deadline):
            return None
        pause = self._retry(now) if verdict.retry else None
        if pause is not None:
            self._guide.counts.add("fairlead_gateway_retries_total", self.choices.label, verdict.reason)
            self.note(now, "retried", {"reason": verdict.reason})
            return pause
        return 0.0 if verdict.fallback and self._fall_back(now) else None

    def _retry(self, now: float) -> float | None:
        """Whether the same model is asked again, and after how many seconds."""
        choices = self.choices
        if not self._tries or self._tries > choices.policy.retries:
            return None
        pause = 0.0
        if not self._untried(now):
            # Asking the same place at once is of no use; another server's may be many behind one address.
            if self._chain or not any(each.place.remote for each in self._tried):
                return None
            pause = PAUSE * 2.0 ** (self._tries - 1) * (0.5 + self._guide.random())
        if self._deadline and now + pause >= self._deadline:
            return None
        return pause if choices.retries.spend(now) else None

    def _fall_back(self, now: float) -> bool:
        while self._chain:
            name = self._chain.pop(0)
            choices = self._guide.fallback(self._asked, name)
            if choices is None or not any(takes(each.place, self._asked) for each in choices.candidates("")):
                continue
            if self._instead is not None and not self._instead(name):
                continue
            asked, model = self._asked, self.choices.label
            self._enter(choices, structs.replace(asked, model=name, version=""))
            self._guide.counts.add("fairlead_gateway_fallbacks_total", model, name)
            self.note(now, "fallback", {"model": name})
            return True
        return False

    # Hedging

    @property
    def hedge_after(self) -> float:
        """Seconds after which a second place is asked; 0: never."""
        after = self.choices.hedge_after
        raw = self.request.raw
        tensors = self.request.prompt is None and (raw is None or raw.num_rows > 0)
        if not after or not tensors or len(self.candidates) < 2:
            return 0.0
        return after

    def may_hedge(self, now: float) -> bool:
        """Whether a second place may be asked at the same time; counts as done."""
        in_time = not self._deadline or now < self._deadline
        return in_time and bool(self._untried(now)) and self.choices.hedges.spend(now)

    def count_hedge(self, outcome: str) -> None:
        self._guide.counts.add("fairlead_gateway_hedges_total", self.choices.label, outcome)

    # Health

    def _latencies(self, without: Candidate, now: float) -> list[float]:
        found = [each.circuit.latency(now) for each in self.candidates if each is not without]
        return [seconds for seconds in found if seconds is not None]

    def _note_opening(self, candidate: Candidate, opened: int) -> None:
        circuit = candidate.circuit
        if circuit.opened > opened:
            self._guide.counts.add("fairlead_gateway_breaker_opened_total", self.choices.label, candidate.place.id, circuit.why)
            log.warning("place_left_out", model=self.choices.name, place=candidate.place.id, reason=circuit.why)


def key_of(request: Request, sticky: Sticky) -> bytes | None:
    """What is given the same version again and again: of several models, too. None: nothing, chance decides."""
    if sticky == "session":
        return session_of(request)
    return request.caller.tenant.encode() if sticky == "tenant" else None


def session_of(request: Request) -> bytes | None:
    """What keeps requests together. Of one tenant: two that name their sessions alike have nothing to do with each other."""
    return f"{request.caller.tenant}\0{request.session}".encode() if request.session else None
