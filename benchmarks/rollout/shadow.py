"""What a shadow costs the requests that it copies.  python benchmarks/rollout/shadow.py [--seconds 60] [--rate 200] [--share 0.1 1.0]

A server in a process of its own, two versions of each model, one client that sends at random times. Short spans with the shadow and
without it follow each other in random order, so that whatever else the machine does meets both: the ratio of the two medians
is what counts, with the interval of a bootstrap over spans.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).parent
CONNECTIONS = 8
SPAN_SECONDS = 0.5
SETTLE_SECONDS = 0.1
MODELS = {
    "rows": "200 boosted trees, computed in the server's event loop",
    "busy": "2 ms of NumPy in a process of its own",
}
BUSY = """
import time
import numpy as np

class Model:
    example = {"x": np.zeros((1, 20), np.float32)}

    def infer(self, inputs):
        end = time.perf_counter() + 0.002
        while time.perf_counter() < end:
            y = inputs["x"].sum(axis=1, keepdims=True)
        return {"y": y}
"""
POLICIES = 'gateway: {models: {"*": {traffic: {"1": 1.0, "2": 0.0}}}}'


def make_models(folder: Path) -> None:
    import xgboost

    values = np.random.default_rng(1)
    x = values.normal(size=(2000, 20)).astype(np.float32)
    for version in (1, 2):
        y = x[:, 0] * 2 + x[:, 1] ** 2 + values.normal(size=2000) * 0.1
        model = xgboost.train({"max_depth": 6, "nthread": 1}, xgboost.DMatrix(x, y), num_boost_round=200)
        for name in MODELS:
            (folder / name / str(version)).mkdir(parents=True)
        model.save_model(folder / "rows" / str(version) / "model.ubj")
        (folder / "busy" / str(version) / "model.py").write_text(BUSY)
    for name, isolation in (("rows", "thread"), ("busy", "process")):
        (folder / name / "model.yaml").write_text(f"version_policy: {{all: true}}\ninstances: {{isolation: {isolation}}}\n")


# The server


async def serve(folder: Path) -> None:
    """Says its address, then does as each line of its input says: `MODEL SHARE`."""
    from fairlead.app import Server
    from fairlead.control.shadow import Comparer
    from fairlead.core.rollout import ShadowRules
    from fairlead.core.settings import parse_settings
    from fairlead.core.watch import ShadowRule
    from fairlead.observe.logs import configure_logs

    text = f"models: {{repositories: ['{folder}']}}\nlisten: {{port: 0, grpc_port: 0, ops_port: 0}}\nlogs: {{requests: false}}\njobs: {{enabled: false}}\n{POLICIES}\n"
    configure_logs("warning", "json")
    server = Server(parse_settings(text, "benchmark"))
    await server.start()
    comparer = Comparer(lambda model: ShadowRules())
    shadows = server.gateway.shadows
    shadows.on_pair = comparer.add
    print(server.http.port, flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().split():
        model, share = line
        shadows.set({model: ShadowRule(version="2", share=float(share))} if float(share) >= 0 else {})
        outcomes = {
            key[2]: number
            for key, number in server.gateway.counts._counts.items()
            if key[0] == "fairlead_shadow_copies_total" and key[1] == model
        }
        print(json.dumps(outcomes), flush=True)
    await shadows.stop()
    await server.stop()


# The client


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, message: bytes) -> float:
        began = time.perf_counter()
        self.writer.write(message)
        head = await self.reader.readuntil(b"\r\n\r\n")
        took = time.perf_counter() - began
        assert head.startswith(b"HTTP/1.1 200"), head
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        await self.reader.readexactly(length)
        return took


def message_for(model: str) -> bytes:
    name = "x" if model == "busy" else "input"
    data = [round(random.gauss(0, 1), 3) for _ in range(20)]
    body = json.dumps({"inputs": [{"name": name, "shape": [1, 20], "datatype": "FP32", "data": data}]})
    return f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def span(connections: list[Connection], model: str, rate: float, seconds: float) -> list[float]:
    """Latencies of requests at random times."""
    found: list[float] = []
    end = time.perf_counter() + seconds

    async def one(connection: Connection) -> None:
        while True:
            await asyncio.sleep(random.expovariate(rate / len(connections)))
            if time.perf_counter() >= end:
                return
            found.append(await connection.ask(message_for(model)))

    await asyncio.gather(*(one(each) for each in connections))
    return found


async def measure(
    port: int, server: asyncio.subprocess.Process, options: argparse.Namespace, progress: Progress
) -> list[dict[str, object]]:
    assert server.stdin is not None and server.stdout is not None
    connections = [Connection(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    results = []
    for model in MODELS:
        for share in options.share:
            spans: dict[bool, list[list[float]]] = {True: [], False: []}
            rounds = max(int(options.seconds / (2 * (SPAN_SECONDS + SETTLE_SECONDS))), 2)
            before: dict[str, int] = {}
            outcomes: dict[str, int] = {}
            for _ in progress.track(range(rounds), description=f"{model}, share {share:g}"):
                for shadowed in random.sample((True, False), 2):
                    server.stdin.write(f"{model} {share if shadowed else -1}\n".encode())
                    outcomes = json.loads(await server.stdout.readline())
                    before = before or outcomes
                    await span(connections, model, options.rate, SETTLE_SECONDS)
                    spans[shadowed].append(await span(connections, model, options.rate, SPAN_SECONDS))
            copies = {name: number - before.get(name, 0) for name, number in outcomes.items()}
            results.append({"model": model, "share": share, "rate": options.rate, "copies": copies, **summary(spans)})
    return results


def summary(spans: dict[bool, list[list[float]]]) -> dict[str, object]:
    on, off = (np.concatenate(spans[each]) for each in (True, False))
    ratios = []
    pairs = list(zip(spans[True], spans[False], strict=True))
    for _ in range(500):
        chosen = random.choices(pairs, k=len(pairs))
        ratios.append(np.median(np.concatenate([one for one, _ in chosen])) / np.median(np.concatenate([other for _, other in chosen])))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {
        "requests": [len(off), len(on)],
        "p50_ms": [statistics.median(off) * 1e3, statistics.median(on) * 1e3],
        "p95_ms": [float(np.quantile(off, 0.95)) * 1e3, float(np.quantile(on, 0.95)) * 1e3],
        "p50_ratio": float(np.median(on) / np.median(off)),
        "p50_ratio_95": [float(low), float(high)],
    }


async def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        server = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--serve", folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert server.stdin is not None and server.stdout is not None
        try:
            async with asyncio.timeout(120):
                port = int(await server.stdout.readline())
            with Progress(console=Console(stderr=True)) as progress:
                results = await measure(port, server, options, progress)
        finally:
            server.stdin.close()
            await asyncio.wait_for(server.wait(), 60)
    table = Table("model", "share", "copies", "p50 without", "p50 with", "ratio", "95% of it", "p95 without", "p95 with")
    for each in results:
        low, high = each["p50_ratio_95"]  # type: ignore[misc]
        (off, on), (off95, on95) = each["p50_ms"], each["p95_ms"]  # type: ignore[misc]
        copies = ", ".join(f"{number} {name}" for name, number in each["copies"].items())  # type: ignore[attr-defined]
        table.add_row(
            str(each["model"]), f"{each['share']:g}", copies, f"{off:.3f} ms", f"{on:.3f} ms", f"{each['p50_ratio']:.3f}", f"{low:.3f} to {high:.3f}", f"{off95:.2f} ms", f"{on95:.2f} ms"
        )  # fmt: skip
    Console(width=160).print(table)
    (HERE / "results" / "shadow.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each row")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 1.0])
    chosen = parser.parse_args()
    if chosen.serve:
        import uvloop

        uvloop.run(serve(chosen.serve))
    else:
        asyncio.run(main(chosen))
