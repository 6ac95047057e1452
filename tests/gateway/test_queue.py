"""The fair queue: single steps, any sequence of them (hypothesis), and whole days of a simulated model."""

import random
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fairlead.core.errors import Shed
from fairlead.core.generation import Usage
from fairlead.core.policy import DegradeStep, QueueSettings
from fairlead.gateway.queue import FairQueue, Waiting, degradation, served_work
from tests.gateway.simulate import Asked, Fifo, Run, Tenant, quantile, simulate

LONG = 1e9
"""As a half-life: nothing is forgotten."""


def line(max_in_flight: int = 1, **fields: object) -> FairQueue:
    return FairQueue(QueueSettings(**{"half_life": LONG, "max_wait": 1e6, **fields}), max_in_flight)  # type: ignore[arg-type]


def ask(tenant: str = "a", **fields: object) -> Waiting:
    return Waiting(tenant=tenant, **fields)  # type: ignore[arg-type]


def busy(queue: FairQueue, now: float = 0.0) -> Waiting:
    """The request that everybody else has to wait for."""
    plug = ask("plug", priority=100)
    assert queue.offer(plug, now).turn
    return plug


def wait(queue: FairQueue, *items: Waiting, now: float = 0.0) -> None:
    for item in items:
        assert not queue.offer(item, now).turn


def order(queue: FairQueue, running: Waiting, now: float = 0.0) -> list[Waiting]:
    """Everybody in the order in which they get the only turn."""
    got = []
    while turns := queue.done(running, running.work, now):
        (running,) = turns
        got.append(running)
    return got


# One step at a time


def test_while_there_is_room_it_is_everybodys_turn_at_once():
    queue = line(2)
    assert [queue.offer(ask(), 0.0).turn for _ in range(3)] == [True, True, False]


def test_without_a_bound_nobody_waits():
    queue = line(0)
    items = [ask() for _ in range(1000)]
    assert all(queue.offer(item, 0.0).turn for item in items)
    assert queue.num_in_flight == 1000
    assert not any(queue.done(item, 1.0, 1.0) for item in items)
    assert queue.num_in_flight == 0


def test_a_higher_band_goes_first_however_much_its_tenant_was_served():
    queue = line()
    plug = busy(queue)
    low, high, higher = ask("new", priority=0), ask("greedy", priority=1), ask("greedy", priority=2)
    wait(queue, low, high, higher)
    assert order(queue, plug) == [higher, high, low]


def test_within_a_band_the_tenant_that_was_served_least_goes_first():
    queue = line()
    plug = busy(queue)
    a, b = [ask("a", work=10.0) for _ in range(2)], [ask("b", work=4.0) for _ in range(5)]
    wait(queue, *a, *b)
    # attained: a 10, then b 4, 8, 12, then a again
    assert order(queue, plug) == [a[0], b[0], b[1], b[2], a[1], b[3], b[4]]


def test_a_weight_of_three_gets_three_turns_for_one():
    queue = line()
    plug = busy(queue)
    wait(queue, *(ask(tenant, weight=weight, work=6.0) for _ in range(40) for tenant, weight in (("heavy", 3.0), ("light", 1.0))))
    first = [item.tenant for item in order(queue, plug)[:40]]
    assert first.count("heavy") == 30


def test_within_a_tenant_the_earliest_deadline_goes_first_and_the_oldest_among_those_without():
    queue = line()
    plug = busy(queue)
    old, new, late, soon = ask(arrived=0.0), ask(arrived=1.0), ask(arrived=2.0, deadline=90.0), ask(arrived=3.0, deadline=50.0)
    wait(queue, new, late, soon, old)
    assert order(queue, plug) == [soon, late, old, new]


def test_a_request_without_a_deadline_is_not_passed_over_for_ever():
    queue = line(max_wait=60.0)
    plug = busy(queue)
    patient = ask(arrived=0.0)
    wait(queue, patient)
    hurried = ask(arrived=50.0, deadline=80.0)
    wait(queue, hurried, now=50.0)
    assert order(queue, plug, 50.0) == [patient, hurried]


