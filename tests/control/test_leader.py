"""From a decision to the traffic, with a real store, registry and repository; what goes wrong on the way."""

import asyncio
import sqlite3

import pytest
from msgspec import structs

from fairlead.control.acts import rollout_of, rollout_row
from fairlead.control.rollout import Command, Outcome, Phase, Validated
from fairlead.core.errors import LoadError, Unavailable
from fairlead.core.rollout import Breakers, RolloutPolicy, Step
from fairlead.core.versions import Ref, Stage
from fairlead.core.window import Tally
from fairlead.store import database
from fairlead.store.rows import AuditQuery, AuditRow
from fairlead.store.transactions import Conflict
from tests.control.house import Clock, House
from tests.stores import new_store

STEPS = (Step(share=0.1, seconds=2.0, min_requests=10), Step(share=0.5, seconds=2.0, min_requests=10))
SHORT = RolloutPolicy(steps=STEPS, interval=1.0, rollback_seconds=30.0, metrics=())


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def house(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)  # for the one that blocks it
    store = new_store(tmp_path)
    made = House(store, tmp_path, clock, {"short": SHORT})
    await made.repository.start()
    yield made
    await made.close()
    store.close()


async def serve(house: House, model: str, adds: float) -> int:
    """A champion. Returns its number."""
    row = house.add(model, adds)
    rollout = await house.start(row.ref, policy="direct")
    await house.until(rollout.id, Phase.COMPLETE)
    return row.number


def well(house: House, model: str = "add", champion: int = 1, candidate: int = 2, num: int = 20) -> None:
    """Both sides answer."""
    house.eyes.see(model, house.clock(), **{f"v{champion}": Tally(requests=num), f"v{candidate}": Tally(requests=num)})


def stage(house: House, ref: str) -> Stage:
    model, _, number = ref.partition("@")
    return house.store.registry.version(model, int(number)).stage


def alias(house: House, model: str, name: str) -> int | None:
    return next((row.number for row in house.store.registry.aliases(model) if row.alias == name), None)


async def test_a_first_version_serves_as_soon_as_it_has_passed_and_is_loaded(house):
    row = house.add("add", 1)
    rollout = await house.start("add@1")
    assert (rollout.phase, stage(house, "add@1")) == (Phase.VALIDATING, Stage.STAGED)
    await house.until(rollout.id, Phase.COMPLETE)
    assert house.shares == {"add": {"1": 1.0}}
    assert await house.ask("add") == 1
    assert (stage(house, row.ref), alias(house, "add", "champion")) == (Stage.SERVING, 1)


