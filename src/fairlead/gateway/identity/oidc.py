"""JSON web tokens of the issuers that are trusted: whether one is genuine, and who it speaks for."""

import asyncio
import json
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from time import time
from typing import Any, NoReturn

import structlog
from joserfc.errors import JoseError
from joserfc.jwk import Key
from joserfc.jws import JWSRegistry
from joserfc.util import urlsafe_b64decode
from msgspec import Struct

from fairlead.core.errors import ConfigError, Unavailable
from fairlead.core.policy import OidcSettings, Scope
from fairlead.gateway.identity.jwks import Keys, NotRead, is_secure, read_keys
from fairlead.gateway.identity.subject import Refused, Subject, is_name
from fairlead.observe.counts import Counts

log = structlog.get_logger("fairlead.identity")

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""All with a public key. A shared secret (HS256) would let whoever may check a token make one, too."""

MAX_TOKEN_CHARS = 16 << 10
MAX_REMEMBERED = 10_000
MAX_WAITING = 256
"""Requests that wait for an issuer's keys."""
MIN_REFRESH_SECONDS = 10.0
"""Between two readings of an issuer's keys: made-up key ids must not make us hammer it."""
LEARN_SECONDS = 12.0
MAX_CANDIDATES = 4
"""Keys that are tried for one token."""
MAX_TIME = 1e12
"""Seconds since 1970; not NaN, not infinity."""
NO_KEYS = "the keys of the token's issuer could not be read: try again later"

TYPES = ("", "jwt", "at+jwt", "application/at+jwt")
"""`typ` of tokens that are for us; not those of a logout, for instance."""


class Token(Struct, frozen=True):
    """One as it came, unproved."""

    header: Mapping[str, Any]
    claims: Mapping[str, Any]
    signed: bytes
    signature: bytes


class Issuer:
    """One that is trusted, and its keys as they were read last."""

    def __init__(self, settings: OidcSettings, counts: Counts, read: Callable[[str], Keys] = read_keys) -> None:
        if not is_secure(settings.issuer):
            raise ConfigError(f"`auth.oidc.issuer` must be an https URL (http only on loopback), not {settings.issuer!r}")
        if unknown := [name for name in settings.algorithms if name not in ALGORITHMS]:
            raise ConfigError(f"`auth.oidc.algorithms`: {', '.join(unknown)} is not one of {', '.join(ALGORITHMS)}")
        self.settings = settings
        self.keys: Keys = {}
        self.num_changes = 0
        """Times that the keys became others."""
        self._prints: set[tuple[str, str]] = set()
        self._read = read
        self._counts = counts
        self._tried = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._num_waiting = 0
        self._failing = False

    def may_refresh(self, now: float) -> bool:
        return self._reading is not None or not 0.0 <= now - self._tried < MIN_REFRESH_SECONDS

    async def refresh(self, now: float) -> None:
        """Read the keys again, or wait for whoever does; the old ones go on where that fails."""
        if self._reading is None:
            self._tried = now
            self._reading = asyncio.create_task(self._refresh())
        await asyncio.wait({self._reading}, timeout=LEARN_SECONDS)

    async def learn(self, now: float) -> None:
        """For a request that needs a key. Raises Unavailable where too many wait."""
        if self._num_waiting >= MAX_WAITING:
            raise Unavailable("too many requests wait for the keys of the token's issuer: try again later")
        self._num_waiting += 1
        try:
            await self.refresh(now)
        finally:
            self._num_waiting -= 1

    async def follow(self) -> NoReturn:
        """Keep the keys fresh, so that requests need not wait for them."""
        while True:
            await self.refresh(time())
            await asyncio.sleep(MIN_REFRESH_SECONDS if self._failing else self.settings.jwks_seconds)

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    def fitting(self, algorithm: str, kid: str | None) -> list[Key]:
        """Keys that a token may be signed with: of one that names none, all of that kind."""
        keys = self.keys.get(kid, ()) if kid is not None else [key for same in self.keys.values() for key in same]
        model = JWSRegistry.algorithms[algorithm]
        found = []
        for key in keys:
            try:
                model.check_key(key)
            except JoseError:
                continue
            found.append(key)
        return found[:MAX_CANDIDATES]

    async def _refresh(self) -> None:
        try:
            keys = await asyncio.to_thread(self._read, self.settings.issuer)
        except NotRead as error:
            self._counts.add("fairlead_auth_refresh_failures_total", "issuer")
            if not self._failing:
                log.error("issuer_keys_not_read", issuer=self.settings.issuer, error=str(error), num_old_keys=len(self.keys))
            self._failing = True
        else:
            self._failing = False
            prints = {(kid, key.thumbprint()) for kid, same in keys.items() for key in same}
            if prints != self._prints:
                self.keys, self._prints = keys, prints
                self.num_changes += 1
                log.info("issuer_keys_read", issuer=self.settings.issuer, num_keys=len(prints))
        finally:
            self._reading = None


