"""Who computes what in the next step, on a virtual clock and a KV memory that remembers whose tokens it holds."""

import random
from collections import deque
from collections.abc import Set
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fairlead.core.errors import QueueFull
from fairlead.core.generation import Sampling
from fairlead.llm.blocks import BlockPool
from fairlead.llm.scheduler import Plan, Scheduler
from fairlead.llm.sequence import Sequence

GARBAGE = -1


class Flight(NamedTuple):
    plan: Plan
    drafts: dict[Sequence, list[int]]
    tables: dict[Sequence, list[int]]
    """As they were when it was planned."""


class Steps:
    """An engine without a model: what a slot holds is the hash of all tokens up to its own, and every attention is checked."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        prefix_caching: bool = True,
        max_num_seqs: int = 4,
        max_batch_tokens: int = 16,
        max_waiting: int = 100,
        max_model_len: int = 64,
        drafts: random.Random | None = None,
        forced: random.Random | None = None,
        overlap: bool = False,
    ) -> None:
        """`drafts`: sequences that decode have one before every step, of tokens that will be chosen and of others; `forced`: behind
        a token that is chosen others may come at once, as a grammar's. `overlap`: a step is planned before the one that computes has
        been read, where it may be."""
        self.drafts = drafts
        self.forced = forced
        self.overlap = overlap
        self.flights: deque[Flight] = deque()
        self.num_ahead = self.num_thrown_away = 0
        self.num_accepted = 0
        self.pool = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, max_waiting=max_waiting, max_model_len=max_model_len
        )
        self.memory = [[GARBAGE] * block_size for _ in range(num_blocks)]
        self.now = 0.0
        self.num_made = 0
        self.answer_lens: dict[Sequence, int] = {}
        self.finished: list[Sequence] = []
        self.expired: list[Sequence] = []

    def add(
        self, prompt: list[int] | int, answer: int = 3, *, prompt_logprobs: int | None = None, bounded: bool = False, **kwargs
    ) -> Sequence:
        """A prompt of so many tokens of its own, or of these. `bounded`: the scheduler knows how long the answer may be."""
        self.num_made += 1
        if isinstance(prompt, int):
            prompt = [1000 * self.num_made + i for i in range(prompt)]
        kwargs.setdefault("arrived", self.now + self.num_made * 1e-6)
        sampling = Sampling(prompt_logprobs=prompt_logprobs, max_tokens=answer if bounded else None)
        seq = Sequence(self.num_made, prompt, sampling, **kwargs)
        self.scheduler.add(seq)
        self.answer_lens[seq] = answer
        return seq

    def plan(self, only: Set[Sequence] | None = None) -> Plan:
        self.now += 1.0
        if self.drafts is not None:
            for seq in self.scheduler.running:
                if seq.num_tokens - seq.num_computed == 1:
                    seq.draft = self.guesses(seq, self.drafts.randrange(6), self.drafts.randrange(3))
        plan = self.scheduler.plan(self.now, only=only)
        self.expired += plan.expired
        self.check_plan(plan)
        self.scheduler.check_integrity()
        return plan

    def guesses(self, seq: Sequence, num_right: int, num_wrong: int) -> list[int]:
        known = list(seq.token_ids)
        for _ in range(num_right):
            known.append(self.chosen(seq, known))
        return known[seq.num_tokens :] + [-7] * num_wrong

    def check_plan(self, plan: Plan) -> None:
        scheduler = self.scheduler
        seqs = [chunk.seq for chunk in plan.chunks]
        assert len(set(seqs)) == len(seqs)
        assert plan.num_tokens == sum(chunk.num_tokens for chunk in plan.chunks) <= scheduler.max_batch_tokens
        assert len(scheduler.running) <= scheduler.num_rows
        assert plan.num_reserved == 0
        assert not set(seqs) & set(plan.preempted)
        assert plan.num_drafts == sum(chunk.num_drafts for chunk in plan.chunks)
        for seq, start, num_tokens, samples, num_drafts in plan.chunks:
            assert num_tokens >= 1 and start + num_tokens - num_drafts == seq.num_computed and seq.row >= 0
            assert start + num_tokens <= len(seq.blocks) * self.pool.block_size
            assert samples == (start + num_tokens - num_drafts == seq.num_tokens - samples)
            assert num_drafts <= len(seq.draft) and (samples or not num_drafts)
            assert start + num_tokens <= scheduler.max_model_len
            assert plan.only is None or seq in plan.only
        assert all(seq.row >= 0 and seq in seqs for seq in plan.admitted)
        assert all(
            chunk.start == 0 for chunk in plan.chunks if chunk.seq in plan.admitted and chunk.seq.sampling.prompt_logprobs is not None
        )
        assert plan.chunks or not scheduler.has_work or plan.only is not None or self.flights

    def compute(self, plan: Plan) -> None:
        """As a layer does: the K and V of all tokens are stored, then each token sees all before it. A device does so in the order
        of the plans, whenever that is."""
        contents = {
            seq: self.contents(seq, self.chosen_too(seq, start + num_tokens - num)) for seq, start, num_tokens, _, num in plan.chunks
        }
        for seq, start, num_tokens, _, _ in plan.chunks:
            for position in range(start, start + num_tokens):
                self.store(seq, position, contents[seq][position])
        for seq, start, num_tokens, _, _ in plan.chunks:
            for position in range(start + num_tokens):
                block, offset = divmod(position, self.pool.block_size)
                assert self.memory[seq.blocks[block]][offset] == contents[seq][position], f"{seq} reads another's K and V at {position}"

    def store(self, seq: Sequence, position: int, content: int) -> None:
        block, offset = divmod(position, self.pool.block_size)
        self.memory[seq.blocks[block]][offset] = content

    def contents(self, seq: Sequence, known: list[int]) -> list[int]:
        running, contents = hash(seq.salt), []
        for token in known:
            running = hash((running, token))
            contents.append(running)
        return contents

    def chosen_too(self, seq: Sequence, end: int) -> list[int]:
        """Its tokens up to there, as the device has them: those that it chose and nobody has read, too. Then the draft's."""
        tokens = list(seq.token_ids)
        while len(tokens) < end:
            tokens.append(self.chosen(seq, tokens))
        return [*tokens, *seq.draft]

    def launch(self, only: Set[Sequence] | None = None) -> Plan:
        plan = self.plan(only)
        if plan.chunks:
            drafts = {chunk.seq: chunk.seq.draft[: chunk.num_drafts] for chunk in plan.chunks}
            self.flights.append(Flight(plan, drafts, {chunk.seq: list(chunk.seq.blocks) for chunk in plan.chunks}))
            self.compute(plan)
        return plan

    def launch_ahead(self) -> Plan | None:
        if (
            not self.overlap
            or len(self.flights) != 1
            or self.drafts is not None
            or self.forced is not None
            or not self.scheduler.preempts_nobody()
        ):
            return None
        plan = self.launch()
        assert not plan.preempted
        self.num_ahead += bool(plan.chunks)
        return plan

    def land(self) -> Plan:
        plan, drafts, _ = self.flights.popleft()
        self.scheduler.commit(plan)
        for chunk in plan.chunks:
            self.num_thrown_away += chunk.seq.row < 0
            if chunk.samples and chunk.seq.row >= 0:
                self.append(chunk.seq, drafts[chunk.seq])
        self.scheduler.check_integrity()
        return plan

    def step(self, only: Set[Sequence] | None = None) -> Plan:
        if not self.flights and not (plan := self.launch(only)).chunks:
            return plan
        if only is None:
            self.launch_ahead()
        return self.land()

    def land_all(self) -> None:
        while self.flights:
            self.land()

    def chosen(self, seq: Sequence, known: list[int]) -> int:
        # What is chosen depends on all that was read, so equal prompts answer alike.
        return self.contents(seq, known)[-1] % 50_000

    def append(self, seq: Sequence, draft: list[int] | None = None) -> None:
        num_accepted = 0
        for guess in [*(draft or []), None]:
            seq.token_ids.append(self.chosen(seq, seq.token_ids))
            num_accepted += seq.token_ids[-1] == guess
            if seq.token_ids[-1] != guess or seq.num_generated == self.answer_lens[seq]:
                break
        for _ in range(self.forced.randrange(6) if self.forced is not None else 0):
            if seq.num_generated < self.answer_lens[seq]:
                seq.token_ids.append(self.chosen(seq, seq.token_ids))
        self.scheduler.accept(seq, num_accepted)
        self.num_accepted += num_accepted
        if seq.num_generated == self.answer_lens[seq]:
            self.scheduler.finish(seq)
            self.finished.append(seq)

    def fail(self, only: Set[Sequence] | None = None) -> Plan:
        """A step that dies half-way, and with it the one after: every slot that they were to write holds garbage."""
        if not self.flights and not (plan := self.launch(only)).chunks:
            return plan
        if only is None:
            self.launch_ahead()
        return self.roll_back_all()

    def roll_back_all(self) -> Plan:
        while self.flights:
            plan, _, tables = self.flights.pop()
            for seq, start, num_tokens, _, _ in plan.chunks:
                for position in range(start, start + num_tokens):
                    block, offset = divmod(position, self.pool.block_size)
                    self.memory[tables[seq][block]][offset] = GARBAGE
            self.scheduler.rollback(plan)
        self.scheduler.check_integrity()
        return plan

    def run(self, max_steps: int) -> int:
        """Until nothing is left to do; how many steps that took."""
        num_steps = 0
        while self.scheduler.has_work or self.flights:
            num_steps += 1
            assert num_steps <= max_steps, f"{self.scheduler.running} and {self.scheduler.waiting} have not finished"
            self.step()
        assert self.pool.num_free == self.pool.num_blocks
        return num_steps


