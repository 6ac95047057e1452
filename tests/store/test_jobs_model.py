"""Whatever is done to jobs in whatever order, the store and a few lines of plain Python agree."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec import Struct

from fairlead.core.errors import LimitExceeded
from fairlead.core.jobs import JobStatus
from fairlead.store.job_rows import JobQuery, JobRow
from fairlead.store.rows import UsageQuery, UsageRow
from fairlead.store.transactions import Conflict
from tests.stores import new_store

LEASE, START, TOTAL, KEEP, REMEMBER = 10, 25, 60, 20, 8
MAX_TRIES, TENANT_QUEUED, TENANT_ACTIVE = 2, 4, 2
tenants = st.sampled_from(["a", "b", "c"])
models = st.sampled_from(["m", "n"])
runners = st.sampled_from(["r", "s"])
choices = st.integers(0, 7)


class Known(Struct):
    """A job as the model has it."""

    id: str
    tenant: str
    model: str
    priority: int
    created: float
    status: str = "queued"
    reason: str = ""
    not_before: float = 0.0
    started: float | None = None
    tries: int = 0
    runner: str = ""
    lease_until: float = 0.0
    ended: float | None = None

    def finish(self, status: str, reason: str, now: float) -> None:
        self.status, self.reason, self.ended, self.runner = status, reason, now, ""


class Jobs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = new_store(Path(self.folder.name))
        self.jobs = self.store.jobs
        self.now = 1000.0
        self.known: dict[str, Known] = {}
        self.keys: dict[tuple[str, str], tuple[str, str, float]] = {}
        self.billed: list[str] = []
        self.number = 0

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def pick(self, choice: int, *, running: bool) -> Known | None:
        among = [job for job in self.known.values() if job.runner or not running]
        return among[choice % len(among)] if among else None

    def of(self, status: str, tenant: str | None = None) -> list[Known]:
        return [job for job in self.known.values() if job.status == status and tenant in (None, job.tenant)]

    @initialize()
    def begin(self) -> None:
        for tenant in "aabbc":
            self.submit(tenant, "m", 0, "", "x")
        self.lease("r", {"m"}, 3)

    @rule(seconds=st.sampled_from([0.5, 0.5, 3.0, 11.0, 26.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(tenant=tenants, model=models, priority=st.integers(0, 1), key=st.sampled_from(["", "k"]), digest=st.sampled_from("xy"))
    def submit(self, tenant: str, model: str, priority: int, key: str, digest: str) -> None:
        self.number += 1
        row = JobRow(
            id=f"job_{self.number:04}", tenant=tenant, model=model, priority=priority, created=self.now, start_deadline=self.now + START,
            total_deadline=self.now + TOTAL, max_tries=MAX_TRIES, retention_seconds=KEEP,
        )  # fmt: skip
        earlier = self.keys.get((tenant, key)) if key else None
        if earlier is not None and earlier[2] <= self.now:
            earlier = None
        try:
            told, new = self.jobs.submit(
                row,
                b"",
                idempotency=(key, digest) if key else None,
                idempotency_seconds=REMEMBER,
                tenant_queued=TENANT_QUEUED,
                now=self.now,
            )
        except Conflict:
            assert earlier is not None and earlier[0] != digest
            return
        except LimitExceeded:
            assert earlier is None and len(self.of("queued", tenant)) >= TENANT_QUEUED
            return
        if earlier is not None:
            assert (told.id, new) == (earlier[1], False) and earlier[0] == digest
            return
        assert new and len(self.of("queued", tenant)) < TENANT_QUEUED
        self.known[row.id] = Known(row.id, tenant, model, priority, self.now)
        if key:
            self.keys[tenant, key] = (digest, row.id, self.now + REMEMBER)

    @rule(runner=runners, asked=st.sets(models), limit=st.integers(1, 4))
    def lease(self, runner: str, asked: set[str], limit: int) -> None:
        got = self.jobs.lease(runner, sorted(asked), limit, now=self.now, lease_seconds=LEASE, tenant_active=TENANT_ACTIVE)
        expected: list[str] = []
        while len(expected) < limit:
            running = {name: len(self.of("active", name)) + len(self.of("aborting", name)) for name in "abc"}
            line = [
                job
                for job in self.of("queued")
                if job.model in asked and job.not_before <= self.now and running[job.tenant] < TENANT_ACTIVE
            ]
            if not line:
                break
            job = min(line, key=lambda job: (-job.priority, running[job.tenant], job.id))
            job.status, job.runner, job.lease_until, job.tries = "active", runner, self.now + LEASE, job.tries + 1
            job.started = self.now if job.started is None else job.started
            expected.append(job.id)
        assert [row.id for row, _ in got] == expected

    @rule(
        choice=choices, runner=runners, how=st.sampled_from(["complete", "failed", "aborted"]), running=st.sampled_from([False, True, True])
    )
    def end(self, choice: int, runner: str, how: str, running: bool) -> None:
        job = self.pick(choice, running=running)
        if job is None:
            return
        usage = [UsageRow(time=self.now, request_id=job.id, tenant="t", model="m", outcome="success")]
        told = self.jobs.end(job.id, runner, status=JobStatus(how), usage=usage, now=self.now)
        assert (told is None) == (job.runner != runner)
        if told is not None:
            job.finish(how, "", self.now)
            self.billed.append(job.id)

    @rule(choice=choices, counted=st.booleans(), stranger=st.sampled_from([False, False, False, True]), later=st.sampled_from([0.0, 5.0]))
    def again(self, choice: int, counted: bool, stranger: bool, later: float) -> None:
        job = self.pick(choice, running=True)
        if job is None:
            return
        runner = "stranger" if stranger else job.runner
        told = self.jobs.again(job.id, runner, not_before=self.now + later, counted=counted, now=self.now)
        assert (told is None) == stranger
        if stranger:
            return
        if job.status == "aborting":
            job.finish("aborted", "cancelled", self.now)
        else:
            self.put_back(job, self.now + later, counted)

    def put_back(self, job: Known, not_before: float, counted: bool) -> None:
        job.status, job.runner, job.not_before = "queued", "", not_before
        job.tries -= not counted
        job.started = job.started if job.tries else None

    @rule(choice=choices)
    def cancel(self, choice: int) -> None:
        job = self.pick(choice, running=False)
        if job is None:
            return
        told = self.jobs.cancel(job.id, job.tenant, self.now)
        if job.status == "queued":
            job.finish("aborted", "cancelled", self.now)
        elif job.status == "active":
            job.status = "aborting"
        assert told is not None and told.status == job.status

    @rule(runner=runners)
    def beat(self, runner: str) -> None:
        held = self.jobs.beat(runner, {}, sorted(self.known), now=self.now, lease_seconds=LEASE)
        ours = [job for job in self.known.values() if job.runner == runner]
        assert held == {job.id: job.status for job in ours}
        for job in ours:
            job.lease_until = self.now + LEASE

    @rule()
    def sweep(self) -> None:
        swept = {row.id for row in self.jobs.sweep(self.now, lambda tries: 2.0 * tries)}
        changed = set()
        for job in self.known.values():
            before = (job.status, job.runner)
            over = job.created + TOTAL <= self.now
            lost = bool(job.runner) and job.lease_until < self.now
            if job.status == "aborting" and (lost or over):
                job.finish("aborted", "cancelled", self.now)
            elif job.status == "queued" and job.started is None and job.created + START <= self.now:
                job.finish("aborted", "expired", self.now)
            elif job.status in ("queued", "active") and over:
                job.finish("failed", "timeout", self.now)
            elif job.status == "active" and lost and job.tries >= MAX_TRIES:
                job.finish("failed", "replica-died", self.now)
            elif job.status == "active" and lost:
                self.put_back(job, self.now + 2.0 * job.tries, True)
            if before != (job.status, job.runner):
                changed.add(job.id)
        assert swept == changed

    @rule()
    def purge(self) -> None:
        gone = set(self.jobs.purge(self.now, 100))
        assert gone == {job.id for job in self.known.values() if job.ended is not None and job.ended + KEEP <= self.now}
        self.known = {id: job for id, job in self.known.items() if id not in gone}
        self.keys = {key: value for key, value in self.keys.items() if value[1] not in gone}

    @invariant()
    def they_agree(self) -> None:
        found = {row.id: row for row in self.jobs.list(JobQuery(limit=1000))}
        assert found.keys() == self.known.keys()
        for id, job in self.known.items():
            row: Any = found[id]
            for name in ("tenant", "model", "status", "reason", "started", "tries", "runner", "ended"):
                assert getattr(row, name) == getattr(job, name), (name, row, job)
        assert sorted(row.request_id for row in self.store.records(UsageQuery(), 1000)) == sorted(self.billed)


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