class Tokens:
    """Tokens of all trusted issuers. Those found genuine are remembered until they expire."""

    def __init__(
        self,
        settings: Collection[OidcSettings],
        classes: Collection[str],
        counts: Counts,
        *,
        read: Callable[[str], Keys] = read_keys,
    ) -> None:
        self.issuers = {each.issuer: Issuer(each, counts, read) for each in settings}
        if len(self.issuers) < len(settings):
            raise ConfigError("`auth.oidc` names the same issuer twice")
        self._classes = classes
        self._remembered: dict[bytes, tuple[Subject, Issuer, int]] = {}

    def configure(self, classes: Collection[str]) -> None:
        """Other classes of service."""
        self._classes = classes
        self._remembered.clear()

    def is_ours(self, text: str) -> bool:
        """Whether it says that one of our issuers made it."""
        try:
            return self._issuer(parse(text)) is not None
        except Refused:
            return False

    def known(self, text: str, now: float) -> Subject | None:
        """None: the issuer's keys must be read first, see `learn`. Raises Refused, Unavailable."""
        digest = sha256(text.encode("utf-8", "surrogateescape")).digest()
        found = self._remembered.get(digest)
        if found is not None:
            subject, issuer, num_changes = found
            if now < subject.expires and num_changes == issuer.num_changes:
                return subject
            del self._remembered[digest]
        token = parse(text)
        issuer_ = self._issuer(token)
        if issuer_ is None:
            raise Refused("token-issuer")
        subject_ = prove(token, issuer_, self._classes, now)
        if subject_ is not None:
            self._remember(digest, subject_, issuer_, now)
        return subject_

    async def learn(self, text: str, now: float) -> None:
        """Read the keys of its issuer, if it is time to."""
        issuer = self._issuer(parse(text))
        if issuer is not None and issuer.may_refresh(now):
            await issuer.learn(now)

    async def follow(self) -> None:
        """For ever, in one task each."""
        async with asyncio.TaskGroup() as group:
            for issuer in self.issuers.values():
                group.create_task(issuer.follow())

    async def close(self) -> None:
        for issuer in self.issuers.values():
            await issuer.close()

    def _issuer(self, token: Token) -> Issuer | None:
        name = token.claims.get("iss")
        return self.issuers.get(name) if isinstance(name, str) else None

    def _remember(self, digest: bytes, subject: Subject, issuer: Issuer, now: float) -> None:
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered = {
                each: found for each, found in self._remembered.items() if now < found[0].expires and found[2] == found[1].num_changes
            }
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
        self._remembered[digest] = (subject, issuer, issuer.num_changes)


def parse(text: str) -> Token:
    """Raises Refused for what is no signed token (RFC 7515, compact) of JSON objects without duplicate names."""
    if len(text) > MAX_TOKEN_CHARS or not text.isascii():
        raise Refused("token-malformed")
    try:
        header, payload, signature = text.encode("ascii").split(b".")
        return Token(_json_object(header), _json_object(payload), header + b"." + payload, urlsafe_b64decode(signature))
    except (ValueError, RecursionError):
        raise Refused("token-malformed") from None


def _json_object(segment: bytes) -> dict[str, Any]:
    value = json.loads(urlsafe_b64decode(segment), object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("duplicate name")
    return names


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


def prove(token: Token, issuer: Issuer, classes: Collection[str], now: float) -> Subject | None:
    """Who it speaks for; None where its key may be among those that the issuer has by now. Raises Refused, Unavailable."""
    algorithm, kid, kind = token.header.get("alg"), token.header.get("kid"), token.header.get("typ", "")
    if not isinstance(algorithm, str) or algorithm not in issuer.settings.algorithms:
        raise Refused("token-algorithm")
    if not isinstance(kid, str | None) or not isinstance(kind, str) or kind.lower() not in TYPES:
        raise Refused("token-malformed")
    if "crit" in token.header or "b64" in token.header:
        raise Refused("token-malformed")
    keys = issuer.fitting(algorithm, kid)
    if not any(_signed_by(token, algorithm, key) for key in keys):
        if (not keys or kid is None) and issuer.may_refresh(now):
            return None
        if not issuer.keys:
            raise Unavailable(NO_KEYS)
        raise Refused("token-signature" if keys else "token-key")
    expires = _check_claims(token.claims, issuer.settings, now)
    return _subject(token.claims, issuer.settings, classes, expires)


def _signed_by(token: Token, algorithm: str, key: Key) -> bool:
    try:
        return JWSRegistry.algorithms[algorithm].verify(token.signed, token.signature, key)
    except (JoseError, ValueError):
        return False


def _check_claims(claims: Mapping[str, Any], settings: OidcSettings, now: float) -> float:
    """When it expires. The issuer was checked when its keys were chosen."""
    audience = claims.get("aud")
    if settings.audience not in (audience if isinstance(audience, list) else [audience]):
        raise Refused("token-audience")
    expires = _time(claims, "exp")
    if expires is None:
        raise Refused("token-claims")
    if now >= expires + settings.leeway:
        raise Refused("token-expired")
    for name in ("nbf", "iat"):
        start = _time(claims, name)
        if start is not None and now < start - settings.leeway:
            raise Refused("token-early")
    return expires + settings.leeway


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_TIME:
        raise Refused("token-claims")
    return float(value)


def _subject(claims: Mapping[str, Any], settings: OidcSettings, classes: Collection[str], expires: float) -> Subject:
    tenant, key = claim(claims, settings.tenant_claim), claims.get("sub")
    project, qos_class = claim(claims, settings.project_claim), claim(claims, settings.class_claim)
    if not is_name(tenant) or not is_name(key) or not (project is None or is_name(project)):
        raise Refused("token-claims")
    if qos_class is not None and (not isinstance(qos_class, str) or qos_class not in classes):
        raise Refused("token-claims")
    return Subject(
        tenant=tenant,
        project=project or "default",
        key=key,
        qos_class=qos_class,
        scopes=_scopes(claim(claims, settings.roles_claim), settings),
        expires=expires,
    )


def _scopes(roles: object, settings: OidcSettings) -> frozenset[Scope]:
    """Roles that are none of ours give nothing, so that a list of others' roles is not the same as no list."""
    if roles is None:
        return frozenset({Scope.INFER})
    names = roles.split() if isinstance(roles, str) else roles
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Refused("token-claims")
    return frozenset(scope for name in names for scope in settings.roles.get(name, ()))


def claim(claims: Mapping[str, Any], path: str) -> Any:
    """One by its name, else by a path of names with dots between them; None where it is not there."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value
