"""A model is looked at while it serves: nobody's request is any different for it, and what could not be had is said."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing

import numpy as np
import pytest
import pytest_asyncio

from fairlead.backends import BACKENDS, fake_engine
from fairlead.core.errors import NotFound
from fairlead.core.generation import Generate, Sampling
from fairlead.core.request import Request, Response
from fairlead.core.timeline import Timeline
from fairlead.observe.finished import Finished
from fairlead.observe.metrics import Metrics
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.profiler import Profiler, Wanted
from fairlead.runtime.repository import ModelRepository, RepositorySettings
from fairlead.store.transactions import Conflict
from tests.servers import IDENTITY, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECONDS = 30.0


async def forbidden(pid: int) -> str:
    return "it may not"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def repository(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ModelRepository]:
    folder = tmp_path_factory.mktemp("models")
    kind, BACKENDS[fake_engine.KIND.name] = BACKENDS.get(fake_engine.KIND.name), fake_engine.KIND
    write_model(folder, "inline", IDENTITY)
    write_model(folder, "apart", IDENTITY, spec="instances: {isolation: process, count: 2}\n")
    (folder / "echo").mkdir()
    (folder / "echo" / "model.yaml").write_text("backend: fake_engine\nparameters: {step_seconds: 0.001}\n")
    (folder / "echo" / "words.txt").write_text("none")
    repository = ModelRepository(
        RepositorySettings(sources=(str(folder),), cache_folder=folder / ".cache"), Metrics(), ForkServer("critical", "json")
    )
    await repository.start()
    assert repository.failures() == {}
    yield repository
    await repository.stop(0.0)
    if kind is None:
        del BACKENDS[fake_engine.KIND.name]


async def ask(repository: ModelRepository, request: Request) -> list[Response]:
    async with asyncio.timeout(SECONDS), aclosing(repository.infer(request)) as responses:
        return [response async for response in responses]


def text_of(responses: list[Response]) -> str:
    return "".join(response.delta.text for response in responses if response.delta is not None)


async def test_where_nobody_may_read_stacks_from_outside_every_process_looks_at_itself(repository: ModelRepository) -> None:
    finished = Finished()
    profiler = Profiler(repository, finished, forbidden)
    looking = asyncio.create_task(profiler.look(Wanted(model="apart", seconds=1.0)))
    request = Request(model="apart", inputs={"input": np.ones((1, 4), np.float32)})
    answers = 0
    while not looking.done():
        (response,) = await ask(repository, request)
        assert response.outputs["output"].tolist() == [[1.0] * 4]
        answers += 1
    found = await looking
    assert answers
    server, first, second = found.processes
    assert [each.sampler for each in found.processes] == ["in-process"] * 3
    assert (server.pid, server.name) == (os.getpid(), "server") and first.pid != second.pid
    assert all(each.num_samples > 0 and each.gil_share is None and each.stacks for each in found.processes)
    assert any("serve" in stack for stack in first.stacks.splitlines())
    assert all(each.memory and each.memory[0].rss > 1 << 20 for each in found.processes)
    assert any("without native code" in note and "it may not" in note for note in found.notes)
    assert any("nothing in this process uses torch" in note for note in found.notes)
    assert finished.listeners == []


async def test_an_engine_goes_on_while_it_is_looked_at(repository: ModelRepository) -> None:
    profiler = Profiler(repository, Finished(), forbidden)
    request = Request(model="echo", prompt=Generate(text="!forever on and on ", sampling=Sampling(max_tokens=300), stream=True))
    before = text_of(await ask(repository, request))
    found, meanwhile = await asyncio.gather(profiler.look(Wanted(model="echo", seconds=1.0, kinds=("cpu",))), ask(repository, request))
    assert text_of(meanwhile) == before != ""
    assert "FakeEngine" in found.processes[1].stacks


async def test_its_requests_are_counted_by_layer_as_long_as_it_is_looked_at(repository: ModelRepository) -> None:
    finished = Finished()
    profiler = Profiler(repository, finished, forbidden)

    def add(request_id: str) -> None:
        timeline = Timeline(request_id, "http", 0.0, model="inline", kind="infer", version="1")
        timeline.note(0.25, "decoded")
        timeline.ended, timeline.outcome = 1.0, "success"
        finished.add(timeline)

    add("before")
    looking = asyncio.create_task(profiler.look(Wanted(model="inline", seconds=1.0, kinds=("memory",))))
    while not finished.listeners:
        await asyncio.sleep(0)
    add("meanwhile")
    found = await looking
    add("after")
    assert (found.answer.num_requests, found.answer.seconds) == (1, 1.0)
    assert {layer.name: layer.share for layer in found.answer.layers} == {"read": 0.25, "gateway": 0.75}
    assert found.version == "1" and [each.name for each in found.processes] == ["server"]


async def test_one_at_a_time_and_of_models_that_are_there(repository: ModelRepository) -> None:
    profiler = Profiler(repository, Finished(), forbidden)
    with pytest.raises(NotFound):
        await profiler.look(Wanted(model="nobody"))
    looking = asyncio.create_task(profiler.look(Wanted(model="inline", seconds=1.0, kinds=("memory",))))
    await asyncio.sleep(0)
    with pytest.raises(Conflict, match="'inline' is being profiled"):
        await profiler.look(Wanted(model="apart"))
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert (await profiler.look(Wanted(model="inline", seconds=1.0, kinds=("memory",)))).model == "inline"


async def test_a_process_that_dies_meanwhile_is_a_note_and_not_an_error(repository: ModelRepository) -> None:
    profiler = Profiler(repository, Finished(), forbidden)
    looking = asyncio.create_task(profiler.look(Wanted(model="apart", seconds=1.0, kinds=("cpu",))))
    replica = repository.find("apart").processes[0]
    pid, life = replica.pid, replica._life
    assert pid is not None and life is not None
    while life.connection.on_frame == replica._on_frame:  # until it is asked
        await asyncio.sleep(0)
    os.kill(pid, 9)
    found = await looking
    assert any("replica 0: its process died" in note for note in found.notes)
    assert found.processes[2].stacks
