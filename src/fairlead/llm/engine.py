"""The engine: requests in, pieces of their answers out, one `step` at a time.

plan → run → choose → read → commit → advance. With `overlap` the next step is planned and given to the device before this one is
read. The engine has no thread and no clock of its own, so that a test drives it step by step; `fairlead.backends.llm` gives it a
thread.
"""

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import structlog
import torch
from msgspec import structs

from fairlead.core.errors import ContextExceeded, FairleadError, InvalidRequest, ModelError, TimeoutExpired
from fairlead.core.generation import Delta, EngineStats, Sampling, TokenLogprob, Usage, add_calls
from fairlead.llm.adapters import Adapters, Use
from fairlead.llm.grammar import Grammar, Grammars, Matcher
from fairlead.llm.masks import Guided
from fairlead.llm.offload import Offloaded, offload_device
from fairlead.llm.output import OutputStream
from fairlead.llm.parsing.answers import AnswerFormat, Parsing
from fairlead.llm.phases import Trail, merged
from fairlead.llm.runner import Chosen, Runner, wants_prompt_logits
from fairlead.llm.sampler import Sampled, Sampler, SampleRow, sampled
from fairlead.llm.scheduler import Chunk, Plan, Scheduler
from fairlead.llm.sequence import Sequence
from fairlead.llm.speculation.draft_model import DraftModel
from fairlead.llm.speculation.speculation import Speculation
from fairlead.llm.steps import Flight, chosen_on_device, may_fly_ahead
from fairlead.llm.tokenizer import Tokenizer
from fairlead.observe.metrics import Histogram
from fairlead.observe.nvtx import ranged
from fairlead.observe.table import SECONDS

log = structlog.get_logger("fairlead.llm")

MAX_FORCED = 16
"""Tokens that a grammar leaves no choice about, in one step."""
MAX_FAILURES = 16
"""Failed steps with no good one between them after which the engine gives itself up: it is not the requests' fault."""

Answer = tuple[int, Delta | FairleadError]


class EngineBroken(Exception):
    """Step after step failed, whatever was computed."""


class _Choice:
    """One of the n answers to a request."""

    __slots__ = ("delta", "finished", "index", "last_at", "output", "row", "sequence", "trail")

    def __init__(self, index: int, sequence: Sequence, output: OutputStream, row: SampleRow) -> None:
        self.index = index
        self.sequence = sequence
        self.output = output
        self.row = row
        self.delta = Delta(index=index)
        """What was not delivered yet."""
        self.finished = False
        self.last_at: float | None = None
        """When its last token came; None before the first."""
        self.trail = Trail(sequence.arrived, sequence.num_prompt)


class _Generation:
    """One request: its choices, which share the prompt."""

    __slots__ = ("choices", "id", "prompt_logprobs", "stream", "waiting")

    def __init__(self, id: int, *, stream: bool) -> None:
        self.id = id
        self.stream = stream
        self.choices: list[_Choice] = []
        self.waiting: list[_Choice] = []
        """Choices that start when the first has computed the prompt, whose blocks they then find in the prefix cache."""
        self.prompt_logprobs: list[TokenLogprob | None] | None = None

    def usage(self) -> Usage:
        sequences = [choice.sequence for choice in self.choices]
        return Usage(
            prompt_tokens=sequences[0].num_prompt,
            completion_tokens=sum(sequence.num_generated for sequence in sequences),
            cached_tokens=sequences[0].cached_tokens,
            reasoning_tokens=sum(choice.output.num_reasoned for choice in self.choices),
        )


