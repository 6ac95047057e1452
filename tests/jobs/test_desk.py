"""Jobs are handed in, found again, watched and cancelled: stories at the counter."""

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from fairlead.core.caller import Credentials
from fairlead.core.errors import Forbidden, InvalidRequest, LimitExceeded, NotFound, TooLarge
from fairlead.core.generation import Paint
from fairlead.core.jobs import JobStatus
from fairlead.core.policy import AuthSettings, GatewaySettings
from fairlead.gateway.identity.identity import Identity
from fairlead.gateway.identity.keyring import Keyring
from fairlead.gateway.identity.keys import new_key
from fairlead.jobs.desk import new_id
from fairlead.jobs.stored import unpack
from fairlead.observe.counts import Counts
from fairlead.store.job_rows import JobQuery, JobRow
from fairlead.store.rows import AuditRow, KeyRow, TenantRow
from fairlead.store.transactions import Conflict
from tests.gateway.house import ACME, caller, rows, turns
from tests.jobs.room import Room, Rooms, painted, painting, progress

sqlite_only = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
AUDIT = AuditRow(time=0.0, actor="test", action="test", subject="test")


# Handing in


async def test_ids_sort_by_time_and_are_not_guessed(room: Room) -> None:
    site = room.site(open=False)
    ids = [(await site.submit(painting())).id for _ in range(5)]
    assert len({id[-20:] for id in ids}) == 5 and all(len(id) == len("job_") + 32 for id in ids)
    assert [row.id for row in await site.desk.list(JobQuery(tenant="acme"))] == sorted(ids, reverse=True)


def test_ids_of_one_millisecond_are_in_the_order_they_were_made() -> None:
    times = [1.7e9 + number / 1e5 for number in range(300)]
    assert (ids := [new_id(time) for time in times]) == sorted(ids)
    assert new_id(1.7e9) < new_id(1.7e9 + 0.999) < new_id(1.7e9 + 1.0)


async def test_the_same_key_gives_the_same_job_though_nobody_chose_a_seed(room: Room) -> None:
    site, other = room.site(open=False), room.site(open=False)
    first = await site.submit(painting(), idempotency_key="k")
    again = await other.submit(painting(), idempotency_key="k")
    assert again.id == first.id
    prompt = unpack(room.store.jobs.data(first.id)).prompt
    assert isinstance(prompt, Paint) and prompt.seed is not None
    with pytest.raises(Conflict):
        await site.submit(painting("something else"), idempotency_key="k")
    with pytest.raises(Conflict):
        await site.submit(painting(), idempotency_key="k", webhook="https://example.com/")
    assert (await site.submit(painting(caller=caller("globex")), idempotency_key="k")).id != first.id
    assert (await site.submit(painting())).id != first.id


@sqlite_only
async def test_many_with_one_key_at_once_are_one_job(room: Room) -> None:
    sites = [room.site(open=False), room.site(open=False)]
    jobs = await asyncio.gather(*(sites[number % 2].submit(painting(), idempotency_key="k") for number in range(20)))
    assert len({job.id for job in jobs}) == 1 and len(await sites[0].desk.list(JobQuery())) == 1


@sqlite_only
async def test_a_key_is_remembered_as_long_as_the_server_says(room: Room) -> None:
    site = room.site(open=False, idempotency_seconds=1e-9)
    assert (await site.submit(painting(), idempotency_key="k")).id != (await site.submit(painting(), idempotency_key="k")).id


@sqlite_only
@pytest.mark.parametrize("key", ["k" * 256, "a\nb", "\0"])
async def test_a_key_that_is_none_is_refused(room: Room, key: str) -> None:
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        await room.site(open=False).submit(painting(), idempotency_key=key)


async def test_no_more_may_wait_than_the_server_allows(room: Room) -> None:
    site = room.site(open=False, tenant_queued=2)
    jobs = [await site.submit(painting()) for _ in range(2)]
    with pytest.raises(LimitExceeded) as refused:
        await site.submit(painting())
    assert refused.value.reason == "queued-jobs"
    await site.submit(painting(caller=caller("globex")))
    await site.desk.cancel(jobs[0].id, ACME)
    await site.submit(painting())


@sqlite_only
async def test_what_is_too_large_or_would_be_refused_anyway_is_not_stored(room: Room) -> None:
    site = room.site(open=False, max_input_bytes=1000)
    with pytest.raises(TooLarge, match="max_input_bytes"):
        await site.submit(painting("x" * 2000))
    with pytest.raises(NotFound):
        await site.submit(painting(model="no-such-model"))
    with pytest.raises(InvalidRequest):
        await site.submit(painting(qos_class="no-such-class"))
    assert await site.desk.list(JobQuery()) == ()


@sqlite_only
async def test_nobody_gets_more_time_than_the_server_allows(room: Room) -> None:
    site = room.site(open=False, start_seconds=100.0, total_seconds=200.0, retention_seconds=300.0)
    job = await site.submit(painting(), start_seconds=1e6, total_seconds=50.0, retention_seconds=1e6)
    assert (job.start_deadline - job.created, job.total_deadline - job.created) == pytest.approx((50.0, 50.0))
    assert job.retention_seconds == 300.0