def test_a_tenant_that_was_away_has_saved_no_credit():
    queue = line()
    plug = busy(queue)
    wait(queue, ask("away"), *(ask("busy", work=100.0) for _ in range(50)))
    running = plug
    for _ in range(40):
        (running,) = queue.done(running, running.work, 0.0)
    wait(queue, *(ask("away", work=100.0) for _ in range(20)))
    # It is its turn next, and then they alternate: the 4000 units that the other had meanwhile are not made good.
    assert [item.tenant for item in order(queue, running)[:6]] == ["away", "busy"] * 3


def test_a_new_tenant_does_not_shut_out_those_that_were_served_long_before():
    queue = line(half_life=60.0)
    plug = busy(queue)
    wait(queue, *(ask(tenant, work=100.0) for _ in range(40) for tenant in "ab"))
    running, now = plug, 0.0
    for _ in range(60):
        now += 5.0
        (running,) = queue.done(running, running.work, now)
    wait(queue, *(ask("new", work=100.0) for _ in range(20)), now=now)
    assert sorted(item.tenant for item in order(queue, running, now)[:6]) == ["a", "a", "b", "b", "new", "new"]


def test_who_underestimates_its_work_pays_for_it_afterwards():
    queue = line()
    plug = busy(queue)
    wait(queue, *(ask("liar", work=1.0) for _ in range(20)), *(ask("honest", work=100.0) for _ in range(20)))
    running, turns = plug, []
    for _ in range(20):
        (running,) = queue.done(running, 100.0, 0.0)
        turns.append(running.tenant)
    assert abs(turns.count("liar") - turns.count("honest")) <= 1


def test_an_estimate_that_was_too_high_is_given_back():
    queue = line()
    plug = busy(queue)
    wait(queue, *(ask("careful", work=1000.0) for _ in range(20)), *(ask("exact", work=10.0) for _ in range(20)))
    running, turns = plug, []
    for _ in range(20):
        (running,) = queue.done(running, 10.0, 0.0)
        turns.append(running.tenant)
    assert abs(turns.count("careful") - turns.count("exact")) <= 1


def test_requests_that_fail_are_charged_for_the_time_that_they_took():
    queue = line()
    running = busy(queue)
    wait(queue, *(ask("failing", work=10.0) for _ in range(40)), *(ask("fine", work=10.0) for _ in range(40)))
    now, turns = 0.0, []
    for _ in range(20):
        now += 10.0
        (running,) = queue.done(running, None if running.tenant == "failing" else running.work, now)
        turns.append(running.tenant)
    assert 8 <= turns.count("failing") <= 12


def test_what_was_served_fades_with_the_half_life():
    def first_after(seconds: float) -> str:
        queue = line(2, half_life=60.0)
        plug = busy(queue)
        whale = ask("whale", work=1.0)
        assert queue.offer(whale, 0.0).turn
        wait(queue, ask("whale", work=1.0), *(ask("small", work=10.0) for _ in range(30)))
        (running,) = queue.done(whale, 2000.0, 0.0)  # far more than it said
        turns = [running.tenant]
        for step in range(1, 29):
            (running,) = queue.done(running, running.work, seconds * step / 28)
            turns.append(running.tenant)
        assert plug.running
        return "early" if "whale" in turns else "late"

    assert first_after(1.0) == "late"  # 2000 against at most 28 times 10
    assert first_after(600.0) == "early"  # what is served later weighs more


def test_a_full_line_takes_the_place_of_the_newest_in_the_lowest_sheddable_band():
    queue = line(max_requests=4)
    busy(queue)
    batch = [ask("x", priority=-1), ask("y", priority=-2), ask("z", priority=-2)]
    wait(queue, *batch, ask("s", priority=0))
    offered = queue.offer(ask("new", priority=0), 0.0)
    assert offered.evicted is batch[2]
    assert not offered.evicted.waiting
    assert queue.offer(ask("new", priority=-1), 0.0).evicted is batch[1]
    with pytest.raises(Shed, match="4 requests are waiting") as refused:
        queue.offer(ask("x", priority=-1), 0.0)  # not of its own band
    assert refused.value.reason == "queue-full"
    assert queue.offer(ask("new", priority=7), 0.0).evicted is not None


