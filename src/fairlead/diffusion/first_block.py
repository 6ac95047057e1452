"""First-block cache: a step whose first block changes little takes over what the other blocks did in the step before.

As ParaAttention and diffusers do it, but with the memory kept per row, so that it works inside a batch: the first block is
computed for all rows, then the others for the rows that need them, packed. The model's own `forward` runs unchanged: for its
duration, the lists of blocks that it walks are laid over with the functions here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from msgspec import Struct

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")


class Memory(Struct):
    """Of one row, from the last step that was computed whole."""

    first: torch.Tensor
    """What the first block added."""
    rest: torch.Tensor
    """What all others added."""


class FirstBlockCache:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.lists = [name for name in BLOCK_LISTS if isinstance(getattr(model, name, None), torch.nn.ModuleList)]
        self.num_blocks = sum(len(getattr(model, name)) for name in self.lists)

    @property
    def works(self) -> bool:
        """Whether there is anything to skip."""
        return self.num_blocks > 1

    def run(
        self, memories: Sequence[Memory | None], threshold: float, forward: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, list[Memory]]:
        """What `forward` returns, which calls the model with one row for each of `memories`; and the memories for the next step: the
        same object where a row was not computed."""
        walk = _Walk(memories, threshold)
        number = 0
        for name in self.lists:
            laid = []
            for block in getattr(self.model, name):
                step = walk.first if number == 0 else walk.last if number == self.num_blocks - 1 else walk.middle
                laid.append(partial(step, block))
                number += 1
            self.model.__dict__[name] = laid  # before a module's own children, which are looked up last
        try:
            output = forward()
        finally:
            for name in self.lists:
                del self.model.__dict__[name]
        return output, walk.after


class _Walk:
    """One forward through the blocks: all rows, the rows to compute, all rows again."""

    def __init__(self, memories: Sequence[Memory | None], threshold: float) -> None:
        self.memories = memories
        self.threshold = threshold
        self.computed: list[int] = []
        self.after: list[Memory] = []

    def first(self, block: Any, *, hidden_states: torch.Tensor, **others: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
        context, hidden = block(hidden_states=hidden_states, **others)
        self.hidden = hidden
        self.added = hidden - hidden_states
        self.computed = self._choose(self.added)
        return self._packed(context), self._packed(hidden)

    def middle(
        self, block: Any, *, hidden_states: torch.Tensor, temb: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        if not self.computed:
            return others["encoder_hidden_states"], hidden_states
        context, hidden = block(hidden_states=hidden_states, temb=self._packed(temb), **others)
        return context, hidden

    def last(self, block: Any, **others: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
        context, hidden = self.middle(block, **others)
        self.after = [memory for memory in self.memories if memory is not None] if not self.computed else self._renewed(hidden)
        if len(self.computed) == len(self.memories):
            return context, hidden
        rows = [memory.rest + self.hidden[row] for row, memory in enumerate(self.after)]
        for at, row in enumerate(self.computed):
            rows[row] = hidden[at]
        return None, torch.stack(rows)

    def _choose(self, added: torch.Tensor) -> list[int]:
        """Rows to compute: without a memory, or whose first block adds something else than it did."""
        changes = {
            row: (added[row] - memory.first).abs().mean() / memory.first.abs().mean()
            for row, memory in enumerate(self.memories)
            if memory is not None
        }
        skipped = {row for row, change in zip(changes, _numbers(list(changes.values())), strict=True) if change <= self.threshold}
        return [row for row in range(len(self.memories)) if row not in skipped]

    def _renewed(self, hidden: torch.Tensor) -> list[Memory]:
        found = list(self.memories)
        for at, row in enumerate(self.computed):
            found[row] = Memory(first=self.added[row], rest=hidden[at] - self.hidden[row])
        return [memory for memory in found if memory is not None]

    def _packed(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        return rows if rows is None or len(self.computed) == len(self.memories) else rows[self.computed]


def _numbers(values: list[torch.Tensor]) -> list[float]:
    """One wait for the device, not one for each row."""
    return torch.stack(values).tolist() if values else []
