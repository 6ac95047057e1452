"""One step's input: a flat mixed batch of prefill chunks and decodes, and the KV memory that it reads and writes.

Shape suffixes throughout the engine: T new tokens of all sequences one after another, S sequences of the step,
N rows whose logits are wanted, H query heads, K key-value heads, D head size, B blocks of a table, V vocabulary.
"""

import math
import mmap
from dataclasses import dataclass

import torch

from fairlead.llm.lora import Laid


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV of one layer that attends: sizes of one token's keys and values."""

    num_kv_heads: int
    k_size: int
    v_size: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of one token."""
        return int(self.num_kv_heads * (self.k_size + self.v_size) * dtype.itemsize)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """KV blocks of one layer: one head's keys of one block lie together."""

    k: torch.Tensor
    """[num_blocks, K, block_size, D]"""
    v: torch.Tensor
    """[num_blocks, K, block_size, Dv]"""


def new_cache(shapes: tuple[LayerShape, ...], num_blocks: int, block_size: int, dtype: torch.dtype, device: str) -> list[LayerCache]:
    """Zeroed blocks for every layer."""
    return [
        LayerCache(
            _zeros((num_blocks, shape.num_kv_heads, block_size, shape.k_size), dtype, device),
            _zeros((num_blocks, shape.num_kv_heads, block_size, shape.v_size), dtype, device),
        )
        for shape in shapes
    ]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; these become memory when a block is first used
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@dataclass(slots=True)
class StepBatch:
    """What one step computes. Sequence s has the rows `query_starts[s] : query_starts[s + 1]` of the T tokens;
    they are the last ones of its `context_lens[s]` tokens."""

    input_ids_T: torch.Tensor
    """int64"""
    positions_T: torch.Tensor
    """int64"""
    slots_T: torch.Tensor
    """int64: where the token's K and V go, `block * block_size + offset`."""
    query_starts_S1: torch.Tensor
    """int32, S + 1 entries, the first 0, the last T."""
    context_lens_S: torch.Tensor
    """int32: tokens that the sequence's last query of this step sees, itself included."""
    block_tables_SB: torch.Tensor
    """int32, padded with 0."""
    logit_rows_N: torch.Tensor
    """int64: rows of T whose logits are wanted."""
    max_query_len: int = 1
    max_context_len: int = 1
    laid: Laid | None = None
    """What adapters add for their sequences' rows; None in a step of the base model alone."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How one layer attends."""

    scale: float
    window: int = 0
    """A query sees itself and the `window - 1` tokens before it; 0: all of them."""
    softcap: float = 0.0
    """Scores become `softcap * tanh(score / softcap)`; 0: as they are."""
    sinks_H: torch.Tensor | None = None
    """A logit for each head that takes part in the softmax and carries no value (gpt-oss)."""
