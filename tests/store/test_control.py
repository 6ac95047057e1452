"""Deployments, rollouts and what they are decided from, on SQLite and on a real PostgreSQL."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec import structs

from fairlead.core.errors import InvalidRequest, NotFound, Unavailable
from fairlead.core.versions import Stage
from fairlead.store import tables
from fairlead.store.control import ControlStore
from fairlead.store.registry import RegistryStore
from fairlead.store.registry_rows import (
    DeploymentRow,
    ExposureRow,
    FeedbackSum,
    LeaseRow,
    Move,
    RolloutRow,
    ServerRow,
    Taken,
)
from fairlead.store.rows import AuditQuery
from fairlead.store.store import Store
from fairlead.store.transactions import Conflict
from tests.store.postgres import Postgres
from tests.store.test_registry import NOW, add, at_once, did


@pytest.fixture
def control(store: Store) -> ControlStore:
    return store.control


def wanted(model: str = "fraud", revision: int = 0, **fields: Any) -> DeploymentRow:
    state = fields.pop("state", {"champion": 1, "share": 0.01})
    return DeploymentRow(**{"model": model, "state": state, "revision": revision, "updated": NOW, "actor": "tester", **fields})


def begun(id: str = "r1", model: str = "fraud", **fields: Any) -> RolloutRow:
    base = {"status": "loading", "state": '{"step": 0}', "created": NOW, "updated": NOW}
    return RolloutRow(**{"id": id, "model": model, **base, **fields})


def start(control: ControlStore, id: str = "r1", members: Mapping[str, int] = {"fraud": 2}, **fields: Any) -> RolloutRow:
    """With the versions that are tried, and on the deployments as they are."""
    registry = RegistryStore(control._transactions, control._sql)
    for model, number in members.items():
        add(registry, *(f"d{n}" for n in range(1, number + 1)), model=model)
    revisions = {row.model: row.revision for row in control.deployments()}
    return control.start_rollout(begun(id, next(iter(members)), **fields), members, [did("rollout.start")], revisions=revisions)


def end(control: ControlStore, row: RolloutRow) -> None:
    control.commit(rollout=structs.replace(row, ended=NOW + 1, status="aborted"), audits=[])


# Deployments


def test_a_deployment_is_put_with_the_revision_that_it_replaces(store: Store, control: ControlStore) -> None:
    assert (control.deployment("fraud"), control.deployments()) == (None, ())
    control.commit(deployments=[wanted("fraud", versions=(1, 2)), wanted("churn")], audits=[did("deploy")])
    assert control.deployment("fraud") == wanted("fraud", 1, versions=(1, 2))
    assert [row.model for row in control.deployments()] == ["churn", "fraud"]
    control.commit(deployments=[wanted("fraud", 1, reason="said \0")], audits=[])
    assert control.deployment("fraud") == wanted("fraud", 2, reason="said ")
    before = control.deployments()
    for stale in (wanted("fraud", 1), wanted("fraud"), wanted("new", 1)):
        with pytest.raises(Conflict, match=f"the deployment of `{stale.model}` was changed meanwhile"):
            control.commit(deployments=[wanted("churn", 1), stale], audits=[did("never")])
    assert control.deployments() == before
    assert [row.action for row in store.audit(AuditQuery(), 10)] == ["deploy"]


def test_of_two_who_change_a_deployment_at_once_one_wins(control: ControlStore) -> None:
    def put(n: int) -> bool:
        try:
            control.commit(deployments=[wanted(state={"champion": n})], audits=[did()])
        except Conflict:
            return False
        return True

    answers = at_once(4, put)
    row = control.deployment("fraud")
    assert row is not None and row.revision == 1
    assert [n for n, won in enumerate(answers) if won] == [row.state["champion"]]


# Rollouts


def test_a_rollout_is_started_saved_and_ended(control: ControlStore) -> None:
    row = start(control)
    assert row == begun(revision=1) == control.rollout("r1")
    saved = control.commit(rollout=structs.replace(row, state='{"step": 1}', updated=NOW + 1), audits=[])
    assert saved == begun(revision=2, state='{"step": 1}', updated=NOW + 1) == control.rollout("r1")
    assert control.running() == (saved,)
    end(control, saved)
    assert control.running() == ()
    assert [(each.id, each.status) for each in control.rollouts("fraud", running=False)] == [("r1", "aborted")]
    with pytest.raises(Conflict, match="has ended"):
        control.commit(rollout=control.rollout("r1"), audits=[])
    with pytest.raises(NotFound, match="no rollout r2"):
        control.rollout("r2")


def test_a_model_is_in_one_rollout_at_a_time(store: Store, control: ControlStore) -> None:
    first = start(control, "r1", {"fraud": 2, "features": 3})
    for members, model in (({"fraud": 2}, "fraud"), ({"churn": 1, "features": 4}, "features")):
        with pytest.raises(Conflict, match=f"a rollout of `{model}` runs already: r1"):
            start(control, "r2", members)
    second = start(control, "r2", {"churn": 1}, created=NOW + 1)
    assert control.running() == (first, second)
    end(control, first)
    third = start(control, "r3", {"features": 4, "fraud": 3}, created=NOW + 2)
    assert [row.id for row in control.rollouts("fraud")] == ["r3", "r1"] == [row.id for row in control.rollouts("features")]
    assert [row.id for row in control.rollouts(limit=2)] == ["r3", "r2"]
    assert control.rollouts("fraud", running=True) == (third,)
    assert len(store.audit(AuditQuery(action="rollout.start"), 10)) == 3


def test_of_two_rollouts_of_a_model_that_start_at_once_one_runs(store: Store, url: str) -> None:
    stores = [store, *(Store.open(url) for _ in range(3))]

    def begin(n: int) -> str:
        try:
            # Each begins with a model of its own, so that they meet at another member.
            return start(stores[n].control, f"r{n}", {f"m{n}": 1, "fraud": 2}).id
        except Conflict as error:
            return error.message

    answers = at_once(4, begin)
    (row,) = store.control.running()
    assert sorted(answers) == sorted([row.id, *[f"a rollout of `fraud` runs already: {row.id}"] * 3])
    assert len(store.control.rollouts()) == 1
    for other in stores[1:]:
        other.close()


def test_a_rollout_starts_upon_what_is_still_so(store: Store, control: ControlStore) -> None:
    def begin(**more: Any) -> RolloutRow:
        return control.start_rollout(begun(), {"features": 3, "fraud": 2}, [did("rollout.start")], **{"revisions": {"fraud": 1}, **more})

    add(store.registry, "d1", "d2")
    add(store.registry, "d1", "d2", "d3", model="features")
    control.commit(deployments=[wanted(versions=(1,))], audits=[])
    skipped = [Move("features", 3, Stage.VALIDATED, "no gates")]
    for revisions in ({}, {"fraud": 2}, {"fraud": 1, "features": 1}):
        with pytest.raises(Conflict, match="was changed meanwhile"):
            begin(revisions=revisions, moves=skipped)
    store.registry.move("fraud", 2, Stage.VALIDATED, "", did())
    store.registry.move("fraud", 2, Stage.SERVING, "", did())
    with pytest.raises(Conflict, match="fraud@2 is serving"):
        begin(moves=skipped)
    store.registry.move("fraud", 2, Stage.VALIDATED, "", did())
    store.registry.move("fraud", 2, Stage.RETIRED, "", did())
    with pytest.raises(Conflict, match="fraud@2 is retired"):
        begin(moves=skipped)
    store.registry.delete_version("fraud", 2, did())
    with pytest.raises(Conflict, match="fraud@2 is gone"):
        begin(moves=skipped)
    assert (control.rollouts(), store.registry.version("features", 3).stage) == ((), Stage.STAGED), "all of it, or nothing"
    control.start_rollout(begun(model="features"), {"features": 3}, [did("rollout.start")], moves=skipped)
    assert store.registry.version("features", 3).stage is Stage.VALIDATED


def test_one_that_was_overtaken_saves_nothing(store: Store, control: ControlStore) -> None:
    """Two that hold themselves to be the one who decides, after a lease ran out: the second to write is told."""
    add(store.registry, "d1", "d2")
    row = start(control)
    control.commit(rollout=row, audits=[])
    stale: list[Callable[[], object]] = [
        lambda: control.commit(rollout=row, deployments=[wanted()], moves=[Move("fraud", 1, Stage.VALIDATED)], audits=[did("never")]),
        lambda: end(control, row),
    ]
    for act in stale:
        with pytest.raises(Conflict, match="the rollout r1 was changed meanwhile"):
            act()
    assert (control.deployments(), store.registry.version("fraud", 1).stage) == ((), Stage.STAGED)
    assert [each.id for each in control.running()] == ["r1"]


def test_a_decision_is_written_whole_or_not_at_all(store: Store, control: ControlStore) -> None:
    add(store.registry, "d1", "d2")
    for number in (1, 2):
        store.registry.move("fraud", number, Stage.VALIDATED, "", did())
    store.registry.move("fraud", 1, Stage.SERVING, "", did())
    row = start(control)
    promote: dict[str, Any] = {
        "rollout": structs.replace(row, status="promoted"),
        "deployments": [wanted(versions=(2, 1))],
        "moves": [Move("fraud", 2, Stage.SERVING, "better"), Move("fraud", 1, Stage.VALIDATED)],
        "aliases": {("fraud", "champion"): 2},
        "audits": [did("rollout.promote", "fraud@2", number=float("inf"))],
    }

    def state() -> object:
        return (
            control.rollout("r1"),
            control.deployments(),
            store.registry.versions(),
            store.registry.aliases(),
            store.audit(AuditQuery(), 100),
        )

    before = state()
    for spoilt in (
        {"deployments": [wanted(revision=5)]},
        {"moves": promote["moves"][:1]},
        {"aliases": {("fraud", "champion"): 9}},
    ):
        with pytest.raises((Conflict, NotFound)):
            control.commit(**{**promote, **spoilt})
        assert state() == before
    saved = control.commit(**promote)
    assert saved is not None and (saved.status, saved.revision) == ("promoted", 2)
    assert control.deployment("fraud") == wanted(revision=1, versions=(2, 1))
    assert [each.stage for each in store.registry.versions("fraud")] == [Stage.SERVING, Stage.VALIDATED]
    (event,) = store.audit(AuditQuery(action="rollout.promote"), 10)
    assert event.details == {"number": None}


def test_what_a_shadow_found_is_kept_beside_its_rollout(control: ControlStore) -> None:
    start(control)
    assert control.report("r1") is None
    control.put_report("r1", '{"fraud": 1}')
    control.put_report("r1", '{"fraud": 2}')
    assert control.report("r1") == '{"fraud": 2}'
    assert control.rollout("r1").revision == 1


# Leases and servers


def test_a_lease_is_its_holders_until_it_runs_out(control: ControlStore) -> None:
    assert control.lease("control") is None
    assert control.take("control", "a", NOW, 5.0)
    assert not control.take("control", "b", NOW + 4.9, 5.0)
    assert control.take("other", "b", NOW, 5.0)
    assert control.take("control", "a", NOW + 4.9, 5.0)
    assert not control.take("control", "b", NOW + 9.8, 5.0)
    assert control.lease("control") == LeaseRow(name="control", holder="a", until=NOW + 4.9 + 5.0)
    assert control.take("control", "b", NOW + 10, 5.0)
    assert not control.take("control", "a", NOW + 10, 5.0)
    control.drop("control", "a")
    assert not control.take("control", "a", NOW + 11, 5.0)
    control.drop("control", "b")
    assert control.take("control", "a", NOW + 11, 5.0)


def test_a_lease_that_many_take_at_once_is_ones(store: Store, url: str) -> None:
    stores = [store, *(Store.open(url) for _ in range(5))]
    for n in range(10):
        # First it is free, then each time the one before has just run out.
        taken = at_once(6, lambda each, n=n: stores[each].control.take("control", f"s{each}-{n}", NOW + n, 1.0))
        assert sorted(taken) == [False] * 5 + [True]
        lease = store.control.lease("control")
        assert lease is not None and lease.holder == f"s{taken.index(True)}-{n}"
    for other in stores[1:]:
        other.close()


def test_servers_that_live_tell_how_they_stand(control: ControlStore) -> None:
    control.beat("a", {"fraud": {"1": {"state": "ready"}}}, NOW)
    control.beat("b", {}, NOW)
    control.beat("b", {"fraud": {"2": {"state": "failed", "reason": "it said \0"}}}, NOW + 5)
    b = ServerRow(id="b", seen=NOW + 5, state={"fraud": {"2": {"state": "failed", "reason": "it said "}}})
    assert control.servers(NOW) == (ServerRow(id="a", seen=NOW, state={"fraud": {"1": {"state": "ready"}}}), b)
    assert control.servers(NOW + 1) == (b,)
    control.leave("b")
    assert [row.id for row in control.servers(0)] == ["a"]


# Windows


def test_windows_are_taken_in_order_and_once(control: ControlStore) -> None:
    assert control.take_windows(10) == ()
    control.add_windows("a", [("fraud", b"\x00\xff"), ("churn", b"")], NOW)
    control.add_windows("b", [("fraud", b"3")], NOW + 1)
    control.add_windows("b", [], NOW)
    first = control.take_windows(2)
    assert [(row.server, row.model, row.time, row.data) for row in first] == [("a", "fraud", NOW, b"\x00\xff"), ("a", "churn", NOW, b"")]
    assert [(row.server, row.data) for row in control.take_windows(2)] == [("b", b"3")]
    assert control.take_windows(2) == ()


def test_windows_that_several_take_at_once_are_had_once(store: Store, url: str) -> None:
    stores = [store, *(Store.open(url) for _ in range(3))]
    for n in range(40):
        store.control.add_windows("a", [("fraud", bytes([n, each])) for each in range(5)], NOW)

    def take(n: int) -> list[bytes]:
        return [row.data for _ in range(20) for row in stores[n].control.take_windows(7)]

    had = [data for each in at_once(4, take) for data in each]
    had += [row.data for row in store.control.take_windows(200)]
    assert sorted(had) == [bytes([n, each]) for n in range(40) for each in range(5)]
    for other in stores[1:]:
        other.close()


# Feedback


def exposed(id: str, version: str = "2", rollout: str = "r1", time: float = NOW, model: str = "fraud") -> ExposureRow:
    return ExposureRow(request_id=id, model=model, version=version, rollout=rollout, time=time)


def give(control: ControlStore, *rows: tuple[str, str, float], now: float = NOW + 1) -> list[Taken]:
    return list(control.give_feedback(rows, "k1", now))


def test_feedback_finds_the_version_that_answered(control: ControlStore) -> None:
    control.add_exposures([exposed(f"q{n}", str(1 + n % 2)) for n in range(300)])
    control.add_exposures([])
    assert give(control, ("q0", "ok", 1.0), ("q1", "ok", 0.5), ("q1", "stars", 3.0), ("q3", "ok", 0.25)) == [Taken.TAKEN] * 4
    rows = control.feedback_since("r1", 0, 3)
    assert [(row.request_id, row.name, row.value, row.version, row.actor, row.time) for row in rows] == [
        ("q0", "ok", 1.0, "1", "k1", NOW + 1),
        ("q1", "ok", 0.5, "2", "k1", NOW + 1),
        ("q1", "stars", 3.0, "2", "k1", NOW + 1),
    ]
    assert [row.request_id for row in control.feedback_since("r1", rows[-1].id, 10)] == ["q3"]
    assert control.feedback_since("r2", 0, 10) == () == control.feedback_sums("r2")
    give(control, ("q2", "ok", 0.5))
    assert control.feedback_sums("r1") == (
        FeedbackSum(model="fraud", version="1", name="ok", num=2, sum=1.5, squares=1.25),
        FeedbackSum(model="fraud", version="2", name="ok", num=2, sum=0.75, squares=0.3125),
        FeedbackSum(model="fraud", version="2", name="stars", num=1, sum=3.0, squares=9.0),
    )


def test_feedback_counts_once(control: ControlStore) -> None:
    control.add_exposures([exposed("q1"), exposed("q2")])
    said = give(control, ("q1", "ok", 1.0), ("q1", "ok", 1.0), ("q1", "ok", 0.0), ("nobody's", "ok", 1.0), ("q\0", "ok", 1.0))
    assert said == [Taken.TAKEN, Taken.SAME, Taken.CONFLICT, Taken.UNKNOWN, Taken.UNKNOWN]
    assert give(control, ("q1", "ok", 1.0), ("q1", "ok", 0.0), ("q2", "ok", 0.0)) == [Taken.SAME, Taken.CONFLICT, Taken.TAKEN]
    assert [(row.num, row.sum) for row in control.feedback_sums("r1")] == [(2, 1.0)]
    for name, value in (("ok", float("nan")), ("ok", 1e200), ("a\0", 1.0)):
        with pytest.raises(InvalidRequest, match="feedback on 'q2'"):
            give(control, ("q1", "more", 1.0), ("q2", name, value))
    assert len(control.feedback_since("r1", 0, 10)) == 2


def test_the_same_feedback_from_many_at_once_counts_once(store: Store, url: str) -> None:
    stores = [store, *(Store.open(url) for _ in range(3))]
    ids = [f"q{n}" for n in range(50)]
    store.control.add_exposures([exposed(id) for id in ids])

    def post(n: int) -> list[Taken]:
        return [answer for id in ids for answer in give(stores[n].control, (id, "ok", 1.0))]

    answers = at_once(4, post)
    for of_one in zip(*answers, strict=True):
        assert sorted(of_one) == [Taken.SAME] * 3 + [Taken.TAKEN]
    assert [(row.num, row.sum) for row in store.control.feedback_sums("r1")] == [(50, 50.0)]
    for other in stores[1:]:
        other.close()


def test_of_a_request_that_is_known_the_first_answer_stays(store: Store, url: str) -> None:
    """A client may send the same id again and again, to several servers."""
    control = store.control
    control.add_exposures([exposed("q1", "1"), exposed("q1", "2"), exposed("q2", "2")])
    control.add_exposures([exposed("q1", "2"), exposed("q2", "1"), exposed("q\0", "1")])
    give(control, ("q1", "ok", 1.0), ("q2", "ok", 1.0))
    assert [(row.request_id, row.version) for row in control.feedback_since("r1", 0, 10)] == [("q1", "1"), ("q2", "2")]
    other = Store.open(url)
    both = [exposed(f"p{n}") for n in range(3000)]
    at_once(2, lambda n: (control, other.control)[n].add_exposures(both if n else both[::-1]))
    with store._engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(tables.exposures)).scalar_one() == 3003
    other.close()


# Upkeep


def test_what_is_old_is_purged_but_not_what_a_rollout_is_decided_from(control: ControlStore) -> None:
    running, over = start(control, "r1"), start(control, "r2", {"churn": 1})
    rows = [exposed(f"{rollout}-{n}", rollout=rollout, time=NOW + n) for rollout in ("r1", "r2") for n in range(3)]
    control.add_exposures(rows)
    give(control, *((row.request_id, "ok", 1.0) for row in rows), now=NOW)
    end(control, over)
    control.add_windows("a", [("fraud", b"")], NOW)
    control.add_windows("a", [("fraud", b"new")], NOW + 9)
    control.beat("a", {}, NOW)
    control.beat("b", {}, NOW + 9)
    assert control.purge(exposures_before=NOW + 2, windows_before=NOW + 2, servers_before=NOW + 2, limit=3) == 3 + 3 + 1 + 1
    assert control.purge(exposures_before=NOW + 2, windows_before=NOW + 2, servers_before=NOW + 2, limit=3) == 1
    assert control.purge(exposures_before=NOW + 2, windows_before=NOW + 2, servers_before=NOW + 2) == 0
    assert [len(control.feedback_since(id, 0, 10)) for id in ("r1", "r2")] == [3, 0]
    assert [(row.num, row.sum) for id in ("r1", "r2") for row in control.feedback_sums(id)] == [(3, 3.0), (3, 3.0)]
    assert give(control, ("r1-0", "ok", 1.0), ("r2-0", "ok", 1.0), ("r2-2", "stars", 1.0)) == [Taken.SAME, Taken.UNKNOWN, Taken.TAKEN]
    assert [row.data for row in control.take_windows(10)] == [b"new"]
    assert [row.id for row in control.servers(0)] == ["b"]
    assert control.running() == (running,)


# Being told


def test_a_change_of_a_deployment_is_heard_of_by_other_servers(postgres: Postgres) -> None:
    store, other = Store.open(url := postgres.new_database()), Store.open(url)
    heard: list[str] = []
    arrived, stop = threading.Condition(), threading.Event()

    def hear(model: str) -> None:
        with arrived:
            heard.append(model)
            arrived.notify_all()

    def expect(models: list[str]) -> None:
        with arrived:
            assert arrived.wait_for(lambda: heard == models, timeout=20), heard
            heard.clear()

    assert other.control.notifies
    thread = threading.Thread(target=other.control.listen, args=(hear, stop))
    thread.start()
    expect([""])
    store.control.commit(deployments=[wanted("fraud"), wanted("churn")], audits=[did()])
    expect(["fraud", "churn"])
    with pytest.raises(Conflict):
        store.control.commit(deployments=[wanted("fraud")], audits=[did()])
    start(store.control)
    other.control.commit(deployments=[wanted("own")], audits=[])  # which it does not tell itself
    store.control.commit(deployments=[wanted("fraud", 1)], audits=[])
    expect(["fraud"])
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
        store.control.listen(break_it, threading.Event())
    store.close()


def test_a_database_that_is_gone_is_unavailable_and_found_again(postgres: Postgres) -> None:
    store = Store.open(postgres.new_database())
    control = store.control
    row = start(control)
    postgres.stop()
    acts: list[Callable[[], object]] = [
        control.deployments,
        control.running,
        lambda: control.commit(rollout=row, audits=[did()]),
        lambda: control.take("control", "a", NOW, 5.0),
        lambda: control.beat("a", {}, NOW),
        lambda: control.add_exposures([exposed("q1")]),
        store.registry.models,
    ]
    for act in acts:
        with pytest.raises(Unavailable, match="does not answer"):
            act()
    postgres.start()
    assert control.running() == (row,)
    assert control.commit(rollout=row, audits=[]) is not None
    store.close()
