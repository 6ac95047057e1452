"""Where jobs are handed in, looked up, cancelled and watched."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from hashlib import sha256
from secrets import randbits

import structlog
from msgspec import Struct, structs

from fairlead.core.caller import Caller
from fairlead.core.errors import InvalidRequest, NotFound, TooLarge
from fairlead.core.generation import Paint, Progress
from fairlead.core.jobs import ENDED, RUNNING, JobStatus
from fairlead.core.policy import JobSettings
from fairlead.core.request import Request
from fairlead.jobs.changes import Changes
from fairlead.jobs.stored import pack
from fairlead.store.job_rows import JobQuery, JobRow
from fairlead.store.jobs import JobStore

log = structlog.get_logger("fairlead.jobs")

MAX_KEY_CHARS = 255
SEED_BITS = 32
"""Of seeds that nobody chose: every protocol's clients can say them again."""

Admit = Callable[[Request], tuple[str, int]]
"""The gateway's: (class, priority) of a request that its caller may make. Raises FairleadError."""


class Wishes(Struct, frozen=True, kw_only=True):
    """What the caller wants of a job beside its answer."""

    face: str = "jobs"
    """Whose words it is told in: `jobs`, `bfl`, `replicate`, `images`."""
    idempotency_key: str = ""
    metadata: dict[str, str] = {}
    webhook: str = ""
    webhook_events: tuple[str, ...] = ()
    """Statuses that it is told of; (): every end."""
    webhook_secret: str = ""
    start_seconds: float | None = None
    """None: as long as the server allows, as for the others."""
    total_seconds: float | None = None
    retention_seconds: float | None = None


class Desk:
    """Lives in the event loop; the store works in threads."""

    def __init__(self, store: JobStore, settings: JobSettings, changes: Changes, admit: Admit, *, poll_seconds: float) -> None:
        """`poll_seconds`: how often a watcher looks for what other processes did and no notice came of."""
        self.store = store
        self.settings = settings
        self.changes = changes
        self.admit = admit
        self.poll_seconds = poll_seconds

    async def submit(self, request: Request, wishes: Wishes) -> tuple[JobRow, bool]:
        """The job, and whether it is a new one: it is not where the same `Idempotency-Key` made it before.

        Raises what the gateway refuses at once; LimitExceeded where too many of the tenant's wait; Conflict where the key came with
        another request; TooLarge; Unavailable where the store does not answer.
        """
        qos_class, priority = self.admit(request)
        data = pack(request)
        idempotency = (wishes.idempotency_key, digest_of(data, wishes)) if wishes.idempotency_key else None
        if isinstance(request.prompt, Paint) and request.prompt.seed is None:
            # Every try gives the same pictures.
            request.prompt = structs.replace(request.prompt, seed=randbits(SEED_BITS))
            data = pack(request)
        if trace := _trace(request):
            data = pack(request, trace)
        settings, caller, now = self.settings, request.caller, time.time()
        if len(data) > settings.max_input_bytes:
            raise TooLarge(f"this job's request has {len(data)} bytes; `jobs.max_input_bytes` is {settings.max_input_bytes}")
        check_wishes(wishes)
        total = shorter(wishes.total_seconds, settings.total_seconds)
        row = JobRow(
            id=new_id(now),
            tenant=caller.tenant,
            project=caller.project,
            key=caller.key,
            qos_class=qos_class,
            priority=priority,
            model=request.model,
            version=request.version,
            kind="infer" if request.prompt is None else type(request.prompt).__name__.lower(),
            face=wishes.face,
            created=now,
            not_before=now,
            start_deadline=now + min(shorter(wishes.start_seconds, settings.start_seconds), total),
            total_deadline=now + total,
            max_tries=settings.tries,
            metadata=wishes.metadata,
            webhook=wishes.webhook,
            webhook_events=wishes.webhook_events,
            webhook_secret=wishes.webhook_secret,
            retention_seconds=shorter(wishes.retention_seconds, settings.retention_seconds),
            address=caller.address,
            request_id=request.log_id,
        )
        stored, new = await asyncio.to_thread(
            self.store.submit,
            row,
            data,
            idempotency=idempotency,
            idempotency_seconds=settings.idempotency_seconds,
            tenant_queued=settings.tenant_queued,
            now=now,
        )
        if new:
            self.changes.submitted.set()
        return stored, new

    async def get(self, id: str, caller: Caller) -> JobRow:
        """Raises NotFound, for another tenant's job too."""
        known = self.changes.progress.get(id)  # forgotten when the job ends, which the store's answer may be from before
        row = await asyncio.to_thread(self.store.get, id, caller.tenant)
        if row is None:
            raise unknown(id)
        return _with(row, self.changes.progress.get(id, known))

    async def position(self, row: JobRow) -> int:
        """How many jobs of its model go before it."""
        return await asyncio.to_thread(self.store.position, row) if row.status is JobStatus.QUEUED else 0

    async def list(self, query: JobQuery) -> tuple[JobRow, ...]:
        rows = await asyncio.to_thread(self.store.list, query)
        return tuple(_with(row, self.changes.progress.get(row.id)) for row in rows)

    async def cancel(self, id: str, caller: Caller) -> JobRow:
        """The job as it is then: aborted where it waited, aborting where it runs, as it was where it had ended. Raises NotFound."""
        row = await asyncio.to_thread(self.store.cancel, id, caller.tenant, time.time())
        if row is None:
            raise unknown(id)
        if row.status is JobStatus.ABORTING:
            self.changes.abort(id)
        elif row.webhook:
            self.changes.deliver()
        self.changes.tell(id)
        return row

    async def watch(self, id: str, caller: Caller) -> AsyncGenerator[JobRow, None]:
        """The job as it is now, and again at each change, until it has ended. Raises NotFound."""
        with self.changes.listen(id) as news:
            last: JobRow | None = None
            while True:
                news.clear()
                row = await self.get(id, caller)
                if last is None or _seen(row) != _seen(last):
                    last = row
                    yield row
                if row.status in ENDED:
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.poll_seconds):
                        await news.wait()

    async def wait(self, id: str, caller: Caller, seconds: float) -> JobRow:
        """The job when it has ended, or as it is after so long. Raises NotFound."""
        deadline = time.monotonic() + seconds
        with self.changes.listen(id) as news:
            while True:
                news.clear()
                row = await self.get(id, caller)
                left = deadline - time.monotonic()
                if row.status in ENDED or left <= 0:
                    return row
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, self.poll_seconds)):
                        await news.wait()


