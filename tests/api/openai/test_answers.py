"""What goes out: deltas as OpenAI's objects."""

import json
from typing import Any

import numpy as np
import pytest
from openai.types import Completion as SdkCompletion
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion as SdkChat
from openai.types.chat import ChatCompletionChunk as SdkChunk

from fairlead.api.openai.answers import Chats, Completions, embeddings, encode, total_usage
from fairlead.core.generation import Delta, TokenLogprob, Usage

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, reasoning_tokens=1)


def token(text: str, logprob: float = -0.5, *, id: int = 1, top: tuple[TokenLogprob, ...] = (), data: bytes | None = None) -> TokenLogprob:
    return TokenLogprob(id, text, text.encode() if data is None else data, logprob, 1, list(top))


def chunks(answer: Chats | Completions, *deltas: Delta, number: int = 0) -> list[dict[str, Any]]:
    return [json.loads(chunk) for delta in deltas for chunk in answer.chunks(number, delta)]


def whole(answer: Chats | Completions, *prompts: list[Delta]) -> dict[str, Any]:
    return json.loads(encode(answer.whole(prompts)))


# Chats


def test_a_streamed_chat_is_role_then_texts_then_reason():
    answer = Chats("id", "m")
    first, hello, end = chunks(answer, Delta(text="Hello"), Delta(text="!", finish_reason="stop", usage=USAGE))
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
    assert hello["choices"] == [{"index": 0, "delta": {"content": "Hello"}, "logprobs": None, "finish_reason": None}]
    assert end["choices"] == [{"index": 0, "delta": {"content": "!"}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    for chunk in (first, hello, end):
        SdkChunk.model_validate(chunk, strict=True)
        assert (chunk["id"], chunk["model"], chunk["object"]) == ("id", "m", "chat.completion.chunk")
        assert "usage" not in chunk


def test_an_end_without_text_is_an_empty_delta():
    answer = Chats("id", "m")
    *_, end = chunks(answer, Delta(text="a"), Delta(finish_reason="length", usage=USAGE))
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "length")


def test_every_choice_begins_with_its_role():
    told = chunks(Chats("id", "m"), Delta(text="a"), Delta(index=1, text="b"), Delta(text="c"))
    assert [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in told] == [
        (0, {"role": "assistant", "content": ""}),
        (0, {"content": "a"}),
        (1, {"role": "assistant", "content": ""}),
        (1, {"content": "b"}),
        (0, {"content": "c"}),
    ]


@pytest.mark.parametrize("answer", [Chats("id", "m", include_usage=True), Completions("id", "m", include_usage=True)])
def test_usage_is_null_until_the_chunk_after_the_last(answer):
    assert all(chunk["usage"] is None for chunk in chunks(answer, Delta(text="a"), Delta(finish_reason="stop", usage=USAGE)))
    closing = json.loads(answer.closing(USAGE))
    assert closing["choices"] == []
    assert closing["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }


def test_a_whole_chat_has_its_choices_in_order_and_the_usage():
    second = Delta(index=1, text="b", finish_reason="length")
    first = Delta(text="a", finish_reason="stop", stop_reason="END", usage=USAGE)
    told = whole(Chats("id", "m"), [second, first])
    SdkChat.model_validate(told, strict=True)
    assert [(c["index"], c["message"]["content"], c["finish_reason"], c["stop_reason"]) for c in told["choices"]] == [
        (0, "a", "stop", "END"),
        (1, "b", "length", None),
    ]
    assert told["usage"]["total_tokens"] == 5
    assert "prompt_logprobs" not in told


def test_log_probabilities_of_a_chat():
    cat = token("cat", -0.1, top=(token("cat", -0.1), token("dog", -2.0)))
    half = token("�", float("-inf"), data=b"\xe2\x82")
    told = whole(Chats("id", "m"), [Delta(text="cat", logprobs=[cat, half], finish_reason="stop", usage=USAGE)])
    SdkChat.model_validate(told, strict=True)
    assert told["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "cat",
                "logprob": -0.1,
                "bytes": [99, 97, 116],
                "top_logprobs": [
                    {"token": "cat", "logprob": -0.1, "bytes": [99, 97, 116]},
                    {"token": "dog", "logprob": -2.0, "bytes": [100, 111, 103]},
                ],
            },
            {"token": "�", "logprob": -9999.0, "bytes": [226, 130], "top_logprobs": []},
        ],
        "refusal": None,
    }
    assert chunks(Chats("id", "m"), Delta(text="cat", logprobs=[cat]))[1]["choices"][0]["logprobs"]["content"][0]["token"] == "cat"


