"""What comes in: which bodies are taken, what they mean, and how the others are refused."""

import json
from typing import Any

import pytest

from fairlead.api.openai.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
    chat_of,
    texts_of,
)
from fairlead.api.openai.errors import NOT_SUPPORTED, RENAMED, BadParameter, decode_body
from fairlead.core.generation import Message, Sampling

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatBody:
    return decode_body(json.dumps({"model": "m", "messages": HELLO, **fields}).encode(), ChatBody)


def completion(**fields: Any) -> CompletionBody:
    return decode_body(json.dumps({"model": "m", "prompt": "hello", **fields}).encode(), CompletionBody)


def refused(ask, **fields: Any) -> tuple[str, str | None, str | None]:
    """(message, param, code)."""
    with pytest.raises(BadParameter) as caught:
        body = ask(**fields)
        body.complete()
        if isinstance(body, ChatBody):
            chat_of(body)
    return caught.value.message, caught.value.param, caught.value.code


# What sampling is asked for


def test_a_bare_chat_leaves_everything_to_the_model():
    assert chat().complete() == Sampling()


def test_a_bare_completion_is_sixteen_tokens_long():
    assert completion().complete() == Sampling(max_tokens=16)


def test_every_sampling_parameter_arrives():
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": -3,
        "presence_penalty": 1,
        "frequency_penalty": -2,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 1,
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "prompt_logprobs": 1,
    }
    more = {"stop": ["a", "b"], "stop_token_ids": [7], "logit_bias": {"5": -100}, "max_tokens": 9}
    expected = Sampling(**fields, stop=("a", "b"), stop_token_ids=(7,), logit_bias={5: -100.0}, max_tokens=9, logprobs=3)
    assert chat(**fields, **more, logprobs=True, top_logprobs=3).complete() == expected
    assert completion(**fields, **more, logprobs=3).complete() == expected


def test_one_stop_string_needs_no_list():
    assert chat(stop="\n").complete().stop == ("\n",)


def test_null_is_the_same_as_leaving_out():
    names = ("temperature", "stop", "n", "stream", "stream_options", "logit_bias", "seed", "user", "response_format", "tools")
    assert chat(**dict.fromkeys(names)).complete() == Sampling()


def test_log_probabilities_of_a_chat_without_alternatives():
    assert chat(logprobs=True).complete().logprobs == 0
    assert chat(logprobs=False).complete().logprobs is None


def test_max_completion_tokens_is_the_newer_name():
    assert chat(max_completion_tokens=5).complete().max_tokens == 5


def test_labels_and_what_has_one_meaning_pass():
    labels = {"user": "me", "metadata": {"run": "7"}, "safety_identifier": "s", "prompt_cache_key": "k"}
    meanings = {"store": False, "service_tier": "auto", "modalities": ["text"], "response_format": {"type": "text"}}
    assert chat(**labels, **meanings, parallel_tool_calls=True, tool_choice="none", tools=[]).complete() == Sampling()


def test_an_echo_with_log_probabilities_asks_for_the_prompts():
    assert completion(echo=True, logprobs=2).complete().prompt_logprobs == 2
    assert completion(echo=True, logprobs=2, prompt_logprobs=4).complete().prompt_logprobs == 4
    assert completion(echo=True).complete().prompt_logprobs is None


def test_nothing_but_the_prompt_can_be_asked_for():
    assert completion(echo=True, max_tokens=0).complete().max_tokens == 0
    assert completion(prompt_logprobs=0, max_tokens=0).complete().max_tokens == 0
    assert refused(completion, max_tokens=0)[1:] == ("max_tokens", "invalid_value")


