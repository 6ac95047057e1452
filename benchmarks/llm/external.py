"""What passing on to an external engine costs: python external.py [--seconds 4] [--rounds 3]    (Fairlead's own environment)

A child that costs next to nothing (`fairlead.runtime.upstream.fake`) is started as a model's engine, and the CPU of Fairlead's process
alone is counted, system calls included: for chats of 1.2 KB with answers of 0.8 KB, and for streams of 64 events, one every 2 ms.
`limited` has a tenant's and a model's limits by tokens, a price and usage records beside it; `plain` has none; `upstream` is `plain` with
the same server as an upstream of fairlead.yaml. They are asked in turns. The numbers hold on a quiet machine; the ratios always do.
"""

import argparse
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

import psutil

HERE = Path(__file__).parent
LOAD = HERE.parent / "gateway" / "load.py"
PYTHON = os.environ.get("FAIRLEAD_PYTHON", str(HERE.parent.parent / ".venv/bin/python"))
START_SECONDS = 120
MUST = {"request": 150.0, "chunk": 40.0}
"""Microseconds."""
BODY = {
    "messages": [{"role": "system", "content": "You answer. " * 10}, {"role": "user", "content": "How is the weather at sea? " * 35}],
    "max_tokens": 64,
    "temperature": 0,
}
ENGINE = """\
backend: openai
engine:
  command: [{python}, -m, fairlead.runtime.upstream.fake, --port, "{{port}}", --script, '{{"models": ["{{name}}"], "pace": {pace}}}']
"""
UPSTREAM = """\
gateway:
  models: {{now: {{upstreams: [{{url: "{now}"}}]}}, paced: {{upstreams: [{{url: "{paced}"}}]}}}}
"""
LIMITED = """\
store: {{url: "sqlite:///{folder}/store.db"}}
gateway:
  tenants: {{default: {{limits: {{tokens_per_minute: 1000000000, requests_per_minute: 10000000}}}}}}
  models: {{"*": {{limits: {{tokens_per_minute: 1000000000}}, price: {{per_million_input_tokens: 1.0}}}}}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """Fairlead with two models: one whose engine answers at once, one that streams at a pace."""

    def __init__(self, name: str, folder: Path, extra: str) -> None:
        self.name = name
        self.others: list[subprocess.Popen[bytes]] = []
        urls = {}
        for model, pace in (("now", 0), ("paced", 0.002)):
            (folder / "models").mkdir(exist_ok=True)
            if name == "upstream":
                port = free_port()
                urls[model] = f"http://127.0.0.1:{port}"
                command = [PYTHON, "-m", "fairlead.runtime.upstream.fake", "--port", str(port), "--script", json.dumps({"pace": pace})]
                self.others.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            else:
                (folder / "models" / model).mkdir()
                (folder / "models" / model / "model.yaml").write_text(ENGINE.format(python=PYTHON, pace=pace))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/v1/chat/completions"
        config = folder / "fairlead.yaml"
        config.write_text(
            f"listen: {{port: {port}, grpc_port: 0, ops_port: 0}}\nmodels: {{repositories: ['{folder}/models']}}\n"
            "control: {enabled: false}\njobs: {enabled: false}\n" + extra.format(folder=folder, **urls)
        )
        self.log = folder / "server.log"
        with self.log.open("w") as out:
            command = [PYTHON, "-m", "fairlead", "serve", "--open", "--config", str(config)]
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        self.cpu = psutil.Process(self.process.pid)

    def wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                ask = urllib.request.Request(self.url, json.dumps(BODY | {"model": "now"}).encode(), {"content-type": "application/json"})
                with urllib.request.urlopen(ask, timeout=10) as answer:
                    assert json.loads(answer.read())["usage"]["completion_tokens"] == 64
                return
            except OSError:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise SystemExit(f"the server does not answer; its log ends with:\n{self.log.read_text()[-2000:]}") from None
                time.sleep(0.2)

    def load(self, seconds: float, *, stream: bool) -> float:
        """Microseconds of CPU for a request, or for a chunk."""
        body = BODY | {"model": "paced" if stream else "now"} | ({"stream": True} if stream else {})
        wanted = {"mode": "streams" if stream else "closed", "connections": 16, "seconds": seconds, "url": self.url, "headers": {}}
        before = sum(self.cpu.cpu_times()[:2])
        told = subprocess.run(
            [PYTHON, str(LOAD), json.dumps(wanted | {"body": json.dumps(body)})], check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
        spent = sum(self.cpu.cpu_times()[:2]) - before
        return spent / json.loads(told)["events" if stream else "requests"] * 1e6

    def stop(self) -> None:
        for process in (self.process, *self.others):
            process.terminate()
            process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        servers = []
        try:
            for name, extra in (("plain", ""), ("upstream", UPSTREAM), ("limited", LIMITED)):
                (Path(folder) / name).mkdir()
                servers.append(Server(name, Path(folder) / name, extra))
            for server in servers:
                server.wait()
                server.load(1.0, stream=False)
            for _ in range(given.rounds):
                for server in servers:
                    found.setdefault((server.name, "request"), []).append(server.load(given.seconds, stream=False))
                    found.setdefault((server.name, "chunk"), []).append(server.load(given.seconds, stream=True))
        finally:
            for server in servers:
                server.stop()
    for (name, what), values in sorted(found.items()):
        best = median(values)
        ratio = best / median(found["upstream", what])
        print(f"{what:8} {name:9} {best:6.1f} us of CPU, {best / MUST[what]:.2f} of what it may cost; {ratio:.2f} of an upstream's")


if __name__ == "__main__":
    main()
