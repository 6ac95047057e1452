"""A conversation in Anthropic's blocks, as the engine is asked it."""

import json
from typing import Any

import pytest

from fairlead.api.anthropic.bodies import CountBody, MessagesBody
from fairlead.api.anthropic.conversation import conversation_of, prompt_of
from fairlead.api.openai.errors import BadParameter, decode_body
from fairlead.core.generation import Chat, Generate, Message, ToolChoice

CALL = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "18 degrees"}
TOOL = {"name": "weather", "input_schema": {"type": "object"}, "strict": True}


def body(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}).encode()


def prompt(**more: Any) -> Generate:
    return prompt_of(decode_body(body(max_tokens=9, **more), MessagesBody))


def chat(*turns: Any, **more: Any) -> Chat:
    messages = [{"role": role, "content": content} for role, content in turns]
    return conversation_of(decode_body(body(messages=messages, **more), CountBody))[0]


def wrong(**more: Any) -> tuple[str | None, str]:
    with pytest.raises(BadParameter) as caught:
        prompt(**more)
    return caught.value.param, caught.value.message


def test_texts_of_a_turn_are_one_and_system_comes_first():
    blocks = [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    assert chat(("user", blocks), ("user", "three"), system=[{"type": "text", "text": "Be brief."}]).messages == [
        Message(role="system", content="Be brief."),
        Message(role="user", content="one\ntwo\nthree"),
    ]


def test_a_loop_of_tools_with_what_was_thought():
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    answer = [thought, {"type": "redacted_thinking", "data": "zzz"}, {"type": "text", "text": "let me look"}, CALL]
    result = [{**RESULT, "is_error": True}, {"type": "text", "text": "and now?"}]
    assert chat(("user", "hi"), ("assistant", answer), ("user", result)).messages[1:] == [
        Message(
            role="assistant",
            content="let me look",
            reasoning="hm",
            tool_calls=[{"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}],
        ),
        Message(role="tool", content="Error: 18 degrees", tool_call_id="t1", name="weather"),
        Message(role="user", content="and now?"),
    ]


def test_an_answer_that_is_begun_is_continued():
    begun = chat(("user", "hi"), ("assistant", "The best answer is ("))
    assert (begun.add_generation_prompt, begun.continue_final_message) == (False, True)
    empty = chat(("user", "hi"), ("assistant", ""))
    assert (empty.add_generation_prompt, len(empty.messages)) == (True, 1)


def test_examples_of_a_tools_input_stand_in_its_description():
    asked = prompt(tools=[{**TOOL, "description": "d", "input_examples": [{"city": "Oslo"}, {}]}])
    assert asked.chat is not None
    assert asked.chat.tools[0]["function"]["description"] == 'd\n\nExamples of its input:\n{"city":"Oslo"}\n{}'
    alone = prompt(tools=[{**TOOL, "input_examples": [{"city": "Oslo"}]}])
    assert alone.chat is not None
    assert alone.chat.tools[0]["function"]["description"] == 'Examples of its input:\n{"city":"Oslo"}'


def test_tools_and_which_of_them():
    chosen = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    asked = prompt(tools=[{**TOOL, "type": "custom", "description": "d"}], tool_choice=chosen)
    assert asked.tool_choice == ToolChoice(mode="named", name="weather", parallel=False)
    assert asked.chat is not None
    assert asked.chat.tools == [
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}, "strict": True}}
    ]
    assert prompt(tools=[TOOL], tool_choice={"type": "any"}).tool_choice.mode == "required"
    assert prompt(tools=[TOOL], tool_choice={"type": "auto"}).tool_choice == prompt().tool_choice == ToolChoice()
    none = prompt(tools=[TOOL], tool_choice={"type": "none"})
    assert none.chat is not None
    assert (none.tool_choice.mode, none.chat.tools) == ("none", [])


def test_how_it_is_chosen_and_where_it_stops():
    asked = prompt(temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["x"], stream=True)
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop) == (0.5, 0.9, 3, ("x",))
    assert (sampling.max_tokens, sampling.fits_context, asked.parsed, asked.stream) == (9, True, True, True)
    assert prompt().sampling.temperature is None


def test_what_the_answer_must_look_like():
    guide = prompt(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}}).guide
    assert guide is not None
    assert (guide.kind, json.loads(guide.text), guide.parameter) == ("json", {"type": "object"}, "output_config.format.schema")


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"max_tokens": 2048, "thinking": {"type": "enabled", "budget_tokens": 1024}}, {"thinking": True, "thinking_budget": 1024}),
        ({"thinking": {"type": "adaptive"}}, {"thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"thinking": False}),
        ({"output_config": {"effort": "xhigh"}}, {"reasoning_effort": "high"}),
        ({}, {}),
    ],
)
def test_how_much_it_shall_think_is_the_templates_business(given, arguments):
    if "thinking" in arguments:
        arguments["enable_thinking"] = arguments["thinking"]
    asked = prompt_of(decode_body(body(**{"max_tokens": 9, **given}), MessagesBody))
    assert asked.chat is not None
    assert asked.chat.template_kwargs == arguments


HELLO = {"role": "user", "content": "hello"}
CALLED = {"role": "assistant", "content": [CALL]}


@pytest.mark.parametrize(
    ("given", "parameter", "said"),
    [
        ({"messages": []}, "messages", "empty array"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "must not be empty"),
        ({"messages": [HELLO, CALLED]}, "messages[1]", "no 'tool_result'"),
        ({"messages": [HELLO, CALLED, HELLO]}, "messages[2]", "needs a 'tool_result' here: 't1'"),
        ({"messages": [HELLO, CALLED, {"role": "system", "content": "x"}]}, "messages[2]", "needs a 'tool_result'"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].tool_use_id", "no 'tool_use'"),
        ({"messages": [HELLO, {"role": "assistant", "content": [CALL, CALL]}]}, "messages[1].content[1].id", "another 'tool_use'"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages[0].content[0].type", "of this role"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "x": 1}]}]}, "messages[0].content[0].type", "text only"),
        (
            {"messages": [HELLO, CALLED, {"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
            "messages[2].content[0].content[0].type",
            "text only",
        ),
        (
            {
                "messages": [
                    HELLO,
                    {"role": "assistant", "content": [{**CALL, "input": {"n": 1 << 70}}]},
                    {"role": "user", "content": [RESULT]},
                ]
            },
            "messages",
            "64 bits",
        ),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name", ""),
        ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools[0].input_schema", "'/type'"),
        ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "tools[0].type", "Anthropic's own"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", ""),
        ({"tools": [{**TOOL, "input_examples": ["Oslo"]}]}, "tools[0].input_examples[0]", ""),
        ({"thinking": {"type": "between_tools"}}, "thinking.type", "adaptive"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name", ""),
        ({"tool_choice": {"type": "any"}}, "tool_choice", ""),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens", "less than 'max_tokens'"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "Missing"),
        ({"thinking": {"type": "disabled", "budget_tokens": 1024}}, "thinking.budget_tokens", "belongs to"),
        ({"stop_sequences": [""]}, "stop_sequences", "empty string"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type", ""),
        ({"container": "c"}, "container", ""),
    ],
)
def test_what_is_wrong_is_named(given, parameter, said):
    named, message = wrong(**given)
    assert named == parameter, message
    assert said in message