def shape(plan: Plan) -> list[tuple[int, int, int]]:
    return [(chunk.seq.id, chunk.start, chunk.num_tokens) for chunk in plan.chunks]


# One rule


def test_a_prompt_then_its_answer_token_by_token():
    steps = Steps()
    seq = steps.add(10, answer=3)
    assert [shape(steps.step()) for _ in range(3)] == [[(1, 0, 10)], [(1, 10, 1)], [(1, 11, 1)]]
    assert steps.finished == [seq] and not steps.scheduler.has_work
    assert seq.row == -1 and seq.blocks == [] and seq.scheduled_at == 1.0
    assert shape(steps.step()) == []


def test_a_long_prompt_is_cut_into_chunks_and_decodes_go_on_beside_it():
    steps = Steps(max_batch_tokens=16)
    steps.add(4, answer=4)
    steps.step()
    steps.add(40, answer=1)
    plans = [steps.step() for _ in range(3)]
    assert [shape(plan) for plan in plans] == [[(1, 4, 1), (2, 0, 15)], [(1, 5, 1), (2, 15, 15)], [(1, 6, 1), (2, 30, 10)]]
    assert [plan.chunks[1].samples for plan in plans] == [False, False, True]


def test_several_prompts_share_a_step_and_only_the_last_is_cut():
    steps = Steps(max_batch_tokens=16)
    for _ in range(4):
        steps.add(6)
    assert shape(steps.step()) == [(1, 0, 6), (2, 0, 6), (3, 0, 4)]
    assert shape(steps.step()) == [(1, 6, 1), (2, 6, 1), (3, 4, 2), (4, 0, 6)]


