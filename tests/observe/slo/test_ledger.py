"""What is counted, and what a store that servers share remembers of it."""

import asyncio

import pytest

from fairlead.core.errors import Unavailable
from fairlead.core.slo import DAY, AlertSettings, Objective
from fairlead.core.timeline import Timeline
from fairlead.observe.counts import Counts
from fairlead.observe.finished import Finished
from fairlead.observe.slo.burn import Events
from fairlead.observe.slo.ledger import MAX_HOURS, MAX_KNOWN, Hour, Ledger, digest_of
from fairlead.observe.slo.slos import Slos
from tests.stores import new_store

HOUR = 3600.0
API = Objective(name="api", target=0.99)
FAST = Objective(name="fast", model="llama-*", kind="latency", threshold=0.5)
WALL = 1_790_000_000.0


def request(outcome="success", *, model="llama-8b", seconds=0.1):
    return Timeline(request_id="r", protocol="http", arrived=0.0, ended=seconds, kind="infer", model=model, outcome=outcome)


class Server:
    def __init__(self, store=None, *, server="one", objectives=(API, FAST), wall=WALL):
        self.now, self.wall = 5_000.0, wall
        self.counts = Counts()
        self.slos = Slos(
            objectives,
            AlertSettings(),
            self.counts,
            server=server,
            signals=self.nothing,
            now=lambda: self.now,
            wall=lambda: self.wall,
        )
        self.slos.store = store

    async def nothing(self):
        return {}

    def pass_by(self, seconds):
        self.now += seconds
        self.wall += seconds

    def serve(self, good=0, bad=0):
        self.slos([request()] * good + [request("failure")] * bad)

    async def minute(self):
        """What the task does once a minute."""
        task = asyncio.create_task(self.slos.keep())
        async with asyncio.timeout(10):
            before = self.rounds()
            while self.rounds() == before:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def rounds(self):
        return self.slos.rounds

    def events(self, name="api"):
        return next(each.reading.events for each in self.slos.shown() if each.reading.objective.name == name)


@pytest.fixture
def store(tmp_path):
    opened = new_store(tmp_path)
    yield opened.slos
    opened.close()


def test_finished_requests_count_for_each_objective_that_they_concern():
    server = Server()
    finished = Finished(server.slos)
    for each in (request(), request(seconds=2.0), request("failure"), request("cancelled"), request(model="qwen", seconds=9.0)):
        finished.add(each)
    finished.flush()
    assert server.events("api") == Events(3, 1)
    assert server.events("fast") == Events(1, 1)
    assert server.counts.get("fairlead_slo_events_total", "api", "bad") == 1
    assert server.counts.get("fairlead_slo_events_total", "fast", "good") == 1


def test_rates_begin_at_zero():
    names = [(name, labels, number) for name, labels, number in Server().counts.samples()]
    assert ("fairlead_slo_events_total", ("api", "bad"), 0) in names


def test_strangers_may_name_any_number_of_models():
    server = Server()
    server.slos([request("failure", model=f"m{number}") for number in range(3 * MAX_KNOWN)])
    assert server.events() == Events(0, 3 * MAX_KNOWN)
    assert len(server.slos.ledger._known) <= MAX_KNOWN


async def test_a_budget_survives_a_restart(store):
    server = Server(store)
    server.serve(good=90, bad=10)
    await server.minute()
    server.serve(good=100)
    await server.slos.stop()

    later = Server(store, server="two", wall=WALL + 2 * HOUR)
    await later.minute()
    assert later.events() == Events(190, 10)
    [api, _] = later.slos.shown()
    assert api.reading.budget_left == pytest.approx(1 - (10 / 200) / 0.01)


async def test_several_servers_add_up(store):
    servers = [Server(store, server=name) for name in ("one", "two", "three")]
    for number, server in enumerate(servers):
        server.serve(good=100, bad=number)
        await server.minute()
    for server in servers:
        for _ in range(5):
            await server.minute()
        assert server.events() == Events(300, 3)


async def test_writing_twice_counts_once(store):
    server = Server(store)
    server.serve(bad=5)
    for _ in range(3):
        await server.minute()
    server.serve(bad=1)
    await server.minute()
    assert [each.bad for each in store.read(slos=["api"], since=0, but="")] == [6]


async def test_a_store_that_is_away_is_counted_and_caught_up_with(store):
    server = Server(Away(store))
    server.serve(bad=5)
    await server.minute()
    await server.minute()
    assert server.counts.get("fairlead_slo_store_failures_total") == 2
    server.slos.store.away = False
    server.serve(bad=1)
    await server.minute()
    assert store.read(slos=["api"], since=0, but="")[0].bad == 6


class Away:
    def __init__(self, store):
        self.store, self.away = store, True

    def __getattr__(self, name):
        if self.away:
            raise Unavailable("the store does not answer: it is away")
        return getattr(self.store, name)


def test_what_waits_for_a_store_is_bounded():
    ledger = Ledger([API], Counts())
    for hour in range(MAX_HOURS + 20):
        ledger.record("api", 1, 0, hour * HOUR, WALL + hour * HOUR)
    assert ledger.give_up() == 20
    hours = ledger.unwritten()
    assert len(hours) == MAX_HOURS
    assert min(each.hour for each in hours) == int((WALL + 20 * HOUR) // HOUR * HOUR)


async def test_another_definition_begins_anew_and_another_target_does_not(store):
    server = Server(store, objectives=(FAST,))
    server.slos([request(seconds=9.0)] * 7)
    await server.slos.stop()
    for objective, events in (
        (Objective(name="fast", model="llama-*", kind="latency", threshold=0.5, target=0.9, window_days=60), Events(0, 7)),
        (Objective(name="fast", model="llama-*", kind="latency", threshold=0.7), Events(0, 0)),
    ):
        later = Server(store, server="two", objectives=(objective,))
        await later.minute()
        assert later.events("fast") == events
    assert digest_of(FAST) != digest_of(API)


@pytest.mark.parametrize("jump", [-30 * DAY, 365 * DAY])
async def test_hours_that_a_wrong_clock_wrote_spoil_nothing(store, jump):
    server = Server(store)
    server.serve(good=100, bad=1)
    await server.minute()
    server.wall += jump
    server.serve(good=50)
    await server.minute()
    server.wall -= jump
    server.serve(good=100)
    await server.minute()
    assert server.events() == Events(250, 1)

    later = Server(store, server="two", wall=WALL + HOUR)
    await later.minute()
    assert later.events() == Events(200, 1)
    assert later.slos.board.alerts() == []


async def test_nothing_is_purged_while_the_calendar_leaps(store):
    store.write("zero", [Hour("api", digest_of(API), int(WALL // HOUR * HOUR), 5, 5)])
    server = Server(store)
    server.wall += 400 * DAY
    for _ in range(3):
        await server.minute()
    assert store.read(slos=["api"], since=0, but="one")


async def test_without_a_store_nothing_waits():
    server = Server()
    server.serve(good=1)
    await server.slos.stop()
    task = asyncio.create_task(server.slos.keep())
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
