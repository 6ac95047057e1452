"""The step scheduler of pictures on a virtual clock: one tick is one step."""

import math
import random
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.core.errors import QueueFull
from fairlead.diffusion.scheduler import Row, Scheduler

BUDGET = 100


@dataclass
class Job:
    """A request: `n` pictures of one size."""

    at: int = 0
    tokens: int = 10
    steps: int = 4
    tenant: str = "acme"
    priority: int = 0
    n: int = 1
    deadline: float = math.inf
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


class House:
    """Runs jobs as the engine does. Pictures of one size share a forward."""

    def __init__(self, jobs, *, max_num_seqs=8, budget=BUDGET, max_waiting=1000):
        self.scheduler = Scheduler(max_num_seqs=max_num_seqs, max_batch_tokens=budget, max_waiting=max_waiting)
        self.jobs = sorted(jobs, key=lambda job: job.at)
        self.budget, self.max_num_seqs = budget, max_num_seqs
        self.left: dict[Row, int] = {}
        self.job_of: dict[Row, Job] = {}
        self.served = defaultdict(int)
        self.now = 0
        self._arrivals = list(enumerate(self.jobs))

    def tick(self):
        """One step; the pictures that computed it."""
        scheduler = self.scheduler
        while self._arrivals and self._arrivals[0][1].at <= self.now:
            number, job = self._arrivals.pop(0)
            rows = [
                Row(
                    100 * number + index,
                    number,
                    tenant=job.tenant,
                    shape=job.tokens,
                    priority=job.priority,
                    arrived=job.at,
                    deadline=job.deadline,
                    num_tokens=job.tokens,
                    num_steps=job.steps,
                )
                for index in range(job.n)
            ]
            scheduler.add(rows)
            self.job_of |= dict.fromkeys(rows, job)
        for row in scheduler.expired(self.now):
            scheduler.drop(row)
        had_work = scheduler.has_work
        for row in scheduler.admit():
            if row not in self.left:
                self.left[row] = row.num_steps
                self.job_of[row].starts.append(-1)
                scheduler.encoded(row, group=row.num_tokens, num_tokens=row.num_tokens, num_steps=row.num_steps)
        runnable = list(scheduler._running)
        batch = scheduler.pick()
        assert bool(batch) == had_work
        self.check(batch, runnable)
        scheduler.commit(batch)
        for row in batch:
            job = self.job_of[row]
            self.served[row.tenant] += row.num_tokens
            if self.left[row] == row.num_steps:
                job.starts[job.starts.index(-1)] = self.now
            self.left[row] -= 1
            if not self.left[row]:
                scheduler.done(row)
                scheduler.drop(row)
                job.ends.append(self.now)
        self.now += 1
        return batch

    def check(self, batch, runnable):
        """What holds in every step."""
        tokens = sum(row.num_tokens for row in batch)
        assert len({row.group for row in batch}) <= 1
        assert tokens <= self.budget or len(batch) == 1
        assert len(runnable) <= self.max_num_seqs
        assert len(self.left) - sum(len(job.ends) for job in self.jobs) <= 2 * self.max_num_seqs
        if batch:
            assert batch[0].priority == min(row.priority for row in runnable)
            spare = [row for row in runnable if row not in batch and row.group == batch[0].group]
            assert all(tokens + row.num_tokens > self.budget for row in spare)

    def run(self, ticks=100_000):
        while (self._arrivals or self.scheduler.has_work) and self.now < ticks:
            self.tick()
        return self


