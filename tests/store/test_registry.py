"""Models and versions in the registry, on SQLite and on a real PostgreSQL."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from msgspec import structs

from fairlead.core.errors import InvalidRequest, NotFound
from fairlead.core.versions import MOVES, Stage, parse_ref
from fairlead.store import tables
from fairlead.store.registry import MAX_NUMBER, RegistryStore
from fairlead.store.registry_rows import (
    AliasRow,
    DeploymentRow,
    ExposureRow,
    FeedbackRow,
    GateOutcome,
    GateRow,
    LeaseRow,
    ModelRow,
    Move,
    RolloutRow,
    ServerRow,
    VersionRow,
    WindowRow,
)
from fairlead.store.rows import AuditQuery, AuditRow
from fairlead.store.store import Store
from fairlead.store.transactions import Conflict

NOW = 1_790_000_000.0


@pytest.fixture
def registry(store: Store) -> RegistryStore:
    return store.registry


def did(action: str = "test", subject: str = "it", time: float = NOW, **details: Any) -> AuditRow:
    return AuditRow(time=time, actor="tester", action=action, subject=subject, details=details)


def draft(digest: str = "d1", model: str = "fraud", **fields: Any) -> VersionRow:
    base = {"spec": "backend: onnx", "files": {"model.onnx": (7, "ab")}, "location": f"file:///r/{digest}", "bytes": 7, "created": NOW}
    return VersionRow(**{"model": model, "digest": digest, **base, **fields})


def add(registry: RegistryStore, *digests: str, model: str = "fraud") -> list[VersionRow]:
    return [registry.add_version(draft(digest, model), did("version.add"))[0] for digest in digests]


def at(registry: RegistryStore, stage: Stage, digest: str = "d1") -> VersionRow:
    """A new version that came to a stage by the shortest way."""
    (row,) = add(registry, digest)
    ways = {Stage.STAGED: (), Stage.SERVING: (Stage.VALIDATED, Stage.SERVING)}
    for each in ways.get(stage, (stage,)):
        row = registry.move("fraud", row.number, each, "", did())
    return row


def deploy(store: Store, model: str, *versions: int) -> None:
    before = store.control.deployment(model)
    row = DeploymentRow(
        model=model, state={}, versions=versions, revision=before.revision if before else 0, updated=NOW, actor="tester"
    )  # fmt: skip
    store.control.commit(deployments=[row], audits=[did()])


def actions(store: Store) -> list[tuple[str, str]]:
    return [(row.action, row.subject) for row in reversed(store.audit(AuditQuery(), 100))]


def test_rows_have_the_columns_of_their_tables() -> None:
    rows = {
        ModelRow: tables.models, VersionRow: tables.versions, AliasRow: tables.aliases, GateRow: tables.gates,
        DeploymentRow: tables.deployments, RolloutRow: tables.rollouts, LeaseRow: tables.leases, ServerRow: tables.servers,
        WindowRow: tables.windows, ExposureRow: tables.exposures, FeedbackRow: tables.feedback,
    }  # fmt: skip
    for row, table in rows.items():
        assert {column.name for column in table.c} == set(row.__struct_fields__)


# Adding


def test_a_version_comes_back_as_it_was_added(registry: RegistryStore) -> None:
    written = draft(
        files={"a.onnx": (1 << 40, "ab"), "sub/b": (0, "cd")}, bytes=1 << 40, backend="onnx", provenance={"who": "me", "metrics": {"auc": 0.9}},
        tags={"team": "risk"}, signed_by="ci", signature_text="c2ln", signature={"inputs": [{"name": "x"}]},
    )  # fmt: skip
    row, new = registry.add_version(written, did())
    assert new
    assert row == structs.replace(written, number=1, moved=NOW) == registry.version("fraud", 1) == registry.same_content("fraud", "d1")
    assert row.ref == "fraud@1"
    assert registry.model("fraud") == ModelRow(name="fraud", created=NOW, next_version=2)


def test_numbers_count_up_and_are_never_given_twice(registry: RegistryStore) -> None:
    assert [row.number for row in add(registry, "d1", "d2", "d3")] == [1, 2, 3]
    registry.delete_version("fraud", 3, did())
    (row,) = add(registry, "d3")
    assert row.number == 4
    with pytest.raises(Conflict, match=r"fraud@3 was given before.* the next is 5"):
        registry.add_version(draft("d5", number=3), did())
    with pytest.raises(Conflict, match="fraud@2 was given before"):
        registry.add_version(draft("d5", number=2), did())
    assert registry.add_version(draft("d5", number=9), did())[0].number == 9
    assert add(registry, "d6")[0].number == 10
    assert add(registry, "d1", model="churn")[0].number == 1


def test_a_reserved_number_is_nobody_elses_and_used_once(registry: RegistryStore) -> None:
    assert [registry.reserve("fraud", now=NOW), registry.reserve("fraud", now=NOW), registry.reserve("fraud", number=7, now=NOW)] == [
        1,
        2,
        7,
    ]
    assert registry.versions("fraud") == ()
    with pytest.raises(Conflict, match="fraud@2 was given before"):
        registry.reserve("fraud", number=2, now=NOW)
    assert registry.add_version(draft("d2", number=2), did())[0].number == 2
    assert registry.add_version(draft("d8"), did())[0].number == 8
    assert registry.add_version(draft("d7", number=7), did())[0].number == 7
    registry.delete_version("fraud", 7, did())
    with pytest.raises(Conflict, match="fraud@7 was given before"):
        registry.add_version(draft("d7", number=7), did())


def test_the_same_content_again_is_the_version_that_it_was(store: Store, registry: RegistryStore) -> None:
    (first,) = add(registry, "d1")
    number = registry.reserve("fraud", now=NOW)
    assert registry.add_version(draft("d1", number=number, location="file:///elsewhere"), did("version.add")) == (first, False)
    assert actions(store) == [("version.add", "fraud@1")]
    with pytest.raises(Conflict, match="fraud@2 was given before"):
        registry.add_version(draft("d2", number=number), did())
    # In another model it is another version.
    assert add(registry, "d1", model="churn")[0].number == 1


@pytest.mark.parametrize(
    "row",
    [
        draft(model="no/name"),
        draft(number=MAX_NUMBER + 1),
        draft(number=-1),
        draft(spec="a\0b"),
        draft(tags={"a": "\ud800"}),
        draft(provenance={"metrics": {"auc": float("nan")}}),
    ],
)
def test_what_no_database_keeps_is_refused_and_leaves_nothing(store: Store, registry: RegistryStore, row: VersionRow) -> None:
    with pytest.raises(InvalidRequest):
        registry.add_version(row, did())
    assert (registry.models(), registry.versions(), actions(store)) == ((), (), [])


def test_the_last_number_is_the_last(registry: RegistryStore) -> None:
    assert registry.add_version(draft(number=MAX_NUMBER), did())[0].number == MAX_NUMBER
    with pytest.raises(Conflict, match="no numbers left"):
        registry.add_version(draft("d2"), did())


def at_once(threads: int, act: Callable[[int], Any]) -> list[Any]:
    start = Barrier(threads, timeout=20)

    def run(number: int) -> Any:
        start.wait()
        return act(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def test_the_same_content_from_many_threads_at_once_is_one_version(store: Store, registry: RegistryStore) -> None:
    found = at_once(8, lambda _: registry.add_version(draft(), did("version.add")))
    assert sorted(new for _, new in found) == [False] * 7 + [True]
    assert len({row.number for row, _ in found}) == 1
    assert actions(store) == [("version.add", "fraud@1")]


def test_other_contents_from_many_threads_at_once_get_a_number_each(registry: RegistryStore) -> None:
    found = at_once(8, lambda n: registry.add_version(draft(f"d{n}"), did())[0].number)
    assert sorted(found) == list(range(1, 9))
    assert sorted(at_once(4, lambda _: registry.reserve("fraud", now=NOW))) == [9, 10, 11, 12]


def _push(url: str, start: Any, answers: Any) -> None:
    store = Store.open(url)
    start.wait(30)
    for n in range(10):
        row, new = store.registry.add_version(draft(f"d{n}"), did("version.add"))
        answers.put((row.digest, row.number, new))
    store.close()


def test_two_processes_that_push_the_same_contents_at_once_share_the_versions(store: Store, url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, answers = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=_push, args=(url, start, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in range(20)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    versions = {row.digest: row.number for row in store.registry.versions("fraud")}
    assert sorted(versions.values()) == list(range(1, 11))
    assert sorted((digest, number) for digest, number, new in found if new) == sorted(versions.items())
    assert {(digest, number) for digest, number, _ in found} == set(versions.items())
    assert len(store.audit(AuditQuery(action="version.add"), 100)) == 10


# Models


def test_a_model_is_made_by_hand_or_by_its_first_version(store: Store, registry: RegistryStore) -> None:
    registry.add_model(ModelRow(name="fraud", created=NOW, description="finds fraud"), did("model.add", "fraud"))
    with pytest.raises(Conflict, match="there is a model `fraud` already"):
        registry.add_model(ModelRow(name="fraud", created=NOW), did())
    add(registry, "d1")
    add(registry, "d1", model="churn")
    assert [(row.name, row.description, row.next_version) for row in registry.models()] == [("churn", "", 2), ("fraud", "finds fraud", 2)]
    with pytest.raises(NotFound, match="no model `nobody` in the registry"):
        registry.model("nobody")
    with pytest.raises(NotFound):
        registry.versions("nobody")


def test_names_that_cannot_be_are_asked_for_in_vain(store: Store, registry: RegistryStore) -> None:
    add(registry, "d1")
    asks: list[Callable[[], object]] = [
        lambda: registry.model("a\0"),
        lambda: registry.versions("a\0"),
        lambda: registry.version("a\0", 1),
        lambda: registry.same_content("a\0", "d1"),
        lambda: registry.gates("a\0", 1),
        lambda: registry.aliases("a\0"),
        lambda: registry.drop_alias("fraud", "a\0", did()),
        lambda: registry.version("fraud", 1 << 40),
        lambda: store.control.deployment("a\0"),
        lambda: store.control.rollouts("a\0"),
        lambda: store.control.rollout("a\0"),
    ]
    for ask in asks:
        with pytest.raises((InvalidRequest, NotFound)):
            ask()
    assert registry.gates("fraud", 1, "a\0") == ()


def test_tags_are_added_and_taken_away_and_checks_replaced(registry: RegistryStore) -> None:
    add(registry, "d1")
    registry.change_model("fraud", did(), tags={"team": "risk", "tier": "1"}, checks={"latency": {"p99": 0.1}})
    row = registry.change_model("fraud", did(), tags={"tier": None, "owner": "ann"}, description="d")
    assert row == registry.model("fraud")
    assert (row.tags, row.checks, row.description) == ({"team": "risk", "owner": "ann"}, {"latency": {"p99": 0.1}}, "d")
    assert registry.change_model("fraud", did(), checks={}).checks == {}
    assert row.next_version == 2


def test_what_is_learnt_of_a_version_is_added_and_what_it_is_stays(registry: RegistryStore) -> None:
    (first,) = [registry.add_version(draft(provenance={"who": "me", "metrics": {"auc": 0.9}}, tags={"a": "1"}), did())[0]]
    row = registry.change_version(
        "fraud", 1, did(), signature={"inputs": []}, tags={"a": None, "b": "2"}, metrics={"f1": 0.5}, signed=("ci", "c2ln"), backend="onnx"
    )
    assert row == registry.version("fraud", 1)
    expected = structs.replace(
        first, signature={"inputs": []}, tags={"b": "2"}, provenance={"who": "me", "metrics": {"auc": 0.9, "f1": 0.5}}, signed_by="ci",
        signature_text="c2ln", backend="onnx",
    )  # fmt: skip
    assert row == expected
    assert registry.change_version("fraud", 1, did()) == expected
    with pytest.raises(InvalidRequest, match="provenance"):
        registry.change_version("fraud", 1, did(), metrics={"auc": float("inf")})


# Stages


@pytest.mark.parametrize("before", Stage)
def test_a_version_goes_from_stage_to_stage_as_the_table_says(registry: RegistryStore, before: Stage) -> None:
    for number, after in enumerate(Stage):
        row = at(registry, before, f"d{number}")
        if after in MOVES[before]:
            moved = registry.move("fraud", row.number, after, "because", did(time=NOW + 1))
            assert moved == structs.replace(row, stage=after, reason="because", moved=NOW + 1) == registry.version("fraud", row.number)
        else:
            with pytest.raises(Conflict, match=f"{row.ref} is {before}: it cannot become {after}"):
                registry.move("fraud", row.number, after, "", did())
            assert registry.version("fraud", row.number) == row
        if registry.version("fraud", row.number).stage is Stage.SERVING:
            registry.move("fraud", row.number, Stage.VALIDATED, "", did())


def test_a_promotion_is_one_transaction(store: Store, registry: RegistryStore) -> None:
    old, new = at(registry, Stage.SERVING), at(registry, Stage.VALIDATED, "d2")
    promote = [Move("fraud", new.number, Stage.SERVING, "better"), Move("fraud", old.number, Stage.VALIDATED, "replaced")]
    with pytest.raises(Conflict, match="fraud@1 serves: fraud@2 cannot serve beside it"):
        registry.move_all(promote[:1], aliases={("fraud", "champion"): 2}, audits=[did("promote")])
    assert registry.aliases() == ()
    registry.move_all(promote, aliases={("fraud", "champion"): 2, ("fraud", "challenger"): None}, audits=[did("promote"), did("step")])
    assert [(row.number, row.stage, row.reason) for row in registry.versions("fraud")] == [
        (2, Stage.SERVING, "better"),
        (1, Stage.VALIDATED, "replaced"),
    ]
    assert registry.aliases("fraud") == (AliasRow(model="fraud", alias="champion", number=2, updated=NOW, actor="tester"),)
    assert [row.action for row in store.audit(AuditQuery(), 2)] == ["step", "promote"]


def test_a_move_that_fails_takes_the_others_with_it(store: Store, registry: RegistryStore) -> None:
    add(registry, "d1", "d2")
    before = (registry.versions(), actions(store))
    moves = [Move("fraud", 1, Stage.VALIDATED), Move("fraud", 2, Stage.SERVING)]
    with pytest.raises(Conflict, match="fraud@2 is staged"):
        registry.move_all(moves, aliases={("fraud", "champion"): 2}, audits=[did()])
    with pytest.raises(NotFound, match="no version 3"):
        registry.move_all([*moves[:1], Move("fraud", 3, Stage.VALIDATED)], audits=[did()])
    assert (registry.versions(), actions(store)) == before


def test_a_reason_may_hold_whatever_a_model_said(registry: RegistryStore) -> None:
    add(registry, "d1")
    assert registry.move("fraud", 1, Stage.REJECTED, "it said \0\ud800!", did(why="\0", number=float("nan"))).reason == "it said ?!"


def test_two_promotions_at_once_leave_one_that_serves(registry: RegistryStore) -> None:
    for digest in ("d1", "d2"):
        at(registry, Stage.VALIDATED, digest)

    def promote(number: int) -> bool:
        try:
            registry.move("fraud", number + 1, Stage.SERVING, "", did())
        except Conflict:
            return False
        return True

    assert sorted(at_once(2, promote)) == [False, True]
    assert [row.stage for row in registry.versions("fraud")].count(Stage.SERVING) == 1


# Aliases and references


def test_a_reference_is_resolved_to_a_version(registry: RegistryStore) -> None:
    def number(ref: str) -> int:
        return registry.resolve(parse_ref(ref)).number

    add(registry, "d1", "d2", "d3")
    registry.put_alias("fraud", "prod", 1, did())
    assert [number("fraud@2"), number("fraud@prod"), number("fraud")] == [2, 1, 3]
    registry.move("fraud", 3, Stage.REJECTED, "", did())
    assert number("fraud") == 2
    registry.move("fraud", 1, Stage.VALIDATED, "", did())
    registry.move_all([], aliases={("fraud", "champion"): 1}, audits=[did()])
    assert number("fraud") == 1
    for ref, message in {"fraud@9": "no version 9", "fraud@test": "the alias `test`", "nobody": "no model", "nobody@1": "no model"}.items():
        with pytest.raises(NotFound, match=message):
            number(ref)
    registry.add_model(ModelRow(name="empty", created=NOW), did())
    with pytest.raises(NotFound, match="no version that is neither"):
        number("empty")


def test_aliases_are_moved_and_dropped_but_not_those_of_rollouts(registry: RegistryStore) -> None:
    add(registry, "d1", "d2")
    registry.put_alias("fraud", "prod", 1, did())
    assert registry.put_alias("fraud", "prod", 2, did(time=NOW + 1)) == AliasRow(
        model="fraud", alias="prod", number=2, updated=NOW + 1, actor="tester"
    )
    assert [(row.alias, row.number) for row in registry.aliases("fraud")] == [("prod", 2)]
    for alias in ("champion", "challenger"):
        with pytest.raises(Conflict, match="moved by rollouts"):
            registry.put_alias("fraud", alias, 1, did())
        with pytest.raises(Conflict, match="moved by rollouts"):
            registry.drop_alias("fraud", alias, did())
    for alias in ("7", "a\0", ""):
        with pytest.raises(InvalidRequest, match="is no alias"):
            registry.put_alias("fraud", alias, 1, did())
    with pytest.raises(NotFound):
        registry.put_alias("fraud", "prod", 3, did())
    registry.drop_alias("fraud", "prod", did())
    assert registry.aliases() == ()
    with pytest.raises(NotFound, match="the alias `prod`"):
        registry.drop_alias("fraud", "prod", did())


# Retiring and deleting


def test_what_is_wanted_is_neither_retired_nor_deleted(store: Store, registry: RegistryStore) -> None:
    add(registry, "d1")

    def refused(message: str) -> None:
        with pytest.raises(Conflict, match=message):
            registry.move("fraud", 1, Stage.RETIRED, "", did())
        with pytest.raises(Conflict, match=message):
            registry.delete_version("fraud", 1, did())

    registry.put_alias("fraud", "prod", 1, did())
    refused("the alias `prod` names fraud@1")
    registry.drop_alias("fraud", "prod", did())
    deploy(store, "fraud", 1, 2)
    refused("fraud@1 is deployed")
    deploy(store, "fraud", 2)
    rollout = RolloutRow(id="r1", model="fraud", status="loading", state="{}", created=NOW, updated=NOW)
    revisions = {"fraud": 2}
    rollout = store.control.start_rollout(rollout, {"fraud": 1}, [did()], revisions=revisions)
    refused("the rollout r1 tries fraud@1: abort it first")
    store.control.commit(rollout=structs.replace(rollout, ended=NOW), audits=[])
    assert registry.move("fraud", 1, Stage.RETIRED, "old", did()).stage is Stage.RETIRED
    with pytest.raises(Conflict, match="retired: no alias"):
        registry.put_alias("fraud", "prod", 1, did())


def test_a_version_that_is_deleted_leaves_its_events(store: Store, registry: RegistryStore) -> None:
    at(registry, Stage.VALIDATED)
    registry.add_gates([gate("r1", "load")])
    with pytest.raises(Conflict, match="fraud@1 is validated: retire it first"):
        registry.delete_version("fraud", 1, did())
    registry.move("fraud", 1, Stage.RETIRED, "", did())
    assert registry.delete_version("fraud", 1, did("version.delete", "fraud@1")).number == 1
    assert registry.versions("fraud") == ()
    with pytest.raises(NotFound):
        registry.gates("fraud", 1)
    assert [row.action for row in store.audit(AuditQuery(model="fraud"), 10)] == ["version.delete", "version.add"]


# Gates


def gate(run: str, name: str, outcome: GateOutcome = GateOutcome.PASSED, **fields: Any) -> GateRow:
    return GateRow(**{"model": "fraud", "number": 1, "run": run, "gate": name, "outcome": outcome, "seconds": 0.5, "time": NOW, **fields})


def test_gates_are_read_by_runs_the_newest_first(registry: RegistryStore) -> None:
    add(registry, "d1")

    def read(run: str | None = None) -> Sequence[tuple[str, str]]:
        return [(row.run, row.gate) for row in registry.gates("fraud", 1, run)]

    registry.add_gates([gate("b", "load")])
    registry.add_gates([gate("b", "schema", GateOutcome.FAILED, details={"said": "\0", "value": float("nan")})])
    registry.add_gates([gate("a", "load"), gate("a", "schema", GateOutcome.SKIPPED)])
    assert read() == [("a", "load"), ("a", "schema"), ("b", "load"), ("b", "schema")]
    assert read("b") == [("b", "load"), ("b", "schema")]
    failed = registry.gates("fraud", 1, "b")[1]
    assert (failed.outcome, failed.details) == (GateOutcome.FAILED, {"said": "", "value": None})
    with pytest.raises(NotFound):
        registry.add_gates([gate("a", "load", number=2)])


# Events


def test_the_events_of_a_model_are_its_own_and_its_versions(store: Store) -> None:
    subjects = ["fraud", "fraud@1", "fraud@12", "fraud2", "Fraud@1", "fraudA", "frau", "fraud-x@1", "a fraud@1"]
    store.record((), [did(subject=each) for each in subjects])
    found = store.audit(AuditQuery(model="fraud"), 10)
    assert [row.subject for row in found] == ["fraud@12", "fraud@1", "fraud"]
    assert [row.subject for row in store.audit(AuditQuery(model="fraud"), 10, found[0].id)] == ["fraud@1", "fraud"]


def test_a_change_of_the_registry_is_no_change_of_who_may_what(store: Store, registry: RegistryStore) -> None:
    before = store.revision()
    add(registry, "d1")
    registry.move("fraud", 1, Stage.VALIDATED, "", did())
    assert store.revision() == before
