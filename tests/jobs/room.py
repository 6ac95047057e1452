"""A room of jobs: several sites (what each server process has of it) on one store, before one real gateway whose models the test plays."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from fairlead.core.caller import Caller
from fairlead.core.errors import Unreachable
from fairlead.core.generation import Delta, Paint, Picture, Progress, Usage
from fairlead.core.jobs import ENDED, Artifact, JobStatus
from fairlead.core.policy import ArtifactSettings, GatewaySettings, JobSettings
from fairlead.core.request import Request
from fairlead.core.timeline import Timeline
from fairlead.jobs import retry, runner
from fairlead.jobs.artifacts import Artifacts
from fairlead.jobs.changes import Changes
from fairlead.jobs.desk import Desk, Wishes
from fairlead.jobs.runner import Runner
from fairlead.observe.finished import Finished
from fairlead.store.job_rows import JobRow
from fairlead.store.rows import UsageQuery, UsageRow
from fairlead.store.store import Store
from tests.gateway.house import ACME, Asked, House, Played, asking

SECONDS = 60.0
"""After which a test that waits has failed."""
MADE = Usage(megapixels=0.25, num_steps=4, compute_seconds=2.0)
IN_YEARS = 1e10
"""A moment at which every lease, deadline and retention has passed."""


def painting(text: str = "a seven", *, n: int = 1, seed: int | None = None, model: str = "painter", **fields: Any) -> Request:
    return asking(model, prompt=Paint(text=text, n=n, seed=seed), **fields)


def progress(asked: Asked, step: int, num_steps: int = 4, *, index: int = 0, preview: bytes = b"") -> None:
    asked.respond(delta=Delta(index=index, progress=Progress(step=step, num_steps=num_steps, preview=preview)))


def picture(asked: Asked, index: int = 0, *, data: bytes = b"", usage: Usage | None = None) -> None:
    """Its bytes tell of the seed, as those of a real one do."""
    seed = (asked.prompt.seed or 0) + index
    made = Picture(
        data=data or f"picture {seed}".encode(),
        content_type="image/png",
        width=8,
        height=8,
        seed=seed,
        mode="exact",
        num_steps=4,
        guidance=1.0,
        scheduler="euler",
    )
    asked.respond(delta=Delta(index=index, picture=made, finish_reason="stop", usage=usage))


def painted(asked: Asked) -> None:
    """All of it."""
    for index in range(asked.prompt.n):
        progress(asked, 4, index=index)
    for index in range(asked.prompt.n):
        picture(asked, index, usage=MADE if index == asked.prompt.n - 1 else None)
    asked.close(None)


class Shelf(Artifacts):
    """An artifact store that does not always take what it is given."""

    broken = 0
    """How many files it will not take."""

    async def put(self, job: str, data: bytes, content_type: str) -> Artifact:
        if self.broken > 0:
            self.broken -= 1
            raise Unreachable("no space left on device", reason="artifact-store")
        return await super().put(job, data, content_type)

    def files(self, job: str = "") -> list[Path]:
        """Those that are whole."""
        return [path for path in Path(self.root).joinpath(job).rglob("*") if path.is_file() and not path.name.startswith(".")]


class Site:
    """What one server process has of jobs."""

    def __init__(self, room: "Room", id: str, settings: JobSettings) -> None:
        self.room = room
        self.id = id
        self.changes = Changes()
        self.desk = Desk(room.store.jobs, settings, self.changes, room.house.gateway.welcome, poll_seconds=0.02)
        self.late: list[UsageRow] = []
        self.runner = Runner(
            id,
            store=room.store.jobs,
            files=room.shelf,
            inference=room.house.gateway,
            inspect=room.house.gateway.inspect,
            callers=room.callers,
            models=self._models,
            late=self.late.append,
            books=True,
            settings=settings,
            log_seconds=3600.0,
            changes=self.changes,
            finished=room.finished,
            counts=room.house.counts,
            poll_seconds=0.02,
        )
        self._task: asyncio.Task[None] | None = None

    def _models(self) -> Sequence[str]:
        gateway, repository = self.room.house.gateway, self.room.house.repository
        here = {entry.name for entry in repository.index(ready=True)}
        ready = [name for name in here if any(repository.find(name, each).ready for each in repository.versions(name))]
        return [*ready, *gateway.remote_models()]

    def open(self) -> "Site":
        self._task = asyncio.get_running_loop().create_task(self.runner.run(), name=self.id)
        return self

    async def die(self) -> None:
        """As a killed process: it writes nothing more."""
        tasks = [each for each in (self._task, *(run.task for run in self.runner.running.values())) if each is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None

    async def submit(self, request: Request, **wishes: Any) -> JobRow:
        row, _ = await self.desk.submit(request, Wishes(**wishes))
        return row

    async def end(self, job: JobRow | str, who: Caller = ACME) -> JobRow:
        """The job when it has ended."""
        row = await self.desk.wait(job if isinstance(job, str) else job.id, who, SECONDS)
        assert row.status in ENDED, row
        return row

    async def when(self, job: JobRow, condition: Callable[[JobRow], Any], who: Caller = ACME) -> JobRow:
        """The job as soon as it is so in the store."""
        async with asyncio.timeout(SECONDS):
            while True:
                row = await asyncio.to_thread(self.room.store.jobs.get, job.id)
                assert row is not None
                if condition(row):
                    return row
                await asyncio.sleep(0.005)

    async def keeps(self, job: JobRow) -> None:
        """A file of it lies there, and the runner has been told."""

        def kept(_: JobRow) -> bool:
            run = self.runner.running.get(job.id)
            return run is not None and bool(run.collected.artifacts)

        await self.when(job, kept)

    async def idle(self) -> None:
        """Nothing runs here."""
        async with asyncio.timeout(SECONDS):
            while self.runner.running:
                await asyncio.sleep(0.005)

    async def is_(self, job: JobRow, status: JobStatus) -> JobRow:
        return await self.when(job, lambda row: row.status is status)


class Room:
    def __init__(self, folder: Path, store: Store, settings: GatewaySettings, callers: Callable[[JobRow], Caller] | None) -> None:
        self.folder = folder
        self.store = store
        self.house = House(folder, "infer", settings, None, 0, books=False)
        self.painter = Played("painter")
        self.house.repository.serve(self.painter)
        self.ended: list[Timeline] = []
        self.finished = Finished(self.ended.extend)
        self.shelf = Shelf(ArtifactSettings(), folder / "artifacts")
        self.callers = callers or (lambda row: structs.replace(ACME, tenant=row.tenant, key=row.key, project=row.project))
        self.sites: list[Site] = []

    def site(self, *, open: bool = True, **settings: Any) -> Site:
        """One more process. `open`: it runs jobs."""
        site = Site(self, f"site-{len(self.sites)}", JobSettings(**settings))
        self.sites.append(site)
        return site.open() if open else site

    def bills(self, job: JobRow | None = None) -> list[UsageRow]:
        """Usage records, the oldest first."""
        rows = self.store.records(UsageQuery(), 10_000)
        return [row for row in reversed(rows) if job is None or row.request_id == job.id]

    def sweep(self, now: float, *, due: bool = True) -> tuple[JobRow, ...]:
        """As another process does, at any moment. `due`: what is put back may be begun at once."""
        return self.store.jobs.sweep(now, lambda _: -now if due else 0.0)

    async def lose(self, job: JobRow) -> JobStatus:
        """Its lease, as if it had run out. A row that a runner's beat holds at this moment is passed over, so look again."""
        for _ in range(1000):
            for row in await asyncio.to_thread(self.sweep, job.created + 1000):
                if row.id == job.id:
                    return row.status
        raise AssertionError("the lease does not run out")

    async def close(self) -> None:
        for site in self.sites:
            await site.die()
        await self.house.check()
        await self.house.close()
        self.shelf.close()


Rooms = Callable[..., Room]


def hurry(patch: Any) -> None:
    """What goes on beside, and waits between tries, as fast as a test wants it."""
    for module, name, seconds in (
        (runner, "BEAT_SECONDS", 0.01),
        (runner, "LOOK_SECONDS", 0.02),
        (runner, "SWEEP_SECONDS", 0.05),
        (runner, "GIVE_BACK_SECONDS", SECONDS),
        (retry, "FIRST_SECONDS", 0.01),
    ):
        patch.setattr(module, name, seconds)
