"""Guides compiled: what they allow, what of them is kept, and how hostile ones end."""

import json
import random

import numpy as np
import pytest

from fairlead.cli.demo_models.tiny.checks import CHAT
from fairlead.core.errors import FairleadError, InvalidRequest, Unsupported
from fairlead.core.generation import MAX_GUIDE_BYTES, Guide
from fairlead.llm.grammar import MAX_CACHED, Grammar, Grammars
from fairlead.llm.tokenizer import Tokenizer
from tests.llm.test_tokenizer import sentencepiece

VOCAB, END = 1536, 2
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokenizer.load(CHAT), VOCAB, [END])


def schema(value: object) -> Guide:
    return Guide(kind="json", text=json.dumps(value), parameter="schema")


def takes(grammars: Grammars, guide: Guide, text: str) -> bool:
    """The whole text may be an answer."""
    matcher = grammars.compile(guide).matcher()
    ids = grammars.tokenizer.encode(text, add_special_tokens=False)
    return matcher.allowed([*ids, END]) == ids and matcher.inner.consume_tokens(ids) and matcher.inner.is_accepting()


def refused(grammars: Grammars, guide: Guide) -> str:
    with pytest.raises(InvalidRequest) as caught:
        grammars.compile(guide)
    return caught.value.message


@pytest.mark.parametrize(
    ("guide", "good", "bad"),
    [
        (schema(PERSON), ['{"name": "Ada", "age": 36}', '{\n  "name": "é",\n  "age": 0\n}'], ['{"age": 36, "name": "Ada"}', "{}", ' {"name"']),
        (schema({"type": "object"}), ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1"]),
        (schema({"enum": ["a", 1, None]}), ['"a"', "1", "null"], ['"b"', "2"]),
        (schema({"oneOf": [{"type": "string"}, {"type": "integer"}]}), ['"a"', "12"], ["1.5"]),
        (schema({"type": "string", "pattern": "^[ab]+$", "maxLength": 3}), ['"aba"'], ['"abab"', '"c"']),
        (schema({"type": "integer", "minimum": 3, "maximum": 11}), ["3", "11"], ["2", "12"]),
        (schema({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}), ["[]", "[true, false]"], ["[true, true, true]"]),
        (schema({"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]}}}), ["[[null]]"], ["[1]"]),
        (Guide(kind="regex", text=r"[A-Z]\d{2}"), ["A12"], ["a12", "A1"]),
        (Guide(kind="choice", text='["yes", "no, \\"never\\"\\n", "é"]'), ["yes", 'no, "never"\n', "é"], ["maybe"]),
        (Guide(kind="lark", text='start: WORD ("," WORD)*\nWORD: /[a-z]+/\n'), ["ab,c"], ["ab,", "1"]),
        (Guide(kind="lark", text='start: "<" %json {"type": "object", "properties": {"%json {": {"const": 1}}} ">"\n'), ['<{"%json {": 1}>'], ["<1>"]),
    ],
)  # fmt: skip
def test_a_guide_allows_what_it_says(grammars, guide, good, bad):
    assert [text for text in good if not takes(grammars, guide, text)] == []
    assert [text for text in bad if takes(grammars, guide, text)] == []


GUIDES = [
    schema(PERSON),
    schema({"type": "object"}),
    schema({"type": "array", "items": {"anyOf": [{"type": "number"}, {"enum": ["red", 7, None, [1]]}]}}),
    schema({"type": "string", "format": "date-time"}),
    schema({"const": {"k": "é\n"}}),
    Guide(kind="regex", text="[a-z]{3}é?[0-9]*(yes|yellow)"),
    Guide(kind="choice", text='["a very long answer that nobody had to think about", "a very short one"]'),
    Guide(kind="lark", text='start: "<think>" /(?s:.*)/ "</think>" NUMBER | "x" <|im_end|> "y"\nNUMBER: /[0-9]{2}/\n'),
]


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_asked_for_a_token_a_grammar_says_what_its_mask_says(grammars, guide):
    # Given answers of any tokens that may come
    dice = random.Random(0)
    for _ in range(3):
        matcher, answer = grammars.compile(guide).matcher(), []
        for _ in range(25):
            mask = np.unpackbits(np.frombuffer(matcher.inner.compute_bitmask(), np.uint8), bitorder="little")[:VOCAB]
            if matcher.inner.is_stopped() and not matcher.inner.is_error():
                break
            # Then it takes at each place the tokens of the mask and no others, and that alone which must come
            assert [matcher.takes(token_id) for token_id in range(VOCAB)] == mask.astype(bool).tolist()
            if forced := matcher.follow(answer, 0):
                assert np.flatnonzero(mask).tolist() == forced[:1]
            answer.append(dice.choice(np.flatnonzero(mask).tolist()))
            matcher.follow(answer, 0)


def test_sentencepiece_vocabularies_spell_their_bytes():
    tokenizer = Tokenizer(sentencepiece())
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 5, [2])
    for text in ('{"name": "a b é", "age": 3}', '{"name": "", "age": 3}'):
        matcher = grammars.compile(schema(PERSON)).matcher()
        left = text.encode()
        while left:  # by the longest token that fits
            fits = [id for id in range(3, tokenizer.vocab_size) if (spelled := tokenizer.token_bytes(id)) and left.startswith(spelled)]
            token_id = max((id for id in fits if matcher.allowed([id])), key=lambda id: len(tokenizer.token_bytes(id)))
            matcher.follow([token_id], -matcher.num_tokens)
            left = left[len(tokenizer.token_bytes(token_id)) :]
        assert matcher.inner.is_accepting()


def test_a_vocabulary_that_spells_no_bytes_takes_no_guides():
    tokenizer = Tokenizer.load(CHAT)
    tokenizer.spelling = "other"
    with pytest.raises(Unsupported, match="its tokenizer"):
        Grammars(tokenizer, VOCAB, [END]).compile(schema(PERSON))


def test_guides_can_be_off():
    grammars = Grammars(Tokenizer.load(CHAT), VOCAB, [END], enabled=False)
    with pytest.raises(Unsupported, match=r"`llm\.guides` of this model is off"):
        grammars.compile(schema(PERSON))
    assert "off" in grammars.explained and grammars.known(schema(PERSON))


# What is kept


def test_a_grammar_is_compiled_once():
    grammars = Grammars(Tokenizer.load(CHAT), VOCAB, [END])
    first = grammars.compile(schema(PERSON))
    assert grammars.compile(Guide(kind="json", text=json.dumps(PERSON), parameter="elsewhere")) is first
    assert (grammars.num_hits, grammars.num_misses) == (1, 1) and grammars.known(schema(PERSON))


def test_what_is_wrong_with_one_is_kept_too():
    grammars = Grammars(Tokenizer.load(CHAT), VOCAB, [END])
    assert refused(grammars, schema({"not": {}})) == "`schema` cannot be followed: /not: the keyword `not` is not supported"
    told = refused(grammars, Guide(kind="json", text='{"not": {}}', parameter="tools[0].schema"))
    assert told.startswith("`tools[0].schema` cannot") and (grammars.num_hits, grammars.num_misses) == (1, 1)


def test_those_asked_for_last_are_kept():
    grammars = Grammars(Tokenizer.load(CHAT), VOCAB, [END])
    guides = [Guide(kind="regex", text="a" * number) for number in range(1, MAX_CACHED + 2)]
    for guide in guides:
        grammars.compile(guide)
        grammars.compile(guides[0])
    assert [grammars.known(guide) for guide in (guides[0], guides[1], guides[-1])] == [True, False, True]


def test_one_that_came_to_its_bounds_is_compiled_anew():
    grammars = Grammars(Tokenizer.load(CHAT), VOCAB, [END])
    guide = Guide(kind="regex", text="a+")
    grammar = grammars.compile(guide)
    matcher = grammar.matcher()
    matcher.inner.consume_token(5)  # not an `a`
    assert "as its grammar demands" in matcher.error
    assert not grammars.known(guide)  # it takes as long as the first time
    assert grammars.compile(guide) is not grammar and grammars.known(guide)


# Hostile ones


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required property 'a' is unsatisfiable"),
        ({"type": "array", "items": {"type": "integer", "minimum": 5, "maximum": 4}, "minItems": 1}, "/items: Unsatisfiable"),
        ({"$ref": "#"}, "nothing can match it"),
        ({"allOf": [{"enum": [f"{n}{k}" for n in range(1500)]} for k in "ab"]}, "schema too large"),
        ({"properties": {"a": {"patternProperties": {"^a": {"type": "string"}, "^ab": {"type": "null"}}}}}, "/properties/a: pattern"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "object"}, {"type": "object", "maxProperties": 1}]}, "oneOf"),
    ],
)
def test_an_impossible_schema_is_refused(grammars, value, told):
    message = refused(grammars, schema(value))
    assert message.startswith("`schema` cannot be followed: /") and told in message


