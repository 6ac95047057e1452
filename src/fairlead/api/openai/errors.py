"""OpenAI's shape of errors: `{"error": {"message", "type", "param", "code"}}`, and which error is which."""

import math
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from starlette.responses import Response

from fairlead.api.status import http_status
from fairlead.api.web import json_response
from fairlead.core import errors
from fairlead.core.errors import FairleadError, InvalidRequest, TooLarge, Unavailable

T = TypeVar("T")

_UNKNOWN = re.compile(r"Object contains unknown field `(.+?)`")
_MISSING = re.compile(r"Object missing required field `(.+?)`")
_PLACE = re.compile(r" - at `\$\.?(.+?)`$")
_BACKTICKED = re.compile(r"`(\w+)`")


class BadParameter(InvalidRequest):
    """A parameter that is wrong, unknown, or not supported: `code` says which."""

    def __init__(self, message: str, param: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


NOT_SUPPORTED = frozenset(
    (
        "audio",
        "background",
        "function_call",
        "functions",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "logit_processors",
        "prediction",
        "reasoning_effort",
        "structured_outputs",
        "suffix",
        "verbosity",
        "web_search_options",
    )
)
"""Parameters that others know and this server does not."""

CODES: dict[type[FairleadError], tuple[int, str, str | None]] = {
    errors.ContextExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    errors.TooLarge: (413, "invalid_request_error", "request_too_large"),
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.NotFound: (404, "invalid_request_error", "model_not_found"),
    errors.Unsupported: (400, "invalid_request_error", "unsupported_value"),
    errors.QueueFull: (429, "rate_limit_error", "queue_full"),
    errors.TimeoutExpired: (503, "server_error", "queue_timeout"),
    errors.Unavailable: (503, "server_error", "unavailable"),
    errors.ModelError: (500, "server_error", "model_error"),
}
"""(status, type, code) of each kind of error."""


class OpenAIErrors:
    """Implements `web.ErrorShape`."""

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> Response:
        headers = dict(headers)
        if isinstance(error, Unavailable):
            headers["Retry-After"] = str(math.ceil(error.retry_after))
        if isinstance(error, TooLarge):
            headers["Connection"] = "close"
        return json_response(_body(error), _entry(error)[0], headers)

    def event(self, error: FairleadError) -> bytes:
        return msgspec.json.encode(_body(error))


def _entry(error: FairleadError) -> tuple[int, str, str | None]:
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return http_status(error), "server_error", None


def _body(error: FairleadError) -> dict[str, object]:
    _, kind, code = _entry(error)
    param = None
    if isinstance(error, BadParameter):
        param, code = error.param, error.code
    elif isinstance(error, errors.NotFound):
        param = "model"
    elif isinstance(error, InvalidRequest) and (named := _BACKTICKED.match(error.message)):
        param = named[1]
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


def decode_body(body: bytes, type_: type[T]) -> T:
    """Raises BadParameter naming the parameter."""
    try:
        return msgspec.json.decode(body, type=type_)
    except RecursionError:
        raise BadParameter("the request's JSON is nested too deeply", None) from None
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadParameter(f"we could not parse the JSON body of your request: {error}", None) from None


def _explained(message: str) -> BadParameter:
    """What msgspec says is wrong, in OpenAI's words."""
    place = _PLACE.search(message)
    where = place[1] if place else ""
    what = message[: place.start()] if place else message
    if unknown := _UNKNOWN.fullmatch(what):
        name = f"{where}.{unknown[1]}" if where else unknown[1]
        if unknown[1] in NOT_SUPPORTED:
            return BadParameter(f"Unsupported parameter: '{name}' is not supported by this server.", name, "unsupported_parameter")
        return BadParameter(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    if missing := _MISSING.fullmatch(what):
        name = f"{where}.{missing[1]}" if where else missing[1]
        return BadParameter(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if not where:
        named = _BACKTICKED.match(what)
        return BadParameter(what, named[1] if named else None, "invalid_value" if named else None)
    return BadParameter(f"Invalid value for '{where}': {what[:1].lower()}{what[1:]}.", where, "invalid_value")
