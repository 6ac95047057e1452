"""Keys, tokens, private keys and passwords, by the forms in which they are written."""

import re
from math import log2

from fairlead.gateway.filters.finding import Span
from fairlead.gateway.identity.keys import PREFIX, parse_key

_WORD = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
_GRAPHIC = "".join(map(chr, range(33, 127)))
_LOWER = {code: code + 32 for code in range(65, 91)}
RUN_REACH = 256
OWN_CHARS = 54

_TOKENS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (prefix, re.compile(body))
    for prefix, body in (
        ("AKIA", r"AKIA[A-Z0-9]{16}(?![A-Za-z0-9_-])"),  # Amazon, long-lived
        ("ASIA", r"ASIA[A-Z0-9]{16}(?![A-Za-z0-9_-])"),  # Amazon, session
        ("ghp_", r"ghp_[A-Za-z0-9]{36,240}"),  # GitHub, and the next five
        ("gho_", r"gho_[A-Za-z0-9]{36,240}"),
        ("ghu_", r"ghu_[A-Za-z0-9]{36,240}"),
        ("ghs_", r"ghs_[A-Za-z0-9]{36,240}"),
        ("ghr_", r"ghr_[A-Za-z0-9]{36,240}"),
        ("github_pat_", r"github_pat_[A-Za-z0-9_]{22,240}"),
        ("glpat-", r"glpat-[A-Za-z0-9_-]{20,64}"),  # GitLab
        ("xoxb-", r"xoxb-[A-Za-z0-9-]{10,240}"),  # Slack, and the next four
        ("xoxp-", r"xoxp-[A-Za-z0-9-]{10,240}"),
        ("xoxa-", r"xoxa-[A-Za-z0-9-]{10,240}"),
        ("xoxr-", r"xoxr-[A-Za-z0-9-]{10,240}"),
        ("xoxs-", r"xoxs-[A-Za-z0-9-]{10,240}"),
        ("sk-", r"sk-(?=[A-Za-z_-]{0,239}[0-9])[A-Za-z0-9_-]{20,240}"),  # OpenAI, Anthropic and who imitates them
        ("sk_live_", r"sk_live_[A-Za-z0-9]{16,128}"),  # Stripe, and the next
        ("rk_live_", r"rk_live_[A-Za-z0-9]{16,128}"),
        ("AIza", r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),  # Google
        ("hf_", r"hf_[A-Za-z0-9]{30,64}"),  # Hugging Face
        ("npm_", r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9_-])"),
    )
)

_NAMES = ("password", "passwd", "passphrase", "pwd", "secret", "token", "credential", "credentials", "key")
SIGNS = (
    "|".join(prefix for prefix in (*(prefix for prefix, _ in _TOKENS), PREFIX, "eyJ", "-----BEGIN "))
    + rf"|(?i)(?:{'|'.join(_NAMES)})[ \t\"'`\\]{{0,40}}[=:]|bearer[ \t]"
)
"""RE2: a text with none of these holds no secret."""
_NAME = re.compile(r"(?:(password|passwd|passphrase|pwd)|secret|token|credentials?|(?:api|access|private|auth|secret|account)[ _-]?key)\Z")
_VALUE = re.compile(r"[\\\"'` \t]{0,4}([A-Za-z0-9!#$%&*+./:=?@^_~|-]{8,128})")
_BEARER = re.compile(r"(?i)\bbearer[ \t]{1,4}(?=([A-Za-z0-9._~+/=-]{16,240}))")
_PLACEHOLDER = re.compile(
    r"(?i)[$%*.]|x{4}|your|example|placeholder|changeme|redacted|os\.|process\.|env[.(\[]|https?:|none|null|true|false"
)

_SIGNS = "!#$%&*+=?@^~|"

MAX_JWT_CHARS = 4096
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]{8,1000}\.eyJ[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]{0,1000}")
_JWT_RUN = _WORD + "."

MAX_PEM_CHARS, MAX_MARK = 8192, 64
_BEGIN, _END = "-----BEGIN ", "-----END "
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PEM_BEGUN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,60}-{0,4}\Z")
_PEM_BODY = re.compile(r"[A-Za-z0-9+/=\s:,\\-]{0,8192}")
_PEM_LINES = re.compile(r"(?:(?:\s|\\n){0,4}[A-Za-z0-9+/=]{20,100}){0,100}")
_PEM_END = re.compile(r"-----END [A-Z0-9 ]{0,40}-----")


def secrets(text: str, at: int, whole: bool) -> tuple[list[Span], int]:
    following = len(text) if whole else _unsure(text, at)
    found = _tokens(text, at, following) + _assigned(text, at, following)
    if "eyJ" in text:
        found += _jwts(text, at, following)
    if _BEGIN in text:
        found += _pems(text, at, following)
    return found, following


