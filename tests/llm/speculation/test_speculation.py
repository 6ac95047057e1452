"""Answers are the same with drafts and without, whatever is asked and whatever happens; and where drafts come from."""

import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec import structs

from fairlead.core.errors import FairleadError, LoadError, ModelError
from fairlead.core.generation import Delta, Guide, Sampling
from fairlead.core.specs import LlmSpec, SpeculationSpec
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine
from fairlead.llm.sampler import Sampler, SampleRow
from tests.llm.tiny import EOS_ID, edit_json, tiny_checkpoint, tiny_model

SMALL = {"kernels": "torch", "dtype": "float32", "max_model_len": 96, "block_size": 16, "max_num_seqs": 4, "max_batch_tokens": 64}
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4
"""16 tokens, 2 layers, K and V, 2 heads of 16 float32."""
SMALLER = {"num_hidden_layers": 1, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
OFF = SpeculationSpec()
NGRAM = SpeculationSpec(method="ngram", num_tokens=5)
TWIN = SpeculationSpec(method="draft", draft="twin", num_tokens=5)
"""A draft model that says what the model says."""
STRANGER = SpeculationSpec(method="draft", draft="stranger", num_tokens=3)
"""One that knows nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model") / "1", "llama")
    tiny_checkpoint(folder / "twin", "llama")
    tiny_checkpoint(folder / "stranger", "llama", seed=7, **SMALLER)
    return folder


Build = Callable[..., Engine]


@pytest.fixture
def build(folder: Path) -> Build:
    def make(speculation: SpeculationSpec, num_blocks: int = 24, **changes: Any) -> Engine:
        spec = LlmSpec(**{**SMALL, "kv_cache_bytes": num_blocks * BLOCK_BYTES, "speculation": speculation, **changes})
        engine = build_generator(folder, spec, clock=lambda: 0.0)[0]
        assert engine.scheduler.pool.num_blocks <= num_blocks
        return engine

    return make


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(5, 500) for _ in range(length)] for length in lengths]


class Answers:
    """Everything that came out of an engine, by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.deltas: dict[int, list[Delta]] = {}
        self.errors: dict[int, FairleadError] = {}

    def step(self) -> None:
        for id, answer in self.engine.step():
            if isinstance(answer, FairleadError):
                self.errors[id] = answer
            else:
                self.deltas.setdefault(id, []).append(answer)
        self.engine.scheduler.check_integrity()

    def finish(self) -> "Answers":
        for _ in range(2000):
            if not self.engine.has_work:
                assert self.engine.scheduler.pool.num_free == self.engine.scheduler.pool.num_blocks
                assert self.engine.speculation is None or not self.engine.speculation._drafted
                return self
            self.step()
        raise AssertionError("the engine does not come to an end")

    def told(self) -> dict[tuple[int, int], Any]:
        """By request and choice, all that its caller sees, but for how it was cut into pieces."""
        whole: dict[tuple[int, int], Any] = {}
        for id, deltas in self.deltas.items():
            for delta in deltas:
                one = whole.setdefault((id, delta.index), {"ids": [], "text": "", "end": None, "logprobs": [], "prompt": None})
                one["ids"] += delta.token_ids
                one["text"] += delta.text
                one["logprobs"] += [
                    (each.token_id, each.rank, round(each.logprob, 3), [t.token_id for t in each.top]) for each in delta.logprobs or ()
                ]
                one["prompt"] = len(delta.prompt_logprobs) if delta.prompt_logprobs else one["prompt"]
                if delta.finish_reason:
                    one["end"] = (delta.finish_reason, delta.stop_reason)
        return whole


SAMPLINGS = {
    "greedy": Sampling(temperature=0.0, max_tokens=30, ignore_eos=True),
    "sampled": Sampling(temperature=0.7, seed=5, max_tokens=30, ignore_eos=True),
    "hot": Sampling(temperature=1.5, seed=6, top_p=0.9, top_k=40, min_p=0.01, max_tokens=30, ignore_eos=True),
    "penalties": Sampling(
        temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.3, max_tokens=30, ignore_eos=True
    ),
    "penalties, sampled": Sampling(temperature=0.5, seed=8, repetition_penalty=1.1, frequency_penalty=0.2, max_tokens=30, ignore_eos=True),
    "bias": Sampling(temperature=0.0, logit_bias={7: 3.0, 100: -100.0}, max_tokens=30, ignore_eos=True),
    "logprobs": Sampling(temperature=0.8, seed=9, logprobs=3, max_tokens=30, ignore_eos=True),
    "prompt_logprobs": Sampling(temperature=0.0, prompt_logprobs=1, max_tokens=12, ignore_eos=True),
    "choices": Sampling(temperature=0.9, seed=10, n=3, max_tokens=20, ignore_eos=True),
    "an end that may come": Sampling(temperature=0.9, seed=11, logit_bias={EOS_ID: 6.0}, min_tokens=4, max_tokens=50),
    "one token": Sampling(temperature=0.0, max_tokens=1),
    "no token": Sampling(temperature=0.0, max_tokens=0, prompt_logprobs=0),
    "to the end of the context": Sampling(temperature=0.0, ignore_eos=True),
}


@cache
def repeated(length: int, period: int, seed: int = 0) -> tuple[int, ...]:
    (ids,) = prompts_of(period, seed=seed)
    return tuple((ids * (length // period + 1))[:length])


def ask(engine: Engine, samplings: dict[str, Sampling], *, stream: bool = True) -> Answers:
    answers = Answers(engine)
    for id, sampling in enumerate(samplings.values()):
        engine.add(id, [*repeated(40, 9, id)], sampling, stream=stream)
        if id % 3 == 2:
            answers.step()
    return answers.finish()


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[tuple[int, int], Any]:
    spec = LlmSpec(**{**SMALL, "kv_cache_bytes": 24 * BLOCK_BYTES})
    return ask(build_generator(folder, spec, clock=lambda: 0.0)[0], SAMPLINGS).told()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("method", [NGRAM, TWIN, STRANGER], ids=["ngram", "twin", "stranger"])
def test_whatever_is_asked_the_answer_is_that_without_drafts(build, plain, method, stream):
    engine = build(method, num_blocks=36)
    answers = ask(engine, SAMPLINGS, stream=stream)
    assert not answers.errors
    for key, told in answers.told().items():
        assert told == plain[key], (list(SAMPLINGS)[key[0]], key)
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens <= stats.num_drafted_tokens or method is STRANGER
    if method is TWIN:
        assert stats.num_accepted_tokens > 0.7 * stats.num_drafted_tokens
        assert stats.num_steps < stats.num_generated_tokens / 2


@pytest.mark.parametrize("method", [NGRAM, TWIN], ids=["ngram", "twin"])
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("decoder", ["lean", "graph"])
def test_greedy_tokens_are_those_of_generate(build, method, decoder, kernels):
    model = tiny_model("llama")
    engine = build(method, num_blocks=36, decoder=decoder, kernels=kernels)
    prompts = [*prompts_of(3, 40, 17), [*repeated(30, 7)]]
    answers = Answers(engine)
    for id, ids in enumerate(prompts):
        engine.add(id, ids, Sampling(temperature=0.0, max_tokens=24, ignore_eos=True))
    told = answers.finish().told()
    for id, ids in enumerate(prompts):
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), max_new_tokens=24, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert told[id, 0]["ids"] == out[0, len(ids) :].tolist()
    assert engine.stats().num_drafted_tokens > 0


@pytest.mark.parametrize("method", [NGRAM, TWIN], ids=["ngram", "twin"])
def test_stop_strings_and_ends_in_the_middle_of_a_draft_cut_it_there(build, method):
    # Given an answer that is known, and what is to end it at each of its places
    (prompt,) = prompts_of(20)
    engine = build(OFF)
    engine.add(0, prompt, Sampling(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0))
    whole = Answers(engine).finish().told()[0, 0]
    samplings = [Sampling(temperature=0.0, max_tokens=30, ignore_eos=True, stop_token_ids=(token_id,)) for token_id in whole["ids"][3:12]]
    samplings += [Sampling(temperature=0.0, max_tokens=30, ignore_eos=True, stop=(whole["text"][at : at + 3],)) for at in range(8, 40, 5)]
    samplings += [Sampling(temperature=0.0, max_tokens=most, ignore_eos=True) for most in range(2, 9)]
    told = []
    for spec in (OFF, method):
        engine = build(spec, num_blocks=36)
        for id, sampling in enumerate(samplings):
            engine.add(id, prompt, sampling)
        told.append(Answers(engine).finish().told())
    assert told[0] == told[1]
    assert len({one["end"] for one in told[0].values()}) > 5


@pytest.mark.parametrize("method", [NGRAM, TWIN, STRANGER], ids=["ngram", "twin", "stranger"])
@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_and_no_draft_changes_a_token(build, method, seed):
    # Given a pool that holds little more than one sequence, and requests that come, share prefixes and leave at random
    def run(spec: SpeculationSpec, num_blocks: int) -> tuple[Answers, set[int]]:
        numbers = random.Random(seed)
        engine = build(spec, num_blocks=num_blocks, max_batch_tokens=numbers.choice([9, 16, 50]))
        answers, left = Answers(engine), set()
        heads = [[*repeated(16, 5, seed)], [*repeated(32, 11, seed)]]
        for id in range(12):
            ids = [*numbers.choice([[], *heads]), *prompts_of(numbers.randrange(1, 30), seed=100 * seed + id)[0]]
            engine.add(
                id,
                ids,
                Sampling(temperature=numbers.choice([0.0, 0.8]), seed=id, max_tokens=20, ignore_eos=True),
                priority=numbers.randrange(2),
            )
            for _ in range(numbers.randrange(4)):
                if engine.has_work:
                    answers.step()
            if numbers.random() < 0.25:
                left.add(id)
                engine.abort(id)
        return answers.finish(), left

    one, left = run(OFF, 40)
    other, _ = run(method, 8 if method is NGRAM else 14)
    expected, told = one.told(), other.told()
    for id in set(range(12)) - left:
        assert told[id, 0] == expected[id, 0], id
    assert other.engine.stats().num_preemptions > 0 or method is not NGRAM


def test_a_grammar_holds_in_every_place_of_a_draft(build):
    guide = Guide(kind="regex", text="(one sailor, ){5}two sailors")
    told, drafted = [], []
    for spec in (OFF, NGRAM, TWIN):
        engine = build(spec, forced_tokens=False)
        for id, temperature in enumerate((0.0, 1.0)):
            engine.add(
                id, prompts_of(9)[0], Sampling(temperature=temperature, seed=3, max_tokens=70), grammar=engine.grammars.compile(guide)
            )
        told.append(Answers(engine).finish().told())
        drafted.append(engine.stats().num_accepted_tokens)
    assert told[0] == told[1] == told[2]
    assert told[0][0, 0]["text"] == "one sailor, " * 5 + "two sailors"
    assert drafted[0] == 0 < drafted[1]


@pytest.mark.parametrize("method", [TWIN, STRANGER], ids=["twin", "stranger"])
def test_tokens_are_the_same_whether_a_draft_is_written_in_one_call_or_place_by_place(build, method):
    # Given requests that come and go, some of them sampled, which have no one call
    greedy = {name: sampling for name, sampling in SAMPLINGS.items() if sampling.temperature == 0.0}
    told = []
    for samplings in (greedy, SAMPLINGS):
        ways: list[Any] = []
        for way in ("one call", "by place", "off"):
            engine = build(OFF if way == "off" else method, num_blocks=36, kernels="native")
            if way == "by place":
                assert engine.speculation is not None and engine.speculation.model is not None
                engine.speculation.model.runner.decoder._whole = None  # type: ignore[attr-defined]
            ways.append(ask(engine, samplings).told())
        told.append(ways)
    for one_call, by_place, off in told:
        assert one_call == by_place == off


# Failure


def fall_over(engine: Engine, token: int) -> None:
    inner = engine.runner.decoder

    class Cursed:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def __call__(self, batch: Any, cache: Any) -> torch.Tensor:
            if (batch.input_ids_T == token).any():
                raise RuntimeError("the kernel fell over")
            return inner(batch, cache)

    engine.runner.decoder = Cursed()  # type: ignore[assignment]


def test_a_draft_that_makes_a_step_fail_harms_nobody(build):
    # Given a token that the model cannot compute, and that only a draft holds
    engine = build(NGRAM)
    prompt = [*repeated(40, 6)]
    greedy = Sampling(temperature=0.0, max_tokens=20, ignore_eos=True)
    engine.add(0, prompt, greedy)
    engine.add(1, prompts_of(12)[0], greedy)
    answers = Answers(engine)
    answers.step()
    before = {id: [token for delta in deltas for token in delta.token_ids] for id, deltas in answers.deltas.items()}
    fall_over(engine, 4)
    assert engine.speculation is not None
    given = engine.speculation._look_up

    def spoilt(decoding: Any) -> None:
        given(decoding)
        for seq in decoding:
            if engine.speculation._state(seq) is not None:  # type: ignore[union-attr]
                seq.draft = [4, 4]

    engine.speculation._look_up = spoilt  # type: ignore[method-assign]
    told = answers.finish().told()
    plain = build(OFF)
    plain.add(0, prompt, greedy)
    plain.add(1, prompts_of(12)[0], greedy)
    assert not answers.errors and before
    assert told == Answers(plain).finish().told()
    assert 0 < engine.stats().num_failed_steps <= 2 and engine.stats().num_quarantined == 0


def test_a_request_that_fails_is_found_though_others_have_drafts(build):
    engine = build(TWIN, num_blocks=40)
    fall_over(engine, 4)
    prompts = prompts_of(10, 20, 7)
    prompts[1][15] = 4
    greedy = Sampling(temperature=0.0, max_tokens=16, ignore_eos=True)
    answers = Answers(engine)
    for id in (0, 2):
        engine.add(id, prompts[id], greedy)
    for _ in range(5):
        answers.step()
    engine.add(1, prompts[1], greedy)
    answers.finish()
    assert set(answers.errors) == {1} and isinstance(answers.errors[1], ModelError)
    plain = build(OFF)
    for id in (0, 2):
        plain.add(id, prompts[id], greedy)
    assert answers.told() == Answers(plain).finish().told()


def test_a_draft_model_that_fails_is_left_alone_and_answers_go_on(build):
    engine = build(TWIN)
    assert engine.speculation is not None and engine.speculation.model is not None

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no memory")

    greedy = Sampling(temperature=0.0, max_tokens=16, ignore_eos=True)
    engine.add(0, prompts_of(10)[0], greedy)
    engine.speculation.model.runner.decoder = broken  # type: ignore[assignment]
    answers = Answers(engine).finish()
    assert len(answers.told()[0, 0]["ids"]) == 16 and engine.stats().num_failed_steps == engine.stats().num_drafted_tokens == 0


# The draft model


def test_a_prefix_that_is_found_again_is_found_by_the_draft_model_too(build):
    engine = build(TWIN, num_blocks=40)
    assert engine.speculation is not None and engine.speculation.model is not None
    runner, computed = engine.speculation.model.runner, []
    run = runner.run

    def counted(chunks: Any) -> torch.Tensor:
        computed.append(sum(chunk.num_tokens for chunk in chunks))
        return run(chunks)

    runner.run = counted  # type: ignore[method-assign]
    (prompt,) = prompts_of(60)
    greedy = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.add(0, prompt, greedy)
    Answers(engine).finish()
    assert max(computed) >= 60
    computed.clear()
    engine.add(1, prompt, greedy)
    Answers(engine).finish()
    assert max(computed) < 60 - 32
    assert engine.stats().num_accepted_tokens > 0.7 * engine.stats().num_drafted_tokens


def test_its_memory_is_within_the_budget(folder):
    budget = 40 * BLOCK_BYTES
    spec = LlmSpec(**{**SMALL, "kv_cache_bytes": budget, "speculation": TWIN})
    engine, _, info = build_generator(folder, spec)
    assert info.num_kv_blocks == 20 and info.kv_block_bytes == 2 * BLOCK_BYTES
    assert engine.speculation is not None and engine.speculation.model is not None
    caches = engine.runner.cache + engine.speculation.model.runner.cache
    assert sum(cache.k.nbytes + cache.v.nbytes for cache in caches) == budget
    assert any("draft model in twin" in line for line in info.explain) and any(
        line.startswith("draft model: decoder") for line in info.explain
    )


def test_a_draft_model_of_other_tokens_is_refused_by_name(folder, tmp_path):
    other = tiny_checkpoint(tmp_path / "model" / "1", "llama")
    draft = tiny_checkpoint(other.parent / "draft", "llama", seed=7, **SMALLER)
    spec = LlmSpec(**SMALL, speculation=SpeculationSpec(method="draft", draft="draft"))
    build_generator(other, spec)
    tokenizer = msgspec.json.decode((draft / "tokenizer.json").read_bytes())
    first, second = list(tokenizer["model"]["vocab"])[300:302]
    vocab = tokenizer["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (draft / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    with pytest.raises(
        LoadError, match=r"the draft model in draft has another tokenizer: token .* is 300 in the model's and 301 in the draft's"
    ):
        build_generator(other, spec)


def test_a_draft_model_that_is_not_there_or_too_small_is_refused(folder, tmp_path):
    other = tiny_checkpoint(tmp_path / "models" / "model" / "1", "llama")
    spec = LlmSpec(**SMALL, speculation=SpeculationSpec(method="draft", draft="small/1"))
    with pytest.raises(LoadError, match=r"`llm.speculation.draft` is 'small/1', and there is no checkpoint of that name"):
        build_generator(other, spec)
    small = tiny_checkpoint(tmp_path / "models" / "small" / "1", "llama", vocab_size=384, **SMALLER)
    with pytest.raises(LoadError, match="only 384 embedding rows"):
        build_generator(other, spec)
    tiny_checkpoint(small, "llama", vocab_size=640, **SMALLER)  # more rows than the model has tokens
    engine = build_generator(other, spec, clock=lambda: 0.0)[0]
    engine.add(0, prompts_of(9)[0], Sampling(temperature=0.8, seed=1, max_tokens=20, ignore_eos=True))
    answers = Answers(engine).finish()
    assert len(answers.told()[0, 0]["ids"]) == 20 and engine.stats().num_drafted_tokens > 0


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"method": "draft"}, "belong together"),
        ({"method": "ngram", "draft": "small"}, "belong together"),
        ({"method": "draft", "draft": "/etc"}, "must be a folder inside"),
        ({"method": "draft", "draft": "../../other"}, "must be a folder inside"),
        ({"method": "ngram", "num_tokens": 17}, "<= 16"),
        ({"method": "eagle"}, "Invalid enum value"),
        ({"methods": "ngram"}, "unknown field"),
    ],
)
def test_settings_that_mean_nothing_are_refused(section, why):
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(section, SpeculationSpec)