def test_a_band_that_is_not_sheddable_keeps_its_places():
    queue = line(max_requests=2)
    busy(queue)
    wait(queue, ask("a"), ask("b"))
    with pytest.raises(Shed):
        queue.offer(ask("c", priority=5), 0.0)


def test_a_tenant_that_fills_the_line_does_not_keep_out_the_others():
    queue = line(max_requests=100)
    busy(queue)
    flood = [ask("flood", arrived=i / 100) for i in range(100)]
    wait(queue, *flood)
    assert queue.offer(ask("light"), 1.0).evicted is flood[99]
    with pytest.raises(Shed):
        queue.offer(ask("flood"), 1.0)
    for _ in range(49):
        assert queue.offer(ask("light"), 1.0).evicted is not None
    with pytest.raises(Shed):  # each has half of the places
        queue.offer(ask("light"), 1.0)
    assert queue.offer(ask("third"), 1.0).evicted is not None
    assert queue.num_waiting == 100


def test_nobody_is_shed_while_nobody_waits():
    queue = line(shed_wait=0.001)
    plug = busy(queue)
    (running,) = [plug]
    wait(queue, ask(), now=1.0)
    (running,) = queue.done(running, 1.0, 100.0)  # a service time of 100 seconds is known now
    wait(queue, ask(), now=100.0)
    with pytest.raises(Shed) as refused:
        queue.offer(ask(), 100.0)
    assert refused.value.reason == "predicted-wait"
    assert refused.value.retry_after > 50.0
    assert running.running


def test_the_sheddable_are_shed_first_because_their_turn_comes_last():
    queue = line(shed_wait=5.5)
    running = busy(queue)
    now = 0.0
    for _ in range(20):  # a unit takes a second
        now += 1.0
        wait(queue, ask(arrived=now), now=now)
        (running,) = queue.done(running, 1.0, now)
    wait(queue, *(ask("a", arrived=now) for _ in range(3)), *(ask("batch", priority=-1, arrived=now) for _ in range(3)), now=now)
    with pytest.raises(Shed):
        queue.offer(ask("batch", priority=-1, arrived=now), now)
    wait(queue, ask("a", arrived=now), now=now)


def test_a_deadline_that_would_be_missed_is_refused_at_the_door():
    queue = line()
    running = busy(queue)
    now = 0.0
    for _ in range(20):
        now += 1.0
        wait(queue, ask(arrived=now), now=now)
        (running,) = queue.done(running, 1.0, now)
    wait(queue, *(ask(arrived=now, deadline=now + 100.0) for _ in range(10)), now=now)
    with pytest.raises(Shed):
        queue.offer(ask("b", priority=-1, arrived=now, deadline=now + 5.0), now)
    # of the same tenant it goes before those with more time
    wait(queue, ask(arrived=now, deadline=now + 5.0), now=now)


def test_those_that_waited_too_long_are_taken_out_in_time():
    queue = line(max_wait=60.0)
    plug = busy(queue)
    patient, hurried, gone = ask(arrived=0.0), ask(arrived=1.0, deadline=10.0), ask(arrived=0.5, deadline=5.0)
    wait(queue, patient, hurried, gone)
    assert queue.next_expiry() == 5.0
    queue.leave(gone, 2.0)
    assert queue.next_expiry() == 10.0
    assert queue.expire(9.9) == []
    assert queue.expire(10.0) == [hurried]
    assert queue.next_expiry() == 60.0
    assert queue.expire(60.0) == [patient]
    assert queue.next_expiry() is None
    assert queue.done(plug, 1.0, 61.0) == ()


