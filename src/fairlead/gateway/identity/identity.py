"""Who asks: from what a request showed to a Caller, or to a refusal that tells a guesser nothing."""

import asyncio
from collections.abc import Mapping
from fnmatch import fnmatchcase
from hmac import compare_digest
from math import inf
from typing import TYPE_CHECKING, Any

from msgspec import structs

from fairlead.core.caller import ANONYMOUS_TENANT, ANYONE, Caller, Credentials
from fairlead.core.errors import Forbidden, Unavailable
from fairlead.core.policy import DEFAULT_TENANT, AuthSettings, GatewaySettings
from fairlead.gateway.identity.addresses import client_address, networks_of
from fairlead.gateway.identity.certificates import subject_of
from fairlead.gateway.identity.keyring import Keyring, Snapshot
from fairlead.gateway.identity.keys import PREFIX, digest_of, parse_key
from fairlead.gateway.identity.subject import Refused, Subject
from fairlead.observe.counts import Counts

if TYPE_CHECKING:
    from fairlead.gateway.identity.oidc import Tokens
    from fairlead.gateway.signing import SigningKey

__all__ = ["Identity", "anyone", "client_address", "may_use", "qos_class_of"]

MAX_CALLERS = 10_000

UNPROVED = "the signature does not prove the key that it names"
"""As of a wrong signature by a key that is good."""


