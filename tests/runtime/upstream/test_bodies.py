"""What is changed of a body on its way to an upstream, and what is read of the answer."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Usage
from fairlead.runtime.upstream.bodies import num_events, openai_body, tells_usage, usage_of, usage_of_events, whole_events

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


def body_of(text: str, *, model: str = "theirs", max_tokens: int | None = None, streams: bool = False) -> str:
    return openai_body(text.encode(), model, max_tokens=max_tokens, streams=streams)[0].decode()


# Requests


def test_the_model_gets_the_upstreams_name_and_all_else_stays_byte_for_byte() -> None:
    body = '{ "temperature": 0.10, "model":"ours" , "messages": [ {"role" : "user", "content":"\\u00e9"} ] }'
    assert body_of(body) == '{"temperature":0.10,"model":"theirs","messages":[ {"role" : "user", "content":"\\u00e9"} ]}'


@given(st.dictionaries(st.sampled_from(["messages", "temperature", "tools", "x", "stop"]), values, max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_value_but_the_models_name_changes(fields: dict[str, Any], streams: bool) -> None:
    sent, _ = openai_body(json.dumps({"model": "ours", **fields}).encode(), "theirs", max_tokens=None, streams=streams)
    got = json.loads(sent)
    assert got.pop("model") == "theirs"
    assert got.pop("stream_options", None) == ({"include_usage": True} if streams else None)
    assert got == fields


def test_of_a_field_that_comes_twice_only_the_one_that_was_checked_goes_on() -> None:
    assert body_of('{"model":"forbidden","n":9,"model":"allowed","n":1}', model="allowed") == '{"model":"allowed","n":1}'


@pytest.mark.parametrize("name", ["Model", "MAX_TOKENS", "Stream", "N", "Messages"])
def test_a_field_that_only_some_servers_would_read_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"unknown field `{name}`: did you mean"):
        body_of(f'{{"model":"m","{name}":1}}')


@pytest.mark.parametrize("body", ["", "[]", '"text"', "{", '{"a":1}}', "null"])
def test_what_is_no_json_object_is_refused(body: str) -> None:
    with pytest.raises(InvalidRequest, match="no JSON object"):
        body_of(body)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ('{"max_tokens":100}', '{"max_tokens":10,"model":"theirs"}'),
        ('{"max_tokens":5}', '{"max_tokens":5,"model":"theirs"}'),
        ('{"max_completion_tokens":100}', '{"max_completion_tokens":10,"model":"theirs"}'),
        ('{"max_tokens":7,"max_completion_tokens":100}', '{"max_tokens":7,"max_completion_tokens":10,"model":"theirs"}'),
        ('{"max_tokens":null}', '{"max_tokens":10,"model":"theirs"}'),
        ("{}", '{"model":"theirs","max_tokens":10}'),
    ],
)
def test_no_more_tokens_are_asked_for_than_allowed(given: str, sent: str) -> None:
    assert body_of(given, max_tokens=10) == sent


def test_a_length_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="`max_tokens` must be an integer"):
        body_of('{"max_tokens":"many"}', max_tokens=10)


@pytest.mark.parametrize(
    ("options", "sent", "asked"),
    [
        (None, {"include_usage": True}, True),
        ("null", {"include_usage": True}, True),
        ('{"include_usage":false,"include_obfuscation":true}', {"include_usage": True, "include_obfuscation": True}, True),
        ('{"include_usage":true}', {"include_usage": True}, False),
        ('{"include_usage":false,"include_usage":true}', {"include_usage": True}, False),
    ],
)
def test_a_stream_always_asks_for_its_usage(options: str | None, sent: dict[str, bool], asked: bool) -> None:
    given = '{"model":"m","stream":true' + (f',"stream_options":{options}}}' if options else "}")
    body, by_us = openai_body(given.encode(), "m", max_tokens=None, streams=True)
    assert (json.loads(body)["stream_options"], by_us) == (sent, asked)
    assert body.count(b"include_usage") == 1


# Answers

USAGE = b'{"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 8}}'


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        (b'{"choices":[],"usage":' + USAGE + b"}", Usage(prompt_tokens=12, completion_tokens=3, cached_tokens=8)),
        (b'{"usage" : ' + USAGE + b', "choices": []}\n', Usage(prompt_tokens=12, completion_tokens=3, cached_tokens=8)),
        (b'{"usage":{"prompt_tokens":4,"total_tokens":4}}', Usage(prompt_tokens=4)),
        (b'{"usage":{"prompt_tokens":4,"completion_tokens":-1}}', Usage(prompt_tokens=4)),
        (b'{"usage":{"prompt_tokens":2,"prompt_tokens_details":null},"by":"usage"}', Usage(prompt_tokens=2)),
        (b'{"usage":null}', None),
        (b'{"usage":{"prompt_tokens":"many"}}', None),
        (b'{"text":"usage"}', None),
        (b"", None),
    ],
)
def test_usage_is_read_from_an_answer_without_decoding_the_rest(answer: bytes, usage: Usage | None) -> None:
    assert usage_of(answer) == usage


@given(st.text(max_size=60))
def test_no_text_of_a_model_passes_for_usage(text: str) -> None:
    told = 'x","usage":{"prompt_tokens":0,"completion_tokens":0}' + text
    answer = json.dumps({"usage": {"prompt_tokens": 7, "completion_tokens": 9}, "text": told, "more": [text]}).encode()
    assert usage_of(answer) == Usage(prompt_tokens=7, completion_tokens=9)


def event(fields: object, newline: bytes = b"\n") -> bytes:
    return b"data: " + msgspec.json.encode(fields) + newline * 2


@given(
    st.lists(st.tuples(st.text(max_size=8), st.sampled_from([None, 3, 11])), min_size=1, max_size=6),
    st.sampled_from([b"\n", b"\r\n"]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_events_cut_anywhere_are_put_together_again(pieces: list[tuple[str, int | None]], newline: bytes, data: st.DataObject) -> None:
    events = [
        event({"choices": [text], "usage": None if tokens is None else {"completion_tokens": tokens}}, newline) for text, tokens in pieces
    ]
    stream = b"".join(events)
    cut = data.draw(st.integers(0, len(stream)))
    end = whole_events(stream[:cut])
    first, rest = stream[:end], stream[end:]
    assert first == b"".join(events[: num_events(first)])
    assert num_events(first) + num_events(rest) == len(events)
    usage, kept = usage_of_events(stream, drop=True)
    told = [tokens for _, tokens in pieces if tokens is not None]
    assert kept == stream
    assert usage == (Usage(completion_tokens=told[-1]) if told else None)
    assert tells_usage(stream) == bool(told)


def test_the_event_that_only_tells_usage_is_dropped_when_nobody_asked_for_it() -> None:
    text, usage, done = event({"choices": [1], "usage": None}), event({"choices": [], "usage": {"prompt_tokens": 1}}), b"data: [DONE]\n\n"
    assert usage_of_events(text + usage + done, drop=True) == (Usage(prompt_tokens=1), text + done)
    assert usage_of_events(text + usage + done, drop=False) == (Usage(prompt_tokens=1), text + usage + done)


def test_usage_beside_text_is_read_and_the_text_stays() -> None:
    both = event({"choices": [{"delta": {}}], "usage": {"completion_tokens": 5}})
    assert usage_of_events(both, drop=True) == (Usage(completion_tokens=5), both)


def test_an_event_that_is_no_json_is_passed_on() -> None:
    odd = b': ping "usage": {"completion_tokens": 5}\n\ndata: {"usage": {oops}}\n\n'
    assert usage_of_events(odd, drop=True) == (None, odd)
