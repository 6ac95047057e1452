"""Start one server, check its answer, load it, print one JSON line per measurement.

python run.py --peer mlserver --workload w1 [--encoding json] [--connections 1 8 64] [--rate 5000] [--seconds 4]
With --rate the load is open-loop at that many requests a second over at most the largest number of connections.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grpc
import load
import numpy as np
from load import Call
from measure import Tree, client_seconds, machine_seconds
from payloads import PAYLOADS
from registry import HERE, NAMES_PROBABILITIES, PEERS, Peer

START_SECONDS = 90
LARGE_TEXT_BYTES = 1 << 20


class Server(NamedTuple):
    process: subprocess.Popen
    tree: Tree
    fill: dict
    """What replaces the braces of the registry."""
    log: Path
    started: float


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(peer: Peer, workload: str) -> Iterator[Server]:
    """One thread for the model everywhere. What the server leaves behind, its log too, is kept where the run fails."""
    fill = {"w": workload, "http": free_port(), "grpc": free_port(), "metrics": free_port()}
    tree, folder = Tree(), Path(tempfile.mkdtemp(prefix="bench-"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "W": workload, "TMPDIR": str(folder)}
    env |= {"PATH": f"{peer.folder}:{os.environ['PATH']}"} | peer.environ | tree.env
    program, *arguments = (part.format(**fill) for part in peer.command.split())
    with (folder / "server.log").open("w") as log:
        command = [peer.folder / program, *arguments]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=HERE, start_new_session=True)
    try:
        yield Server(process, tree, fill, folder / "server.log", time.perf_counter())
    finally:
        tree.stop()
    shutil.rmtree(folder)


def prepare(peer: str, server: Server, encoding: str) -> Call:
    """The request to send, once the server has answered it rightly."""
    workload = server.fill["w"]
    prefix = "proba." if peer in NAMES_PROBABILITIES and workload == "w1" else ""
    body = PAYLOADS / f"{workload}.{prefix}{encoding}"
    headers = {"Content-Type": "application/json"}
    if encoding == "bin":
        length = (PAYLOADS / f"{workload}.{prefix}header").read_text()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": length}
    if encoding == "grpc":
        headers = {"content-type": "application/grpc", "te": "trailers"}
    call = Call(PEERS[peer].urls[encoding].format(**server.fill), body, headers, 0)
    answer = first_answer(call, encoding, server)
    if not right(answer, np.fromfile(PAYLOADS / f"{workload}.want", "f4"), encoding):
        raise SystemExit(f"{peer} {workload} {encoding}: wrong answer {answer[:300]}; log: {server.log}")
    return call._replace(answer_bytes=len(answer) + (5 if encoding == "grpc" else 0))


def first_answer(call: Call, encoding: str, server: Server) -> bytes:
    while True:
        try:
            return ask(call, encoding)
        except (OSError, grpc.RpcError) as error:  # urllib's errors are OSErrors
            if time.perf_counter() - server.started > START_SECONDS or server.process.poll() is not None:
                body = error.read()[:300] if isinstance(error, urllib.error.HTTPError) else ""
                raise SystemExit(f"{call.url}: no answer: {error} {body}; log: {server.log}") from None
        time.sleep(0.1)


def ask(call: Call, encoding: str) -> bytes:
    if encoding != "grpc":
        with urllib.request.urlopen(urllib.request.Request(call.url, call.body.read_bytes(), call.headers), timeout=5) as answer:
            return answer.read()
    host, method = call.url.removeprefix("http://").split("/", 1)
    with grpc.insecure_channel(host, [("grpc.max_receive_message_length", -1)]) as channel:
        return channel.unary_unary("/" + method)(call.body.read_bytes()[5:], timeout=5)


def right(answer: bytes, want: np.ndarray, encoding: str) -> bool:
    """Whether the expected numbers are somewhere in the answer."""
    if encoding in ("json", "native"):
        got = np.array(list(numbers(json.loads(answer))))
        return all(np.abs(got - value).min(initial=9) < 1e-4 for value in want)
    starts = range(len(answer) - want.nbytes + 1)
    return any(np.allclose(np.frombuffer(answer, "f4", len(want), at), want, atol=1e-4) for at in starts)


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield float(value)
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)


def measured(generate: Callable[[], dict], tree: Tree) -> dict | None:
    """The load's own numbers and what the server's process tree spent on it; None where no answer came in time."""
    before, machine, client = tree.cpu_seconds(), machine_seconds(), client_seconds()
    result = generate()
    machine, cpu, client = machine_seconds() - machine, tree.cpu_seconds() - before, client_seconds() - client
    peak, proportional = tree.memory_mib()
    if not (answers := result["requests"] - result["errors"]):
        return None
    return {
        "rps": round(result["rps"], 1),
        "p50_ms": round(result["p50_ms"], 4),
        "p99_ms": round(result["p99_ms"], 4),
        "errors": result["errors"],
        "cpu_s_per_1k": round(cpu / answers * 1000, 5),
        "server_cores": round(cpu / result["seconds"], 3),
        "client_cores": round(client / result["seconds"], 3),
        "other_cores": round((machine - cpu - client) / result["seconds"], 3),
        "peak_mib": peak,
        "pss_mib": proportional,
        "processes": len(tree.processes()),
    }


def measurements(name: str, encodings: Iterable[str], args: argparse.Namespace) -> Iterator[dict]:
    """Closed loop at each number of connections or, with a rate, once at that rate."""
    with serving(PEERS[name], args.workload) as server:
        ready = 0.0
        for encoding in encodings:
            call = prepare(name, server, encoding)
            ready = ready or round(time.perf_counter() - server.started, 1)
            closed = load.grpc if encoding == "grpc" else load.http
            # Tens of megabytes of JSON in flight would be seconds for each answer.
            widths = sorted({min(n, 8) for n in args.connections}) if large_text(call) else args.connections
            closed(call, max(widths), args.warmup)
            for kind, connections, generate in loads(call, closed, widths, args.rate):
                generate(seconds=1)
                about = {"kind": kind, "peer": name, "workload": args.workload, "encoding": encoding, "connections": connections}
                if row := measured(partial(generate, seconds=args.seconds), server.tree):
                    yield about | row | {"rate": args.rate, "ready_s": ready, "label": args.label}
                else:
                    print("no answer in time:", *about.values(), file=sys.stderr)


def large_text(call: Call) -> bool:
    return call.headers.get("Content-Type") == "application/json" and call.body.stat().st_size > LARGE_TEXT_BYTES


def loads(call: Call, closed: Callable[..., dict], widths: list[int], rate: float) -> Iterator[tuple[str, int, Callable[..., dict]]]:
    if rate:
        yield "paced", max(widths), partial(load.paced, call, rate, max(widths))
        return
    for connections in widths:
        yield "closed", connections, partial(closed, call, connections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--encoding", action="append", help="json, bin, grpc or native; without it all that the server has")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--label", default="")
    args = parser.parse_args()
    for line in measurements(args.peer, args.encoding or PEERS[args.peer].urls, args):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
