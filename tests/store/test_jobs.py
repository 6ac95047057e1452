"""Jobs in the store, on SQLite and on a real PostgreSQL."""

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec import structs

from fairlead.core.errors import InvalidRequest, LimitExceeded, NotFound, Unavailable
from fairlead.core.generation import Delta
from fairlead.core.jobs import ENDED, RUNNING, Artifact, JobResult, JobStatus, PackedTensor
from fairlead.store import job_sql, tables
from fairlead.store.job_rows import DeliveryRow, DeliveryState, JobQuery, JobRow, SecretRow
from fairlead.store.jobs import JobStore
from fairlead.store.rows import UsageQuery, UsageRow
from fairlead.store.store import Store
from fairlead.store.transactions import Conflict
from tests.store.postgres import Postgres
from tests.store.test_store import _made_by as made_by

NOW = 1_790_000_000.0
SECONDS = 20.0
_numbers = count()


@pytest.fixture
def jobs(store: Store) -> JobStore:
    return store.jobs


def job(id: str = "", **fields: Any) -> JobRow:
    defaults = {
        "id": id or f"job_{next(_numbers):08x}", "tenant": "acme", "model": "m", "created": NOW, "start_deadline": NOW + 100,
        "total_deadline": NOW + 200, "max_tries": 3, "retention_seconds": 50.0,
    }  # fmt: skip
    return JobRow(**defaults | fields)


def submit(jobs: JobStore, id: str = "", *, data: bytes = b"", now: float = NOW, tenant_queued: int = 100, **fields: Any) -> JobRow:
    row, new = jobs.submit(job(id, **fields), data, tenant_queued=tenant_queued, now=now)
    assert new
    return row


def lease(
    jobs: JobStore, limit: int = 1, runner: str = "r", *, models: tuple[str, ...] = ("m",), now: float = NOW, most: int = 24
) -> list[str]:
    return [row.id for row, _ in jobs.lease(runner, models, limit, now=now, lease_seconds=SECONDS, tenant_active=most)]


def end(jobs: JobStore, id: str, runner: str = "r", status: JobStatus = JobStatus.COMPLETE, **fields: Any) -> JobRow | None:
    return jobs.end(id, runner, **{"status": status, "now": NOW + 9, **fields})


def status(jobs: JobStore, id: str) -> JobStatus:
    row = jobs.get(id)
    assert row is not None
    return row.status


def spent(id: str, **fields: Any) -> UsageRow:
    return UsageRow(**{"time": NOW, "request_id": id, "tenant": "acme", "model": "m", "outcome": "success", "cost": 0.5, **fields})


def billed(store: Store) -> Counter[str]:
    return Counter(row.request_id for row in store.records(UsageQuery(), 100_000))


def rows(store: Store, table: sa.Table) -> int:
    with store._engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


# A job's life


def test_a_job_is_submitted_leased_ended_and_comes_back_with_all_that_it_was_given(store: Store, jobs: JobStore) -> None:
    wish = job(
        project="app", key="k1", qos_class="batch", priority=-3, version="7", kind="paint", face="bfl", metadata={"a": ["ü\0", None, 1.5]},
        webhook="https://example.com/hook", webhook_events=("complete",), webhook_secret="s", address="::1", request_id="r1",
        not_before=NOW - 1,
    )  # fmt: skip
    assert jobs.submit(wish, b"\0what", tenant_queued=1, now=NOW) == (wish, True)
    assert (jobs.get(wish.id), jobs.get(wish.id, "acme"), jobs.data(wish.id)) == (wish, wish, b"\0what")

    ((active, data),) = jobs.lease("r", ["m"], 5, now=NOW + 2, lease_seconds=SECONDS, tenant_active=1)
    begun = structs.replace(wish, status=JobStatus.ACTIVE, started=NOW + 2, tries=1, runner="r", lease_until=NOW + 22, revision=1)
    assert (active, data, jobs.get(wish.id)) == (begun, b"\0what", begun)

    result = JobResult(
        artifacts=(Artifact(key="x", content_type="image/png", num_bytes=5, sha256="00", seed=1 << 60),),
        choices=(Delta(text="ü"),),
        outputs=(PackedTensor("y", "FP32", (1,), b"\0\0\0\0"),),
        version="7",
    )
    done = jobs.end(wish.id, "r", status=JobStatus.COMPLETE, result=result, cost=0.25, usage=[spent("r1")], now=NOW + 5)
    ended = structs.replace(
        begun, status=JobStatus.COMPLETE, result=result, cost=0.25, ended=NOW + 5, expires=NOW + 55, runner="", lease_until=0.0, revision=2
    )
    assert (done, jobs.get(wish.id)) == (ended, ended)
    assert billed(store) == {"r1": 1}


