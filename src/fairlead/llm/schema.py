"""JSON schemas as grammars take them: every keyword is one that the answer will follow, or the schema is refused with the place where
it stands. What only describes is taken out."""

import re
from collections.abc import Iterator
from fractions import Fraction
from math import gcd, isfinite, lcm
from typing import Any

from fairlead.core.errors import InvalidRequest

MAX_DEPTH = 64
"""Of schemas within schemas."""
MAX_SCHEMAS = 20_000
MAX_OPTIONAL = 256
"""Properties of one object that may be left out: any of them may come next."""
MAX_LITERAL_CHARS = 8192
MAX_REPEATS = 10_000
"""In a pattern: an automaton counts them one by one."""
MAX_WRITTEN = 50_000
"""Bytes of a pattern or of a grammar's terminals, with what they repeat written out: some 0.1 s and 30 MB where all of it is forced."""
MAX_MULTIPLE = 10_000
"""Of the least number that every `multipleOf` of a schema divides, in units of their last digit: an automaton has that many states."""
MAX_COUNT = 1 << 31
EXACT = 1 << 53
"""Numbers up to it are themselves as 64-bit floats."""

ANNOTATIONS = frozenset(
    (
        "$anchor",
        "$comment",
        "$id",
        "$schema",
        "contentEncoding",
        "contentMediaType",
        "default",
        "deprecated",
        "description",
        "discriminator",
        "example",
        "examples",
        "id",
        "readOnly",
        "title",
        "writeOnly",
    )
)
"""They say something of an answer and demand nothing."""
ONE = ("additionalItems", "additionalProperties", "items")
SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems")
NAMED = ("$defs", "definitions", "patternProperties", "properties")
COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
NUMBERS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf")
VALUES = ("$ref", "const", "enum", "format", "pattern", "required", "type")
SUPPORTED = frozenset((*ONE, *SEVERAL, *NAMED, *COUNTS, *NUMBERS, *VALUES))
TYPES = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))
FORMATS = frozenset(("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"))

_PIECE = re.compile(
    r"(?P<one>\\.|\[\^?\]?(?:\\.|\[(?:\\.|[^\]\\])*\]|[^\[\]\\])*\])|(?P<bracket>\((?:\?:)?|\))|(?P<repeat>\{\s*\d*\s*,?\s*\d*\s*\}|~\s*\d+(?:\s*\.\.\s*\d+)?)|[|*+?]+|(?P<plain>[^\\\[(){~|*+?]+|.)",
    re.DOTALL,
)


class BadSchema(InvalidRequest):
    """`pointer` tells where in the schema."""

    def __init__(self, pointer: str, what: str) -> None:
        super().__init__(f"{pointer or '/'}: {what}")
        self.pointer = pointer
        self.what = what


def cleaned(schema: Any) -> Any:
    """What of a schema its grammar is made of. Raises BadSchema."""
    walk = _Walk()
    clean = walk.schema(schema, "", 0)
    for pointer, target in walk.references:
        if target not in walk.seen:
            raise BadSchema(pointer, f"`$ref` must be '#' or the pointer of a schema in this one, not {target[:100]!r}")
    _check_multiples(walk.multiples)
    return clean


class Written:
    """How long something is with all that it repeats written out. Every step of it raises InvalidRequest where that is too much."""

    def __init__(self) -> None:
        self.size = 0
        """Of what is in the brackets so far."""
        self._last = 0
        """Of the part that a count would repeat."""
        self._outer: list[int] = []

    def add(self, size: int, last: int) -> None:
        self.size, self._last = self.size + size, last
        if self.size > MAX_WRITTEN:
            raise InvalidRequest(f"written out it is too large: it has more than {MAX_WRITTEN} bytes")

    def bracket(self, sign: str) -> None:
        if sign == "(":
            self._outer.append(self.size)
            self.size = self._last = 0
        else:
            inner = self.size
            self.size = self._outer.pop() if self._outer else 0
            self.add(inner, inner)

    def repeat(self, text: str) -> None:
        most = max((int(number[:9]) for number in re.findall(r"\d+", text)), default=1)
        size = self.size + self._last * max(most - 1, 0)
        if most > MAX_REPEATS or size > MAX_WRITTEN:
            raise InvalidRequest(f"{text[:40]} repeats too much: at most {MAX_REPEATS} times, and {MAX_WRITTEN} bytes written out")
        self.size, self._last = size, self._last * max(most, 1)

    @property
    def total(self) -> int:
        return self.size + sum(self._outer)


