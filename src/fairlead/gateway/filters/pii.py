"""Personal data: e-mail addresses, telephone numbers, payment cards, bank accounts. Secrets have a file of their own.

Each search anchors at what is rare (`@`, digits), looks a bounded number of characters to both sides, and then verifies.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from fairlead.core.errors import ConfigError
from fairlead.core.policy import FilterPolicy
from fairlead.gateway.filters.finding import Action, Scan, Span, Spans, scan_of
from fairlead.gateway.filters.linear import only_where
from fairlead.gateway.filters.secret import SIGNS, secrets

DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def pii(policy: FilterPolicy) -> list[Scan]:
    """Raises ConfigError where a library is missing."""
    if policy.pii == "off":
        return []
    action: Action = policy.pii
    kinds: dict[str, Callable[[], Spans]] = {
        "email": lambda: emails,
        "phone": lambda: only_where(r"[0-9](?:[ .\-/()]{0,2}[0-9]){6}", phones()),
        "card": lambda: only_where(r"[0-9](?:[ .\-\x{a0}]?[0-9]){12}", cards),
        "iban": lambda: only_where(r"[A-Za-z]{2}[0-9]{2}(?: ?[A-Za-z0-9]){11}", ibans()),
        "secret": lambda: only_where(SIGNS, secrets),
    }
    return [scan_of(f"pii.{kind}", action, kinds[kind]()) for kind in dict.fromkeys(policy.pii_kinds)]


def run_start(text: str, at: int, characters: str, reach: int) -> int:
    """Where the run of these characters at a text's end begins, at most `reach` before it and not before `at`."""
    low = max(at, len(text) - reach)
    return low + len(text[low:].rstrip(characters))


# E-mail

MAX_LOCAL, MAX_DOMAIN = 64, 190
_LOCAL = LETTERS + DIGITS + "._%+-"
_DOMAIN = LETTERS + DIGITS + ".-"
_ADDRESS = _LOCAL + "@"
_FILES = frozenset(
    [
        "png",
        "jpg",
        "jpeg",
        "gif",
        "svg",
        "webp",
        "ico",
        "css",
        "js",
        "ts",
        "json",
        "tgz",
        "gz",
        "zip",
        "py",
        "md",
        "txt",
        "html",
        "xml",
        "yaml",
        "yml",
        "toml",
        "whl",
        "jar",
        "so",
    ]
)
"""Endings of files: `icon@2x.png` is none's address."""


def emails(text: str, at: int, whole: bool) -> tuple[list[Span], int]:
    following = len(text) if whole else run_start(text, at, _ADDRESS, MAX_LOCAL + 1 + MAX_DOMAIN)
    found = []
    sign = text.find("@", at)
    while sign >= 0:
        left = text[max(0, sign - MAX_LOCAL) : sign]
        start = sign - len(left) + len(left.rstrip(_LOCAL))
        start += len(text[start:sign]) - len(text[start:sign].lstrip(".%+-"))
        if start >= following:
            break
        if start >= at and start < sign and (length := _domain_length(text[sign + 1 : sign + 1 + MAX_DOMAIN])):
            found.append((start, sign + 1 + length))
        sign = text.find("@", sign + 1)
    return found, following


def _domain_length(text: str) -> int:
    """Of the domain that a text begins with; 0: none."""
    domain = text[: len(text) - len(text.lstrip(_DOMAIN))].rstrip(".-")
    *labels, last = domain.split(".")
    if not labels or not all(labels) or not (2 <= len(last) <= 24 and last.isalpha()) or last.lower() in _FILES or domain[0] == "-":
        return 0
    return len(domain)


# Telephone

