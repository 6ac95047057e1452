"""The incidents of one server: begun by a person or an alert, sampled while they last, kept as an archive each.

On disk one that runs is a folder: `incident.json`, metrics as they were every few seconds, and what was to be seen at its beginning. A
server that died leaves it behind; the next one goes on with it.
"""

import asyncio
import gzip
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog
from msgspec import Struct, structs

from fairlead.core.errors import InvalidRequest, NotFound, Unavailable, encodable
from fairlead.core.slo import IncidentSettings
from fairlead.observe.incidents.archive import Archive, written
from fairlead.observe.incidents.exhibits import Exhibit, Provider, Providers, Span
from fairlead.observe.incidents.impact import Impact, Values, impact_of, values_of
from fairlead.observe.incidents.postmortem import Facts, postmortem
from fairlead.observe.slo.board import Alert

PROVIDER_SECONDS = 20.0
RING_BYTES = 32 << 20
"""Of samples before an incident, compressed."""
IDLE_SHARE = 0.01
"""Of the time that samples may take while there is no incident."""
MAX_SAMPLES = 2000
"""Of one incident. When there are so many every second one goes, and they are taken half as often."""
MAX_TITLE = 200
BEFORE_SECONDS = 86_400.0
"""What changed in the day before an incident is told with it."""
AT_BEGINNING = ("slow.json", "failed.json", "logs.ndjson", "slo.json")
"""Kept when an incident begins, too: what is in rings would be gone at its end."""
ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{4}")
MAX_READ = 60
"""Samples that are read to tell what an incident cost."""
MARKER = "incident.json"

log = structlog.get_logger("fairlead.incidents")

Scrape = Callable[[], Awaitable[bytes]]


class Incident(Struct, frozen=True, kw_only=True):
    id: str
    title: str = ""
    began: float
    """Seconds since 1970."""
    ended: float | None = None
    by: str = ""
    """Who began it: a key, `alert`, ..."""
    server: str = ""
    bytes: int = 0
    """Of its archive."""
    restarts: int = 0
    """Times that the server began anew meanwhile."""


class Running(Struct):
    incident: Incident
    folder: Path
    every: float
    lock: int
    """A file that is locked while this process samples."""
    due: float = 0.0
    number: int = 0
    """Of the latest sample."""
    samples: int = 0
    bytes: int = 0
    skipped: int = 0


class Sample(NamedTuple):
    """The metrics at one moment."""

    now: float
    wall: float
    text: bytes
    """Compressed."""


