"""Texts that are kept for people to read: without what is private in them."""

from collections.abc import Callable

from fairlead.core.errors import ConfigError
from fairlead.core.policy import FilterPolicy
from fairlead.gateway.filters.finding import redacted
from fairlead.gateway.filters.pii import pii


def redaction() -> Callable[[str], str] | None:
    """Puts `[EMAIL]` and the like in place of every kind of personal data. None where the extra that finds it is missing."""
    try:
        scans = tuple(pii(FilterPolicy(pii="redact")))
    except ConfigError:
        return None

    def redact(text: str) -> str:
        found = [finding for scan in scans for finding in scan(text, 0, True)[0]]
        return redacted(text, found) if found else text

    return redact