def test_a_prompts_log_probabilities_are_vllms():
    told = [None, token("b", -0.3, id=7, top=(token("c", -0.1, id=8),))]
    expected = [
        None,
        {"8": {"logprob": -0.1, "rank": 1, "decoded_token": "c"}, "7": {"logprob": -0.3, "rank": 1, "decoded_token": "b"}},
    ]
    delta = Delta(text="x", prompt_logprobs=told, finish_reason="stop", usage=USAGE)
    assert whole(Chats("id", "m"), [delta])["prompt_logprobs"] == expected
    assert chunks(Chats("id", "m"), delta)[1]["prompt_logprobs"] == expected
    assert whole(Completions("id", "m", prompt_logprobs=1), [delta])["choices"][0]["prompt_logprobs"] == expected
    assert whole(Completions("id", "m", prompt_logprobs=0), [delta])["choices"][0]["prompt_logprobs"][1].keys() == {"7"}


# Completions


def test_choices_of_several_prompts_are_numbered_through():
    answer = Completions("id", "m", n=2)
    told = whole(
        answer,
        [Delta(text="a", finish_reason="stop"), Delta(index=1, text="b", finish_reason="stop", usage=USAGE)],
        [Delta(index=1, text="d", finish_reason="stop"), Delta(text="c", finish_reason="length", usage=USAGE)],
    )
    SdkCompletion.model_validate(told, strict=True)
    assert [(c["index"], c["text"]) for c in told["choices"]] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert told["usage"]["total_tokens"] == 10
    assert chunks(Completions("id", "m", n=2), Delta(index=1, text="d"), number=1)[0]["choices"][0]["index"] == 3


def test_a_streamed_completion():
    told = chunks(Completions("id", "m"), Delta(text="a"), Delta(text="b", finish_reason="stop", stop_reason=5, usage=USAGE))
    assert [chunk["object"] for chunk in told] == ["text_completion"] * 2
    assert told[0]["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]
    assert told[1]["choices"] == [{"index": 0, "text": "b", "logprobs": None, "finish_reason": "stop", "stop_reason": 5}]


def test_the_chosen_token_is_among_the_likeliest_even_where_it_is_not():
    rare = token("rare", -7.0, top=(token("cat", -0.1), token("dog", -0.2)))
    logprobs = whole(Completions("id", "m", logprobs=2), [Delta(text="rare", logprobs=[rare], finish_reason="stop", usage=USAGE)])
    assert logprobs["choices"][0]["logprobs"] == {
        "tokens": ["rare"],
        "token_logprobs": [-7.0],
        "top_logprobs": [{"cat": -0.1, "dog": -0.2, "rare": -7.0}],
        "text_offset": [0],
    }


def test_of_two_tokens_that_look_the_same_the_likelier_is_told():
    half = token("�", -3.0, id=9, data=b"\xe2", top=(token("�", -1.0, id=8, data=b"\xf0"),))
    told = whole(Completions("id", "m", logprobs=1), [Delta(text="", logprobs=[half], finish_reason="stop", usage=USAGE)])
    assert told["choices"][0]["logprobs"]["top_logprobs"] == [{"�": -1.0}]


def test_text_offsets_go_on_from_chunk_to_chunk_and_count_characters():
    halves = [token("�", data=b"\xe2\x82"), token("�", data=b"\xac")]
    told = chunks(
        Completions("id", "m", logprobs=0),
        Delta(text="ab", logprobs=[token("a"), token("b")]),
        Delta(text="€", logprobs=halves),
        Delta(text="c", logprobs=[token("c")]),
    )
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in told] == [[0, 1], [2, 2], [3]]


