"""Calls to the URLs that jobs name: signed as Standard Webhooks wants it, tried by a schedule, each at least once.

due → leased → called → 2xx: delivered · 410, or the schedule is at its end: failed · else: put off to its next try
Several servers share the work by leases; of one that died, the lease runs out and another calls, with the same `webhook-id`.
"""

import asyncio
import base64
import hashlib
import hmac
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import structlog

from fairlead import __version__
from fairlead.core.errors import NotFound, Unavailable
from fairlead.core.policy import WebhookSettings
from fairlead.core.timeline import MAX_CHARS, Timeline, parse_traceparent
from fairlead.jobs.calls import Answer, Calls
from fairlead.jobs.secrets import Secrets
from fairlead.jobs.stored import trace_of
from fairlead.observe.counts import Counts
from fairlead.observe.finished import Finished
from fairlead.observe.tracing.tracing import Tracing
from fairlead.store.job_rows import DeliveryRow
from fairlead.store.jobs import JobStore

PREFIX = "whsec_"
SECRET_BYTES = 32
GONE = 410
MAX_RETRY_AFTER = 3600.0
"""Of what a receiver asks for."""
LEASE_MARGIN = 15.0
"""Of a lease beyond the longest call: for the store to be told how it ended."""
POLL_SECONDS = 1.0
MAX_WAITING = 256
"""Deliveries that are leased, and wait for others of their receiver or tenant to end."""
BUSY_SECONDS = 5.0
"""How long those beyond that are put off, more or less."""

Render = Callable[[DeliveryRow], Awaitable[bytes | None]]
"""The body, in the words of the job's face; None where the job is no longer there."""

Share = tuple[str, str]
"""("receiver", host and port) or ("tenant", name)."""

log = structlog.get_logger("fairlead.webhooks")


NOTHING_LEFT = Answer(error="the job is no longer there, and nothing was sent of it before")


def next_try(answer: Answer, *, tries: int, retries: Sequence[float], now: float, chance: float) -> float | None:
    """When to call again; None: never. `tries`: those that were made, this one too. `chance`: from 0 to 1."""
    if answer.status == GONE or tries > len(retries):
        return None
    wait = retries[tries - 1] * (0.9 + 0.2 * chance)
    return now + max(wait, min(answer.retry_after, MAX_RETRY_AFTER))


def signatures(id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> str:
    """One for each secret: a receiver needs to know any of them."""
    text = f"{id}.{timestamp}.".encode() + body
    return " ".join(f"v1,{base64.b64encode(hmac.digest(_bytes(secret), text, hashlib.sha256)).decode()}" for secret in secrets)


def new_secret() -> str:
    return PREFIX + base64.b64encode(os.urandom(SECRET_BYTES)).decode()


def _bytes(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(PREFIX))


def headers_of(row: DeliveryRow, body: bytes, secrets: Sequence[str], now: float) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "user-agent": f"Fairlead/{__version__}",
        "accept-encoding": "identity",
        "webhook-id": row.id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": signatures(row.id, int(now), body, secrets),
    }
    if row.face == "bfl" and row.secret:
        headers["x-bfl-signature"] = "sha256=" + hmac.digest(row.secret.encode(), body, hashlib.sha256).hex()
    return headers


