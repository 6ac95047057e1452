"""One step on the device: from chunks of sequences to the logits of those that have caught up.

The structure is that of vLLM's second model runner (2026): every running sequence owns a fixed row of state for as long
as it runs, the inputs of a step are gathered from the rows into buffers that never move, so that a captured CUDA graph can
read them, and nothing on the way asks the device for a value. A second step may be given to the device while it computes one.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fairlead.llm.batch import LayerCache, StepBatch, new_cache
from fairlead.llm.load import Decoder
from fairlead.llm.lora import Laid, Layout
from fairlead.llm.scheduler import Chunk
from fairlead.llm.sequence import Sequence
from fairlead.observe.nvtx import ranged

Wait = Callable[[], object]
"""Returns when the device has done what it was given before this was made."""


class Chosen(NamedTuple):
    """Tokens that a step chooses, where the next step can read them before the host has."""

    ids_N: torch.Tensor
    """int64; -1 where there is none."""
    places: dict[int, int]
    """Of each sequence's token, by its id."""


class Staged(NamedTuple):
    """Where in the host's buffers a step's input is, and how much it is."""

    turn: int
    num_tokens: int
    num_seqs: int
    width: int
    """Blocks of each table."""
    num_logits: int
    max_query_len: int
    max_context_len: int
    laid: Laid | None


def _kind_of(_: "Runner", chunks: Seq[Chunk], chosen: Chosen | None = None) -> str:
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    return f"decode of {len(chunks)}" if num_tokens == len(chunks) else f"prefill of {num_tokens} tokens"


