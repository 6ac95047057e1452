"""The CUDA kernels, computed by Triton's interpreter on the CPU, agree with the oracle on any mixed batch."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fairlead.llm.attention.triton_attention import TritonAttention
from fairlead.llm.batch import LayerCache
from tests.llm.test_attention import ODD, Case, cases, exactly, oracle

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}

pytest.importorskip("triton")  # which has no wheels but for Linux


@pytest.fixture
def triton():
    assert os.environ["TRITON_INTERPRET"] == "1"
    return TritonAttention(num_processors=8)


def assert_right(triton, case: Case, *, unwritten: float = 100.0) -> None:
    """The interpreter multiplies no bfloat16: float16 stands in for it."""
    if case.dtype == torch.bfloat16:
        case = replace(case, dtype=torch.float16)
    q, layer, batch, spec = case.build(unwritten=unwritten)
    written = LayerCache(layer.k.nan_to_num(), layer.v.nan_to_num())

    out = triton.attend(q, layer, batch, spec)

    assert out.dtype == case.dtype
    torch.testing.assert_close(out.float(), exactly(q, written, batch, spec), rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_a_mixed_batch_of_any_shape(triton, case):
    assert_right(triton, case)


@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
def test_odd_shapes(triton, case):
    assert_right(triton, case)


@pytest.mark.parametrize(
    "case",
    [
        Case([1, 1], [1500, 3], group=4),
        Case([1], [1100], num_kv_heads=1, window=700, with_sinks=True, dtype=torch.bfloat16),
        Case([1, 1, 1], [900, 130, 1], softcap=20.0, with_sinks=True, num_shared=2),
    ],
)
def test_a_decode_is_split_over_its_context(triton, case):
    assert triton.num_parts(len(case.query_lens) * case.num_kv_heads, max(case.context_lens)) > 1
    assert_right(triton, case, unwritten=float("nan"))


def test_large_scores_stay_finite(triton):
    q, layer, batch, spec = Case([1, 15], [30, 33]).build()

    torch.testing.assert_close(triton.attend(q * 1e4, layer, batch, spec), exactly(q * 1e4, layer, batch, spec), rtol=1e-5, atol=1e-5)


def test_heads_of_a_fused_row_need_no_copy(triton):
    q, layer, batch, spec = Case([1, 1, 18], [20, 300, 18]).build()
    view = torch.cat([torch.full((len(q), 3, 32), 9.0), q, torch.full((len(q), 2, 32), 9.0)], 1)[:, 3:7]

    assert torch.equal(triton.attend(view, layer, batch, spec), triton.attend(q, layer, batch, spec))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tokens_go_to_their_slots(triton, dtype):
    fused_TRD = torch.randn(50, 8, 24).to(dtype)
    k, v = fused_TRD[:, 2:4], fused_TRD[:, 4:6, :16]
    slots = torch.randperm(6 * 16)[:50]
    mine, wanted = (LayerCache(torch.zeros(6, 2, 16, 24, dtype=dtype), torch.zeros(6, 2, 16, 16, dtype=dtype)) for _ in range(2))

    triton.store(k, v, mine, slots)
    oracle.store(k, v, wanted, slots)

    assert torch.equal(mine.k, wanted.k)
    assert torch.equal(mine.v, wanted.v)
    assert mine.k.count_nonzero() > 0


def test_the_parts_of_a_decode_fill_the_device(triton):
    assert triton.num_parts(1, 100_000) == 16  # 8 processors, 2 programs each
    assert triton.num_parts(4, 100_000) == 4
    assert triton.num_parts(1, 300) == 2
    assert triton.num_parts(1, 10) == triton.num_parts(64, 100_000) == 1
