"""Rollouts through a whole server under load.  python live.py [--swaps 50] [--json FILE]

`fairlead serve` in a process of its own; everything is asked over HTTP, as a user would.

swaps      one version after the other takes all of the traffic (policy without steps), each loaded, swapped and the one before unloaded,
           while clients ask without a pause: how many requests failed, and what the slowest one took against the same without swaps.
rollback   a candidate with half of the traffic begins to answer NaN: when the breaker decided, and when the last request that was sent
           to it left its client.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from msgspec import Struct, field

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.servers import Serving, serving

CLIENTS = 16
MODEL = """
import numpy as np

class Model:
    example = {{"x": np.zeros((1, 4), np.float32)}}

    def infer(self, inputs):
        x = inputs["x"]
        return {{"y": np.where(x > 1e6, np.nan, x + {add}) if {spoils} else x + {add}}}
"""
SPEC = "instances: {isolation: thread}\noutputs:\n  - {name: y, datatype: FP32, shape: [-1, 4]}\n"
CONFIG = """
store: {{url: "sqlite:///{folder}/fairlead.db"}}
logs: {{requests: false}}
control:
  tick_seconds: 0.2
  policies:
    swap: {{steps: [], validate: false, rollback_seconds: 0.5, interval: 0.2}}
    half: {{steps: [{{share: 0.5, hold: true}}], validate: false, interval: 0.2}}
