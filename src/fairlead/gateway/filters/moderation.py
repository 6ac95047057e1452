"""Texts put before a served classifier."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np

Classify = Callable[[str, list[str]], Awaitable[Sequence[Mapping[str, float]]]]
"""(model, texts) → for each text label → probability."""

PIECE_CHARS, MAX_PIECES = 1000, 64
"""A long text is judged piece by piece, so that a harmful sentence is not lost among harmless ones; the pieces of a very long one are longer."""


def pieces(texts: Sequence[str]) -> list[str]:
    """Nothing is left out; at most about MAX_PIECES."""
    size = max(PIECE_CHARS, -(-sum(map(len, texts)) // MAX_PIECES))
    joined: list[str] = []
    for text in texts:
        if text.strip():
            joined += (text[at : at + size] for at in range(0, len(text), size))
    if len(joined) <= 2 * MAX_PIECES:
        return joined
    whole = "\n".join(joined)  # of a great many short texts
    return [whole[at : at + size] for at in range(0, len(whole), size)]


def above(probabilities: Sequence[Mapping[str, float]], threshold: float) -> dict[str, float]:
    """The labels that some piece is at least so probable for, the most probable first."""
    most: dict[str, float] = {}
    for each in probabilities:
        for label, probability in each.items():
            most[label] = max(most.get(label, 0.0), probability)
    found = ((label, probability) for label, probability in most.items() if probability >= threshold)
    return dict(sorted(found, key=lambda item: -item[1]))


def by_label(labels: Sequence[str], scores: np.ndarray) -> list[dict[str, float]]:
    """A classifier's output, one row for each text, with the labels of its spec."""
    return [dict(zip(labels, row, strict=True)) for row in scores.reshape(-1, len(labels)).tolist()]
