"""Answers of the Responses API that are kept: those that this server computes, and what the store holds of all.

An answer is ended by the server that computes it, or by any other once that one has been silent for `lease_seconds`.
"""

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import structlog
from msgspec import structs

from fairlead.api.openai.errors import BadParameter, Missing
from fairlead.api.openai.responses_events import ENDED, Answering, decoded, encode, failed_by_death
from fairlead.api.openai.responses_items import REFERENCE, Item, packed, unpacked
from fairlead.core.errors import Cancelled, LimitExceeded, Unavailable
from fairlead.core.policy import ResponseSettings
from fairlead.core.request import Response
from fairlead.store.responses import ResponseRow, ResponseStore

MAX_CHAIN = 1000
"""Answers that one may go on from, one after the other."""
MAX_REFERENCES = 10_000
"""To items, in one request."""
PURGE_SECONDS = 60.0
POLL_SECONDS = 0.25
"""How often the store is asked for what another server does."""
STOP_SECONDS = 5.0
"""For what is still to be written when the server stops."""
DAY = 86_400.0

log = structlog.get_logger(__name__)


class Running:
    """An answer that this server computes."""

    def __init__(self, answering: Answering, tenant: str, input: list[Item], task: asyncio.Task[Any] | None) -> None:
        self.answering = answering
        self.tenant = tenant
        self.input = input
        self.task = task
        """Which computes it."""
        self.waiting = False
        """For the model: then its task may be interrupted."""
        self.cancelled = False
        self.deleted = False
        self.written: asyncio.Task[bool] | None = None
        """Whether the store has its beginning."""
        self.ended = asyncio.Event()
        self._changed = asyncio.Event()

    @property
    def id(self) -> str:
        return self.answering.response.id

    def stop(self) -> None:
        self.cancelled = True
        if self.waiting and self.task is not None:
            self.task.cancel()

    async def is_written(self) -> bool:
        return self.written is not None and await asyncio.shield(self.written)

    def was_cancelled(self) -> bool:
        return self.cancelled

    async def next(self, responses: AsyncGenerator[Response, None]) -> Response | None:
        """None: there are no more. Raises Cancelled where somebody stopped it."""
        if self.was_cancelled():
            raise Cancelled("it was cancelled")
        self.waiting = True
        try:
            return await anext(responses, None)
        except asyncio.CancelledError:
            if not self.was_cancelled():
                raise
            assert self.task is not None
            self.task.uncancel()
            raise Cancelled("it was cancelled") from None
        finally:
            self.waiting = False

    def changed(self) -> None:
        """There are more events."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def events(self, after: int) -> AsyncGenerator[bytes, None]:
        """Those that follow number `after`, as they come."""
        logged = self.answering.log
        assert logged is not None
        at = after + 1
        while True:
            changed, ended = self._changed, self.ended.is_set()
            if events := logged[at:]:
                at += len(events)
                yield b"".join(events)
            elif ended:
                return
            else:
                await changed.wait()


class Kept:
    def __init__(self, store: ResponseStore, settings: ResponseSettings) -> None:
        self.store = store
        self.settings = settings
        self.server = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self.running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._computing: set[asyncio.Task[Any]] = set()
        """Those among them that are to be cancelled when the server stops."""
        self._purged = 0.0

    # Asking

    async def get(self, id: str, tenant: str) -> ResponseRow:
        """As it is now, without an end that its server has not written. Raises Missing."""
        running = self.running.get(id)
        if running is not None and running.tenant == tenant and not running.deleted:
            if running.answering.response.status not in ENDED:
                return self._row(running)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.lease_seconds):
                    await running.ended.wait()
        row = await asyncio.to_thread(self.store.get, id, tenant)
        if row is None:
            raise no_such_response(id)
        if row.ended is None and row.lease_until < time.time():
            return self._lost(row)
        return row

    async def history(self, id: str, tenant: str) -> list[Item]:
        """All items of the conversation up to this answer. Raises BadParameter."""
        where = "previous_response_id"
        most_bytes = self.settings.max_context_bytes
        rows = await asyncio.to_thread(self.store.chain, id, tenant, most=MAX_CHAIN, most_bytes=most_bytes)
        if not rows:
            if await asyncio.to_thread(self.store.get, id, tenant) is not None:
                raise BadParameter(f"The conversation of '{id[:128]}' has more than {most_bytes} bytes.", where, "invalid_value")
            raise BadParameter(f"Previous response with id '{id[:128]}' not found.", where, "previous_response_not_found")
        if rows[-1].ended is None:
            raise BadParameter(f"Previous response with id '{id[:128]}' is not complete yet.", where, "previous_response_not_complete")
        if (before := rows[0].previous) is not None:
            message = f"The conversation of '{id[:128]}' begins with '{before}', which is no longer kept, or is longer than {MAX_CHAIN} answers or {most_bytes} bytes."
            raise BadParameter(message, where, "previous_response_not_found")
        await asyncio.to_thread(self.store.keep, [row.id for row in rows], self._expires())
        return [item for row in rows for item in (*unpacked(row.input), *output_of(row))]

    async def referred(self, items: Sequence[Item], tenant: str) -> dict[str, Item]:
        """Items that references among these stand for, as far as the answers that hold them are not too large together. Raises
        BadParameter."""
        wanted = {item["id"] for item in items if item["type"] == REFERENCE}
        if not wanted:
            return {}
        if len(wanted) > MAX_REFERENCES:
            raise BadParameter(f"Invalid 'input': at most {MAX_REFERENCES} references to items.", "input", "array_above_max_length")
        found: dict[str, Item] = {}
        for row in await asyncio.to_thread(self.store.holders, wanted, tenant, most_bytes=self.settings.max_context_bytes):
            for item in (*output_of(row), *unpacked(row.input)):
                if item["id"] in wanted:
                    found.setdefault(item["id"], item)
        return found

    async def input(self, row: ResponseRow) -> list[Item]:
        """All that the model was shown for it, of the answers before it, too, as far as those are still kept."""
        before: Sequence[ResponseRow] = ()
        if row.previous is not None:
            most_bytes = self.settings.max_context_bytes
            before = await asyncio.to_thread(self.store.chain, row.previous, row.tenant, most=MAX_CHAIN, most_bytes=most_bytes)
        return [*(item for each in before for item in (*unpacked(each.input), *output_of(each))), *unpacked(row.input)]

    # Computing

    def room(self, tenant: str) -> None:
        """For one more in the background. Raises LimitExceeded."""
        busy = Counter(each.tenant for each in self.running.values() if each.answering.response.background)
        settings = self.settings
        if busy[tenant] >= settings.tenant_background or busy.total() >= settings.max_background:
            message = f"{busy[tenant]} responses of tenant `{tenant}` are computed in the background already"
            raise LimitExceeded(message, reason="background-responses", retry_after=1.0)

    def fits(self, input: list[Item]) -> bool:
        return len(packed(input)) <= self.settings.max_bytes

    def begin(self, running: Running) -> asyncio.Task[bool]:
        """It is known from now on, and the store has it soon: whether it could be written."""
        self.running[running.id] = running
        running.written = self._spawn(self._write(self._row(running)))
        return running.written

    async def _write(self, row: ResponseRow) -> bool:
        try:
            await asyncio.to_thread(self.store.add, row, (), tenant_bytes=self.settings.tenant_bytes)
        except Unavailable as error:
            log.warning("response_not_kept", response=row.id, error=error.message)
            return False
        return True

    def begun(self, running: Running) -> None:
        self._spawn(self._in_progress(running))

    async def _in_progress(self, running: Running) -> None:
        if await running.is_written():
            with suppress(Unavailable):
                await asyncio.to_thread(self.store.begun, running.id, self.server)

    async def end(self, running: Running) -> bytes:
        """It has ended, and the store knows. Returns the last event, which says whether it is kept. Goes on where its caller is cancelled."""
        return await asyncio.shield(self._spawn(self._end(running)))

    async def _end(self, running: Running) -> bytes:
        try:
            await self._finish(running)
            return running.answering.last()
        finally:
            self.forget(running)

    async def fail(self, running: Running) -> None:
        """The same for one whose reader is told by the error itself."""
        await asyncio.shield(self._spawn(self._fail(running)))

    async def _fail(self, running: Running) -> None:
        try:
            await self._finish(running)
        finally:
            self.forget(running)

    async def _finish(self, running: Running) -> None:
        if running.written is None:
            return
        written = await running.is_written()
        if running.deleted:
            running.answering.response.store = False
            if written:  # possibly after it was deleted
                await self._remove(running.id, running.tenant)
        else:
            row = self._row(running, ended=time.time())
            running.answering.response.store = await self._put(row, running.input, written=written)

    def forget(self, running: Running) -> None:
        """It is computed no longer."""
        self.running.pop(running.id, None)
        running.ended.set()
        running.changed()

    async def put(self, answering: Answering, tenant: str, input: list[Item]) -> None:
        """One that nobody knew of before it was complete."""
        running = Running(answering, tenant, input, None)
        answering.response.store = await self._put(self._row(running, ended=time.time()), input, written=False)

    async def _put(self, row: ResponseRow, input: list[Item], *, written: bool) -> bool:
        """Whether it is kept."""
        ids = [item["id"] for item in (*input, *output_of(row))]
        size, most = len(row.body) + len(row.input), self.settings.max_bytes
        if size + len(row.events or b"") > most:
            row = structs.replace(row, events=None)
        if size > most:
            log.warning("response_not_kept", response=row.id, error=f"it has more than {most} bytes")
            if written:
                await self._remove(row.id, row.tenant)
            return False
        try:
            if written:
                return await asyncio.to_thread(self.store.end, row, ids, tenant_bytes=self.settings.tenant_bytes)
            await asyncio.to_thread(self.store.add, row, ids, tenant_bytes=self.settings.tenant_bytes)
        except Unavailable as error:
            log.warning("response_not_kept", response=row.id, error=error.message)
            return False
        return True

    async def _remove(self, id: str, tenant: str) -> None:
        try:
            await asyncio.to_thread(self.store.delete, id, tenant)
        except Unavailable as error:  # its lease runs out, and it has failed
            log.warning("response_not_removed", response=id, error=error.message)

    def leave(self, running: Running) -> None:
        """It has ended, and nobody waits for it."""
        self._spawn(self._end(running))

    def compute(self, running: Running, work: Coroutine[Any, Any, None]) -> None:
        """In the background."""
        running.task = task = self._spawn(work)
        self._computing.add(task)
        task.add_done_callback(self._computing.discard)

    async def cancel(self, id: str, tenant: str) -> ResponseRow:
        """As it is once it has stopped. Raises Missing, BadParameter."""
        row = await self.get(id, tenant)
        if row.ended is not None:
            if decoded(row.body).background:
                return row
            raise BadParameter("Cannot cancel a synchronous response.", None, "invalid_value")
        running = self.running.get(id)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.lease_seconds):
                if running is not None:
                    running.stop()
                    await running.ended.wait()
                else:
                    await self._cancelled_elsewhere(id, tenant)
        return await self.get(id, tenant)

    async def _cancelled_elsewhere(self, id: str, tenant: str) -> None:
        row = await asyncio.to_thread(self.store.cancel, id, tenant)
        while row is not None and row.ended is None:
            await asyncio.sleep(POLL_SECONDS)
            row = await asyncio.to_thread(self.store.get, id, tenant)

    async def delete(self, id: str, tenant: str) -> None:
        """Raises Missing."""
        running = self.running.get(id)
        if running is not None and running.tenant != tenant:
            running = None
        if running is not None:
            running.deleted = True
            running.stop()
        if not await asyncio.to_thread(self.store.delete, id, tenant) and running is None:
            raise no_such_response(id)

    # Upkeep

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self.settings.lease_seconds / 3)

    async def look(self) -> None:
        """Once: renew leases, end what other servers left, remove what is too old."""
        now = time.time()
        ids = list(self.running)
        held = await asyncio.to_thread(self.store.beat, self.server, ids, lease_until=now + self.settings.lease_seconds)
        for id, running in list(self.running.items()):
            is_written = running.written is not None and running.written.done() and running.written.result()
            if id in ids and is_written and held.get(id, True):
                running.stop()
        await asyncio.to_thread(self.store.sweep, now, self._lost)
        if now - self._purged >= PURGE_SECONDS:
            self._purged = now
            while await asyncio.to_thread(self.store.purge, now):
                pass

    async def stop(self, seconds: float) -> None:
        """What is computed in the background has so long to end; then it has failed."""
        if self._computing:
            await asyncio.wait(self._computing, timeout=seconds)
        for task in self._computing:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_SECONDS)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Rows

    def _row(self, running: Running, *, ended: float | None = None) -> ResponseRow:
        response, logged = running.answering.response, running.answering.log
        response.store = True
        return ResponseRow(
            id=response.id,
            tenant=running.tenant,
            previous=response.previous_response_id,
            status=response.status,
            created=response.created_at,
            ended=ended,
            expires=self._expires(),
            server=self.server,
            lease_until=0.0 if ended is not None else time.time() + self.settings.lease_seconds,
            body=encode(response),
            input=packed(running.input),
            events=b"".join(logged) if ended is not None and logged is not None else None,
        )

    def _expires(self) -> float:
        return time.time() + self.settings.retention_days * DAY

    def _lost(self, row: ResponseRow) -> ResponseRow:
        return structs.replace(row, status="failed", ended=time.time(), lease_until=0.0, body=encode(failed_by_death(decoded(row.body))))


def output_of(row: ResponseRow) -> list[Item]:
    return decoded(row.body).output


def no_such_response(id: str) -> Missing:
    return Missing(f"Response with id '{id[:128]}' not found.", None)
