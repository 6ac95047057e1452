"""Models, their versions, and what is known of them, as plain functions: blocking, safe to call from any thread.

Every change carries its rows of the audit log into the same transaction, and changes come one after the other, so that what is checked stays
true. All methods raise Unavailable where the database is gone, full or locked; nothing is half-written then.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import Struct, structs
from sqlalchemy import Connection

from fairlead.core.errors import InvalidRequest, NotFound
from fairlead.core.versions import ALIAS_NAME, CHALLENGER, CHAMPION, MOVES, Ref, Stage, check_model_name
from fairlead.store import tables
from fairlead.store.registry_rows import AliasRow, DeploymentRow, GateRow, ModelRow, Move, VersionRow
from fairlead.store.rows import AuditRow
from fairlead.store.sql import Sql, find, plain, select, write_audit
from fairlead.store.transactions import Conflict, Transactions

MAX_NUMBER = 999_999_999
"""The last one that a `Ref` can name."""
CHANGES_LOCK = 0x6661_6974
"""PostgreSQL's advisory lock: changes of versions, deployments and rollouts come one after the other. There are few, and each is short."""

Aliases = Mapping[tuple[str, str], int | None]
"""Model and alias → the number that it is to name; None: it is dropped."""


class RegistryStore:
    def __init__(self, transactions: Transactions, sql: Sql) -> None:
        self._transactions = transactions
        self._sql = sql

    # Models

    def models(self) -> tuple[ModelRow, ...]:
        """By name."""
        with self._transactions.reads() as connection:
            return select(connection, sa.select(tables.models).order_by(tables.models.c.name), ModelRow)

    def model(self, name: str) -> ModelRow:
        """Raises NotFound."""
        with self._transactions.reads() as connection:
            return _model(connection, name)

    def add_model(self, row: ModelRow, audit: AuditRow) -> None:
        """Raises Conflict where there is one of that name, InvalidRequest."""
        with self._changes([audit]) as connection:
            if find(connection, tables.models, ModelRow, name=check_model_name(row.name)) is not None:
                raise Conflict(f"there is a model `{row.name}` already")
            connection.execute(tables.models.insert(), _columns(row))

    def change_model(
        self,
        name: str,
        audit: AuditRow,
        *,
        description: str | None = None,
        tags: Mapping[str, str | None] | None = None,
        checks: dict[str, Any] | None = None,
    ) -> ModelRow:
        """None: as it was. `tags` are added; one that is None is removed. `checks` are replaced. Raises NotFound, InvalidRequest."""
        with self._changes([audit]) as connection:
            old = _model(connection, name)
            row = structs.replace(
                old,
                description=old.description if description is None else description,
                tags=_tagged(old.tags, tags),
                checks=old.checks if checks is None else checks,
            )
            connection.execute(tables.models.update().where(tables.models.c.name == name), _columns(row))
            return row

    # Versions

    def reserve(self, model: str, *, number: int = 0, now: float) -> int:
        """A number for `add_version`, which nobody else gets; 0: the next one. Makes the model where there is none.

        Raises Conflict where `number` was given before, InvalidRequest.
        """
        with self._changes() as connection:
            row = _model_or_new(connection, model, now)
            given = _next_number(row, number)
            connection.execute(tables.reservations.insert(), {"model": model, "number": given})
            _count_up(connection, row, given)
            return given

    def add_version(self, row: VersionRow, audit: AuditRow) -> tuple[VersionRow, bool]:
        """The stored row, and whether it is new: of the same content, the earlier one. Makes the model where there is none.

        `row.number`: 0, one that was reserved, or one that was never given. The subject of `audit` becomes the version's ref.
        Raises Conflict where the number belongs to other content, or did once; InvalidRequest.
        """
        assert row.stage is Stage.STAGED, row.stage
        with self._changes() as connection:
            model = _model_or_new(connection, row.model, audit.time)
            reserved = tables.reservations
            ours = connection.execute(reserved.delete().where(reserved.c.model == row.model, reserved.c.number == row.number)).rowcount
            earlier = find(connection, tables.versions, VersionRow, model=row.model, digest=row.digest)
            if earlier is not None:
                return earlier, False
            number = row.number if ours else _next_number(model, row.number)
            row = structs.replace(row, number=number, moved=audit.time)
            connection.execute(tables.versions.insert(), _columns(row))
            _count_up(connection, model, number)
            write_audit(connection, [structs.replace(audit, subject=row.ref)])
            return row, True

    def version(self, model: str, number: int) -> VersionRow:
        """Raises NotFound."""
        with self._transactions.reads() as connection:
            return _version(connection, model, number)

    def same_content(self, model: str, digest: str) -> VersionRow | None:
        """The version of that digest. None: there is none, or no such model."""
        with self._transactions.reads() as connection:
            return find(connection, tables.versions, VersionRow, model=check_model_name(model), digest=digest)

    def versions(self, model: str | None = None, stage: Stage | None = None) -> tuple[VersionRow, ...]:
        """By model, the newest first. Raises NotFound for an unknown model."""
        table = tables.versions
        query = sa.select(table).order_by(table.c.model, table.c.number.desc())
        if stage is not None:
            query = query.where(table.c.stage == stage)
        with self._transactions.reads() as connection:
            if model is not None:
                _model(connection, model)
                query = query.where(table.c.model == model)
            return select(connection, query, VersionRow)

    def resolve(self, ref: Ref) -> VersionRow:
        """Of a bare name the champion, else the newest that is neither retired nor rejected. Raises NotFound."""
        table = tables.versions
        with self._transactions.reads() as connection:
            if ref.version:
                return _version(connection, ref.model, ref.version)
            _model(connection, ref.model)
            alias = find(connection, tables.aliases, AliasRow, model=ref.model, alias=ref.alias or CHAMPION)
            if alias is not None:
                return _version(connection, ref.model, alias.number)
            if ref.alias:
                raise NotFound(f"no version of `{ref.model}` has the alias `{ref.alias}`")
            usable = table.c.stage.not_in((Stage.RETIRED, Stage.REJECTED))
            newest = sa.select(table).where(table.c.model == ref.model, usable).order_by(table.c.number.desc()).limit(1)
            found = select(connection, newest, VersionRow)
            if not found:
                raise NotFound(f"model `{ref.model}` has no version that is neither retired nor rejected")
            return found[0]

    def change_version(
        self,
        model: str,
        number: int,
        audit: AuditRow,
        *,
        signature: dict[str, Any] | None = None,
        backend: str | None = None,
        tags: Mapping[str, str | None] | None = None,
        metrics: Mapping[str, Any] | None = None,
        signed: tuple[str, str] | None = None,
    ) -> VersionRow:
        """None: as it was. `tags` are added, one that is None is removed; `metrics` are added to those of its provenance; `signed`: by which
        key, signature. Raises NotFound, InvalidRequest."""
        with self._changes([audit]) as connection:
            old = _version(connection, model, number)
            provenance = old.provenance
            if metrics is not None:
                provenance = {**provenance, "metrics": {**provenance.get("metrics", {}), **metrics}}
            signed_by, signature_text = (old.signed_by, old.signature_text) if signed is None else signed
            row = structs.replace(
                old,
                signature=old.signature if signature is None else signature,
                backend=old.backend if backend is None else backend,
                tags=_tagged(old.tags, tags),
                provenance=provenance,
                signed_by=signed_by,
                signature_text=signature_text,
            )
            _put_version(connection, row)
            return row

    def move(self, model: str, number: int, stage: Stage, reason: str, audit: AuditRow) -> VersionRow:
        """Raises NotFound, and Conflict where that stage does not come after its own, where it would be the second one that serves, and where
        one that is to be retired is still wanted."""
        return self.move_all([Move(model, number, stage, reason)], audits=[audit])[0]

    def move_all(self, moves: Sequence[Move], *, aliases: Aliases | None = None, audits: Sequence[AuditRow]) -> tuple[VersionRow, ...]:
        """All of them, or none. Time and actor are those of the first of `audits`. Raises as `move` does."""
        with self._changes(audits) as connection:
            return move_versions(connection, moves, aliases or {}, audits[0])

    def delete_version(self, model: str, number: int, audit: AuditRow) -> VersionRow:
        """The row of which nothing is left but its events; its files are the caller's to delete. Raises NotFound, and Conflict while it is wanted."""
        with self._changes([audit]) as connection:
            row = _version(connection, model, number)
            if row.stage in (Stage.VALIDATED, Stage.SERVING):
                raise Conflict(f"{row.ref} is {row.stage}: retire it first")
            _check_unwanted(connection, row)
            for table in (tables.gates, tables.versions):
                connection.execute(table.delete().where(table.c.model == model, table.c.number == number))
            return row

    # Aliases

    def aliases(self, model: str | None = None) -> tuple[AliasRow, ...]:
        """By model and name. Raises NotFound for an unknown model."""
        table = tables.aliases
        query = sa.select(table).order_by(table.c.model, table.c.alias)
        with self._transactions.reads() as connection:
            if model is not None:
                _model(connection, model)
                query = query.where(table.c.model == model)
            return select(connection, query, AliasRow)

    def put_alias(self, model: str, alias: str, number: int, audit: AuditRow) -> AliasRow:
        """Raises NotFound, InvalidRequest, and Conflict for `champion` and `challenger`, and for a retired version."""
        _check_alias(alias)
        with self._changes([audit]) as connection:
            _put_alias(connection, model, alias, number, audit)
            return AliasRow(model=model, alias=alias, number=number, updated=audit.time, actor=audit.actor)

    def drop_alias(self, model: str, alias: str, audit: AuditRow) -> None:
        """Raises NotFound, and Conflict for `champion` and `challenger`."""
        _check_alias(alias)
        with self._changes([audit]) as connection:
            _model(connection, model)
            if not _drop_alias(connection, model, alias):
                raise NotFound(f"no version of `{model}` has the alias `{alias}`")

    # Gates

    def add_gates(self, rows: Sequence[GateRow]) -> None:
        """Raises NotFound for an unknown version."""
        with self._changes() as connection:
            for model, number in {(row.model, row.number) for row in rows}:
                _version(connection, model, number)
            entries = [plain(msgspec.to_builtins(row)) for row in rows]
            for entry in entries:
                del entry["id"]
            if entries:
                connection.execute(tables.gates.insert(), entries)

    def gates(self, model: str, number: int, run: str | None = None) -> tuple[GateRow, ...]:
        """The newest run first, and of each run the first gate first. Raises NotFound for an unknown version."""
        table = tables.gates
        query = sa.select(table).where(table.c.model == model, table.c.number == number).order_by(table.c.id)
        with self._transactions.reads() as connection:
            _version(connection, model, number)
            runs: dict[str, list[GateRow]] = {}
            for row in select(connection, query, GateRow):
                runs.setdefault(row.run, []).append(row)
        return tuple(row for each in reversed(runs.values()) for row in each if run in (None, row.run))

    @contextmanager
    def _changes(self, audits: Sequence[AuditRow] = ()) -> Iterator[Connection]:
        with changes(self._transactions, self._sql, audits) as connection:
            yield connection


