"""From the tokens of one generation to its text, piece by piece, and where it ends.

Each token costs what its own characters cost, however long the text is already.
"""

import codecs
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from fairlead.core.generation import FinishReason, Sampling, ToolCall
from fairlead.llm.parsing.parser import Piece, ResponseParser
from fairlead.llm.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING = 8
"""Tokens that may wait for the rest of a character where only the library's decoder knows the spelling."""
NUM_CONTEXT = 4
"""Last tokens of the prompt that shape the first ones of the answer: one character has at most four bytes."""


class Pushed(NamedTuple):
    text: str
    """What may be shown now."""
    finish_reason: FinishReason = ""
    stop_reason: str | int | None = None
    """The stop string or stop token id; None for an end-of-sequence token."""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


class OutputStream:
    """One answer on its way out.

    Where it is parsed, stop strings are looked for in the text of the answer alone: not in reasoning, and not in calls.

    Text that may turn out to be the beginning of a stop string is held back until that is decided, and bytes until they are
    a whole character. The text ends before the stop string, or after it with `include_stop_str_in_output`; that of an
    end-of-sequence or stop token follows the same rule.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        eos_ids: Collection[int] = (),
        max_model_len: int = 0,
        parser: ResponseParser | None = None,
        shown_ids: Collection[int] = frozenset(),
    ) -> None:
        """`max_model_len`: tokens of prompt and answer together; 0: no such bound. `parser`: parts the answer; `shown_ids`: special
        tokens that it must see."""
        self.sampling = sampling
        self.num_generated = 0
        self.num_reasoned = 0
        """Of the tokens, those of reasoning."""
        self.finished = False
        self._eos_ids = frozenset() if sampling.ignore_eos else frozenset(eos_ids)
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._parser = parser
        self._detokenizer = detokenizer(tokenizer, prompt_ids, skip_special_tokens=sampling.skip_special_tokens, shown_ids=shown_ids)
        self._stops = _StopStrings(sampling.stop) if sampling.stop else None
        room = max_model_len - len(prompt_ids) if max_model_len else None
        bounds = [bound for bound in (sampling.max_tokens, room) if bound is not None]
        self._max_tokens = min(bounds) if bounds else None

    def push(self, token_id: int) -> Pushed:
        """The next token. With a finish reason, the text is the last, and nothing may be pushed any more."""
        assert not self.finished
        self.num_generated += 1
        reason: FinishReason = ""
        stop: str | int | None = None
        # below `min_tokens` the sampler forbids these tokens; here they are text like any other
        if self.num_generated > self.sampling.min_tokens and (token_id in self._eos_ids or token_id in self._stop_ids):
            reason = "stop"
            stop = None if token_id in self._eos_ids else token_id
        elif self._max_tokens is not None and self.num_generated >= self._max_tokens:
            reason = "length"
        text = self._detokenizer.push(token_id) if reason != "stop" or self.sampling.include_stop_str_in_output else ""
        if reason:
            text += self._detokenizer.finish()
        if self._parser is not None:
            return self._parsed(self._parser, text, reason, stop)
        if self._stops is not None:
            text, matched = self._stops.push(text, ignore=self.num_generated <= self.sampling.min_tokens)
            if matched is not None:
                reason, stop = "stop", matched
                text += matched if self.sampling.include_stop_str_in_output else ""
            elif reason:
                text += self._stops.finish()
        self.finished = bool(reason)
        return Pushed(text, reason, stop)

    def _parsed(self, parser: ResponseParser, text: str, reason: FinishReason, stop: str | int | None) -> Pushed:
        reasoned = parser.reasons
        pieces = parser.push(text) if text else []
        self.num_reasoned += reasoned or parser.reasons
        if reason:
            pieces += parser.finish(cut=reason == "length")
        elif parser.enough:
            reason = "stop"
        elif self._stops is None and len(pieces) < 2:  # mostly
            only = pieces[0] if pieces else Piece()
            return Pushed(only.text, "", None, only.reasoning, () if only.call is None else (only.call,))
        shown, matched = self._shown(pieces, end=bool(reason))
        if matched is not None:
            reason, stop = "stop", matched
        if reason == "stop" and parser.num_calls and matched is None:
            reason = "tool_calls"
        self.finished = bool(reason)
        text = "".join(piece.text for piece in shown)
        reasoning = "".join(piece.reasoning for piece in shown)
        return Pushed(text, reason, stop, reasoning, tuple(piece.call for piece in shown if piece.call is not None))

    def _shown(self, pieces: list[Piece], *, end: bool) -> tuple[list[Piece], str | None]:
        """The pieces up to a stop string in their text, and that; what may be the beginning of one is held back."""
        if self._stops is None:
            return pieces, None
        shown: list[Piece] = []
        for piece in pieces:
            if not piece.text:
                shown.append(piece)
                continue
            text, matched = self._stops.push(piece.text, ignore=self.num_generated <= self.sampling.min_tokens)
            shown.append(Piece(text=text))
            if matched is not None:
                return [*shown, Piece(text=matched if self.sampling.include_stop_str_in_output else "")], matched
        return [*shown, Piece(text=self._stops.finish() if end else "")], None

    def finish(self) -> str:
        """The text that is held back, where the generation ends for a reason of somebody else's."""
        self.finished = True
        text = self._detokenizer.finish()
        if self._stops is None:
            return text
        text, _ = self._stops.push(text, ignore=True)
        return text + self._stops.finish()


