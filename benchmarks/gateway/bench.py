"""Gateways side by side over one mock upstream.  python bench.py [--quick] [--only fairlead litellm] [--rounds 3]

Workloads run in turns: every peer does one, then every peer does the next, round after round.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil
from peers import FAIRLEAD, HERE, PEERS, Peer
from rich.console import Console
from rich.table import Table

RESULTS = HERE / "results"
START_SECONDS = 120
WARMUP_SECONDS = 2.0
STREAM_CHUNKS = 64
BODY = {
    "model": "mock",
    "messages": [{"role": "system", "content": "You answer. " * 10}, {"role": "user", "content": "How is the weather at sea? " * 35}],
    "max_tokens": 64,
    "temperature": 0,
}
"""1.2 KB; its answer has 0.8 KB."""
PACE = 0.002
SLOW_PACE = 0.020
STALL = 10 * SLOW_PACE
DISTURBED_CORES = 0.25
"""Taken by other work on the machine while a peer was measured."""


class LoadFailed(RuntimeError):
    """A peer that did not finish the work."""


class Server:
    """A started process and all it starts."""

    def __init__(self, command: list[str], log: Path, environ: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | (environ or {}), start_new_session=True, cwd=log.parent
            )
        self.root = psutil.Process(self.process.pid)

    def tree(self) -> list[psutil.Process]:
        return [self.root, *self.root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system seconds of all of them and of those that ended, from /proc."""
        return sum(sum(process.cpu_times()[:4]) for process in self.tree())

    def rss_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self.tree())

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        processes = self.tree() if self.process.poll() is None else []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=15)
        for process in alive:
            process.kill()
        self.process.wait(15)


