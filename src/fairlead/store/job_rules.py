"""What may become of a job, decided without a database: a row and a moment go in, the row as it is to be comes out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush, nsmallest

from msgspec import Struct, structs

from fairlead.core.jobs import ENDED, RUNNING, JobReason, JobResult, JobStatus
from fairlead.store.job_rows import DeliveryRow, JobRow


class Ending(Struct, frozen=True, kw_only=True):
    status: JobStatus
    reason: JobReason = ""
    message: str = ""
    result: JobResult | None = None
    cost: float = 0.0


CANCELLED = Ending(status=JobStatus.ABORTED, reason="cancelled", message="it was cancelled")
EXPIRED = Ending(status=JobStatus.ABORTED, reason="expired", message="it did not start in time")
TIMEOUT = Ending(status=JobStatus.FAILED, reason="timeout", message="it did not end in time")
DIED = Ending(status=JobStatus.FAILED, reason="replica-died", message="the server that computed it is gone, and its tries are used up")


def leased(row: JobRow, runner: str, now: float, lease_until: float) -> JobRow:
    assert row.status == JobStatus.QUEUED, row
    return structs.replace(
        row,
        status=JobStatus.ACTIVE,
        runner=runner,
        lease_until=lease_until,
        tries=row.tries + 1,
        started=now if row.started is None else row.started,
        message="",
        revision=row.revision + 1,
    )


def ended(row: JobRow, ending: Ending, now: float) -> JobRow:
    assert row.status not in ENDED and ending.status in ENDED, (row, ending)
    return structs.replace(
        row,
        status=ending.status,
        reason=ending.reason,
        message=ending.message,
        result=ending.result,
        cost=ending.cost,
        ended=now,
        step=row.num_steps if ending.status is JobStatus.COMPLETE else row.step,
        expires=now + row.retention_seconds,
        runner="",
        lease_until=0.0,
        preview=b"",
        revision=row.revision + 1,
    )


def put_back(row: JobRow, not_before: float, message: str, now: float, *, counted: bool) -> JobRow:
    assert row.status in RUNNING, row
    if row.status == JobStatus.ABORTING:
        return ended(row, CANCELLED, now)
    tries = row.tries if counted else row.tries - 1
    return structs.replace(
        row,
        status=JobStatus.QUEUED,
        not_before=not_before,
        message=message,
        tries=tries,
        # What never began a try has not started, and its start deadline holds again.
        started=row.started if tries else None,
        runner="",
        lease_until=0.0,
        step=0,
        num_steps=0,
        preview=b"",
        revision=row.revision + 1,
    )


def cancelled(row: JobRow, now: float) -> JobRow:
    match row.status:
        case JobStatus.QUEUED:
            return ended(row, CANCELLED, now)
        case JobStatus.ACTIVE:
            return structs.replace(row, status=JobStatus.ABORTING, revision=row.revision + 1)
    return row


def swept(row: JobRow, now: float, backoff: Callable[[int], float]) -> JobRow:
    """The same row where nothing has passed."""
    lost = row.status in RUNNING and row.lease_until < now
    if row.status in ENDED:
        return row
    if row.status == JobStatus.ABORTING:
        return ended(row, CANCELLED, now) if lost or row.total_deadline <= now else row
    if row.started is None and row.start_deadline <= now:
        return ended(row, EXPIRED, now)
    if row.total_deadline <= now:
        return ended(row, TIMEOUT, now)
    if not lost:
        return row
    if row.tries >= row.max_tries:
        return ended(row, DIED, now)
    return put_back(row, now + backoff(row.tries), "the server that computed it is gone", now, counted=True)


def called_for(row: JobRow, now: float) -> DeliveryRow | None:
    """The call that a job's new status asks for. Its id says which it is, so that none is made twice."""
    wanted = row.status in row.webhook_events if row.webhook_events else row.status in ENDED
    if not row.webhook or not wanted:
        return None
    return DeliveryRow(
        id=f"msg_{row.id.removeprefix('job_')}_{row.status}",
        job=row.id,
        tenant=row.tenant,
        url=row.webhook,
        event=row.status.value,
        face=row.face,
        secret=row.webhook_secret,
        created=now,
        next_at=now,
    )


class Group(Struct, frozen=True):
    """Jobs that wait for the same: the oldest of them that is due, what all have in common."""

    head: str
    model: str
    priority: int
    tenant: str


def chosen(groups: Iterable[Group], running: Mapping[str, int], limit: int, tenant_active: int) -> list[tuple[Group, int]]:
    """The groups whose jobs may be among the next `limit`, and how many of each at most: at every priority the `limit` tenants with the fewest
    running jobs, so that a thousand tenants that wait cost no more than a few. Each that a higher priority has served meanwhile took one of
    the places, so that there are always enough."""
    heads: dict[tuple[int, str], str] = {}
    ours = [group for group in groups if running.get(group.tenant, 0) < tenant_active]
    for group in ours:
        head = heads.get((group.priority, group.tenant))
        if head is None or group.head < head:
            heads[group.priority, group.tenant] = group.head
    levels: dict[int, list[str]] = {}
    for priority, tenant in heads:
        levels.setdefault(priority, []).append(tenant)
    taken = {
        (priority, tenant)
        for priority, tenants in levels.items()
        for tenant in nsmallest(limit, tenants, key=lambda name: (running.get(name, 0), heads[priority, name]))
    }
    return [(group, min(limit, tenant_active - running.get(group.tenant, 0))) for group in ours if (group.priority, group.tenant) in taken]


def dealt(due: Iterable[tuple[Group, Sequence[str]]], running: Mapping[str, int], limit: int, tenant_active: int) -> list[str]:
    """Ids of the next `limit` jobs: the highest priority first, then of the tenant with the fewest running, then the oldest."""
    lines: dict[tuple[int, str], list[str]] = {}
    for group, ids in due:
        lines.setdefault((group.priority, group.tenant), []).extend(ids)
    counts = dict(running)
    # An entry a line: where its count has grown meanwhile (a tenant may wait at several priorities), it is put in again.
    heap: list[tuple[int, int, str, str]] = []
    for (priority, tenant), ids in lines.items():
        ids.sort(reverse=True)
        heappush(heap, (-priority, counts.get(tenant, 0), ids.pop(), tenant))
    taken: list[str] = []
    while heap and len(taken) < limit:
        behind, count, id, tenant = heappop(heap)
        now_running = counts.get(tenant, 0)
        if now_running >= tenant_active:
            continue
        if now_running > count:
            heappush(heap, (behind, now_running, id, tenant))
            continue
        taken.append(id)
        counts[tenant] = now_running + 1
        if rest := lines[-behind, tenant]:
            heappush(heap, (behind, now_running + 1, rest.pop(), tenant))
    return taken
