"""What a search of a text finds, and the form that every search has."""

from collections.abc import Callable, Iterable
from typing import Literal

from msgspec import Struct

Action = Literal["block", "redact", "flag"]


class Finding(Struct, frozen=True):
    """Where, and by which rule. Never the text itself: this goes to logs and metrics."""

    rule: str
    """`deny`, `deny_patterns[0]`, `pii.email`, ...: as many as a policy has."""
    start: int
    end: int
    action: Action


Scan = Callable[[str, int, bool], tuple[list[Finding], int]]
"""`scan(text, at, whole)`: the findings that begin at `at` or later, and from where to search again when more text has come.

Whole: there is no more text, and every finding is told. Otherwise only those that more text cannot alter, which begin before the
returned place. A scan may look at CONTEXT characters before `at`, and decides by a bounded number of characters after each
place: so however a text is cut into pieces, the findings are the same.
"""
Span = tuple[int, int]
Spans = Callable[[str, int, bool], tuple[list[Span], int]]
"""A Scan that leaves it to others to name its findings."""

CONTEXT = 64


def scan_of(rule: str, action: Action, spans: Spans) -> Scan:
    def scan(text: str, at: int, whole: bool) -> tuple[list[Finding], int]:
        found, following = spans(text, at, whole)
        return [Finding(rule, start, end, action) for start, end in found] if found else [], following

    return scan


def label(rule: str) -> str:
    """What stands in place of a text that was taken out: `[EMAIL]`."""
    return f"[{rule.rpartition('.')[2].upper()}]"


def place_of(finding: Finding) -> tuple[int, int, str]:
    return finding.start, -finding.end, finding.rule


def redacted(text: str, findings: Iterable[Finding]) -> str:
    """The text without what was found. What overlaps is taken out together, under the name of the first."""
    parts: list[str] = []
    at = 0
    for finding in sorted(findings, key=place_of):
        if finding.start >= at:
            parts += (text[at : finding.start], label(finding.rule))
        at = max(at, finding.end)
    return "".join((*parts, text[at:]))
