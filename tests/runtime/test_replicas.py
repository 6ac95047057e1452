"""What is told of each replica of a loaded version."""

import asyncio

import pytest

from fairlead.backends import BACKENDS, fake_engine
from fairlead.core.specs import InstancesSpec, Isolation, LlmSpec, ModelSpec
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.loading import load_version
from fairlead.runtime.replicas import replicas_of
from tests.servers import IDENTITY


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(BACKENDS, fake_engine.KIND.name, fake_engine.KIND)


async def test_an_engines_replica_tells_of_its_memory_and_what_it_chose(fake, tmp_path):
    server = ForkServer("critical", "json")
    spec = ModelSpec(name="echo", backend="fake_engine", llm=LlmSpec(), instances=InstancesSpec(count=2))
    version = await load_version(spec, "3", tmp_path, server)
    try:
        first, second = replicas_of(version)
        assert (first.model, first.version, first.instance, first.kind, first.state) == ("echo", "3", 0, "process", "ready")
        assert first.pid and second.pid and first.pid != second.pid
        assert first.kv_blocks == first.kv_free == version.info.num_kv_blocks > 0
        assert first.block_size == version.info.block_size and first.explain == version.info.explain
        assert version.metrics.kv_bytes == 2 * first.kv_blocks * version.info.kv_block_bytes
    finally:
        await version.drain(0.0)
        await server.close()


@pytest.mark.parametrize(("isolation", "kind"), [(Isolation.THREAD, "inline"), (Isolation.PROCESS, "process")])
async def test_a_tensor_models_replicas_are_inside_or_apart(tmp_path, isolation, kind):
    (tmp_path / "model.py").write_text(IDENTITY)
    server = ForkServer("critical", "json")
    version = await load_version(ModelSpec(name="m", instances=InstancesSpec(isolation=isolation)), "1", tmp_path, server)
    (replica,) = replicas_of(version)
    assert (replica.kind, replica.state, replica.in_flight, replica.kv_blocks) == (kind, "ready", 0, 0)
    assert (replica.pid is not None) is (kind == "process")
    await version.drain(0.0)
    await asyncio.sleep(0)
    (replica,) = replicas_of(version)
    assert replica.pid is None
    await server.close()
