"""Readers of what stands between the anchors of tool calls: names and arguments as they come."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from fairlead.core.generation import ToolCall
from fairlead.llm.parsing.scanner import Event, JsonScanner
from fairlead.llm.parsing.template import CallShape, Region

Schemas = Mapping[str, Mapping[str, Any]]
"""Of the arguments of each tool, by its name."""


class Numbers:
    """Of the calls of one answer: each has an index, and an id that no other answer's call has."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.count = 0

    def next(self, name: str) -> ToolCall:
        call = ToolCall(index=self.count, id=f"{self.prefix}{self.count}", name=name)
        self.count += 1
        return call


class Reader(Protocol):
    """Of one region."""

    done: bool
    """It reads no more: what comes is the close, or nothing that belongs to a call."""
    began: bool
    """A call has gone out; before that the region may still turn out to be text."""

    def push(self, text: str) -> tuple[int, list[ToolCall]]:
        """How much of the text it took, and the pieces of calls in that."""

    def finish(self, *, cut: bool) -> list[ToolCall]:
        """The region is over. `cut`: in the middle, because the answer may not be longer."""


def reader_of(region: Region, captures: Mapping[str, str], numbers: Numbers, tools: Schemas, *, known: bool) -> Reader:
    """`captures`: groups of the opening anchor; `known`: a call counts only if it is of one of the tools."""
    assert region.calls is not None
    match region.calls.reader:
        case "json":
            return JsonCalls(region.calls, captures, numbers, tools if known else None)
        case "tags":
            return TagCalls(region.calls, captures, numbers, tools)
        case _:
            return WholeCalls(region, captures, numbers)


class JsonCalls:
    """`{"name": …, "arguments": {…}}`, a list of them, or the arguments alone where the anchor tells the name.

    Its text is read as JSON, so that an anchor within a string does not end it. Arguments go out as they are written, up to where
    they stop being JSON; an object without a name, or whose arguments are no object, is no call.
    """

    def __init__(self, shape: CallShape, captures: Mapping[str, str], numbers: Numbers, known: Schemas | None) -> None:
        self.done = False
        self.began = False
        self._shape = shape
        self._numbers = numbers
        self._known = known
        self._base = int(shape.each)
        self._scanner = JsonScanner()
        self._key: str | None = None
        self._name: str | None = captures.get(shape.name.group, "").strip() if shape.name.group else None
        self._arguments: list[str] | None = None
        """What was read of them and has not gone out."""
        self._inside = False
        self._told = False
        """The key of the arguments was there."""
        self._call: ToolCall | None = None

    def push(self, text: str) -> tuple[int, list[ToolCall]]:
        scanner, pieces, at = self._scanner, list[ToolCall](), 0
        while not self.done:
            at, event = scanner.step(text, at)
            if event == "more":
                break
            pieces += self._heed(event)
            self.done = self.done or scanner.state in ("done", "broken")
        pieces += self._flush()
        return at, pieces

    def finish(self, *, cut: bool) -> list[ToolCall]:
        self.done = True
        if cut and self._arguments is None and not self._told:
            self._arguments = []
        return self._flush()

    def _heed(self, event: Event) -> list[ToolCall]:
        scanner, shape = self._scanner, self._shape
        whole = not shape.arguments.key
        if event == "key":
            if scanner.depth == self._base + 1 and not self._inside:
                self._key = scanner.string
                self._told = self._told or self._key == shape.arguments.key
        elif event == "open":
            if scanner.depth <= self._base:
                self.done = scanner.stack[-1] != "["
            elif scanner.depth == self._base + 1:
                if scanner.stack[-1] != "{":
                    self.done = True
                elif whole:
                    self._begin_arguments()
            elif scanner.depth == self._base + 2 and self._key == shape.arguments.key and not whole and scanner.stack[-1] == "{":
                self._begin_arguments()
        elif event == "scalar":
            if scanner.depth <= self._base:
                self.done = True
            elif scanner.depth == self._base + 1 and not whole:
                self._take_scalar(scanner.string)
        elif event == "close":
            if self._inside and scanner.depth == self._base + (0 if whole else 1):
                pieces = self._flush()
                self._inside, scanner.recorded = False, None
                return pieces + (self._end_call() if whole else [])
            if scanner.depth == self._base and not whole:
                return self._end_call()
        elif event == "broken":
            return self._flush()
        return []

    def _begin_arguments(self) -> None:
        if self._arguments is not None:  # they stand there twice
            return
        self._inside = True
        self._arguments = ["{"]
        self._scanner.recorded = self._arguments

    def _take_scalar(self, value: str | None) -> None:
        if self._key == self._shape.name.key and self._name is None:
            self._name = value
            self.done = self._known is not None and value not in self._known
        elif self._key == self._shape.arguments.key and self._arguments is None:
            try:
                written = json.loads("{}" if self._scanner.is_null and value is None else value or "")  # some write them as a string
            except (ValueError, RecursionError):
                return
            if isinstance(written, dict):
                self._arguments = [json.dumps(written, ensure_ascii=False)]

    def _flush(self) -> list[ToolCall]:
        """What may go out: the call once its name and the beginning of its arguments are known, and what was read of them."""
        if self._arguments is None or not self._name or (self._known is not None and self._name not in self._known):
            return []
        pieces = []
        if self._call is None:
            self._call = self._numbers.next(self._name)
            pieces.append(self._call)
            self.began = True
        if self._arguments:
            pieces.append(ToolCall(index=self._call.index, arguments="".join(self._arguments)))
            self._arguments.clear()
        return pieces

    def _end_call(self) -> list[ToolCall]:
        if self._arguments is None and self._known is None and not self._told:
            self._arguments = ["{}"]
        pieces = self._flush()
        self._call, self._key, self._arguments, self._told = None, None, None, False
        self._name = self._name if self._shape.name.group else None
        return pieces


