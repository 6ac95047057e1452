"""Signed requests: RFC 9421 HTTP message signatures over RFC 9530 digests.

A signature covers what is asked (method, authority, target, digest of the body), when and by whom. `verify` proves all of it;
`Nonces.use`, or `SharedNonces.use` where there are several gateways, then sees to it that a proof counts once.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from msgspec import Struct

from fairlead.core.caller import Envelope
from fairlead.core.errors import ConfigError, LimitExceeded, Unauthenticated, Unreachable

if TYPE_CHECKING:
    from redis.asyncio import Redis

HMAC, ED25519 = "hmac-sha256", "ed25519"
TAG = "fairlead"
DIGESTS: dict[str, Callable[[bytes | memoryview], bytes]] = {
    "sha-256": lambda body: hashlib.sha256(body).digest(),
    "sha-512": lambda body: hashlib.sha512(body).digest(),
}
TARGETS = (("@target-uri",), ("@request-target",), ("@path", "@query"))
"""Any of these says the whole of what is asked for."""
MEANING = (b"content-encoding", b"inference-header-content-length")
"""Headers that say what the body means: covered where they are sent, as is everything that begins with x-fairlead-."""
MAX_FIELD_CHARS = 4096
MAX_LABELS = 4
MAX_COMPONENTS = 32
MAX_NONCE_CHARS = 128
ACCEPT_SIGNATURE = f'sig=("@method" "@authority" "@path" "@query" "content-digest");created;tag="{TAG}"'


class SigningKey(Struct, frozen=True):
    """What proves that a request was signed by a key."""

    id: str
    hmac: bytes = b""
    """The shared secret; b"" where there is none."""
    ed25519: str = ""
    """The public key in PEM; "" where there is none."""


class Verified(Struct, frozen=True):
    """A signature that is right, and has yet to be looked up among those that were used."""

    key: str
    nonce: str
    until: float
    """When it would be refused as too old: its nonce must be remembered until then."""
    covered: frozenset[str]
    """The components that the signature covers; nothing else of the message is proved."""


# Reading: the part of structured fields (RFC 8941) that signatures are written in, as its serialisation writes it.
# Possessive quantifiers never look back: reading is linear.

_KEY = r"[a-z*][a-z0-9_.*-]*+"
_STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*+"'
_BYTES = r":[A-Za-z0-9+/]*+={0,2}:"
_BARE = rf"(?:-?[0-9]{{1,15}}+(?:\.[0-9]{{1,3}}+)?+|{_STRING}|{_BYTES}|\?[01]|[A-Za-z*][!#-'*+.^_`|~:/0-9A-Za-z-]*+)"
_PARAM = rf";({_KEY})(?:=({_BARE}))?+"
_PARAMS = rf"(?:;{_KEY}(?:={_BARE})?+)*+"
_COMPONENT = rf"{_STRING}{_PARAMS}"
_INPUT = re.compile(rf"({_KEY})=(\(((?:{_COMPONENT}(?: {_COMPONENT})*+)?+)\)({_PARAMS}))")
_BYTE_SEQUENCE = re.compile(rf"({_KEY})=:([A-Za-z0-9+/]*+={{0,2}}):")
_COMMA = re.compile(r"[ \t]*+,[ \t]*+")
_ONE_PARAM = re.compile(_PARAM)
_ONE_COMPONENT = re.compile(rf"({_STRING})({_PARAMS})")
_PLAIN_NAME = re.compile(r'"@?[a-z0-9!#$%&\'*+.^_`|~-]+"')
_OUR_TAG = f'"{TAG}"'
_NUMBERS = ("created", "expires")
_STRINGS = ("nonce", "keyid", "alg", "tag")


class _Input(Struct, frozen=True):
    """One member of Signature-Input."""

    text: str
    """What the signature's last line says of itself."""
    components: str
    parameters: list[tuple[str, str]]
    """(name, value as written)"""


def _members(field: str, text: str, member: re.Pattern[str]) -> dict[str, re.Match[str]]:
    """The members of a dictionary by label."""
    found: dict[str, re.Match[str]] = {}
    at = 0
    while len(text) <= MAX_FIELD_CHARS and len(found) < MAX_LABELS:
        match = member.match(text, at)
        if match is None or match[1] in found:
            break
        found[match[1]] = match
        if match.end() == len(text):
            return found
        comma = _COMMA.match(text, match.end())
        if comma is None:
            break
        at = comma.end()
    raise _refused(
        f"the header {field} cannot be read: RFC 8941, at most {MAX_LABELS} different labels and {MAX_FIELD_CHARS} characters are understood"
    )


