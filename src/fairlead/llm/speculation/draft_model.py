"""A second, smaller model of the same tokens says what may follow.

Its K and V lie in blocks of the same numbers as the model's own: what the scheduler gives a sequence is given to both, a
prefix that is found again is found by both, and nothing has to be booked twice. It catches up with what is known as the
model does, a chunk at a time; then it writes a few tokens ahead, one for all sequences at once, without any scheduler.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch

from fairlead.core.errors import LoadError
from fairlead.core.generation import Sampling
from fairlead.llm.batch import StepBatch
from fairlead.llm.blocks import BlockPool
from fairlead.llm.decoder import LeanDecoder
from fairlead.llm.runner import Runner
from fairlead.llm.sampler import Sampler, SampleRow
from fairlead.llm.scheduler import Chunk
from fairlead.llm.sequence import Sequence
from fairlead.llm.tokenizer import Tokenizer


class Shadow:
    """One sequence as the draft model sees it: without adapters, and without anybody who asks for log-probabilities."""

    __slots__ = ("_blocks", "_num_known_blocks", "num_computed", "seq", "view")

    def __init__(self, seq: Sequence) -> None:
        self.seq = seq
        self.view = Sequence(seq.id, [], Sampling())
        self.view.token_ids = seq.token_ids  # the same list, which grows
        self._blocks: list[int] | None = None
        self.num_computed = 0
        self._num_known_blocks = 0

    def follow(self, pool: BlockPool, filled: dict[int, bytes]) -> int:
        """Take over the sequence's row and blocks. Returns how many of its known tokens the draft model has yet to compute.

        `filled`: the hashes of full blocks for which the draft model has K and V, too.
        """
        seq, view, size = self.seq, self.view, pool.block_size
        num_known = len(seq.token_ids)
        view.row, view.blocks = seq.row, seq.blocks
        if self._blocks is not seq.blocks:  # it starts, or starts again, with other ones
            self._blocks, self._num_known_blocks, self.num_computed = seq.blocks, 0, 0
            for block in seq.blocks[: (num_known - 1) // size]:
                digest = pool.digest(block)
                if digest is None or filled.get(block) != digest:
                    break
                self.num_computed += size
        else:
            self.num_computed = min(self.num_computed, num_known - 1)
            full = self.num_computed // size
            for index in range(self._num_known_blocks, full):
                digest = pool.digest(seq.blocks[index])
                if digest is not None:
                    filled[seq.blocks[index]] = digest
            self._num_known_blocks = full
        return num_known - self.num_computed


class DraftModel:
    """Owns the draft model's memory."""

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        *,
        vocab_size: int,
        max_batch_tokens: int,
        max_model_len: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`pool`, `vocab_size`: of the model that it writes ahead for; `max_model_len`: positions of its own."""
        self.runner = runner
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.clock = clock
        self.catch_up_seconds = 0.0
        """Of the last `propose`, what it took to begin."""
        self._num_ids = min(vocab_size, runner.decoder.vocab_size)
        """Tokens of both; an embedding may have rows for more than the tokenizer knows."""
        self._all_known = runner.decoder.vocab_size >= vocab_size
        self._sampler = Sampler(vocab_size) if runner.decoder.vocab_size == vocab_size else None
        self._filled: dict[int, bytes] = {}
        self._starts = torch.arange(len(runner.tables_RB) + 1, dtype=torch.int32, device=runner.decoder.device)
        self._rows = torch.arange(len(runner.tables_RB), device=runner.decoder.device)

    def sleep(self) -> None:
        """Give its KV memory back, and what it knows of blocks."""
        self._filled.clear()
        self.runner.sleep()

    def wake(self) -> None:
        self.runner.wake()

    def propose(self, wanted: Seq[tuple[Shadow, SampleRow, int]]) -> None:
        """A draft for each sequence, of at most so many tokens, whose blocks are there. One that has too much to catch up with
        gets none yet."""
        chunks: list[Chunk] = []
        ready: list[tuple[Shadow, SampleRow, int]] = []
        self.catch_up_seconds = 0.0
        budget = self.max_batch_tokens
        for each in sorted(wanted, key=lambda each: -each[2]):
            shadow = each[0]
            missing = shadow.follow(self.pool, self._filled)
            num_tokens = min(missing, budget)
            start = shadow.num_computed
            if num_tokens and (self._all_known or max(shadow.view.token_ids[start : start + num_tokens]) < self._num_ids):
                budget -= num_tokens
                chunks.append(Chunk(shadow.view, start, num_tokens, num_tokens == missing))
                shadow.num_computed += num_tokens
                if num_tokens == missing:
                    ready.append(each)
        if not chunks:
            return
        started = self.clock()
        logits_NV = self.runner.run(chunks)
        if self.max_batch_tokens - budget > 2 * len(chunks):
            self.catch_up_seconds = self.clock() - started
        if ready:
            self._write_ahead(ready, logits_NV)

    def _write_ahead(self, wanted: list[tuple[Shadow, SampleRow, int]], logits_NV: torch.Tensor) -> None:
        """`wanted`: the longest draft first. `logits_NV`: of what follows the tokens that are known."""
        # what a grammar allows is not known yet
        shaped = [n for n, (_, row, _) in enumerate(wanted) if not row.guided and not (row.greedy and row.plain)]
        decoder = self.runner.decoder
        if isinstance(decoder, LeanDecoder) and decoder.writes_ahead and not shaped:
            drafts = self._write_at_once(decoder, wanted, logits_NV)
        else:
            drafts = self._write_by_place(wanted, shaped, logits_NV)
        for (shadow, _, _), draft in zip(wanted, drafts, strict=True):
            shadow.num_computed += len(draft) - 1
            shadow.seq.draft = draft if min(draft) >= 0 else draft[: draft.index(-1)]

    def _write_at_once(self, decoder: LeanDecoder, wanted: list[tuple[Shadow, SampleRow, int]], logits_NV: torch.Tensor) -> list[list[int]]:
        runner, most = self.runner, wanted[0][2]
        known = [len(shadow.view.token_ids) for shadow, _, _ in wanted]
        rows = [shadow.view.row for shadow, _, _ in wanted]
        width = -(-(max(known) + most - 1) // runner.block_size)
        tables_RB = runner.tables_RB[:, :width]
        tables_NB = tables_RB[rows[0] : rows[0] + 1] if len(rows) == 1 else tables_RB[rows]
        nums = [sum(length > place for _, _, length in wanted) for place in range(1, most)]
        with torch.inference_mode():
            ids_PN = decoder.write_ahead(logits_NV, torch.tensor(known), torch.from_numpy(tables_NB), nums, self._num_ids, runner.cache)
        return [[ids_N[n] for ids_N in ids_PN[:length]] for n, (_, _, length) in enumerate(wanted)]

    def _write_by_place(self, wanted: list[tuple[Shadow, SampleRow, int]], shaped: list[int], logits_NV: torch.Tensor) -> list[list[int]]:
        """`shaped`: whose tokens are not simply the likeliest."""
        most = wanted[0][2]
        rounds = _Rounds(self.runner, [shadow.view for shadow, _, _ in wanted], most - 1)
        drafts: list[list[int]] = [[] for _ in wanted]
        ids_N: list[int] = []
        num = len(wanted)
        pushed: list[tuple[SampleRow, int]] = []
        try:
            for place in range(most):
                if place:
                    logits_NV = self._compute(rounds, place - 1, ids_N, num)
                chosen = _likeliest(logits_NV[:, : self._num_ids])
                while shaped and shaped[-1] >= num:
                    shaped.pop()
                if shaped and self._sampler is not None:
                    # by the very random numbers with which the model's own tokens will be chosen
                    rows = [wanted[n][1] for n in shaped]
                    for n, row, one in zip(shaped, rows, self._sampler.sample(logits_NV[shaped], rows), strict=True):
                        chosen[n] = one.token_id
                        if one.token_id >= 0:
                            row.push(one.token_id)
                            pushed.append((row, one.token_id))
                for draft, token_id in zip(drafts, chosen, strict=False):
                    draft.append(token_id)
                while num and wanted[num - 1][2] <= place + 1:
                    num -= 1
                ids_N = chosen[:num]
        finally:
            for row, token_id in reversed(pushed):
                row.pop(token_id)
        return drafts

    def _compute(self, rounds: "_Rounds", place: int, ids_N: list[int], num: int) -> torch.Tensor:
        """One token more of each sequence."""
        device = self.runner.decoder.device
        batch = StepBatch(
            torch.tensor([max(token_id, 0) for token_id in ids_N], device=device),
            rounds.positions_PN[place, :num],
            rounds.slots_PN[place, :num],
            self._starts[: num + 1],
            rounds.context_lens_PN[place, :num],
            rounds.tables_NB[:num],
            self._rows[:num],
            max_query_len=1,
            max_context_len=rounds.longest[place],
        )
        with torch.inference_mode():
            return self.runner.decoder(batch, self.runner.cache)


class _Rounds:
    """Where the tokens go that are written ahead: one round for each place."""

    __slots__ = ("context_lens_PN", "longest", "positions_PN", "slots_PN", "tables_NB")

    def __init__(self, runner: Runner, views: list[Sequence], num_rounds: int) -> None:
        size, device = runner.block_size, runner.decoder.device
        known_N = np.array([len(view.token_ids) for view in views])
        rows_N = np.array([view.row for view in views])
        positions_PN = known_N + np.arange(num_rounds)[:, None]
        block_PN, offset_PN = np.divmod(positions_PN, size)
        slots_PN = runner.tables_RB[rows_N, block_PN] * np.int64(size) + offset_PN
        context_lens_PN = (positions_PN + 1).astype(np.int32)
        self.longest: list[int] = context_lens_PN.max(1).tolist()
        width = -(-(int(known_N.max()) + num_rounds) // size)
        self.positions_PN = torch.from_numpy(positions_PN).to(device)
        self.slots_PN = torch.from_numpy(slots_PN).to(device)
        self.context_lens_PN = torch.from_numpy(context_lens_PN).to(device)
        self.tables_NB = torch.from_numpy(runner.tables_RB[rows_N, :width]).to(device)


def _likeliest(logits_NV: torch.Tensor) -> list[int]:
    if logits_NV.device.type != "cpu":
        return logits_NV.argmax(-1).tolist()  # type: ignore[no-any-return]
    return logits_NV.float().numpy().argmax(-1).tolist()  # type: ignore[no-any-return]


def check_same_tokens(tokenizer: Tokenizer, draft: Tokenizer, folder: str) -> None:
    """Raises LoadError where a token of one model is another one, or none, of the other."""
    ours, theirs = tokenizer.vocabulary(), draft.vocabulary()
    if ours == theirs:
        return
    differs = f"the draft model in {folder} has another tokenizer: "
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != token_id:
            there = theirs.get(token)
            raise LoadError(
                f"{differs}token {token!r} is {token_id} in the model's and {'missing' if there is None else there} in the draft's"
            )
    extra = min(theirs.keys() - ours.keys(), key=lambda token: theirs[token])
    raise LoadError(f"{differs}token {extra!r} ({theirs[extra]}) is missing in the model's")