class Engine:
    """Continuous batching over one decoder. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        eos_ids: Iterable[int] = (),
        defaults: dict[str, float] | None = None,
        adapters: Adapters | None = None,
        guides: bool = True,
        forced_tokens: bool = True,
        answers: AnswerFormat | None = None,
        speculation: Speculation | None = None,
        overlap: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`defaults`: of the model's generation_config; `overlap`: the device computes while the host reads the step before; `clock`:
        seconds."""
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.defaults = defaults or {}
        self.adapters = adapters
        """Whose `take` gives what `add` wants of one; None where it takes none."""
        self.speculation = speculation
        self.overlap = overlap
        self.clock = clock
        self.grammars = Grammars(tokenizer, runner.decoder.vocab_size, self.eos_ids, enabled=guides)
        """Whose `compile` gives what `add` wants of a guide."""
        self.answers = answers or AnswerFormat(None, tokenizer)
        """Whose `read` gives what `add` wants of a request that is to be parsed."""
        self.forced_tokens = forced_tokens
        self._generations: dict[int, _Generation] = {}
        self._choices: dict[int, tuple[_Generation, _Choice]] = {}  # by sequence
        self._masked: set[int] = set()  # sequences whose tokens cannot be chosen without the masks of their grammars
        self._next_sequence = 0
        self._flights: deque[Flight] = deque()
        """At most two, the first planned first."""
        self._landed = 0.0
        """When the last one was read."""
        self._suspects: deque[set[Sequence]] = deque()
        """While not empty: groups of sequences of a step that failed, tried one group after another."""
        self._failures = 0
        self._offloaded: Offloaded | None = None
        """While it sleeps: weights of a CUDA device."""
        self._num_prompt_tokens = self._num_generated_tokens = 0
        self._num_steps = self._num_failed_steps = self._num_quarantined = 0
        self._finished: Counter[str] = Counter()
        self._first_token, self._inter_token = Histogram(SECONDS), Histogram(SECONDS)
        self._queue_time, self._step_time = Histogram(SECONDS), Histogram(SECONDS)

    # Requests

    def add(
        self,
        id: int,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        arrived: float | None = None,
        priority: int = 0,
        deadline: float = 0.0,
        salt: str = "",
        stream: bool = True,
        adapter: Use | None = None,
        grammar: Grammar | None = None,
        parsing: Parsing | None = None,
    ) -> None:
        """Queue a request. Its answer comes out of `step` as Deltas under `id`, the last with `usage`, or as one error.

        `arrived`, `deadline`: on the engine's clock; 0 is no deadline. `priority`: smaller goes first.
        Raises InvalidRequest, or QueueFull.
        """
        sampling = self._check(prompt_ids, sampling)
        generation = _Generation(id, stream=stream)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        stop_ids = frozenset(sampling.stop_token_ids)
        for index in range(sampling.n):
            sequence = Sequence(
                self._next_sequence,
                prompt_ids,
                sampling if index == 0 else structs.replace(sampling, prompt_logprobs=None),
                arrived=self.clock() if arrived is None else arrived,
                priority=priority,
                deadline=deadline or float("inf"),
                salt=salt,
                adapter=adapter,
            )
            self._next_sequence += 1
            output = OutputStream(
                self.tokenizer,
                prompt_ids,
                sampling,
                eos_ids=self.eos_ids,
                max_model_len=self.max_model_len,
                parser=None if parsing is None else parsing.parser(),
                shown_ids=frozenset() if parsing is None else parsing.shown_ids,
            )
            matcher = None if grammar is None else grammar.matcher()
            ends = stop_ids | self.eos_ids
            row = SampleRow(sampling, prompt_ids, seed=seed, index=index, stop_ids=ends, matcher=matcher)
            generation.waiting.append(_Choice(index, sequence, output, row))
        self._start_choice(generation, bounded=True)
        for choice in generation.waiting:  # the request has started when they begin to wait
            choice.sequence.deadline = float("inf")
        self._generations[id] = generation

    def _check(self, prompt_ids: list[int], sampling: Sampling) -> Sampling:
        """Raises InvalidRequest. Returns the sampling with nothing left open."""
        vocab_size, num = self.runner.decoder.vocab_size, len(prompt_ids)
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty: it must have at least one token")
        room = self.max_model_len - num
        wanted = None if sampling.fits_context else sampling.max_tokens
        if room < (wanted if wanted is not None else 1):
            asked = "" if wanted is None else f" ({num} in the prompt and {wanted} for the answer)"
            raise ContextExceeded(
                f"this model's maximum context length is {self.max_model_len} tokens, but {num + (wanted or 0)} tokens were requested{asked}: shorten the prompt or ask for fewer"
            )
        if max(prompt_ids) >= vocab_size or min(prompt_ids) < 0:
            raise InvalidRequest(f"the prompt holds token ids outside the vocabulary of {vocab_size}")
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(not 0 <= token_id < vocab_size for token_id in ids):
                raise InvalidRequest(f"`{name}` holds token ids outside the vocabulary of {vocab_size}")
        return sampling.with_defaults(self.defaults)

    def _start_choice(self, generation: _Generation, *, bounded: bool = False) -> None:
        choice = generation.waiting.pop(0)
        self.scheduler.add(choice.sequence, bounded=bounded)
        generation.choices.append(choice)
        self._choices[choice.sequence.id] = (generation, choice)
        if choice.row.guided and not choice.row.takes_likeliest:
            self._masked.add(choice.sequence.id)

    def abort(self, id: int) -> None:
        """Forget a request and free its blocks; nothing more comes out for it."""
        generation = self._generations.pop(id, None)
        if generation is not None:
            for choice in generation.choices:
                if not choice.finished:
                    self._drop(choice)
                    self._finished["abort"] += 1

    def _drop(self, choice: _Choice) -> None:
        self.scheduler.abort(choice.sequence)
        self._gone(choice.sequence)
        self._choices.pop(choice.sequence.id, None)
        self._masked.discard(choice.sequence.id)
        for group in self._suspects:
            group.discard(choice.sequence)

    @property
    def has_work(self) -> bool:
        return bool(self._generations or self._flights)

    @property
    def recovering(self) -> bool:
        """Somebody is still suspected: groups of which all are gone wait for nothing."""
        return any(self._suspects)

    # Sleep

    def sleep(self) -> None:
        """Give back KV memory with all prefixes, the draft model's too, LoRA adapters, and on a CUDA device the memory of the weights,
        which wait on the host. No request may be there."""
        assert not self._generations, "requests run"
        while self._flights:  # of requests that are gone
            self._land([])
        self.scheduler.pool.clear()
        for each in self._runners:
            each.sleep()
        if self.adapters is not None:
            self.adapters.clear()
        if self.runner.decoder.device != "cpu":
            self._offloaded = offload_device()

    def wake(self) -> None:
        """Undo that. Raises RuntimeError where the device has not as much memory left."""
        if self._offloaded is not None:
            self._offloaded.restore()
            self._offloaded = None
        for each in self._runners:
            each.wake()

    @property
    def _runners(self) -> list[Runner | DraftModel]:
        draft = None if self.speculation is None else self.speculation.model
        return [self.runner] if draft is None else [self.runner, draft]

    # Steps

    @ranged("step")
    def step(self) -> list[Answer]:
        """Compute one step and return what it gave. Raises EngineBroken where no step succeeds any more."""
        answers: list[Answer] = []
        if not self._flights:
            self._launch(answers)
        if self._flights and self._may_fly_ahead():
            self._launch(answers)
        if self._flights:
            self._land(answers)
        return answers

    def _may_fly_ahead(self) -> bool:
        speculating = self.speculation is not None
        return (
            self.overlap
            and may_fly_ahead(self._flights, recovering=self.recovering, speculating=speculating)
            and self.scheduler.preempts_nobody()
        )

    def _launch(self, answers: list[Answer]) -> None:
        """Plan a step and give it to the device."""
        now = self.clock()
        while self._suspects and not self._suspects[0]:
            self._suspects.popleft()
        before = self._flights[-1].chosen if self._flights else None
        if self.speculation is not None and not self._flights and not self._suspects:
            self.speculation.propose(self.scheduler, self._row_of)
            self._heed_grammars()
        plan = self.scheduler.plan(now, only=self._suspects[0] if self._suspects else None)
        for sequence in plan.preempted:
            trail, num_tokens = self._choices[sequence.id][1].trail, len(sequence.token_ids)
            trail.turn("preempted", now, step=self._num_steps, num_tokens=num_tokens)
        for sequence in plan.expired:
            self._fail(sequence, TimeoutExpired("Request timeout expired"), answers)
        if not plan.chunks:
            if self._suspects:  # nothing of the group can run now: let everybody
                self._suspects.popleft()
            return
        try:
            with self._guided(plan):
                logits_NV = self.runner.run(plan.chunks, before)
            self._flights.append(self._choose(plan, logits_NV))
        except Exception as error:
            self._isolate(plan, error, answers)

    @ranged("sample")
    def _choose(self, plan: Plan, logits_NV: torch.Tensor) -> Flight:
        """The step's tokens, on their way to the host, or its logits, of which the host will choose."""
        chunks = [chunk for chunk in plan.chunks if chunk.samples]
        flight = Flight(plan, chunks, [self._row_of(chunk.seq) for chunk in chunks])
        if not (self.overlap and chosen_on_device(plan, flight.rows)):
            flight.logits_NV = logits_NV
        else:
            ids_N = self.sampler.choose(logits_NV, flight.rows, [chunk.seq.num_pending - 1 for chunk in chunks])
            flight.chosen = Chosen(ids_N, {chunk.seq.id: place for place, chunk in enumerate(chunks)})
            flight.read = self.runner.fetch(ids_N)
        return flight

    def _land(self, answers: list[Answer]) -> None:
        """Wait for the first step in flight, and go on from what it gave."""
        flight = self._flights.popleft()
        plan, now = flight.plan, flight.plan.now
        try:
            found = self._read(flight)
        except Exception as error:
            while self._flights:  # it computes with what is not there
                self.scheduler.rollback(self._flights.pop().plan)
            self._isolate(plan, error, answers)
            return
        self._failures = 0
        self.scheduler.commit(plan)
        done = self.clock()
        self._num_steps += 1
        self._step_time.observe(done - max(now, self._landed))
        self._landed = done
        for sequence in plan.admitted:
            if sequence.num_preemptions == 0:
                self._queue_time.observe(now - sequence.arrived)
            if sequence.id in self._choices:
                cached = sequence.cached_tokens if sequence.num_preemptions == 0 else 0
                self._choices[sequence.id][1].trail.turn("prefill", now, step=self._num_steps - 1, num_tokens=cached)
        num_seqs = len(plan.chunks)
        speculation = None if plan.only is not None else self.speculation
        for chunk, tokens in found:
            if chunk.num_drafts and speculation is not None:
                speculation.learn(chunk.seq, len(tokens) - 1, chunk.num_drafts)
            if chunk.seq.id in self._choices:  # not gone: ended by the step before, or with its request
                self._advance(chunk.seq, tokens, done, num_seqs, answers)
        if self._suspects and plan.only is not None:  # they have shown that they can compute
            self._suspects[0].difference_update([chunk.seq for chunk in flight.chunks])
        if speculation is not None:
            speculation.end(plan, sum(len(tokens) for _, tokens in found))

    def _row_of(self, sequence: Sequence) -> SampleRow:
        return self._choices[sequence.id][1].row

    def _heed_grammars(self) -> None:
        """What a grammar forbids of a draft is not computed."""
        for seq in self.scheduler.running:
            if seq.draft and (matcher := self._row_of(seq).matcher) is not None:
                seq.draft = matcher.allowed(seq.draft)

    @contextmanager
    def _guided(self, plan: Plan) -> Iterator[None]:
        """What the grammars allow is found while the step computes, for those that the sampler cannot do without."""
        guided: list[tuple[SampleRow, Guided]] = []
        if self._masked or plan.num_drafts:
            for chunk in plan.chunks:
                if chunk.samples and (chunk.num_drafts or chunk.seq.id in self._masked):
                    row = self._row_of(chunk.seq)
                    if row.matcher is not None:
                        guided.append((row, Guided(row.matcher, chunk.seq.draft[: chunk.num_drafts])))
        with self.sampler.masks.alongside([each for _, each in guided]) as masks:
            yield
        for (row, _), (masks_RW, first) in zip(guided, masks, strict=True):
            row.allow(masks_RW, first)

    @ranged("read")
    def _read(self, flight: Flight) -> list[tuple[Chunk, list[Sampled]]]:
        """A token for every chunk that caught up, or several where it has a draft; log-probabilities of prompts on the way."""
        plan, logits_NV, chunks, rows = flight.plan, flight.logits_NV, flight.chunks, flight.rows
        if flight.chosen is not None:
            return [(chunk, [sampled(token_id)]) for chunk, token_id in zip(chunks, flight.read(), strict=True)]
        assert logits_NV is not None
        at: list[int] = []
        place = 0
        for chunk in plan.chunks:
            if wants_prompt_logits(chunk):
                self._note_prompt_logprobs(chunk, logits_NV[place : place + chunk.num_tokens])
                place += chunk.num_tokens
            elif chunk.samples:
                place += 1 + chunk.num_drafts
            if chunk.samples:
                at += range(place - 1 - chunk.num_drafts, place)
        if not chunks:
            return []
        wanted_NV = logits_NV if place == len(at) else logits_NV[at]
        if plan.num_drafts:
            drafts = [chunk.seq.draft[: chunk.num_drafts] for chunk in chunks]
            return list(zip(chunks, self.sampler.verify(wanted_NV, rows, drafts), strict=True))
        return [(chunk, [token]) for chunk, token in zip(chunks, self.sampler.sample(wanted_NV, rows), strict=True)]

    def _note_prompt_logprobs(self, chunk: Chunk, logits_TV: torch.Tensor) -> None:
        sequence = chunk.seq
        if sequence.id not in self._choices:
            return
        generation, _ = self._choices[sequence.id]
        known: list[TokenLogprob | None] = generation.prompt_logprobs or [None]
        # after a preemption the prompt is computed again; the last row of the prompt predicts what is generated
        first, end = max(chunk.start, len(known) - 1), min(chunk.start + chunk.num_tokens, sequence.num_prompt - 1)
        if first < end:
            ids = sequence.token_ids[first + 1 : end + 1]
            count = sequence.sampling.prompt_logprobs or 0
            wanted_PV = logits_TV[first - chunk.start : end - chunk.start]
            known += [self._spelled(each) for each in self.sampler.prompt_logprobs(wanted_PV, ids, count)]
        generation.prompt_logprobs = known

    def _advance(self, sequence: Sequence, tokens: list[Sampled], now: float, num_seqs: int, answers: list[Answer]) -> None:
        """New tokens of one sequence: their text, its end, and what of it is delivered. `num_seqs`: that shared the step."""
        generation, choice = self._choices[sequence.id]
        matcher = choice.row.matcher
        if unmatched := matcher.error if matcher is not None else "":
            self._fail(sequence, InvalidRequest(unmatched), answers)
            return
        if error := tokens[0].error:
            self._num_quarantined += 1
            self._fail(sequence, ModelError(error), answers)
            return
        delta, trail = choice.delta, choice.trail
        trail.max_seqs = max(trail.max_seqs, num_seqs)
        last_at, num_before = choice.last_at, len(sequence.token_ids)
        if last_at is not None:
            seconds = now - last_at
            if trail.name != "decode":
                trail.turn("decode", now, step=self._num_steps, num_tokens=len(sequence.token_ids))
            elif seconds > trail.slowest:
                trail.slowest = seconds
        else:
            trail.turn("decode", now, step=self._num_steps, num_tokens=sequence.num_prompt)
            self._first_token.observe(now - sequence.arrived)
            if choice.index == 0:
                self._num_prompt_tokens += sequence.num_prompt
                delta.prompt_logprobs = generation.prompt_logprobs
        choice.last_at = now
        if sequence.sampling.max_tokens == 0:
            delta.finish_reason = "length"
        else:
            num_pushed = 0
            for sampled in tokens:
                self._push(choice, sampled)
                num_pushed += 1
                if delta.finish_reason:
                    break
            if len(tokens) > 1:  # all but the last are the draft's
                self.scheduler.accept(sequence, min(num_pushed, len(tokens) - 1))
            if matcher is not None and not delta.finish_reason:
                self._push_forced(choice, matcher)
        if last_at is not None:
            num_new = len(sequence.token_ids) - num_before
            for _ in range(num_new):
                self._inter_token.observe((now - last_at) / num_new)
        while generation.waiting:
            self._start_choice(generation)
        if delta.finish_reason:
            self._finish(generation, choice)
            trail.turn("", now, step=self._num_steps, num_tokens=len(sequence.token_ids))
        told = delta.text or delta.reasoning or delta.tool_calls or delta.logprobs or delta.prompt_logprobs
        if delta.finish_reason or (generation.stream and told):
            choice.delta = Delta(index=choice.index)
            answers.append((generation.id, delta))
            if all(other.finished for other in generation.choices):
                delta.usage = generation.usage()
                delta.phases = merged([other.trail for other in generation.choices])
                del self._generations[generation.id]

    def _gone(self, sequence: Sequence) -> None:
        sequence.adapter = None  # for others to take its room
        if self.speculation is not None:
            self.speculation.forget(sequence)

    def _push(self, choice: _Choice, sampled: Sampled) -> None:
        """One token more, in what is to be delivered next."""
        delta, token_id = choice.delta, sampled.token_id
        choice.sequence.token_ids.append(token_id)
        self._num_generated_tokens += 1
        choice.row.push(token_id)
        pushed = choice.output.push(token_id)
        delta.token_ids.append(token_id)
        delta.text += pushed.text
        delta.reasoning += pushed.reasoning
        if pushed.calls:
            add_calls(delta.tool_calls, pushed.calls)
        delta.finish_reason, delta.stop_reason = pushed.finish_reason, pushed.stop_reason
        if choice.sequence.sampling.logprobs is not None:
            delta.logprobs = delta.logprobs or []
            delta.logprobs.append(self._spelled(sampled))

    def _push_forced(self, choice: _Choice, matcher: Matcher) -> None:
        """What the grammar leaves no choice about is chosen: the next step computes it together with the token before it."""
        sequence = choice.sequence
        forced = matcher.follow(sequence.token_ids, sequence.num_prompt)
        room = MAX_FORCED if forced and self.forced_tokens and sequence.sampling.logprobs is None else 0
        while forced and room:
            for token_id in forced[:room]:
                self._push(choice, Sampled(token_id))
                if choice.delta.finish_reason:
                    return
            room -= len(forced[:room])
            forced = matcher.follow(sequence.token_ids, sequence.num_prompt)

    def _finish(self, generation: _Generation, choice: _Choice) -> None:
        choice.finished = True
        self.scheduler.finish(choice.sequence)
        self._gone(choice.sequence)
        del self._choices[choice.sequence.id]
        self._masked.discard(choice.sequence.id)
        for group in self._suspects:
            group.discard(choice.sequence)
        self._finished[choice.delta.finish_reason] += 1

    def _spelled(self, sampled: Sampled) -> TokenLogprob:
        def spelled(token_id: int, logprob: float, rank: int, top: list[TokenLogprob]) -> TokenLogprob:
            return TokenLogprob(token_id, self.tokenizer.token_text(token_id), self.tokenizer.token_bytes(token_id), logprob, rank, top)

        top = [spelled(token_id, logprob, rank, []) for rank, (token_id, logprob) in enumerate(sampled.top, 1)]
        return spelled(sampled.token_id, sampled.logprob, sampled.rank, top)

    # Failure

    def _isolate(self, plan: Plan, error: Exception, answers: list[Answer]) -> None:
        """A step failed. Its sequences are tried again in halves until the one that cannot be computed stands alone."""
        self._num_failed_steps += 1
        self._failures += 1
        group = {chunk.seq for chunk in plan.chunks if chunk.seq.id in self._choices}
        log.error("step failed", sequences=len(plan.chunks), tokens=sum(chunk.num_tokens for chunk in plan.chunks), exc_info=error)
        self.scheduler.rollback(plan)
        if self.speculation is not None:
            for chunk in plan.chunks:
                if chunk.num_drafts:
                    self.speculation.give_up(chunk.seq)
        if self._suspects:
            self._suspects[0] -= group
        if self._failures >= MAX_FAILURES:
            raise EngineBroken(f"{self._failures} steps failed one after another, the last with {type(error).__name__}: {error}") from error
        if len(plan.chunks) == len(group) == 1:
            self._num_quarantined += 1
            message = f"the model failed on this request: {type(error).__name__}: {error}"
            self._fail(group.pop(), ModelError(message), answers)
            return
        ordered = sorted(group, key=lambda sequence: sequence.id)
        half = len(ordered) // 2
        self._suspects.extendleft([set(ordered[half:]), set(ordered[:half])])

    def _fail(self, sequence: Sequence, error: FairleadError, answers: list[Answer]) -> None:
        """End a whole request with an error."""
        generation, _ = self._choices[sequence.id]
        for choice in generation.choices:
            if not choice.finished:
                self._drop(choice)
                self._finished["error"] += 1
        self._generations.pop(generation.id, None)
        answers.append((generation.id, error))

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_prefix_queried_tokens=scheduler.num_prefix_queried_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_drafted_tokens=0 if self.speculation is None else self.speculation.num_drafted,
            num_accepted_tokens=0 if self.speculation is None else self.speculation.num_accepted,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            num_quarantined=self._num_quarantined,
            finished=dict(self._finished),
            time_to_first_token=_buckets(self._first_token),
            inter_token=_buckets(self._inter_token),
            queue_time=_buckets(self._queue_time),
            step_time=_buckets(self._step_time),
            recovering=self.recovering,
            num_grammars=self.grammars.num_misses,
            num_grammar_hits=self.grammars.num_hits,
            grammar_seconds=self.grammars.compile_seconds,
            num_adapters=0 if self.adapters is None else self.adapters.num_loaded,
            adapter_bytes=0 if self.adapters is None else self.adapters.nbytes,
            num_adapter_loads=0 if self.adapters is None else self.adapters.num_loads,
            num_adapter_evictions=0 if self.adapters is None else self.adapters.num_evictions,
        )


def _buckets(histogram: Histogram) -> tuple[list[int], float]:
    return list(histogram.counts), histogram.sum
