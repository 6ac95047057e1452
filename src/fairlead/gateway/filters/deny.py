"""Deny lists: words and phrases, and the operator's own patterns. All by RE2: linear time whatever the text and the pattern."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from fairlead.core.errors import ConfigError
from fairlead.gateway.filters.finding import CONTEXT, Finding, Scan
from fairlead.gateway.filters.folding import Fold, folded_place, plain_place
from fairlead.gateway.filters.linear import re2_pattern

MAX_WORD_CHARS = 200
MAX_SPAN = 1024
"""Characters of a text that one word may be spread over, by spaces and invisible characters between its own."""
MAX_PATTERN_CHARS = 1000
MAX_PATTERNS = 200
PATTERN_REACH = 256
"""Characters of a stream that are held back where there are patterns: a longer match is not found in time."""

_LETTER = r"\pL\pN\pM_"
_WORD_START = re.compile(r"(?<!\w)\S|[^\w\s]")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Scripts that write no spaces between words: a word is found within a text of them."""


def deny_words(words: Sequence[str]) -> Scan:
    """One finding at most: the first. Raises ConfigError."""
    fold = Fold()
    entries = sorted({_entry(word, fold) for word in words})
    pattern = re2_pattern(_alternation(entries), "gateway filters: `deny`", max_mem=64 << 20)
    anywhere = any(_UNSPACED.match(entry) for entry in entries)
    reach = max(len(entry) + 16 * entry.count(" ") for entry in entries) + 1

    def scan(text: str, at: int, whole: bool) -> tuple[list[Finding], int]:
        if whole and at == 0 and pattern.search(fold.quickly(text).encode("utf-8", "replace")) is None:
            return [], len(text)
        begin = max(0, at - CONTEXT)
        part = text[begin:] if begin else text
        folded, places = fold(part), fold.places(part)
        data = folded.encode("utf-8", "replace")
        # one character more than is searched, which says whether a word begins there
        first = max(0, folded_place(places, at - begin) - 1)
        offset = first if places is None else len(folded[:first].encode("utf-8", "replace"))
        following = len(text)
        if not whole:
            partial = begin + plain_place(places, _partial(folded, first), len(part))
            following = max(at, partial, len(text) - MAX_SPAN)
        seen, low = 0, 0  # bytes, and characters, so that nothing is counted twice
        while (match := pattern.search(data, offset)) is not None:
            first_byte, last_byte = _word_span(match)
            low += len(data[seen:first_byte].decode("utf-8", "replace"))
            high = low + len(data[first_byte:last_byte].decode("utf-8", "replace"))
            seen, offset = first_byte, first_byte + 1
            start, end = begin + plain_place(places, low, len(part)), begin + plain_place(places, high, len(part))
            if start >= following:
                break
            if start >= at and end - start <= MAX_SPAN:
                return [Finding("deny", start, end, "block")], following
        return [], following

    def _partial(folded: str, first: int) -> int:
        """Where in a text the first word begins that its continuation may complete."""
        low = max(first, len(folded) - reach)
        starts = range(low, len(folded)) if anywhere else (match.start() for match in _WORD_START.finditer(folded, low))
        for start in starts:
            rest = folded[start:]
            beginning = " ".join(rest.split()) + (" " if rest[-1].isspace() else "")
            place = bisect_left(entries, beginning)
            if place < len(entries) and entries[place].startswith(beginning):
                return start
        return len(folded)

    return scan


def _entry(word: str, fold: Fold) -> str:
    entry = " ".join(fold(word).split())
    if not entry or len(entry) > MAX_WORD_CHARS:
        raise ConfigError(f"gateway filters: `deny` holds {word[:50]!r}: write a word or phrase of 1 to {MAX_WORD_CHARS} characters")
    return entry


def _alternation(entries: Sequence[str]) -> str:
    """Whole words: where an entry begins or ends with a letter of a script that writes spaces, no letter may stand beside it."""
    forms: dict[tuple[bool, bool], list[str]] = {}
    for entry in entries:
        edges = (_bounded(entry[0]), _bounded(entry[-1]))
        forms.setdefault(edges, []).append(r"[\s\x{85}\x{a0}\pZ]{1,16}".join(re.escape(word) for word in entry.split(" ")))
    return "|".join(
        (rf"(?:^|[^{_LETTER}])" if left else "") + f"({'|'.join(words)})" + (rf"(?:$|[^{_LETTER}])" if right else "")
        for (left, right), words in forms.items()
    )


def _bounded(edge: str) -> bool:
    return (edge.isalnum() or edge == "_") and _UNSPACED.match(edge) is None


def _word_span(match: Any) -> tuple[int, int]:
    spans: list[tuple[int, int]] = [match.span(group) for group in range(1, len(match.groups()) + 1)]
    return next(span for span in spans if span[0] >= 0)


def deny_patterns(patterns: Sequence[str]) -> Scan:
    """One finding at most: the first. Raises ConfigError naming the pattern that is wrong."""
    if len(patterns) > MAX_PATTERNS:
        raise ConfigError(f"gateway filters: at most {MAX_PATTERNS} `deny_patterns`, not {len(patterns)}")
    compiled = [_pattern(index, pattern) for index, pattern in enumerate(patterns)]

    def scan(text: str, at: int, whole: bool) -> tuple[list[Finding], int]:
        begin = max(0, at - CONTEXT)
        data = (text[begin:] if begin else text).encode("utf-8", "replace")
        simple = len(data) == len(text) - begin
        offset = at - begin if simple else len(text[begin:at].encode("utf-8", "replace"))
        following = len(text) if whole else max(at, len(text) - PATTERN_REACH)
        found: list[Finding] = []
        for index, pattern in enumerate(compiled):
            match = pattern.search(data, offset)
            if match is None:
                continue
            start, end = (begin + (place if simple else len(data[:place].decode("utf-8", "replace"))) for place in match.span())
            if start < following or whole:
                found.append(Finding(f"deny_patterns[{index}]", start, max(end, start + 1), "block"))
        return found, following

    return scan


def _pattern(index: int, pattern: str) -> Any:
    where = f"gateway filters: `deny_patterns[{index}]`"
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ConfigError(f"{where} is longer than {MAX_PATTERN_CHARS} characters")
    compiled = re2_pattern(pattern, where)
    if compiled.search(b"") is not None:
        raise ConfigError(f"{where} matches a text of no characters, and so everything: {pattern!r}")
    return compiled
