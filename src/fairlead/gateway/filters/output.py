"""Answers on their way out: deltas of an engine, tensors, and bytes of another server's answer."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from msgspec import Struct, structs

from fairlead.core.errors import Filtered, ModelError
from fairlead.core.generation import Delta, FinishReason, TokenLogprob, ToolCall
from fairlead.core.request import Response
from fairlead.core.tensors import object_array
from fairlead.gateway.filters.answers import Body, Events
from fairlead.gateway.filters.finding import Scan
from fairlead.gateway.filters.window import Window

TEXT_OUTPUT = "text_output"
"""The tensor of a language model's answer: of a stream each response has a piece of it."""


class _Piece(Struct):
    """What came with a piece of text, until that has gone out."""

    spans: list[tuple[Window, int, int]]
    """Where its text is, and its reasoning and arguments of calls."""
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


class _Choice:
    """Its text, its reasoning and the arguments of each call are searched each on its own; where one gives way to another, it is
    over, so that nothing of it comes out later."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self.scans = scans
        self.windows: dict[str | int, Window] = {}
        """Of what is not over: `text`, `reasoning`, and calls by their index."""
        self.rules: set[str] = set()
        self.pieces: list[_Piece] = []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.began = self.ended = False

    def push(self, delta: Delta) -> Delta | None:
        """What goes out of it now: the same object where all of it does, None for nothing."""
        if self.ended:
            return Delta(index=delta.index, usage=delta.usage) if delta.usage is not None else None
        first, self.began, last = not self.began, True, bool(delta.finish_reason)
        parts: list[tuple[str | int, str]] = [("reasoning", delta.reasoning), ("text", delta.text)]
        parts += [(call.index, call.arguments) for call in delta.tool_calls]
        out, piece = self._searched(parts, last), _Piece([], delta.token_ids, delta.logprobs)
        piece.spans = out.spans
        calls = [structs.replace(call, arguments=out.texts.pop(call.index, "")) for call in delta.tool_calls]
        calls += [ToolCall(index=index, arguments=text) for index, text in out.texts.items() if isinstance(index, int) and text]
        text, reasoning = out.texts.get("text", ""), out.texts.get("reasoning", "")
        if out.blocked:
            self.ended = True
            if first and last:  # an answer that comes as one is withheld as one
                text, reasoning, calls = "", "", []
            return Delta(
                index=delta.index,
                text=text,
                reasoning=reasoning,
                tool_calls=[call for call in calls if call.arguments],
                finish_reason="content_filter",
                usage=delta.usage,
                prompt_logprobs=self._told(delta),
            )
        if not self.pieces and out.whole and self.prompt_logprobs is None:
            return delta
        self.pieces.append(piece)
        self.prompt_logprobs = self._told(delta)
        token_ids, logprobs = self._released(out.redacted)
        if not (text or reasoning or calls or token_ids or delta.finish_reason or delta.usage is not None):
            return None
        told, self.prompt_logprobs = self.prompt_logprobs, None
        changes = {"text": text, "reasoning": reasoning, "tool_calls": calls, "token_ids": token_ids, "logprobs": logprobs}
        return structs.replace(delta, **changes, prompt_logprobs=told)

    def _searched(self, parts: Sequence[tuple[str | int, str]], last: bool) -> "_Searched":
        """`last`: nothing comes behind it."""
        out = _Searched()
        told = {key for key, text in parts if text}
        if told or last:
            for key in [key for key in self.windows if key not in told]:
                self._push(key, "", True, out)
        for key, text in parts:
            if text:
                self._push(key, text, last, out)
        return out

    def _push(self, key: str | int, text: str, last: bool, out: "_Searched") -> None:
        window = self.windows.get(key)
        if window is None:
            window = self.windows[key] = Window(self.scans)
        start, held = window.end, window.given < window.end
        given = window.push(text, last)
        if not out.blocked:
            out.texts[key] = out.texts.get(key, "") + given
        out.spans.append((window, start, window.end))
        out.redacted += [(window, *place) for place in window.redacted]
        out.whole = out.whole and not held and window.given == window.end and not window.redacted
        out.blocked = out.blocked or bool(window.blocked)
        self.rules |= window.rules
        if last:
            del self.windows[key]

    def _told(self, delta: Delta) -> list[TokenLogprob | None] | None:
        return self.prompt_logprobs if delta.prompt_logprobs is None else delta.prompt_logprobs

    def _released(self, redacted: Sequence[tuple[Window, int, int]]) -> tuple[list[int], list[TokenLogprob] | None]:
        """The tokens whose text has gone out; not those whose text was taken out."""
        for window, start, end in redacted:
            for piece in self.pieces:
                if any(span[0] is window and span[1] < end and span[2] > start for span in piece.spans):
                    piece.token_ids, piece.logprobs = [], None if piece.logprobs is None else []
        out = list(takewhile(lambda piece: all(end <= window.given for window, _, end in piece.spans), self.pieces))
        self.pieces = self.pieces[len(out) :]
        told = [piece.logprobs for piece in out if piece.logprobs is not None]
        token_ids = [token_id for piece in out for token_id in piece.token_ids]
        return token_ids, [each for logprobs in told for each in logprobs] if told else None

    def rest(self, index: int) -> Delta | None:
        """Of an answer that broke off."""
        if self.ended:
            return None
        out = self._searched([], True)
        token_ids, logprobs = self._released(out.redacted)
        reason: FinishReason = "content_filter" if out.blocked else ""
        calls = [ToolCall(index=key, arguments=text) for key, text in out.texts.items() if isinstance(key, int) and text]
        text, reasoning = out.texts.get("text", ""), out.texts.get("reasoning", "")
        if not (text or reasoning or calls or token_ids or reason):
            return None
        return Delta(
            index=index, text=text, reasoning=reasoning, tool_calls=calls, token_ids=token_ids, logprobs=logprobs, finish_reason=reason
        )


class _Searched(Struct):
    """What one push gave."""

    texts: dict[str | int, str] = {}
    """That may go out."""
    spans: list[tuple[Window, int, int]] = []
    redacted: list[tuple[Window, int, int]] = []
    whole: bool = True
    """All of it goes out, and nothing else."""
    blocked: bool = False


class OutputFilter:
    """The responses to one request, as they may go out.

    A text is held back only as long as what follows could make it part of something that is looked for: mostly up to the next
    space, never more than the longest form of that. A choice that is blocked ends with the finish reason `content_filter`; an
    answer that has no finish reason ends with Filtered. An answer that comes as one, and not piece by piece, is withheld as one.
    """

    def __init__(self, scans: Sequence[Scan], stream: bool) -> None:
        self.scans = scans
        self._stream = stream
        self._choices: dict[int, _Choice] = {}
        self._texts: dict[int, Window] = {}
        """Of the elements of TEXT_OUTPUT."""
        self._events: Events | None = None
        self._headers: dict[str, str] = {}
        """Of responses that were held back."""
        self._last: Response | None = None
        self._rules: set[str] = set()

    @property
    def rules(self) -> tuple[str, ...]:
        """Those that the answer has hit so far."""
        windows = list(self._texts.values())
        if self._events is not None:
            windows += self._events.windows.values()
        choices = self._choices.values()
        return tuple(sorted(self._rules.union(*(window.rules for window in windows), *(choice.rules for choice in choices))))

    def push(self, response: Response) -> Sequence[Response]:
        """Raises Filtered."""
        self._last = response
        if response.delta is not None:
            out = self._delta(response, response.delta)
        elif response.raw is not None:
            out = self._raw(response, response.raw)
        else:
            out = self._tensors(response)
        if out is None:
            self._headers.update(response.headers)
            return ()
        if self._headers:
            out.headers = {**self._headers, **out.headers}
            self._headers = {}
        return (out,)

    def finish(self) -> Sequence[Response]:
        """What an answer that broke off still had. Raises Filtered."""
        last = self._last
        if last is None:
            return ()
        out = []
        for index, choice in self._choices.items():
            if (delta := choice.rest(index)) is not None:
                out.append(self._further(last, delta=delta))
        if self._texts:
            rest = [self._text(number, "", True) for number in self._texts]
            if any(rest):
                out.append(self._further(last, outputs={TEXT_OUTPUT: object_array(rest, (len(rest),))}))
        if self._events is not None and (raw := self._events.finish()):
            out.append(self._further(last, raw=raw))
        return out

    def _further(self, last: Response, **parts: Any) -> Response:
        headers, self._headers = self._headers, {}
        return Response(model=last.model, version=last.version, id=last.id, status=last.status, headers=headers, **parts)

    def _delta(self, response: Response, delta: Delta) -> Response | None:
        choice = self._choices.get(delta.index)
        if choice is None:
            if not (delta.text or delta.reasoning or delta.tool_calls or delta.finish_reason):
                return response  # a vector, or tokens of the prompt
            choice = self._choices[delta.index] = _Choice(self.scans)
        out = choice.push(delta)
        if out is delta:
            return response
        return None if out is None else structs.replace(response, delta=out)

    def _tensors(self, response: Response) -> Response:
        changed = {name: self._elements(name, array) for name, array in response.outputs.items() if array.dtype.kind == "O"}
        if all(array is response.outputs[name] for name, array in changed.items()):
            return response
        return structs.replace(response, outputs={**response.outputs, **changed})

    def _elements(self, name: str, array: np.ndarray) -> np.ndarray:
        before = array.reshape(-1).tolist()
        if self._stream and name == TEXT_OUTPUT:
            after = [self._text(number, element.decode(errors="replace"), False) for number, element in enumerate(before)]
        else:
            after = [self._whole(element) for element in before]
        return array if before == after else object_array(after, array.shape)

    def _whole(self, element: bytes) -> bytes:
        try:
            text, encoding = element.decode(), "utf-8"
        except UnicodeDecodeError:
            text, encoding = element.decode("latin-1"), "latin-1"
        window = Window(self.scans)
        out = window.push(text, True)
        self._rules |= window.rules
        _refuse(window)
        return element if out == text else out.encode(encoding)

    def _text(self, number: int, piece: str, last: bool) -> bytes:
        window = self._texts.get(number)
        if window is None:
            window = self._texts[number] = Window(self.scans)
        out = window.push(piece, last)
        _refuse(window)
        return out.encode()

    def _raw(self, response: Response, raw: bytes) -> Response | None:
        if response.status >= 400:
            return response
        if self._events is None and raw[:64].lstrip()[:1] == b"{":
            body = Body(self.scans)
            length = next((each for name, each in response.headers.items() if name.lower() == "inference-header-content-length"), "")
            if length:
                if body.has_binary_texts(raw[: int(length)]):
                    raise ModelError("an answer with a BYTES tensor in the binary form cannot be searched by the filters of this model")
                return response
            out = body.whole(raw)
            self._rules |= body.rules
        else:
            if self._events is None:
                self._events = Events(self.scans)
            out = self._events.push(raw)
        if out is raw:
            return response
        return structs.replace(response, raw=out) if out else None


def _refuse(window: Window) -> None:
    if window.blocked:
        raise Filtered(f"a content filter of this server blocks the answer ({window.blocked})", window.blocked, answer=True)