def test_a_chunk_remembers_that_it_samples_after_the_token_was_appended():
    steps = Steps()
    steps.add(5)
    plan = steps.step()
    assert plan.chunks[0].samples


def test_rows_are_the_sequences_own_and_used_again():
    steps = Steps(max_num_seqs=2)
    first, second, third = steps.add(3, answer=1), steps.add(3, answer=9), steps.add(3)
    plan = steps.plan()
    assert (first.row, second.row, third.row) == (0, 1, -1) and plan.admitted == [first, second]
    steps.compute(plan)
    steps.scheduler.commit(plan)
    steps.append(first)
    steps.append(second)
    steps.step()
    assert (first.row, second.row, third.row) == (-1, 1, 0)


def test_no_more_run_than_a_step_has_tokens():
    steps = Steps(max_num_seqs=8, max_batch_tokens=3)
    for _ in range(6):
        steps.add(2, answer=5)
    for _ in range(4):
        steps.step()
    assert steps.scheduler.num_running == 3
    steps.run(max_steps=40)


def test_decodes_that_fill_the_step_do_not_keep_out_a_better_priority():
    steps = Steps(max_num_seqs=8, max_batch_tokens=2)
    first, second = steps.add(1, answer=50, priority=1), steps.add(1, answer=50, priority=1)
    steps.step()
    urgent = steps.add(1, priority=0)
    plan = steps.step()
    assert plan.preempted == [second] and {chunk.seq for chunk in plan.chunks} == {urgent, first}


# Drafts


def test_a_draft_is_computed_with_the_token_before_it_and_what_was_right_of_it_is_known():
    steps = Steps()
    seq = steps.add(10, answer=9)
    steps.step()
    seq.draft = steps.guesses(seq, 2, 2)
    plan = steps.step()
    assert plan.chunks == [(seq, 10, 5, True, 4)] and plan.num_drafts == 4
    assert seq.num_tokens == 14 and seq.num_computed == 13, "two of the draft, and the token after them, which was chosen"
    assert seq.draft == []
    assert shape(steps.step()) == [(1, 13, 1)]
    steps.run(max_steps=9)


def test_blocks_that_a_draft_fills_are_found_by_others_once_it_is_known():
    steps = Steps()
    seq = steps.add(6, answer=9)
    steps.step()
    seq.draft = steps.guesses(seq, 5, 4)
    plan = steps.plan()
    assert plan.chunks[0].num_drafts == 9 and plan.published == [] and steps.pool.num_published == 1
    steps.compute(plan)
    draft = seq.draft
    steps.scheduler.commit(plan)
    steps.append(seq, draft)
    assert (seq.num_tokens, seq.num_computed, steps.pool.num_published) == (13, 12, 3)
    steps.scheduler.check_integrity()
    steps.run(max_steps=9)


def test_drafts_take_only_what_prompts_leave_of_a_step():
    steps = Steps(max_batch_tokens=16)
    seq = steps.add(4, answer=20)
    steps.step()
    steps.add(12, answer=20)
    seq.draft = steps.guesses(seq, 5, 0)
    assert [(chunk.num_tokens, chunk.num_drafts) for chunk in steps.step().chunks] == [(4, 3), (12, 0)]


def test_a_draft_throws_nobody_out():
    steps = Steps(num_blocks=6, max_model_len=24, max_batch_tokens=32)
    first, second = steps.add(8, answer=5), steps.add(8, answer=5)
    steps.step()
    for seq in (first, second):
        seq.draft = steps.guesses(seq, 9, 0)
    plan = steps.step()
    assert plan.preempted == [] and [chunk.num_drafts for chunk in plan.chunks] == [3, 3], "a block more for each, and none is left"
    steps.run(max_steps=20)


