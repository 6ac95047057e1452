"""What an answer must look like: OpenAI's `response_format` and vLLM's `structured_outputs`, as a Guide."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from fairlead.api.openai.errors import BadParameter
from fairlead.core.generation import MAX_GUIDE_BYTES, Guide, GuideKind

Text = Annotated[str, Meta(min_length=1)]


class JsonSchemaFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """`strict` changes nothing: every answer follows its schema."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: Any
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema: Any = None
    """Beside `json_object`, as llama.cpp has it."""


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of them."""

    json: Any = None
    """A JSON schema, also as text."""
    regex: Text | None = None
    choice: Annotated[list[Text], Meta(min_length=1)] | None = None
    grammar: Text | None = None
    """Of llguidance's Lark dialect."""


def guide_of(response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None) -> Guide | None:
    """What a request asks for; None: any text. Raises BadParameter."""
    guide = None if response_format is None else _of_format(response_format)
    if structured_outputs is None:
        return guide
    if guide is not None:
        message = "'response_format' and 'structured_outputs' both say what the answer looks like: give one of them."
        raise BadParameter(message, "structured_outputs", "invalid_value")
    return _of_outputs(structured_outputs)


def guide_of_schema(schema: Any, parameter: str) -> Guide:
    """`parameter`: where the request has it, for errors. Raises BadParameter."""
    if schema is None:
        raise BadParameter(f"Missing required parameter: '{parameter}'.", parameter, "missing_required_parameter")
    if not isinstance(schema, dict):
        raise BadParameter(f"Invalid type for '{parameter}': expected a JSON schema, which is an object.", parameter, "invalid_type")
    try:
        text = msgspec.json.encode(schema).decode()
    except RecursionError:
        raise BadParameter(f"Invalid value for '{parameter}': it is nested too deeply.", parameter, "invalid_value") from None
    return _guide("json", text, parameter)


def _of_format(given: ResponseFormat) -> Guide | None:
    if given.json_schema is not None and given.type != "json_schema":
        message = f"'response_format.json_schema' belongs to the type 'json_schema', not to {given.type!r}."
        raise BadParameter(message, "response_format.json_schema", "invalid_value")
    if given.schema is not None and given.type != "json_object":
        message = f"'response_format.schema' belongs to the type 'json_object', not to {given.type!r}."
        raise BadParameter(message, "response_format.schema", "invalid_value")
    if given.type == "text":
        return None
    if given.type == "json_schema":
        if given.json_schema is None:
            where = "response_format.json_schema"
            raise BadParameter(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
        return guide_of_schema(given.json_schema.schema, "response_format.json_schema.schema")
    if given.schema is not None:
        return guide_of_schema(given.schema, "response_format.schema")
    return guide_of_schema({"type": "object"}, "response_format")


def _of_outputs(given: StructuredOutputs) -> Guide:
    names = [name for name in given.__struct_fields__ if getattr(given, name) is not None]
    if len(names) != 1:
        had = " and ".join(map(repr, names)) or "nothing"
        message = (
            f"Invalid value for 'structured_outputs': expected exactly one of {', '.join(map(repr, given.__struct_fields__))}, got {had}."
        )
        raise BadParameter(message, "structured_outputs", "invalid_value")
    parameter = f"structured_outputs.{names[0]}"
    if given.choice is not None:
        return _guide("choice", msgspec.json.encode(given.choice).decode(), parameter)
    if given.regex is not None:
        return _guide("regex", given.regex, parameter)
    if given.grammar is not None:
        return _guide("lark", given.grammar, parameter)
    if isinstance(given.json, str):
        try:
            return guide_of_schema(msgspec.json.decode(given.json), parameter)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadParameter(f"Invalid value for '{parameter}': it is not valid JSON: {error}.", parameter, "invalid_value") from None
    return guide_of_schema(given.json, parameter)


def _guide(kind: GuideKind, text: str, parameter: str) -> Guide:
    if (size := len(text.encode())) > MAX_GUIDE_BYTES:
        message = f"Invalid value for '{parameter}': it has {size} bytes, and at most {MAX_GUIDE_BYTES} are allowed."
        raise BadParameter(message, parameter, "string_above_max_length")
    return Guide(kind=kind, text=text, parameter=parameter)
