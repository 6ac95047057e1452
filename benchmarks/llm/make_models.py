"""Checkpoints with random weights: what is measured is speed, and speed does not ask what the weights say.

python make_models.py [S] [M]     into models/S-bf16, models/M-bf16; run in an environment with torch and transformers

S   Llama shape, 15M parameters: what an engine costs beside its arithmetic shows here
M   Qwen3-0.6B's shape with a vocabulary of 32,768: 474M parameters, bound by memory bandwidth as real models are
"""

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MODELS = Path(__file__).parent / "models"
UNK, BOS, EOS = range(3)
COMMON = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": UNK, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
NUM_FILES = {"S": 800, "M": 2000}
"""Of the standard library, for the tokenizer to learn from."""


def shape(name: str) -> PreTrainedModel:
    if name == "S":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8192,
                hidden_size=256,
                intermediate_size=1408,
                num_hidden_layers=8,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=32,
                tie_word_embeddings=False,
                **COMMON,
            )
        )
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=32768,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
            **COMMON,
        )
    )


def source_files(count: int) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:count]:
        if "lib2to3" not in path.parts:  # its tests are broken on purpose
            yield path.read_text(encoding="ascii", errors="ignore")


def tokenizer(vocab_size: int, num_files: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(source_files(num_files), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["S", "M"])
    for name in parser.parse_args().names:
        torch.manual_seed(0)
        model = shape(name).eval().to(torch.bfloat16)
        model.generation_config.eos_token_id = EOS
        folder = MODELS / f"{name}-bf16"
        model.save_pretrained(folder)
        tokenizer(model.config.vocab_size, NUM_FILES[name]).save_pretrained(folder)
        print(folder.name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