# Looking


async def test_another_tenants_job_is_not_there(room: Room) -> None:
    site = room.site(open=False)
    job, globex = await site.submit(painting()), caller("globex")
    for look in (site.desk.get(job.id, globex), site.desk.cancel(job.id, globex), site.desk.wait(job.id, globex, 0.0)):
        with pytest.raises(NotFound, match="there is no job"):
            await look
    with pytest.raises(NotFound):
        await anext(site.desk.watch(job.id, globex))
    assert (await site.desk.get(job.id, ACME)).status is JobStatus.QUEUED


async def test_the_place_in_the_line(room: Room) -> None:
    site = room.site(open=False)
    jobs = [await site.submit(painting()) for _ in range(3)]
    assert [await site.desk.position(job) for job in jobs] == [0, 1, 2]
    await site.desk.cancel(jobs[0].id, ACME)
    assert await site.desk.position(await site.desk.get(jobs[2].id, ACME)) == 1


async def test_who_waits_gets_the_end_or_what_there_is(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting())
    asked = await room.painter.next()
    assert (await site.desk.wait(job.id, ACME, 0.0)).status is JobStatus.ACTIVE
    waiting = asyncio.get_running_loop().create_task(site.desk.wait(job.id, ACME, 20.0))
    await turns()
    painted(asked)
    assert (await waiting).status is JobStatus.COMPLETE


async def test_a_watcher_hears_of_each_change_once_and_of_the_end(room: Room) -> None:
    site = room.site(open=False)
    job = await site.submit(painting())

    async def watch() -> list[JobRow]:
        return [row async for row in site.desk.watch(job.id, ACME)]

    watching = asyncio.get_running_loop().create_task(watch())
    await turns()
    site.open()
    asked = await room.painter.next()
    for step in (1, 2, 3):
        progress(asked, step)
        await site.when(job, lambda row, step=step: row.step == step)
    painted(asked)
    async with asyncio.timeout(20):
        seen = await watching
    told = [(row.status, row.step) for row in seen]
    assert all(before != after for before, after in pairwise(told))
    assert told[-1][0] is JobStatus.COMPLETE and [row.status for row in seen].count(JobStatus.COMPLETE) == 1
    assert [step for _, step in told if step] == sorted(step for _, step in told if step)
    assert site.changes._waiting == {}


@sqlite_only
async def test_a_watcher_that_leaves_leaves_nothing(room: Room) -> None:
    site = room.site(open=False)
    job = await site.submit(painting())
    watched = site.desk.watch(job.id, ACME)
    await anext(watched)
    await watched.aclose()
    assert site.changes._waiting == {}


# Who


async def identity_of(room: Room) -> Any:
    keyring = Keyring(room.store, GatewaySettings(), Counts())
    room.store.add_tenant(TenantRow(name="acme", policy=None, created=0.0), AUDIT)
    made = new_key()
    key = KeyRow(id=made.id, tenant="acme", digest=made.digest, signing_key=made.signing_key, prefix=made.prefix, created=0.0)
    room.store.add_key(key, AUDIT)
    keyring.refresh()
    return keyring, Identity(AuthSettings(), GatewaySettings(), keyring, Counts(), required=True), made


@pytest.mark.parametrize("meanwhile", ["the key is revoked", "the tenant is disabled"])
async def test_what_was_handed_in_by_somebody_who_may_no_longer_is_not_computed(rooms: Rooms, meanwhile: str) -> None:
    asks: dict[str, Identity] = {}
    room = rooms(callers=lambda row: asks["now"].stored(tenant=row.tenant, project=row.project, key=row.key, address=row.address))
    keyring, asks["now"], made = await identity_of(room)
    site = room.site(open=False)
    who = asks["now"].known(Credentials(authorization=f"Bearer {made.secret}", address="192.0.2.1"), 1.0)
    assert who is not None and who.tenant == "acme"
    job = await site.submit(rows(1.0, caller=who))
    assert (job.key, job.address) == (made.id, "192.0.2.1")
    if meanwhile == "the key is revoked":
        room.store.revoke_key(made.id, AUDIT, force=True)
    else:
        room.store.change_tenant("acme", lambda row: TenantRow(name="acme", policy=None, created=0.0, disabled=True), AUDIT, force=True)
    keyring.refresh()
    row = await site.open().end(job, who)
    assert (row.status, row.reason, row.cost) == (JobStatus.FAILED, "forbidden", 0.0)
    assert room.bills() == []


@sqlite_only
async def test_what_a_caller_may_not_do_is_refused_at_the_counter(room: Room) -> None:
    site = room.site(open=False)
    with pytest.raises(Forbidden):
        await site.submit(painting(caller=caller(classes=("standard",)), priority=1))