class Identity:
    """Turns credentials into callers. Lives in the event loop; `follow` keeps what it knows fresh."""

    def __init__(self, auth: AuthSettings, gateway: GatewaySettings, keyring: Keyring, counts: Counts, *, required: bool) -> None:
        """Raises ConfigError."""
        networks_of(auth.trusted_proxies)
        self.required = required
        self._auth = auth
        self._keyring = keyring
        self._counts = counts
        self._tokens: Tokens | None = None
        if auth.oidc:
            from fairlead.gateway.identity import oidc

            self._tokens = oidc.Tokens(auth.oidc, tuple(gateway.classes), counts)
        self._snapshot: Snapshot = keyring.snapshot
        self._callers: dict[Subject | None, Caller] = {}
        """Of this snapshot; None: anyone."""
        self._certificates: dict[tuple[Any, Any], Subject] = {}

    def known(self, credentials: Credentials, now: float) -> Caller | None:
        """`now` is seconds since 1970. None: an issuer must be asked first, see `learn`. Raises Unauthenticated, Unavailable."""
        try:
            caller = self._caller(credentials, now)
        except Refused as refused:
            self._counts.add("fairlead_auth_failures_total", refused.kind)
            raise
        return None if caller is None else structs.replace(caller, address=credentials.address)

    @property
    def snapshot(self) -> Snapshot:
        """Another object when a key, a tenant or a policy has changed."""
        return self._keyring.snapshot

    async def learn(self, credentials: Credentials, now: float) -> Caller:
        """As `known`, after the keys of the token's issuer were read."""
        from fairlead.gateway.identity.oidc import NO_KEYS

        if self._tokens is not None:
            await self._tokens.learn(_shown(credentials), now)
        caller = self.known(credentials, now)
        if caller is None:
            raise Unavailable(NO_KEYS)
        return caller

    async def follow(self) -> None:
        """For ever: what other gateways and the issuers change."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keyring.follow(self._auth.revocation_seconds))
            if self._tokens is not None:
                group.create_task(self._tokens.follow())

    def configure(self, gateway: GatewaySettings) -> None:
        """Other classes of service, after the keyring has them."""
        if self._tokens is not None:
            self._tokens.configure(tuple(gateway.classes))

    async def close(self) -> None:
        if self._tokens is not None:
            await self._tokens.close()

    @property
    def asks_nobody(self) -> bool:
        """Whether who shows nothing is ANYONE: he need not, and nothing says what the tenant named `default` may."""
        snapshot = self._keyring.snapshot
        return not self.required and ANONYMOUS_TENANT not in snapshot.disabled and snapshot.policy(ANONYMOUS_TENANT) is DEFAULT_TENANT

    def signing_key_of(self, keyid: str) -> "SigningKey | None":
        """None for a key that is unknown or revoked, or whose tenant is disabled. `known` says whether it has expired."""
        from fairlead.gateway.signing import SigningKey

        entry = self._keyring.snapshot.of_id(keyid)
        return None if entry is None or entry.refused else SigningKey(id=keyid, hmac=entry.hmac, ed25519=entry.ed25519)

    def stored(self, *, tenant: str, project: str, key: str, address: str) -> Caller:
        """Who handed in a job, as its key or tenant may by now. A key that has expired since was good when it mattered.

        Raises Refused for one that was revoked, and where the tenant is disabled.
        """
        entry = self._keyring.snapshot.of_id(key) if key else None
        if entry is not None:
            if entry.refused:
                raise Refused(entry.refused)
            caller = entry.caller
        elif key:
            caller = self._keyring.snapshot.caller(Subject(tenant=tenant, project=project, key=key, expires=inf))
        else:
            caller = self._of_subject(None)
        return structs.replace(caller, address=address)

    def again(self, caller: Caller, now: float) -> Caller:
        """Who was known by a key of the store, as that key is now. Raises Refused for one that is gone, revoked or expired."""
        entry = self._keyring.snapshot.of_id(caller.key)
        if entry is None:
            raise Refused("unknown")
        entry.check(now)
        return structs.replace(entry.caller, address=caller.address)

    def _caller(self, credentials: Credentials, now: float) -> Caller | None:
        if shown := _shown(credentials):
            if shown.startswith(PREFIX):
                return self._of_key(shown, now)
            if self._tokens is not None and shown.count(".") == 2 and (self.required or self._tokens.is_ours(shown)):
                subject = self._tokens.known(shown, now)
                return None if subject is None else self._of_subject(subject)
            if self.required:
                raise Refused("unknown")
        if self._auth.mtls and credentials.certificate:
            return self._of_certificate(credentials.certificate, now)
        if credentials.signature_input:
            return self._of_signature(credentials.signature_input, now)
        if self.required:
            raise Refused("missing", self._how())
        return self._of_subject(None)

    def _of_key(self, shown: str, now: float) -> Caller:
        # Digest first, whatever it is: a wrong checksum takes as long as a key that nobody has.
        entry = self._keyring.snapshot.of_digest(digest_of(shown))
        if entry is None:
            raise Refused("malformed" if parse_key(shown) is None else "unknown")
        entry.check(now)
        return entry.caller

    def _of_certificate(self, certificate: Mapping[str, Any], now: float) -> Caller:
        name = (certificate.get("subject"), certificate.get("notAfter"))
        subject = self._certificates.get(name)
        if subject is None:
            if len(self._certificates) >= MAX_CALLERS:
                self._certificates.clear()
            subject = self._certificates[name] = subject_of(certificate)
        if now >= subject.expires:
            raise Refused("certificate")
        entry = self._keyring.snapshot.of_id(subject.key)
        if entry is None:
            return self._of_subject(subject)
        if entry.caller.tenant != subject.tenant:
            raise Refused("certificate")
        entry.check(now)
        return entry.caller

    def _of_signature(self, signature_input: str, now: float) -> Caller:
        from fairlead.gateway.signing import key_id

        entry = self._keyring.snapshot.of_id(key_id(signature_input))
        if entry is None:
            raise Refused("unknown", UNPROVED)
        entry.check(now, UNPROVED)
        return structs.replace(entry.caller, must_sign=True)

    def _of_subject(self, subject: Subject | None) -> Caller:
        snapshot = self._keyring.snapshot
        if snapshot is not self._snapshot or len(self._callers) >= MAX_CALLERS:
            self._snapshot, self._callers = snapshot, {}
        caller = self._callers.get(subject)
        if caller is None:
            caller = self._callers[subject] = anyone(snapshot) if subject is None else snapshot.caller(subject)
        return caller

    def _how(self) -> str:
        ways = ["a key as `Authorization: Bearer fl_...` or in `x-api-key` (`fairlead keys create` makes one)"]
        if self._tokens is not None:
            ways.append("a token of " + " or ".join(self._tokens.issuers) + " as `Authorization: Bearer ...`")
        if self._auth.mtls:
            ways.append("a client certificate")
        return "this server must know who asks: send " + ", or ".join(ways)


def anyone(snapshot: Snapshot) -> Caller:
    """Whoever asks an open server: may do everything, within what the tenant named `default` may."""
    if ANONYMOUS_TENANT in snapshot.disabled:
        raise Refused("tenant")
    policy = snapshot.policy(ANONYMOUS_TENANT)
    if policy is DEFAULT_TENANT:
        return structs.replace(ANYONE, classes=tuple(snapshot.gateway.classes))
    return structs.replace(
        ANYONE,
        qos_class=policy.qos_class,
        classes=snapshot.classes(policy),
        models=(policy.models,),
        policy=policy,
        must_sign=policy.require_signature,
    )


def may_use(caller: Caller, model: str) -> bool:
    """Whether all of its allow-lists have a pattern that the model matches."""
    for patterns in caller.models:
        if not ("*" in patterns or model in patterns or any(fnmatchcase(model, pattern) for pattern in patterns)):
            return False
    return True


def qos_class_of(caller: Caller, asked: str) -> str:
    """The class that it gets. Raises Forbidden for one that it may not ask for."""
    if not asked or asked == caller.qos_class:
        return caller.qos_class
    if asked not in caller.classes and "*" not in caller.classes:
        allowed = ", ".join(dict.fromkeys((caller.qos_class, *caller.classes)))
        raise Forbidden(f"class `{asked[:64]}` is not one that this caller may ask for: {allowed}")
    return asked


def _shown(credentials: Credentials) -> str:
    """The key or token; "" where there is none. Raises Refused where there are two."""
    authorization, api_key = credentials.authorization, credentials.api_key
    bearer = authorization[7:].strip() if authorization[:7].lower() == "bearer " else ""
    if bearer and api_key and not compare_digest(_bytes(bearer), _bytes(api_key)):
        raise Refused("ambiguous", "`Authorization` and `x-api-key` show different keys: send one of them")
    return bearer or api_key


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
