"""Answers stored requests: takes jobs from the store, asks the gateway under their callers' names, and writes down how they ended.

At least once: a runner that dies leaves its jobs' leases to run out, and others begin them again. Once only, in effect: the end
of a job, its usage record and its webhooks are one transaction, which only the runner that holds the lease can make.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol

import structlog
from msgspec import structs

from fairlead.core.caller import Caller
from fairlead.core.errors import Cancelled, FairleadError, ModelError, ShuttingDown, Unavailable
from fairlead.core.generation import Picture, Progress
from fairlead.core.jobs import ENDED, Artifact, JobReason, JobResult, JobStatus
from fairlead.core.policy import JobSettings
from fairlead.core.request import Inference, Request
from fairlead.core.timeline import Timeline, parse_traceparent
from fairlead.jobs.changes import Changes
from fairlead.jobs.retry import Again, Failed, backoff, decide
from fairlead.jobs.stored import Collected, unpack
from fairlead.observe.counts import Counts
from fairlead.observe.finished import Finished
from fairlead.store.job_rows import JobRow
from fairlead.store.jobs import JobStore
from fairlead.store.rows import UsageRow

log = structlog.get_logger("fairlead.jobs")

BEAT_SECONDS = 0.5
"""How often the store is told of progress, at most."""
LOOK_SECONDS = 1.0
"""How often it is asked whether another process has cancelled a job, where no notice comes."""
SWEEP_SECONDS = 1.0
PURGE_SECONDS = 30.0
PURGE_JOBS = 500
"""In one transaction."""
MAX_PREVIEW_BYTES = 64 << 10
END_TRIES = 5
"""Of writing down an end, while the store does not answer; then the lease runs out and the job is begun again."""
GIVE_BACK_SECONDS = 5.0


class Files(Protocol):
    """What of the artifact store is needed here."""

    async def put(self, job: str, data: bytes, content_type: str) -> Artifact:
        """Raises Unreachable."""

    async def remove(self, key: str) -> None:
        """One file. Raises Unreachable."""

    async def delete(self, job: str) -> None:
        """All files of a job. Raises Unreachable."""


Callers = Callable[[JobRow], Caller]
"""Who a job's caller is by now. Raises Unauthenticated where its key was revoked or its tenant disabled."""
Inspect = Callable[[Request, Picture], Awaitable[None]]
"""The gateway's look at a finished picture. Raises Filtered."""


