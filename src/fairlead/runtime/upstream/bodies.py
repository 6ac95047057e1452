"""Bodies of the OpenAI protocol on their way through: changed at the top level where that is needed, never taken apart below."""

import re

import msgspec
from msgspec import Raw as Json
from msgspec import Struct

from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Usage

_fields = msgspec.json.Decoder(dict[str, Json])
_encode = msgspec.json.Encoder().encode
_integer = msgspec.json.Decoder(int)
WITH_USAGE = Json(b'{"include_usage":true}')
LENGTHS = ("max_tokens", "max_completion_tokens")
READ_HERE = frozenset({"model", "stream", "stream_options", "n", "messages", "prompt", "input", *LENGTHS})
_USAGE = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
"""As a key: a quotation mark inside of a JSON string has a backslash before it, so no text of a model can look like this."""


def openai_body(body: bytes | memoryview, model: str, *, max_tokens: int | None, streams: bool) -> tuple[bytes, bool]:
    """What to send in place of `body`: with the upstream's name for the model, no more tokens than allowed, and a request for
    usage where an answer in pieces would not tell it (True then). All other values stay as they are, byte for byte.

    Of a key that comes twice only the last remains: what the gateway read is what the upstream reads. Raises InvalidRequest.
    """
    try:
        fields = _fields.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is no JSON object: {error}") from None
    for name in fields:
        if name not in READ_HERE and name.casefold() in READ_HERE:  # some servers do not tell `Model` from `model`
            raise InvalidRequest(f"unknown field `{name}`: did you mean `{name.casefold()}`?")
    fields["model"] = Json(_encode(model))
    if max_tokens is not None:
        _limit(fields, max_tokens)
    asked = False
    if streams:
        asked = _ask_for_usage(fields)
    return _encode(fields), asked


def _limit(fields: dict[str, Json], max_tokens: int) -> None:
    bounded = False
    for name in LENGTHS:
        value = fields.get(name)
        if value is None or bytes(value) == b"null":
            continue
        bounded = True
        try:
            above = _integer.decode(value) > max_tokens
        except msgspec.DecodeError:
            raise InvalidRequest(f"`{name}` must be an integer") from None
        if above:
            fields[name] = Json(b"%d" % max_tokens)
    if not bounded:
        fields["max_tokens"] = Json(b"%d" % max_tokens)


def _ask_for_usage(fields: dict[str, Json]) -> bool:
    """Whether the caller did not."""
    given = fields.get("stream_options")
    if given is None or bytes(given) == b"null":
        fields["stream_options"] = WITH_USAGE
        return True
    try:
        options = _fields.decode(given)
    except msgspec.DecodeError:
        raise InvalidRequest("`stream_options` must be an object") from None
    asked = bytes(options.get("include_usage", b"")) != b"true"
    options["include_usage"] = Json(b"true")
    fields["stream_options"] = Json(_encode(options))
    return asked


# Usage


class _Cached(Struct):
    cached_tokens: int | None = None


class _Told(Struct):
    """OpenAI's `usage`."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Event(Struct):
    usage: _Told | None = None
    choices: list[Json] = []


_told = msgspec.json.Decoder(_Told)
_event = msgspec.json.Decoder(_Event)


def _usage(told: _Told) -> Usage:
    """Numbers below 0 are taken for 0: they would be money back."""
    details = told.prompt_tokens_details
    return Usage(
        prompt_tokens=max(told.prompt_tokens or 0, 0),
        completion_tokens=max(told.completion_tokens or 0, 0),
        cached_tokens=max((details.cached_tokens if details is not None else None) or 0, 0),
    )


def usage_of(body: bytes) -> Usage | None:
    """Of a whole answer: its last `"usage": {...}`, looked for from the end. None where there is none that can be read."""
    at = len(body)
    while (at := body.rfind(b'"usage"', 0, at)) >= 0:
        if match := _USAGE.match(body, at):
            try:
                return _usage(_told.decode(match[1]))
            except msgspec.DecodeError:
                return None
    return None


# Server-sent events


SEPARATOR_BYTES = 3
"""Of what ends an event, those that may have come before the rest of it."""


def whole_events(data: bytes | bytearray, start: int = 0) -> int:
    """Where the last whole event of `data` ends, if it does behind `start`; else 0."""
    lf, crlf = data.rfind(b"\n\n", start), data.rfind(b"\r\n\r\n", start)
    return max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)


def num_events(data: bytes) -> int:
    if data.endswith(b"\n\n") and data.find(b"\n", 0, -2) < 0:  # one line: two look-ups cost a third of a count
        return 1
    return data.count(b"\n\n") or data.count(b"\r\n\r\n")


def tells_usage(data: bytes) -> bool:
    """Whether there is one in `data`: of a stream, most events say `"usage":null`, and nearly all chunks are one event."""
    at = data.rfind(b'"usage"')
    if at < 0:
        return False
    if data.startswith(b":null", at + 7) and (data.find(b'"usage"', 0, at) < 0 or data.count(b'"usage"') == data.count(b'"usage":null')):
        return False
    return _USAGE.search(data) is not None


def usage_of_events(data: bytes, *, drop: bool) -> tuple[Usage | None, bytes]:
    """(the last usage told, the events). `drop`: without those that tell nothing else."""
    usage = None
    kept = []
    for event in re.split(rb"(?<=\n\n)|(?<=\r\n\r\n)", data):
        told = None
        if b'"usage"' in event:
            lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
            try:
                told = _event.decode(b"\n".join(lines))
            except (msgspec.DecodeError, UnicodeDecodeError):
                told = None
        if told is not None and told.usage is not None:
            usage = _usage(told.usage)
            if drop and not told.choices:
                continue
        kept.append(event)
    return usage, b"".join(kept)
