"""An engine's process: ended with all that it started, whoever ends first; what it prints."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fairlead.core.errors import LoadError
from fairlead.runtime.external import child as child_module
from fairlead.runtime.external.child import (
    INHERITED,
    INHERITED_FAMILIES,
    KEPT,
    LAST_LINES,
    LINES_PER_SECOND,
    MAX_LINE_CHARS,
    Child,
    Lines,
    inherited,
    resolved,
)

SECONDS = 30.0
FAMILY = "sleep 1000 & echo $!; setsid sleep 1000 & echo $!; wait"
"""A program with two children, of which one left its group."""
SERVER = """
import asyncio, os, sys
from fairlead.runtime.external.child import Child

async def main():
    child = Child("m", "1", ["sh", "-c", sys.argv[1]], os.environ, [])
    await child.start(5.0)
    while len(child.lines.last) < 2 or child.pid is None:
        await asyncio.sleep(0.01)
    print("family", child.pid, *child.lines.last, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


async def started(*command: str, stop_seconds: float = 10.0, secrets: tuple[str, ...] = ()) -> Child:
    child = Child("m", "1", command, os.environ, secrets)
    await child.start(stop_seconds)
    return child


async def test_all_that_it_started_ends_with_it() -> None:
    child = await started("sh", "-c", FAMILY)
    await until(lambda: len(child.lines.last) == 2 and child.pid is not None)
    family = [child.pid or 0, *map(int, child.lines.last)]
    assert all(map(runs, family))
    await child.stop()
    assert child.ended.result() == -signal.SIGTERM
    assert child.pid is None
    assert not any(map(runs, family))


async def test_what_it_left_behind_ends_where_it_dies_by_itself() -> None:
    child = await started("sh", "-c", FAMILY)
    await until(lambda: len(child.lines.last) == 2 and child.pid is not None)
    family = list(map(int, child.lines.last))
    os.kill(child.pid or 0, signal.SIGKILL)
    assert await asyncio.wait_for(child.ended, SECONDS) == -signal.SIGKILL
    assert not any(map(runs, family))
    await child.stop()  # there is nothing left to stop


async def test_one_that_does_not_listen_is_killed() -> None:
    child = await started("sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done", stop_seconds=0.1)
    await until(lambda: bool(child.lines.last))
    await child.stop()
    assert child.ended.result() == -signal.SIGKILL


async def test_it_ends_with_this_server_however_that_ends() -> None:
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, FAMILY, stdout=subprocess.PIPE)
    assert server.stdout is not None
    line = b""
    try:
        async with asyncio.timeout(SECONDS):
            while not line.startswith(b"family"):
                line = await server.stdout.readline()
        family = list(map(int, line.split()[1:]))
        assert len(family) == 3 and all(map(runs, family))
    finally:
        server.kill()
        await server.wait()
    await until(lambda: not any(map(runs, family)))


async def test_one_that_cannot_be_started_says_why() -> None:
    child = await started("/nowhere/at/all")
    assert await asyncio.wait_for(child.ended, SECONDS) == 127
    await until(lambda: bool(child.lines.last))
    assert child.last_words == "; the last lines of its log:\n/nowhere/at/all cannot be started: No such file or directory"


async def test_its_last_lines_are_kept_without_secrets() -> None:
    child = await started(
        "sh", "-c", "echo the key is hunter22-hunter22; echo api_key=abcdefgh; seq 40; exit 3", secrets=("hunter22-hunter22",)
    )
    assert await asyncio.wait_for(child.ended, SECONDS) == 3
    await until(lambda: "40" in child.lines.last)
    assert len(child.lines.last) == LAST_LINES
    lines = Lines("m", "1", ["hunter22"])
    lines.handed_over()
    lines._take(b"the key is hunter22; api_key=abcdefgh; " + b"x" * 1000)
    lines.close()
    assert lines.last[0].startswith("the key is [SECRET]; api_key=[SECRET]; xxx")
    assert len(lines.last[0]) == MAX_LINE_CHARS


async def test_a_flood_of_lines_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    second = [1.0]
    monkeypatch.setattr("time.monotonic", lambda: second[0])
    told: list[str] = []
    monkeypatch.setattr("fairlead.runtime.printed.log.info", lambda event, line, **_: told.append(line))
    monkeypatch.setattr(child_module.log, "warning", lambda event, num, **_: told.append(f"{event} {num}"))
    lines = Lines("m", "1", [])
    lines.handed_over()
    for number in range(LINES_PER_SECOND + 7):
        lines._take(str(number).encode())
    assert len(told) == LINES_PER_SECOND
    second[0] = 2.0
    lines._take(b"later")
    assert told[-2:] == ["lines_left_out 7", "later"]
    lines._take_all([b"%d" % number for number in range(50_000)])
    assert len(told) == 2 * LINES_PER_SECOND + 1
    assert lines.last == [str(number) for number in range(50_000 - LAST_LINES, 50_000)]
    second[0] = 3.0
    lines._take(b"")
    assert told[-1] == f"lines_left_out {50_001 - LINES_PER_SECOND}"
    lines.close()


def test_the_documentation_names_all_that_an_engine_is_given() -> None:
    text = (Path(__file__).parents[3] / "docs/engines.md").read_text()
    _, _, section = text.partition("## What it is given")
    named = set(re.findall(r"`([A-Za-z_]+)`", section.partition("\n## ")[0]))
    assert named - {"PYTHONPATH", "PYTHONHOME", *KEPT} == INHERITED | set(INHERITED_FAMILIES) and named.issuperset(KEPT)
    given = {"PATH": "/bin", "LC_ALL": "C", "HF_TOKEN": "hf", "VLLM_USE_V1": "1"}
    assert inherited(given | {"FAIRLEAD_STORE_URL": "postgresql://", "MY_HF_TOKEN": "x", "PATHS": "x", "Path": "x"}) == given
    assert inherited({"NVIDIA_API_KEY": "x", "VLLM_API_KEY": "x", "LMCACHE_REDIS_PASSWORD": "x"}) == {}


def test_a_program_is_looked_for_in_its_environment_first(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sh"
    program.write_text("")
    program.chmod(0o755)
    command, changes = resolved(["sh", "-c", "true"], str(tmp_path), "m")
    assert command == [str(program), "-c", "true"]
    assert changes["VIRTUAL_ENV"] == str(tmp_path) and changes["PATH"].startswith(f"{tmp_path}/bin:")
    assert resolved(["python", "-V"], "", "m") == ([sys.executable, "-V"], {})
    with pytest.raises(
        LoadError, match="there is no program `vllm-of-nobody` on the PATH: `engine.environment` says where it is installed"
    ):
        resolved(["vllm-of-nobody"], "", "m")
    with pytest.raises(LoadError, match="there is no environment at /nowhere, which `engine.environment` names"):
        resolved(["sh"], "/nowhere", "m")
