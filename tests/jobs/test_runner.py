"""Jobs from their submission to their end: stories over a real store, a real gateway and models that the test plays."""

import asyncio
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from fairlead.core.caller import Caller
from fairlead.core.errors import Forbidden, InvalidRequest, ModelError, ReplicaDied, Unavailable
from fairlead.core.generation import Delta, Embed, Usage
from fairlead.core.jobs import JobStatus
from fairlead.core.pictures import encode
from fairlead.core.policy import FilterPolicy, GatewaySettings, Limits, ModelPolicy, Price, RoutingSettings, Upstream
from fairlead.core.request import Raw
from fairlead.core.specs import BatchingSpec, Execution, ModelSpec, TensorSpec
from fairlead.runtime.local import LocalInstance
from fairlead.runtime.upstream.fake import Fake, Script
from fairlead.runtime.version import ModelVersion
from fairlead.store.job_rows import JobRow
from tests.gateway.house import ACME, Function, asking, caller, policies, rows, say, tensor_model, texts
from tests.jobs.room import IN_YEARS, MADE, Room, Rooms, painted, painting, picture, progress

PRICED = GatewaySettings(models={"painter": ModelPolicy(price=Price(per_megapixel=4.0))})
sqlite_only = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


# Results


async def test_a_job_is_answered_and_billed_once(rooms: Rooms) -> None:
    room = rooms(PRICED)
    site = room.site()
    job = await site.submit(painting(), metadata={"for": "a friend"})
    assert job.status is JobStatus.QUEUED and job.kind == "paint"
    painted(await room.painter.next())
    row = await site.end(job)
    assert (row.status, row.reason, row.tries, row.metadata) == (JobStatus.COMPLETE, "", 1, {"for": "a friend"})
    assert row.result is not None and row.result.usage == MADE and row.result.version == "1"
    (artifact,) = row.result.artifacts
    assert await whole(room, artifact) == b"picture %d" % (artifact.seed or -1)
    (bill,) = room.bills()
    assert (bill.request_id, bill.tenant, bill.kind, bill.outcome) == (job.id, "acme", "paint", "success")
    assert bill.megapixels == 0.25 and bill.cost == row.cost == 1.0


async def test_pictures_keep_their_order_however_they_come(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting(n=3, seed=7))
    asked = await room.painter.next()
    for index in (2, 0, 1):
        picture(asked, index, usage=MADE if index == 1 else None)
    asked.close(None)
    row = await site.end(job)
    assert row.result is not None and [each.seed for each in row.result.artifacts] == [7, 8, 9]
    assert [await whole(room, each) for each in row.result.artifacts] == [b"picture 7", b"picture 8", b"picture 9"]


async def test_texts_vectors_and_tensors_are_results_too(room: Room) -> None:
    site = room.site()
    chat = await site.submit(say("hello", stream=False))
    asked = await room.house.chat.next()
    asked.respond(delta=Delta(index=1, text="and you", finish_reason="stop"))
    asked.respond(delta=Delta(index=0, text="hello", finish_reason="length", usage=Usage(prompt_tokens=2, completion_tokens=3)))
    asked.close(None)
    row = await site.end(chat)
    assert row.result is not None and [(each.index, each.text, each.finish_reason) for each in row.result.choices] == [
        (0, "hello", "length"),
        (1, "and you", "stop"),
    ]
    assert row.result.usage == Usage(prompt_tokens=2, completion_tokens=3)

    vector = await site.end(await site.submit(asking("chat", prompt=Embed(text="a text"))))
    assert vector.kind == "embed" and vector.result is not None and len(vector.result.choices[0].vector) > 8

    doubled = await site.end(await site.submit(rows(1.5, 2.0)))
    assert doubled.result is not None
    (tensor,) = doubled.result.outputs
    assert (doubled.kind, tensor.name, tensor.datatype, tensor.shape) == ("infer", "y", "FP32", (2, 2))

    shouted = await site.end(await site.submit(texts("hello")))
    assert shouted.result is not None and shouted.result.outputs[0].data == b"\x05\x00\x00\x00HELLO"
    assert [bill.request_id for bill in room.bills()] == [chat.id, vector.id, doubled.id, shouted.id]


