"""Usage as it is written: a row for each request, and the sums of each hour.

Millions of rows pass here, so that statements are the driver's own and rows go to it as tuples.
"""

import math
from collections.abc import Sequence
from itertools import chain

from msgspec.structs import astuple
from sqlalchemy import Connection

from fairlead.store import tables
from fairlead.store.rows import UsageRow

HOUR = 3600
GROUP = ("hour", "tenant", "project", "key", "model", "outcome")
SUMS = tuple(column.name for column in tables.usage_hours.c if column.name not in GROUP)
COLUMNS = UsageRow.__struct_fields__[:-1]
"""All but the id."""


STATEMENT_ROWS = (1024, 128, 16, 1)
"""Rows of one statement: SQLite takes 32,766 values. Each statement hands the GIL over a few times, for which the event loop is
woken and put to sleep; that costs more than its rows do."""


def _names(columns: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


ADD = f" ON CONFLICT ({_names(GROUP)}) DO UPDATE SET " + ", ".join(f'"{name}" = usage_hours."{name}" + excluded."{name}"' for name in SUMS)


def insert_usage(connection: Connection, rows: Sequence[UsageRow]) -> None:
    values = [astuple(row)[:-1] for row in rows]
    if connection.dialect.name == "sqlite":
        # Statements of several rows, not `executemany`: that would give up and win back the GIL for every row, at the
        # requests' expense. Of few lengths, because the driver keeps each that it has prepared.
        at = 0
        for rows_at_once in STATEMENT_ROWS:
            marks = ", ".join([f"({', '.join('?' * len(COLUMNS))})"] * rows_at_once)
            statement = f"INSERT INTO usage ({_names(COLUMNS)}) VALUES {marks}"
            while len(values) - at >= rows_at_once:
                part = values[at : at + rows_at_once]
                connection.exec_driver_sql(statement, tuple(chain.from_iterable(part)))
                at += rows_at_once
        connection.exec_driver_sql(_insert("usage_hours", (*GROUP, *SUMS), "?") + ADD, by_hour(rows))
    else:
        # A quarter of INSERT's CPU.
        with connection.connection.cursor().copy(f"COPY usage ({_names(COLUMNS)}) FROM STDIN") as copy:
            for each in values:
                copy.write_row(each)
        connection.exec_driver_sql(_insert("usage_hours", (*GROUP, *SUMS), "%s") + ADD, by_hour(rows))


def by_hour(rows: Sequence[UsageRow]) -> list[tuple[object, ...]]:
    """Rows of `usage_hours`, in an order that all writers share, so that two never wait for each other in a circle."""
    sums: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        group = (int(row.time // HOUR) * HOUR, row.tenant, row.project, row.key, row.model, row.outcome)
        total = sums.get(group)
        if total is None:
            total = sums[group] = [0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0]
        total[0] += row.requests
        total[1] += row.input_tokens
        total[2] += row.cached_tokens
        total[3] += row.output_tokens
        total[4] += row.rows
        total[5] += row.megapixels
        total[6] += row.compute_seconds
        total[7] += row.seconds
        total[8] += row.cost
        total[9] += row.requests if row.cached else 0
    return [(*group, *sums[group]) for group in sorted(sums)]


def widened(since: float, until: float | None) -> tuple[int, int | None]:
    """A range to whole hours."""
    return int(since // HOUR) * HOUR, None if until is None else math.ceil(until / HOUR) * HOUR


def _insert(table: str, columns: Sequence[str], mark: str) -> str:
    return f"INSERT INTO {table} ({_names(columns)}) VALUES ({', '.join(mark for _ in columns)})"
