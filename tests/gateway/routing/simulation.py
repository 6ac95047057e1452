"""What the choice of places does to a load, in virtual time: `python -m tests.gateway.routing.simulation` prints docs/routing.md's tables.

The dispatch is the real one. Places are models of servers: an engine with a prefix cache that computes one prompt after another,
a server that answers after a random time, a server that fails at once.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import cycle
from random import Random
from statistics import fmean, quantiles

from fairlead.core.errors import FairleadError
from fairlead.core.policy import Breaker, GatewaySettings, ModelPolicy, RoutingSettings
from fairlead.core.request import Raw, Request, Response, Sink
from fairlead.gateway.routing.balance import pick
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.routing.fake import FakePlace, VirtualTime
from fairlead.observe.counts import Counts
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import ModelRepository, RepositorySettings
from fairlead.runtime.upstream.errors import UpstreamGone

NEVER = Breaker(failures=1 << 30, min_requests=1 << 30)


def front(time: VirtualTime, places: list[FakePlace], policy: RoutingSettings, seed: int = 1) -> Dispatch:
    settings = GatewaySettings(models={"m": ModelPolicy(routing=policy)})
    repository = ModelRepository(RepositorySettings(sources=()), Metrics())
    return Dispatch(
        repository,
        lambda: settings,
        lambda model: places,
        Counts(),
        allowed=lambda caller, model: True,
        clock=time.clock,
        random=Random(seed).random,
        later=time.later,
    )


class Timed(Sink):
    """Notes how long the first response took."""

    def __init__(self, time: VirtualTime, seconds: list[float], failures: list[FairleadError]) -> None:
        self.time, self.seconds, self.failures = time, seconds, failures
        self.began = time.now
        self.answered = False

    def respond(self, response: Response) -> None:
        if not self.answered:
            self.answered = True
            self.seconds.append(self.time.now - self.began)

    def close(self, error: FairleadError | None) -> None:
        if error is not None:
            self.failures.append(error)


def percentile(seconds: list[float], percent: int) -> float:
    return quantiles(seconds, n=100)[percent - 1]


# Prefix affinity


class SimulatedEngine(FakePlace):
    """Computes one prompt after another, but for what stands in its prefix cache (least recently used goes); then answers beside the others."""

    PIECE = 64
    """Characters of a block of KV memory: 16 tokens."""
    PROMPT_RATE = 2000.0
    TOKEN_SECONDS = 0.02
    NUM_BLOCKS = 4000

    def __init__(self, time: VirtualTime, name: str) -> None:
        super().__init__(time, name)
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.busy_until = 0.0
        self.asked_tokens = self.hit_tokens = 0

    def submit(self, request: Request, sink: Sink) -> "SimulatedEngine":
        raw = request.raw
        assert raw is not None
        missing = self._missing(raw.prefix)
        self.busy_until = max(self.busy_until, self.time.now) + missing / self.PROMPT_RATE
        first = self.busy_until - self.time.now
        self.time.later(first, lambda: sink.respond(Response(model="m", version="")))
        self.time.later(first + (raw.max_tokens or 0) * self.TOKEN_SECONDS, lambda: sink.close(None))
        return self

    def cancel(self) -> None: ...

    def _missing(self, prompt: bytes) -> int:
        """Tokens to compute."""
        before, held, holding = 0, 0, True
        for end in range(self.PIECE, len(prompt) + 1, self.PIECE):
            before = hash((before, prompt[end - self.PIECE : end]))
            holding = holding and before in self.cache
            held += self.PIECE if holding else 0
            self.cache[before] = None
            self.cache.move_to_end(before)
        while len(self.cache) > self.NUM_BLOCKS:
            self.cache.popitem(last=False)
        self.asked_tokens += len(prompt) // 4
        self.hit_tokens += held // 4
        return (len(prompt) - held) // 4


def conversations(random: Random, num: int) -> list[bytes]:
    """Prompts of chats: one of a few long instructions, and turns that grow; many chats are under way at once."""
    instructions = [random.randbytes(2000).hex().encode()[:3200] for _ in range(6)]
    chats = [random.choice(instructions) for _ in range(60)]
    prompts = []
    for _ in range(num):
        at = random.randrange(len(chats))
        chats[at] += random.randbytes(200).hex().encode()
        prompts.append(chats[at])
        if len(chats[at]) > 12_000:
            chats[at] = random.choice(instructions)
    return prompts


def affinity(how: str, rate: float, num: int = 4000, num_places: int = 4) -> dict[str, float]:
    """`how`: round-robin, least-work or affinity."""
    time, random = VirtualTime(), Random(11)
    engines = [SimulatedEngine(time, f"e{n}") for n in range(num_places)]
    dispatch = front(time, list(engines), RoutingSettings(prefix_affinity=how == "affinity", breaker=NEVER))
    turn = cycle(engines)
    seconds: list[float] = []
    for prompt in conversations(random, num):
        request = Request(model="m", raw=Raw(path="", body=b"", prefix=prompt, prompt_chars=len(prompt), max_tokens=50))
        sink = Timed(time, seconds, [])
        if how == "round-robin":
            next(turn).submit(request, sink)
        else:
            dispatch.submit(request, sink)
        time.advance(random.expovariate(rate))
    time.advance_to_end()
    hits, asked = sum(engine.hit_tokens for engine in engines), sum(engine.asked_tokens for engine in engines)
    busiest = max(engine.asked_tokens for engine in engines) / asked * num_places
    return {"hit_rate": hits / asked, "mean": fmean(seconds), "p99": percentile(seconds, 99), "busiest": busiest}


# Herding


class SimulatedServer(FakePlace):
    """Computes one request after another."""

    def __init__(self, time: VirtualTime, name: str, random: Random, mean: float) -> None:
        super().__init__(time, name)
        self.random, self.mean = random, mean
        self.busy_until = 0.0

    def seconds_of(self, request: Request) -> float:
        self.busy_until = max(self.busy_until, self.time.now) + self.random.expovariate(1 / self.mean)
        return self.busy_until - self.time.now


def herding(temperature: float | None, delay: float, num: int = 20_000) -> dict[str, float]:
    """Sixteen gateways before eight servers at 70 % load, all of which know what was under way at each server `delay` seconds ago.

    `temperature` None: each takes a server at random.
    """
    time, random = VirtualTime(), Random(5)
    servers = [SimulatedServer(time, f"s{n}", random, 0.1) for n in range(8)]
    known, seconds = [0] * 8, []
    looked = time.now
    for _ in range(num):
        if time.now - looked >= delay:
            known, looked = [server.in_flight for server in servers], time.now
        at = random.randrange(8) if temperature is None else pick([each + 1.0 for each in known], 1.0, temperature, random.random())
        servers[at].submit(Request(model="m"), Timed(time, seconds, []))
        servers[at].asked.clear()
        time.advance(random.expovariate(0.7 * 8 / 0.1))
    time.advance_to_end()
    return {"mean": fmean(seconds), "p99": percentile(seconds, 99)}


def strangers(choose: str, num: int = 20_000) -> dict[str, float]:
    """The same gateways as they are: each knows only what it sent itself. `choose`: `dispatch`, `random`, or `first` (of the least loaded)."""
    time, random = VirtualTime(), Random(5)
    servers = [SimulatedServer(time, f"s{n}", random, 0.1) for n in range(8)]
    gateways = [front(time, list(servers), RoutingSettings(breaker=NEVER, temperature=0.1), seed) for seed in range(16)]
    own = [[0] * 8 for _ in gateways]
    seconds: list[float] = []
    for _ in range(num):
        at = random.randrange(16)
        request, sink = Request(model="m", raw=Raw(path="/infer", body=b"", num_rows=1)), Timed(time, seconds, [])
        if choose == "dispatch":
            gateways[at].submit(request, sink)
        else:
            place = own[at].index(min(own[at])) if choose == "first" else random.randrange(8)
            servers[place].submit(request, _Counting(sink, own[at], place))
        for server in servers:
            server.asked.clear()
        time.advance(random.expovariate(0.7 * 8 / 0.1))
    time.advance_to_end()
    return {"mean": fmean(seconds), "p99": percentile(seconds, 99)}


class _Counting:
    def __init__(self, sink: Timed, counts: list[int], at: int) -> None:
        self.sink, self.counts, self.at = sink, counts, at
        counts[at] += 1

    def respond(self, response: Response) -> None:
        self.sink.respond(response)

    def close(self, error: FairleadError | None) -> None:
        self.counts[self.at] -= 1
        self.sink.close(error)


# A bad place, a slow place


def bad_place(breaker: Breaker, retries: int, *, seconds_bad: float = 60.0, rate: float = 50.0) -> dict[str, float]:
    """One of three places fails at once for a minute, in two minutes; the others take 50 ms."""
    time, random = VirtualTime(), Random(2)
    places = [FakePlace(time, name, seconds=0.05) for name in "abc"]
    dispatch = front(time, places, RoutingSettings(retries=retries, breaker=breaker))
    seconds: list[float] = []
    failures: list[FairleadError] = []
    began, num = time.now, 0
    while time.now < began + 120.0:
        bad = 30.0 <= time.now - began < 30.0 + seconds_bad
        places[0].fails, places[0].seconds = (UpstreamGone("connection refused"), 0.001) if bad else (None, 0.05)
        dispatch.submit(Request(model="m", raw=Raw(path="/infer", body=b"", num_rows=1)), Timed(time, seconds, failures))
        num += 1
        time.advance(random.expovariate(rate))
    time.advance_to_end()
    return {"failed": len(failures) / num, "asked_bad": len(places[0].asked) / num}


class Wavering(FakePlace):
    """Answers after a random time."""

    def __init__(self, time: VirtualTime, name: str, seconds: Callable[[], float]) -> None:
        super().__init__(time, name)
        self.draw = seconds

    def seconds_of(self, request: Request) -> float:
        return self.draw()


def slow_place(
    *, hedge_after: float, budget: float = 0.05, breaker: Breaker = NEVER, num: int = 20_000, rate: float = 50.0
) -> dict[str, float]:
    """Three places that take 20 ms on average, and one that takes 400 ms."""
    time, random = VirtualTime(), Random(4)
    means = (0.02, 0.02, 0.02, 0.4)
    places = [Wavering(time, f"p{n}", lambda mean=mean: random.gammavariate(4.0, mean / 4.0)) for n, mean in enumerate(means)]  # type: ignore[misc]
    dispatch = front(time, list(places), RoutingSettings(hedge_after=hedge_after, hedge_budget=budget, breaker=breaker))
    seconds: list[float] = []
    for _ in range(num):
        dispatch.submit(Request(model="m", raw=Raw(path="/infer", body=b"", num_rows=1)), Timed(time, seconds, []))
        time.advance(random.expovariate(rate))
    time.advance_to_end()
    return {"p50": percentile(seconds, 50), "p99": percentile(seconds, 99), "sent": sum(len(place.asked) for place in places) / num}


if __name__ == "__main__":

    def row(name: str, numbers: dict[str, float]) -> None:
        print(f"{name:40}", *(f"{key} {value:.4f}" for key, value in numbers.items()))

    for load in (6.0, 10.0):
        for way in ("round-robin", "least-work", "affinity"):
            row(f"prefix {way} at {load:g}/s", affinity(way, load))
    for wait in (0.0, 0.05, 0.5):
        for warmth in (None, 0.0, 0.1, 1.0, 3.0):
            row(f"herd, told {wait:g} s late, temperature {warmth}", herding(warmth, wait))
    for choice in ("first", "random", "dispatch"):
        row(f"strangers {choice}", strangers(choice))
    for which, policy in (("off", NEVER), ("on", Breaker())):
        for tries in (0, 1):
            row(f"one of three fails, breaker {which}, retries {tries}", bad_place(policy, tries))
    row("one of four slow", slow_place(hedge_after=0.0))
    for share in (0.05, 0.1):
        row(f"one of four slow, hedged after 0.06, {share}", slow_place(hedge_after=0.06, budget=share))
    row("one of four slow, breaker", slow_place(hedge_after=0.0, breaker=Breaker()))
    row("one of four slow, breaker and hedged", slow_place(hedge_after=0.06, breaker=Breaker()))
