"""What is kept and asked, as plain functions: blocking, safe to call from any thread."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import gmtime, strftime
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from msgspec import structs
from sqlalchemy import ColumnElement, Connection, Engine, Select, Table

from fairlead.core.errors import NotFound
from fairlead.core.policy import DEFAULT_TENANT, Scope
from fairlead.store import tables
from fairlead.store.batches import BatchStore
from fairlead.store.control import ControlStore
from fairlead.store.database import open_database
from fairlead.store.jobs import JobStore
from fairlead.store.registry import RegistryStore
from fairlead.store.responses import ResponseStore
from fairlead.store.rows import (
    AuditQuery,
    AuditRow,
    ConfigRow,
    Dimension,
    KeyRow,
    ProjectRow,
    TenantRow,
    UsageQuery,
    UsageRow,
    UsageSum,
)
from fairlead.store.slo import SloStore
from fairlead.store.spent import SUMS, insert_usage, widened
from fairlead.store.sql import Sql, find, select, write_audit
from fairlead.store.transactions import Conflict, Transactions

R = TypeVar("R")

DEFAULT = "default"
"""The tenant, and each tenant's project, of those who name none: always there."""


class Store:
    """Changes of who may what carry their row of the audit log into the same transaction."""

    def __init__(self, engine: Engine) -> None:
        self._transactions = Transactions(engine)
        self._engine = engine
        self._writing = self._transactions.writing
        self.jobs = JobStore(self._transactions)
        control = Sql(engine, "fairlead_control")
        self.registry = RegistryStore(self._transactions, control)
        self.control = ControlStore(self._transactions, control)
        self.slos = SloStore(self._transactions, control)
        self.responses = ResponseStore(self._transactions, control)
        self.batches = BatchStore(self._transactions)

    @classmethod
    def open(cls, url: str) -> "Store":
        """Raises ConfigError."""
        return cls(open_database(url))

    @property
    def url(self) -> str:
        """Without its password."""
        return self._engine.url.render_as_string(hide_password=True)

    @property
    def file(self) -> Path | None:
        """SQLite's; None for a database that a server keeps."""
        return Path(str(self._engine.url.database)) if self._engine.dialect.name == "sqlite" else None

    def close(self) -> None:
        self._engine.dispose()

    def revision(self) -> int:
        """Grows with every change of tenants, projects, keys and configurations."""
        with self._transactions.reads() as connection:
            return int(connection.exec_driver_sql("SELECT number FROM revision").scalar_one())

    # Tenants and projects

    def tenants(self) -> tuple[TenantRow, ...]:
        return self._all(sa.select(tables.tenants).order_by(tables.tenants.c.name), TenantRow)

    def tenant(self, name: str) -> TenantRow:
        """Raises NotFound."""
        with self._transactions.reads() as connection:
            return _tenant(connection, name)

    def add_tenant(self, row: TenantRow, audit: AuditRow) -> None:
        """Raises Conflict where there is one of that name."""
        with self._changes(audit) as connection:
            if find(connection, tables.tenants, TenantRow, name=row.name) is not None:
                raise Conflict(f"there is a tenant `{row.name}` already")
            connection.execute(tables.tenants.insert(), _columns(row))

    def change_tenant(self, name: str, change: Callable[[TenantRow], TenantRow], audit: AuditRow, *, force: bool = False) -> TenantRow:
        """Raises NotFound, and Conflict where it would leave nobody with the admin scope, unless forced."""
        with self._changes(audit) as connection, _an_admin_stays(connection, audit.time, force):
            row = change(_tenant(connection, name))
            connection.execute(tables.tenants.update().where(tables.tenants.c.name == name), _columns(row))
            return row

    def delete_tenant(self, name: str, audit: AuditRow, *, force: bool = False) -> None:
        """With its projects and keys. Raises NotFound, and Conflict while it has keys that live, unless forced."""
        if name == DEFAULT:
            raise Conflict("the tenant `default` cannot be deleted, because callers without a tenant are its: disable it instead")
        with self._changes(audit) as connection:
            _tenant(connection, name)
            live = [row.id for row in select(connection, sa.select(tables.keys).filter_by(tenant=name), KeyRow) if row.live(audit.time)]
            if live and not force:
                raise Conflict(f"tenant `{name}` has {len(live)} keys that work: revoke them first, or force it")
            for table in (tables.keys, tables.projects):
                connection.execute(table.delete().where(table.c.tenant == name))
            connection.execute(tables.tenants.delete().where(tables.tenants.c.name == name))

    def projects(self, tenant: str | None = None) -> tuple[ProjectRow, ...]:
        """Raises NotFound for an unknown tenant."""
        query = sa.select(tables.projects).order_by(tables.projects.c.tenant, tables.projects.c.name)
        with self._transactions.reads() as connection:
            if tenant is not None:
                _tenant(connection, tenant)
                query = query.where(tables.projects.c.tenant == tenant)
            return select(connection, query, ProjectRow)

    def put_project(self, row: ProjectRow, audit: AuditRow) -> ProjectRow:
        """Make it, or change its limits. Raises NotFound for an unknown tenant."""
        table = tables.projects
        with self._changes(audit) as connection:
            _tenant(connection, row.tenant)
            old = find(connection, table, ProjectRow, tenant=row.tenant, name=row.name)
            if old is None:
                connection.execute(table.insert(), _columns(row))
            else:
                row = structs.replace(row, created=old.created)
                connection.execute(table.update().where(table.c.tenant == row.tenant, table.c.name == row.name), _columns(row))
            return row

    def delete_project(self, tenant: str, name: str, audit: AuditRow) -> None:
        """Raises NotFound, and Conflict while it has keys that live."""
        table = tables.projects
        with self._changes(audit) as connection:
            if find(connection, table, ProjectRow, tenant=tenant, name=name) is None:
                raise NotFound(f"tenant `{tenant}` has no project `{name}`")
            keys = select(connection, sa.select(tables.keys).filter_by(tenant=tenant, project=name), KeyRow)
            if name != DEFAULT and any(row.live(audit.time) for row in keys):
                raise Conflict(f"project `{name}` of tenant `{tenant}` has keys that work: revoke them first")
            connection.execute(table.delete().where(table.c.tenant == tenant, table.c.name == name))

    # Keys

    def keys(self, tenant: str | None = None, project: str | None = None) -> tuple[KeyRow, ...]:
        """The revoked and expired ones too."""
        query = sa.select(tables.keys).order_by(tables.keys.c.created, tables.keys.c.id)
        if tenant is not None:
            query = query.where(tables.keys.c.tenant == tenant)
        if project is not None:
            query = query.where(tables.keys.c.project == project)
        return self._all(query, KeyRow)

    def key(self, id: str) -> KeyRow:
        """Raises NotFound."""
        with self._transactions.reads() as connection:
            return _key(connection, id)

    def add_key(self, row: KeyRow, audit: AuditRow) -> None:
        """Raises NotFound for an unknown tenant or project."""
        with self._changes(audit) as connection:
            _tenant(connection, row.tenant)
            if row.project != DEFAULT and find(connection, tables.projects, ProjectRow, tenant=row.tenant, name=row.project) is None:
                raise NotFound(f"tenant `{row.tenant}` has no project `{row.project}`")
            connection.execute(tables.keys.insert(), _columns(row))

    def rotate_key(self, id: str, successor: Callable[[KeyRow], KeyRow], overlap: float, audit: AuditRow) -> tuple[KeyRow, KeyRow]:
        """(the old key, which lives `overlap` seconds more at most, the new one). Raises NotFound; Conflict for a key that is no longer alive."""
        with self._changes(audit) as connection:
            old = _key(connection, id)
            if not old.live(audit.time):
                raise Conflict(f"key {id} is {'revoked' if old.revoked is not None else 'expired'}: create another one")
            later = find(connection, tables.keys, KeyRow, replaces=id)
            if later is not None:
                raise Conflict(f"key {id} was already rotated: {later.id} came after it")
            new = successor(old)
            connection.execute(tables.keys.insert(), _columns(new))
            expires = audit.time + overlap if old.expires is None else min(old.expires, audit.time + overlap)
            connection.execute(tables.keys.update().where(tables.keys.c.id == id), {"expires": expires})
            return structs.replace(old, expires=expires), new

    def revoke_key(self, id: str, audit: AuditRow, *, force: bool = False) -> KeyRow:
        """Raises NotFound; Conflict for the last one with the admin scope, unless forced. A revoked key stays as it is."""
        with self._changes(audit) as connection, _an_admin_stays(connection, audit.time, force):
            row = _key(connection, id)
            if row.revoked is None:
                row = structs.replace(row, revoked=audit.time)
                connection.execute(tables.keys.update().where(tables.keys.c.id == id), {"revoked": audit.time})
            return row

    # Usage

    def record(self, usage: Sequence[UsageRow], audit: Sequence[AuditRow] = ()) -> None:
        """Write all of them, or none."""
        with self._transactions.writes() as connection:
            if usage:
                insert_usage(connection, usage)
            write_audit(connection, audit)

    def usage(self, query: UsageQuery, by: Sequence[Dimension] = (), limit: int | None = None) -> tuple[UsageSum, ...]:
        """Sums over whole hours: the range is widened to them. One row for each group, in the order of the groups."""
        hours = tables.usage_hours
        since, until = widened(query.since, query.until)
        groups = [_group(each).label(f"by_{each}") for each in by]
        counted = [sa.cast(sa.func.sum(hours.c[name]), hours.c[name].type).label(name) for name in SUMS]
        statement = sa.select(*groups, *counted).where(*_wanted(hours, query), hours.c.hour >= since)
        if until is not None:
            statement = statement.where(hours.c.hour < until)
        statement = statement.group_by(*groups).order_by(*groups).limit(limit)
        with self._transactions.reads() as connection:
            rows = connection.execute(statement).all()
        named = [tuple(_name(each, value) for each, value in zip(by, row, strict=False)) for row in rows]
        return tuple(
            UsageSum(group=group, **{name: getattr(row, name) or 0 for name in SUMS})
            for group, row in zip(named, rows, strict=True)
            if row.requests is not None
        )

    def records(self, query: UsageQuery, limit: int, after: tuple[float, int] | None = None) -> tuple[UsageRow, ...]:
        """The newest first; `after`: what follows the row of that time and id."""
        table = tables.usage
        statement = sa.select(table).where(*_wanted(table, query), *_within(table, query.since, query.until))
        if after is not None:
            statement = statement.where(sa.tuple_(table.c.time, table.c.id) < sa.tuple_(*map(sa.literal, after)))
        return self._all(statement.order_by(table.c.time.desc(), table.c.id.desc()).limit(limit), UsageRow)

    def purge(self, before: float, audit: AuditRow) -> int:
        """Delete the records of requests that ended before; their sums by the hour stay. Returns how many there were."""
        with self._transactions.writes() as connection:
            deleted = connection.execute(tables.usage.delete().where(tables.usage.c.time < before)).rowcount
            write_audit(connection, [structs.replace(audit, details={**audit.details, "records": deleted})])
            return deleted

    # Audit

    def audit(self, query: AuditQuery, limit: int, after: int | None = None) -> tuple[AuditRow, ...]:
        """The newest first; `after`: what follows the row of that id."""
        table = tables.audit
        equal = {"actor": query.actor, "action": query.action, "subject": query.subject}
        statement = sa.select(table).where(*_within(table, query.since, query.until))
        statement = statement.where(*(table.c[name] == value for name, value in equal.items() if value is not None))
        if query.model is not None:
            statement = statement.where(sa.or_(table.c.subject == query.model, self._begins(table.c.subject, f"{query.model}@")))
        if after is not None:
            statement = statement.where(table.c.id < after)
        return self._all(statement.order_by(table.c.id.desc()).limit(limit), AuditRow)

    # Configurations

    def configs(self, limit: int = 100) -> tuple[ConfigRow, ...]:
        """The newest first."""
        return self._all(sa.select(tables.configs).order_by(tables.configs.c.version.desc()).limit(limit), ConfigRow)

    def add_config(self, text: str, audit: AuditRow) -> ConfigRow:
        """A new version, which becomes the active one."""
        with self._changes(audit) as connection:
            last = connection.execute(sa.select(sa.func.max(tables.configs.c.version))).scalar()
            row = ConfigRow(version=(last or 0) + 1, time=audit.time, actor=audit.actor, text=text, active=True)
            connection.execute(tables.configs.update(), {"active": False})
            connection.execute(tables.configs.insert(), _columns(row))
            return row

    # Transactions

    @contextmanager
    def _changes(self, audit: AuditRow) -> Iterator[Connection]:
        """The new revision comes first: its row is the lock that puts changes in order, so that what is checked stays true."""
        with self._transactions.writes() as connection:
            connection.exec_driver_sql("UPDATE revision SET number = number + 1")
            yield connection
            write_audit(connection, [audit])

    def _begins(self, column: ColumnElement[str], beginning: str) -> ColumnElement[bool]:
        """Byte by byte, so that the index serves: LIKE takes capitals for small letters in SQLite."""
        at_least, below = (">=", "<") if self._transactions.is_sqlite else ("~>=~", "~<~")
        after = beginning[:-1] + chr(ord(beginning[-1]) + 1)
        return sa.and_(column.bool_op(at_least)(beginning), column.bool_op(below)(after))

    def _all(self, query: Select[Any], type_: type[R]) -> tuple[R, ...]:
        with self._transactions.reads() as connection:
            return select(connection, query, type_)