def _unsure(text: str, at: int) -> int:
    """Where something may begin of which the end has not come yet."""
    low = max(at, len(text) - RUN_REACH)
    following = low + len(text[low:].rstrip(_GRAPHIC))
    if "eyJ" in text:
        low = max(at, len(text) - MAX_JWT_CHARS)
        begun = text.find("eyJ", low + len(text[low:].rstrip(_JWT_RUN)))
        following = following if begun < 0 else min(following, begun)
    begun = text.find(_BEGIN, at)
    while 0 <= begun < following:
        if _pem_end(text, begun) is None:
            return begun
        begun = text.find(_BEGIN, begun + 1)
    return following


def _begins(text: str, place: int) -> bool:
    return place == 0 or text[place - 1] not in _WORD


def _tokens(text: str, at: int, following: int) -> list[Span]:
    found = []
    for prefix, body in _TOKENS:
        place = text.find(prefix, at, following + len(prefix))
        while 0 <= place < following:
            if _begins(text, place) and (match := body.match(text, place)):
                found.append(match.span())
            place = text.find(prefix, place + 1)
    place = text.find(PREFIX, at, following + len(PREFIX))
    while 0 <= place < following:
        if _begins(text, place) and parse_key(text[place : place + OWN_CHARS]) is not None:
            found.append((place, place + OWN_CHARS))
        place = text.find(PREFIX, place + 1)
    return found


def _assigned(text: str, at: int, following: int) -> list[Span]:
    """`password = ...`, `"api_key": "..."`, `Authorization: Bearer ...`: the value."""
    found: list[Span] = []
    low = max(0, at - 48)
    lower = text[low:].translate(_LOWER)  # `str.lower` may change the length
    if "bearer" in lower:
        bearers = (match for match in _BEARER.finditer(text, low) if at <= match.start(1) < following)
        found += [match.span(1) for match in bearers if _looks_random(match[1], 16)]
    if any(word in lower for word in _NAMES):
        for match in re.finditer("[=:]", lower):
            before = lower[max(0, match.start() - 40) : match.start()].rstrip(" \t\"'`\\")
            if not before.endswith(_NAMES):
                continue
            sign, name = low + match.start(), _NAME.search(before)
            value = _VALUE.match(text, sign + 1) if name else None
            if name is None or value is None or not at <= value.start(1) < following:
                continue
            if _is_password(value[1]) if name[1] else _looks_random(value[1], 16):
                found.append(value.span(1))
    return found


def _is_password(value: str) -> bool:
    """A letter with a digit or a sign among them, and no name of a variable or a place for one."""
    value = value.rstrip(".:!?")
    return any(map(str.isalpha, value)) and any(each.isdigit() or each in _SIGNS for each in value) and _PLACEHOLDER.match(value) is None


def _looks_random(value: str, least: int) -> bool:
    if len(value) < least or _PLACEHOLDER.match(value) or not any(map(str.isdigit, value)) or not any(map(str.isalpha, value)):
        return False
    shares = [value.count(each) / len(value) for each in set(value)]
    return -sum(share * log2(share) for share in shares) >= 3.0


def _jwts(text: str, at: int, following: int) -> list[Span]:
    found = []
    place = text.find("eyJ", at)
    while 0 <= place < following:
        if _begins(text, place) and (match := _JWT.match(text, place)):
            found.append(match.span())
        place = text.find("eyJ", place + 1)
    return found


def _pems(text: str, at: int, following: int) -> list[Span]:
    found = []
    place = text.find(_BEGIN, at)
    while 0 <= place < following:
        if _PEM.match(text, place):
            found.append((place, _pem_end(text, place) or _without_end(text, place)))
        place = text.find(_BEGIN, place + 1)
    return found


def _pem_end(text: str, begun: int) -> int | None:
    """Where a private key's block ends, or its beginning proves none; None: it may go on."""
    head = _PEM.match(text, begun)
    if head is None:
        return None if _PEM_BEGUN.match(text, begun) else begun
    body = _PEM_BODY.match(text, head.end())
    stop = body.end() if body else head.end()
    end = text.find(_END, head.end(), stop)
    if end >= 0 and (match := _PEM_END.match(text, end)):
        return match.end()
    if stop < len(text) and (end < 0 or len(text) - end > MAX_MARK):
        return _without_end(text, begun)
    return None


def _without_end(text: str, begun: int) -> int:
    """The head and the lines that follow it, of a block that is cut off or goes on for too long."""
    head = _PEM.match(text, begun)
    lines = _PEM_LINES.match(text, head.end(), head.end() + MAX_PEM_CHARS) if head else None
    return lines.end() if lines else begun
