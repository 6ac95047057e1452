"""A real `fairlead serve` for tests: started on free ports, spoken to over loopback, stopped by its process id."""

import json
import queue
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IDENTITY = """
import numpy as np

class Model:
    example = {"input": np.zeros((1, 4), np.float32)}

    def infer(self, inputs):
        return {"output": inputs["input"]}
"""


def write_model(root: Path, name: str, code: str, *, spec: str = "instances: {isolation: thread}\n", version: int = 1) -> None:
    folder = root / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(code)
    if spec:
        (root / name / "model.yaml").write_text(spec)


class Serving:
    """A running server and its log."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self.log: list[dict[str, Any]] = []
        self.said: deque[str] = deque(maxlen=1000)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            try:
                self.lines.put(json.loads(line))
            except ValueError:
                self.lines.put({"event": "text", "text": line.rstrip()})
        self.lines.put({"event": "end of log"})

    def wait_for(self, event: str, seconds: float = 60.0) -> dict[str, Any]:
        """The next log line of that event."""
        while True:
            line = self.lines.get(timeout=seconds)
            self.log.append(line)
            if line["event"] == event:
                return line
            assert line["event"] != "end of log", self.log

    def begin(self) -> "Serving":
        ready = self.wait_for("serving")
        self.http, self.grpc, self.ops = ready["http"], ready["grpc"], ready["ops"]
        return self

    def get(self, path: str, *, url: str = "", body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """(status, decoded JSON or text) of a GET, or of a POST where there is a body."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        request = urllib.request.Request((url or self.http) + path, data=data, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode()

    def infer(self, model: str, values: list[float], name: str = "input") -> tuple[int, Any]:
        tensor = {"name": name, "shape": [1, len(values)], "datatype": "FP32", "data": values}
        return self.get(f"/v2/models/{model}/infer", body={"inputs": [tensor]})

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def serving(*arguments: object) -> Iterator[Serving]:
    command = [
        sys.executable,
        "-m",
        "fairlead",
        "serve",
        *map(str, arguments),
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--ops-port",
        "0",
        "--log-format",
        "json",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        server = Serving(process)
        try:
            yield server
        except BaseException:
            print(*server.said, sep="")  # shown by pytest where a test fails
            raise
        finally:
            process.kill()
            process.wait(30)
            server._reader.join(10)
