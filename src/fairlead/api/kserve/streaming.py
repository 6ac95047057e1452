"""Inference that answers with server-sent events, and Triton's generate."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.doorkeeper import place
from fairlead.api.kserve import codec
from fairlead.api.kserve.generate import decode_flat, encode_flat
from fairlead.api.line import AccessLine
from fairlead.api.openapi import EVENTS, HEADER_LENGTH, JSON
from fairlead.api.status import CLIENT_LEFT, INTERNAL, http_status
from fairlead.api.web import EventStream, error_response, framed, read_body, while_connected
from fairlead.core.errors import FairleadError, InvalidRequest, TooLarge
from fairlead.core.request import Inference, Request, Response
from fairlead.core.specs import ModelSpec
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

MAX_JSON_BYTES = 1 << 20
"""Nobody else is served while JSON is parsed; larger tensors have the binary extension."""

Encode = Callable[[Response], Awaitable[bytes]]


class Streaming:
    """Endpoints whose answers come in several parts, or could."""

    def __init__(self, repository: ModelRepository, gateway: Inference, finished: Finished, max_body_bytes: int) -> None:
        self.repository = repository
        self.gateway = gateway
        self.finished = finished
        self.max_body_bytes = max_body_bytes

    async def infer(self, http: HttpRequest) -> Any:
        """The body is that of any `infer`; every response is an event."""
        return await self._logged(http, self._infer)

    async def generate(self, http: HttpRequest) -> Any:
        return await self._logged(http, self._generate)

    async def generate_stream(self, http: HttpRequest) -> Any:
        return await self._logged(http, self._generate_stream)

    async def _logged(self, http: HttpRequest, serve: Callable[[HttpRequest, AccessLine], Awaitable[Any]]) -> Any:
        """Every end that comes before the answer has begun is logged here."""
        line = AccessLine(self.finished, http)
        try:
            line.model, line.version = place(http)
            return await serve(http, line)
        except FairleadError as failure:
            error = _named(failure, line.request.id if line.request else "")
            line.end(http_status(error), error.message)
            return error_response(error, line.headers)
        except HTTPException as error:
            line.end(error.status_code, error.detail)
            raise
        except ClientDisconnect:
            return _left(line)
        except Exception:
            line.end(500, INTERNAL.message)
            raise

    async def _infer(self, http: HttpRequest, line: AccessLine) -> EventStream:
        if EVENTS not in http.headers.get("accept", ""):
            raise HTTPException(406, f"this path answers with {EVENTS}")
        spec = self.repository.find(line.model, line.version).spec
        request, form = await self._decode(http, line, spec)
        self._complete(line, request)

        async def encode(response: Response) -> bytes:
            if codec.pace(response, form) is codec.Pace.LOOP:
                parts, _ = codec.encode(response, form, request.outputs)
            else:
                parts, _ = await asyncio.to_thread(codec.encode, response, form, request.outputs)
            return bytes(parts[0])

        return EventStream(self._events(request, line, encode), line.end, line.headers)

    async def _generate(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        request = await self._flat(http, line)
        event = await while_connected(http.scope, http.receive, self._only_event(request, line))
        if event is None:
            return _left(line)
        line.end(200, "")
        return HttpResponse(event, headers=line.headers, media_type=JSON)

    async def _generate_stream(self, http: HttpRequest, line: AccessLine) -> EventStream:
        return EventStream(self._events(await self._flat(http, line), line, _encode_flat), line.end, line.headers)

    # In

    async def _decode(self, http: HttpRequest, line: AccessLine, spec: ModelSpec) -> tuple[Request, codec.Form]:
        body = await read_body(http, self.max_body_bytes)
        header = http.headers.get(HEADER_LENGTH)
        head_bytes = None if header is None else codec.head_size(header, len(body))
        if head_bytes == 0:
            request, _ = codec.decode_raw(body, line.model, line.version, spec)
            return request, codec.JSON_FORM
        if (head_bytes or len(body)) > MAX_JSON_BYTES:
            raise TooLarge(f"the request's JSON exceeds {MAX_JSON_BYTES} bytes: send its tensors with the binary extension")
        try:
            request, form = codec.decode(body, head_bytes, line.model, line.version)
        except codec.TooSlow:
            request, form = await asyncio.to_thread(codec.decode, body, head_bytes, line.model, line.version, True)
        if form.binary or any(form.binaries.values()):
            raise InvalidRequest("events are text: ask for outputs without 'binary_data_output' and 'binary_data'")
        return request, codec.with_labels(form, spec) if form.classes else form

    async def _flat(self, http: HttpRequest, line: AccessLine) -> Request:
        spec = self.repository.find(line.model, line.version).spec
        request = decode_flat(await read_body(http, MAX_JSON_BYTES), line.model, line.version, spec)
        self._complete(line, request)
        return request

    def _complete(self, line: AccessLine, request: Request) -> None:
        line.complete(request)

    # Out

    async def _events(self, request: Request, line: AccessLine, encode: Encode) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._responses(request, line)) as responses:
            async for response in responses:
                yield framed(await encode(response))

    async def _responses(self, request: Request, line: AccessLine) -> AsyncGenerator[Response, None]:
        try:
            async with aclosing(self.gateway.infer(request)) as responses:
                async for response in responses:
                    line.answered(response)
                    yield response
        except FairleadError as error:
            raise _named(error, request.id) from None

    async def _only_event(self, request: Request, line: AccessLine) -> bytes:
        async with aclosing(self._responses(request, line)) as responses:
            response = await anext(responses, None)
            if response is None or await anext(responses, None) is not None:
                raise InvalidRequest(
                    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number of responses"
                )
        return encode_flat(response)


async def _encode_flat(response: Response) -> bytes:
    return encode_flat(response)


def _named(error: FairleadError, request_id: str) -> FairleadError:
    """The error, saying which request it is about."""
    return error.saying(codec.message_of(error, request_id))


def _left(line: AccessLine) -> HttpResponse:
    """Goes nowhere."""
    line.end(CLIENT_LEFT, "the client left")
    return HttpResponse(status_code=CLIENT_LEFT)