def test_a_large_input_and_a_large_result_are_kept_whole(jobs: JobStore) -> None:
    large = bytes(range(256)) * 4096
    row = submit(jobs, data=large)
    lease(jobs)
    assert jobs.data(row.id) == large
    end(jobs, row.id, result=JobResult(raw=large))
    assert jobs.get(row.id) == jobs.cancel(row.id, "acme", NOW)
    (whole,) = jobs.list(JobQuery(whole=True))
    assert whole.result == JobResult(raw=large)


def test_another_tenants_job_is_not_there(jobs: JobStore) -> None:
    row = submit(jobs)
    assert (jobs.get(row.id, "other"), jobs.cancel(row.id, "other", NOW), jobs.get("job_unknown")) == (None, None, None)
    assert status(jobs, row.id) == JobStatus.QUEUED
    with pytest.raises(NotFound):
        jobs.data("job_unknown")


@pytest.mark.parametrize("bad", [{"model": "a\0b"}, {"model": "\ud800"}, {"priority": 1 << 70}, {"metadata": {"a": "\ud800"}}])
def test_what_the_database_cannot_keep_is_the_callers_mistake_and_harms_nobody_else(
    store: Store, jobs: JobStore, bad: dict[str, Any]
) -> None:
    if store._engine.dialect.name == "sqlite" and "\0" in str(bad.get("model")):
        pytest.skip("SQLite keeps it")
    with pytest.raises(InvalidRequest, match="cannot keep"):
        submit(jobs, **bad)
    assert rows(store, tables.jobs) == rows(store, tables.job_inputs) == 0


def test_one_bad_job_of_many_at_once_fails_alone(store: Store, jobs: JobStore) -> None:
    def one(number: int) -> bool:
        try:
            submit(jobs, model="\ud800" if number % 10 == 3 else "m")
        except InvalidRequest:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        assert Counter(threads.map(one, range(100))) == {True: 90, False: 10}
    assert rows(store, tables.jobs) == 90


def test_what_a_model_says_of_its_failure_is_kept_whatever_is_in_it(jobs: JobStore) -> None:
    row = submit(jobs)
    lease(jobs)
    end(jobs, row.id, status=JobStatus.FAILED, reason="model-error", message="bad \0 and \ud800!")
    found = jobs.get(row.id)
    assert found is not None and (found.reason, found.message) == ("model-error", "bad  and ?!")


# The table of states


def queued(jobs: JobStore) -> str:
    return submit(jobs).id


def active(jobs: JobStore) -> str:
    row = submit(jobs)
    assert lease(jobs) == [row.id]
    return row.id


def aborting(jobs: JobStore) -> str:
    id = active(jobs)
    jobs.cancel(id, "acme", NOW)
    return id


def over(jobs: JobStore, how: JobStatus) -> str:
    id = active(jobs)
    end(jobs, id, status=how)
    return id


def no_wait(tries: int) -> float:
    return 1.0


