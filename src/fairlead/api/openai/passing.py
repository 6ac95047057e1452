"""Bodies for models that another server computes: passed on as they came, and only peeked at."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from msgspec import Raw as Json
from msgspec import Struct
from starlette.responses import Response as HttpResponse

from fairlead.api.openai.bodies import ChatBody, CompletionBody, EmbeddingBody
from fairlead.api.openai.errors import BadParameter, decode_body
from fairlead.core.errors import FairleadError, ModelError
from fairlead.core.request import Inference, Raw, Request, Response

BODIES: dict[str, type[ChatBody | CompletionBody | EmbeddingBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
}
"""By the path that goes on to other servers."""
PREFIX_BYTES = 32 << 10
"""Of a prompt's beginning, by which a place is found that has computed it before."""
EMPTY = Json(b"")
ESCAPED_QUOTES = 24
"""Bytes of JSON around the text of a message: keys, quotation marks, the role."""


class Peek(Struct):
    """What is read of a body before it is known who computes it; it may hold anything else."""

    model: str
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    priority: int | None = None
    messages: Json = EMPTY
    prompt: Json = EMPTY
    input: Json = EMPTY
    user: str | None = None
    prompt_cache_key: str | None = None

    @property
    def session(self) -> str:
        return self.prompt_cache_key or self.user or ""


_peek = msgspec.json.Decoder(Peek)
_list = msgspec.json.Decoder(list[Json])


def peek(body: bytes) -> Peek:
    """Raises BadParameter."""
    try:
        return _peek.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return decode_body(body, Peek)  # which says what is wrong


def raw_of(peeked: Peek, path: str, body: bytes, accept: str) -> Raw:
    """Raises BadParameter."""
    old, new = peeked.max_tokens, peeked.max_completion_tokens
    given = (
        ("max_tokens", old),
        ("max_completion_tokens", new),
        ("n", peeked.n),
        ("best_of", peeked.best_of),
        ("priority", peeked.priority),
    )
    for name, value in given:
        if value is not None and value < 0:
            raise BadParameter(f"Invalid value for '{name}': expected at least 0.", name, "invalid_value")
    num_choices = max(peeked.n or 1, peeked.best_of or 1)
    if bytes(peeked.prompt)[:1] == b"[":
        num_choices *= num_prompts(peeked.prompt)
    limit = old if new is None else new if old is None else max(old, new)
    if path == "/v1/embeddings":
        limit = 0
    text = bytes(peeked.messages) or bytes(peeked.prompt) or bytes(peeked.input)
    return Raw(
        path=path,
        body=body,
        accept=accept,
        stream=bool(peeked.stream),
        max_tokens=limit,
        num_choices=num_choices,
        prompt_chars=len(text) - ESCAPED_QUOTES * text.count(b'"role"'),
        prefix=text[:PREFIX_BYTES],
    )


def num_prompts(prompt: Json) -> int:
    """Of a list: texts and lists of token ids are one each; a list of token ids is one alone."""
    try:
        prompts = _list.decode(prompt)
    except msgspec.DecodeError:
        return 1
    return max(sum(bytes(each)[:1] in (b'"', b"[") for each in prompts), 1)


class Whole:
    """A sink for one answer in one piece."""

    def __init__(self) -> None:
        self._response: Response | None = None
        self._end: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

    def respond(self, response: Response) -> None:
        self._response = response

    def close(self, error: FairleadError | None) -> None:
        if self._end.done():
            return
        if error is not None:
            self._end.set_exception(error)
        elif self._response is None:
            self._end.set_exception(ModelError("the model gave no response"))
        else:
            self._end.set_result(self._response)

    @classmethod
    async def of(cls, gateway: Inference, request: Request) -> Response:
        """Raises FairleadError. Cancelling it cancels the request."""
        sink = cls()
        ticket = gateway.submit(request, sink)
        try:
            return await sink._end
        except asyncio.CancelledError:
            sink._end.cancel()
            ticket.cancel()
            raise


def passed(response: Response, headers: dict[str, str]) -> HttpResponse:
    """An upstream's whole answer, byte for byte."""
    return HttpResponse(response.raw, response.status, {**headers, **response.headers})


async def chained(first: Response, rest: AsyncGenerator[Response, None]) -> AsyncGenerator[bytes, None]:
    """The events of an upstream, as they come."""
    async with aclosing(rest) as responses:
        yield first.raw or b""
        async for response in responses:
            yield response.raw or b""
