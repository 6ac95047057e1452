"""Statements about jobs, for both databases, and how rows become Structs.

Thousands of them pass here in a second, so that statements are the driver's own and each writes many rows. Databases keep what they have
prepared, so that texts are constant: rows go to PostgreSQL as one parameter, in JSON, and to SQLite in statements of few lengths. `?` stands
for a parameter; a list of texts is one parameter.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from secrets import token_hex
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine

from fairlead.core.jobs import JobResult, JobStatus
from fairlead.store import tables
from fairlead.store.job_rows import DeliveryRow, DeliveryState, JobRow, SecretRow
from fairlead.store.job_rules import Group

CHANNEL = "fairlead_jobs"
STATEMENT_ROWS = (64, 16, 4, 1)
"""Rows of one statement."""

JOB = JobRow.__struct_fields__
LARGE = ("preview", "result")
LIGHT = tuple(name for name in JOB if name not in LARGE)
DELIVERY = DeliveryRow.__struct_fields__
SECRET = SecretRow.__struct_fields__
CHANGING = (
    "id", "status", "reason", "message", "not_before", "started", "ended", "tries", "runner", "lease_until", "step", "num_steps", "cost",
    "expires", "revision",
)  # fmt: skip
"""What the rules change, after the id, but for the result."""
LARGE_BYTES = 1 << 16
"""Inputs and results from this size on are written in statements of their own, as they are."""

_result = msgspec.msgpack.Decoder(JobResult)
_statuses = {status.value: status for status in JobStatus}


class Sql:
    """Statements in the words of one database."""

    def __init__(self, engine: Engine) -> None:
        self.is_sqlite = engine.dialect.name == "sqlite"
        self.origin = token_hex(8)
        """By which a process knows its own notices."""
        self._types = {
            (table.name, column.name): column.type.compile(dialect=engine.dialect)
            for table in tables.metadata.tables.values()
            for column in table.c
        }

    def run(self, connection: Connection, statement: str, *parameters: Any) -> Any:
        return connection.exec_driver_sql(statement if self.is_sqlite else statement.replace("?", "%s"), parameters)

    def within(self, texts: Iterable[str]) -> str | list[str]:
        """The parameter of `among`."""
        return json.dumps(list(texts)) if self.is_sqlite else list(texts)

    @property
    def among(self) -> str:
        return "IN (SELECT value FROM json_each(?))" if self.is_sqlite else "= ANY(?)"

    @property
    def for_update(self) -> str:
        """Everybody locks in the order of the ids, so that no two wait for each other in a circle. SQLite's writers are alone anyway."""
        return "ORDER BY id" if self.is_sqlite else "ORDER BY id FOR UPDATE"

    @property
    def skip_locked(self) -> str:
        return "" if self.is_sqlite else "FOR UPDATE SKIP LOCKED"

    def lock(self, connection: Connection, *numbers: int) -> None:
        """Until the transaction ends, nobody else holds one of these numbers."""
        if not self.is_sqlite:
            self.run(connection, "SELECT pg_advisory_xact_lock(n) FROM unnest(CAST(? AS bigint[])) AS n", sorted(set(numbers)))

    def notify(self, connection: Connection, ids: Sequence[str]) -> None:
        if ids and not self.is_sqlite:
            notices = [f"{self.origin} {id}" for id in ids]
            self.run(connection, f"SELECT pg_notify('{CHANNEL}', notice) FROM unnest(CAST(? AS text[])) AS notice", notices)

    # Writing

    def insert(self, connection: Connection, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], rest: str = "") -> None:
        if self.is_sqlite:
            for part in _parts(rows):
                values = ", ".join([f"({_marks(columns)})"] * len(part))
                statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES {values} {rest}"
                self.run(connection, statement, *(value for row in part for value in row))
        elif rows:
            statement = f"INSERT INTO {table} ({', '.join(columns)}) SELECT {{values}} FROM {{rows}} {rest}"
            self._run_json(connection, statement, table, columns, rows)

    def update(self, connection: Connection, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], changes: dict[str, str]) -> None:
        """Jobs by their ids, which are the first of `columns`; `changes`: column to be set -> what to, where others than `columns` are."""
        if self.is_sqlite:
            said = {name: f"v.column{number}" for number, name in enumerate(columns, 1)}
            for part in _parts(rows):
                values = ", ".join([f"({_marks(columns)})"] * len(part))
                statement = f"UPDATE jobs SET {_assigned(columns, changes, said)} FROM (VALUES {values}) AS v WHERE jobs.id = v.column1"
                self.run(connection, statement, *(value for row in part for value in row))
        elif rows:
            said = {name: self._decoded("jobs", name) for name in columns}
            statement = f"UPDATE jobs SET {_assigned(columns, changes, said)} FROM {{rows}} WHERE jobs.id = v.id"
            self._run_json(connection, statement, "jobs", columns, rows)

    def _run_json(
        self, connection: Connection, statement: str, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
    ) -> None:
        types = ", ".join(f"{name} {'text' if self._is_binary(table, name) else self._types[table, name]}" for name in columns)
        values = ", ".join(self._decoded(table, name) for name in columns)
        said = statement.format(values=values, rows=f"json_to_recordset(CAST(? AS json)) AS v({types})")
        self.run(connection, said, msgspec.json.encode([dict(zip(columns, row, strict=True)) for row in rows]).decode())

    def _decoded(self, table: str, column: str) -> str:
        return f"decode(v.{column}, 'base64')" if self._is_binary(table, column) else f"v.{column}"

    def _is_binary(self, table: str, column: str) -> bool:
        return self._types[table, column] == "BYTEA"

    def add_jobs(self, connection: Connection, jobs: Sequence[tuple[JobRow, bytes]]) -> None:
        self.insert(connection, "jobs", JOB, [job_values(row) for row, _ in jobs])
        inputs = [(row.id, data) for row, data in jobs]
        self.insert(connection, "job_inputs", ("job", "data"), [each for each in inputs if len(each[1]) < LARGE_BYTES])
        for id, data in inputs:
            if len(data) >= LARGE_BYTES:
                self.run(connection, "INSERT INTO job_inputs (job, data) VALUES (?, ?)", id, data)

    def put_jobs(self, connection: Connection, rows: Sequence[JobRow]) -> None:
        """What the rules made of jobs that this transaction has locked."""
        results = {row.id: None if row.result is None else msgspec.msgpack.encode(row.result) for row in rows}
        large = {id: result for id, result in results.items() if result is not None and len(result) >= LARGE_BYTES}
        values = [(*(getattr(row, name) for name in CHANGING), None if row.id in large else results[row.id]) for row in rows]
        # The preview is gone where a job no longer runs.
        kept = {"preview": f"CASE WHEN v.{'column2' if self.is_sqlite else 'status'} IN ('active', 'aborting') THEN jobs.preview END"}
        self.update(connection, (*CHANGING, "result"), values, kept)
        for id, result in large.items():
            self.run(connection, "UPDATE jobs SET result = ? WHERE id = ?", result, id)

    def put_steps(self, connection: Connection, rows: Sequence[tuple[str, int, int, bytes | None]]) -> None:
        """Id, step, number of steps, preview or None for the last one."""
        preview = "v.column4" if self.is_sqlite else self._decoded("jobs", "preview")
        newer = {"preview": f"COALESCE({preview}, jobs.preview)", "revision": "jobs.revision + 1"}
        self.update(connection, ("id", "step", "num_steps", "preview"), rows, newer)

    def add_deliveries(self, connection: Connection, rows: Sequence[DeliveryRow]) -> None:
        values = [tuple(getattr(row, name) for name in DELIVERY) for row in rows]
        self.insert(connection, "deliveries", DELIVERY, values, "ON CONFLICT DO NOTHING")

    # Reading

    def jobs(self, connection: Connection, rest: str, *parameters: Any, whole: bool = False) -> list[JobRow]:
        names = JOB if whole else LIGHT
        found = self.run(connection, f"SELECT {', '.join(names)} FROM jobs {rest}", *parameters)
        return [_job(names, row) for row in found.fetchall()]

    def locked(self, connection: Connection, ids: Iterable[str]) -> dict[str, JobRow]:
        """Without previews and results."""
        found = self.jobs(connection, f"WHERE id {self.among} {self.for_update}", self.within(ids))
        return {row.id: row for row in found}

    def deliveries(self, connection: Connection, rest: str, *parameters: Any) -> tuple[DeliveryRow, ...]:
        found = self.run(connection, f"SELECT {', '.join(DELIVERY)} FROM deliveries {rest}", *parameters)
        return tuple(delivery(row) for row in found.fetchall())

    def groups(self, connection: Connection, models: Sequence[str], now: float) -> list[Group]:
        """Of every model, priority and tenant with a job that is due, by jumps from one to the next in the index: what it costs does not
        depend on how many wait."""
        each = "SELECT value FROM json_each(?)" if self.is_sqlite else "SELECT unnest(CAST(? AS text[]))"
        first = "q.status = 'queued' AND q.not_before <= ? ORDER BY q.model, q.priority, q.tenant, q.id LIMIT 1"
        # `|| ''`: SQLite does not look into the index for a column that is compared with another table's.
        statement = f"""
            WITH RECURSIVE wanted(model) AS ({each}), heads(id, model, priority, tenant) AS (
                SELECT n.id, n.model, n.priority, n.tenant FROM wanted w
                JOIN jobs n ON n.id = (SELECT q.id FROM jobs q WHERE q.model = w.model AND {first})
                UNION ALL
                SELECT n.id, n.model, n.priority, n.tenant FROM heads h JOIN jobs n
                ON n.id = (SELECT q.id FROM jobs q WHERE q.model = h.model AND (q.priority, q.tenant) > (h.priority, h.tenant || '') AND {first})
            )
            SELECT id, model, priority, tenant FROM heads"""
        return [Group(*row) for row in self.run(connection, statement, self.within(models), now, now).fetchall()]

    def oldest(self, connection: Connection, groups: Sequence[tuple[Group, int]], now: float) -> list[tuple[Group, list[str]]]:
        """Ids of the jobs of each group that are due, at most so many."""
        one = """SELECT * FROM (SELECT CAST(? AS INTEGER) AS at, id FROM jobs WHERE status = 'queued' AND model = ? AND priority = ? AND tenant = ?
            AND not_before <= ? ORDER BY id LIMIT ?) AS g"""
        ids: list[list[str]] = [[] for _ in groups]
        for part in _parts(list(enumerate(groups))):
            parameters = [(at, group.model, group.priority, group.tenant, now, limit) for at, (group, limit) in part]
            found = self.run(connection, " UNION ALL ".join([one] * len(part)), *(value for row in parameters for value in row))
            for at, id in found.fetchall():
                ids[at].append(id)
        return [(group, found) for (group, _), found in zip(groups, ids, strict=True)]


