"""What tracing costs a tensor request: the same server with traces off, as configured by default, and with every request exported.

    python benchmarks/observe/tracing.py [--rounds 5] [--seconds 3] [--connections 16]      Markdown on stdout
    python benchmarks/observe/tracing.py --telemetry ...      all telemetry on against all of it off, in place of traces alone

The servers run side by side and are asked in turns, in another order each round; every number is held against `off` of the same
round; `off again` says what chance does to them. Load and collector are processes of their own; the collector reads and answers. Requests are KServe JSON to an identity model,
the cheapest there is: whatever does work pays less.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.servers import IDENTITY, write_model

ARMS = {
    "off": "",
    "off again": "",
    "default": "traces: {{endpoint: '{url}'}}\n",
    "all": "traces: {{endpoint: '{url}', max_per_second: 0, max_queue: 100000}}\n",
}
NOTHING = "ui: {{enabled: false}}\nmetrics: {{gil: false, max_tenants: 0}}\nrequests: {{keep: 0, failed: 0, slow: 0}}\nlogs: {{requests: false}}\n"
TELEMETRY = {
    "off": NOTHING,
    "off again": NOTHING,
    "as it comes": "",
    "everything": "traces: {{endpoint: '{url}'}}\nslos:\n- {{name: up, kind: availability}}\n- {{name: fast, kind: latency, threshold: 0.1}}\n",
}
"""Timelines are kept in any case."""
BODY = json.dumps({"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()


class Collector(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *_: object) -> None:
        pass


def collect(told: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    told.send(server.server_address[1])
    server.serve_forever()


class Client(asyncio.Protocol):
    """One connection that asks again and again."""

    def __init__(self, request: bytes, until: float, seconds: list[float]) -> None:
        self.request = request
        self.until = until
        self.seconds = seconds
        self.sent = 0.0
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.ask()

    def ask(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        assert data.startswith(b"HTTP/1.1 200"), data  # answers are small: one read each
        now = time.perf_counter()
        self.seconds.append(now - self.sent)
        if now < self.until:
            self.ask()
        else:
            self.transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        self.closed.set_result(None)


def load(url: str, seconds: float, connections: int, told: Connection) -> None:
    target = urlsplit(url)
    head = f"POST /v2/models/identity/infer HTTP/1.1\r\nhost: {target.netloc}\r\ncontent-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"

    async def run() -> list[float]:
        loop, took = asyncio.get_running_loop(), list[float]()
        until = time.perf_counter() + seconds
        clients = []
        for _ in range(connections):
            _, client = await loop.create_connection(lambda: Client(head.encode() + BODY, until, took), target.hostname, target.port)
            clients.append(client)
        await asyncio.gather(*(client.closed for client in clients))
        return took

    told.send(uvloop.run(run()))


class Quiet:
    """A server whose lines go into a file, as in production: here nobody's processor time is spent on reading them."""

    def __init__(self, config: Path, models: Path, *flags: str) -> None:
        self.log = config.with_suffix(".log")
        command = [sys.executable, "-m", "fairlead", "serve", models, "--config", config, "--log-format", "json", *flags]
        ports = [f"--{name}=0" for name in ("port", "grpc-port", "ops-port")]
        self.process = subprocess.Popen([*map(str, command), *ports], stderr=self.log.open("w"))
        self.http = self.ops = ""

    def __enter__(self) -> "Quiet":
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline and not self.http:
            time.sleep(0.1)
            for line in self.log.read_text().splitlines():
                if '"serving"' in line:
                    told = json.loads(line)
                    self.http, self.ops = told["http"], told["ops"]
        if not self.http:
            raise RuntimeError(self.log.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60.0)


def measure(server: Quiet, seconds: float, connections: int) -> dict[str, float]:
    process = psutil.Process(server.process.pid)
    ours, theirs = multiprocessing.Pipe()
    before, began = process.cpu_times(), time.perf_counter()
    asking = multiprocessing.get_context("spawn").Process(target=load, args=(server.http, seconds, connections, theirs))
    asking.start()
    if not ours.poll(seconds + 60.0):
        raise TimeoutError("the load did not end")
    took = sorted(ours.recv())
    asking.join()
    after = process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return {
        "requests/s": len(took) / sum(took) * connections,
        "p50 ms": took[len(took) // 2] * 1e3,
        "p99 ms": took[int(len(took) * 0.99)] * 1e3,
        "CPU us/request": cpu / len(took) * 1e6,
        "wall": time.perf_counter() - began,
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=3.0)
    options.add_argument("--connections", type=int, default=16)
    options.add_argument("--telemetry", action="store_true")
    given = options.parse_args()
    arms = TELEMETRY if given.telemetry else ARMS
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model(folder / "models", "identity", IDENTITY)
        ours, theirs = multiprocessing.Pipe()
        collector = multiprocessing.get_context("spawn").Process(target=collect, args=(theirs,), daemon=True)
        collector.start()
        stack.callback(collector.terminate)
        url = f"http://127.0.0.1:{ours.recv()}"
        servers: dict[str, Quiet] = {}
        for arm, text in arms.items():
            config = folder / f"{arm.replace(' ', '-')}.yaml"
            config.write_text(text.format(url=url) or "{}")
            servers[arm] = stack.enter_context(Quiet(config, folder / "models", *(() if given.telemetry else ("--no-log-requests",))))
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(-1, given.rounds):
            names = list(arms)[number % len(arms) :] + list(arms)[: number % len(arms)]
            found = {arm: measure(servers[arm], given.seconds, given.connections) for arm in names}
            if number >= 0:  # the first one warms them
                rounds.append(found)
        show(rounds)
        for arm in [arm for arm, text in arms.items() if "traces" in text]:
            with urllib.request.urlopen(f"{servers[arm].ops}/metrics", timeout=10.0) as answer:
                text = answer.read().decode()
            counted = [line for line in text.splitlines() if line.startswith("fairlead_traces_total")]
            print(f"\n{arm}: {', '.join(counted)}")


def show(rounds: list[dict[str, dict[str, float]]]) -> None:
    columns = ["requests/s", "p50 ms", "p99 ms", "CPU us/request"]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for arm in rounds[0]:
        cells = []
        for column in columns:
            middle = statistics.median(each[arm][column] for each in rounds)
            ratio = statistics.median(each[arm][column] / each["off"][column] for each in rounds)
            cells.append(f"{middle:,.4g} ({ratio:.3f})")
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