def test_a_draft_ends_with_the_longest_sequence():
    steps = Steps(num_blocks=6, max_model_len=24)
    seq = steps.add(20, answer=4)
    steps.step()
    steps.step()
    seq.draft = [1] * 9
    assert steps.step().chunks == [(seq, 20, 4, True, 3)]
    steps.run(max_steps=4)


def test_a_failed_step_forgets_its_drafts_and_the_search_for_its_cause_does_without():
    steps = Steps()
    seq = steps.add(8, answer=5)
    steps.step()
    seq.draft = steps.guesses(seq, 3, 0)
    assert steps.fail().num_drafts == 3
    assert seq.draft == [] and (seq.num_tokens, seq.num_computed) == (9, 8)
    seq.draft = steps.guesses(seq, 3, 0)
    assert steps.step(only={seq}).num_drafts == 0
    steps.run(max_steps=5)


# The prefix cache


def test_the_same_prompt_again_computes_its_last_tokens_only():
    steps = Steps()
    prompt = list(range(10))
    steps.add(prompt)
    steps.run(max_steps=3)
    again = steps.add(prompt)
    assert shape(steps.step()) == [(2, 8, 2)]
    assert again.cached_tokens == 8
    assert (steps.scheduler.num_prefix_queried_tokens, steps.scheduler.num_prefix_hit_tokens) == (20, 8)


def test_equal_prompts_of_one_step_are_computed_once():
    steps = Steps()
    for _ in range(3):
        steps.add(list(range(9)))
    assert shape(steps.step()) == [(1, 0, 9), (2, 8, 1), (3, 8, 1)]
    assert steps.pool.num_free == 64 - 2 - 3


def test_another_salt_shares_nothing():
    steps = Steps(max_batch_tokens=32)
    for salt in ("a", "b", "a"):
        steps.add(list(range(9)), salt=salt)
    assert shape(steps.step()) == [(1, 0, 9), (2, 0, 9), (3, 8, 1)]


def test_the_next_turn_of_a_chat_finds_the_answer_before_it():
    steps = Steps()
    first = steps.add(6, answer=8)
    steps.run(max_steps=8)
    # The last token chosen was never computed itself: 13 of 14 have K and V, 12 of them in full blocks.
    second = steps.add([*first.token_ids, 7, 7, 7])
    assert shape(steps.step()) == [(2, 12, 5)]
    assert second.cached_tokens == 12


def test_who_wants_all_logits_of_the_prompt_skips_none_but_leaves_them_to_others():
    steps = Steps(max_batch_tokens=32)
    prompt = list(range(9))
    for logprobs in (None, 0, None):
        steps.add(prompt, prompt_logprobs=logprobs)
    assert shape(steps.step()) == [(1, 0, 9), (2, 0, 9), (3, 8, 1)]
    assert steps.scheduler.num_prefix_queried_tokens == 18
    steps.run(max_steps=5)


def test_without_prefix_caching_all_is_computed():
    steps = Steps(max_batch_tokens=32, prefix_caching=False)
    steps.add(list(range(9)))
    steps.add(list(range(9)))
    assert shape(steps.step()) == [(1, 0, 9), (2, 0, 9)]
    assert steps.scheduler.num_prefix_queried_tokens == 0


# The waiting line


def test_the_waiting_line_is_bounded_and_takes_all_choices_or_none():
    steps = Steps(max_waiting=3)
    steps.add(3)
    steps.add(3)
    choices = [Sequence(i, [1, 2], Sampling()) for i in (8, 9)]
    with pytest.raises(QueueFull, match="2 sequences are waiting, and at most 3 may"):
        steps.scheduler.add(*choices)
    assert steps.scheduler.num_waiting == 2
    steps.step()
    steps.scheduler.add(*choices)


def test_better_priorities_start_first_then_earlier_arrivals():
    steps = Steps(max_num_seqs=1)
    later = steps.add(3, answer=1, priority=1, arrived=5.0)
    sooner = steps.add(3, answer=1, priority=1, arrived=4.0)
    best = steps.add(3, answer=1, priority=0, arrived=9.0)
    steps.run(max_steps=3)
    assert steps.finished == [best, sooner, later]


def test_who_waits_past_the_deadline_is_given_up_and_who_runs_is_not():
    steps = Steps(max_num_seqs=1)
    runs = steps.add(3, answer=6, deadline=2.0)
    waits = steps.add(3, deadline=2.0)
    patient = steps.add(3, answer=1, deadline=50.0)
    steps.step()
    assert steps.step().expired == []  # at the deadline itself there is still time
    assert steps.step().expired == [waits]
    steps.run(max_steps=10)
    assert steps.finished == [runs, patient]


def test_a_preempted_sequence_does_not_expire():
    steps = Steps(max_num_seqs=1)
    old = steps.add(3, answer=4, priority=1, deadline=2.0)
    steps.step()
    steps.add(3, answer=5, priority=0)
    assert steps.step().preempted == [old]
    steps.run(max_steps=20)
    assert old in steps.finished and steps.expired == []