class Detokenizer(Protocol):
    """Turns tokens into text as they come; all its pieces together are the decoded whole."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str:
        """What is left: bytes that never became a character show as U+FFFD."""


def detokenizer(
    tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True, shown_ids: Collection[int] = frozenset()
) -> Detokenizer:
    """One for the tokens that follow `prompt_ids`. `shown_ids`: special tokens that are not skipped."""
    skip = tokenizer.special_ids.difference(shown_ids) if skip_special_tokens else frozenset()
    match tokenizer.spelling:
        case "bytes":
            made: Detokenizer = _Bytes(tokenizer, skip)
        case "byte_fallback":
            made = _ByteFallback(tokenizer, skip)
        case _:
            made = _Window(tokenizer, skip)
    context = list(prompt_ids[-NUM_CONTEXT:])
    if skip and all(token_id in skip for token_id in context):
        context += [token_id for token_id in prompt_ids if token_id not in skip][-1:]
    for token_id in context:
        made.push(token_id)
    return made


class _Bytes:
    """Of a byte-level vocabulary: tokens are bytes, whatever the border between them."""

    def __init__(self, tokenizer: Tokenizer, skip: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallback:
    """Of a sentencepiece vocabulary: most tokens are whole characters, some are one byte.

    The library takes a run of byte tokens that is not valid UTF-8 as one U+FFFD for each byte, all of the run. A stream
    cannot take back the characters of the run that it has shown, so it replaces only the bytes that belong to none.
    """

    def __init__(self, tokenizer: Tokenizer, skip: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._pending = b""
        self._at_start = tokenizer.strips_first_space

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        if token_id in self._tokenizer.byte_ids:
            return self._started(self._push_byte(self._tokenizer.token_bytes(token_id)))
        return self._started(self._drain() + self._tokenizer.token_text(token_id))

    def _push_byte(self, byte: bytes) -> str:
        self._pending += byte
        try:
            text = self._pending.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            if len(self._pending) > 1:  # the last byte may begin another character
                self._pending = self._pending[:-1]
                return self._drain() + self._push_byte(byte)
            return self._drain()
        self._pending = b""
        return text

    def _drain(self) -> str:
        text = UNKNOWN * len(self._pending)
        self._pending = b""
        return text

    def _started(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        return self._started(self._drain())


class _Window:
    """Of any other vocabulary: the last few tokens are decoded with and without the new one (Hugging Face's TGI)."""

    def __init__(self, tokenizer: Tokenizer, skip: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._shown: list[int] = []
        """Tokens whose text is out, as context."""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._pending.append(token_id)
        before, text = self._texts()
        if (len(text) <= len(before) or text.endswith(UNKNOWN)) and len(self._pending) < MAX_PENDING:
            return ""
        self._shown, self._pending = self._pending, []
        return text[len(before) :]

    def finish(self) -> str:
        before, text = self._texts()
        self._pending = []
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._shown, skip_special_tokens=False), decode([*self._shown, *self._pending], skip_special_tokens=False)


class _StopStrings:
    """Finds the stop string that is complete first, and knows how much of the text's end may be the beginning of one.

    Knuth, Morris and Pratt's automaton for each, so that no character is looked at again. Of two that are complete at the
    same character the longer one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._lengths = [0] * len(self._stops)
        """How many characters of each stop string the text ends with."""
        self._held = ""

    def push(self, text: str, *, ignore: bool) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string that was found behind it. `ignore`: complete ones do not count."""
        if not self._held and self._firsts.isdisjoint(text):
            return text, None
        num_held = len(self._held)
        self._held += text
        for at, character in enumerate(text, num_held + 1):
            for number, stop in enumerate(self._stops):
                if not self._advance(number, character):
                    continue
                if not ignore:
                    shown = self._held[: at - len(stop)]
                    self._held = ""
                    return shown, stop
        keep = max(self._lengths)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, None

    def finish(self) -> str:
        """What is held back."""
        text, self._held = self._held, ""
        self._lengths = [0] * len(self._stops)
        return text

    def _advance(self, number: int, character: str) -> bool:
        """Whether the character completes the stop string."""
        stop, borders, length = self._stops[number], self._borders[number], self._lengths[number]
        while length and stop[length] != character:
            length = borders[length - 1]
        if stop[length] == character:
            length += 1
        complete = length == len(stop)
        self._lengths[number] = borders[length - 1] if complete else length
        return complete


def _borders(text: str) -> list[int]:
    """For each prefix of the text, how long its longest proper border is: what is a prefix and a suffix of it."""
    borders = [0] * len(text)
    length = 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = borders[length - 1]
        if text[at] == text[length]:
            length += 1
        borders[at] = length
    return borders