def _inputs(signature_input: str) -> dict[str, _Input]:
    """Label → signature, of those that are meant for us: with our tag; where there are none, without a tag."""
    members = _members("Signature-Input", signature_input, _INPUT)
    tagged: dict[str, _Input] = {}
    untagged: dict[str, _Input] = {}
    for label, match in members.items():
        parameters = _ONE_PARAM.findall(match[4])
        tags = [value for name, value in parameters if name == "tag"]
        if not tags or tags[0] == _OUR_TAG:
            (tagged if tags else untagged)[label] = _Input(match[2], match[3], parameters)
    return tagged or untagged


def _parameters(parameters: list[tuple[str, str]]) -> tuple[dict[str, int], dict[str, str]]:
    """The numbers and the strings."""
    numbers: dict[str, int] = {}
    strings: dict[str, str] = {}
    for name, value in parameters:
        if name in numbers or name in strings:
            raise _refused(f"the parameter `{name}` of Signature-Input is there twice")
        if name in _NUMBERS and value.lstrip("-").isdigit():
            numbers[name] = int(value)
        elif name in _STRINGS and value[:1] == '"':
            strings[name] = value[1:-1].replace('\\"', '"').replace("\\\\", "\\") if "\\" in value else value[1:-1]
        else:
            raise _refused(
                f"the parameter `{name}` of Signature-Input is unknown, or not of its type: integers are {', '.join(_NUMBERS)}; strings {', '.join(_STRINGS)}"
            )
    return numbers, strings


def _components(text: str) -> tuple[str, ...]:
    """Names of the covered components."""
    names = []
    for name, parameters in _ONE_COMPONENT.findall(text):
        if parameters or not _PLAIN_NAME.fullmatch(name):
            raise _refused(f"the component {name}{parameters} is not supported: only names in lower case, without parameters")
        names.append(name[1:-1])
    if len(names) > MAX_COMPONENTS or len(set(names)) != len(names):
        raise _refused(f"a signature covers at most {MAX_COMPONENTS} components, each once")
    return tuple(names)


def key_id(signature_input: str) -> str:
    """The key that a request says it is signed by; "" where that cannot be read. Proves nothing."""
    try:
        for each in _inputs(signature_input.strip(" \t")).values():
            return _parameters(each.parameters)[1].get("keyid", "")
    except Unauthenticated:
        pass
    return ""


# The signature base (RFC 9421, 2.5)


def _authority(envelope: Envelope) -> str:
    port = {"http": ":80", "https": ":443"}.get(envelope.scheme, "")
    return envelope.authority.removesuffix(port)


DERIVED: dict[str, Callable[[Envelope], str]] = {
    "@method": lambda envelope: envelope.method,
    "@scheme": lambda envelope: envelope.scheme,
    "@authority": _authority,
    "@target-uri": lambda envelope: f"{envelope.scheme}://{envelope.authority}{envelope.target}",
    "@request-target": lambda envelope: envelope.target,
    "@path": lambda envelope: envelope.target.partition("?")[0],
    "@query": lambda envelope: "?" + envelope.target.partition("?")[2],
}


def signature_base(envelope: Envelope, components: tuple[str, ...], text: str) -> bytes:
    lines = []
    for name in components:
        if name[0] == "@":
            derive = DERIVED.get(name)
            if derive is None:
                raise _refused(f'the component "{name}" is not supported: {", ".join(DERIVED)} are')
            value = derive(envelope)
        else:
            field = envelope.headers.get(name.encode("ascii"))
            if field is None:
                raise _refused(f'the signature covers "{name}", which the request does not have')
            value = field.decode("latin-1").strip(" \t")
        if not value.isascii() or "\n" in value or "\r" in value:
            raise _refused(f'"{name}" can be signed only where it is ASCII')
        lines.append(f'"{name}": {value}\n')
    return f'{"".join(lines)}"@signature-params": {text}'.encode("ascii")


# Verifying


def verify(envelope: Envelope, find: Callable[[str], SigningKey | None], *, window: float, now: float) -> Verified:
    """Who signed this request. `now` is the time of day; `find` should know no key but those that may have signed it."""
    if not envelope.header("signature-input") or not envelope.header("signature"):
        raise _refused("this request must be signed: the headers Signature-Input and Signature of RFC 9421 are not both there")
    inputs = _inputs(envelope.header("signature-input").strip(" \t"))
    signatures = _members("Signature", envelope.header("signature").strip(" \t"), _BYTE_SEQUENCE)
    refusal = None
    for label in inputs:
        if label in signatures:
            try:
                return _verify_one(envelope, inputs[label], _bytes("Signature", signatures[label][2]), find, window, now)
            except Unauthenticated as error:
                refusal = refusal or error
    raise refusal or _refused(f"Signature-Input and Signature have no label in common whose tag is absent or {_OUR_TAG}")


