"""Tools as the Responses API has them: functions, custom tools and namespaces of both become functions that chat templates know.

A custom tool takes a text: it is shown as a function with the one argument `input`. A tool of a namespace is shown under both names joined.
Its calls come back under the names that the client knows.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field, structs

from fairlead.api.openai.errors import BadParameter, explained
from fairlead.api.openai.tools import tools_of
from fairlead.core.generation import Guide, ToolChoice

T = TypeVar("T")

INPUT = "input"
"""The argument of a custom tool."""
JOINT = "__"


class _Function(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: tuple[Literal["direct"], ...] | None = None
    defer_loading: Literal[False] | None = None


class _Format(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class _Custom(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["custom"]
    name: str
    description: str | None = None
    format: _Format | None = None
    """A grammar is shown to the model, which is held to it."""
    allowed_callers: tuple[Literal["direct"], ...] | None = None
    defer_loading: Literal[False] | None = None


class _Namespace(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["namespace"]
    name: str
    description: str | None = None
    tools: list[Any]


class _Allowed(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[dict[str, Any]], Meta(min_length=1)]


class _Chosen(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class Known(Struct, frozen=True):
    """A tool by the names of its client."""

    name: str
    namespace: str = ""
    custom: bool = False


class Offered(Struct, kw_only=True):
    """What a request offers."""

    shown: list[dict[str, Any]] = field(default_factory=list)
    """As chat templates want them."""
    choice: ToolChoice = ToolChoice()
    known: dict[str, Known] = field(default_factory=dict)
    """By the name that the model sees."""
    told: list[dict[str, Any]] = field(default_factory=list)
    """As the answer tells of them."""


def joined(namespace: str, name: str) -> str:
    """The name that the model sees."""
    if not namespace:
        return name
    return namespace + name if namespace.endswith(JOINT) else f"{namespace}{JOINT}{name}"


def offered(
    tools: list[Any], choice: Any, parallel: bool | None, *, omit: Collection[str] = (), where: Mapping[int, str] | None = None
) -> Offered:
    """`omit`: types that are left out. `where`: of a tool by its number, if that is not `tools[number]`. Raises BadParameter."""
    reader = _Reader(omit)
    for number, tool in enumerate(tools):
        reader.read(tool, (where or {}).get(number, f"tools[{number}]"))
    choice = _chosen(choice, reader.known)
    try:
        plain, chosen = tools_of(reader.shown, choice, parallel)
    except BadParameter as error:
        raise _placed(error, reader.places) from None
    if plain:
        chosen = structs.replace(chosen, inputs=reader.inputs)
    return Offered(shown=plain, choice=chosen, known=reader.known, told=reader.told)


class _Reader:
    def __init__(self, omit: Collection[str]) -> None:
        self.omit = omit
        self.shown: list[dict[str, Any]] = []
        self.places: list[str] = []
        self.inputs: dict[str, Guide] = {}
        """Grammars of custom tools, by the name that the model sees."""
        self.known: dict[str, Known] = {}
        self.told: list[dict[str, Any]] = []

    def read(self, given: Any, where: str, within: _Namespace | None = None) -> None:
        kind = given.get("type") if isinstance(given, dict) else None
        if not isinstance(kind, str):
            raise BadParameter(f"Invalid type for '{where}': expected an object with a 'type'.", where, "invalid_type")
        if kind in self.omit:
            return
        if kind == "namespace" and within is None:
            self._namespace(_convert(given, _Namespace, where), where)
        elif kind == "function":
            self._function(_convert(given, _Function, where), where, within)
        elif kind == "custom":
            self._custom(_convert(given, _Custom, where), where, within)
        else:
            why = "this server runs no tools of its own; it knows 'function', 'custom' and 'namespace'"
            raise BadParameter(f"Unsupported tool: '{where}.type' is {kind[:64]!r}: {why}.", f"{where}.type", "unsupported_value")
        if within is None:
            self.told.append({**given, "strict": bool(given.get("strict"))} if kind == "function" else given)

    def _namespace(self, space: _Namespace, where: str) -> None:
        for number, tool in enumerate(space.tools):
            self.read(tool, f"{where}.tools[{number}]", space)

    def _function(self, function: _Function, where: str, within: _Namespace | None) -> None:
        shown = {"name": function.name, "description": function.description, "parameters": function.parameters, "strict": function.strict}
        self._add({name: value for name, value in shown.items() if value is not None}, function.name, where, within, custom=False)

    def _custom(self, tool: _Custom, where: str, within: _Namespace | None) -> None:
        described = tool.description or ""
        form = tool.format
        if form is not None and form.type == "grammar":
            for name in ("syntax", "definition"):
                if not getattr(form, name):
                    place = f"{where}.format.{name}"
                    raise BadParameter(f"Missing required parameter: '{place}'.", place, "missing_required_parameter")
            assert form.syntax is not None and form.definition is not None
            shown = joined("" if within is None else within.name, tool.name)
            self.inputs[shown] = Guide(kind=form.syntax, text=form.definition, parameter=f"{where}.format.definition")
            described = f"{described}\n\nThe input follows this {form.syntax} grammar:\n{form.definition}".strip()
        parameters = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT], "additionalProperties": False}
        self._add({"name": tool.name, "description": described, "parameters": parameters}, tool.name, where, within, custom=True)

    def _add(self, function: dict[str, Any], name: str, where: str, within: _Namespace | None, *, custom: bool) -> None:
        space = "" if within is None else within.name
        if within is not None and within.description:
            function["description"] = f"{within.description}\n\n{function.get('description', '')}".strip()
        function["name"] = joined(space, name)
        if function["name"] in self.known:
            message = f"Invalid value for '{where}.name': another tool is called {function['name'][:128]!r} too."
            raise BadParameter(message, f"{where}.name", "invalid_value")
        self.known[function["name"]] = Known(name, space, custom)
        self.shown.append({"type": "function", "function": function})
        self.places.append(where)


def _chosen(choice: Any, known: Mapping[str, Known]) -> Any:
    """As chats have it."""
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "allowed_tools":
        allowed = _convert(choice, _Allowed, "tool_choice")
        named = [_function(_name_of(each, known, f"tool_choice.tools[{number}]")) for number, each in enumerate(allowed.tools)]
        return {"type": kind, kind: {"mode": allowed.mode, "tools": named}}
    if kind not in ("function", "custom"):
        message = (
            f"Unsupported value for 'tool_choice.type': {str(kind)[:64]!r}. Supported values are: 'function', 'custom' and 'allowed_tools'."
        )
        raise BadParameter(message, "tool_choice.type", "unsupported_value")
    return _function(_name_of(choice, known, "tool_choice"))


def _function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _name_of(given: dict[str, Any], known: Mapping[str, Known], where: str) -> str:
    """The name that the model sees."""
    tool = _convert(given, _Chosen, where)
    name = joined(tool.namespace or "", tool.name)
    if name not in known or known[name].custom != (tool.type == "custom"):
        raise BadParameter(f"Tool choice '{tool.name[:128]}' not found in 'tools' parameter.", f"{where}.name", "invalid_value")
    return name


def _convert(given: Any, type_: type[T], where: str) -> T:
    try:
        return msgspec.convert(given, type_)
    except msgspec.ValidationError as error:
        raise explained(str(error), type_, where) from None


def _placed(error: BadParameter, places: list[str]) -> BadParameter:
    """Where a client of this protocol has what chats have at `tools[number].function`."""
    for number in range(len(places) - 1, -1, -1):
        at = f"tools[{number}].function"
        if error.param is not None and (error.param == at or error.param.startswith(f"{at}.")):
            return BadParameter(error.message.replace(at, places[number]), error.param.replace(at, places[number]), error.code)
    return error


# Calls


def call_item(known: Known, id: str, call_id: str, arguments: str, status: str) -> dict[str, Any]:
    """As the client knows its tool."""
    space = {"namespace": known.namespace} if known.namespace else {}
    if known.custom:
        return {
            "id": id,
            "type": "custom_tool_call",
            "status": status,
            "call_id": call_id,
            "name": known.name,
            **space,
            "input": input_of(arguments),
        }
    return {"id": id, "type": "function_call", "status": status, "call_id": call_id, "name": known.name, **space, "arguments": arguments}


def input_of(arguments: str) -> str:
    """The text that a custom tool is called with; what is no call of it, as it is."""
    try:
        read = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return read[INPUT] if isinstance(read, dict) and isinstance(read.get(INPUT), str) else arguments


def arguments_of(given: str) -> str:
    """The other way round."""
    return msgspec.json.encode({INPUT: given}).decode()
