"""What comes in at `/v1/responses`, but for the items and tools, which are read where they are made use of."""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from fairlead.api.openai.bodies import LARGEST, Count, Logprobs, Positive, Probability, Seed, check_numbers
from fairlead.api.openai.errors import BadParameter
from fairlead.api.openai.formats import guide_of_schema
from fairlead.core.generation import Guide, Penalty, Sampling

ENCRYPTED = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"
INCLUDES = (
    ENCRYPTED,
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""All but the first two are parts of items that there are none of here."""
MAX_METADATA = 16
MAX_KEY_CHARS = 64
MAX_VALUE_CHARS = 512
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Reasoning(Struct, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """Needs a chat template that heeds it."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    schema: Any = None
    description: str | None = None
    strict: bool | None = None
    """Changes nothing: every answer follows its schema."""

    def guide(self) -> Guide | None:
        """Raises BadParameter."""
        if self.type != "json_schema":
            given = next((name for name in ("name", "schema", "description", "strict") if getattr(self, name) is not None), None)
            if given is not None:
                message = f"'text.format.{given}' belongs to the type 'json_schema', not to {self.type!r}."
                raise BadParameter(message, f"text.format.{given}", "invalid_value")
            return guide_of_schema({"type": "object"}, "text.format") if self.type == "json_object" else None
        if self.name is None:
            raise BadParameter("Missing required parameter: 'text.format.name'.", "text.format.name", "missing_required_parameter")
        return guide_of_schema(self.schema, "text.format.schema")


class TextOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: Literal[False] | None = None


class ConversationBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What answering and counting share."""

    prompt_parameter: ClassVar[str] = "input"

    model: str
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def guide(self) -> Guide | None:
        """Raises BadParameter."""
        return None if self.text is None or self.text.format is None else self.text.format.guide()

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def template_kwargs(self) -> dict[str, Any]:
        return {}

    def check_options(self) -> None:
        """Raises BadParameter."""
        if self.truncation == "auto":
            raise _unsupported("truncation", "auto", "items are never dropped here: an input that is too long is an error")
        if self.text is not None and self.text.verbosity in ("low", "high"):
            raise _unsupported(
                "text.verbosity", self.text.verbosity, "models are not told how long to answer; `instructions` can tell them"
            )
        reasoning = self.reasoning or Reasoning()
        for name in ("summary", "generate_summary"):
            if getattr(reasoning, name) in ("concise", "detailed"):
                why = "reasoning is not summarised here: it is told as it is, in the reasoning items' `content`"
                raise _unsupported(f"reasoning.{name}", getattr(reasoning, name), why)
        for name in ("tools", "input"):
            _check_packable(getattr(self, name), name)


class CountBody(ConversationBody, kw_only=True, forbid_unknown_fields=True):
    def check_options(self) -> None:
        super().check_options()
        if self.input is None and self.previous_response_id is None and self.instructions is None:
            raise BadParameter("Missing required parameter: 'input'.", "input", "missing_required_parameter")


class ResponseBody(ConversationBody, kw_only=True, forbid_unknown_fields=True):
    input: str | list[Any]
    max_tool_calls: Positive | None = None
    """Of tools that the server calls, of which there are none."""
    include: list[str] | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_logprobs: Logprobs | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    # Labels
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    client_metadata: dict[str, Any] | None = None
    # As of chats
    top_k: Annotated[int, Meta(ge=-1, le=LARGEST)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Count | None = None
    """1 is the highest."""

    def sampling(self) -> Sampling:
        """Raises BadParameter."""
        self.check_options()
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Sampling(max_tokens=self.max_output_tokens, fits_context=True, logprobs=self.logprobs, **given)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        return self.chat_template_kwargs or {}

    def check_options(self) -> None:
        super().check_options()
        if self.stream_options is not None and not self.stream:
            raise BadParameter("'stream_options' is only allowed when 'stream' is set.", "stream_options", "invalid_value")
        for number, name in enumerate(self.include or ()):
            if name not in INCLUDES:
                supported = ", ".join(map(repr, INCLUDES))
                where = f"include[{number}]"
                raise BadParameter(
                    f"Invalid value for '{where}': {name[:128]!r}. Supported values are: {supported}.", where, "invalid_value"
                )
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise BadParameter(f"'top_logprobs' needs 'include' to hold {LOGPROBS!r}.", "top_logprobs", "invalid_value")
        check_metadata(self.metadata)
        _check_packable(self.chat_template_kwargs, "chat_template_kwargs")

    @property
    def logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Raises BadParameter."""
    if len(metadata or {}) > MAX_METADATA:
        raise BadParameter(f"Invalid 'metadata': at most {MAX_METADATA} pairs.", "metadata", "object_above_max_properties")
    for key, value in (metadata or {}).items():
        if len(key) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS:
            message = f"Invalid 'metadata': keys have at most {MAX_KEY_CHARS} characters, values {MAX_VALUE_CHARS}."
            raise BadParameter(message, "metadata", "string_above_max_length")


def _check_packable(free: Any, where: str) -> None:
    """Raises BadParameter."""
    try:
        check_numbers(free, where)
    except RecursionError:
        raise BadParameter(f"Invalid value for '{where}': it is nested too deeply.", where, "invalid_value") from None


def _unsupported(name: str, value: str, why: str) -> BadParameter:
    return BadParameter(f"Unsupported value for '{name}': {value!r}: {why}.", name, "unsupported_value")
