"""An image model's version over real replica processes: the fake painter, and a tiny pipeline of diffusers."""

import asyncio
from contextlib import aclosing

import numpy as np
import pytest
import pytest_asyncio

from fairlead.backends import BACKENDS, fake_painter
from fairlead.core.errors import InvalidRequest, ModelError, QueueFull, ReplicaDied, Unsupported
from fairlead.core.generation import Delta, Paint, Picture, Progress, Usage
from fairlead.core.pictures import decode_image, metadata_of
from fairlead.core.request import Request
from fairlead.core.specs import DiffusionSpec, ModelSpec
from fairlead.core.tensors import object_array
from fairlead.observe.metrics import Metrics
from fairlead.runtime.engine_version import joined
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.loading import load_version
from fairlead.runtime.repository import ModelRepository, RepositorySettings
from tests.diffusion import tiny

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECONDS = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forkserver():
    server = ForkServer("critical", "json")
    yield server
    await server.close()


@pytest_asyncio.fixture(loop_scope="module")
async def load(forkserver, tmp_path, monkeypatch):
    """Loads versions of the painter, and drains them after the test."""
    monkeypatch.setitem(BACKENDS, fake_painter.KIND.name, fake_painter.KIND)
    loaded = []

    async def load(**diffusion):
        parameters = {"size": 16, "step_seconds": 0.001}
        spec = ModelSpec(name="art", backend="fake_painter", parameters=parameters, diffusion=DiffusionSpec(**diffusion))
        loaded.append(await load_version(spec, "3", tmp_path, forkserver))
        return loaded[-1]

    yield load
    await asyncio.gather(*(version.drain(0.0) for version in loaded))


async def deltas(inference, model="art", **fields):
    request = Request(model=model, prompt=Paint(**{"text": "a seven", "seed": 1} | fields))
    async with asyncio.timeout(SECONDS), aclosing(inference.infer(request)) as responses:
        return [response.delta async for response in responses]


async def test_progress_pictures_and_cost_come_through_the_process(load):
    version = await load()
    assert version.info.tasks == ("paint",) and version.info.image.family == "fake"
    assert version.spec.inputs == version.spec.outputs == ()
    pieces = await deltas(version, n=3, format="webp", preview_steps=1)
    pictures = {piece.index: piece.picture for piece in pieces if piece.picture is not None}
    assert sorted(pictures) == [0, 1, 2] and pieces[-1].usage.num_steps == 12
    assert metadata_of(pictures[2].data)["model"] == "art@3" and pictures[2].seed == 3


async def test_a_reader_who_is_slow_misses_no_picture(load):
    version = await load(max_num_seqs=16)
    request = Request(model="art", prompt=Paint(text="a seven", n=8, num_steps=20, seed=1))
    async with asyncio.timeout(SECONDS), aclosing(version.infer(request)) as responses:
        first = await anext(responses)
        while version.metrics.success.count == 0:
            await asyncio.sleep(0.005)
        later = [response.delta async for response in responses]
    pieces = [first.delta, *later]
    assert sorted(piece.picture.seed for piece in pieces if piece.picture is not None) == list(range(1, 9))
    assert len(later) == 8 and all(piece.progress.step == 20 for piece in later)
    assert [piece.usage is not None for piece in pieces] == [False] * 8 + [True]


async def test_pieces_of_one_picture_that_wait_are_joined():
    def at(step, preview=b"", **fields):
        return Delta(index=1, progress=Progress(step=step, num_steps=4, preview=preview), **fields)

    assert joined(at(1), at(2, b"seen")).progress == Progress(step=2, num_steps=4, preview=b"seen")
    assert joined(at(2, b"seen"), at(3)).progress == Progress(step=3, num_steps=4, preview=b"seen")
    picture = Picture(data=b"x", content_type="image/png", width=1, height=1, seed=1, num_steps=4, guidance=1.0, scheduler="")
    whole = joined(joined(at(3), at(4)), Delta(index=1, picture=picture, finish_reason="stop", usage=Usage(num_steps=4)))
    assert (whole.progress.step, whole.picture, whole.finish_reason, whole.usage.num_steps) == (4, picture, "stop", 4)