STATES: dict[str, Callable[[JobStore], str]] = {
    "queued": queued, "active": active, "aborting": aborting, "aborted": partial(over, how=JobStatus.ABORTED),
    "failed": partial(over, how=JobStatus.FAILED), "complete": partial(over, how=JobStatus.COMPLETE),
}  # fmt: skip
ACTS: dict[str, Callable[[JobStore, str], object]] = {
    "lease": lambda jobs, id: lease(jobs),
    "end": end,
    "a stranger's end": lambda jobs, id: end(jobs, id, "stranger"),
    "again": lambda jobs, id: jobs.again(id, "r", not_before=NOW, counted=True, now=NOW),
    "a stranger's again": lambda jobs, id: jobs.again(id, "stranger", not_before=NOW, counted=True, now=NOW),
    "cancel": lambda jobs, id: jobs.cancel(id, "acme", NOW),
    "sweep at once": lambda jobs, id: jobs.sweep(NOW, no_wait),
    "sweep after the lease": lambda jobs, id: jobs.sweep(NOW + 21, no_wait),
    "sweep after the start": lambda jobs, id: jobs.sweep(NOW + 150, no_wait),
    "sweep after all": lambda jobs, id: jobs.sweep(NOW + 200, no_wait),
}
BECOMES: dict[tuple[str, str], tuple[str, str]] = {
    ("queued", "lease"): ("active", ""),
    ("queued", "cancel"): ("aborted", "cancelled"),
    ("queued", "sweep after the start"): ("aborted", "expired"),
    ("queued", "sweep after all"): ("aborted", "expired"),
    ("active", "end"): ("complete", ""),
    ("active", "again"): ("queued", ""),
    ("active", "cancel"): ("aborting", ""),
    ("active", "sweep after the lease"): ("queued", ""),
    ("active", "sweep after the start"): ("queued", ""),
    ("active", "sweep after all"): ("failed", "timeout"),
    ("aborting", "end"): ("complete", ""),
    ("aborting", "again"): ("aborted", "cancelled"),
    ("aborting", "sweep after the lease"): ("aborted", "cancelled"),
    ("aborting", "sweep after the start"): ("aborted", "cancelled"),
    ("aborting", "sweep after all"): ("aborted", "cancelled"),
}
"""All others leave a job as it is."""


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("state", STATES)
def test_every_act_in_every_state(jobs: JobStore, state: str, act: str) -> None:
    id = STATES[state](jobs)
    before = jobs.get(id)
    assert before is not None and before.status == state
    ACTS[act](jobs, id)
    after = jobs.get(id)
    assert after is not None
    became = BECOMES.get((state, act))
    if became is None:
        assert after == before
    else:
        assert ((after.status, after.reason), after.revision) == (became, before.revision + 1)
        assert (after.status in ENDED) == (after.ended is not None) == (after.expires is not None)
        assert (after.status in RUNNING) == (after.runner == "r")


# Leasing


def test_the_highest_priority_goes_first_then_the_oldest(jobs: JobStore) -> None:
    low, first, second = submit(jobs, priority=-1), submit(jobs), submit(jobs)
    high = submit(jobs, priority=10)
    assert [jobs.position(row) for row in (high, first, second, low)] == [0, 1, 2, 3]
    assert lease(jobs, 3) == [high.id, first.id, second.id]
    assert lease(jobs, 3) == [low.id]


def test_a_runner_gets_only_jobs_of_its_models_that_are_due(jobs: JobStore) -> None:
    submit(jobs, model="other")
    later = submit(jobs, not_before=NOW + 5)
    assert not jobs.waiting(["m"], NOW) and jobs.waiting(["m"], NOW + 5) and jobs.waiting(["m", "other"], NOW)
    assert lease(jobs, 5) == [] == lease(jobs, 5, models=())
    assert lease(jobs, 5, now=NOW + 5) == [later.id]


def test_tenants_take_turns_and_none_runs_more_than_its_share(jobs: JobStore) -> None:
    greedy = [submit(jobs, tenant="greedy").id for _ in range(10)]
    modest = [submit(jobs, tenant="modest").id for _ in range(2)]
    assert lease(jobs, 2, most=3) == [greedy[0], modest[0]]
    assert lease(jobs, 9, most=3) == [greedy[1], modest[1], greedy[2]]
    assert lease(jobs, 9, most=3) == []
    end(jobs, greedy[0])
    assert lease(jobs, 9, most=3) == [greedy[3]]


def test_a_tenant_that_floods_does_not_starve_the_others(jobs: JobStore) -> None:
    flood = [submit(jobs, tenant="flood", model=f"m{number % 3}").id for number in range(90)]
    late = [submit(jobs, tenant=f"t{number}").id for number in range(20)]
    models = ("m", "m0", "m1", "m2")
    assert lease(jobs, 22, models=models) == [flood[0], *late, flood[1]]


def test_a_tenants_priorities_count_together(jobs: JobStore) -> None:
    a = [submit(jobs, tenant="a", priority=1).id, submit(jobs, tenant="a").id]
    b = [submit(jobs, tenant="b").id, submit(jobs, tenant="b").id]
    assert lease(jobs, 4) == [a[0], b[0], a[1], b[1]]


def test_what_a_tenant_gets_at_a_high_priority_counts_at_a_low_one(jobs: JobStore) -> None:
    """However few are asked for at once: the place that `a` would have had at the low priority is given to `b`."""
    low_a, low_b = submit(jobs, tenant="a"), submit(jobs, tenant="b")
    high_a = submit(jobs, tenant="a", priority=1)
    assert lease(jobs, 2) == [high_a.id, low_b.id]
    assert lease(jobs, 2) == [low_a.id]


