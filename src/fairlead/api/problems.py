"""Errors as RFC 9457 wants them: `application/problem+json`."""

from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import BadField, FieldError, Problem
from fairlead.api.status import http_status, told
from fairlead.core.errors import FairleadError
from fairlead.store.transactions import Conflict


class Problems:
    """Implements `web.Shape`."""

    def refusal(self, _: Request, error: HTTPException) -> Response:
        return Response(_problem(error.status_code, error.detail), error.status_code, error.headers, Problem.content_type)

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> Response:
        status, media_type, body = self.content(error)
        return Response(body, status, {**headers, **told(error)}, media_type)

    def content(self, error: FairleadError) -> tuple[int, str, bytes]:
        errors: tuple[FieldError, ...] = ()
        detail = error.message
        if isinstance(error, BadField) and error.field:
            errors, detail = (FieldError(error.field, error.message),), f"{error.field}: {error.message}"
        status = HTTPStatus.CONFLICT if isinstance(error, Conflict) else http_status(error)
        return status, Problem.content_type, _problem(status, detail, errors)


def _problem(status: int, detail: str, errors: tuple[FieldError, ...] = ()) -> bytes:
    return msgspec.json.encode(Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors))