def test_a_draft_model_with_a_shorter_context_is_asked_as_far_as_it_goes(folder, tmp_path):
    other = tiny_checkpoint(tmp_path / "1", "llama")
    tiny_checkpoint(other / "draft", "llama", max_position_embeddings=48)
    edit_json(other / "draft" / "config.json", max_position_embeddings=48)
    spec = LlmSpec(**SMALL, speculation=SpeculationSpec(method="draft", draft="draft", num_tokens=5))
    engine = build_generator(other, spec, clock=lambda: 0.0)[0]
    engine.add(0, prompts_of(30)[0], Sampling(temperature=0.0, max_tokens=60, ignore_eos=True))
    answers = Answers(engine)
    drafted = []
    while engine.has_work:
        answers.step()
        drafted.append(engine.stats().num_drafted_tokens)
    assert 0 < drafted[-1] < 20 and len(answers.told()[0, 0]["ids"]) == 60


# The sampler


def row_of(**sampling: Any) -> SampleRow:
    return SampleRow(Sampling(**sampling).with_defaults({}), [5, 6, 7], seed=3)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "frequency_penalty": 0.9, "presence_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 2},
    ],
)
def test_looking_at_a_draft_is_choosing_one_by_one(sampling):
    # Given what the model says after each token of a text that the sampler itself chooses
    torch.manual_seed(0)
    sampler, logits = Sampler(40), torch.randn(9, 40) * 2
    one, other = row_of(**sampling), row_of(**sampling)
    chosen = []
    for at in range(9):
        (each,) = sampler.sample(logits[at : at + 1], [one])
        chosen.append(each)
        one.push(each.token_id)
    ids = [each.token_id for each in chosen]
    # When drafts are right up to some place, the tokens up to there come, and the one in place of the first that is wrong
    for num_right in range(9):
        for wrong in ([], [(ids[num_right] + 1) % 40, 1])[: 1 + (num_right < 7)]:
            draft = ids[:num_right] + wrong
            (got,) = sampler.verify(logits[: len(draft) + 1], [other], [draft])
            assert got == chosen[: num_right + 1]
            assert other.num_generated == 0, "the row is as it was"