def _verify_one(
    envelope: Envelope, one: _Input, signature: bytes, find: Callable[[str], SigningKey | None], window: float, now: float
) -> Verified:
    numbers, strings = _parameters(one.parameters)
    components = _components(one.components)
    covered = frozenset(components)
    _check_covered(envelope, covered)
    created, expires = _check_times(numbers, window, now)
    if not 0 < len(nonce := strings.get("nonce", "")) <= MAX_NONCE_CHARS or not strings.get("keyid"):
        raise _refused(f"a signature needs `keyid` and a `nonce` of 1 to {MAX_NONCE_CHARS} characters")
    if strings.get("alg") not in (HMAC, ED25519):
        raise _refused(f"the `alg` of a signature must be `{HMAC}` or `{ED25519}`")
    if not proves(find(strings["keyid"]), strings["alg"], signature_base(envelope, components, one.text), signature):
        raise _refused("the signature does not prove the key that it names")
    if "content-digest" in covered:  # after the proof: hashing a large body is not for strangers to ask
        check_digest(envelope.header("content-digest"), envelope.body)
    return Verified(strings["keyid"], nonce, min(created + window, expires), covered)


def _check_covered(envelope: Envelope, covered: frozenset[str]) -> None:
    """Everything that says what is asked."""
    missing = [name for name in ("@method", "@authority") if name not in covered]
    if not any(covered.issuperset(names) for names in TARGETS):
        missing.append("@target-uri")
    if len(envelope.body) and "content-digest" not in covered:
        missing.append("content-digest")
    meaning = [name.decode("latin-1") for name in envelope.headers if name in MEANING or name.startswith(b"x-fairlead-")]
    missing += [name for name in meaning if name not in covered]
    if missing:
        raise _refused(f"the signature must cover {', '.join(missing)}")


def _check_times(numbers: Mapping[str, int], window: float, now: float) -> tuple[float, float]:
    """(created, expires)"""
    created, expires = numbers.get("created"), numbers.get("expires")
    if created is None:
        raise _refused("a signature needs `created`: the time of day in whole seconds (Unix time)")
    if abs(now - created) > window:
        raise _refused(f"`created` of the signature is more than {window:g} seconds from this server's time; check the clock")
    if expires is not None and expires <= now:
        raise _refused("the signature has expired")
    return created, float("inf") if expires is None else expires


def check_digest(field: str, body: bytes | memoryview) -> None:
    """A Content-Digest (RFC 9530) that does not fit the body is refused; algorithms that are not DIGESTS are passed over."""
    members = _members("Content-Digest", field.strip(" \t"), _BYTE_SEQUENCE)
    known = members.keys() & DIGESTS.keys()
    if not known:
        raise _refused(f"Content-Digest must have one of {', '.join(DIGESTS)}")
    for name in known:
        if not hmac.compare_digest(DIGESTS[name](body), _bytes("Content-Digest", members[name][2])):
            raise _refused("Content-Digest does not fit the body")


def proves(key: SigningKey | None, algorithm: str, base: bytes, signature: bytes) -> bool:
    """The key, never the request, says which secret belongs to an algorithm; an unknown key costs as much as a wrong signature by HMAC."""
    if algorithm == HMAC:
        secret = key.hmac if key is not None else b""
        return hmac.compare_digest(hmac.digest(secret, base, "sha256"), signature) and secret != b""
    public = load_pem_public_key(key.ed25519.encode()) if key is not None and key.ed25519 else None
    if not isinstance(public, Ed25519PublicKey):
        return False
    try:
        public.verify(signature, base)
    except InvalidSignature:
        return False
    return True


