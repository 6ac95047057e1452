"""Validation of one version, from the outside: nothing of the model's code runs in this process."""

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct, field

from fairlead.control.gates.plan import Plan, Signature
from fairlead.control.gates.report import GATES, GateResult, Outcome, Report, not_asked
from fairlead.control.scratch import CLOSE_SECONDS, Began, Ended, Event, Learned, packed_plan

log = structlog.get_logger("fairlead.control")

START_SECONDS = 60.0
"""Until the scratch process asks its first gate."""
MAX_LINE_BYTES = 16 << 20
LOG_CHUNKS, LOG_CHUNK_BYTES = 16, 4096
"""What is kept of what its processes write: the end."""
LOG_SECONDS = 2.0
"""For the rest of that, after its end."""

OnGate = Callable[[GateResult], None]


async def validate(plan: Plan, on_gate: OnGate | None = None) -> Report:
    """Every gate in a scratch process of its own, which is ended with all its children at a gate's deadline, or when this is
    cancelled. `on_gate` is told of each gate as it ends. Nothing that the version does raises anything here."""
    began = time.time()
    found = _Found(on_gate=on_gate or (lambda _: None))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "fairlead.control.scratch",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=MAX_LINE_BYTES,
    )
    words: deque[bytes] = deque(maxlen=LOG_CHUNKS)
    listening = asyncio.create_task(_listen(process, words))
    try:
        await _follow(process, plan, found)
    finally:
        _kill(process.pid)
        with suppress(TimeoutError):  # of what a process that left the group may hold open
            async with asyncio.timeout(LOG_SECONDS):
                await listening
        await process.wait()
    found.fill()
    return Report(
        model=plan.candidate.spec.name,
        version=plan.candidate.version,
        gates=tuple(found.gates),
        signature=found.signature,
        began=began,
        seconds=time.time() - began,
        log=b"".join(words).decode(errors="replace"),
    )


class _Found(Struct):
    """What is known by now."""

    on_gate: OnGate
    gates: list[GateResult] = field(default_factory=list)
    signature: Signature | None = None
    running: str = ""
    """The gate that is asked."""
    since: float = 0.0

    def add(self, result: GateResult) -> None:
        self.gates.append(result)
        self.running = ""
        self.on_gate(result)

    def broke_off(self, why: str) -> None:
        """The process is gone: that is the version's fault while a gate is asked."""
        if len(self.gates) < len(GATES):
            seconds = time.monotonic() - self.since if self.running else 0.0
            outcome = Outcome.FAILED if self.running else Outcome.ERROR
            self.add(GateResult(gate=GATES[len(self.gates)], outcome=outcome, message=why, seconds=seconds))

    def fill(self) -> None:
        """What was not asked any more."""
        for result in not_asked(GATES[len(self.gates) :], self.gates[-1]):
            self.add(result)

    @property
    def may_end(self) -> bool:
        """Whether the process has told all that there is to tell."""
        return len(self.gates) == len(GATES) or (bool(self.gates) and self.gates[-1].outcome in (Outcome.FAILED, Outcome.ERROR))


async def _follow(process: asyncio.subprocess.Process, plan: Plan, found: _Found) -> None:
    """Until the process has told all, is gone, or has to go."""
    assert process.stdin is not None and process.stdout is not None
    decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
    limit = START_SECONDS
    try:
        async with asyncio.timeout(START_SECONDS):
            process.stdin.write(packed_plan(plan))
            with suppress(ConnectionError):  # then there is no line to read either
                await process.stdin.drain()
        while True:
            async with asyncio.timeout(limit):
                line = await process.stdout.readline()
            if not line:
                break
            match decoder.decode(line):
                case Began(gate):
                    found.running, found.since = gate, time.monotonic()
                    limit = plan.checks.rules.deadline(gate)
                case Ended(result):
                    found.add(result)
                    limit = CLOSE_SECONDS
                case Learned(signature):
                    found.signature = signature
    except TimeoutError:
        found.broke_off(f"it did not end within {limit:g} s, and was ended")
        return
    except (ValueError, msgspec.DecodeError) as error:  # a line too long, or no event: only the version's code can have written it
        found.broke_off(f"its process told nonsense: {error}")
        return
    if found.running or not found.may_end:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOG_SECONDS):
                await process.wait()
        status = process.returncode
        how = "" if status is None else f" (signal {-status})" if status < 0 else f" (exit code {status})"
        found.broke_off(f"its process ended{how}")


async def _listen(process: asyncio.subprocess.Process, words: deque[bytes]) -> None:
    assert process.stderr is not None
    while chunk := await process.stderr.read(LOG_CHUNK_BYTES):
        words.append(chunk)


def _kill(pid: int) -> None:
    """The process, its group, and what left the group."""
    strays = _below(pid)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for stray in strays:
        with suppress(ProcessLookupError):
            if os.getpgid(stray) != pid:
                os.kill(stray, signal.SIGKILL)


def _below(pid: int) -> list[int]:
    """All processes that it started, and they, as far as the system tells."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, thread.read_text().split()):
                found += [child, *_below(child)]
    return found
