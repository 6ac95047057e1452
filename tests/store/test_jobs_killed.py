"""Gateways and runners that die at any moment: no job is lost, none is billed twice."""

import multiprocessing
import random
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess

from fairlead.core.jobs import JobResult, JobStatus
from fairlead.store.job_rows import JobQuery, JobRow
from fairlead.store.rows import UsageQuery, UsageRow
from fairlead.store.store import Store

NUM_JOBS = 200
KILLS = 15
SECONDS = 120.0


def wish(number: int) -> JobRow:
    now = time.time()
    return JobRow(
        id=f"job_{time.time_ns():x}_{number}", tenant=f"t{number % 3}", model="m", created=now, start_deadline=now + 1000,
        total_deadline=now + 1000, max_tries=1000, retention_seconds=1000, webhook="http://example.com", metadata={"number": number},
    )  # fmt: skip


def submit_all(url: str) -> None:
    """What a client does that gets no answer: it asks again with the same key."""
    jobs = Store.open(url).jobs
    for number in range(NUM_JOBS):
        jobs.submit(wish(number), b"%d" % number, idempotency=(f"k{number}", "d"), tenant_queued=NUM_JOBS, now=time.time())


def run_for_ever(url: str, name: str) -> None:
    jobs = Store.open(url).jobs
    while True:
        for row, data in jobs.lease(name, ["m"], 4, now=time.time(), lease_seconds=0.0, tenant_active=NUM_JOBS):
            usage = UsageRow(time=time.time(), request_id=data.decode(), tenant=row.tenant, model="m", outcome="success", cost=1.0)
            jobs.end(row.id, name, status=JobStatus.COMPLETE, result=JobResult(raw=data), cost=1.0, usage=[usage], now=time.time())


def test_killed_at_random_no_job_is_lost_and_none_is_billed_twice(url: str) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    store = Store.open(url)
    chance = random.Random(7)

    def gateway() -> ForkServerProcess:
        return server.Process(target=submit_all, args=(url,))

    def runner(number: int) -> ForkServerProcess:
        return server.Process(target=run_for_ever, args=(url, f"r{number}"))

    running = [gateway(), runner(0), runner(1)]
    try:
        for process in running:
            process.start()
        for number in range(KILLS):
            time.sleep(chance.uniform(0.05, 0.3))
            at = number % 3
            running[at].kill()
            running[at].join()
            # Every lease is over at once here: the other runner may still be at work on a job that is given again.
            store.jobs.sweep(time.time(), lambda _: 0.0)
            running[at] = runner(number + 2) if at else gateway()
            running[at].start()
        running[0].join(SECONDS)
        assert running[0].exitcode == 0
        deadline = time.monotonic() + SECONDS
        while len(store.jobs.list(JobQuery(statuses=(JobStatus.COMPLETE,), limit=1000))) < NUM_JOBS:
            assert time.monotonic() < deadline
            store.jobs.sweep(time.time(), lambda _: 0.0)
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.join()
    jobs = store.jobs.list(JobQuery(limit=1000, whole=True))
    assert Counter(row.metadata["number"] for row in jobs) == dict.fromkeys(range(NUM_JOBS), 1)
    assert all(row.result == JobResult(raw=b"%d" % row.metadata["number"]) and row.cost == 1.0 for row in jobs)
    assert Counter(row.request_id for row in store.records(UsageQuery(), 10_000)) == {str(number): 1 for number in range(NUM_JOBS)}
    assert sum(row.cost for row in store.usage(UsageQuery())) == NUM_JOBS
    assert all(len(store.jobs.deliveries(row.id, None)) == 1 for row in jobs)
    store.close()
