"""The operations under `/v1`: models, chats, completions, embeddings, tokens."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import structlog
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
    generate_of,
    texts_of,
)
from fairlead.api.openai.door import Door, Elsewhere, answered, delta_of, left, passed_on
from fairlead.api.openai.errors import BadParameter, no_such_model
from fairlead.api.openai.formats import guide_of
from fairlead.api.openai.moderations import ModerationBody, Moderations, moderations
from fairlead.api.openai.passing import Whole
from fairlead.api.openai.together import each, interleaved
from fairlead.api.web import EventStream, framed, json_response, while_connected
from fairlead.core.errors import FairleadError, InvalidRequest
from fairlead.core.generation import Delta, Detokenize, Embed, EngineInfo, Generate, Tokenize
from fairlead.core.request import Inference, Request
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


class OpenAI(Door):
    """Chats, completions, embeddings, moderations and tokens."""

    def __init__(
        self, repository: ModelRepository, gateway: Inference, finished: Finished, max_body_bytes: int, elsewhere: Elsewhere | None
    ) -> None:
        super().__init__(repository, gateway, finished, max_body_bytes, elsewhere)
        self.operations = (
            self.get("/v1/models", "openaiModels", "Models that generate, embed or score", self.models, Models),
            self.get("/v1/models/{model}", "openaiModel", "One of them", self.model, Model, 400, 404, 503),
            self.post("/v1/chat/completions", "openaiChat", "Answer a conversation", self.chat, ChatBody, ChatCompletion, events="also"),
            self.post("/v1/completions", "openaiComplete", "Continue a text", self.complete, CompletionBody, Completion, events="also"),
            self.post("/v1/embeddings", "openaiEmbed", "Texts in, vectors out", self.embed, EmbeddingBody, Embeddings),
            self.post(
                "/v1/moderations",
                "openaiModerate",
                "Whether texts are harmful, by a served classifier",
                self.moderate,
                ModerationBody,
                Moderations,
                engine=False,
            ),
            self.post("/v1/tokenize", "openaiTokenize", "A text or a conversation as token ids", self.tokenize, TokenizeBody, Tokens),
            self.post("/v1/detokenize", "openaiDetokenize", "Token ids as text", self.detokenize, DetokenizeBody, Text),
        )

    # Models

    async def models(self, http: HttpRequest) -> HttpResponse:
        caller, _ = caller_of(http)
        ready = {entry.name for entry in self.repository.index(ready=True) if self.repository.versions(entry.name)}
        names = sorted(name for name in ready if may_use(caller, name))
        found = {name: self.repository.engine_info(name) for name in names}
        listed = []
        for name, info in found.items():
            if info is not None:
                adapters = await asyncio.to_thread(self.repository.adapters, name)
                listed += [self._model(name, info), *(self._adapter(name, adapter, info) for adapter in adapters)]
        others = [] if self.elsewhere is None else self.elsewhere.remote_models()
        listed += [Model(name, self.since, OWNER) for name in others if name not in found and may_use(caller, name)]
        return json_response(Models(listed))

    async def model(self, http: HttpRequest) -> HttpResponse:
        name = http.path_params["model"]
        caller, _ = caller_of(http)
        if self.elsewhere is not None and self.elsewhere.remote(name) and may_use(caller, name):
            return json_response(Model(name, self.since, OWNER))
        try:
            base, version, adapter = self.named(name)
            info = self.info(caller, base, version)
            if not adapter:
                return json_response(self._model(name, info))
            if adapter not in await asyncio.to_thread(self.repository.adapters, base, version):
                raise no_such_model(name)
            return json_response(self._adapter(name.removesuffix(f":{adapter}"), adapter, info))
        except FairleadError as error:
            return self.errors().response(error, {})

    def _model(self, name: str, info: EngineInfo) -> Model:
        return Model(name, self.since, OWNER, info.max_model_len)

    def _adapter(self, name: str, adapter: str, info: EngineInfo) -> Model:
        """As vLLM lists it."""
        return Model(f"{name}:{adapter}", self.since, OWNER, info.max_model_len, root=name, parent=name)

    # Generation

    async def chat(self, http: HttpRequest, body: ChatBody, line: AccessLine) -> Any:
        prompt = generate_of(body)
        answer = Chats(f"chatcmpl-{line.id}", body.model, include_usage=body.include_usage)
        return await self._generate(http, body, [prompt], answer, line)

    async def complete(self, http: HttpRequest, body: CompletionBody, line: AccessLine) -> Any:
        sampling = body.complete()
        guide = guide_of(body.response_format, body.structured_outputs)
        stream = bool(body.stream)
        prompts = [
            Generate(text=text, token_ids=ids, sampling=sampling, guide=guide, stream=stream, add_special_tokens=body.add_special_tokens)
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
        return (await self.only(line, self.request_of(Detokenize(token_ids=prompt.token_ids or []), line))).text

    async def _generate(
        self, http: HttpRequest, body: ChatBody | CompletionBody, prompts: list[Generate], answer: Answer, line: AccessLine
    ) -> Any:
        requests = self.requests_of(prompts, line, body.priority)
        for request in requests:
            request.session = request.session or getattr(body, "prompt_cache_key", None) or body.user or ""
        if body.stream:
            events = self._events(line, requests, answer, include_usage=body.include_usage)
            return EventStream(events, line.end, line.headers, self.errors(body.prompt_parameter))
        found = await while_connected(http.scope, http.receive, each(partial(self.responses_of, line), requests))
        if found is None:
            return left(line)
        if found[0][0].raw is not None:
            return passed_on(found[0][0], line)
        return answered(answer.whole([[delta_of(response) for response in responses] for responses in found]), line)

    async def _events(
        self, line: AccessLine, requests: list[Request], answer: Answer, *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """Nothing comes before the first delta: until then an error is an ordinary answer with its status."""
        last: list[Delta] = []
        passed_on_whole = False
        async with aclosing(interleaved(partial(self.stream, line), requests)) as responses:
            async for number, response in responses:
                if response.raw is not None:  # another server's, whole
                    if response.status != 200:
                        raise InvalidRequest(f"the model that answers in its place refuses: {response.raw[:512].decode(errors='replace')}")
                    yield response.raw
                    passed_on_whole = True
                    continue
                delta = delta_of(response)
                for chunk in answer.chunks(number, delta):
                    yield framed(chunk)
                if delta.usage is not None:
                    last.append(delta)
        if passed_on_whole:
            return
        if include_usage:
            yield framed(answer.closing(total_usage(last)))
        yield framed(DONE)

    # Embeddings and tokens

    async def embed(self, http: HttpRequest, body: EmbeddingBody, line: AccessLine) -> Any:
        prompts = [Embed(text=text, token_ids=ids, dimensions=body.dimensions) for text, ids in texts_of(body.input, "input")]
        requests = self.requests_of(prompts, line, body.priority)
        found = await while_connected(http.scope, http.receive, each(partial(self.responses_of, line), requests))
        if found is None:
            return left(line)
        if found[0][0].raw is not None:
            return passed_on(found[0][0], line)
        deltas = [delta_of(response) for (response,) in found]
        return answered(embeddings(deltas, body.model, body.encoding_format or "float"), line)

    async def moderate(self, http: HttpRequest, body: ModerationBody, line: AccessLine) -> Any:
        spec = self.repository.find(line.model, line.asked_version).spec
        label_names = check_classifier(spec)
        texts = body.texts()
        request = line.complete(Request(model=line.model, version=line.asked_version, inputs=text_rows(spec, texts), id=line.id))
        response = await while_connected(http.scope, http.receive, Whole.of(self.gateway, request))
        if response is None:
            return left(line)
        line.answered(response)
        scores = by_label(label_names, response.outputs[spec.outputs[0].name])
        return answered(moderations(line.model, scores), line)

    async def tokenize(self, http: HttpRequest, body: TokenizeBody, line: AccessLine) -> Any:
        """vLLM's: a text, or the messages of a chat."""
        if (body.prompt is None) == (body.messages is None):
            raise BadParameter("Give either 'prompt' or 'messages'.", "prompt", "invalid_value")
        chat = None if body.messages is None else chat_of(body)
        prompt = Tokenize(text=body.prompt, chat=chat, add_special_tokens=body.add_special_tokens)
        delta = await while_connected(http.scope, http.receive, self.only(line, self.request_of(prompt, line)))
        if delta is None:
            return left(line)
        max_model_len = self.info(line.caller, line.model, line.version).max_model_len
        spelled = delta.tokens if body.return_token_strs else None
        return answered(Tokens(len(delta.token_ids), max_model_len, delta.token_ids, spelled), line)

    async def detokenize(self, http: HttpRequest, body: DetokenizeBody, line: AccessLine) -> Any:
        delta = await while_connected(http.scope, http.receive, self.only(line, self.request_of(Detokenize(token_ids=body.tokens), line)))
        return left(line) if delta is None else answered(Text(delta.text), line)
