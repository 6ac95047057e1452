"""Adapters in the engine: the same tokens as peft's, whatever is computed beside them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from fairlead.core.errors import FairleadError
from fairlead.core.generation import Sampling
from fairlead.core.specs import LlmSpec, SpeculationSpec
from fairlead.llm import kernels
from fairlead.llm.adapters import Use
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine
from fairlead.llm.linear import PackedLinear
from fairlead.llm.lora import Layout, LowRank, Part, Site
from tests.llm.adapters import ALL, old_words, tiny_adapter
from tests.llm.tiny import tiny_checkpoint, tiny_model

NUM_NEW = 8
GREEDY = Sampling(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 16, "max_num_seqs": 8, "max_batch_tokens": 24}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "scaled": {"r": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "std": 0.3},
    "patterns": {
        "r": 3,
        "rank_pattern": {"q_proj": 7},
        "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 32},
        "target_modules": r".*\.(q_proj|up_proj|down_proj)",
    },
    "linear": {"r": 2, "target_modules": "all-linear"},
}
NAMES = ("", *ADAPTERS)
PROMPTS = [[5, 6, 7], [*range(40, 74)], [*range(40, 72), 9, 9]]
"""The last two share two blocks."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        tiny_adapter(folder, name, seed=seed, **config)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Callable[[str, int], list[int]]:
    """What peft generates for one prompt alone with one adapter, or with none."""

    @cache
    def tokens(name: str, index: int) -> list[int]:
        base, ids = tiny_model("llama"), PROMPTS[index]
        with old_words():
            model = PeftModel.from_pretrained(base, checkpoint / "loras" / name) if name else base
        with torch.inference_mode():
            mask = torch.ones(1, len(ids), dtype=torch.int64)
            out = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=mask,
                max_new_tokens=NUM_NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]

    return tokens


def engine_of(checkpoint: Path, **changes: Any) -> Engine:
    return build_generator(checkpoint, LlmSpec(**{**SMALL, "kv_cache_bytes": 1 << 20, **changes}))[0]


def use_of(engine: Engine, name: str) -> Use | None:
    assert engine.adapters is not None
    return engine.adapters.take(name) if name else None


def finish(engine: Engine) -> dict[int, dict[int, list[int]]]:
    """Tokens by request and choice."""
    found: dict[int, dict[int, list[int]]] = {}
    while engine.has_work:
        for id, delta in engine.step():
            assert not isinstance(delta, FairleadError), delta
            found.setdefault(id, {}).setdefault(delta.index, []).extend(delta.token_ids)
    return found


@pytest.mark.parametrize(
    ("decoder", "kernel", "prefix_caching"),
    [("lean", "native", True), ("lean", "torch", False), ("graph", "native", False), ("graph", "torch", True)],
)
def test_a_batch_of_all_adapters_and_none_has_pefts_tokens(checkpoint, expected, decoder, kernel, prefix_caching):
    engine = engine_of(checkpoint, decoder=decoder, kernels=kernel, prefix_caching=prefix_caching)
    asked = [(name, index) for index in range(len(PROMPTS)) for name in NAMES]
    assert len({tuple(expected(*each)) for each in asked}) == len(asked)  # the adapters tell
    for id, (name, index) in enumerate(asked):
        engine.add(id, PROMPTS[index], GREEDY, adapter=use_of(engine, name))
    found = finish(engine)
    for id, (name, index) in enumerate(asked):
        assert found[id][0] == expected(name, index), (name, index)
    # and prefixes are shared only within one adapter, and with who has none
    again = engine.stats().num_prefix_hit_tokens
    assert (again > 0) == prefix_caching
    engine.add(100, PROMPTS[1], GREEDY, adapter=use_of(engine, "plain"))
    assert finish(engine)[100][0] == expected("plain", 1)
    assert engine.stats().num_prefix_hit_tokens - again == (32 if prefix_caching else 0)


def test_choices_share_the_prompt_of_their_adapter(checkpoint, expected):
    engine = engine_of(checkpoint)
    sampling = Sampling(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, n=3)
    engine.add(1, PROMPTS[1], sampling, adapter=use_of(engine, "linear"))
    engine.add(2, PROMPTS[1], sampling)
    found = finish(engine)
    assert found[1] == dict.fromkeys(range(3), expected("linear", 1))
    assert found[2] == dict.fromkeys(range(3), expected("", 1))


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_what_is_speculated_is_verified_with_the_adapter(checkpoint, expected, method, tmp_path):
    draft = {"draft": "draft"} if method == "draft" else {}
    if draft and not (checkpoint / "draft").exists():
        tiny_checkpoint(checkpoint / "draft")
    engine = engine_of(checkpoint, speculation=SpeculationSpec(method=method, **draft))
    for id, name in enumerate(NAMES):
        engine.add(id, PROMPTS[1], GREEDY, adapter=use_of(engine, name))
    found = finish(engine)
    assert [found[id][0] for id in range(len(NAMES))] == [expected(name, 1) for name in NAMES]


def test_an_adapter_lies_beside_an_int8_base(checkpoint):
    # Given int8 bases, once with the adapter in a mixed batch and once alone
    engine = engine_of(checkpoint, quantization="int8")
    engine.add(0, PROMPTS[1], GREEDY, adapter=use_of(engine, "plain"))
    alone = finish(engine)[0][0]
    for id, name in enumerate(NAMES):
        engine.add(id, PROMPTS[1], GREEDY, adapter=use_of(engine, name))
    found = finish(engine)
    assert found[NAMES.index("plain")][0] == alone
    assert len({tuple(found[id][0]) for id in range(len(NAMES))}) == len(NAMES)


