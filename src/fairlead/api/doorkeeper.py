"""Says who calls, at every door, before a body is read; and that a signed request is what was signed."""

import time
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request as HttpRequest

from fairlead.api.web import place as place_of
from fairlead.core.caller import ANYONE, Caller, Credentials, Envelope
from fairlead.core.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated, Unavailable
from fairlead.core.policy import AuthSettings, Scope
from fairlead.gateway.identity.identity import Identity, client_address, may_use
from fairlead.gateway.identity.keyring import Snapshot
from fairlead.gateway.signing import Nonces, SharedNonces, Verified, key_id, verify
from fairlead.observe.counts import Counts

Headers = Mapping[bytes, bytes]
Fields = list[tuple[bytes, bytes]]

KEY_HEADERS = frozenset((b"x-api-key", b"api-key", b"x-key"))
"""Triton's clients' and others', Azure's, Black Forest Labs'."""
SHOWN = (b"authorization", *KEY_HEADERS, b"signature-input", b"x-forwarded-for", b"origin", b"host")
"""All that a caller is known by, but for its connection's address and certificate; and that a browser says of the page that asks."""
CREDENTIALS = frozenset((b"authorization", b"signature-input", *KEY_HEADERS))
ONCE = CREDENTIALS | {b"host", b"x-fairlead-class", b"x-fairlead-session", b"x-forwarded-for"}
"""Headers that say who somebody is or what they may: one that comes twice could be read in two ways."""
MAX_UNPROVED_BYTES = 512 << 20
CALLER = "fairlead.caller"
"""Where the ASGI scope has it."""


class Acquaintance:
    """Who came by a connection last. The same credentials are the same caller's, as long as nothing changes in the keyring."""

    __slots__ = ("caller", "shown", "snapshot")

    def __init__(self) -> None:
        self.caller: Caller | None = None
        self.shown: tuple[bytes | None, ...] = ()
        self.snapshot: Snapshot | None = None


class Doorkeeper:
    def __init__(
        self,
        identity: Identity,
        auth: AuthSettings,
        nonces: Nonces | SharedNonces,
        counts: Counts,
        *,
        recorded: bool = False,
        local_only: bool = False,
        max_body_bytes: int = 64 << 20,
    ) -> None:
        """`recorded`: each request leaves a record, which says where anyone came from. `local_only`: callers without a key are programs
        of this machine. `max_body_bytes`: what a door lets in."""
        self.local_only = local_only
        self.recorded = recorded
        self.max_body_bytes = max_body_bytes
        self.unproved_bytes = 0
        """Of bodies that are read to be held against their signatures."""
        self.identity = identity
        self.auth = auth
        self.nonces = nonces
        self.counts = counts

    def caller(self, headers: Headers, peer: str, certificate: Mapping[str, Any] | None) -> Caller | None:
        """Who calls; None where that must be `learn`ed. Raises Unauthenticated, and Forbidden."""
        if not self.recorded and certificate is None and self.identity.asks_nobody and CREDENTIALS.isdisjoint(headers):
            return self._checked(ANYONE, headers)
        known = self.identity.known(self._credentials(headers, peer, certificate), time.time())
        return known if known is None else self._checked(known, headers)

    def _checked(self, caller: Caller, headers: Headers) -> Caller:
        """Raises Forbidden for a page of another site: where nobody shows a key, any page that this machine's browser opens could ask."""
        if caller.key or not self.local_only:
            return caller
        host = _text(headers, b"host")
        if host and not is_local(host):  # a call by gRPC has none
            # a page whose name was made to point here (DNS rebinding) is its own site
            raise Forbidden(f"{host} asks a server that asks for no keys: ask it by its address or as localhost, or set `auth.required`")
        if b"origin" in headers and not is_origin_of(origin := _text(headers, b"origin"), host):
            raise Forbidden(f"pages of {origin} may not ask a server that asks for no keys: set `auth.required`")
        return caller

    def caller_again(self, headers: Headers, peer: str, certificate: Mapping[str, Any] | None, last: Acquaintance) -> Caller | None:
        """As `caller`, on a connection that may have shown the same before."""
        shown, snapshot = tuple(map(headers.get, SHOWN)), self.identity.snapshot
        caller = last.caller
        if caller is not None and shown == last.shown and snapshot is last.snapshot and time.time() < caller.expires:
            return caller
        caller = self.caller(headers, peer, certificate)
        if certificate is None:  # which may expire before the key that it names
            last.caller, last.shown, last.snapshot = caller, shown, snapshot
        return caller

    async def learn(self, headers: Headers, peer: str, certificate: Mapping[str, Any] | None) -> Caller:
        """Raises Unauthenticated."""
        return self._checked(await self.identity.learn(self._credentials(headers, peer, certificate), time.time()), headers)

    async def prove(self, envelope: Envelope, caller: Caller) -> str:
        """The id of the key that signed this message. Raises Unauthenticated for a signature that does not hold, or another's."""
        now = time.time()
        try:
            verified = verify(envelope, self.identity.signing_key_of, window=self.auth.signature_seconds, now=now)
            if caller.key and verified.key != caller.key:
                raise Unauthenticated("the request is signed by another key than the one it shows")
            await self._use(verified, now)
        except Unauthenticated:
            self.counts.add("fairlead_auth_failures_total", "signature")
            raise
        return verified.key

    async def _use(self, verified: Verified, now: float) -> None:
        """Its nonce, once. Raises Unauthenticated."""
        if isinstance(self.nonces, Nonces):
            self.nonces.use(verified, now)
        else:
            await self.nonces.use(verified, now)

    async def admit(self, http: HttpRequest, scope: Scope | None) -> None:
        """Put the caller into the ASGI scope. Raises Unauthenticated, and Forbidden where its scopes lack this one."""
        if scope is None:
            return
        fields: Fields = http.scope["headers"]
        headers = dict(fields)
        refuse_twice(fields, headers)
        peer, certificate = _peer(http)
        caller = self.caller(headers, peer, certificate) or await self.learn(headers, peer, certificate)
        signed_by = ""
        if is_signed(headers):
            signed_by = await self.prove(envelope_of(http, await self._body(http)), caller)
        may(caller, scope, signed_by)
        http.scope[CALLER] = (caller, signed_by)

    async def _body(self, http: HttpRequest) -> bytes:
        """Whole: nothing is proved before. Raises Unavailable where others' take all that there is for it."""
        size = self.max_body_bytes if "transfer-encoding" in http.headers else int(http.headers.get("content-length", "0"))
        if self.unproved_bytes + size > MAX_UNPROVED_BYTES:
            raise Unavailable(f"signed bodies of {MAX_UNPROVED_BYTES} bytes are being received already")
        self.unproved_bytes += size
        try:
            return await http.body()
        finally:
            self.unproved_bytes -= size

    def _credentials(self, headers: Headers, peer: str, certificate: Mapping[str, Any] | None) -> Credentials:
        if self.auth.trusted_proxies:
            peer = client_address(peer, _text(headers, b"x-forwarded-for"), self.auth.trusted_proxies)
        keys = set() if KEY_HEADERS.isdisjoint(headers) else {text for name in KEY_HEADERS if (text := _text(headers, name))}
        if len(keys) > 1:
            raise Unauthenticated("`x-api-key`, `api-key` and `x-key` show different keys: send one of them")
        return Credentials(
            authorization=_text(headers, b"authorization"),
            api_key=keys.pop() if keys else "",
            signature_input=_text(headers, b"signature-input"),
            address=peer,
            certificate=certificate,
        )


