"""Response templates: which parts of a model's answer are reasoning, text and calls of tools, as data.

The format is that of transformers' `response_template`, which tokenizers bring in tokenizer_config.json.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import msgspec
import regex
from msgspec import Struct

Kind = Literal["text", "reasoning", "calls"]
KINDS: dict[str, Kind] = {
    "content": "text",
    "thinking": "reasoning",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning",
    "tool_calls": "calls",
}
"""What the fields of a template are to us."""

_QUOTED = regex.compile(r"\{(\w+(?:\.\w+)*)\}")
_LAST_LITERALS = regex.compile(r"(?:[^\\\[\](){}.*+?^$|]|\\\W)+\Z")
_FIRST_LITERAL = regex.compile(r"(?:\\(\W)|([^\\\[\](){}.*+?^$|]))(?![?*{])")


class FieldSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """One field of a template, as it is written."""

    open: str | list[str] | None = None
    open_pattern: str | None = None
    close: str | list[str] | None = None
    close_pattern: str | None = None
    content: Literal["text", "int", "float", "bool", "json", "xml-inline", "kv-lines"] = "text"
    content_args: dict[str, Any] = {}
    repeats: bool = False
    join: str | None = None
    optional: bool = True
    transform: Any = None
    transform_each: bool = False


class TemplateSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """A template as it is written."""

    fields: dict[str, FieldSpec]
    version: Literal[1] = 1
    defaults: dict[str, Any] = {}
    start_anchor: str | list[str] | None = None
    start_anchor_pattern: str | None = None


class FormatSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """A file of `formats/`."""

    response_template: TemplateSpec
    found_by: list[list[str]] = []
    """In a chat template: all texts of one of these lists."""
    call: str = ""
    """How a call is written: a text with NAME and ARGUMENTS in it, for grammars; "" where no grammar can be made."""
    argument: str = ""
    """How one argument is written, with KEY and VALUE, where ARGUMENTS are no JSON."""
    before: str = ""
    between: str = ""
    after: str = ""
    """Around the calls of one answer, and between two of them."""
    begun: str = ""
    """For a format whose calls begin with no text of their own: a regular expression of an answer's beginning, up to where a call has begun."""


@dataclass(frozen=True)
class Anchor:
    """What opens or closes a region."""

    pattern: regex.Pattern[str]
    literals: tuple[str, ...] = ()
    """Empty for a pattern."""

    @cached_property
    def firsts(self) -> frozenset[str] | None:
        """The characters that it can begin with; None: it is not known."""
        if self.literals:
            return frozenset(literal[0] for literal in self.literals)
        first = None if "|" in self.pattern.pattern.replace("\\|", "") else _FIRST_LITERAL.match(self.pattern.pattern)
        return None if first is None else frozenset(first[1] or first[2])

    def can_grow(self, matched: str, rest: str) -> bool:
        """Whether more text could make another match of one. `rest`: the text from where it begins."""
        if self.literals:
            return any(len(other) > len(rest) and other.startswith(rest) for other in self.literals)
        return rest == matched


@dataclass(frozen=True)
class Part:
    """Where a call's name or arguments are: in a group of the opening pattern, all of the content, or under a key of it."""

    group: str = ""
    key: str = ""


@dataclass(frozen=True)
class CallShape:
    """How calls are written in a region."""

    name: Part
    arguments: Part
    each: bool
    """The content is a list of them."""
    reader: Literal["json", "tags", "whole"]
    """whole: nothing is known before its end."""
    tag: regex.Pattern[str] | None = None
    tag_end: str = ""
    """A text that each tag ends with."""
    value_is_json: bool = False


@dataclass(frozen=True)
class Region:
    name: str
    kind: Kind
    open: Anchor | None
    close: Anchor | None
    calls: CallShape | None = None
    spec: FieldSpec = field(default_factory=FieldSpec)


@dataclass(frozen=True)
class ResponseTemplate:
    name: str
    """For people."""
    regions: tuple[Region, ...]
    start: regex.Pattern[str] | None
    """Where an answer begins in the prompt."""
    call: str = ""
    argument: str = ""
    before: str = ""
    between: str = ""
    after: str = ""
    begun: str = ""

    @cached_property
    def implicit(self) -> Region | None:
        """What stands outside all others; None: it is dropped."""
        return next((region for region in self.regions if region.open is None), None)

    @cached_property
    def calls(self) -> Region | None:
        return next((region for region in self.regions if region.kind == "calls"), None)

    @cached_property
    def reasoning(self) -> Region | None:
        return next((region for region in self.regions if region.kind == "reasoning" and region.open is not None), None)

    def shows(self, special: str) -> bool:
        """Whether a special token is part of an anchor, so that the parser must see it."""
        anchors = [anchor for region in self.regions for anchor in (region.open, region.close) if anchor is not None]
        return any(
            special in literal
            for anchor in anchors
            for literal in (anchor.literals or (anchor.pattern.pattern, anchor.pattern.pattern.replace("\\", "")))
        )


