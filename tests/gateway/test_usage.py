"""The usage log: nothing is awaited, nothing is lost that need not be."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from fairlead.core.errors import Unavailable
from fairlead.gateway import usage
from fairlead.gateway.usage import UsageLog
from fairlead.observe.counts import Counts
from fairlead.store.rows import AuditQuery, AuditRow, UsageQuery, UsageRow
from fairlead.store.store import Store
from tests.store.postgres import Postgres, private_postgres
from tests.stores import new_store

RECORDS = "fairlead_usage_records_total"
NEVER = 3600.0


def row(number: int, **fields: Any) -> UsageRow:
    return UsageRow(**{"time": float(number), "request_id": str(number), "tenant": "t", "model": "m", "outcome": "success", **fields})


def entry(subject: str) -> AuditRow:
    return AuditRow(time=1.0, actor="gateway", action="abuse.throttle", subject=subject)


class Books:
    """A store that fails when told to, and says when it was asked."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.sizes: list[int] = []
        self.gone = False
        self.poison = ""
        self.asked = threading.Semaphore(0)

    def record(self, usage: Sequence[UsageRow], audit: Sequence[AuditRow] = ()) -> None:
        self.asked.release()
        if self.gone:
            raise Unavailable("the store does not answer: it is gone")
        if any(each.request_id == self.poison for each in usage):
            raise ValueError("a text that no database takes")
        self.sizes.append(len(usage) + len(audit))
        self.taken += [each.request_id for each in usage] + [each.subject for each in audit]

    async def was_asked(self, times: int = 1) -> None:
        for _ in range(times):
            assert await asyncio.to_thread(self.asked.acquire, timeout=30)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = new_store(tmp_path)
    yield opened
    opened.close()


async def test_what_is_added_is_in_the_store_when_it_has_stopped(store: Store) -> None:
    counts = Counts()
    log = UsageLog(store, NEVER, counts)
    log.start()
    for number in range(2500):
        log.add(row(number))
    log.audit(entry("k1"))
    await log.stop()
    assert [each.request_id for each in store.records(UsageQuery(), 10_000)] == [str(number) for number in reversed(range(2500))]
    assert store.usage(UsageQuery())[0].requests == 2500
    assert [each.subject for each in store.audit(AuditQuery(), 10)] == ["k1"]
    assert (counts.get(RECORDS, "written"), log.waiting) == (2501, 0)


async def test_a_full_batch_does_not_wait_for_the_interval() -> None:
    books = Books()
    log = UsageLog(books, NEVER, Counts())
    log.start()
    for number in range(usage.BATCH_ROWS):
        log.add(row(number))
    await books.was_asked()
    await log.stop()
    assert books.sizes == [usage.BATCH_ROWS]


async def test_a_few_rows_wait_for_the_interval_only() -> None:
    books = Books()
    log = UsageLog(books, 0.01, Counts())
    log.start()
    log.add(row(1))
    await books.was_asked()
    log.add(row(2))
    await books.was_asked()
    await log.stop()
    assert books.taken == ["1", "2"]


async def test_without_a_store_nothing_is_kept() -> None:
    log = UsageLog(None, 0.01, Counts())
    log.start()
    log.add(row(1))
    log.audit(entry("k1"))
    assert log.waiting == 0
    await log.stop()


async def test_an_outage_is_told_of_once_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_RETRY_SECONDS", 0.01)
    books, counts = Books(), Counts()
    books.gone = True
    log = UsageLog(books, 0.01, counts)
    log.start()
    with capture_logs() as lines:
        log.add(row(1))
        await books.was_asked(3)
        log.add(row(2))
        await books.was_asked(2)
        books.gone = False
        await log.stop()
    assert books.taken == ["1", "2"]
    assert counts.get("fairlead_usage_failed_writes_total") >= 4
    assert [line["event"] for line in lines] == ["usage_not_written", "usage_written_again"]
    assert "it is gone" in lines[0]["error"]


async def test_beyond_the_bound_the_oldest_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_RETRY_SECONDS", 0.01)
    books, counts = Books(), Counts()
    books.gone = True
    log = UsageLog(books, 0.01, counts, max_rows=10)
    log.start()
    for number in range(6):
        log.add(row(number))
    await books.was_asked(2)
    for number in range(6, 16):
        log.add(row(number))
    await books.was_asked(3)
    books.gone = False
    await log.stop()
    assert books.taken == [str(number) for number in range(6, 16)]
    assert (counts.get(RECORDS, "dropped"), counts.get(RECORDS, "written")) == (6, 10)


