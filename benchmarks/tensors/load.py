"""Load from another process: closed loop by wrk (HTTP/1.1) and h2load (gRPC), one thread of C each; open loop by paced.c."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

HERE = Path(__file__).parent


class Call(NamedTuple):
    """One request, the same every time, and how long its right answer is."""

    url: str
    body: Path
    headers: dict[str, str]
    answer_bytes: int


def http(call: Call, connections: int, seconds: int) -> dict:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "-s", HERE / "post.lua", call.url, "--", call.body]
    result = json.loads(_output(command + [f"{k}: {v}" for k, v in call.headers.items()]).splitlines()[-1])
    return result | {"rps": result["requests"] / result["seconds"]}


def grpc(call: Call, connections: int, seconds: int) -> dict:
    """One stream per connection. A gRPC error is HTTP 200 without a message: it shows in the bytes that came."""
    with tempfile.NamedTemporaryFile() as log:
        command = ["h2load", "-t1", f"-c{connections}", "-m1", f"-D{seconds}", f"--log-file={log.name}", "-d", call.body]
        for name, value in call.headers.items():
            command += ["-H", f"{name}: {value}"]
        text = _output([*command, call.url])
        rows = np.loadtxt(log.name, ndmin=2, usecols=(1, 2)) if Path(log.name).stat().st_size else np.zeros((0, 2))
    data_bytes = float(text.split("traffic:")[1].split("data")[0].rsplit("(", 1)[1].split(")")[0])
    errors = int((rows[:, 0] != 200).sum())
    empty = len(rows) - int(data_bytes / call.answer_bytes)
    if empty > connections:  # as many may have been cut off at the end
        errors = max(errors, empty)
    return {"requests": len(rows), "seconds": seconds, "rps": len(rows) / seconds, "errors": errors, **percentiles(rows[:, 1] / 1e3)}


def paced(call: Call, rate: float, connections: int, seconds: int) -> dict:
    target, body = urlsplit(call.url), call.body.read_bytes()
    lines = [f"POST {target.path} HTTP/1.1", f"Host: {target.netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in call.headers.items()]
    with tempfile.NamedTemporaryFile() as message:
        message.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        message.flush()
        return json.loads(_output([HERE / "envs/paced", target.port, message.name, rate, connections, seconds]))


def percentiles(ms: np.ndarray) -> dict:
    if not len(ms):
        return {"p50_ms": 0.0, "p99_ms": 0.0}
    return {"p50_ms": float(np.percentile(ms, 50)), "p99_ms": float(np.percentile(ms, 99))}


def _output(command: list) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
