"""Loading, swapping and unloading, with real Python models in threads."""

import asyncio
import gc
import json
import os
import shutil
import signal
import weakref
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from fairlead.core.errors import ConfigError, FairleadError, InvalidRequest, LoadError, NotFound, ShuttingDown, Unavailable
from fairlead.core.request import Request
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import Control, ModelRepository, RepositorySettings

MODEL = """
import numpy as np

class Model:
    example = {{"x": np.zeros((1, 2), np.float32)}}

    def infer(self, inputs):
        return {{"y": inputs["x"] + {add}}}
"""
IN_A_THREAD = "instances: {isolation: thread}\n"


def put(root: Path, name: str, *versions: int, spec: str = "") -> None:
    """Write a model that adds its version number."""
    for number in versions:
        folder = root / name / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.py").write_text(MODEL.format(add=number))
    (root / name / "model.yaml").write_text(IN_A_THREAD + spec)


@asynccontextmanager
async def repository(root: object, tmp_path: Path, **fields: object):
    made = ModelRepository(
        RepositorySettings(sources=(str(root),), cache_folder=tmp_path / "cache", drain_timeout=5.0, **fields), Metrics()
    )  # type: ignore[arg-type]
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


async def ask(of: ModelRepository, name: str, version: str = "") -> float:
    request = Request(model=name, version=version, inputs={"x": np.zeros((1, 2), np.float32)})
    (answer,) = [response async for response in of.infer(request)]
    return float(answer.outputs["y"][0, 0])


def states(of: ModelRepository) -> dict[str, str]:
    return {f"{entry.name}@{entry.version}": str(entry.state) for entry in of.index()}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "models"


async def test_the_latest_version_answers_unless_another_is_asked_for(root, tmp_path):
    put(root, "add", 1, 2, spec="version_policy: {all: true}")
    async with repository(root, tmp_path) as models:
        assert await ask(models, "add") == 2
        assert await ask(models, "add", "1") == 1
        assert models.versions("add") == ["1", "2"]
        assert models.ready


async def test_by_default_only_the_latest_version_is_loaded(root, tmp_path):
    put(root, "add", 1, 2)
    async with repository(root, tmp_path) as models:
        assert models.versions("add") == ["2"]
        with pytest.raises(NotFound, match="Request for unknown model: 'add' version 1 is not found"):
            await ask(models, "add", "1")


async def test_an_unknown_model_is_said_in_tritons_words(root, tmp_path):
    put(root, "add", 1)
    async with repository(root, tmp_path) as models:
        with pytest.raises(NotFound, match="^Request for unknown model: 'sub' is not found$"):
            await ask(models, "sub")


async def test_a_model_that_fails_to_load_is_reported_and_the_others_serve(root, tmp_path):
    put(root, "good", 1)
    put(root, "bad", 1)
    (root / "bad/1/model.py").write_text("import nothing_of_this_name\n")
    (root / "hollow").mkdir()
    async with repository(root, tmp_path) as models:
        assert await ask(models, "good") == 1
        assert models.ready
        assert states(models) == {"bad@1": "UNAVAILABLE", "good@1": "READY", "hollow@": "UNAVAILABLE"}
        failures = models.failures()
        assert "nothing_of_this_name" in failures["bad@1"]
        assert "no artefact" in failures["hollow"]
        assert models.metrics.loads["bad", "failure"] == 1
        with pytest.raises(NotFound, match="'bad' has no available versions"):
            await ask(models, "bad")


async def test_with_strict_readiness_one_failure_makes_the_server_not_ready(root, tmp_path):
    put(root, "good", 1)
    put(root, "bad", 1, spec="nonsense: 1")
    async with repository(root, tmp_path, strict_readiness=True) as models:
        assert not models.ready
        assert "unknown key `nonsense`" in models.failures()["bad"]


async def test_with_strict_readiness_a_model_whose_replica_died_makes_the_server_not_ready(root, tmp_path):
    put(root, "add", 1)
    (root / "add" / "model.yaml").write_text("instances: {isolation: process}\n")
    async with repository(root, tmp_path, strict_readiness=True) as models:
        assert models.ready
        (slot,) = models.find("add").slots
        os.kill(slot.instance.pid, signal.SIGKILL)
        while slot.instance.ready:
            await asyncio.sleep(0)
        assert not models.ready
        while not slot.instance.ready:
            await asyncio.sleep(0.01)
        assert models.ready