class Runner:
    """Lives in the event loop."""

    def __init__(
        self,
        id: str,
        *,
        store: JobStore,
        files: Files,
        inference: Inference,
        inspect: Inspect,
        callers: Callers,
        models: Callable[[], Sequence[str]],
        late: Callable[[UsageRow], None],
        books: bool,
        settings: JobSettings,
        changes: Changes,
        log_seconds: float,
        finished: Finished,
        counts: Counts,
        poll_seconds: float,
    ) -> None:
        """`models`: those that can be asked now. `late`: takes a usage record that came after its job's end. `books`: whether usage
        records are kept. `log_seconds`: how long deliveries are remembered. `poll_seconds`: how often the store is looked through for
        work that no notice came of."""
        self.id = id
        self.store = store
        self.files = files
        self.inference = inference
        self.inspect = inspect
        self.callers = callers
        self.models = models
        self.late = late
        self.books = books
        self.settings = settings
        self.changes = changes
        self.log_seconds = log_seconds
        self.finished = finished
        self.counts = counts
        self.poll_seconds = poll_seconds
        self.running: dict[str, Run] = {}
        self.stopping = False
        self._leasing = asyncio.Lock()
        self._free = asyncio.Event()
        self._look = asyncio.Event()
        changes.abort = self.abort

    async def run(self) -> None:
        """For ever. What fails is begun again by whoever called this; the jobs that run go on meanwhile."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lease())
            group.create_task(self._beat())
            group.create_task(self._sweep())
            group.create_task(self._purge())

    async def stop(self, seconds: float) -> None:
        """Take no more; what has not ended after so long goes back into the queue at once."""
        self.stopping = True
        with suppress(TimeoutError):
            # What is being leased just now is ours, too.
            async with asyncio.timeout(seconds), self._leasing:
                pass
        await self._ended(seconds)
        for run in list(self.running.values()):
            run.interrupt(ShuttingDown("the server is stopping"))
        await self._ended(GIVE_BACK_SECONDS)

    async def _ended(self, seconds: float) -> None:
        if tasks := [run.task for run in self.running.values()]:
            await asyncio.wait(tasks, timeout=seconds)

    # Taking work

    async def _lease(self) -> None:
        settings = self.settings
        while not self.stopping:
            self.changes.submitted.clear()
            room = settings.max_active - len(self.running)
            models = self.models()
            if room > 0 and models and await self._take(models, room) == room:
                continue
            self._free.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.poll_seconds):
                    if room > 0:
                        await self.changes.submitted.wait()
                    else:
                        await self._free.wait()

    async def _take(self, models: Sequence[str], room: int) -> int:
        """Lease so many at most, and begin them. How many there were."""
        settings = self.settings
        async with self._leasing:
            if self.stopping:
                return 0
            try:
                leased = await asyncio.to_thread(
                    self.store.lease,
                    self.id,
                    models,
                    room,
                    now=time.time(),
                    lease_seconds=settings.lease_seconds,
                    tenant_active=settings.tenant_active,
                )
            except Unavailable as error:
                log.error("jobs_not_leased", error=error.message)
                return 0
            for row, data in leased:
                self._begin(row, data)
        return len(leased)

    def _begin(self, row: JobRow, data: bytes) -> None:
        run = Run(row)
        if (earlier := self.running.get(row.id)) is not None:
            # It was lost, and is leased again before that was noticed here.
            self._heed(earlier, None)
        self.running[row.id] = run
        self.changes.tell(row.id)
        run.task = asyncio.create_task(self._work(run, data), name=row.id)

    async def _work(self, run: "Run", data: bytes) -> None:
        row = run.row
        try:
            try:
                await self._answer(run, data)
            except FairleadError as error:
                run.error = error
                await self._failed(run, error)
            except asyncio.CancelledError:
                run.error = run.why or ShuttingDown("the server is stopping")
                if run.why is None:
                    raise
                asyncio.current_task().uncancel()  # type: ignore[union-attr]
                await self._failed(run, run.why)
            except Exception:
                log.exception("job_failed", job=row.id, model=row.model)
                run.error = ModelError("internal error")
                await self._failed(run, run.error)
        finally:
            run.settling = True
            self.finished.add(run.ended())
            if self.running.get(row.id) is run:  # and not the same job, lost and leased again meanwhile
                del self.running[row.id]
                self.changes.progress.pop(row.id, None)
            self._free.set()
            self.changes.submitted.set()  # its tenant may have room for another one
            self.changes.tell(row.id)

    async def _answer(self, run: "Run", data: bytes) -> None:
        row = run.row
        run.begun = True
        if run.why is not None:
            raise run.why
        request = unpack(data)
        request.caller = self.callers(row)
        request.log_id = row.id
        request.arrived = time.perf_counter()
        request.timeline = run.timeline
        if parse_traceparent(request.trace) is not None:
            run.timeline.traceparent = request.trace
        request.booked = run.book(self.late)
        collected = run.collected
        async with aclosing(self.inference.infer(request)) as responses:
            async for response in responses:
                collected.take(response)
                run.timeline.version = response.version
                run.timeline.rows = request.num_rows if request.inputs else 0
                delta = response.delta
                if delta is None:
                    continue
                if delta.progress is not None:
                    self._progress(run, delta.index, delta.progress)
                if delta.picture is not None:
                    await self.inspect(request, delta.picture)
                    await self._keep(run, delta.index, delta.picture)
        await self._end(run, JobStatus.COMPLETE, result=collected.result())

    def _progress(self, run: "Run", index: int, progress: Progress) -> None:
        """Of several pictures, all together."""
        run.steps[index] = progress
        preview = progress.preview if len(progress.preview) <= MAX_PREVIEW_BYTES else b""
        run.preview = preview or run.preview
        total = Progress(
            step=sum(each.step for each in run.steps.values()),
            num_steps=sum(each.num_steps for each in run.steps.values()),
            preview=run.preview,
        )
        run.told = False
        self.changes.progress[run.row.id] = total
        self.changes.tell(run.row.id)

    async def _keep(self, run: "Run", index: int, picture: Picture) -> None:
        """Raises Unreachable."""
        artifact = await self.files.put(run.row.id, picture.data, picture.content_type)
        run.collected.artifacts[index] = structs.replace(
            artifact, width=picture.width, height=picture.height, seed=picture.seed, mode=picture.mode
        )

    # How it ends

    async def _failed(self, run: "Run", error: FairleadError) -> None:
        row = run.row
        run.settling = True
        if run.lost:
            self._lost(run, "its lease ran out, and another runner may have it")
            await self._remove_own(run)
            return
        if run.aborted:
            await self._end(run, JobStatus.ABORTED, "cancelled", "the job was cancelled")
            return
        served = row.model in self.models()
        chosen = decide(error, tries=row.tries, max_tries=row.max_tries, served=served, chance=random.random())
        match chosen:
            case Failed(reason):
                await self._end(run, JobStatus.FAILED, reason, error.message)
            case Again(seconds, counted):
                log.info("job_again", job=row.id, model=row.model, seconds=round(seconds, 1), tries=row.tries, error=error.message)
                self.counts.add("fairlead_job_retries_total", row.model)
                await self._told(
                    run,
                    lambda: self.store.again(
                        row.id, self.id, not_before=time.time() + seconds, counted=counted, message=error.message, now=time.time()
                    ),
                )
                await self._remove_own(run)

    async def _end(self, run: "Run", status: JobStatus, reason: JobReason = "", message: str = "", result: JobResult | None = None) -> None:
        row = run.row
        run.settling = True
        run.bill = lambda each: billed(each, status, reason)
        usage = [run.bill(each) for each in run.usage]
        ended = await self._told(
            run,
            lambda: self.store.end(
                row.id,
                self.id,
                status=status,
                reason=reason,
                message=message,
                result=result,
                cost=sum(each.cost for each in usage),
                usage=usage if self.books else (),
                now=time.time(),
            ),
        )
        if ended is None:
            self._lost(run, "it ended here after its lease had run out")
            if not run.unsure:
                await self._remove_own(run)
            return
        run.written = True
        run.timeline.note(time.perf_counter(), "stored", {"bytes": sum(each.num_bytes for each in run.collected.artifacts.values())})
        if ended.webhook:
            self.changes.deliver()
        for each in run.usage[len(usage) :]:
            self.late(run.bill(each))
        seconds = (ended.ended or 0.0) - row.created
        self.counts.add("fairlead_jobs_total", row.model, str(ended.status), ended.reason)
        log.info(
            "job", job=row.id, model=row.model, tenant=row.tenant, status=str(ended.status), reason=ended.reason, seconds=round(seconds, 3)
        )
        if status is not JobStatus.COMPLETE and (run.collected.artifacts or row.tries > 1):
            # Nobody begins it again: those of a try that died with its runner go, too.
            await self._remove_all(row.id)

    def _lost(self, run: "Run", why: str) -> None:
        self.counts.add("fairlead_jobs_lost_total")
        log.warning("job_lost", job=run.row.id, note=why)

    async def _told(self, run: "Run", write: Callable[[], JobRow | None]) -> JobRow | None:
        """What the store says to it. Raises nothing: a job whose end cannot be written is begun again when its lease has run out."""
        for attempt in range(END_TRIES):
            try:
                return await asyncio.to_thread(write)
            except Unavailable as error:
                run.unsure = True
                log.error("job_not_written", job=run.row.id, error=error.message)
                await asyncio.sleep(backoff(attempt))
        return None

    async def _remove_own(self, run: "Run") -> None:
        """Files of a try that came to nothing, and no others: another runner may be putting its own there."""
        for artifact in run.collected.artifacts.values():
            try:
                await self.files.remove(artifact.key)
            except Unavailable as error:
                log.warning("artifacts_not_removed", job=run.row.id, error=error.message, note="they are when the job is purged")
                return

    async def _remove_all(self, job: str) -> bool:
        """Whether nothing is left of a job that has ended."""
        try:
            await self.files.delete(job)
        except Unavailable as error:
            log.warning("artifacts_not_removed", job=job, error=error.message)
            return False
        return True

    # What goes on beside

    async def _beat(self) -> None:
        """Keep the leases, tell of progress, and hear of cancellations by others."""
        next_lease = 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._look.wait()
                    next_lease = 0.0
            self._look.clear()
            runs = {id: run for id, run in self.running.items() if not run.settling}
            news = {id: run for id, run in runs.items() if not run.told}
            now = time.monotonic()
            if not runs or (not news and now < next_lease):
                continue
            next_lease = now + min(self.settings.lease_seconds / 3, LOOK_SECONDS)
            progress = {}
            for id, run in news.items():
                run.told = True
                if (at := self.changes.progress.get(id)) is not None:
                    progress[id] = (at.step, at.num_steps, at.preview or None)
            try:
                statuses = await asyncio.to_thread(
                    self.store.beat, self.id, progress, list(runs), now=time.time(), lease_seconds=self.settings.lease_seconds
                )
            except Unavailable as error:
                log.error("jobs_not_renewed", error=error.message)
                continue
            for id, run in runs.items():
                self._heed(run, statuses.get(id))

    def _heed(self, run: "Run", status: JobStatus | None) -> None:
        if run.settling:
            return
        if status is None:
            run.lost = True
            run.interrupt(Cancelled("its lease ran out"))
        elif status is JobStatus.ABORTING:
            self.abort(run.row.id)

    def heard(self, job: str) -> None:
        """Another process says that a job has changed."""
        if not job:
            self.changes.tell_all()
            self._look.set()
        self.changes.tell(job)
        if job in self.running:
            self._look.set()
        else:
            self.changes.submitted.set()

    def abort(self, job: str) -> None:
        """Somebody cancelled it: if it runs here, it stops before its next step."""
        run = self.running.get(job)
        if run is not None and not run.settling:
            run.aborted = True
            run.interrupt(Cancelled("the job was cancelled"))

    async def _sweep(self) -> None:
        """What no runner looks after any longer: each runner does it for all."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS * (0.5 + random.random()))
            try:
                swept = await asyncio.to_thread(self.store.sweep, time.time(), backoff)
            except Unavailable as error:
                log.error("jobs_not_swept", error=error.message)
                continue
            for row in swept:
                log.info("job_swept", job=row.id, status=str(row.status), reason=row.reason)
                if row.status in ENDED:
                    self.counts.add("fairlead_jobs_total", row.model, str(row.status), row.reason)
                    self.changes.deliver()
                if (run := self.running.get(row.id)) is not None:
                    self._heed(run, None)
                self.changes.tell(row.id)
            self.changes.submitted.set()  # the time of some that waited may have come

    async def _purge(self) -> None:
        while True:
            await asyncio.sleep(PURGE_SECONDS * (0.5 + random.random()))
            try:
                await self.purge(time.time())
            except Unavailable as error:
                log.error("jobs_not_purged", error=error.message)

    async def purge(self, now: float) -> None:
        """Remove the jobs whose time is over. The files first: of a job that is gone nobody would know them. Raises Unavailable."""
        expired = await asyncio.to_thread(self.store.expired, now, PURGE_JOBS)
        gone = [job for job in expired if await self._remove_all(job)]
        await asyncio.to_thread(self.store.purge, now, PURGE_JOBS, among=gone, log_seconds=self.log_seconds)


