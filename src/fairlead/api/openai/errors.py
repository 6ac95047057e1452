"""OpenAI's shape of errors: `{"error": {"message", "type", "param", "code"}}`, and which error is which."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from msgspec.inspect import ListType, LiteralType, StructType, Type, UnionType, type_info
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.status import LateRequest, LongHead, http_status, told
from fairlead.api.web import JSON, json_response
from fairlead.core import errors
from fairlead.core.errors import FairleadError, InvalidRequest, TooLarge
from fairlead.gateway.reuse.response_cache import NotStored

T = TypeVar("T")

_UNKNOWN = re.compile(r"Object contains unknown field `(.+?)`")
_MISSING = re.compile(r"Object missing required field `(.+?)`")
_CHOICE = re.compile(r"Invalid enum value (.+)", re.DOTALL)
_PLACE = re.compile(r" - at `\$\.?(.+?)`$")
_INDEX = re.compile(r"\[.*?\]")
_BACKTICKED = re.compile(r"`(\w[\w.\[\]]*)`")


class BadParameter(InvalidRequest):
    """A parameter that is wrong, unknown, or not supported: `code` says which."""

    def __init__(self, message: str, param: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Missing(BadParameter):
    """Something with an id that is not there, or is another tenant's."""


NOT_SUPPORTED = frozenset(
    (
        "access_programs",
        "audio",
        "background",
        "background_options",
        "context_management",
        "conversation",
        "function_call",
        "functions",
        "input_fidelity",
        "logit_processors",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "style",
        "suffix",
        "verbosity",
        "web_search_options",
    )
)
"""Parameters that others know and this server does not."""

RENAMED = {
    "guided_choice": "`structured_outputs: {choice: [...]}`",
    "guided_grammar": "`structured_outputs: {grammar: ...}`",
    "guided_json": "`structured_outputs: {json: ...}`",
    "guided_regex": "`structured_outputs: {regex: ...}`",
}
"""Parameters that vLLM once had, and what took their place."""

CODES: dict[type[FairleadError], tuple[int, str, str | None]] = {
    errors.ContextExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    Missing: (404, "invalid_request_error", None),
    errors.TooLarge: (413, "invalid_request_error", "request_too_large"),
    LongHead: (431, "invalid_request_error", "headers_too_large"),
    LateRequest: (408, "invalid_request_error", "request_timeout"),
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.Filtered: (400, "invalid_request_error", "content_filter"),
    errors.Unauthenticated: (401, "invalid_request_error", "invalid_api_key"),
    errors.Forbidden: (403, "invalid_request_error", "permission_denied"),
    errors.NotFound: (404, "invalid_request_error", "model_not_found"),
    errors.Unsupported: (400, "invalid_request_error", "unsupported_model"),
    NotStored: (504, "server_error", "not_stored"),
    errors.LimitExceeded: (429, "rate_limit_error", "rate_limit_exceeded"),
    errors.Shed: (429, "rate_limit_error", "overloaded"),
    errors.QueueFull: (429, "rate_limit_error", "queue_full"),
    errors.TimeoutExpired: (503, "server_error", "queue_timeout"),
    errors.Unavailable: (503, "server_error", "unavailable"),
    errors.ModelError: (500, "server_error", "model_error"),
}
"""(status, type, code) of each kind of error."""


class OpenAIErrorDetails(Struct):
    message: str
    type: str
    param: str | None
    """The parameter that is wrong."""
    code: str | None


class OpenAIError(Struct):
    error: OpenAIErrorDetails


