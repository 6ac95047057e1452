"""Tools in a request, and calls and reasoning in its answers, as OpenAI has them."""

import json

import pytest
from openai.types.chat import ChatCompletion as SdkChat
from openai.types.chat import ChatCompletionChunk as SdkChunk

from fairlead.api.openai.answers import Chats, encode
from fairlead.api.openai.errors import BadParameter
from fairlead.api.openai.tools import MAX_DEPTH, MAX_TOOLS, tools_of
from fairlead.core.generation import Delta, ToolCall, ToolChoice, Usage

NAMED = {"type": "function", "function": {"name": "f"}}


def tool(name="f", **function):
    return {"type": "function", "function": {"name": name, **function}}


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("choice", "parallel", "chosen"),
    [
        (None, None, ToolChoice()),
        ("auto", True, ToolChoice()),
        ("auto", False, ToolChoice(parallel=False)),
        ("required", None, ToolChoice(mode="required")),
        (NAMED, False, ToolChoice(mode="named", name="f", parallel=False)),
        (allowed("auto", "f"), None, ToolChoice()),
    ],
)
def test_how_a_model_may_choose(choice, parallel, chosen):
    parameters = {"type": "object", "properties": {"a": {"type": ["string", "null"], "enum": ["x", None]}}, "additionalProperties": False}
    shown, told = tools_of([tool(parameters=parameters, description="d", strict=True)], choice, parallel)
    assert shown == [tool(description="d", parameters=parameters, strict=True)]
    assert told == chosen


def test_all_tools_are_shown_where_some_may_be_called():
    tools = [tool("a"), tool("b"), tool("c")]
    assert tools_of(tools, allowed("auto", "c", "a", "c"), None) == (tools_of(tools, None, None)[0], ToolChoice(allowed=("a", "c")))
    shown, choice = tools_of(tools, allowed("required", "b"), None)
    assert (len(shown), choice) == (3, ToolChoice(mode="required", allowed=("b",)))
    assert [choice.permits(name) for name in "abc"] == [False, True, False]


def test_where_none_may_be_called_none_is_shown():
    assert tools_of([tool()], "none", None) == ([], ToolChoice(mode="none"))
    assert tools_of(None, "none", None) == tools_of([], "none", True) == ([], ToolChoice(mode="none"))
    assert tools_of(None, "auto", None) == ([], ToolChoice())


@pytest.mark.parametrize(
    ("tools", "choice", "param", "says"),
    [
        ([5], None, "tools[0]", "object"),
        ([{"type": "custom", "custom": {}}], None, "tools[0].type", "'function'"),
        ([{"type": "function"}], None, "tools[0].function", "Missing"),
        ([tool("a b")], None, "tools[0].function.name", "regex"),
        ([tool(), tool("g"), tool()], None, "tools[2].function.name", "another tool"),
        ([tool(colour="red")], None, "tools[0].function.colour", "Unknown"),
        ([tool(str(number)) for number in range(MAX_TOOLS + 1)], None, "tools", str(MAX_TOOLS)),
        ([tool()], "always", "tool_choice", "'required'"),
        ([tool()], {"type": "function", "function": {"name": "g"}}, "tool_choice.function.name", "'g'"),
        ([tool()], {"type": "allowed_tools"}, "tool_choice.allowed_tools", "Missing"),
        ([tool()], allowed("none", "f"), "tool_choice.allowed_tools.mode", "'required'"),
        ([tool()], allowed("auto"), "tool_choice.allowed_tools.tools", "length"),
        ([tool()], allowed("auto", "f", "g"), "tool_choice.allowed_tools.tools[1].function.name", "'g'"),
        ([tool()], {"type": "any"}, "tool_choice.type", "'function'"),
        ([tool()], 5, "tool_choice", "object"),
        (None, "required", "tool_choice", "'tools'"),
        (None, NAMED, "tool_choice", "'tools'"),
    ],
)
def test_what_is_wrong_with_tools_is_named(tools, choice, param, says):
    with pytest.raises(BadParameter, match=says) as refused:
        tools_of(tools, choice, None)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "array"}, "/type"),
        ({"properties": []}, "/properties"),
        ({"properties": {"a": 3}}, "/properties/a"),
        ({"properties": {"a/b~c": {"type": "strin"}}}, "/properties/a~1b~0c/type"),
        ({"properties": {"a": {"items": {"enum": []}}}}, "/properties/a/items/enum"),
        ({"anyOf": [{}, {"minLength": -1}]}, "/anyOf/1/minLength"),
        ({"$defs": {"x": {"required": "a"}}}, "/$defs/x/required"),
        ({"additionalProperties": {"pattern": 5}}, "/additionalProperties/pattern"),
        (nested(MAX_DEPTH + 1), "/properties/a" * MAX_DEPTH),
    ],
)
def test_a_broken_schema_is_pointed_at(schema, pointer):
    with pytest.raises(BadParameter) as refused:
        tools_of([tool("ok"), tool(parameters=schema)], None, None)
    assert refused.value.param == "tools[1].function.parameters"
    assert f"at '{pointer}':" in refused.value.message


USAGE = Usage(prompt_tokens=3, completion_tokens=9, reasoning_tokens=4)
FIRST = ToolCall(index=0, id="call_a", name="f", arguments="")


def test_a_streamed_call_begins_with_its_name_and_goes_on_with_its_arguments():
    deltas = [
        Delta(reasoning="hm"),
        Delta(tool_calls=[FIRST]),
        Delta(tool_calls=[ToolCall(index=0, arguments='{"a"')]),
        Delta(tool_calls=[ToolCall(index=0, arguments=": 1}"), ToolCall(index=1, id="call_b", name="g", arguments="{}")]),
        Delta(finish_reason="tool_calls", usage=USAGE),
    ]
    answer = Chats("id", "m")
    chunks = [json.loads(chunk) for delta in deltas for chunk in answer.chunks(0, delta)]
    for chunk in chunks:
        SdkChunk.model_validate(chunk)
    told = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert told[1] == {"reasoning": "hm", "reasoning_content": "hm"}
    assert told[2]["tool_calls"] == [{"index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": ""}}]
    assert told[3]["tool_calls"] == [{"index": 0, "function": {"arguments": '{"a"'}}]
    assert [call["index"] for call in told[4]["tool_calls"]] == [0, 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_whole_answer_has_its_calls():
    call = ToolCall(index=0, id="call_a", name="f", arguments='{"a": 1}')
    delta = Delta(reasoning="hm", tool_calls=[call], finish_reason="tool_calls", usage=USAGE)
    whole = json.loads(encode(Chats("id", "m").whole([[delta]])))
    told = SdkChat.model_validate(whole).choices[0]
    assert (told.message.content, told.finish_reason) == (None, "tool_calls")
    (called,) = told.message.tool_calls or []
    assert (called.id, called.type, called.function.name, called.function.arguments) == ("call_a", "function", "f", '{"a": 1}')
    assert whole["choices"][0]["message"]["reasoning"] == whole["choices"][0]["message"]["reasoning_content"] == "hm"
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


def test_an_answer_without_calls_says_nothing_of_them():
    whole = json.loads(encode(Chats("id", "m").whole([[Delta(text="hi", finish_reason="stop", usage=USAGE)]])))
    assert whole["choices"][0]["message"] == {"content": "hi", "role": "assistant", "refusal": None}
