"""A conversation in Anthropic's blocks, as the chat templates' messages and OpenAI's tools, which the engine takes."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import msgspec

from fairlead.api.anthropic.bodies import (
    AnyBlock,
    ConversationBody,
    MessageParam,
    MessagesBody,
    OtherParam,
    RedactedThinkingParam,
    ServerTool,
    TextParam,
    ThinkingParam,
    ToolChoiceParam,
    ToolParam,
    ToolResultParam,
    ToolUseParam,
)
from fairlead.api.openai.bodies import check_numbers
from fairlead.api.openai.errors import BadParameter, explained
from fairlead.api.openai.formats import guide_of_schema
from fairlead.api.openai.tools import tools_of
from fairlead.core.generation import Chat, Generate, Message, Sampling, ToolChoice

EFFORTS = {"xhigh": "high", "max": "high"}
"""Those that no chat template knows."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
FAILED = "Error: "
"""Before the result of a tool that says that it failed: chat templates have no other way to say it."""

Placed = tuple[str, AnyBlock]
"""Where a block stands, and the block."""


def prompt_of(body: MessagesBody) -> Generate:
    """Raises BadParameter."""
    chat, tool_choice = conversation_of(body)
    thinking = body.thinking
    if thinking is not None and thinking.budget_tokens is not None and thinking.budget_tokens >= body.max_tokens:
        where = "thinking.budget_tokens"
        raise BadParameter(f"Invalid value for '{where}': it must be less than 'max_tokens'.", where, "invalid_value")
    try:
        sampling = Sampling(
            max_tokens=body.max_tokens,
            fits_context=True,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            stop=tuple(body.stop_sequences or ()),
        )
    except ValueError as error:
        raise BadParameter(str(error).replace("`stop`", "`stop_sequences`"), "stop_sequences", "invalid_value") from None
    format = None if body.output_config is None else body.output_config.format
    guide = None if format is None else guide_of_schema(format.schema, "output_config.format.schema")
    return Generate(chat=chat, sampling=sampling, guide=guide, tool_choice=tool_choice, parsed=True, stream=bool(body.stream))


def conversation_of(body: ConversationBody) -> tuple[Chat, ToolChoice]:
    """Raises BadParameter."""
    messages = [] if body.system is None else [Message(role="system", content=_text(body.system))]
    messages += _messages(body.messages)
    continues = messages[-1].role == "assistant"
    if continues and messages[-1].tool_calls:
        where = f"messages[{len(body.messages) - 1}]"
        raise BadParameter(f"Invalid '{where}': its 'tool_use' has no 'tool_result' in a message that follows.", where, "invalid_value")
    if continues and not messages[-1].content:
        messages, continues = messages[:-1], False
    tools, tool_choice = _tools(body)
    for value, name in ((messages, "messages"), (tools, "tools")):
        check_numbers(value, name)
    chat = Chat(
        messages=messages,
        tools=tools,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        template_kwargs=_template_arguments(body),
    )
    return chat, tool_choice