def _parts(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    at = 0
    for length in STATEMENT_ROWS:
        while len(rows) - at >= length:
            yield rows[at : at + length]
            at += length


def _marks(columns: Sequence[str]) -> str:
    return ", ".join("?" * len(columns))


def _assigned(columns: Sequence[str], changes: Mapping[str, str], said: Mapping[str, str]) -> str:
    """Of an UPDATE by rows whose first column is the id."""
    values = {**{name: said[name] for name in columns[1:]}, **changes}
    return ", ".join(f"{name} = {value}" for name, value in values.items())


# Rows


def job_values(row: JobRow) -> tuple[Any, ...]:
    """Of a new job."""
    assert row.result is None and not row.preview, row
    json = {"metadata": row.metadata, "webhook_events": row.webhook_events}
    return tuple(
        msgspec.json.encode(json[name]).decode() if name in json else getattr(row, name) if name not in LARGE else None for name in JOB
    )


def _job(names: Sequence[str], values: Sequence[Any]) -> JobRow:
    fields = dict(zip(names, values, strict=True))
    fields["status"] = _statuses[fields["status"]]
    fields["metadata"] = msgspec.json.decode(fields["metadata"])
    fields["webhook_events"] = tuple(msgspec.json.decode(fields["webhook_events"]))
    if "result" in fields:
        fields["preview"] = fields["preview"] or b""
        fields["result"] = None if fields["result"] is None else _result.decode(fields["result"])
    return JobRow(**fields)


def delivery(values: Sequence[Any]) -> DeliveryRow:
    fields = dict(zip(DELIVERY, values, strict=True))
    return DeliveryRow(**fields | {"state": DeliveryState(fields["state"])})


def secret(values: Sequence[Any]) -> SecretRow:
    return SecretRow(**dict(zip(SECRET, values, strict=True)))