def _bytes(field: str, text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except Base64Error:
        raise _refused(f"the header {field} is not base64 between colons") from None


def _refused(message: str) -> Unauthenticated:
    error = Unauthenticated(message)
    error.headers = {**Unauthenticated.headers, "Accept-Signature": ACCEPT_SIGNATURE}
    return error


# Once


class Nonces:
    """The nonces that were used, in this process. Where there is no room for another, its request is refused: none is forgotten early.

    They are kept in sets by when they may be forgotten, which a repeated nonce says again; a set goes as a whole.
    """

    STEP = 10.0
    """Seconds of one set."""

    def __init__(self, max_entries: int = 262_144, max_per_key: int = 65_536) -> None:
        self.max_entries = max_entries
        self.max_per_key = max_per_key
        """So that one key cannot lock out the others."""
        self._sets: dict[int, tuple[set[bytes], Counter[str]]] = {}
        self._of_key: Counter[str] = Counter()
        self._num_entries = 0
        self._swept = 0.0

    def __len__(self) -> int:
        return self._num_entries

    async def close(self) -> None:
        pass

    def use(self, verified: Verified, now: float) -> None:
        """Raises Unauthenticated for a nonce that was used before."""
        if abs(now - self._swept) >= self.STEP:
            self._sweep(now)
        marks, of_key = self._sets.setdefault(int(verified.until // self.STEP), (set(), Counter()))
        mark = _mark(verified)
        if mark in marks:
            raise _replayed()
        if self._of_key[verified.key] >= self.max_per_key:
            raise LimitExceeded(
                f"key `{verified.key}` has {self.max_per_key} signatures that could still be replayed: give them an earlier `expires`",
                reason="too-many-signatures",
                retry_after=self.STEP,
            )
        if self._num_entries >= self.max_entries:
            raise Unreachable("there are too many signed requests to remember", reason="too-many-signatures")
        marks.add(mark)
        of_key[verified.key] += 1
        self._of_key[verified.key] += 1
        self._num_entries += 1

    def _sweep(self, now: float) -> None:
        self._swept = now
        for index in [index for index in self._sets if (index + 1) * self.STEP <= now]:
            marks, of_key = self._sets.pop(index)
            self._num_entries -= len(marks)
            self._of_key -= of_key


class SharedNonces:
    """The nonces that were used, in Redis, for several gateways. While it does not answer, signed requests are refused."""

    LEEWAY = 60.0
    """Seconds by which the clocks of the gateways may differ."""

    def __init__(self, redis: "Redis", timeout: float = 1.0) -> None:
        self._redis = redis
        self._timeout = timeout

    @classmethod
    def at(cls, url: str) -> "SharedNonces":
        """Raises ConfigError."""
        try:
            from redis.asyncio import Redis
        except ImportError:
            raise ConfigError("nonces in Redis need a package that is not installed: pip install 'fairlead[redis]'") from None
        return cls(Redis.from_url(url))

    async def close(self) -> None:
        await self._redis.aclose()

    async def use(self, verified: Verified, now: float) -> None:
        """Raises Unauthenticated for a nonce that was used before."""
        from redis.exceptions import RedisError

        milliseconds = max(1, int((verified.until - now + self.LEEWAY) * 1000))
        try:
            async with asyncio.timeout(self._timeout):
                new = await self._redis.set(f"fairlead:nonce:{_mark(verified).hex()}", b"", nx=True, px=milliseconds)
        except (RedisError, OSError, TimeoutError):
            raise Unreachable(
                "signed requests cannot be checked for replay now, because Redis does not answer", reason="redis-gone"
            ) from None
        if not new:
            raise _replayed()


def _mark(verified: Verified) -> bytes:
    return hashlib.blake2b(f"{verified.key}\0{verified.nonce}".encode("ascii"), digest_size=16).digest()


def _replayed() -> Unauthenticated:
    return _refused("this signature's nonce was used before: every request needs a new one")


# Signing


def sign(
    method: str,
    url: str,
    body: bytes = b"",
    *,
    keyid: str,
    secret: bytes | str,
    now: float,
    nonce: str = "",
    expires: int | None = None,
    headers: Mapping[str, str] | None = None,
    target: tuple[str, ...] = ("@path", "@query"),
    label: str = "sig",
) -> dict[str, str]:
    """The headers to add to a request. `secret`: bytes of a shared one, or an Ed25519 private key in PEM; `headers`: further ones to cover."""
    parts = urlsplit(url)
    path = parts.path or "/"
    fields = {name.lower(): value for name, value in (headers or {}).items()}
    signed: dict[str, str] = {}
    if body:
        signed["Content-Digest"] = fields["content-digest"] = f"sha-256=:{b64encode(DIGESTS['sha-256'](body)).decode()}:"
    envelope = Envelope(
        method=method,
        target=f"{path}?{parts.query}" if parts.query else path,
        scheme=parts.scheme,
        authority=parts.netloc.rpartition("@")[2].lower(),
        headers={name.encode("ascii"): value.encode("latin-1") for name, value in fields.items()},
    )
    components = ("@method", "@authority", *target, *fields)
    algorithm = ED25519 if isinstance(secret, str) else HMAC
    times = f";created={int(now)}" + (f";expires={expires}" if expires is not None else "")
    quoted = " ".join(f'"{name}"' for name in components)
    text = f'({quoted}){times};nonce="{nonce or secrets.token_urlsafe(18)}";keyid="{keyid}";alg="{algorithm}";tag="{TAG}"'
    base = signature_base(envelope, components, text)
    if isinstance(secret, str):
        private = load_pem_private_key(secret.encode(), password=None)
        if not isinstance(private, Ed25519PrivateKey):
            raise ValueError("the private key must be an Ed25519 key in PEM")
        signature = private.sign(base)
    else:
        signature = hmac.digest(secret, base, "sha256")
    return {**signed, "Signature-Input": f"{label}={text}", "Signature": f"{label}=:{b64encode(signature).decode()}:"}