def test_many_threads_never_get_the_same_job_nor_exceed_a_tenants_share(store: Store, jobs: JobStore) -> None:
    for number in range(120):
        submit(jobs, tenant=f"t{number % 3}", tenant_queued=1000)
    most = 7

    def work(name: int) -> list[str]:
        had: list[str] = []
        while got := lease(jobs, 5, f"r{name}", most=most):
            running = Counter(row.tenant for row in jobs.list(JobQuery(statuses=tuple(RUNNING), limit=1000)))
            assert max(running.values()) <= most
            for id in got:
                assert end(jobs, id, f"r{name}") is not None
            had += got
        return had

    with ThreadPoolExecutor(8) as threads:
        had = [id for each in threads.map(work, range(8)) for id in each]
    assert len(had) == len(set(had))
    # Whoever found the shares used up went home, so that some may be left.
    assert len(had) + len(lease(jobs, 200, most=200)) == 120


# Heartbeats, lost leases


def test_a_beat_keeps_jobs_and_tells_how_far_they_are(jobs: JobStore) -> None:
    ids = [active(jobs) for _ in range(3)]
    held = jobs.beat("r", {ids[0]: (3, 20, b"\0picture")}, ids, now=NOW + 15, lease_seconds=SECONDS)
    assert held == dict.fromkeys(ids, JobStatus.ACTIVE)
    assert jobs.sweep(NOW + 30, no_wait) == ()
    row = jobs.get(ids[0])
    assert row is not None
    assert (row.step, row.num_steps, row.preview, row.lease_until) == (3, 20, b"\0picture", NOW + 35)
    assert jobs.revisions([*ids, "job_unknown"]) == {ids[0]: 2, ids[1]: 1, ids[2]: 1}

    jobs.beat("r", {ids[0]: (4, 20, None)}, ids, now=NOW + 16, lease_seconds=SECONDS)
    jobs.cancel(ids[0], "acme", NOW)
    row = jobs.get(ids[0])
    assert row is not None and (row.step, row.preview, row.status) == (4, b"\0picture", JobStatus.ABORTING)
    end(jobs, ids[0])
    row = jobs.get(ids[0])
    assert row is not None and (row.step, row.preview) == (20, b""), "who is complete has done all its steps"


def test_a_beat_tells_which_jobs_are_to_be_stopped_and_which_are_gone(jobs: JobStore) -> None:
    kept, cancelled, lost, done = (active(jobs) for _ in range(4))
    jobs.cancel(cancelled, "acme", NOW)
    end(jobs, done)
    jobs.again(lost, "r", not_before=NOW, counted=True, now=NOW)
    assert lease(jobs, runner="other") == [lost]
    steps = dict.fromkeys((lost, done), (1, 2, b""))
    held = jobs.beat("r", steps, [kept, cancelled, lost, done, "job_unknown"], now=NOW, lease_seconds=SECONDS)
    assert held == {kept: JobStatus.ACTIVE, cancelled: JobStatus.ABORTING}
    found = jobs.get(lost)
    assert found is not None and (found.runner, found.step) == ("other", 0)
    assert jobs.beat("r", {}, [], now=NOW, lease_seconds=SECONDS) == {}


def test_a_lost_lease_is_given_again_after_a_while_until_the_tries_are_used_up(store: Store, jobs: JobStore) -> None:
    row = submit(jobs, max_tries=2, webhook="http://example.com")
    assert lease(jobs, runner="first") == [row.id]
    (lost,) = jobs.sweep(NOW + 21, lambda tries: tries * 10.0)
    assert (lost.status, lost.not_before, lost.tries, lost.started) == (JobStatus.QUEUED, NOW + 31, 1, NOW)
    assert lease(jobs, now=NOW + 30) == []
    assert lease(jobs, runner="second", now=NOW + 31) == [row.id]
    # The first one comes back from the dead.
    assert end(jobs, row.id, "first", usage=[spent("first")]) is None
    (failed,) = jobs.sweep(NOW + 60, no_wait)
    assert (failed.status, failed.reason, failed.tries) == (JobStatus.FAILED, "replica-died", 2)
    assert end(jobs, row.id, "second", usage=[spent("second")]) is None
    assert billed(store) == {}
    assert [call.event for call in jobs.deliveries(row.id, "acme")] == ["failed"]