# The arithmetic

SITES: tuple[Site, ...] = (
    (Part("q", 33, 48), Part("k", 33, 20, 48), Part("v", 33, 30, 68)),
    (Part("gate", 33, 40, 0, 32), Part("up", 33, 40, 16, 32)),
    (Part("down", 40, 50),),
)
SIDE_BY_SIDE = (SITES[0], (Part("gate", 33, 40), Part("up", 33, 40, 40)), SITES[2])


@pytest.mark.skipif(not kernels.load(), reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_the_kernel_adds_what_torch_adds(dtype, num_rows):
    packed, plain = Layout(SITES, dtype, "cpu", native=True), Layout(SIDE_BY_SIDE, dtype, "cpu", native=False)
    draw = torch.Generator().manual_seed(num_rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    adapters = [
        {
            part.name: LowRank(random(rank, part.num_inputs), random(part.num_outputs, rank))
            for part in packed.parts.values()
            if part.name not in absent
        }
        for rank, absent in ((3, ""), (8, "k up"), (17, "q k v"))
    ]
    kept = [(packed.keep(adapter), plain.keep(adapter)) for adapter in adapters]
    for (mine, theirs), adapter in zip(kept, adapters, strict=True):
        ranks = {name: len(low_rank.a_RK) for name, low_rank in adapter.items()}
        assert (mine.nbytes, theirs.nbytes) == (packed.nbytes(ranks), plain.nbytes(ranks))
    order = [None, 0, 1, 2, 0, None, 1]
    lens, wanted_rows = np.full(len(order), num_rows), np.arange(0, len(order) * num_rows, 3)
    laid = [layout.lay([None if i is None else kept[i][j] for i in order], lens, wanted_rows) for j, layout in enumerate((packed, plain))]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.8}
    for site, parts in enumerate(SIDE_BY_SIDE):
        for wanted in (False, True):
            x = random(len(wanted_rows) if wanted else int(lens.sum()), parts[0].num_inputs).to(dtype)
            theirs = random(len(x), sum(part.num_outputs for part in parts)).to(dtype)
            mine = theirs.clone()
            if site == 1:  # gate and up in alternating panels, the last ones filled up
                halves = torch.nn.functional.pad(theirs.view(len(x), 2, 40), (0, 8)).view(len(x), 2, 3, 16)
                mine = halves.transpose(1, 2).reshape(len(x), 96).contiguous()
            for each, y in zip(laid, (mine, theirs), strict=True):
                assert each is not None
                (add,) = each.adds(site, 1, wanted=wanted)
                assert add is not None
                add(y, x)
            if site == 1:
                mine = mine.view(len(x), 3, 2, 16).transpose(1, 2).reshape(len(x), 2, 48)[:, :, :40].reshape(len(x), 80)
            torch.testing.assert_close(mine, theirs, **tolerance)
    # an adapter without a layer costs that layer nothing
    only_third = packed.lay([kept[2][0]], [4], np.arange(4))
    assert only_third is not None and [add is None for add in only_third.adds(0, 3)] == [True, False, False]


def test_a_step_of_the_base_model_lays_nothing():
    layout = Layout(SIDE_BY_SIDE, torch.float32, "cpu", native=False)
    assert layout.lay([None, None], [1, 5], np.arange(2)) is None


@pytest.mark.skipif(not kernels.load(), reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_adapter_have_the_same_bits_beside_others(dtype):
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(40, 33, generator=draw).to(dtype) for _ in range(2)]
    layer, x = PackedLinear(weights, [], "silu"), torch.randn(7, 33, generator=draw).to(dtype)
    layout = Layout(SITES[1:2], dtype, "cpu", native=True)
    kept = layout.keep({"up": LowRank(torch.ones(2, 33), torch.ones(40, 2))})
    laid = layout.lay([None, kept, None], [3, 1, 3], np.arange(7))
    assert laid is not None
    (add,) = laid.adds(0, 1)
    alone, beside = layer(x), layer(x, add)
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(alone[others], beside[others]) and not torch.equal(alone[3], beside[3])


@pytest.mark.skipif(not kernels.load(), reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_an_adapter_have_the_same_bits_however_many_there_are(dtype):
    draw = torch.Generator().manual_seed(0)
    layout = Layout(SITES[:1], dtype, "cpu", native=True)
    weights = [torch.randn(*shape, generator=draw) for shape in ((9, 33), (48, 9))]
    kept, x = layout.keep({"q": LowRank(*weights)}), torch.randn(15, 33, generator=draw).to(dtype)

    def added(first: int, end: int) -> torch.Tensor:
        laid = layout.lay([kept], [end - first], np.arange(0))
        assert laid is not None
        (add,) = laid.adds(0, 1)
        assert add is not None
        y = torch.zeros(end - first, 98, dtype=dtype)
        add(y, x[first:end].contiguous())
        return y

    together = added(0, 15)
    for num in range(1, 8):
        pieces = [added(first, min(first + num, 15)) for first in range(0, 15, num)]
        assert torch.equal(torch.cat(pieces), together)
