"""The filters of a policy, on requests of every kind."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from fairlead.core.errors import ConfigError, Filtered, InvalidRequest, ModelError, Unsupported
from fairlead.core.generation import Chat, Detokenize, Embed, Generate, Message, Score, Tokenize
from fairlead.core.policy import FilterPolicy
from fairlead.core.request import Raw, Request
from fairlead.core.tensors import object_array
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.filters.moderation import MAX_PIECES, PIECE_CHARS, by_label, pieces

MAIL = "write to jane@example.com"
HIDDEN = "write to [EMAIL]"
REDACT = Filters.of(FilterPolicy(pii="redact"))
DENY = Filters.of(FilterPolicy(deny=("bomb",)))


def chat(*messages: Message, **rest: object) -> Request:
    return Request(model="m", prompt=Generate(chat=Chat(messages=list(messages), **rest)))  # type: ignore[arg-type]


def user(content: str) -> Message:
    return Message(role="user", content=content)


def test_a_request_without_any_finding_passes_as_it_is() -> None:
    request = chat(user("hello"))
    checked = REDACT.check(request)
    assert checked.request is request
    assert checked.flagged == ()


def test_what_is_redacted_is_redacted_wherever_it_stands() -> None:
    call = {"id": "1", "function": {"name": "mail", "arguments": f'{{"text": "{MAIL}"}}'}}
    request = chat(
        Message(role="system", content=MAIL),
        user(f"{MAIL}!"),
        Message(role="assistant", tool_calls=[call], reasoning=f"who is {MAIL}?"),
        tools=[{"function": {"description": MAIL}}],
        template_kwargs={"documents": [{"text": MAIL}]},
    )
    prompt = REDACT.check(request).request.prompt
    assert isinstance(prompt, Generate) and prompt.chat is not None
    assert [message.content for message in prompt.chat.messages] == [HIDDEN, f"{HIDDEN}!", None]
    assert prompt.chat.messages[2].reasoning == f"who is {HIDDEN}?"
    assert prompt.chat.messages[2].tool_calls == [{"id": "1", "function": {"name": "mail", "arguments": f'{{"text": "{HIDDEN}"}}'}}]
    assert prompt.chat.tools == [{"function": {"description": HIDDEN}}]
    assert prompt.chat.template_kwargs == {"documents": [{"text": HIDDEN}]}
    assert "jane" in str(request), "the request that was checked is left as it was"


def test_names_of_fields_are_searched_as_what_stands_in_them() -> None:
    schema = {"type": "object", "properties": {MAIL: {"type": "string"}}, "required": [MAIL]}
    hidden = {"type": "object", "properties": {HIDDEN: {"type": "string"}}, "required": [HIDDEN]}
    checked = REDACT.check(chat(user("x"), tools=[{"function": {"parameters": schema}}], template_kwargs={MAIL: 1})).request.prompt
    assert isinstance(checked, Generate) and checked.chat is not None
    assert (checked.chat.tools, checked.chat.template_kwargs) == ([{"function": {"parameters": hidden}}], {HIDDEN: 1})
    body = {"model": "m", "messages": [], "tools": [{"function": {"parameters": {"properties": {"the bomb": {}}}}}]}
    for blocked in (
        chat(user("x"), tools=body["tools"]),
        Request(model="m", raw=Raw(body=json.dumps(body).encode(), path="/v1/chat/completions")),
    ):
        with pytest.raises(Filtered):
            DENY.check(blocked)
    two = chat(user("x"), tools=[{"properties": {"jane@example.com": {}, "joe@example.com": {}}}])
    with pytest.raises(InvalidRequest, match="two fields of one name"):
        REDACT.check(two)


def test_words_of_the_protocol_are_no_texts() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object", "properties": {}}}}]
    filters = Filters.of(FilterPolicy(deny=("type", "properties", "function")))
    with pytest.raises(Filtered, match="deny"):
        filters.check(chat(user("x"), tools=[{"function": {"parameters": {"properties": {"a": {"type": "type"}}}}}]))
    assert Filters.of(FilterPolicy(deny=("properties", "parameters"))).check(chat(user("x"), tools=tools)).flagged == ()


@pytest.mark.parametrize(
    "prompt",
    [
        Generate(text=MAIL),
        Embed(text=MAIL),
        Score(text=MAIL, pair="x"),
        Score(text="x", pair=MAIL),
        Tokenize(text=MAIL),
        Tokenize(chat=Chat(messages=[user(MAIL)])),
    ],
)
def test_prompts_of_every_kind_are_searched(prompt: Generate | Embed | Score | Tokenize) -> None:
    changed = REDACT.check(Request(model="m", prompt=prompt)).request.prompt
    assert "[EMAIL]" in str(changed) and "jane" not in str(changed)


def test_token_ids_are_no_way_around_a_filter() -> None:
    ids = Request(model="m", prompt=Generate(token_ids=[1, 2]))
    for filters in (REDACT, DENY, Filters.of(FilterPolicy(injection="block")), Filters.of(FilterPolicy(max_chars=5))):
        with pytest.raises(Unsupported, match="send text"):
            filters.check(ids)
    assert Filters.of(FilterPolicy(pii="flag")).check(ids).request is ids
    assert REDACT.check(Request(model="m", prompt=Detokenize(token_ids=[1]))).flagged == ()


@pytest.mark.parametrize(
    "body", [{"prompt": ["x", [98]]}, {"prompt": "x", "prompt_embeds": "AA=="}, {"prompt": "x", "prompt_token_ids": [1]}]
)
def test_other_ways_to_say_a_prompt_to_another_server_are_no_way_around_either(body: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="send text"):
        DENY.check(passed(body))
    assert Filters.of(FilterPolicy(pii="flag")).check(passed(body)).flagged == ()


def test_tensors_of_text_are_searched_and_pictures_are_not() -> None:
    picture = b"\xff\xd8" + b"jane@example.com" + bytes(100_000)
    inputs = {
        "text_input": object_array([MAIL.encode(), b"fine"], (2, 1)),
        "latin": object_array(["é jane@example.com".encode("latin-1")], (1,)),
        "picture": object_array([picture], (1,)),
        "x": np.zeros(4, np.float32),
    }
    request = Request(model="m", inputs=inputs, parameters={"system": MAIL, "n": 1})
    checked = REDACT.check(request).request
    assert checked.inputs["text_input"].tolist() == [[HIDDEN.encode()], [b"fine"]]
    assert checked.inputs["latin"].tolist() == ["é [EMAIL]".encode("latin-1")]
    assert checked.inputs["picture"] is inputs["picture"] and checked.inputs["x"] is inputs["x"]
    assert checked.parameters == {"system": HIDDEN, "n": 1}
    assert REDACT.check(checked).request is checked


def test_what_is_blocked_is_named_by_its_rule_and_never_by_its_text() -> None:
    with pytest.raises(Filtered) as refused:
        DENY.check(chat(user("how to build a bomb")))
    assert refused.value.rule == "deny"
    assert "bomb" not in refused.value.message


def test_what_only_wants_to_be_told_of_is_told_once_for_each_rule() -> None:
    checked = Filters.of(FilterPolicy(pii="flag")).check(chat(user(MAIL), user(f"{MAIL}, card 4111 1111 1111 1111")))
    assert sorted(checked.flagged) == ["pii.card", "pii.email"]


def test_the_length_of_all_texts_together_is_limited() -> None:
    filters = Filters.of(FilterPolicy(max_chars=10))
    filters.check(chat(user("12345"), user("12345")))
    with pytest.raises(Filtered, match="longer than 10 characters") as refused:
        filters.check(chat(user("12345"), user("123456")))
    assert refused.value.rule == "max_chars"


def test_only_the_languages_that_are_named_are_answered() -> None:
    filters = Filters.of(FilterPolicy(languages=("en", "de")))
    filters.check(chat(user("What is the best way to travel from the harbour to the old town on a Sunday?")))
    filters.check(chat(user("Wie komme ich am besten vom Hafen in die Altstadt, wenn sonntags kein Bus fährt?")))
    filters.check(chat(user("¿Qué hora es?")))  # too little to tell
    filters.check(chat(user("def f(x): return [y ** 2 for y in range(x) if y % 3 == 0 and y not in seen]")))
    french = "Quelle est la meilleure façon d'aller du port à la vieille ville un dimanche matin ?"
    for text in (french, "plain English words stand before it, for quite a while, and then: " * 20 + french * 20):
        with pytest.raises(Filtered) as refused:
            filters.check(chat(user(text)))
        assert refused.value.rule == "languages"
    with pytest.raises(ConfigError, match="'xx'"):
        Filters.of(FilterPolicy(languages=("xx",)))


# Bodies that go on to another server


def passed(body: object, **rest: str) -> Request:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request(model="m", raw=Raw(path="/v1/chat/completions", body=data, **rest))  # type: ignore[arg-type]


def test_a_body_goes_on_byte_for_byte_where_nothing_is_redacted() -> None:
    request = passed(b'{ "messages": [{"role":"user", "content": "hello"}], "temperature": 1.10 }')
    assert REDACT.check(request).request is request


@pytest.mark.parametrize("name", ["role", "file", "image_url", "input_audio"])
def test_a_parameter_called_as_a_part_of_a_message_hides_nothing(name: str) -> None:
    tool = {"function": {"name": "f", "parameters": {"type": "object", "properties": {name: {"description": "a bomb"}}}}}
    with pytest.raises(Filtered):
        DENY.check(chat(user("hello"), tools=[tool]))
    with pytest.raises(Filtered):
        DENY.check(passed({"model": "m", "messages": [], "tools": [tool]}))


def test_a_body_is_written_anew_where_something_is() -> None:
    parts = [{"type": "text", "text": MAIL}, {"type": "image_url", "image_url": {"url": "data:jane@example.com"}}]
    body = {"model": "m", "messages": [{"role": "user", "content": MAIL}, {"role": "user", "content": parts}], "n": 2, "user": "u"}
    raw = REDACT.check(passed(body)).request.raw
    assert raw is not None
    changed = json.loads(bytes(raw.body))
    assert changed["messages"][0]["content"] == HIDDEN
    assert changed["messages"][1]["content"] == [{"type": "text", "text": HIDDEN}, parts[1]]
    assert (changed["n"], changed["user"], changed["model"]) == (2, "u", "m")


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": MAIL},
        {"prompt": ["x", MAIL]},
        {"input": [MAIL]},
        {"inputs": [{"datatype": "BYTES", "data": [MAIL]}]},
        {"text_input": MAIL},
    ],
)
def test_every_field_that_holds_text_is_searched(body: dict[str, object]) -> None:
    raw = REDACT.check(passed(body)).request.raw
    assert raw is not None and b"jane" not in bytes(raw.body)


def test_a_field_that_comes_twice_is_what_was_searched() -> None:
    raw = DENY.check(passed(b'{"prompt": "a bomb", "prompt": "a cake"}')).request.raw
    assert raw is not None and bytes(raw.body) == b'{"prompt":"a cake"}'


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"{", InvalidRequest),
        (b"[]", InvalidRequest),
        (b'{"messages": "\xff"}', InvalidRequest),
        (b'{"messages":' + b"[" * 500 + b"]" * 500 + b"}", InvalidRequest),
        (b'{"messages":' + b"[" * 200_000, InvalidRequest),
        (b'{"prompt": [1, 2, 3]}', Unsupported),
        (b'{"prompt": [[1, 2], [3]]}', Unsupported),
        (b'{"messages": [1, {"content": "bomb"}]}', Filtered),
        (b'{"prompt": "bo\\u006db"}', Filtered),
    ],
)
def test_a_body_that_cannot_be_read_does_not_pass(body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        DENY.check(passed(body))


def test_tensors_in_the_binary_form_pass_unless_they_are_text() -> None:
    head = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}]}).encode()
    request = passed(head + bytes(4), header_length=str(len(head)))
    assert DENY.check(request).request is request
    head = head.replace(b"FP32", b"BYTES")
    with pytest.raises(Unsupported, match="binary form"):
        DENY.check(passed(head + bytes(4), header_length=str(len(head))))
    with pytest.raises(InvalidRequest):
        DENY.check(passed(head, header_length="999999"))


def test_gigantic_inputs_are_searched_in_one_pass() -> None:
    text = "harmless words, 12 of them at most. " * 25_000 + MAIL
    assert REDACT.check(chat(user(text))).request.prompt.chat.messages[0].content.endswith(HIDDEN)  # type: ignore[union-attr]
    numbers = passed({"inputs": [{"name": "x", "datatype": "FP32", "data": [0.5] * 200_000}]})
    assert REDACT.check(numbers).request is numbers


# Moderation


class Judge:
    """A classifier that knows one word."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.error = error

    async def __call__(self, model: str, texts: list[str]) -> Sequence[Mapping[str, float]]:
        self.asked.append((model, texts))
        if self.error is not None:
            raise self.error
        return [{"violence": 0.9 if "stab" in text else 0.1, "spam": 0.6 if "stab" in text else 0.0} for text in texts]


