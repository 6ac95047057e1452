"""Grammars of answers that call tools, or that reason before they follow a guide: llguidance's Lark, from a template's data."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Guide, ToolChoice
from fairlead.llm.parsing.calls import types_of
from fairlead.llm.parsing.spelled import spelled
from fairlead.llm.parsing.template import ResponseTemplate

Thought = Literal["", "may", "open"]
"""Whether an answer begins with reasoning: not, as it likes, or the prompt has begun it."""

WHOLE = "fl_arguments"
ANY_OBJECT: dict[str, Any] = {"type": "object"}
_HOLES = re.compile(r"(NAME|ARGUMENTS)")
_SLASH = re.compile(r"(?<!\\)((?:\\\\)*)/")
_START = re.compile(r"^start\b", re.MULTILINE)


def needs_grammar(tools: Sequence[Mapping[str, Any]], choice: ToolChoice) -> bool:
    held = choice.mode in ("required", "named") or choice.allowed or choice.inputs
    return bool(tools) and (bool(held) or any(tool["function"].get("strict") for tool in tools))


def guide_of(
    template: ResponseTemplate,
    added_ids: Mapping[str, int],
    *,
    tools: Sequence[Mapping[str, Any]],
    choice: ToolChoice,
    guide: Guide | None,
    thought: Thought,
) -> Guide | None:
    """What an answer must look like; None: as it likes. `guide`: of its text; `added_ids`: tokens that a grammar must name as such.

    Raises InvalidRequest.
    """
    wants_calls = needs_grammar(tools, choice) or (bool(tools) and guide is not None)
    if not wants_calls and (guide is None or not thought):
        return guide
    rules = _Rules(template, added_ids, choice.inputs)
    if not wants_calls:
        assert guide is not None
        rules.start(thought, rules.answer(guide))
        return Guide(kind="lark", text=rules.text, parameter=guide.parameter)
    if not template.call:
        what = "tool_choice" if choice.mode in ("required", "named") or choice.allowed else "tools"
        raise InvalidRequest(
            f"`{what}` cannot be heeded: the response template of this model ({template.name}) does not tell how calls are written"
        )
    permitted = [tool for tool in tools if choice.permits(tool["function"]["name"])]
    forced = choice.mode in ("required", "named")
    calls = rules.calls(permitted, schemas=forced, parallel=choice.parallel and choice.mode != "named")
    if forced:
        rules.start(thought, calls)
    elif guide is not None:
        rules.start(thought, f"({rules.answer(guide)} | {calls})")
    else:
        rules.start(thought, rules.text_and_calls(permitted, parallel=choice.parallel))
    return Guide(kind="lark", text=rules.text, parameter="tools" if guide is None else guide.parameter)


def _from_whole(value: Any) -> Any:
    """A schema whose references, from the outermost one, lead into that of all arguments."""
    if isinstance(value, dict):
        return {
            name: f"#/$defs/{WHOLE}{each[1:]}" if name == "$ref" and isinstance(each, str) and each.startswith("#") else _from_whole(each)
            for name, each in value.items()
        }
    return list(map(_from_whole, value)) if isinstance(value, list) else value


class _Rules:
    """A grammar that is being written. Its names begin with `fl_`, so that they clash with none of a caller's grammar."""

    def __init__(self, template: ResponseTemplate, added_ids: Mapping[str, int], inputs: Mapping[str, Guide]) -> None:
        """`inputs`: of tools that take a text, by name."""
        self.template = template
        self._inputs = inputs
        self._added_ids = added_ids
        texts = sorted(added_ids, key=len, reverse=True)
        self._added = re.compile("|".join(f"({re.escape(text)})" for text in texts)) if texts else None
        self._lines: list[str] = []
        self._count = 0

    @property
    def text(self) -> str:
        return "\n".join((*self._lines, "FL_TEXT: /(.|\\n)*/", ""))

    def rule(self, body: str, options: str = "") -> str:
        self._count += 1
        name = f"fl_{self._count}"
        self._lines.append(f"{name}{options}: {body}")
        return name

    def start(self, thought: Thought, body: str) -> None:
        reasoning = self.template.reasoning
        before = ""
        if thought and reasoning is not None and reasoning.open is not None and reasoning.close is not None:
            inner = self.until(reasoning.close.literals[0]) + " FL_SPACE?"
            before = inner if thought == "open" else f"({self.literal(reasoning.open.literals[0])} {inner})?"
            self._lines.append("FL_SPACE: /[ \\n]{1,8}/")
        self._lines.append(f"start: {before} {body}")

    def literal(self, text: str) -> str:
        return " ".join(self._parts(text))

    def _parts(self, text: str) -> list[str]:
        pieces = [text] if self._added is None else [piece for piece in self._added.split(text) if piece]
        return [f"<[{self._added_ids[piece]}]>" if piece in self._added_ids else json.dumps(piece, ensure_ascii=False) for piece in pieces]

    def until(self, text: str) -> str:
        """Any text, up to and with this one."""
        first, *rest = self._parts(text)
        head = f"FL_TEXT {first}" if first.startswith("<[") else self.rule(f"FL_TEXT {first}", "[lazy]")
        return " ".join((head, *rest))

    def answer(self, guide: Guide) -> str:
        """The rule of a guide. Raises InvalidRequest."""
        match guide.kind:
            case "json":
                return self.rule(f"%json {guide.text}")
            case "choice":
                return self.rule(" | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(guide.text)))
            case "regex":
                slashed = _SLASH.sub(r"\1\/", guide.text).replace("\n", "\\n")
                return self.rule(f"/{slashed}/")
        if len(re.findall(r"\bstart\b", guide.text)) != 1 or _START.search(guide.text) is None or "%llguidance" in guide.text:
            raise InvalidRequest(
                f"`{guide.parameter}` cannot stand beside reasoning or tools: its rule `start` must be there once, and named nowhere else"
            )
        self._lines.append(_START.sub("fl_answer", guide.text))
        return "fl_answer"

    # Calls

    def calls(self, tools: Sequence[Mapping[str, Any]], *, schemas: bool, parallel: bool) -> str:
        """`schemas`: of all tools, not of the strict ones alone."""
        form = self.template
        one = self.rule(" | ".join(self._call(tool, schemas=schemas) for tool in tools))
        more = f"({self.literal(form.between)} {one})*" if parallel else ""
        return self.rule(f"{self.literal(form.before)} {one} {more} {self.literal(form.after)}")

    def text_and_calls(self, tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> str:
        """Text, in which calls follow what is asked of them. Raises InvalidRequest."""
        form, region = self.template, self.template.calls
        whole = form.before + form.call
        assert region is not None and region.open is not None
        trigger = next((literal for literal in region.open.literals if whole.startswith(literal)), "")
        trigger = trigger or (self._added.match(whole) or [""])[0] if self._added is not None else trigger
        if not trigger and form.begun:
            self._lines.append(f"FL_PLAIN: /(.|\\n)*/ & ~/({form.begun})(.|\\n)*/")
            return self.rule(f"{self.calls(tools, schemas=False, parallel=parallel)} | FL_PLAIN")
        if not trigger:
            raise InvalidRequest(
                f"`tools` cannot be `strict`, allowed in part or held to a grammar with `tool_choice: auto`: calls of this model ({form.name}) "
                "begin with nothing that tells them from text"
            )
        bodies = [self._call(tool, schemas=False, behind=trigger) for tool in tools]
        more = ""
        if form.after and parallel:  # a list
            one = self.rule(" | ".join(self._call(tool, schemas=False) for tool in tools))
            more = f"({self.literal(form.between)} {one})*"
        call = self.rule(f"{self.until(trigger)} ({' | '.join(bodies)}) {more} {self.literal(form.after)}")
        return self.rule(f"{call}* FL_TEXT" if parallel else f"{call} | FL_TEXT")

    def _call(self, tool: Mapping[str, Any], *, schemas: bool, behind: str = "") -> str:
        """`behind`: what is already there of it, and of what stands before the calls."""
        form, function = self.template, tool["function"]
        schema = (function.get("parameters") or ANY_OBJECT) if schemas or function.get("strict") else ANY_OBJECT
        region = form.calls
        assert region is not None and region.calls is not None
        name = json.dumps(function["name"]) if region.calls.name.key else function["name"]
        guide = self._inputs.get(function["name"])
        written = (form.before + form.call).removeprefix(behind) if behind else form.call
        holes = {"NAME": self.literal(name), "ARGUMENTS": self._arguments(schema) if guide is None else self._input(guide)}
        parts = [holes.get(piece) or self.literal(piece) for piece in _HOLES.split(written) if piece]
        return self.rule(" ".join(parts))

    def _arguments(self, schema: Mapping[str, Any]) -> str:
        if not self.template.argument:
            return self.rule(f"%json {json.dumps({'type': 'object', **schema}, ensure_ascii=False)}")
        required = schema.get("required") or ()
        properties = schema.get("properties") or {}
        shared = {"$defs": {WHOLE: _from_whole({"type": "object", **schema})}} if '"$ref"' in json.dumps(properties) else {}
        parts = [
            self._argument(key, {**(_from_whole(each) if shared else each), **shared} if isinstance(each, dict) else {})
            + ("" if key in required else "?")
            for key, each in properties.items()
        ]
        return self.rule(" ".join(parts) or '""')

    def _input(self, guide: Guide) -> str:
        """The arguments of a tool that takes a text. Raises InvalidRequest."""
        self._count += 1
        lines, start = spelled(guide, f"fl_text_{self._count}", quoted=not self.template.argument)
        self._lines += lines
        before, end, rest = r'/\{[ \n]{0,8}"input":[ \n]{0,8}"/', r'/"[ \n]{0,8}\}/', ""
        if self.template.argument:
            opening, _, closing = self.template.argument.replace("KEY", "input").partition("VALUE")
            before, (end, *more) = self.literal(opening), self._parts(closing)
            rest = " ".join(more)
        if start.isupper() and not end.startswith("<["):  # one lexeme: what may still be text, or the end already, is either
            self._lines.append(f"{start}_END: {start} {end}")
            return self.rule(f"{before} {start}_END {rest}")
        return self.rule(f"{before} {start} {end} {rest}")

    def _argument(self, key: str, schema: Mapping[str, Any]) -> str:
        before, after = (part.replace("KEY", key) for part in self.template.argument.partition("VALUE")[::2])
        if isinstance(choices := schema.get("enum"), list):
            written = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in choices]
            return self.rule(f"{self.literal(before)} ({' | '.join(map(self.literal, filter(None, written)))}) {self.literal(after)}")
        if types_of(schema) in (set(), {"string"}):
            return self.rule(f"{self.literal(before)} {self.until(after)}")
        return self.rule(f"{self.literal(before)} %json {json.dumps(schema, ensure_ascii=False)} {self.literal(after)}")