@contextmanager
def changes(transactions: Transactions, sql: Sql, audits: Sequence[AuditRow]) -> Iterator[Connection]:
    """Nobody else changes versions, deployments or rollouts until it ends."""
    with transactions.writes() as connection:
        sql.lock(connection, CHANGES_LOCK)
        yield connection
        write_audit(connection, audits)


def move_versions(connection: Connection, moves: Iterable[Move], aliases: Aliases, audit: AuditRow) -> tuple[VersionRow, ...]:
    """What is checked is how it is after all of them."""
    rows = []
    for move in moves:
        row = _version(connection, move.model, move.number)
        if move.stage not in MOVES[row.stage]:
            raise Conflict(f"{row.ref} is {row.stage}: it cannot become {move.stage}")
        row = structs.replace(row, stage=move.stage, reason=plain(move.reason), moved=audit.time)
        _put_version(connection, row)
        rows.append(row)
    for (model, alias), number in aliases.items():
        if number is None:
            _drop_alias(connection, model, alias)
        else:
            _put_alias(connection, model, alias, number, audit)
    for row in rows:
        if row.stage is Stage.RETIRED:
            _check_unwanted(connection, row)
        if row.stage is Stage.SERVING:
            table = tables.versions.c
            serving = connection.execute(
                sa.select(table.number).where(table.model == row.model, table.stage == Stage.SERVING).order_by(table.number)
            ).scalars()
            other = next((number for number in serving if number != row.number), None)
            if other is not None:
                raise Conflict(f"{row.model}@{other} serves: {row.ref} cannot serve beside it")
    return tuple(rows)