async def test_a_text_that_the_classifier_finds_harmful_is_blocked_by_its_likeliest_label() -> None:
    filters = Filters.of(FilterPolicy(moderation="block"))
    judge = Judge()
    assert filters.moderates and not DENY.moderates
    assert await filters.moderate(chat(user("a nice day")), judge) == ()
    with pytest.raises(Filtered) as refused:
        await filters.moderate(chat(Message(role="system", content="be kind"), user("I will stab him")), judge)
    assert refused.value.rule == "moderation.violence"
    assert judge.asked == [("moderation", ["a nice day"]), ("moderation", ["I will stab him"])]


async def test_flagging_tells_the_labels_and_lets_pass() -> None:
    filters = Filters.of(FilterPolicy(moderation="flag", moderation_model="judge", moderation_threshold=0.5))
    assert await filters.moderate(chat(user("stab")), Judge()) == ("moderation.violence", "moderation.spam")
    assert await filters.moderate(chat(user("stab")), Judge(ModelError("gone"))) == ("moderation.failed",)
    assert await filters.moderate(Request(model="m", inputs={"x": np.zeros(3)}), Judge()) == ()


async def test_where_the_classifier_is_gone_nothing_passes_that_it_must_see() -> None:
    with pytest.raises(ModelError):
        await Filters.of(FilterPolicy(moderation="block")).moderate(chat(user("hello")), Judge(ModelError("gone")))


def test_long_texts_are_judged_in_a_bounded_number_of_pieces_and_nothing_is_left_out() -> None:
    assert pieces(["short", " ", "x" * (PIECE_CHARS + 1)]) == ["short", "x" * PIECE_CHARS, "x"]
    long = "".join(chr(97 + n % 26) for n in range(500_000))
    assert len(pieces([long])) <= MAX_PIECES and "".join(pieces([long])) == long
    many = [f"text {n}" for n in range(10_000)]
    assert len(pieces(many)) <= 2 * MAX_PIECES and "\n".join(many)[:50] == pieces(many)[0][:50]


def test_a_classifiers_output_is_read_with_its_labels() -> None:
    assert by_label(("a", "b"), np.array([[0.5, 0.25]], np.float32)) == [{"a": 0.5, "b": 0.25}]


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module, policy in (
        ("re2", FilterPolicy(deny=("x",))),
        ("re2", FilterPolicy(injection="block")),
        ("phonenumbers", FilterPolicy(pii="flag")),
        ("stdnum", FilterPolicy(pii="flag")),
        ("py3langid.langid", FilterPolicy(languages=("en",))),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=r"pip install 'fairlead\[filters\]'"):
                Filters.of(policy)
