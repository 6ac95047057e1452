"""The step scheduler: which sequences compute how many tokens in the next step.

One rule, that of vLLM's v1 scheduler: the tokens computed catch up with the tokens known. Prompts cut into chunks, decodes,
cached prefixes and sequences that start again after a preemption are all the same case. Sequences are served by
(priority, arrival); of one priority those that run before those that wait. Drafts come last: they take budget and blocks that
nothing known has a use for. A second step may be planned while one is under way, with a place for every token that it chooses.

    waiting ── plan ──► running ── finish ──► gone          abort: from anywhere
       ▲                  │
       └── preempted ─────┘   its blocks are released, it computes again from zero (or from what the prefix cache still holds)
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from fairlead.core.errors import QueueFull
from fairlead.llm.blocks import BlockPool
from fairlead.llm.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens `start : start + num_tokens` of a sequence, computed in one step."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    """It goes up to the last token that has a place: the step's logits choose the next."""
    num_drafts: int = 0
    """Of its tokens the last, which are the sequence's `draft`: each has logits, to see whether it is what would be chosen."""


@dataclass(slots=True)
class Plan:
    """One step. A plan with chunks is under way until `commit` or `rollback`; an empty one is not."""

    now: float
    only: Set[Sequence] | None = None
    chunks: list[Chunk] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)
    """Waited past their deadline and never started: already gone from the scheduler."""
    preempted: list[Sequence] = field(default_factory=list)
    """Back in the waiting line, without row and blocks."""
    admitted: list[Sequence] = field(default_factory=list)
    """Started or started again: they have a new row."""
    published: list[int] = field(default_factory=list)
    """Blocks that others may share already, and that this step is to fill."""
    withheld: list[tuple[Sequence, int]] = field(default_factory=list)
    """(sequence, place in its table) of blocks that the step fills with a token that is not known yet."""
    num_tokens: int = 0
    num_drafts: int = 0
    """Of those, the ones that are not known."""
    num_reserved: int = 0
    """While it is made: tokens kept for running sequences that decode and have not had their turn."""


def _decodes(seq: Sequence) -> bool:
    """It goes on by a token in every step: it has one to compute, or several that its grammar has chosen."""
    num_tokens = len(seq.token_ids) + seq.num_pending - seq.num_computed
    return num_tokens == 1 or (num_tokens > 1 and len(seq.token_ids) > seq.num_prompt)


def order(seq: Sequence) -> tuple[int, float, int]:
    return (seq.priority, seq.arrived, seq.id)