async def test_polling_serves_a_new_version_and_drains_the_old(root, tmp_path):
    put(root, "add", 1)
    async with repository(root, tmp_path, control=Control.POLL, poll_seconds=3600.0) as models:
        put(root, "add", 2)
        await models.poll_once()
        assert await ask(models, "add") == 1, "seen for the first time: it may still be being copied"
        await models.poll_once()
        assert await ask(models, "add") == 2
        assert models.versions("add") == ["2"]


async def test_an_edition_is_that_of_the_files_wherever_they_are(root, tmp_path):
    put(root, "add", 1)
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere")
    async with repository(root, tmp_path) as models, repository(elsewhere, tmp_path) as copied:
        first = models.edition("add", "1")
        assert first and copied.edition("add", "1") == first
        assert models.edition("add", "2") == models.edition("nobody", "1") == ""
    put(root, "add", 1)
    os.utime(root / "add/1/model.py", (1.0, 1.0))
    async with repository(root, tmp_path) as models:
        assert models.edition("add", "1") not in ("", first)
    put(elsewhere, "add", spec="batching: {max_batch_size: 2}\n")
    async with repository(elsewhere, tmp_path) as copied:
        assert copied.edition("add", "1") not in ("", first)


async def test_polling_finds_new_models_and_drops_removed_ones(root, tmp_path):
    put(root, "add", 1)
    async with repository(root, tmp_path, control=Control.POLL, poll_seconds=3600.0) as models:
        put(root, "more", 4)
        shutil.rmtree(root / "add")
        await models.poll_once()
        await models.poll_once()
        assert await ask(models, "more") == 4
        with pytest.raises(NotFound, match="is not found"):
            await ask(models, "add")
        assert states(models) == {"more@4": "READY"}


async def test_a_broken_update_leaves_the_old_version_serving(root, tmp_path):
    put(root, "add", 1)
    async with repository(root, tmp_path, control=Control.POLL, poll_seconds=3600.0) as models:
        put(root, "add", 2)
        (root / "add/2/model.py").write_text("raise ValueError('half a file')\n")
        await models.poll_once()
        await models.poll_once()
        assert await ask(models, "add") == 1
        assert "half a file" in models.failures()["add@2"]
        put(root, "add", 2)
        await models.poll_once()
        await models.poll_once()
        assert await ask(models, "add") == 2
        assert models.failures() == {}


async def test_no_request_is_lost_while_versions_are_swapped(root, tmp_path):
    put(root, "add", 1)
    async with repository(root, tmp_path, control=Control.POLL, poll_seconds=3600.0) as models:
        answers: list[float] = []
        enough = asyncio.Event()

        async def client() -> None:
            while not enough.is_set():
                answers.append(await ask(models, "add"))

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for number in (2, 3):
            put(root, "add", number)
            await models.poll_once()
            await models.poll_once()
        while answers[-1:] != [3.0]:
            await asyncio.sleep(0)
        enough.set()
        await asyncio.gather(*clients)
        assert set(answers) >= {1.0, 3.0}
        assert answers == sorted(answers)


async def test_explicit_mode_loads_what_it_is_told_to(root, tmp_path):
    put(root, "add", 1)
    put(root, "other", 7)
    async with repository(root, tmp_path, control=Control.EXPLICIT, load=("other",)) as models:
        assert states(models) == {"add@": "", "other@7": "READY"}
        await models.load("add")
        assert await ask(models, "add") == 1
        await models.unload("add")
        with pytest.raises(NotFound, match="has no available versions"):
            await ask(models, "add")
        assert states(models) == {"add@1": "UNAVAILABLE", "other@7": "READY"}
        await models.load("add")
        assert await ask(models, "add") == 1


async def test_an_explicit_load_may_bring_its_own_config_and_files(root, tmp_path):
    root.mkdir()
    async with repository(root, tmp_path, control=Control.EXPLICIT) as models:
        await models.load("fresh", config=IN_A_THREAD, files={"3/model.py": MODEL.format(add=30).encode()})
        assert await ask(models, "fresh", "3") == 30
        with pytest.raises(FairleadError, match="does not lie inside"):
            await models.load("fresh", config=IN_A_THREAD, files={"../evil.py": b""})
        with pytest.raises(FairleadError, match="together with a `config`"):
            await models.load("fresh", files={"1/model.py": b""})


