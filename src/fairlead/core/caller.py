"""Who asks, what they showed, and the HTTP message that it came in."""

from collections.abc import Mapping
from math import inf
from typing import Any

from msgspec import Struct

from fairlead.core.policy import DEFAULT_TENANT, Limits, Scope, TenantPolicy

ANONYMOUS_TENANT = "default"


class Caller(Struct, frozen=True, kw_only=True, eq=False):
    """Who asks, as far as it was proved."""

    tenant: str = ANONYMOUS_TENANT
    project: str = "default"
    key: str = ""
    """The id of the key (never the key), or the subject of the token or certificate; "" for anyone on an open server."""
    qos_class: str = "standard"
    classes: tuple[str, ...] = ("*",)
    """Those that its requests may ask for; `*`: any."""
    scopes: frozenset[Scope] = frozenset(Scope)
    models: tuple[tuple[str, ...], ...] = ()
    """Allow-lists, all of which must have a pattern that matches: the tenant's, the key's."""
    policy: TenantPolicy = DEFAULT_TENANT
    project_limits: Limits = {}
    key_limits: Limits = {}
    must_sign: bool = False
    """Nothing but the key's id was shown: only a valid signature by that key proves it."""
    address: str = ""
    expires: float = 0.0
    """Seconds since 1970: until then the same credentials show the same caller, as long as no key or tenant changes; 0: look again."""


ANYONE = Caller(expires=inf)
"""On a server that asks nobody."""


class Credentials(Struct, frozen=True, kw_only=True):
    """What a request showed, unproved."""

    authorization: str = ""
    """The header, scheme and all."""
    api_key: str = ""
    """Of the headers x-api-key (Triton's and others' clients) and api-key."""
    signature_input: str = ""
    """RFC 9421's header: names the key where no other credential is shown."""
    address: str = ""
    """Of the peer, after `auth.trusted_proxies`."""
    certificate: Mapping[str, Any] | None = None
    """As `ssl.SSLSocket.getpeercert` gives it: verified."""


class Envelope(Struct, frozen=True, kw_only=True):
    """The HTTP message that a request came in. Names of headers are lower case; values of one name are joined with `, `."""

    method: str
    target: str
    """Path and query as sent."""
    scheme: str
    authority: str
    """The Host header, lower case."""
    headers: Mapping[bytes, bytes]
    body: bytes | memoryview = b""

    def header(self, name: str) -> str:
        """ "" where it is not there."""
        return self.headers.get(name.encode("ascii"), b"").decode("latin-1")
