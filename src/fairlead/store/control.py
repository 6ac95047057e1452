"""What control keeps: deployments, rollouts and what they are decided from, as plain functions: blocking, safe to call from any thread.

All methods raise Unavailable where the database is gone, full or locked; nothing is half-written then.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from threading import Event

import msgspec
import sqlalchemy as sa
from msgspec import structs
from sqlalchemy import ColumnElement, Connection, Select, Table
from sqlalchemy.dialects import postgresql, sqlite

from fairlead.core.errors import InvalidRequest, NotFound
from fairlead.core.versions import Stage, check_model_name
from fairlead.store import tables
from fairlead.store.registry import Aliases, changes, move_versions
from fairlead.store.registry_rows import (
    DeploymentRow,
    ExposureRow,
    FeedbackRow,
    FeedbackSum,
    LeaseRow,
    Move,
    RolloutRow,
    ServerRow,
    Taken,
    VersionRow,
    WindowRow,
)
from fairlead.store.rows import AuditRow
from fairlead.store.sql import Sql, find, plain, select
from fairlead.store.transactions import Conflict, Transactions

EXPOSURE = ExposureRow.__struct_fields__
FEEDBACK = FeedbackRow.__struct_fields__[:-1]
"""All but the id."""
SUM = ("rollout", *FeedbackSum.__struct_fields__)
ADDED = "ON CONFLICT (rollout, model, version, name) DO UPDATE SET " + ", ".join(
    f"{name} = feedback_sums.{name} + excluded.{name}" for name in ("num", "sum", "squares")
)
FEEDBACK_LOCK = 0x6661_6975
"""PostgreSQL's advisory lock: feedback is taken by one after the other, so that it is seen in the order of its ids, too."""
PURGE_ROWS = 10_000