def _model(connection: Connection, name: str) -> ModelRow:
    check_model_name(name)
    row = find(connection, tables.models, ModelRow, name=name)
    if row is None:
        raise NotFound(f"there is no model `{name}` in the registry")
    return row


def _model_or_new(connection: Connection, name: str, now: float) -> ModelRow:
    row = find(connection, tables.models, ModelRow, name=check_model_name(name))
    if row is None:
        row = ModelRow(name=name, created=now)
        connection.execute(tables.models.insert(), _columns(row))
    return row


def _version(connection: Connection, model: str, number: int) -> VersionRow:
    check_model_name(model)
    row = find(connection, tables.versions, VersionRow, model=model, number=number) if 0 < number <= MAX_NUMBER else None
    if row is None:
        _model(connection, model)
        raise NotFound(f"model `{model}` has no version {number} in the registry")
    return row


def _next_number(model: ModelRow, wanted: int) -> int:
    if not 0 <= wanted <= MAX_NUMBER:
        raise InvalidRequest(f"{wanted} is no number of a version: 1 to {MAX_NUMBER}")
    number = wanted or model.next_version
    if number < model.next_version:
        raise Conflict(f"{model.name}@{number} was given before, and numbers are given once: the next is {model.next_version}")
    if number > MAX_NUMBER:
        raise Conflict(f"model `{model.name}` has no numbers left")
    return number


