"""One step on the device: from chunks of sequences to the logits of those that have caught up.

The structure is that of vLLM's second model runner (2026): every running sequence owns a fixed row of state for as long
as it runs, the inputs of a step are gathered from the rows into buffers that never move, so that a captured CUDA graph can
read them, and nothing on the way asks the device for a value.
"""

from collections.abc import Sequence as Seq
from functools import partial

import numpy as np
import torch

from fairlead.llm.batch import LayerCache, StepBatch, new_cache
from fairlead.llm.load import Decoder
from fairlead.llm.lora import Laid, Layout
from fairlead.llm.scheduler import Chunk
from fairlead.observe.nvtx import ranged


def _kind_of(_: "Runner", chunks: Seq[Chunk]) -> str:
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
    def run(self, chunks: Seq[Chunk]) -> torch.Tensor:
        """Compute the chunks: K and V of their tokens go to their blocks.

        Returns logits [N, V] in the model's dtype: for each chunk in order the row of its last known token and those of its
        drafts where it `samples`, or all its rows where the sequence wants the log-probabilities of its prompt (and some of
        the chunk's rows are the prompt's).
        """
        with torch.inference_mode():
            return self.decoder(self.gather(chunks), self.cache)

    def gather(self, chunks: Seq[Chunk]) -> StepBatch:
        """The step's input, in the buffers that every step shares."""
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
                ids.append(sequence.token_ids[start])
            else:
                ids += sequence.token_ids[start : start + num]
                if chunk.num_drafts:
                    ids += sequence.draft[: chunk.num_drafts]
            self._know_blocks(sequence.row, sequence.blocks)
        total = len(ids)
        query_starts = self._query_starts.host[: num_seqs + 1]
        query_starts[0] = 0
        np.cumsum(lens, out=query_starts[1:])
        self._ids.host[:total] = ids
        positions = self._positions.host[:total]
        if total == num_seqs:
            positions[:] = starts
            rows_T = rows
        else:
            np.subtract(np.arange(total), np.repeat(query_starts[:-1] - starts, lens), out=positions)
            rows_T = np.repeat(rows, lens)
        block, offset = np.divmod(positions, self.block_size)
        np.add(self.tables_RB[rows_T, block] * self.block_size, offset, out=self._slots.host[:total])
        context_lens = self._context_lens.host[:num_seqs]
        np.add(starts, lens, out=context_lens, casting="unsafe")
        longest = int(context_lens.max())
        width = -(-longest // self.block_size)
        tables = self._tables.host[: num_seqs * width].reshape(num_seqs, width)
        np.take(self.tables_RB[:, :width], rows, axis=0, out=tables)
        num_logits = self._choose_logits(chunks, query_starts)
        return StepBatch(
            self._ids.device(total),
            self._positions.device(total),
            self._slots.device(total),
            self._query_starts.device(num_seqs + 1),
            self._context_lens.device(num_seqs),
            self._tables.device(num_seqs * width).view(num_seqs, width),
            self._logit_rows.device(num_logits),
            max_query_len=int(lens.max()),
            max_context_len=longest,
            laid=self._lay(self.layout, chunks, lens, num_logits) if adapted and self.layout is not None else None,
        )

    def _lay(self, layout: Layout, chunks: Seq[Chunk], lens: np.ndarray, num_logits: int) -> Laid | None:
        adapters = [None if chunk.seq.adapter is None else chunk.seq.adapter.weights for chunk in chunks]
        return layout.lay(adapters, lens, self._logit_rows.host[:num_logits])

    def _know_blocks(self, row: int, blocks: list[int]) -> None:
        """Write what is new of a sequence's block table into its row. A sequence that lost its blocks has a new list."""
        if self._known[row] is not blocks:
            self._known[row], self._num_known[row] = blocks, 0
        known = self._num_known[row]
        if known < len(blocks):
            self.tables_RB[row, known : len(blocks)] = blocks[known:]
            self._num_known[row] = len(blocks)

    def _choose_logits(self, chunks: Seq[Chunk], query_starts: np.ndarray) -> int:
        out = self._logit_rows.host
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


class _Buffer:
    """Input that is written on the host and read on the device, always at the same addresses."""

    def __init__(self, size: int, dtype: type, device: str) -> None:
        memory = torch.zeros(size, dtype=torch.int64 if dtype is np.int64 else torch.int32, pin_memory=device != "cpu")
        self.host: np.ndarray = memory.numpy()
        self._memory = memory
        self._device = memory if device == "cpu" else torch.zeros_like(memory, device=device)

    def device(self, size: int) -> torch.Tensor:
        """The first `size` elements where the device reads them."""
        if self._device is not self._memory:
            self._device[:size].copy_(self._memory[:size], non_blocking=True)
        return self._device[:size]