class Runner:
    """Owns the device's memory: KV blocks, state rows, input buffers."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        layout: Layout | None = None,
    ) -> None:
        """`layout`: of adapters; None for a draft model, which computes every sequence without."""
        self.decoder = decoder
        self.layout = layout
        self.block_size = block_size
        self._new_cache = partial(new_cache, decoder.layers, num_blocks, block_size, decoder.dtype, decoder.device)
        self.cache: list[LayerCache] = self._new_cache()
        """Empty while it sleeps."""
        max_blocks = -(-max_model_len // block_size)
        self.tables_RB = np.zeros((max_num_seqs, max_blocks), np.int32)
        """Block tables by row."""
        self._num_known = [0] * max_num_seqs  # leading entries of each row that are written
        self._known: list[list[int] | None] = [None] * max_num_seqs  # whose list of blocks they are
        self._turn = 0
        self._waits: list[Wait] = [_at_once, _at_once]  # until the device has read what a turn of the buffers held
        self._ids = _Buffer(max_batch_tokens, np.int64, decoder.device)
        self._positions = _Buffer(max_batch_tokens, np.int64, decoder.device)
        self._slots = _Buffer(max_batch_tokens, np.int64, decoder.device)
        self._query_starts = _Buffer(max_num_seqs + 1, np.int32, decoder.device)
        self._context_lens = _Buffer(max_num_seqs, np.int32, decoder.device)
        self._logit_rows = _Buffer(max_batch_tokens, np.int64, decoder.device)
        self._tables = _Buffer(max_num_seqs * max_blocks, np.int32, decoder.device)

    def sleep(self) -> None:
        """Give the memory of all KV blocks back."""
        self.cache = []

    def wake(self) -> None:
        """Take as much of it again."""
        self.cache = self._new_cache()

    @ranged(_kind_of)
    def run(self, chunks: Seq[Chunk], chosen: Chosen | None = None) -> torch.Tensor:
        """Compute the chunks: K and V of their tokens go to their blocks. `chosen`: by the step before, whose tokens the sequences
        may not know yet.

        Returns logits [N, V] in the model's dtype: for each chunk in order the row of its last known token and those of its
        drafts where it `samples`, or all its rows where the sequence wants the log-probabilities of its prompt (and some of
        the chunk's rows are the prompt's).
        """
        self._turn ^= 1
        self._waits[self._turn]()
        try:
            return self._run(chunks, chosen)
        finally:
            self._waits[self._turn] = self.mark()

    def mark(self) -> Wait:
        """Of all that the device was given until now."""
        return _at_once

    def fetch(self, ids_N: torch.Tensor) -> Callable[[], list[int]]:
        """Set out to bring tokens to the host; what is returned waits for them."""
        return ids_N.tolist  # type: ignore[no-any-return]

    def _run(self, chunks: Seq[Chunk], chosen: Chosen | None) -> torch.Tensor:
        return self.compute(self.stage(chunks, chosen), chosen)

    def compute(self, staged: Staged, chosen: Chosen | None) -> torch.Tensor:
        """What the device does of a step."""
        with torch.inference_mode():
            return self.decoder(self._batch(staged, chosen), self.cache)

    def stage(self, chunks: Seq[Chunk], chosen: Chosen | None = None) -> Staged:
        """What the host does: the step's input into the buffers that every other step shares."""
        num_seqs = len(chunks)
        rows = np.empty(num_seqs, np.int64)
        starts = np.empty(num_seqs, np.int64)
        lens = np.empty(num_seqs, np.int64)
        ids: list[int] = []
        adapted = False
        for s, chunk in enumerate(chunks):
            sequence, start, num = chunk.seq, chunk.start, chunk.num_tokens
            adapted = adapted or sequence.adapter is not None
            rows[s], starts[s], lens[s] = sequence.row, start, num
            if num == 1:
                ids.append(sequence.token_ids[start] if chosen is None else id_at(sequence, start, chosen))
            else:
                ids += sequence.token_ids[start : start + num]
                if chunk.num_drafts:
                    ids += sequence.draft[: chunk.num_drafts]
            self._know_blocks(sequence.row, sequence.blocks)
        total = len(ids)
        turn = self._turn
        query_starts = self._query_starts.host[turn, : num_seqs + 1]
        query_starts[0] = 0
        np.cumsum(lens, out=query_starts[1:])
        self._ids.host[turn, :total] = ids
        positions = self._positions.host[turn, :total]
        if total == num_seqs:
            positions[:] = starts
            rows_T = rows
        else:
            np.subtract(np.arange(total), np.repeat(query_starts[:-1] - starts, lens), out=positions)
            rows_T = np.repeat(rows, lens)
        block, offset = np.divmod(positions, self.block_size)
        np.add(self.tables_RB[rows_T, block] * self.block_size, offset, out=self._slots.host[turn, :total])
        context_lens = self._context_lens.host[turn, :num_seqs]
        np.add(starts, lens, out=context_lens, casting="unsafe")
        longest = int(context_lens.max())
        width = -(-longest // self.block_size)
        tables = self._tables.host[turn, : num_seqs * width].reshape(num_seqs, width)
        np.take(self.tables_RB[:, :width], rows, axis=0, out=tables)
        num_logits = self._choose_logits(chunks, query_starts)
        laid = self._lay(self.layout, chunks, lens, num_logits) if adapted and self.layout is not None else None
        return Staged(turn, total, num_seqs, width, num_logits, int(lens.max()), longest, laid)

    def _batch(self, staged: Staged, chosen: Chosen | None) -> StepBatch:
        """The step's input where the device reads it."""
        turn, num_seqs, width = staged.turn, staged.num_seqs, staged.width
        ids_T = self._ids.device(turn, staged.num_tokens)
        if chosen is not None and chosen.places:
            fill_in(ids_T, chosen)
        return StepBatch(
            ids_T,
            self._positions.device(turn, staged.num_tokens),
            self._slots.device(turn, staged.num_tokens),
            self._query_starts.device(turn, num_seqs + 1),
            self._context_lens.device(turn, num_seqs),
            self._tables.device(turn, num_seqs * width).view(num_seqs, width),
            self._logit_rows.device(turn, staged.num_logits),
            max_query_len=staged.max_query_len,
            max_context_len=staged.max_context_len,
            laid=staged.laid,
        )

    def _lay(self, layout: Layout, chunks: Seq[Chunk], lens: np.ndarray, num_logits: int) -> Laid | None:
        adapters = [None if chunk.seq.adapter is None else chunk.seq.adapter.weights for chunk in chunks]
        return layout.lay(adapters, lens, self._logit_rows.host[self._turn, :num_logits])

    def _know_blocks(self, row: int, blocks: list[int]) -> None:
        """Write what is new of a sequence's block table into its row. A sequence that lost its blocks has a new list."""
        if self._known[row] is not blocks:
            self._known[row], self._num_known[row] = blocks, 0
        known = self._num_known[row]
        if known < len(blocks):
            self.tables_RB[row, known : len(blocks)] = blocks[known:]
            self._num_known[row] = len(blocks)

    def _choose_logits(self, chunks: Seq[Chunk], query_starts: np.ndarray) -> int:
        out = self._logit_rows.host[self._turn]
        num = 0
        for s, chunk in enumerate(chunks):
            if wants_prompt_logits(chunk):
                out[num : num + chunk.num_tokens] = range(query_starts[s], query_starts[s + 1])
                num += chunk.num_tokens
            elif chunk.num_drafts:
                end = query_starts[s + 1]
                out[num : num + chunk.num_drafts + 1] = range(end - chunk.num_drafts - 1, end)
                num += chunk.num_drafts + 1
            elif chunk.samples:
                out[num] = query_starts[s + 1] - 1
                num += 1
        return num


def wants_prompt_logits(chunk: Chunk) -> bool:
    """Whether every row of the chunk gives logits."""
    return chunk.seq.sampling.prompt_logprobs is not None and chunk.start < chunk.seq.num_prompt


def id_at(sequence: Sequence, position: int, chosen: Chosen) -> int:
    """The token there or, as a number below zero, the place among the chosen ones where the device finds it."""
    return sequence.token_ids[position] if position < len(sequence.token_ids) else ~chosen.places[sequence.id]


def fill_in(ids_T: torch.Tensor, chosen: Chosen) -> None:
    """Put tokens in the places of numbers below zero. What follows a token that is none is never looked at."""
    ids_N = chosen.ids_N.clamp(min=0)
    ids_T.copy_(torch.where(ids_T < 0, ids_N.index_select(0, (~ids_T).clamp_(min=0)), ids_T))


def _at_once() -> None: ...


class _Buffer:
    """Input that is written on the host and read on the device, always at the same addresses. The host has two by turns: it
    writes one while the device may still have the other to read."""

    def __init__(self, size: int, dtype: type, device: str) -> None:
        memory = torch.zeros(2, size, dtype=torch.int64 if dtype is np.int64 else torch.int32, pin_memory=device != "cpu")
        self.host: np.ndarray = memory.numpy()
        self._memory = memory
        self._device = None if device == "cpu" else torch.zeros_like(memory[0], device=device)

    def device(self, turn: int, size: int) -> torch.Tensor:
        """The first `size` elements where the device reads them."""
        if self._device is None:
            return self._memory[turn, :size]
        self._device[:size].copy_(self._memory[turn, :size], non_blocking=True)
        return self._device[:size]
