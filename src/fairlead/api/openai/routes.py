"""The operations under `/v1`: models, chats, completions, embeddings, tokens."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.doorkeeper import caller_of
from fairlead.api.line import AccessLine
from fairlead.api.openai.answers import (
    Answer,
    ChatCompletion,
    Chats,
    Completion,
    Completions,
    Embeddings,
    Model,
    Models,
    Text,
    Tokens,
    embeddings,
    total_usage,
)
from fairlead.api.openai.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
    chat_of,
    texts_of,
)
from fairlead.api.openai.errors import BadParameter, OpenAIError, OpenAIErrors, decode_body, no_such_model
from fairlead.api.openai.moderations import DEFAULT_MODEL, ModerationBody, Moderations, moderations
from fairlead.api.openai.passing import Peek, Whole, chained, passed, peek, raw_of
from fairlead.api.openai.together import each, interleaved
from fairlead.api.openapi import Operation
from fairlead.api.status import CLIENT_LEFT, INTERNAL
from fairlead.api.web import EventStream, Serve, framed, json_response, read_body, while_connected
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError, InvalidRequest
from fairlead.core.generation import Delta, Detokenize, Embed, EngineInfo, Generate, Prompt, Tokenize
from fairlead.core.request import Inference, Raw, Request, Response
from fairlead.gateway.filters.moderation import by_label, check_classifier, text_rows
from fairlead.gateway.identity.identity import may_use
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

B = TypeVar("B", ChatBody, CompletionBody, EmbeddingBody, ModerationBody, TokenizeBody, DetokenizeBody)

OWNER = "fairlead"
MAX_BODY_BYTES = 16 << 20
DONE = b"[DONE]"
PASSED_ON = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/embeddings"))
"""What goes on to other servers."""

log = structlog.get_logger(__name__)


class Elsewhere(Protocol):
    """Which models other servers compute."""

    def remote(self, model: str) -> bool:
        """No version of it is here, but other servers compute it."""

    def falls_back(self, model: str) -> bool:
        """A model that is here may answer in its place."""

    def remote_models(self) -> list[str]: ...


class OpenAI:
    """The operations upon one repository."""

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
        self.operations = (
            self._get("/v1/models", "openaiModels", "Models that generate or embed", self.models, Models),
            self._get("/v1/models/{model}", "openaiModel", "One of them", self.model, Model, 400, 404, 503),
            self._post("/v1/chat/completions", "openaiChat", "Answer a conversation", self.chat, ChatBody, ChatCompletion, events="also"),
            self._post("/v1/completions", "openaiComplete", "Continue a text", self.complete, CompletionBody, Completion, events="also"),
            self._post("/v1/embeddings", "openaiEmbed", "Texts in, vectors out", self.embed, EmbeddingBody, Embeddings),
            self._post(
                "/v1/moderations",
                "openaiModerate",
                "Whether texts are harmful, by a served classifier",
                self.moderate,
                ModerationBody,
                Moderations,
                engine=False,
            ),
            self._post("/v1/tokenize", "openaiTokenize", "A text or a conversation as token ids", self.tokenize, TokenizeBody, Tokens),
            self._post("/v1/detokenize", "openaiDetokenize", "Token ids as text", self.detokenize, DetokenizeBody, Text),
        )

    # Models

    async def models(self, http: HttpRequest) -> HttpResponse:
        caller, _ = caller_of(http)
        ready = {entry.name for entry in self.repository.index(ready=True) if self.repository.versions(entry.name)}
        names = sorted(name for name in ready if may_use(caller, name))
        found = {name: self.repository.engine_info(name) for name in names}
        listed = [self._model(name, info) for name, info in found.items() if info is not None]
        others = [] if self.elsewhere is None else self.elsewhere.remote_models()
        listed += [Model(name, self.since, OWNER) for name in others if name not in found and may_use(caller, name)]
        return json_response(Models(listed))

    async def model(self, http: HttpRequest) -> HttpResponse:
        name = http.path_params["model"]
        caller, _ = caller_of(http)
        if self.elsewhere is not None and self.elsewhere.remote(name) and may_use(caller, name):
            return json_response(Model(name, self.since, OWNER))
        try:
            return json_response(self._model(name, self._info(caller_of(http)[0], *_parted(name))))
        except FairleadError as error:
            return OpenAIErrors().response(error, {})

    def _model(self, name: str, info: EngineInfo) -> Model:
        return Model(name, self.since, OWNER, info.max_model_len)

    def _info(self, caller: Caller, name: str, version: str) -> EngineInfo:
        """Raises NotFound, Unavailable, or BadParameter for a model of tensors."""
        self._check_known(caller, name)
        info = self.repository.engine_info(name, version)
        if info is None:
            message = f"The model '{name}' takes tensors and gives tensors: ask it at /v2/models/{name}/infer."
            raise BadParameter(message, "model", "unsupported_model")
        return info

    def _check_known(self, caller: Caller, name: str) -> None:
        """Raises NotFound."""
        if not self.repository.known(name) or not may_use(caller, name):
            raise no_such_model(name)

    # Generation

    async def chat(self, http: HttpRequest, body: ChatBody, line: AccessLine) -> Any:
        prompt = Generate(chat=chat_of(body), sampling=body.complete(), stream=bool(body.stream))
        answer = Chats(f"chatcmpl-{line.id}", body.model, include_usage=body.include_usage)
        return await self._generate(http, body, [prompt], answer, line)

    async def complete(self, http: HttpRequest, body: CompletionBody, line: AccessLine) -> Any:
        sampling = body.complete()
        prompts = [
            Generate(text=text, token_ids=ids, sampling=sampling, stream=bool(body.stream), add_special_tokens=body.add_special_tokens)
            for text, ids in texts_of(body.prompt, "prompt")
        ]
        answer = Completions(
            f"cmpl-{line.id}",
            body.model,
            n=sampling.n,
            logprobs=body.logprobs,
            prompt_logprobs=body.prompt_logprobs,
            echoed=[await self._text_of(prompt, line) for prompt in prompts] if body.echo else None,
            include_usage=body.include_usage,
        )
        return await self._generate(http, body, prompts, answer, line)

    async def _text_of(self, prompt: Generate, line: AccessLine) -> str:
        if prompt.text is not None:
            return prompt.text
        return (await self._only(line, self._request(Detokenize(token_ids=prompt.token_ids or []), line))).text

    async def _generate(
        self, http: HttpRequest, body: ChatBody | CompletionBody, prompts: list[Generate], answer: Answer, line: AccessLine
    ) -> Any:
        requests = self._requests(prompts, line, body.priority)
        for request in requests:
            request.session = request.session or getattr(body, "prompt_cache_key", None) or body.user or ""
        if body.stream:
            events = self._events(line, requests, answer, include_usage=body.include_usage)
            return EventStream(events, line.end, line.headers, OpenAIErrors(body.prompt_parameter))
        found = await while_connected(http.scope, http.receive, each(partial(self._responses, line), requests))
        if found is None:
            return _left(line)
        if found[0][0].raw is not None:
            return _passed(found[0][0], line)
        return _answered(answer.whole([[_delta(response) for response in responses] for responses in found]), line)

    async def _events(
        self, line: AccessLine, requests: list[Request], answer: Answer, *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """Nothing comes before the first delta: until then an error is an ordinary answer with its status."""
        last: list[Delta] = []
        passed_on = False
        async with aclosing(interleaved(partial(self._stream, line), requests)) as responses:
            async for number, response in responses:
                if response.raw is not None:  # another server's, whole
                    if response.status != 200:
                        raise InvalidRequest(f"the model that answers in its place refuses: {response.raw[:512].decode(errors='replace')}")
                    yield response.raw
                    passed_on = True
                    continue
                delta = _delta(response)
                for chunk in answer.chunks(number, delta):
                    yield framed(chunk)
                if delta.usage is not None:
                    last.append(delta)
        if passed_on:
            return
        if include_usage:
            yield framed(answer.closing(total_usage(last)))
        yield framed(DONE)

    # Embeddings and tokens

    async def embed(self, http: HttpRequest, body: EmbeddingBody, line: AccessLine) -> Any:
        prompts = [Embed(text=text, token_ids=ids, dimensions=body.dimensions) for text, ids in texts_of(body.input, "input")]
        requests = self._requests(prompts, line, body.priority)
        deltas = await while_connected(http.scope, http.receive, each(partial(self._only, line), requests))
        return _left(line) if deltas is None else _answered(embeddings(deltas, body.model, body.encoding_format or "float"), line)

    async def moderate(self, http: HttpRequest, body: ModerationBody, line: AccessLine) -> Any:
        spec = self.repository.find(line.model, line.asked_version).spec
        label_names = check_classifier(spec)
        texts = body.texts()
        request = line.complete(Request(model=line.model, version=line.asked_version, inputs=text_rows(spec, texts), id=line.id))
        response = await while_connected(http.scope, http.receive, Whole.of(self.gateway, request))
        if response is None:
            return _left(line)
        line.answered(response)
        scores = by_label(label_names, response.outputs[spec.outputs[0].name])
        return _answered(moderations(line.model, scores), line)

    async def tokenize(self, http: HttpRequest, body: TokenizeBody, line: AccessLine) -> Any:
        """vLLM's: a text, or the messages of a chat."""
        if (body.prompt is None) == (body.messages is None):
            raise BadParameter("Give either 'prompt' or 'messages'.", "prompt", "invalid_value")
        chat = None if body.messages is None else chat_of(body)
        prompt = Tokenize(text=body.prompt, chat=chat, add_special_tokens=body.add_special_tokens)
        delta = await while_connected(http.scope, http.receive, self._only(line, self._request(prompt, line)))
        if delta is None:
            return _left(line)
        max_model_len = self._info(line.caller, line.model, line.version).max_model_len
        spelled = delta.tokens if body.return_token_strs else None
        return _answered(Tokens(len(delta.token_ids), max_model_len, delta.token_ids, spelled), line)

    async def detokenize(self, http: HttpRequest, body: DetokenizeBody, line: AccessLine) -> Any:
        delta = await while_connected(http.scope, http.receive, self._only(line, self._request(Detokenize(token_ids=body.tokens), line)))
        return _left(line) if delta is None else _answered(Text(delta.text), line)

    # To the repository and back

    def _request(self, prompt: Prompt, line: AccessLine, priority: int | None = None) -> Request:
        return line.complete(Request(model=line.model, version=line.asked_version, prompt=prompt, id=line.id, priority=priority or 0))

    def _requests(self, prompts: Sequence[Prompt], line: AccessLine, priority: int | None) -> list[Request]:
        """The prompts of one HTTP request, which limits count as one."""
        requests = [self._request(prompt, line, priority) for prompt in prompts]
        if len(requests) == 1:
            requests[0].raw = line.raw
        for request in requests[1:]:
            request.num_requests = 0
        return requests

    async def _stream(self, line: AccessLine, request: Request) -> AsyncGenerator[Response, None]:
        async with aclosing(self.gateway.infer(request)) as responses:
            async for response in responses:
                line.answered(response)
                yield response

    async def _responses(self, line: AccessLine, request: Request) -> list[Response]:
        async with aclosing(self._stream(line, request)) as responses:
            return [response async for response in responses]

    async def _only(self, line: AccessLine, request: Request) -> Delta:
        (response,) = await self._responses(line, request)
        return _delta(response)

    # To other servers

    async def _pass(self, http: HttpRequest, peeked: Peek, line: AccessLine, raw: Raw) -> Any:
        """To a model of which no version is here."""
        request = line.complete(Request(model=line.model, version=line.asked_version, raw=raw, id=line.id, priority=peeked.priority or 0))
        request.session = request.session or peeked.session
        if not raw.stream:
            answer = await while_connected(http.scope, http.receive, Whole.of(self.gateway, request))
            return _left(line) if answer is None else _passed(answer, line)
        responses = self.gateway.infer(request)
        try:
            first = await while_connected(http.scope, http.receive, _first(responses))
        except BaseException:
            await responses.aclose()
            raise
        if first is None:
            await responses.aclose()
            return _left(line)
        line.answered(first)
        if first.status != 200:
            await responses.aclose()
            return _passed(first, line)
        return EventStream(chained(first, responses), line.end, line.headers, OpenAIErrors())

    # Rows of the table

    def _get(self, path: str, name: str, summary: str, serve: Serve, answer: Any, *errors: int) -> Operation:
        return Operation(
            name=name,
            method="GET",
            path=path,
            tag="openai",
            summary=summary,
            serve=serve,
            answer=answer,
            errors=(*errors, 500),
            error=OpenAIError,
        )

    def _post(
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
            tag="openai",
            summary=summary,
            serve=self._endpoint(body, serve, engine=engine),
            body=body,
            body_required=True,
            answer=answer,
            events=events,
            errors=(400, 404, 413, 429, 500, 501, 503),
            error=OpenAIError,
        )

    def _endpoint(self, type_: type[B], serve: Callable[[HttpRequest, B, AccessLine], Awaitable[Any]], *, engine: bool) -> Serve:
        """Decode the body, find the model, answer; every end that comes before the answer has begun is logged here."""
        errors = OpenAIErrors(type_.prompt_parameter)

        async def endpoint(http: HttpRequest) -> Any:
            line = AccessLine(self.finished, http)
            try:
                data = await read_body(http, self.max_body_bytes)
                if self.elsewhere is not None and (path := http.scope["path"]) in PASSED_ON:
                    peeked = peek(data)
                    line.model, line.asked_version = _parted(peeked.model)
                    line.version = line.asked_version
                    line.raw = raw_of(peeked, path, data, http.headers.get("accept", ""))
                    if self.elsewhere.remote(line.model) and may_use(line.caller, line.model):
                        try:
                            # only one that can be read can be answered here where the others are gone
                            body = decode_body(data, type_) if self.elsewhere.falls_back(line.model) else None
                        except BadParameter:
                            body = None
                        if body is None:
                            return await self._pass(http, peeked, line, line.raw)
                        return await serve(http, body, line)
                body = decode_body(data, type_)
                line.model, line.asked_version = _parted(DEFAULT_MODEL if body.model is None else body.model)
                if engine:
                    self._info(line.caller, line.model, line.asked_version)
                else:
                    self._check_known(line.caller, line.model)
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
                return _left(line)
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


def _delta(response: Response) -> Delta:
    assert response.delta is not None
    return response.delta


def _passed(response: Response, line: AccessLine) -> HttpResponse:
    line.answered(response)
    line.end(response.status, "" if response.status < 400 else "the upstream refuses")
    return passed(response, line.headers)


def _parted(model: str) -> tuple[str, str]:
    """(name, version) of `name` or `name@version`."""
    name, _, version = model.partition("@")
    return name, version


def _answered(body: Struct, line: AccessLine) -> HttpResponse:
    answer = json_response(body, headers=line.headers)
    line.end(200, "")
    return answer


def _left(line: AccessLine) -> HttpResponse:
    """Goes nowhere."""
    line.end(CLIENT_LEFT, "the client left")
    return HttpResponse(status_code=CLIENT_LEFT)
