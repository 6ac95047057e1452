"""Incidents from their beginning to their archive, with a clock that is turned by hand."""

import asyncio
import gzip
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from fairlead.core.errors import InvalidRequest, NotFound, Unavailable
from fairlead.core.slo import IncidentSettings
from fairlead.observe.incidents import incidents as module
from fairlead.observe.incidents.archive import members
from fairlead.observe.incidents.exhibits import Exhibit, Happening
from fairlead.observe.incidents.incidents import Incidents
from fairlead.observe.slo.board import Alert

WALL = 1_790_000_000.0
SETTINGS = IncidentSettings(sample_seconds=10.0, before_seconds=60.0)


class Ward:
    """One server's incidents, and what it tells."""

    def __init__(self, folder, settings=SETTINGS, *, server="one"):
        self.now, self.wall = 1000.0, WALL
        self.failed = 0
        self.requests = 0
        self.audit = []
        self.incidents = Incidents(
            settings, lambda: Path(folder), self.scrape, server=server, release="1.2.3", wall=lambda: self.wall, now=lambda: self.now
        )
        self.incidents.told = lambda *told: self.audit.append(told)

    async def scrape(self):
        self.requests += 10
        return (
            f'fairlead_requests_total{{model="m",version="1",outcome="success"}} {self.requests}\n'
            f'fairlead_requests_total{{model="m",version="1",outcome="failure"}} {self.failed}\n'
        ).encode()

    async def go_on(self, seconds, failed=0):
        for _ in range(round(seconds / 10)):
            self.now += 10.0
            self.wall += 10.0
            self.failed += failed
            await self.incidents.sample()

    def provide(self, name, content, *happenings):
        async def exhibit(span):
            return Exhibit(content(span) if callable(content) else content, happenings)

        self.incidents.provide({name: exhibit})

    def archive(self, id):
        files = {name.removeprefix(f"{id}/"): content for name, content in members(self.incidents.path(id))}
        assert all("/" not in name.removeprefix("start/").removeprefix("metrics/") for name in files)
        return files


@pytest.fixture
def ward(tmp_path):
    return Ward(tmp_path / "incidents")


async def test_an_incident_becomes_one_archive_with_what_was_before_and_meanwhile(ward):
    ward.provide("slow.json", lambda span: [{"at": ward.now}])
    ward.provide("audit.json", [], Happening(WALL - 500.0, "admin: config.put gateway", change=True))
    ward.provide("logs.ndjson", "one line\n")
    await ward.go_on(300, failed=0)
    begun = await ward.incidents.start("It is | slow", "admin-key")
    await ward.go_on(120, failed=3)
    ended = await ward.incidents.stop("admin-key")

    assert ended.id == begun.id and ended.ended == begun.began + 120.0
    files = ward.archive(ended.id)
    assert {
        "postmortem.md",
        "incident.json",
        "slow.json",
        "logs.ndjson",
        "audit.json",
        "start/slow.json",
        "start/logs.ndjson",
    } <= files.keys()
    assert json.loads(files["start/slow.json"]) != json.loads(files["slow.json"])
    before = [name for name in files if name.startswith("metrics/before-")]
    during = [name for name in files if name.startswith("metrics/during-")]
    assert (len(before), len(during)) == (7, 13)
    assert b'outcome="failure"} 36' in gzip.decompress(files[max(during)])
    text = files["postmortem.md"].decode()
    assert "| Requests that failed | 36 |" in text
    assert "# Post-mortem: It is \\| slow" in text
    assert "config.put gateway" in text.partition("## What changed before")[2]
    assert ward.audit == [("admin-key", "incident.start", begun.id), ("admin-key", "incident.stop", begun.id)]


async def test_archives_are_for_their_owner_only(ward):
    await ward.incidents.start("", "me")
    [folder] = ward.incidents.folder_of().iterdir()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder, folder / "incident.json")}
    assert modes == {"incidents": 0o700, folder.name: 0o700, "incident.json": 0o600}
    ended = await ward.incidents.stop("me")
    assert stat.S_IMODE(ward.incidents.path(ended.id).stat().st_mode) == 0o600
    assert sorted(path.suffix for path in ward.incidents.folder_of().iterdir()) == [".gz", ".json"]


