"""What came of the requests of each objective, by the hour and by the server that counted: blocking, safe to call from any thread.

All methods raise Unavailable where the database is gone, full or locked; nothing is half-written then.
"""

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from fairlead.observe.slo.ledger import Hour
from fairlead.store import tables
from fairlead.store.sql import Sql
from fairlead.store.transactions import Transactions

COLUMNS = ("slo", "digest", "hour", "server", "good", "bad")
REPLACED = "ON CONFLICT (slo, digest, hour, server) DO UPDATE SET good = excluded.good, bad = excluded.bad"


class SloStore:
    def __init__(self, transactions: Transactions, sql: Sql) -> None:
        self._transactions = transactions
        self._sql = sql

    def write(self, server: str, hours: Sequence[Hour]) -> None:
        """Whole sums of a server's hours, in place of what it wrote of them before."""
        rows = sorted((each.slo, each.digest, each.hour, server, each.good, each.bad) for each in hours)
        with self._transactions.writes() as connection:
            self._sql.insert(connection, "slo_hours", COLUMNS, rows, REPLACED)

    def read(self, *, slos: Collection[str], since: float, but: str) -> tuple[Hour, ...]:
        """Sums of all servers `but` one, from the hour that holds `since`."""
        table = tables.slo_hours.c
        counts = [sa.cast(sa.func.sum(each), sa.BigInteger).label(each.name) for each in (table.good, table.bad)]
        query = (
            sa.select(table.slo, table.digest, table.hour, *counts)
            .where(table.slo.in_(slos), table.hour > since - 3600, table.server != but)
            .group_by(table.slo, table.digest, table.hour)
        )
        with self._transactions.reads() as connection:
            return tuple(Hour(*row) for row in connection.execute(query))

    def purge(self, before: float) -> int:
        """Delete hours before that. Returns how many rows there were."""
        with self._transactions.writes() as connection:
            return connection.execute(tables.slo_hours.delete().where(tables.slo_hours.c.hour < before)).rowcount
