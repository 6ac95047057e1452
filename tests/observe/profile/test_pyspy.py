"""py-spy as a child: stacks of another process, and a readable reason where there are none."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fairlead.observe.profile import pyspy

BUSY = """
def busy():
    while True:
        sum(range(1000))

print("begun", flush=True)
busy()
"""


@pytest.fixture
def busy() -> Iterator[int]:
    """The pid of a process that does nothing else."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        yield process.pid
        process.kill()


@pytest.fixture
def gone() -> int:
    """That of one that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(30)
    return process.pid


async def test_another_processs_stacks_and_who_holds_its_lock(busy: int) -> None:
    if why := await pyspy.probe(os.getpid()):
        pytest.skip(why)
    found = await pyspy.record(busy, 1.0)
    holds = await pyspy.record(busy, 1.0, gil=True)
    assert found.num_samples == sum(found.stacks.values()) > 0
    assert all("busy (<string>:" in stack for stack in (*found.stacks, *holds.stacks)) and holds.num_samples > 0


async def test_a_process_that_is_not_there_is_an_error_in_a_sentence(gone: int) -> None:
    if pyspy.path_of() is None:
        pytest.skip("py-spy is not installed")
    with pytest.raises(pyspy.PySpyError) as failed:
        await pyspy.record(gone, 1.0)
    assert str(failed.value) and "\n" not in str(failed.value)
    assert (await pyspy.probe(gone)).startswith("py-spy: ")
