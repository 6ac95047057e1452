"""Parts an answer as it comes into text, reasoning and calls of tools.

What is said of a text does not depend on the pieces that it comes in. The state is bounded: of the text, only what may be the
beginning of an anchor is kept (MAX_ANCHOR), and of a call what stands before its name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fairlead.core.generation import ToolCall
from fairlead.llm.parsing.calls import Numbers, Reader, reader_of
from fairlead.llm.parsing.template import Anchor, Region, ResponseTemplate

MAX_ANCHOR = 512
"""Characters of one; what is longer is text."""
CONTEXT = 64
"""Characters that stay before the place that is looked at, for patterns that look behind."""


class Piece(NamedTuple):
    text: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class _Found(NamedTuple):
    opens: Region | None
    """None: it closes the region."""
    start: int
    end: int
    captures: dict[str, str]


class ResponseParser:
    """Of one answer."""

    def __init__(
        self,
        template: ResponseTemplate,
        *,
        prompt: str = "",
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        id_prefix: str = "call_",
        sole: bool = False,
    ) -> None:
        """`prompt`: its end may have begun the answer; `tools`: the schemas of those that may be called, none: calls are text;
        `sole`: one call is enough."""
        self.template = template
        self.enough = False
        """No more calls are wanted."""
        self.reasoned = False
        """Its reasoning is over."""
        self._tools = tools or {}
        self._numbers = Numbers(id_prefix)
        self._sole = sole
        self._opens = tuple(region for region in template.regions if region.open is not None and (self._tools or region.kind != "calls"))
        self._implicit = template.implicit
        self._region: Region | None = self._implicit
        self._reader: Reader | None = None
        self._raw = ""
        """Of a region of calls before its first: it may turn out to be text."""
        self._buffer = ""
        self._at = 0
        self._lead = False
        """White space is dropped until something else comes."""
        self._space = ""
        """At the end of reasoning so far."""
        self._watch()
        self._begin(prompt)

    @property
    def reasons(self) -> bool:
        return self._region is not None and self._region.kind == "reasoning"

    @property
    def num_calls(self) -> int:
        return self._numbers.count

    def push(self, text: str) -> list[Piece]:
        if self.enough:
            return []
        if self._at == len(self._buffer) and self._reader is None and self._firsts is not None and self._firsts.isdisjoint(text):
            pieces: list[Piece] = []
            self._buffer = (self._buffer + text)[-CONTEXT:]
            self._at = len(self._buffer)
            self._say(text, pieces)
            return pieces
        return self._process(text, final=False)

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """The rest. `cut`: the answer was not at its end."""
        pieces = self._process("", final=True)
        if self._reader is not None:
            self._finish_calls(pieces, cut=cut)
            self._leave()
        return pieces

    # The prompt

    def _begin(self, prompt: str) -> None:
        """Where the prompt's end has begun the answer, go on from there."""
        rest = self._since_start(prompt)
        if rest:
            self._process(rest, final=False)
        if self._reader is not None:
            self._leave()
        self._numbers.count = 0
        self.enough = False
        if not rest.strip():
            self._buffer, self._lead = "", self.reasons
        self._at = len(self._buffer)  # none of it is the answer's

    def _since_start(self, prompt: str) -> str:
        found = [] if self.template.start is None else [match.end() for match in self.template.start.finditer(prompt)]
        if found:
            return prompt[found[-1] :]
        reasoning = self.template.reasoning
        literals = reasoning.open.literals if reasoning is not None and reasoning.open is not None else ()
        return next((literal for literal in literals if prompt.rstrip().endswith(literal)), "")

    # Text

    def _process(self, text: str, *, final: bool) -> list[Piece]:
        pieces: list[Piece] = []
        self._buffer += text
        while not self.enough:
            if self._reader is not None and self._read(pieces, final=final):
                continue
            if self._reader is not None and not final and self._at == len(self._buffer):
                break
            found, hold = self._scan(final=final)
            if found is None:
                self._pass(self._buffer[self._at : hold], pieces)
                self._at = hold
                break
            self._pass(self._buffer[self._at : found.start], pieces)
            self._at = found.end
            self._turn(found, pieces)
        cut = max(self._at - CONTEXT, 0)
        if cut:
            self._buffer, self._at = self._buffer[cut:], self._at - cut
        return pieces

    def _read(self, pieces: list[Piece], *, final: bool) -> bool:
        """Hand JSON to its reader. Returns whether the region is over."""
        reader, region = self._reader, self._region
        assert reader is not None and region is not None
        shape = region.calls
        assert shape is not None
        if shape.reader == "json" and not reader.done:
            rest = self._buffer[self._at :]
            num, calls = reader.push(rest)
            self._take(rest[:num], calls, pieces)
            self._at += num
        if reader.done and not reader.began:
            self._say_raw(pieces)
            self._leave()
            return True
        if reader.done and region.close is None:
            self._leave(ended=True)
            return True
        return False

    def _take(self, text: str, calls: list[ToolCall], pieces: list[Piece]) -> None:
        assert self._reader is not None
        self._raw = "" if self._reader.began else self._raw + text
        for call in calls:
            if self._sole and call.index > 0:
                self.enough = True
                self._numbers.count = 1
                return
            pieces.append(Piece(call=call))

    def _pass(self, text: str, pieces: list[Piece]) -> None:
        """Text of the region."""
        if not text:
            return
        if self._reader is None:
            self._say(text, pieces)
        elif not self._reader.done:
            _, calls = self._reader.push(text)
            self._take(text, calls, pieces)

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._region is None:
            return
        if self._lead:
            text = text.lstrip()
            if not text:
                return
            self._lead = False
        if self._region.kind == "reasoning":
            text = self._space + text
            shown = text.rstrip()
            self._space = text[len(shown) :]
            if shown:
                pieces.append(Piece(reasoning=shown))
        else:
            pieces.append(Piece(text=text))

    def _say_raw(self, pieces: list[Piece]) -> None:
        """What was taken for calls is text."""
        if self._raw:
            pieces.append(Piece(text=self._raw))
            self._raw = ""

    # Regions

    def _turn(self, found: _Found, pieces: list[Piece]) -> None:
        anchor = self._buffer[found.start : found.end]
        if found.opens is None:
            if self._reader is not None:
                self._finish_calls(pieces, cut=False, anchor=anchor)
            self._leave(ended=True)
            return
        self._region = region = found.opens
        self._lead, self._space = region.kind == "reasoning", ""
        if region.kind == "calls":
            known = not anchor.strip()
            self._reader = reader_of(region, found.captures, self._numbers, self._tools, known=known)
            self._raw = anchor
        self._watch()

    def _finish_calls(self, pieces: list[Piece], *, cut: bool, anchor: str = "") -> None:
        reader = self._reader
        assert reader is not None
        calls = reader.finish(cut=cut)
        self._take(anchor, calls, pieces)
        self._say_raw(pieces)

    def _leave(self, *, ended: bool = False) -> None:
        """Back to what stands outside the regions. `ended`: the region was there, whole."""
        had_calls = self._reader is not None and self._reader.began
        self.reasoned = self.reasoned or self.reasons
        self._region, self._reader, self._raw, self._space = self._implicit, None, "", ""
        self._lead = ended
        self.enough = self.enough or (self._sole and had_calls)
        self._watch()

    def _watch(self) -> None:
        """What ends the region, or opens one in it."""
        region = self._region
        watched: list[tuple[Region | None, Anchor]] = []
        if region is None or region.open is None:
            watched = [(each, each.open) for each in self._opens if each.open is not None]
        if region is not None and region.close is not None:
            watched.append((None, region.close))
        self._watched = tuple(watched)
        firsts: frozenset[str] | None = frozenset()
        for _, anchor in watched:
            firsts = None if firsts is None or anchor.firsts is None else firsts | anchor.firsts
        self._firsts = firsts

    def _scan(self, *, final: bool) -> tuple[_Found | None, int]:
        """The first anchor that is there for certain, and how far the text is certainly no anchor."""
        best: tuple[tuple[int, int, int], _Found] | None = None
        hold = len(self._buffer)
        for number, (opens, anchor) in enumerate(self._watched):
            match = _search(anchor, self._buffer, self._at, final=final)
            if match is None:
                continue
            start, end = match.span()
            if match.partial or (not final and anchor.can_grow(match[0], self._buffer[start:])):
                hold = min(hold, start)
                continue
            if start == end and opens is None:  # it closes nothing
                continue
            key = (start, start - end, number)
            if best is None or key < best[0]:
                best = key, _Found(opens, start, end, {name: text for name, text in match.groupdict().items() if text is not None})
        if best is None or best[1].start >= hold:
            return None, hold
        return best[1], hold


def _search(anchor: Anchor, text: str, at: int, *, final: bool) -> Any:
    """A match, also of what may become one, that is not too long."""
    while True:
        match = anchor.pattern.search(text, at) if final else anchor.pattern.search(text, at, partial=True)
        if match is None or (len(text) if match.partial else match.end()) - match.start() <= MAX_ANCHOR:
            return match
        at = match.start() + 1