JOBS = st.lists(
    st.builds(
        Job,
        at=st.integers(0, 40),
        tokens=st.sampled_from([5, 10, 40, 100, 150]),
        steps=st.integers(1, 12),
        tenant=st.sampled_from("abc"),
        priority=st.integers(0, 2),
        n=st.integers(1, 3),
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None)
@given(JOBS, st.integers(1, 6))
def test_every_picture_is_finished_and_no_step_is_idle_over_the_budget_or_of_two_kinds(jobs, max_num_seqs):
    house = House(jobs, max_num_seqs=max_num_seqs).run()
    assert all(len(job.ends) == job.n for job in jobs)
    last = max(end for job in jobs for end in job.ends)
    assert last <= max(job.at for job in jobs) + sum(job.n * job.steps for job in jobs)
    scheduler = house.scheduler
    assert (scheduler.num_running, scheduler.num_waiting, scheduler._num_displaced) == (0, 0, 0)
    assert (scheduler._tenants._amounts, scheduler._lines, scheduler._num_steps, scheduler._waiting) == ({}, {}, {}, {})


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([5, 10, 40, 150]), st.integers(1, 12)), min_size=2, max_size=4), st.integers(2, 8))
def test_tenants_that_always_have_work_are_computed_equally_to_within_one_step(kinds, max_num_seqs):
    """Whatever the sizes of their pictures: a share is of latent tokens, not of pictures."""
    jobs = [Job(tokens=tokens, steps=steps, tenant=f"t{number}") for number, (tokens, steps) in enumerate(kinds) for _ in range(40)]
    house = House(jobs, max_num_seqs=max(max_num_seqs, len(kinds)))
    quantum = max(BUDGET, *(tokens for tokens, _ in kinds))
    while True:
        house.tick()
        done = defaultdict(int)
        for job in jobs:
            done[job.tenant] += len(job.ends)
        if any(number > 30 for number in done.values()):
            break
        shares = [house.served[f"t{number}"] for number in range(len(kinds))]
        if len({tokens for tokens, _ in kinds}) == len(kinds):  # of one size, the one ahead rides along where there is room
            assert max(shares) - min(shares) <= quantum


@pytest.mark.parametrize("tenant", ["acme", "other"])
@pytest.mark.parametrize("tokens", [10, 60, 150])
@pytest.mark.parametrize("long", [Job(tokens=10, steps=50, n=8), Job(tokens=60, steps=50, n=8), Job(tokens=150, steps=50, n=8)])
def test_a_short_job_behind_a_long_one_begins_within_two_steps(long, tokens, tenant):
    """Whether or not they can share a forward, of one tenant or of two, and with every place taken."""
    short = Job(at=10, tokens=tokens, steps=4, tenant=tenant)
    long = Job(tokens=long.tokens, steps=long.steps, n=long.n)
    House([long, short], max_num_seqs=4).run()
    assert short.starts[0] - short.at <= 1
    assert len(long.ends) == 8


def test_equal_pictures_of_a_tenant_are_finished_in_the_order_in_which_they_came():
    jobs = [Job(at=number, tokens=150, steps=6) for number in range(6)]
    House(jobs).run()
    assert [job.ends[0] for job in jobs] == [5, 11, 17, 23, 29, 35]


def test_no_stream_of_short_jobs_holds_up_a_long_one_for_ever():
    long = Job(tokens=150, steps=30)
    shorts = [Job(at=2 * number, tokens=120, steps=2) for number in range(200)]
    house = House([long, *shorts], max_num_seqs=4).run()
    assert long.ends[0] <= 2 * long.steps + 6
    assert house.now >= 400


def test_a_tenant_that_floods_leaves_the_others_their_half():
    flood = [Job(tokens=50, steps=10, tenant="flood", n=4) for _ in range(50)]
    modest = [Job(at=5 + 20 * number, tokens=40, steps=8, tenant="modest") for number in range(10)]
    House([*flood, *modest], max_num_seqs=8).run()
    waited = [job.starts[0] - job.at for job in modest]
    assert max(waited) <= 2
    assert max(job.ends[0] - job.at for job in modest) <= 2 * 8 + 2


def test_who_was_idle_has_no_claim_to_what_others_computed_meanwhile():
    busy = [Job(tokens=150, steps=100, tenant="busy") for _ in range(3)]
    late = [Job(at=100, tokens=120, steps=50, tenant="late") for _ in range(3)]
    house = House([*busy, *late]).run(140)
    assert abs((house.served["busy"] - 100 * 150) - house.served["late"]) <= 150


