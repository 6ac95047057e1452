"""The engine step by step: the same tokens as `transformers.generate` whatever the schedule, and no fault that spreads."""

import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from fairlead.core.errors import ContextExceeded, FairleadError, InvalidRequest, ModelError, QueueFull, TimeoutExpired
from fairlead.core.generation import Delta, Phase, Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine, EngineBroken
from fairlead.llm.phases import MAX_PHASES, Trail
from tests.llm.tiny import EOS_ID, edit_json, tiny_checkpoint, tiny_model

GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
NUM_NEW = 8
SMALL = {"kernels": "torch", "dtype": "float32", "max_model_len": 96, "block_size": 16, "max_num_seqs": 4, "max_batch_tokens": 24}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture
def build(checkpoint: Path) -> Callable[..., Engine]:
    torch.set_num_threads(1)

    def make(num_blocks: int = 24, clock: Clock | None = None, folder: Path = checkpoint, **changes: Any) -> Engine:
        spec = LlmSpec(**{**SMALL, "kv_cache_bytes": num_blocks * BLOCK_BYTES, **changes})
        return build_generator(folder, spec, clock=clock or Clock())[0]

    return make


BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4
"""16 tokens, 2 layers, K and V, 2 heads of 16 float32."""


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(5, 500) for _ in range(length)] for length in lengths]


@cache
def expected(model_type: str, ids: tuple[int, ...], num_new: int = NUM_NEW) -> list[int]:
    """What transformers generates for one prompt alone."""
    with torch.inference_mode():
        model = model_of(model_type)
        mask = torch.ones(1, len(ids), dtype=torch.int64)
        out = model.generate(
            torch.tensor([ids]), attention_mask=mask, max_new_tokens=num_new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]


@cache
def model_of(model_type: str) -> Any:
    return tiny_model(model_type)


