"""transformers' graphs over our paged KV: the same tokens and logits as `generate`, or a refusal by name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from fairlead.core.errors import LoadError
from fairlead.core.specs import LlmSpec
from fairlead.llm.attention import ReferenceAttention, TorchAttention, choose
from fairlead.llm.batch import LayerShape, StepBatch, new_cache
from fairlead.llm.decoder import LeanDecoder
from fairlead.llm.graph import GraphDecoder, check_config, dry_run, freeze_rope, prove
from fairlead.llm.load import load_decoder
from tests.llm.tiny import EOS_ID, TINY, VOCAB, tiny_checkpoint, tiny_config, tiny_model

REFUSED = ("bloom", "falcon", "mamba2", "llama4_text", "qwen3_next", "lfm2")
BLOCK_SIZE = 16
NUM_BLOCKS = 24
NUM_NEW = 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Text:
    """A sequence as the engine would run it: blocks from anywhere, its prompt in chunks."""

    ids: list[int]
    num_prompt: int
    blocks: list[int]
    num_computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def slots(self, start: int, end: int) -> list[int]:
        return [self.blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(start, end)]


def flat(chunks: list[tuple[Text, int]]) -> StepBatch:
    """The next so many tokens of each text, as one batch; logits of those that caught up."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, rows = [0], []
    for text, num in chunks:
        start, end = text.num_computed, text.num_computed + num
        ids += text.ids[start:end]
        positions += range(start, end)
        slots += text.slots(start, end)
        starts.append(len(ids))
        if end == len(text.ids):
            rows.append(len(ids) - 1)
    widest = max(len(text.blocks) for text, _ in chunks)
    lens = [text.num_computed + num for text, num in chunks]
    return StepBatch(
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        torch.tensor([text.blocks + [0] * (widest - len(text.blocks)) for text, _ in chunks], dtype=torch.int32),
        torch.tensor(rows, dtype=torch.int64),
        max_query_len=max(num for _, num in chunks),
        max_context_len=max(lens),
    )


