"""A checkpoint of make_models.py as GGUF, for llama.cpp: python to_gguf.py MODEL    writes MODEL.gguf (environment transformers)"""

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTROL, NORMAL = 3, 1
NUM_CONTROL = 3


def write_config(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    tokens += [f"[PAD{number}]" for number in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if number < NUM_CONTROL else NORMAL for number in range(len(tokens))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def write_weights(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    for key, weight in load_file(folder / "model.safetensors").items():
        name = key.removesuffix(".weight").removeprefix("model.")
        place = ""
        if name.startswith("layers."):
            _, number, name = name.split(".", 2)
            place = f"blk.{number}."
        if config["model_type"] == "llama" and name in ("self_attn.q_proj", "self_attn.k_proj"):
            # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
            weight = weight.view(-1, 2, config["head_dim"] // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        if weight.dim() == 2:
            raw = weight.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(f"{place}{NAMES[name]}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(f"{place}{NAMES[name]}.weight", weight.float().numpy())


def main() -> None:
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(folder.with_name(folder.name + ".gguf"), config["model_type"])
    write_config(writer, config)
    write_tokenizer(writer, folder, config["vocab_size"])
    write_weights(writer, folder, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
