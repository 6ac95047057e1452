"""Answers on their way out: of an engine, of a model, of another server."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.core.errors import Filtered, ModelError
from fairlead.core.generation import Delta, TokenLogprob, ToolCall, Usage, add_calls
from fairlead.core.policy import FilterPolicy
from fairlead.core.request import Response
from fairlead.core.tensors import object_array
from fairlead.gateway.filters.filters import Filters, OutputFilter

MAIL = "jane@example.com"
REDACT = Filters.of(FilterPolicy(pii="redact"))
BOTH = Filters.of(FilterPolicy(pii="redact", deny=("bomb",)))


def output(filters: Filters = BOTH, *, stream: bool = False) -> OutputFilter:
    found = filters.output(stream=stream)
    assert found is not None
    return found


def of(delta: Delta, **rest: Any) -> Response:
    return Response(model="m", version="1", delta=delta, **rest)


def run(filter: OutputFilter, *responses: Response) -> list[Response]:
    return [out for response in responses for out in filter.push(response)] + list(filter.finish())


def deltas(responses: list[Response]) -> list[Delta]:
    return [response.delta for response in responses if response.delta is not None]


def test_a_policy_that_does_not_look_at_answers_has_no_filter_for_them() -> None:
    assert Filters.of(FilterPolicy(pii="redact", output=False)).output() is None
    assert Filters.of(FilterPolicy(injection="block", max_chars=5)).output() is None


def test_an_answer_without_findings_goes_out_as_it_came() -> None:
    response = of(Delta(text="The harbour is closed.", token_ids=[1, 2], finish_reason="stop", usage=Usage(completion_tokens=2)))
    filter = output()
    assert run(filter, response) == [response]
    assert filter.push(response)[0] is not None
    assert filter.rules == ()


def test_a_whole_answer_is_redacted_and_its_tokens_do_not_tell_what_was_there() -> None:
    logprobs = [TokenLogprob(7, MAIL, MAIL.encode(), -0.1, 1)]
    (out,) = run(output(), of(Delta(text=f"ask {MAIL}.", token_ids=[1, 7], logprobs=logprobs, finish_reason="stop")))
    assert out.delta == Delta(text="ask [EMAIL].", token_ids=[], logprobs=[], finish_reason="stop")


def test_a_stream_is_held_back_only_where_it_must_be_and_tokens_stay_with_their_text() -> None:
    pieces = ["The ", "har", "bour ", "mail is ja", "ne@exam", "ple.com", " ok", " now"]
    filter = output()
    sent = [of(Delta(text=text, token_ids=[number])) for number, text in enumerate(pieces)]
    sent.append(of(Delta(finish_reason="stop", usage=Usage(completion_tokens=8))))
    out = deltas(run(filter, *sent))
    assert "".join(delta.text for delta in out) == "The harbour mail is [EMAIL] ok now"
    assert [token for delta in out for token in delta.token_ids] == [0, 1, 2, 6, 7]
    assert out[-1].finish_reason == "stop" and out[-1].usage == Usage(completion_tokens=8)
    assert out[0].text == "The " and len(out) >= 5
    assert filter.rules == ("pii.email",)


def test_reasoning_and_arguments_of_calls_are_searched_too_each_on_its_own() -> None:
    arguments = ['{"to": "ja', "ne@example", '.com"}']
    sent = [Delta(reasoning="ask jane@ex", token_ids=[0]), Delta(reasoning="ample.com first", token_ids=[1])]
    sent += [Delta(text="I write ", token_ids=[2])]
    sent += [
        Delta(tool_calls=[ToolCall(index=0, id="c" * (not at), name="mail" * (not at), arguments=text)])
        for at, text in enumerate(arguments)
    ]
    sent += [Delta(tool_calls=[ToolCall(index=1, id="d", name="now", arguments="{}")]), Delta(finish_reason="tool_calls")]
    out = deltas(run(output(), *map(of, sent)))
    calls: list[ToolCall] = []
    add_calls(calls, [call for delta in out for call in delta.tool_calls])
    assert "".join(delta.reasoning for delta in out) == "ask [EMAIL] first"
    assert "".join(delta.text for delta in out) == "I write "
    assert [(call.id, call.name, call.arguments) for call in calls] == [("c", "mail", '{"to": "[EMAIL]"}'), ("d", "now", "{}")]
    assert [token for delta in out for token in delta.token_ids] == [2]
    assert out[-1].finish_reason == "tool_calls"
    # nothing of the reasoning comes behind the text
    kinds = [kind for delta in out for kind in ("reasoning", "text", "tool_calls") if getattr(delta, kind)]
    assert kinds == sorted(kinds, key=["reasoning", "text", "tool_calls"].index)


@pytest.mark.parametrize(
    "pieces",
    [
        [Delta(reasoning="a bomb it is"), Delta(text="so")],
        [Delta(text="so"), Delta(tool_calls=[ToolCall(index=0, id="c", name="f", arguments='{"what": "bomb"}')]), Delta(text="more")],
    ],
)
def test_a_choice_is_blocked_by_its_reasoning_and_its_calls_too(pieces: list[Delta]) -> None:
    out = deltas(run(output(), *map(of, [*pieces, Delta(finish_reason="stop")])))
    told = "".join(delta.reasoning + delta.text + "".join(call.arguments for call in delta.tool_calls) for delta in out)
    assert "bomb" not in told and "more" not in told
    assert [delta.finish_reason for delta in out if delta.finish_reason] == ["content_filter"]


def test_a_whole_answer_with_a_blocked_call_is_withheld_whole() -> None:
    call = ToolCall(index=0, id="c", name="f", arguments='{"what": "bomb"}')
    (out,) = deltas(run(output(), of(Delta(text="here", reasoning="hm", tool_calls=[call], finish_reason="tool_calls"))))
    assert out == Delta(finish_reason="content_filter")


def test_calls_that_hold_nothing_go_out_as_they_came() -> None:
    response = of(Delta(reasoning="hm.", tool_calls=[ToolCall(index=0, id="c", name="f", arguments="{}")], finish_reason="tool_calls"))
    assert run(output(), response)[0] is response


def test_a_blocked_choice_ends_with_content_filter_and_the_others_go_on() -> None:
    filter = output()
    sent = [
        of(Delta(index=0, text="how to build a bo", token_ids=[1])),
        of(Delta(index=1, text="how to bake ", token_ids=[2])),
        of(Delta(index=0, text="mb at ", token_ids=[3])),
        of(Delta(index=0, text="home", token_ids=[4])),
        of(Delta(index=1, text="a cake", token_ids=[5], finish_reason="stop")),
        of(Delta(index=0, finish_reason="length", usage=Usage(completion_tokens=5))),
    ]
    out = deltas(run(filter, *sent))
    first = [delta for delta in out if delta.index == 0]
    assert "".join(delta.text for delta in first) == "how to build a "
    assert [delta.finish_reason for delta in first if delta.finish_reason] == ["content_filter"]
    assert first[-1].usage == Usage(completion_tokens=5), "what it cost is still told"
    second = [delta for delta in out if delta.index == 1]
    assert "".join(delta.text for delta in second) == "how to bake a cake" and second[-1].finish_reason == "stop"
    assert filter.rules == ("deny",)


def test_a_blocked_answer_that_comes_as_one_is_withheld_as_one() -> None:
    (out,) = run(
        output(), of(Delta(text="to build a bomb you need", token_ids=[1, 2], finish_reason="stop", usage=Usage(completion_tokens=2)))
    )
    assert out.delta == Delta(finish_reason="content_filter", usage=Usage(completion_tokens=2))


def test_an_answer_that_breaks_off_still_gives_what_was_held() -> None:
    filter = output()
    out = run(filter, of(Delta(text="write to ja")), of(Delta(text="ne")))
    assert "".join(delta.text for delta in deltas(out)) == "write to jane"


def test_headers_of_a_response_that_was_held_come_with_the_next() -> None:
    out = run(
        output(), of(Delta(text="jane", token_ids=[1]), headers={"x-a": "1"}), of(Delta(text="@ x ", token_ids=[2], finish_reason="stop"))
    )
    assert [response.headers for response in out] == [{"x-a": "1"}]


def test_what_was_told_of_the_prompt_is_not_lost() -> None:
    told = [None, TokenLogprob(1, "a", b"a", -1.0, 1)]
    out = deltas(run(output(), of(Delta(text="jane", prompt_logprobs=told)), of(Delta(text=" ", finish_reason="stop"))))
    assert [delta.prompt_logprobs for delta in out if delta.prompt_logprobs is not None] == [told]


def test_vectors_pass() -> None:
    response = of(Delta(vector=b"1234", usage=Usage(prompt_tokens=1)))
    assert run(output(), response) == [response]


# Tensors


def test_tensors_of_text_are_filtered_element_by_element() -> None:
    filter = output()
    response = Response(model="m", version="1", outputs={"names": object_array([b"fine", MAIL.encode()], (2,)), "x": np.zeros(2)})
    (out,) = run(filter, response)
    assert out.outputs["names"].tolist() == [b"fine", b"[EMAIL]"]
    assert out.outputs["x"] is response.outputs["x"]
    assert filter.rules == ("pii.email",)
    with pytest.raises(Filtered) as refused:
        run(output(), Response(model="m", version="1", outputs={"names": object_array([b"a bomb"], (1,))}))
    assert refused.value.rule == "deny" and "a bomb" not in refused.value.message


def test_the_text_output_of_a_stream_is_one_text() -> None:
    pieces = [b"mail ja", b"ne@example", b".com now"]
    responses = [Response(model="m", version="1", outputs={"text_output": object_array([piece], (1,))}) for piece in pieces]
    out = run(output(stream=True), *responses)
    assert b"".join(response.outputs["text_output"][0] for response in out) == b"mail [EMAIL] now"


# Another server's


def whole(body: dict[str, Any], filters: Filters = BOTH, **rest: Any) -> Response:
    (out,) = run(output(filters), Response(model="m", version="1", raw=json.dumps(body).encode(), **rest))
    return out


def test_a_whole_answer_of_another_server_goes_on_byte_for_byte_unless_something_is_found() -> None:
    raw = b'{ "choices": [{"message": {"content": "fine"}}], "usage": {"x": 1.10} }'
    (out,) = run(output(), Response(model="m", version="1", raw=raw))
    assert out.raw is raw
    error = Response(model="m", version="1", raw=MAIL.encode(), status=400)
    assert run(output(), error) == [error]


def test_a_whole_answer_of_another_server_is_redacted_or_withheld_by_choice() -> None:
    choices = [
        {"index": 0, "message": {"role": "assistant", "content": f"ask {MAIL}"}, "finish_reason": "stop", "logprobs": {"content": [MAIL]}},
        {"index": 1, "message": {"role": "assistant", "content": "a bomb"}, "finish_reason": "stop"},
        {"index": 2, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop", "logprobs": {"content": ["fine"]}},
        {"index": 3, "text": "a bomb", "finish_reason": "length"},
    ]
    body = json.loads(whole({"choices": choices, "usage": {"total_tokens": 4}}).raw or b"")
    assert body["usage"] == {"total_tokens": 4}
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "ask [EMAIL]"}, "finish_reason": "stop", "logprobs": None},
        {"index": 1, "message": {"role": "assistant", "content": ""}, "finish_reason": "content_filter"},
        choices[2],
        {"index": 3, "text": "", "finish_reason": "content_filter"},
    ]


def test_tensors_of_another_server_are_searched() -> None:
    outputs = [{"name": "y", "datatype": "BYTES", "shape": [1], "data": [MAIL]}, {"name": "x", "datatype": "FP32", "data": [0.5]}]
    assert json.loads(whole({"outputs": outputs}).raw or b"")["outputs"][0]["data"] == ["[EMAIL]"]
    with pytest.raises(Filtered):
        whole({"outputs": [{"data": ["bomb"]}]})
    head = json.dumps({"outputs": [{"name": "y", "datatype": "FP32", "parameters": {"binary_data_size": 4}}]}).encode()
    binary = Response(model="m", version="1", raw=head + bytes(4), headers={"Inference-Header-Content-Length": str(len(head))})
    assert run(output(), binary) == [binary]
    text = head.replace(b"FP32", b"BYTES")
    with pytest.raises(ModelError):
        run(output(), Response(model="m", version="1", raw=text + bytes(4), headers={"inference-header-content-length": str(len(text))}))
    with pytest.raises(ModelError):
        run(output(), Response(model="m", version="1", raw=b'{"outputs": [}'))


def chunk(text: str | None, *, index: int = 0, finish: str | None = None, **delta: Any) -> bytes:
    content = {} if text is None else {"content": text}
    choice = {"index": index, "delta": {**delta, **content}, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c1", "object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


USAGE = b'data: {"id":"c1","choices":[],"usage":{"total_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def stream(filters: Filters, *parts: bytes) -> list[dict[str, Any]]:
    """The events that go out; the last must be [DONE]."""
    out = run(output(filters, stream=True), *(Response(model="m", version="1", raw=part) for part in parts))
    events = b"".join(response.raw or b"" for response in out).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def said(events: list[dict[str, Any]], index: int = 0, field: str = "content") -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice.get("delta", {}).get(field) or "" for choice in choices)


def test_events_without_findings_go_on_byte_for_byte() -> None:
    filter = output(stream=True)
    parts = [chunk("", role="assistant"), b": ping\n\n", chunk("All is "), chunk("well. "), chunk(None, finish="stop"), USAGE, DONE]
    for part in parts:
        (out,) = filter.push(Response(model="m", version="1", raw=part))
        assert out.raw is part
    assert filter.finish() == []


def test_events_are_redacted_across_their_borders() -> None:
    parts = [chunk("", role="assistant"), *map(chunk, ("ask ja", "ne@exa", "mple.com", " now")), chunk(None, finish="stop"), USAGE, DONE]
    events = stream(BOTH, *parts)
    assert said(events) == "ask [EMAIL] now"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [event["choices"][0]["finish_reason"] for event in events if event["choices"]][-1] == "stop"
    assert events[-1]["usage"] == {"total_tokens": 3}


def test_what_is_held_at_the_end_goes_out_before_it() -> None:
    for parts in (
        [chunk("mail to jane"), chunk(None, finish="stop"), DONE],
        [chunk("mail to jane"), DONE],
        [chunk("mail to "), chunk("jane", finish="stop"), DONE],
    ):
        assert said(stream(BOTH, *parts)) == "mail to jane"


def test_a_blocked_stream_ends_its_choice_and_tells_the_usage() -> None:
    parts = [
        chunk("a bo"),
        chunk("fine ", index=1),
        chunk("mb "),
        chunk("secret"),
        chunk(None, finish="length"),
        chunk("too", index=1, finish="stop"),
        USAGE,
        DONE,
    ]
    events = stream(BOTH, *parts)
    assert said(events) == "a "
    assert said(events, 1) == "fine too"
    reasons = {choice["index"]: choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]}
    assert reasons == {0: "content_filter", 1: "stop"}
    assert "secret" not in json.dumps(events)
    assert events[-1]["usage"]


def test_what_a_stream_ends_with_is_blocked_too() -> None:
    for parts in ([chunk("a bomb", finish="stop"), DONE], [chunk("a bomb"), chunk(None, finish="stop"), DONE], [chunk("a bomb"), DONE]):
        events = stream(BOTH, *parts)
        assert said(events) == "a "
        assert events[-1]["choices"][0]["finish_reason"] == "content_filter"


def test_reasoning_and_calls_of_tools_are_searched_as_texts_of_their_own() -> None:
    def call(arguments: str) -> bytes:
        return chunk(None, tool_calls=[{"index": 0, "function": {"arguments": arguments}}])

    parts = [
        chunk(None, reasoning_content="ask ja"),
        chunk("so: "),
        chunk(None, reasoning_content="ne@x.org"),
        call('{"to": "ja'),
        call('ne@x.org"}'),
        chunk(None, finish="tool_calls"),
        DONE,
    ]
    events = stream(REDACT, *parts)
    assert said(events, field="reasoning_content") == "ask [EMAIL]"
    assert said(events) == "so: "
    calls = [call for event in events for choice in event["choices"] for call in choice["delta"].get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"to": "[EMAIL]"}'


def test_events_of_kserve_are_one_text_too() -> None:
    parts = [b'data: {"model_name":"m","text_output":"ja"}\n\n', b'data: {"model_name":"m","text_output":"ne@x.org now"}\n\n']
    out = run(output(stream=True), *(Response(model="m", version="1", raw=part) for part in parts))
    events = [json.loads(line[6:]) for line in b"".join(response.raw or b"" for response in out).splitlines() if line]
    assert "".join(event["text_output"] for event in events) == "[EMAIL] now"
    with pytest.raises(Filtered):
        run(output(stream=True), Response(model="m", version="1", raw=b'data: {"text_output":"bomb "}\n\n'))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=8), st.sampled_from(["\n\n", "\r\n\r\n"]))
def test_it_does_not_matter_where_the_bytes_of_events_are_cut(cuts: list[int], end: str) -> None:
    parts = [
        chunk("", role="assistant"),
        *map(chunk, ("ask ja", "ne@exa", "mple.com", " or a bo", "mb", " x")),
        chunk(None, finish="stop"),
        DONE,
    ]
    data = b"".join(parts).replace(b"\n\n", end.encode())
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    out = run(output(stream=True), *(Response(model="m", version="1", raw=data[a:b]) for a, b in pairwise(places)))
    text = b"".join(response.raw or b"" for response in out).replace(b"\r\n", b"\n").decode()
    events = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
    assert said(events) == "ask [EMAIL] or a "
    assert "jane" not in text and "bomb" not in text


@pytest.mark.parametrize(
    "event", [b"data: {\n\n", b'data: {"choices": [1]}\n\n', b'data: {"choices": [{"index": "x"}]}\n\n', b"data: " + b"x" * (5 << 20)]
)
def test_events_that_cannot_be_read_do_not_pass(event: bytes) -> None:
    with pytest.raises(ModelError):
        run(output(stream=True), Response(model="m", version="1", raw=event))
