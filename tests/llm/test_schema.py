"""Which JSON schemas become grammars, and how the others are told their place."""

import pytest

from fairlead.core.errors import InvalidRequest
from fairlead.llm.schema import MAX_DEPTH, MAX_OPTIONAL, BadSchema, cleaned, written_size


def test_what_only_describes_is_left_out():
    schema = {"title": "T", "type": "object", "properties": {"a": {"type": "string", "description": "d", "examples": ["x"], "x-ui": 1}}}
    assert cleaned(schema) == {"type": "object", "properties": {"a": {"type": "string"}}}


def test_properties_may_have_the_names_of_keywords():
    schema = {"type": "object", "properties": {"not": {"type": "string"}, "title": True, "$ref": {}}, "required": ["not"]}
    assert cleaned(schema) == schema


def test_items_of_older_drafts_are_those_of_the_new():
    schema = {"type": "array", "items": [{"type": "string"}], "additionalItems": False}
    assert cleaned(schema) == {"type": "array", "prefixItems": [{"type": "string"}], "items": False}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"properties": {"a/b": {"unevaluatedItems": False}}}, "/properties/a~1b/unevaluatedItems"),
        ({"anyOf": [True, {"not": {}}]}, "/anyOf/1/not"),
        ({"$defs": {"a": {"uniqueItems": True}}}, "/$defs/a/uniqueItems"),
        ({"items": {"propertyNames": {}}}, "/items/propertyNames"),
        ({"x-guidance": {"lenient": True}}, "/x-guidance"),
        ({"type": "text"}, "/type"),
        ({"type": "string", "format": "idn-email"}, "/format"),
        ({"type": "string", "minLength": -1}, "/minLength"),
        ({"type": "object", "minProperties": 2}, "/minProperties"),
        ({"properties": []}, "/properties"),
        ({"anyOf": []}, "/anyOf"),
        ({"enum": []}, "/enum"),
        ({"enum": [1, "x" * 10_000]}, "/enum/1"),
        ({"const": 1 << 60}, "/const"),
        ({"multipleOf": 0}, "/multipleOf"),
        ({"multipleOf": 1_000_003}, "/multipleOf"),
        ({"properties": {"a": {"multipleOf": 101}, "b": {"multipleOf": 103}}}, "/properties/b/multipleOf"),
        ({"pattern": "a{100000}"}, "/pattern"),
        ({"$ref": "#/$defs/a"}, "/$ref"),
        ({"$ref": "https://example.com/schema"}, "/$ref"),
        ({"default": {"type": "string"}, "$ref": "#/default"}, "/$ref"),
        ({"items": {"$id": "https://example.com"}}, "/items/$id"),
        ({"items": 5}, "/items"),
        ({"properties": {str(number): {} for number in range(MAX_OPTIONAL + 1)}}, "/properties"),
        (nested(MAX_DEPTH + 1), ""),
        ([], ""),
    ],
)
def test_what_cannot_be_promised_is_refused_with_its_place(schema, pointer):
    with pytest.raises(BadSchema) as caught:
        cleaned(schema)
    assert caught.value.pointer == pointer and caught.value.message.startswith(f"{pointer or '/'}: ")


def test_a_schema_may_refer_to_itself():
    schema = {"type": "object", "properties": {"next": {"$ref": "#"}, "a": {"$ref": "#/properties/next"}}}
    assert cleaned(schema) == schema


@pytest.mark.parametrize(
    "pattern",
    [
        "a{2000}",
        "(ab{3}){100}",
        r"\{99999\}",
        "[{99999}]+",
        "(a{100})(b{1000})",
        "a{,5}",
        "x~5",
        "(?:a|b|cde){1,10000}",
        r'(?:[[^\n]&&[^"]]|\\["n]){0,9999}',
    ],
)
def test_patterns_may_repeat(pattern):
    written_size(pattern)


@pytest.mark.parametrize(
    "pattern", ["a{10001}", "(a{1000}){1000}", "((a{99}){99}){99}", "(a|(b{9000})c){0,10}", "a~20000", "x{5,99999}", "(one hundred){9999}"]
)
def test_patterns_that_count_too_far_are_refused(pattern):
    with pytest.raises(InvalidRequest, match="repeats too much"):
        written_size(pattern)