class ControlStore:
    def __init__(self, transactions: Transactions, sql: Sql) -> None:
        self._transactions = transactions
        self._sql = sql

    # Changes

    def commit(
        self,
        *,
        deployments: Sequence[DeploymentRow] = (),
        rollout: RolloutRow | None = None,
        moves: Sequence[Move] = (),
        aliases: Aliases | None = None,
        audits: Sequence[AuditRow],
    ) -> RolloutRow | None:
        """All that follows from one decision, or none of it. Returns the rollout as it is then.

        Each deployment, and the rollout, carries the revision that it replaces, and gets the next one. A rollout with `ended` runs no more.
        Time and actor of moves and aliases are those of the first of `audits`.

        Raises Conflict where a revision has moved on, and whatever `RegistryStore.move` raises.
        """
        assert audits or not (moves or aliases)
        with changes(self._transactions, self._sql, audits) as connection:
            if rollout is not None:
                rollout = _save_rollout(connection, rollout)
            if moves or aliases:
                move_versions(connection, moves, aliases or {}, audits[0])
            _put_deployments(connection, self._sql, deployments)
            return rollout

    # Deployments

    def deployments(self) -> tuple[DeploymentRow, ...]:
        """By model."""
        with self._transactions.reads() as connection:
            return select(connection, sa.select(tables.deployments).order_by(tables.deployments.c.model), DeploymentRow)

    def deployment(self, model: str) -> DeploymentRow | None:
        with self._transactions.reads() as connection:
            return find(connection, tables.deployments, DeploymentRow, model=check_model_name(model))

    @property
    def notifies(self) -> bool:
        """Whether there is something to listen to: in PostgreSQL. Processes that share a file ask again and again."""
        return not self._sql.is_sqlite

    def listen(self, on_change: Callable[[str], None], stop: Event) -> None:
        """Call with each model whose deployment another process changes, and with "" once it listens; until `stop`. For a thread of its own.

        Raises Unavailable when the connection is lost: listen again, and look at everything that matters.
        """
        with self._transactions.reads() as connection:
            self._sql.listen(connection, lambda notice: on_change(notice.removeprefix("deployment ")), stop)

    # Rollouts

    def start_rollout(
        self,
        row: RolloutRow,
        members: Mapping[str, int],
        audits: Sequence[AuditRow],
        *,
        revisions: Mapping[str, int] | None = None,
        moves: Sequence[Move] = (),
    ) -> RolloutRow:
        """As it is then. `members`: model → the version that is tried; they are neither retired nor deleted until the rollout has ended.
        `revisions`: model → of the deployment that this was decided upon; a member that is not in it has none. `moves`: as in `commit`.

        Raises Conflict where one of the models is in a rollout that runs, a deployment was changed, or a version is gone, retired or serves.
        """
        assert row.model in members and row.ended is None, row
        table = tables.rollout_members
        with changes(self._transactions, self._sql, audits) as connection:
            busy = sa.select(table.c.model, table.c.rollout).where(table.c.model.in_(list(members)), table.c.running)
            running = connection.execute(busy.order_by(table.c.model)).first()
            if running is not None:
                raise Conflict(f"a rollout of `{running.model}` runs already: {running.rollout}")
            for model, number in members.items():
                _check_revision(connection, model, (revisions or {}).get(model, 0))
                _check_candidate(connection, model, number)
            if moves:
                move_versions(connection, moves, {}, audits[0])
            row = structs.replace(row, revision=1)
            connection.execute(tables.rollouts.insert(), msgspec.to_builtins(row))
            entries = [{"rollout": row.id, "model": model, "number": number, "running": True} for model, number in members.items()]
            connection.execute(table.insert(), entries)
            return row

    def rollout(self, id: str) -> RolloutRow:
        """Raises NotFound."""
        with self._transactions.reads() as connection:
            return _rollout(connection, id)

    def rollouts(self, model: str | None = None, *, running: bool | None = None, limit: int = 100) -> tuple[RolloutRow, ...]:
        """The newest first; `model`: those that it is, or was, a member of."""
        table, members = tables.rollouts, tables.rollout_members
        query = sa.select(table)
        if model is not None:
            query = query.where(table.c.id.in_(sa.select(members.c.rollout).where(members.c.model == check_model_name(model))))
        if running is not None:
            query = query.where(table.c.ended.is_(None) if running else table.c.ended.is_not(None))
        return self._rollouts(query.order_by(table.c.created.desc(), table.c.id.desc()).limit(limit))

    def running(self) -> tuple[RolloutRow, ...]:
        """The oldest first."""
        table = tables.rollouts
        return self._rollouts(sa.select(table).where(table.c.ended.is_(None)).order_by(table.c.created, table.c.id))

    def _rollouts(self, query: Select[tuple[object, ...]]) -> tuple[RolloutRow, ...]:
        with self._transactions.reads() as connection:
            return select(connection, query, RolloutRow)

    def report(self, rollout: str) -> str | None:
        """What `put_report` was given last."""
        with self._transactions.reads() as connection:
            return connection.execute(sa.select(tables.reports.c.data).where(tables.reports.c.rollout == rollout)).scalar()

    def put_report(self, rollout: str, data: str) -> None:
        """What a rollout's shadow found: JSON, control's own. Apart from the rollout, which is written far more often."""
        with self._transactions.writes() as connection:
            self._put(connection, tables.reports, {"rollout": rollout, "data": data})

    # Leases and servers

    def take(self, name: str, holder: str, now: float, seconds: float) -> bool:
        """Whether the lease is the holder's until `now + seconds`: it was free, ran out, or was the holder's already."""
        statement = """INSERT INTO leases (name, holder, until) VALUES (?, ?, ?)
            ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
            WHERE leases.until <= ? OR leases.holder = excluded.holder RETURNING holder"""
        with self._transactions.writes() as connection:
            return self._sql.run(connection, statement, name, holder, now + seconds, now).fetchone() is not None

    def drop(self, name: str, holder: str) -> None:
        """Another's is left as it is."""
        with self._transactions.writes() as connection:
            connection.execute(tables.leases.delete().where(tables.leases.c.name == name, tables.leases.c.holder == holder))

    def lease(self, name: str) -> LeaseRow | None:
        """It may have run out."""
        with self._transactions.reads() as connection:
            return find(connection, tables.leases, LeaseRow, name=name)

    def beat(self, id: str, state: dict[str, object], now: float) -> None:
        """A server lives, and this is how it stands."""
        row = plain(msgspec.to_builtins({"id": id, "seen": now, "state": state}))
        with self._transactions.writes() as connection:
            self._put(connection, tables.servers, row)

    def servers(self, since: float) -> tuple[ServerRow, ...]:
        """That told of themselves since then."""
        table = tables.servers
        with self._transactions.reads() as connection:
            return select(connection, sa.select(table).where(table.c.seen >= since).order_by(table.c.id), ServerRow)

    def leave(self, id: str) -> None:
        """A server is no more."""
        with self._transactions.writes() as connection:
            connection.execute(tables.servers.delete().where(tables.servers.c.id == id))

    # Windows

    def add_windows(self, server: str, windows: Sequence[tuple[str, bytes]], now: float) -> None:
        """Model, data."""
        rows = [{"server": server, "model": model, "time": now, "data": data} for model, data in windows]
        if rows:
            with self._transactions.writes() as connection:
                connection.execute(tables.windows.insert(), rows)

    def take_windows(self, limit: int) -> tuple[WindowRow, ...]:
        """The oldest, each of which nobody else gets."""
        table = tables.windows
        query = sa.select(table).order_by(table.c.id).limit(limit)
        with self._transactions.reads() as connection:
            if connection.execute(query.with_only_columns(table.c.id).limit(1)).first() is None:
                return ()
        with self._transactions.writes() as connection:
            rows = select(connection, query.with_for_update(skip_locked=True), WindowRow)
            connection.execute(table.delete().where(table.c.id.in_([row.id for row in rows])))
            return rows

    # Feedback

    def add_exposures(self, rows: Sequence[ExposureRow]) -> None:
        """Of a request that is known already the first one stays."""
        # In one order, so that two writers never wait for each other in a circle.
        values = sorted(tuple(plain(value) for value in structs.astuple(row)) for row in rows)
        if values:
            with self._transactions.writes() as connection:
                self._sql.insert(connection, "exposures", EXPOSURE, values, "ON CONFLICT DO NOTHING")

    def give_feedback(self, rows: Sequence[tuple[str, str, float]], actor: str, now: float) -> tuple[Taken, ...]:
        """Request id, name, value; what became of each. Raises InvalidRequest for a value that is no number."""
        for id, name, value in rows:
            if not math.isfinite(value * value) or plain(name) != name:
                raise InvalidRequest(f"feedback on {id!r}: {name!r} must be a name, and {value} a number whose square is finite")
        sql = self._sql
        ids = sql.within({id for id, _, _ in rows if plain(id) == id})
        with self._transactions.writes() as connection:
            sql.lock(connection, FEEDBACK_LOCK)
            found = sql.run(connection, f"SELECT {', '.join(EXPOSURE)} FROM exposures WHERE request_id {sql.among}", ids)
            exposed = {each[0]: ExposureRow(**dict(zip(EXPOSURE, each, strict=True))) for each in found.fetchall()}
            found = sql.run(connection, f"SELECT request_id, name, value FROM feedback WHERE request_id {sql.among}", ids)
            known = {(id, name): value for id, name, value in found.fetchall()}
            answers: list[Taken] = []
            new: list[FeedbackRow] = []
            for id, name, value in rows:
                before, exposure = known.get((id, name)), exposed.get(id)
                if before is not None:
                    answers.append(Taken.SAME if before == value else Taken.CONFLICT)
                elif exposure is None:
                    answers.append(Taken.UNKNOWN)
                else:
                    answers.append(Taken.TAKEN)
                    known[id, name] = value
                    new.append(FeedbackRow(
                        request_id=id, name=name, value=value, time=now, model=exposure.model, version=exposure.version,
                        rollout=exposure.rollout, actor=actor,
                    ))  # fmt: skip
            sql.insert(connection, "feedback", FEEDBACK, [structs.astuple(row)[:-1] for row in new])
            sql.insert(connection, "feedback_sums", SUM, _sums(new), ADDED)
            return tuple(answers)

    def waited_for(self, ids: Collection[str]) -> dict[str, tuple[str, str]]:
        """Request id → model and rollout, of those requests that a rollout waits for feedback on."""
        table = tables.exposures.c
        query = sa.select(table.request_id, table.model, table.rollout).where(table.request_id.in_([id for id in ids if plain(id) == id]))
        with self._transactions.reads() as connection:
            return {id: (model, rollout) for id, model, rollout in connection.execute(query)}

    def feedback_since(self, rollout: str, id: int, limit: int) -> tuple[FeedbackRow, ...]:
        """What came after the row of that id, the oldest first; 0: all."""
        table = tables.feedback
        query = sa.select(table).where(table.c.rollout == rollout, table.c.id > id).order_by(table.c.id).limit(limit)
        with self._transactions.reads() as connection:
            return select(connection, query, FeedbackRow)

    def feedback_sums(self, rollout: str) -> tuple[FeedbackSum, ...]:
        """By model, version and name: of all that was ever taken, whatever of it is purged."""
        table = tables.feedback_sums.c
        groups = (table.model, table.version, table.name)
        query = sa.select(*groups, table.num, table.sum, table.squares).where(table.rollout == rollout).order_by(*groups)
        with self._transactions.reads() as connection:
            return select(connection, query, FeedbackSum)

    # Upkeep

    def purge(self, *, exposures_before: float, windows_before: float, servers_before: float, limit: int = PURGE_ROWS) -> int:
        """Delete what is older: exposures, and feedback of rollouts that have ended; windows that nobody took; servers that are silent. How many
        rows that were; at most `limit` of each kind, so that others are not held up: ask again."""
        running = sa.select(tables.rollouts.c.id).where(tables.rollouts.c.ended.is_(None))
        old: dict[Table, tuple[ColumnElement[bool], ...]] = {
            tables.exposures: (tables.exposures.c.time < exposures_before,),
            tables.feedback: (tables.feedback.c.time < exposures_before, tables.feedback.c.rollout.not_in(running)),
            tables.windows: (tables.windows.c.time < windows_before,),
            tables.servers: (tables.servers.c.seen < servers_before,),
        }
        deleted = 0
        for table, where in old.items():
            (key,) = table.primary_key.columns
            # What another one purges just now is left to it.
            ours = sa.select(key).where(*where).limit(limit).with_for_update(skip_locked=True)
            with self._transactions.writes() as connection:
                deleted += connection.execute(table.delete().where(key.in_(ours))).rowcount
        return deleted

    def _put(self, connection: Connection, table: Table, row: dict[str, object]) -> None:
        """In place of the row of that key, where there is one."""
        insert = (sqlite if self._sql.is_sqlite else postgresql).insert(table).values(row)
        (key,) = table.primary_key.columns
        changed = {name: insert.excluded[name] for name in row if name != key.name}
        connection.execute(insert.on_conflict_do_update(index_elements=[key], set_=changed))


