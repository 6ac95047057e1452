"""How much slower a model answers while it is profiled: `python benchmarks/observe/profile.py [--seconds 2] [--rounds 5]`.

A server with the packaged language model and one with a small Python model in a process of its own; four clients each, who ask again as
soon as they have their answer. Each kind of profile alone, then all of them, each beside the time just before and after it; the median of the rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import fairlead.cli.demo_models

CHAT = Path(fairlead.cli.demo_models.__file__).parent / "tiny" / "chat"
CLIENTS = 4
KINDS = ((("memory",), False), (("cpu",), False), (("cpu",), True), (("torch",), False), (("cpu", "torch", "memory"), False))
"""With functions of C and C++, or without."""
MODEL = """
import numpy as np

class Model:
    example = {"input": np.zeros((1, 64), np.float32)}

    def infer(self, inputs):
        return {"output": inputs["input"] @ np.ones((64, 64), np.float32)}
"""
ASKED = {
    "chat": (
        "/v1/chat/completions",
        {"model": "chat", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64, "temperature": 0},
    ),
    "small": ("/v2/models/small/infer", {"inputs": [{"name": "input", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}]}),
}


class Load:
    """Clients who ask again and again."""

    def __init__(self, url: str, model: str) -> None:
        path, body = ASKED[model]
        self.request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        self.answers: list[str] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _ask(self) -> None:
        while not self.ended.is_set():
            with urllib.request.urlopen(self.request, timeout=60) as response:
                answer = json.loads(response.read())
            self.answers.append(json.dumps(answer.get("choices") or answer["outputs"]))

    def rate(self, run: Callable[[], object]) -> float:
        """Answers in a second, as long as that runs."""
        before, began = len(self.answers), time.perf_counter()
        run()
        return (len(self.answers) - before) / (time.perf_counter() - began)

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def measure(model: str, path: Path, seconds: float, rounds: int) -> None:
    ports = ("--port", "0", "--grpc-port", "0", "--ops-port", "0")
    serve = [sys.executable, "-m", "fairlead", "serve", str(path), *ports, "--log-format", "json", "--no-log-requests"]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(serve, stderr=log) as server:
        try:
            found = serving(log)
            load = Load(found["http"], model)
            load.rate(lambda: time.sleep(2.0))
            for kinds, native in KINDS:
                body: dict[str, object] = {"model": model, "seconds": seconds, "kinds": kinds, "native": native}
                pairs = []
                for _ in range(rounds):
                    before = load.rate(lambda: time.sleep(2 * seconds))
                    during = load.rate(lambda: profile(found["ops"], body))  # noqa: B023
                    after = load.rate(lambda: time.sleep(2 * seconds))
                    pairs.append((2 * during / (before + after), during, (before + after) / 2))
                share, during, beside = sorted(pairs)[rounds // 2]
                what = ", ".join(kinds) + (" --native" if native else "")
                print(f"{model:6} {what:18} {during:8.1f}/s, beside it {beside:8.1f}/s: {share:6.1%}", flush=True)
            load.stop()
            print(f"{model:6} {len(load.answers)} answers, {len(set(load.answers))} different")
        finally:
            server.terminate()


def serving(log: TextIO) -> dict[str, str]:
    """What its log says when it serves."""
    while True:
        log.seek(0)
        for line in log:
            if '"serving"' in line:
                found: dict[str, str] = json.loads(line)
                return found
        time.sleep(0.1)


def profile(url: str, body: dict[str, object]) -> None:
    request = urllib.request.Request(f"{url}/admin/profile", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        response.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small" / "1"
        small.mkdir(parents=True)
        (small / "model.py").write_text(MODEL)
        measure("small", small.parent.parent, chosen.seconds, chosen.rounds)
        measure("chat", CHAT, chosen.seconds, chosen.rounds)


if __name__ == "__main__":
    main()
