"""Who is logged in at the dashboard: a cookie in place of a key.

A session remembers the key's id, never the key, and is as good as the key is at each request: one that is revoked, expires or loses a
scope takes its sessions with it. All are in memory, and end with the server.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Mapping

from msgspec import Struct

from fairlead.core.caller import Caller
from fairlead.core.errors import LimitExceeded, Unauthenticated
from fairlead.core.ui import UiSettings
from fairlead.gateway.identity.identity import Identity

MAX_TRIES = 10
"""Wrong keys of one address within TRY_SECONDS."""
TRY_SECONDS = 60.0
MAX_ADDRESSES = 100
"""Whose wrong keys are counted: those that tried last."""
MAX_COOKIE_CHARS = 128

ENDED = "the session has ended: log in again"


class Session(Struct):
    caller: Caller
    csrf: str
    """What every request that changes something must show in a header: a page of another site cannot know it."""
    began: float
    used: float


class Sessions:
    """Times are seconds since 1970."""

    def __init__(self, settings: UiSettings, identity: Identity) -> None:
        self.settings = settings
        self.identity = identity
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        """By the digest of what the cookie says; the one that was idle for the longest is first."""
        self._tries: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """Address → (since when, how many)."""

    def begin(self, caller: Caller, now: float) -> tuple[str, Session]:
        """(what the cookie is to say, session)."""
        while len(self._sessions) >= self.settings.max_sessions:
            self._sessions.popitem(last=False)
        token = secrets.token_urlsafe(32)
        session = Session(caller, secrets.token_urlsafe(32), began=now, used=now)
        self._sessions[_digest(token)] = session
        return token, session

    def find(self, token: str, now: float) -> Session:
        """The session, with its caller as the key is now. Raises Unauthenticated, and ends the session, where it is not good any more."""
        name = _digest(token)
        session = self._sessions.get(name)
        if session is None:
            raise Unauthenticated(ENDED)
        if self._is_over(session, now):
            del self._sessions[name]
            raise Unauthenticated(ENDED)
        try:
            session.caller = self.identity.again(session.caller, now)
        except Unauthenticated:
            del self._sessions[name]
            raise
        session.used = now
        self._sessions.move_to_end(name)
        return session

    def end(self, token: str) -> None:
        self._sessions.pop(_digest(token), None)

    def _is_over(self, session: Session, now: float) -> bool:
        settings = self.settings
        return now - session.began >= settings.session_hours * 3600 or now - session.used >= settings.idle_minutes * 60

    # Guessing

    def failed(self, address: str, now: float) -> None:
        """Somebody showed a wrong key. Raises LimitExceeded where too many came from there lately.

        Good keys are let in all the same: a key is too long to be guessed, and what strangers do must not lock anybody out.
        """
        since, tries = self._tries.get(address, (now, 0))
        if not 0.0 <= now - since < TRY_SECONDS:
            since, tries = now, 0
        self._tries[address] = (since, min(tries + 1, MAX_TRIES))
        self._tries.move_to_end(address)
        while len(self._tries) > MAX_ADDRESSES:
            self._tries.popitem(last=False)
        if tries >= MAX_TRIES:
            raise LimitExceeded("too many failed logins: wait a minute", reason="logins", retry_after=TRY_SECONDS - (now - since))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def cookie_name(headers: Mapping[bytes, bytes]) -> str:
    """With the port that the browser sees: cookies are shared by all ports of a host, and several servers may run on it."""
    port = headers.get(b"host", b"").decode("latin-1").rpartition(":")[2]
    return f"fairlead-session-{port}" if port.isdigit() else "fairlead-session"


def token_of(headers: Mapping[bytes, bytes]) -> str:
    """What the session's cookie says; "": there is none."""
    name = cookie_name(headers)
    for pair in headers.get(b"cookie", b"").decode("latin-1").split(";"):
        key, _, value = pair.strip().partition("=")
        if key == name:
            return value[:MAX_COOKIE_CHARS]
    return ""


def cookie(headers: Mapping[bytes, bytes], token: str, *, secure: bool, seconds: float) -> str:
    """`token` "": the browser is to forget it."""
    rest = "; Secure" if secure else ""
    return f"{cookie_name(headers)}={token}; Path=/; HttpOnly; SameSite=Strict; Max-Age={int(seconds) if token else 0}{rest}"
