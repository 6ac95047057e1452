"""Answers as models write them, in every way in which their text can be cut into pieces."""

import json
import random
from itertools import chain, pairwise

import pytest

from fairlead.core.generation import ToolCall, add_calls
from fairlead.llm.parsing.choose import FORMATS, shipped
from fairlead.llm.parsing.parser import MAX_ANCHOR, ResponseParser
from fairlead.llm.parsing.template import template_of

TOOLS = {
    "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}}},
    "now": {"properties": {}},
}
OSLO = '{"city": "Oslo"}'

SAMPLES = [
    # (format, end of the prompt, what the model writes, reasoning, text, calls)
    ("hermes", "", "Hello\n\nworld  ", "", "Hello\n\nworld  ", []),
    ("hermes", "", "", "", "", []),
    ("hermes", "", "<think>\nhm \n ok\n</think>\n\nIt is.", "hm \n ok", "It is.", []),
    (
        "hermes",
        "",
        'Wait.\n<tool_call>\n{"name": "weather", "arguments": {"city": "</tool_call> \\u00e9\\"", "days": -1.5e3}}\n</tool_call>'
        '\n<tool_call>{"name": "now"}</tool_call> bye',
        "",
        "Wait.\nbye",
        [("weather", '{"city": "</tool_call> \\u00e9\\"", "days": -1.5e3}'), ("now", "{}")],
    ),
    (
        "hermes",
        "<|im_start|>assistant\n<think>\n",
        'so\n</think>\n\n<tool_call>{"arguments": {"city": 1}, "name": "now"}</tool_call>',
        "so",
        "",
        [("now", '{"city": 1}')],
    ),
    ("hermes", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "Hi <think>a</think>b", "a", "Hi b", []),
    ("hermes", "", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", "", [("now", "{}")]),
    ("hermes", "", '<tool_call>{"name": "weather", "arguments": {"city": "a\nb"}}</tool_call>', "", "", [("weather", '{"city": "a\\nb"}')]),
    ("hermes", "", '<tool_call>{"name": "weather", "arguments": {"city": "A"}</tool_call>, so', "", ", so", [("weather", '{"city": "A"}')]),
    ("hermes", "", '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>x', "", "x", [("weather", '{"city": ')]),
    ("hermes", "", "<tool_call>nonsense</tool_call> x", "", "<tool_call>nonsense</tool_call> x", []),
    (
        "hermes",
        "",
        '<tool_call>{"name": "now", "arguments": 3}</tool_call>',
        "",
        '<tool_call>{"name": "now", "arguments": 3}</tool_call>',
        [],
    ),
    ("hermes", "", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", "", [("now", "{}")]),
    ("hermes", "", "a < b <tool <tool_cal", "", "a < b <tool <tool_cal", []),
    (
        "qwen3-xml",
        "",
        "<think>x</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        '<parameter=tags>\n["a", "b"]\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>',
        "x",
        "",
        [("weather", '{"city": "12", "days": 3, "tags": ["a", "b"]}'), ("now", "{}")],
    ),
    ("qwen3-xml", "", "text <function=x>", "", "text <function=x>", []),
    (
        "glm",
        "",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"
        "</tool_call><tool_call>now</tool_call>",
        "",
        "",
        [("weather", '{"city": "Oslo", "days": 2}'), ("now", "{}")],
    ),
    (
        "llama3",
        "",
        '{"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "now", "parameters": {}}',
        "",
        "",
        [("weather", OSLO), ("now", "{}")],
    ),
    ("llama3", "", '{"name": "Bob", "age": 3} and more', "", '{"name": "Bob", "age": 3} and more', []),
    ("llama3", "", 'Sure: {"name": "weather", "parameters": {}}', "", 'Sure: {"name": "weather", "parameters": {}}', []),
    ("llama3", "", '<|python_tag|>{"type": "function", "name": "else", "parameters": {}}', "", "", [("else", "{}")]),
    (
        "mistral",
        "",
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "[x]"}}, {"name": "now", "arguments": {}, "id": "abcdefghi"}]',
        "",
        "",
        [("weather", '{"city": "[x]"}'), ("now", "{}")],
    ),
    ("mistral", "", "[THINK]a[/THINK]b [TOOL]", "a", "b [TOOL]", []),
    ("mistral", "", '[TOOL_CALLS]{"name"}', "", '[TOOL_CALLS]{"name"}', []),
    (
        "mistral-args",
        "",
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}',
        "",
        "",
        [("weather", OSLO), ("now", "{}")],
    ),
    (
        "deepseek",
        "<｜Assistant｜><think>\n",
        'I see\n</think>\n\nx<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "```"}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "I see",
        "x",
        [("weather", '{"city": "```"}'), ("now", "{}")],
    ),
    (
        "harmony",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
        "Think.",
        "",
        [("weather", OSLO)],
    ),
    ("harmony", "", "<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>Hi there", "T", "Hi there", []),
    ("think", "hello <think>\n", "a\n</think>\n\nb c", "a", "b c", []),
]


