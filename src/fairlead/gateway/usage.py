"""Records of requests on their way to the store: taken in the event loop at once, written by one thread in batches.

A batch is written when it is full and `flush_seconds` after the last one: a process that is killed loses no more than
that. While the store does not answer, rows wait here up to a bound; beyond it the oldest are dropped and counted.
"""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

import structlog

from fairlead.core.errors import Unavailable
from fairlead.observe.counts import Counts
from fairlead.store.rows import AuditRow, UsageRow

R = TypeVar("R")

MAX_ROWS = 100_000
"""That wait: some 45 MB."""
MAX_AUDIT_ROWS = 10_000
BATCH_ROWS = 2048
"""In one transaction: some ten milliseconds of the writing thread. A batch has a price of its own, whatever it holds."""
MAX_RETRY_SECONDS = 30.0
STOP_SECONDS = 10.0
STOP_RETRY_SECONDS = 0.1

RECORDS = "fairlead_usage_records_total"
FAILURES = "fairlead_usage_failed_writes_total"

log = structlog.get_logger(__name__)


class Records(Protocol):
    """What of the store is needed here. It blocks."""

    def record(self, usage: Sequence[UsageRow], audit: Sequence[AuditRow] = ()) -> None:
        """All or none. Raises Unavailable where another try may do better."""


class UsageLog:
    """Everything but the writing itself happens in the event loop."""

    def __init__(self, store: Records | None, flush_seconds: float, counts: Counts, *, max_rows: int = MAX_ROWS) -> None:
        """Without a store, rows go nowhere."""
        self._store = store
        self._flush_seconds = flush_seconds
        self._counts = counts
        self._rows: deque[UsageRow] = deque(maxlen=max_rows)
        self._audit: deque[AuditRow] = deque(maxlen=MAX_AUDIT_ROWS)
        self._wake = asyncio.Event()
        self._stopping = False
        self._failing = False
        self._writer: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "usage")

    @property
    def waiting(self) -> int:
        return len(self._rows) + len(self._audit)

    def start(self) -> None:
        if self._store is not None:
            self._writer = asyncio.create_task(self._write_all(self._store), name="usage")

    def add(self, row: UsageRow) -> None:
        """Never waits."""
        if self._store is None:
            return
        rows = self._rows
        if len(rows) == rows.maxlen:
            self._counts.add(RECORDS, "dropped")
        rows.append(row)
        if len(rows) == BATCH_ROWS:
            self._wake.set()

    def audit(self, row: AuditRow) -> None:
        """For what the gateway does by itself; what people do is written with its effect."""
        if self._store is None:
            return
        if len(self._audit) == self._audit.maxlen:
            self._counts.add(RECORDS, "dropped")
        self._audit.append(row)

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Write what is left. What the store has not taken by then is lost, and the log says how much."""
        self._stopping = True
        self._wake.set()
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=seconds)
            if not self._writer.done():
                self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        if self.waiting:
            log.error("usage_lost", records=self.waiting)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _write_all(self, store: Records) -> None:
        pause = self._flush_seconds
        while not self._stopping or self.waiting:
            await self._wait(pause)
            try:
                await self._flush(store)
            except Unavailable as error:
                self._counts.add(FAILURES)
                if not self._failing:
                    log.error(
                        "usage_not_written", error=error.message, note=f"up to {self._rows.maxlen} records wait until the store answers"
                    )
                self._failing = True
                pause = min(pause * 2, max(MAX_RETRY_SECONDS, self._flush_seconds))
            else:
                if self._failing:
                    log.info("usage_written_again", waiting=self.waiting)
                self._failing = False
                pause = self._flush_seconds

    async def _wait(self, seconds: float) -> None:
        """Until it is time, or a batch is full, or all shall end."""
        if self._stopping:
            if self._failing:
                await asyncio.sleep(STOP_RETRY_SECONDS)
            return
        self._wake.clear()
        if self._failing or len(self._rows) < BATCH_ROWS:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    async def _flush(self, store: Records) -> None:
        """Write what is there now; what comes meanwhile is for the next time. Raises Unavailable."""
        for _ in range(math.ceil(max(len(self._rows), len(self._audit)) / BATCH_ROWS)):
            rows = [self._rows.popleft() for _ in range(min(BATCH_ROWS, len(self._rows)))]
            audit = [self._audit.popleft() for _ in range(min(BATCH_ROWS, len(self._audit)))]
            await self._write(store, rows, audit)

    async def _write(self, store: Records, rows: list[UsageRow], audit: list[AuditRow]) -> None:
        """Raises Unavailable, with what is not written back in its place. Rows that the store cannot take keep no others from it."""
        parts, refused = [(rows, audit)], 0
        while parts:
            rows, audit = parts.pop()
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, store.record, rows, audit)
            except (Unavailable, asyncio.CancelledError):
                for back, entries in (*parts, (rows, audit)):
                    dropped = _put_back(self._rows, back) + _put_back(self._audit, entries)
                    self._counts.add(RECORDS, "dropped", by=dropped)
                raise
            except Exception as error:
                if len(rows) + len(audit) > 1:
                    parts += _halves(rows, audit)
                else:
                    refused += 1
                    # Once for each batch: the values in it are the callers'.
                    if refused == 1:
                        log.error("usage_record_refused", error=type(error).__name__)
                    self._counts.add(RECORDS, "refused")
            else:
                self._counts.add(RECORDS, "written", by=len(rows) + len(audit))


def _put_back(waiting: deque[R], back: list[R]) -> int:
    """As far as there is room beside the newer ones. Returns how many had none."""
    room = (waiting.maxlen or 0) - len(waiting)
    waiting.extendleft(back[: -room - 1 : -1])
    return max(len(back) - room, 0)


def _halves(rows: list[UsageRow], audit: list[AuditRow]) -> list[tuple[list[UsageRow], list[AuditRow]]]:
    """The later one first."""
    if rows and audit:
        return [([], audit), (rows, [])]
    row, entry = (len(rows) + 1) // 2, (len(audit) + 1) // 2
    return [(rows[row:], audit[entry:]), (rows[:row], audit[:entry])]
