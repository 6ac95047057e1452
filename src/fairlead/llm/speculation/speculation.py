"""Gives sequences their drafts before a step, and learns from what became of them."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from operator import attrgetter

import structlog

from fairlead.llm.sampler import SampleRow
from fairlead.llm.scheduler import Plan, Scheduler
from fairlead.llm.sequence import Sequence
from fairlead.llm.speculation.draft_model import DraftModel, Shadow
from fairlead.llm.speculation.ngram import NUM_CLASSES, Repeats, agreement_class
from fairlead.llm.speculation.pace import Pace, Rate

log = structlog.get_logger("fairlead.llm")

FIRST_RATE = 0.7
"""How often drafts are right, before anything is known of it."""
ENGINE_WEIGHT = 1 / 64
SEQUENCE_WEIGHT = 1 / 8


_value = attrgetter("value")


class _Drafted:
    """What is known of one sequence's drafts."""

    __slots__ = ("kind", "rates", "repeats", "shadow", "tried")

    def __init__(self, seq: Sequence, rates: Seq[Rate], *, by_model: bool) -> None:
        self.shadow = Shadow(seq) if by_model else None
        self.repeats = None if by_model else Repeats(seq.token_ids)
        self.rates = [Rate(rate.value, SEQUENCE_WEIGHT, num=4) for rate in rates]
        """By kind of draft: how well its place agrees."""
        self.kind = 0
        """Of its last draft."""
        self.tried = False
        """Whether that was a trial."""


