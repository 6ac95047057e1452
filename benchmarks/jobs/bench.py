"""What a job costs before and after its model's work.  python bench.py [--quick] [--store sqlite postgres] [--workloads chain rate deep]

The store alone: jobs are submitted, leased and ended by threads of one process, as a server does, and nothing is computed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from fairlead.core.jobs import JobResult, JobStatus  # noqa: E402, the path comes first
from fairlead.store.job_rows import JobRow  # noqa: E402
from fairlead.store.jobs import JobStore  # noqa: E402
from fairlead.store.rows import UsageRow  # noqa: E402
from fairlead.store.store import Store  # noqa: E402
from tests.store.postgres import private_postgres  # noqa: E402

RESULTS = HERE / "results"
DAY = 86_400.0
INPUT = b"x" * 1024
SUBMITTERS = 16
ENDERS = 16
MAX_ACTIVE = 64
RATE = 100.0
POLL_SECONDS = 0.005
TARGET_JOBS, TARGET_P99_MS = 400, 20
DISTURBED_CORES = 0.25
"""Taken by other work on the machine meanwhile."""
_ids = count()


def job(tenant: str = "acme", *, priority: int = 0) -> JobRow:
    now = time.time()
    return JobRow(
        id=f"job_{int(now * 1000):012x}{next(_ids):020x}", tenant=tenant, key="key_1", qos_class="standard", priority=priority, model="mock",
        kind="generate", face="fairlead", created=now, start_deadline=now + DAY, total_deadline=now + DAY, max_tries=3,
        retention_seconds=DAY, address="127.0.0.1", request_id=f"r{next(_ids)}",
    )  # fmt: skip


def submit(jobs: JobStore, row: JobRow) -> None:
    jobs.submit(row, INPUT, tenant_queued=1_000_000, now=time.time())


class Runner:
    """Leases what waits, and ends it at once, with a usage record of each."""

    def __init__(self, jobs: JobStore) -> None:
        self.jobs = jobs
        self.ended: dict[str, float] = {}
        self._stop = Event()
        self._thread = Thread(target=self._run)

    def __enter__(self) -> "Runner":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with ThreadPoolExecutor(ENDERS) as enders:
            under_way: set[str] = set()
            while not self._stop.is_set():
                free = MAX_ACTIVE - len(under_way)
                if not free or not self.jobs.waiting(["mock"], time.time()):
                    self._stop.wait(POLL_SECONDS)
                    continue
                found = self.jobs.lease("runner", ["mock"], free, now=time.time(), lease_seconds=15, tenant_active=MAX_ACTIVE)
                under_way.update(row.id for row, _ in found)
                for row, _ in found:
                    enders.submit(self._end, row, under_way)

    def _end(self, row: JobRow, under_way: set[str]) -> None:
        now = time.time()
        usage = UsageRow(time=now, request_id=row.request_id, tenant=row.tenant, key=row.key, model=row.model, outcome="success")
        done = self.jobs.end(row.id, "runner", status=JobStatus.COMPLETE, result=JobResult(raw=b"done"), usage=[usage], now=now)
        assert done is not None
        self.ended[row.id] = time.perf_counter()
        under_way.discard(row.id)

    def wait(self, num: int, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while len(self.ended) < num:
            if time.monotonic() > deadline:
                raise SystemExit(f"only {len(self.ended)} of {num} jobs ended in {seconds:g} s")
            time.sleep(0.002)


# Workloads: each returns a row's fields


def chain(jobs: JobStore, size: "Size") -> dict[str, float]:
    """As fast as it goes: all threads submit while the runner works."""
    with Runner(jobs) as runner, ThreadPoolExecutor(SUBMITTERS) as threads, Spent() as spent:
        list(threads.map(lambda _: submit(jobs, job()), range(size.jobs)))
        submitted = spent.seconds()
        runner.wait(size.jobs)
    return spent.told(size.jobs) | {"jobs_per_s": size.jobs / spent.wall, "submits_per_s": size.jobs / submitted}


def rate(jobs: JobStore, size: "Size") -> dict[str, float]:
    """Submitted at a fixed rate, whether or not those before are answered: how long each submit takes, and how long until its job has ended."""
    num = int(size.seconds * RATE)
    took: list[float] = []
    begun: dict[str, float] = {}

    def one(at: float) -> None:
        row = job()
        submit(jobs, row)
        begun[row.id] = at
        took.append(time.perf_counter() - at)

    with Runner(jobs) as runner, ThreadPoolExecutor(SUBMITTERS) as threads, Spent() as spent:
        start = time.perf_counter()
        for number in range(num):
            at = start + number / RATE
            time.sleep(max(0.0, at - time.perf_counter()))
            threads.submit(one, at)
        runner.wait(num)
    ends = [runner.ended[id] - at for id, at in begun.items()]
    return spent.told(num) | quantiles("submit", took) | quantiles("end", ends)


def deep(jobs: JobStore, size: "Size") -> dict[str, float]:
    """What leasing and asking cost where many wait: a thousand jobs of each of many tenants."""
    with ThreadPoolExecutor(64) as threads:
        list(threads.map(lambda number: submit(jobs, job(f"t{number % size.tenants}")), range(size.tenants * 1000)))
    last = job("t0")
    with Spent() as spent:
        timed = {
            "submit": repeated(lambda: submit(jobs, job("late"))),
            "waiting": repeated(lambda: jobs.waiting(["mock"], time.time())),
            "position": repeated(lambda: jobs.position(last)),
            "sweep": repeated(lambda: jobs.sweep(time.time(), lambda _: 1.0)),
            "lease_1": repeated(lambda: jobs.lease("a", ["mock"], 1, now=time.time(), lease_seconds=DAY, tenant_active=24)),
            "lease_64": repeated(lambda: jobs.lease("b", ["mock"], 64, now=time.time(), lease_seconds=DAY, tenant_active=1000)),
        }
    return spent.told(size.tenants * 1000) | {f"{name}_ms": value for name, value in timed.items()}


WORKLOADS: dict[str, Callable[[JobStore, "Size"], dict[str, float]]] = {"chain": chain, "rate": rate, "deep": deep}


class Size:
    def __init__(self, *, quick: bool) -> None:
        self.jobs = 1000 if quick else 8000
        self.seconds = 5.0 if quick else 30.0
        self.tenants = 5 if quick else 50


class Spent:
    """Wall time, and the CPU of this process and of everybody else."""

    def __enter__(self) -> "Spent":
        self._wall, self._cpu, self._machine = time.perf_counter(), time.process_time(), machine_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = self.seconds()
        self.cpu = time.process_time() - self._cpu
        self.others = max(0.0, machine_seconds() - self._machine - self.cpu)

    def seconds(self) -> float:
        return time.perf_counter() - self._wall

    def told(self, num: int) -> dict[str, float]:
        return {"jobs": num, "seconds": self.wall, "cpu_us_per_job": self.cpu / num * 1e6, "other_cores": self.others / self.wall}


def machine_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def repeated(call: Callable[[], object], times: int = 20) -> float:
    """Milliseconds, the median."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return median(took) * 1e3


