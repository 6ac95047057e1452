"""RE2: regular expressions whose time is linear in the text, whatever the text and the pattern."""

from typing import Any

from fairlead.core.errors import ConfigError
from fairlead.gateway.filters.finding import Span, Spans


def re2_pattern(pattern: str, where: str, max_mem: int = 8 << 20) -> Any:
    """Over UTF-8. Raises ConfigError that says where the pattern stands."""
    try:
        import re2
    except ImportError:
        raise ConfigError(f"{where} needs RE2: pip install 'fairlead[filters]'") from None
    options = re2.Options()
    options.log_errors = False
    options.max_mem = max_mem
    try:
        return re2.compile(pattern.encode(), options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise ConfigError(f"{where} is no regular expression that RE2 accepts: {reason[:200]}") from None


def only_where(pattern: str, spans: Spans) -> Spans:
    """A search that costs more than one look of RE2's, made only in texts where that finds `pattern`. Raises ConfigError."""
    compiled = re2_pattern(pattern, "gateway filters: `pii`")

    def scan(text: str, at: int, whole: bool) -> tuple[list[Span], int]:
        if whole and at == 0 and compiled.search(text.encode("utf-8", "replace")) is None:
            return [], len(text)
        return spans(text, at, whole)

    return scan