def test_a_client_that_leaves_gives_its_turn_to_the_next():
    queue = line()
    plug = busy(queue)
    a, b = ask("a"), ask("b")
    wait(queue, a, b)
    assert queue.leave(a, 1.0) == ()
    assert list(queue.leave(plug, 1.0)) == [b]
    assert queue.leave(a, 1.0) == () and queue.leave(plug, 1.0) == ()  # twice is once
    assert (queue.num_in_flight, queue.num_waiting) == (1, 0)


def test_more_room_is_used_at_once_and_less_room_takes_nobodys_turn():
    queue = line()
    plug = busy(queue)
    items = [ask() for _ in range(5)]
    wait(queue, *items)
    assert list(queue.resize(3, 0.0)) == items[:2]
    assert queue.resize(1, 0.0) == []
    assert [list(queue.done(each, 1.0, 0.0)) for each in (plug, items[0], items[1])] == [[], [], [items[2]]]
    assert list(queue.resize(0, 0.0)) == items[3:]


def test_other_settings_count_from_now_on():
    queue = line(half_life=60.0, max_requests=10)
    running = busy(queue)
    wait(queue, *(ask(tenant, work=10.0) for _ in range(5) for tenant in "ab"))
    (running,) = queue.done(running, running.work, 0.0)
    queue.configure(QueueSettings(half_life=1.0, max_requests=3))
    with pytest.raises(Shed):
        queue.offer(ask("a"), 1.0)
    turns = [item.tenant for item in order(queue, running, 1.0)]
    assert (turns[:8].count("a"), len(turns)) == (4, 9)


def test_everybody_can_be_sent_away():
    queue = line()
    plug = busy(queue)
    items = [ask(priority=i % 3) for i in range(9)]
    wait(queue, *items)
    assert queue.waiting_by_priority() == {100: 0, 0: 3, 1: 3, 2: 3}
    assert set(queue.drop_all()) == set(items)
    assert queue.done(plug, 1.0, 0.0) == () and queue.num_waiting == 0


def test_work_is_counted_in_tokens_or_rows_and_of_pictures_in_megapixels_times_steps():
    assert served_work(Usage(megapixels=2.0, num_pictures=2, num_steps=60)) == 60.0
    assert served_work(Usage(prompt_tokens=100, completion_tokens=10, cached_tokens=60)) == 60.0
    assert served_work(None, 32) == 32.0


# Bounded, whatever comes


def test_tenants_that_are_away_are_forgotten():
    queue = line(4, half_life=1.0)
    for number in range(20_000):
        item = ask(f"tenant-{number}", work=10.0)
        queue.offer(item, number * 0.01)
        queue.done(item, 10.0, number * 0.01 + 0.005)
    assert len(queue._by_priority[0].flows) <= 1024


def test_clients_that_come_and_leave_leave_nothing_behind():
    queue = line()
    busy(queue)
    wait(queue, ask("patient"))
    for number in range(5000):
        item = ask(f"t{number % 10}", arrived=float(number))
        wait(queue, item, now=float(number))
        queue.leave(item, float(number))
    band = queue._by_priority[0]
    assert len(queue._expiring) < 100 and len(band.heap) < 100
    assert sum(len(flow.items) for flow in band.flows.values()) < 100


@pytest.mark.parametrize("pause", [1.0, 1e4, 1e9])
def test_years_of_half_lives_do_not_upset_the_order(pause: float):
    queue = line(half_life=1.0, max_wait=1e12)
    running, now = busy(queue), 0.0
    turns: list[str] = []
    for _ in range(400):
        now += pause
        wait(queue, *(ask(tenant, arrived=now) for tenant in "ab"), now=now)
        for _ in range(2):
            (running,) = queue.done(running, running.work, now)
            turns.append(running.tenant)
    assert all({turns[i], turns[i + 1]} == {"a", "b"} for i in range(0, 800, 2))