def _put_deployments(connection: Connection, sql: Sql, rows: Sequence[DeploymentRow]) -> None:
    table = tables.deployments
    for row in rows:
        is_new = _check_revision(connection, row.model, row.revision) is None
        columns = msgspec.to_builtins(structs.replace(row, revision=row.revision + 1, reason=plain(row.reason)))
        connection.execute(table.insert() if is_new else table.update().where(table.c.model == row.model), columns)
    sql.notify(connection, [f"deployment {row.model}" for row in rows])


def _check_revision(connection: Connection, model: str, revision: int) -> DeploymentRow | None:
    """The deployment, as it is. Raises Conflict."""
    row = find(connection, tables.deployments, DeploymentRow, model=model)
    if revision != (0 if row is None else row.revision):
        raise Conflict(f"the deployment of `{model}` was changed meanwhile")
    return row


def _check_candidate(connection: Connection, model: str, number: int) -> None:
    """Raises Conflict."""
    row = find(connection, tables.versions, VersionRow, model=model, number=number)
    if row is None:
        raise Conflict(f"{model}@{number} is gone")
    if row.stage in (Stage.RETIRED, Stage.SERVING):
        raise Conflict(f"{row.ref} is {row.stage}")


def _sums(rows: Sequence[FeedbackRow]) -> list[tuple[object, ...]]:
    sums: dict[tuple[str, str, str, str], tuple[int, float, float]] = {}
    for row in rows:
        group = (row.rollout, row.model, row.version, row.name)
        num, total, squares = sums.get(group, (0, 0.0, 0.0))
        sums[group] = (num + 1, total + row.value, squares + row.value * row.value)
    return [(*group, *sums[group]) for group in sums]


def _save_rollout(connection: Connection, row: RolloutRow) -> RolloutRow:
    before = _rollout(connection, row.id)
    if before.revision != row.revision:
        raise Conflict(f"the rollout {row.id} was changed meanwhile")
    if before.ended is not None:
        raise Conflict(f"the rollout {row.id} has ended")
    row = structs.replace(row, revision=row.revision + 1)
    connection.execute(tables.rollouts.update().where(tables.rollouts.c.id == row.id), msgspec.to_builtins(row))
    if row.ended is not None:
        members = tables.rollout_members
        connection.execute(members.update().where(members.c.rollout == row.id), {"running": False})
    return row


def _rollout(connection: Connection, id: str) -> RolloutRow:
    row = find(connection, tables.rollouts, RolloutRow, id=id) if plain(id) == id else None
    if row is None:
        raise NotFound(f"there is no rollout {id}")
    return row