class Running:
    """A peer that answers."""

    def __init__(self, peer: Peer, folder: Path, url: str, upstream: Server) -> None:
        self.peer = peer
        self.upstream = upstream
        start = peer.start(folder, free_port(), url)
        self.url = f"{start.url}/v1/chat/completions"
        self.headers = {"authorization": f"Bearer {start.key}"}
        self.server = Server(start.command, folder / "server.log", start.environ)
        self.rps = 0.0

    def wait(self) -> None:
        """Until it answers as it should."""
        deadline = time.monotonic() + START_SECONDS
        request = urllib.request.Request(self.url, json.dumps(BODY).encode(), self.headers | {"content-type": "application/json"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    told = json.loads(answer.read())
                assert told["usage"]["completion_tokens"] == STREAM_CHUNKS, told
                return
            except OSError as error:
                if time.monotonic() > deadline or self.server.process.poll() is not None:
                    told = error.read() if isinstance(error, urllib.error.HTTPError) else b""
                    raise SystemExit(
                        f"{self.peer.name} does not answer: {error} {told!r}; its log ends with:\n{self.server.tail()}"
                    ) from None
                time.sleep(0.3)

    def load(self, **spec: object) -> dict:
        """What the load saw, and what the peer spent on it."""
        stream = {"stream": True, "stream_options": {"include_usage": True}} if spec["mode"] == "streams" else {}
        body = BODY | stream | {"max_tokens": spec.pop("max_tokens", STREAM_CHUNKS)}
        spec |= {"url": self.url, "headers": self.headers, "body": json.dumps(body)}
        cpu, upstream, machine = self.server.cpu_seconds(), self.upstream.cpu_seconds(), machine_seconds()
        command = [sys.executable, str(HERE / "load.py"), json.dumps(spec)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            memory = []
            told = {}
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                memory.append((told["requests"], self.server.rss_bytes()))
        if process.returncode:
            raise LoadFailed(f"the load on {self.peer.name} failed; its log ends with:\n{self.server.tail()}")
        told["server_cpu_seconds"] = self.server.cpu_seconds() - cpu
        machine, upstream = machine_seconds() - machine, self.upstream.cpu_seconds() - upstream
        told["other_cores"] = max(0.0, machine - upstream - told["server_cpu_seconds"] - told["cpu_seconds"]) / told["seconds"]
        told["memory"] = memory
        return told


def machine_seconds() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def script(upstream: str, **fields: object) -> None:
    """Tell the mock upstream how to answer."""
    request = urllib.request.Request(f"{upstream}/script", json.dumps(fields).encode(), method="PUT")
    urllib.request.urlopen(request, timeout=10).close()


# Workloads: each returns a row's fields


def unary(running: Running, upstream: str, size: "Size") -> dict:
    script(upstream, chunks=STREAM_CHUNKS)
    told = running.load(mode="closed", connections=16, seconds=size.seconds)
    running.rps = told["rps"]
    cpu = told["server_cpu_seconds"]
    return pick(told) | {
        "cpu_us_per_request": cpu / told["requests"] * 1e6,
        "requests_per_cpu_second": told["requests"] / cpu if cpu else 0.0,
    }


def stream(running: Running, upstream: str, size: "Size") -> dict:
    script(upstream, chunks=STREAM_CHUNKS, pace=PACE)
    told = running.load(mode="streams", connections=16, seconds=size.seconds)
    cpu = told["server_cpu_seconds"]
    return pick(told) | {"events": told["events"], "cpu_us_per_event": cpu / told["events"] * 1e6, "first_p50_ms": told["first_p50_ms"]}


def streams512(running: Running, upstream: str, size: "Size") -> dict:
    """All of them under way at once: they begin within a second and last for several."""
    script(upstream, chunks=size.slow_chunks, pace=SLOW_PACE)
    told = running.load(mode="streams", connections=512, requests=512, stall=STALL, max_tokens=size.slow_chunks)
    names = ("events", "stalls", "max_gap_ms", "gap_p99_ms", "first_p50_ms", "first_p99_ms")
    return pick(told) | {name: told[name] for name in names} | {"cpu_us_per_event": told["server_cpu_seconds"] / told["events"] * 1e6}


def latency(running: Running, upstream: str, size: "Size") -> dict:
    """At half of what it did at most, or of `rate`."""
    script(upstream, chunks=STREAM_CHUNKS)
    rate = size.rate or running.rps / 2
    told = running.load(mode="open", connections=64, rate=rate, seconds=size.seconds)
    return pick(told) | {"rate": rate}


def memory(running: Running, upstream: str, size: "Size") -> dict:
    """The resident size against the number of requests, over the last two thirds of them: a line's slope."""
    script(upstream, chunks=STREAM_CHUNKS)
    told = running.load(mode="closed", connections=16, requests=size.requests(running), report=0.5)
    points = [(num, rss) for num, rss in told["memory"] if num > told["requests"] / 3]
    return pick(told) | {"mib_at_end": points[-1][1] / 2**20, "kib_per_100k_requests": slope(points) * 1e5 / 1024}


WORKLOADS = {"unary": unary, "latency": latency, "stream": stream, "streams512": streams512, "memory": memory}


class Size:
    def __init__(self, *, quick: bool, requests: int) -> None:
        self.seconds = 3.0 if quick else 8.0
        self.slow_chunks = 150 if quick else 500
        self.rate = 0.0
        self._requests = requests or (10_000 if quick else 200_000)

    def requests(self, running: Running) -> int:
        """A slow peer gets a minute."""
        return min(self._requests, max(1000, int(running.rps * 60))) if running.peer.name != "fairlead" else self._requests


def pick(told: dict) -> dict:
    names = ("requests", "errors", "lost_connections", "seconds", "rps", "p50_ms", "p99_ms", "server_cpu_seconds", "other_cores")
    return {name: told[name] for name in names}


def slope(points: list[tuple[int, int]]) -> float:
    xs, ys = zip(*points, strict=True)
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


# A run


@contextlib.contextmanager
def serving(names: list[str], folder: Path) -> Iterator[tuple[str, list[Running]]]:
    """The upstream and every peer, all started; the idle ones wait."""
    port = free_port()
    fake = Server([FAIRLEAD, "-m", "fairlead.runtime.upstream.fake", "--port", str(port)], folder / "upstream.log")
    upstream = f"http://127.0.0.1:{port}"
    started: list[Running] = []
    try:
        wait_for_port(port)
        for name in names:
            place = folder / name
            place.mkdir()
            started.append(Running(PEERS[name], place, upstream, fake))
        for running in started:
            running.wait()
            running.load(mode="closed", connections=4, seconds=WARMUP_SECONDS)
        yield upstream, started
    finally:
        for running in started:
            running.server.stop()
        fake.stop()


def wait_for_port(port: int) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise SystemExit("the mock upstream does not start")


def run(args: argparse.Namespace) -> list[dict]:
    size = Size(quick=args.quick, requests=args.requests)
    names = [name for name in args.only if PEERS[name].installed()]
    for name in set(args.only) - set(names):
        print(f"{name} is not installed: bash setup.sh {name}", file=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as folder, serving(names, Path(folder)) as (upstream, started):
        for number in range(args.rounds):
            for name in args.workloads:
                if name == "memory" and number:
                    continue
                for running in started:
                    if running.peer.name == "direct" and name == "memory":
                        continue
                    for at in rates(name, running, started):
                        size.rate = at
                        row = {"peer": running.peer.name, "workload": name, "round": number}
                        try:
                            row |= WORKLOADS[name](running, upstream, size)
                        except LoadFailed as error:
                            print(error, file=sys.stderr)
                            row["failed"] = True
                        rows.append(row)
                        print(
                            json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}),
                            flush=True,
                        )
    return rows


def rates(workload: str, running: Running, started: list[Running]) -> list[float]:
    """The upstream itself is asked at the rate of every gateway, to tell what each adds."""
    if workload == "latency" and running.peer.name == "direct":
        return [other.rps / 2 for other in started if other is not running]
    return [0.0]


def best(rows: list[dict], peer: str, workload: str, field: str) -> float | None:
    """The median of the rounds that other work on the machine left alone, or of all where there are none."""
    of = [row for row in rows if row["peer"] == peer and row["workload"] == workload and field in row]
    quiet = [row for row in of if row["other_cores"] <= DISTURBED_CORES]
    return median(row[field] for row in quiet or of) if of else None


def added(rows: list[dict], peer: str, field: str) -> float | None:
    """Latency at half load, less the upstream's own at the same rate; the median of the rounds."""
    values = []
    for row in rows:
        if row["peer"] == peer and row["workload"] == "latency":
            bare = [r for r in rows if r["peer"] == "direct" and r["workload"] == "latency" and r["round"] == row["round"]]
            if bare:
                values.append(row[field] - min(bare, key=lambda r: abs(r["rate"] - row["rate"]))[field])
    return median(values) if values else None


COLUMNS = (
    ("CPU us/request", "unary", "cpu_us_per_request"),
    ("requests/CPU s", "unary", "requests_per_cpu_second"),
    ("CPU us/event", "stream", "cpu_us_per_event"),
    ("512 streams: CPU us/event", "streams512", "cpu_us_per_event"),
    ("stalls > 200 ms", "streams512", "stalls"),
    ("longest gap ms", "streams512", "max_gap_ms"),
    ("memory MiB", "memory", "mib_at_end"),
    ("KiB per 100k requests", "memory", "kib_per_100k_requests"),
)


def show(rows: list[dict]) -> None:
    table = Table(title="One mock upstream, 1.2 KB asked, 0.8 KB answered; medians of the undisturbed rounds")
    table.add_column("")
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    for peer in peers:
        table.add_column(peer, justify="right")
    for title, workload, field in COLUMNS:
        table.add_row(
            title, *(number(None if peer == "direct" and "cpu" in field else best(rows, peer, workload, field)) for peer in peers)
        )
    for title, field in (("added p50 ms at half load", "p50_ms"), ("added p99 ms", "p99_ms")):
        table.add_row(title, *(number(None if peer == "direct" else added(rows, peer, field)) for peer in peers))
    table.add_row("requests/s, 16 connections", *(number(best(rows, peer, "unary", "rps")) for peer in peers))
    table.add_row("errors, all in all", *(number(sum(row.get("errors", 0) for row in rows if row["peer"] == peer)) for peer in peers))
    disturbed = [sum(row.get("other_cores", 0) > DISTURBED_CORES for row in rows if row["peer"] == peer) for peer in peers]
    table.add_row("disturbed measurements", *map(number, disturbed))
    ours = best(rows, "fairlead", "unary", "requests_per_cpu_second")
    if ours:
        others = {peer: best(rows, peer, "unary", "requests_per_cpu_second") for peer in peers if peer not in ("fairlead", "direct")}
        table.caption = "; ".join(
            f"fairlead / {peer}: {ours / value:.1f}x requests per CPU second" for peer, value in others.items() if value
        )
    Console(width=120).print(table)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the numbers are rough")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=0, help="[default: 3; 1 with --quick]")
    parser.add_argument("--requests", type=int, default=0, help="of the memory workload  [default: 200,000; 10,000 with --quick]")
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