def _template_arguments(body: ConversationBody) -> dict[str, Any]:
    """By the names that the templates of models that think have for it."""
    arguments: dict[str, Any] = {}
    if body.thinking is not None:
        thinks = body.thinking.type != "disabled"
        if thinks and body.thinking.type == "enabled" and body.thinking.budget_tokens is None:
            where = "thinking.budget_tokens"
            raise BadParameter(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
        if body.thinking.type != "enabled" and body.thinking.budget_tokens is not None:
            where = "thinking.budget_tokens"
            raise BadParameter(f"'{where}' belongs to the type 'enabled'.", where, "invalid_value")
        arguments = {"enable_thinking": thinks, "thinking": thinks}
        if body.thinking.budget_tokens is not None:
            arguments["thinking_budget"] = body.thinking.budget_tokens
    effort = None if body.output_config is None else body.output_config.effort
    if effort is not None:
        arguments["reasoning_effort"] = EFFORTS.get(effort, effort)
    return arguments


# Messages


def _messages(given: list[MessageParam]) -> list[Message]:
    """Messages of one role that follow each other are one turn, as Anthropic has it."""
    if not given:
        raise BadParameter("Invalid 'messages': empty array. Expected an array with minimum length 1.", "messages", "empty_array")
    messages: list[Message] = []
    open_calls: dict[str, str] = {}
    last = len(given) - 1
    for role, turn in groupby(enumerate(given), key=lambda each: each[1].role):
        together = list(turn)
        where = f"messages[{together[0][0]}]"
        blocks = [placed for number, message in together for placed in _blocks(message, f"messages[{number}]")]
        if not blocks and not (role == "assistant" and together[-1][0] == last):
            message = f"Invalid '{where}.content': it must not be empty, but for that of a last message of the assistant."
            raise BadParameter(message, f"{where}.content", "invalid_value")
        if role == "user":
            messages += _of_user(blocks, open_calls)
        if open_calls:
            ids = ", ".join(repr(id[:64]) for id in open_calls)
            message = f"Invalid '{where}': the 'tool_use' before it needs a 'tool_result' here: {ids}."
            raise BadParameter(message, where, "invalid_value")
        if role == "assistant":
            messages.append(_of_assistant(blocks, open_calls))
        elif role == "system":
            messages.append(Message(role="system", content="\n".join(_only_text(placed) for placed in blocks)))
    return messages


def _blocks(message: MessageParam, where: str) -> Iterator[Placed]:
    if isinstance(message.content, str):
        if message.content:
            yield f"{where}.content", TextParam(text=message.content)
        return
    for number, block in enumerate(message.content):
        yield f"{where}.content[{number}]", block


def _of_user(blocks: list[Placed], open_calls: dict[str, str]) -> Iterator[Message]:
    """The results of tools, and the texts between them, in their order. Takes the calls out that are answered."""
    texts: list[str] = []
    for where, block in blocks:
        if not isinstance(block, ToolResultParam):
            texts.append(_only_text((where, block)))
            continue
        name = open_calls.pop(block.tool_use_id, None)
        if name is None:
            place = f"{where}.tool_use_id"
            message = f"Invalid value for '{place}': no 'tool_use' of the message before has the id {block.tool_use_id[:64]!r}."
            raise BadParameter(message, place, "invalid_value")
        if texts:
            yield Message(role="user", content="\n".join(texts))
            texts = []
        content = _text(block.content or "", f"{where}.content")
        yield Message(role="tool", content=FAILED * bool(block.is_error) + content, tool_call_id=block.tool_use_id, name=name)
    if texts:
        yield Message(role="user", content="\n".join(texts))


def _of_assistant(blocks: list[Placed], open_calls: dict[str, str]) -> Message:
    texts, thoughts, calls = [], [], []
    for where, block in blocks:
        match block:
            case ThinkingParam():
                thoughts.append(block.thinking)
            case RedactedThinkingParam():
                pass
            case ToolUseParam():
                if block.id in open_calls:
                    message = f"Invalid value for '{where}.id': another 'tool_use' has the id {block.id[:64]!r} too."
                    raise BadParameter(message, f"{where}.id", "invalid_value")
                open_calls[block.id] = block.name
                calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}})
            case _:
                texts.append(_only_text((where, block)))
    content = "\n".join(texts)
    return Message(
        role="assistant",
        content=None if calls and not content else content,
        reasoning="\n".join(filter(None, thoughts)) or None,
        tool_calls=calls or None,
    )


def _text(content: str | list[Any], where: str = "system") -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_only_text((f"{where}[{number}]", block)) for number, block in enumerate(content))


def _only_text(placed: Placed) -> str:
    where, block = placed
    if isinstance(block, TextParam):
        return block.text
    kind = block.__struct_config__.tag
    if isinstance(block, OtherParam):
        message = f"Invalid value for '{where}.type': this model reads text only, not {kind!r}."
    else:
        message = f"Invalid value for '{where}.type': a block of the type {kind!r} cannot stand in a message of this role."
    raise BadParameter(message, f"{where}.type", "invalid_value")


# Tools


def _tools(body: ConversationBody) -> tuple[list[dict[str, Any]], ToolChoice]:
    tools = [_tool(given, f"tools[{number}]") for number, given in enumerate(body.tools or ())]
    choice, parallel = _choice(body.tool_choice)
    try:
        return tools_of(tools, choice, parallel)
    except BadParameter as error:
        message, parameter = (_in_our_words(text) for text in (error.message, error.param or ""))
        raise BadParameter(message, parameter, error.code) from None


def _tool(given: Any, where: str) -> dict[str, Any]:
    try:
        kind = msgspec.convert(given, ServerTool).type
        if kind not in (None, "custom"):
            message = f"Invalid value for '{where}.type': {kind[:64]!r} is Anthropic's own tool; this server knows only those that have an 'input_schema'."
            raise BadParameter(message, f"{where}.type", "invalid_value")
        tool = msgspec.convert(given, ToolParam)
    except msgspec.ValidationError as error:
        raise explained(str(error), ToolParam, where) from None
    description = tool.description
    if tool.input_examples:
        shown = "\n".join(msgspec.json.encode(each).decode() for each in tool.input_examples)
        description = f"{description or ''}\n\nExamples of its input:\n{shown}".strip()
    function = {"name": tool.name, "description": description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(given: ToolChoiceParam | None) -> tuple[Any, bool | None]:
    """(OpenAI's `tool_choice`, whether several calls may be in one answer)."""
    if given is None:
        return None, None
    if (given.name is None) == (given.type == "tool"):
        message = "'tool_choice.name' goes with the type 'tool', and with no other."
        raise BadParameter(message, "tool_choice.name", "invalid_value")
    choice = {"type": "function", "function": {"name": given.name}} if given.type == "tool" else CHOICES[given.type]
    return choice, None if given.disable_parallel_tool_use is None else not given.disable_parallel_tool_use


def _in_our_words(text: str) -> str:
    """The names of OpenAI's fields as Anthropic's."""
    return text.replace(".function.parameters", ".input_schema").replace(".function.name", ".name")