class AnySequence(RuleBasedStateMachine):
    """Whatever happens: nobody is lost, no slot is free while somebody waits, and the next is the right one."""

    waiting_or_running = Bundle("items")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.queue = line(2, max_requests=6, max_wait=20.0, half_life=5.0)
        self.waiting: set[Waiting] = set()
        self.running: set[Waiting] = set()

    @rule(
        target=waiting_or_running,
        tenant=st.sampled_from("abc"),
        priority=st.sampled_from([-2, -1, 0, 5]),
        weight=st.sampled_from([0.5, 1.0, 4.0]),
        work=st.floats(0.0, 50.0),
        patience=st.sampled_from([0.0, 0.0, 3.0, 100.0]),
    )
    def offer(self, tenant: str, priority: int, weight: float, work: float, patience: float) -> Waiting:
        deadline = self.now + patience if patience else 0.0
        item = Waiting(tenant=tenant, priority=priority, weight=weight, work=work, deadline=deadline, arrived=self.now)
        before = set(self.waiting)
        try:
            offered = self.queue.offer(item, self.now)
        except Shed as shed:
            assert before, "refused although nobody waits"
            assert shed.reason != "queue-full" or len(before) == 6
            assert shed.retry_after >= 1.0
            return item
        if offered.evicted is not None:
            assert len(before) == 6 and offered.evicted.priority <= priority
            self.waiting.remove(offered.evicted)
        (self.running if offered.turn else self.waiting).add(item)
        return item

    @rule(item=consumes(waiting_or_running), served=st.none() | st.floats(0.0, 500.0))
    def done(self, item: Waiting, served: float | None) -> None:
        if item in self.running:
            self.running.remove(item)
            self.turns(self.queue.done(item, served, self.now))

    @rule(item=consumes(waiting_or_running))
    def leave(self, item: Waiting) -> None:
        self.waiting.discard(item)
        self.running.discard(item)
        self.turns(self.queue.leave(item, self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0, 7.0, 2000.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        expired = self.queue.expire(self.now)
        assert {item for item in self.waiting if item.expires <= self.now} == set(expired)
        self.waiting -= set(expired)

    @rule(max_in_flight=st.integers(1, 4))
    def resize(self, max_in_flight: int) -> None:
        self.turns(self.queue.resize(max_in_flight, self.now))

    def turns(self, items: list[Waiting]) -> None:
        for item in items:
            self.waiting.remove(item)
            self.running.add(item)
        # what is left behind must not have gone first
        for item in items:
            for other in self.waiting:
                assert other.priority <= item.priority
                if (other.tenant, other.priority) == (item.tenant, item.priority):
                    assert other.expires >= item.expires

    @invariant()
    def books(self) -> None:
        queue = self.queue
        assert (queue.num_waiting, queue.num_in_flight) == (len(self.waiting), len(self.running))
        assert all(item.waiting and not item.running for item in self.waiting)
        assert all(item.running and not item.waiting for item in self.running)
        assert not self.waiting or len(self.running) >= queue.max_in_flight
        assert queue.next_expiry() == min((item.expires for item in self.waiting), default=None)
        for band in queue._bands:
            flows = band.flows.values()
            assert set(band.waiting) == {item for item in self.waiting if item.priority == band.priority}
            assert band.work == pytest.approx(sum(item.work for item in band.waiting), abs=1e-6)
            assert sum(flow.num_waiting for flow in flows) == len(band.waiting)
            assert {entry[2] for entry in band.heap if entry[1] == entry[2].entry} == {flow for flow in flows if flow.num_waiting}
            for attained, number, flow in band.heap:
                assert number != flow.entry or attained == flow.attained
            for flow in flows:
                assert flow.num_running == sum(item.flow is flow for item in self.running)
                assert flow.pending >= -1e-6
        for priority in (-2, 0, 5):
            assert queue.predicted_wait(priority, "a", 1.0, self.now) >= 0.0


AnySequence.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnySequence = AnySequence.TestCase


# A simulated model


def exponential(mean: float) -> Callable[[random.Random], float]:
    return lambda rng: rng.expovariate(1 / mean)


def up_to(most: float) -> Callable[[random.Random], float]:
    return lambda rng: rng.uniform(1.0, most)


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.2, 5.0), min_size=2, max_size=5),
    quantum=st.floats(2.0, 20.0),
    slots=st.integers(1, 4),
    half_life=st.sampled_from([LONG, 100.0]),
    seed=st.integers(0, 1000),
)
def test_backlogged_tenants_share_by_weight_within_one_quantum(
    weights: list[float], quantum: float, slots: int, half_life: float, seed: int
):
    tenants = [Tenant(name=str(i), weight=w, work=up_to(quantum), backlog=20) for i, w in enumerate(weights)]
    attained = dict.fromkeys((tenant.name for tenant in tenants), 0.0)
    faded_at = 0.0

    def began(item: Asked, now: float) -> None:
        """Keep the books anew, and compare once everybody has had a few turns."""
        nonlocal faded_at
        for name in attained:
            attained[name] *= 2 ** ((faded_at - now) / half_life)
        faded_at = now
        attained[item.tenant] += item.real / item.weight
        if now > 40.0 * quantum:
            assert max(attained.values()) - min(attained.values()) <= quantum / min(weights) * (1 + 1e-9)

    simulate(line(slots, half_life=half_life), tenants, slots=slots, until=80.0 * quantum, seed=seed, began=began)


