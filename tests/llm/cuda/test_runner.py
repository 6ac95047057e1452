"""Decoding steps that are captured and replayed give the tokens of steps that are launched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fairlead.core.generation import Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm.build import build_generator
from fairlead.llm.cuda.runner import Compute, CudaRunner, buckets_of
from fairlead.llm.engine import Engine
from tests.llm.tiny import tiny_checkpoint

NUM_SEQS = 12


class Recorder:
    """In the place of CUDA graphs: computes again over the same tensors, as a graph does."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, compute: Compute) -> Compute:
        self.num_captured += 1

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            return compute()

        return replay


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3")


@pytest.fixture
def build(checkpoint: Path) -> Callable[..., Engine]:
    torch.set_num_threads(1)
    sizes = {"block_size": 16, "max_num_seqs": NUM_SEQS, "max_batch_tokens": 48}

    def make(recorder: Recorder | None) -> Engine:
        spec = LlmSpec(kernels="torch", dtype="float32", max_model_len=96, kv_cache_bytes=1 << 20, **sizes)
        engine = build_generator(checkpoint, spec)[0]
        num_blocks = engine.scheduler.pool.num_blocks
        engine.runner = CudaRunner(engine.runner.decoder, num_blocks=num_blocks, max_model_len=96, **sizes, capture=recorder)
        return engine

    return make


def answers(engine: Engine) -> dict[int, list[int]]:
    """Sequences come and go, so that steps have every size."""
    found: dict[int, list[int]] = {}
    arriving = list(range(20))
    while arriving or engine.has_work:
        for id in arriving[:2]:
            sampling = Sampling(temperature=0.0 if id % 2 else 1.0, seed=id, max_tokens=5 + 3 * id % 17, ignore_eos=True)
            engine.add(id, [5 + id, 7, 9 + 2 * id][: 1 + id % 3] * (1 + id % 5), sampling, stream=False)
        del arriving[:2]
        for id, delta in engine.step():
            found[id] = delta.token_ids
        engine.scheduler.check_integrity()
    return found


def test_replayed_steps_give_the_tokens_of_launched_ones(build):
    recorder = Recorder()
    engine = build(recorder)

    assert answers(engine) == answers(build(None))
    assert recorder.num_captured >= 3, "sizes of several buckets"
    assert recorder.num_replayed > recorder.num_captured


def test_a_size_is_captured_when_it_comes_the_second_time(build):
    recorder = Recorder()
    engine = build(recorder)
    engine.add(1, [5, 6, 7], Sampling(temperature=0.0, max_tokens=4, ignore_eos=True))

    engine.step()  # the prompt
    engine.step()
    assert recorder.num_captured == 0
    engine.step()
    assert (recorder.num_captured, recorder.num_replayed) == (1, 1)
    engine.step()
    assert (recorder.num_captured, recorder.num_replayed) == (1, 2)


def test_steps_are_captured_anew_after_sleep(build):
    recorder = Recorder()
    engine = build(recorder)
    before = answers(engine)
    captured = recorder.num_captured
    engine.sleep()
    engine.wake()

    assert answers(engine) == before
    assert recorder.num_captured == 2 * captured


def test_what_fills_up_a_bucket_touches_no_block_of_a_sequence(build):
    engine = build(Recorder())
    pool_blocks = engine.scheduler.pool.num_blocks
    for id in range(5):  # of a bucket of 8
        engine.add(id, [5 + id, 6, 7], Sampling(temperature=0.0, max_tokens=4, ignore_eos=True))
    engine.step()
    held = sorted({block for sequence in engine.scheduler.running for block in sequence.blocks})
    free = sorted(set(range(pool_blocks)) - set(held))
    before = [layer.k[free].clone() for layer in engine.runner.cache]

    engine.step()
    engine.step()

    assert all(torch.equal(layer.k[free], old) for layer, old in zip(engine.runner.cache, before, strict=True))
    assert engine.runner.cache[0].k[pool_blocks].count_nonzero() > 0, "the block of their own"


def test_buckets():
    assert buckets_of(1) == (1,)
    assert buckets_of(3) == (1, 2, 3)
    assert buckets_of(20) == (1, 2, 4, 8, 16, 20)
    assert buckets_of(300)[-5:] == (224, 240, 256, 288, 300)
    assert max(b - a for a, b in zip(buckets_of(512), buckets_of(512)[1:], strict=False)) == 32
