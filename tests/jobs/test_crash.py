"""Processes that are killed at any moment: no job is lost, none is answered or billed twice."""

import asyncio
import json
import random
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import aiohttp
import psutil
import pytest

from fairlead.core.jobs import ENDED, JobStatus
from fairlead.jobs.fake_receiver import FakeReceiver
from fairlead.store.job_rows import JobQuery
from fairlead.store.rows import UsageQuery
from fairlead.store.store import Store
from tests.servers import Serving

NUM_JOBS = 200
NUM_PICTURES = 2
STEP_SECONDS, NUM_STEPS = 0.05, 5
SERVER_KILLS, REPLICA_KILLS = 3, 6
SECONDS = 120.0
"""After which all of it must be over; it takes a quarter of that."""
SERVER = """
import sys
from fairlead.backends.fake_painter import KIND
from fairlead.backends.table import BACKENDS
BACKENDS[KIND.name] = KIND
from fairlead.cli import main
main()
"""
CONFIG = """
store: {{url: "{url}"}}
auth: {{required: false}}
jobs: {{lease_seconds: 1, tries: 100, max_active: 6, tenant_active: 64}}
artifacts: {{url: "{folder}/artifacts"}}
webhooks: {{allow: [127.0.0.0/8], timeout: 2, retries: [0.2, 0.5, 1, 1, 1, 1, 1, 1]}}
logs: {{requests: false}}
"""
MODEL = f"""
backend: fake_painter
parameters: {{step_seconds: {STEP_SECONDS}, num_steps: {NUM_STEPS}, size: 16}}
"""