def test_none_passes_the_first_in_line():
    steps = Steps(num_blocks=8, max_model_len=32)
    steps.add(20, answer=4)
    steps.step()
    steps.step()
    big, small = steps.add(20), steps.add(2)
    assert len(steps.step().chunks) == 1 and small.row == -1  # `big` finds too few blocks; `small` would fit
    steps.run(max_steps=20)
    assert big.scheduled_at <= small.scheduled_at


# Out of blocks


def test_the_latest_of_the_worst_priority_is_preempted_and_finishes_all_the_same():
    steps = Steps(num_blocks=6, max_model_len=24, max_batch_tokens=32)
    first, second, third = steps.add(7, answer=12), steps.add(7, answer=12), steps.add(7, answer=12)
    preempted = []
    while steps.scheduler.has_work:
        preempted += steps.step().preempted
    assert preempted and preempted[0] is not first and first.num_preemptions == 0
    assert steps.finished[0] is first and set(steps.finished) == {first, second, third}
    assert steps.scheduler.num_preemptions == len(preempted) == second.num_preemptions + third.num_preemptions


def test_priority_outweighs_arrival_when_one_must_go():
    steps = Steps(num_blocks=5, max_model_len=20, max_batch_tokens=32)
    batch = steps.add(7, answer=12, priority=1)
    interactive = steps.add(7, answer=12, priority=0)
    steps.step()
    assert steps.scheduler.num_running == 2
    preempted = []
    while not steps.finished:
        preempted += steps.step().preempted
    assert preempted == [batch] and steps.finished == [interactive]


def test_a_preempted_sequence_takes_up_what_the_prefix_cache_still_holds():
    steps = Steps(max_num_seqs=1)
    old = steps.add(10, answer=4, priority=1)
    steps.step()
    steps.step()
    steps.add(3, answer=1, priority=0)
    steps.step()
    assert shape(steps.step()) == [(1, 8, 4)]
    assert old.cached_tokens == 0 and old.scheduled_at == 1.0  # both tell of its first start
    assert steps.scheduler.num_prefix_hit_tokens == 0


def test_a_better_priority_takes_the_row_of_a_worse_one_and_an_equal_one_waits():
    steps = Steps(max_num_seqs=2)
    first, second = steps.add(3, answer=20, priority=1), steps.add(3, answer=20, priority=1)
    steps.step()
    equal = steps.add(3, priority=1)
    assert steps.step().preempted == []
    urgent = steps.add(3, priority=0)
    plan = steps.step()
    assert plan.preempted == [second] and plan.admitted == [urgent]
    assert {chunk.seq for chunk in plan.chunks} == {first, urgent} and equal.row == -1


def test_a_better_priority_takes_the_blocks_of_worse_ones():
    steps = Steps(num_blocks=8, max_model_len=32)
    batch = [steps.add(11, answer=9, priority=1) for _ in range(2)]
    steps.step()
    steps.step()
    urgent = steps.add(12, answer=2, priority=0)
    assert steps.step().preempted == [batch[1]]  # one is enough
    assert urgent.row >= 0 and batch[0].row >= 0
    steps.run(max_steps=40)
    assert steps.finished[0] is urgent


def test_a_better_priority_does_not_preempt_where_that_would_not_be_enough():
    steps = Steps(num_blocks=8, max_model_len=32, max_batch_tokens=32)
    steps.add(18, answer=3, priority=0)
    worse = steps.add(3, answer=9, priority=1)
    steps.step()
    steps.add(20, priority=0)  # 5 blocks; 5 are taken by the first, 1 by the worse one
    assert steps.step().preempted == [] and worse.row >= 0
    steps.run(max_steps=20)


def test_a_long_prompt_of_a_worse_priority_yields_the_budget():
    steps = Steps(max_batch_tokens=8)
    steps.add(40, answer=1, priority=1)
    steps.step()
    steps.add(12, answer=1, priority=0)
    assert [shape(steps.step()) for _ in range(3)] == [[(2, 0, 8)], [(2, 8, 4), (1, 8, 4)], [(1, 12, 8)]]


def test_a_better_prompt_leaves_worse_decodes_their_token():
    steps = Steps(max_batch_tokens=8)
    steps.add(3, answer=9, priority=1)
    steps.step()
    steps.add(40, priority=0)
    assert shape(steps.step()) == [(2, 0, 7), (1, 3, 1)]


def test_several_tokens_that_are_known_at_once_share_a_step_and_wait_for_no_prompt():
    # Given a sequence that decodes, and behind whose next token three more are known at once
    steps = Steps(max_batch_tokens=8)
    seq = steps.add(3, answer=9, priority=1)
    steps.step()
    seq.token_ids += [1, 2, 3]
    # When a long prompt of a better priority comes, then at least one of them is computed in every step
    steps.add(20, answer=1, priority=0)
    assert [shape(steps.step()) for _ in range(3)] == [[(2, 0, 7), (1, 3, 1)], [(2, 7, 7), (1, 4, 1)], [(2, 14, 6), (1, 5, 2)]]


def test_a_sequence_that_would_never_fit_the_pool_is_refused_at_the_start():
    with pytest.raises(ValueError, match="one sequence of 64 tokens needs 16 KV blocks of 4, and there are 15"):
        Steps(num_blocks=15, max_model_len=64)
    steps = Steps(num_blocks=16, max_model_len=64)
    steps.add(40, answer=24)
    steps.run(max_steps=30)


