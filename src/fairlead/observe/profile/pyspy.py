"""py-spy, run as a child for so long: it reads the stacks of another process without that process's help."""

import asyncio
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from fairlead.observe.profile.stacks import Stacks, parsed

START_SECONDS = 30.0
"""Beyond the time that is asked for: it reads the symbols of libraries first."""
PROBE_SECONDS = 15.0


class PySpyError(Exception):
    """Why there are no stacks."""


class Recorded(Struct):
    stacks: Stacks
    num_samples: int


def path_of() -> str | None:
    """Beside this interpreter, or where the shell looks."""
    beside = Path(sys.executable).parent / "py-spy"
    return str(beside) if beside.exists() else shutil.which("py-spy")


async def probe(pid: int) -> str:
    """Why it cannot read that process; "" where it can."""
    program = path_of()
    if program is None:
        return "py-spy is not installed: pip install 'fairlead[profile]'"
    try:
        await _run([program, "dump", "--nonblocking", "--pid", str(pid)], PROBE_SECONDS)
    except PySpyError as error:
        return f"py-spy: {error}"
    return ""


async def record(pid: int, seconds: float, *, rate: int = 100, gil: bool = False, native: bool = False) -> Recorded:
    """`gil`: only samples of the thread that holds the interpreter's lock. `native`: with functions of C and C++. Raises PySpyError."""
    program = path_of()
    if program is None:
        raise PySpyError("py-spy is not installed")
    with tempfile.TemporaryDirectory(prefix="fairlead-profile-") as folder:
        out = Path(folder) / "stacks.txt"
        # Two of them may not stop the same process: the one that looks for the lock only looks
        options = ["--gil", "--nonblocking"] if gil else ["--native"] if native else []
        what = ["--pid", str(pid), "--duration", str(max(round(seconds), 1)), "--rate", str(rate), "--output", str(out)]
        await _run([program, "record", *what, "--format", "raw", "--threads", "--function", *options], seconds + START_SECONDS)
        stacks = parsed(await asyncio.to_thread(out.read_text, errors="replace")) if out.exists() else Stacks()
    return Recorded(stacks, sum(stacks.values()))


async def _run(command: list[str], seconds: float) -> None:
    """Raises PySpyError."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(seconds):
            _, said = await process.communicate()
    except TimeoutError:
        raise PySpyError(f"gave no answer within {seconds:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
        raise PySpyError(lines[0].removeprefix("Error: ") if lines else f"exit code {process.returncode}")
