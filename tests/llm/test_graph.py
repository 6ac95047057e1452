"""transformers' graphs over our paged KV: the same tokens and logits as `generate`, or a refusal by name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fairlead.core.errors import LoadError
from fairlead.llm.attention import ReferenceAttention, TorchAttention
from fairlead.llm.batch import LayerShape, StepBatch, new_cache
from fairlead.llm.graph import GraphDecoder, check_config, dry_run, freeze_rope, prove
from tests.llm.tiny import TINY, tiny_model

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
