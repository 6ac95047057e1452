"""Statements that all parts of the store share, in the words of both databases.

Where many rows pass, statements are the driver's own and each writes many rows. Databases keep what they have prepared, so that texts are
constant: rows go to PostgreSQL as one parameter, in JSON, and to SQLite in statements of few lengths. `?` stands for a parameter; a list of
texts is one parameter.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from secrets import token_hex
from threading import Event
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Select, Table

from fairlead.store import tables
from fairlead.store.rows import AuditRow

R = TypeVar("R")

STATEMENT_ROWS = (64, 16, 4, 1)
"""Rows of one statement."""
LISTEN_SECONDS = 0.5
"""How soon a listener sees that it is to stop."""


class Sql:
    """Statements in the words of one database."""

    def __init__(self, engine: Engine, channel: str) -> None:
        self.channel = channel
        """Of notices, on PostgreSQL."""
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

    def notify(self, connection: Connection, texts: Sequence[str]) -> None:
        """Tell the other processes, once the transaction is done."""
        if texts and not self.is_sqlite:
            notices = [f"{self.origin} {text}" for text in texts]
            self.run(connection, f"SELECT pg_notify('{self.channel}', notice) FROM unnest(CAST(? AS text[])) AS notice", notices)

    def listen(self, connection: Connection, on_notice: Callable[[str], None], stop: Event) -> None:
        """Call with each text that another process notifies of, and with "" once it listens; until `stop`. The connection is used up."""
        assert not self.is_sqlite
        connection.execution_options(isolation_level="AUTOCOMMIT")
        driver: Any = connection.connection.driver_connection
        # It hears until it is closed, so that nobody else gets it from the pool.
        connection.detach()
        driver.execute(f"LISTEN {self.channel}")
        on_notice("")
        while not stop.is_set():
            for note in driver.notifies(timeout=LISTEN_SECONDS):
                origin, _, text = note.payload.partition(" ")
                if origin != self.origin:
                    on_notice(text)
                if stop.is_set():
                    break

    # Writing

    def insert(self, connection: Connection, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], rest: str = "") -> None:
        if self.is_sqlite:
            for part in parts(rows):
                values = ", ".join([f"({marks(columns)})"] * len(part))
                statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES {values} {rest}"
                self.run(connection, statement, *(value for row in part for value in row))
        elif rows:
            statement = f"INSERT INTO {table} ({', '.join(columns)}) SELECT {{values}} FROM {{rows}} {rest}"
            self.run_json(connection, statement, table, columns, rows)

    def run_json(self, connection: Connection, statement: str, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        types = ", ".join(f"{name} {'text' if self._is_binary(table, name) else self._types[table, name]}" for name in columns)
        values = ", ".join(self.decoded(table, name) for name in columns)
        said = statement.format(values=values, rows=f"json_to_recordset(CAST(? AS json)) AS v({types})")
        self.run(connection, said, msgspec.json.encode([dict(zip(columns, row, strict=True)) for row in rows]).decode())

    def decoded(self, table: str, column: str) -> str:
        return f"decode(v.{column}, 'base64')" if self._is_binary(table, column) else f"v.{column}"

    def _is_binary(self, table: str, column: str) -> bool:
        return self._types[table, column] == "BYTEA"


def parts(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    at = 0
    for length in STATEMENT_ROWS:
        while len(rows) - at >= length:
            yield rows[at : at + length]
            at += length


def marks(columns: Sequence[str]) -> str:
    return ", ".join("?" * len(columns))


# Rows


def select(connection: Connection, query: Select[Any], type_: type[R]) -> tuple[R, ...]:
    found = connection.execute(query)
    names = [str(name) for name in found.keys()]  # noqa: SIM118, a result is no mapping; SQLAlchemy's names are a kind of str of their own
    return tuple(msgspec.convert(dict(zip(names, row, strict=True)), type_) for row in found)


def find(connection: Connection, table: Table, type_: type[R], **equal: Any) -> R | None:
    found = select(connection, sa.select(table).filter_by(**equal).limit(1), type_)
    return found[0] if found else None


def write_audit(connection: Connection, rows: Iterable[AuditRow]) -> None:
    entries = [plain(msgspec.to_builtins(row)) for row in rows]
    for entry in entries:
        del entry["id"]
    if entries:
        connection.execute(tables.audit.insert(), entries)


def plain(value: Any) -> Any:
    """As both databases keep it: no NUL, no half of a character, and of JSON no number that is none. What models say of their failures may
    hold anything."""
    match value:
        case str():
            return value.replace("\0", "").encode("utf-8", "replace").decode()
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {plain(name): plain(each) for name, each in value.items()}
        case list() | tuple():
            return type(value)(map(plain, value))
    return value