async def test_a_candidate_goes_up_in_steps_takes_over_and_the_one_before_is_let_go_at_last(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    assert house.shares == {"add": {"1": 0.9, "2": 0.1}}
    assert (alias(house, "add", "champion"), alias(house, "add", "challenger")) == (1, 2)
    seen = []
    for _ in range(12):
        well(house)
        await house.tick()
        seen.append(house.shares["add"].get("2"))
        if house.rollout(rollout.id).phase is Phase.PROMOTED:
            break
    assert seen == sorted(seen) and set(seen) == {0.1, 0.5, 1.0}
    assert house.repository.versions("add") == ["1", "2"], "kept for an instant return"
    assert (stage(house, "add@1"), stage(house, "add@2")) == (Stage.VALIDATED, Stage.SERVING)
    assert (alias(house, "add", "champion"), alias(house, "add", "challenger")) == (2, None)
    await house.tick(31.0)
    await house.tick()
    assert house.rollout(rollout.id).phase is Phase.COMPLETE
    assert house.repository.versions("add") == ["2"]
    actions = [row.action for row in house.store.audit(AuditQuery(subject="add@2"), 100)][::-1]
    assert actions[0] == "version.add"
    assert {"rollout.start", "rollout.step", "rollout.promote", "rollout.complete"} <= set(actions)


async def test_a_candidate_that_fails_is_taken_back_in_the_tick_that_sees_it(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    house.eyes.see("add", house.clock(), v1=Tally(requests=300), v2=Tally(requests=30, errors=30))
    await house.tick()
    ended = house.rollout(rollout.id)
    assert ended.phase is Phase.ABORTED and "error" in ended.reason
    assert house.shares == {"add": {"1": 1.0}}
    assert stage(house, "add@2") is Stage.REJECTED
    assert house.store.registry.version("add", 2).reason == ended.reason or ended.reason in house.store.registry.version("add", 2).reason
    assert house.counts.get("fairlead_rollouts_total", "add", "aborted") == 1


async def test_after_a_promotion_the_one_before_is_back_at_once(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    await house.command(rollout.id, "promote")
    assert house.shares == {"add": {"2": 1.0}}
    await house.command(rollout.id, "rollback", "customers complain")
    assert house.shares == {"add": {"1": 1.0}}, "before anything else happened"
    assert await house.ask("add") == 1
    assert (stage(house, "add@1"), stage(house, "add@2")) == (Stage.SERVING, Stage.REJECTED)
    assert alias(house, "add", "champion") == 1


async def test_what_does_not_pass_its_gates_gets_no_traffic(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    house.findings = Validated(ok=False, reason="golden: 3 of 10 answers differ", model="add")
    rollout = await house.start("add@2", policy="short")
    ended = await house.until(rollout.id, Phase.ABORTED)
    assert "3 of 10" in ended.reason
    assert house.repository.versions("add") == ["1"]
    assert stage(house, "add@2") is Stage.REJECTED


async def test_a_candidate_that_cannot_be_loaded_ends_its_rollout_and_the_champion_serves_on(house):
    await serve(house, "add", 1)
    house.add("add", None)
    rollout = await house.start("add@2", policy="short")
    ended = await house.until(rollout.id, Phase.ABORTED)
    assert "no such thing" in ended.reason
    assert await house.ask("add") == 1
    assert "add" in house.repository.hosted() and set(house.repository.hosted()["add"]) == {1}


async def test_one_rollout_of_a_model_at_a_time(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    house.add("add", 3)
    first = await house.start("add@2", policy="short")
    with pytest.raises(Conflict, match=f"runs already: {first.id}"):
        await house.start("add@3", policy="short")
    with pytest.raises(Conflict, match="runs: abort"):
        await house.rollouts.undeploy("add", "somebody", "")
    await house.command("add", "abort")
    await house.start("add@3", policy="short")


async def test_what_serves_already_is_no_candidate(house):
    await serve(house, "add", 1)
    with pytest.raises(Conflict, match="serves already"):
        await house.start("add@1")


async def test_who_decides_is_killed_and_another_one_goes_on_where_it_was(house, clock):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    well(house)
    await house.tick()
    counted = house.rollout(rollout.id).counted["add"].requests
    assert counted == 40
    # No word of farewell: the lease runs out.
    second = House(house.store, house.folder, clock, {"short": SHORT}, name="b")
    await second.repository.start()
    try:
        await second.tick()
        assert not second.leader.leads
        assert second.shares == {"add": {"1": 0.9, "2": 0.1}}, "it follows all the same"
        await second.tick(6.0)
        assert second.leader.leads
        assert second.rollout(rollout.id).counted["add"].requests == counted
        for _ in range(25):  # for a while the first one may be answering requests of which nobody hears
            well(second)
            await second.tick()
        assert second.rollout(rollout.id).phase is Phase.PROMOTED
        await house.follow()
        assert house.shares == second.shares == {"add": {"2": 1.0}}
    finally:
        await second.close()


async def test_windows_of_all_servers_are_decided_upon_together(house, clock):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    second = House(house.store, house.folder, clock, {"short": SHORT}, name="b")
    await second.repository.start()
    try:
        await house.tick()
        await second.leader.tick(clock())  # says that it is there, and has nothing
        await house.tick()
        assert house.rollout(rollout.id).phase is Phase.LOADING, "one server is not ready yet"
        await second.tick()
        await second.tick()
        await house.until(rollout.id, Phase.PROGRESSING)
        second.eyes.see("add", clock(), v1=Tally(requests=300), v2=Tally(requests=30, errors=30))
        await second.tick()
        await house.tick()
        assert house.rollout(rollout.id).phase is Phase.ABORTED
        await second.follow()
        assert second.shares == {"add": {"1": 1.0}}
    finally:
        await second.close()


async def test_while_a_server_is_silent_nothing_goes_forward(house, clock):
    await serve(house, "add", 1)
    house.add("add", 2)
    second = House(house.store, house.folder, clock, {"short": SHORT}, name="b")
    await second.repository.start()
    try:
        house.settings.policies["longer"] = structs.replace(SHORT, steps=(Step(share=0.1, seconds=20.0, min_requests=10),))
        rollout = await house.start("add@2", policy="longer")
        for _ in range(10):
            await house.tick(0.5)
            await second.tick(0.5)
        assert house.rollout(rollout.id).phase is Phase.PROGRESSING
        outcomes = []
        for _ in range(40):  # the second one says nothing any more
            well(house)
            await house.tick()
            outcomes.append(house.rollout(rollout.id).last)
        silent = outcomes.index(Outcome.INCONCLUSIVE)
        assert house.rollout(rollout.id).phase is Phase.PROMOTED, "taken for dead, at last"
        assert outcomes[silent : silent + 10] == [Outcome.INCONCLUSIVE] * 10
    finally:
        await second.close()


async def test_windows_that_cannot_be_read_are_no_success(house, clock):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    for _ in range(8):
        well(house)
        house.store.control.add_windows("of another release", [("add", b"\x93\x01\x02")], clock())
        await house.tick()
    ended = house.rollout(rollout.id)
    assert ended.phase is Phase.ABORTED and "measure" in ended.reason
    assert house.shares == {"add": {"1": 1.0}}


async def test_without_the_store_traffic_goes_on_nothing_goes_forward_and_a_broken_candidate_still_loses_it(house, monkeypatch, tmp_path):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    blocker = sqlite3.connect(tmp_path / "fairlead.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        for _ in range(3):
            well(house, num=1000)
            await house.tick()
        assert house.shares == {"add": {"1": 0.9, "2": 0.1}}
        assert house.counts.get("fairlead_control_store_failures_total") == 3
        # much less than what it answered well meanwhile
        house.eyes.see("add", house.clock(), v1=Tally(requests=300), v2=Tally(requests=100, errors=100))
        await house.tick()
        assert house.shares == {"add": {"1": 1.0}}
    finally:
        blocker.rollback()
        blocker.close()
    await house.tick()
    assert house.rollout(rollout.id).phase is Phase.ABORTED
    assert house.shares == {"add": {"1": 1.0}}
    assert stage(house, "add@2") is Stage.REJECTED


async def test_a_command_that_cannot_be_written_leaves_what_was_done_without_the_store(house, tmp_path):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    row = house.rollouts.find(rollout.id)
    blocker = sqlite3.connect(tmp_path / "fairlead.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        house.eyes.see("add", house.clock(), v1=Tally(requests=300), v2=Tally(requests=100, errors=100))
        await house.tick()
        assert house.shares == {"add": {"1": 1.0}}
        # It was read before the store was gone.
        for kind in ("abort", "promote"):
            with pytest.raises(Unavailable):
                await house.rollouts._command(row, Command(kind=kind, actor="somebody"))
            await house.follow()
            assert house.shares == {"add": {"1": 1.0}}, kind
    finally:
        blocker.rollback()
        blocker.close()
    await house.tick()
    assert house.rollout(rollout.id).phase is Phase.ABORTED
    assert house.shares == {"add": {"1": 1.0}}


async def test_an_abort_that_cannot_be_written_is_taken_back(house, tmp_path):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    row = house.rollouts.find(rollout.id)
    blocker = sqlite3.connect(tmp_path / "fairlead.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(Unavailable):
            await house.rollouts._command(row, Command(kind="abort", actor="somebody"))
    finally:
        blocker.rollback()
        blocker.close()
    await house.follow()
    assert house.shares == {"add": {"1": 0.9, "2": 0.1}}, "as the caller was told"


async def test_a_rollout_that_is_refused_has_skipped_no_gates(house):
    await serve(house, "add", 1)
    await serve(house, "features", 1)
    house.settings.policies["trusting"] = structs.replace(SHORT, validate=False)
    for model in ("add", "features"):
        house.add(model, 2)
    await house.start("features@2", policy="short")
    with pytest.raises(Conflict, match="`features` runs already"):
        await house.start("add@2", "features@2", policy="trusting")
    assert stage(house, "add@2") is Stage.STAGED
    await house.start("add@2", policy="trusting")
    assert stage(house, "add@2") is Stage.VALIDATED


async def test_models_that_belong_together_change_sides_together(house):
    await serve(house, "features", 1)
    await serve(house, "add", 1)
    house.add("features", 2)
    house.add("add", 2)
    rollout = await house.start("add@2", "features@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    assert house.shares == {"add": {"1": 0.9, "2": 0.1}, "features": {"1": 0.9, "2": 0.1}}
    for _ in range(12):
        well(house)
        well(house, "features")
        await house.tick()
    assert house.rollout(rollout.id).phase is Phase.PROMOTED
    both = [routes.shares for routes in house.published if {"add", "features"} <= routes.shares.keys()]
    sides = {(dict(shares["add"]).get("2", 0.0), dict(shares["features"]).get("2", 0.0)) for shares in both}
    assert {0.1, 0.5, 1.0} <= {one for one, _ in sides}
    assert all(one == other for one, other in sides), "in no snapshot is one ahead of the other"
    # what is wrong with one takes both back
    house.eyes.see("features", house.clock(), v2=Tally(requests=100, errors=100))
    await house.tick()
    assert house.shares == {"add": {"1": 1.0}, "features": {"1": 1.0}}


async def test_a_deployment_that_was_never_written_is_made_good(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    skip = RolloutPolicy(steps=STEPS, interval=1.0, validate=False)
    house.settings.policies["trusting"] = skip
    rollout = await house.start("add@2", policy="trusting")
    assert rollout.phase is Phase.LOADING
    assert "2" not in house.repository.versions("add")
    await house.until(rollout.id, Phase.PROGRESSING)
    assert house.shares == {"add": {"1": 0.9, "2": 0.1}}


async def test_a_crash_loop_ends_the_rollout(house, monkeypatch):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    await house.tick()
    restarts = 0
    monkeypatch.setattr(house.repository.find("add", "2").metrics, "restarts", lambda: restarts)
    await house.tick()
    restarts = Breakers().restarts
    await house.tick()
    assert house.rollout(rollout.id).phase is Phase.ABORTED
    assert house.shares == {"add": {"1": 1.0}}


async def test_a_bare_name_is_the_newest_version(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    house.add("add", 3)
    rollout = await house.start("add", policy="short")
    assert rollout.members[0].candidate == 3


async def test_undeployed_models_are_gone(house):
    await serve(house, "add", 1)
    await house.rollouts.undeploy("add", "somebody", "not needed")
    await house.follow()
    assert not house.repository.known("add")
    assert stage(house, "add@1") is Stage.VALIDATED
    assert house.store.registry.resolve(Ref("add")).number == 1
    await asyncio.sleep(0)


async def test_a_leader_that_was_cut_off_follows_what_another_one_decided_meanwhile(house, clock, tmp_path):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    blocker = sqlite3.connect(tmp_path / "fairlead.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    house.eyes.see("add", clock(), v1=Tally(requests=300), v2=Tally(requests=100, errors=100))
    await house.tick()
    assert house.shares == {"add": {"1": 1.0}}, "it took the traffic away by itself"
    blocker.rollback()
    blocker.close()
    second = House(house.store, house.folder, clock, {"short": SHORT}, name="b")
    await second.repository.start()
    try:
        await second.command(rollout.id, "promote")  # somebody knew better
        await second.tick(40.0)
        await second.tick(40.0)
        await second.tick()
        assert second.rollout(rollout.id).phase is Phase.COMPLETE
        await house.tick()
        await house.follow()
        assert house.shares == second.shares == {"add": {"2": 1.0}}
        assert house.repository.versions("add") == ["2"]
    finally:
        await second.close()


async def test_gates_of_a_rollout_that_was_aborted_are_not_waited_for(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    ended = asyncio.Event()

    async def validate(_: object) -> Validated:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    house.leader.validate = validate
    rollout = await house.start("add@2", policy="short")
    await house.tick()
    await asyncio.sleep(0)
    await house.command(rollout.id, "abort")
    await house.tick()
    async with asyncio.timeout(5):
        await ended.wait()
    assert stage(house, "add@2") is Stage.STAGED


async def test_what_is_not_the_versions_fault_does_not_reject_it(house):
    await serve(house, "add", 1)
    house.add("add", 2)

    async def validate(_: object) -> Validated:
        raise LoadError("add@1 is not what was added")

    house.leader.validate = validate
    rollout = await house.start("add@2", policy="short")
    ended = await house.until(rollout.id, Phase.ABORTED)
    assert "is not what was added" in ended.reason
    assert stage(house, "add@2") is Stage.STAGED


async def test_the_champion_comes_back_even_where_somebody_rejected_it_meanwhile(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    await house.command(rollout.id, "promote")
    audit = AuditRow(time=house.clock(), actor="somebody", action="version.stage", subject="add@1")
    house.store.registry.move("add", 1, Stage.REJECTED, "by mistake", audit)
    house.eyes.see("add", house.clock(), v2=Tally(requests=100, errors=100))
    await house.tick()
    assert house.shares == {"add": {"1": 1.0}}
    assert house.rollout(rollout.id).phase is Phase.ABORTED


async def test_windows_are_counted_although_a_command_came_between(house, monkeypatch):
    await serve(house, "add", 1)
    house.add("add", 2)
    rollout = await house.start("add@2", policy="short")
    await house.until(rollout.id, Phase.PROGRESSING)
    real = house.store.control.running

    def running():
        rows = real()
        paused = rollout_row(structs.replace(rollout_of(rows[0]), reason="changed"), revision=rows[0].revision, now=house.clock())
        house.store.control.commit(rollout=paused, audits=[AuditRow(time=house.clock(), actor="x", action="x", subject="x")])
        return rows

    monkeypatch.setattr(house.store.control, "running", running)
    well(house)
    await house.tick()
    monkeypatch.undo()
    await house.tick()
    assert house.rollout(rollout.id).counted["add"].requests == 40


async def test_after_it_has_stopped_it_takes_no_lease(house):
    await serve(house, "add", 1)
    house.add("add", 2)
    await house.start("add@2", policy="short")
    await house.tick()
    await house.leader.stop()
    await house.leader.tick(house.clock() + 60.0)
    assert house.store.control.lease("control") is None
