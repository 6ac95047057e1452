"""The page of one model, on a port of its own: its form, and as much of the data plane as that needs. No administration, no metrics."""

import time
from collections.abc import Callable, Iterable
from typing import Annotated

from msgspec import Meta, Struct, structs
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from fairlead import __version__
from fairlead.api.admin_bodies import decoded
from fairlead.api.data import DATA_SHAPES
from fairlead.api.openapi import Operation
from fairlead.api.ops import OPS_SHAPES
from fairlead.api.ui.files import File, Files
from fairlead.api.ui.guests import SESSION_SECONDS, Guests, Visit
from fairlead.api.ui.playground import Playground
from fairlead.api.ui.routes import FOREVER, MAX_LOGIN_BYTES, SessionState, WithDashboard, check_origin, is_secure, served
from fairlead.api.ui.sessions import cookie
from fairlead.api.web import json_app, json_response, read_body
from fairlead.core import policy

ASKED = frozenset(
    {
        "openaiChat",
        "openaiComplete",
        "openaiEmbed",
        "modelInfer",
        "modelVersionInfer",
        "jobSubmit",
        "jobGet",
        "jobEvents",
        "jobCancel",
        "artifact",
        "artifactHead",
    }
)
"""Operations of the data plane that guests may ask."""


class Token(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    token: Annotated[str, Meta(min_length=1, max_length=200)]


class GuestState(SessionState, frozen=True, kw_only=True):
    model: str = ""
    """The one that may be asked; "" before a guest has entered."""


class Demo:
    def __init__(self, guests: Guests, files: Files, clock: Callable[[], float] = time.monotonic) -> None:
        self.guests = guests
        self.files = files
        self.clock = clock

    def app(self, playground: Playground, data: Iterable[Operation]) -> ASGIApp:
        """`data`: all of the data plane's, of which most are left out.

        Under any name, as a proxy before it may have: what a page of another site cannot do here is to send a guest's cookie.
        """
        pages = [
            ("GET", "/", self.page, None),
            ("GET", "/ui/static/{build}/{name:path}", self.static, None),
            ("GET", "/ui/session", self.session, None),
            ("POST", "/ui/enter", self.enter, None),
            *(("GET", path, serve, policy.Scope.INFER) for path, serve in playground.routes),
        ]
        asked = [(each.method, each.path, each.serve, each.scope) for each in data if each.name in ASKED]
        return WithDashboard(json_app(pages, OPS_SHAPES, self._admit), json_app(asked, DATA_SHAPES, self._admit))

    async def page(self, http: Request) -> Response:
        return served(http, self.files.demo, {"Content-Security-Policy": self.files.policy, "Cache-Control": "no-cache"})

    async def static(self, http: Request) -> Response:
        name = http.path_params["name"]
        file: File | None = None if name.startswith("pages/") else self.files.find(http.path_params["build"], name)
        if file is None:
            raise HTTPException(404)
        return served(http, file, {"Cache-Control": FOREVER})

    async def session(self, http: Request) -> Response:
        visit = self.guests.visit(http, self.clock())
        return json_response(self._state(visit), headers={"Cache-Control": "no-store"})

    async def enter(self, http: Request) -> Response:
        check_origin(http)
        token = decoded(await read_body(http, MAX_LOGIN_BYTES), Token).token
        shown, visit = self.guests.enter(token, self.clock())
        answer = json_response(self._state(visit), headers={"Cache-Control": "no-store"})
        answer.headers["Set-Cookie"] = cookie(dict(http.scope["headers"]), shown, secure=is_secure(http), seconds=SESSION_SECONDS)
        return answer

    async def _admit(self, http: Request, scope: policy.Scope | None) -> None:
        if scope is not None:
            self.guests.admit(http, self.clock())

    def _state(self, visit: Visit | None) -> GuestState:
        state = GuestState(required=True)
        if visit is None:
            return state
        return structs.replace(
            state, required=False, scopes=(policy.Scope.INFER,), csrf=visit.csrf, version=__version__, model=self.guests.model
        )