# Rows


def _tenant(connection: Connection, name: str) -> TenantRow:
    row = find(connection, tables.tenants, TenantRow, name=name)
    if row is None:
        raise NotFound(f"there is no tenant `{name}`")
    return row


def _key(connection: Connection, id: str) -> KeyRow:
    row = find(connection, tables.keys, KeyRow, id=id)
    if row is None:
        raise NotFound(f"there is no key {id}")
    return row


def _columns(row: TenantRow | ProjectRow | KeyRow | ConfigRow) -> dict[str, Any]:
    columns: dict[str, Any] = msgspec.to_builtins(row)
    if isinstance(row, TenantRow) and row.policy is not None:
        # Only what was said, so that a later default is not overruled by an older one.
        columns["policy"] = said(row.policy, DEFAULT_TENANT)
    return columns


def said(policy: msgspec.Struct, default: msgspec.Struct) -> dict[str, Any]:
    """A policy as JSON, without what is as it is by default."""
    unsaid = msgspec.to_builtins(default)
    return {name: value for name, value in msgspec.to_builtins(policy).items() if value != unsaid[name]}


@contextmanager
def _an_admin_stays(connection: Connection, now: float, force: bool) -> Iterator[None]:
    before = _admins(connection, now)
    yield
    if before and not force and not _admins(connection, now):
        raise Conflict(f"key {before[0]} is the last one with the scope `admin`: create another one first, or force it")


