"""The doorkeeper of the ops port: a session of the dashboard is as good as the key that began it."""

import time
from collections.abc import Mapping
from hmac import compare_digest
from typing import Any

from starlette.requests import Request as HttpRequest

from fairlead.api.doorkeeper import (
    CALLER,
    CREDENTIALS,
    Acquaintance,
    Doorkeeper,
    Headers,
    caller_of,
    is_local,
    is_origin_of,
    may,
    refuse_twice,
)
from fairlead.api.ui.sessions import Session, Sessions, token_of
from fairlead.core.caller import Caller
from fairlead.core.errors import Forbidden
from fairlead.core.policy import Scope

CSRF_HEADER = b"x-fairlead-csrf"
SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
OURS = frozenset((b"", b"same-origin", b"none"))
"""Of Sec-Fetch-Site: our own pages, what somebody typed, and clients that are no browsers."""


class SessionDoorkeeper(Doorkeeper):
    """Who shows a key, or signs, is whom that says, whatever cookies come with it."""

    def __init__(self, inner: Doorkeeper, sessions: Sessions) -> None:
        super().__init__(
            inner.identity, inner.auth, inner.nonces, inner.counts, recorded=inner.recorded, max_body_bytes=inner.max_body_bytes
        )
        self.sessions = sessions

    async def admit(self, http: HttpRequest, scope: Scope | None) -> None:
        if scope is None:
            return
        headers = dict(http.scope["headers"])
        session = self.session(headers, http.method)
        if session is None:
            await super().admit(http, scope)
            _check_site(headers, caller_of(http)[0])
            return
        refuse_twice(http.scope["headers"], headers)
        may(session.caller, scope, "")
        http.scope[CALLER] = (session.caller, "")

    def caller_again(self, headers: Headers, peer: str, certificate: Mapping[str, Any] | None, last: Acquaintance) -> Caller | None:
        session = self.session(headers, "POST")
        if session is not None:
            return session.caller
        caller = super().caller_again(headers, peer, certificate, last)
        if caller is not None:
            _check_site(headers, caller)
        return caller

    def session(self, headers: Headers, method: str) -> Session | None:
        """None where no cookie shows one, or something else says who asks. Raises Unauthenticated, and Forbidden for what another site's page asks."""
        token = token_of(headers) if CREDENTIALS.isdisjoint(headers) and self.identity.required else ""
        if not token:
            return None
        session = self.sessions.find(token, time.time())
        if not _is_ours(headers):
            raise Forbidden("pages of another site may not use this session")
        if method not in SAFE and not compare_digest(headers.get(CSRF_HEADER, b""), session.csrf.encode("ascii")):
            raise Forbidden(f"this session's token is missing in the header {CSRF_HEADER.decode()}: reload the page")
        return session


def _check_site(headers: Headers, caller: Caller) -> None:
    """Raises Forbidden for a page of another site that lets a browser ask: where nobody shows a key, it could."""
    if not caller.key and not (is_local(headers.get(b"host", b"").decode("latin-1")) and _is_ours(headers)):
        raise Forbidden("this server asks for no keys: on this port it answers its own pages only, by its address or as localhost")


def _is_ours(headers: Headers) -> bool:
    """Whether no page of another site asks."""
    origin = headers.get(b"origin")
    return headers.get(b"sec-fetch-site", b"") in OURS and (
        origin is None or is_origin_of(origin.decode("latin-1"), headers.get(b"host", b"").decode("latin-1"))
    )
