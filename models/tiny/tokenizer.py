"""The tokenizer of the small language model: byte-level BPE learned from its training text, a token per digit."""

from itertools import islice
from pathlib import Path
from typing import Any

from models.tiny.data import conversations
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1536
MAX_LENGTH = 1024
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, START, END)
# One token each, yet part of the text: an answer is decoded without special tokens, and the call must stay readable.
MARKS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>")
# Qwen2's pattern: words with the space before them, digits one by one, runs of marks.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(num_conversations: int = 30_000) -> Any:
    """A PreTrainedTokenizerFast; the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template = as_transformers(tokenizer)
    text = (
        template.apply_chat_template(conversation.messages, tools=conversation.tools, tokenize=False)
        for conversation in islice(conversations(seed=0), num_conversations)
    )
    tokenizer.train_from_iterator((without_marks(piece) for piece in text), trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return as_transformers(tokenizer)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that was saved with a checkpoint."""
    return as_transformers(Tokenizer.from_file(str(folder / "tokenizer.json")))


def as_transformers(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE.read_text(encoding="utf-8").rstrip("\n"),
    )


def without_marks(text: str) -> str:
    """No merge may span a special token or a mark."""
    for token in (*SPECIAL, *MARKS):
        text = text.replace(token, "\n")
    return text
