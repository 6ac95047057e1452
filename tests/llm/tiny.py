"""Tiny checkpoints with random weights, one for each architecture, and a tokenizer that fits them all."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
NOT = object()
"""Marks a key of BASE that the architecture does not know."""
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
MHA = {"num_key_value_heads": NOT, "head_dim": NOT}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = dict(
    **MHA,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=256,
    hidden_size=NOT,
    num_hidden_layers=NOT,
    num_attention_heads=NOT,
    intermediate_size=NOT,
    max_position_embeddings=NOT,
)

TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": NOT},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "phi3": {"head_dim": NOT},
    "gemma2": dict(**SLIDING, query_pre_attn_scalar=16),
    "gemma3_text": dict(**SLIDING, query_pre_attn_scalar=16),
    "gemma4_text": {
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
    },
    "olmo2": {"head_dim": NOT},
    "granite": {
        "head_dim": NOT,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
    },
    "smollm3": {"head_dim": NOT, "no_rope_layer_interval": 2},
    "qwen3_moe": dict(**EXPERTS, num_experts=4),
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": dict(**SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": dict(**MLA, **GROUPS, **EXPERTS),
    "glm4_moe": dict(**GROUPS, **EXPERTS),
    "gpt2": GPT2,
    "opt": dict(**MHA, ffn_dim=128, word_embed_proj_dim=64, intermediate_size=NOT),
    "gpt_neox": MHA,
    "cohere2": SLIDING,
    "starcoder2": {},
    "stablelm": {"head_dim": NOT},
    "phi": {"head_dim": NOT},
    "exaone4": SLIDING,
    # What the engine refuses
    "bloom": dict(**MHA, n_head=4, n_layer=2, intermediate_size=NOT, max_position_embeddings=NOT),
    "falcon": dict(**MHA, intermediate_size=NOT, alibi=True),
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 128, "attention_chunk_size": 8},
    "qwen3_next": dict(
        **EXPERTS,
        num_hidden_layers=4,
        num_experts=4,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "lfm2": {"full_attn_idxs": [1]},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    merged = {**BASE, **TINY[model_type], **overrides}
    return AutoConfig.for_model(model_type, **{name: value for name, value in merged.items() if value is not NOT})


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model with weights that make its choices clear-cut. `overrides` go to its config."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.requires_grad_(False)


def tiny_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a whole checkpoint: config, weights, generation_config, tokenizer with a chat template."""
    model = tiny_model(model_type, seed=seed, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file, which may be new; `...` removes one."""
    merged = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}, indent=2))


@cache
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 tokens; it writes <s> before a text, and any text comes back whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    corpus = [
        f"{first} sailors pull {second} lines through the fairlead, and {first} more wait." for first in numbers for second in numbers
    ]
    corpus += [f'{{"name": "buoy {n}", "depth": {n * n}, "unit": "metre"}}' for n in range(100)]
    specials = [PAD, BOS, EOS, "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(token, special=True) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)])
    return tokenizer