@pytest.mark.parametrize("setting", ["max_num_seqs", "max_batch_tokens", "max_waiting", "max_model_len"])
def test_settings_of_nothing_are_refused(setting: str):
    with pytest.raises(ValueError, match="must be at least 1"):
        Steps(**{setting: 0})


# Leaving


def test_abort_frees_the_blocks_at_once_wherever_the_sequence_is():
    steps = Steps(max_num_seqs=1)
    runs, waits = steps.add(10), steps.add(10)
    steps.step()
    assert steps.pool.num_free == 64 - 3
    steps.scheduler.abort(runs)
    assert steps.pool.num_free == 64 and runs.row == -1
    steps.scheduler.abort(waits)
    assert not steps.scheduler.has_work
    for gone in (runs, waits):
        steps.scheduler.abort(gone)
    steps.scheduler.check_integrity()


@pytest.mark.parametrize("succeeds", [True, False])
def test_abort_while_a_step_is_under_way(succeeds: bool):
    steps = Steps()
    first, second = steps.add(list(range(9)), answer=5), steps.add(list(range(9)), answer=5)
    plan = steps.plan()
    steps.scheduler.abort(first)
    assert steps.pool.num_free == 64 - 3
    (steps.scheduler.commit if succeeds else steps.scheduler.rollback)(plan)
    steps.scheduler.check_integrity()
    assert (steps.pool.num_published, second.num_computed, second.row) == ((2, 9, 1) if succeeds else (0, 0, -1))


def test_two_plans_are_under_way_at_most_and_end_in_their_order():
    steps = Steps()
    steps.add(3)
    first, second = steps.plan(), steps.plan()
    with pytest.raises(AssertionError, match="neither committed nor rolled back"):
        steps.scheduler.plan(5.0)
    with pytest.raises(AssertionError, match="not the first under way"):
        steps.scheduler.commit(second)
    with pytest.raises(AssertionError, match="not the last under way"):
        steps.scheduler.rollback(first)
    steps.scheduler.commit(first)
    steps.scheduler.rollback(second)
    with pytest.raises(AssertionError, match="not the last under way"):
        steps.scheduler.rollback(second)


# Planned ahead


def test_a_step_is_planned_with_a_place_for_each_token_that_is_being_chosen():
    steps = Steps(overlap=True)
    seq = steps.add(10, answer=3)
    first = steps.launch()
    assert (seq.num_tokens, seq.num_computed, seq.num_pending, len(seq.token_ids)) == (11, 10, 1, 10)
    second = steps.launch_ahead()
    assert shape(first) == [(1, 0, 10)] and second is not None and shape(second) == [(1, 10, 1)]
    steps.land()
    assert (seq.num_tokens, seq.num_pending, seq.num_generated) == (12, 1, 1)
    steps.run(max_steps=4)
    assert seq.num_generated == 3 and steps.num_thrown_away == 1


def test_who_is_sure_to_end_is_not_planned_again():
    steps = Steps(overlap=True, max_model_len=32)
    by_length, by_context = steps.add(10, answer=2, bounded=True), steps.add(30, answer=2)
    steps.run(max_steps=8)
    assert {by_length, by_context} == set(steps.finished) and steps.num_thrown_away == 0 < steps.num_ahead


def test_a_block_is_found_by_others_when_the_token_that_fills_it_is_known():
    steps = Steps(overlap=True)
    seq = steps.add(6, answer=9)
    steps.step()  # its first token is known, its second is being chosen
    plan = steps.launch_ahead()  # which this computes, the last of its block
    assert plan is not None and shape(plan) == [(1, 7, 1)] and plan.published == [] and steps.pool.num_published == 1
    steps.land()
    assert steps.pool.num_published == 1
    steps.land()
    assert steps.pool.num_published == 2 and seq.num_generated == 3


def test_what_is_computed_after_an_end_is_found_by_nobody():
    steps = Steps(overlap=True)
    steps.add(6, answer=2)
    steps.run(max_steps=4)
    assert steps.num_thrown_away == 1 and steps.pool.num_published == 1


def test_blocks_of_one_that_ended_are_handed_on_while_it_is_still_computed():
    steps = Steps(overlap=True, num_blocks=6, max_model_len=24, prefix_caching=False)
    steps.add(7, answer=2)
    steps.step()
    steps.launch_ahead()
    steps.land()  # it has ended, and is in flight once more
    assert steps.flights and steps.pool.num_free == 6
    steps.add(23, answer=1)
    steps.run(max_steps=6)  # the slots that it wrote late are written again


def test_a_step_that_would_throw_somebody_out_waits_until_the_one_before_is_known():
    steps = Steps(overlap=True, num_blocks=4, max_model_len=16, max_batch_tokens=32)
    steps.add(8, answer=9)
    steps.add(7, answer=2, arrived=99.0)
    steps.launch()
    assert steps.pool.num_free == 0 and not steps.scheduler.preempts_nobody()
    assert steps.launch_ahead() is None
    steps.run(max_steps=30)
    assert len(steps.finished) == 2