@pytest.mark.parametrize(
    "guide",
    [
        Guide(kind="json", text="{"),
        Guide(kind="json", text='{"a":' * 10_000 + "1" + "}" * 10_000),
        Guide(kind="json", text='{"items":' * 300 + "{}" + "}" * 300),
        Guide(kind="json", text=json.dumps({"enum": ["x" * MAX_GUIDE_BYTES]})),
        Guide(kind="regex", text="(" * 3000 + "a" + ")" * 3000),
        Guide(kind="regex", text="((((a{0,100}){0,100}){0,100}){0,100}){0,100}"),
        Guide(kind="regex", text=r"(a)\1"),
        Guide(kind="regex", text=r"[^\s\S]"),
        Guide(kind="regex", text="a" * 100_000),
        Guide(kind="choice", text="[]"),
        Guide(kind="choice", text=json.dumps([str(number) for number in range(20_000)])),
        Guide(kind="lark", text="start: ("),
        Guide(kind="lark", text='start: a\na: a "x"\n'),
        Guide(kind="lark", text='start: a "b"\na[stop="zz"]: /x+/\n'),
        Guide(kind="lark", text="start: a\na[temperature=0.5]: /x+/\n"),
        Guide(kind="lark", text='start: %json {"type": "string", "x-guidance": {"lenient": true}}\n'),
        Guide(kind="lark", text='start: %json {"type": "string", "not": {}}\n'),
        Guide(kind="lark", text='{"grammars": [{"json_schema": {"not": {}, "x-guidance": {"lenient": true}}}]}'),
        Guide(kind="lark", text="start: A0\n" + "".join(f"A{n}: {f'A{n + 1} ' * 4}\n" for n in range(30)) + 'A30: "x"?\n'),
        Guide(kind="lark", text="start: A0\n" + "".join(f"A{n}: A{n + 1} A{n + 1}\n" for n in range(17)) + 'A17: "x"\n'),
        Guide(kind="lark", text="start: A\nA: B{200}\nB: C{200}\nC: /ab/{9}\n"),
        Guide(kind="lark", text="start: a\na[lazy]: B{1000}\nB: /x{60}/\n"),
        Guide(kind="lark", text="start: A0\n" + "".join(f"A{n}: A{n + 1}\n" for n in range(2500)) + 'A2500: "x"\n'),
        Guide(kind="lark", text="start: " + " ".join(f"A{n}" for n in range(10)) + "".join(f"\nA{n}: /{n}a{{8000}}/" for n in range(10))),
        Guide(kind="regex", text="(abcdefghijklmnopqrst){10000}"),
    ],
    ids=range(25),
)  # fmt: skip
def test_a_hostile_guide_is_refused(grammars, guide):
    assert len(refused(grammars, guide)) < 600


def test_counts_in_a_literal_repeat_nothing(grammars):
    text = '#"[\nstart: "{99999}" A ("," A){0,10000}\nA: /["{]{9}/ | "a{20000}" // "\n'
    assert takes(grammars, Guide(kind="lark", text=text), '{99999}a{20000},"{"{"{"{"')
    assert takes(grammars, Guide(kind="lark", text='start: "' + "x" * 60 + '"{900} A{900}\nA: "y"\n'), "x" * 54_000 + "y" * 900)


def test_hostile_text_never_ends_in_anything_but_a_refusal(grammars):
    pieces = [
        "{",
        '"type"',
        ":",
        '"string"',
        "}",
        "[",
        "(",
        "a|b",
        "*",
        "{1,9}",
        "\\",
        "/",
        "start: ",
        "\n",
        "\ud800",
        "%json ",
        "<[5]>",
        "\0",
    ]
    for kind in ("json", "regex", "choice", "lark"):
        for number in range(150):
            text = "".join(pieces[(number * step + step) % len(pieces)] for step in range(1, 2 + number % 9))
            try:
                assert isinstance(grammars.compile(Guide(kind=kind, text=text)), Grammar)
            except FairleadError as error:
                assert isinstance(error, InvalidRequest)