async def test_one_at_a_time(ward):
    with pytest.raises(NotFound, match="no incident runs"):
        await ward.incidents.stop("me")
    first = await ward.incidents.start("", "me")
    with pytest.raises(InvalidRequest, match=f"incident {first.id} runs since 2026-09-21 14:13 UTC"):
        await ward.incidents.start("", "me")
    with pytest.raises(NotFound, match="runs: its archive is made when it is stopped"):
        ward.incidents.path(first.id)
    results = await asyncio.gather(ward.incidents.stop("me"), ward.incidents.stop("you"), return_exceptions=True)
    assert sorted(type(each).__name__ for each in results) == ["Incident", "NotFound"]


async def test_what_cannot_be_had_is_said_and_nothing_else_is_lost(ward):
    async def broken(span):
        raise Unavailable("the store does not answer")

    async def odd(span):
        return {"not": "an exhibit"}[span]

    ward.incidents.provide({"audit.json": broken, "odd.json": odd})
    ward.provide("slow.json", [])
    await ward.incidents.start("", "me")
    files = ward.archive((await ward.incidents.stop("me")).id)
    assert "audit.json" not in files and "slow.json" in files
    assert "* `audit.json` is missing: Unavailable: the store does not answer" in files["postmortem.md"].decode()
    assert [name for name, _ in json.loads(files["incident.json"])["missing"]] == ["audit.json", "odd.json"]


async def test_one_that_never_answers_is_left_out(ward, monkeypatch):
    monkeypatch.setattr(module, "PROVIDER_SECONDS", 0.01)

    async def hangs(span):
        await asyncio.Event().wait()

    ward.incidents.provide({"audit.json": hangs})
    await ward.incidents.start("", "me")
    files = ward.archive((await ward.incidents.stop("me")).id)
    assert "no answer within" in files["postmortem.md"].decode()


async def test_an_incident_outlives_its_server(ward, tmp_path):
    await ward.go_on(60)
    begun = await ward.incidents.start("the server died", "me")
    await ward.go_on(30, failed=1)
    await ward.incidents.stop_sampling()  # which lets go of the lock, as death does

    later = Ward(tmp_path / "incidents", server="two")
    later.wall = ward.wall + 600.0
    await later.incidents._resume()
    assert later.incidents.running is not None
    assert (later.incidents.running.incident.id, later.incidents.running.incident.restarts) == (begun.id, 1)
    await later.go_on(20, failed=1)
    ended = await later.incidents.stop("me")
    assert (ended.title, ended.began, ended.restarts) == ("the server died", begun.began, 1)
    files = later.archive(ended.id)
    assert "| Requests that failed | 5 |" in files["postmortem.md"].decode()
    during = sorted(name for name in files if name.startswith("metrics/during-"))
    assert len(during) == 3 + 3


async def test_an_incident_that_another_process_samples_is_left_to_it(ward, tmp_path):
    await ward.incidents.start("", "me")
    other = Ward(tmp_path / "incidents", server="two")
    await other.incidents._resume()
    assert other.incidents.running is None
    await other.incidents.start("another one", "you")
    assert len(await other.incidents.list()) == 1


async def test_what_is_left_and_cannot_be_read_is_passed_over(ward):
    folder = ward.incidents.folder_of() / "20260101T000000Z-dead"
    folder.mkdir(parents=True)
    (folder / "incident.json").write_text("{")
    (folder.parent / "20260101T000000Z-beef").mkdir()
    await ward.incidents._resume()
    assert ward.incidents.running is None


