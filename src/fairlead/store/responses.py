"""Answers of the Responses API as they are kept, by tenant: blocking, safe to call from any thread. Every time is an argument.

A row is written when its answer begins, or when it is complete. While it is computed, its server renews its lease; one whose lease ran out is
ended by whoever sweeps. A tenant that keeps more than it may loses those that it has not used for longest. All methods raise Unavailable where
the database is gone, full or locked; nothing is half-written then.
"""

from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa
from msgspec import Struct, structs
from sqlalchemy import Connection

from fairlead.store.sql import Sql, select
from fairlead.store.tables import response_items, response_sizes, responses
from fairlead.store.transactions import Transactions

NUL = "\0"
"""PostgreSQL complains of looking for one."""
ROWS = 256
"""That one transaction removes, or ends."""
ADDED = "ON CONFLICT (tenant) DO UPDATE SET size = response_sizes.size + excluded.size"


class ResponseRow(Struct, frozen=True, kw_only=True):
    id: str
    tenant: str
    previous: str | None = None
    """The answer that it goes on from."""
    status: str
    """queued, in_progress; completed, incomplete, failed, cancelled."""
    created: float
    ended: float | None = None
    expires: float
    server: str = ""
    """Which computes it."""
    lease_until: float = 0.0
    cancelling: bool = False
    """Its server is to stop."""
    size: int = 0
    """Bytes of all three."""
    body: bytes
    """The object, as JSON."""
    input: bytes
    """The items that it was asked with, as JSON: not those of the answers before."""
    events: bytes | None = None
    """All of its stream, where that may be read again."""