def template_of(name: str, given: Any) -> ResponseTemplate:
    """From a file's content: a response template alone, or one of our formats. Raises ValueError."""
    is_format = isinstance(given, dict) and "response_template" in given
    try:
        form = msgspec.convert(given if is_format else {"response_template": given}, FormatSpec)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace("$.response_template", "$") if not is_format else str(error)) from None
    spec = form.response_template
    regions = tuple(_region(key, each) for key, each in spec.fields.items())
    if sum(region.open is None for region in regions) > 1:
        raise ValueError("at most one field may have neither `open` nor `open_pattern`")
    start = _anchor("the template", spec.start_anchor, spec.start_anchor_pattern)
    derived = form.call or next((_written(region) for region in regions if region.calls is not None), "")
    return ResponseTemplate(
        name, regions, start.pattern if start else None, derived, form.argument, form.before, form.between, form.after, form.begun
    )


def _region(name: str, spec: FieldSpec) -> Region:
    kind = KINDS.get(name)
    if kind is None:
        raise ValueError(f"its field {name!r} has no place in an answer: {', '.join(KINDS)} have one")
    if kind != "calls" and (spec.content != "text" or spec.transform is not None):
        raise ValueError(f"its field {name!r} must be plain text")
    region = Region(name, kind, _anchor(name, spec.open, spec.open_pattern), _anchor(name, spec.close, spec.close_pattern), spec=spec)
    if kind != "calls":
        return region
    if region.open is None:
        raise ValueError("its field 'tool_calls' needs `open` or `open_pattern`")
    return Region(name, kind, region.open, region.close, _shape(spec), spec)


def _anchor(name: str, literals: str | list[str] | None, pattern: str | None) -> Anchor | None:
    if literals is not None and pattern is not None:
        raise ValueError(f"{name}: a literal and a pattern exclude each other")
    if pattern is not None:
        try:
            return Anchor(regex.compile(pattern, regex.DOTALL))
        except regex.error as error:
            raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None
    if literals is None:
        return None
    given = [literals] if isinstance(literals, str) else literals
    if not given or not all(given):
        raise ValueError(f"{name}: a literal must not be empty")
    ordered = sorted(set(given), key=lambda literal: (-len(literal), literal))
    return Anchor(regex.compile("|".join(regex.escape(literal) for literal in ordered), regex.DOTALL), tuple(ordered))


def _shape(spec: FieldSpec) -> CallShape:
    """As far as the transform says where name and arguments come from."""
    made = spec.transform.get("function", spec.transform) if isinstance(spec.transform, dict) else spec.transform
    if made is None or made == "{content}":
        made = {"name": "{content.name}", "arguments": "{content.arguments}"}
    name, arguments = (_part(made.get(key), spec) for key in ("name", "arguments")) if isinstance(made, dict) else (None, None)
    whole = CallShape(Part(), Part(), spec.transform_each, "whole")
    if name is None or arguments is None or arguments.group:
        return whole
    args = spec.content_args
    if spec.content == "json" and not (args.get("unquoted_keys") or args.get("string_delims")) and bool(arguments.key) == bool(name.key):
        return CallShape(name, arguments, spec.transform_each, "json")
    if spec.content == "xml-inline" and name.group and not arguments.key and not args.get("merge_duplicates"):
        tag = regex.compile(str(args.get("tag_pattern", "")), regex.DOTALL)
        if not {"key", "value"} <= tag.groupindex.keys():
            raise ValueError("tool_calls: `tag_pattern` needs the groups `key` and `value`")
        last = _LAST_LITERALS.search(tag.pattern)
        if last is not None:
            tag_end = regex.sub(r"\\(\W)", r"\1", last[0])
            is_json = (args.get("value_parser") or {}).get("name") == "json"
            return CallShape(name, arguments, False, "tags", tag, tag_end, is_json)
    return whole


def _part(placeholder: Any, spec: FieldSpec) -> Part | None:
    match = _QUOTED.fullmatch(placeholder) if isinstance(placeholder, str) else None
    if match is None:
        return None
    root, *keys = match[1].split(".")
    if root == "content":
        return Part(key=keys[0]) if len(keys) == 1 else Part() if not keys else None
    if keys:
        return None
    return Part(key=root) if spec.transform_each else Part(group=root)


def _written(region: Region) -> str:
    """How a call is written, of a template that tells only how it is read; "" where that does not say it."""
    shape, open, close = region.calls, region.open, region.close
    if shape is None or shape.reader != "json" or shape.each or not shape.name.key or open is None or not open.literals:
        return ""
    end = close.literals[0] if close is not None and close.literals else ""
    if close is not None and not end:
        return ""
    return f'{open.literals[0]}{{"{shape.name.key}": NAME, "{shape.arguments.key}": ARGUMENTS}}{end}'