def test_a_better_priority_in_line_waits_until_the_step_before_is_known():
    steps = Steps(overlap=True, max_num_seqs=1)
    worse = steps.add(3, answer=9, priority=1)
    steps.step()
    steps.land_all()
    steps.launch()
    steps.add(3, answer=1, priority=0)
    assert steps.launch_ahead() is None
    steps.land()
    assert steps.launch().preempted == [worse]


def test_steps_in_flight_that_fail_are_as_if_they_had_not_been():
    steps = Steps(overlap=True)
    old = steps.add(7, answer=9)
    steps.step()
    steps.land_all()
    steps.launch()
    new = steps.add(list(range(9)), answer=4)
    ahead = steps.launch_ahead()
    assert ahead is not None and shape(ahead) == [(1, 9, 1), (2, 0, 9)]
    steps.roll_back_all()
    assert (old.num_computed, old.num_pending, old.num_tokens) == (8, 0, 9)
    assert (new.row, new.num_pending, new.scheduled_at) == (-1, 0, -1.0)
    assert steps.pool.num_published == 2, "the first block of `old`, and the one that its first token filled"
    steps.run(max_steps=20)


# Steps that fail


def test_a_failed_step_is_as_if_it_had_not_been():
    steps = Steps()
    old = steps.add(7, answer=9)
    steps.step()
    new = [steps.add(list(range(9)), answer=4) for _ in range(2)]
    plan = steps.fail()
    assert shape(plan) == [(1, 7, 1), (2, 0, 9), (3, 8, 1)]
    assert old.row >= 0 and old.num_computed == 7
    assert [(seq.row, seq.num_computed, seq.scheduled_at, seq.cached_tokens) for seq in new] == [(-1, 0, -1.0, 0)] * 2
    assert steps.pool.num_published == 1  # the first block of `old`; not the second, nor those of the prompt
    assert steps.scheduler.num_prefix_hit_tokens == 0
    assert shape(steps.step()) == shape(plan)
    steps.run(max_steps=20)


def test_who_shared_a_block_of_a_failed_step_computes_it_itself():
    steps = Steps()
    owner, sharer = steps.add(list(range(9))), steps.add(list(range(9)))
    steps.fail()
    assert shape(steps.step(only={sharer})) == [(2, 0, 9)]
    assert shape(steps.step(only={owner})) == [(1, 8, 1)]
    steps.run(max_steps=5)


def test_the_one_that_fails_is_found_by_halves():
    steps = Steps(max_batch_tokens=32)
    seqs = [steps.add(4, answer=6) for _ in range(4)]
    steps.step()
    culprit = seqs[2]
    suspects = [chunk.seq for chunk in steps.fail().chunks]
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        if culprit in half:
            suspects = [chunk.seq for chunk in steps.fail(only=set(half)).chunks]
        else:
            steps.step(only=set(half))
            suspects = suspects[len(half) :]
    assert suspects == [culprit]
    steps.scheduler.abort(culprit)
    steps.run(max_steps=10)
    assert set(steps.finished) == set(seqs) - {culprit}


def test_a_restricted_plan_computes_even_where_others_hold_all_blocks_and_rows():
    steps = Steps(num_blocks=6, max_model_len=24, max_num_seqs=2, max_batch_tokens=32)
    steps.add(11, answer=5)
    last = steps.add(11, answer=5)
    steps.step()
    steps.step()
    assert steps.pool.num_free == 0
    assert shape(steps.step(only={last})) == [(2, 12, 1)]
    waits = steps.add(11, answer=5)
    assert [chunk.seq for chunk in steps.step(only={waits}).chunks] == [waits]
    steps.run(max_steps=40)


def test_a_restricted_plan_expires_nobody():
    steps = Steps(max_num_seqs=1)
    runs, waits = steps.add(3), steps.add(3, deadline=0.5)
    steps.scheduler.abort(waits)
    steps.step()
    late = steps.add(3, deadline=1.0)
    assert steps.step(only={runs}).expired == []
    assert steps.step().expired == [late]


# Anything, in any order

PREFIXES = [[p * 100 + i for i in range(40)] for p in range(3)]