# What is refused


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1 << 31}, "max_tokens", "invalid_value"),
        ({"seed": 1 << 63}, "seed", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop", "invalid_value"),
        ({"stop": "a" * 1025}, "stop", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-5": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]", "invalid_value"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
        ({"top_p_": 1}, "top_p_", "unknown_parameter"),
        ({"model": None}, "model", "invalid_type"),
    ],
)
@pytest.mark.parametrize("ask", [chat, completion])
def test_a_wrong_value_is_named(ask, fields, param, code):
    assert refused(ask, **fields)[1:] == (param, code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, "max_completion_tokens", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hello"}, "messages", "invalid_type"),
        ({"messages": [{"content": "hello"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [*HELLO, {"role": "robot", "content": "x"}]}, "messages[1].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "messages[0].mood", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "reasoning": "y"}]}, "messages[0].reasoning", "invalid_value"),
        (
            {"messages": [{"role": "assistant", "content": "x", "reasoning": "y", "reasoning_content": "z"}]},
            "messages[0].reasoning_content",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "missing_required_parameter",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        ({"structured_outputs": {"xml": "x"}}, "structured_outputs.xml", "unknown_parameter"),
        ({"store": True}, "store", "invalid_value"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "invalid_value"),
        ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "unsupported_parameter"),
        ({"chat_template_kwargs": {"big": 1 << 70}}, "chat_template_kwargs", "invalid_value"),
    ],
)
def test_a_chats_wrong_value_is_named(fields, param, code):
    assert refused(chat, **fields)[1:] == (param, code)


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_what_others_know_and_this_server_does_not_is_said_to_be_unsupported(name):
    message, param, code = refused(chat, **{name: "x"})
    assert (message, param, code) == (f"Unsupported parameter: '{name}' is not supported by this server.", name, "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_what_vllm_renamed_is_told_its_new_name(name):
    message, param, code = refused(chat, **{name: "x"})
    assert (param, code) == (name, "unsupported_parameter") and f"structured_outputs: {{{name.removeprefix('guided_')}" in message


def test_best_of_is_n_or_nothing():
    assert completion(best_of=2, n=2).complete().n == 2
    assert refused(completion, best_of=3)[1:] == ("best_of", "unsupported_value")


def test_an_unknown_choice_tells_the_known_ones():
    message, _, _ = refused(chat, messages=[{"role": "robot", "content": "x"}])
    assert message == (
        "Invalid value for 'messages[0].role': 'robot'. Supported values are: 'assistant', 'developer', 'system', 'tool', 'user'."
    )
    assert refused(chat, service_tier="priority")[0].endswith("Supported values are: 'auto', 'default'.")


@pytest.mark.parametrize(
    ("body", "starts"),
    [
        (b"", "We could not parse the JSON body"),
        (b"{", "We could not parse the JSON body"),
        (b'{"model": "m", "messages": [], "temperature": NaN}', "We could not parse the JSON body"),
        (b'{"model": "m", "messages": [], "temperature": Infinity}', "We could not parse the JSON body"),
        (b'{"model": "\xff"}', "We could not parse the JSON body"),
        (b'{"model": "\\ud800"}', "We could not parse the JSON body"),
        (b"[]", "Invalid request body: expected `object`, got `array`"),
        (b'"hello"', "Invalid request body: expected `object`, got `str`"),
        (b'{"model": "m", "messages": [], "chat_template_kwargs": {"x": ' + b"[" * 100_000, "the request's JSON is nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_refused_as_such(body, starts):
    with pytest.raises(BadParameter) as caught:
        decode_body(body, ChatBody)
    assert caught.value.message.startswith(starts)
    assert caught.value.param is None


def test_a_number_too_large_for_a_float_is_named():
    with pytest.raises(BadParameter) as caught:
        decode_body(b'{"model": "m", "messages": [], "temperature": 1e999}', ChatBody)
    assert caught.value.param == "temperature"


# Conversations


def test_a_conversation_as_the_template_wants_it():
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    body = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "now?"}], "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None, "annotations": [], "reasoning_content": "hm"},
            {"role": "tool", "content": "7", "tool_call_id": "c"},
        ],
        tools=[{"type": "function", "function": {"name": "f"}}],
        chat_template_kwargs={"enable_thinking": False},
    )
    told = chat_of(body)
    assert told.messages == [
        Message(role="system", content="be brief"),
        Message(role="user", content="what now?", name="ann"),
        Message(role="assistant", tool_calls=calls, reasoning="hm"),
        Message(role="tool", content="7", tool_call_id="c"),
    ]
    shown = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert (told.tools, told.template_kwargs) == ([shown], {"enable_thinking": False})
    assert told.add_generation_prompt


def test_the_final_message_can_be_continued():
    body = chat(messages=[*HELLO, {"role": "assistant", "content": "Hel"}], add_generation_prompt=False, continue_final_message=True)
    assert chat_of(body).continue_final_message


# Texts


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, [1, 2])]),
        ([[1, 2], [3]], [(None, [1, 2]), (None, [3])]),
    ],
)
def test_one_prompt_or_many_as_text_or_token_ids(given, texts):
    assert texts_of(given, "prompt") == texts


@pytest.mark.parametrize(
    ("given", "code"),
    [([], "empty_array"), (["a", 1], "invalid_type"), ([[1], "a"], "invalid_type"), (["a"] * 2049, "array_above_max_length")],
)
def test_other_lists_of_prompts_are_refused(given, code):
    with pytest.raises(BadParameter) as caught:
        texts_of(given, "input")
    assert (caught.value.param, caught.value.code) == ("input", code)


@pytest.mark.parametrize(
    ("type_", "fields", "param"),
    [
        (CompletionBody, {"prompt": [1, -1]}, "prompt[1]"),
        (CompletionBody, {"prompt": [[1.5]]}, "prompt[0][0]"),
        (CompletionBody, {"prompt": None}, "prompt"),
        (CompletionBody, {}, "prompt"),
        (EmbeddingBody, {"input": [True]}, "input[0]"),
        (EmbeddingBody, {"input": "a", "dimensions": 0}, "dimensions"),
        (EmbeddingBody, {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        (EmbeddingBody, {"input": "a", "temperature": 1}, "temperature"),
        (TokenizeBody, {"prompt": ["a"]}, "prompt"),
        (DetokenizeBody, {"tokens": [1 << 31]}, "tokens[0]"),
        (DetokenizeBody, {"tokens": "a"}, "tokens"),
    ],
)
def test_the_other_bodies_name_what_is_wrong_too(type_, fields, param):
    with pytest.raises(BadParameter) as caught:
        decode_body(json.dumps({"model": "m", **fields}).encode(), type_)
    assert caught.value.param == param
