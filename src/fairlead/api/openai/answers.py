"""What goes out: deltas as OpenAI's chunks and objects."""

import base64
import codecs
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np
from msgspec import UNSET, Struct, UnsetType

from fairlead import __version__
from fairlead.core.generation import MAX_LOGPROBS, Delta, TokenLogprob, ToolCall, Usage

FINGERPRINT = f"fairlead-{__version__}"
LEAST = -9999.0
"""What OpenAI says for a log-probability of minus infinity, which JSON does not have."""

encode = msgspec.json.Encoder().encode

FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class UsageBody(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class PromptLogprob(Struct):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""As vLLM has them: for each token of the prompt, token id → how likely it was."""


class ChatToken(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenOfMany(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(Struct):
    content: list[ChatTokenOfMany]
    refusal: None = None


class CalledFunction(Struct):
    name: str
    arguments: str
    """JSON, as far as the model writes JSON."""


class Call(Struct):
    """Of a tool."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class CalledPiece(Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class CallPiece(Struct, omit_defaults=True):
    """The first one of a call has `id`, `type` and the name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledPiece | None = None


class ChatDelta(Struct, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    """vLLM's name for it."""
    reasoning_content: str | None = None
    """The same: DeepSeek's name, which most others took."""
    tool_calls: list[CallPiece] | None = None


class ChatPiece(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    """The stop string or token that ended it, as vLLM has it; not there before the end."""


class ChatAnswer(Struct):
    content: str | None
    """null where there are only calls."""
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    """vLLM's name for it."""
    reasoning_content: str | UnsetType = UNSET
    """The same: DeepSeek's name, which most others took."""
    tool_calls: list[Call] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatAnswer
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | None = None


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where each token begins, in characters of the choice's whole text."""


class CompletionChoice(Struct):
    """Of a stream as of a whole answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class _Object(Struct, kw_only=True):
    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str = FINGERPRINT
    usage: UsageBody | UnsetType | None = UNSET


class ChatCompletion(_Object, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatChunk(_Object, kw_only=True):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatPiece]
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(_Object, kw_only=True):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Embedding(Struct):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Model(Struct):
    id: str
    created: int
    owned_by: str
    max_model_len: int | None = None
    """Tokens of prompt and answer together; null where another server knows."""
    root: str | None = None
    """Of a LoRA adapter: the model that it belongs to."""
    parent: str | None = None
    """The same."""
    object: Literal["model"] = "model"


class Models(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Struct):
    prompt: str


class Answer(Protocol):
    """One answer on its way out, as chunks or whole. Deltas come with the number of the prompt that they answer."""

    def chunks(self, number: int, delta: Delta) -> Iterator[bytes]:
        """JSON of the chunks that tell of one delta."""

    def closing(self, usage: Usage) -> bytes:
        """The chunk after the last, for those who asked for the usage."""

    def whole(self, deltas: Sequence[Sequence[Delta]]) -> Struct:
        """From all deltas of every prompt, one for each choice."""


class Chats:
    """Implements Answer for one conversation."""

    def __init__(self, id: str, model: str, *, include_usage: bool = False) -> None:
        """`include_usage`: every chunk has the field, null but for the last."""
        self.id, self.model, self.created = id, model, int(time.time())
        self.usage: UnsetType | None = None if include_usage else UNSET
        self._opened: set[int] = set()

    def chunks(self, number: int, delta: Delta) -> Iterator[bytes]:
        index = delta.index
        if index not in self._opened:
            self._opened.add(index)
            yield self._chunk([ChatPiece(index, ChatDelta(role="assistant", content=""))])
        told = ChatDelta(content=delta.text or None, reasoning=delta.reasoning or None, reasoning_content=delta.reasoning or None)
        if delta.tool_calls:
            told.tool_calls = [_call_piece(call) for call in delta.tool_calls]
        piece = ChatPiece(index, told)
        if delta.logprobs is not None:
            piece.logprobs = _chat_logprobs(delta.logprobs)
        if delta.finish_reason:
            piece.finish_reason, piece.stop_reason = _reason(delta), delta.stop_reason
        yield self._chunk([piece], prompt_logprobs_of(delta.prompt_logprobs))

    def closing(self, usage: Usage) -> bytes:
        chunk = ChatChunk(id=self.id, created=self.created, model=self.model, choices=[], usage=_usage(usage))
        return encode(chunk)

    def whole(self, deltas: Sequence[Sequence[Delta]]) -> ChatCompletion:
        (choices,) = deltas
        told = next((delta.prompt_logprobs for delta in choices if delta.prompt_logprobs is not None), None)
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[_chat_choice(delta) for delta in sorted(choices, key=_index)],
            usage=_usage(total_usage(choices)),
            prompt_logprobs=prompt_logprobs_of(told),
        )

    def _chunk(self, pieces: list[ChatPiece], told: PromptLogprobs | UnsetType = UNSET) -> bytes:
        return encode(ChatChunk(id=self.id, created=self.created, model=self.model, choices=pieces, usage=self.usage, prompt_logprobs=told))


class Completions:
    """Implements Answer for texts that are continued."""

    def __init__(
        self,
        id: str,
        model: str,
        *,
        n: int = 1,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        echoed: Sequence[str] | None = None,
        include_usage: bool = False,
    ) -> None:
        """`logprobs`, `prompt_logprobs`: how many alternatives to tell; `echoed`: the prompts, where each choice shall begin with its own."""
        self.id, self.model, self.created, self.n = id, model, int(time.time()), n
        self.logprobs, self.prompt_logprobs = logprobs, prompt_logprobs
        self.echoed = echoed
        self.usage: UnsetType | None = None if include_usage else UNSET
        self._told: dict[int, list[TokenLogprob | None]] = {}  # by prompt: they come once for all its choices
        self._logprobs: dict[int, _Logprobs] = {}  # by choice

    def chunks(self, number: int, delta: Delta) -> Iterator[bytes]:
        choices = [self._choice(number, delta)]
        yield encode(Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage))

    def closing(self, usage: Usage) -> bytes:
        return encode(Completion(id=self.id, created=self.created, model=self.model, choices=[], usage=_usage(usage)))

    def whole(self, deltas: Sequence[Sequence[Delta]]) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._choice(number, delta) for number, of_prompt in enumerate(deltas) for delta in sorted(of_prompt, key=_index)],
            usage=_usage(total_usage(delta for of_prompt in deltas for delta in of_prompt)),
        )

    def _choice(self, number: int, delta: Delta) -> CompletionChoice:
        index = number * self.n + delta.index
        if delta.prompt_logprobs is not None:
            self._told[number] = delta.prompt_logprobs
        told = self._told.get(number)
        first = index not in self._logprobs
        if first:
            self._logprobs[index] = _Logprobs(self.logprobs or 0)
        choice = CompletionChoice(index, delta.text)
        if first and self.echoed is not None:
            choice.text = self.echoed[number] + delta.text
            if self.logprobs is not None:
                choice.logprobs = self._logprobs[index].of_prompt(self.echoed[number], told or [])
        if self.logprobs is not None and delta.logprobs is not None:
            choice.logprobs = self._logprobs[index].add(delta.logprobs, choice.logprobs)
        if first and self.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs_of(told, self.prompt_logprobs)
        if delta.finish_reason:
            choice.finish_reason, choice.stop_reason = _reason(delta), delta.stop_reason
        return choice


class _Logprobs:
    """Of one choice's tokens, as they come."""

    def __init__(self, num_top: int) -> None:
        self.num_top = num_top
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens

    def of_prompt(self, prompt: str, told: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        """The first token is what the others leave of the prompt; nothing where it is a special one that the text does not show."""
        others = [each for each in told if each is not None]
        rest = len(b"".join(each.data for each in others).decode(errors="replace"))
        self._at = len(prompt) - rest
        first = CompletionLogprobs([prompt[: max(self._at, 0)]], [None], [None], [0]) if told else CompletionLogprobs([], [], [], [])
        return self.add(others, first)

    def add(self, tokens: Iterable[TokenLogprob], before: CompletionLogprobs | None = None) -> CompletionLogprobs:
        answer = before or CompletionLogprobs([], [], [], [])
        for each in tokens:
            answer.tokens.append(each.token)
            answer.token_logprobs.append(_finite(each.logprob))
            # OpenAI's has the chosen token beside the likeliest; of two tokens that look the same the likelier one
            top: dict[str, float] = {}
            for other in (*each.top[: self.num_top], each):
                top.setdefault(other.token, _finite(other.logprob))
            answer.top_logprobs.append(top)
            answer.text_offset.append(max(self._at, 0))
            self._at += len(self._decoder.decode(each.data))
        return answer


def _chat_logprobs(tokens: Iterable[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenOfMany(
                each.token,
                _finite(each.logprob),
                list(each.data),
                [ChatToken(other.token, _finite(other.logprob), list(other.data)) for other in each.top],
            )
            for each in tokens
        ]
    )


def _chat_choice(delta: Delta) -> ChatChoice:
    logprobs = None if delta.logprobs is None else _chat_logprobs(delta.logprobs)
    answer = ChatAnswer(delta.text if delta.text or not delta.tool_calls else None)
    if delta.reasoning:
        answer.reasoning = answer.reasoning_content = delta.reasoning
    if delta.tool_calls:
        answer.tool_calls = calls_of(delta)
    return ChatChoice(delta.index, answer, _reason(delta), logprobs, delta.stop_reason)


def calls_of(delta: Delta) -> list[Call]:
    """Whole."""
    return [Call(call.id, CalledFunction(call.name, call.arguments)) for call in delta.tool_calls]


def _call_piece(call: ToolCall) -> CallPiece:
    first = bool(call.id)
    return CallPiece(call.index, call.id or None, "function" if first else None, CalledPiece(call.name if first else None, call.arguments))


def prompt_logprobs_of(told: Sequence[TokenLogprob | None] | None, num_top: int = MAX_LOGPROBS) -> PromptLogprobs | UnsetType:
    def entry(each: TokenLogprob) -> PromptLogprob:
        return PromptLogprob(_finite(each.logprob), each.rank, each.token)

    if told is None:
        return UNSET
    return [None if each is None else {str(other.token_id): entry(other) for other in (*each.top[:num_top], each)} for each in told]


def _reason(delta: Delta) -> FinishReason:
    return delta.finish_reason if delta.finish_reason in ("length", "content_filter", "tool_calls") else "stop"


def _index(delta: Delta) -> int:
    return delta.index


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)


def total_usage(deltas: Iterable[Delta]) -> Usage:
    """Of several prompts; the last delta of each tells its own."""
    usages = [delta.usage for delta in deltas if delta.usage is not None]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )


def _usage(usage: Usage) -> UsageBody:
    num_tokens = usage.prompt_tokens + usage.completion_tokens
    return UsageBody(
        usage.prompt_tokens,
        usage.completion_tokens,
        num_tokens,
        PromptTokensDetails(usage.cached_tokens),
        CompletionTokensDetails(usage.reasoning_tokens),
    )


def embeddings(deltas: Sequence[Delta], model: str, encoding: Literal["float", "base64"]) -> Embeddings:
    def vector(data: bytes) -> list[float] | str:
        return base64.b64encode(data).decode("ascii") if encoding == "base64" else np.frombuffer(data, "<f4").tolist()

    num_tokens = total_usage(deltas).prompt_tokens
    data = [Embedding(index, vector(delta.vector)) for index, delta in enumerate(deltas)]
    return Embeddings(data, model, EmbeddingUsage(num_tokens, num_tokens))
