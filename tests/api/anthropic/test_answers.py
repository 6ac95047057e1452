"""What goes out: deltas as Anthropic's message, whole and in events."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic.types import Message as SdkMessage
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from fairlead.api.anthropic.answers import Messages, encode
from fairlead.core.generation import Delta, ToolCall, Usage

USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4, reasoning_tokens=2)
EVENT = TypeAdapter[Any](RawMessageStreamEvent)


def answer(**more: Any) -> Messages:
    return Messages("msg_1", "m", **{"max_tokens": 10, "max_model_len": 100, **more})


def whole(delta: Delta, **more: Any) -> SdkMessage:
    return SdkMessage.model_validate(json.loads(encode(answer(**more).whole(delta))), strict=True)


def told(*deltas: Delta) -> Iterator[tuple[Any, ...]]:
    """The events but for the first two, as far as they differ, each checked by the SDK's own types."""
    one = answer()
    for each in [event for delta in deltas for event in one.events(delta)]:
        name, data = each.decode().removesuffix("\n\n").split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event, strict=True)
        match event["type"]:
            case "content_block_start":
                yield "start", event["index"], event["content_block"]["type"]
            case "content_block_delta":
                yield event["index"], *list(event["delta"].values())[1:]
            case "content_block_stop":
                yield "stop", event["index"]
            case "message_delta":
                yield event["delta"]["stop_reason"], event["delta"]["stop_sequence"]


def test_thought_then_text_then_calls():
    assert list(
        told(
            Delta(reasoning="a"),
            Delta(reasoning="b"),
            Delta(),
            Delta(text="c"),
            Delta(tool_calls=[ToolCall(index=0, id="i", name="f")]),
            Delta(tool_calls=[ToolCall(index=0, arguments='{"x":1}'), ToolCall(index=1, id="j", name="g", arguments="{}")]),
            Delta(finish_reason="tool_calls", usage=USAGE),
        )
    ) == [
        *(("start", 0, "thinking"), (0, "a"), (0, "b"), (0, "fairlead"), ("stop", 0)),
        *(("start", 1, "text"), (1, "c"), ("stop", 1)),
        *(("start", 2, "tool_use"), (2, '{"x":1}'), ("stop", 2)),
        *(("start", 3, "tool_use"), (3, "{}"), ("stop", 3)),
        ("tool_use", None),
    ]


def test_what_a_slow_reader_let_be_joined_stays_in_order():
    first = Delta(tool_calls=[ToolCall(index=0, id="i", name="f", arguments="{")])
    rest = [ToolCall(index=0, arguments="}"), ToolCall(index=1, id="j", name="g", arguments="{}")]
    assert list(told(first, Delta(text="then", tool_calls=rest, finish_reason="tool_calls", usage=USAGE))) == [
        *(("start", 0, "tool_use"), (0, "{"), (0, "}"), ("stop", 0)),
        *(("start", 1, "text"), (1, "then"), ("stop", 1)),
        *(("start", 2, "tool_use"), (2, "{}"), ("stop", 2)),
        ("tool_use", None),
    ]


def test_an_answer_of_nothing():
    assert list(told(Delta(finish_reason="stop", usage=USAGE))) == [("end_turn", None)]
    assert whole(Delta(finish_reason="stop", usage=USAGE)).content == []


def test_usage_tells_what_was_cached_and_what_was_thought():
    usage = whole(Delta(text="x", finish_reason="stop", usage=USAGE)).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (3, 4, 5)
    assert usage.output_tokens_details is not None
    assert usage.output_tokens_details.thinking_tokens == 2


def test_a_call_that_is_nested_too_deeply_is_no_call():
    assert whole(Delta(tool_calls=[ToolCall(index=0, id="i", name="f", arguments="[" * 5000)], usage=USAGE)).content == []


def test_half_a_call_is_no_call():
    calls = [ToolCall(index=0, id="i", name="f", arguments='{"x":1}'), ToolCall(index=1, id="j", name="g", arguments='{"y":')]
    answered = whole(Delta(tool_calls=calls, finish_reason="length", usage=USAGE), max_tokens=5)
    assert [block.name for block in answered.content if block.type == "tool_use"] == ["f"]
    assert answered.stop_reason == "max_tokens"


@pytest.mark.parametrize(
    ("delta", "bounds", "reason"),
    [
        (Delta(finish_reason="stop"), {}, ("end_turn", None)),
        (Delta(finish_reason="stop", stop_reason=7), {}, ("end_turn", None)),
        (Delta(finish_reason="stop", stop_reason="so"), {}, ("stop_sequence", "so")),
        (Delta(finish_reason="tool_calls"), {}, ("tool_use", None)),
        (Delta(finish_reason="content_filter"), {}, ("refusal", None)),
        (Delta(finish_reason="length"), {"max_tokens": 5}, ("max_tokens", None)),
        (Delta(finish_reason="length"), {"max_model_len": 12}, ("model_context_window_exceeded", None)),
        (Delta(finish_reason="length"), {"max_tokens": 5, "max_model_len": 12}, ("max_tokens", None)),
        (Delta(finish_reason="length"), {"max_model_len": 0}, ("max_tokens", None)),
        # of a bound that the gateway lowered
        (Delta(finish_reason="length"), {}, ("max_tokens", None)),
    ],
)
def test_why_it_stops(delta, bounds, reason):
    delta.usage = USAGE
    answered = whole(delta, **bounds)
    assert (answered.stop_reason, answered.stop_sequence) == reason