class TagCalls:
    """One tag for each argument, as in `<parameter=city>Oslo</parameter>`; the anchor tells the name. Arguments go out tag by tag."""

    def __init__(self, shape: CallShape, captures: Mapping[str, str], numbers: Numbers, tools: Schemas) -> None:
        assert shape.tag is not None
        self.done = False
        self.began = False
        self._shape = shape
        self._tag = shape.tag
        self._numbers = numbers
        self._name = captures.get(shape.name.group, "").strip()
        self._properties = tools.get(self._name, {}).get("properties")
        self._rest = ""
        """Behind the last tag."""
        self._keys: set[str] = set()
        self._call: ToolCall | None = None

    def push(self, text: str) -> tuple[int, list[ToolCall]]:
        pieces = self._begin()
        assert self._call is not None
        new_from = max(len(self._rest) - len(self._shape.tag_end), 0)
        self._rest += text
        if self._rest.find(self._shape.tag_end, new_from) < 0:
            return len(text), pieces
        at, said = 0, ""
        for match in self._tag.finditer(self._rest):
            at, key = match.end(), match["key"].strip()
            if key not in self._keys:
                said += f"{', ' if self._keys else '{'}{json.dumps(key, ensure_ascii=False)}: {self._value(key, match['value'])}"
                self._keys.add(key)
        self._rest = self._rest[at:]
        return len(text), [*pieces, ToolCall(index=self._call.index, arguments=said)] if said else pieces

    def finish(self, *, cut: bool) -> list[ToolCall]:
        self.done = True
        pieces = self._begin()
        assert self._call is not None
        if cut:
            return pieces
        return [*pieces, ToolCall(index=self._call.index, arguments="}" if self._keys else "{}")]

    def _begin(self) -> list[ToolCall]:
        if self._call is not None:
            return []
        self.began = True
        self._call = self._numbers.next(self._name)
        return [self._call]

    def _value(self, key: str, text: str) -> str:
        """As JSON, of the type that the tool's schema gives it."""
        schema = self._properties.get(key) if isinstance(self._properties, Mapping) else None
        types = types_of(schema)
        if types == {"string"} or (not types and not self._shape.value_is_json):
            return json.dumps(text, ensure_ascii=False)
        try:
            value = json.loads(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, RecursionError):
            literal = {"true": True, "false": False, "none": None, "null": None}.get(text.strip().lower(), text)
            return json.dumps(literal if types else text, ensure_ascii=False)
        fits = not types or type_of(value) in types or (type_of(value) == "integer" and "number" in types)
        return json.dumps(value if fits else text, ensure_ascii=False)


class WholeCalls:
    """Of any other format: transformers' own parsers read it when it is complete."""

    def __init__(self, region: Region, captures: Mapping[str, str], numbers: Numbers) -> None:
        self.done = False
        self.began = False
        self._region = region
        self._captures = captures
        self._numbers = numbers
        self._body: list[str] = []

    def push(self, text: str) -> tuple[int, list[ToolCall]]:
        self._body.append(text)
        return len(text), []

    def finish(self, *, cut: bool) -> list[ToolCall]:
        from transformers.utils.chat_parsing.content_parsers import process_field

        self.done = True
        if cut:
            return []
        try:
            value = process_field("".join(self._body), _Named(self._region), dict(self._captures))
        except (ValueError, KeyError, TypeError, RecursionError):
            return []
        found = []
        for each in value if isinstance(value, list) else [value]:
            function = each.get("function", each) if isinstance(each, dict) else None
            name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
            if not (isinstance(name, str) and name and isinstance(arguments, dict)):
                return []
            found.append((name, json.dumps(arguments, ensure_ascii=False)))
        self.began = bool(found)
        calls = [self._numbers.next(name) for name, _ in found]
        for call, (_, arguments) in zip(calls, found, strict=True):
            call.arguments = arguments
        return calls


class _Named:
    """A field as transformers' parsers want it."""

    def __init__(self, region: Region) -> None:
        spec = region.spec
        self.name, self.content, self.content_args = region.name, spec.content, spec.content_args
        self.transform, self.transform_each = spec.transform, spec.transform_each


def types_of(schema: Any) -> set[str]:
    """The JSON types that a schema names; none where it names none."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    types = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else set()
    for union in ("anyOf", "oneOf"):
        for each in schema.get(union) or ():
            types |= types_of(each)
    if not types and isinstance(schema.get("enum"), list):
        types = {type_of(value) for value in schema["enum"]}
    return types | ({"null"} if types and schema.get("nullable") else set())


def type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