class Scheduler:
    """Pure: it decides, the engine acts; time is an argument. Not thread-safe."""

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_batch_tokens: int, max_waiting: int, max_model_len: int) -> None:
        """Raises ValueError where a sequence of `max_model_len` tokens would not fit the pool: it could never finish."""
        if min(max_num_seqs, max_batch_tokens, max_waiting, max_model_len) < 1:
            raise ValueError("`max_num_seqs`, `max_batch_tokens`, `max_waiting` and `max_model_len` must be at least 1")
        need = pool.num_blocks_for(max_model_len)
        if need > pool.num_blocks:
            raise ValueError(
                f"one sequence of {max_model_len} tokens needs {need} KV blocks of {pool.block_size}, and there are {pool.num_blocks}: "
                "give more KV memory or a smaller `max_model_len`"
            )
        self.pool = pool
        # With a token in every step for each that runs, no decode waits for budget, and none keeps a better priority from starting.
        self.num_rows = min(max_num_seqs, max_batch_tokens)
        self.max_batch_tokens = max_batch_tokens
        self.max_waiting = max_waiting
        self.max_model_len = max_model_len
        self.running: list[Sequence] = []
        """In order."""
        self.waiting: list[Sequence] = []
        """In order; new ones and preempted ones."""
        self.num_preemptions = 0
        self.num_prefix_queried_tokens = 0
        """Known tokens of sequences when they first started, where the prefix cache was asked."""
        self.num_prefix_hit_tokens = 0
        self._free_rows = list(range(self.num_rows))
        self._next_deadline = float("inf")
        """No waiting sequence has an earlier one."""
        self._blocked: tuple[Sequence, int, int] | None = None
        """(first in line that found too few blocks, sequences that ran, blocks that were free)."""
        self._underway: deque[Plan] = deque()
        """At most two, the first planned first."""

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, *seqs: Sequence, bounded: bool = True) -> None:
        """All of them or none. Raises QueueFull unless not `bounded`: then they belong to a request that was let in."""
        if bounded and len(self.waiting) + len(seqs) > self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} sequences are waiting, and at most {self.max_waiting} may")
        for seq in seqs:
            assert 0 < seq.num_tokens <= self.max_model_len, f"{seq} does not fit {self.max_model_len} tokens"
            self._wait(seq)

    def abort(self, seq: Sequence) -> None:
        """Forget it, wherever it is; its blocks are free at once. One that is gone already is no error.

        While steps are under way the blocks are still being written, but only later plans can hand them on, and a device
        computes steps in the order of their plans.
        """
        if seq.row >= 0:
            self._vacate(seq)
        else:
            index = bisect_left(self.waiting, order(seq), key=order)
            if index < len(self.waiting) and self.waiting[index] is seq:
                del self.waiting[index]

    def finish(self, seq: Sequence) -> None:
        """Its row and blocks are free, as after `abort`; the full blocks stay cached."""
        assert seq.row >= 0, f"{seq} does not run"
        self._vacate(seq)

    def plan(self, now: float, *, only: Set[Sequence] | None = None) -> Plan:
        """Hand out one step's tokens, rows and blocks.

        `only`: nothing but these compute, to find the one that makes a step fail. They start even where others must be
        preempted for it, and nothing expires.
        """
        assert len(self._underway) < 2, "two plans were neither committed nor rolled back"
        plan = Plan(now, only)
        if only is None:
            self._expire(plan)
            running = [seq for seq in self.running if not self._ends(seq)] if self._underway else self.running.copy()
        else:
            running = [seq for seq in self.running if seq in only]
        plan.num_reserved = sum([_decodes(seq) for seq in running])
        admitting = True
        for seq in running:
            if admitting and self.waiting and self.waiting[0].priority < seq.priority:
                admitting = self._admit(plan, before=seq.priority)
            if seq.row >= 0:
                self._continue(plan, seq)
        if admitting:
            self._admit(plan)
        if only is None:  # what fails is to be found among what is known
            for index, chunk in enumerate(plan.chunks):
                if chunk.seq.draft and chunk.samples:
                    self._add_draft(plan, index, chunk)
        if plan.chunks:
            self._underway.append(plan)
        for seq, start, num_tokens, samples, num_drafts in plan.chunks:
            seq.num_computed = start + num_tokens - num_drafts
            seq.num_pending += samples
        return plan

    def preempts_nobody(self) -> bool:
        """Whether that is sure of a plan made now. One made while a step is under way must not: that step may end sequences,
        and then nobody has to go."""
        if self.waiting and self.running and self.waiting[0].priority < self.running[-1].priority:
            return False
        if self.pool.num_free >= len(self.running) + self.max_batch_tokens // self.pool.block_size:
            return True
        missing = 0
        for seq in self.running:
            num_tokens = min(seq.num_tokens - seq.num_computed, self.max_batch_tokens)
            missing += max(0, self.pool.num_blocks_for(seq.num_computed + num_tokens) - len(seq.blocks))
        return missing <= self.pool.num_free

    def commit(self, plan: Plan) -> None:
        """The step is computed. The engine then appends a token to each sequence whose chunk `samples`, or several and tells
        how many of them were drafts (`accept`)."""
        assert self._underway and plan is self._underway[0], "this plan is not the first under way"
        self._underway.popleft()
        for seq, _, _, samples, _ in plan.chunks:
            seq.num_pending -= samples
            seq.draft = []
        for seq, index in plan.withheld:
            if seq.row >= 0:
                self.pool.publish(seq, index, index + 1)
        for seq in plan.admitted:
            if seq.num_preemptions == 0 and self._asks_cache(seq):
                self.num_prefix_queried_tokens += len(seq.token_ids)
                self.num_prefix_hit_tokens += seq.cached_tokens

    def reserve(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks for a draft that is being made, before the step is planned, where there are more free than those that run
        need next. Returns for how many tokens after the known ones there is room."""
        end, size = len(seq.token_ids) + num_tokens, self.pool.block_size
        missing = self.pool.num_blocks_for(min(end, self.max_model_len)) - len(seq.blocks)
        if missing > 0:
            spare = self.pool.num_free - len(self.running)
            if spare > 0:
                seq.blocks += self.pool.allocate(min(missing, spare))
        return len(seq.blocks) * size - len(seq.token_ids)

    def accept(self, seq: Sequence, num_tokens: int) -> None:
        """So many of its draft's tokens are known now: what the last step computed of them stands."""
        start, size = seq.num_computed, self.pool.block_size
        seq.num_computed = end = start + num_tokens
        if end // size > start // size:
            self.pool.publish(seq, start // size, end // size)

    def rollback(self, plan: Plan) -> None:
        """The step failed, or goes on from one that did: what it was to compute is not there.

        Sequences that ran before it keep what they had computed. Those that it admitted wait again as if it had not been:
        of those that stay, they alone can have taken a block that the step was to fill.
        """
        assert self._underway and plan is self._underway[-1], "this plan is not the last under way"
        self._underway.pop()
        self.pool.unpublish(plan.published)
        for seq, start, _, samples, _ in plan.chunks:
            seq.draft = []
            seq.num_pending -= samples
            if seq.row >= 0:
                seq.num_computed = start
        for seq in plan.admitted:
            if seq.row >= 0:
                self._vacate(seq)
                if seq.num_preemptions == 0:
                    seq.scheduled_at = -1.0
                    seq.cached_tokens = 0
                self._wait(seq)

    def check_integrity(self) -> None:
        """Raises AssertionError where the books of sequences, rows and blocks disagree."""
        self.pool.check_integrity(self.running)
        for line in (self.running, self.waiting):
            assert line == sorted(line, key=order), "out of order"
        rows = [seq.row for seq in self.running]
        assert sorted(rows + self._free_rows) == list(range(self.num_rows)), f"rows {rows} in use, {self._free_rows} free"
        for seq in self.waiting:
            assert seq.row == -1 and not seq.blocks and not seq.num_computed, f"{seq} waits and holds something"
        assert len(self._underway) <= 2
        for seq in (*self.running, *self.waiting):
            pending = sum(chunk.seq is seq and chunk.samples for plan in self._underway for chunk in plan.chunks)
            assert seq.num_pending == pending, f"{seq}: {seq.num_pending} pending, {pending} under way"
        if not self._underway:
            for seq in self.running:
                for block in seq.blocks[seq.num_computed // self.pool.block_size :]:
                    assert not self.pool.is_published(block), f"{seq}: block {block} is published and not computed"

    def _expire(self, plan: Plan) -> None:
        if plan.now <= self._next_deadline:
            return
        plan.expired = [seq for seq in self.waiting if seq.deadline < plan.now and seq.scheduled_at < 0]
        for seq in plan.expired:
            self.abort(seq)
        self._next_deadline = min((seq.deadline for seq in self.waiting if seq.scheduled_at < 0), default=float("inf"))

    def _continue(self, plan: Plan, seq: Sequence) -> None:
        """The next tokens of a running sequence: one, or as much of its prompt as the budget has left."""
        num_tokens = len(seq.token_ids) + seq.num_pending - seq.num_computed
        if num_tokens > 1:
            reserved = self._is_reserved(plan, seq)
            num_tokens = min(num_tokens, self._budget(plan) + reserved)
            if num_tokens > 0 and self._make_room(plan, seq, num_tokens):
                plan.num_reserved -= reserved
                self._compute(plan, seq, num_tokens)
        elif num_tokens and self._make_room(plan, seq, 1):
            plan.num_reserved -= 1
            self._compute(plan, seq, 1)

    def _budget(self, plan: Plan) -> int:
        """Tokens that the step has left for prompts."""
        return self.max_batch_tokens - plan.num_tokens - plan.num_reserved

    def _make_room(self, plan: Plan, seq: Sequence, num_tokens: int) -> bool:
        """Preempt until there are blocks for the next tokens of `seq`; False when it had to go itself."""
        need = self.pool.num_blocks_for(seq.num_computed + num_tokens) - len(seq.blocks)
        while need > self.pool.num_free:
            victim = self._victim(plan)
            self._preempt(plan, victim)
            if victim is seq:
                return False
        return True

    def _compute(self, plan: Plan, seq: Sequence, num_tokens: int) -> None:
        """Add the chunk to the step; there are blocks for it."""
        start = seq.num_computed
        end = start + num_tokens
        size = self.pool.block_size
        if end > len(seq.blocks) * size:
            assert end <= self.max_model_len, f"{seq} is longer than {self.max_model_len} tokens"
            seq.blocks += self.pool.allocate(self.pool.num_blocks_for(end) - len(seq.blocks))
        if end // size > start // size:
            # Found by others from now on: in a step, every token's K and V are stored before any token attends.
            if end <= len(seq.token_ids):
                plan.published += self.pool.publish(seq, start // size, end // size)
            else:  # by a token that the step under way chooses
                plan.withheld.append((seq, start // size))
        plan.chunks.append(Chunk(seq, start, num_tokens, end == len(seq.token_ids) + seq.num_pending))
        plan.num_tokens += num_tokens

    def _add_draft(self, plan: Plan, index: int, chunk: Chunk) -> None:
        """As much of the draft as there is budget and memory for. It takes nothing from anybody."""
        seq, start, num_tokens, samples, _ = chunk
        end, size = start + num_tokens, self.pool.block_size
        room = (len(seq.blocks) + self.pool.num_free) * size
        num_drafts = min(len(seq.draft), self.max_batch_tokens - plan.num_tokens, self.max_model_len - end, room - end)
        if num_drafts <= 0:
            return
        missing = self.pool.num_blocks_for(end + num_drafts) - len(seq.blocks)
        if missing > 0:
            seq.blocks += self.pool.allocate(missing)
        plan.chunks[index] = Chunk(seq, start, num_tokens + num_drafts, samples, num_drafts)
        plan.num_tokens += num_drafts
        plan.num_drafts += num_drafts

    def _admit(self, plan: Plan, *, before: float = float("inf")) -> bool:
        """Start waiting sequences of a priority better than `before`, in order. False once one must go on waiting:
        none passes it."""
        while seq := self._first(plan):
            if seq.priority >= before:
                return True
            if not self._start(plan, seq):
                return False
        return True

    def _first(self, plan: Plan) -> Sequence | None:
        if plan.only is None:
            return self.waiting[0] if self.waiting else None
        return next((seq for seq in self.waiting if seq in plan.only), None)

    def _start(self, plan: Plan, seq: Sequence) -> bool:
        """Give `seq` a row, the cached blocks of its prefix, and its first chunk; False when it must wait."""
        # Preempted just now: it has had its turn in this plan.
        if seq in plan.preempted or self._still_blocked(plan, seq) or not self._has_turn(plan, seq):
            return False
        matched = self.pool.match(seq) if self._asks_cache(seq) else []
        if not self._clear_the_way(plan, seq, matched):
            return False
        self.waiting.remove(seq)
        insort(self.running, seq, key=order)
        seq.row = heappop(self._free_rows)
        plan.admitted.append(seq)
        self.pool.acquire(matched)
        seq.blocks = matched
        seq.num_computed = len(matched) * self.pool.block_size
        if seq.scheduled_at < 0:
            seq.scheduled_at = plan.now
            seq.cached_tokens = seq.num_computed
        self._compute(plan, seq, min(seq.num_tokens - seq.num_computed, self._budget(plan)))
        return True

    def _asks_cache(self, seq: Sequence) -> bool:
        """Logits of all prompt tokens must be computed, so none may be skipped."""
        return self.pool.prefix_caching and seq.sampling.prompt_logprobs is None

    def _still_blocked(self, plan: Plan, seq: Sequence) -> bool:
        """Nothing that could help has changed since `seq` last found too few blocks: no need to match its prefix again."""
        if self._blocked is None or plan.only is not None:
            return False
        blocked, num_running, num_free = self._blocked
        return blocked is seq and num_running == len(self.running) and num_free >= self.pool.num_free

    def _has_turn(self, plan: Plan, seq: Sequence) -> bool:
        """There is a row, or one that must yield it, and a token of budget."""
        budget = self._budget(plan)
        if not self._free_rows:
            victim = self._victim(plan)
            if not self._yields(plan, victim, to=seq):
                return False
            budget += self._is_reserved(plan, victim)
        return budget > 0

    def _clear_the_way(self, plan: Plan, seq: Sequence, matched: list[int]) -> bool:
        """A row and blocks for `seq`, preempting those that must yield to it; False where that would not be enough."""
        if (missing := self._num_missing(seq, matched)) > 0:
            victims = [other for other in self.running if self._yields(plan, other, to=seq)]
            if missing > sum(len(victim.blocks) + 1 for victim in victims):
                self._blocked = (seq, len(self.running), self.pool.num_free)
                return False
        while not self._free_rows or self._num_missing(seq, matched) > 0:
            victim = self._victim(plan)
            if not self._yields(plan, victim, to=seq):  # the victims' blocks were shared: fewer came back
                return False
            self._preempt(plan, victim)
        return True

    def _num_missing(self, seq: Sequence, matched: list[int]) -> int:
        """Blocks that must become free before `seq` may start: for all that is known of it, and one for every second that runs,
        or their next tokens would soon throw it out again (none: a tenth more computed; one for each: fewer run at once)."""
        total = self.pool.num_blocks_for(seq.num_tokens)
        return self.pool.num_taken(total, matched) + len(self.running) // 2 - self.pool.num_free

    def _victim(self, plan: Plan) -> Sequence:
        """Who goes when blocks or rows are short: the last in order of those that run, never one with a chunk in `plan`.
        Who has no part in a restricted plan goes first."""
        if plan.only is not None:
            for seq in reversed(self.running):
                if seq not in plan.only:
                    return seq
        return self.running[-1]

    def _yields(self, plan: Plan, victim: Sequence, *, to: Sequence) -> bool:
        return victim.priority > to.priority or (plan.only is not None and victim not in plan.only)

    def _ends(self, seq: Sequence) -> bool:
        """The token that it waits for is its last one, whichever it is."""
        most = seq.sampling.max_tokens
        return seq.num_pending > 0 and (
            seq.num_tokens >= self.max_model_len or (most is not None and seq.num_tokens - seq.num_prompt >= most)
        )

    def _preempt(self, plan: Plan, seq: Sequence) -> None:
        assert not self._underway, "the step under way may end somebody"
        plan.num_reserved -= self._is_reserved(plan, seq)
        plan.preempted.append(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._vacate(seq)
        self._wait(seq)

    def _is_reserved(self, plan: Plan, seq: Sequence) -> bool:
        return _decodes(seq) and (plan.only is None or seq in plan.only)

    def _wait(self, seq: Sequence) -> None:
        seq.num_computed = 0
        insort(self.waiting, seq, key=order)
        if seq.scheduled_at < 0:
            self._next_deadline = min(self._next_deadline, seq.deadline)

    def _vacate(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.pool.release(seq)
        seq.draft = []
        heappush(self._free_rows, seq.row)
        seq.row = -1
