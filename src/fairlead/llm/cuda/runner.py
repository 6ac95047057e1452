"""Steps on a CUDA device: those that only decode are replayed from captured graphs, so that the host launches one thing, not hundreds.

A graph is captured for a bucket of batch sizes when that bucket is used the second time (the first computes the same step launch by
launch, which compiles its kernels), so that a server is ready before anything is captured and sizes that never come cost nothing.
Rows that fill up a bucket write to a block of their own and are never read.
"""

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from weakref import WeakSet

import numpy as np
import structlog
import torch

from fairlead.llm.batch import StepBatch
from fairlead.llm.load import Decoder
from fairlead.llm.lora import Layout
from fairlead.llm.runner import Chosen, Runner, Wait, fill_in, id_at, wants_prompt_logits
from fairlead.llm.scheduler import Chunk

log = structlog.get_logger("fairlead.llm")

Compute = Callable[[], torch.Tensor]
Capture = Callable[[Compute], Compute]
"""Takes a computation over tensors that stay where they are; returns what computes it again."""


def capture_graph() -> Capture:
    """By a CUDA graph; those that live share the memory of what they compute on the way: one is replayed at a time."""
    alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def capture(compute: Compute) -> Compute:
        pool = next((graph.pool() for graph in alive), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = compute()
        alive.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    return capture


def buckets_of(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to capture: one waits for what the next larger costs, which is little from 8 on."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


class CudaRunner(Runner):
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
        capture: Capture | None = None,
    ) -> None:
        """`capture` None: every step is launched kernel by kernel."""
        super().__init__(
            decoder,
            num_blocks=num_blocks + 1,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_model_len=max_model_len,
            layout=layout,
        )
        self._capture = capture
        self._buckets = buckets_of(max_num_seqs)
        self._steps: dict[int, Compute] = {}
        self._captured: set[int] = set()
        self._spare = num_blocks  # the block of rows that fill up a bucket
        max_blocks = self.tables_RB.shape[1]
        self._on_cuda = torch.device(decoder.device).type == "cuda"
        inputs = torch.zeros(2, 3, max_num_seqs, dtype=torch.int64, pin_memory=self._on_cuda)
        lens = torch.ones(2, max_num_seqs, dtype=torch.int32, pin_memory=self._on_cuda)
        tables = torch.full((2, max_num_seqs, max_blocks), self._spare, dtype=torch.int32, pin_memory=self._on_cuda)
        self._host = (inputs, lens, tables)  # written by turns
        self._fixed = tuple(tensor[0].clone().to(decoder.device) for tensor in self._host)
        self._arange = torch.arange(max_num_seqs + 1, device=decoder.device)

    def sleep(self) -> None:
        # Captured steps know addresses: they are captured anew, as their sizes come.
        self._steps.clear()
        self._captured.clear()
        super().sleep()

    def mark(self) -> Wait:
        if not self._on_cuda:
            return super().mark()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.decoder.device))
        return event.synchronize  # type: ignore[no-any-return]

    def fetch(self, ids_N: torch.Tensor) -> Callable[[], list[int]]:
        if not self._on_cuda:
            return super().fetch(ids_N)
        host_N = torch.empty(ids_N.shape, dtype=ids_N.dtype, pin_memory=True)
        host_N.copy_(ids_N, non_blocking=True)
        copied = self.mark()

        def read() -> list[int]:
            copied()
            return host_N.tolist()  # type: ignore[no-any-return]

        return read

    def _run(self, chunks: Seq[Chunk], chosen: Chosen | None) -> torch.Tensor:
        if self._capture is None or not all(_decodes(chunk) for chunk in chunks):
            return super()._run(chunks, chosen)
        size = self._buckets[bisect_left(self._buckets, len(chunks))]
        self._write(chunks, size, chosen)
        return self.replay(self._turn, size, chosen)[: len(chunks)]

    def replay(self, turn: int, size: int, chosen: Chosen | None) -> torch.Tensor:
        """What the device does of a step that is captured."""
        for host, fixed in zip(self._host[:2], self._fixed[:2], strict=True):
            fixed.copy_(host[turn], non_blocking=True)
        self._fixed[2][:size].copy_(self._host[2][turn, :size], non_blocking=True)
        if chosen is not None and chosen.places:
            fill_in(self._fixed[0][0, :size], chosen)
        with torch.inference_mode():
            return self._step(size)()

    def _step(self, size: int) -> Compute:
        """Launch by launch the first time, captured the second, replayed from then on."""
        step = self._steps.get(size)
        if step is None:
            batch = self._fixed_batch(size)
            step = self._steps[size] = lambda: self.decoder(batch, self.cache)
        elif size not in self._captured:
            assert self._capture is not None
            step = self._steps[size] = self._capture(step)
            self._captured.add(size)
            log.debug("step captured", sequences=size)
        return step

    def _fixed_batch(self, size: int) -> StepBatch:
        """Views of the tensors that stay where they are."""
        (ids, positions, slots), lens, tables = self._fixed
        return StepBatch(
            ids[:size],
            positions[:size],
            slots[:size],
            self._arange[: size + 1].int(),
            lens[:size],
            tables[:size],
            self._arange[:size],
            max_query_len=1,
            max_context_len=self.tables_RB.shape[1] * self.block_size,
        )

    def _write(self, chunks: Seq[Chunk], size: int, chosen: Chosen | None) -> None:
        """The step's input, on the host."""
        num = len(chunks)
        inputs, lens, tables = (tensor[self._turn].numpy() for tensor in self._host)
        rows = np.empty(num, np.int64)
        for s, chunk in enumerate(chunks):
            sequence = chunk.seq
            rows[s] = sequence.row
            inputs[0, s] = sequence.token_ids[chunk.start] if chosen is None else id_at(sequence, chunk.start, chosen)
            inputs[1, s] = chunk.start
            self._know_blocks(sequence.row, sequence.blocks)
        positions = inputs[1, :num]
        block, offset = np.divmod(positions, self.block_size)
        inputs[2, :num] = self.tables_RB[rows, block] * self.block_size + offset
        lens[:num] = positions + 1
        width = int(block.max()) + 1
        tables[:num, :width] = self.tables_RB[rows, :width]
        inputs[0, num:size] = inputs[1, num:size] = 0
        inputs[2, num:size] = self._spare * self.block_size
        lens[num:size] = 1
        tables[num:size, 0] = self._spare


def _decodes(chunk: Chunk) -> bool:
    """It is one token, whose logits are wanted, of a sequence that has nothing special."""
    return chunk.num_tokens == 1 and chunk.samples and chunk.seq.adapter is None and not wants_prompt_logits(chunk)
