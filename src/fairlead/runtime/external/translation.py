"""Prompts of the other doors in OpenAI's words, and the events of the answer as Deltas."""

from array import array
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
from msgspec import Struct, structs

from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, QueueFull, Unavailable, Unsupported
from fairlead.core.generation import Delta, Embed, FinishReason, Generate, Guide, Message, Phase, Prompt, Sampling, ToolCall, Usage
from fairlead.core.request import Response
from fairlead.runtime.engine_version import joined

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
LONGEST_RETRY = 3600.0
"""Seconds that an engine may send callers away for."""
POSSIBLE = f"{CHAT}, {COMPLETIONS} and {EMBEDDINGS}"
EXTENDED = (
    "min_tokens",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)
"""Sampling parameters that are vLLM's, not OpenAI's."""
PLAIN = ("temperature", "top_p", "seed")
REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "abort": "abort",
}
_encode = msgspec.json.Encoder().encode


def asked(prompt: Prompt, *, model: str, name: str, backend: str, extended: bool) -> tuple[str, bytes]:
    """(path, body) that ask for the same. `model`: for messages; `name`: what the server calls it. Raises Unsupported for what OpenAI's
    protocol has no words for."""
    lacks = _Lacks(model, backend)
    match prompt:
        case Generate():
            return _generation(prompt, name, lacks, extended=extended)
        case Embed():
            body: dict[str, Any] = {"model": name, "input": prompt.text if prompt.text is not None else prompt.token_ids}
            if prompt.dimensions is not None:
                body["dimensions"] = prompt.dimensions
            return EMBEDDINGS, _encode(body)
    raise lacks(f"`{type(prompt).__name__.lower()}`")


class _Lacks:
    """What is wrong, and what can be asked instead."""

    def __init__(self, model: str, backend: str) -> None:
        self.model = model
        self.backend = backend

    def __call__(self, what: str) -> Unsupported:
        return Unsupported(
            f"model '{self.model}' is computed by another engine ({self.backend}), which is not asked for {what} here:"
            f" {POSSIBLE} pass on whatever the engine takes"
        )


def _generation(prompt: Generate, name: str, lacks: _Lacks, *, extended: bool) -> tuple[str, bytes]:
    if prompt.adapter:
        raise lacks("an adapter")
    body: dict[str, Any] = {"model": name, "stream": True, "stream_options": {"include_usage": True}}
    body |= _sampling(prompt.sampling, lacks, extended=extended, chat=prompt.chat is not None)
    if prompt.guide is not None:
        body |= _guide(prompt.guide, lacks, extended=extended)
    chat = prompt.chat
    if chat is None:
        body["prompt"] = prompt.text if prompt.text is not None else prompt.token_ids
        if not prompt.add_special_tokens:
            if not extended:
                raise lacks("`add_special_tokens: false`")
            body["add_special_tokens"] = False
        return COMPLETIONS, _encode(body)
    body["messages"] = [_message(message) for message in chat.messages]
    if chat.tools:
        choice = prompt.tool_choice
        if choice.inputs:
            raise lacks("a grammar for the text that a tool is called with")
        body["tools"] = [tool for tool in chat.tools if choice.mode == "named" or choice.permits(tool["function"]["name"])]
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}} if choice.mode == "named" else choice.mode
        if not choice.parallel:
            body["parallel_tool_calls"] = False
    beyond: dict[str, Any] = {}
    if not chat.add_generation_prompt:
        beyond["add_generation_prompt"] = False
    if chat.continue_final_message:
        beyond["continue_final_message"] = True
    if chat.template_kwargs:
        beyond["chat_template_kwargs"] = chat.template_kwargs
    if beyond and not extended:
        raise lacks(f"`{next(iter(beyond))}`")
    return CHAT, _encode(body | beyond)


def _message(message: Message) -> dict[str, Any]:
    told = {name: value for name, value in structs.asdict(message).items() if value is not None}
    told.setdefault("content", None)
    if "reasoning" in told:
        told["reasoning_content"] = told.pop("reasoning")
    return told


def _sampling(sampling: Sampling, lacks: _Lacks, *, extended: bool, chat: bool) -> dict[str, Any]:
    # A completion that names none would get 16 from most servers
    body: dict[str, Any] = {} if chat and sampling.max_tokens is None else {"max_tokens": sampling.max_tokens}
    body |= {name: value for name in PLAIN if (value := getattr(sampling, name)) is not None}
    body |= {name: value for name in ("presence_penalty", "frequency_penalty") if (value := getattr(sampling, name))}
    if sampling.n > 1:
        body["n"] = sampling.n
    if sampling.stop:
        body["stop"] = sampling.stop
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.logprobs is not None or sampling.prompt_logprobs is not None:
        raise lacks("log-probabilities")
    neutral = Sampling()
    for name in EXTENDED:
        if (value := getattr(sampling, name)) != getattr(neutral, name):
            if not extended:
                raise lacks(f"`{name}`")
            body[name] = value
    return body


def _guide(guide: Guide, lacks: _Lacks, *, extended: bool) -> dict[str, Any]:
    if guide.kind == "json":
        schema = msgspec.Raw(guide.text.encode())
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}}
    if not extended or guide.kind == "lark":
        raise lacks(f"`{guide.parameter or guide.kind}`")
    value: Any = guide.text if guide.kind == "regex" else msgspec.Raw(guide.text.encode())
    return {"structured_outputs": {guide.kind: value}}


