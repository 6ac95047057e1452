"""Neither secrets nor people's texts get into a log, whatever they stand in; and nothing in it can look like another line."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.gateway.identity.keys import new_key
from fairlead.observe.logs import dumps
from fairlead.observe.redaction import MAX_CHARS, MAX_ITEMS, kind_of, plain_json, printable, redact_event, redacted, without_secrets


def test_a_key_of_ours_is_taken_out_wherever_it_stands() -> None:
    key = new_key().secret
    assert without_secrets(f"refused {key}, bye") == "refused [SECRET], bye"
    assert key not in json.dumps(redacted({"a": [{"b": (f"x {key}",)}], f"of {key}": 1}["a"]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:hunter2@db:5432/x is down", "postgresql://me:[SECRET]@db:5432/x is down"),
        ("redis://:hunter2@127.0.0.1/0", "redis://:[SECRET]@127.0.0.1/0"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [SECRET]"),
        ("authorization=Basic dXNlcjpwYXNz", "authorization=Basic [SECRET]"),
        ('{"api_key": "abcd1234"}', '{"api_key": "[SECRET]"}'),
        ("GET /x?token=abcd1234&y=1", "GET /x?token=[SECRET]&y=1"),
        ("cookie: session=abcd1234", "cookie: [SECRET]"),
        ("signature: sig1=:abcdefgh:", "signature: [SECRET]"),
        ("password='hunter2!'", "password='[SECRET]'"),
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "[SECRET]"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY----- rest", "[SECRET] rest"),
        ("the password is wrong", "the password is wrong"),
        ("400 tokens, max_tokens=4096, tokens: 5", "400 tokens, max_tokens=4096, tokens: 5"),
        ("http://127.0.0.1:8000/v2/models", "http://127.0.0.1:8000/v2/models"),
        ("/models/sklearn/1", "/models/sklearn/1"),
        (
            "send a key as `Authorization: Bearer fl_...` or in `x-api-key`",
            "send a key as `Authorization: Bearer fl_...` or in `x-api-key`",
        ),
    ],
)
def test_secrets_are_known_by_their_form_and_nothing_else_is_taken_for_one(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_a_key_tells_what_its_value_is_however_it_is_written() -> None:
    secrets = (
        "Authorization",
        "x-api-key",
        "api_key",
        "Set-Cookie",
        "cookies",
        "db_password",
        "client_secret",
        "access_token",
        "Signature-Input",
    )
    assert {kind_of(name) for name in secrets} == {"secret"}
    assert {kind_of(name) for name in ("prompt", "messages", "input", "inputs", "content")} == {"text"}
    assert {kind_of(name) for name in ("key", "tokens", "max_tokens", "model", "error", "num_secrets_found", "path")} == {""}


def test_texts_are_told_by_their_length_alone_in_any_depth_and_kept_only_where_that_is_wanted() -> None:
    event = {
        "event": "failed",
        "body": {"messages": [{"role": "user", "content": "my illness"}]},
        "all": [{"prompt": "and mine"}],
        "input": 5,
    }
    shown = redact_event(json.loads(json.dumps(event)))
    assert shown == {"event": "failed", "body": {"messages": "[TEXT of 1]"}, "all": [{"prompt": "[TEXT of 8]"}], "input": 5}
    kept = redact_event(json.loads(json.dumps(event)), texts=True)
    assert kept == event


def test_what_no_log_can_hold_becomes_small_and_plain() -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    shown = redacted(
        {"bytes": b"abc", "object": object, "broken": Broken(), "deep": deep, "long": "x" * (2 * MAX_CHARS), "many": list(range(1000))}
    )
    assert shown["bytes"] == "[3 bytes]" and shown["broken"] == "[Broken that cannot be shown]"
    assert len(shown["long"]) < MAX_CHARS + 100 and len(shown["many"]) == MAX_ITEMS
    assert len(json.dumps(shown["deep"])) < 200


@given(st.text())
def test_a_line_is_one_line_of_printable_json_and_means_what_was_said(text: str) -> None:
    line = dumps({"event": text})
    assert len(line.splitlines()) == 1 and not set(line) & set("\n\r\x1b\x9b\u2028\u202e")
    if not any("\ud800" <= each <= "\udfff" for each in text):
        assert json.loads(line) == {"event": text}


@given(st.text(alphabet=st.characters(categories=("Cc", "Cf", "Zl", "Zp", "Lu"))))
def test_nothing_moves_the_cursor_of_a_terminal(text: str) -> None:
    assert not set(printable(text)) & set("\n\r\x1b\x9b\x07\x08\u2028\u2029\u202e\u2066")


def test_escapes_are_those_of_json() -> None:
    assert json.loads(plain_json('"a\u202eb\x9b"')) == "a\u202eb\x9b"
