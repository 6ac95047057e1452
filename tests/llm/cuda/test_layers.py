"""The CUDA kernels between the projections, computed by Triton's interpreter on the CPU, give what torch's operators give."""

import os

import pytest
import torch

from fairlead.llm.cuda.layers import TritonLayers
from fairlead.llm.decoder import add_norm, add_normed, head_norm, rotate
from fairlead.llm.linear import ACTIVATIONS

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # which makes a gate zero, as it should


@pytest.fixture
def layers():
    assert os.environ["TRITON_INTERPRET"] == "1"
    return TritonLayers()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[theirs.dtype], atol=TOLERANCE[theirs.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("round_first", [True, False])
@pytest.mark.parametrize(("size", "scale"), [(64, 1.0), (200, 0.25)])
def test_norms(layers, dtype, round_first, size, scale):
    x, y, weight = random(5, size).to(dtype), (random(5, size) * 3).to(dtype), random(size).to(dtype)
    ours, theirs = x.clone(), x.clone()

    close(layers.add_norm(ours, y, weight, 1e-6, scale, round_first), add_norm(theirs, y, weight, 1e-6, scale, round_first))
    close(ours, theirs)
    close(layers.add_norm(ours, None, weight, 1e-6, 1.0, round_first), add_norm(theirs, None, weight, 1e-6, 1.0, round_first))
    layers.add_normed(ours, y, weight, 1e-6, round_first)
    add_normed(theirs, y, weight, 1e-6, round_first)
    close(ours, theirs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("rotates", [True, False])
def test_heads_are_normed_and_rotated_and_stored(layers, dtype, norms, rotates):
    num_heads, num_kv_heads, size, block_size, num_tokens = 4, 2, 24, 16, 7
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * size).to(dtype)
    positions, slots = torch.tensor([0, 1, 2, 9, 30, 31, 5]), torch.tensor([17, 3, 40, 41, 0, 47, 20])
    angles = random(32, size // 2)
    cos, sin = (angles.cos(), angles.sin()) if rotates else (None, None)
    q_norm, k_norm = (random(size).to(dtype), random(size + 1)[1:].to(dtype)) if norms else (None, None)
    k_cache, v_cache = (torch.zeros(3, num_kv_heads, block_size, size, dtype=dtype) for _ in range(2))
    q, k, v = qkv.split([num_heads * size, num_kv_heads * size, num_kv_heads * size], 1)
    q, k = (head_norm(each, weight, size, 1e-6, True) for each, weight in ((q, q_norm), (k, k_norm)))
    if rotates:
        q, k = (rotate(each, cos[positions, None], sin[positions, None]) for each in (q, k))
    ours = qkv.clone()

    layers.rope_store(ours, positions, slots, cos, sin, k_cache, v_cache, q_norm, k_norm, num_heads, 1e-6, True)

    close(ours.view(num_tokens, -1, size)[:, :num_heads], q)
    close(k_cache[slots // block_size, :, slots % block_size], k)
    assert torch.equal(v_cache[slots // block_size, :, slots % block_size], v.reshape(num_tokens, num_kv_heads, size))
    assert k_cache.abs().sum(-1).count_nonzero() == num_tokens * num_kv_heads, "nothing else is written"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates(layers, dtype, activation):
    both = (random(3, 2 * 1500) * 4).to(dtype)
    gate, up = both.chunk(2, -1)

    close(layers.gated(both, activation), ACTIVATIONS[activation](gate) * up)