async def test_a_store_that_stays_away_ends_with_a_word_on_what_is_lost() -> None:
    books = Books()
    books.gone = True
    log = UsageLog(books, 0.01, Counts())
    log.start()
    log.add(row(1))
    log.add(row(2))
    with capture_logs() as lines:
        await log.stop(0.05)
    assert lines[-1] == {"event": "usage_lost", "records": 2, "log_level": "error"}


async def test_a_record_that_no_database_takes_keeps_no_other_from_it() -> None:
    books, counts = Books(), Counts()
    books.poison = "13"
    log = UsageLog(books, NEVER, counts)
    log.start()
    for number in range(50):
        log.add(row(number))
    log.audit(entry("k1"))
    with capture_logs() as lines:
        await log.stop()
    assert books.taken == [*(str(number) for number in range(50) if number != 13), "k1"]
    assert (counts.get(RECORDS, "refused"), counts.get(RECORDS, "written")) == (1, 50)
    assert lines == [{"event": "usage_record_refused", "error": "ValueError", "log_level": "error"}]


async def test_an_outage_in_the_middle_of_that_keeps_the_order() -> None:
    class GoneOnce(Books):
        def record(self, usage: Sequence[UsageRow], audit: Sequence[AuditRow] = ()) -> None:
            if len(usage) == 1 and not self.sizes and self.poison:
                self.poison = ""
                raise Unavailable("the store does not answer: it is gone")
            super().record(usage, audit)

    books = GoneOnce()
    books.poison = "0"
    log = UsageLog(books, NEVER, Counts())
    log.start()
    for number in range(8):
        log.add(row(number))
    await log.stop()
    assert books.taken == [str(number) for number in range(8)]


# A real PostgreSQL


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with private_postgres() as running:
        yield running


async def test_what_postgresql_cannot_take_keeps_no_other_record_from_it(postgres: Postgres) -> None:
    store, counts = Store.open(postgres.new_database()), Counts()
    log = UsageLog(store, NEVER, counts)
    log.start()
    for number, text in enumerate(("good", "nul \x00", "half a pair \ud800", "good")):
        log.add(row(number, model=text))
    log.add(row(4, input_tokens=1 << 70))
    await log.stop()
    assert [each.model for each in store.records(UsageQuery(), 10)] == ["good", "good"]
    assert store.usage(UsageQuery())[0].requests == counts.get(RECORDS, "written") == 2
    assert counts.get(RECORDS, "refused") == 3
    store.close()


async def test_records_outlive_a_postgresql_that_is_killed_and_comes_back(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_RETRY_SECONDS", 0.05)
    store, counts = Store.open(postgres.new_database()), Counts()
    log = UsageLog(store, 0.01, counts)
    log.start()
    log.add(row(1))
    async with asyncio.timeout(30):
        while not counts.get(RECORDS, "written"):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(postgres.stop)
        for number in range(2, 3000):
            log.add(row(number))
        while not counts.get("fairlead_usage_failed_writes_total"):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(postgres.start)
    await log.stop(30)
    assert store.usage(UsageQuery())[0].requests == len(store.records(UsageQuery(), 10_000)) == 2999
    store.close()


# A real process


def run_until(url: str, flush_seconds: float, lines: int, number: signal.Signals) -> list[tuple[int, float]]:
    """(number, time) of the requests of a process that got the signal after so many."""
    command = [sys.executable, str(Path(__file__).with_name("usage_process.py")), url, str(flush_seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(number)
        said += process.stdout.readlines()
    assert process.returncode == (0 if number is signal.SIGTERM else -signal.SIGKILL)
    return [(int(line.split()[0]), float(line.split()[1])) for line in said if len(line.split()) == 2]


def stored(url: str) -> set[int]:
    store = Store.open(url)
    try:
        records = store.records(UsageQuery(), 10_000)
        assert sum(each.requests for each in store.usage(UsageQuery())) == len(records)
        return {int(each.request_id) for each in records}
    finally:
        store.close()


def test_sigterm_loses_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fairlead.db"
    requests = run_until(url, NEVER, 200, signal.SIGTERM)
    assert stored(url) == {number for number, _ in requests}


def test_sigkill_loses_no_more_than_the_last_interval(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fairlead.db"
    requests = run_until(url, 0.1, 600, signal.SIGKILL)
    kept, end = stored(url), requests[-1][1]
    assert kept == set(range(len(kept)))
    lost = [time for number, time in requests if number not in kept]
    # Beside the interval: the one write that was under way, on a machine that does other things too.
    assert all(end - time < 0.1 + 0.9 for time in lost)
