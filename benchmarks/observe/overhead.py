"""What a request's timeline costs: each of its parts in a loop of its own, and whole servers of two checkouts, asked in turns.

python benchmarks/observe/overhead.py                      the parts
python benchmarks/observe/overhead.py --against FOLDER     and servers, of this checkout and of the one in FOLDER
"""

import argparse
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from timeit import repeat

ROOT = Path(__file__).resolve().parents[2]
NUMBER = 100_000
SECONDS = 1.5
CONNECTIONS = 16
MODEL = """
class Echo:
    example = {"x": __import__("numpy").zeros((1, 4), "float32")}

    def infer(self, inputs):
        return {"y": inputs["x"]}
"""
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()


def parts() -> dict[str, float]:
    """Microseconds per request on the path of a tensor request, and off it."""
    from fairlead.core.timeline import BatchNote, Timeline
    from fairlead.observe.access import AccessLog
    from fairlead.observe.finished import Finished
    from fairlead.observe.recent import Recent

    now = time.perf_counter()
    note = BatchNote("m", "1", 1, "idle", 1, 1, 0, now, 0.0, 0.0, now)

    def path() -> Timeline:
        """All that the rooms do to one of them: made, noted, filled in, ended."""
        timeline = Timeline("", "http", now)
        timeline.bytes_in = 99
        timeline.events.append((time.perf_counter(), "decoded", None))
        timeline.kind = "infer"
        timeline.tenant = "default"
        timeline.note(now, "batched", note)
        if not timeline.ended:
            timeline.events.append((now, "computed", None))
        timeline.events.append((time.perf_counter(), "encoded", None))
        timeline.bytes_out = 99
        timeline.rows = 1
        timeline.request_id = "0123456789ab-1"
        timeline.path = "/v2/models/{model}/infer"
        timeline.model, timeline.version = "m", "1"
        timeline.end(now, 200, "", "success", "")
        return timeline

    some = [path() for _ in range(64)]
    finished = Finished()
    with open(os.devnull, "w") as nowhere:
        log, recent = AccessLog(nowhere), Recent()
        measured = {
            "made, noted, ended": (path, NUMBER, 1),
            "a batch's note": (lambda: BatchNote("m", "1", 1, "idle", 1, 1, 0, now), NUMBER, 1),
            "given to Finished": (lambda: finished.add(some[0]), NUMBER, 1),
            "Recent (of 64)": (lambda: recent(some), NUMBER // 64, 64),
            "access log line (of 64)": (lambda: log(some), NUMBER // 64, 64),
        }
        return {name: min(repeat(call, number=number, repeat=5)) / number / each * 1e6 for name, (call, number, each) in measured.items()}


async def ask(port: int, until: float) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v2/models/echo/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()
    count = 0
    try:
        while time.perf_counter() < until:
            writer.write(head + BODY)
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", answer)[1]))  # type: ignore[index]
            count += 1
    finally:
        writer.close()
    return count


async def load(port: int, seconds: float) -> int:
    until = time.perf_counter() + seconds
    return sum(await asyncio.gather(*(ask(port, until) for _ in range(CONNECTIONS))))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Server:
    """One under load, from its start to its end."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.port, *others = (free_port() for _ in range(3))
        ports = ["--port", str(self.port), "--grpc-port", str(others[0]), "--ops-port", str(others[1])]
        command = [sys.executable, "-m", "fairlead", "serve", str(folder / "models"), *ports]
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "XDG_DATA_HOME": str(folder / str(self.port))}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.measured: list[tuple[float, float]] = []
        """(requests per second, microseconds of processor time for each)."""

    def wait(self) -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/models/echo/ready", timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("a server did not get ready")

    def measure(self) -> None:
        before = processor_seconds(self.process.pid)
        count = asyncio.run(load(self.port, SECONDS))
        self.measured.append((count / SECONDS, (processor_seconds(self.process.pid) - before) / count * 1e6))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--against", type=Path, help="A checkout from before.")
    arguments.add_argument("--rounds", type=int, default=12)
    given = arguments.parse_args()
    for name, microseconds in parts().items():
        print(f"{name:28} {microseconds:6.3f} us")
    if given.against is None:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version = folder / "models" / "echo" / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL)
        (version.parent / "model.yaml").write_text("instances: {isolation: thread, execution: inline}\n")
        servers = {"before": Server(given.against.resolve(), folder), "now": Server(ROOT, folder)}
        try:
            for server in servers.values():
                server.wait()
            for turn in range(given.rounds + 1):
                for name in sorted(servers, reverse=bool(turn % 2)):
                    servers[name].measure()
        finally:
            for server in servers.values():
                server.stop()
        for name, server in servers.items():
            rates, times = zip(*server.measured[1:], strict=True)  # the first round warms up
            print(f"{name:8} {median(rates):8.0f} /s   processor time for each: least {min(times):5.1f} us, median {median(times):5.1f} us")


if __name__ == "__main__":
    main()
