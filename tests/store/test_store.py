"""The store on SQLite and on a real PostgreSQL."""

import multiprocessing
import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from msgspec import structs
from sqlalchemy.exc import DBAPIError

from fairlead.core.errors import ConfigError, NotFound, Unavailable
from fairlead.core.policy import Scope, TenantPolicy
from fairlead.store import database, migrations, tables
from fairlead.store.rows import AuditQuery, AuditRow, ConfigRow, KeyRow, ProjectRow, TenantRow, UsageQuery, UsageRow
from fairlead.store.store import Store
from fairlead.store.transactions import Conflict
from tests.store.postgres import Postgres

NOW = 1_790_000_000.0


def did(action: str = "test", subject: str = "it", time: float = NOW) -> AuditRow:
    return AuditRow(time=time, actor="tester", action=action, subject=subject)


def key(id: str = "k1", **fields: Any) -> KeyRow:
    return KeyRow(
        **{"id": id, "tenant": "default", "digest": f"d-{id}", "signing_key": "00", "prefix": f"fl_{id}", "created": NOW, **fields}
    )


def admin(id: str, **fields: Any) -> KeyRow:
    return key(id, scopes=(Scope.ADMIN,), **fields)


# Opening


def test_the_tables_are_as_the_migrations_leave_them(store: Store) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": database.VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_the_newest_migration_is_the_one_that_is_looked_for() -> None:
    assert ScriptDirectory(os.path.dirname(migrations.__file__)).get_heads() == [database.HEAD]


def test_rows_have_the_columns_of_their_tables() -> None:
    rows = {TenantRow: "tenants", ProjectRow: "projects", KeyRow: "keys", UsageRow: "usage", AuditRow: "audit", ConfigRow: "configs"}
    for row, table in rows.items():
        assert {column.name for column in tables.metadata.tables[table].c} == set(row.__struct_fields__)


def _open(url: str, start: Any) -> None:
    start.wait()
    store = Store.open(url)
    store.record((), [did("opened")])
    store.close()