def test_who_leaves_and_comes_back_is_not_forgiven():
    """One at a time, a tenant gets no more than its half."""
    steady = [Job(tokens=150, steps=200, tenant="steady")]
    house = House([*steady])
    hopper = []
    for _ in range(100):
        if not hopper or hopper[-1].ends:
            job = Job(at=house.now, tokens=120, steps=1, tenant="hopper")
            hopper.append(job)
            house.jobs.append(job)
            house._arrivals.append((len(house.jobs), job))
        house.tick()
    assert house.served["hopper"] <= house.served["steady"] + 150


def test_a_better_priority_takes_the_next_step_and_the_others_go_on_where_they_were():
    slow = [Job(tokens=150, steps=10, priority=2) for _ in range(2)]
    urgent = Job(at=5, tokens=120, steps=3, priority=1)
    house = House([*slow, urgent], max_num_seqs=2).run()
    assert (urgent.starts, urgent.ends) == ([5], [7])
    assert sorted(end for job in slow for end in job.ends) == [12, 22]
    assert house.scheduler.num_preemptions == 1


def test_what_has_not_begun_in_time_is_given_up_and_what_has_is_not():
    running = Job(tokens=150, steps=10, deadline=3)
    late, patient = Job(tokens=150, steps=12, deadline=5), Job(tokens=150, steps=12, deadline=20)
    House([running, late, patient], max_num_seqs=1).run()
    assert (len(running.ends), len(late.ends), len(patient.ends)) == (1, 0, 1)


def test_so_many_requests_wait_and_no_more():
    scheduler = Scheduler(max_num_seqs=1, max_batch_tokens=BUDGET, max_waiting=2)

    def rows(request, n=3):
        return [
            Row(10 * request + i, request, tenant="", shape=1, priority=0, arrived=0, deadline=math.inf, num_tokens=1, num_steps=1)
            for i in range(n)
        ]

    scheduler.add(first := rows(1))
    scheduler.add(rows(2))
    assert [row.id for row in scheduler.admit()] == [10]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.add(rows(3))
    for row in first:
        scheduler.drop(row)
    scheduler.add(rows(3))
    assert scheduler.num_waiting == 2


def fifo(jobs, *, max_num_seqs=8, budget=BUDGET):
    """What others do: the first in line and those right behind it that fit make a batch, which runs to its end."""
    line = sorted((job for job in jobs for _ in range(job.n)), key=lambda job: job.at)
    now = 0
    while line:
        now = max(now, line[0].at)
        batch = [line.pop(0)]
        while line and line[0].at <= now and line[0].tokens == batch[0].tokens and len(batch) < max_num_seqs:
            if (len(batch) + 1) * line[0].tokens > budget:
                break
            batch.append(line.pop(0))
        for job in batch:
            job.starts.append(now)
            job.ends.append(now + job.steps - 1)
        now += max(job.steps for job in batch)
    return now


@pytest.mark.parametrize("seed", range(10))
def test_against_batches_in_the_order_of_arrival_it_begins_sooner_and_takes_no_longer(seed):
    def workload():
        chance = random.Random(seed)
        return [
            Job(at=chance.randrange(200), tokens=chance.choice([10, 25, 150]), steps=chance.choice([4, 20, 50]), tenant=chance.choice("ab"))
            for _ in range(60)
        ]

    ours, theirs = workload(), workload()
    ticks, their_ticks = House(ours, max_num_seqs=32).run().now, fifo(theirs, max_num_seqs=32)
    wait, their_wait = (fmean(job.starts[0] - job.at for job in jobs) for jobs in (ours, theirs))
    end, their_end = (fmean(job.ends[0] - job.at for job in jobs) for jobs in (ours, theirs))
    assert ticks <= their_ticks
    assert wait < their_wait / 2 and end < their_end