class ResponseStore:
    def __init__(self, transactions: Transactions, sql: Sql) -> None:
        self._transactions = transactions
        self._sql = sql

    def add(self, row: ResponseRow, items: Collection[str], *, tenant_bytes: int) -> None:
        """`items`: ids by which later requests may refer to them. `tenant_bytes`: what its tenant may keep."""
        row = _sized(row)
        with self._transactions.writes() as connection:
            connection.execute(responses.insert(), _columns(row))
            self._index(connection, row.id, items)
            self._grow(connection, row.tenant, row.size, tenant_bytes)

    def end(self, row: ResponseRow, items: Collection[str], *, tenant_bytes: int) -> bool:
        """What became of it. False, and nothing written, where it was deleted or ended by another server meanwhile."""
        row = _sized(row)
        ours = (responses.c.id == row.id) & (responses.c.server == row.server) & responses.c.ended.is_(None)
        with self._transactions.writes() as connection:
            before = connection.execute(sa.select(responses.c.size).where(ours).with_for_update()).scalar()
            if before is None:
                return False
            connection.execute(responses.update().where(ours), _columns(row))
            self._index(connection, row.id, items)
            self._grow(connection, row.tenant, row.size - before, tenant_bytes)
            return True

    def begun(self, id: str, server: str) -> None:
        """queued -> in_progress."""
        ours = (responses.c.id == id) & (responses.c.server == server) & (responses.c.status == "queued")
        with self._transactions.writes() as connection:
            connection.execute(responses.update().where(ours).values(status="in_progress"))

    def get(self, id: str, tenant: str) -> ResponseRow | None:
        """None: unknown, or another tenant's."""
        if NUL in id:
            return None
        with self._transactions.reads() as connection:
            found = select(connection, sa.select(responses).where(responses.c.id == id, responses.c.tenant == tenant), ResponseRow)
        return found[0] if found else None

    def chain(self, id: str, tenant: str, *, most: int, most_bytes: int) -> tuple[ResponseRow, ...]:
        """The answer and those that it goes on from, the oldest first, without their events; it ends where one is missing, or after `most` of
        them or so many bytes: then the oldest one that is given has a `previous`."""
        if NUL in id:
            return ()
        table = responses.alias()
        links = (
            sa.select(table.c.id, table.c.previous, sa.literal(1).label("depth"), sa.cast(table.c.size, sa.BigInteger).label("total"))
            .where(table.c.id == id, table.c.tenant == tenant)
            .cte("links", recursive=True)
        )
        before = responses.alias()
        links = links.union_all(
            sa.select(before.c.id, before.c.previous, links.c.depth + 1, sa.cast(links.c.total + before.c.size, sa.BigInteger))
            .where(before.c.id == links.c.previous, before.c.tenant == tenant)
            .where(links.c.depth < most, links.c.total <= most_bytes)
        )
        columns = [column for column in responses.c if column.name != "events"]
        query = (
            sa.select(*columns).join(links, links.c.id == responses.c.id).where(links.c.total <= most_bytes).order_by(links.c.depth.desc())
        )
        with self._transactions.reads() as connection:
            return select(connection, query, ResponseRow)

    def keep(self, ids: Collection[str], expires: float) -> None:
        """At least until then."""
        with self._transactions.writes() as connection:
            late = responses.c.id.in_(ids) & (responses.c.expires < expires)
            connection.execute(responses.update().where(late).values(expires=expires))

    def holders(self, items: Collection[str], tenant: str, *, most_bytes: int) -> tuple[ResponseRow, ...]:
        """The tenant's newest answer with each of these items, the newest first; no more of them than have so many bytes together."""
        columns = [column for column in responses.c if column.name != "events"]
        newest = sa.func.row_number().over(
            partition_by=response_items.c.item, order_by=(responses.c.created.desc(), responses.c.id)
        )  # ids that clients give may be in very many answers
        held = (
            sa.select(responses.c.id, responses.c.size, newest.label("place"))
            .join(response_items, response_items.c.response == responses.c.id)
            .where(response_items.c.item.in_([item for item in items if NUL not in item]), responses.c.tenant == tenant)
            .subquery()
        )
        query = sa.select(*columns).order_by(responses.c.created.desc(), responses.c.id)
        with self._transactions.reads() as connection:
            ids, total = [], 0
            for id, size in connection.execute(sa.select(held.c.id, held.c.size).distinct().where(held.c.place == 1)).all():
                total += size
                if total <= most_bytes:
                    ids.append(id)
            return select(connection, query.where(responses.c.id.in_(ids)), ResponseRow)

    def cancel(self, id: str, tenant: str) -> ResponseRow | None:
        """Ask its server to stop; one that has ended stays as it is. None: unknown, or another tenant's."""
        if NUL in id:
            return None
        its = (responses.c.id == id) & (responses.c.tenant == tenant)
        with self._transactions.writes() as connection:
            connection.execute(responses.update().where(its, responses.c.ended.is_(None)).values(cancelling=True))
            found = select(connection, sa.select(responses).where(its), ResponseRow)
        return found[0] if found else None

    def delete(self, id: str, tenant: str) -> bool:
        """False: unknown, or another tenant's."""
        if NUL in id:
            return False
        with self._transactions.writes() as connection:
            its = sa.select(responses.c.id).where(responses.c.id == id, responses.c.tenant == tenant)
            return bool(self._drop(connection, list(connection.execute(its).scalars())))

    # Upkeep

    def beat(self, server: str, ids: Collection[str], *, lease_until: float) -> dict[str, bool]:
        """Renew the leases. Those that are still this server's, and whether each is to be stopped."""
        if not ids:
            return {}
        ours = responses.c.id.in_(ids) & (responses.c.server == server) & responses.c.ended.is_(None)
        with self._transactions.writes() as connection:
            connection.execute(responses.update().where(ours).values(lease_until=lease_until))
            held = connection.execute(sa.select(responses.c.id, responses.c.cancelling).where(ours)).all()
        return dict(tuple(row) for row in held)

    def sweep(self, now: float, lost: Callable[[ResponseRow], ResponseRow]) -> int:
        """End those whose lease ran out, as `lost` says. Returns how many, at most ROWS."""
        over = responses.c.ended.is_(None) & (responses.c.lease_until < now)
        with self._transactions.reads() as connection:
            if connection.execute(sa.select(responses.c.id).where(over).limit(1)).scalar() is None:
                return 0
        with self._transactions.writes() as connection:
            rows = select(connection, sa.select(responses).where(over).limit(ROWS).with_for_update(skip_locked=True), ResponseRow)
            grown: dict[str, int] = {}
            for old in rows:
                row = _sized(lost(old))
                connection.execute(responses.update().where(responses.c.id == row.id), _columns(row))
                grown[row.tenant] = grown.get(row.tenant, 0) + row.size - old.size
            self._count(connection, grown)
            return len(rows)

    def purge(self, now: float) -> int:
        """Remove those whose time is over. Returns how many, at most ROWS."""
        over = sa.select(responses.c.id).where(responses.c.expires <= now, responses.c.ended.is_not(None)).limit(ROWS)
        with self._transactions.writes() as connection:
            return self._drop(connection, list(connection.execute(over.with_for_update(skip_locked=True)).scalars()))

    def size(self, tenant: str) -> int:
        """Bytes of all that it keeps."""
        with self._transactions.reads() as connection:
            return connection.execute(sa.select(response_sizes.c.size).where(response_sizes.c.tenant == tenant)).scalar() or 0

    def _index(self, connection: Connection, id: str, items: Collection[str]) -> None:
        rows = [(item, id) for item in sorted(set(items)) if NUL not in item]
        self._sql.insert(connection, "response_items", ("item", "response"), rows, "ON CONFLICT DO NOTHING")

    def _grow(self, connection: Connection, tenant: str, size: int, most: int) -> None:
        """Count what was written, and make room for it."""
        self._count(connection, {tenant: size})
        total = connection.execute(sa.select(response_sizes.c.size).where(response_sizes.c.tenant == tenant)).scalar_one()
        ended = responses.c.ended.is_not(None)
        while total > most:
            query = sa.select(responses.c.id, responses.c.size).where(responses.c.tenant == tenant, ended).order_by(responses.c.expires)
            doomed: list[str] = []
            # those that others remove just now wait for the count that is held here
            for id, freed in connection.execute(query.limit(ROWS).with_for_update(skip_locked=True)).all():
                if total > most:
                    doomed.append(id)
                    total -= freed
            if not self._drop(connection, doomed):
                return

    def _drop(self, connection: Connection, ids: Sequence[str]) -> int:
        if not ids:
            return 0
        connection.execute(response_items.delete().where(response_items.c.response.in_(ids)))
        gone = connection.execute(responses.delete().where(responses.c.id.in_(ids)).returning(responses.c.tenant, responses.c.size)).all()
        freed: dict[str, int] = {}
        for tenant, size in gone:
            freed[tenant] = freed.get(tenant, 0) - size
        self._count(connection, freed)
        return len(gone)

    def _count(self, connection: Connection, sizes: dict[str, int]) -> None:
        self._sql.insert(connection, "response_sizes", ("tenant", "size"), sorted(sizes.items()), ADDED)


def _sized(row: ResponseRow) -> ResponseRow:
    return structs.replace(row, size=len(row.body) + len(row.input) + len(row.events or b""))


def _columns(row: ResponseRow) -> dict[str, object]:
    return {name: getattr(row, name) for name in row.__struct_fields__}
