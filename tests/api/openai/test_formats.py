import msgspec
import pytest

from fairlead.api.openai.bodies import ChatBody, CompletionBody
from fairlead.api.openai.errors import BadParameter, decode_body
from fairlead.api.openai.formats import guide_of, guide_of_schema
from fairlead.core.generation import MAX_GUIDE_BYTES, Guide

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]}


def asked(**fields) -> Guide | None:
    """What a chat's body with these fields asks for; a completion's is the same."""
    chat = decode_body(msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}), ChatBody)
    completion = decode_body(msgspec.json.encode({"model": "m", "prompt": "x", **fields}), CompletionBody)
    guide = guide_of(chat.response_format, chat.structured_outputs)
    assert guide_of(completion.response_format, completion.structured_outputs) == guide
    return guide


def refused(**fields) -> tuple[str, str | None, str | None]:
    with pytest.raises(BadParameter) as caught:
        asked(**fields)
    return caught.value.message, caught.value.param, caught.value.code


def test_a_schema_goes_down_as_it_came_its_properties_in_order():
    schema = {"name": "person", "schema": PERSON, "strict": True, "description": "Somebody"}
    guide = asked(response_format={"type": "json_schema", "json_schema": schema})
    assert guide == Guide(kind="json", text=msgspec.json.encode(PERSON).decode(), parameter="response_format.json_schema.schema")
    assert list(msgspec.json.decode(guide.text)["properties"]) == ["name", "age"]


def test_any_json_object_is_a_schema_too():
    assert asked(response_format={"type": "json_object"}) == Guide(kind="json", text='{"type":"object"}', parameter="response_format")
    own = asked(response_format={"type": "json_object", "schema": PERSON})
    assert own is not None and own.parameter == "response_format.schema" and msgspec.json.decode(own.text) == PERSON


def test_text_is_no_guide():
    assert asked() is None and asked(response_format={"type": "text"}) is None and asked(response_format=None) is None


def test_vllms_structured_outputs():
    of = "structured_outputs"
    assert asked(structured_outputs={"regex": "a+"}) == Guide(kind="regex", text="a+", parameter=f"{of}.regex")
    assert asked(structured_outputs={"choice": ["yes", "no"]}) == Guide(kind="choice", text='["yes","no"]', parameter=f"{of}.choice")
    assert asked(structured_outputs={"grammar": "start: /a/"}) == Guide(kind="lark", text="start: /a/", parameter=f"{of}.grammar")
    expected = Guide(kind="json", text=msgspec.json.encode(PERSON).decode(), parameter=f"{of}.json")
    assert asked(structured_outputs={"json": PERSON}) == expected
    assert asked(structured_outputs={"json": msgspec.json.encode(PERSON).decode()}) == expected


NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        ({"response_format": {**NAMED, "type": "text"}}, "response_format.json_schema", "invalid_value"),
        ({"response_format": {"type": "text", "schema": PERSON}}, "response_format.schema", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": PERSON}}},
            "response_format.json_schema.name",
            "missing_required_parameter",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a person", "schema": PERSON}}},
            "response_format.json_schema.name",
            "invalid_value",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": [PERSON]}}},
            "response_format.json_schema.schema",
            "invalid_type",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "invalid_value"),
        ({"structured_outputs": {"json": "7"}}, "structured_outputs.json", "invalid_type"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "invalid_value"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "invalid_type"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "invalid_value"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": "a" * (MAX_GUIDE_BYTES + 1)}}, "structured_outputs.regex", "string_above_max_length"),
    ],
)
def test_a_wrong_format_is_named(fields, param, code):
    assert refused(**fields)[1:] == (param, code)


def test_a_schema_nested_ten_thousand_deep_is_refused():
    schema: dict = {}
    for _ in range(10_000):
        schema = {"items": schema}
    with pytest.raises(BadParameter, match="nested too deeply"):
        guide_of_schema(schema, "schema")


def test_a_schema_of_a_megabyte_is_refused():
    assert "at most" in refused(structured_outputs={"json": {"enum": ["x" * (1 << 20)]}})[0]