def test_waiting_for_a_limit_is_no_try_and_no_start(jobs: JobStore) -> None:
    id = active(jobs)
    jobs.beat("r", {id: (3, 20, b"p")}, [id], now=NOW, lease_seconds=SECONDS)
    row = jobs.again(id, "r", not_before=NOW + 5, counted=False, message="limited", now=NOW + 1)
    assert row == jobs.get(id)
    assert row is not None
    assert (row.tries, row.started, row.not_before, row.message, row.step, row.preview) == (0, None, NOW + 5, "limited", 0, b"")
    assert lease(jobs, now=NOW + 5) == [id]
    row = jobs.again(id, "r", not_before=NOW + 9, counted=True, now=NOW + 6)
    assert row is not None and (row.tries, row.started) == (1, NOW + 5)
    # It has started, so that only the total deadline holds.
    assert jobs.sweep(NOW + 150, no_wait) == ()
    assert [(row.status, row.reason) for row in jobs.sweep(NOW + 200, no_wait)] == [(JobStatus.FAILED, "timeout")]


def test_sweeping_at_the_same_time_changes_each_job_once(jobs: JobStore) -> None:
    ids = {submit(jobs).id for _ in range(60)}
    assert set(lease(jobs, 60, most=100)) == ids
    with ThreadPoolExecutor(6) as threads:
        swept = list(threads.map(lambda _: jobs.sweep(NOW + 21, no_wait), range(6)))
    assert Counter(row.id for each in swept for row in each) == dict.fromkeys(ids, 1)


# Idempotency and the queue's bound


def test_the_same_key_and_request_give_the_same_job(store: Store, jobs: JobStore) -> None:
    first, again = job(), job()
    assert jobs.submit(first, b"a", idempotency=("k", "d"), tenant_queued=1, now=NOW) == (first, True)
    lease(jobs)
    submit(jobs, tenant="filler", tenant_queued=1)
    found, new = jobs.submit(again, b"b", idempotency=("k", "d"), tenant_queued=1, now=NOW)
    assert (found, new) == (jobs.get(first.id), False)
    assert (jobs.get(again.id), found.status, rows(store, tables.job_inputs)) == (None, JobStatus.ACTIVE, 2)
    with pytest.raises(Conflict, match="another request"):
        jobs.submit(again, b"b", idempotency=("k", "other"), tenant_queued=1, now=NOW)
    # Another tenant's key is another key.
    assert jobs.submit(job(tenant="other"), b"", idempotency=("k", "other"), tenant_queued=1, now=NOW)[1]


def test_a_key_is_forgotten_with_time_and_with_its_job(store: Store, jobs: JobStore) -> None:
    keyed = partial(jobs.submit, data=b"", tenant_queued=9)
    first, second, third = job(), job(), job()
    assert keyed(first, idempotency=("k", "1"), idempotency_seconds=5.0, now=NOW)[1]
    assert not keyed(second, idempotency=("k", "1"), idempotency_seconds=5.0, now=NOW + 4.9)[1]
    assert keyed(second, idempotency=("k", "2"), idempotency_seconds=500.0, now=NOW + 5)[1]
    assert not keyed(third, idempotency=("k", "2"), now=NOW + 6)[1]
    jobs.cancel(second.id, None, NOW + 6)
    assert jobs.purge(NOW + 56, 10) == (second.id,)
    assert keyed(third, idempotency=("k", "3"), now=NOW + 57)[1]
    assert rows(store, tables.idempotency) == 1


def test_the_same_key_at_the_same_moment_makes_one_job(store: Store, jobs: JobStore, url: str) -> None:
    other = Store.open(url)

    def one(number: int) -> tuple[str, bool]:
        row, new = (jobs, other.jobs)[number % 2].submit(job(), b"", idempotency=("k", "d"), tenant_queued=100, now=NOW)
        return row.id, new

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(one, range(60)))
    assert len({id for id, _ in answers}) == 1
    assert sum(new for _, new in answers) == 1 == rows(store, tables.jobs)
    other.close()


def test_a_tenants_line_is_bounded_whoever_submits_at_once(store: Store, jobs: JobStore, url: str) -> None:
    other = Store.open(url)

    def one(number: int) -> str:
        try:
            submit((jobs, other.jobs)[number % 2], tenant_queued=25)
        except LimitExceeded as error:
            return error.reason
        return "ok"

    with ThreadPoolExecutor(16) as threads:
        assert Counter(threads.map(one, range(80))) == {"ok": 25, "queued-jobs": 55}
    submit(jobs, tenant="other", tenant_queued=25)
    lease(jobs)
    submit(jobs, tenant_queued=25)
    other.close()


# Lists


