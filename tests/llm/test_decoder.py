"""The lean decoder computes what transformers computes: over prompts in chunks, decodes, and several sequences at once."""

from dataclasses import dataclass

import pytest
import torch
from transformers import (
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from fairlead.llm import kernels, linear
from fairlead.llm.attention import AttentionKernel, ReferenceAttention, choose
from fairlead.llm.batch import LayerCache, StepBatch, new_cache
from fairlead.llm.decoder import PREPARE, LeanDecoder, matches, probe
from fairlead.llm.linear import Prepare
from fairlead.llm.lora import Layout, LowRank, Weights

BLOCK = 16
SMALL = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied-biases": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-scaled-rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama-yarn": LlamaConfig(**SMALL, rope_parameters=YARN),
    "llama-gelu": LlamaConfig(**SMALL, hidden_act="gelu_pytorch_tanh"),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-sliding": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=11),
    "smollm3": SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1]),
    "granite": GraniteConfig(**SMALL, embedding_multiplier=6.0, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=4.0),
    "olmo2": Olmo2Config(**SMALL),
}


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32):
    """With norms and biases that do something."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.to(dtype)


@pytest.fixture(autouse=True)
def one_thread():
    """Nothing here is large enough for two, and waking one costs more than the work on a busy machine."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


@pytest.fixture(scope="module")
def native() -> AttentionKernel:
    if not kernels.load():
        pytest.skip(kernels.load().reason)
    return choose("native", "cpu")


@dataclass
class Story:
    """A sequence of tokens and the blocks that hold it."""

    ids: torch.Tensor
    blocks: list[int]


