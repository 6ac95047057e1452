"""Fairlead and its peers on the same weights in the same run; a table at the end.

python bench.py [--model S|M] [--quick] [--only ENGINE...] [--workloads NAME...] [--json]      (the project's environment)

All engines are loaded first, one after the other, which gives their start and memory; then they take turns, the others
stopped meanwhile, until each has enough turns in which the machine was quiet. Results are lines of JSON in results/.
PRECEDE=1 in the environment: the engine at its turn goes before the machine's other work (Linux, as root, under setsid).
"""

import argparse
import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import table
from http_load import Load, Refused, Server, chat, load
from registry import ENGINES, HERE, MAIN, Engine
from tree import Meter, Tree, precede
from workloads import WORKLOADS

START_SECONDS = 400
TURN_SECONDS = 300
QUIET_SECONDS = 3
"""How long a turn waits for other work on the machine to end."""
QUIET_CORES = 0.25
PRECEDE = bool(os.environ.get("PRECEDE"))

Write = Callable[..., None]


class Offline:
    """One engine's process that answers workloads over its pipes."""

    def __init__(self, name: str, model: Path, log: Path) -> None:
        engine = ENGINES[name]
        self.name = name
        self.log = log
        self.tree = Tree(
            engine.command(engine.offline, model=model),
            env=os.environ | engine.environ,
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
        )

    def ready(self) -> float:
        self._line(START_SECONDS)
        return time.perf_counter() - self.tree.started

    def ask(self, workload: str, seed: int) -> dict[str, float]:
        self.tree.process.stdin.write(json.dumps({"workload": workload, "seed": seed}).encode() + b"\n")
        self.tree.process.stdin.flush()
        return json.loads(self._line(TURN_SECONDS))

    def _line(self, seconds: float) -> bytes:
        """Raises RuntimeError where the process ends or does not answer in time."""
        pipe, line, until = self.tree.process.stdout.fileno(), b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(pipe, 65536) if ready else b""
            if not piece:
                raise RuntimeError(f"{'ended' if ready else f'no answer in {seconds} s'}, see {self.log.relative_to(HERE)}")
            line += piece
        return line


