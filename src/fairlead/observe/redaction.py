"""What must not stand in a log: secrets, and the texts that people send to models.

A key says what its value is (`authorization`, `messages`), wherever it stands; in all other texts secrets are known by their form.
What looks for secrets in requests knows more forms and reads more slowly: `fairlead.gateway.filters.secret`.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

SECRET = "[SECRET]"
MAX_CHARS = 16_384
"""Of one text; a stack trace has its place in it."""
MAX_ITEMS = 200
"""Of one list or mapping."""
MAX_DEPTH = 12

_SECRET_KEY = re.compile(
    r"(?:^|_)(?:authorization|cookies?|password|passwd|passphrase|pwd|secrets?|token|api_?key|private_?key|signing_?key|credentials?"
    r"|signature|signature_input|dsn)$"
)
TEXT_KEYS = frozenset(
    (
        "prompt",
        "negative_prompt",
        "messages",
        "content",
        "input",
        "inputs",
        "text_input",
        "instructions",
        "completion",
        "arguments",
        "documents",
    )
)
"""Their values are what people asked, or were answered."""

_TOLD = re.compile(r"\[TEXT(?: of \d{1,12})?\]")
_SIGNS = (
    "fl_",
    "sk-",
    "whsec_",
    "eyj",
    "://",
    "bearer",
    "basic",
    "authorization",
    "signature",
    "cookie",
    "pass",
    "pwd",
    "secret",
    "token",
    "api",
    "private",
)
"""A text in lower case with none of these holds no secret."""
MIN_CHARS = 8
"""`pwd=abcd` is the shortest of all."""
_FORMS = re.compile(
    r"fl_[0-9A-Za-z]{12}_[0-9A-Za-z]{8,}"  # a key of ours: fairlead.gateway.identity.keys
    r"|whsec_[0-9A-Za-z+/=_-]{8,}"
    r"|\bsk-[0-9A-Za-z_-]{16,}"
    r"|eyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]*)?"
    r"|-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]{0,40}-----|\Z)"
    r"|(?P<before>\b[a-z][a-z0-9+.-]{1,30}://[^\s/:@\"']{0,256}:)[^\s/@\"']{1,512}(?=@)"  # the password of a URL
    r"|(?P<name>(?i:\b(?:bearer|basic)[ \t]+|(?:\b|_)(?:authorization|signature(?:-input)?|(?:set-)?cookie|password|passwd|passphrase|pwd|secret|token"
    r"|api[_-]?key|private[_-]?key)[\"']?[ \t]*[=:][ \t]*(?:(?:bearer|basic)[ \t]+)?[\"']?))(?!fl_\.\.\.|(?i:bearer|basic)[ \t])(?P<value>[^\s\"',;&(){}\[\]<>]{4,})",
    re.DOTALL,
)
# What ends a line or is drawn otherwise than it is written: control characters, line separators, changes of direction.
_UNSHOWN = "\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_CONTROL = re.compile(f"[{_UNSHOWN}]")
_CONTROL_BUT_LINES = re.compile(f"(?!\n)[{_UNSHOWN}]")
_BEYOND_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


@lru_cache(maxsize=4096)
def kind_of(key: str) -> Literal["secret", "text", ""]:
    """What a key says of its value."""
    name = key.lower().replace("-", "_")
    if _SECRET_KEY.search(name):
        return "secret"
    return "text" if name in TEXT_KEYS else ""


def without_secrets(text: str) -> str:
    """The same text with `[SECRET]` in place of what has the form of one."""
    return _FORMS.sub(_hidden, text) if may_hold_secrets(text) else text


def may_hold_secrets(text: str) -> bool:
    if len(text) < MIN_CHARS:
        return False
    low = text.lower()
    for sign in _SIGNS:  # noqa: SIM110  a generator would take longer than the search
        if sign in low:
            return True
    return False


def _hidden(match: re.Match[str]) -> str:
    return (match["before"] or match["name"] or "") + SECRET


def redacted(value: Any, *, texts: bool = False, depth: int = 0) -> Any:
    """A value as it may stand in a log: of types that JSON has, bounded in size, without secrets. `texts`: with texts."""
    match value:
        case str():
            if len(value) > MAX_CHARS:
                value = f"{value[:MAX_CHARS]} ... ({len(value)} characters)"
            return without_secrets(value)
        case None | bool() | int() | float():
            return value
        case bytes() | bytearray() | memoryview():
            return f"[{len(value)} bytes]"
        case Mapping():
            if depth >= MAX_DEPTH:
                return "..."
            pairs = list(value.items())[:MAX_ITEMS]
            return {_text_of(key): _of(_text_of(key), each, texts, depth) for key, each in pairs}
        case list() | tuple() | set() | frozenset():
            if depth >= MAX_DEPTH:
                return "..."
            return [redacted(each, texts=texts, depth=depth + 1) for each in list(value)[:MAX_ITEMS]]
    return redacted(_text_of(value), texts=texts, depth=depth)


def _of(key: str, value: Any, texts: bool, depth: int) -> Any:
    kind = kind_of(key)
    if kind == "secret" and isinstance(value, (str, bytes, list, tuple, Mapping)) and value:
        return SECRET
    if kind == "text" and not texts and value is not None and not isinstance(value, (bool, int, float)):
        if isinstance(value, str) and _TOLD.fullmatch(value):  # by the process that wrote the line
            return value
        return f"[TEXT of {len(value)}]" if hasattr(value, "__len__") else "[TEXT]"
    return redacted(value, texts=texts, depth=depth + 1)


def _text_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return str(value)
    except Exception:
        return f"[{type(value).__name__} that cannot be shown]"


def redact_event(event: dict[str, Any], *, texts: bool = False) -> dict[str, Any]:
    """A line, as structlog has it."""
    for key, value in event.items():
        if (kind := type(value)) is int or kind is float:
            continue
        if kind is str and len(value) <= MAX_CHARS and not kind_of(key):
            if may_hold_secrets(value):
                event[key] = without_secrets(value)
        else:
            event[key] = _of(key, value, texts, 0)
    return event


# What forges a line, or colours a terminal


def printable(text: str, *, lines: bool = False) -> str:
    """For a terminal: characters that move its cursor, end a line or turn the direction are written as escapes. `lines`: but line breaks."""
    return (_CONTROL_BUT_LINES if lines else _CONTROL).sub(_escaped, text)


def plain_json(text: str) -> str:
    r"""A line of JSON that means the same, with such characters as \u escapes: JSON itself only has those below the space."""
    return text if text.isascii() and "\x7f" not in text else _BEYOND_JSON.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return {9: r"\t", 10: r"\n", 13: r"\r"}.get(code) or f"\\u{code:04x}"
