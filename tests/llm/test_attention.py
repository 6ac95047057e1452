"""All attention kernels agree with the oracle on any mixed batch, and the C++ one on more threads, strides and layouts."""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fairlead.llm import attention, kernels
from fairlead.llm.attention import NativeAttention, ReferenceAttention, TorchAttention, choose
from fairlead.llm.batch import AttentionSpec, LayerCache, StepBatch
from fairlead.llm.kernels.build import Loaded

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MAX_TOKENS = 40  # of a step: the oracle takes its time

oracle = ReferenceAttention()


@dataclass(frozen=True)
class PairsAttention(NativeAttention):
    """The C++ kernel with bfloat16 multiplied in pairs, whether or not that is this CPU's faster way."""

    def attend(self, q_THD, layer, batch, spec):
        tables = (batch.query_starts_S1, batch.context_lens_S, batch.block_tables_SB)
        return torch.ops.fairlead.attend(q_THD, layer.k, layer.v, *tables, spec.scale, spec.window, spec.softcap, spec.sinks_H, True)


@pytest.fixture(params=[TorchAttention, NativeAttention, PairsAttention])
def kernel(request):
    if issubclass(request.param, NativeAttention) and not kernels.load():
        pytest.skip(kernels.load().reason)
    return request.param()


@pytest.fixture
def native():
    if not kernels.load():
        pytest.skip(kernels.load().reason)
    return NativeAttention()


@pytest.fixture(autouse=True)
def one_thread():
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


@pytest.fixture
def native_threads(native):
    num = torch.ops.fairlead.num_threads()
    yield torch.ops.fairlead.set_num_threads
    torch.ops.fairlead.set_num_threads(num)