def _admins(connection: Connection, now: float) -> list[str]:
    """Keys with which somebody may still administer: not those that were rotated and live on for a while."""
    enabled = sa.select(tables.tenants.c.name).where(~tables.tenants.c.disabled)
    keys = select(connection, sa.select(tables.keys).where(tables.keys.c.revoked.is_(None), tables.keys.c.tenant.in_(enabled)), KeyRow)
    rotated = set(connection.execute(sa.select(tables.keys.c.replaces)).scalars())
    return [row.id for row in keys if Scope.ADMIN in row.scopes and row.live(now) and row.id not in rotated]


# Usage


def _wanted(table: Table, query: UsageQuery) -> list[ColumnElement[bool]]:
    equal = {name: getattr(query, name) for name in ("tenant", "project", "key", "model", "outcome")}
    return [table.c[name] == value for name, value in equal.items() if value is not None]


def _within(table: Table, since: float, until: float | None) -> list[ColumnElement[bool]]:
    return [table.c.time >= since] + ([table.c.time < until] if until is not None else [])


def _group(dimension: Dimension) -> ColumnElement[Any]:
    hours = tables.usage_hours.c
    match dimension:
        case Dimension.HOUR:
            return hours.hour
        case Dimension.DAY:
            return hours.hour // 86400
    return hours[dimension]


def _name(dimension: Dimension, value: Any) -> str:
    match dimension:
        case Dimension.HOUR:
            return strftime("%Y-%m-%dT%H:%MZ", gmtime(value))
        case Dimension.DAY:
            return strftime("%Y-%m-%d", gmtime(value * 86400))
    return str(value)