def quantiles(name: str, values: list[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {f"{name}_{label}_ms": ranked[int(share * (len(ranked) - 1))] * 1e3 for label, share in (("p50", 0.5), ("p99", 0.99))}


# A run


@contextmanager
def stores(names: list[str]) -> Iterator[dict[str, Callable[[], str]]]:
    """What makes an empty database of each kind, with the settings of those who want to keep their data."""
    with tempfile.TemporaryDirectory() as folder, private_postgres(fsync="on") as postgres:
        numbers = count()
        kinds = {"sqlite": lambda: f"sqlite:///{folder}/{next(numbers)}.db", "postgres": postgres.new_database}
        yield {name: kinds[name] for name in names}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    size = Size(quick=args.quick)
    rows: list[dict[str, Any]] = []
    with stores(args.store) as databases:
        for number in range(args.rounds):
            for workload in args.workloads:
                for name, new in databases.items():
                    store = Store.open(new())
                    try:
                        row = {"store": name, "workload": workload, "round": number} | WORKLOADS[workload](store.jobs, size)
                    finally:
                        store.close()
                    rows.append(row)
                    shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
                    print(json.dumps(shown), flush=True)
    return rows


COLUMNS = (
    (f"jobs/s through submit, lease, end (at least {TARGET_JOBS})", "chain", "jobs_per_s"),
    ("CPU us/job of this process", "chain", "cpu_us_per_job"),
    (f"submit p50 ms at {RATE:g}/s", "rate", "submit_p50_ms"),
    (f"submit p99 ms at {RATE:g}/s (under {TARGET_P99_MS})", "rate", "submit_p99_ms"),
    ("submit to end p50 ms", "rate", "end_p50_ms"),
    ("submit to end p99 ms", "rate", "end_p99_ms"),
    ("many wait: submit ms", "deep", "submit_ms"),
    ("... is anything due ms", "deep", "waiting_ms"),
    ("... position ms", "deep", "position_ms"),
    ("... sweep ms", "deep", "sweep_ms"),
    ("... lease of 1 ms", "deep", "lease_1_ms"),
    ("... lease of 64 ms", "deep", "lease_64_ms"),
)


def middle(rows: list[dict[str, Any]], store: str, workload: str, field: str) -> float | None:
    found: list[float] = [row[field] for row in rows if row["store"] == store and row["workload"] == workload and field in row]
    return median(found) if found else None


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Jobs that compute nothing, 1 KiB each; medians of the rounds")
    table.add_column("")
    names = list(dict.fromkeys(row["store"] for row in rows))
    for name in names:
        table.add_column(name, justify="right")
    for title, workload, field in COLUMNS:
        values = [middle(rows, name, workload, field) for name in names]
        if any(value is not None for value in values):
            table.add_row(title, *("" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for value in values))
    disturbed = [sum(row["other_cores"] > DISTURBED_CORES for row in rows if row["store"] == name) for name in names]
    table.add_row("measurements with other work (PostgreSQL's own counts)", *map(str, disturbed))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the numbers are rough")
    parser.add_argument("--store", nargs="+", choices=("sqlite", "postgres"), default=["sqlite", "postgres"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=0, help="[default: 3; 1 with --quick]")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    rows = run(args)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    show(rows)
    print(path)


if __name__ == "__main__":
    main()