@dataclass
class Case:
    """One layer's step: `query_lens[s]` new tokens at the end of `context_lens[s]`; the first blocks of all are the same."""

    query_lens: list[int]
    context_lens: list[int]
    num_kv_heads: int = 2
    group: int = 2
    k_size: int = 32
    v_size: int = 32
    block_size: int = 16
    num_shared: int = 0
    window: int = 0
    softcap: float = 0.0
    with_sinks: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @functools.cached_property
    def random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def tables(self) -> torch.Tensor:
        """[S, B], blocks in no order."""
        needed = [-(-length // self.block_size) for length in self.context_lens]
        free = (torch.randperm(sum(needed) + 2, generator=self.random)).tolist()
        shared = [free.pop() for _ in range(min(self.num_shared, *needed))]
        tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
        for s, num in enumerate(needed):
            blocks = [*shared, *(free.pop() for _ in range(num - len(shared)))]
            tables[s, :num] = torch.tensor(blocks, dtype=torch.int32)
        return tables

    def build(self, *, unwritten: float = 100.0) -> tuple[torch.Tensor, LayerCache, StepBatch, AttentionSpec]:
        """`unwritten`: what lies in the slots of no token."""
        tables = self.tables()
        num_blocks = int(sum(-(-length // self.block_size) for length in self.context_lens)) + 2
        k = torch.full((num_blocks, self.num_kv_heads, self.block_size, self.k_size), unwritten)
        v = torch.full((num_blocks, self.num_kv_heads, self.block_size, self.v_size), unwritten)
        for table, length in zip(tables, self.context_lens, strict=True):
            slots = torch.arange(length)
            blocks, offsets = table[slots // self.block_size].long(), slots % self.block_size
            k[blocks, :, offsets] = self.normal(length, self.num_kv_heads, self.k_size)
            v[blocks, :, offsets] = self.normal(length, self.num_kv_heads, self.v_size)
        starts = torch.tensor([0, *self.query_lens]).cumsum(0)
        num_heads, num_tokens = self.num_kv_heads * self.group, int(starts[-1])
        q = self.normal(num_tokens, num_heads, self.k_size).to(self.dtype)
        none = torch.zeros(0, dtype=torch.int64)
        lens = torch.tensor(self.context_lens, dtype=torch.int32)
        batch = StepBatch(none, none, none, starts.int(), lens, tables, none, max(self.query_lens), max(self.context_lens))
        sinks = self.normal(num_heads) if self.with_sinks else None
        spec = AttentionSpec(self.k_size**-0.5, self.window, self.softcap, sinks)
        return q, LayerCache(k.to(self.dtype), v.to(self.dtype)), batch, spec


@st.composite
def cases(draw) -> Case:
    """Decodes, chunks with context, whole prompts, of any shape; small enough for the oracle."""
    query_lens = [1] * draw(st.integers(0, 3)) + draw(st.lists(st.integers(2, 15), max_size=2)) or [1]
    befores = [draw(st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 300))) for _ in query_lens]
    k_size = draw(st.sampled_from([16, 24, 32, 64, 80, 128]))
    return Case(
        query_lens=query_lens,
        context_lens=[before + length for before, length in zip(befores, query_lens, strict=True)],
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8])),
        k_size=k_size,
        v_size=draw(st.sampled_from([k_size, 16, 40, 128])),
        block_size=draw(st.sampled_from([16, 32])),
        num_shared=draw(st.integers(0, 2)),
        window=draw(st.sampled_from([0, 0, 1, 7, 33])),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0, 50.0])),
        with_sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_agrees(out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def exactly(q: torch.Tensor, layer: LayerCache, batch: StepBatch, spec: AttentionSpec) -> torch.Tensor:
    """By the oracle, float32 of the rounded inputs."""
    return oracle.attend(q.float(), LayerCache(layer.k.float(), layer.v.float()), batch, spec)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_a_mixed_batch_of_any_shape(kernel, case):
    q, layer, batch, spec = case.build()

    assert_agrees(kernel.attend(q, layer, batch, spec), exactly(q, layer, batch, spec), case.dtype)


ODD = {
    "sizes of no vector": Case([1, 20], [70, 20], k_size=7, v_size=5),
    "sizes of no vector, bfloat16": Case([1, 20], [70, 20], k_size=9, v_size=3, dtype=torch.bfloat16),
    "blocks of 8": Case([1, 20], [70, 33], block_size=8),
    "blocks of 24": Case([1, 20], [70, 33], block_size=24, dtype=torch.bfloat16),
    "latent attention": Case([1, 2], [40, 17], num_kv_heads=1, group=16, k_size=576, v_size=512),
    "latent attention, bfloat16": Case([1, 2], [40, 17], num_kv_heads=1, group=16, k_size=576, v_size=512, dtype=torch.bfloat16),
    "heads beyond one tile": Case([2], [50], num_kv_heads=1, group=100, k_size=16, v_size=16),
    "a sequence without new tokens": Case([1, 0, 3], [20, 20, 20]),
    "one token": Case([1], [1]),
}


@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
def test_odd_shapes(kernel, case):
    q, layer, batch, spec = case.build()

    assert_agrees(kernel.attend(q, layer, batch, spec), exactly(q, layer, batch, spec), case.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [0, 100])
def test_a_long_prompt_in_tiles(native, dtype, window):
    case = Case([300, 1, 200], [300, 600, 450], dtype=dtype, window=window, k_size=64, v_size=48, group=3)
    q, layer, batch, spec = case.build()
    # Torch's own, in float32, has just been held against the oracle.
    exact = TorchAttention().attend(q.float(), LayerCache(layer.k.float(), layer.v.float()), batch, spec)

    assert_agrees(native.attend(q, layer, batch, spec), exact, dtype)
    assert_agrees(PairsAttention().attend(q, layer, batch, spec), exact, dtype)


@pytest.mark.parametrize(
    "case", [Case([1], [3000], num_kv_heads=1, with_sinks=True), Case([1, 12], [2100, 1500], window=1400, softcap=20.0)]
)
def test_a_long_context_is_split_over_threads(native, native_threads, case):
    q, layer, batch, spec = case.build()
    exact = exactly(q, layer, batch, spec)

    for num in (1, 2, 5):
        native_threads(num)
        assert_agrees(native.attend(q, layer, batch, spec), exact, case.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_slots_of_no_token_are_never_read(native, dtype):
    case = Case([1, 1, 13, 40], [1, 37, 29, 40], dtype=dtype, softcap=5.0, window=9)
    q, layer, batch, spec = case.build(unwritten=float("nan"))

    assert native.attend(q, layer, batch, spec).isfinite().all()


def test_large_scores_stay_finite(kernel):
    q, layer, batch, spec = Case([1, 15], [30, 33]).build()

    out = kernel.attend(q * 1e4, layer, batch, spec)

    assert_agrees(out, exactly(q * 1e4, layer, batch, spec), torch.float32)


def test_heads_of_a_fused_row_need_no_copy(native):
    case = Case([1, 1, 18], [20, 300, 18])
    q, layer, batch, spec = case.build()
    fused_TRD = torch.cat([torch.full((len(q), 3, 32), 9.0), q, torch.full((len(q), 2, 32), 9.0)], 1)
    view = fused_TRD[:, 3:7]

    assert not view.is_contiguous()
    assert torch.equal(native.attend(view, layer, batch, spec), native.attend(q, layer, batch, spec))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tokens_go_to_their_slots(kernel, dtype):
    fused_TRD = torch.randn(50, 8, 24).to(dtype)
    k, v = fused_TRD[:, 2:4], fused_TRD[:, 4:6, :16]
    slots = torch.randperm(6 * 16)[:50]
    mine, wanted = (LayerCache(torch.zeros(6, 2, 16, 24, dtype=dtype), torch.zeros(6, 2, 16, 16, dtype=dtype)) for _ in range(2))

    kernel.store(k, v, mine, slots)
    oracle.store(k, v, wanted, slots)

    assert torch.equal(mine.k, wanted.k)
    assert torch.equal(mine.v, wanted.v)
    assert mine.k.count_nonzero() > 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_prompt_in_chunks_is_the_prompt_at_once(kernel, dtype):
    case = Case([37], [37], dtype=dtype, window=20)
    q, layer, batch, spec = case.build()
    at_once = kernel.attend(q, layer, batch, spec)

    pieces = []
    for start, end in ((0, 5), (5, 6), (6, 37)):
        starts, lens = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        none = torch.zeros(0, dtype=torch.int64)
        pieces.append(kernel.attend(q[start:end], layer, StepBatch(none, none, none, starts, lens, batch.block_tables_SB, none), spec))

    assert_agrees(torch.cat(pieces), at_once.float(), dtype)


def test_what_the_kernel_cannot_do_it_says(native):
    q, layer, batch, spec = Case([1], [5]).build()

    with pytest.raises(RuntimeError, match="float32 and bfloat16, not Half"):
        native.attend(q.half(), LayerCache(layer.k.half(), layer.v.half()), batch, spec)
    with pytest.raises(RuntimeError, match="one dtype"):
        native.attend(q.bfloat16(), layer, batch, spec)
    with pytest.raises(RuntimeError, match="slot 48 is not one of 48"):
        native.store(torch.zeros(1, 2, 32), torch.zeros(1, 2, 32), layer, torch.tensor([48]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_tables_SB": [[0, 3], [1, 0]]}, "a block of sequence 0 is not one of 3"),
        ({"block_tables_SB": [[0, 1], [-1, 0]]}, "a block of sequence 1 is not one of 3"),
        ({"context_lens_S": [33, 9]}, "sequence 0 has 33 tokens, and a table of 2 blocks"),
        ({"context_lens_S": [20, 2]}, "sequence 1 has fewer tokens than are asked of it"),
        ({"query_starts_S1": [0, 5, 4], "context_lens_S": [20, 9]}, "sequence 1 ends before it begins"),
        ({"query_starts_S1": [0, 1, 5]}, "query_starts end at 5, and there are 4 tokens"),
    ],
)
def test_nothing_is_read_beyond_the_cache_whatever_a_step_says(native, changes, said):
    batch = StepBatch(
        **{
            "input_ids_T": torch.zeros(0),
            "positions_T": torch.zeros(0),
            "slots_T": torch.zeros(0),
            "query_starts_S1": torch.tensor([0, 1, 4], dtype=torch.int32),
            "context_lens_S": torch.tensor([20, 9], dtype=torch.int32),
            "block_tables_SB": torch.tensor([[0, 1], [2, 99]], dtype=torch.int32),
            "logit_rows_N": torch.zeros(0),
        }
    )
    layer = LayerCache(torch.zeros(3, 2, 16, 32), torch.zeros(3, 2, 16, 32))
    q, spec = torch.zeros(4, 4, 32), AttentionSpec(0.2)
    assert native.attend(q, layer, batch, spec).isfinite().all(), "what lies behind a table's last block is nobody's"

    wrong = replace(batch, **{name: torch.tensor(value, dtype=torch.int32) for name, value in changes.items()})
    with pytest.raises(RuntimeError, match=said):
        native.attend(q, layer, wrong, spec)


def test_the_kernels_are_chosen(native):
    assert choose("auto", "cpu").name == "native"
    assert choose("native", "cpu").name == "native"
    assert choose("torch", "cpu").name == "torch"
    assert choose("auto", "meta").name == "torch"


def test_without_kernels_one_line_says_so(monkeypatch):
    monkeypatch.setattr(attention.native_kernels, "load", lambda: Loaded(reason="no C++ compiler: g++ not found"))
    with capture_logs() as logs:
        kernel = choose("auto", "cpu")

    assert kernel.name == "torch"
    assert [(line["log_level"], line["reason"]) for line in logs] == [("warning", "no C++ compiler: g++ not found")]