def _count_up(connection: Connection, model: ModelRow, given: int) -> None:
    if given >= model.next_version:
        connection.execute(tables.models.update().where(tables.models.c.name == model.name), {"next_version": given + 1})


def _put_version(connection: Connection, row: VersionRow) -> None:
    table = tables.versions
    connection.execute(table.update().where(table.c.model == row.model, table.c.number == row.number), _columns(row))


def _check_alias(alias: str) -> None:
    if alias in (CHAMPION, CHALLENGER):
        raise Conflict(f"the alias `{alias}` is moved by rollouts")
    if not ALIAS_NAME.fullmatch(alias):
        raise InvalidRequest(f"{alias!r} is no alias: small letters, digits, `_` and `-`, at most 64, the first a letter")


def _put_alias(connection: Connection, model: str, alias: str, number: int, audit: AuditRow) -> None:
    row = _version(connection, model, number)
    if row.stage is Stage.RETIRED:
        raise Conflict(f"{row.ref} is retired: no alias can name it")
    _drop_alias(connection, model, alias)
    new = AliasRow(model=model, alias=alias, number=number, updated=audit.time, actor=audit.actor)
    connection.execute(tables.aliases.insert(), _columns(new))


def _drop_alias(connection: Connection, model: str, alias: str) -> bool:
    table = tables.aliases
    return bool(connection.execute(table.delete().where(table.c.model == model, table.c.alias == alias)).rowcount)


def _check_unwanted(connection: Connection, row: VersionRow) -> None:
    alias = find(connection, tables.aliases, AliasRow, model=row.model, number=row.number)
    if alias is not None:
        raise Conflict(f"the alias `{alias.alias}` names {row.ref}: move or drop it first")
    deployment = find(connection, tables.deployments, DeploymentRow, model=row.model)
    if deployment is not None and row.number in deployment.versions:
        raise Conflict(f"{row.ref} is deployed")
    members = tables.rollout_members
    rollout = connection.execute(
        sa.select(members.c.rollout).where(members.c.model == row.model, members.c.number == row.number, members.c.running)
    ).scalar()
    if rollout is not None:
        raise Conflict(f"the rollout {rollout} tries {row.ref}: abort it first")


def _tagged(old: dict[str, str], changes: Mapping[str, str | None] | None) -> dict[str, str]:
    merged = {**old, **(changes or {})}
    return {name: value for name, value in merged.items() if value is not None}


def _columns(row: Struct) -> dict[str, Any]:
    """Raises InvalidRequest for what the databases do not both keep."""
    columns: dict[str, Any] = msgspec.to_builtins(row)
    for name, value in columns.items():
        if plain(value) != value:
            raise InvalidRequest(f"`{name}` holds what the store cannot keep: a NUL, half of a character, NaN or infinity")
    return columns