def _with(row: JobRow, progress: Progress | None) -> JobRow:
    """With the progress that the store is told of only now and then."""
    if progress is None or row.status not in RUNNING:
        return row
    return structs.replace(row, step=progress.step, num_steps=progress.num_steps, preview=progress.preview or row.preview)


def _trace(request: Request) -> str:
    """The traceparent of what computes it: part of the request that submitted it."""
    timeline = request.timeline
    return request.trace if timeline is None or timeline.sample < 0.0 else timeline.context()


def _seen(row: JobRow) -> tuple[object, ...]:
    """What a watcher would notice."""
    return row.status, row.tries, row.step, row.num_steps, row.preview, row.message


def check_wishes(wishes: Wishes) -> None:
    """Raises InvalidRequest, naming the field."""
    key = wishes.idempotency_key
    if len(key) > MAX_KEY_CHARS or not key.isprintable():
        raise InvalidRequest(f"`Idempotency-Key` may have {MAX_KEY_CHARS} printable characters")


def shorter(wanted: float | None, allowed: float) -> float:
    return allowed if wanted is None else min(wanted, allowed)


def digest_of(data: bytes, wishes: Wishes) -> str:
    """Of everything that makes two submissions the same one."""
    rest = structs.replace(wishes, idempotency_key="")
    return sha256(data + b"\0" + repr(rest).encode()).hexdigest()


def new_id(now: float) -> str:
    """Sorts by time, to the microsecond, and nobody guesses it."""
    milliseconds, rest = divmod(int(now * 1e6), 1000)
    return f"job_{milliseconds:012x}{rest:04x}{os.urandom(8).hex()}"


def unknown(id: str) -> NotFound:
    return NotFound(f"there is no job `{id[:64]}`")