def parsed(template, pieces, prompt="", *, cut=False, tools=TOOLS, **more):
    parser = ResponseParser(template, prompt=prompt, tools=tools, **more)
    given = list(chain(*(parser.push(piece) for piece in pieces), parser.finish(cut=cut)))
    calls: list[ToolCall] = []
    add_calls(calls, [piece.call for piece in given if piece.call is not None])
    assert all(call.id and call.name for call in calls) and len({call.id for call in calls}) == len(calls)
    reasoning, text = "".join(piece.reasoning for piece in given), "".join(piece.text for piece in given)
    return reasoning, text, [(call.name, call.arguments) for call in calls]


def cuts(text, seed):
    chance = random.Random(seed)
    places = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(1, 9)))
    return [text[start:end] for start, end in pairwise([0, *places, len(text)])]


@pytest.mark.parametrize(("name", "prompt", "text", "reasoning", "answer", "calls"), SAMPLES)
def test_an_answer_is_the_same_however_its_text_is_cut(name, prompt, text, reasoning, answer, calls):
    template, _ = shipped(name)
    assert parsed(template, [text], prompt) == (reasoning, answer, calls)
    assert parsed(template, text, prompt) == (reasoning, answer, calls)
    for at in range(1, len(text)):
        assert parsed(template, [text[:at], text[at:]], prompt) == (reasoning, answer, calls), text[:at]
    for seed in range(20):
        assert parsed(template, cuts(text, seed), prompt) == (reasoning, answer, calls), seed


@pytest.mark.parametrize("name", FORMATS)
def test_so_is_nonsense_of_the_right_words(name):
    template, spec = shipped(name)
    anchors = [anchor for region in template.regions for anchor in (region.open, region.close) if anchor is not None]
    words = [literal for anchor in anchors for literal in anchor.literals]
    words += [
        *spec.call.replace("NAME", "weather").replace("ARGUMENTS", OSLO).split(),
        *spec.found_by[0],
        "{",
        '"name": "now"',
        "}",
        " ",
        "\n",
    ]
    for seed in range(25):
        chance = random.Random(seed)
        text = "".join(chance.choice(words) for _ in range(12))
        whole = parsed(template, [text])
        assert parsed(template, text) == whole, text
        for cut in range(5):
            assert parsed(template, cuts(text, cut), "") == whole, text


def test_without_tools_a_call_is_text():
    template, _ = shipped("hermes")
    text = '<think>a</think><tool_call>{"name": "now"}</tool_call>'
    assert parsed(template, [text], tools={}) == ("a", '<tool_call>{"name": "now"}</tool_call>', [])


def test_arguments_come_while_they_are_written():
    parser = ResponseParser(shipped("hermes")[0], tools=TOOLS)
    assert parser.push('<tool_call>\n{"name": "weather", ') == []
    first, second = parser.push('"arguments": {"city": "Os')
    assert (first.call.name, first.call.index, second.call.arguments) == ("weather", 0, '{"city": "Os')
    assert [piece.call.arguments for piece in parser.push('lo"}}')] == ['lo"}']
    assert parser.push("</tool_call>") == []


def test_json_that_calls_nothing_is_text_as_soon_as_that_is_known():
    parser = ResponseParser(shipped("llama3")[0], tools=TOOLS)
    assert parser.push('{"name": "Bo') == []
    assert "".join(piece.text for piece in parser.push('b", "age": ')) == '{"name": "Bob", "age": '
    assert [piece.text for piece in parser.push("3}")] == ["3}"]


