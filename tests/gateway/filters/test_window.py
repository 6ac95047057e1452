"""Answers that come in pieces: what goes out does not depend on how they were cut."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairlead.core.policy import FilterPolicy
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.filters.finding import CONTEXT, Scan, redacted
from fairlead.gateway.filters.window import Window
from tests.gateway.filters.cases import cases

REDACT = Filters.of(FilterPolicy(pii="redact")).scans
BLOCK = Filters.of(
    FilterPolicy(
        deny=("bomb", "secret project", "c++", "敏感词", "größe", "a b c"),
        deny_patterns=(r"\bAB-\d{4}\b", r"(?i)codename\s+\w+"),
        pii="redact",
    )
).scans
VALUES = sorted({case.value for case in cases() if len(case.value) < 200})
PRIVATE_KEY = next(case.value for case in cases() if "PRIVATE KEY" in case.value)

words = st.sampled_from(
    [
        "the ",
        "a",
        " ",
        "\n",
        "harbour ",
        "4",
        "12 ",
        "+",
        "@",
        "(",
        ". ",
        "-",
        "eyJ",
        "sk-",
        "password: ",
        "Bearer ",
        "DE",
        "é",
        "\u0303",
        "漢字",
        "-----BEGIN ",
        "x@y.co",
    ]
)
denied = st.sampled_from(
    [
        "bomb",
        "BOMB",
        "bom",
        "b\u200bomb",
        "secret",
        " project",
        "secret \n project",
        "C++",
        "敏感",
        "词",
        "GRÖSSE",
        "a ",
        "b c",
        "AB-1234",
        "codename",
    ]
)
texts = st.lists(st.one_of(words, st.sampled_from(VALUES), st.text(max_size=4)), max_size=12).map("".join)
denied_texts = st.lists(st.one_of(words, denied, st.sampled_from(VALUES)), max_size=10).map("".join)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def filtered(scans: tuple[Scan, ...], pieces: list[str]) -> tuple[str, str, list[str]]:
    """(what went out, the rule that blocked it, what went out by piece)."""
    window = Window(scans)
    out = [window.push(piece, False) for piece in pieces if not window.blocked]
    if not window.blocked:
        out.append(window.push("", True))
    return "".join(out), window.blocked, out


cuts = st.lists(st.integers(0, 400), max_size=20)


@settings(max_examples=300, deadline=None)
@given(texts, cuts)
@example("call (212) 736-5000x", [14, 19])
@example("4111 1111 1111 1111 2024", [19, 20, 23])
@example("DE89 3704 0044 0532 0130 00 and", [1, 2, 3, 4, 26, 27])
def test_however_a_text_is_cut_what_is_redacted_is_the_same(text: str, cuts: list[int]) -> None:
    whole = redacted(text, [finding for scan in REDACT for finding in scan(text, 0, True)[0]])
    assert filtered(REDACT, [text])[0] == whole
    assert filtered(REDACT, pieces_of(text, cuts))[0] == whole
    assert filtered(REDACT, list(text))[0] == whole


@settings(max_examples=300, deadline=None)
@given(denied_texts, cuts)
@example("bom\u0303b and a bomb", [3, 4])
@example("secret" + " " * 20 + "project", [6, 10])
def test_however_a_text_is_cut_it_is_blocked_at_the_same_place_by_the_same_rule(text: str, cuts: list[int]) -> None:
    whole = filtered(BLOCK, [text])[:2]
    assert filtered(BLOCK, pieces_of(text, cuts))[:2] == whole
    assert filtered(BLOCK, list(text))[:2] == whole


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(VALUES), st.text(max_size=20), st.text(max_size=20), cuts)
def test_nothing_that_is_found_ever_goes_out(value: str, before: str, after: str, cuts: list[int]) -> None:
    text = f"{before} {value} {after}"
    sent = ""
    for piece in filtered(REDACT, pieces_of(text, cuts))[2]:
        sent += piece
        # what is found in the whole, and in nothing that went out up to now
        assert not any(
            f.start < len(sent) and sent[f.start : f.end] in value
            for scan in REDACT
            for f in scan(sent + "\n", 0, True)[0]
            if f.end - f.start == len(value)
        )


def test_a_private_key_is_taken_out_line_by_line() -> None:
    pieces = [f"{line}\n" for line in f"here it is:\n{PRIVATE_KEY}\nthat was it".split("\n")]
    assert filtered(REDACT, pieces)[0] == "here it is:\n[SECRET]\nthat was it\n"


def test_a_private_key_that_is_never_ended_is_still_taken_out() -> None:
    head = PRIVATE_KEY.rpartition("-----END")[0]
    whole = filtered(REDACT, [head])[0]
    assert whole == "[SECRET]\n"
    assert filtered(REDACT, list(head))[0] == whole


def test_prose_goes_out_word_by_word() -> None:
    window = Window(BLOCK[1:])  # without patterns, which cost a fixed delay
    words = [
        "It",
        "was",
        "the",
        "best",
        "of",
        "times",
        "it",
        "was",
        "the",
        "worst",
        "of",
        "times",
        "in",
        "the",
        "year",
        "1775",
        ",",
        "said",
        "he",
    ]
    behind = []
    sent = 0
    for number, word in enumerate(words):
        sent += len(window.push(word if number == 0 else f" {word}", False))
        behind.append(len(" ".join(words[: number + 1])) - sent)
    assert max(behind) <= max(map(len, words)) + 1


@pytest.mark.parametrize(
    "alphabet", ["a", "4", "1 ", "+1 ", "a@", "x.", "eyJ", "-----BEGIN ", "(", "DE44 ", "sk-1", "password=a1", "b o m b ", "\u200b", "é"]
)
def test_what_is_held_back_is_bounded_whatever_comes(alphabet: str) -> None:
    window = Window(BLOCK)
    for _ in range(2000):
        window.push(alphabet * 10, False)
        if window.blocked:
            return
        assert window.end - window.given <= 10_000
        assert len(window._text) <= 10_000 + 2 * CONTEXT + 300


def test_a_chinese_word_is_found_within_a_text_without_spaces() -> None:
    assert filtered(BLOCK, list("这是一个敏感词测试"))[:2] == ("这是一个", "deny")
