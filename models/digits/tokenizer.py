"""A tokenizer of CLIP's kind whose vocabulary holds the captions' words whole, and everything else byte by byte."""

from models.digits.captions import every_word
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 24


def make_tokenizer() -> CLIPTokenizer:
    letters = list(bytes_to_unicode().values())
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in every_word()]
    merges: list[tuple[str, str]] = []
    # Byte-pair encoding of which every merge is applied to all words before the next is chosen: encoding repeats just that.
    while split := next((word for word in words if len(word) > 1), None):
        merges.append((split[0], split[1]))
        words = [_merged(word, *merges[-1]) for word in words]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges), START, END]
    return CLIPTokenizer(vocab={token: id for id, token in enumerate(dict.fromkeys(tokens))}, merges=merges, model_max_length=MAX_LENGTH)


def _merged(word: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if piece == right and merged and merged[-1] == left:
            merged[-1] = left + right
        else:
            merged.append(piece)
    return merged
