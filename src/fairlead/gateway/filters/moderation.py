"""Texts put before a served classifier."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np

from fairlead.core.errors import Unsupported
from fairlead.core.specs import ModelSpec
from fairlead.core.tensors import Tensors

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


def check_classifier(spec: ModelSpec) -> tuple[str, ...]:
    """The labels of a served classifier of texts. Raises Unsupported for a model that is none."""
    if len(spec.inputs) != 1 or spec.inputs[0].datatype != "BYTES" or not spec.outputs or not spec.outputs[0].labels:
        raise Unsupported(f"model '{spec.name}' does not classify texts: it must take one BYTES tensor and give an output with `labels`")
    return spec.outputs[0].labels


def text_rows(spec: ModelSpec, texts: Sequence[str]) -> Tensors:
    """A text in each row of its one input."""
    rows = np.empty(len(texts), dtype=object)
    rows[:] = [text.encode("utf-8", "replace") for text in texts]
    return {spec.inputs[0].name: rows.reshape(len(texts), *(1 for _ in spec.inputs[0].shape[1:]))}