@pytest.fixture
async def far() -> Any:
    server = await Fake(Script(chunks=4)).start()
    yield server
    await server.stop()


def elsewhere(far: Fake) -> GatewaySettings:
    return policies(far=ModelPolicy(upstreams=(Upstream(url=far.url),), routing=RoutingSettings(retries=0)))


QUESTION = Raw(path="/v1/chat/completions", body=b'{"model":"far","messages":[{"role":"user","content":"hello"}]}')


@sqlite_only
async def test_another_servers_answer_is_kept_as_it_came(rooms: Rooms, far: Fake) -> None:
    site = rooms(elsewhere(far)).site()
    row = await site.end(await site.submit(asking("far", raw=QUESTION)))
    assert row.status is JobStatus.COMPLETE and row.result is not None
    assert b'"chat.completion"' in row.result.raw and row.result.usage is not None and row.result.usage.completion_tokens == 4


@sqlite_only
async def test_another_servers_refusal_ends_the_job_and_its_trouble_does_not(rooms: Rooms, far: Fake) -> None:
    room = rooms(elsewhere(far))
    site = room.site()
    far.script = Script(fault="status", status=400)
    row = await site.end(await site.submit(asking("far", raw=QUESTION)))
    assert (row.status, row.reason) == (JobStatus.FAILED, "invalid") and "answers 400" in row.message
    (bill,) = room.bills(row)
    assert (bill.outcome, bill.reason, bill.cost) == ("failure", "upstream-error", 0.0)
    for status, tries in ((429, 1), (503, 2)):
        far.script = Script(fault="status", status=status)
        job = await site.submit(asking("far", raw=QUESTION))
        await site.when(job, lambda row: row.status is JobStatus.QUEUED and row.message)
        far.script = Script(chunks=4)
        row = await site.end(job)
        assert row.status is JobStatus.COMPLETE and row.tries >= tries
        assert [each.outcome for each in room.bills(row)] == ["success"]


# What is told on the way


async def test_progress_is_seen_before_the_store_has_it(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting(n=2))
    watched = site.desk.watch(job.id, ACME)
    asked = await room.painter.next()
    async with asyncio.timeout(20):
        assert (await anext(watched)).status in (JobStatus.QUEUED, JobStatus.ACTIVE)
        progress(asked, 1, preview=b"a first idea")
        while (row := await anext(watched)).num_steps != 4:
            pass
        assert (row.step, row.preview) == (1, b"a first idea")
        progress(asked, 2, index=1)
        while (row := await anext(watched)).num_steps != 8:
            pass
        assert (row.step, row.preview) == (3, b"a first idea")  # of both together
        stored = await site.when(job, lambda row: row.step == 3)
        assert (stored.num_steps, stored.preview) == (8, b"a first idea")
        painted(asked)
        last = [row async for row in watched][-1]
    assert last.status is JobStatus.COMPLETE and last.preview == b""


