"""What every protocol of language models does alike: read a body, find the model, ask the gateway, log the end."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Protocol, TypeVar

import structlog
from msgspec import Struct, structs
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.line import AccessLine
from fairlead.api.openai.errors import BadParameter, OpenAIError, OpenAIErrors, decode_body, no_such_model
from fairlead.api.openai.moderations import DEFAULT_MODEL
from fairlead.api.openai.passing import Peek, Whole, chained, passed, peek, raw_of
from fairlead.api.openapi import Operation
from fairlead.api.status import CLIENT_LEFT, INTERNAL
from fairlead.api.web import ErrorShape, EventStream, Serve, json_response, read_body, while_connected
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError
from fairlead.core.generation import Delta, Detokenize, EngineInfo, Generate, Prompt, Tokenize
from fairlead.core.request import Inference, Raw, Request, Response
from fairlead.gateway.identity.identity import may_use
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

MAX_BODY_BYTES = 16 << 20
PASSED_ON = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/embeddings"))
"""What goes on to other servers."""

log = structlog.get_logger(__name__)


class Elsewhere(Protocol):
    """Which models other servers compute."""

    def remote(self, model: str) -> bool:
        """No version of it is here, but other servers compute it."""

    def passes(self, model: str, version: str) -> bool:
        """They, or engines of others, take its bodies as they came."""

    def falls_back(self, model: str) -> bool:
        """A model that is here may answer in its place."""

    def remote_models(self) -> list[str]: ...


class Body(Protocol):
    """What `Door.post` takes."""

    prompt_parameter: ClassVar[str]
    """Which the engine complains of unless it names another."""

    @property
    def model(self) -> str | None: ...


B = TypeVar("B", bound=Body)


class Door:
    """One protocol's operations upon one repository."""

    tag: ClassVar[str] = "openai"
    error: ClassVar[Any] = OpenAIError
    """The shape of its errors, for OpenAPI."""
    overloaded: ClassVar[int] = 503
    """The status of one that comes when the server cannot take it."""

    def __init__(
        self, repository: ModelRepository, gateway: Inference, finished: Finished, max_body_bytes: int, elsewhere: Elsewhere | None
    ) -> None:
        """`elsewhere`: which models other servers compute; None: none."""
        self.repository = repository
        self.gateway = gateway
        self.elsewhere = elsewhere
        self.finished = finished
        self.max_body_bytes = min(max_body_bytes, MAX_BODY_BYTES)
        self.since = int(time.time())

    def errors(self, prompt_parameter: str | None = None) -> ErrorShape:
        """How this protocol tells them."""
        return OpenAIErrors(prompt_parameter)

    def info(self, caller: Caller, name: str, version: str) -> EngineInfo:
        """Raises NotFound, Unavailable, or BadParameter for a model of tensors."""
        self.check_known(caller, name)
        info = self.repository.engine_info(name, version)
        if info is None:
            message = f"The model '{name}' takes tensors and gives tensors: ask it at /v2/models/{name}/infer."
            raise BadParameter(message, "model", "unsupported_model")
        return info

    def check_known(self, caller: Caller, name: str) -> None:
        """Raises NotFound."""
        if not self.repository.known(name) or not may_use(caller, name):
            raise no_such_model(name)

    def named(self, model: str) -> tuple[str, str, str]:
        """(name, version, adapter) of `name`, `name@version`, `name:adapter` or `name@version:adapter`. A model that has a colon in its
        own name wins."""
        name, version = parted(model)
        if version:
            before, _, adapter = version.partition(":")
            return (name, before, adapter) if adapter else (name, version, "")
        base, colon, adapter = name.rpartition(":")
        if colon and adapter and self.repository.known(base) and not self._has(name):
            return base, "", adapter
        return name, "", ""

    def _has(self, name: str) -> bool:
        return self.repository.known(name) or (self.elsewhere is not None and self.elsewhere.remote(name))

    def _ask(self, line: AccessLine, model: str) -> None:
        """What the line is about."""
        line.model, line.asked_version, line.adapter = self.named(model)

    # To the repository and back

    def request_of(self, prompt: Prompt, line: AccessLine, priority: int | None = None) -> Request:
        """Raises BadParameter."""
        first = line.request is None
        if line.adapter:
            prompt = adapted(prompt, line)
        request = Request(model=line.model, version=line.asked_version, prompt=prompt, id=line.id, priority=priority or 0)
        line.complete(request)
        if line.adapter and first:
            line.timeline.note(time.perf_counter(), "adapted", {"adapter": line.adapter})
        return request

    def requests_of(self, prompts: Sequence[Prompt], line: AccessLine, priority: int | None) -> list[Request]:
        """The prompts of one HTTP request, which limits count as one."""
        requests = [self.request_of(prompt, line, priority) for prompt in prompts]
        if len(requests) == 1 and not line.adapter:  # which no other server has
            requests[0].raw = line.raw
        for request in requests[1:]:
            request.num_requests = 0
        return requests

    async def stream(self, line: AccessLine, request: Request) -> AsyncGenerator[Response, None]:
        async with aclosing(self.gateway.infer(request)) as responses:
            async for response in responses:
                line.answered(response)
                yield response

    async def responses_of(self, line: AccessLine, request: Request) -> list[Response]:
        async with aclosing(self.stream(line, request)) as responses:
            return [response async for response in responses]

    async def only(self, line: AccessLine, request: Request) -> Delta:
        (response,) = await self.responses_of(line, request)
        return delta_of(response)

    # To other servers

    async def _pass(self, http: HttpRequest, peeked: Peek, line: AccessLine, raw: Raw) -> Any:
        """To a model of which no version is here."""
        request = line.complete(Request(model=line.model, version=line.asked_version, raw=raw, id=line.id, priority=peeked.priority or 0))
        request.session = request.session or peeked.session
        if not raw.stream:
            answer = await while_connected(http.scope, http.receive, Whole.of(self.gateway, request))
            return left(line) if answer is None else passed_on(answer, line)
        responses = self.gateway.infer(request)
        try:
            first = await while_connected(http.scope, http.receive, _first(responses))
        except BaseException:
            await responses.aclose()
            raise
        if first is None:
            await responses.aclose()
            return left(line)
        line.answered(first)
        if first.status != 200:
            await responses.aclose()
            return passed_on(first, line)
        return EventStream(chained(first, responses), line.end, line.headers, self.errors())

    # Rows of the table

    def get(self, path: str, name: str, summary: str, serve: Serve, answer: Any, *errors: int) -> Operation:
        return Operation(
            name=name,
            method="GET",
            path=path,
            tag=self.tag,
            summary=summary,
            serve=serve,
            answer=answer,
            errors=(*errors, 500),
            error=self.error,
        )

    def post(
        self,
        path: str,
        name: str,
        summary: str,
        serve: Callable[[HttpRequest, B, AccessLine], Awaitable[Any]],
        body: type[B],
        answer: Any,
        *,
        events: str = "",
        engine: bool = True,
    ) -> Operation:
        """`engine`: for models that have one; else for those of tensors."""
        return Operation(
            name=name,
            method="POST",
            path=path,
            tag=self.tag,
            summary=summary,
            serve=self._endpoint(body, serve, engine=engine),
            body=body,
            body_required=True,
            answer=answer,
            events=events,
            errors=(400, 404, 413, 429, 500, 501, self.overloaded),
            error=self.error,
        )

    def _endpoint(self, type_: type[B], serve: Callable[[HttpRequest, B, AccessLine], Awaitable[Any]], *, engine: bool) -> Serve:
        """Decode the body, find the model, answer; every end that comes before the answer has begun is logged here."""
        errors = self.errors(type_.prompt_parameter)

        async def endpoint(http: HttpRequest) -> Any:
            line = AccessLine(self.finished, http)
            try:
                data = await read_body(http, self.max_body_bytes)
                if self.elsewhere is not None and (path := http.scope["path"]) in PASSED_ON:
                    peeked = peek(data)
                    self._ask(line, peeked.model)
                    line.version = line.asked_version
                    line.raw = raw_of(peeked, path, data, http.headers.get("accept", ""))
                    if self.elsewhere.passes(line.model, line.asked_version) and may_use(line.caller, line.model):
                        if line.adapter:
                            raise no_such_model(peeked.model)
                        try:
                            # only one that can be read can be answered here where the others are gone
                            body = decode_body(data, type_) if self.elsewhere.falls_back(line.model) else None
                        except BadParameter:
                            body = None
                        if body is None:
                            return await self._pass(http, peeked, line, line.raw)
                        return await serve(http, body, line)
                body = decode_body(data, type_)
                self._ask(line, DEFAULT_MODEL if body.model is None else body.model)
                if engine:
                    self.info(line.caller, line.model, line.asked_version)
                else:
                    self.check_known(line.caller, line.model)
                    if line.adapter:
                        raise no_such_model(body.model or line.model)
                # until it is known which one answers
                line.version = self.repository.find(line.model, line.asked_version).version
                return await serve(http, body, line)
            except FairleadError as error:
                answer = errors.response(error, line.headers)
                line.end(answer.status_code, error.message)
                return answer
            except HTTPException as error:
                line.end(error.status_code, error.detail)
                raise
            except ClientDisconnect:
                return left(line)
            except asyncio.CancelledError:
                line.end(503, "the server stopped")
                raise
            except Exception:
                log.exception("request_failed", method=http.method, path=http.url.path)
                line.end(500, INTERNAL.message)
                return errors.response(INTERNAL, line.headers)

        return endpoint


