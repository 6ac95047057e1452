"""Answers batches: line by line at this server's own doors, under their caller's name, in a class that gives way to live traffic.

The server that holds a batch's lease runs it. Results are written as they come, so that whoever goes on after a crash asks only for lines that were
not answered: those that were under way then are asked again.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing, suppress
from secrets import token_hex
from typing import Any

import msgspec
import structlog
from msgspec import Struct, structs
from starlette.requests import Request as HttpRequest

from fairlead.api.doorkeeper import CALLER
from fairlead.api.openai.batch_objects import MAX_ID_CHARS, BatchError, BatchErrors, BatchUsage, checked_line, decoded, encode, new_id
from fairlead.api.web import Serve
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError, InvalidRequest, Unavailable
from fairlead.core.policy import BatchSettings
from fairlead.observe.counts import Counts
from fairlead.store.batches import BatchRow, BatchStore, FileRow, Result

LOOK_SECONDS = 1.0
FLUSH_SECONDS = 1.0
FLUSH_RESULTS = 64
PURGE_SECONDS = 60.0
AGAIN = frozenset((429, 503))
"""Not now: such a line is asked again."""
MAX_PAUSE = 30.0
MAX_ERRORS = 50
"""That are told of one file."""
STOP_SECONDS = 5.0
DAY = 86_400.0
UNSIGNED = (
    "requests for model '{}' must be signed (RFC 9421): sign the upload of the file and the request for the batch, see docs/signing.md"
)
BATCHES = "fairlead_api_batches_total"
LINES = "fairlead_api_batch_lines_total"

log = structlog.get_logger(__name__)


class _Details(Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(Struct):
    """Of any of the answers: chats and the Responses API have other names."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None

    def add_to(self, usage: BatchUsage) -> None:
        details = self.prompt_tokens_details, self.completion_tokens_details, self.input_tokens_details, self.output_tokens_details
        told = [each for each in details if each is not None]
        usage.add(
            self.input_tokens + self.prompt_tokens,
            self.output_tokens + self.completion_tokens,
            sum(each.cached_tokens for each in told),
            sum(each.reasoning_tokens for each in told),
        )


class _Answer(Struct):
    usage: _Usage | None = None


class _Run:
    """A batch that this server runs."""

    def __init__(self, row: BatchRow) -> None:
        self.row = row
        self.batch = decoded(row.body)
        self.cancelling = row.cancelling
        self.lost = False
        """To another server."""
        self.trouble: FairleadError | None = None
        """Why none of its lines can be asked."""
        self.results: list[Result] = []
        """That are not written yet."""
        self.flushed = time.monotonic()

    def over(self, now: float) -> bool:
        return self.cancelling or self.lost or self.trouble is not None or now >= self.batch.expires_at

    def take(self, result: Result, usage: _Usage | None) -> None:
        self.results.append(result)
        counts = self.batch.request_counts
        if result.good:
            counts.completed += 1
        else:
            counts.failed += 1
        if usage is not None:
            usage.add_to(self.batch.usage)


