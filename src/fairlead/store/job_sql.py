"""Statements about jobs, of which thousands pass in a second, and how rows become Structs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection

from fairlead.core.jobs import JobResult, JobStatus
from fairlead.store.job_rows import DeliveryRow, DeliveryState, JobRow, SecretRow
from fairlead.store.job_rules import Group
from fairlead.store.sql import Sql, marks, parts

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


class JobSql(Sql):
    def update(self, connection: Connection, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], changes: dict[str, str]) -> None:
        """Jobs by their ids, which are the first of `columns`; `changes`: column to be set -> what to, where others than `columns` are."""
        if self.is_sqlite:
            said = {name: f"v.column{number}" for number, name in enumerate(columns, 1)}
            for part in parts(rows):
                values = ", ".join([f"({marks(columns)})"] * len(part))
                statement = f"UPDATE jobs SET {_assigned(columns, changes, said)} FROM (VALUES {values}) AS v WHERE jobs.id = v.column1"
                self.run(connection, statement, *(value for row in part for value in row))
        elif rows:
            said = {name: self.decoded("jobs", name) for name in columns}
            statement = f"UPDATE jobs SET {_assigned(columns, changes, said)} FROM {{rows}} WHERE jobs.id = v.id"
            self.run_json(connection, statement, "jobs", columns, rows)

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
        preview = "v.column4" if self.is_sqlite else self.decoded("jobs", "preview")
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
        for part in parts(list(enumerate(groups))):
            parameters = [(at, group.model, group.priority, group.tenant, now, limit) for at, (group, limit) in part]
            found = self.run(connection, " UNION ALL ".join([one] * len(part)), *(value for row in parameters for value in row))
            for at, id in found.fetchall():
                ids[at].append(id)
        return [(group, found) for (group, _), found in zip(groups, ids, strict=True)]


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
