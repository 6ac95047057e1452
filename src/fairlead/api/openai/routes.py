"""The operations under `/v1`: models, chats, completions, embeddings, tokens."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.line import AccessLine
from fairlead.api.openai.answers import FINGERPRINT, Chats, Completions, encode, prompt_logprobs_json, total_usage, usage_json, vector_json
from fairlead.api.openai.bodies import Body, ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody, chat_of, texts_of
from fairlead.api.openai.errors import BadParameter, OpenAIErrors, decode_body
from fairlead.api.status import CLIENT_LEFT, INTERNAL
from fairlead.api.web import EventStream, Serve, json_response, read_body, while_connected
from fairlead.core.errors import FairleadError, NotFound
from fairlead.core.generation import Delta, Detokenize, Embed, EngineInfo, Generate, Prompt, Tokenize, Usage
from fairlead.core.request import Request
from fairlead.observe.access import AccessLog
from fairlead.runtime.repository import ModelRepository

B = TypeVar("B")

OWNER = "fairlead"
MAX_BODY_BYTES = 16 << 20
DONE = b"[DONE]"
ERRORS = OpenAIErrors()


class OpenAI:
    """The operations upon one repository."""

    def __init__(self, repository: ModelRepository, access_log: AccessLog, max_body_bytes: int) -> None:
        self.repository = repository
        self.access_log = access_log
        self.max_body_bytes = min(max_body_bytes, MAX_BODY_BYTES)
        self.routes: list[tuple[str, str, Serve]] = [
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{model}", self.model),
            ("POST", "/v1/chat/completions", self._post(ChatBody, self.chat)),
            ("POST", "/v1/completions", self._post(CompletionBody, self.complete)),
            ("POST", "/v1/embeddings", self._post(EmbeddingBody, self.embed)),
            ("POST", "/v1/tokenize", self._post(TokenizeBody, self.tokenize)),
            ("POST", "/v1/detokenize", self._post(DetokenizeBody, self.detokenize)),
        ]

    # Models

    async def models(self, _: HttpRequest) -> HttpResponse:
        names = sorted({entry.name for entry in self.repository.index(ready=True)})
        found = [(name, info) for name in names if (info := self._info(name)) is not None]
        return json_response({"object": "list", "data": [_model_json(name, info) for name, info in found]})

    async def model(self, http: HttpRequest) -> HttpResponse:
        name = http.path_params["model"]
        info = self._info(name)
        if info is None:
            return ERRORS.response(_no_model(name), {})
        return json_response(_model_json(name, info))

    def _info(self, name: str) -> EngineInfo | None:
        """What the engine of a model tells; None for models without one, or not there."""
        try:
            return self.repository.engine_info(name)
        except FairleadError:
            return None

    # Generation

    async def chat(self, http: HttpRequest, body: ChatBody, line: AccessLine) -> Any:
        prompt = Generate(chat=chat_of(body), sampling=body.complete(), stream=bool(body.stream))
        return await self._generate(http, body, [prompt], Chats(), f"chatcmpl-{line.id}", line)

    async def complete(self, http: HttpRequest, body: CompletionBody, line: AccessLine) -> Any:
        sampling = body.complete()
        prompts = [
            Generate(
                text=text if isinstance(text, str) else None,
                token_ids=None if isinstance(text, str) else text,
                sampling=sampling,
                stream=bool(body.stream),
                add_special_tokens=body.add_special_tokens,
            )
            for text in texts_of(body.prompt, "prompt")
        ]
        echoed = [await self._text_of(prompt, body.model, line) for prompt in prompts] if body.echo else None
        return await self._generate(http, body, prompts, Completions(echoed), f"cmpl-{line.id}", line)

    async def _text_of(self, prompt: Generate, model: str, line: AccessLine) -> str:
        if prompt.text is not None:
            return prompt.text
        return (await self._only(self._request(model, Detokenize(token_ids=prompt.token_ids or []), line))).text

    async def _generate(
        self, http: HttpRequest, body: Body, prompts: list[Generate], shape: Chats | Completions, id: str, line: AccessLine
    ) -> Any:
        requests = [self._request(body.model, prompt, line, body.priority) for prompt in prompts]
        line.request = requests[0]
        base = {"id": id, "object": shape.object, "created": int(time.time()), "model": body.model, "system_fingerprint": FINGERPRINT}
        n = body.n or 1
        if body.stream:
            base["object"] = shape.chunk
            events = self._chunks(requests, shape, base, n, include_usage=body.include_usage)
            return EventStream(events, line.end, line.headers, ERRORS)
        deltas = await while_connected(http.receive, _all([self._deltas(request) for request in requests]))
        if deltas is None:
            return _left(line)
        choices, usages, prompt_logprobs = [], [], []
        for number, of_prompt in enumerate(deltas):
            for delta in sorted(of_prompt, key=lambda each: each.index):
                index = number * n + delta.index
                if isinstance(shape, Completions):
                    choices.append(shape.choice(delta, index, shape.prompts[number] if shape.prompts else ""))
                else:
                    choices.append(shape.choice(delta, index))
                if delta.usage is not None:
                    usages.append(delta.usage)
                if delta.prompt_logprobs is not None:
                    prompt_logprobs.append(prompt_logprobs_json(delta.prompt_logprobs))
        answer = base | {"choices": choices, "usage": usage_json(total_usage(usages))}
        if body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs[0] if len(prompts) == 1 else prompt_logprobs
        line.end(200, "")
        return json_response(answer, headers=line.headers)

    async def _chunks(
        self, requests: list[Request], shape: Chats | Completions, base: dict[str, Any], n: int, *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """Every choice opens with its first chunk, so that nothing is sent before it is known that the request is good."""
        if include_usage:
            base["usage"] = None
        usages: list[Usage] = []
        opened: set[int] = set()
        async with aclosing(_merged([self._stream(request) for request in requests])) as deltas:
            async for number, delta in deltas:
                index = number * n + delta.index
                if index not in opened:
                    opened.add(index)
                    if (first := shape.start(index)) is not None:
                        yield encode(base | {"choices": [first]})
                chunk = base | {"choices": [shape.piece(delta, index)]}
                if delta.prompt_logprobs is not None:
                    chunk["prompt_logprobs"] = prompt_logprobs_json(delta.prompt_logprobs)
                yield encode(chunk)
                if delta.usage is not None:
                    usages.append(delta.usage)
        if include_usage:
            yield encode(base | {"choices": [], "usage": usage_json(total_usage(usages))})
        yield DONE

    # Embeddings and tokens

    async def embed(self, http: HttpRequest, body: EmbeddingBody, line: AccessLine) -> Any:
        requests = [
            self._request(
                body.model,
                Embed(text=text, dimensions=body.dimensions)
                if isinstance(text, str)
                else Embed(token_ids=text, dimensions=body.dimensions),
                line,
                body.priority,
            )
            for text in texts_of(body.input, "input")
        ]
        line.request = requests[0]
        deltas = await while_connected(http.receive, _all([self._only(request) for request in requests]))
        if deltas is None:
            return _left(line)
        encoding = body.encoding_format or "float"
        data = [{"object": "embedding", "index": i, "embedding": vector_json(delta.vector, encoding)} for i, delta in enumerate(deltas)]
        num = sum(delta.usage.prompt_tokens for delta in deltas if delta.usage)
        line.end(200, "")
        usage = {"prompt_tokens": num, "total_tokens": num}
        return json_response({"object": "list", "data": data, "model": body.model, "usage": usage}, headers=line.headers)

    async def tokenize(self, http: HttpRequest, body: TokenizeBody, line: AccessLine) -> Any:
        """vLLM's: a text, or the messages of a chat."""
        if (body.prompt is None) == (body.messages is None):
            raise BadParameter("Give either 'prompt' or 'messages'.", "prompt", "invalid_value")
        chat = None if body.messages is None else chat_of(body)
        prompt = Tokenize(text=body.prompt, chat=chat, add_special_tokens=body.add_special_tokens)
        delta = await while_connected(http.receive, self._only(self._request(body.model, prompt, line)))
        if delta is None:
            return _left(line)
        info = self._info(body.model)
        answer = {"count": len(delta.token_ids), "max_model_len": info.max_model_len if info else 0, "tokens": delta.token_ids}
        if body.return_token_strs:
            answer["token_strs"] = delta.tokens or []
        line.end(200, "")
        return json_response(answer, headers=line.headers)

    async def detokenize(self, http: HttpRequest, body: DetokenizeBody, line: AccessLine) -> Any:
        delta = await while_connected(http.receive, self._only(self._request(body.model, Detokenize(token_ids=body.tokens), line)))
        if delta is None:
            return _left(line)
        line.end(200, "")
        return json_response({"prompt": delta.text}, headers=line.headers)

    # To the repository and back

    def _request(self, model: str, prompt: Prompt, line: AccessLine, priority: int | None = None) -> Request:
        name, version = _parted(model)
        return Request(
            model=name, version=version, prompt=prompt, id=line.id, trace=line.trace, arrived=line.arrived, priority=priority or 0
        )

    async def _stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        async with aclosing(self.repository.infer(request)) as responses:
            async for response in responses:
                assert response.delta is not None
                yield response.delta

    async def _deltas(self, request: Request) -> list[Delta]:
        async with aclosing(self._stream(request)) as deltas:
            return [delta async for delta in deltas]

    async def _only(self, request: Request) -> Delta:
        return (await self._deltas(request))[0]

    def _post(self, type_: type[B], serve: Callable[[HttpRequest, B, AccessLine], Awaitable[Any]]) -> Serve:
        """Decode the body, find the model, answer; every end that comes before the answer has begun is logged here."""

        async def endpoint(http: HttpRequest) -> Any:
            line = AccessLine(self.access_log, http)
            try:
                body = decode_body(await read_body(http, self.max_body_bytes), type_)
                line.model, line.version = _parted(body.model)  # type: ignore[attr-defined]
                if not self.repository.known(line.model):
                    raise _no_model(body.model)  # type: ignore[attr-defined]
                return await serve(http, body, line)
            except FairleadError as error:
                answer = ERRORS.response(error, line.headers)
                line.end(answer.status_code, error.message)
                return answer
            except HTTPException as error:
                line.end(error.status_code, error.detail)
                raise
            except ClientDisconnect:
                return _left(line)
            except Exception:
                line.end(500, INTERNAL.message)
                raise

        return endpoint


def _model_json(name: str, info: EngineInfo) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": OWNER,
        "root": name,
        "parent": None,
        "max_model_len": info.max_model_len,
    }


def _parted(model: str) -> tuple[str, str]:
    """(name, version) of `name` or `name@version`."""
    name, _, version = model.partition("@")
    return name, version


def _no_model(name: str) -> NotFound:
    return NotFound(f"The model '{name}' does not exist or you do not have access to it.")


async def _all(coroutines: list[Any]) -> list[Any]:
    """Their results in order; where one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _merged(streams: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(number of the stream, delta) as they come; a stream may be one ahead of the reader."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | None, BaseException | None]] = asyncio.Queue(maxsize=1)

    async def pump(number: int, stream: AsyncGenerator[Delta, None]) -> None:
        error = None
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    await queue.put((number, delta, None))
        except Exception as failure:
            error = failure
        await queue.put((number, None, error))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            number, piece, error = await queue.get()
            if error is not None:
                raise error
            if piece is None:
                left -= 1
            else:
                yield number, piece
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _left(line: AccessLine) -> HttpResponse:
    """Goes nowhere."""
    line.end(CLIENT_LEFT, "the client left")
    return HttpResponse(status_code=CLIENT_LEFT)