"""
GOOD, SPOILED = 1.0, 1e7


class Asked(Struct):
    """What the clients saw."""

    value: float = GOOD
    sent: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def body(value: float) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}]}).encode()


async def client(session: aiohttp.ClientSession, url: str, asked: Asked, stop: asyncio.Event) -> None:
    bodies = {value: body(value) for value in (GOOD, SPOILED)}
    while not stop.is_set():
        sent = time.time()
        try:
            async with session.post(url, data=bodies[asked.value]) as response:
                text = await response.text()
        except aiohttp.ClientError as error:
            asked.failed.append(repr(error))
            continue
        asked.sent.append(sent)
        asked.seconds.append(time.time() - sent)
        if response.status != 200:
            asked.failed.append(text[:200])
        else:
            asked.versions.append(json.loads(text.replace("NaN", "null"))["model_version"])
            continue
        asked.versions.append("")


class Admin:
    def __init__(self, session: aiohttp.ClientSession, server: Serving) -> None:
        self.session = session
        self.url = server.ops

    async def ask(self, method: str, path: str, value: Any = None) -> Any:
        async with self.session.request(method, self.url + path, json=value) as response:
            told = await response.json(content_type=None)
            assert response.status < 400, told
            return told

    async def add(self, folder: Path, number: int, *, spoils: bool = False) -> None:
        source = folder / f"source-{number}"
        (source / "1").mkdir(parents=True)
        (source / "1" / "model.py").write_text(MODEL.format(add=number, spoils=spoils))
        (source / "model.yaml").write_text(SPEC)
        await self.ask("POST", "/admin/models/add/versions", {"uri": str(source)})

    async def roll(self, number: int, policy: str, *until: str) -> dict[str, Any]:
        started = await self.ask("POST", "/admin/rollouts", {"candidates": [f"add@{number}"], "policy": policy})
        return await self.wait(started["id"], *until)

    async def wait(self, id: str, *until: str) -> dict[str, Any]:
        async with asyncio.timeout(120):
            while (told := await self.ask("GET", f"/admin/rollouts/{id}"))["phase"] not in until:
                assert told["phase"] != "aborted", told["reason"]
                await asyncio.sleep(0.02)
        return dict(told)


async def under_load(session: aiohttp.ClientSession, server: Serving, asked: Asked, work: Any) -> Any:
    stop = asyncio.Event()
    url = f"{server.http}/v2/models/add/infer"
    clients = [asyncio.create_task(client(session, url, asked, stop)) for _ in range(CLIENTS)]
    try:
        return await work
    finally:
        stop.set()
        await asyncio.gather(*clients)


async def swaps(session: aiohttp.ClientSession, server: Serving, admin: Admin, folder: Path, numbers: list[int]) -> dict[str, Any]:
    quiet = Asked()
    await under_load(session, server, quiet, asyncio.sleep(5.0))
    asked, began = Asked(), time.time()

    async def swap() -> None:
        for done, number in enumerate(numbers, 1):
            await admin.add(folder, number)
            await admin.roll(number, "swap", "complete")
            print(f"\r{done} of {len(numbers)} swaps, {len(asked.sent):,} requests", end="", flush=True)
        print()

    await under_load(session, server, asked, swap())
    return {
        "swaps": len(numbers),
        "seconds": time.time() - began,
        "requests": len(asked.sent),
        "failed": len(asked.failed),
        "failures": sorted(set(asked.failed))[:5],
        "versions_that_answered": len(set(asked.versions)),
        "p50_ratio": statistics.median(asked.seconds) / statistics.median(quiet.seconds),
        "p99_ratio": statistics.quantiles(asked.seconds, n=100)[98] / statistics.quantiles(quiet.seconds, n=100)[98],
        "slowest_ms": max(asked.seconds) * 1e3,
        "slowest_without_ms": max(quiet.seconds) * 1e3,
    }


async def rollback(session: aiohttp.ClientSession, server: Serving, admin: Admin, folder: Path, number: int) -> dict[str, Any]:
    await admin.add(folder, number, spoils=True)
    rollout = await admin.roll(number, "half", "progressing")
    asked = Asked()

    async def spoil() -> float:
        await asyncio.sleep(2.0)
        asked.value = SPOILED
        spoiled_at = time.time()
        async with asyncio.timeout(30):
            while (await admin.ask("GET", f"/admin/rollouts/{rollout['id']}"))["phase"] != "aborted":  # noqa: ASYNC110 -- another process decides
                await asyncio.sleep(0.005)
        await asyncio.sleep(2.0)
        return spoiled_at

    spoiled_at = await under_load(session, server, asked, spoil())
    events = (await admin.ask("GET", f"/admin/audit?subject=add@{number}&limit=50"))["entries"]
    decided = next(event["time"] for event in events if event["action"] == "rollout.abort")
    decided_at = _seconds(decided)
    bad = [sent for sent, version in zip(asked.sent, asked.versions, strict=True) if version == str(number)]
    return {
        "requests": len(asked.sent),
        "failed": len(asked.failed),
        "to_the_candidate": len(bad),
        "decided_after_first_nan_ms": (decided_at - spoiled_at) * 1e3,
        "last_sent_to_it_after_decision_ms": (max(bad) - decided_at) * 1e3,
        "sent_to_it_more_than_100_ms_after_decision": sum(sent > decided_at + 0.1 for sent in bad),
        "requests_after_that": sum(sent > decided_at + 0.1 for sent in asked.sent),
    }


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


async def main(num_swaps: int, num_rollbacks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "fairlead.yaml"
        config.write_text(CONFIG.format(folder=folder))
        (folder / "none").mkdir()
        with serving(folder / "none", "--config", str(config)) as server:
            server.begin()
            timeout = aiohttp.ClientTimeout(total=60)
            async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
                admin, numbers = Admin(session, server), itertools.count(1)
                first = next(numbers)
                await admin.add(folder, first)
                await admin.roll(first, "swap", "complete")
                found: dict[str, Any] = {"swaps": await swaps(session, server, admin, folder, [next(numbers) for _ in range(num_swaps)])}
                found["rollbacks"] = [await rollback(session, server, admin, folder, next(numbers)) for _ in range(num_rollbacks)]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--rollbacks", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = json.dumps(asyncio.run(main(options.swaps, options.rollbacks)), indent=2)
    print(measured)
    if options.json is not None:
        options.json.write_text(measured + "\n")
