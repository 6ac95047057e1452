"""What comes in: the bodies of the Messages API.

A field that this server would not heed is not here, or allows only the value that asks for nothing: it is refused by name. `cache_control`
is a hint (every prefix is cached, and looked up, by itself), and so is a signature, which only whoever made it could check.
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from fairlead.api.openai.bodies import LARGEST, Count
from fairlead.core.generation import MAX_STOPS

Positive = Annotated[int, Meta(ge=1, le=LARGEST)]
CacheControl = dict[str, Any]


class Block(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """A piece of a message."""


class TextParam(Block, kw_only=True, forbid_unknown_fields=True, tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ThinkingParam(Block, kw_only=True, forbid_unknown_fields=True, tag="thinking"):
    thinking: str
    signature: str = ""


class RedactedThinkingParam(Block, kw_only=True, forbid_unknown_fields=True, tag="redacted_thinking"):
    """What another server thought, for no one else to read: it is left out of the prompt."""

    data: str


class DirectCaller(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["direct"]


class ToolUseParam(Block, kw_only=True, forbid_unknown_fields=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None
    toolset_name: None = None


class OtherParam(Struct, tag_field="type"):
    """A block that is no text: it is refused, whatever it holds."""


class ImageParam(OtherParam, tag="image"):
    pass


class DocumentParam(OtherParam, tag="document"):
    pass


class SearchResultParam(OtherParam, tag="search_result"):
    pass


class ToolResultParam(Block, kw_only=True, forbid_unknown_fields=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextParam | ImageParam | DocumentParam | SearchResultParam] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: None = None


AnyBlock = (
    TextParam | ThinkingParam | RedactedThinkingParam | ToolUseParam | ToolResultParam | ImageParam | DocumentParam | SearchResultParam
)


class MessageParam(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class ToolParam(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: str | None = None
    cache_control: CacheControl | None = None
    input_examples: list[dict[str, Any]] | None = None
    """Chat templates have no place of their own for them: they stand in the description."""
    eager_input_streaming: bool | None = None
    """Arguments are streamed as they are written, always."""
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class ServerTool(Struct):
    """Any tool, as far as it says what it is."""

    type: str | None = None


class ToolChoiceParam(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Meta(ge=1024, le=LARGEST)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Struct, kw_only=True, forbid_unknown_fields=True):
    user_id: str | None = None


class KeepThinking(Struct, kw_only=True, forbid_unknown_fields=True):
    """An edit that leaves everything as it is."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Struct, kw_only=True, forbid_unknown_fields=True):
    edits: list[KeepThinking] | None = None


class ConversationBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What asking and counting share."""

    prompt_parameter: ClassVar[str] = "messages"

    model: str
    messages: list[MessageParam]
    system: str | list[TextParam] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None
    speed: Literal["standard"] | None = None
    thread: Any = None
    """Refused in a way that programs understand."""


class CountBody(ConversationBody, kw_only=True, forbid_unknown_fields=True):
    pass


class MessagesBody(ConversationBody, kw_only=True, forbid_unknown_fields=True):
    max_tokens: Positive
    stop_sequences: Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Count | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    """There is one tier."""
    container: None = None
    diagnostics: None = None