def test_an_echo_puts_the_prompt_before_every_choice():
    answer = Completions("id", "m", n=2, echoed=["one ", "two "])
    told = whole(answer, *[[Delta(index=i, text=str(i), finish_reason="stop", usage=USAGE) for i in (0, 1)]] * 2)
    assert [c["text"] for c in told["choices"]] == ["one 0", "one 1", "two 0", "two 1"]
    streamed = chunks(Completions("id", "m", echoed=["one "]), Delta(text="1"), Delta(text="2", finish_reason="stop", usage=USAGE))
    assert [chunk["choices"][0]["text"] for chunk in streamed] == ["one 1", "2"]


def test_an_echo_tells_the_prompts_log_probabilities_for_every_choice():
    prompt = [None, token("two ", -1.0), token("three ", -2.0)]
    deltas = [
        Delta(text="x", logprobs=[token("x")], prompt_logprobs=prompt, finish_reason="length"),
        Delta(index=1, text="y", logprobs=[token("y")], finish_reason="length", usage=USAGE),
    ]
    told = whole(Completions("id", "m", n=2, logprobs=0, echoed=["one two three "]), deltas)
    for choice, last in zip(told["choices"], "xy", strict=True):
        assert choice["logprobs"]["tokens"] == ["one ", "two ", "three ", last]
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -0.5]
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert choice["logprobs"]["text_offset"] == [0, 4, 8, 14]
        assert "prompt_logprobs" not in choice


def test_a_first_token_that_the_text_does_not_show_takes_no_room():
    prompt = [None, token("one ", -1.0)]  # the first is a begin-of-sequence token
    delta = Delta(text="x", logprobs=[token("x")], prompt_logprobs=prompt, finish_reason="length", usage=USAGE)
    told = whole(Completions("id", "m", logprobs=0, echoed=["one "]), [delta])["choices"][0]["logprobs"]
    assert (told["tokens"], told["text_offset"]) == (["", "one ", "x"], [0, 0, 4])


def test_nothing_but_the_prompts_log_probabilities():
    delta = Delta(prompt_logprobs=[None, token("b", -1.0)], finish_reason="length", usage=USAGE)
    (choice,) = whole(Completions("id", "m", logprobs=1, echoed=["ab"]), [delta])["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]


def test_prompts_that_were_asked_for_by_their_own_name_are_no_part_of_the_echo():
    delta = Delta(text="x", prompt_logprobs=[None, token("b", -1.0)], finish_reason="length", usage=USAGE)
    (choice,) = whole(Completions("id", "m", prompt_logprobs=1, echoed=["ab"]), [delta])["choices"]
    assert choice["logprobs"] is None
    assert len(choice["prompt_logprobs"]) == 2


# The others


def test_embeddings_as_numbers_or_as_their_bytes():
    vectors = [np.array([1, 0.5], "<f4"), np.array([0, -2], "<f4")]
    deltas = [Delta(vector=vector.tobytes(), usage=Usage(prompt_tokens=4)) for vector in vectors]
    told = json.loads(encode(embeddings(deltas, "m", "float")))
    CreateEmbeddingResponse.model_validate(told, strict=True)
    assert [(each["index"], each["embedding"]) for each in told["data"]] == [(0, [1.0, 0.5]), (1, [0.0, -2.0])]
    assert told["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert json.loads(encode(embeddings(deltas, "m", "base64")))["data"][0]["embedding"] == "AACAPwAAAD8="


def test_the_usage_of_several_prompts_is_their_sum():
    assert total_usage([Delta(text="a"), Delta(usage=USAGE), Delta(usage=USAGE)]) == Usage(
        prompt_tokens=6, completion_tokens=4, cached_tokens=2, reasoning_tokens=2
    )
