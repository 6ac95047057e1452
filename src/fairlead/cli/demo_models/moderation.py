"""How likely a text is to be harassment, hate, violence, ...: a linear model over hashed words and parts of words."""

import itertools
import re
from typing import Any
from zlib import crc32

import numpy as np

NUM_BUCKETS = 1 << 15
MAX_WORDS = 1000
LABELS = ("harassment", "hate", "violence", "self-harm", "sexual", "illicit", "spam")


class Model:
    example = {"text": ["The harbour is closed on Sundays."]}

    def load(self, context: Any) -> None:
        with np.load(context.path / "weights.npz") as arrays:
            self.weights = arrays["weights"].astype(np.float32)
            self.biases = arrays["biases"]

    def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        texts = [text.decode(errors="replace") for text in inputs["text"].reshape(-1)]
        return {"probability": probabilities(texts, self.weights, self.biases)}


def probabilities(texts: list[str], weights: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Of each label for each text; the labels are independent of one another."""
    scores = np.empty((len(texts), weights.shape[1]), np.float32)
    for row, text in zip(scores, texts, strict=True):
        buckets = features(text)
        row[:] = weights[buckets].sum(axis=0) / np.sqrt(max(len(buckets), 1)) + biases
    return np.asarray(1 / (1 + np.exp(-scores)), np.float32)


def features(text: str) -> np.ndarray:
    """The buckets of a text's words, pairs of words, and parts of words: each once."""
    words = re.findall(r"[^\W_]+", text.lower().replace("'", ""))[:MAX_WORDS]
    parts = set(words) | {f"{left} {right}" for left, right in itertools.pairwise(words)}
    for word in set(words):
        edged = f"<{word[:32]}>"
        parts.update(f"#{edged[at : at + size]}" for size in (3, 4, 5) for at in range(len(edged) - size + 1))
    return np.unique(np.fromiter((crc32(part.encode("utf-8", "replace")) % NUM_BUCKETS for part in parts), np.int64, len(parts)))
