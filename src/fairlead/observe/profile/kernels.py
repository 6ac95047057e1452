"""`python -m fairlead.observe.profile.kernels TRACE`: the table of operators and kernels of a trace, as JSON.

A process of its own: a trace has hundreds of thousands of events, and whoever reads them holds the interpreter's lock meanwhile.
"""

import asyncio
import gzip
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

READ_SECONDS = 60.0
MAX_TRACE_BYTES = 512 << 20
TOP = 30


class Kernel(Struct):
    name: str
    kind: str
    """operator, or kernel of a device."""
    calls: int = 0
    seconds: float = 0.0
    """Its own, without what it calls."""
    share: float = 0.0
    """Of all of its kind."""
    allocated_bytes: int = 0
    """By its own code, and given back by nobody in the meantime."""
    shapes: str = ""
    """Of its inputs, as they were most often the slowest."""


class _Event(Struct):
    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: int | str = 0
    tid: int | str = 0
    ts: float = 0.0
    dur: float = 0.0
    args: dict[str, Any] = {}


class _Trace(Struct):
    traceEvents: list[_Event] = []


KINDS = {"cpu_op": "operator", "kernel": "kernel", "gpu_memcpy": "kernel", "gpu_memset": "kernel"}


def table(events: Iterable[_Event], limit: int = TOP) -> list[Kernel]:
    """The largest by their own time."""
    found: dict[tuple[str, str], Kernel] = {}
    slowest: dict[tuple[str, str], float] = {}
    open_of: dict[object, list[tuple[_Event, list[float]]]] = {}

    def close(event: _Event, inner: list[float]) -> None:
        key = (KINDS[event.cat], event.name)
        kernel = found.get(key)
        if kernel is None:
            kernel = found[key] = Kernel(event.name, KINDS[event.cat])
        kernel.calls += 1
        own = max(event.dur - inner[0], 0.0) / 1e6
        kernel.seconds += own
        if own > slowest.get(key, 0.0) and (shapes := event.args.get("Input Dims")):
            slowest[key], kernel.shapes = own, str(shapes)[:200]

    for event in sorted((each for each in events if each.cat in KINDS or each.name == "[memory]"), key=lambda each: (each.ts, -each.dur)):
        stack = open_of.setdefault((event.pid, event.tid), [])
        while stack and stack[-1][0].ts + stack[-1][0].dur <= event.ts:
            close(*stack.pop())
        if event.name == "[memory]":
            if stack:
                top = stack[-1][0]
                kernel = found.setdefault((KINDS[top.cat], top.name), Kernel(top.name, KINDS[top.cat]))
                kernel.allocated_bytes += int(event.args.get("Bytes", 0))
            continue
        if stack:
            stack[-1][1][0] += event.dur
        stack.append((event, [0.0]))
    for stack in open_of.values():
        while stack:
            close(*stack.pop())
    for kind in set(KINDS.values()):
        whole = sum(kernel.seconds for kernel in found.values() if kernel.kind == kind)
        for kernel in found.values():
            if kernel.kind == kind:
                kernel.share = round(kernel.seconds / whole, 6) if whole else 0.0
    return sorted(found.values(), key=lambda kernel: -kernel.seconds)[:limit]


def read(path: Path) -> list[Kernel]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # What names a thread or a process has other types in these places
    return table(msgspec.convert(msgspec.json.decode(data), _Trace, strict=False).traceEvents)


async def read_in_child(path: Path) -> list[Kernel]:
    """Raises OSError, ValueError, TimeoutError where there is no table to be had."""
    size = (await asyncio.to_thread(path.stat)).st_size
    if size > MAX_TRACE_BYTES:
        raise ValueError(f"the trace of {size >> 20} MiB is too large to read")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", __name__, str(path), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(READ_SECONDS):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise ValueError(f"who reads it ended with {process.returncode}")
    return msgspec.json.decode(said, type=list[Kernel])


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(read(Path(sys.argv[1]))))
