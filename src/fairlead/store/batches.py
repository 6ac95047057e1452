"""Files of the OpenAI API and batches of requests, by tenant: blocking, safe to call from any thread. Every time is an argument.

A batch belongs to the server that holds its lease, which alone writes it; the results of its lines are kept one by one until the batch has
ended, so that whoever takes it over asks none of them again. Files are kept in parts. All methods raise Unavailable where the database is gone,
full or locked; nothing is half-written then.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import sqlalchemy as sa
from msgspec import Struct, structs
from sqlalchemy import Connection

from fairlead.core.errors import LimitExceeded
from fairlead.store.sql import select
from fairlead.store.tables import batch_results, batches, file_parts, files
from fairlead.store.transactions import Transactions

NUL = "\0"
PART_BYTES = 1 << 20
MAX_FILES = 100_000
"""Of a tenant: empty ones take room, too."""
PAGE = 200
"""Results that are read at once."""
ROWS = 64
"""That one transaction removes."""


class FileRow(Struct, frozen=True, kw_only=True):
    id: str
    tenant: str
    name: str
    purpose: str
    size: int
    created: float
    expires: float
    signed_by: str = ""
    """The key that signed the upload."""


class BatchRow(Struct, frozen=True, kw_only=True):
    id: str
    tenant: str
    project: str
    key: str
    address: str
    created: float
    ended: float | None = None
    expires: float
    """When it is removed."""
    output_seconds: float | None = None
    """How long its files are kept; None: as long as it is."""
    signed_by: str = ""
    """The key that signed the wish and the upload of its file, both."""
    server: str = ""
    lease_until: float = 0.0
    cancelling: bool = False
    body: bytes
    """The object, as JSON."""


class Result(Struct, frozen=True):
    """Of one line."""

    number: int
    good: bool
    data: bytes
    """The line of the output file."""


class BatchStore:
    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    # Files

    def add_file(self, row: FileRow, data: bytes, *, tenant_bytes: int) -> None:
        """Raises LimitExceeded where its tenant has no room for it."""
        with self._transactions.writes() as connection:
            _check_room(connection, row.tenant, row.size, tenant_bytes)
            _write(connection, row, (data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)))

    def file(self, id: str, tenant: str) -> FileRow | None:
        """None: unknown, or another tenant's."""
        if NUL in id:
            return None
        with self._transactions.reads() as connection:
            found = select(connection, sa.select(files).where(files.c.id == id, files.c.tenant == tenant), FileRow)
        return found[0] if found else None

    def files(self, tenant: str, *, purpose: str | None, after: str, limit: int, newest: bool) -> tuple[FileRow, ...]:
        query = sa.select(files).where(files.c.tenant == tenant).limit(limit)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        if after:
            query = query.where(files.c.id < after if newest else files.c.id > after)
        with self._transactions.reads() as connection:
            return select(connection, query.order_by(files.c.id.desc() if newest else files.c.id), FileRow)

    def part(self, file: str, number: int) -> bytes | None:
        """None: there are no more."""
        with self._transactions.reads() as connection:
            found = connection.execute(
                sa.select(file_parts.c.data).where(file_parts.c.file == file, file_parts.c.number == number)
            ).scalar()
        return None if found is None else bytes(found)

    def delete_file(self, id: str, tenant: str) -> bool:
        """False: unknown, or another tenant's."""
        if NUL in id:
            return False
        with self._transactions.writes() as connection:
            its = (files.c.id == id) & (files.c.tenant == tenant)
            gone = connection.execute(files.delete().where(its)).rowcount
            if gone:
                connection.execute(file_parts.delete().where(file_parts.c.file == id))
            return bool(gone)

    # Batches

    def add(self, row: BatchRow, *, tenant_batches: int, tenant_bytes: int) -> None:
        """Raises LimitExceeded where its tenant has as many that have not ended, or no room for files."""
        with self._transactions.writes() as connection:
            _check_room(connection, row.tenant, 0, tenant_bytes)
            open_ones = sa.select(sa.func.count()).where(batches.c.tenant == row.tenant, batches.c.ended.is_(None))
            if connection.execute(open_ones).scalar_one() >= tenant_batches:
                message = f"{tenant_batches} batches of tenant `{row.tenant}` have not ended yet"
                raise LimitExceeded(message, reason="queued-batches", retry_after=60.0)
            connection.execute(batches.insert(), structs.asdict(row))

    def get(self, id: str, tenant: str) -> BatchRow | None:
        """None: unknown, or another tenant's."""
        if NUL in id:
            return None
        with self._transactions.reads() as connection:
            found = select(connection, sa.select(batches).where(batches.c.id == id, batches.c.tenant == tenant), BatchRow)
        return found[0] if found else None

    def list(self, tenant: str, *, after: str, limit: int) -> tuple[BatchRow, ...]:
        """The newest first."""
        query = sa.select(batches).where(batches.c.tenant == tenant).order_by(batches.c.id.desc()).limit(limit)
        if after:
            query = query.where(batches.c.id < after)
        with self._transactions.reads() as connection:
            return select(connection, query, BatchRow)

    def cancel(self, id: str, tenant: str) -> BatchRow | None:
        """Ask whoever runs it to stop; one that has ended stays as it is. None: unknown, or another tenant's."""
        if NUL in id:
            return None
        its = (batches.c.id == id) & (batches.c.tenant == tenant)
        with self._transactions.writes() as connection:
            connection.execute(batches.update().where(its, batches.c.ended.is_(None)).values(cancelling=True))
            found = select(connection, sa.select(batches).where(its), BatchRow)
        return found[0] if found else None

    # Running

    def lease(self, server: str, limit: int, *, now: float, lease_until: float) -> tuple[BatchRow, ...]:
        """At most `limit` that nobody runs, the oldest first."""
        free = batches.c.ended.is_(None) & (batches.c.lease_until < now)
        with self._transactions.reads() as connection:
            if limit < 1 or connection.execute(sa.select(batches.c.id).where(free).limit(1)).scalar() is None:
                return ()
        with self._transactions.writes() as connection:
            query = sa.select(batches).where(free).order_by(batches.c.id).limit(limit).with_for_update(skip_locked=True)
            rows = select(connection, query, BatchRow)
            ids = [row.id for row in rows]
            connection.execute(batches.update().where(batches.c.id.in_(ids)).values(server=server, lease_until=lease_until))
            return tuple(structs.replace(row, server=server, lease_until=lease_until) for row in rows)

    def beat(self, server: str, ids: Collection[str], *, lease_until: float) -> dict[str, bool]:
        """Renew the leases. Those that are still this server's, and whether each is to be cancelled."""
        if not ids:
            return {}
        ours = batches.c.id.in_(ids) & (batches.c.server == server) & batches.c.ended.is_(None)
        with self._transactions.writes() as connection:
            connection.execute(batches.update().where(ours).values(lease_until=lease_until))
            held = connection.execute(sa.select(batches.c.id, batches.c.cancelling).where(ours)).all()
        return dict(tuple(row) for row in held)

    def release(self, server: str) -> None:
        """Others may go on with this server's batches at once."""
        ours = (batches.c.server == server) & batches.c.ended.is_(None)
        with self._transactions.writes() as connection:
            connection.execute(batches.update().where(ours).values(lease_until=0.0))

    def put(self, id: str, server: str, body: bytes, results: Sequence[Result] = ()) -> bool:
        """How far it is. False, and nothing written, where it is this server's no longer."""
        ours = (batches.c.id == id) & (batches.c.server == server) & batches.c.ended.is_(None)
        with self._transactions.writes() as connection:
            if not connection.execute(batches.update().where(ours).values(body=body)).rowcount:
                return False
            if results:
                connection.execute(batch_results.insert(), [{"batch": id, **structs.asdict(each)} for each in results])
            return True

    def done(self, id: str) -> dict[int, bool]:
        """Lines that have been answered, and whether well."""
        query = sa.select(batch_results.c.number, batch_results.c.good).where(batch_results.c.batch == id)
        with self._transactions.reads() as connection:
            return dict(tuple(row) for row in connection.execute(query).all())

    def end(
        self,
        id: str,
        server: str,
        *,
        now: float,
        expires: float,
        outputs: Callable[[bool, int], FileRow | None],
        body: Callable[[], bytes],
        tenant_ended: int,
    ) -> bool:
        """Its results become files, and are gone. `outputs`: of good or bad results, and how many bytes they have; None where there are none.
        `body`: the object, asked for after those. `tenant_ended`: as many that have ended are kept of its tenant, the oldest go.
        False, and nothing written, where it is this server's no longer."""
        ours = (batches.c.id == id) & (batches.c.server == server) & batches.c.ended.is_(None)
        with self._transactions.writes() as connection:
            if connection.execute(sa.select(batches.c.id).where(ours).with_for_update()).scalar() is None:
                return False
            for good in (True, False):
                its = (batch_results.c.batch == id) & (batch_results.c.good == good)
                size = sa.func.coalesce(sa.func.sum(sa.func.length(batch_results.c.data) + 1), 0)
                row = outputs(good, int(connection.execute(sa.select(size).where(its)).scalar_one()))
                if row is not None:
                    _write(connection, row, _parts(connection, id, good))
            connection.execute(batch_results.delete().where(batch_results.c.batch == id))
            connection.execute(batches.update().where(ours).values(body=body(), ended=now, expires=expires, lease_until=0.0))
            tenant = sa.select(batches.c.tenant).where(batches.c.id == id).scalar_subquery()
            ended = sa.select(batches.c.id).where(batches.c.tenant == tenant, batches.c.ended.is_not(None))
            too_many = connection.execute(
                ended.order_by(batches.c.ended.desc(), batches.c.id.desc()).offset(tenant_ended).limit(ROWS)
            ).scalars()
            connection.execute(batches.delete().where(batches.c.id.in_(list(too_many))))
            return True

    # Upkeep

    def purge(self, now: float) -> int:
        """Remove files and ended batches whose time is over. Returns how many, at most ROWS of each."""
        with self._transactions.writes() as connection:
            old = sa.select(files.c.id).where(files.c.expires <= now).limit(ROWS).with_for_update(skip_locked=True)
            gone = list(connection.execute(old).scalars())
            connection.execute(file_parts.delete().where(file_parts.c.file.in_(gone)))
            connection.execute(files.delete().where(files.c.id.in_(gone)))
            over = sa.select(batches.c.id).where(batches.c.expires <= now, batches.c.ended.is_not(None)).limit(ROWS)
            ids = list(connection.execute(over.with_for_update(skip_locked=True)).scalars())
            connection.execute(batches.delete().where(batches.c.id.in_(ids)))
            return len(gone) + len(ids)


