"""Words and patterns that are not let through."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.core.errors import ConfigError
from fairlead.core.policy import FilterPolicy
from fairlead.gateway.filters.deny import deny_patterns, deny_words
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.filters.finding import Scan
from fairlead.gateway.filters.folding import Fold


def hit(scan: Scan, text: str) -> str | None:
    findings = scan(text, 0, True)[0]
    return text[findings[0].start : findings[0].end] if findings else None


@pytest.mark.parametrize(
    ("word", "text", "expected"),
    [
        ("bomb", "a Bomb!", "Bomb"),
        ("bomb", "bombastic", None),
        ("bomb", "a_bomb", None),
        ("bomb", "bomb7", None),
        ("bomb", "bomb", "bomb"),
        ("secret project", "the SECRET\n  project.", "SECRET\n  project"),
        ("secret project", "secret projects", None),
        ("Straße", "STRASSE", "STRASSE"),
        ("straße", "strasse", "strasse"),
        ("naïve", "NAI\u0308VE", "NAI\u0308VE"),  # composed and not
        ("ano", "el año", None),  # a mark makes another letter
        ("bomb", "ｂｏｍｂ", "ｂｏｍｂ"),  # full width
        ("bomb", "b\u200bo\u00admb", "b\u200bo\u00admb"),  # invisible characters
        ("bomb", "bоmb", "bоmb"),  # a Cyrillic о
        ("бомба", "БОМБА!", "БОМБА"),
        ("c++", "I write C++17", "C++"),
        ("@home", "me@home", "@home"),
        ("敏感词", "这是敏感词吗", "敏感词"),
        ("bomb", "b0mb", None),  # not done: digits for letters
        ("bomb", "b o m b", None),  # not done: spaces between letters
        ("ΟΔΟΣ", "οδος", "οδος"),
    ],
)
def test_words_are_found_whole_and_in_any_spelling_that_looks_the_same(word: str, text: str, expected: str | None) -> None:
    scan = deny_words((word,))
    assert hit(scan, text) == expected
    assert hit(scan, f"é {text} 漢") == expected


def test_a_list_of_ten_thousand_words_is_one_search() -> None:
    words = tuple(f"word{n}x" for n in range(10_000))
    scan = deny_words(words)
    assert hit(scan, "harmless " * 1000 + "word9999x") == "word9999x"
    assert hit(scan, "harmless " * 1000 + "word99990x") is None


@given(st.text())
def test_a_text_folded_character_by_character_knows_where_it_came_from(text: str) -> None:
    fold = Fold()
    places = fold.places(text)
    assert places is None or (len(places) == len(fold(text)) and places == sorted(places))


def test_patterns_are_found_and_named_by_their_number() -> None:
    scan = deny_patterns((r"never", r"(?i)project\s+x\d"))
    (finding,) = scan("about PROJECT  X7.", 0, True)[0]
    assert (finding.rule, finding.start, finding.end, finding.action) == ("deny_patterns[1]", 6, 17, "block")
    assert scan("é" * 10 + "never", 0, True)[0][0].start == 10


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (("ok", "(a"), r"deny_patterns\[1\].*missing \)"),
        ((r"(?<=a)b",), r"deny_patterns\[0\].*invalid perl operator"),
        ((r"(a)\1",), r"deny_patterns\[0\].*invalid escape"),
        (("a*",), r"deny_patterns\[0\].*matches a text of no characters"),
        (("((a{100}){100}){100}",), r"deny_patterns\[0\]"),
        (("a" * 1001,), r"deny_patterns\[0\].*1000"),
        (("a",) * 201, "at most 200"),
    ],
)
def test_a_pattern_that_is_wrong_is_named(patterns: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Filters.of(FilterPolicy(deny_patterns=patterns))


@pytest.mark.parametrize("word", ["", "  ", "\u200b", "x" * 201])
def test_a_word_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="`deny` holds"):
        Filters.of(FilterPolicy(deny=("fine", word)))


@pytest.mark.parametrize("unit", ["a", "badwor", "badword\u200b" + "\u200b" * 1100 + "x ", "e\u0301", "bad ", "б"])
def test_hostile_texts_cost_time_in_proportion_to_their_length(unit: str) -> None:
    scans = (deny_words(("badword", "bad word here", "badwordx")), deny_patterns((r"(a+)+b", r"(x|xx)*y", r"(.*)(.*)(.*)z")))

    def seconds(size: int) -> float:
        text = (unit * (size // len(unit) + 1))[:size]
        best = 1e9
        for _ in range(2):
            start = time.perf_counter()
            for scan in scans:
                scan(text, 0, True)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(64_000) / max(seconds(8_000), 1e-4) < 32