class Run:
    """One job on its way here."""

    task: "asyncio.Task[None]"
    why: FairleadError | None = None
    """Why its task was cancelled."""
    begun = False
    aborted = False
    lost = False
    settling = False
    """What becomes of it is being written: nothing stops it any more."""
    unsure = False
    """The store has not always answered to that: it may be written all the same."""
    written = False
    """Its end is."""
    error: FairleadError | None = None
    """What became of this try."""
    told = True
    """The store knows of its progress."""
    preview = b""

    def __init__(self, row: JobRow) -> None:
        self.row = row
        self.timeline = timeline = Timeline(row.request_id or row.id, "job", time.perf_counter())
        timeline.job, timeline.model, timeline.version, timeline.kind = row.id, row.model, row.version, row.kind
        timeline.note(timeline.arrived, "lease", {"attempt": row.tries})
        self.collected = Collected()
        self.steps: dict[int, Progress] = {}
        self.usage: list[UsageRow] = []
        self.bill: Callable[[UsageRow], UsageRow] = lambda row: row

    def interrupt(self, why: FairleadError) -> None:
        """Once: the second time it is on its way out already."""
        if self.why is None and not self.settling:
            self.why = why
            if self.begun:  # a task that is cancelled before its first step never takes it
                self.task.cancel()

    def ended(self) -> Timeline:
        error = self.error
        outcome, status = end_of(error)
        message, reason = ("", "") if error is None else (error.message, "model-error" if outcome == "failure" else outcome)
        self.timeline.end(time.perf_counter(), status, message, outcome, reason)
        return self.timeline

    def book(self, late: Callable[[UsageRow], None]) -> Callable[[Any], None]:
        """Takes the usage records of its try, which are written with its end. One that comes later is of what others computed it for."""

        def take(row: UsageRow) -> None:
            if self.written:
                late(self.bill(row))
            else:
                self.usage.append(row)

        return take


def end_of(error: FairleadError | None) -> tuple[str, int]:
    """(outcome, in HTTP's numbers) of a try, where the gateway has not said."""
    match error:
        case None:
            return "success", 200
        case Cancelled():
            return "cancelled", 499
        case Unavailable():
            return "refused", 503
        case ModelError():
            return "failure", 500
        case _:
            return "refused", 400


def billed(row: UsageRow, status: JobStatus, reason: JobReason) -> UsageRow:
    """A job that failed gave nothing, and costs nothing; one that was cancelled costs what was computed for it."""
    if status is not JobStatus.FAILED:
        return row
    if reason == "moderated-output":
        # The model did what it was asked for, and the gateway has seen its caller leave.
        row = structs.replace(row, outcome="refused", status=400, reason="filtered")
    return structs.replace(row, cost=0.0)
