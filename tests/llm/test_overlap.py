"""The next step is planned and given to the device while it computes one: the same tokens, the same counts, and no fault that spreads.

The device of these stories computes as late as it can, when somebody waits for it, or somewhat earlier.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from fairlead.core.errors import LoadError, ModelError, TimeoutExpired
from fairlead.core.generation import Guide, Sampling
from fairlead.core.specs import LlmSpec, SpeculationSpec
from fairlead.llm.build import build_embedder, build_generator, overlaps
from fairlead.llm.engine import Engine, EngineBroken
from fairlead.llm.runner import Chosen
from fairlead.llm.sampler import SampleRow
from fairlead.llm.scheduler import Chunk, Plan
from fairlead.llm.sequence import Sequence
from fairlead.llm.steps import Flight, chosen_on_device, may_fly_ahead
from tests.llm.adapters import tiny_adapter
from tests.llm.late import LateDevice, late
from tests.llm.test_engine import BLOCK_BYTES, CURSED, Answers, Clock, Cursed, Ticking, fall_over, prompts_of
from tests.llm.tiny import EOS_ID, tiny_checkpoint

SMALL = {"kernels": "torch", "dtype": "float32", "max_model_len": 96, "block_size": 16, "max_num_seqs": 4, "max_batch_tokens": 24}
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0, max_tokens=30, ignore_eos=True),
    "hot": Sampling(temperature=1.5, seed=6, top_p=0.9, top_k=40, min_p=0.01, max_tokens=70, ignore_eos=True),
    "sampled": Sampling(temperature=0.7, seed=5, max_tokens=30, ignore_eos=True),
    "choices": Sampling(temperature=0.9, seed=10, n=3, max_tokens=20, ignore_eos=True),
    "an end that may come": Sampling(temperature=1.9, seed=11, min_tokens=4, max_tokens=50),
    "one token": Sampling(temperature=0.0, max_tokens=1),
    "no token": Sampling(temperature=0.0, max_tokens=0),
    "to the end of the context": Sampling(temperature=0.0, ignore_eos=True),
}
NEEDS_HOST = {
    "penalties": Sampling(temperature=0.5, seed=8, repetition_penalty=1.1, frequency_penalty=0.2, max_tokens=14, ignore_eos=True),
    "bias": Sampling(temperature=0.0, logit_bias={7: 3.0, 100: -100.0}, max_tokens=14, ignore_eos=True),
    "logprobs": Sampling(temperature=0.8, seed=9, logprobs=3, max_tokens=14, ignore_eos=True),
    "prompt_logprobs": Sampling(temperature=0.0, prompt_logprobs=1, max_tokens=12, ignore_eos=True),
    "min_tokens": Sampling(temperature=1.0, seed=12, logit_bias={EOS_ID: 6.0}, min_tokens=4, max_tokens=14),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama")


Build = Callable[..., Engine]


@pytest.fixture
def build(checkpoint: Path) -> Build:
    def make(overlap: str = "on", num_blocks: int = 36, clock: Clock | None = None, folder: Path = checkpoint, **changes: Any) -> Engine:
        spec = LlmSpec(**{**SMALL, "kv_cache_bytes": num_blocks * BLOCK_BYTES, "overlap": overlap, **changes})
        return build_generator(folder, spec, clock=clock or Clock())[0]

    return make


def told(answers: Answers) -> dict[tuple[int, int], dict[str, Any]]:
    """By request and choice, all that its caller sees, but for how it was cut into pieces."""
    whole: dict[tuple[int, int], dict[str, Any]] = {}
    for id, deltas in answers.deltas.items():
        for delta in deltas:
            one = whole.setdefault((id, delta.index), {"ids": [], "text": "", "end": None, "usage": None, "logprobs": [], "prompt": 0})
            one["ids"] += delta.token_ids
            one["text"] += delta.text
            one["logprobs"] += [(each.token_id, each.rank, round(each.logprob, 3)) for each in delta.logprobs or ()]
            one["prompt"] += len(delta.prompt_logprobs or ())
            if delta.finish_reason:
                one["end"] = (delta.finish_reason, delta.stop_reason)
            if delta.usage is not None:  # of all choices, with the last of them
                whole[id, 0]["usage"] = (delta.usage.prompt_tokens, delta.usage.completion_tokens)
    return whole


def ask(engine: Engine, samplings: dict[str, Sampling], *, stream: bool = True) -> Answers:
    answers = Answers(engine)
    for id, (sampling, ids) in enumerate(zip(samplings.values(), prompts_of(*[25, 9, 40] * 5), strict=False)):
        engine.add(id, ids, sampling, stream=stream)
        if id % 3 == 2:
            answers.step()
    return answers.finish()


# Parity


@pytest.mark.parametrize("device", ["cpu", "late", "captured"])
@pytest.mark.parametrize("stream", [True, False])
def test_whatever_is_asked_the_answer_is_that_of_one_step_after_another(build, device, stream):
    asked = {**SAMPLINGS, **NEEDS_HOST}
    engine = build()
    if device != "cpu":
        late(engine, captures=device == "captured")
    answers = ask(engine, asked, stream=stream)
    assert not answers.errors
    assert told(answers) == told(ask(build("off"), asked, stream=stream))


@pytest.mark.parametrize("device", ["late", "captured"])
@pytest.mark.parametrize("num_blocks", [6, 8, 40])
@pytest.mark.parametrize("seed", range(4))
def test_no_schedule_changes_a_token(build, device, num_blocks, seed):
    # Given requests that come, share prefixes and leave at random, of which some must make room for others
    def run(overlap: str, num_blocks: int) -> tuple[Answers, set[int], LateDevice | None]:
        numbers = random.Random(seed)
        engine = build(overlap, num_blocks=num_blocks, max_batch_tokens=numbers.choice([9, 16, 50]))
        lagging = late(engine, captures=device == "captured", numbers=random.Random(seed)) if overlap == "on" else None
        answers, left = Answers(engine), set()
        heads = prompts_of(16, 32, seed=seed)
        for id in range(14):
            ids = [*numbers.choice([[], *heads]), *prompts_of(numbers.randrange(1, 30), seed=100 * seed + id)[0]]
            sampling = Sampling(
                temperature=numbers.choice([0.0, 0.8]),
                seed=id,
                max_tokens=numbers.choice([3, 20]),
                ignore_eos=True,
                presence_penalty=numbers.choice([0.0, 0.0, 0.0, 0.5]),
                stop_token_ids=tuple(numbers.sample(range(5, 500), numbers.choice([0, 16]))),
            )
            engine.add(id, ids, sampling, priority=numbers.choice([0, 0, 0, 1]))
            for _ in range(numbers.randrange(6)):
                if engine.has_work:
                    answers.step()
            if numbers.random() < 0.2:
                left.add(gone := numbers.randrange(id + 1))
                engine.abort(gone)
        return answers.finish(), left, lagging

    expected, left, _ = run("off", 40)
    answers, _, lagging = run("on", num_blocks)
    assert lagging is not None and lagging.num_ahead > 0
    one, other = told(expected), told(answers)
    for id in set(range(14)) - left:
        assert other[id, 0] == one[id, 0], id
    assert not answers.errors


def test_stop_strings_and_ends_are_seen_though_a_token_too_many_was_computed(build):
    # Given an answer that is known, and what is to end it at each of its places
    (prompt,) = prompts_of(20)
    engine = build("off")
    engine.add(0, prompt, Sampling(temperature=0.0, max_tokens=24, ignore_eos=True))
    whole = told(Answers(engine).finish())[0, 0]
    samplings = [Sampling(temperature=0.0, max_tokens=30, ignore_eos=True, stop_token_ids=(token_id,)) for token_id in whole["ids"][:12]]
    samplings += [Sampling(temperature=0.0, max_tokens=30, ignore_eos=True, stop=(whole["text"][at : at + 3],)) for at in range(0, 40, 5)]
    samplings += [Sampling(temperature=0.0, max_tokens=most, ignore_eos=True) for most in range(1, 9)]
    found = []
    for overlap in ("off", "on"):
        engine = build(overlap)
        if overlap == "on":
            late(engine, captures=True)
        for id, sampling in enumerate(samplings):
            engine.add(id, prompt, sampling)
        found.append(told(Answers(engine).finish()))
        assert engine.stats().num_generated_tokens == sum(len(one["ids"]) for one in found[-1].values())
    assert found[0] == found[1]
    assert len({one["end"] for one in found[0].values()}) > 5


def test_a_grammar_is_followed_beside_answers_that_have_none(build):
    guide = Guide(kind="regex", text="(one sailor, ){3}two sailors")
    found = []
    for overlap in ("off", "on"):
        engine = build(overlap)
        if overlap == "on":
            late(engine, captures=False)
        grammar = engine.grammars.compile(guide)
        answers = Answers(engine)
        for id, ids in enumerate(prompts_of(60, 9, 5)):
            guided = grammar if id == 0 else None
            engine.add(id, ids, Sampling(temperature=0.0, max_tokens=36, ignore_eos=guided is None), grammar=guided)
            answers.step()
        found.append(told(answers.finish()))
    assert found[0] == found[1]
    assert found[0][0, 0]["text"] == "one sailor, " * 3 + "two sailors"


def test_adapters_are_mixed_in_steps_that_overlap(build, tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama")
    tiny_adapter(folder, "one", std=0.3)
    tiny_adapter(folder, "two", r=2, std=0.4)
    found = []
    for overlap in ("off", "on"):
        engine = build(overlap, folder=folder)
        if overlap == "on":
            late(engine, captures=True)
        assert engine.adapters is not None
        answers = Answers(engine)
        for id, name in enumerate(("one", "", "two", "one", "")):
            adapter = engine.adapters.take(name) if name else None
            engine.add(id, prompts_of(20)[0], structs.replace(GREEDY, max_tokens=6 + 3 * id), adapter=adapter)
            answers.step()
        found.append(told(answers.finish()))
    assert found[0] == found[1]
    assert len({tuple(found[0][id, 0]["ids"][:6]) for id in (0, 1, 2)}) == 3


# What is planned ahead


def row(**changes: Any) -> SampleRow:
    return SampleRow(Sampling(**{"temperature": 0.0, **changes}).with_defaults({}), [5], seed=1, stop_ids=(EOS_ID,))


@pytest.mark.parametrize(
    ("changes", "on_device"),
    [
        ({}, True),
        ({"temperature": 1.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}, True),
        ({"stop": ("x",), "stop_token_ids": (7,)}, True),
        ({"logprobs": 0}, False),
        ({"presence_penalty": 0.1}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"logit_bias": {5: 1.0}}, False),
        ({"min_tokens": 2}, False),
        ({"prompt_logprobs": 0}, False),
    ],
)
def test_what_needs_the_host_is_not_chosen_on_the_device(changes, on_device):
    mine = row(**changes)
    plan = Plan(0.0, chunks=[Chunk(Sequence(0, [5, 6], mine.sampling), 0, 2, samples=True)])
    assert chosen_on_device(plan, [mine]) == on_device
    assert not chosen_on_device(plan, [mine, row(logprobs=1)])


def test_of_a_guided_row_and_of_drafts_the_host_decides(build):
    matcher = build().grammars.compile(Guide(kind="regex", text="a+")).matcher()
    guided = SampleRow(Sampling(temperature=0.0).with_defaults({}), [5], seed=1, matcher=matcher)
    assert not chosen_on_device(Plan(0.0), [guided])
    assert not chosen_on_device(Plan(0.0, num_drafts=1), [row()])


def test_a_step_follows_one_whose_tokens_the_device_knows():
    unknown = Flight(Plan(0.0), [], [], logits_NV=torch.zeros(0))
    chosen = Flight(Plan(0.0), [], [], chosen=Chosen(torch.zeros(0), {}))
    ways = {"recovering": False, "speculating": False}
    assert may_fly_ahead([chosen], **ways)
    assert not may_fly_ahead([unknown], **ways) and not may_fly_ahead([], **ways) and not may_fly_ahead([chosen, chosen], **ways)
    assert not any(may_fly_ahead([chosen], **{**ways, way: True}) for way in ways)


def test_the_device_has_the_next_step_while_the_host_reads_one(build):
    engine = build()
    device = late(engine, captures=True)
    answers = Answers(engine)
    for id, ids in enumerate(prompts_of(20, 9)):
        engine.add(id, ids, GREEDY)
    waiting = []
    while engine.has_work:
        answers.step()
        waiting.append(len(engine._flights))
    assert waiting == [1] * (len(waiting) - 1) + [0]
    assert engine.stats().num_steps == len(waiting) == 9, "two prompts take two steps; the ends are known, and none is thrown away"
    assert device.num_ahead == 8


@pytest.mark.parametrize("name", ["penalties", "bias", "logprobs"])
def test_beside_one_that_needs_the_host_steps_wait_for_each_other(build, name):
    engine = build()
    answers = Answers(engine)
    for id, (sampling, ids) in enumerate(zip((NEEDS_HOST[name], SAMPLINGS["greedy"]), prompts_of(9, 5), strict=True)):
        engine.add(id, ids, sampling)
    while 0 in engine._generations:
        assert not engine._flights
        answers.step()
    answers.step()
    assert engine._flights and 1 in engine._generations


def test_steps_overlap_from_the_least_number_of_tokens_on(build):
    engine = build()
    answers = Answers(engine)
    engine.add(0, prompts_of(9)[0], Sampling(temperature=0.0, min_tokens=4, max_tokens=10))
    flights = []
    while engine.has_work:
        answers.step()
        flights.append(len(engine._flights))
    assert flights[:5] == [0, 0, 0, 0, 1], "an end is forbidden to the first four"


def test_host_memory_that_the_device_has_not_read_is_not_written_again(build):
    # Given a prompt of so many chunks that nothing is read of the device until the last of them
    engine = build(max_batch_tokens=9)
    device = late(engine, captures=False)
    (prompt,) = prompts_of(80)
    engine.add(0, prompt, GREEDY)
    plans = [engine.scheduler.plan(0.0)]
    for _ in range(3):
        engine.runner.run(plans[-1].chunks)
        engine.scheduler.commit(plans[-1])
        plans.append(engine.scheduler.plan(0.0))
    # Then the device was given time to read what is written over
    assert device.num_done == 1 and device.num_given == 3


# Counts


def test_what_is_told_of_steps_and_tokens_is_what_was(build):
    def run(overlap: str) -> tuple[Engine, Answers]:
        engine = build(overlap, clock=Ticking())
        if overlap == "on":
            late(engine, captures=False)
        for id, ids in enumerate(prompts_of(20, 9, 30)):
            engine.add(id, ids, Sampling(temperature=0.0, max_tokens=12, ignore_eos=True), arrived=0.0)
        return engine, Answers(engine).finish()

    (one, plain), (other, answers) = run("off"), run("on")
    before, stats = one.stats(), other.stats()
    for name in ("num_prompt_tokens", "num_generated_tokens", "num_prefix_queried_tokens", "finished", "num_preemptions"):
        assert getattr(stats, name) == getattr(before, name), name
    for name in ("time_to_first_token", "inter_token", "queue_time"):
        assert sum(getattr(stats, name)[0]) == sum(getattr(before, name)[0]), name
    assert sum(stats.step_time[0]) == stats.num_steps
    # no moment is of two steps
    assert stats.step_time[1] <= other.clock.now  # type: ignore[attr-defined]
    for id in range(3):
        phases, expected = answers.deltas[id][-1].phases, plain.deltas[id][-1].phases
        assert [(phase.name, phase.num_tokens) for phase in phases] == [(phase.name, phase.num_tokens) for phase in expected]


def test_a_token_too_many_is_counted_nowhere(build):
    (prompt,) = prompts_of(12)
    engine = build()
    engine.add(0, prompt, GREEDY)
    third = told(Answers(engine).finish())[0, 0]["ids"][2]
    engine = build()
    device = late(engine, captures=True)
    engine.add(0, prompt, Sampling(temperature=0.0, max_tokens=50, ignore_eos=True, stop_token_ids=(third,)))
    answers = Answers(engine)
    while engine._generations:
        answers.step()
    # Given an answer that has ended, and a step with it that the device still has to compute
    num = len(told(answers)[0, 0]["ids"])
    assert told(answers)[0, 0]["usage"] == (12, num) and engine.stats().num_generated_tokens == num
    assert engine.has_work and device.num_done < device.num_given
    assert engine.step() == [] and not engine.has_work
    assert engine.stats().num_generated_tokens == num
    assert engine.scheduler.pool.num_published == (12 + num - 1) // 16


# Leaving


def test_who_leaves_during_a_step_hears_nothing_more_and_its_blocks_serve_others(build):
    engine = build(num_blocks=6)
    late(engine, captures=False)
    prompts = prompts_of(40, 30, 40)
    answers = Answers(engine)
    engine.add(0, prompts[0], Sampling(temperature=0.0, max_tokens=40, ignore_eos=True))
    for _ in range(4):
        answers.step()
    assert engine._flights
    engine.abort(0)
    heard = len(answers.deltas[0])
    assert engine.scheduler.pool.num_free == 6 and engine.has_work
    for id in (1, 2):
        engine.add(id, prompts[id], GREEDY)
    answers.finish()
    plain = build("off")
    for id in (1, 2):
        plain.add(id, prompts[id], GREEDY)
    expected = told(Answers(plain).finish())
    assert len(answers.deltas[0]) == heard and all(told(answers)[id, 0] == expected[id, 0] for id in (1, 2))


def test_an_engine_that_all_have_left_finishes_its_step(build):
    engine = build()
    device = late(engine, captures=True)
    engine.add(0, prompts_of(12)[0], GREEDY)
    engine.step()
    engine.abort(0)
    assert engine.has_work
    assert engine.step() == [] and not engine.has_work
    assert device.num_done == device.num_given


def test_who_waits_past_a_deadline_is_given_up_by_the_step_that_is_planned_ahead(build):
    clock = Clock()
    engine = build(num_blocks=6, clock=clock)
    answers = Answers(engine)
    engine.add(1, prompts_of(80)[0], Sampling(temperature=0.0, max_tokens=16, ignore_eos=True))
    for _ in range(5):
        answers.step()
    engine.add(2, prompts_of(80)[0], GREEDY, deadline=5.0)
    clock.now = 6.0
    answers.step()
    assert isinstance(answers.errors[2], TimeoutExpired)
    assert len(answers.finish().ids(1)) == 16


# Failure


@pytest.mark.parametrize("device", ["cpu", "late"])
@pytest.mark.parametrize("place", [0, 3, 20, 39])
def test_a_request_that_fails_its_step_is_found_and_the_others_go_on(build, device, place):
    prompts = prompts_of(10, 40, 7, 25, 12, 3)
    prompts[1][place] = CURSED

    def run(overlap: str, leave_out: int | None) -> Answers:
        engine = build(overlap, num_blocks=30, max_num_seqs=8, max_batch_tokens=32)
        Cursed(engine, CURSED, fall_over)
        if overlap == "on" and device == "late":
            late(engine, captures=False)
        answers = Answers(engine)
        for id, ids in enumerate(prompts):
            if id != leave_out:
                engine.add(id, ids, GREEDY)
            if id in (0, 2):
                answers.step()
        return answers.finish()

    expected, answers = run("off", 1), run("on", None)
    assert set(answers.errors) == {1} and not expected.errors
    assert isinstance(answers.errors[1], ModelError) and "the kernel fell over" in answers.errors[1].message
    assert told(answers) == told(expected)
    stats = answers.engine.stats()
    assert stats.num_quarantined == 1 and stats.num_failed_steps > 0 and not stats.recovering


def test_a_step_that_fails_when_it_is_read_takes_back_the_one_after(build):
    # Given two that decode, and a device that fails once
    engine = build()
    late(engine, captures=False)
    failing: list[int] = []

    def fault(logits: torch.Tensor, cursed_T: torch.Tensor) -> None:
        if failing:
            failing.pop()
            raise RuntimeError("a cosmic ray")

    Cursed(engine, CURSED, fault)
    prompts = prompts_of(14, 15)
    answers = Answers(engine)
    for id, ids in enumerate(prompts):
        engine.add(id, ids, Sampling(temperature=0.0, max_tokens=30, ignore_eos=True))
    for _ in range(4):
        answers.step()
    assert len(engine._flights) == 1
    failing.append(1)
    answers.step()
    # Then both steps are taken back, and each is tried alone
    assert not engine._flights and engine.recovering
    answers.finish()
    plain = build("off")
    for id, ids in enumerate(prompts):
        plain.add(id, ids, Sampling(temperature=0.0, max_tokens=30, ignore_eos=True))
    assert told(answers) == told(Answers(plain).finish()) and not answers.errors
    assert engine.stats().num_failed_steps == 1 and engine.stats().num_quarantined == 0


def test_a_step_that_fails_while_another_computes_clears_nobody_whom_that_one_computed(build):
    # Given a fault that is noticed when the second of two steps is given to the device
    engine = build()
    num_computed = []

    def fault(logits: torch.Tensor, cursed_T: torch.Tensor) -> None:
        num_computed.append(len(logits))
        if len(num_computed) == 4:
            raise RuntimeError("a cosmic ray")

    Cursed(engine, CURSED, fault)
    answers = Answers(engine)
    for id, ids in enumerate(prompts_of(11, 12)):
        engine.add(id, ids, SAMPLINGS["greedy"])
    while len(num_computed) < 4:
        answers.step()
    # Then what the first gave is told, and both are suspected, who failed after it
    assert not engine._flights and [seq.num_generated for seq in engine.scheduler.running] == [3, 3]
    assert [len(group) for group in engine._suspects] == [1, 1]
    answers.finish()
    plain = build("off")
    for id, ids in enumerate(prompts_of(11, 12)):
        plain.add(id, ids, SAMPLINGS["greedy"])
    assert told(answers) == told(Answers(plain).finish()) and not answers.errors


def test_one_that_left_the_step_before_it_failed_leaves_nobody_under_suspicion(build):
    engine = build()
    late(engine, captures=False)
    failing = [1]

    def fault(logits: torch.Tensor, cursed_T: torch.Tensor) -> None:
        if cursed_T.any() and failing.pop():
            raise RuntimeError("the kernel fell over")

    prompts = prompts_of(9, 10)
    prompts[0][4] = CURSED
    answers = Answers(engine)
    Cursed(engine, CURSED, fault)
    engine.add(2, prompts_of(4)[0], Sampling(temperature=0.0, max_tokens=20, ignore_eos=True))
    answers.step()
    engine.add(0, prompts[0], GREEDY)
    engine.add(1, prompts[1], GREEDY)
    answers.step()  # a step with all three is in flight, and will fail
    assert len(engine._flights[0].plan.chunks) == 3
    engine.abort(0)
    engine.abort(2)
    answers.finish()
    assert not answers.errors and len(answers.ids(1)) == 8
    assert engine.stats().num_failed_steps == 1 and engine.stats().num_quarantined == 0


def test_logits_that_are_no_numbers_end_one_request_alone(build):
    # Given logits without a token, which the next step takes for a token before the host has seen them
    engine = build(max_batch_tokens=96)
    late(engine, captures=True)

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
    assert set(answers.errors) == {1} and len(answers.ids(0)) == len(answers.ids(2)) == 8
    assert engine.stats().num_failed_steps == 0


def test_an_engine_whose_every_step_fails_gives_itself_up(build):
    engine = build()
    late(engine, captures=False)

    def always(logits: torch.Tensor, cursed_T: torch.Tensor) -> None:
        raise RuntimeError("the device is gone")

    Cursed(engine, 0, always)
    for id in range(40):
        engine.add(id, [5, 6, 7], GREEDY)
    with pytest.raises(EngineBroken, match="the device is gone"):
        Answers(engine).finish()


# The switch


def test_it_is_on_for_a_device_and_off_for_the_cpu_and_never_with_drafts(build, tmp_path):
    drafts = SpeculationSpec(method="ngram")
    assert overlaps(LlmSpec(), "cuda") and overlaps(LlmSpec(), "cuda:1") and not overlaps(LlmSpec(), "cpu")
    assert overlaps(LlmSpec(overlap="on"), "cpu") and not overlaps(LlmSpec(overlap="off"), "cuda")
    assert not overlaps(LlmSpec(speculation=drafts), "cuda")
    with pytest.raises(LoadError, match="`llm.overlap: on` cannot be heeded with `llm.speculation`"):
        build(speculation=drafts)
    with pytest.raises(LoadError, match="`llm.overlap` is of models that generate"):
        build_embedder(tmp_path, LlmSpec(overlap="on"))
    assert not build("auto").overlap and build("on").overlap


def test_the_log_says_that_steps_overlap(checkpoint):
    explained = [build_generator(checkpoint, LlmSpec(**SMALL, overlap=way))[2].explain for way in ("on", "off")]
    assert ["overlap" in " ".join(lines) for lines in explained] == [True, False]