class Deliveries:
    """Lives in the event loop; the store works in threads."""

    def __init__(
        self,
        store: JobStore,
        settings: WebhookSettings,
        secrets: Secrets,
        render: Render,
        counts: Counts,
        *,
        runner: str,
        finished: Finished | None = None,
        tracing: Tracing | None = None,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Raises ConfigError for an `allow` that is no network."""
        self.store = store
        self.settings = settings
        self.secrets = secrets
        self.render = render
        self.counts = counts
        self.runner = runner
        self.now = now
        self.chance = chance
        self.calls = Calls(settings, now)
        self.finished = Finished() if finished is None else finished
        self.tracing = tracing
        self.stopping = False
        self.num_of_receiver = max(1, settings.max_in_flight // 8)
        self.num_of_tenant = max(1, settings.max_in_flight // 2)
        self._calls: dict[asyncio.Task[None], DeliveryRow] = {}
        self._waiting: list[DeliveryRow] = []
        self._busy: Counter[Share] = Counter()
        """Calls under way, by receiver and by tenant: none may hold up the others."""
        self._look = asyncio.Event()

    def look(self) -> None:
        """There may be something to deliver."""
        self._look.set()

    async def run(self) -> None:
        """For ever. What fails is begun again by whoever called this; the calls that are under way go on meanwhile."""
        while not self.stopping:
            self._look.clear()
            if await self.take():
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._look.wait()

    async def take(self) -> bool:
        """Begin the calls that are due, as many as there is room for. Whether there may be more."""
        await self._go_on()
        room = self.settings.max_in_flight - len(self._calls)
        if room <= 0 or self.stopping:
            return False
        rows = await asyncio.to_thread(
            self.store.due,
            self.runner,
            room,
            now=self.now(),
            lease_seconds=2 * self.settings.timeout + LEASE_MARGIN,
            # Of those that cannot be called now no more than are here already.
            busy_urls={row.url for row in (*self._waiting, *self._calls.values()) if not self._room(row)},
            busy_tenants={name for (kind, name), number in self._busy.items() if kind == "tenant" and number >= self.num_of_tenant},
        )
        for row in rows:
            if self._room(row):
                self._begin(row)
            elif len(self._waiting) < MAX_WAITING:
                self._waiting.append(row)
            else:
                await self._put_back(row, BUSY_SECONDS * (0.5 + self.chance()))
        return len(rows) == room

    async def _go_on(self) -> None:
        """With those that waited for others of their receiver or tenant."""
        waiting, self._waiting = self._waiting, []
        for row in waiting:
            if self.stopping or row.lease_until < self.now() + self.settings.timeout + LEASE_MARGIN / 2:
                await self._put_back(row, 0.0)
            elif len(self._calls) < self.settings.max_in_flight and self._room(row):
                self._begin(row)
            else:
                self._waiting.append(row)

    def _room(self, row: DeliveryRow) -> bool:
        receiver, tenant = _shares(row)
        return not self.stopping and self._busy[receiver] < self.num_of_receiver and self._busy[tenant] < self.num_of_tenant

    def _begin(self, row: DeliveryRow) -> None:
        self._busy.update(_shares(row))
        call = asyncio.create_task(self._deliver(row), name=row.id)
        self._calls[call] = row
        call.add_done_callback(self._over)

    def _over(self, call: asyncio.Task[None]) -> None:
        for key in _shares(self._calls.pop(call)):
            self._busy[key] -= 1
            if not self._busy[key]:
                del self._busy[key]
        self._look.set()

    async def _put_back(self, row: DeliveryRow, seconds: float) -> None:
        """Nobody was called."""
        later = self.now() + seconds
        await asyncio.to_thread(self.store.put_off, row.id, self.runner, next_at=later, status=None, error="", body=None, counted=False)

    async def idle(self) -> None:
        """Until no call is under way."""
        while self._calls:
            await asyncio.wait(self._calls)

    async def stop(self, seconds: float) -> None:
        """Begin no more; what has not ended after so long is cut off, and called again when its lease has run out."""
        self.stopping = True
        self._look.set()
        with suppress(Unavailable):
            await self._go_on()
        if self._calls:
            await asyncio.wait(self._calls, timeout=seconds)
        for task in list(self._calls):
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self.calls.close()

    async def _deliver(self, row: DeliveryRow) -> None:
        try:
            try:
                body = await self._body(row)
                answer = NOTHING_LEFT if body is None else await self._call(row, body)
            except Unavailable:
                raise
            except Exception:
                log.exception("webhook_failed", delivery=row.id, job=row.job)
                body, answer = None, Answer(error="internal error")
            await self._write(row, body, answer)
        except Unavailable as error:
            log.error("webhook_not_written", delivery=row.id, job=row.job, error=error.message)

    async def _body(self, row: DeliveryRow) -> bytes | None:
        """As the job is now, with links that are good now; of a job that was purged, as it was."""
        body = await self.render(row)
        return body if body is not None or row.body is None else row.body.encode()

    async def _call(self, row: DeliveryRow, body: bytes) -> Answer:
        secrets = [secret.value for secret in await self.secrets.rows(row.tenant)]
        headers = headers_of(row, body, secrets, self.now())
        if self.tracing is None:
            return await self.calls.post(row.url, body, headers)
        call = Timeline(row.id, "webhook", time.perf_counter(), path=row.url, job=row.job)
        call.traceparent = await self._trace(row)
        headers["traceparent"] = self.tracing.context(call)
        answer = await self.calls.post(row.url, body, headers)
        call.end(time.perf_counter(), answer.status, answer.error, "success" if answer.taken else "failure", "")
        self.tracing([call])
        return answer

    async def _trace(self, row: DeliveryRow) -> str:
        """The traceparent that the job was submitted with; "" where that is not to be had."""
        try:
            trace = trace_of(await asyncio.to_thread(self.store.data, row.job))
        except (NotFound, Unavailable):
            return ""
        return trace if parse_traceparent(trace) is not None else ""

    async def _write(self, row: DeliveryRow, body: bytes | None, answer: Answer) -> None:
        """Raises Unavailable."""
        store, now = self.store, self.now()
        kept = body.decode() if body is not None else row.body
        status = answer.status or None
        next_at = next_try(answer, tries=row.tries, retries=self.settings.retries, now=now, chance=self.chance())
        if answer.taken:
            outcome = "delivered"
            ours = await asyncio.to_thread(store.delivered, row.id, self.runner, status=answer.status, body=kept or "", now=now)
        elif next_at is None or answer is NOTHING_LEFT:
            outcome = "failed"
            log.warning("webhook_given_up", delivery=row.id, job=row.job, tenant=row.tenant, status=status, error=answer.error)
            ours = await asyncio.to_thread(store.gave_up, row.id, self.runner, status=status, error=answer.error, body=kept, now=now)
        else:
            outcome = "retried"
            ours = await asyncio.to_thread(
                store.put_off, row.id, self.runner, next_at=next_at, status=status, error=answer.error, body=kept
            )
        if ours:
            self.counts.add("fairlead_webhook_deliveries_total", outcome)
            details = {"status": answer.status, "attempt": row.tries, "error": answer.error[:MAX_CHARS]}
            self.finished.afterwards(row.job, time.perf_counter(), "webhook", details)


def _shares(row: DeliveryRow) -> tuple[Share, Share]:
    """What a call takes a share of."""
    return ("receiver", urlsplit(row.url).netloc), ("tenant", row.tenant)