class OpenAIErrors:
    """Implements `web.ErrorShape` and `web.Shape`."""

    def __init__(self, prompt: str | None = None) -> None:
        """`prompt`: the parameter that the prompt comes in, which is what the engine complains of unless it names another."""
        self.prompt = prompt

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> Response:
        headers = {**headers, **told(error)}
        if isinstance(error, TooLarge):
            # What is left of the body is not worth reading.
            headers["Connection"] = "close"
        return json_response(self.body(error), _entry(error)[0], headers)

    def refusal(self, request: Request, error: HTTPException) -> Response:
        """What never reaches an operation: an unknown path, a method that the path does not have."""
        message, code = error.detail, None
        if error.status_code == 404:
            message = f"Unknown request URL: {request.method} {request.url.path}. Please check the URL for typos."
            code = "unknown_url"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message, code = f"Not allowed to {request.method} on {request.url.path}: its methods are {allowed}.", "method_not_supported"
        return json_response(
            OpenAIError(OpenAIErrorDetails(message, "invalid_request_error", None, code)), error.status_code, error.headers
        )

    def content(self, error: FairleadError) -> tuple[int, str, bytes]:
        return _entry(error)[0], JSON, self.event(error)

    def event(self, error: FairleadError) -> bytes:
        return msgspec.json.encode(self.body(error))

    def body(self, error: FairleadError) -> OpenAIError:
        _, kind, code = _entry(error)
        if isinstance(error, errors.LimitExceeded) and error.reason.startswith("budget"):
            kind = code = "insufficient_quota"
        if isinstance(error, BadParameter):
            return OpenAIError(OpenAIErrorDetails(error.message, kind, error.param, error.code))
        param = None
        if isinstance(error, (errors.NotFound, errors.Unsupported)):
            param = "model"
        elif isinstance(error, InvalidRequest) and not isinstance(error, TooLarge):
            named = _BACKTICKED.match(error.message)
            param = named[1] if named else self.prompt
        return OpenAIError(OpenAIErrorDetails(error.message, kind, param, code))


def no_such_model(name: str) -> errors.NotFound:
    return errors.NotFound(f"The model '{name}' does not exist or you do not have access to it.")


def openai_status(error: FairleadError) -> int:
    return _entry(error)[0]


def _entry(error: FairleadError) -> tuple[int, str, str | None]:
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return http_status(error), "server_error", None


def decode_body(body: bytes, type_: type[T]) -> T:
    """Raises BadParameter naming the parameter."""
    try:
        return msgspec.json.decode(body, type=type_)
    except RecursionError:
        raise BadParameter("the request's JSON is nested too deeply", None) from None
    except msgspec.ValidationError as error:
        raise explained(str(error), type_) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadParameter(f"We could not parse the JSON body of your request: {error}.", None) from None


def explained(message: str, type_: type, within: str = "") -> BadParameter:
    """What msgspec says is wrong, in OpenAI's words. `within`: where the request has what was read as `type_`."""
    place = _PLACE.search(message)
    inner = place[1] if place else ""
    where = ".".join(part for part in (within, inner) if part)
    what = message[: place.start()] if place else message
    if unknown := _UNKNOWN.fullmatch(what):
        name = f"{where}.{unknown[1]}" if where else unknown[1]
        if instead := RENAMED.get(unknown[1]):
            return BadParameter(f"Unsupported parameter: '{name}'. Use {instead} in its place.", name, "unsupported_parameter")
        if unknown[1] in NOT_SUPPORTED:
            return BadParameter(f"Unsupported parameter: '{name}' is not supported by this server.", name, "unsupported_parameter")
        return BadParameter(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    if missing := _MISSING.fullmatch(what):
        name = f"{where}.{missing[1]}" if where else missing[1]
        return BadParameter(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if not where:
        return BadParameter(f"Invalid request body: {what[:1].lower()}{what[1:]}.", None, "invalid_type")
    if choice := _CHOICE.fullmatch(what):
        supported = ", ".join(map(repr, _supported(type_, inner)))
        return BadParameter(f"Invalid value for '{where}': {choice[1]}. Supported values are: {supported}.", where, "invalid_value")
    if ", got `" in what:
        return BadParameter(f"Invalid type for '{where}': {what[:1].lower()}{what[1:]}.", where, "invalid_type")
    return BadParameter(f"Invalid value for '{where}': {what[:1].lower()}{what[1:]}.", where, "invalid_value")


def _supported(type_: type, where: str) -> list[Any]:
    """What may stand at a place of a body, e.g. `messages[3].role`."""
    found: list[Type] = [type_info(type_)]
    for name in _INDEX.sub("", where).split("."):
        structs = [each for each in _alternatives(found) if isinstance(each, StructType)]
        found = [field.type for struct in structs for field in struct.fields if field.encode_name == name]
    return [value for each in _alternatives(found) if isinstance(each, LiteralType) for value in each.values]


def _alternatives(types: list[Type]) -> Iterator[Type]:
    for each in types:
        if isinstance(each, UnionType):
            yield from _alternatives(list(each.types))
        elif isinstance(each, ListType):
            yield from _alternatives([each.item_type])
        else:
            yield each
