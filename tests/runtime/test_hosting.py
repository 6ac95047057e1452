"""Versions that come from no source: whoever hosts them decides which are loaded, and which one answers."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from fairlead.core.config import read_yaml
from fairlead.core.errors import InvalidRequest, LoadError, NotFound
from fairlead.core.request import Request
from fairlead.core.specs import ModelSpec
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import Control, Hosted, ModelRepository, RepositorySettings

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