MAX_ASKED = 100
"""Numbers of one text that the library is asked about, at 60 us for each way to read it; what looks like one beyond these counts
as one."""
_PHONE_REACH = 64
_PHONE_RUN = DIGITS + " ()+-./"
_MORE = r"(?:[ .\-/()]{0,2}[0-9])"
_PHONE = re.compile(
    r"[+(0-9](?<![\w.,+/\-][+(0-9])(?=((?:"
    rf"(?<=\+)[1-9]{_MORE}{{6,14}}"  # +44 20 7946 0018
    rf"|(?<=0)0[1-9]{_MORE}{{7,13}}"  # 0044 20 ...
    r"|(?<![0-9] [(0-9])(?:"
    r"(?:(?<=1)[ .\-]\(?|(?<=\())?(?:(?<=[2-9])|[2-9])[0-9]{2}\)?[ .\-]{1,2}[2-9][0-9]{2}[ .\-][0-9]{4}"  # (212) 736-5000
    r"|(?<=0)[1-9](?:[ .\-][0-9]{2}){4}"  # 06 12 34 56 78
    r"|(?:(?<=\()0|(?<=0))[1-9][0-9]{1,3}\)?[ /\-]{1,2}[0-9](?:[ \-]?[0-9]){4,7})"  # 020 7946 0018, 030/901820
    r")(?![0-9A-Za-z_]|[.\-/][0-9])))"
)
"""Every form is unambiguous, so that no text makes it try many ways. `+` and `00` for any country; else North America, France,
Britain, Germany."""
_REGIONS = ("GB", "DE", "FR")


def phones() -> Spans:
    """Raises ConfigError."""
    try:
        import phonenumbers
    except ImportError:
        raise ConfigError("gateway filters: `pii` of phone numbers needs phonenumbers: pip install 'fairlead[filters]'") from None

    def valid(number: str, region: str | None) -> bool:
        try:
            return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
        except phonenumbers.NumberParseException:
            return False

    def length(number: str) -> int:
        """Of the telephone number that begins a text; 0: none."""
        for _ in range(3):
            if number[0] == "+":
                known = valid(number, None)
            elif number.startswith("00"):
                known = valid("+" + number[2:], None)
            elif number.lstrip("(")[0] == "0":
                known = any(valid(number, region) for region in _REGIONS)
            else:
                known = valid(number, "US")
            if known:
                return len(number)
            shorter = number.rstrip(DIGITS).rstrip(" .-/()")
            if sum(map(str.isdigit, shorter)) < 8:
                return 0
            number = shorter
        return 0

    def scan(text: str, at: int, whole: bool) -> tuple[list[Span], int]:
        following = len(text)
        if not whole:
            start = run_start(text, at, _PHONE_RUN, _PHONE_REACH)
            following -= len(text[start:].lstrip(" .-/)"))
        found = []
        for num_asked, match in enumerate(_PHONE.finditer(text, at)):
            if match.start() >= following:
                break
            number = match[0] + match[1]
            size = length(number) if num_asked < MAX_ASKED else len(number)
            if size:
                found.append((match.start(), match.start() + size))
        return found, following

    return scan


# Payment cards

_CARD_REACH = 32
_CARD_RUN = DIGITS + " -.\u00a0"
_CARD = re.compile(
    r"[0-9](?<![\w.\-][0-9])(?<![0-9]{4} [0-9])(?=([0-9]{3}(?:"
    r"([ .\-\u00a0])(?:[0-9]{4}\2[0-9]{4}\2[0-9]{4}(?:\2[0-9]{1,3}(?![0-9]))?|[0-9]{6}\2[0-9]{4,5})"
    r"|[0-9]{9,15}"
    r"))(?![0-9A-Za-z_]))"
)
"""4-4-4-4, 4-4-4-4-3, 4-6-5, 4-6-4 or no groups at all."""


def cards(text: str, at: int, whole: bool) -> tuple[list[Span], int]:
    following = len(text)
    if not whole:
        start = run_start(text, at, _CARD_RUN, _CARD_REACH)
        following -= len(text[start:].lstrip(" -.\u00a0"))
    found = []
    for match in _CARD.finditer(text, at):
        if match.start() >= following:
            break
        number = match[0] + match[1]
        for end in (len(number), 19) if match[2] and len(number) > 19 else (len(number),):
            if is_card("".join(each for each in number[:end] if each in DIGITS)):
                found.append((match.start(), match.start() + end))
                break
    return found, following


