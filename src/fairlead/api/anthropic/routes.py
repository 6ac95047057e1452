"""The operations under `/v1/messages`: an answer to a conversation, and how long one is."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar

from starlette.requests import Request as HttpRequest

from fairlead.api.anthropic.answers import MessageAnswer, Messages, TokenCount
from fairlead.api.anthropic.bodies import ConversationBody, CountBody, MessagesBody
from fairlead.api.anthropic.conversation import conversation_of, prompt_of
from fairlead.api.anthropic.errors import AnthropicError, AnthropicErrors, ThreadUnsupported
from fairlead.api.line import AccessLine
from fairlead.api.openai.door import Door, Elsewhere, answered, delta_of, left
from fairlead.api.web import EventStream, while_connected
from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Tokenize
from fairlead.core.request import Inference, Request
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

VERSIONS = ("2023-06-01", "2026-10-21")
"""Of Anthropic's API. The newer one has no `temperature`, `top_p` and `top_k`: here they mean something in both. What `anthropic-beta`
allows is in the body's fields or is not."""


class Anthropic(Door):
    """Messages."""

    tag: ClassVar[str] = "anthropic"
    error: ClassVar[Any] = AnthropicError
    overloaded = 529

    def __init__(
        self, repository: ModelRepository, gateway: Inference, finished: Finished, max_body_bytes: int, elsewhere: Elsewhere | None
    ) -> None:
        super().__init__(repository, gateway, finished, max_body_bytes, elsewhere)
        self.operations = (
            self.post(
                "/v1/messages", "anthropicMessages", "Answer a conversation", self.messages, MessagesBody, MessageAnswer, events="also"
            ),
            self.post("/v1/messages/count_tokens", "anthropicCount", "How long a conversation is", self.count, CountBody, TokenCount),
        )

    def errors(self, prompt_parameter: str | None = None, request_id: str | None = None) -> AnthropicErrors:
        return AnthropicErrors(request_id)

    async def messages(self, http: HttpRequest, body: MessagesBody, line: AccessLine) -> Any:
        _begin(http, body, line)
        prompt = prompt_of(body)
        answer = Messages(
            f"msg_{line.id}",
            body.model,
            max_tokens=body.max_tokens,
            max_model_len=self.info(line.caller, line.model, line.version).max_model_len,
            shows_thinking=body.thinking is None or body.thinking.display != "omitted",
        )
        request = self.request_of(prompt, line)
        request.session = request.session or (body.metadata.user_id if body.metadata is not None else None) or ""
        if body.stream:
            events = self._events(line, request, answer)
            return EventStream(events, line.end, line.headers, self.errors(request_id=line.id), error_event="error")
        delta = await while_connected(http.scope, http.receive, self.only(line, request))
        return left(line) if delta is None else answered(answer.whole(delta), line)

    async def _events(self, line: AccessLine, request: Request, answer: Messages) -> AsyncGenerator[bytes, None]:
        """Nothing comes before the first delta: until then an error is an ordinary answer with its status."""
        async with aclosing(self.stream(line, request)) as responses:
            async for response in responses:
                for event in answer.events(delta_of(response)):
                    yield event

    async def count(self, http: HttpRequest, body: CountBody, line: AccessLine) -> Any:
        _begin(http, body, line)
        chat, _ = conversation_of(body)
        delta = await while_connected(http.scope, http.receive, self.only(line, self.request_of(Tokenize(chat=chat), line)))
        return left(line) if delta is None else answered(TokenCount(len(delta.token_ids)), line)


def _begin(http: HttpRequest, body: ConversationBody, line: AccessLine) -> None:
    """Raises InvalidRequest for a version of the API that is not spoken here, and for a conversation that the server should keep."""
    line.headers["request-id"] = line.id
    version = http.headers.get("anthropic-version")
    if version is not None and version not in VERSIONS:
        raise InvalidRequest(f"anthropic-version: {version[:32]!r} is not supported; {' and '.join(VERSIONS)} are")
    if body.thread is not None:
        raise ThreadUnsupported