async def test_long_incidents_are_sampled_less_often_and_stay_bounded(ward, monkeypatch):
    monkeypatch.setattr(module, "MAX_SAMPLES", 40)
    await ward.incidents.start("", "me")
    await ward.go_on(10_000)
    files = ward.archive((await ward.incidents.stop("me")).id)
    during = sorted(name for name in files if name.startswith("metrics/during-"))
    assert 20 <= len(during) <= 41
    assert "| m | 1000" in files["postmortem.md"].decode() or "| m | 10010 |" in files["postmortem.md"].decode()


async def test_an_archive_is_bounded_and_says_what_is_left_out(tmp_path):
    ward = Ward(tmp_path / "incidents", IncidentSettings(sample_seconds=10.0, max_bytes=4 << 20))
    ward.provide("logs.ndjson", "x" * (3 << 20))
    ward.provide("slow.json", "y" * (1 << 20))
    await ward.incidents.start("", "me")
    files = ward.archive((await ward.incidents.stop("me")).id)
    assert "slow.json" in files and "logs.ndjson" not in files
    assert "* `logs.ndjson` is missing: its 3145728 bytes are more than there is room for" in files["postmortem.md"].decode()


async def test_the_oldest_archives_go(tmp_path):
    ward = Ward(tmp_path / "incidents", IncidentSettings(keep=2))
    ids = []
    for _ in range(4):
        ward.wall += 60.0
        await ward.incidents.start("", "me")
        ids.append((await ward.incidents.stop("me")).id)
    assert [each.id for each in await ward.incidents.list()] == ids[:1:-1]
    assert len(list(ward.incidents.folder_of().iterdir())) == 4


async def test_a_list_tells_what_was_and_what_runs(ward):
    await ward.incidents.start("first", "me")
    await ward.incidents.stop("me")
    ward.wall += 60.0
    await ward.incidents.start("second", "alert")
    second, first = await ward.incidents.list()
    assert (second.title, second.ended, first.title, first.by) == ("second", None, "first", "me")
    assert first.bytes == ward.incidents.path(first.id).stat().st_size


@pytest.mark.parametrize("id", ["", "..", "../../etc/passwd", "20260921T141320Z-abcd", "x/y", "20260921T141320Z-abcd/../.."])
def test_an_id_names_an_archive_or_nothing(ward, id):
    with pytest.raises(NotFound):
        ward.incidents.path(id)


async def test_where_nothing_can_be_written_it_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    ward = Ward(tmp_path / "file" / "incidents")
    with pytest.raises(Unavailable, match="cannot be kept: Not a directory"):
        await ward.incidents.start("", "me")
    assert ward.incidents.running is None


async def test_an_archive_that_cannot_be_written_leaves_the_incident_running(ward):
    begun = await ward.incidents.start("", "me")
    blocked = ward.incidents.folder_of() / f".{begun.id}.tar.gz.part"
    blocked.mkdir()
    with pytest.raises(Unavailable, match="the incident runs on"):
        await ward.incidents.stop("me")
    blocked.rmdir()
    assert (await ward.incidents.stop("me")).id == begun.id


async def test_a_page_begins_an_incident_where_that_is_wanted(tmp_path):
    def alert(severity, state="firing"):
        return Alert(id="1", name="FairleadDiskFull", severity=severity, subject="", summary="full", state=state, since=WALL, began=WALL)

    for on_page, alerts, begun in (
        (True, [alert("ticket"), alert("page", "resolved")], False),
        (False, [alert("page")], False),
        (True, [alert("ticket"), alert("page"), alert("page")], True),
    ):
        ward = Ward(tmp_path / f"{on_page}{begun}", IncidentSettings(on_page=on_page))
        ward.incidents.alerts = lambda: [alert("page")]
        ward.incidents.on_alerts(alerts)
        await asyncio.gather(*ward.incidents._tasks)
        assert (ward.incidents.running is not None) is begun
        if ward.incidents.running is not None:
            assert (ward.incidents.running.incident.title, ward.incidents.running.incident.by) == ("FairleadDiskFull: full", "alert")
            files = ward.archive((await ward.incidents.stop("me")).id)
            assert "FairleadDiskFull (page) fires" in files["postmortem.md"].decode()
            assert json.loads(files["alerts.json"])[0]["during"]


