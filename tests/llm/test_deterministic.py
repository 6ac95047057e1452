"""With `deterministic` an answer has the same bits whatever is computed beside it and however its own tokens are cut into steps."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead.core.errors import FairleadError, LoadError
from fairlead.core.generation import Sampling
from fairlead.core.specs import LlmSpec, SpeculationSpec
from fairlead.llm import kernels
from fairlead.llm.attention import NativeAttention
from fairlead.llm.batch import AttentionSpec, LayerCache, StepBatch
from fairlead.llm.build import build_generator
from fairlead.llm.linear import prepare
from fairlead.llm.load import load_decoder
from tests.llm.adapters import tiny_adapter
from tests.llm.tiny import tiny_checkpoint

BLOCK = 16
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def native_threads():
    """Two, since sums that are shared out among threads are those that change."""
    if not kernels.load():
        pytest.skip(kernels.load().reason)
    mine, torchs = torch.ops.fairlead.num_threads(), torch.get_num_threads()
    torch.ops.fairlead.set_num_threads(2)
    torch.set_num_threads(1)
    yield
    torch.ops.fairlead.set_num_threads(mine)
    torch.set_num_threads(torchs)


@both_dtypes
@pytest.mark.parametrize("gate", ["", "silu", "gelu_tanh"])
def test_a_linear_layer_does_not_see_the_other_rows(dtype, gate):
    numbers = torch.Generator().manual_seed(1)
    weights = [torch.randn(176, 72, generator=numbers).to(dtype) for _ in range(2)]
    x_TK = torch.randn(40, 72, generator=numbers).to(dtype)
    layer = prepare(weights, gate=gate, native=True, fixed=True)

    together = layer(x_TK)

    for begin in range(0, 40, 5):
        for size in (1, 2, 3, 4, 5, 7, 11, 12, 13):
            assert torch.equal(together[begin : begin + size], layer(x_TK[begin : begin + size]))


class Text:
    """Keys and values of one text in blocks, and the queries of all its tokens."""

    def __init__(self, num_tokens: int, dtype: torch.dtype, *, seed: int = 0, num_heads: int = 4) -> None:
        numbers = torch.Generator().manual_seed(seed)
        self.num_tokens = num_tokens
        self.num_blocks = -(-num_tokens // BLOCK)
        k, v = (torch.randn(self.num_blocks, 2, BLOCK, 24, generator=numbers).to(dtype) for _ in range(2))
        self.layer = LayerCache(k, v)
        self.q_THD = torch.randn(num_tokens, num_heads, 24, generator=numbers).to(dtype)

    def attend(self, chunks: list[tuple[int, int]], spec: AttentionSpec, *, fixed: bool = True) -> list[torch.Tensor]:
        """Each chunk of tokens is a sequence of the batch."""
        lens = [end - begin for begin, end in chunks]
        starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
        rows = torch.cat([torch.arange(begin, end) for begin, end in chunks])
        batch = StepBatch(
            rows,
            rows,
            rows,
            starts,
            torch.tensor([end for _, end in chunks], dtype=torch.int32),
            torch.arange(self.num_blocks, dtype=torch.int32).expand(len(chunks), -1).contiguous(),
            rows,
            max_query_len=max(lens),
            max_context_len=max(end for _, end in chunks),
        )
        return list(NativeAttention(fixed=fixed).attend(self.q_THD[rows], self.layer, batch, spec).split(lens))


def random_cuts(num_tokens: int, seed: int) -> list[tuple[int, int]]:
    numbers = random.Random(seed)
    edges = sorted({0, num_tokens, *(numbers.randrange(1, num_tokens) for _ in range(12))})
    return list(itertools.pairwise(edges))


SPECS = {
    "plain": AttentionSpec(scale=0.2),
    "window": AttentionSpec(scale=0.2, window=300),
    "softcap": AttentionSpec(scale=0.2, softcap=5.0),
    "sinks and window": AttentionSpec(scale=0.2, window=1100, sinks_H=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


@both_dtypes
@pytest.mark.parametrize("name", SPECS)
def test_attention_does_not_depend_on_how_a_text_is_cut(name, dtype):
    text = Text(2300, dtype)  # over the end of a span
    whole = text.attend([(0, 2300)], SPECS[name])[0]

    for seed in range(3):
        cuts = random_cuts(2300, seed)
        assert torch.equal(torch.cat(text.attend(cuts, SPECS[name])), whole)
    for token in (0, 5, 1100, 2047, 2048, 2299):  # as when it was generated: alone
        assert torch.equal(text.attend([(token, token + 1)], SPECS[name])[0][0], whole[token])


@both_dtypes
def test_attention_is_right_all_the_same(dtype):
    text = Text(1500, dtype)

    for spec in SPECS.values():
        fixed, free = (text.attend([(0, 1500)], spec, fixed=fixed)[0] for fixed in (True, False))
        torch.testing.assert_close(fixed.float(), free.float(), rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


# ---- the engine

PROMPTS = 5
SIZES = {"max_model_len": 160, "block_size": BLOCK, "kv_cache_bytes": 4 << 20, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("deterministic"), "llama", dtype=torch.bfloat16)
    tiny_adapter(folder, "pilot")
    return folder


def prompts() -> list[list[int]]:
    """Of which two begin alike."""
    numbers = random.Random(5)
    made = [[numbers.randrange(5, 500) for _ in range(length)] for length in (3, 40, 71, 100, 64)]
    made[2][:40] = made[1]
    return made


def told(checkpoint: Path, order: list[int], *, company: int = 0, seed: int = 0, **changes: Any) -> dict[int, list[Any]]:
    """Tokens and log-probabilities of the prompts of `order`, which come one step after another among `company` others."""
    engine, _, _ = build_generator(checkpoint, LlmSpec(**{**SIZES, "deterministic": True, **changes}))
    numbers = random.Random(seed)
    answers: dict[int, list[Any]] = {}
    waiting = [(number, prompts()[number], number % 2 == 0) for number in order]
    waiting += [(100 + i, [numbers.randrange(5, 500) for _ in range(numbers.randrange(1, 90))], False) for i in range(company)]
    if company:
        numbers.shuffle(waiting)
    while waiting or engine.has_work:
        for number, prompt, greedy in waiting[: numbers.randrange(1, 3) if company else 1]:
            sampling = Sampling(
                temperature=0.0 if greedy else 1.0,
                seed=number,
                max_tokens=12,
                ignore_eos=True,
                logprobs=2,
                prompt_logprobs=1 if number == 3 else None,
            )
            assert engine.adapters is not None
            adapter = engine.adapters.take("pilot") if number % 3 == 1 else None
            engine.add(number, prompt, sampling, adapter=adapter, stream=False)
            waiting = waiting[1:]
        for number, delta in engine.step():
            assert not isinstance(delta, FairleadError), delta
            if number < 100:
                answers[number] = [delta.token_ids, delta.logprobs, delta.prompt_logprobs]
    return answers


@pytest.mark.parametrize("quantization", ["off", "int8"])
def test_an_answer_is_the_same_alone_and_in_any_company(checkpoint, quantization):
    if quantization == "int8" and not torch.ops.fairlead.fast_int8():
        pytest.skip("no AVX-512 VNNI")
    alone: dict[int, list[Any]] = {}
    for number in range(PROMPTS):
        alone |= told(checkpoint, [number], quantization=quantization, prefix_caching=False)

    for seed, changes in enumerate(
        [
            {},
            {"max_batch_tokens": 17},
            {"prefix_caching": False, "max_batch_tokens": 48},
            {"speculation": SpeculationSpec(method="ngram")},
            {"kv_cache_bytes": 80 << 10, "max_batch_tokens": 32},
        ]
    ):
        mixed = told(checkpoint, [4, 2, 0, 1, 3], company=6, seed=seed, quantization=quantization, **changes)
        assert mixed == alone


def test_what_cannot_be_had_is_refused(checkpoint, tmp_path):
    with pytest.raises(LoadError, match=r"needs the C\+\+ kernels on a CPU, and this model computes by torch kernels on cpu"):
        load_decoder(checkpoint, LlmSpec(deterministic=True, kernels="torch"))
    with pytest.raises(LoadError, match="needs the lean decoder, and `llm.decoder` is graph"):
        load_decoder(checkpoint, LlmSpec(deterministic=True, decoder="graph"))
    with pytest.raises(LoadError, match="`llm.deterministic` cannot compute this checkpoint"):
        load_decoder(tiny_checkpoint(tmp_path, "gpt2"), LlmSpec(deterministic=True))