def test_what_the_prompt_ends_with_is_not_the_answers():
    assert parsed(shipped("hermes")[0], ["b"], "<|im_start|>assistant\nif a <") == ("", "b", [])


def test_an_answer_that_is_cut_off_keeps_what_was_written_of_its_call():
    template, _ = shipped("hermes")
    assert parsed(template, ['<tool_call>{"name": "weather", "arguments": {"city": "Os'], cut=True)[2] == [("weather", '{"city": "Os')]
    assert parsed(template, ['<tool_call>{"name": "weather", "arg'], cut=True)[2] == [("weather", "")]
    xml = "<tool_call><function=weather><parameter=city>Oslo</parameter><parameter=da"
    assert parsed(shipped("qwen3-xml")[0], [xml], cut=True)[2] == [("weather", '{"city": "Oslo"')]


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral-args"])
def test_one_call_is_enough_where_only_one_is_wanted(name):
    template, spec = shipped(name)
    key = template.calls.calls.name.key
    call = spec.call.replace("NAME", '"now"' if key else "now").replace("ARGUMENTS", "{}")
    alone = ResponseParser(template, tools=TOOLS, sole=True)
    pieces = [piece for text in (f"{spec.before}{call}", *" and more") for piece in alone.push(text)]
    assert not any(piece.text for piece in pieces)
    text = f"{spec.before}{call}{spec.between}{call}{spec.after} and more"
    parser = ResponseParser(template, tools=TOOLS, sole=True)
    calls = [piece.call for character in text for piece in parser.push(character) if piece.call is not None]
    assert {call.index for call in calls} == {0} and parser.enough and parser.num_calls == 1


def test_what_is_kept_does_not_grow_with_the_answer():
    parser = ResponseParser(shipped("hermes")[0], tools=TOOLS)
    for _ in range(2000):
        parser.push("a word < and <tool_call ")
    assert len(parser._buffer) <= 2 * MAX_ANCHOR


def test_an_anchor_that_never_ends_is_text():
    text = "<tool_call><function=" + "x" * 2 * MAX_ANCHOR
    assert parsed(shipped("qwen3-xml")[0], text) == ("", text, [])


def test_a_template_of_a_tokenizer_is_read_as_transformers_does():
    from transformers.utils.chat_parsing import parse_response

    template = {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"<\|assistant\|>\n?",
        "fields": {
            "reasoning_content": {"open_pattern": r"<think>\s*", "close": "</think>"},
            "tool_calls": {
                "open": "<call>",
                "close": "</call>",
                "repeats": True,
                "content": "json",
                "content_args": {"unquoted_keys": True},
                "transform": {"type": "function", "function": {"name": "{content.tool}", "arguments": "{content.with}"}},
            },
            "content": {},
        },
    }
    text = '<think>\nhm</think>Well.<call>{tool:"weather",with:{city:"Oslo"}}</call>'
    theirs = parse_response(text, template, prefix="<|assistant|>")
    function = theirs["tool_calls"][0]["function"]
    wanted = theirs["reasoning_content"], theirs["content"], [(function["name"], json.dumps(function["arguments"]))]
    ours = template_of("own", template)
    assert parsed(ours, [text], "<|assistant|>") == parsed(ours, text, "<|assistant|>") == wanted


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"tool_calls": {"close": "x"}}, "needs `open`"),
        ({"content": {"content": "json"}}, "must be plain text"),
        ({"mood": {"open": "x"}}, "has no place"),
        ({"content": {}, "thinking": {}}, "at most one"),
        ({"thinking": {"open_pattern": "("}}, "no regular expression"),
        ({"thinking": {"open": "", "close": "x"}}, "must not be empty"),
        ({"thinking": {"open": "x", "open_pattern": "x"}}, "exclude each other"),
        ({"thinking": {"opens": "x"}}, "unknown field `opens`"),
    ],
)
def test_a_template_that_cannot_be_read_says_why(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        template_of("x", {"start_anchor": "a", "fields": fields})