class Served:
    """One engine's server."""

    def __init__(self, name: str, model: Path, log: Path) -> None:
        engine = ENGINES[name]
        self.name = name
        self.log = log
        self.model = model
        port = free_port()
        self.tree = Tree(
            engine.command(engine.serve, model=model, port=port),
            env=os.environ | engine.environ,
            cwd=HERE,
            stdin=subprocess.DEVNULL,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        served = "m" if " m " in f"{engine.serve} " else model.name if name == "fairlead" else str(model)
        self.server = Server(port, served, engine.fields)

    def ready(self) -> float:
        """When a chat has been answered. Raises RuntimeError where that does not come to pass."""
        until, error = time.monotonic() + START_SECONDS, None
        while time.monotonic() < until and self.tree.process.poll() is None:
            try:
                asyncio.run(chat(self.server, "a", 2, timeout=60))
                return time.perf_counter() - self.tree.started
            except Refused:
                raise
            except (OSError, RuntimeError, EOFError, ValueError) as unanswered:
                error = unanswered
            time.sleep(0.02)
        raise RuntimeError(f"no answer ({error}), see {self.log.relative_to(HERE)}")

    def ask(self, workload: str, seed: int) -> dict[str, float]:
        shape = Load(requests=int(workload.removeprefix("http")))
        asyncio.run(load(self.server, self.model, -seed, shape._replace(requests=shape.clients, output=4)))  # awake
        return asyncio.run(load(self.server, self.model, seed, shape))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for_quiet() -> None:
    until = time.monotonic() + (0 if PRECEDE else QUIET_SECONDS)
    while psutil.cpu_percent(interval=0.3) > QUIET_CORES / psutil.cpu_count() * 100 and time.monotonic() < until:
        pass


def started(kind: type[Offline] | type[Served], names: list[str], model: Path, write: Write, stack: contextlib.ExitStack) -> list:
    """Each engine in turn, from nothing to its first answer. One that does not start is named and left out."""
    engines = []
    for name in names:
        wait_for_quiet()
        engine = kind(name, model, HERE / "logs" / f"{name}-{kind.__name__.lower()}.log")
        stack.callback(engine.tree.stop)
        if PRECEDE:
            engine.tree.precede()
        meter = Meter(engine.tree)
        try:
            with meter:
                seconds = engine.ready()
        except RuntimeError as error:
            print(f"{name} does not start: {error}", file=sys.stderr, flush=True)
            engine.tree.stop()
            continue
        memory = engine.tree.memory_bytes()
        write(engine=name, kind=kind.__name__.lower(), workload="start", seconds=round(seconds, 2), memory_bytes=memory, meter=meter)
        engine.tree.pause()
        engines.append(engine)
    return engines


def take_turns(engines: list, workloads: list[str], rounds: int, write: Write, seed: int, *, rehearse: bool) -> None:
    """Until each has `rounds` undisturbed turns at each workload, at most twice as many in all."""
    quiet: Counter[tuple[str, str]] = Counter()
    for number in range(2 * rounds):
        for workload in workloads:
            for engine in list(engines):
                if quiet[engine.name, workload] >= rounds:
                    continue
                engine.tree.resume()
                if PRECEDE:
                    engine.tree.precede()
                wait_for_quiet()
                meter = Meter(engine.tree)
                try:
                    if number == 0 and rehearse:  # the first of its shape
                        engine.ask(workload, seed + 99_000)
                    with meter:
                        values = engine.ask(workload, seed + number)
                except (RuntimeError, OSError, ExceptionGroup) as error:
                    print(f"{engine.name} {workload}: {error}", file=sys.stderr, flush=True)
                    engine.tree.stop()
                    engines.remove(engine)
                    continue
                quiet[engine.name, workload] += PRECEDE or meter.other_cores <= QUIET_CORES
                write(engine=engine.name, kind=type(engine).__name__.lower(), workload=workload, meter=meter, **values)
                engine.tree.pause()
    for engine in engines:
        write(engine=engine.name, kind=type(engine).__name__.lower(), workload="end", memory_bytes=engine.tree.memory_bytes())


def usable(name: str, engine: Engine) -> bool:
    if not engine.python.exists():
        print(f"{name} is left out: no environment, see setup.sh", file=sys.stderr)
    return engine.python.exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="S", choices=["S", "M"])
    parser.add_argument("--only", nargs="+", default=MAIN, choices=ENGINES, metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--workloads", nargs="+", default=[*WORKLOADS, "http"], choices=[*WORKLOADS, "http"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed turns wanted of each")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--out", type=Path, help="default: results/MODEL.jsonl, begun anew")
    parser.add_argument("--append", action="store_true", help="add to what is there")
    parser.add_argument("--json", action="store_true", help="the medians as JSON instead of a table")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what was started is stopped
    if PRECEDE:  # the load comes from here
        precede(psutil.Process())
    model = HERE / "models" / f"{args.model}-bf16"
    out = args.out or HERE / "results" / f"{args.model}.jsonl"
    out.parent.mkdir(exist_ok=True)
    (HERE / "logs").mkdir(exist_ok=True)
    if not args.append:
        out.unlink(missing_ok=True)

    def write(*, meter: Meter | None = None, **row: object) -> None:
        about = {"model": args.model, **row} | ({"other_cores": meter.other_cores, "preceded": PRECEDE} if meter else {})
        line = json.dumps(about)
        with out.open("a") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr, flush=True)

    wait_for_quiet()
    with Meter() as meter:
        limits = subprocess.run([sys.executable, HERE / "limits.py", model], check=True, capture_output=True, text=True).stdout
    write(kind="limits", meter=meter, **json.loads(limits))

    rounds = 2 if args.quick else args.rounds
    names = [name for name in args.only if usable(name, ENGINES[name])]
    offline = [name for name in args.workloads if name != "http"]
    http = [f"http{8 if args.quick or args.model == 'M' else 24}"] if "http" in args.workloads else []
    for kind, workloads in ((Offline, offline), (Served, http)):
        wanted = [name for name in names if (ENGINES[name].offline if kind is Offline else ENGINES[name].serve)]
        with contextlib.ExitStack() as stack:
            engines = started(kind, wanted if workloads else [], model, write, stack)
            take_turns(engines, workloads, rounds, write, seed=int(time.time()) % 100_000 * 10, rehearse=args.model == "S")
    results = table.Results(out)
    print(json.dumps(results.medians()) if args.json else "\n".join(table.markdown(results)))


if __name__ == "__main__":
    main()