class Servers:
    """Some that share a store, and whoever kills them."""

    def __init__(self, folder: Path, url: str, num: int) -> None:
        self.folder = folder
        (folder / "models" / "painter" / "1").mkdir(parents=True)
        (folder / "models" / "painter" / "1" / "painter").touch()
        (folder / "models" / "painter" / "model.yaml").write_text(MODEL)
        (folder / "server.py").write_text(SERVER)
        (folder / "fairlead.yaml").write_text(CONFIG.format(url=url, folder=folder))
        self.num = num
        self.running: list[Serving] = []
        self.orphans: list[psutil.Process] = []

    async def start(self) -> None:
        ports = [part for name in ("--port", "--grpc-port", "--ops-port") for part in (name, "0")]
        config = ["--config", self.folder / "fairlead.yaml", "--log-format", "json"]
        command = list(map(str, [sys.executable, self.folder / "server.py", "serve", self.folder / "models", *config, *ports]))
        server = Serving(self.process(command))
        try:
            await asyncio.to_thread(server.begin)
        except BaseException:
            await self.end(server)
            raise
        self.running.append(server)

    def process(self, command: list[str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    async def kill(self, server: Serving) -> None:
        self.running.remove(server)
        with suppress(psutil.NoSuchProcess):
            self.orphans += psutil.Process(server.process.pid).children(recursive=True)
        await self.end(server)

    async def end(self, server: Serving) -> None:
        server.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(server.process.wait, 30)
        await asyncio.to_thread(server._reader.join, 10)
        if server.process.stderr is not None:
            server.process.stderr.close()

    def kill_replica(self, server: Serving, chance: random.Random) -> bool:
        """One of the processes that compute: children of the fork server."""
        with suppress(psutil.NoSuchProcess):
            replicas = [each for child in psutil.Process(server.process.pid).children() for each in child.children()]
            if replicas:
                chance.choice(replicas).send_signal(signal.SIGKILL)
                return True
        return False

    async def close(self) -> None:
        for server in list(self.running):
            await self.kill(server)
        deadline = asyncio.get_running_loop().time() + 20
        while left := [each for each in self.orphans if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]:
            assert asyncio.get_running_loop().time() < deadline, f"processes outlived their server: {left}"
            await asyncio.sleep(0.05)


async def hand_in(session: aiohttp.ClientSession, servers: Servers, number: int, receiver: FakeReceiver, chance: random.Random) -> str:
    """As a careful client: until somebody has taken it, and with a key that says that it is always the same wish."""
    wish = {"model": "painter", "input": {"prompt": f"picture {number}", "n": NUM_PICTURES}, "webhook": {"url": receiver.url}}
    while True:
        if servers.running:
            url = chance.choice(servers.running).http
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.post(f"{url}/v1/jobs", json=wish, headers={"Idempotency-Key": f"wish-{number}"}) as response:
                    said = await response.text()
                    if response.status < 300:
                        return str(json.loads(said)["id"])
                    # a server knows its models only when it has loaded them
                    assert response.status in {404, 503}, said
        await asyncio.sleep(0.05)


async def misfortune(servers: Servers, store: Store, chance: random.Random) -> None:
    """Kills servers and replicas, each when so many jobs have ended as chance wants, and starts servers again."""
    whom = ["server"] * SERVER_KILLS + ["replica"] * REPLICA_KILLS
    chance.shuffle(whom)
    for kind, num in zip(whom, sorted(chance.sample(range(NUM_JOBS * 9 // 10), len(whom))), strict=True):
        while await asyncio.to_thread(ended, store) < num:
            await asyncio.sleep(0.01)
        await asyncio.sleep(chance.uniform(0.0, STEP_SECONDS * NUM_STEPS))
        victim = chance.choice(servers.running)
        if kind == "server":
            await servers.kill(victim)
            await servers.start()
        else:
            servers.kill_replica(victim, chance)


def ended(store: Store) -> int:
    return len(store.jobs.list(JobQuery(statuses=tuple(ENDED), limit=2 * NUM_JOBS)))


def bills(store: Store) -> list[str]:
    return [row.request_id for row in store.records(UsageQuery(), 10_000) if row.outcome == "success"]


@pytest.mark.parametrize("kind", ["one server on SQLite", "two servers on PostgreSQL"])
async def test_two_hundred_jobs_survive_any_number_of_kills(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    sqlite = kind.endswith("SQLite")
    url = f"sqlite:///{tmp_path}/fairlead.db" if sqlite else request.getfixturevalue("postgres").new_database()
    chance = random.Random()
    servers = Servers(tmp_path, url, 1 if sqlite else 2)
    store = Store.open(url)
    async with AsyncExitStack() as stack, asyncio.timeout(SECONDS):
        stack.callback(store.close)
        stack.push_async_callback(servers.close)
        receiver = await stack.enter_async_context(FakeReceiver())
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)))
        await asyncio.gather(*(servers.start() for _ in range(servers.num)))
        killer = asyncio.get_running_loop().create_task(misfortune(servers, store, chance))
        stack.callback(killer.cancel)
        room = asyncio.Semaphore(16)

        async def one(number: int) -> str:
            async with room:
                return await hand_in(session, servers, number, receiver, chance)

        ids = await asyncio.gather(*map(one, range(NUM_JOBS)))
        assert len(set(ids)) == NUM_JOBS
        await killer
        while await asyncio.to_thread(ended, store) < NUM_JOBS:
            await asyncio.sleep(0.05)
        found = await asyncio.to_thread(store.jobs.list, JobQuery(limit=2 * NUM_JOBS, whole=True))
        assert {row.id for row in found} == set(ids), "none lost, none made twice"
        assert {(row.status, row.reason) for row in found} == {(JobStatus.COMPLETE, "")}
        assert sum(row.tries for row in found) > NUM_JOBS, "nothing was killed in time: the test has proved nothing"
        billed = await asyncio.to_thread(bills, store)
        assert sorted(billed) == sorted(ids), "each billed once"
        for row in found:
            assert row.result is not None and len(row.result.artifacts) == NUM_PICTURES
            for artifact in row.result.artifacts:
                assert (tmp_path / "artifacts" / artifact.key).stat().st_size == artifact.num_bytes
        told: set[str] = set()
        while told != set(ids):
            told = {json.loads(each.body)["data"]["id"] for each in receiver.received}
            await asyncio.sleep(0.05)
        # Whoever receives a call twice knows it by its id.
        assert len({each.headers["webhook-id"] for each in receiver.received}) == NUM_JOBS
        tries = [row.tries for row in found]
        print(f"{kind}: {sum(tries) - NUM_JOBS} tries more than jobs, {max(tries)} at most, {len(receiver.received)} calls")