def test_processes_that_open_a_new_database_at_once_all_succeed(bare_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(3)
    processes = [spawn.Process(target=_open, args=(bare_url, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = Store.open(bare_url)
    assert len(store.audit(AuditQuery(), 10)) == 3
    assert [row.name for row in store.tenants()] == ["default"]
    store.close()


def test_a_database_is_looked_at_without_a_change(bare_url: str) -> None:
    assert database.look_at(bare_url) == ("", 0)
    assert database.look_at(bare_url) == ("", 0)
    Store.open(bare_url).close()
    assert database.look_at(bare_url) == (database.HEAD, 0)


def test_a_database_of_a_newer_version_is_not_touched(store: Store, url: str) -> None:
    with store._writing.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {database.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(ConfigError, match="newer Fairlead"):
        Store.open(url)


def test_records_of_before_they_knew_how_many_requests_they_are_count_as_one_each(bare_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _made_by("0001", bare_url, monkeypatch)
    store = Store.open(bare_url)
    (record,) = store.records(UsageQuery(), 10)
    assert (record.tenant, record.requests, record.input_tokens) == ("acme", 1, 7)
    store.record([UsageRow(time=NOW, tenant="acme", model="m", outcome="success", requests=0)])
    assert [each.requests for each in store.records(UsageQuery(), 10)] == [0, 1]
    store.close()


def _made_by(version: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database as an older Fairlead left it, with one record."""
    with monkeypatch.context() as older:
        older.setattr(database, "_upgrade", partial(_upgrade_to, version))
        store = Store.open(url)
    columns = {
        **dict.fromkeys(("request_id", "project", "key", "version", "qos_class", "kind", "reason", "address"), ""),
        **dict.fromkeys(("cached_tokens", "output_tokens", "rows", "megapixels", "compute_seconds", "seconds", "cost"), 0),
        **{"time": NOW - 1, "tenant": "acme", "model": "m", "outcome": "success", "status": 200, "input_tokens": 7, "cached": False},
    }
    names = ", ".join(f'"{name}"' for name in columns)
    with store._writing.begin() as connection:
        connection.execute(sa.text(f"INSERT INTO usage ({names}) VALUES ({', '.join(f':{name}' for name in columns)})"), columns)
    store.close()


def _upgrade_to(version: str, connection: sa.Connection, *_: Any) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", os.path.dirname(migrations.__file__))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, version)


def test_others_cannot_read_the_file(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/a.db")
    store.add_key(key(), did())
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    store.close()


def test_the_default_place_is_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert database.default_url() == f"sqlite:///{tmp_path}/data/fairlead/fairlead.db"
    assert stat.S_IMODE((tmp_path / "data/fairlead").stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert database.default_url() == f"sqlite:///{tmp_path}/.local/share/fairlead/fairlead.db"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "is no URL"),
        ("mysql://somewhere/db", "`mysql` is not offered"),
        ("sqlite://", "must name a file"),
        ("sqlite:////no/such/folder/a.db", "cannot open the store /no/such/folder/a.db: No such file"),
        ("postgresql://me:hidden@127.0.0.1:1/db", r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/db"),
    ],
)
def test_a_url_that_cannot_be_opened_says_why_and_hides_its_password(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Store.open(url)
    assert "hidden" not in raised.value.message


def test_a_file_that_is_no_database_is_an_error_of_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_text("just some text, and long enough to be looked at" * 10)
    with pytest.raises(ConfigError, match="not a database"):
        Store.open(f"sqlite:///{tmp_path}/a.db")


# Revisions and audit


def test_every_change_counts_the_revision_up_and_is_in_the_audit_log(store: Store) -> None:
    changes = {
        "tenant.create": lambda a: store.add_tenant(TenantRow(name="acme", created=NOW), a),
        "tenant.update": lambda a: store.change_tenant("acme", lambda row: structs.replace(row, policy=TenantPolicy(weight=2.0)), a),
        "project.put": lambda a: store.put_project(ProjectRow(tenant="acme", name="app", created=NOW), a),
        "key.create": lambda a: store.add_key(key(tenant="acme", project="app"), a),
        "key.rotate": lambda a: store.rotate_key("k1", lambda old: key("k2", tenant="acme", replaces="k1"), 5.0, a),
        "key.revoke": lambda a: store.revoke_key("k1", a),
        "project.delete": lambda a: store.delete_project("acme", "app", a),
        "tenant.delete": lambda a: store.delete_tenant("acme", a, force=True),
        "config.put": lambda a: store.add_config("a: 1", a),
    }
    before = store.revision()
    for number, (action, change) in enumerate(changes.items(), 1):
        change(did(action))
        assert store.revision() == before + number
    assert [row.action for row in reversed(store.audit(AuditQuery(), 100))] == list(changes)


def test_a_change_that_fails_leaves_no_trace(store: Store) -> None:
    before = store.revision()
    with pytest.raises(NotFound):
        store.add_key(key(tenant="nobody"), did())
    with pytest.raises(Conflict):
        store.add_tenant(TenantRow(name="default", created=NOW), did())
    assert (store.revision(), store.audit(AuditQuery(), 10)) == (before, ())


def test_usage_and_audit_entries_alone_do_not_make_gateways_read_all_keys_again(store: Store) -> None:
    before = store.revision()
    store.record([UsageRow(time=NOW, tenant="t", model="m", outcome="success")], [did()])
    assert store.revision() == before


def test_audit_rows_cannot_be_changed_or_deleted(store: Store) -> None:
    store.record((), [did()])
    for statement in ("UPDATE audit SET actor = 'somebody else'", "DELETE FROM audit"):
        with pytest.raises(DBAPIError, match="never changed"), store._writing.begin() as connection:
            connection.exec_driver_sql(statement)
    assert [row.actor for row in store.audit(AuditQuery(), 10)] == ["tester"]


def test_the_audit_log_is_asked_by_whom_what_when_and_paged(store: Store) -> None:
    store.record((), [did(f"a{n % 2}", f"s{n}", NOW + n) for n in range(6)])
    found = store.audit(AuditQuery(action="a1", since=NOW + 1, until=NOW + 5), 10)
    assert [row.subject for row in found] == ["s3", "s1"]
    first = store.audit(AuditQuery(), 4)
    rest = store.audit(AuditQuery(), 4, first[-1].id)
    assert [row.subject for row in (*first, *rest)] == ["s5", "s4", "s3", "s2", "s1", "s0"]


def test_concurrent_changes_from_many_threads_all_count(store: Store) -> None:
    def add(n: int) -> None:
        store.add_key(key(f"k{n}"), did(subject=f"k{n}"))

    before = store.revision()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(40)))
    assert store.revision() == before + 40
    assert len(store.keys()) == 40


# Tenants and projects


def test_a_tenant_is_kept_with_what_its_policy_says_and_nothing_else(store: Store) -> None:
    policy = TenantPolicy(qos_class="batch", limits={"tokens_per_minute": 5}, models=("llama-*",))
    store.add_tenant(TenantRow(name="acme", policy=policy, created=NOW), did())
    assert store.tenant("acme").policy == policy
    with store._engine.connect() as connection:
        kept = connection.execute(sa.select(tables.tenants.c.policy).where(tables.tenants.c.name == "acme")).scalar_one()
    assert kept == {"class": "batch", "limits": {"tokens_per_minute": 5.0}, "models": ["llama-*"]}


def test_a_tenant_with_keys_that_work_is_deleted_only_by_force_and_they_go_with_it(store: Store) -> None:
    store.add_tenant(TenantRow(name="acme", created=NOW), did())
    store.put_project(ProjectRow(tenant="acme", name="app", created=NOW), did())
    store.add_key(key(tenant="acme"), did())
    with pytest.raises(Conflict, match="1 keys that work"):
        store.delete_tenant("acme", did())
    store.delete_tenant("acme", did(), force=True)
    assert (store.keys(), store.projects()) == ((), ())
    with pytest.raises(NotFound):
        store.projects("acme")
    with pytest.raises(Conflict, match="disable it instead"):
        store.delete_tenant("default", did(), force=True)


def test_a_project_that_is_put_again_keeps_its_beginning(store: Store) -> None:
    store.put_project(ProjectRow(tenant="default", name="app", created=NOW), did())
    row = store.put_project(ProjectRow(tenant="default", name="app", limits={"concurrent": 4}, created=NOW + 9), did())
    assert row == ProjectRow(tenant="default", name="app", limits={"concurrent": 4.0}, created=NOW)
    assert store.projects("default") == (row,)


# Keys


def test_a_key_comes_back_as_it_was_stored(store: Store) -> None:
    row = key(
        scopes=(Scope.INFER, Scope.REPOSITORY), models=("a", "b-*"), qos_class="batch", limits={"rows_per_second": 2.5},
        name="laptop", public_key="PEM", expires=NOW + 5, created_by="somebody",
    )  # fmt: skip
    store.add_key(row, did())
    assert (store.key("k1"), store.keys("default"), store.keys("default", "app")) == (row, (row,), ())


def test_a_rotated_key_lives_on_for_the_overlap_and_is_not_rotated_twice(store: Store) -> None:
    store.add_key(key(), did())
    old, new = store.rotate_key("k1", lambda old: key("k2", replaces=old.id), 60.0, did())
    assert (old.expires, new.replaces) == (NOW + 60, "k1")
    assert (old.live(NOW + 59), old.live(NOW + 60)) == (True, False)
    assert store.key("k1") == old
    with pytest.raises(Conflict, match="k2 came after it"):
        store.rotate_key("k1", lambda old: key("k3", replaces=old.id), 60.0, did())
    store.revoke_key("k2", did())
    with pytest.raises(Conflict, match="is revoked"):
        store.rotate_key("k2", lambda old: key("k3", replaces=old.id), 60.0, did())


def test_rotating_never_makes_a_key_live_longer(store: Store) -> None:
    store.add_key(key(expires=NOW + 10), did())
    old, _ = store.rotate_key("k1", lambda old: key("k2", replaces=old.id), 60.0, did())
    assert old.expires == NOW + 10


def test_the_last_admin_key_is_not_lost_by_accident(store: Store) -> None:
    store.add_tenant(TenantRow(name="ops", created=NOW), did())
    store.add_key(admin("root", tenant="ops"), did())
    store.add_key(admin("gone", expires=NOW - 1), did())
    store.add_key(key("plain"), did())
    for lose in (
        lambda: store.revoke_key("root", did()),
        lambda: store.change_tenant("ops", lambda row: structs.replace(row, disabled=True), did()),
    ):
        with pytest.raises(Conflict, match="root is the last one with the scope `admin`"):
            lose()
    assert store.revoke_key("plain", did()).revoked == NOW

    # A rotated one is no reserve, because it is about to expire.
    store.rotate_key("root", lambda old: admin("root2", tenant="ops", replaces="root"), 60.0, did())
    with pytest.raises(Conflict):
        store.revoke_key("root2", did())
    assert store.revoke_key("root", did()).revoked == NOW

    store.add_key(admin("second"), did())
    assert store.revoke_key("root2", did()).revoked == NOW
    assert store.revoke_key("second", did(), force=True).revoked == NOW


def test_revoking_again_keeps_the_first_time(store: Store) -> None:
    store.add_key(key(), did())
    store.revoke_key("k1", did())
    assert store.revoke_key("k1", did(time=NOW + 5)).revoked == NOW


def test_two_administrators_cannot_revoke_each_others_last_key_at_the_same_moment(store: Store) -> None:
    store.add_key(admin("a"), did())
    store.add_key(admin("b"), did())

    def revoke(id: str) -> bool:
        try:
            store.revoke_key(id, did())
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(revoke, ["a", "b"])) == [False, True]


# Configurations


def test_the_newest_configuration_is_the_active_one(store: Store) -> None:
    assert store.configs() == ()
    store.add_config("one", did())
    assert store.add_config("two", did()) == ConfigRow(version=2, time=NOW, actor="tester", text="two", active=True)
    assert [(row.version, row.text, row.active) for row in store.configs()] == [(2, "two", True), (1, "one", False)]


# Outages


def test_a_store_that_is_gone_says_so_and_is_found_again(postgres: Postgres) -> None:
    store = Store.open(postgres.new_database())
    postgres.stop()
    with pytest.raises(Unavailable, match="the store does not answer"):
        store.revision()
    postgres.start()
    assert store.revision() == 1
    store.close()


def test_a_file_that_another_program_locks_is_waited_for_and_then_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    store = Store.open(f"sqlite:///{tmp_path}/a.db")
    other = sqlite3.connect(tmp_path / "a.db")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        store.add_key(key(), did())
    assert store.keys() == ()
    other.close()
    store.add_key(key(), did())
    store.close()