@settings(max_examples=15, deadline=None)
@given(weights=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=6), slots=st.integers(1, 4), seed=st.integers(0, 1000))
def test_nobody_in_a_band_starves(weights: list[float], slots: int, seed: int):
    """Between two turns of a tenant with something waiting, the others get what its last turns were worth to them, and one more each."""
    quantum = 10.0
    tenants = [Tenant(name=str(i), weight=w, work=up_to(quantum), backlog=10) for i, w in enumerate(weights)]
    last: dict[str, float] = {}

    def began(item: Asked, now: float) -> None:
        bound = (slots * sum(weights) / item.weight + len(weights)) * quantum / slots + quantum
        assert now - last.get(item.tenant, 0.0) <= bound
        last[item.tenant] = now

    simulate(line(slots), tenants, slots=slots, until=500.0, seed=seed, began=began)
    assert len(last) == len(weights)


@pytest.mark.parametrize("seed", range(5))
def test_a_light_tenant_is_served_before_a_flood(seed: int):
    tenants = [
        Tenant(name="flood", work=exponential(1.0), backlog=200),
        Tenant(name="light", work=exponential(1.0), rate=0.5),
    ]
    fair, fifo = (simulate(kind(QueueSettings(max_wait=1e6), 8), tenants, slots=8, until=500.0, seed=seed) for kind in (FairQueue, Fifo))
    assert len(fair.of("light")) > 150
    assert quantile(fair.waits("light"), 0.99) < quantile(fifo.waits("light"), 0.99) / 20
    # and nothing is lost: the slots are as busy
    assert fair.busy_seconds == pytest.approx(fifo.busy_seconds, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_with_estimates_that_are_wrong_the_shares_come_right_all_the_same(seed: int):
    tenants = [
        Tenant(name="bounds nothing", work=up_to(20.0), backlog=30, estimate=lambda rng: rng.uniform(1.0, 20.0)),
        Tenant(name="says one", work=up_to(20.0), backlog=30, estimate=lambda _: 0.0),
        Tenant(name="knows", work=up_to(20.0), backlog=30),
    ]
    run = simulate(line(4), tenants, slots=4, until=3000.0, seed=seed)
    served = [run.served(tenant.name) for tenant in tenants]
    assert max(served) - min(served) < 4 * 20.0 * 20.0  # the greatest error of what is under way
    assert min(served) > 0.3 * sum(served)


@pytest.mark.parametrize("seed", range(3))
def test_a_band_gets_nothing_while_a_higher_one_waits(seed: int):
    queue = line(2)
    tenants = [
        Tenant(name="interactive", priority=10, work=exponential(1.0), rate=1.0, bursts=[(50.0, 40)]),
        Tenant(name="batch", priority=-1, work=exponential(1.0), backlog=20),
    ]

    def began(item: Asked, now: float) -> None:
        assert item.priority == 10 or queue.waiting_by_priority().get(10, 0) == 0

    run = simulate(queue, tenants, slots=2, until=200.0, seed=seed, began=began)
    assert run.served("batch") > 100.0
    assert run.busy_seconds == pytest.approx(400.0, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_overload_sheds_the_sheddable_and_keeps_the_promise_to_the_others(seed: int):
    tenants = [
        Tenant(name="standard", work=exponential(1.0), rate=3.0),
        Tenant(name="batch", priority=-1, work=exponential(1.0), rate=6.0),
    ]
    run = simulate(line(4, max_requests=200, max_wait=60.0, shed_wait=10.0), tenants, slots=4, until=600.0, seed=seed)
    shed = {
        name: sum(len(run.of(name, reason)) for reason in ("predicted-wait", "queue-full", "evicted")) for name in ("standard", "batch")
    }
    assert shed["standard"] == 0 and shed["batch"] > 2000
    assert not run.of("standard", "expired")
    assert quantile(run.waits("batch"), 0.5) < 20.0
    assert run.busy_seconds > 0.99 * 4 * 600.0


PREDICTED = {
    "one tenant": (8, [Tenant(name="a", work=exponential(1.0), rate=7.4)], 0.35),
    "a flood": (8, [Tenant(name="a", work=exponential(1.0), backlog=100), Tenant(name="b", work=exponential(1.0), rate=1.0)], 0.15),
    "ten tenants": (8, [Tenant(name=str(i), work=exponential(1.0), rate=0.76) for i in range(10)], 0.5),
    "two bands": (
        8,
        [Tenant(name="a", priority=1, work=exponential(1.0), rate=4.0), Tenant(name="b", work=exponential(1.0), rate=3.5)],
        0.5,
    ),
    "estimates up to ten times too high": (
        8,
        [Tenant(name=str(i), work=exponential(1.0), rate=0.76, estimate=lambda rng: rng.uniform(1.0, 10.0)) for i in range(10)],
        0.65,
    ),
}


def errors_of(run: Run) -> list[float]:
    waited = [item for item in run.asked if item.outcome == "served" and item.waited > 0.0 and item.arrived > 20.0]
    return [abs(item.predicted - item.waited) / item.waited for item in waited]


@pytest.mark.parametrize("name", PREDICTED)
def test_the_predicted_wait_is_honest(name: str):
    """docs/queueing.md says how far off it is."""
    slots, tenants, most = PREDICTED[name]
    errors = [median(errors_of(simulate(line(slots), tenants, slots=slots, until=600.0, seed=seed))) for seed in range(3)]
    assert median(errors) < most


# Degradation

STEPS = (
    DegradeStep(wait_above=2.0, max_tokens=512),
    DegradeStep(wait_above=5.0, max_tokens=128, classes=("standard", "batch")),
    DegradeStep(wait_above=5.0, cached=True, classes=("interactive",)),
    DegradeStep(wait_above=20.0, model="small", classes=("batch",)),
)


@pytest.mark.parametrize(
    ("qos_class", "wait", "step"),
    [
        ("standard", 0.0, None),
        ("standard", 2.0, None),
        ("standard", 2.1, STEPS[0]),
        ("standard", 60.0, STEPS[1]),
        ("interactive", 60.0, STEPS[2]),
        ("batch", 19.0, STEPS[1]),
        ("batch", 21.0, STEPS[3]),
    ],
)
def test_the_last_step_that_applies_counts_alone(qos_class: str, wait: float, step: DegradeStep | None):
    assert degradation(STEPS, qos_class, wait) is step


def test_without_steps_nothing_is_degraded():
    assert degradation((), "standard", 1e9) is None
