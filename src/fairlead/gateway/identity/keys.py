"""API keys: how they look, how they are made, and what of them is kept.

    fl_ 7Jx0aQm2VbKc _ 32 random characters  6 characters of checksum
        id, public     the secret part        CRC-32 of all before it

A checksum lets a typo, and what a scanner of source code takes for a key, be told from a key without asking anyone.
"""

import re
import secrets
from hashlib import sha256
from hmac import digest as hmac_digest
from zlib import crc32

from msgspec import Struct

PREFIX = "fl_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_CHARS = 12
RANDOM_CHARS = 32
"""190 bits."""
CHECKSUM_CHARS = 6
SIGNING_PURPOSE = b"fairlead request signing v1"

_KEY = re.compile(rf"{PREFIX}([0-9A-Za-z]{{{ID_CHARS}}})_[0-9A-Za-z]{{{RANDOM_CHARS + CHECKSUM_CHARS}}}", re.ASCII)


class NewKey(Struct, frozen=True, kw_only=True):
    """A key on the day it is made: the only time that `secret` is seen."""

    id: str
    secret: str
    """What the caller sends. Never stored."""
    prefix: str
    """What lists show of it."""
    digest: str
    """SHA-256 of the secret in hex: what is stored, and looked up."""
    signing_key: str
    """Hex. What hmac-sha256 request signatures are made with; derived, so that it gives away nothing of the secret."""


def new_key() -> NewKey:
    id = _random(ID_CHARS)
    body = f"{PREFIX}{id}_{_random(RANDOM_CHARS)}"
    secret = body + checksum_of(body)
    return NewKey(id=id, secret=secret, prefix=PREFIX + id, digest=digest_of(secret), signing_key=signing_key_of(secret))


def parse_key(text: str) -> str | None:
    """The id of what has a key's shape and checksum, else None. Proves nothing."""
    match = _KEY.fullmatch(text)
    if match is None or checksum_of(text[:-CHECKSUM_CHARS]) != text[-CHECKSUM_CHARS:]:
        return None
    return match[1]


def digest_of(secret: str) -> str:
    return sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def signing_key_of(secret: str) -> str:
    """Hex; anyone who holds the secret can derive it."""
    return hmac_digest(secret.encode("ascii"), SIGNING_PURPOSE, "sha256").hex()


def checksum_of(body: str) -> str:
    number, digits = crc32(body.encode("ascii")), ""
    for _ in range(CHECKSUM_CHARS):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits


def _random(num_chars: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(num_chars))