class Speculation:
    """Of one engine. `propose` before a step is planned, `learn` for each draft that was computed, `end` after the step."""

    def __init__(
        self, pace: Pace, *, max_model_len: int, model: DraftModel | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`model`: that writes the drafts; None: they are what followed before in the same text. `clock`: seconds that steps take."""
        self.pace = pace
        self.model = model
        self.max_model_len = max_model_len
        self.clock = clock
        self.num_drafted = self.num_accepted = 0
        self._rates = [Rate(FIRST_RATE, ENGINE_WEIGHT) for _ in range(1 if model else NUM_CLASSES)]
        self._drafted: dict[int, _Drafted | None] = {}
        """By sequence; None: it gets no more."""
        self._turn = 0
        self._began = 0.0
        self._num_tried = self._num_seqs = 0
        self._proposed = False
        """Whether anybody got a draft before this step."""
        self._broken = False

    # Before a step

    def propose(self, scheduler: Scheduler, row_of: Callable[[Sequence], SampleRow]) -> None:
        """Give those that decode a draft, where that is worth its price."""
        self._num_tried = self._num_seqs = 0
        self._proposed = False
        if self.model is not None:
            self.model.catch_up_seconds = 0.0
            self._began = self.clock()
        decoding = [seq for seq in scheduler.running if seq.num_prompt < len(seq.token_ids) == seq.num_computed + 1]
        if not decoding or self._broken:
            return
        self._num_seqs = len(decoding)
        self.pace.begin(self._num_seqs)
        if self.pace.price < 1.0 or self.pace.tries:
            try:
                if self.model is None:
                    self._look_up(decoding)
                else:
                    self._write_ahead(self.model, decoding, scheduler, row_of)
                self._proposed = any(seq.draft for seq in decoding)
            except Exception as error:  # answers need no drafts
                self._broken = True
                for seq in decoding:
                    seq.draft = []
                log.error("drafts failed, and there are no more", exc_info=error)
        if self.model is None and (self._proposed or self.pace.notes):  # every step looks up, with drafts or without
            self._began = self.clock()

    def _state(self, seq: Sequence) -> _Drafted | None:
        try:
            return self._drafted[seq.id]
        except KeyError:
            state = self._drafted[seq.id] = _Drafted(seq, self._rates, by_model=self.model is not None)
            return state

    def _room(self, seq: Sequence) -> int:
        """Tokens of a draft that can still become part of the answer: one is chosen after them."""
        room, bound = self.max_model_len - len(seq.token_ids) - 1, seq.sampling.max_tokens
        return room if bound is None else min(room, bound - seq.num_generated - 1)

    def _look_up(self, decoding: list[Sequence]) -> None:
        pace, tries = self.pace, self.pace.tries
        unworthy: list[tuple[Sequence, _Drafted]] = []
        drafted, price = self._drafted, pace.price
        for seq in decoding:
            state = drafted[seq.id] if seq.id in drafted else self._state(seq)
            if state is None or (not tries and max(state.rates, key=_value).value <= price):
                continue
            repeats = state.repeats
            assert repeats is not None
            repeats.catch_up()
            if not repeats.place or (room := self._room(seq)) < 1:
                continue
            state.kind = agreement_class(repeats.run)
            num_tokens = pace.length(state.rates[state.kind].value, room)
            if num_tokens:
                state.tried = False
                seq.draft = repeats.guess(num_tokens)
            else:
                unworthy.append((seq, state))
        if unworthy and tries:
            seq, state = self._next(unworthy)
            assert state.repeats is not None
            seq.draft = state.repeats.guess(1)

    def _write_ahead(
        self, model: DraftModel, decoding: list[Sequence], scheduler: Scheduler, row_of: Callable[[Sequence], SampleRow]
    ) -> None:
        pace = self.pace
        wanted: list[tuple[Sequence, _Drafted, int]] = []
        unworthy: list[tuple[Sequence, _Drafted]] = []
        share = (scheduler.max_batch_tokens - len(scheduler.running)) // len(decoding)
        for seq in decoding:
            state = self._state(seq)
            if state is None:
                continue
            most = min(share, self._room(seq), model.max_model_len - len(seq.token_ids))
            num_tokens = pace.length(state.rates[0].value, most)
            if num_tokens:
                state.tried = False
                wanted.append((seq, state, num_tokens))
            elif most >= 1:
                unworthy.append((seq, state))
        if unworthy and pace.tries:
            wanted.append((*self._next(unworthy), 1))
        asked = []
        for seq, state, num_tokens in wanted:
            num_tokens = min(num_tokens, scheduler.reserve(seq, num_tokens))
            if num_tokens >= 1:
                assert state.shadow is not None
                asked.append((state.shadow, row_of(seq), num_tokens))
        if asked:
            model.propose(asked)

    def _next(self, unworthy: list[tuple[Sequence, _Drafted]]) -> tuple[Sequence, _Drafted]:
        """Whose turn it is to try."""
        self._turn += 1
        seq, state = unworthy[self._turn % len(unworthy)]
        state.tried = True
        return seq, state

    # After it

    def learn(self, seq: Sequence, num_accepted: int, num_drafts: int) -> None:
        """So many tokens of the draft that was computed were chosen."""
        self.num_drafted += num_drafts
        self.num_accepted += num_accepted
        state = self._drafted.get(seq.id)
        if state is not None:
            self._num_tried += num_drafts if state.tried else 0
            state.rates[state.kind].note(num_accepted, num_drafts)
            self._rates[state.kind].note(num_accepted, num_drafts)

    def end(self, plan: Plan, num_tokens: int) -> None:
        """The step that `propose` began gave so many tokens. One that computes prompts, too, tells nothing."""
        if self._num_seqs == len(plan.chunks) == plan.num_tokens - plan.num_drafts and self._proposed == bool(plan.num_drafts):
            catch_up = 0.0 if self.model is None else self.model.catch_up_seconds
            timed = self.model is not None or self._proposed or self.pace.notes
            seconds = self.clock() - self._began if timed else 0.0
            self.pace.end(num_tokens, plan.num_drafts, seconds, num_tried=self._num_tried, catch_up=catch_up)

    def give_up(self, seq: Sequence) -> None:
        """A step with a draft of it failed: it has had its last."""
        self._drafted[seq.id] = None

    def forget(self, seq: Sequence) -> None:
        """It is gone."""
        self._drafted.pop(seq.id, None)
