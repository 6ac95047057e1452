"""Anthropic's shape of errors: `{"type": "error", "error": {"type", "message"}, "request_id"}`, and which error is which."""

from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.line import AccessLine
from fairlead.api.status import LateRequest, LongHead, http_status, told
from fairlead.api.web import JSON, json_response
from fairlead.core import errors
from fairlead.core.errors import FairleadError, InvalidRequest, TooLarge
from fairlead.gateway.reuse.response_cache import NotStored

Kind = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "timeout_error",
    "api_error",
    "overloaded_error",
]

KINDS: dict[type[FairleadError], tuple[int, Kind]] = {
    errors.TooLarge: (413, "request_too_large"),
    LongHead: (431, "invalid_request_error"),
    LateRequest: (408, "invalid_request_error"),
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.Filtered: (400, "invalid_request_error"),
    errors.Unauthenticated: (401, "authentication_error"),
    errors.Forbidden: (403, "permission_error"),
    errors.NotFound: (404, "not_found_error"),
    errors.Unsupported: (400, "invalid_request_error"),
    NotStored: (504, "timeout_error"),
    errors.LimitExceeded: (429, "rate_limit_error"),
    errors.Unavailable: (529, "overloaded_error"),
    errors.ModelError: (500, "api_error"),
}
"""(status, type) of each kind of error."""


class ThreadUnsupported(InvalidRequest):
    """Programs that meet it send the whole conversation themselves from then on."""

    def __init__(self) -> None:
        super().__init__("'thread' is not supported: this server keeps no conversations, so send all messages each time.")


class AnthropicErrorCause(Struct):
    error_code: Literal["thread_unsupported_request"]
    unsupported: list[str]


class AnthropicErrorDetails(Struct, omit_defaults=True):
    type: Kind
    message: str
    details: AnthropicErrorCause | None = None


class AnthropicError(Struct):
    error: AnthropicErrorDetails
    request_id: str | None = None
    type: Literal["error"] = "error"


class AnthropicErrors:
    """Implements `web.ErrorShape` and `web.Shape`."""

    def __init__(self, request_id: str | None = None) -> None:
        """`request_id`: of the request whose stream breaks off; an answer's own head says it."""
        self.request_id = request_id

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> Response:
        headers = {**headers, **told(error)}
        if isinstance(error, TooLarge):
            # What is left of the body is not worth reading.
            headers["Connection"] = "close"
        return _answer(_details(error), _entry(error)[0], headers)

    def refusal(self, request: Request, error: HTTPException) -> Response:
        """What never reaches an operation: an unknown path, a method that the path does not have."""
        message, kind = error.detail, _kind_of(error.status_code)
        if error.status_code == 404:
            message = f"Unknown request URL: {request.method} {request.url.path}"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"Not allowed to {request.method} on {request.url.path}: its methods are {allowed}"
        line: AccessLine | None = request.scope.get("fairlead.line")
        headers = {**(line.headers if line is not None else {}), **(error.headers or {})}
        return _answer(AnthropicErrorDetails(kind, message), error.status_code, headers)

    def content(self, error: FairleadError) -> tuple[int, str, bytes]:
        return _entry(error)[0], JSON, self.event(error)

    def event(self, error: FairleadError) -> bytes:
        return msgspec.json.encode(AnthropicError(_details(error), self.request_id))


def _details(error: FairleadError) -> AnthropicErrorDetails:
    cause = AnthropicErrorCause("thread_unsupported_request", ["thread"]) if isinstance(error, ThreadUnsupported) else None
    return AnthropicErrorDetails(_entry(error)[1], error.message, cause)


def _answer(details: AnthropicErrorDetails, status: int, headers: Mapping[str, str]) -> Response:
    id = headers.get("x-request-id")
    head = headers if id is None else {**headers, "request-id": id}
    return json_response(AnthropicError(details, id), status, head)


def _entry(error: FairleadError) -> tuple[int, Kind]:
    for kind in type(error).__mro__:
        if kind in KINDS:
            return KINDS[kind]
    return http_status(error), _kind_of(http_status(error))


def _kind_of(status: int) -> Kind:
    return "not_found_error" if status == 404 else "invalid_request_error" if status < 500 else "api_error"
