"""What comes in: the bodies of the OpenAI API and, among their fields, the ones that vLLM's users know.

A field that this server would not heed is not here: it is refused by name. The ones that are here and mean nothing
(`user`, `metadata`, ...) are labels, which OpenAI defines to have no effect on the answer; those with one meaning that
can be served (`store: false`) allow only that.
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct, msgpack
from msgspec.structs import replace

from fairlead.api.openai.errors import BadParameter
from fairlead.api.openai.formats import ResponseFormat, StructuredOutputs, guide_of
from fairlead.api.openai.tools import tools_of
from fairlead.core.generation import MAX_CHOICES, MAX_LOGPROBS, MAX_STOPS, Chat, Generate, Message, Penalty, Sampling, ToolChoice

LARGEST = (1 << 31) - 1
Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Positive = Annotated[int, Meta(ge=1, le=LARGEST)]
TokenId = Count
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
DEFAULT_MAX_TOKENS = 16
"""Of a text completion, as OpenAI has it."""
MAX_PROMPTS = 2048
"""Texts in one request."""
_DIRECT = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "include_stop_str_in_output",
    "ignore_eos",
    "prompt_logprobs",
    "skip_special_tokens",
)


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Body(Struct, kw_only=True, forbid_unknown_fields=True):
    """What chats and completions share."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Meta(ge=-1, le=LARGEST)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    min_tokens: Count | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Logprobs | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    priority: Count | None = None
    """1 is the highest."""

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Raises BadParameter."""
        if self.stream_options is not None and not self.stream:
            raise BadParameter("'stream_options' is only allowed when 'stream' is set.", "stream_options", "invalid_value")
        given: dict[str, Any] = {name: value for name in _DIRECT if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return Sampling(
                max_tokens=max_tokens,
                logprobs=logprobs,
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                logit_bias=_bias(self.logit_bias),
                **given,
            )
        except ValueError as error:
            raise BadParameter(str(error), str(error).partition("`")[2].partition("`")[0] or None, "invalid_value") from None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _bias(given: dict[str, float] | None) -> dict[int, float]:
    for key in given or ():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise BadParameter(
                f"Invalid value for 'logit_bias': its keys must be token ids, not {key[:20]!r}.", "logit_bias", "invalid_value"
            )
    return {int(key): bias for key, bias in (given or {}).items()}


class TextPart(Struct, kw_only=True, forbid_unknown_fields=True):
    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's name for it; answers tell both."""
    # What other servers' answers hold, which clients send back as they came
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def plain(self, place: str) -> Message:
        """For the chat template. Raises BadParameter."""
        content = self.content
        if isinstance(content, list):
            texts = []
            for number, part in enumerate(content):
                where = f"{place}.content[{number}]"
                if part.type != "text":
                    message = f"Invalid value for '{where}.type': this model reads text only, not {part.type!r}."
                    raise BadParameter(message, f"{where}.type", "invalid_value")
                if part.text is None:
                    raise BadParameter(f"Missing required parameter: '{where}.text'.", f"{where}.text", "missing_required_parameter")
                texts.append(part.text)
            content = "".join(texts)
        reasoning = self.reasoning_content if self.reasoning is None else self.reasoning
        if reasoning is not None and self.role != "assistant":
            raise BadParameter("Reasoning belongs to messages of the assistant.", f"{place}.reasoning", "invalid_value")
        if self.reasoning_content not in (None, reasoning):
            message = f"'{place}.reasoning' and '{place}.reasoning_content' are the same: give one of them."
            raise BadParameter(message, f"{place}.reasoning_content", "invalid_value")
        if content is None and not (self.role == "assistant" and (self.tool_calls or reasoning)):
            where = f"{place}.content"
            raise BadParameter(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
        if self.tool_calls and self.role != "assistant":
            raise BadParameter("'tool_calls' belong to messages of the assistant.", f"{place}.tool_calls", "invalid_value")
        if self.role == "tool" and self.tool_call_id is None:
            where = f"{place}.tool_call_id"
            raise BadParameter(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
        role = "system" if self.role == "developer" else self.role
        calls = [_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(self.tool_calls or ())] or None
        return Message(role=role, content=content, name=self.name, tool_calls=calls, tool_call_id=self.tool_call_id, reasoning=reasoning)


def _call(call: dict[str, Any], place: str) -> dict[str, Any]:
    """A call of an earlier answer. Raises BadParameter."""
    function = call.get("function")
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    for value, right, where in ((name, isinstance(name, str), "name"), (arguments, isinstance(arguments, (str, dict)), "arguments")):
        if value is None:
            where = f"{place}.function.{where}"
            raise BadParameter(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
        if not right:
            where = f"{place}.function.{where}"
            raise BadParameter(f"Invalid type for '{where}': expected `str`.", where, "invalid_type")
    return call


def generate_of(body: "ChatBody") -> Generate:
    """Raises BadParameter."""
    chat, choice = _chat_of(body)
    return Generate(
        chat=chat,
        sampling=body.complete(),
        guide=guide_of(body.response_format, body.structured_outputs),
        tool_choice=choice,
        parsed=True,
        stream=bool(body.stream),
    )


def chat_of(body: "ChatBody | TokenizeBody") -> Chat:
    """Raises BadParameter."""
    return _chat_of(body)[0]


def _chat_of(body: "ChatBody | TokenizeBody") -> tuple[Chat, ToolChoice]:
    if not body.messages:
        raise BadParameter("Invalid 'messages': empty array. Expected an array with minimum length 1.", "messages", "empty_array")
    if body.add_generation_prompt and body.continue_final_message:
        message = "'continue_final_message' needs 'add_generation_prompt' to be false."
        raise BadParameter(message, "continue_final_message", "invalid_value")
    messages = [message.plain(f"messages[{number}]") for number, message in enumerate(body.messages)]
    check_numbers([message.tool_calls for message in messages], "messages")
    check_numbers(body.chat_template_kwargs, "chat_template_kwargs")
    check_numbers(body.tools, "tools")
    if "tools" in (body.chat_template_kwargs or {}):
        where = "chat_template_kwargs.tools"
        raise BadParameter(f"Unsupported parameter: '{where}'. Use 'tools' in its place.", where, "unsupported_parameter")
    asked = body if isinstance(body, ChatBody) else None
    tools, choice = tools_of(body.tools, asked.tool_choice if asked else None, asked.parallel_tool_calls if asked else None)
    chat = Chat(
        messages=messages,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        reasoning_effort=body.reasoning_effort or "",
        template_kwargs=body.chat_template_kwargs or {},
    )
    return chat, choice


def check_numbers(free: Any, where: str) -> None:
    """JSON's integers have no bound, those on the way to the engine have. Raises BadParameter."""
    try:
        msgpack.encode(free)
    except OverflowError:
        raise BadParameter(f"Invalid value for '{where}': it holds an integer of more than 64 bits.", where, "invalid_value") from None


class ChatBody(Body, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "messages"

    messages: list[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    """Handed to the chat template as they are."""
    reasoning_effort: Effort | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def complete(self) -> Sampling:
        """Raises BadParameter."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "'max_tokens' and 'max_completion_tokens' are the same: give one of them."
            raise BadParameter(message, "max_completion_tokens", "invalid_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise BadParameter("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs", "invalid_value")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit == 0:
            name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise BadParameter(f"Invalid value for '{name}': expected at least 1.", name, "invalid_value")
        return self.sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)


class CompletionBody(Body, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "prompt"

    prompt: str | list[str | TokenId | list[TokenId]]
    add_special_tokens: bool = True
    echo: bool | None = None
    logprobs: Logprobs | None = None
    best_of: Positive | None = None

    def complete(self) -> Sampling:
        """Raises BadParameter."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadParameter("'best_of' is not supported: it must equal 'n'.", "best_of", "unsupported_value")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            message = "Invalid value for 'max_tokens': 0 needs 'echo' or 'prompt_logprobs'."
            raise BadParameter(message, "max_tokens", "invalid_value")
        sampling = self.sampling(DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, self.logprobs)
        if self.echo and self.logprobs is not None:
            return replace(sampling, prompt_logprobs=max(self.logprobs, self.prompt_logprobs or 0))
        return sampling


class EmbeddingBody(Struct, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "input"

    model: str
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None
    priority: Count | None = None


class TokenizeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "prompt"

    model: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    reasoning_effort: Effort | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "tokens"

    model: str
    tokens: list[TokenId]


def texts_of(given: str | list[Any], name: str) -> list[tuple[str | None, list[int] | None]]:
    """One prompt or many, each a text or token ids: the other is None. Raises BadParameter."""
    if isinstance(given, str):
        return [(given, None)]
    if not given:
        raise BadParameter(f"Invalid '{name}': empty array. Expected an array with minimum length 1.", name, "empty_array")
    if all(isinstance(each, int) for each in given):
        return [(None, given)]
    if len(given) > MAX_PROMPTS:
        raise BadParameter(f"Invalid '{name}': at most {MAX_PROMPTS} texts in one request.", name, "array_above_max_length")
    if all(isinstance(each, str) for each in given):
        return [(text, None) for text in given]
    if all(isinstance(each, list) for each in given):
        return [(None, ids) for ids in given]
    raise BadParameter(
        f"Invalid '{name}': expected a string, an array of strings, of token ids, or of arrays of token ids.", name, "invalid_type"
    )