def is_signed(headers: Headers) -> bool:
    """For us: a proxy's own signature is none of our business."""
    return b"signature-input" in headers and bool(key_id(_text(headers, b"signature-input")))


def may(caller: Caller, scope: Scope, signed_by: str) -> None:
    """Raises Forbidden, or Unauthenticated where nothing was proved."""
    if scope not in caller.scopes:
        raise Forbidden(f"this key has no scope '{scope}'")
    if caller.must_sign and not signed_by:
        raise Unauthenticated("requests of this tenant must be signed (RFC 9421): see docs/signing.md")


def caller_of(http: HttpRequest) -> tuple[Caller, str]:
    """Who calls, and the key that signed."""
    return http.scope.get(CALLER) or (ANYONE, "")


def is_origin_of(origin: str, host: str) -> bool:
    """Whether a page of that origin came from the host that is asked. What is no origin, came from elsewhere."""
    try:
        return urlsplit(origin).netloc == host != ""
    except ValueError:
        return False


def is_local(host: str) -> bool:
    name = ""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        ip_address(name)
    except ValueError:
        return name == "localhost"
    return True


def place(http: HttpRequest) -> tuple[str, str]:
    """(model, version) of the path. Raises NotFound for a model that the caller may not use, as for one that is not there."""
    model, version = place_of(http)
    see(caller_of(http)[0], model)
    return model, version


def see(caller: Caller, model: str) -> None:
    """Raises NotFound."""
    if not may_use(caller, model):
        raise NotFound(f"Request for unknown model: '{model}' is not found")


def refuse_twice(fields: Fields, headers: Headers) -> None:
    """Raises InvalidRequest for a header that must not come twice."""
    if len(headers) == len(fields):
        return
    seen = set()
    for name, _ in fields:
        if name in seen and name in ONCE:
            raise InvalidRequest(f"header '{name.decode('ascii')}' comes twice")
        seen.add(name)


def joined(fields: Fields) -> dict[bytes, bytes]:
    """Values of one name together, as RFC 9110 reads them."""
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def envelope_of(http: HttpRequest, body: bytes = b"") -> Envelope:
    scope = http.scope
    query = scope["query_string"]
    target = scope["raw_path"] + (b"?" + query if query else b"")
    return Envelope(
        method=scope["method"],
        target=target.decode("latin-1"),
        scheme=scope["scheme"],
        authority=http.headers.get("host", "").lower(),
        headers=joined(scope["headers"]),
        body=body,
    )


def _peer(http: HttpRequest) -> tuple[str, Mapping[str, Any] | None]:
    client = http.scope.get("client")
    return client[0] if client else "", http.scope.get("fairlead.certificate")


def _text(headers: Headers, name: bytes) -> str:
    value = headers.get(name)
    return value.decode("latin-1") if value else ""