class Incidents:
    """Lives in the event loop; files are written in threads. `now`: of a clock that only goes on."""

    def __init__(
        self,
        settings: IncidentSettings,
        folder: Callable[[], Path],
        scrape: Scrape,
        *,
        server: str,
        release: str = "",
        wall: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`folder`: of the archives. Raises ConfigError where there can be none."""
        self.settings = settings
        self.folder_of = folder
        self.scrape = scrape
        self.server = server
        self.release = release
        self.wall = wall
        self.now = now
        self.providers: dict[str, Provider] = {}
        self.alerts: Callable[[], Sequence[Alert]] = tuple
        """Those that fire, and those that did."""
        self.versions: Callable[[], Sequence[tuple[str, str, str]]] = tuple
        """(model, version, digest) of what serves."""
        self.told: Callable[[str, str, str], None] = _nobody
        """(who, `incident.start` or `incident.stop`, id): for the audit log."""
        self.running: Running | None = None
        self._ring: deque[Sample] = deque()
        self._ring_bytes = 0
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def provide(self, providers: Providers) -> None:
        """By the name of a file: a later one takes the place of an earlier one."""
        self.providers.update(providers)

    # Life

    async def run(self) -> None:
        """For ever: sample the metrics."""
        await self._resume()
        while True:
            began = self.now()
            self._wake.clear()  # what begins while this sample is taken wants one of its own
            if self.running is not None or self.settings.before_seconds:
                await self.sample()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.pause(self.now() - began)):
                    await self._wake.wait()

    def pause(self, took: float) -> float:
        """Until the next sample; `took`: seconds of the last one. While nothing is wrong, a server with very many models has better to do."""
        return max(self.settings.sample_seconds, 0.0 if self.running is not None else took / IDLE_SHARE)

    async def stop_sampling(self) -> None:
        """The server stops: an incident that runs is left for the next one."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.running is not None:
            os.close(self.running.lock)
            log.warning("incident_goes_on", incident=self.running.incident.id, note="the next server finds it in its folder")

    async def sample(self) -> None:
        text = await self.scrape()
        sample = Sample(self.now(), self.wall(), await asyncio.to_thread(gzip.compress, text, 1))
        running = self.running
        if running is not None and sample.now >= running.due:
            running.due = sample.now + running.every
            await self._keep(running, sample)
        self._ring.append(sample)
        self._ring_bytes += len(sample.text)
        while self._ring and (self._ring_bytes > RING_BYTES or self._ring[0].now < sample.now - self.settings.before_seconds):
            self._ring_bytes -= len(self._ring.popleft().text)

    async def _keep(self, running: Running, sample: "Sample") -> None:
        running.number += 1
        try:
            await asyncio.to_thread(_write, running.folder / "metrics" / _named("during", running.number, sample.wall), sample.text)
            running.samples += 1
            running.bytes += len(sample.text)
            if running.samples >= MAX_SAMPLES or running.bytes > self.settings.max_bytes:
                await asyncio.to_thread(_thin, running.folder)
                running.samples, running.bytes = await asyncio.to_thread(_size, running.folder)
                running.every *= 2
        except OSError as error:
            if not running.skipped:
                log.error("incident_not_sampled", incident=running.incident.id, error=str(error))
            running.skipped += 1

    async def _resume(self) -> None:
        try:
            found = await asyncio.to_thread(_left_behind, self.folder_of())
        except Exception as error:
            log.warning("incidents_not_read", error=str(error))
            return
        if found is not None and self.running is None:
            incident, folder, lock = found
            incident = structs.replace(incident, restarts=incident.restarts + 1)
            running = Running(incident, folder, self.settings.sample_seconds, lock)
            running.samples, running.bytes = await asyncio.to_thread(_size, folder)
            running.number = incident.restarts * 10 * MAX_SAMPLES
            self.running = running
            with suppress(OSError):
                await asyncio.to_thread(_mark, folder, incident)
            log.warning("incident_found", incident=incident.id, title=incident.title, began=incident.began)

    # Begun and ended

    def on_alerts(self, alerts: Sequence[Alert]) -> None:
        """A listener of alerts, where a page begins an incident."""
        paged = [each for each in alerts if each.state == "firing" and each.severity == "page"]
        if paged and self.settings.on_page and self.running is None:
            task = asyncio.get_running_loop().create_task(self._begin_by(paged[0]), name="incident")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _begin_by(self, alert: Alert) -> None:
        try:
            await self.start(f"{alert.name}: {alert.summary}", "alert")
        except (InvalidRequest, Unavailable) as error:
            log.error("incident_not_begun", alert=alert.name, error=error.message)

    async def start(self, title: str, by: str) -> Incident:
        """Raises InvalidRequest where one runs, Unavailable where it cannot be kept."""
        async with self._changing:
            if self.running is not None:
                raise InvalidRequest(f"incident {self.running.incident.id} runs since {_shown(self.running.incident.began)}: stop it first")
            wall = self.wall()
            id = f"{datetime.fromtimestamp(wall, UTC):%Y%m%dT%H%M%SZ}-{os.urandom(2).hex()}"
            incident = Incident(id=id, title=encodable(title[:MAX_TITLE]), began=wall, by=by, server=self.server)
            before = list(self._ring)
            exhibits, missing = await self._gather(Span(wall, wall), AT_BEGINNING)
            try:
                folder = self.folder_of() / id
                lock = await asyncio.to_thread(_begin, folder, incident, before, exhibits, missing)
            except OSError as error:
                raise Unavailable(f"the incident cannot be kept: {error.strerror or error}") from None
            num_bytes = sum(len(each.text) for each in before)
            self.running = Running(incident, folder, self.settings.sample_seconds, lock, samples=len(before), bytes=num_bytes)
        self._wake.set()
        log.warning("incident_begun", incident=id, title=incident.title, by=by)
        self.told(by, "incident.start", id)
        return incident

    async def stop(self, by: str) -> Incident:
        """Raises NotFound where none runs, Unavailable where its archive cannot be written: it runs on then."""
        async with self._changing:
            running = self.running
            if running is None:
                raise NotFound("no incident runs: begin one with `fairlead incident start`")
            running.due = 0.0
            await self.sample()
            ended = structs.replace(running.incident, ended=max(self.wall(), running.incident.began))
            span = Span(running.incident.began, self.wall())
            exhibits, missing = await self._gather(span, tuple(self.providers))
            alerts = self._alerts(span)
            try:
                ended = await asyncio.to_thread(self._archive, running, ended, exhibits, missing, alerts)
            except OSError as error:
                raise Unavailable(f"the archive cannot be written: {error.strerror or error}; the incident runs on") from None
            self.running = None
        log.warning("incident_ended", incident=ended.id, bytes=ended.bytes)
        self.told(by, "incident.stop", ended.id)
        return ended

    async def _gather(self, span: Span, names: Sequence[str]) -> tuple[dict[str, Exhibit], dict[str, str]]:
        """(what there is, what there is not and why)."""
        found: dict[str, Exhibit] = {}
        missing: dict[str, str] = {}
        for name in names:
            provider = self.providers.get(name)
            if provider is None:
                continue
            try:
                async with asyncio.timeout(PROVIDER_SECONDS):
                    found[name] = await provider(span)
            except Exception as error:
                missing[name] = (
                    f"no answer within {PROVIDER_SECONDS:g} s" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
                )
                log.warning("exhibit_missing", file=name, error=missing[name])
        return found, missing

    def _alerts(self, span: Span) -> list[Alert]:
        return sorted((each for each in self.alerts() if each.state != "pending" and each.began <= span.end), key=lambda each: each.began)

    def _archive(
        self, running: Running, ended: Incident, exhibits: dict[str, Exhibit], missing: dict[str, str], alerts: Sequence[Alert]
    ) -> Incident:
        """In a thread. Raises OSError."""
        assert ended.ended is not None
        samples = _samples(running.folder)
        archive = Archive(running.folder.parent / f"{ended.id}.tar.gz", ended.id, self.settings.max_bytes, ended.ended)
        try:
            archive.missing += missing.items()
            archive.add_all(sorted(exhibits.items()))
            archive.add("alerts.json", written([_during(each, ended) for each in alerts]))
            for path in sorted((running.folder / "start").glob("*")):  # none where somebody tidied up
                archive.add(f"start/{path.name}", path.read_bytes())
            archive.add_spread([(f"metrics/{path.name}", path) for path in samples])
            happenings = [each for exhibit in exhibits.values() for each in exhibit.happenings]
            facts = Facts(
                id=ended.id,
                title=ended.title,
                server=ended.server,
                release=self.release,
                began=ended.began,
                ended=ended.ended,
                impact=_impact(samples),
                happenings=happenings,
                shown=[exhibit.shown for exhibit in exhibits.values() if exhibit.shown is not None],
                versions=self.versions(),
                alerts=[(each.name, each.severity, each.subject, each.began) for each in alerts if _overlaps(each, ended)],
                files=[*(name for name in archive.files if not name.startswith("metrics/")), *(["metrics/"] if samples else [])],
                missing=archive.missing,
            )
            archive.add("incident.json", written({**structs.asdict(ended), "missing": archive.missing}), last=True)
            archive.add("postmortem.md", postmortem(facts).encode(), last=True)
            archive.close()
        except BaseException:
            archive.abandon()
            raise
        ended = structs.replace(ended, bytes=archive.path.stat().st_size)
        _write(_beside(archive.path), msgspec.json.encode(ended))
        os.close(running.lock)
        shutil.rmtree(running.folder, ignore_errors=True)
        try:
            for path in _archives(archive.path.parent)[self.settings.keep :]:
                path.unlink(missing_ok=True)
                _beside(path).unlink(missing_ok=True)
        except OSError as error:  # the incident has its archive all the same
            log.warning("archive_not_removed", error=str(error))
        return ended

    # Shown

    async def list(self) -> list[Incident]:
        """The newest first, the one that runs before all. Raises Unavailable."""
        try:
            ended = await asyncio.to_thread(lambda: [_of_archive(path) for path in _archives(self.folder_of())])
        except OSError as error:
            raise Unavailable(f"archives cannot be read: {error.strerror or error}") from None
        running = [self.running.incident] if self.running is not None else []
        return [*running, *ended]

    def path(self, id: str) -> Path:
        """Of its archive. Raises NotFound."""
        path = self.folder_of() / f"{id}.tar.gz"
        if not ID.fullmatch(id) or not path.is_file():
            runs = self.running is not None and self.running.incident.id == id
            raise NotFound(f"incident {id} runs: its archive is made when it is stopped" if runs else f"there is no incident {id}")
        return path


def _nobody(_: str, __: str, ___: str) -> None:
    pass


# On disk


def _begin(folder: Path, incident: Incident, before: Sequence[Sample], exhibits: dict[str, Exhibit], missing: dict[str, str]) -> int:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    try:
        for name in ("start", "metrics"):
            (folder / name).mkdir(mode=0o700)
        for number, sample in enumerate(before):
            _write(folder / "metrics" / _named("before", number, sample.wall), sample.text)
        for name, exhibit in exhibits.items():
            _write(folder / "start" / name, written(exhibit.content))
        for name, why in missing.items():
            _write(folder / "start" / f"{name}.missing", why.encode())
        _mark(folder, incident)
        lock = _locked(folder)
        assert lock is not None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return lock


def _mark(folder: Path, incident: Incident) -> None:
    """Whole or not at all."""
    beside = folder / f".{MARKER}"
    _write(beside, msgspec.json.encode(incident))
    os.replace(beside, folder / MARKER)


def _write(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None where another process has it."""
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        import fcntl
    except ImportError:  # Windows
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _left_behind(folder: Path) -> tuple[Incident, Path, int] | None:
    """The newest incident that no process samples."""
    if not folder.is_dir():
        return None
    for each in sorted(folder.iterdir(), reverse=True):
        if not ID.fullmatch(each.name) or not (each / MARKER).is_file():
            continue
        try:
            incident = msgspec.json.decode((each / MARKER).read_bytes(), type=Incident)
            lock = _locked(each)
        except (msgspec.DecodeError, OSError) as error:
            log.warning("incident_not_read", folder=each.name, error=str(error))
            continue
        if lock is not None:
            return incident, each, lock
    return None


def _named(part: str, number: int, wall: float) -> str:
    """In the order in which they were taken, whatever the calendar did meanwhile."""
    return f"{part}-{number:07d}-{datetime.fromtimestamp(wall, UTC):%Y%m%dT%H%M%SZ}.prom.gz"


def _thin(folder: Path) -> None:
    for path in _samples(folder)[1::2]:
        path.unlink(missing_ok=True)


def _samples(folder: Path) -> Sequence[Path]:
    """The oldest first."""
    return sorted((folder / "metrics").glob("*.prom.gz"))


def _size(folder: Path) -> tuple[int, int]:
    """(samples, bytes)."""
    sizes = [path.stat().st_size for path in _samples(folder)]
    return len(sizes), sum(sizes)


def _impact(samples: Sequence[Path]) -> Impact:
    """From the last sample before it began on."""
    num_before = sum(path.name.startswith("before-") for path in samples)
    during = samples[max(num_before - 1, 0) :]
    step = len(during) // MAX_READ + 1
    values: list[Values] = []
    for path in (*during[:-1:step], *during[-1:]):
        try:
            values.append(values_of(gzip.decompress(path.read_bytes()).decode("utf-8", "replace")))
        except (OSError, EOFError, ValueError) as error:
            log.warning("sample_not_read", file=path.name, error=str(error))
    return impact_of(values)


def _archives(folder: Path) -> Sequence[Path]:
    """The newest first."""
    return sorted((path for path in folder.glob("*.tar.gz") if ID.fullmatch(path.name.removesuffix(".tar.gz"))), reverse=True)


def _beside(archive: Path) -> Path:
    """What a list says of it."""
    return archive.with_name(archive.name.removesuffix(".tar.gz") + ".json")


def _of_archive(path: Path) -> Incident:
    try:
        return msgspec.json.decode(_beside(path).read_bytes(), type=Incident)
    except (OSError, msgspec.DecodeError):  # somebody tidied up
        id, stat = path.name.removesuffix(".tar.gz"), path.stat()
        began = datetime.strptime(id.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        return Incident(id=id, began=began, ended=stat.st_mtime, bytes=stat.st_size)


def _during(alert: Alert, incident: Incident) -> dict[str, Any]:
    return {**structs.asdict(alert), "during": _overlaps(alert, incident)}


def _overlaps(alert: Alert, incident: Incident) -> bool:
    ended = alert.since if alert.state == "resolved" else incident.ended
    return ended is None or ended >= incident.began


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
