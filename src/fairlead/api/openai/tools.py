"""The tools that a model may call, and which of them it shall call: checked, in the shape that chat templates want."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, structs

from fairlead.api.openai.errors import BadParameter, explained
from fairlead.core.generation import ToolChoice

T = TypeVar("T")

MAX_TOOLS = 128
MAX_DEPTH = 64
"""Of a tool's schema."""
MODES = ("none", "auto", "required")
TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
"""Of a tool that tells no schema, as OpenAI has it."""


class Function(Struct, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """The arguments follow the schema; else they are what the model writes."""


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class FunctionName(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Struct, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1)]


class AllowedChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    """All tools are shown, so that the prompt stays the same; some may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def tools_of(tools: list[Any] | None, choice: Any, parallel: bool | None, where: str = "tools") -> tuple[list[dict[str, Any]], ToolChoice]:
    """The tools that the model is shown, in OpenAI's shape, and how it chooses among them. Raises BadParameter.

    With `tool_choice: none` it is shown none.
    """
    if len(tools or ()) > MAX_TOOLS:
        raise BadParameter(f"Invalid '{where}': at most {MAX_TOOLS} tools in one request.", where, "array_above_max_length")
    plain = [_tool(tool, f"{where}[{number}]") for number, tool in enumerate(tools or ())]
    names = [tool["function"]["name"] for tool in plain]
    for number, name in enumerate(names):
        if name in names[:number]:
            place = f"{where}[{number}].function.name"
            raise BadParameter(f"Invalid value for '{place}': another tool is called {name!r} too.", place, "invalid_value")
    chosen = _choice(choice, names, where)
    return ([] if chosen.mode == "none" else plain), structs.replace(chosen, parallel=parallel is not False)


def _tool(given: Any, where: str) -> dict[str, Any]:
    function = _read(given, Tool, where).function
    if function.parameters is not None:
        check_schema(function.parameters, f"{where}.function.parameters")
    parameters = NO_ARGUMENTS if function.parameters is None else function.parameters
    plain = {"name": function.name, "description": function.description, "parameters": parameters, "strict": function.strict}
    return {"type": "function", "function": {name: value for name, value in plain.items() if value is not None}}


def _choice(given: Any, names: list[str], where: str) -> ToolChoice:
    if isinstance(given, str) and given not in MODES:
        supported = ", ".join(map(repr, MODES))
        message = (
            f"Invalid value for 'tool_choice': {given[:128]!r}. Supported values are: {supported}, or an object that names a function."
        )
        raise BadParameter(message, "tool_choice", "invalid_value")
    if given is None or given == "auto":
        return ToolChoice()
    if given == "none":
        return ToolChoice(mode="none")
    if not names:
        raise BadParameter(f"'tool_choice' is only allowed when '{where}' are specified.", "tool_choice", "invalid_value")
    if given == "required":
        return ToolChoice(mode="required")
    if isinstance(given, dict) and given.get("type") == "allowed_tools":
        some = _read(given, AllowedChoice, "tool_choice").allowed_tools
        allowed = {
            _known(each.function.name, names, where, f"tool_choice.allowed_tools.tools[{number}].function.name")
            for number, each in enumerate(some.tools)
        }
        return ToolChoice(mode=some.mode, allowed=() if allowed.issuperset(names) else tuple(name for name in names if name in allowed))
    name = _read(given, NamedTool, "tool_choice").function.name
    return ToolChoice(mode="named", name=_known(name, names, where, "tool_choice.function.name"))


def _known(name: str, names: list[str], where: str, place: str) -> str:
    """Raises BadParameter."""
    if name not in names:
        raise BadParameter(f"Invalid value for '{place}': no tool of '{where}' is called {name[:128]!r}.", place, "invalid_value")
    return name


def _read(given: Any, type_: type[T], where: str) -> T:
    try:
        return msgspec.convert(given, type_)
    except msgspec.ValidationError as error:
        raise explained(str(error), type_, where) from None


# Schemas

_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedProperties")
_NUMBERS = ("minimum", "maximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains")
_TEXTS = ("$ref", "$id", "$anchor", "title", "description", "pattern", "format")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_filled(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_KEYWORDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_OF_SCHEMAS, ("an object", lambda value: isinstance(value, dict))),
    **dict.fromkeys(_LISTS, ("an array with at least one schema", _is_filled)),
    **dict.fromkeys(_NUMBERS, ("a number", _is_number)),
    **dict.fromkeys(_COUNTS, ("a whole number of at least 0", _is_count)),
    **dict.fromkeys(_TEXTS, ("a string", lambda value: isinstance(value, str))),
    "enum": ("an array with at least one value", _is_filled),
    "required": ("an array of strings", _is_names),
}
"""What each must be: in words, and the test."""


def check_schema(schema: dict[str, Any], parameter: str) -> None:
    """That it is JSON Schema of an object, as far as its keywords' shapes go. Raises BadParameter, which tells the JSON pointer."""
    if schema.get("type", "object") != "object":
        raise _broken(parameter, "/type", f"the arguments of a tool are an object, not {schema['type']!r}")
    waiting: list[tuple[Any, str, int]] = [(schema, "", 0)]
    while waiting:
        each, at, depth = waiting.pop()
        if isinstance(each, bool):
            continue
        if not isinstance(each, dict):
            raise _broken(parameter, at, f"a schema is an object or a boolean, not {_named(each)}")
        if depth == MAX_DEPTH:
            raise _broken(parameter, at, f"it is nested more than {MAX_DEPTH} levels deep")
        wrong, inner = _wrong(each), _inner(each)
        if wrong:
            keyword, why = wrong
            raise _broken(parameter, f"{at}/{_escaped(keyword)}", why)
        waiting += [(schema, at + pointer, depth + 1) for pointer, schema in inner]


def _inner(schema: dict[str, Any]) -> list[tuple[str, Any]]:
    """The schemas within one, by pointer."""
    found = [(f"/{name}", schema[name]) for name in _SINGLE if name in schema and not isinstance(schema[name], list)]
    for name in (*_LISTS, "items"):
        if isinstance(some := schema.get(name), list):
            found += [(f"/{name}/{number}", each) for number, each in enumerate(some)]
    for name in _OF_SCHEMAS:
        if isinstance(named := schema.get(name), dict):
            found += [(f"/{name}/{_escaped(key)}", each) for key, each in named.items()]
    return found


def _wrong(schema: dict[str, Any]) -> tuple[str, str] | None:
    """(keyword, why) of one that cannot mean anything."""
    given = schema.get("type")
    for each in given if isinstance(given, list) else [given]:
        if "type" in schema and each not in TYPES:
            return "type", f"{str(each)[:64]!r} is not among {', '.join(TYPES)}"
    for name in schema.keys() & _KEYWORDS.keys():
        kind, right = _KEYWORDS[name]
        if not right(schema[name]):
            return name, f"expected {kind}, not {_named(schema[name])}"
    return None


def _named(value: Any) -> str:
    if value == [] or value == {}:
        return "an empty array" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _broken(parameter: str, pointer: str, why: str) -> BadParameter:
    return BadParameter(f"Invalid schema for '{parameter}' at '{pointer}': {why}.", parameter, "invalid_value")
