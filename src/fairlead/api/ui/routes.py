"""The dashboard's own routes: its pages and files, logging in and out, and what is live."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fairlead import __version__
from fairlead.api.admin_bodies import NoQuery, decoded, query_of
from fairlead.api.admin_route import administered
from fairlead.api.doorkeeper import CREDENTIALS, caller_of, is_origin_of, may
from fairlead.api.problems import Problems
from fairlead.api.ui.doorkeeper import SessionDoorkeeper
from fairlead.api.ui.files import File, Files
from fairlead.api.ui.live import Live
from fairlead.api.ui.models import ModelList, ModelsQuery, Registered
from fairlead.api.ui.sessions import cookie, token_of
from fairlead.api.web import EventStream, Serve, json_response, read_body
from fairlead.core import policy
from fairlead.core.caller import Caller, Credentials
from fairlead.core.errors import FairleadError, Forbidden, InvalidRequest, Unauthenticated
from fairlead.gateway.identity.identity import client_address
from fairlead.observe.history import History

DATA = "/ui/data"
"""Under which the data plane is mounted, for pages of this site."""
MAX_LOGIN_BYTES = 4096
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CONFINED = [(b"content-security-policy", b"default-src 'none'; sandbox"), (b"x-content-type-options", b"nosniff")]
"""Of answers of the data plane: what a model or a caller made must not act as a page of the dashboard."""
FOREVER = "public, max-age=31536000, immutable"

UiRoute = tuple[str, str, Serve, policy.Scope | None]


class Login(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: Annotated[str, Meta(min_length=1, max_length=1024)]


class HistoryQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str = ""
    """"": the whole server."""


class SessionState(Struct, frozen=True, kw_only=True):
    required: bool
    """A key must be shown first: then nothing else is told."""
    who: str = ""
    tenant: str = ""
    scopes: tuple[str, ...] = ()
    csrf: str = ""
    version: str = ""
    features: tuple[str, ...] = ()
    """What /admin has on this server: models, rollouts, tenants, ..."""


class UiRoutes:
    def __init__(
        self,
        files: Files,
        doorkeeper: SessionDoorkeeper,
        history: History,
        live: Live,
        models: ModelList,
        registered: Callable[[], Mapping[str, Registered]],
        features: Iterable[str],
    ) -> None:
        """`registered`: blocks."""
        self.files = files
        self.doorkeeper = doorkeeper
        self.history = history
        self.live = live
        self.models = models
        self._registered = registered
        self.features = tuple(sorted(set(features)))

    @property
    def routes(self) -> list[UiRoute]:
        return [
            ("GET", "/ui", self.shell, None),
            ("GET", "/ui/static/{build}/{name:path}", self.static, None),
            ("POST", "/ui/login", self.login, None),
            ("POST", "/ui/logout", self.logout, None),
            ("GET", "/ui/session", self.session, None),
            ("GET", "/ui/live", administered(self.stream), policy.Scope.ADMIN),
            ("GET", "/ui/history", administered(self.past), policy.Scope.ADMIN),
            ("GET", "/ui/models.json", administered(self.listed), policy.Scope.ADMIN),
            ("GET", "/ui/{page:path}", self.shell, None),
        ]

    # Files

    async def shell(self, http: Request) -> Response:
        if http.url.path.startswith("/ui/static/"):
            raise HTTPException(404)
        return served(http, self.files.shell, {"Content-Security-Policy": self.files.policy, "Cache-Control": "no-cache"})

    async def static(self, http: Request) -> Response:
        file = self.files.find(http.path_params["build"], http.path_params["name"])
        if file is None:
            raise HTTPException(404)
        return served(http, file, {"Cache-Control": FOREVER})

    # Sessions

    async def login(self, http: Request) -> Response:
        headers, now = dict(http.scope["headers"]), time.time()
        check_origin(http)
        sessions, identity = self.doorkeeper.sessions, self.doorkeeper.identity
        if not identity.required:
            raise InvalidRequest("this server asks nobody for a key")
        proxies, peer = self.doorkeeper.auth.trusted_proxies, http.client.host if http.client else ""
        address = client_address(peer, http.headers.get("x-forwarded-for", ""), proxies) if proxies else peer
        shown = decoded(await read_body(http, MAX_LOGIN_BYTES), Login).key
        try:
            caller = identity.known(Credentials(api_key=shown, address=address), now)
            if caller is None or not caller.key or caller.key not in identity.snapshot.by_id:
                raise Unauthenticated("log in with a key of this server (fl_...), not with a token")
        except Unauthenticated:
            sessions.failed(address, now)
            raise
        if policy.Scope.ADMIN not in caller.scopes:
            raise Forbidden("this key has no scope 'admin'")
        if caller.must_sign:
            raise Forbidden("requests of this tenant must be signed, which browsers do not do: log in with a key of another one")
        token, session = sessions.begin(caller, now)
        answer = json_response(self._state(caller, session.csrf))
        seconds = sessions.settings.session_hours * 3600
        answer.headers["Set-Cookie"] = cookie(headers, token, secure=is_secure(http), seconds=seconds)
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def logout(self, http: Request) -> Response:
        headers = dict(http.scope["headers"])
        answer = json_response({})
        try:
            ours = self.doorkeeper.session(headers, http.method) is not None
        except Unauthenticated:
            ours = True  # it has ended already
        if ours:
            self.doorkeeper.sessions.end(token_of(headers))
            answer.headers["Set-Cookie"] = cookie(headers, "", secure=is_secure(http), seconds=0)
        return answer

    async def session(self, http: Request) -> Response:
        """Who looks. Tells a stranger only that somebody must log in."""
        headers = dict(http.scope["headers"])
        state = SessionState(required=True)
        try:
            session = self.doorkeeper.session(headers, http.method)
            if session is not None:
                state = self._state(session.caller, session.csrf)
            else:
                await self.doorkeeper.admit(http, policy.Scope.ADMIN)
                state = self._state(caller_of(http)[0], "")
        except Unauthenticated:
            pass
        return json_response(state, headers={"Cache-Control": "no-store"})

    def _state(self, caller: Caller, csrf: str) -> SessionState:
        return SessionState(
            required=False,
            who=caller.key,
            tenant=caller.tenant,
            scopes=tuple(sorted(caller.scopes)),
            csrf=csrf,
            version=__version__,
            features=self.features,
        )

    # Numbers

    async def stream(self, http: Request) -> Any:
        query_of(http, NoQuery)
        return EventStream(self.live.view(self._allowed(http)), _quiet, {}, _StreamProblems())

    def _allowed(self, http: Request) -> Callable[[], object]:
        """What raises Unauthenticated once whoever asks may not any more."""
        headers, caller = dict(http.scope["headers"]), caller_of(http)[0]
        if not caller.key or caller.key not in self.doorkeeper.identity.snapshot.by_id:
            return lambda: None  # anyone; or a token's or certificate's owner, whose connections end by themselves
        token = token_of(headers) if CREDENTIALS.isdisjoint(headers) else ""
        if token:
            return lambda: may(self.doorkeeper.sessions.find(token, time.time()).caller, policy.Scope.ADMIN, "")
        return lambda: self.doorkeeper.identity.again(caller, time.time())

    async def past(self, http: Request) -> Response:
        return json_response(self.history.series(query_of(http, HistoryQuery).model), headers={"Cache-Control": "no-store"})

    async def listed(self, http: Request) -> Response:
        query = query_of(http, ModelsQuery)
        registered = await asyncio.to_thread(self._registered)
        return json_response(self.models.answer(query, registered), headers={"Cache-Control": "no-store"})


class _StreamProblems(Problems):
    def event(self, error: FairleadError) -> bytes:
        return self.content(error)[2]


def _quiet(status: int, message: str) -> None:
    """The ops port keeps no access log."""


def served(http: Request, file: File, headers: Mapping[str, str]) -> Response:
    told = {**HEADERS, **headers, "ETag": file.etag, "Vary": "Accept-Encoding"}
    if file.etag in http.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=told)
    zipped = file.zipped and "gzip" in http.headers.get("accept-encoding", "")
    body, encoding = (file.zipped, {"Content-Encoding": "gzip"}) if zipped else (file.body, {})
    return Response(body, headers={**told, **encoding, "Content-Type": file.content_type})


def check_origin(http: Request) -> None:
    """Raises Forbidden: who logs a browser in from elsewhere would have it act under a name of their own."""
    origin = http.headers.get("origin")
    foreign = origin is not None and not is_origin_of(origin, http.headers.get("host", ""))
    if foreign or http.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("log in on this server's own page")


def is_secure(http: Request) -> bool:
    """Whether the browser speaks TLS, to us or to a proxy before us."""
    return http.url.scheme == "https" or http.headers.get("x-forwarded-proto", "").split(",")[0].strip() == "https"


class WithDashboard:
    """The ops port's app, with the data plane's beneath DATA."""

    def __init__(self, ops: ASGIApp, data: ASGIApp) -> None:
        self.ops = ops
        self.data = data

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if not path.startswith(f"{DATA}/"):
            await self.ops(scope, receive, send)
            return

        async def confined(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *CONFINED]}
            await send(message)

        raw = scope.get("raw_path") or path.encode()
        await self.data({**scope, "path": path[len(DATA) :], "raw_path": raw[len(DATA) :]}, receive, confined)