async def _first(responses: AsyncGenerator[Response, None]) -> Response:
    return await anext(responses)


def adapted(prompt: Prompt, line: AccessLine) -> Prompt:
    """The prompt for the adapter that the model's name names. Raises BadParameter where there is nothing to adapt."""
    if isinstance(prompt, Generate):
        return structs.replace(prompt, adapter=line.adapter)
    if isinstance(prompt, Tokenize | Detokenize):  # one tokenizer for all
        return prompt
    raise BadParameter(f"The model '{line.model}' has no adapters: they change what a model generates.", "model", "unsupported_model")


def delta_of(response: Response) -> Delta:
    assert response.delta is not None
    return response.delta


def passed_on(response: Response, line: AccessLine) -> HttpResponse:
    line.answered(response)
    line.end(response.status, "" if response.status < 400 else "the upstream refuses")
    return passed(response, line.headers)


def parted(model: str) -> tuple[str, str]:
    """(name, version) of `name` or `name@version`."""
    name, _, version = model.partition("@")
    return name, version


def answered(body: Struct, line: AccessLine) -> HttpResponse:
    answer = json_response(body, headers=line.headers)
    line.end(200, "")
    return answer


def left(line: AccessLine) -> HttpResponse:
    """Goes nowhere."""
    line.end(CLIENT_LEFT, "the client left")
    return HttpResponse(status_code=CLIENT_LEFT)
