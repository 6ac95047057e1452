"""Jobs as the store keeps them, as plain functions: blocking, safe to call from any thread. Every time is an argument.

| from | by | to |
|---|---|---|
| | submit | queued |
| queued | lease | active: `tries` + 1, `started` set at the first |
| queued | cancel | aborted (`cancelled`) |
| queued | sweep | aborted (`expired`: it never started, and its start deadline passed), failed (`timeout`) |
| active | end | complete, failed, aborted |
| active | again | queued |
| active | cancel | aborting |
| active | sweep | queued or, its tries used up, failed (`replica-died`): its lease ran out; failed (`timeout`) |
| aborting | end | aborted, complete, failed: what its runner came to |
| aborting | again, sweep | aborted (`cancelled`) |

What has ended stays as it is until it is purged. All methods raise Unavailable where the database is gone, full or locked; nothing is
half-written then.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from threading import Event
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection
from sqlalchemy.exc import DataError

from fairlead.core.errors import InvalidRequest, LimitExceeded, NotFound
from fairlead.core.jobs import RUNNING, JobReason, JobResult, JobStatus
from fairlead.store import job_rules
from fairlead.store.grouped import Grouped
from fairlead.store.job_rows import Backlog, DeliveryRow, DeliveryState, JobQuery, JobRow, SecretRow
from fairlead.store.job_rules import Ending
from fairlead.store.job_sql import DELIVERY, SECRET, JobSql, delivery, secret
from fairlead.store.rows import UsageRow
from fairlead.store.spent import insert_usage
from fairlead.store.sql import plain
from fairlead.store.transactions import Conflict, Transactions

NUL = "\0"
"""PostgreSQL keeps no text with one in it, and complains of looking for one."""
MAX_POSITION = 1000
SWEEP_ROWS = 256
LEASE_ROWS = 256
GROUP_CALLS = 64
"""That share a transaction."""
GROUP_SECONDS = 15.0
"""How long a call waits for the transactions before."""
LEASE_LOCK = 0x6661_6973
"""PostgreSQL's advisory lock: leases come one after the other, so that two runners together never exceed a tenant's share, nor look at the
same jobs."""


class _Wish(Struct, frozen=True):
    """A call of `submit`."""

    row: JobRow
    data: bytes
    idempotency: tuple[str, str] | None
    idempotency_seconds: float
    tenant_queued: int
    now: float


class _End(Struct, frozen=True):
    """A call of `end`."""

    id: str
    runner: str
    ending: Ending
    usage: Sequence[UsageRow]
    now: float


class JobStore:
    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._sql = JobSql(transactions.engine, "fairlead_jobs")
        self._submits = Grouped[_Wish, tuple[JobRow, bool]](self._submit, most=GROUP_CALLS, seconds=GROUP_SECONDS)
        self._ends = Grouped[_End, JobRow | None](self._end, most=GROUP_CALLS, seconds=GROUP_SECONDS)
        self._positions = Grouped[JobRow, int](self._position, most=GROUP_CALLS, seconds=GROUP_SECONDS)

    # Submitting and asking

    def submit(
        self,
        row: JobRow,
        data: bytes,
        *,
        idempotency: tuple[str, str] | None = None,
        idempotency_seconds: float = 86_400.0,
        tenant_queued: int,
        now: float,
    ) -> tuple[JobRow, bool]:
        """The stored row, and whether it is new. `idempotency` (key, digest of what is asked): the earlier job of the tenant's same key.

        Raises Conflict where that one was another wish, LimitExceeded (`queued-jobs`) where the tenant has as many waiting,
        InvalidRequest for texts that the database cannot keep. Calls at the same time share a transaction.
        """
        try:
            return self._submits(_Wish(row, data, idempotency, idempotency_seconds, tenant_queued, now))
        except (DataError, UnicodeError, OverflowError) as error:
            raise InvalidRequest(
                "the job holds what the store cannot keep: a NUL, half a character, or a number that is too large"
            ) from error

    def _submit(self, wishes: Sequence[_Wish]) -> Sequence[tuple[JobRow, bool] | Exception]:
        with self._transactions.writes() as connection:
            # Whoever submits for one of these tenants meanwhile, waits: what is counted stays true.
            self._sql.lock(connection, *(_number(f"submit:{wish.row.tenant}") for wish in wishes))
            earlier = self._earlier(connection, wishes)
            queued = self._queued(connection, {wish.row.tenant for wish in wishes})
            answers: list[tuple[JobRow, bool] | Exception] = []
            new: list[_Wish] = []
            for wish in wishes:
                answer = _admitted(wish, earlier, queued)
                answers.append(answer)
                if not isinstance(answer, Exception) and answer[1]:
                    new.append(wish)
                    queued[wish.row.tenant] += 1
                    if wish.idempotency is not None:
                        earlier[wish.row.tenant, wish.idempotency[0]] = (wish.idempotency[1], wish.row)
            if new:
                self._sql.add_jobs(connection, [(wish.row, wish.data) for wish in new])
                keys = [
                    (wish.row.tenant, *wish.idempotency, wish.row.id, wish.now + wish.idempotency_seconds)
                    for wish in new
                    if wish.idempotency is not None
                ]
                self._sql.insert(connection, "idempotency", ("tenant", "key", "digest", "job", "expires"), keys, REPLACED_KEY)
                self._sql.notify(connection, [wish.row.id for wish in new])
            return answers

    def _earlier(self, connection: Connection, wishes: Sequence[_Wish]) -> dict[tuple[str, str], tuple[str, JobRow]]:
        """Tenant and key of those that live -> digest and job."""
        keys = {(wish.row.tenant, wish.idempotency[0]): wish.now for wish in wishes if wish.idempotency is not None}
        if not keys:
            return {}
        among = self._sql.among
        statement = f"SELECT tenant, key, digest, job, expires FROM idempotency WHERE tenant {among} AND key {among}"
        parameters = self._sql.within({tenant for tenant, _ in keys}), self._sql.within({key for _, key in keys})
        found = [row for row in self._sql.run(connection, statement, *parameters).fetchall() if keys.get((row[0], row[1]), row[4]) < row[4]]
        if not found:
            return {}
        jobs = {
            row.id: row for row in self._sql.jobs(connection, f"WHERE id {among}", self._sql.within(row[3] for row in found), whole=True)
        }
        return {(row[0], row[1]): (row[2], jobs[row[3]]) for row in found if row[3] in jobs}

    def _queued(self, connection: Connection, tenants: set[str]) -> Counter[str]:
        statement = f"SELECT tenant, count(*) FROM jobs WHERE status = 'queued' AND tenant {self._sql.among} GROUP BY tenant"
        return Counter(dict(tuple(row) for row in self._sql.run(connection, statement, self._sql.within(tenants)).fetchall()))

    def get(self, id: str, tenant: str | None = None) -> JobRow | None:
        """None: unknown, or another tenant's. `tenant` None: any."""
        if NUL in id:
            return None
        with self._transactions.reads() as connection:
            found = self._sql.jobs(connection, "WHERE id = ?", id, whole=True)
        return found[0] if found and tenant in (None, found[0].tenant) else None

    def data(self, id: str) -> bytes:
        """The input. Raises NotFound."""
        with self._transactions.reads() as connection:
            found = self._sql.run(connection, "SELECT data FROM job_inputs WHERE job = ?", id).scalar()
        if found is None:
            raise NotFound(f"there is no job {id}")
        return bytes(found)

    def list(self, query: JobQuery) -> tuple[JobRow, ...]:
        """The newest first."""
        wanted = {
            "tenant = ?": query.tenant,
            "model = ?": query.model,
            "kind = ?": query.kind,
            "id < ?": query.before,
            f"status {self._sql.among}": self._sql.within(query.statuses) if query.statuses else None,
        }
        said = {words: value for words, value in wanted.items() if value is not None}
        if any(value and NUL in value for value in (query.model, query.before)):
            return ()
        where = f"WHERE {' AND '.join(said)}" if said else ""
        with self._transactions.reads() as connection:
            rest = f"{where} ORDER BY id DESC LIMIT ?"
            return tuple(self._sql.jobs(connection, rest, *said.values(), query.limit, whole=query.whole))

    def revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Of those that there are: what to ask again and again, where nobody notifies."""
        statement = f"SELECT id, revision FROM jobs WHERE id {self._sql.among}"
        with self._transactions.reads() as connection:
            return dict(tuple(row) for row in self._sql.run(connection, statement, self._sql.within(ids)).fetchall())

    def position(self, row: JobRow) -> int:
        """How many queued jobs of its model go before it, by priority and age; MAX_POSITION stands for as many or more. Calls at the same
        time share a connection."""
        return self._positions(row) if row.status == JobStatus.QUEUED else 0

    def _position(self, rows: Sequence[JobRow]) -> Sequence[int]:
        ours = "SELECT 1 FROM jobs WHERE status = 'queued' AND model = ? AND priority"
        statement = f"SELECT count(*) FROM (SELECT * FROM ({ours} > ? UNION ALL {ours} = ? AND id < ?) AS a LIMIT {MAX_POSITION}) AS b"
        with self._transactions.reads() as connection:
            found = [self._sql.run(connection, statement, row.model, row.priority, row.model, row.priority, row.id) for row in rows]
            return [int(each.scalar()) for each in found]

    def cancel(self, id: str, tenant: str | None, now: float) -> JobRow | None:
        """queued -> aborted, active -> aborting; others are returned as they are. None: unknown, or another tenant's."""
        if NUL in id:
            return None
        with self._transactions.writes() as connection:
            found = self._sql.jobs(connection, f"WHERE id = ? {self._sql.for_update}", id, whole=True)
            if not found or tenant not in (None, found[0].tenant):
                return None
            row = job_rules.cancelled(found[0], now)
            if row is not found[0]:
                self._put(connection, [row], now)
            return row

    # Running

    def waiting(self, models: Sequence[str], now: float) -> bool:
        """Cheap: whether a job of these is due (its tenant may run as many as it can, though)."""
        statement = f"SELECT 1 FROM jobs WHERE status = 'queued' AND model {self._sql.among} AND not_before <= ? LIMIT 1"
        with self._transactions.reads() as connection:
            return self._sql.run(connection, statement, self._sql.within(models), now).scalar() is not None

    def lease(
        self, runner: str, models: Sequence[str], limit: int, *, now: float, lease_seconds: float, tenant_active: int
    ) -> tuple[tuple[JobRow, bytes], ...]:
        """At most `limit` due jobs with their inputs, active now: the highest priority first, then of the tenant with the fewest running
        jobs, then the oldest. Never more than `tenant_active` running of a tenant, on all servers together."""
        limit = min(limit, LEASE_ROWS)
        sql = self._sql
        if limit < 1 or not models:
            return ()
        with self._transactions.writes() as connection:
            sql.lock(connection, LEASE_LOCK)
            counted = sql.run(connection, f"SELECT tenant, count(*) FROM jobs WHERE {RUNS} GROUP BY tenant").fetchall()
            running = dict(tuple(row) for row in counted)
            groups = job_rules.chosen(sql.groups(connection, models, now), running, limit, tenant_active)
            if not groups:
                return ()
            ids = job_rules.dealt(sql.oldest(connection, groups, now), running, limit, tenant_active)
            # Those that are locked are just being cancelled.
            rest = f"WHERE id {sql.among} AND status = 'queued' {sql.skip_locked}"
            found = {row.id: row for row in sql.jobs(connection, rest, sql.within(ids))}
            rows = [job_rules.leased(found[id], runner, now, now + lease_seconds) for id in ids if id in found]
            self._put(connection, rows, now)
            inputs = sql.run(connection, f"SELECT job, data FROM job_inputs WHERE job {sql.among}", sql.within(found)).fetchall()
            data = {job: bytes(held) for job, held in inputs}
            return tuple((row, data[row.id]) for row in rows)

    def beat(
        self,
        runner: str,
        progress: Mapping[str, tuple[int, int, bytes | None]],
        ids: Sequence[str],
        *,
        now: float,
        lease_seconds: float,
    ) -> dict[str, JobStatus]:
        """Renew the leases of `ids`; write (step, number of steps, preview or None for the last one). A job that is missing in the answer
        is this runner's no longer; one that is `aborting` is to be stopped."""
        sql = self._sql
        if not ids:
            return {}
        with self._transactions.writes() as connection:
            # Locked in the order of the ids, as every other change does.
            theirs = f"WHERE id {sql.among} AND runner = ? AND {RUNS} {sql.for_update}"
            found = sql.run(connection, f"SELECT id, status FROM jobs {theirs}", sql.within(ids), runner).fetchall()
            held = {id: JobStatus(status) for id, status in found}
            sql.run(connection, f"UPDATE jobs SET lease_until = ? WHERE id {sql.among}", now + lease_seconds, sql.within(held))
            steps = [(id, step, num_steps, preview) for id, (step, num_steps, preview) in progress.items() if id in held]
            sql.put_steps(connection, steps)
            sql.notify(connection, [id for id, *_ in steps])
            return held

    def end(
        self,
        id: str,
        runner: str,
        *,
        status: JobStatus,
        reason: JobReason = "",
        message: str = "",
        result: JobResult | None = None,
        cost: float = 0.0,
        usage: Sequence[UsageRow] = (),
        now: float,
    ) -> JobRow | None:
        """In one transaction: the job's end, its usage, its webhook deliveries. None, and nothing written, where it is this runner's no longer.
        Calls at the same time share a transaction."""
        ending = Ending(status=status, reason=reason, message=plain(message), result=result, cost=cost)
        return self._ends(_End(id, runner, ending, usage, now))

    def _end(self, ends: Sequence[_End]) -> Sequence[JobRow | Exception | None]:
        with self._transactions.writes() as connection:
            rows = self._sql.locked(connection, {end.id for end in ends})
            answers: list[JobRow | None] = []
            usage: list[UsageRow] = []
            for end in ends:
                row = rows.get(end.id)
                if row is None or row.runner != end.runner or row.status not in RUNNING:
                    answers.append(None)
                    continue
                rows[end.id] = row = job_rules.ended(row, end.ending, end.now)
                usage += end.usage
                answers.append(row)
            changed = [row for row in answers if row is not None]
            self._put(connection, changed, max(end.now for end in ends))
            if usage:
                insert_usage(connection, usage)
            return answers

    def again(self, id: str, runner: str, *, not_before: float, counted: bool, message: str = "", now: float) -> JobRow | None:
        """Back to queued (an aborting one: aborted). `counted` False takes the try back. None where it is this runner's no longer."""
        with self._transactions.writes() as connection:
            row = self._sql.locked(connection, [id]).get(id)
            if row is None or row.runner != runner or row.status not in RUNNING:
                return None
            row = job_rules.put_back(row, not_before, plain(message), now, counted=counted)
            self._put(connection, [row], now)
            return row

    def _put(self, connection: Connection, rows: Sequence[JobRow], now: float) -> None:
        """What the rules made of locked jobs, with the calls that it asks for."""
        self._sql.put_jobs(connection, rows)
        self._sql.add_deliveries(connection, [call for row in rows if (call := job_rules.called_for(row, now)) is not None])
        self._sql.notify(connection, [row.id for row in rows])

    def backlog(self) -> Backlog:
        """What is to be done, of all servers together."""
        unfinished = "SELECT model, status, count(*), min(created) FROM jobs WHERE ended IS NULL GROUP BY model, status"
        with self._transactions.reads() as connection:
            rows = self._sql.run(connection, unfinished).fetchall()
            calls = self._sql.run(connection, "SELECT count(*) FROM deliveries WHERE state = 'pending'").scalar()
        return Backlog(jobs={(row[0], row[1]): (row[2], row[3]) for row in rows}, num_calls=calls or 0)

    # Upkeep

    def sweep(self, now: float, backoff: Callable[[int], float]) -> tuple[JobRow, ...]:
        """Jobs whose lease or deadline passed, as they are now; at most SWEEP_ROWS of them. `backoff`: seconds to wait after so many tries."""
        sql = self._sql
        passed = (
            f"SELECT id FROM jobs WHERE {RUNS} AND lease_until < ?",
            "SELECT id FROM jobs WHERE status = 'queued' AND started IS NULL AND start_deadline <= ?",
            "SELECT id FROM jobs WHERE ended IS NULL AND total_deadline <= ?",
        )
        with self._transactions.reads() as connection:
            statement = f"SELECT id FROM ({' UNION '.join(passed)}) AS passed LIMIT {SWEEP_ROWS}"
            ids = [row[0] for row in sql.run(connection, statement, now, now, now).fetchall()]
        if not ids:
            return ()
        with self._transactions.writes() as connection:
            # What somebody has locked is just being changed, and is looked at next time.
            found = sql.jobs(connection, f"WHERE id {sql.among} {sql.skip_locked}", sql.within(ids))
            pairs = [(row, job_rules.swept(row, now, backoff)) for row in found]
            rows = [new for old, new in pairs if new is not old]
            self._put(connection, rows, now)
            return tuple(rows)

    def expired(self, now: float, limit: int) -> tuple[str, ...]:
        """Ids of at most `limit` ended jobs whose time is over."""
        with self._transactions.reads() as connection:
            found = self._sql.run(connection, "SELECT id FROM jobs WHERE expires <= ? ORDER BY expires LIMIT ?", now, limit)
            return tuple(row[0] for row in found.fetchall())

    def purge(self, now: float, limit: int, *, among: Sequence[str] | None = None, log_seconds: float = 604_800.0) -> tuple[str, ...]:
        """Ids of at most `limit` ended jobs (`among`: of these only) whose time is over: removed with their inputs and idempotency keys. Also
        removes idempotency keys and secrets that have expired, and deliveries that ended `log_seconds` ago."""
        sql = self._sql
        with self._transactions.writes() as connection:
            ours, given = ("", ()) if among is None else (f"AND id {sql.among}", (sql.within(among),))
            over = f"SELECT id FROM jobs WHERE expires <= ? {ours} ORDER BY expires LIMIT ? {sql.skip_locked}"
            ids = [row[0] for row in sql.run(connection, over, now, *given, limit).fetchall()]
            for table, column in {"job_inputs": "job", "idempotency": "job", "jobs": "id"}.items() if ids else ():
                sql.run(connection, f"DELETE FROM {table} WHERE {column} {sql.among}", sql.within(ids))
            sql.run(connection, "DELETE FROM idempotency WHERE expires <= ?", now)
            sql.run(connection, "DELETE FROM secrets WHERE expires <= ?", now)
            old = "SELECT id FROM deliveries WHERE ended <= ? LIMIT ?"
            sql.run(connection, f"DELETE FROM deliveries WHERE id IN ({old})", now - log_seconds, limit)
            return tuple(ids)

    @property
    def notifies(self) -> bool:
        """Whether there is something to listen to: in PostgreSQL. Processes that share a file ask again and again."""
        return not self._sql.is_sqlite

    def listen(self, on_change: Callable[[str], None], stop: Event) -> None:
        """Call with the id of each job that another process changes, and with "" once it listens; until `stop`. For a thread of its own.

        Raises Unavailable when the connection is lost: listen again, and look at everything that matters.
        """
        with self._transactions.reads() as connection:
            self._sql.listen(connection, on_change, stop)

    # Webhook deliveries

    def due(
        self,
        runner: str,
        limit: int,
        *,
        now: float,
        lease_seconds: float,
        busy_urls: Iterable[str] = (),
        busy_tenants: Iterable[str] = (),
    ) -> tuple[DeliveryRow, ...]:
        """Pending deliveries to be tried now, `tries` + 1; nobody else gets them for `lease_seconds`. None to `busy_urls` or of `busy_tenants`."""
        sql = self._sql
        wanted = f"state = 'pending' AND next_at <= ? AND lease_until <= ? AND NOT (url {sql.among}) AND NOT (tenant {sql.among})"
        parameters = now, now, sql.within(busy_urls), sql.within(busy_tenants)
        with self._transactions.reads() as connection:
            if sql.run(connection, f"SELECT 1 FROM deliveries WHERE {wanted} LIMIT 1", *parameters).scalar() is None:
                return ()
        with self._transactions.writes() as connection:
            ours = f"SELECT id FROM deliveries WHERE {wanted} ORDER BY next_at LIMIT ? {sql.skip_locked}"
            ids = [row[0] for row in sql.run(connection, ours, *parameters, limit).fetchall()]
            change = f"UPDATE deliveries SET runner = ?, lease_until = ?, tries = tries + 1 WHERE id {sql.among}"
            sql.run(connection, change, runner, now + lease_seconds, sql.within(ids))
            return sql.deliveries(connection, f"WHERE id {sql.among} ORDER BY next_at, id", sql.within(ids))

    def delivered(self, id: str, runner: str, *, status: int, body: str, now: float) -> bool:
        """False: another runner's meanwhile."""
        return self._tried(id, runner, state=DeliveryState.DELIVERED, last_status=status, last_error="", body=body, ended=now)

    def put_off(
        self, id: str, runner: str, *, next_at: float, status: int | None, error: str, body: str | None, counted: bool = True
    ) -> bool:
        """Try again at `next_at`. `counted` False: nobody was called, which takes the try back and leaves `last_...` and the body as they were.
        False: another runner's meanwhile."""
        if counted:
            return self._tried(id, runner, next_at=next_at, last_status=status, last_error=plain(error), body=body)
        statement = """UPDATE deliveries SET next_at = ?, tries = tries - 1, runner = '', lease_until = 0
            WHERE id = ? AND runner = ? AND state = 'pending'"""
        with self._transactions.writes() as connection:
            return bool(self._sql.run(connection, statement, next_at, id, runner).rowcount)

    def gave_up(self, id: str, runner: str, *, status: int | None, error: str, body: str | None, now: float) -> bool:
        """False: another runner's meanwhile."""
        return self._tried(id, runner, state=DeliveryState.FAILED, last_status=status, last_error=plain(error), body=body, ended=now)

    def _tried(self, id: str, runner: str, *, body: str | None, **changes: Any) -> bool:
        said = ", ".join(f"{name} = ?" for name in changes)
        statement = f"""UPDATE deliveries SET {said}, body = COALESCE(?, body), runner = '', lease_until = 0
            WHERE id = ? AND runner = ? AND state = 'pending'"""
        with self._transactions.writes() as connection:
            return bool(self._sql.run(connection, statement, *changes.values(), body, id, runner).rowcount)

    def deliveries(self, job: str, tenant: str | None) -> tuple[DeliveryRow, ...]:
        """The oldest first."""
        if NUL in job:
            return ()
        with self._transactions.reads() as connection:
            found = self._sql.deliveries(connection, "WHERE job = ? ORDER BY created, id", job)
        return tuple(row for row in found if tenant in (None, row.tenant))

    def replay(self, id: str, tenant: str | None, now: float) -> DeliveryRow | None:
        """Deliver once more, from the first try on, by the same id. None: unknown, or another tenant's."""
        if NUL in id:
            return None
        statement = f"""UPDATE deliveries SET state = 'pending', next_at = ?, tries = 0, runner = '', lease_until = 0, ended = NULL
            WHERE id = ? AND tenant = COALESCE(?, tenant) RETURNING {", ".join(DELIVERY)}"""
        with self._transactions.writes() as connection:
            found = self._sql.run(connection, statement, now, id, tenant).fetchall()
        return delivery(found[0]) if found else None

    # Secrets

    def secrets(self, name: str, tenant: str, now: float) -> tuple[SecretRow, ...]:
        """Those that live, the newest first."""
        with self._transactions.reads() as connection:
            return self._live(connection, name, tenant, now)

    def put_secret(self, name: str, tenant: str, value: str, now: float) -> tuple[SecretRow, ...]:
        """Add it unless there is one that lives; those that live, the newest first. Of processes that do so at once, one wins."""
        with self._transactions.writes() as connection:
            self._sql.lock(connection, _number(f"secret:{name}:{tenant}"))
            if not self._live(connection, name, tenant, now):
                self._add_secret(connection, SecretRow(name=name, tenant=tenant, value=value, created=now))
            return self._live(connection, name, tenant, now)

    def rotate(self, name: str, tenant: str, value: str, *, expires_old: float, now: float) -> tuple[SecretRow, ...]:
        """A new one; those before live until `expires_old` at most. Those that live, the newest first."""
        with self._transactions.writes() as connection:
            self._sql.lock(connection, _number(f"secret:{name}:{tenant}"))
            statement = "UPDATE secrets SET expires = ? WHERE name = ? AND tenant = ? AND (expires IS NULL OR expires > ?)"
            self._sql.run(connection, statement, expires_old, name, tenant, expires_old)
            self._add_secret(connection, SecretRow(name=name, tenant=tenant, value=value, created=now))
            return self._live(connection, name, tenant, now)

    def _live(self, connection: Connection, name: str, tenant: str, now: float) -> tuple[SecretRow, ...]:
        rest = "WHERE name = ? AND tenant = ? AND (expires IS NULL OR expires > ?) ORDER BY created DESC, expires IS NOT NULL, value"
        found = self._sql.run(connection, f"SELECT {', '.join(SECRET)} FROM secrets {rest}", name, tenant, now)
        return tuple(secret(row) for row in found.fetchall())

    def _add_secret(self, connection: Connection, row: SecretRow) -> None:
        self._sql.insert(connection, "secrets", SECRET, [tuple(getattr(row, name) for name in SECRET)])


RUNS = "status IN ('active', 'aborting')"
REPLACED_KEY = "ON CONFLICT (tenant, key) DO UPDATE SET digest = excluded.digest, job = excluded.job, expires = excluded.expires"


def _admitted(
    wish: _Wish, earlier: Mapping[tuple[str, str], tuple[str, JobRow]], queued: Mapping[str, int]
) -> tuple[JobRow, bool] | Exception:
    row = wish.row
    if wish.idempotency is not None:
        key, digest = wish.idempotency
        known = earlier.get((row.tenant, key))
        if known is not None:
            asked, job = known
            return (job, False) if asked == digest else Conflict("this idempotency key was used for another request")
    if queued.get(row.tenant, 0) >= wish.tenant_queued:
        told = f"{wish.tenant_queued} jobs of tenant `{row.tenant}` wait already"
        return LimitExceeded(told, reason="queued-jobs", retry_after=1.0)
    return row, True


def _number(name: str) -> int:
    """Of an advisory lock."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)