async def test_a_clock_that_goes_back_meanwhile_spoils_nothing(ward):
    await ward.go_on(60)
    await ward.incidents.start("", "me")
    await ward.go_on(30, failed=1)
    ward.wall -= 86_400.0
    await ward.go_on(30, failed=1)
    files = ward.archive((await ward.incidents.stop("me")).id)
    assert "| Requests that failed | 6 |" in files["postmortem.md"].decode()
    assert "| Lasted | 0 min 0 s |" in files["postmortem.md"].decode()


async def test_without_a_ring_only_what_is_meanwhile_is_kept(tmp_path):
    ward = Ward(tmp_path / "incidents", IncidentSettings(before_seconds=0.0, sample_seconds=10.0))
    await ward.go_on(60)
    await ward.incidents.start("", "me")
    await ward.go_on(20)
    files = ward.archive((await ward.incidents.stop("me")).id)
    assert len([name for name in files if name.startswith("metrics/before-")]) <= 1
    assert os.listdir(ward.incidents.folder_of())


async def test_while_nothing_is_wrong_a_large_server_is_sampled_seldom(ward):
    assert (ward.incidents.pause(0.001), ward.incidents.pause(0.5)) == (10.0, 50.0)
    await ward.incidents.start("", "me")
    assert ward.incidents.pause(0.5) == 10.0


async def test_an_incident_is_sampled_from_its_beginning_on(ward):
    task = asyncio.create_task(ward.incidents.run())
    async with asyncio.timeout(10):
        while not ward.requests:
            await asyncio.sleep(0.001)
        await ward.incidents.start("", "me")
        while not ward.incidents.running.number:  # one that was taken meanwhile, beside those from before
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_one_that_begins_while_a_sample_is_taken_gets_one_of_its_own(ward):
    task = asyncio.create_task(ward.incidents.run())
    scraping, go_on, scrape = asyncio.Event(), asyncio.Event(), ward.scrape

    async def slow():
        text = await scrape()
        scraping.set()
        await go_on.wait()
        return text

    ward.incidents.scrape = slow
    await scraping.wait()
    begun = await ward.incidents.start("", "me")
    ward.incidents.scrape = scrape
    go_on.set()
    async with asyncio.timeout(8):  # sooner than the next one's time
        while ward.requests < 20:
            await asyncio.sleep(0.001)
    assert ward.incidents.running.incident == begun
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_half_characters_keep_no_incident_from_its_archive(ward):
    ward.provide("slow.json", [{"error": "no such file: \udcff"}])
    begun = await ward.incidents.start("late \ud800", "me")
    await ward.incidents.stop("me")
    files = ward.archive(begun.id)
    assert begun.title == "late ?"
    assert json.loads(files["slow.json"]) == json.loads(files["start/slow.json"]) == [{"error": "no such file: ?"}]


async def test_an_incident_whose_folder_somebody_removed_can_be_stopped(ward):
    begun = await ward.incidents.start("", "me")
    shutil.rmtree(ward.incidents.running.folder)
    ended = await ward.incidents.stop("me")
    assert ended.id == begun.id and "postmortem.md" in ward.archive(ended.id)
    assert (await ward.incidents.start("", "me")).id != begun.id


async def test_an_old_archive_that_cannot_be_removed_does_not_keep_an_incident_running(tmp_path):
    ward = Ward(tmp_path / "incidents", IncidentSettings(sample_seconds=10.0, keep=1))
    first = await ward.incidents.start("", "me")
    await ward.incidents.stop("me")
    old = ward.incidents.path(first.id)
    old.unlink()
    old.mkdir()  # which no `unlink` removes
    await ward.go_on(60)
    second = await ward.incidents.start("", "me")
    assert (await ward.incidents.stop("me")).id == second.id
    assert ward.incidents.running is None