def _check_room(connection: Connection, tenant: str, size: int, tenant_bytes: int) -> None:
    """Raises LimitExceeded."""
    theirs = sa.select(sa.func.coalesce(sa.func.sum(files.c.size), 0), sa.func.count()).where(files.c.tenant == tenant)
    present, number = connection.execute(theirs).one()
    if present + size > tenant_bytes or number >= MAX_FILES:
        message = f"the files of tenant `{tenant}` would be more than {MAX_FILES}, or have more than {tenant_bytes} bytes: delete some"
        raise LimitExceeded(message, reason="stored-files", retry_after=60.0)


def _write(connection: Connection, row: FileRow, parts: Iterable[bytes]) -> None:
    connection.execute(files.insert(), structs.asdict(row))
    for number, part in enumerate(parts):
        connection.execute(file_parts.insert(), {"file": row.id, "number": number, "data": part})


def _parts(connection: Connection, batch: str, good: bool) -> Iterator[bytes]:
    """The results of a batch as a file, in the order of its lines."""
    held, after = b"", -1
    query = sa.select(batch_results.c.number, batch_results.c.data).order_by(batch_results.c.number).limit(PAGE)
    its = (batch_results.c.batch == batch) & (batch_results.c.good == good)
    while page := connection.execute(query.where(its, batch_results.c.number > after)).all():
        after = page[-1][0]
        held += b"".join(bytes(data) + b"\n" for _, data in page)
        while len(held) >= PART_BYTES:
            yield held[:PART_BYTES]
            held = held[PART_BYTES:]
    if held:
        yield held