async def test_progress_does_not_go_back_while_a_job_ends(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    site = room.site()
    job = await site.submit(painting())
    asked = await room.painter.next()
    progress(asked, 3)
    async with asyncio.timeout(20):
        while (await site.desk.get(job.id, ACME)).step != 3:
            await asyncio.sleep(0)
        before = structs.replace(await asyncio.to_thread(room.store.jobs.get, job.id, ACME.tenant), step=1)

        def late(*_: Any) -> JobRow:
            """The store's answer is from before the end, and comes after it."""
            site.changes.progress.clear()
            return before

        with monkeypatch.context() as patch:
            patch.setattr(room.store.jobs, "get", late)
            assert (await site.desk.get(job.id, ACME)).step == 3
        painted(asked)
        await site.when(job, lambda row: row.status is JobStatus.COMPLETE)


async def test_another_process_sees_the_progress_too(room: Room) -> None:
    runs, asks = room.site(), room.site(open=False)
    job = await asks.submit(painting())
    watched = asks.desk.watch(job.id, ACME)
    asked = await room.painter.next()
    progress(asked, 3)
    async with asyncio.timeout(20):
        while (row := await anext(watched)).step != 3:
            pass
        painted(asked)
        assert [row async for row in watched][-1].status is JobStatus.COMPLETE
    assert row.runner == runs.id


# What goes wrong


async def test_a_limit_makes_a_job_wait_and_is_no_try(rooms: Rooms) -> None:
    limits: dict[str, Limits] = {"now": {"requests_per_day": 0}}
    room = rooms(callers=lambda row: caller("acme", limits=limits["now"]))
    site = room.site()
    job = await site.submit(rows(1.0))
    row = await site.when(job, lambda row: row.not_before > row.created)
    assert (row.status, row.tries, row.started) == (JobStatus.QUEUED, 0, None) and "requests per day" in row.message
    assert row.not_before < row.created + 400, "a budget of a day may be raised before tomorrow"
    assert room.bills() == []
    limits["now"] = {}
    await asyncio.to_thread(hurry_up, room, job)
    row = await site.end(job)
    assert row.status is JobStatus.COMPLETE and row.tries == 1
    assert [bill.outcome for bill in room.bills()] == ["success"]


async def test_a_job_whose_replica_dies_is_tried_again_with_the_same_seed(room: Room) -> None:
    site = room.site(tries=3)
    job = await site.submit(painting())
    for number in (1, 2):
        asked = await room.painter.next(number)
        progress(asked, 1)
        asked.fail(ReplicaDied("the replica is gone"))
    painted(await room.painter.next(3))
    row = await site.end(job)
    assert (row.status, row.tries) == (JobStatus.COMPLETE, 3)
    seeds = {asked.prompt.seed for asked in room.painter.asked}
    assert len(seeds) == 1 and None not in seeds and row.result is not None and row.result.artifacts[0].seed in seeds
    assert len(room.bills()) == 1
    assert room.house.counts.get("fairlead_job_retries_total", "painter") == 2


@pytest.mark.parametrize(
    ("error", "reason", "tries"),
    [
        (ReplicaDied("the replica is gone"), "replica-died", 2),
        (Unavailable("no place takes requests"), "unavailable", 2),
        (ModelError("its code failed"), "model-error", 1),
        (InvalidRequest("no such scheduler"), "invalid", 1),
    ],
)
@sqlite_only
async def test_a_job_fails_when_another_try_would_not_help(rooms: Rooms, error: Any, reason: str, tries: int) -> None:
    room = rooms(PRICED)
    site = room.site(tries=2)
    job = await site.submit(painting())
    for number in range(tries):
        asked = await room.painter.next(number + 1)
        progress(asked, 1)
        asked.fail(error)
    row = await site.end(job)
    assert (row.status, row.reason, row.tries, row.message, row.cost) == (JobStatus.FAILED, reason, tries, error.message, 0.0)
    (bill,) = room.bills()
    assert bill.outcome != "success" and bill.cost == 0.0


@sqlite_only
async def test_what_is_no_error_of_ours_is_the_models(room: Room) -> None:
    room.house.repository.serve(tensor_model("broken", lambda inputs: {"y": inputs["x"].no_such_thing}))
    site = room.site()
    row = await site.end(await site.submit(rows(1.0, model="broken")))
    assert (row.status, row.reason) == (JobStatus.FAILED, "model-error")


async def test_a_prompt_that_a_filter_blocks_is_moderated_and_costs_nothing(rooms: Rooms) -> None:
    room = rooms(GatewaySettings(models={"painter": ModelPolicy(price=Price(per_request=5.0), filters=FilterPolicy(deny=("bomb",)))}))
    site = room.site()
    row = await site.end(await site.submit(painting("a bomb")))
    assert (row.status, row.reason, row.cost, row.tries) == (JobStatus.FAILED, "moderated-input", 0.0, 1)
    assert "bomb" not in row.message and room.painter.asked == []
    (bill,) = room.bills()
    assert (bill.outcome, bill.reason, bill.cost) == ("refused", "filtered", 0.0)


async def test_a_picture_that_a_classifier_blocks_is_moderated_and_leaves_no_file(rooms: Rooms) -> None:
    filters = FilterPolicy(picture_moderation="block", picture_moderation_model="judge")
    room = rooms(GatewaySettings(models={"painter": ModelPolicy(price=Price(per_megapixel=4.0), filters=filters)}))
    room.house.repository.serve(judge())
    site = room.site()
    job = await site.submit(painting(n=2))
    asked = await room.painter.next()
    picture(asked, 0, data=png((0, 200, 0)))
    picture(asked, 1, data=png((255, 0, 0)), usage=MADE)
    row = await site.end(job)
    assert (row.status, row.reason, row.cost, row.result) == (JobStatus.FAILED, "moderated-output", 0.0, None)
    (bill,) = room.bills()
    assert (bill.outcome, bill.reason, bill.cost) == ("refused", "filtered", 0.0)
    await site.idle()
    assert room.shelf.files() == []


@sqlite_only
async def test_a_text_that_is_blocked_on_its_way_out_is_the_answers_fault(rooms: Rooms) -> None:
    room = rooms(GatewaySettings(models={"shout": ModelPolicy(filters=FilterPolicy(deny=("BOOM",)))}))
    room.house.repository.serve(tensor_model("shout", lambda inputs: {"y": inputs["x"] + b"oom"}, datatype="BYTES", shape=(-1, 1)))
    site = room.site()
    row = await site.end(await site.submit(texts("b")))
    assert (row.status, row.reason) == (JobStatus.FAILED, "moderated-output")


# Who may


@sqlite_only
async def test_a_job_of_somebody_who_may_no_longer_ask_is_forbidden(rooms: Rooms) -> None:
    def revoked(row: JobRow) -> Caller:
        raise Forbidden("this key was revoked")

    room = rooms(callers=revoked)
    site = room.site()
    row = await site.end(await site.submit(painting()))
    assert (row.status, row.reason, row.message) == (JobStatus.FAILED, "forbidden", "this key was revoked")
    assert room.painter.asked == [] and room.bills() == []


# Cancelling


async def test_a_job_that_waits_is_cancelled_at_once(room: Room) -> None:
    site = room.site(open=False)
    job = await site.submit(painting())
    row = await site.desk.cancel(job.id, ACME)
    assert (row.status, row.reason) == (JobStatus.ABORTED, "cancelled")
    site.open()
    await site.end(await site.submit(rows(1.0)))
    assert room.painter.asked == []


async def test_a_job_that_runs_is_cancelled_before_its_next_step(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting(n=2))
    asked = await room.painter.next()
    picture(asked, 0)
    await site.keeps(job)
    row = await site.desk.cancel(job.id, ACME)
    assert row.status is JobStatus.ABORTING
    row = await site.end(job)
    assert (row.status, row.reason, row.result) == (JobStatus.ABORTED, "cancelled", None) and asked.cancelled
    await site.idle()
    assert room.shelf.files() == []
    assert [bill.outcome for bill in room.bills()] == ["cancelled"]
    assert (await site.desk.cancel(job.id, ACME)).status is JobStatus.ABORTED, "what has ended stays as it is"


async def test_a_job_is_cancelled_by_another_process(room: Room) -> None:
    runs, asks = room.site(), room.site(open=False)
    job = await asks.submit(painting())
    asked = await room.painter.next()
    assert (await asks.desk.cancel(job.id, ACME)).status is JobStatus.ABORTING
    assert (await asks.end(job)).status is JobStatus.ABORTED
    assert asked.cancelled and await runs.idle() is None


@sqlite_only
async def test_a_job_is_cancelled_in_the_moment_it_is_leased(room: Room) -> None:
    site = room.site(open=False)
    job = await site.submit(painting())
    ((row, data),) = room.store.jobs.lease(site.id, ["painter"], 1, now=job.created, lease_seconds=60, tenant_active=9)
    site.runner._begin(row, data)
    room.store.jobs.cancel(job.id, "acme", row.created)
    site.changes.abort(job.id)  # its task has not taken a step
    assert (await site.end(job)).status is JobStatus.ABORTED and room.painter.asked == []
    assert await site.idle() is None


# Files


async def test_a_file_store_that_is_full_is_tried_again_and_nothing_is_left_of_the_first_try(room: Room) -> None:
    room.shelf.broken = 1
    site = room.site()
    job = await site.submit(painting(n=2, seed=5))
    asked = await room.painter.next()
    room.shelf.broken = 0
    picture(asked, 0)
    await site.keeps(job)
    room.shelf.broken = 1
    picture(asked, 1)
    painted(await room.painter.next(2))
    row = await site.end(job)
    assert (row.status, row.tries) == (JobStatus.COMPLETE, 2) and row.result is not None
    await site.idle()
    assert {path.name for path in room.shelf.files()} == {each.key.split("/")[1] for each in row.result.artifacts}
    assert asked.cancelled and len(room.bills()) == 1


@sqlite_only
async def test_a_file_store_that_is_gone_fails_the_job(room: Room) -> None:
    room.shelf.broken = 99
    site = room.site(tries=2)
    job = await site.submit(painting())
    for number in (1, 2):
        picture(await room.painter.next(number))
    row = await site.end(job)
    assert (row.status, row.reason, row.tries) == (JobStatus.FAILED, "storage", 2)


async def test_what_is_purged_takes_its_files_along(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting(), retention_seconds=60.0)
    painted(await room.painter.next())
    row = await site.end(job)
    assert row.expires is not None and len(room.shelf.files()) == 1
    await site.runner.purge(row.expires - 1)
    assert len(room.shelf.files()) == 1
    await site.runner.purge(row.expires)
    assert room.shelf.files() == [] and room.store.jobs.get(job.id) is None


@sqlite_only
async def test_a_job_is_kept_as_long_as_its_files_cannot_be_removed(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    site = room.site()
    job = await site.submit(painting())
    painted(await room.painter.next())
    await site.end(job)

    async def gone(_: str) -> None:
        raise Unavailable("the artifact store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(room.shelf, "delete", gone)
        await site.runner.purge(IN_YEARS)
        assert room.store.jobs.get(job.id) is not None
    await site.runner.purge(IN_YEARS)
    assert room.store.jobs.get(job.id) is None


# Leases and deadlines


async def test_a_runner_that_lost_its_lease_stops_and_the_others_result_stands(room: Room) -> None:
    first = room.site()
    job = await first.submit(painting(n=2))
    stalled = await room.painter.next()
    picture(stalled, 0)
    await first.keeps(job)
    first.runner.stopping = True  # it takes no more
    assert await room.lose(job) == JobStatus.QUEUED
    second = room.site()
    asked = await room.painter.next(2)
    painted(asked)
    row = await second.end(job)
    assert row.status is JobStatus.COMPLETE and row.tries == 2 and row.result is not None
    for site in (first, second):
        await site.idle()
    assert stalled.cancelled and len(room.bills()) == 1
    assert {path.name for path in room.shelf.files(job.id)} == {each.key.split("/")[1] for each in row.result.artifacts}
    assert room.house.counts.get("fairlead_jobs_lost_total") == 1


async def test_whoever_delivers_is_told_of_every_end_that_has_a_webhook(room: Room) -> None:
    site, told = room.site(), 0

    def deliver() -> None:
        nonlocal told
        told += 1

    site.changes.deliver = deliver
    plain, called = await site.submit(painting()), await site.submit(painting(), webhook="https://example.com/")
    for number in (1, 2):
        painted(await room.painter.next(number))
    for job in (plain, called):
        await site.end(job)
    await site.idle()
    assert told == 1
    site.runner.stopping = True
    waiting = await site.submit(painting(), webhook="https://example.com/")
    await site.desk.cancel(waiting.id, ACME)
    assert told == 2


async def test_an_end_that_comes_after_the_lease_was_lost_writes_nothing(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    first = room.site()
    job = await first.submit(painting())
    stalled = await room.painter.next()
    monkeypatch.setattr(first.runner, "_heed", lambda run, status: None)  # the news does not come in time
    room.sweep(job.created + 1000, due=False)
    ((row, _),) = room.store.jobs.lease("another", ["painter"], 1, now=job.created + 1000, lease_seconds=1e9, tenant_active=9)
    assert row.id == job.id
    painted(stalled)
    await first.idle()
    row = await first.is_(job, JobStatus.ACTIVE)
    assert row.runner == "another" and room.bills() == [] and room.shelf.files() == []


async def test_a_runner_that_gets_a_lost_job_again_stops_the_first_try(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting())
    stalled = await room.painter.next()
    await room.lose(job)
    asked = await room.painter.next(2)
    await site.when(job, lambda _: stalled.cancelled)
    painted(asked)
    row = await site.end(job)
    assert (row.status, row.tries) == (JobStatus.COMPLETE, 2) and len(room.bills()) == 1
    await site.idle()
    assert len(room.shelf.files()) == 1


async def test_a_killed_runners_jobs_are_begun_again_by_another(room: Room) -> None:
    first = room.site()
    job = await first.submit(painting())
    await room.painter.next()
    await first.die()
    assert (await asyncio.to_thread(room.store.jobs.get, job.id)).status is JobStatus.ACTIVE  # type: ignore[union-attr]
    second = room.site()
    await asyncio.to_thread(room.sweep, job.created + 1000)
    painted(await room.painter.next(2))
    row = await second.end(job)
    assert (row.status, row.tries) == (JobStatus.COMPLETE, 2) and len(room.bills()) == 1


async def test_a_lease_is_kept_as_long_as_its_runner_lives(room: Room) -> None:
    site = room.site(lease_seconds=60.0)
    job = await site.submit(painting())
    asked = await room.painter.next()
    began = await site.is_(job, JobStatus.ACTIVE)
    await site.when(job, lambda row: row.lease_until > began.lease_until)
    assert await asyncio.to_thread(room.sweep, began.lease_until) == ()
    painted(asked)
    assert (await site.end(job)).tries == 1


async def test_deadlines_to_start_and_to_end(room: Room) -> None:
    site = room.site(open=False)
    never = await site.submit(painting(), start_seconds=30.0)
    long = await site.submit(painting(), total_seconds=60.0)
    assert room.sweep(never.created + 29) == ()
    (row,) = room.sweep(never.created + 31)
    assert (row.id, row.status, row.reason) == (never.id, JobStatus.ABORTED, "expired")
    site.open()
    asked = await room.painter.next()
    await asyncio.to_thread(room.sweep, long.created + 61)
    row = await site.end(long)
    assert (row.status, row.reason, row.cost) == (JobStatus.FAILED, "timeout", 0.0)
    await site.idle()
    assert asked.cancelled and room.bills() == []


async def test_a_runner_that_stops_gives_its_jobs_back(room: Room) -> None:
    first = room.site()
    job = await first.submit(painting(n=2))
    asked = await room.painter.next()
    picture(asked, 0)
    await first.keeps(job)
    await first.runner.stop(0.0)
    row = await asyncio.to_thread(room.store.jobs.get, job.id)
    assert row is not None and (row.status, row.tries, row.started) == (JobStatus.QUEUED, 0, None)
    assert asked.cancelled and room.shelf.files() == []
    second = room.site()
    painted(await room.painter.next(2))
    row = await second.end(job)
    assert (row.status, row.tries) == (JobStatus.COMPLETE, 1) and len(room.bills()) == 1


async def test_a_runner_that_stops_lets_its_jobs_end_first(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting())
    later = await site.submit(painting())
    asked = [await room.painter.next(1), await room.painter.next(2)]
    stopping = asyncio.get_running_loop().create_task(site.runner.stop(20.0))
    third = await site.submit(painting())
    for each in asked:
        painted(each)
    await stopping
    assert (await site.end(job)).tries == (await site.end(later)).tries == 1
    assert (await asyncio.to_thread(room.store.jobs.get, third.id)).status is JobStatus.QUEUED  # type: ignore[union-attr]


@sqlite_only
async def test_an_end_that_is_being_written_is_not_interrupted(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    site = room.site()
    job = await site.submit(painting())
    asked = await room.painter.next()
    writing, go_on = asyncio.Event(), asyncio.Event()
    told = site.runner._told

    async def slowly(run: Any, write: Any) -> Any:
        writing.set()
        await go_on.wait()
        return await told(run, write)

    monkeypatch.setattr(site.runner, "_told", slowly)
    painted(asked)
    await writing.wait()
    site.changes.abort(job.id)
    stopping = asyncio.get_running_loop().create_task(site.runner.stop(0.0))
    await asyncio.sleep(0)
    go_on.set()
    await stopping
    row = await site.end(job)
    assert row.status is JobStatus.COMPLETE and len(room.shelf.files()) == 1


# A store that does not answer


@sqlite_only
async def test_an_end_is_written_when_the_store_is_back(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    site = room.site()
    job = await site.submit(painting())
    asked = await room.painter.next()
    end, refused = room.store.jobs.end, []

    def away(*args: Any, **named: Any) -> Any:
        if len(refused) < 2:
            refused.append(1)
            raise Unavailable("the store does not answer")
        return end(*args, **named)

    monkeypatch.setattr(room.store.jobs, "end", away)
    painted(asked)
    row = await site.end(job)
    assert (row.status, row.tries) == (JobStatus.COMPLETE, 1) and len(room.bills()) == 1 and len(refused) == 2


@sqlite_only
async def test_an_end_that_was_written_and_not_confirmed_keeps_its_files(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    site = room.site()
    job = await site.submit(painting())
    asked = await room.painter.next()
    end, told = room.store.jobs.end, []

    def lost_its_answer(*args: Any, **named: Any) -> Any:
        row = end(*args, **named)
        told.append(row)
        if len(told) == 1:
            raise Unavailable("the connection is lost")
        return row

    monkeypatch.setattr(room.store.jobs, "end", lost_its_answer)
    painted(asked)
    row = await site.end(job)
    await site.idle()
    assert row.status is JobStatus.COMPLETE and told[1] is None
    assert len(room.shelf.files()) == 1 and len(room.bills()) == 1


@pytest.mark.parametrize("name", ["lease", "sweep", "beat"])
@sqlite_only
async def test_a_store_that_does_not_answer_for_a_while_stops_nothing(room: Room, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    call, refused = getattr(room.store.jobs, name), asyncio.Event()
    loop = asyncio.get_running_loop()
    times = []

    def away(*args: Any, **named: Any) -> Any:
        times.append(1)
        if len(times) < 4:
            raise Unavailable("the store does not answer")
        loop.call_soon_threadsafe(refused.set)
        return call(*args, **named)

    monkeypatch.setattr(room.store.jobs, name, away)
    site = room.site()
    job = await site.submit(painting())
    asked = await room.painter.next()
    async with asyncio.timeout(20):
        await refused.wait()
    painted(asked)
    row = await site.end(job)
    assert (row.status, row.tries) == (JobStatus.COMPLETE, 1)


# Whose turn


async def test_a_server_runs_no_more_than_it_can_and_the_most_urgent_first(rooms: Rooms) -> None:
    anyone = caller(classes=("*",))
    room = rooms(policies(classes={"slow": 0, "fast": 5, "now": 9}), callers=lambda row: anyone)
    site = room.site(open=False, max_active=2)
    jobs = [
        await site.submit(painting(f"{name}", qos_class=qos_class, caller=anyone))
        for name, qos_class in (("last", "slow"), ("second", "fast"), ("third", "fast"), ("first", "now"))
    ]
    assert [job.priority for job in jobs] == [0, 5, 5, 9]
    site.open()
    await room.painter.next(2)
    assert {asked.prompt.text for asked in room.painter.running} == {"first", "second"}
    for number, name in ((3, "third"), (4, "last")):
        painted(room.painter.running[0])
        assert (await room.painter.next(number)).prompt.text == name
        assert len(site.runner.running) <= 2
    for asked in list(room.painter.running):
        painted(asked)
    for job in jobs:
        assert (await site.end(job)).status is JobStatus.COMPLETE


async def test_a_tenant_runs_no_more_than_its_share_on_all_servers_together(room: Room) -> None:
    sites = [room.site(tenant_active=2), room.site(tenant_active=2)]
    mine = [await sites[0].submit(painting(str(number))) for number in range(5)]
    globex = caller("globex")
    theirs = await sites[0].submit(painting("theirs", caller=globex))
    await room.painter.next(3)
    assert sorted(asked.request.caller.tenant for asked in room.painter.running) == ["acme", "acme", "globex"]
    for number in range(6):
        asked = await room.painter.next(number + 1)
        assert sum(each.request.caller.tenant == "acme" for each in room.painter.running) <= 2
        painted(asked)
    for job in mine:
        assert (await sites[0].end(job)).status is JobStatus.COMPLETE
    assert (await sites[0].end(theirs, globex)).status is JobStatus.COMPLETE


async def test_a_job_of_a_model_that_is_not_served_waits_for_it(room: Room) -> None:
    site = room.site(open=False)
    job = await site.submit(painting())
    room.house.repository.withdraw("painter")
    site.open()
    await site.end(await site.submit(rows(1.0)))
    assert (await site.is_(job, JobStatus.QUEUED)).tries == 0
    room.house.repository.serve(room.painter)
    painted(await room.painter.next())
    assert (await site.end(job)).status is JobStatus.COMPLETE


@sqlite_only
async def test_a_model_that_goes_away_between_the_lease_and_the_question_is_waited_for(room: Room) -> None:
    site = room.site(open=False)
    job = await site.submit(painting())
    ((row, data),) = room.store.jobs.lease(site.id, ["painter"], 1, now=job.created, lease_seconds=60, tenant_active=9)
    room.house.repository.withdraw("painter")
    site.runner._begin(row, data)
    row = await site.is_(job, JobStatus.QUEUED)
    assert row.tries == 0 and row.message


# Records


@sqlite_only
async def test_a_record_that_comes_after_the_end_goes_to_the_log(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting())
    asked = await room.painter.next()
    painted(asked)
    await site.end(job)
    await site.idle()
    (bill,) = room.bills()
    assert site.late == []
    asked.request.booked(structs.replace(bill, outcome="late"))  # type: ignore[misc]
    assert [each.outcome for each in site.late] == ["late"]


@sqlite_only
async def test_a_record_that_comes_after_a_try_was_put_off_is_nobodys(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting())
    first = await room.painter.next()
    first.fail(ReplicaDied("gone"))
    second = await room.painter.next(2)
    painted(second)
    await site.end(job)
    (bill,) = room.bills()
    first.request.booked(bill)  # type: ignore[misc]
    assert site.late == [] and len(room.bills()) == 1


async def test_each_try_of_a_job_has_a_timeline(room: Room) -> None:
    site = room.site()
    request = painting()
    request.log_id = "handed-in"
    job = await site.submit(request)
    (await room.painter.next()).fail(ReplicaDied("gone"))
    painted(await room.painter.next(2))
    await site.end(job)
    room.finished.flush()
    first, second = room.ended
    for number, timeline in enumerate(room.ended, 1):
        assert (timeline.protocol, timeline.job, timeline.request_id, timeline.kind) == ("job", job.id, "handed-in", "paint")
        assert timeline.events[0][1:] == ("lease", {"attempt": number}) and timeline.tenant == "acme"
    assert (first.outcome, first.status, first.error) == ("failure", 500, "gone")
    assert (second.outcome, second.status, second.error, second.events[-1][1]) == ("success", 200, "", "stored")


async def test_a_job_that_is_cancelled_says_so(room: Room) -> None:
    site = room.site()
    job = await site.submit(painting())
    await room.painter.next()
    await site.desk.cancel(job.id, ACME)
    await site.end(job)
    room.finished.flush()
    (timeline,) = room.ended
    assert (timeline.outcome, timeline.status) == ("cancelled", 499)


async def whole(room: Room, artifact: Any) -> bytes:
    return b"".join([chunk async for chunk in room.shelf.read(artifact.key, 0, artifact.num_bytes)])


def hurry_up(room: Room, job: JobRow) -> None:
    """Its next try is due now."""
    with room.store.jobs._transactions.writes() as connection:
        room.store.jobs._sql.run(connection, "UPDATE jobs SET not_before = 0 WHERE id = ?", job.id)


def png(colour: tuple[int, int, int]) -> bytes:
    return encode(np.broadcast_to(np.array(colour, np.uint8), (8, 8, 3)).astype(np.uint8), "png")


def judge() -> Any:
    """A classifier that finds red pictures unsafe."""
    spec = ModelSpec(
        name="judge",
        inputs=(TensorSpec(name="x", datatype="UINT8", shape=(-1, 8, 8, 3)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1), labels=("unsafe",)),),
        batching=BatchingSpec(max_batch_size=4),
    )

    def red(inputs: Any) -> Any:
        return {"y": (inputs["x"][:, 0, 0, :1] > 250).astype(np.float32)}

    return ModelVersion(spec, "1", "python", [LocalInstance(Function(red), "judge", Execution.INLINE)])