class BatchRunner:
    def __init__(
        self,
        store: BatchStore,
        settings: BatchSettings,
        doors: Mapping[str, Serve],
        callers: Callable[[BatchRow], Caller],
        classes: Callable[[], Collection[str]],
        signed_only: Callable[[str], bool],
        counts: Counts,
    ) -> None:
        """`doors`: by path. `callers`: who a batch's caller is by now; raises Unauthenticated. `classes`: those that there are.
        `signed_only`: whether the model of that name takes signed requests alone."""
        self.store = store
        self.settings = settings
        self.doors = doors
        self.callers = callers
        self.classes = classes
        self.signed_only = signed_only
        self.counts = counts
        self.server = f"{socket.gethostname()}-{os.getpid()}-{token_hex(4)}"
        self.stopping = False
        self._runs: dict[str, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._look = asyncio.Event()
        self._purged = self._beaten = 0.0

    def look(self) -> None:
        """There is a new batch."""
        self._look.set()

    async def run(self) -> None:
        while not self.stopping:
            await self.once()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._look.wait()
            self._look.clear()

    async def once(self) -> None:
        """Renew leases, take what nobody runs, remove what is too old."""
        now, settings = time.time(), self.settings
        lease_until = now + settings.lease_seconds
        if now - self._beaten >= settings.lease_seconds / 3 or any(not run.cancelling for run in self._runs.values()):
            self._beaten = now
            held = await asyncio.to_thread(self.store.beat, self.server, list(self._runs), lease_until=lease_until)
            for id, run in self._runs.items():
                run.lost = run.lost or id not in held
                run.cancelling = run.cancelling or held.get(id, False)
        room = settings.max_active - len(self._runs)
        for row in await asyncio.to_thread(self.store.lease, self.server, room, now=now, lease_until=lease_until):
            run = self._runs[row.id] = _Run(row)
            task = asyncio.create_task(self._run(run))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if now - self._purged >= PURGE_SECONDS:
            self._purged = now
            while await asyncio.to_thread(self.store.purge, now):
                pass

    async def stop(self, seconds: float) -> None:
        """What is answered is written; others go on with the rest."""
        self.stopping = True
        self.look()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=min(seconds, STOP_SECONDS))
        try:
            await asyncio.to_thread(self.store.release, self.server)
        except Unavailable as error:
            log.warning("batches_not_released", error=error.message)

    # One batch

    async def _run(self, run: _Run) -> None:
        try:
            if run.batch.status == "validating" and not await self._validate(run):
                return
            await self._answer(run)
            if not run.lost:
                await self._end(run)
        except asyncio.CancelledError:
            await self._flush(run)
        except Unavailable as error:
            log.warning("batch_interrupted", batch=run.row.id, error=error.message)  # its lease runs out, and it is begun again
        except Exception:
            log.exception("batch_failed", batch=run.row.id)
            run.trouble = InvalidRequest("internal error")
            await self._end(run)
        finally:
            del self._runs[run.row.id]

    async def _validate(self, run: _Run) -> bool:
        """Whether its file can be asked; else it has failed."""
        batch = run.batch
        batch.request_counts.total = 0  # whoever began to read it may have stopped
        errors: list[BatchError] = []
        names: set[str] = set()
        async with aclosing(self._lines(batch.input_file_id)) as lines:
            async for number, line in lines:
                try:
                    asked = checked_line(line, batch.endpoint)
                    if asked.custom_id in names:
                        raise InvalidRequest(f"`custom_id` {asked.custom_id[:64]!r} is not the only one of that name")
                    names.add(asked.custom_id)
                    model = asked.body.get("model")
                    if isinstance(model, str):
                        batch.model = batch.model or model[:MAX_ID_CHARS]
                        if not run.row.signed_by and self.signed_only(model):
                            errors.append(BatchError("signature_required", UNSIGNED.format(model[:MAX_ID_CHARS]), number + 1, "model"))
                except InvalidRequest as error:
                    errors.append(BatchError("invalid_request", error.message, number + 1))
                batch.request_counts.total += 1
                if batch.request_counts.total > self.settings.max_lines:
                    errors.append(BatchError("too_many_lines", f"a batch has at most {self.settings.max_lines} lines", number + 1))
                if len(errors) >= MAX_ERRORS or batch.request_counts.total > self.settings.max_lines:
                    break
        if not batch.request_counts.total:
            errors.append(BatchError("empty_file", "the input file has no lines, or was deleted"))
        if errors:
            batch.errors = BatchErrors(errors)
            await self._end(run)
            return False
        batch.status, batch.in_progress_at = "in_progress", int(time.time())
        await self._flush(run)
        return True

    async def _lines(self, file: str) -> AsyncGenerator[tuple[int, bytes], None]:
        """(number, line) of those that are not blank."""
        rest, part_number, number = b"", 0, 0
        while (part := await asyncio.to_thread(self.store.part, file, part_number)) is not None:
            part_number += 1
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                if line.strip():
                    yield number, line
                number += 1
        if rest.strip():
            yield number, rest

    async def _answer(self, run: _Run) -> None:
        """All lines that have no answer yet, as long as it is to go on."""
        done = await asyncio.to_thread(self.store.done, run.row.id)
        counts = run.batch.request_counts
        counts.completed, counts.failed = sum(done.values()), len(done) - sum(done.values())
        pending: set[asyncio.Task[None]] = set()
        num_lines = 0
        try:
            async with aclosing(self._lines(run.batch.input_file_id)) as lines:
                async for number, line in lines:
                    num_lines += 1
                    if number in done:
                        continue
                    while len(pending) >= self.settings.max_lines_active and not run.over(time.time()):
                        pending = await self._wait(run, pending)
                    if run.over(time.time()):
                        break
                    pending.add(asyncio.create_task(self._ask(run, number, line)))
            while pending and not run.over(time.time()):
                pending = await self._wait(run, pending)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if not run.over(time.time()) and num_lines < counts.total:
            run.trouble = InvalidRequest("the input file was deleted before all of its lines were answered")
        await self._flush(run)

    async def _wait(self, run: _Run, pending: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """For one of them, or a moment."""
        finished, rest = await asyncio.wait(pending, timeout=FLUSH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for task in finished:
            task.result()
        if len(run.results) >= FLUSH_RESULTS or (run.results and time.monotonic() - run.flushed >= FLUSH_SECONDS):
            await self._flush(run)
        return rest

    async def _flush(self, run: _Run) -> None:
        """What was answered is written."""
        results, run.results = run.results, []
        run.flushed = time.monotonic()
        if not run.lost and not await asyncio.to_thread(self.store.put, run.row.id, self.server, encode(run.batch), results):
            run.lost = True

    async def _ask(self, run: _Run, number: int, line: bytes) -> None:
        asked = checked_line(line, run.batch.endpoint)
        body = msgspec.json.encode(asked.body)
        while True:
            try:
                caller = self._caller(run.row)
            except FairleadError as error:
                run.trouble = error
                return
            id = f"batch_req_{token_hex(16)}"
            status, answer, pause = await self._call(run.batch.endpoint, caller, run.row.signed_by, id, body)
            if pause is None:
                break
            self.counts.add(LINES, "postponed")
            await asyncio.sleep(pause)
        told = {"id": id, "custom_id": asked.custom_id, "response": _response(status, id, answer), "error": None}
        good = status == 200
        self.counts.add(LINES, "answered" if good else "refused")
        run.take(Result(number, good, msgspec.json.encode(told)), _usage(answer) if good else None)

    def _caller(self, row: BatchRow) -> Caller:
        caller, wanted = self.callers(row), self.settings.qos_class
        return structs.replace(caller, qos_class=wanted) if wanted in self.classes() else caller

    async def _call(self, path: str, caller: Caller, signed_by: str, id: str, body: bytes) -> tuple[int, bytes, float | None]:
        """(status, body, seconds after which to ask again or None) of a request as it comes by HTTP."""
        waiting = asyncio.Event()
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop()
            await waiting.wait()  # its client never leaves
            return {"type": "http.disconnect"}

        named = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": id}
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "fairlead.route": path,
            CALLER: (caller, signed_by),
        }
        answer = await self.doors[path](HttpRequest(scope, receive))
        if answer.status_code not in AGAIN or answer.headers.get("x-should-retry") == "false":  # it needs more than it ever may
            return answer.status_code, bytes(answer.body), None
        after = answer.headers.get("retry-after", "1")
        return answer.status_code, bytes(answer.body), min(float(after) if after.isdigit() else 1.0, MAX_PAUSE)

    async def _end(self, run: _Run) -> None:
        """As it is now: its results become files."""
        batch, now = run.batch, time.time()
        batch.finalizing_at = int(now)
        if run.trouble is not None:
            batch.errors = BatchErrors([BatchError("batch_failed", run.trouble.message)])
        if batch.errors is not None:
            batch.status, batch.failed_at = "failed", int(now)
        elif run.cancelling:
            batch.status, batch.cancelling_at, batch.cancelled_at = "cancelled", batch.cancelling_at or int(now), int(now)
        elif now >= batch.expires_at and batch.request_counts.missing:
            batch.status, batch.expired_at = "expired", int(now)
            await self._expire(run)
        else:
            batch.status, batch.completed_at = "completed", int(now)
        expires = now + self.settings.retention_days * DAY

        def outputs(good: bool, size: int) -> FileRow | None:
            if not size:
                return None
            name = f"{run.row.id}_{'output' if good else 'errors'}.jsonl"
            seconds = run.row.output_seconds
            row = FileRow(
                id=new_id("file"),
                tenant=run.row.tenant,
                name=name,
                purpose="batch_output",
                size=size,
                created=now,
                expires=expires if seconds is None else min(now + seconds, expires),
            )
            if good:
                batch.output_file_id = row.id
            else:
                batch.error_file_id = row.id
            return row

        ended = await asyncio.to_thread(
            self.store.end,
            run.row.id,
            self.server,
            now=now,
            expires=expires,
            outputs=outputs,
            body=lambda: encode(batch),
            tenant_ended=self.settings.tenant_ended,
        )
        if ended:
            self.counts.add(BATCHES, batch.status)

    async def _expire(self, run: _Run) -> None:
        """Lines without an answer are told as errors."""
        done = await asyncio.to_thread(self.store.done, run.row.id)
        async with aclosing(self._lines(run.batch.input_file_id)) as lines:
            async for number, line in lines:
                if number in done:
                    continue
                message = "This request could not be executed before the completion window expired."
                error = {"code": "batch_expired", "message": message}
                told = {"id": f"batch_req_{token_hex(16)}", "custom_id": checked_line(line, run.batch.endpoint).custom_id, "response": None}
                run.take(Result(number, False, msgspec.json.encode({**told, "error": error})), None)
                if len(run.results) >= FLUSH_RESULTS:
                    await self._flush(run)
        await self._flush(run)


def _response(status: int, id: str, answer: bytes) -> dict[str, Any]:
    return {"status_code": status, "request_id": id, "body": msgspec.Raw(answer)}


def _usage(answer: bytes) -> _Usage | None:
    try:
        return msgspec.json.decode(answer, type=_Answer).usage
    except (msgspec.DecodeError, RecursionError):
        return None