class AnySchedule(RuleBasedStateMachine):
    """Arrivals, aborts, failures, restricted steps over tiny pools: the books agree after every step, no token reads another's
    K and V, and whatever is left in the end finishes in a bounded number of steps."""

    @initialize(
        drafts=st.one_of(st.none(), st.randoms(use_true_random=False)),
        forced=st.one_of(st.none(), st.randoms(use_true_random=False)),
        num_blocks=st.integers(6, 20),
        max_num_seqs=st.integers(1, 5),
        max_batch_tokens=st.integers(1, 24),
        prefix_caching=st.sampled_from([True, True, False]),
        overlap=st.booleans(),
    )
    def start(
        self,
        drafts: random.Random | None,
        forced: random.Random | None,
        num_blocks: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        prefix_caching: bool,
        overlap: bool,
    ) -> None:
        self.steps = Steps(
            drafts=drafts,
            forced=forced,
            overlap=overlap,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            prefix_caching=prefix_caching,
            max_waiting=12,
            max_model_len=24,
        )

    @rule(
        prefix=st.sampled_from(PREFIXES),
        length=st.integers(1, 18),
        own=st.integers(0, 3),
        answer=st.integers(1, 6),
        priority=st.integers(0, 2),
        patience=st.sampled_from([float("inf"), 3.0]),
        age=st.sampled_from([0.0, 5.0]),
        salt=st.sampled_from(["", "", "tenant"]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        bounded=st.booleans(),
    )
    def arrive(self, prefix, length, own, answer, priority, patience, age, salt, prompt_logprobs, bounded) -> None:
        steps = self.steps
        if steps.scheduler.num_waiting >= steps.scheduler.max_waiting:
            with pytest.raises(QueueFull):
                steps.add(3)
            return
        prompt = [*prefix[: min(length, 18 - own)], *([7777 + steps.num_made] * own)]
        steps.add(
            prompt,
            answer,
            priority=priority,
            deadline=steps.now + patience,
            arrived=steps.now - age,
            salt=salt,
            prompt_logprobs=prompt_logprobs,
            bounded=bounded,
        )

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.steps.step()

    @rule()
    def fail(self) -> None:
        self.steps.fail()

    @precondition(lambda self: self.steps.scheduler.has_work)
    @rule(data=st.data(), fails=st.booleans())
    def restricted_step(self, data: st.DataObject, fails: bool) -> None:
        scheduler = self.steps.scheduler
        self.steps.land_all()
        alive = [*scheduler.running, *scheduler.waiting]
        if not alive:
            return
        only = set(data.draw(st.lists(st.sampled_from(alive), min_size=1, unique_by=id)))
        assert (self.steps.fail if fails else self.steps.step)(only).chunks

    @precondition(lambda self: self.steps.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        scheduler = self.steps.scheduler
        scheduler.abort(data.draw(st.sampled_from([*scheduler.running, *scheduler.waiting])))

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "steps"):
            self.steps.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "steps"):
            # Alone, one after another, each would need a step for every token of prompt and answer at the very most, and one that is
            # thrown away.
            self.steps.run(max_steps=25 * (self.steps.scheduler.num_running + self.steps.scheduler.num_waiting) + len(self.steps.flights))


AnySchedule.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestAnySchedule = AnySchedule.TestCase


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_long_day_with_a_tiny_pool(seed: int, overlap: bool):
    rng = random.Random(seed)
    steps = Steps(num_blocks=24, max_num_seqs=6, max_batch_tokens=20, max_waiting=20, max_model_len=48, overlap=overlap)
    accepted = []
    for _ in range(400):
        if rng.random() < 0.35:
            prompt = rng.choice(PREFIXES)[: rng.randint(1, 24)] + [rng.randrange(10_000) for _ in range(rng.randint(0, 8))]
            try:
                accepted.append(
                    steps.add(
                        prompt, rng.randint(1, 16), priority=rng.choice([0, 0, 1]), salt=rng.choice("aab"), bounded=rng.random() < 0.5
                    )
                )
            except QueueFull:
                assert steps.scheduler.num_waiting == 20
        if rng.random() < 0.03 and steps.scheduler.has_work:
            gone = rng.choice([*steps.scheduler.running, *steps.scheduler.waiting])
            steps.scheduler.abort(gone)
            accepted.remove(gone)
        (steps.fail if rng.random() < 0.05 else steps.step)()
    steps.run(max_steps=600)
    assert set(steps.finished) == set(accepted)
    assert steps.scheduler.num_preemptions > 0 and steps.scheduler.num_prefix_hit_tokens > 0
    assert (steps.num_ahead > 100 and steps.num_thrown_away > 10) == overlap


def test_the_answers_do_not_depend_on_the_schedule():
    """Small pool or large, chunks or whole prompts, cached or not: each sequence computes the same tokens."""

    def answers(**kwargs) -> list[list[int]]:
        rng = random.Random(0)
        steps = Steps(max_model_len=48, **kwargs)
        seqs = [steps.add(rng.choice(PREFIXES)[: rng.randint(4, 30)], rng.randint(1, 16)) for _ in range(20)]
        steps.run(max_steps=2_000)
        return [seq.token_ids[seq.num_prompt :] for seq in seqs]

    alone = answers(num_blocks=400, max_num_seqs=1, max_batch_tokens=64, prefix_caching=False)
    assert answers(num_blocks=400, max_num_seqs=6, max_batch_tokens=64, overlap=True) == alone
    assert answers(num_blocks=12, max_num_seqs=6, max_batch_tokens=7, overlap=True) == alone
    assert answers(num_blocks=400, max_num_seqs=6, max_batch_tokens=64, drafts=random.Random(1)) == alone
    assert answers(num_blocks=12, max_num_seqs=6, max_batch_tokens=20, drafts=random.Random(2)) == alone
    assert answers(num_blocks=400, max_num_seqs=20, max_batch_tokens=640) == alone
    assert answers(num_blocks=12, max_num_seqs=6, max_batch_tokens=7) == alone
