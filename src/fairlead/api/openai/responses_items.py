"""Items of the Responses API: as they come in, as they are kept, and as the messages of a chat.

An item is kept as it came, whatever else it holds, so that it comes back whole; what the model is shown of it is read here. Item types that
it would be shown nothing of are refused.
"""

import base64
import binascii
import zlib
from collections.abc import Callable, Iterable, Mapping
from secrets import token_hex
from typing import Any

import msgspec

from fairlead.api.openai.errors import BadParameter
from fairlead.api.openai.responses_tools import arguments_of, joined
from fairlead.core.generation import Message

Item = dict[str, Any]

PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "additional_tools": "at",
}
"""By type: how ids begin."""
REFERENCE = "item_reference"
ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
MAX_SEALED_BYTES = 16 << 20
"""Of all sealed reasoning of a request, unpacked: a few bytes can stand for very many."""
SEAL = "fairlead1."
MAX_ID_CHARS = 256


def new_id(prefix: str) -> str:
    return f"{prefix}_{token_hex(25)}"


def items_of(given: str | list[Any]) -> list[Item]:
    """With ids, and each content as a list of parts. References are left as they are. Raises BadParameter."""
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": given}]
    if not given:
        raise BadParameter("Invalid 'input': empty array. Expected an array with minimum length 1.", "input", "empty_array")
    return [_item(item, f"input[{number}]") for number, item in enumerate(given)]


def _item(given: Any, where: str) -> Item:
    if not isinstance(given, dict):
        raise BadParameter(f"Invalid type for '{where}': expected an object.", where, "invalid_type")
    kind = given.get("type")
    if kind is None:
        kind = "message" if "role" in given else REFERENCE if "id" in given else None
    if kind == REFERENCE:
        return {"type": REFERENCE, "id": _text_at(given, "id", where)}
    if not isinstance(kind, str) or kind not in PREFIXES:
        supported = ", ".join(map(repr, (*PREFIXES, REFERENCE)))
        message = f"Invalid value for '{where}.type': {str(kind)[:64]!r}. Supported values are: {supported}."
        raise BadParameter(message, f"{where}.type", "invalid_value")
    item = {**given, "type": kind}
    if item.get("id") is None:
        item["id"] = new_id(PREFIXES[kind])
    else:
        id = _text_at(item, "id", where)
        if len(id) > MAX_ID_CHARS:
            raise BadParameter(f"Invalid '{where}.id': at most {MAX_ID_CHARS} characters.", f"{where}.id", "string_above_max_length")
    if kind == "message":
        if item.get("role") not in ROLES:
            supported = ", ".join(map(repr, ROLES))
            message = f"Invalid value for '{where}.role': {str(item.get('role'))[:64]!r}. Supported values are: {supported}."
            raise BadParameter(message, f"{where}.role", "invalid_value")
        item.setdefault("status", "completed")
        item["content"] = _parts(item.get("content"), item["role"], where)
    return item


def _parts(content: Any, role: str, where: str) -> Any:
    if not isinstance(content, str):
        return content
    if role == "assistant":
        return [{"type": "output_text", "text": content, "annotations": []}]
    return [{"type": "input_text", "text": content}]


def resolved(items: list[Item], found: Mapping[str, Item]) -> list[Item]:
    """With what references stand for. Raises BadParameter."""
    referred: set[str] = set()
    for number, item in enumerate(items):
        if item["type"] == REFERENCE and item["id"] in referred:  # a short request could come to any number of long texts
            message = f"Duplicate item found with id '{item['id'][:128]}'. Remove duplicate items from your input and try again."
            raise BadParameter(message, f"input[{number}].id", "invalid_value")
        if item["type"] == REFERENCE:
            referred.add(item["id"])
        if item["type"] == REFERENCE and item["id"] not in found:
            message = (
                f"Item with id '{item['id'][:128]}' not found. Items are not kept where `store` is false: "
                "store the answer that it is of, or send the item itself."
            )
            raise BadParameter(message, f"input[{number}].id", "item_not_found")
    return [found[item["id"]] if item["type"] == REFERENCE else item for item in items]


