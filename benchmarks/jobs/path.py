"""What a job costs through a whole server.  python path.py [--quick] [--store sqlite postgres] [--profile]

`fairlead serve` in a process of its own, with a model that gives back what it gets: jobs are handed in by HTTP, run, and end in the
store. The store's own share is what bench.py measures.
"""

import argparse
import asyncio
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from bench import HERE, RATE, Spent, quantiles, stores

from fairlead.store.job_rows import JobQuery
from fairlead.store.store import Store
from tests.servers import IDENTITY, Serving, serving, write_model

assert HERE.name == "jobs"
CONNECTIONS = 32
BODY = json.dumps(
    {"model": "same", "input": {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0]}]}}
).encode()
CONFIG = """
store: {{url: "{url}"}}
auth: {{required: false}}
jobs: {{tenant_active: 64, tenant_queued: 1000000}}
logs: {{requests: false}}
"""


async def submit(session: aiohttp.ClientSession, url: str) -> None:
    async with session.post(f"{url}/v1/jobs", data=BODY) as response:
        assert response.status == 202, await response.text()
        await response.read()


async def ended(session: aiohttp.ClientSession, ops: str) -> int:
    """How many are complete; none may have come to anything else."""
    async with session.get(f"{ops}/metrics") as response:
        text = await response.text()
    found = dict(re.findall(r'^fairlead_jobs_total{[^}]*status="(\w+)"[^}]*} (\d+)', text, re.MULTILINE))
    assert found.keys() <= {"complete"}, found
    return int(found.get("complete", 0))


async def all_ended(session: aiohttp.ClientSession, ops: str, num: int) -> None:
    async with asyncio.timeout(300):
        while await ended(session, ops) < num:  # noqa: ASYNC110 -- another process counts them
            await asyncio.sleep(0.05)


async def chain(session: aiohttp.ClientSession, server: Serving, store: Store, num: int) -> dict[str, float]:
    """As fast as it goes."""
    left = iter(range(num))
    before = await ended(session, server.ops)

    async def one_connection() -> None:
        for _ in left:
            await submit(session, server.http)

    with Spent() as spent:
        await asyncio.gather(*(one_connection() for _ in range(CONNECTIONS)))
        submitted = spent.seconds()
        await all_ended(session, server.ops, before + num)
    return spent.told(num) | {"jobs_per_s": num / spent.wall, "submits_per_s": num / submitted}


async def rate(session: aiohttp.ClientSession, server: Serving, store: Store, num: int) -> dict[str, float]:
    """At a fixed rate, whether or not those before are answered."""
    took: list[float] = []
    before = await ended(session, server.ops)

    async def one(at: float) -> None:
        await submit(session, server.http)
        took.append(time.perf_counter() - at)

    with Spent() as spent:
        start = time.perf_counter()
        tasks = []
        for number in range(num):
            at = start + number / RATE
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.append(asyncio.create_task(one(at)))
        await asyncio.gather(*tasks)
        await all_ended(session, server.ops, before + num)
    rows = store.jobs.list(JobQuery(limit=num))
    return spent.told(num) | quantiles("submit", took) | quantiles("end", [(row.ended or 0.0) - row.created for row in rows])


async def measure(server: Serving, database: str, *, quick: bool) -> list[dict[str, float]]:
    store = Store.open(database)
    cpu = psutil.Process(server.process.pid)
    rows = []
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
            await submit(session, server.http)
            await all_ended(session, server.ops, 1)
            for workload, num in ((chain, 1000 if quick else 8000), (rate, int(RATE * (5 if quick else 30)))):
                before = cpu.cpu_times()
                row: dict[str, Any] = {"workload": workload.__name__} | await workload(session, server, store, num)
                after = cpu.cpu_times()
                row["server_us_per_job"] = (after.user + after.system - before.user - before.system) / num * 1e6
                rows.append(row)
    finally:
        store.close()
    return rows


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with stores(args.store) as databases:
        for number in range(args.rounds):
            for name, new in databases.items():
                with tempfile.TemporaryDirectory() as folder:
                    root, database = Path(folder), new()
                    write_model(root / "models", "same", IDENTITY)
                    (root / "fairlead.yaml").write_text(CONFIG.format(url=database))
                    with serving(root / "models", "--config", root / "fairlead.yaml") as server:
                        measured = asyncio.run(measure(server.begin(), database, quick=args.quick))
                        server.terminate()
                for row in measured:
                    row = {"store": name, "path": "http", "round": number} | row
                    rows.append(row)
                    print(
                        json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}), flush=True
                    )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--store", nargs="+", default=["sqlite", "postgres"])
    parser.add_argument("--rounds", type=int, default=1)
    run(parser.parse_args())
