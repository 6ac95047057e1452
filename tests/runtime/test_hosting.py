"""Versions that come from no source: whoever hosts them decides which are loaded, and which one answers."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from fairlead.core.config import read_yaml
from fairlead.core.errors import InvalidRequest, LoadError, NotFound, ShuttingDown
from fairlead.core.request import Request
from fairlead.core.specs import ModelSpec
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import Control, Hosted, ModelRepository, RepositorySettings
from fairlead.runtime.version import Version

MODEL = """
import numpy as np

class Model:
    example = {{"x": np.zeros((1, 2), np.float32)}}

    def infer(self, inputs):
        return {{"y": inputs["x"] + {add}}}
"""


def hosted(tmp_path: Path, number: int, *, seconds: float = 0.0, name: str = "add") -> Hosted:
    """A model that adds its version number, and whose files take a while to come."""
    folder = tmp_path / f"{name}-{number}"
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(MODEL.format(add=number))

    def fetch() -> Path:
        time.sleep(seconds)
        return folder

    return Hosted(read_yaml("instances: {isolation: thread}\n", ModelSpec, "spec").replace(name=name), fetch, f"edition-{number}")


@pytest.fixture
async def models(tmp_path):
    (tmp_path / "sources").mkdir()
    folder = tmp_path / "sources" / "own" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL.format(add=100))
    (tmp_path / "sources" / "own" / "model.yaml").write_text("instances: {isolation: thread}\n")
    made = ModelRepository(
        RepositorySettings(sources=(str(tmp_path / "sources"),), control=Control.EXPLICIT, load=("*",), drain_timeout=5.0), Metrics()
    )
    await made.start()
    yield made
    await made.stop()


async def ask(of: ModelRepository, name: str = "add", version: str = "") -> float:
    request = Request(model=name, version=version, inputs={"x": np.zeros((1, 2), np.float32)})
    (answer,) = [response async for response in of.infer(request)]
    return float(answer.outputs["y"][0, 0])


async def test_versions_come_and_go_one_by_one(models, tmp_path):
    await models.host("add", 3, hosted(tmp_path, 3), 10.0)
    await models.host("add", 4, hosted(tmp_path, 4), 10.0)
    assert (await ask(models), await ask(models, version="3")) == (4, 3)
    models.prefer("add", 3)
    assert await ask(models) == 3
    assert models.edition("add", "4") == "edition-4"
    models.release("add", 3)
    assert await ask(models) == 4
    models.release("add", 4)
    with pytest.raises(NotFound, match="is not found"):
        models.find("add")
    assert not models.known("add")


async def test_hosting_the_same_twice_loads_it_once(models, tmp_path):
    one = hosted(tmp_path, 1)
    await asyncio.gather(models.host("add", 1, one, 10.0), models.host("add", 1, one, 10.0))
    assert models.versions("add") == ["1"]


async def test_a_version_whose_files_do_not_come_in_time_is_given_up(models, tmp_path):
    await models.host("add", 1, hosted(tmp_path, 1), 10.0)
    with pytest.raises(LoadError, match=r"not loaded within 0\.05 s"):
        await models.host("add", 2, hosted(tmp_path, 2, seconds=0.5), 0.05)
    assert models.hosted()["add"][2].state == "UNAVAILABLE"
    assert await ask(models) == 1


async def test_a_version_that_cannot_be_loaded_says_why(models, tmp_path):
    broken = hosted(tmp_path, 2)
    (tmp_path / "add-2" / "model.py").write_text("import nothing_of_that_name")
    with pytest.raises(LoadError, match="nothing_of_that_name"):
        await models.host("add", 2, broken, 10.0)
    models.release("add", 2)
    assert not models.known("add")


async def test_a_name_belongs_to_a_source_or_to_the_host(models, tmp_path):
    with pytest.raises(LoadError, match="too: rename one"):
        await models.host("own", 2, hosted(tmp_path, 2, name="own"), 10.0)
    await models.host("add", 1, hosted(tmp_path, 1), 10.0)
    with pytest.raises(InvalidRequest, match="deployed from the registry"):
        await models.unload("add")
    await models.poll_once()
    assert await ask(models) == 1
    assert await ask(models, "own") == 100


class Files:
    """A version whose files come when they are let go."""

    def __init__(self, of: Hosted) -> None:
        self.asked, self.go = Event(), Event()

        def fetch() -> Path:
            self.asked.set()
            assert self.go.wait(30.0)
            return of.fetch()

        self.hosted = Hosted(of.spec, fetch, of.edition)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.asked.wait, 30.0)


class SlowToEnd(ModelRepository):
    """The clean-up of a cancelled load takes until it is let go."""

    def __init__(self, settings: RepositorySettings) -> None:
        super().__init__(settings, Metrics())
        self.ending, self.go = asyncio.Event(), asyncio.Event()

    async def _load_version(self, *args: Any) -> Version | None:
        try:
            return await super()._load_version(*args)
        except asyncio.CancelledError:
            self.ending.set()
            await self.go.wait()
            raise


async def test_a_version_that_is_wanted_again_while_its_cancelled_load_cleans_up_is_kept(tmp_path):
    models = SlowToEnd(RepositorySettings(sources=(), drain_timeout=5.0, cache_folder=tmp_path))
    await models.start()
    files = Files(hosted(tmp_path, 1))
    old = asyncio.create_task(models.host("add", 1, files.hosted, 30.0))
    await files.begun()
    old.cancel()
    await models.ending.wait()
    new = asyncio.create_task(models.host("add", 1, hosted(tmp_path, 1), 30.0))
    await asyncio.sleep(0)  # it begins
    files.go.set()
    models.go.set()
    with pytest.raises(asyncio.CancelledError):
        await old
    await new
    assert models.hosted()["add"][1].state == "READY"
    assert await ask(models) == 1
    models.release("add", 1)
    assert not models.known("add")
    await models.stop()


async def test_the_clean_up_of_one_version_leaves_another_that_is_loading(models, tmp_path):
    one, two = Files(hosted(tmp_path, 1)), Files(hosted(tmp_path, 2))
    loads = [asyncio.create_task(models.host("add", number, files.hosted, 30.0)) for number, files in ((1, one), (2, two))]
    await one.begun()
    await two.begun()
    loads[0].cancel()
    one.go.set()
    two.go.set()
    with pytest.raises(asyncio.CancelledError):
        await loads[0]
    await loads[1]
    assert list(models.hosted()["add"]) == [2]


async def test_what_is_released_while_it_loads_does_not_serve(models, tmp_path):
    files = Files(hosted(tmp_path, 1))
    load = asyncio.create_task(models.host("add", 1, files.hosted, 30.0))
    await files.begun()
    models.release("add", 1)
    files.go.set()
    with pytest.raises(ShuttingDown, match="released meanwhile"):
        await load
    assert not models.known("add")


async def test_the_time_of_what_waits_for_its_turn_does_not_run(tmp_path):
    models = ModelRepository(RepositorySettings(sources=(), load_concurrency=1, drain_timeout=5.0, cache_folder=tmp_path), Metrics())
    await models.start()
    hanging = Files(hosted(tmp_path, 1, name="hangs"))
    first = asyncio.create_task(models.host("hangs", 1, hanging.hosted, 30.0))
    await hanging.begun()
    waiting = asyncio.create_task(models.host("add", 1, hosted(tmp_path, 1), 0.05))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    hanging.go.set()
    await first
    await asyncio.wait([waiting])
    await models.stop()
    with suppress(LoadError):  # a slow machine
        await waiting


async def test_sources_and_the_host_do_not_take_each_others_turn(tmp_path):
    folder = tmp_path / "sources" / "own" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL.format(add=100))
    (tmp_path / "sources" / "own" / "model.yaml").write_text("instances: {isolation: thread}\n")
    settings = RepositorySettings(
        sources=(str(tmp_path / "sources"),), control=Control.EXPLICIT, load_concurrency=1, drain_timeout=5.0, cache_folder=tmp_path
    )
    models = ModelRepository(settings, Metrics())
    await models.start()
    hanging = Files(hosted(tmp_path, 1))
    load = asyncio.create_task(models.host("add", 1, hanging.hosted, 60.0))
    await hanging.begun()
    async with asyncio.timeout(30.0):
        await models.load("own")
    assert await ask(models, "own") == 100
    assert not load.done()
    hanging.go.set()
    await load
    await models.stop()
