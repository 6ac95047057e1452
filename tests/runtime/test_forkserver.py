import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fairlead.backends import BACKENDS
from fairlead.core.errors import ShuttingDown
from fairlead.core.specs import ModelSpec
from fairlead.core.tensors import object_array
from fairlead.runtime import lives
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.process import ProcessInstance

MODELS = Path(__file__).parent / "process_models"
SECONDS = 20.0


@pytest.fixture
async def forkserver():
    server = ForkServer("error", "json")
    yield server
    await server.close()


def doubler(forkserver):
    return ProcessInstance(ModelSpec(name="doubler"), MODELS / "doubler" / "model.py", BACKENDS["python"], 1, forkserver, lambda: None)


async def works(instance):
    answer = asyncio.get_running_loop().create_future()
    instance.run([{"x": np.ones((1, 4), np.float32)}], None, lambda outputs, error: answer.set_result((outputs, error)))
    outputs, error = await asyncio.wait_for(answer, SECONDS)
    return error is None and (outputs["y"] == 2).all()


def ended(pidfds):
    """Waits, in a thread, until all these processes have ended."""
    import select

    for fd in pidfds:
        assert select.select([fd], [], [], SECONDS)[0], "a process lives on"
        os.close(fd)


async def test_it_starts_with_the_first_replica_and_ends_when_it_is_closed(forkserver):
    assert forkserver.pid is None
    instance = doubler(forkserver)
    await instance.start(SECONDS)
    pidfds = [os.pidfd_open(forkserver.pid), os.pidfd_open(instance.pid)]
    assert await works(instance)
    await instance.close()
    await forkserver.close()
    await asyncio.to_thread(ended, pidfds)
    assert forkserver.pid is None and forkserver.restarts == 0


async def test_many_replicas_start_at_once_from_one_server(forkserver):
    instances = [doubler(forkserver) for _ in range(5)]
    await asyncio.gather(*(instance.start(SECONDS) for instance in instances))
    assert len({instance.pid for instance in instances}) == 5
    assert all([await works(instance) for instance in instances])
    await asyncio.gather(*(instance.close() for instance in instances))


async def test_its_death_leaves_replicas_alone_and_the_next_one_starts_another(forkserver):
    orphan = doubler(forkserver)
    await orphan.start(SECONDS)
    first = forkserver.pid
    died = orphan._life.process.exited  # None when nobody is left who could tell
    os.kill(first, signal.SIGKILL)
    assert await asyncio.wait_for(asyncio.shield(died), SECONDS) is None
    assert forkserver.restarts == 1 and forkserver.pid is None
    assert await works(orphan)
    heir = doubler(forkserver)
    await heir.start(SECONDS)
    assert forkserver.pid not in (None, first)
    assert await works(heir) and await works(orphan)
    pidfds = [os.pidfd_open(instance.pid) for instance in (orphan, heir)]
    await asyncio.gather(orphan.close(), heir.close())
    await asyncio.to_thread(ended, pidfds)


async def test_an_orphan_that_dies_is_replaced_from_the_next_server(forkserver):
    changes: asyncio.Queue = asyncio.Queue()
    spec, artefact = ModelSpec(name="doubler"), MODELS / "doubler" / "model.py"
    instance = ProcessInstance(spec, artefact, BACKENDS["python"], 1, forkserver, lambda: changes.put_nowait(None))
    await instance.start(SECONDS)
    os.kill(forkserver.pid, signal.SIGKILL)
    os.kill(instance.pid, signal.SIGKILL)
    for _ in range(2):
        await asyncio.wait_for(changes.get(), SECONDS)
    assert instance.ready and await works(instance)
    await instance.close()


async def test_an_orphan_that_does_not_end_is_killed(forkserver, tmp_path, monkeypatch):
    monkeypatch.setattr(lives, "CLOSE_SECONDS", 0.2)
    began = tmp_path / "began"
    os.mkfifo(began)
    spec = ModelSpec(name="trouble", parameters={"began": str(began)})
    instance = ProcessInstance(spec, MODELS / "trouble" / "model.py", BACKENDS["python"], 1, forkserver, lambda: None)
    await instance.start(SECONDS)
    failed = asyncio.get_running_loop().create_future()
    instance.run([{"do": object_array([b"hang"], (1,))}], None, lambda outputs, error: failed.set_result(error))
    await asyncio.wait_for(asyncio.to_thread(began.read_text), SECONDS)
    pidfds = [os.pidfd_open(forkserver.pid), os.pidfd_open(instance.pid)]
    os.kill(forkserver.pid, signal.SIGKILL)
    await asyncio.wait_for(asyncio.shield(instance._life.process.exited), SECONDS)
    await instance.close()
    await asyncio.to_thread(ended, pidfds)
    assert isinstance(await failed, ShuttingDown)


GATEWAY = """
import asyncio, json, sys
from pathlib import Path
from fairlead.backends import BACKENDS
from fairlead.core.specs import ModelSpec
from fairlead.observe.logs import configure_logs
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.process import ProcessInstance

async def main(artefact):
    server = ForkServer("error", "json")
    instance = ProcessInstance(ModelSpec(name="m"), Path(artefact), BACKENDS["python"], 1, server, lambda: None)
    await instance.start(20)
    print(json.dumps([server.pid, instance.pid]), flush=True)
    await asyncio.Event().wait()

configure_logs("error")
asyncio.run(main(sys.argv[1]))
"""


def test_a_gateway_that_is_killed_takes_all_its_processes_with_it():
    with subprocess.Popen([sys.executable, "-c", GATEWAY, MODELS / "doubler" / "model.py"], stdout=subprocess.PIPE) as gateway:
        pidfds = [os.pidfd_open(pid) for pid in json.loads(gateway.stdout.readline())]
        gateway.kill()
        ended(pidfds)


def test_the_entry_point_says_what_it_is_for():
    ended = subprocess.run([sys.executable, "-m", "fairlead.runtime", "nonsense"], capture_output=True, check=False)
    assert ended.returncode == 2 and b"forkserver FD" in ended.stderr