def written_size(pattern: str) -> int:
    """Of a regular expression. Raises InvalidRequest where it repeats too much."""
    written = Written()
    for found in _PIECE.finditer(pattern):
        piece = found[0]
        match found.lastgroup:
            case "bracket":
                written.bracket(piece[0])
            case "repeat":
                written.repeat(piece)
            case "one":
                written.add(1, 1)
            case "plain":
                written.add(len(piece.encode()), len(piece[-1].encode()))
    return written.total


def pointer_to(pointer: str, name: str | int) -> str:
    return f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}"


class _Walk:
    """One pass over a schema."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        """Pointers of the schemas in it."""
        self.references: list[tuple[str, str]] = []
        """(where, pointer that is referred to)."""
        self.multiples: list[tuple[str, Fraction]] = []

    def schema(self, schema: Any, at: str, depth: int) -> Any:
        if len(self.seen) >= MAX_SCHEMAS:
            raise BadSchema(at, f"a schema may hold at most {MAX_SCHEMAS} others")
        if depth > MAX_DEPTH:
            raise BadSchema("", f"schemas may be nested at most {MAX_DEPTH} deep")
        self.seen.add(at)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise BadSchema(at, "a schema must be an object or a boolean")
        if at and ("$id" in schema or "$schema" in schema):
            raise BadSchema(pointer_to(at, "$id" if "$id" in schema else "$schema"), "only the outermost schema may have it")
        clean: dict[str, Any] = {}
        for name, value in schema.items():
            if name in SUPPORTED:
                clean[name] = self.value(name, value, pointer_to(at, name), depth)
            elif name not in ANNOTATIONS and (not name.startswith("x-") or name == "x-guidance"):
                raise BadSchema(pointer_to(at, name), f"the keyword `{name[:100]}` is not supported")
        _items_of_older_drafts(clean, at)
        _check_object(clean, at)
        return clean

    def value(self, name: str, value: Any, at: str, depth: int) -> Any:
        if name in NAMED:
            if not isinstance(value, dict):
                raise BadSchema(at, "expected an object of schemas")
            for key in value:
                _check_text(key, at)
                if name == "patternProperties":
                    _check_pattern(key, at)
            return {key: self.schema(each, pointer_to(at, key), depth + 1) for key, each in value.items()}
        if name in SEVERAL or (name == "items" and isinstance(value, list)):
            if not isinstance(value, list) or (not value and name != "items"):
                raise BadSchema(at, "expected an array of schemas")
            return [self.schema(each, pointer_to(at, number), depth + 1) for number, each in enumerate(value)]
        if name in ONE:
            return self.schema(value, at, depth + 1)
        if name in COUNTS:
            if not _is_number(value) or value != int(value) or not 0 <= value < MAX_COUNT:
                raise BadSchema(at, f"expected a whole number from 0 to {MAX_COUNT - 1}")
            if name == "minProperties" and value > 1:
                raise BadSchema(at, "only 0 and 1 are supported: nothing keeps a name from coming twice")
            return int(value)
        if name in NUMBERS:
            _check_number(value, at)
            if name == "multipleOf":
                if not value:
                    raise BadSchema(at, "must not be 0")
                self.multiples.append((at, abs(Fraction(str(value)))))
            return value
        _check_value(name, value, at)
        if name == "$ref":
            self.references.append((at, _pointed(value)))
        return value


def _items_of_older_drafts(clean: dict[str, Any], at: str) -> None:
    """Until 2019 `items` was an array where the first ones had schemas of their own, and `additionalItems` was for the others."""
    if isinstance(clean.get("items"), list):
        if "prefixItems" in clean:
            raise BadSchema(pointer_to(at, "items"), "expected a schema beside `prefixItems`")
        first = clean.pop("items")
        if first:
            clean["prefixItems"] = first
        if "additionalItems" in clean:
            clean["items"] = clean.pop("additionalItems")
    elif "additionalItems" in clean:
        raise BadSchema(pointer_to(at, "additionalItems"), "it means something only beside an array of `items`")


def _check_object(clean: dict[str, Any], at: str) -> None:
    properties = clean.get("properties", {})
    required = clean.get("required", ())
    optional = len(properties.keys() - set(required))
    if optional > MAX_OPTIONAL:
        raise BadSchema(pointer_to(at, "properties"), f"{optional} of them are optional, and at most {MAX_OPTIONAL} may be")


def _check_value(name: str, value: Any, at: str) -> None:
    """Of what is no schema and no number. Raises BadSchema."""
    match name:
        case "const":
            _check_instance(value, at)
        case "enum":
            if not isinstance(value, list) or not value:
                raise BadSchema(at, "expected an array of values")
            for number, each in enumerate(value):
                _check_instance(each, pointer_to(at, number))
        case "type":
            for each in value if isinstance(value, list) and value else [value]:
                if not isinstance(each, str) or each not in TYPES:
                    raise BadSchema(at, f"expected one or more of {', '.join(sorted(TYPES))}")
        case "required":
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise BadSchema(at, "expected an array of names")
            for each in value:
                _check_text(each, at)
        case "format":
            if value not in FORMATS:
                raise BadSchema(at, f"the format {str(value)[:100]!r} is not supported: {', '.join(sorted(FORMATS))} are")
        case "pattern":
            if not isinstance(value, str):
                raise BadSchema(at, "expected a text")
            _check_pattern(value, at)
        case "$ref":
            if not isinstance(value, str):
                raise BadSchema(at, "expected a text")


def _check_instance(value: Any, at: str) -> None:
    """A value that an answer may have to hold. Raises BadSchema."""
    for each in _leaves(value, at, 0):
        if isinstance(each, str):
            _check_text(each, at)
        elif _is_number(each):
            _check_number(each, at)


def _leaves(value: Any, at: str, depth: int) -> Iterator[Any]:
    if depth > MAX_DEPTH:
        raise BadSchema(at, f"values may be nested at most {MAX_DEPTH} deep")
    if isinstance(value, dict):
        yield from value
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each, at, depth + 1)
    else:
        yield value


def _check_text(text: str, at: str) -> None:
    if len(text) > MAX_LITERAL_CHARS:
        raise BadSchema(at, f"a text of {len(text)} characters, and at most {MAX_LITERAL_CHARS} are allowed")


def _check_pattern(pattern: str, at: str) -> None:
    _check_text(pattern, at)
    try:
        written_size(pattern)
    except InvalidRequest as error:
        raise BadSchema(at, error.message) from None


def _check_number(value: Any, at: str) -> None:
    if not _is_number(value):
        raise BadSchema(at, "expected a number")
    if isinstance(value, int) and abs(value) > EXACT:
        raise BadSchema(at, f"whole numbers beyond {EXACT} are not supported")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _check_multiples(multiples: list[tuple[str, Fraction]]) -> None:
    together: Fraction | None = None
    unit = 1
    for at, each in multiples:
        unit = lcm(unit, each.denominator)
        if together is None:
            together = each
        else:
            together = Fraction(lcm(together.numerator, each.numerator), gcd(together.denominator, each.denominator))
        if together * unit > MAX_MULTIPLE:
            raise BadSchema(at, "`multipleOf` has too many digits, alone or together with the others of this schema")


def _pointed(reference: str) -> str:
    """The pointer in a `$ref`, in the form that `pointer_to` gives; as it is where it is none."""
    if reference in ("#", "#/"):
        return ""
    return reference[1:] if reference.startswith("#/") else reference