def test_jobs_are_listed_from_the_newest_on_page_by_page_without_what_is_large(jobs: JobStore) -> None:
    made = [submit(jobs, model="ab"[number % 2]) for number in range(7)]
    submit(jobs, tenant="other")
    assert lease(jobs, 2, models=("a",)) == [made[0].id, made[2].id]
    end(jobs, made[0].id, result=JobResult(raw=b"x"))
    seen, before = [], None
    while page := jobs.list(JobQuery(tenant="acme", before=before, limit=3)):
        seen += [row.id for row in page]
        before = page[-1].id
    assert seen == [row.id for row in reversed(made)]
    (done,) = jobs.list(JobQuery(statuses=(JobStatus.COMPLETE,)))
    assert (done.id, done.result) == (made[0].id, None)
    found = jobs.list(JobQuery(tenant="acme", statuses=(JobStatus.QUEUED, JobStatus.ACTIVE), model="a"))
    assert [row.id for row in found] == [made[6].id, made[4].id, made[2].id]


def test_the_place_in_a_long_line_is_counted_no_further_than_it_matters(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairlead.store.jobs.MAX_POSITION", 3)
    made = [submit(jobs) for _ in range(6)]
    assert [jobs.position(row) for row in made] == [0, 1, 2, 3, 3, 3]
    assert jobs.position(structs.replace(made[5], status=JobStatus.ACTIVE)) == 0


# Webhooks


def test_calls_are_made_for_the_statuses_that_were_asked_for(jobs: JobStore) -> None:
    every, some, none = submit(jobs, webhook="u"), submit(jobs, webhook="u", webhook_events=("active", "failed")), submit(jobs)
    assert set(lease(jobs, 3)) == {every.id, some.id, none.id}
    for row in (every, some, none):
        end(jobs, row.id, status=JobStatus.FAILED)
    events = {row.id: [call.event for call in jobs.deliveries(row.id, "acme")] for row in (every, some, none)}
    assert events == {every.id: ["failed"], some.id: ["active", "failed"], none.id: []}
    assert jobs.deliveries(every.id, "other") == ()


def test_a_job_that_starts_twice_is_told_of_once(jobs: JobStore) -> None:
    row = submit(jobs, webhook="u", webhook_events=("active",))
    lease(jobs)
    jobs.again(row.id, "r", not_before=NOW, counted=False, now=NOW)
    lease(jobs)
    assert len(jobs.deliveries(row.id, None)) == 1


def called(jobs: JobStore, **fields: Any) -> DeliveryRow:
    row = submit(jobs, webhook="http://example.com/hook", webhook_secret="s", face="bfl", **fields)
    jobs.cancel(row.id, None, NOW)
    (call,) = jobs.deliveries(row.id, None)
    return call


def test_a_delivery_is_tried_put_off_and_delivered(jobs: JobStore) -> None:
    call = called(jobs)
    assert (call.event, call.face, call.secret, call.tries, call.state) == ("aborted", "bfl", "s", 0, DeliveryState.PENDING)
    due = partial(jobs.due, limit=5, lease_seconds=SECONDS)
    (first,) = due("a", now=NOW)
    assert (first.tries, first.runner, due("b", now=NOW)) == (1, "a", ())
    assert jobs.put_off(call.id, "a", next_at=NOW + 5, status=503, error="busy\0", body="{}")
    assert due("b", now=NOW + 4) == ()
    (second,) = due("b", now=NOW + 5)
    assert (second.tries, second.body, second.last_status, second.last_error) == (2, "{}", 503, "busy")
    # The first one comes late.
    assert not jobs.gave_up(call.id, "a", status=None, error="", body=None, now=NOW)
    assert jobs.delivered(call.id, "b", status=204, body="{}", now=NOW + 6)
    (done,) = jobs.deliveries(call.job, None)
    assert (done.state, done.last_status, done.last_error, done.ended) == (DeliveryState.DELIVERED, 204, "", NOW + 6)
    assert due("b", now=NOW + 99) == ()


def test_a_delivery_whose_sender_died_is_given_to_another(jobs: JobStore) -> None:
    call = called(jobs)
    jobs.due("a", 5, now=NOW, lease_seconds=SECONDS)
    (again,) = jobs.due("b", 5, now=NOW + SECONDS, lease_seconds=SECONDS)
    assert (again.id, again.tries) == (call.id, 2)


def test_a_delivery_that_failed_can_be_replayed_by_its_tenant(jobs: JobStore) -> None:
    call = called(jobs)
    jobs.due("a", 5, now=NOW, lease_seconds=SECONDS)
    assert jobs.gave_up(call.id, "a", status=None, error="no route", body="{}", now=NOW + 1)
    assert jobs.replay(call.id, "other", NOW + 2) is None
    replayed = jobs.replay(call.id, "acme", NOW + 2)
    assert replayed is not None
    assert (replayed.state, replayed.tries, replayed.ended, replayed.body) == (DeliveryState.PENDING, 0, None, "{}")
    assert [each.id for each in jobs.due("a", 5, now=NOW + 2, lease_seconds=SECONDS)] == [call.id]


def test_no_two_senders_get_the_same_delivery(jobs: JobStore) -> None:
    calls = {called(jobs).id for _ in range(40)}
    with ThreadPoolExecutor(6) as threads:
        got = list(threads.map(lambda name: jobs.due(f"s{name}", 10, now=NOW, lease_seconds=SECONDS), range(6)))
    had = [row.id for each in got for row in each]
    had += [row.id for row in jobs.due("last", 100, now=NOW, lease_seconds=SECONDS)]
    assert Counter(had) == dict.fromkeys(calls, 1)


# Purge


def test_purging_removes_what_has_expired_and_all_that_belongs_to_it(store: Store, jobs: JobStore) -> None:
    kept, fresh = submit(jobs), submit(jobs)
    old = [jobs.submit(job(webhook="u"), b"x", idempotency=(f"k{n}", "d"), tenant_queued=99, now=NOW)[0].id for n in range(5)]
    for id in old:
        jobs.cancel(id, None, NOW)
    jobs.cancel(fresh.id, None, NOW + 10)
    jobs.due("s", 2, now=NOW, lease_seconds=SECONDS)
    assert jobs.purge(NOW + 49, 10) == ()
    first = jobs.purge(NOW + 50, 3)
    assert len(first) == 3
    assert set(first) | set(jobs.purge(NOW + 50, 3)) == set(old)
    assert {row.id for row in jobs.list(JobQuery())} == {kept.id, fresh.id}
    assert (rows(store, tables.job_inputs), rows(store, tables.idempotency), rows(store, tables.jobs)) == (2, 0, 2)
    # Calls that are under way are not forgotten with their job, only when they ended long ago.
    (call,) = jobs.deliveries(old[0], None)
    jobs.due("a", 9, now=NOW + 60, lease_seconds=SECONDS)
    assert jobs.delivered(call.id, "a", status=200, body="", now=NOW + 60)
    jobs.purge(NOW + 159, 10, log_seconds=100)
    assert rows(store, tables.deliveries) == 5
    jobs.purge(NOW + 160, 10, log_seconds=100)
    assert rows(store, tables.deliveries) == 4


# Secrets


def test_the_first_secret_wins_and_one_that_is_replaced_lives_on_for_a_while(store: Store, jobs: JobStore) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: jobs.put_secret("webhook", "acme", f"s{number}", NOW), range(16)))
    (first,) = set(found)
    assert len(first) == 1
    (old,) = first
    newer = SecretRow(name="webhook", tenant="acme", value="new", created=NOW + 1)
    replaced = structs.replace(old, expires=NOW + 100)
    assert jobs.rotate("webhook", "acme", "new", expires_old=NOW + 100, now=NOW + 1) == (newer, replaced)
    newest = SecretRow(name="webhook", tenant="acme", value="newest", created=NOW + 2)
    # Never makes an older one live longer.
    expected = (newest, structs.replace(newer, expires=NOW + 200), replaced)
    assert jobs.rotate("webhook", "acme", "newest", expires_old=NOW + 200, now=NOW + 2) == expected
    assert [row.value for row in jobs.secrets("webhook", "acme", NOW + 100)] == ["newest", "new"]
    assert jobs.secrets("webhook", "other", NOW) == () == jobs.secrets("links", "acme", NOW)
    jobs.purge(NOW + 200, 1)
    assert rows(store, tables.secrets) == 1