@torch.inference_mode()
def generate(decoder: GraphDecoder, prompts: list[list[int]], *, budget: int = 13) -> list[Text]:
    """Greedy, `budget` tokens a step: decodes first, then as much of the prompts as fits."""
    cache = new_cache(decoder.layers, NUM_BLOCKS, BLOCK_SIZE, decoder.dtype, decoder.device)
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    texts = [Text(list(ids), len(ids), [free.pop() for _ in range(-(-(len(ids) + NUM_NEW) // BLOCK_SIZE))]) for ids in prompts]
    while running := [text for text in texts if len(text.ids) < text.num_prompt + NUM_NEW]:
        left, chunks = budget, []
        for text in sorted(running, key=lambda text: len(text.ids) - text.num_computed):
            num = min(left, len(text.ids) - text.num_computed)
            if num:
                chunks.append((text, num))
                left -= num
        logits = iter(decoder(flat(chunks), cache))
        for text, num in chunks:
            text.num_computed += num
            if text.num_computed == len(text.ids):
                text.logits.append(next(logits))
                text.ids.append(int(text.logits[-1].argmax()))
    return texts


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 500, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def expected(model: Any, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """What transformers makes of one prompt alone: all tokens, and the logits of the new ones."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0].tolist(), torch.stack(out.logits)[:, 0]


PROMPTS = prompts_of(3, 17, 33)


@pytest.mark.parametrize("model_type", [name for name in TINY if name not in REFUSED])
def test_flat_batches_give_the_tokens_and_logits_of_generate(model_type: str) -> None:
    model = tiny_model(model_type)
    wanted = [expected(model, ids) for ids in PROMPTS]
    check_config(model.config)
    decoder = GraphDecoder(model, ReferenceAttention() if model_type in ("llama", "gpt_oss", "deepseek_v3") else TorchAttention())
    prove(decoder)

    for text, (tokens, logits) in zip(generate(decoder, PROMPTS), wanted, strict=True):
        assert text.ids == tokens
        assert torch.allclose(torch.stack(text.logits), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "BloomForCausalLM (bloom) is not supported: its 2 layers do not attend through transformers' attention interface"),
        ("falcon", "FalconForCausalLM (falcon) is not supported: its 2 layers do not attend"),
        ("mamba2", "Mamba2ForCausalLM (mamba2) is not supported: its 2 layers (linear_attention) do not attend"),
        ("qwen3_next", "Qwen3NextForCausalLM (qwen3_next) is not supported: layers 0, 1, 2 of 4 (linear_attention) do not attend"),
        ("lfm2", "Lfm2ForCausalLM (lfm2) is not supported: layer 0 of 2 (conv) does not attend"),
        ("llama4_text", "(llama4_text) is not supported: layers 0, 1 of 2 attend in chunks (`attention_chunk_size`)"),
    ],
)
def test_what_flat_batches_would_get_wrong_is_refused_by_name(model_type: str, reason: str) -> None:
    model = tiny_model(model_type)
    with pytest.raises(LoadError) as caught:
        check_config(model.config)
        dry_run(model)
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_encoder_decoder": True}, "it has an encoder and a decoder"),
        ({"vision_config": {"hidden_size": 8}}, "it is multimodal (vision_config)"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "(M-RoPE)"),
        ({"attention_chunk_size": 8192}, "layers 0, 1 of 2 attend in chunks"),
    ],
)
def test_a_config_that_tells_of_more_than_a_decoder_is_refused(changes: dict[str, Any], reason: str) -> None:
    config = tiny_config("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(LoadError) as caught:
        check_config(config)
    assert reason in caught.value.message


def test_an_encoder_that_transformers_would_let_generate_is_refused() -> None:
    config = BertConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(LoadError, match="BertSelfAttention of layer 0 attends to tokens that come later"):
        dry_run(BertLMHeadModel(config).eval())


class Looks(nn.Module):
    """An MLP that also reads the token before, as token shift and short convolutions do."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_looks_along_the_flat_batch_does_not_pass_the_proof(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    prove(GraphDecoder(model, TorchAttention()))
    for layer in model.model.layers:
        layer.mlp = Looks(layer.mlp)
    decoder = GraphDecoder(model, TorchAttention())  # the dry run sees nothing wrong
    with pytest.raises(LoadError, match="in a batch of several texts its logits differ from those of each text alone"):
        prove(decoder)


def test_a_bias_that_attention_is_handed_is_refused() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda *call: (call[1], {**call[2], "position_bias": torch.zeros(1)}), with_kwargs=True)
    with pytest.raises(LoadError, match="LlamaAttention of layer 1 passes `position_bias` to its attention"):
        dry_run(model)


def test_layers_that_share_keys_and_values_share_one_cache() -> None:
    decoder = GraphDecoder(tiny_model("gemma4_text"), TorchAttention())
    assert decoder.layers == (LayerShape(2, 16, 16), LayerShape(2, 32, 32))
    assert decoder.model.config.num_hidden_layers == 4


def test_latent_attention_has_values_of_their_own_size() -> None:
    assert dry_run(tiny_model("deepseek_v3")) == (LayerShape(4, 24, 16),) * 2


# Rotary embeddings that depend on the batch

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("max_model_len", [32, 256])
def test_longrope_takes_its_factors_by_the_longest_text_allowed(max_model_len: int) -> None:
    model = tiny_model("phi3", **LONGROPE)
    short, long = prompts_of(20, 60)
    prompts = [short] if max_model_len == 32 else [long]  # transformers, which chooses by each batch, takes the same for these
    wanted = expected(model, prompts[0])
    chosen = freeze_rope(model, max_model_len)
    decoder = GraphDecoder(model, TorchAttention())
    mixed = prompts if max_model_len == 32 else [short, long]

    text = generate(decoder, mixed)[-1]

    assert text.ids == wanted[0]
    assert ("short" if max_model_len == 32 else "long") in chosen[0].split("factors")[0]


def test_dynamic_scaling_is_taken_where_it_never_applies_and_refused_beyond() -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    with pytest.raises(LoadError, match="set `llm.max_model_len` to at most 256"):
        freeze_rope(model, 1024)
    wanted = [expected(model, ids) for ids in PROMPTS]
    freeze_rope(model, 256)
    for text, (tokens, _) in zip(generate(GraphDecoder(model, TorchAttention()), PROMPTS), wanted, strict=True):
        assert text.ids == tokens


# The decoder as the engine uses it


def test_several_models_live_in_one_process() -> None:
    models = [tiny_model("llama", seed=1), tiny_model("llama", seed=2), tiny_model("gpt2")]
    wanted = [expected(model, PROMPTS[1])[0] for model in models]
    decoders = [GraphDecoder(model, TorchAttention()) for model in models]  # each before any has computed
    assert [generate(decoder, [PROMPTS[1]])[0].ids for decoder in decoders] == wanted
    assert len({tuple(tokens) for tokens in wanted}) == 3


def test_a_chunk_in_the_middle_of_a_prompt_gives_no_logits() -> None:
    decoder = GraphDecoder(tiny_model("llama"), TorchAttention())
    text = Text(PROMPTS[1], 17, [3, 1])
    with torch.inference_mode():
        assert decoder(flat([(text, 5)]), new_cache(decoder.layers, 4, BLOCK_SIZE, decoder.dtype, decoder.device)).shape == (0, VOCAB)


def test_a_step_that_failed_leaves_the_decoder_as_it_was() -> None:
    model = tiny_model("llama")
    wanted, _ = expected(model, PROMPTS[0])
    decoder = GraphDecoder(model, TorchAttention())
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        generate(decoder, [PROMPTS[0]])
    handle.remove()
    assert generate(decoder, [PROMPTS[0]])[0].ids == wanted


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gemma4_text", "gpt2"])
def test_the_native_kernel_computes_the_graph_too(model_type: str) -> None:
    kernel = choose("auto", "cpu")
    if kernel.name != "native":
        pytest.skip("no compiler: the C++ kernels cannot be built here")
    model = tiny_model(model_type)
    wanted = [expected(model, ids) for ids in PROMPTS]
    for text, (tokens, logits) in zip(generate(GraphDecoder(model, kernel), PROMPTS), wanted, strict=True):
        assert text.ids == tokens
        assert torch.allclose(torch.stack(text.logits), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma2", "gpt_oss"])
def test_half_precision_passes_the_proof(model_type: str) -> None:
    prove(GraphDecoder(tiny_model(model_type).to(torch.bfloat16), TorchAttention()))


# From a folder


def test_the_lean_decoder_is_taken_where_it_computes_the_same_and_the_graph_elsewhere(tmp_path: Path) -> None:
    llama, gpt2 = tiny_checkpoint(tmp_path / "llama"), tiny_checkpoint(tmp_path / "gpt2", "gpt2")

    loaded = load_decoder(llama, LlmSpec())
    assert isinstance(loaded.decoder, LeanDecoder)
    assert "decoder: lean: its logits match those of transformers' graph" in loaded.explain
    assert (loaded.max_model_len, loaded.architecture, loaded.eos_ids) == (256, "LlamaForCausalLM", (EOS_ID,))

    loaded = load_decoder(llama, LlmSpec(decoder="graph", max_model_len=64))
    assert isinstance(loaded.decoder, GraphDecoder)
    assert loaded.max_model_len == 64

    loaded = load_decoder(gpt2, LlmSpec())
    assert isinstance(loaded.decoder, GraphDecoder)
    assert "decoder: transformers' graph: the lean decoder has no gpt2" in loaded.explain

    with pytest.raises(LoadError, match="`llm.decoder: lean` cannot compute this checkpoint .the lean decoder has no gpt2."):
        load_decoder(gpt2, LlmSpec(decoder="lean"))


def test_no_more_context_than_the_checkpoint_has(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "llama")
    with pytest.raises(LoadError, match="`llm.max_model_len` is 300, but llama/config.json has positions for 256 tokens"):
        load_decoder(folder, LlmSpec(max_model_len=300))


@pytest.mark.parametrize("decoder", ["graph", "lean"])
def test_a_context_shorter_than_the_probes_is_served(tmp_path: Path, decoder: Literal["graph", "lean"]) -> None:
    assert load_decoder(tiny_checkpoint(tmp_path / "llama"), LlmSpec(max_model_len=4, decoder=decoder)).max_model_len == 4