def test_a_place_without_a_token_is_left_to_the_next_step():
    sampler, logits = Sampler(10), torch.zeros(4, 10)
    for at, token_id in enumerate((3, 4, 5)):
        logits[at, token_id] = 1.0
    logits[2] = torch.nan
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}):
        (got,) = sampler.verify(logits, [row_of(**sampling)], [[3, 4, 5]])
        assert [each.token_id for each in got] == [3, 4] and not got[-1].error
    (got,) = sampler.verify(logits[2:], [row_of(temperature=0.0)], [[5]])
    assert got[0].error


@pytest.mark.parametrize("method", [NGRAM, TWIN, STRANGER], ids=["ngram", "twin", "stranger"])
def test_sampled_tokens_follow_the_models_distribution(build, method):
    # Given a model's distribution of the second and third token after a prompt and one first token
    engine = build(method, num_blocks=40, max_model_len=32)
    numbers = random.Random(0)
    prompt = [numbers.randrange(20, 24) for _ in range(24)]
    bias = dict.fromkeys(range(20, 24), 100.0)  # four tokens, so that few samples tell
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(600):
        engine.add(seed, prompt, Sampling(temperature=2.0, seed=seed, max_tokens=3, ignore_eos=True, logit_bias=bias), stream=False)
        if seed % 4 == 3:
            for told in Answers(engine).finish().told().values():
                counts[tuple(told["ids"])] += 1
    model = tiny_model("llama")
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        grown = {}
        for ids, share in expected.items():
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1].double().numpy()[20:24] / 2.0
            weights = np.exp(logits - logits.max())
            for token_id, weight in enumerate(weights / weights.sum(), 20):
                grown[*ids, token_id] = share * float(weight)
        expected = grown
    # Then what came is a sample of it: chi-squared over the cells that are not too small
    cells = [(counts[ids], 600 * share) for ids, share in expected.items() if 600 * share >= 5]
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), (statistic, freedom)
    assert engine.stats().num_drafted_tokens > 0


def test_what_a_step_takes_is_told_by_the_processors_clock(folder):
    # Given an engine on a CPU, whose core other work takes away now and then
    engine = build_generator(folder, LlmSpec(**SMALL, speculation=NGRAM))[0]
    assert engine.clock is time.perf_counter
    assert engine.speculation is not None and engine.speculation.clock is time.thread_time
    # When its own share of each step is a quarter of a second
    marks = itertools.count()
    engine.speculation.clock = lambda: next(marks) * 0.25
    engine.add(0, prompts_of(9)[0], Sampling(temperature=0.0, max_tokens=3, ignore_eos=True))
    Answers(engine).finish()
    assert engine.speculation.pace._sizes[1].plain.median == 0.25


def test_speculation_off_leaves_no_trace(build):
    engine = build(OFF)
    assert engine.speculation is None
    engine.add(0, prompts_of(9)[0], structs.replace(SAMPLINGS["greedy"]))
    Answers(engine).finish()
    assert engine.stats().num_drafted_tokens == 0