async def test_a_caller_who_leaves_stops_the_painting(load):
    version = await load()
    request = Request(model="art", prompt=Paint(text="a seven", num_steps=100))
    async with asyncio.timeout(SECONDS), aclosing(version.infer(request)) as responses:
        await anext(responses)
    assert (await deltas(version))[-1].picture is not None
    async with asyncio.timeout(SECONDS):
        while version.stats.finished != {"abort": 1, "stop": 1}:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"width": 10}, InvalidRequest, "`width` must be a multiple of 8"),
        ({"mode": "balanced"}, Unsupported, "`mode`"),
        ({"text": "!raise"}, ModelError, "it was asked to"),
    ],
)
async def test_what_is_wrong_comes_back_through_the_process(load, fields, error, said):
    version = await load()
    with pytest.raises(error, match=said):
        await deltas(version, **fields)


async def test_it_takes_no_tensors(load):
    version = await load()
    for inputs in ({}, {"text_input": object_array([b"a seven"], (1,))}):
        with pytest.raises((Unsupported, InvalidRequest), match="makes pictures|unexpected inference input|expected 0 inputs"):
            async with asyncio.timeout(SECONDS), aclosing(version.infer(Request(model="art", inputs=inputs))) as responses:
                await anext(responses)


async def test_its_section_bounds_it(load):
    version = await load(max_num_seqs=1, max_waiting=1, step_timeout=1.0)
    assert version.instances[0].max_in_flight == 2
    requests = [asyncio.create_task(deltas(version, num_steps=50)) for _ in range(3)]
    ended = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(each) for each in ended].count(QueueFull) == 1
    with pytest.raises(ReplicaDied, match=r"a step took longer than `diffusion\.step_timeout`"):
        await deltas(version, text="!hang")


async def test_a_process_that_dies_is_started_again(load):
    version = await load()
    with pytest.raises(ReplicaDied, match="exit code 7"):
        await deltas(version, text="!crash")
    async with asyncio.timeout(SECONDS):
        while not version.ready:
            await asyncio.sleep(0.005)
    assert (await deltas(version))[-1].picture is not None


async def test_a_pipeline_of_diffusers_is_served_from_its_folder(tmp_path, forkserver):
    tiny.save("sd", tmp_path / "art" / "2")
    (tmp_path / "art" / "model.yaml").write_text("diffusion: {num_steps: 3, width: 32, height: 32, max_num_seqs: 4}\n")
    metrics = Metrics()
    repository = ModelRepository(RepositorySettings(sources=(str(tmp_path),), cache_folder=tmp_path / ".cache"), metrics, forkserver)
    try:
        await repository.start()
        assert repository.engine_info("art").image.num_steps == 3
        many = await asyncio.gather(*(deltas(repository, "art", seed=seed, num_steps=3 + seed) for seed in range(6)))
        alone = await deltas(repository, "art", seed=2, num_steps=5)
        seen = [decode_image(pieces[-1].picture.data, "picture", 32, 32).astype(int) for pieces in (many[2], alone, many[3])]
        assert np.abs(seen[0] - seen[1]).max() <= 1 < np.abs(seen[0] - seen[2]).max()
        assert metadata_of(alone[-1].picture.data)["model"] == "art@2"
        async with asyncio.timeout(SECONDS):
            while 'fairlead_pictures_total{model="art",version="2"} 7.0' not in metrics.text("")[1].decode():
                await asyncio.sleep(0.01)
        assert 'fairlead_denoising_steps_total{model="art",version="2"} 38.0' in metrics.text("")[1].decode()
    finally:
        await repository.stop()