class Answers:
    """Everything that came out of an engine, by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.deltas: dict[int, list[Delta]] = {}
        self.errors: dict[int, FairleadError] = {}

    def step(self) -> None:
        for id, answer in self.engine.step():
            assert id not in self.errors
            if isinstance(answer, FairleadError):
                self.errors[id] = answer
            else:
                self.deltas.setdefault(id, []).append(answer)
        self.engine.scheduler.check_integrity()

    def finish(self) -> "Answers":
        for _ in range(2000):
            if not self.engine.has_work:
                assert self.engine.scheduler.pool.num_free == self.engine.scheduler.pool.num_blocks
                return self
            self.step()
        raise AssertionError("the engine does not come to an end")

    def ids(self, id: int, index: int = 0) -> list[int]:
        return [token for delta in self.deltas[id] if delta.index == index for token in delta.token_ids]

    def text(self, id: int, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas[id] if delta.index == index)


# Parity


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("decoder", ["lean", "graph"])
def test_each_feature_on_and_off_gives_the_tokens_of_generate(build, decoder, kernels, prefix_caching):
    prompts = prompts_of(3, 40, 17, 61, 1)
    shared = [prompts[1][:32] + ids for ids in prompts_of(5, 9, seed=1)]
    engine = build(decoder=decoder, kernels=kernels, prefix_caching=prefix_caching)
    answers = Answers(engine)
    for id, ids in enumerate([*prompts, *shared]):
        engine.add(id, ids, GREEDY)
    answers.finish()
    for id, ids in enumerate([*prompts, *shared]):
        assert answers.ids(id) == expected("llama", tuple(ids))
    assert (engine.stats().num_prefix_hit_tokens > 0) == prefix_caching


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe"])
def test_no_schedule_changes_a_token(build, tmp_path_factory, model_type, seed):
    # Given a pool that holds little more than one sequence, and requests that come, share prefixes and leave at random
    numbers = random.Random(seed)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("c"), model_type) if model_type != "llama" else None
    engine = build(num_blocks=7, max_batch_tokens=numbers.choice([7, 16, 50]), **({"folder": folder} if folder else {}))
    answers = Answers(engine)
    heads = prompts_of(16, 32, seed=seed)
    left: set[int] = set()
    prompts: dict[int, list[int]] = {}
    for id in range(12):
        prompts[id] = [*numbers.choice([[], *heads]), *prompts_of(numbers.randrange(1, 40), seed=100 * seed + id)[0]]
        engine.add(id, prompts[id], GREEDY, priority=numbers.randrange(2))
        for _ in range(numbers.randrange(4)):
            if engine.has_work:
                answers.step()
        if numbers.random() < 0.25 and (live := [other for other in prompts if other in engine._generations]):
            left.add(gone := numbers.choice(live))
            engine.abort(gone)
    answers.finish()
    # Then whoever stayed has the tokens that it would have had alone
    for id in prompts.keys() - left:
        assert answers.ids(id) == expected(model_type, tuple(prompts[id])), id
    assert not answers.errors


def test_a_tiny_pool_preempts_and_loses_nothing(build):
    engine = build(num_blocks=6)
    answers = Answers(engine)
    prompts = prompts_of(10, 10, 10, 10)
    for id, ids in enumerate(prompts):
        engine.add(id, ids, Sampling(temperature=0.0, max_tokens=50, ignore_eos=True))
    answers.finish()
    assert engine.stats().num_preemptions > 0
    for id, ids in enumerate(prompts):
        assert answers.ids(id) == expected("llama", tuple(ids), 50)


def test_log_likelihoods_are_the_models_own(build):
    ids = prompts_of(50)[0]
    with torch.inference_mode():
        logprobs = model_of("llama")(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    engine = build()
    engine.add(1, ids, Sampling(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=3, prompt_logprobs=2))
    delta = merge(Answers(engine).finish().deltas[1])
    assert delta.prompt_logprobs is not None and delta.prompt_logprobs[0] is None and len(delta.prompt_logprobs) == 50
    for at, told in enumerate(delta.prompt_logprobs[1:]):
        assert told is not None and told.token_id == ids[at + 1]
        assert told.logprob == pytest.approx(float(logprobs[at, ids[at + 1]]), abs=1e-3)
        best = logprobs[at].topk(2)
        assert [each.token_id for each in told.top] == best.indices.tolist()
    assert delta.logprobs is not None and [each.token_id for each in delta.logprobs] == delta.token_ids
    assert delta.logprobs[0].logprob == pytest.approx(float(logprobs[-1].max()), abs=1e-3)
    assert delta.logprobs[0].rank == 1 and len(delta.logprobs[0].top) == 3


def merge(deltas: list[Delta]) -> Delta:
    whole = Delta()
    for delta in deltas:
        whole.token_ids += delta.token_ids
        whole.text += delta.text
        whole.logprobs = [*(whole.logprobs or []), *(delta.logprobs or [])]
        whole.prompt_logprobs = delta.prompt_logprobs or whole.prompt_logprobs
    return whole


# Choices and ends


def test_n_choices_share_the_prompt_and_are_told_apart(build):
    engine = build()
    prompt = prompts_of(33)[0]
    engine.add(1, prompt, Sampling(temperature=1.5, seed=5, n=5, max_tokens=6, ignore_eos=True))
    answers = Answers(engine).finish()
    choices = [answers.ids(1, index) for index in range(5)]
    assert all(len(ids) == 6 for ids in choices) and len({tuple(ids) for ids in choices}) > 1
    last = answers.deltas[1][-1]
    assert last.usage is not None and (last.usage.prompt_tokens, last.usage.completion_tokens) == (33, 30)
    assert sum(delta.usage is not None for delta in answers.deltas[1]) == 1
    assert engine.stats().num_prefix_hit_tokens == 4 * 32


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(build):
    seeded = Sampling(temperature=1.2, top_p=0.9, seed=11, max_tokens=10, ignore_eos=True)
    prompt, *others = prompts_of(20, 5, 30)
    engine = build()
    engine.add(1, prompt, seeded)
    alone = Answers(engine).finish().ids(1)
    for id, ids in enumerate(others, 2):
        engine.add(id, ids, Sampling(temperature=1.0, max_tokens=12, ignore_eos=True))
    engine.add(1, prompt, seeded)
    assert Answers(engine).finish().ids(1) == alone


def test_each_way_to_end(build):
    prompt = tuple(prompts_of(12)[0])
    tokens = expected("llama", prompt)
    engine = build()
    text = engine.tokenizer.decode(tokens, skip_special_tokens=True)

    def ask(**changes: Any) -> Delta:
        engine.add(1, list(prompt), Sampling(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **changes}), stream=False)
        [delta] = Answers(engine).finish().deltas[1]
        return delta

    whole = ask()
    assert (whole.token_ids, whole.finish_reason, whole.text) == (tokens, "length", text)
    third = ask(stop_token_ids=(tokens[2],))
    assert (third.finish_reason, third.stop_reason) == ("stop", tokens[2]) and third.token_ids == tokens[: tokens.index(tokens[2]) + 1]
    stop = text[len(text) // 2 :][:2]
    cut = ask(stop=(stop,))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[: text.index(stop)], "stop", stop)
    none = ask(max_tokens=0, prompt_logprobs=0)
    assert (none.token_ids, none.finish_reason) == ([], "length") and len(none.prompt_logprobs or []) == 12
    engine.eos_ids = frozenset([tokens[3]])
    ended = ask(ignore_eos=False)
    assert (ended.finish_reason, ended.stop_reason, ended.token_ids) == ("stop", None, tokens[: tokens.index(tokens[3]) + 1])
    longer = ask(ignore_eos=False, min_tokens=6)
    assert len(longer.token_ids) >= 6 and tokens[3] not in longer.token_ids[:5]


@pytest.mark.parametrize(
    ("config", "ends"), [([4, EOS_ID], {4, EOS_ID}), (None, {EOS_ID}), (4, {4, EOS_ID}), (-1, {EOS_ID}), (999, {EOS_ID})]
)
def test_the_ends_are_those_of_the_config_and_the_tokenizers(build, tmp_path, config, ends):
    folder = tiny_checkpoint(tmp_path)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=config)
    assert build(folder=folder).eos_ids == ends


def test_an_answer_that_is_not_streamed_comes_in_one_piece(build):
    engine = build()
    engine.add(1, prompts_of(5)[0], GREEDY, stream=False)
    engine.add(2, prompts_of(5)[0], GREEDY, stream=True)
    answers = Answers(engine).finish()
    assert len(answers.deltas[1]) == 1 and len(answers.deltas[2]) > 1
    assert answers.text(1) == answers.text(2)


# Refusals


@pytest.mark.parametrize(
    ("ids", "sampling", "error", "said"),
    [
        ([], GREEDY, InvalidRequest, "empty"),
        ([5, 512], GREEDY, InvalidRequest, "vocabulary"),
        ([5] * 96, GREEDY, ContextExceeded, "96 tokens, but 104"),
        ([5] * 96, Sampling(), ContextExceeded, "maximum context length is 96"),
        ([5], Sampling(max_tokens=100), ContextExceeded, "1 in the prompt and 100 for the answer"),
        ([5], Sampling(logit_bias={900: 1.0}), InvalidRequest, "logit_bias"),
        ([5], Sampling(stop_token_ids=(900,)), InvalidRequest, "stop_token_ids"),
    ],
)
def test_what_cannot_be_computed_is_refused_at_the_door(build, ids, sampling, error, said):
    engine = build()
    with pytest.raises(error, match=said):
        engine.add(1, ids, sampling)
    assert not engine.has_work


def test_the_waiting_line_is_bounded_and_a_thousand_get_through(build):
    engine = build(num_blocks=48, max_num_seqs=64, max_batch_tokens=512, max_waiting=1000)
    short = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
    prompts = prompts_of(*[2] * 1000)
    for id, ids in enumerate(prompts):
        engine.add(id, ids, short)
    with pytest.raises(QueueFull):
        engine.add(1000, [5], short)
    answers = Answers(engine).finish()
    assert len(answers.deltas) == 1000
    assert all(answers.ids(id) == expected("llama", tuple(prompts[id]), 1) for id in range(0, 1000, 50))


def test_choices_beyond_the_bound_of_the_line_still_come(build):
    engine = build(max_waiting=4)
    engine.add(1, prompts_of(20)[0], Sampling(n=8, temperature=1.0, max_tokens=3, ignore_eos=True))
    answers = Answers(engine).finish()
    assert {delta.index for delta in answers.deltas[1]} == set(range(8))


def test_a_request_that_waits_past_its_deadline_is_given_up(build):
    clock = Clock()
    engine = build(num_blocks=6, clock=clock)
    answers = Answers(engine)
    engine.add(1, prompts_of(80)[0], Sampling(temperature=0.0, max_tokens=16, ignore_eos=True))
    engine.add(2, prompts_of(80)[0], GREEDY, deadline=5.0)
    answers.step()
    clock.now = 6.0
    answers.finish()
    assert isinstance(answers.errors[2], TimeoutExpired) and len(answers.ids(1)) == 16


def test_a_request_that_has_started_is_not_given_up_because_its_choices_wait(build):
    # Given a full engine, and a request whose other choices find no row before its deadline
    clock = Clock()
    engine = build(num_blocks=12, clock=clock, max_num_seqs=2)
    answers = Answers(engine)
    engine.add(1, prompts_of(20)[0], Sampling(n=4, temperature=0.0, max_tokens=8, ignore_eos=True), deadline=5.0)
    answers.step()
    answers.step()
    assert engine.stats().num_waiting > 1
    # When the deadline passes
    clock.now = 6.0
    answers.finish()
    # Then all of them come
    assert not answers.errors and all(len(answers.ids(1, index)) == 8 for index in range(4))


# Failure


CURSED = 4
"""A token that no prompt here has and no answer either."""


class Cursed:
    """A decoder that cannot compute one token: a fault of the model's, not of the engine's."""

    def __init__(self, engine: Engine, token: int, fault: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self.inner, self.token, self.fault = engine.runner.decoder, token, fault
        engine.runner.decoder = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, batch: Any, cache: Any) -> torch.Tensor:
        logits = self.inner(batch, cache)
        self.fault(logits, batch.input_ids_T == self.token)
        return logits


def fall_over(logits: torch.Tensor, cursed_T: torch.Tensor) -> None:
    if cursed_T.any():
        raise RuntimeError("the kernel fell over")


@pytest.mark.parametrize("place", [0, 3, 20, 39])
def test_a_request_that_fails_its_step_is_found_and_the_others_go_on(build, place):
    engine = build(num_blocks=30, max_num_seqs=8, max_batch_tokens=64)
    Cursed(engine, CURSED, fall_over)
    prompts = prompts_of(10, 40, 7, 25, 12, 3)
    prompts[1][place] = CURSED
    answers = Answers(engine)
    for id, ids in enumerate(prompts[:3]):
        engine.add(id, ids, GREEDY)
    answers.step()
    for id, ids in enumerate(prompts[3:], 3):
        engine.add(id, ids, GREEDY)
    answers.finish()
    assert set(answers.errors) == {1}
    assert isinstance(answers.errors[1], ModelError) and "the kernel fell over" in answers.errors[1].message
    for id in (0, 2, 3, 4, 5):
        assert answers.ids(id) == expected("llama", tuple(prompts[id]))
    stats = engine.stats()
    assert stats.num_quarantined == 1 and stats.num_failed_steps > 0 and not stats.recovering


def test_an_engine_whose_suspects_have_all_left_has_recovered(build):
    engine = build()
    Cursed(engine, CURSED, fall_over)
    for id, ids in enumerate(([5, CURSED], [6, 7], [8, 9])):
        engine.add(id, ids, GREEDY)
    answers = Answers(engine)
    answers.step()
    assert engine.stats().recovering and len(engine._suspects) == 2
    # When those leave who were not tried, and the one that fails is found
    engine.abort(1)
    engine.abort(2)
    answers.finish()
    # Then an idle engine is as ready as any, though no step has come after it
    assert set(answers.errors) == {0} and not engine.stats().recovering


def test_logits_that_are_no_numbers_end_one_request_alone(build):
    engine = build(max_batch_tokens=96)

    def spoil(logits: torch.Tensor, cursed_T: torch.Tensor) -> None:
        if cursed_T.any():
            logits[1] = torch.nan

    Cursed(engine, CURSED, spoil)
    prompts = prompts_of(10, 20, 7)
    prompts[1][5] = CURSED
    answers = Answers(engine)
    for id, ids in enumerate(prompts):
        engine.add(id, ids, GREEDY)
    answers.finish()
    assert set(answers.errors) == {1}
    assert answers.ids(0) == expected("llama", tuple(prompts[0])) and answers.ids(2) == expected("llama", tuple(prompts[2]))
    assert engine.stats().num_failed_steps == 0


def test_a_choice_without_a_token_ends_its_whole_request(build):
    engine = build()
    answers = Answers(engine)
    engine.add(1, prompts_of(10)[0], Sampling(n=4, temperature=1.0, max_tokens=6, ignore_eos=True, prompt_logprobs=0))
    answers.step()
    assert len(answers.deltas[1][0].prompt_logprobs or []) == 10

    def spoil(logits: torch.Tensor, cursed_T: torch.Tensor) -> None:
        logits[1] = torch.nan

    Cursed(engine, 0, spoil)
    answers.finish()
    assert isinstance(answers.errors[1], ModelError) and sum(bool(delta.prompt_logprobs) for delta in answers.deltas[1]) == 1


def test_an_engine_whose_every_step_fails_gives_itself_up(build):
    engine = build()

    def always(logits: torch.Tensor, cursed_T: torch.Tensor) -> None:
        raise RuntimeError("the device is gone")

    Cursed(engine, 0, always)
    for id in range(40):
        engine.add(id, [5, 6, 7], GREEDY)
    answers = Answers(engine)
    with pytest.raises(EngineBroken, match="the device is gone"):
        answers.finish()


def test_abort_frees_the_blocks_at_once(build):
    engine = build()
    engine.add(1, prompts_of(40)[0], GREEDY)
    engine.add(2, prompts_of(40)[0], Sampling(n=3, temperature=1.0, max_tokens=5))
    answers = Answers(engine)
    answers.step()
    engine.abort(1)
    engine.abort(2)
    engine.abort(3)
    assert not engine.has_work and engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert engine.stats().finished["abort"] >= 2


# What it tells of its time


class Ticking(Clock):
    """Each look at it is a second later."""

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def phases_of(answers: Answers, id: int) -> list[Phase]:
    *before, last = answers.deltas[id]
    assert not any(delta.phases for delta in before)
    for phase, then in pairwise(last.phases):
        assert phase.start + phase.seconds == pytest.approx(then.start), "no moment is of no phase"
    return last.phases


def test_the_last_piece_tells_what_the_engine_did_for_a_request(build):
    engine = build(clock=Ticking())
    answers = Answers(engine)
    (prompt,) = prompts_of(40)
    engine.add(1, prompt, GREEDY, arrived=0.0)
    waiting, prefill, decode = phases_of(answers.finish(), 1)
    assert [phase.name for phase in (waiting, prefill, decode)] == ["waiting", "prefill", "decode"]
    assert waiting.start == 0.0 and waiting.seconds > 0
    assert (prefill.num_steps, prefill.num_tokens) == (2, 40), "24 tokens fit a step"
    assert (decode.num_steps, decode.num_tokens, decode.max_seqs) == (NUM_NEW - 1, NUM_NEW, 1)
    assert decode.slowest == pytest.approx(2.0)


def test_those_that_share_steps_say_with_how_many(build):
    engine = build(clock=Ticking())
    for id, prompt in enumerate(prompts_of(5, 5, 5)):
        engine.add(id, prompt, GREEDY)
    answers = Answers(engine).finish()
    assert [phases_of(answers, id)[-1].max_seqs for id in range(3)] == [3, 3, 3]


def test_one_that_is_put_aside_says_for_how_long(build):
    engine = build(num_blocks=8, clock=Ticking(), max_num_seqs=3)
    answers = Answers(engine)
    for id, prompt in enumerate(prompts_of(28, 28, 28)):
        engine.add(id, prompt, structs.replace(GREEDY, max_tokens=40))
    answers.finish()
    assert engine.stats().num_preemptions > 0
    told = {id: phases_of(answers, id) for id in range(3)}
    set_aside = [phase for phases in told.values() for phase in phases if phase.name == "preempted"]
    assert len(set_aside) == engine.stats().num_preemptions and all(phase.seconds > 0 for phase in set_aside)
    for phases in told.values():
        assert sum(phase.num_tokens for phase in phases if phase.name == "decode") == 40
        names = [phase.name for phase in phases]
        assert all(names[at + 1] == "prefill" for at, name in enumerate(names) if name == "preempted"), "it computes again what it knows"


def test_of_several_choices_the_first_tells_of_the_prompt_and_the_last_of_the_end(build):
    engine = build(clock=Ticking())
    (prompt,) = prompts_of(20)
    engine.add(1, prompt, structs.replace(GREEDY, n=3))
    phases = phases_of(Answers(engine).finish(), 1)
    assert [phase.name for phase in phases][:2] == ["waiting", "prefill"]
    assert phases[1].num_tokens == 20
    assert sum(phase.num_tokens for phase in phases if phase.name == "decode") == 3 * NUM_NEW


def test_a_trail_of_endless_preemptions_stays_short_and_adds_up():
    trail = Trail(0.0, 5)
    for at in range(1, 1001):
        trail.turn(("prefill", "decode", "preempted")[at % 3], float(at), step=at, num_tokens=5)
    trail.turn("", 1001.0, step=1001, num_tokens=5)
    assert len(trail.phases) == MAX_PHASES
    assert sum(phase.seconds for phase in trail.phases) == 1001.0
