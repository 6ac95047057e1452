"""Who has been let in to try one model: by a link with a token, which becomes a session that may ask this model and nothing else."""

from glob import escape
from hmac import compare_digest
from secrets import token_urlsafe

from msgspec import Struct, structs
from starlette.requests import Request

from fairlead.api.doorkeeper import CALLER
from fairlead.api.ui.doorkeeper import CSRF_HEADER, OURS, SAFE
from fairlead.api.ui.sessions import token_of
from fairlead.core.caller import ANYONE
from fairlead.core.errors import Forbidden, Unauthenticated
from fairlead.core.policy import Scope

SESSION_SECONDS = 12 * 3600.0
NOT_IN = "open the link that you were given: this page shows one model to invited guests only"


class _Invitation(Struct):
    token: str
    left: int
    """How many more browsers may come by it."""


class Visit(Struct):
    csrf: str
    """What every request that changes something must show in a header."""
    until: float


class Guests:
    """Lives in the event loop, and forgets everybody when the process ends. `now` is of a clock that only goes forward."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._invitations: list[_Invitation] = []
        self._visits: dict[str, Visit] = {}
        """By what the cookie says. As many as there were invitations, at most."""

    def invite(self, browsers: int = 1) -> str:
        """A token that so many browsers may come with."""
        invitation = _Invitation(token_urlsafe(24), browsers)
        self._invitations.append(invitation)
        return invitation.token

    def enter(self, token: str, now: float) -> tuple[str, Visit]:
        """(what the cookie is to say, visit). Raises Unauthenticated for a token that nobody gave, or that is used up."""
        found = next((each for each in self._invitations if compare_digest(each.token.encode(), token.encode())), None)
        if found is None or not found.left:
            raise Unauthenticated("this link is not good, or has been used already: ask for another one")
        found.left -= 1
        cookie, visit = token_urlsafe(32), Visit(token_urlsafe(32), now + SESSION_SECONDS)
        self._visits[cookie] = visit
        return cookie, visit

    def visit(self, http: Request, now: float) -> Visit | None:
        """None for who has not entered."""
        cookie = token_of(dict(http.scope["headers"]))
        visit = self._visits.get(cookie)
        if visit is not None and visit.until <= now:
            del self._visits[cookie]
            return None
        return visit

    def admit(self, http: Request, now: float) -> None:
        """Put the guest into the ASGI scope. Raises Unauthenticated, and Forbidden for what another site's page asks."""
        visit = self.visit(http, now)
        if visit is None:
            raise Unauthenticated(NOT_IN)
        headers = dict(http.scope["headers"])
        if headers.get(b"sec-fetch-site", b"") not in OURS:
            raise Forbidden("pages of another site may not use this session")
        if http.method not in SAFE and not compare_digest(headers.get(CSRF_HEADER, b""), visit.csrf.encode("ascii")):
            raise Forbidden(f"this session's token is missing in the header {CSRF_HEADER.decode()}: reload the page")
        guest = structs.replace(
            ANYONE,
            classes=(),
            scopes=frozenset((Scope.INFER,)),
            models=((escape(self.model),),),
            address=http.client.host if http.client else "",
        )
        http.scope[CALLER] = (guest, "")
