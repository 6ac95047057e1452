"""Errors as FastAPI's users know them, `{"detail": ...}`: what Black Forest Labs and Replicate answer with."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.status import http_status, told
from fairlead.api.web import JSON, json_response
from fairlead.core.errors import FairleadError, InvalidRequest, LimitExceeded, TooLarge, Unsupported

_NAMED = re.compile(r"`([\w.\[\]]+)`")


class Detail(Struct):
    detail: Any
    """A sentence; of fields that are wrong, a list of {loc, msg, type}."""


class Details:
    """Implements `web.Shape` and `web.ErrorShape`."""

    def refusal(self, request: Request, error: HTTPException) -> Response:
        return json_response(Detail(error.detail), error.status_code, error.headers)

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> Response:
        status, media_type, body = self.content(error)
        more = {"Connection": "close"} if isinstance(error, TooLarge) else {}
        return Response(body, status, {**headers, **told(error), **more}, media_type)

    def event(self, error: FairleadError) -> bytes:
        return self.content(error)[2]

    def content(self, error: FairleadError) -> tuple[int, str, bytes]:
        if isinstance(error, LimitExceeded) and error.reason.startswith("budget"):
            return 402, JSON, msgspec.json.encode(Detail(error.message))
        if isinstance(error, (InvalidRequest, Unsupported)) and not isinstance(error, TooLarge):
            named = _NAMED.match(error.message)
            loc = ["body", *named[1].split(".")] if named else ["body"]
            return 422, JSON, msgspec.json.encode(Detail([{"loc": loc, "msg": error.message, "type": "value_error"}]))
        return http_status(error), JSON, msgspec.json.encode(Detail(error.message))