def is_card(digits: str) -> bool:
    """A number that a known brand could have given out."""
    return len(digits) in _brand_lengths(digits) and _luhn(digits)


def _brand_lengths(digits: str) -> Sequence[int]:
    two, three, four = int(digits[:2]), int(digits[:3]), int(digits[:4])
    if digits[0] == "4":
        return 13, 16, 19  # Visa
    if 51 <= two <= 55 or 2221 <= four <= 2720 or 2200 <= four <= 2204:
        return (16,)  # Mastercard, Mir
    if two in (34, 37):
        return (15,)  # American Express
    if four == 6011 or two in (62, 65) or 644 <= three <= 649 or 3528 <= four <= 3589:
        return 16, 17, 18, 19  # Discover, UnionPay, JCB
    if two in (36, 38, 39) or 300 <= three <= 305:
        return (14,)  # Diners Club
    return ()


def _luhn(digits: str) -> bool:
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


# Bank accounts

_IBAN_REACH = 72
_IBAN = re.compile(r"[0-9]{2}(?<=[A-Za-z]{2}[0-9]{2})(?<![A-Za-z0-9_][A-Za-z]{2}[0-9]{2})(?=((?: ?[A-Za-z0-9]){11,30}))")
_IBAN_BEGUN = re.compile(r"(?<![A-Za-z0-9_])[A-Za-z](?:[A-Za-z](?:[0-9](?:[0-9](?: ?[A-Za-z0-9])* ?)?)?)?\Z")
_STRUCTURE = re.compile(r"([0-9]+)!([nac])")
_CLASSES = {"n": "[0-9]", "a": "[A-Z]", "c": "[A-Z0-9]"}


def ibans() -> Spans:
    """Raises ConfigError."""
    try:
        from stdnum import numdb
    except ImportError:
        raise ConfigError("gateway filters: `pii` of bank accounts needs python-stdnum: pip install 'fairlead[filters]'") from None
    countries: Any = numdb.get("iban")
    known: dict[str, tuple[int, re.Pattern[str]] | None] = {}

    def form(country: str) -> tuple[int, re.Pattern[str]] | None:
        """How long a country's account numbers are, and what they look like, after the first four characters."""
        if country not in known:
            structure = countries.info(country)[0][1].get("bban", "")
            parts = _STRUCTURE.findall(structure)
            number = re.compile("".join(f"{_CLASSES[kind]}{{{size}}}" for size, kind in parts))
            known[country] = (sum(int(size) for size, _ in parts), number) if parts else None
        return known[country]

    def scan(text: str, at: int, whole: bool) -> tuple[list[Span], int]:
        following = len(text)
        if not whole:
            begun = _IBAN_BEGUN.search(text, max(at, len(text) - _IBAN_REACH))
            following = begun.start() if begun else len(text)
        found = []
        for match in _IBAN.finditer(text, at):
            start = match.start() - 2
            if start >= following:
                break
            country = form(text[start : start + 2].upper())
            if start < at or country is None:
                continue
            length = _length_of(match[1], country[0])
            end = match.end() + length
            if not length or text[end : end + 1].isalnum():
                continue
            number = match[1][:length].replace(" ", "").upper()
            if country[1].fullmatch(number) and _mod_97(number + text[start : start + 4].upper()) == 1:
                found.append((start, end))
        return found, following

    return scan


def _length_of(text: str, num_characters: int) -> int:
    """How much of a text holds so many characters that are no spaces; 0: it has not so many."""
    seen = 0
    for place, character in enumerate(text):
        seen += character != " "
        if seen == num_characters:
            return place + 1
    return 0


def _mod_97(number: str) -> int:
    return int("".join(str(int(character, 36)) for character in number)) % 97