async def test_a_request_cannot_bring_a_program_to_run(root, tmp_path):
    root.mkdir()
    ran = tmp_path / "ran"
    config = json.dumps({"backend": "openai", "engine": {"command": ["touch", str(ran)]}})
    async with repository(root, tmp_path, control=Control.EXPLICIT) as models:
        with pytest.raises(InvalidRequest, match="`engine` cannot come with a request"):
            await models.load("fresh", config=config, files={"1/model.py": b""})
    assert not ran.exists()


async def test_given_files_are_kept_while_they_serve_and_no_longer(root, tmp_path):
    root.mkdir()
    async with repository(root, tmp_path, control=Control.EXPLICIT) as models:
        await models.load("fresh", config=IN_A_THREAD, files={"3/model.py": MODEL.format(add=30).encode()})
        (serving,) = models._models["fresh"].given
        with pytest.raises(LoadError, match="no good"):
            await models.load("fresh", config=IN_A_THREAD, files={"3/model.py": b"raise ValueError('no good')"})
        assert await ask(models, "fresh") == 30
        assert (serving / "3/model.py").exists()
        await models.load("fresh", config=IN_A_THREAD, files={"3/model.py": MODEL.format(add=31).encode()})
        assert not serving.exists()
        (serving,) = models._models["fresh"].given
        await models.unload("fresh")
        assert not serving.exists()


async def test_a_failing_explicit_load_says_why_and_keeps_the_old_one(root, tmp_path):
    put(root, "add", 1)
    async with repository(root, tmp_path, control=Control.EXPLICIT, load=("*",)) as models:
        (root / "add/1/model.py").write_text("raise OSError('disk on fire')\n")
        with pytest.raises(LoadError, match="disk on fire"):
            await models.load("add")
        assert await ask(models, "add") == 1
        with pytest.raises(NotFound, match="failed to poll from model repository"):
            await models.load("nothing")
        with pytest.raises(NotFound):
            await models.unload("nothing")


@pytest.mark.parametrize("control", [Control.NONE, Control.POLL])
async def test_outside_explicit_mode_loading_by_hand_is_refused(root, tmp_path, control):
    put(root, "add", 1)
    async with repository(root, tmp_path, control=control) as models:
        for action in (models.load, models.unload):
            with pytest.raises(Unavailable, match="explicit model load / unload is not allowed"):
                await action("add")


async def test_unloading_lets_go_of_the_models_memory(root, tmp_path, freezing):
    put(root, "add", 1)
    async with repository(root, tmp_path, control=Control.EXPLICIT, load=("*",)) as models:
        held = weakref.ref(models.find("add").slots[0].instance.executable)
        await ask(models, "add")
        await models.unload("add")
        gc.collect()
        assert held() is None
        assert models.metrics.models == {}


async def test_a_stopping_repository_refuses_and_is_not_ready(root, tmp_path):
    put(root, "add", 1)
    async with repository(root, tmp_path) as models:
        models.stopping = True
        assert not models.ready
        with pytest.raises(ShuttingDown, match="Server is stopping"):
            await ask(models, "add")


async def test_a_model_to_load_that_no_source_has_is_a_configuration_error(root, tmp_path):
    put(root, "add", 1)
    with pytest.raises(ConfigError, match="model 'sub' is to be loaded but no source has it; there are: add"):
        async with repository(root, tmp_path, control=Control.EXPLICIT, load=("sub",)):
            pass


async def test_naming_models_to_load_where_nobody_heeds_it_is_a_configuration_error(root, tmp_path):
    put(root, "add", 1)
    with pytest.raises(ConfigError, match=r"models to load are named \(add\), which only `--control explicit` heeds"):
        async with repository(root, tmp_path, load=("add",)):
            pass


async def test_of_two_sources_with_the_same_name_the_first_serves(root, tmp_path):
    put(root, "add", 1)
    second = tmp_path / "second"
    put(second, "add", 2)
    put(second, "extra", 3)
    settings = RepositorySettings(sources=(str(root), str(second)), cache_folder=tmp_path / "cache")
    models = ModelRepository(settings, Metrics())
    await models.start()
    assert (await ask(models, "add"), await ask(models, "extra")) == (1, 3)
    await models.stop()
