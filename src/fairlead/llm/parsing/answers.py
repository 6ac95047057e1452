"""How the answers to one request are parsed, and what they must look like."""

import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from fairlead.core.errors import FairleadError, InvalidRequest
from fairlead.core.generation import Generate, Guide
from fairlead.llm.parsing.guide import Thought, guide_of
from fairlead.llm.parsing.parser import ResponseParser
from fairlead.llm.parsing.template import ResponseTemplate
from fairlead.llm.tokenizer import Tokenizer


class Parsing:
    """Of one request: each of its answers has a parser of its own."""

    def __init__(self, template: ResponseTemplate, prompt: Generate, rendered: str, shown_ids: frozenset[int]) -> None:
        tools = prompt.chat.tools if prompt.chat is not None else []
        self.shown_ids = shown_ids
        """Special tokens that the parser must see."""
        self._template = template
        self._tools: Mapping[str, Mapping[str, Any]] = {
            tool["function"]["name"]: tool["function"].get("parameters") or {}
            for tool in tools
            if prompt.tool_choice.permits(tool["function"]["name"])
        }
        self._sole = bool(tools) and not prompt.tool_choice.parallel
        self._prompt = rendered

    def parser(self) -> ResponseParser:
        prefix = f"call_{secrets.token_hex(12)}"
        return ResponseParser(self._template, prompt=self._prompt, tools=self._tools, id_prefix=prefix, sole=self._sole)


class AnswerFormat:
    """Of one model."""

    def __init__(self, template: ResponseTemplate | None, tokenizer: Tokenizer) -> None:
        """`template`: None where answers are text."""
        self.template = template
        chat_templates = [] if tokenizer.templates is None else tokenizer.templates.texts
        self._shows_tools = tokenizer.templates is not None and tokenizer.templates.shows_tools
        added = tokenizer.backend.get_added_tokens_decoder()
        self._added_ids = {token.content: id for id, token in added.items()}
        self._shown_ids = frozenset(
            id for id, token in added.items() if token.special and template is not None and template.shows(token.content)
        )
        reasoning = None if template is None else template.reasoning
        opens = reasoning.open.literals if reasoning is not None and reasoning.open is not None else ()
        self._reasons = any(literal in text for literal in opens for text in chat_templates)
        """Whether the model was taught to: its chat template knows of it."""

    @property
    def calls_tools(self) -> bool:
        return self._shows_tools and self.template is not None and self.template.calls is not None

    def read(self, prompt: Generate, rendered: str) -> tuple[Parsing | None, Guide | None]:
        """`rendered`: its chat as text. Raises InvalidRequest."""
        tools = prompt.chat.tools if prompt.chat is not None else []
        if not prompt.parsed:
            return None, prompt.guide
        if tools and not self._shows_tools:
            raise InvalidRequest("`tools` cannot be heeded: the chat template of this model does not show tools to it")
        if self.template is None or (tools and self.template.calls is None):
            if tools:
                raise InvalidRequest(
                    "`tools` cannot be heeded: it is not known how this model writes calls; set `response_template` in the `llm` section "
                    "of its model.yaml to the name of a format or to a file (docs/tools.md)"
                )
            if self.template is None:
                return None, prompt.guide
        parsing = Parsing(self.template, prompt, rendered, self._shown_ids)
        if prompt.guide is None and not tools:
            return parsing, None
        guide = guide_of(
            self.template,
            self._added_ids,
            tools=tools,
            choice=prompt.tool_choice,
            guide=prompt.guide,
            thought=self._thought(parsing),
        )
        return parsing, guide

    def forms(self, prompt: Generate) -> list[Guide]:
        """What the guide of a prompt without tools may become: by itself, or behind reasoning."""
        if prompt.guide is None:
            return []
        if prompt.chat is None or not prompt.parsed or self.template is None or self.template.reasoning is None:
            return [prompt.guide]
        thoughts: tuple[Thought, ...] = ("", "may", "open")
        found = (
            guide_of(self.template, self._added_ids, tools=(), choice=prompt.tool_choice, guide=prompt.guide, thought=thought)
            for thought in thoughts
        )
        try:
            return [guide for guide in found if guide is not None]
        except (FairleadError, ValueError, TypeError, RecursionError):  # reading it tells what is wrong
            return [prompt.guide]

    def _thought(self, parsing: Parsing) -> Thought:
        parser = parsing.parser()
        if parser.reasons:
            return "open"
        return "may" if self._reasons and not parser.reasoned else ""


def own_guides(prompt: Generate) -> Iterator[Guide]:
    """What a combined guide was made of, one by one, each with the parameter that it came in."""
    if prompt.guide is not None:
        yield prompt.guide
    yield from prompt.tool_choice.inputs.values()
    for number, tool in enumerate(prompt.chat.tools if prompt.chat is not None else []):
        schema = {"type": "object", **(tool["function"].get("parameters") or {})}
        yield Guide(kind="json", text=json.dumps(schema), parameter=f"tools[{number}].function.parameters")