# Being told


def test_changes_are_heard_of_by_other_processes(postgres: Postgres) -> None:
    store, other = Store.open(url := postgres.new_database()), Store.open(url)
    heard: list[str] = []
    arrived, stop = threading.Condition(), threading.Event()

    def hear(id: str) -> None:
        with arrived:
            heard.append(id)
            arrived.notify_all()

    def expect(ids: list[str]) -> None:
        with arrived:
            assert arrived.wait_for(lambda: heard == ids, timeout=20), heard
            heard.clear()

    assert other.jobs.notifies
    thread = threading.Thread(target=other.jobs.listen, args=(hear, stop))
    thread.start()
    expect([""])
    row = submit(store.jobs)
    expect([row.id])
    lease(store.jobs)
    expect([row.id])
    store.jobs.beat("r", {row.id: (1, 2, b"")}, [row.id], now=NOW, lease_seconds=SECONDS)
    expect([row.id])
    store.jobs.beat("r", {}, [row.id], now=NOW, lease_seconds=SECONDS)
    store.jobs.cancel(row.id, None, NOW)
    expect([row.id])
    submit(other.jobs)  # which it does not tell itself
    end(store.jobs, row.id)
    expect([row.id])
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    store.close()
    other.close()


def test_a_listener_hears_that_its_connection_is_gone(postgres: Postgres) -> None:
    store = Store.open(postgres.new_database())

    def break_it(_: str) -> None:
        with store._engine.connect() as connection:
            connection.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'")

    with pytest.raises(Unavailable, match="does not answer"):
        store.jobs.listen(break_it, threading.Event())
    store.close()