def step(chunks: list[tuple[Story, int, int]]) -> StepBatch:
    """Tokens `begin` to `end` of each sequence, all their logits wanted."""
    tables = torch.zeros(len(chunks), max(len(story.blocks) for story, _, _ in chunks), dtype=torch.int32)
    ids, positions, slots, starts = [], [], [], [0]
    for row, (story, begin, end) in enumerate(chunks):
        tables[row, : len(story.blocks)] = torch.tensor(story.blocks)
        at = torch.arange(begin, end)
        ids.append(story.ids[begin:end])
        positions.append(at)
        slots.append(torch.tensor(story.blocks)[at // BLOCK] * BLOCK + at % BLOCK)
        starts.append(starts[-1] + end - begin)
    return StepBatch(
        input_ids_T=torch.cat(ids),
        positions_T=torch.cat(positions),
        slots_T=torch.cat(slots),
        query_starts_S1=torch.tensor(starts, dtype=torch.int32),
        context_lens_S=torch.tensor([end for _, _, end in chunks], dtype=torch.int32),
        block_tables_SB=tables,
        logit_rows_N=torch.arange(starts[-1]),
        max_query_len=max(end - begin for _, begin, end in chunks),
        max_context_len=max(end for _, _, end in chunks),
    )


def lean(model, kernel: AttentionKernel, prepare: Prepare = linear.prepare) -> LeanDecoder:
    decoder = LeanDecoder.from_graph(model, kernel, prepare=prepare)
    assert isinstance(decoder, LeanDecoder), decoder
    return decoder


def tell(decoder: LeanDecoder, stories: list[Story]) -> list[torch.Tensor]:
    """Logits of two stories' every token: prompts in chunks that mix with decodes."""
    first, second = stories
    cache: list[LayerCache] = new_cache(decoder.layers, 8, BLOCK, decoder.dtype, decoder.device)
    plan = [
        [(first, 0, 13)],
        [(first, 13, 14), (second, 0, 20)],
        [(second, 20, 37), (first, 14, 15)],
        *[[(first, 15 + i, 16 + i), (second, 37 + i, 38 + i)] for i in range(5)],
    ]
    logits: dict[int, list[torch.Tensor]] = {id(first): [], id(second): []}
    for chunks in plan:
        sizes = [end - begin for _, begin, end in chunks]
        with torch.inference_mode():
            rows = decoder(step(chunks), cache).split(sizes)
        for (story, _, _), its in zip(chunks, rows, strict=True):
            logits[id(story)].append(its)
    return [torch.cat(logits[id(story)]) for story in stories]


def two_stories() -> list[Story]:
    generator = torch.Generator().manual_seed(3)
    return [
        Story(torch.randint(3, 131, (20,), generator=generator), [5, 1]),
        Story(torch.randint(3, 131, (42,), generator=generator), [7, 0, 2]),
    ]


@torch.inference_mode()
def truth(model, stories: list[Story]) -> list[torch.Tensor]:
    return [model(input_ids=story.ids[None], use_cache=False).logits[0] for story in stories]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name):
    model = random_model(CONFIGS[name])
    stories = two_stories()

    told = tell(lean(model, ReferenceAttention()), stories)

    for ours, theirs in zip(told, truth(model, stories), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_native_kernels_compute_the_same(name, native):
    model = random_model(CONFIGS[name])
    stories = two_stories()

    told = tell(lean(model, native), stories)

    for ours, theirs in zip(told, truth(model, stories), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", PREPARE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "olmo2"])
def test_one_call_gives_the_bits_of_its_operators(name, dtype, quantization, native):
    decoder = lean(random_model(CONFIGS[name], dtype), native, prepare=PREPARE[quantization])
    if not decoder.writes_ahead:
        pytest.skip("our linear layers are not the fast ones here")
    stories = two_stories()

    at_once = tell(decoder, stories)
    decoder._whole = None

    for one, other in zip(at_once, tell(decoder, stories), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_wanted", [0, 2, 33])
@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("gate_proj", "down_proj"), ("k_proj", "o_proj", "up_proj")])
@pytest.mark.parametrize("quantization", PREPARE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_adds_what_its_operators_add(dtype, quantization, modules, num_wanted, native):
    # Given two adapters of some of the layers' modules, and sequences that have one, the other, or none
    decoder = lean(random_model(CONFIGS["llama"], dtype), native, prepare=PREPARE[quantization])
    if not decoder.writes_ahead:
        pytest.skip("our linear layers are not the fast ones here")
    layout = Layout(decoder.sites, decoder.dtype, "cpu", native=True)
    generator = torch.Generator().manual_seed(7)
    parts = [part for site in decoder.sites for part in site if part.name.endswith(modules)]
    one, other = (
        layout.keep(
            {
                part.name: LowRank(
                    torch.randn(rank, part.num_inputs, generator=generator) * 0.1, torch.randn(part.num_outputs, rank, generator=generator)
                )
                for part in parts
            }
        )
        for rank in (4, 6)
    )
    stories = [Story(torch.randint(3, 131, (num,), generator=generator), ids) for num, ids in ((12, [5]), (20, [1, 2]), (1, [3]))]
    batch = step([(story, 0, len(story.ids)) for story in stories])
    batch.logit_rows_N = torch.arange(33)[33 - num_wanted :]

    def logits(*adapters: Weights | None) -> torch.Tensor:
        batch.laid = layout.lay(adapters, [12, 20, 1], batch.logit_rows_N.numpy())
        with torch.inference_mode():
            return decoder(batch, new_cache(decoder.layers, 8, BLOCK, decoder.dtype, decoder.device))

    mixed = [(one, None, other), (other, other, one), (None, one, None)]
    at_once, plain = [logits(*adapters) for adapters in mixed], logits(None, None, None)
    decoder._whole = None

    for adapters, found in zip(mixed, at_once, strict=True):
        assert torch.equal(found, logits(*adapters))
        assert not num_wanted or not torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_ahead_is_what_steps_would_write(dtype, native):
    # Given three stories of other lengths, whose blocks are not in order, and tokens of the vocabulary that may not be written
    decoder = lean(random_model(CONFIGS["llama"], dtype), native)
    if not decoder.writes_ahead:
        pytest.skip("our linear layers are not the fast ones here")
    generator = torch.Generator().manual_seed(5)
    blocks = ([5, 1], [7, 0, 2], [3, 6])
    stories = [Story(torch.randint(3, 131, (num,), generator=generator), ids) for num, ids in zip((14, 40, 20), blocks, strict=True)]
    lengths, num_ids = (6, 4, 1), 100
    caches = [new_cache(decoder.layers, 8, BLOCK, decoder.dtype, decoder.device) for _ in range(2)]
    told = [(story, 0, len(story.ids)) for story in stories]
    last_N = torch.tensor([len(story.ids) for story in stories]).cumsum(0) - 1
    with torch.inference_mode():
        logits_NV, _ = [decoder(step(told), cache)[last_N] for cache in caches]
        tables_NB = step(told).block_tables_SB
        positions_N = torch.tensor([len(story.ids) for story in stories])
        nums = [sum(length > place for length in lengths) for place in range(1, max(lengths))]

        written = decoder.write_ahead(logits_NV, positions_N, tables_NB, nums, num_ids, caches[0])

        # When each goes on by steps of its own, token by token
        for n, (story, length) in enumerate(zip(stories, lengths, strict=True)):
            chosen = [int(logits_NV[n, :num_ids].float().numpy().argmax())]
            while len(chosen) < length:
                grown = Story(torch.cat([story.ids, torch.tensor(chosen)]), story.blocks)
                one = step([(grown, len(grown.ids) - 1, len(grown.ids))])
                chosen.append(int(decoder(one, caches[1])[0, :num_ids].float().numpy().argmax()))
            assert [place[n] for place in written[:length]] == chosen
    # Then both have left the same keys and values
    for one, other in zip(*caches, strict=True):
        torch.testing.assert_close(one.k, other.k)
        torch.testing.assert_close(one.v, other.v)


def test_nothing_is_written_ahead_past_the_blocks(native):
    decoder = lean(random_model(CONFIGS["llama"]), native)
    if not decoder.writes_ahead:
        pytest.skip("our linear layers are not the fast ones here")
    cache = new_cache(decoder.layers, 8, BLOCK, decoder.dtype, decoder.device)
    tables_NB = torch.tensor([[5]], dtype=torch.int32)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="position 16 has no block"):
        decoder.write_ahead(torch.zeros(1, 131), torch.tensor([14]), tables_NB, [1, 1, 1], 131, cache)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_probe_is_content_in_bfloat16(name, native):
    model = random_model(CONFIGS[name], torch.bfloat16)

    for kernel in (native, choose("torch", "cpu")):
        assert probe(model, lean(model, kernel)) == ""

    assert model.config._attn_implementation == "eager"


def test_only_the_wanted_rows_get_logits(native):
    model = random_model(CONFIGS["llama"])
    story = two_stories()[1]
    batch = step([(story, 0, 30)])
    every = truth(model, [story])[0]

    for kernel in (ReferenceAttention(), native):
        decoder = lean(model, kernel)
        batch.logit_rows_N = torch.tensor([4, 29])
        with torch.inference_mode():
            some = decoder(batch, new_cache(decoder.layers, 8, BLOCK, decoder.dtype, decoder.device))
        torch.testing.assert_close(some, every[[4, 29]], rtol=1e-4, atol=1e-4)


def forget_a_norm(model):
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(1.0)


def swap_gate_and_up(model):
    mlp = model.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def turn_at_another_speed(model):
    model.model.rotary_emb.inv_freq *= 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tamper", [forget_a_norm, swap_gate_and_up, turn_at_another_speed])
def test_the_probe_finds_a_decoder_that_is_wrong(tamper, dtype, native):
    model, wrong = random_model(CONFIGS["llama"], dtype), random_model(CONFIGS["llama"], dtype)
    tamper(wrong)

    assert "differ" in probe(model, lean(wrong, native))
    assert probe(model, lean(model, native)) == ""


def test_logits_that_are_not_numbers_never_match():
    logits = torch.randn(4, 9)

    assert matches(logits, logits) == ""
    assert "nan" in matches(logits, logits.clone().fill_(float("nan")))
    assert "shape" in matches(logits, logits[:3])


def test_a_clear_winner_must_win():
    logits = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    logits[1, 20], logits[1, 30] = 10.0, 9.0
    other = logits.clone()
    other[1, 20], other[1, 30] = 9.0, 10.0

    assert "other tokens win" in matches(logits, other)


def test_what_the_family_does_not_cover_is_named():
    kernel = ReferenceAttention()
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

    assert LeanDecoder.from_graph(random_model(LlamaConfig(**SMALL, hidden_act="relu")), kernel) == "activation relu"
    assert LeanDecoder.from_graph(random_model(LlamaConfig(**SMALL, rope_parameters=dynamic)), kernel) == "rope type dynamic"
    half = random_model(CONFIGS["llama"])
    half.model.layers[0].mlp.bfloat16()
    assert "several dtypes" in str(LeanDecoder.from_graph(half, kernel))
    quantized = random_model(CONFIGS["llama"])
    quantized.model.layers[0].mlp.up_proj = torch.nn.Identity()
    assert LeanDecoder.from_graph(quantized, kernel) == "model.layers.0.mlp.up_proj is a Identity"


def test_the_table_of_rotations_holds_as_many_positions_as_are_served():
    model = random_model(CONFIGS["llama"])

    assert lean(model, ReferenceAttention()).max_model_len == 128
    short = LeanDecoder.from_graph(model, ReferenceAttention(), max_model_len=40)
    assert isinstance(short, LeanDecoder)
    assert short.max_model_len == 40