class Conversation:
    """Items as the messages of a chat, one after the other.

    What instructions, system and developer messages say stands in one system message at the head: most chat templates refuse another place.
    Reasoning, text and calls that follow each other are one message of the assistant.
    """

    def __init__(self, instructions: str | None = None) -> None:
        self.tools: list[tuple[str, Any]] = []
        """Offered by items: (where, tool)."""
        self._rules = [instructions] if instructions else []
        self._messages: list[Message] = []
        self._calls: dict[str, str] = {}
        """Id of a call -> name of its tool."""
        self._said: list[str] = []
        self._thought: list[str] = []
        self._called: list[dict[str, Any]] = []
        self._sealed_room = MAX_SEALED_BYTES
        self._readers: dict[str, Callable[[Item, str], None]] = {
            "message": self._message,
            "reasoning": self._reasoning,
            "function_call": self._call,
            "custom_tool_call": self._call,
            "function_call_output": self._output,
            "custom_tool_call_output": self._output,
            "additional_tools": self._tools,
        }

    def add(self, items: Iterable[Item], where: str = "input") -> None:
        """Raises BadParameter."""
        for number, item in enumerate(items):
            self._readers[item["type"]](item, f"{where}[{number}]")

    def messages(self) -> list[Message]:
        self._turn()
        head = [Message(role="system", content="\n\n".join(self._rules))] if self._rules else []
        return [*head, *self._messages]

    def _message(self, item: Item, where: str) -> None:
        text = text_of(item.get("content"), f"{where}.content")
        role = item["role"]
        if role in ("system", "developer"):
            self._rules.append(text)
        elif role == "user":
            self._turn()
            self._messages.append(Message(role="user", content=text))
        else:
            if self._called or self._said:
                self._turn()
            self._said.append(text)

    def _reasoning(self, item: Item, where: str) -> None:
        if self._said or self._called:
            self._turn()
        self._thought.append(self._thought_of(item, where))

    def _thought_of(self, item: Item, where: str) -> str:
        """As it was told, else as it was sealed; a summary of another server's where there is nothing else."""
        if content := item.get("content"):
            return text_of(content, f"{where}.content")
        if item.get("encrypted_content") is not None:
            text = unsealed(_text_at(item, "encrypted_content", where), f"{where}.encrypted_content", self._sealed_room)
            self._sealed_room -= len(text.encode())
            return text
        return text_of(item.get("summary") or "", f"{where}.summary")

    def _call(self, item: Item, where: str) -> None:
        call_id, own = _text_at(item, "call_id", where), _text_at(item, "name", where)
        space = item.get("namespace")
        name = joined(space if isinstance(space, str) else "", own)
        custom = item["type"] == "custom_tool_call"
        arguments = arguments_of(_text_at(item, "input", where)) if custom else _arguments(_text_at(item, "arguments", where))
        self._calls[call_id] = name
        self._called.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def _output(self, item: Item, where: str) -> None:
        call_id = _text_at(item, "call_id", where)
        name = self._calls.get(call_id)
        if name is None:
            message = f"No tool call found for function call output with call_id {call_id[:128]}."
            raise BadParameter(message, f"{where}.call_id", "invalid_value")
        self._turn()
        text = text_of(item.get("output"), f"{where}.output")
        self._messages.append(Message(role="tool", content=text, tool_call_id=call_id, name=name))

    def _tools(self, item: Item, where: str) -> None:
        tools = item.get("tools")
        if not isinstance(tools, list):
            raise BadParameter(f"Invalid type for '{where}.tools': expected an array.", f"{where}.tools", "invalid_type")
        self.tools += [(f"{where}.tools[{number}]", tool) for number, tool in enumerate(tools)]

    def _turn(self) -> None:
        """What the assistant has said so far is a message."""
        if self._said or self._thought or self._called:
            content = "".join(self._said)
            if content or self._called or "".join(self._thought):
                self._messages.append(
                    Message(
                        role="assistant",
                        content=content,
                        reasoning="\n".join(self._thought) or None,
                        tool_calls=list(self._called) or None,
                    )
                )
        self._said, self._thought, self._called = [], [], []


def text_of(content: Any, where: str) -> str:
    """Of a content: a text, or parts that are texts. Raises BadParameter."""
    if isinstance(content, str):
        return content
    if content is None:
        raise BadParameter(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
    if not isinstance(content, list):
        raise BadParameter(f"Invalid type for '{where}': expected a string or an array of parts.", where, "invalid_type")
    return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXTS:
        return _text_at(part, "text", where)
    if kind == "refusal":
        return _text_at(part, "refusal", where)
    place = f"{where}.type"
    if isinstance(kind, str) and kind.startswith("input_"):
        raise BadParameter(f"Invalid value for '{place}': models here read text only, not {kind[:64]!r}.", place, "unsupported_value")
    supported = "'input_text', 'output_text' and 'refusal'"
    raise BadParameter(f"Invalid value for '{place}': {str(kind)[:64]!r}. Supported values are: {supported}.", place, "invalid_value")


def _arguments(text: str) -> str:
    """What a model wrote that is no JSON object is shown to it as a text: chat templates want an object."""
    try:
        whole = isinstance(msgspec.json.decode(text or "{}"), dict)
    except (msgspec.DecodeError, RecursionError):
        whole = False
    return text if whole else arguments_of(text)


def _text_at(given: Mapping[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    place = f"{where}.{name}"
    if value is None:
        raise BadParameter(f"Missing required parameter: '{place}'.", place, "missing_required_parameter")
    if not isinstance(value, str):
        raise BadParameter(f"Invalid type for '{place}': expected a string.", place, "invalid_type")
    return value


# Reasoning


def sealed(text: str) -> str:
    """`encrypted_content`: the reasoning for clients that keep nothing else of it. It hides nothing: the same text is in the item's `content`."""
    return SEAL + base64.urlsafe_b64encode(zlib.compress(text.encode(errors="replace"))).decode()


def unsealed(token: str, where: str, most: int = MAX_SEALED_BYTES) -> str:
    """At most so many bytes. Raises BadParameter."""
    foreign = BadParameter(
        f"The encrypted content of '{where}' could not be read: it is not of this server. Leave it out, or send the item's `content`.",
        where,
        "invalid_encrypted_content",
    )
    if not token.startswith(SEAL):
        raise foreign
    try:
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(base64.urlsafe_b64decode(token[len(SEAL) :]), most + 1)  # 0: no bound
        if len(data) > most:
            message = f"Invalid '{where}': the reasoning that is sealed in a request has at most {MAX_SEALED_BYTES} bytes."
            raise BadParameter(message, where, "string_above_max_length")
        if not unpacking.eof:
            raise foreign
        return data.decode()
    except (binascii.Error, zlib.error, ValueError):
        raise foreign from None


def packed(items: list[Item]) -> bytes:
    return msgspec.json.encode(items)


def unpacked(data: bytes) -> list[Item]:
    return msgspec.json.decode(data, type=list[Item])
