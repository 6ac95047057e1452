"""An engine that gives its memory back while its process stays, and computes the same when it is awake."""

import gc
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fairlead.core.errors import FairleadError
from fairlead.core.generation import Sampling
from fairlead.core.specs import LlmSpec, SpeculationSpec
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine
from fairlead.llm.offload import Offloaded, offload_device
from tests.llm.adapters import ALL, tiny_adapter
from tests.llm.late import late
from tests.llm.tiny import tiny_checkpoint

SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 16, "max_num_seqs": 4, "kv_cache_bytes": 1 << 20}
PROMPT = [*range(40, 80)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    tiny_checkpoint(folder / "draft")
    tiny_adapter(folder, "fine", target_modules=ALL)
    return folder


def engine_of(checkpoint: Path, *, device: str = "cpu", **changes: Any) -> Engine:
    return build_generator(checkpoint, LlmSpec(**{**SMALL, **changes}), device=device)[0]


def tokens_of(engine: Engine, adapter: str = "") -> list[int]:
    use = engine.adapters.take(adapter) if adapter and engine.adapters is not None else None
    engine.add(1, PROMPT, Sampling(temperature=0.0, max_tokens=12, ignore_eos=True), adapter=use)
    found: list[int] = []
    while engine.has_work:
        for _, delta in engine.step():
            assert not isinstance(delta, FairleadError), delta
            found += delta.token_ids
    return found


@pytest.mark.parametrize("changes", [{}, {"decoder": "graph"}, {"speculation": SpeculationSpec(method="draft", draft="draft")}])
def test_it_forgets_prefixes_and_answers_as_before(checkpoint, changes):
    engine = engine_of(checkpoint, **changes)
    before = tokens_of(engine)
    assert tokens_of(engine) == before and engine.stats().num_prefix_hit_tokens == 32
    engine.sleep()
    assert engine.runner.cache == [] and engine.scheduler.pool.num_published == 0
    engine.scheduler.pool.check_integrity([])
    engine.wake()
    assert tokens_of(engine) == before and engine.stats().num_prefix_hit_tokens == 32, "what was known is gone"
    assert tokens_of(engine) == before and engine.stats().num_prefix_hit_tokens == 64, "and found again where it was computed again"


def test_a_draft_model_knows_nothing_of_blocks_that_are_gone(checkpoint):
    # A pool of four blocks, all of which are used each time: every second time in the same order
    engine = engine_of(checkpoint, speculation=SpeculationSpec(method="draft", draft="draft"), max_model_len=64, kv_cache_bytes=1 << 16)
    for _ in range(3):
        tokens_of(engine)
        told = engine.stats()
        assert told.num_accepted_tokens == told.num_drafted_tokens > 0, "it is the model itself, and right where it has its own K and V"
        engine.sleep()
        engine.wake()


def test_adapters_are_let_go_and_read_again(checkpoint):
    engine = engine_of(checkpoint)
    assert engine.adapters is not None
    before = tokens_of(engine, "fine")
    assert before != tokens_of(engine) and engine.adapters.num_loaded == 1
    engine.sleep()
    assert engine.adapters.num_loaded == engine.adapters.nbytes == 0
    engine.wake()
    assert tokens_of(engine, "fine") == before and engine.adapters.num_loads == 2


def test_the_machine_has_the_memory_of_a_full_pool_back(checkpoint):
    num_bytes, process = 256 << 20, psutil.Process()
    engine = engine_of(checkpoint, kv_cache_bytes=num_bytes)
    for layer in engine.runner.cache:
        layer.k.fill_(1.0)
        layer.v.fill_(1.0)
    del layer
    gc.collect()
    full = process.memory_info().rss
    engine.sleep()
    given_back = full - process.memory_info().rss
    assert given_back > 0.95 * num_bytes
    engine.wake()
    assert process.memory_info().rss < full - 0.95 * num_bytes, "it becomes memory again as it is used"
    assert len(tokens_of(engine)) == 12


def test_what_runs_is_not_put_to_sleep(checkpoint):
    engine = engine_of(checkpoint)
    engine.add(1, PROMPT, Sampling(max_tokens=4))
    with pytest.raises(AssertionError, match="requests run"):
        engine.sleep()


def test_it_falls_asleep_though_a_step_computes_for_those_that_left(checkpoint):
    # Given requests that are given up just before, while the device has a step of theirs
    engine = engine_of(checkpoint, overlap="on")
    before = tokens_of(engine)
    late(engine, captures=False)
    engine.add(2, PROMPT, Sampling(temperature=0.0, max_tokens=12, ignore_eos=True))
    engine.step()
    engine.step()
    engine.abort(2)
    assert engine.has_work
    engine.sleep()
    assert not engine.has_work and engine.runner.cache == []
    engine.wake()
    assert tokens_of(engine) == before


# Storages on the host


def test_tensors_and_their_views_are_what_they_were_when_their_memory_is_back(monkeypatch):
    monkeypatch.setattr("fairlead.llm.offload.CHUNK_BYTES", 1000)
    whole = torch.arange(700, dtype=torch.float32)
    small, empty = torch.arange(7, dtype=torch.int64), torch.zeros(0)
    rows, tail = whole.view(7, 100), whole[650:]
    parameter = torch.nn.Parameter(torch.ones(33, 3))
    offloaded = Offloaded([tail, whole, small, rows, empty, parameter], pinned=False)
    assert offloaded.nbytes == 2800 + 56 + 396
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in (whole, small, rows, tail, parameter))
    offloaded.restore()
    assert torch.equal(whole, torch.arange(700, dtype=torch.float32)) and torch.equal(small, torch.arange(7))
    assert torch.equal(tail, whole[650:]) and torch.equal(parameter, torch.ones(33, 3))
    rows[6, 99] = -1.0
    assert whole[699] == tail[-1] == -1.0, "a view is still one"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_cuda_device_has_its_memory_back(checkpoint, cuda_graphs):
    engine = engine_of(checkpoint, device="cuda", dtype="bfloat16", kv_cache_bytes=64 << 20, cuda_graphs=cuda_graphs)
    before = [tokens_of(engine) for _ in range(3)]
    held = torch.cuda.memory_allocated()
    for _ in range(2):
        engine.sleep()
        assert torch.cuda.memory_allocated() < 0.1 * held
        engine.wake()
        assert [tokens_of(engine) for _ in range(3)] == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_of_a_device_moves_whoever_holds_it():
    held = {"by": [torch.ones(1000, device="cuda")]}
    offloaded = offload_device()
    assert offloaded.nbytes >= 4000
    offloaded.restore()
    assert held["by"][0].sum().item() == 1000.0