# Outages


def test_a_full_disk_is_unavailable_and_leaves_nothing_half_written(store: Store, jobs: JobStore) -> None:
    if store._engine.dialect.name != "sqlite":
        pytest.skip("one disk of PostgreSQL's own is not to be had here")
    id = active(jobs)
    with store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    def limit(most: int) -> None:
        @sa.event.listens_for(store._engine, "checkout")
        def full(connection: sqlite3.Connection, *_: Any) -> None:
            connection.execute(f"PRAGMA max_page_count = {most}")

    limit(pages + 2)
    big = bytes(1 << 20)
    for act in (lambda: submit(jobs, data=big), lambda: end(jobs, id, result=JobResult(raw=big), usage=[spent("r")])):
        with pytest.raises(Unavailable, match="full"):
            act()
    assert (rows(store, tables.jobs), rows(store, tables.job_inputs), status(jobs, id), billed(store)) == (1, 1, JobStatus.ACTIVE, {})
    limit(1 << 30)
    assert end(jobs, id, result=JobResult(raw=big), usage=[spent("r")]) is not None
    assert billed(store) == {"r": 1}


def test_a_database_that_is_gone_is_unavailable_and_found_again(postgres: Postgres) -> None:
    store = Store.open(postgres.new_database())
    id = active(store.jobs)
    postgres.stop()
    acts: list[Callable[[], object]] = [
        lambda: submit(store.jobs),
        lambda: store.jobs.get(id),
        lambda: lease(store.jobs),
        lambda: end(store.jobs, id),
        lambda: store.jobs.beat("r", {}, [id], now=NOW, lease_seconds=SECONDS),
        lambda: store.jobs.sweep(NOW, no_wait),
    ]
    for act in acts:
        with pytest.raises(Unavailable, match="does not answer"):
            act()
    postgres.start()
    assert end(store.jobs, id) is not None
    store.close()


def test_a_database_from_before_there_were_jobs_gets_them_and_keeps_the_rest(bare_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by("0001", bare_url, monkeypatch)
    store = Store.open(bare_url)
    assert [record.tenant for record in store.records(UsageQuery(), 10)] == ["acme"]
    row = submit(store.jobs)
    lease(store.jobs)
    assert end(store.jobs, row.id, usage=[spent("r")]) is not None
    assert len(store.records(UsageQuery(), 10)) == 2
    store.close()


def test_rows_have_the_columns_of_their_tables() -> None:
    assert set(JobRow.__struct_fields__) == {column.name for column in tables.jobs.c}
    assert set(DeliveryRow.__struct_fields__) == {column.name for column in tables.deliveries.c}
    assert set(SecretRow.__struct_fields__) == {column.name for column in tables.secrets.c}
    assert set(job_sql.CHANGING) < set(job_sql.JOB)


# What there is to do


def test_the_backlog_counts_what_has_not_ended_by_model_and_status(jobs: JobStore) -> None:
    assert jobs.backlog().jobs == {} and jobs.backlog().num_calls == 0
    first = submit(jobs, created=NOW - 50, webhook="https://there.example/")
    submit(jobs, created=NOW - 20)
    submit(jobs, created=NOW - 30, model="other")
    assert lease(jobs) == [first.id]
    assert jobs.backlog().jobs == {("m", "active"): (1, NOW - 50), ("m", "queued"): (1, NOW - 20), ("other", "queued"): (1, NOW - 30)}
    end(jobs, first.id)
    assert jobs.backlog().jobs.keys() == {("m", "queued"), ("other", "queued")}
    assert jobs.backlog().num_calls == 1