# Answers


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Piece(Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(Struct):
    index: int = 0
    delta: _Piece | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class _Failure(Struct):
    message: str = ""


class _Chunk(Struct):
    choices: list[_Choice] = []
    error: _Failure | str | None = None


class _Vector(Struct):
    embedding: list[float]


class _Vectors(Struct):
    data: list[_Vector]


class _Refusal(Struct):
    error: _Failure | str | None = None
    message: str = ""


_chunk = msgspec.json.Decoder(_Chunk)
_vectors = msgspec.json.Decoder(_Vectors)
_refusal = msgspec.json.Decoder(_Refusal)


class Consumer(Protocol):
    """As `runtime.engine_instance` has it."""

    def respond(self, delta: Delta) -> None: ...

    def close(self, error: FairleadError | None) -> None: ...


class Reader:
    """A sink of bytes, which a consumer of Deltas stands behind."""

    def __init__(self, model: str, prompt: Prompt, consumer: Consumer, clock: Callable[[], float], age: float) -> None:
        """`age`: seconds since the request arrived."""
        self._model = model
        self._generates = isinstance(prompt, Generate)
        """Then a stream was asked for, whatever the consumer wants."""
        self._streams = isinstance(prompt, Generate) and prompt.stream
        self._num_choices = prompt.sampling.n if isinstance(prompt, Generate) else 1
        self._consumer = consumer
        self._clock = clock
        self._arrived = clock() - age
        self._age = age
        self._first_at = 0.0
        self._held: dict[int, Delta] = {}
        """By choice: its last piece, or all of it where the answer is wanted in one. It waits for the usage."""
        self._ended: set[int] = set()
        self._usage: Usage | None = None
        self._error: FairleadError | None = None
        self.num_tokens = 0
        self.done = False

    def respond(self, response: Response) -> None:
        if self.done or self._error is not None:
            return
        body = response.raw or b""
        self._usage = response.usage or self._usage
        try:
            if response.status >= 400:
                self._error = self._refused(response, body)
            elif response.headers.get("content-type", "").startswith("application/json"):
                if self._generates:
                    self._error = self._garbage("it answers in one piece where a stream was asked for")
                else:
                    self._read_whole(body)
            else:
                for line in body.splitlines():
                    if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                        self._read(_chunk.decode(line[5:]))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._error = self._garbage(str(error))

    @property
    def failed(self) -> bool:
        """Whatever comes now is read by nobody."""
        return self._error is not None

    def close(self, error: FairleadError | None) -> None:
        if self.done:
            return
        self.done = True
        error = self._error or error
        if error is None and not (self._held and len(self._ended) == self._num_choices):
            error = self._garbage("its answer has no end")
        if error is None:
            held = list(self._held.values())
            held[-1].usage = self._usage or Usage()
            held[-1].phases = self._phases()
            for delta in held:
                self._consumer.respond(delta)
        self._consumer.close(error)

    def _garbage(self, detail: str) -> ModelError:
        return ModelError(f"the server that computes model '{self._model}' gave an answer that is none of OpenAI's protocol: {detail}")

    def _refused(self, response: Response, body: bytes) -> FairleadError:
        try:
            told = _refusal.decode(body)
            failure = told.error
            message = told.message if failure is None else failure if isinstance(failure, str) else failure.message
        except (msgspec.DecodeError, UnicodeDecodeError):
            message = ""
        message = message or f"it answers {response.status}"
        if response.status < 500 and response.status != 429:
            return InvalidRequest(f"the engine of model '{self._model}' refuses: {message[:512]}")
        kind = QueueFull if response.status == 429 else Unavailable
        error = kind(f"the engine of model '{self._model}' cannot answer: {message[:512]}")
        after = response.headers.get("retry-after", "")
        if after.isascii() and after.isdigit():
            error.retry_after = min(float(after[:9]), LONGEST_RETRY)
        return error

    def _read_whole(self, body: bytes) -> None:
        vectors = _vectors.decode(body)
        self._held[0] = Delta(vector=array("f", vectors.data[0].embedding).tobytes() if vectors.data else b"")
        self._ended.add(0)

    def _read(self, chunk: _Chunk) -> None:
        if chunk.error is not None:
            message = chunk.error if isinstance(chunk.error, str) else chunk.error.message
            self._error = ModelError(f"the engine of model '{self._model}' failed: {message[:512]}")
            return
        for choice in chunk.choices:
            if not 0 <= choice.index < self._num_choices:
                self._error = self._garbage(f"choice {choice.index} of {self._num_choices}")
                return
            delta = self._delta(choice)
            if not self._first_at:
                self._first_at = self._clock()
            self.num_tokens += 1
            held = self._held.get(choice.index)
            if held is not None and (not self._streams or choice.index in self._ended):
                joined(held, delta)
            elif self._streams and not delta.finish_reason:
                self._consumer.respond(delta)
            else:
                self._held[choice.index] = delta
            if delta.finish_reason:
                self._ended.add(choice.index)

    def _delta(self, choice: _Choice) -> Delta:
        delta = Delta(index=choice.index, text=choice.text or "", stop_reason=choice.stop_reason)
        if (piece := choice.delta) is not None:
            delta.text = piece.content or ""
            delta.reasoning = piece.reasoning or piece.reasoning_content or ""
            delta.tool_calls = [
                ToolCall(
                    index=call.index,
                    id=call.id or "",
                    name=(call.function and call.function.name) or "",
                    arguments=(call.function and call.function.arguments) or "",
                )
                for call in piece.tool_calls or ()
            ]
        if choice.finish_reason:
            delta.finish_reason = REASONS.get(choice.finish_reason, "stop")
        return delta

    def _phases(self) -> list[Phase]:
        """As far as it can be seen from here."""
        age, now = self._age, self._clock() - self._arrived
        if not self._first_at:
            return [Phase("prefill", age, now - age)]
        first = self._first_at - self._arrived
        return [Phase("prefill", age, first - age), Phase("decode", first, now - first, 0, self.num_tokens)]
