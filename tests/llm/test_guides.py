"""Answers that follow a grammar, in the engine: with the small model that was really trained, beside others, drafted or not."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import convert, structs

from fairlead.cli.demo_models.tiny.checks import CHAT
from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Chat, EngineStats, Guide, Message, Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm import masks
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine
from fairlead.llm.grammar import Matcher
from tests.llm.test_engine import Answers

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "reader"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["name", "age", "role", "tags"],
    "additionalProperties": False,
}
GREEDY = Sampling(temperature=0.0, max_tokens=100)
SPEC = {"kernels": "torch", "dtype": "float32", "max_model_len": 256, "block_size": 16, "max_num_seqs": 8, "kv_cache_bytes": 16 << 20}
ASKS = ("Bob is 33 and an admin.", "What is 3 plus 4?", "Sort 5, 1, 9.", "Tell me of Ada, who reads.")


@cache
def build(**changes: Any) -> Engine:
    torch.set_num_threads(1)
    return build_generator(CHAT, LlmSpec(**{**SPEC, **changes}))[0]


@cache
def cached_build(changes: str) -> Engine:
    return build_generator(CHAT, convert({**SPEC, **json.loads(changes)}, LlmSpec))[0]


@pytest.fixture
def engine() -> Engine:
    return build()


def ask(engine: Engine, id: int, text: str, guide: Guide | None, sampling: Sampling = GREEDY, *, stream: bool = False) -> None:
    ids = engine.tokenizer.encode_chat(Chat(messages=[Message(role="user", content=text)]))
    engine.add(id, ids, sampling, stream=stream, grammar=None if guide is None else engine.grammars.compile(guide))


def schema(value: dict[str, Any]) -> Guide:
    return Guide(kind="json", text=json.dumps(value), parameter="schema")


def one(engine: Engine, text: str, guide: Guide | None, sampling: Sampling = GREEDY) -> tuple[str, str]:
    """(text, finish reason) of a request alone."""
    ask(engine, 0, text, guide, sampling)
    answers = Answers(engine).finish()
    return answers.text(0), answers.deltas[0][-1].finish_reason


# What comes out


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_every_answer_follows_its_schema(engine, temperature):
    # When the choices of several requests, of two schemas and of none, share the batch
    numbers = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4}
    for id, text in enumerate(ASKS):
        sampling = structs.replace(GREEDY, temperature=temperature, n=2, seed=id)
        ask(engine, id, text, (schema(PERSON), schema(numbers), None)[id % 3], sampling)
    answers = Answers(engine).finish()
    # Then each follows its own
    for id in range(len(ASKS)):
        for index in range(2):
            (delta,) = [delta for delta in answers.deltas[id] if delta.index == index]
            assert delta.finish_reason == "stop", delta.text
            if id % 3 < 2:
                jsonschema.validate(json.loads(delta.text), (PERSON, numbers)[id % 3])


LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 40},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 2},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"type": "string", "format": "date"},
        {"enum": ["red", 7, None, [1]]},
        {"const": {"k": "é\n"}},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 2)),
        st.builds(lambda several: {"anyOf": several}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda properties, some: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:some],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b c", 'q"', "é"]), inner, max_size=3),
            st.integers(0, 3),
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(value=SCHEMAS, seed=st.integers(0, 9))
def test_whatever_the_schema_the_answer_follows_it(value, seed):
    text, reason = one(build(), ASKS[seed % 4], schema(value), structs.replace(GREEDY, temperature=1.2, seed=seed, max_tokens=150))
    if reason == "stop":
        jsonschema.validate(json.loads(text), value)
    else:
        assert reason == "length"


def test_streamed_it_is_the_same_text(engine):
    whole = one(engine, ASKS[0], schema(PERSON))
    ask(engine, 1, ASKS[0], schema(PERSON), stream=True)
    answers = Answers(engine).finish()
    assert (answers.text(1), "stop") == whole and len(answers.deltas[1]) > 5


@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        (Guide(kind="choice", text='["positive", "negative"]'), {"positive", "negative"}),
        (Guide(kind="regex", text="(ab|ba){2}"), {"abab", "abba", "baab", "baba"}),
        (Guide(kind="lark", text='start: ("x" | "y") END\nEND: "!"\n'), {"x!", "y!"}),
    ],
)
def test_other_guides(engine, guide, expected):
    assert one(engine, ASKS[1], guide)[0] in expected


# What it leaves alone


def test_those_beside_it_have_the_same_tokens(engine):
    for id, text in enumerate(ASKS):
        ask(engine, id, text, None)
    alone = Answers(engine).finish()
    for id, text in enumerate(ASKS):
        ask(engine, id, text, None)
        ask(engine, 10 + id, text, schema(PERSON), structs.replace(GREEDY, temperature=float(id % 2), seed=id))
    beside = Answers(engine).finish()
    assert [beside.ids(id) for id in range(4)] == [alone.ids(id) for id in range(4)]


@pytest.mark.parametrize("sampling", [GREEDY, structs.replace(GREEDY, temperature=0.9, seed=4, top_p=0.9, frequency_penalty=0.3)])
def test_a_guide_that_allows_all_that_is_said_changes_nothing(engine, sampling):
    for id, text in enumerate(ASKS):
        ask(engine, id, text, None, sampling)
        ask(engine, 10 + id, text, Guide(kind="regex", text="(.|\n)*"), sampling)
    answers = Answers(engine).finish()
    assert [answers.ids(10 + id) for id in range(4)] == [answers.ids(id) for id in range(4)]


@pytest.mark.parametrize("changes", [{"forced_tokens": False}, {"speculation": {"method": "ngram", "num_tokens": 4}}], ids=str)
def test_the_tokens_are_the_same_however_they_are_computed(changes):
    plain, other = build(), build_generator(CHAT, convert({**SPEC, **changes}, LlmSpec))[0]
    found = []
    for engine in (plain, other):
        for id, text in enumerate(ASKS[:2]):
            ask(engine, id, text, schema(PERSON))
            ask(engine, 10 + id, text, schema(PERSON), structs.replace(GREEDY, temperature=0.8, seed=id, logprobs=1))
            ask(engine, 20 + id, text, Guide(kind="regex", text="(ab ){5,20}"), structs.replace(GREEDY, ignore_eos=True, max_tokens=40))
        answers = Answers(engine).finish()
        found.append([answers.ids(id) for id in sorted(answers.deltas)])
    assert found[0] == found[1]


NGRAM = {"speculation": {"method": "ngram", "num_tokens": 4}}
WAYS = [{}, {"forced_tokens": False}, NGRAM, {"kernels": "auto"}, {"kernels": "auto", **NGRAM}]


@pytest.mark.parametrize("changes", WAYS, ids=str)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(value=SCHEMAS)
def test_asked_first_or_masked_the_tokens_are_the_same(value, changes):
    engine = cached_build(json.dumps(changes))
    found = []
    # When grammars are asked whether they take the likeliest token, and when all of them refuse, so that each token is one of a mask
    for takes in (Matcher.takes, lambda matcher, token_id: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Matcher, "takes", takes)
            for id, text in enumerate(ASKS):
                sampling = structs.replace(GREEDY, min_tokens=5 * (id % 2), ignore_eos=id == 2, max_tokens=60)
                ask(engine, id, text, schema(value), sampling)
            answers = Answers(engine).finish()
        found.append([answers.ids(id) for id in range(len(ASKS))])
    # Then nobody can tell the difference
    assert found[0] == found[1]


def test_what_a_grammar_forces_takes_fewer_steps():
    steps: list[EngineStats] = []
    for forced in (True, False):
        engine = build_generator(CHAT, LlmSpec(**SPEC, forced_tokens=forced))[0]
        one(engine, ASKS[0], Guide(kind="choice", text='["a very long answer that nobody had to think about"]'))
        steps.append(engine.stats())
    assert steps[0].num_generated_tokens == steps[1].num_generated_tokens and 2 * steps[0].num_steps < steps[1].num_steps


# Where it ends


def test_the_length_is_kept_and_leaves_a_part(engine):
    text, reason = one(engine, ASKS[0], schema(PERSON), structs.replace(GREEDY, max_tokens=6))
    assert reason == "length" and one(engine, ASKS[0], schema(PERSON))[0].startswith(text)


def test_nothing_follows_a_complete_answer(engine):
    yes = Guide(kind="choice", text='["yes"]')
    ask(engine, 0, ASKS[0], yes)
    ask(engine, 1, ASKS[0], yes, structs.replace(GREEDY, min_tokens=10, max_tokens=20))
    ask(engine, 2, ASKS[0], yes, structs.replace(GREEDY, ignore_eos=True, max_tokens=20))
    answers = Answers(engine).finish()
    assert [answers.text(id) for id in range(3)] == ["yes", "yes", "yes"]
    assert [answers.deltas[id][-1].finish_reason for id in range(3)] == ["stop", "stop", "length"]
    assert 10 <= len(answers.ids(1)) <= 11 and len(answers.ids(2)) == 20


def test_bias_penalties_and_stop_strings_do_as_elsewhere(engine):
    end = next(iter(engine.eos_ids))
    # No bias makes room for what the grammar forbids
    pushed = structs.replace(GREEDY, logit_bias={end: 100.0}, repetition_penalty=1.3, presence_penalty=0.5)
    assert one(engine, ASKS[1], Guide(kind="choice", text='["yes", "no"]'), pushed)[0] in ("yes", "no")
    # and a stop string ends the answer before its grammar does
    assert one(engine, ASKS[1], Guide(kind="choice", text='["one, two"]'), structs.replace(GREEDY, stop=(",",))) == ("one", "stop")


def test_log_probabilities_are_the_models_own(engine):
    sampling = structs.replace(GREEDY, logprobs=2, max_tokens=1)
    ask(engine, 0, ASKS[1], None, sampling)
    ask(engine, 1, ASKS[1], Guide(kind="choice", text='["zebra"]'), sampling)
    answers = Answers(engine).finish()
    (free,), (bound,) = answers.deltas[0][0].logprobs, answers.deltas[1][0].logprobs
    assert bound.top == free.top and bound.rank > 1 and bound.logprob < free.logprob


# Where it fails


def test_one_that_can_go_no_further_ends_alone(engine):
    # Given a grammar whose automaton has too many states to build
    bomb = Guide(
        kind="lark", text="start: A\nA: /(?s:.*)/ & ~/(?s:.*)x.{12}y(?s:.*)/ & ~/(?s:.*)(foo.{10}bar)(?s:.*)/ & /(.*q.{9}){0,5}/\n"
    )
    for id in range(2):
        ask(engine, id, ASKS[id], None)
    ask(engine, 7, ASKS[2], bomb, structs.replace(GREEDY, temperature=2.0, seed=1, ignore_eos=True, max_tokens=150))
    # When it comes to its bounds
    answers = Answers(engine).finish()
    # Then the others have their answers, and the next request that asks for it compiles it anew
    assert isinstance(answers.errors[7], InvalidRequest) and "as its grammar demands" in answers.errors[7].message
    assert all(answers.deltas[id][-1].finish_reason == "stop" for id in range(2))
    assert one(engine, ASKS[0], schema(PERSON))[1] == "stop"


def test_one_that_forces_text_without_end_is_the_requests_own_fault(engine):
    ask(engine, 0, ASKS[0], Guide(kind="lark", text='start: "a" start\n'), structs.replace(GREEDY, max_tokens=40))
    found = Answers(engine).finish()
    assert isinstance(found.errors[0], InvalidRequest) and "as its grammar demands" in found.errors[0].message


def test_one_that_takes_the_time_of_all_ends(engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(masks, "MAX_SLOW_SECONDS", 0.0)
    ask(engine, 0, ASKS[0], schema(PERSON))
    assert "takes too long" in Answers(engine).finish().errors[0].message


@pytest.mark.parametrize("num_cores", [1, 64])
def test_masks_are_the_same_alone_and_together(engine, num_cores):
    found = masks.Masks(engine.runner.decoder.vocab_size, num_cores=num_cores)
    grammars: list[Callable[[], Any]] = [engine.grammars.compile(schema(PERSON)).matcher] * 3
    matchers = [make() for make in grammars]
    forced = matchers[0].inner
    ids = engine.tokenizer.encode('{"name', add_special_tokens=False)
    for draft in ([], ids[1:]):
        guided = [masks.Guided(matcher, draft if number == 1 else []) for number, matcher in enumerate(matchers)]
        for matcher in matchers[1:]:
            matcher.follow(ids[:1], 0)
        with found.alongside(guided) as rows:
            assert rows == []
        masks_RW = rows[0][0]
        assert [first for _, first in rows] == [0, 1, 2 + len(draft)]
        assert masks_RW[0].tobytes() == forced.compute_bitmask()[: masks_RW[0].nbytes]
        assert (masks_RW[1] == masks_RW[2 + len(draft)]).all()
        allowed = [bool(masks_RW[1 + place][id // 32] >> (id % 32) & 1) for place, id in enumerate(draft)]
        assert all(allowed)
