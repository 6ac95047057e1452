"""Answers of other servers, in JSON or as server-sent events: the texts in them filtered, all else as it came."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from fairlead.core.errors import Filtered, ModelError
from fairlead.gateway.filters.finding import Scan
from fairlead.gateway.filters.texts import MAX_DEPTH, encoded
from fairlead.gateway.filters.window import Window

MAX_EVENT_BYTES = 4 << 20
MAX_TEXTS = 1024
"""In one stream: choices, their fields, calls of tools."""
_EVENT_END = re.compile(rb"\r?\n\r?\n")
_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "text")
"""Texts of a choice that come piece by piece."""
_ANSWERS = ("choices", "outputs", "text_output", "output")
"""Where an answer has its texts; `data` of embeddings are numbers."""

Key = tuple[int, str, int]
"""Of a text in a stream: choice, field, tool call."""
Place = tuple[Key, dict[str, Any], str]
"""A text: its key, and where it stands."""


class Body:
    """A whole answer in JSON."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self._scans = scans
        self.rules: set[str] = set()

    def whole(self, raw: bytes) -> bytes:
        """The same object where nothing changed. Raises Filtered, ModelError."""
        body = _parsed(raw)
        if not isinstance(body, dict):
            return raw
        changed = False
        for name in _ANSWERS:
            if name == "choices" and isinstance(body.get(name), list):
                changed |= sum(map(self._choice, body[name])) > 0
            elif name in body:
                after, blocked = self._deep(body[name], 0)
                if blocked:
                    raise Filtered(f"a content filter of this server blocks the answer ({blocked})", blocked, answer=True)
                changed |= after is not body[name]
                body[name] = after
        return encoded(body) if changed else raw

    def has_binary_texts(self, head: bytes) -> bool:
        body = _parsed(head)
        outputs = body.get("outputs", []) if isinstance(body, dict) else []
        return any(isinstance(each, dict) and each.get("datatype") == "BYTES" for each in outputs)

    def _choice(self, choice: Any) -> bool:
        """Whether it was changed, in place."""
        if not isinstance(choice, dict):
            return False
        changed = False
        for name in ("message", "text"):
            if name not in choice:
                continue
            after, blocked = self._deep(choice[name], 0)
            if blocked:
                choice[name] = {"role": "assistant", "content": ""} if name == "message" else ""
                choice["finish_reason"] = "content_filter"
            elif after is choice[name]:
                continue
            else:
                choice[name] = after
            changed = True
        if changed and "logprobs" in choice:
            choice["logprobs"] = None  # they spell out what was taken out
        return changed

    def _deep(self, value: Any, depth: int) -> tuple[Any, str]:
        """(the value with every text in it filtered, the rule that blocks it)."""
        if depth > MAX_DEPTH:
            raise ModelError(f"the answer is nested more than {MAX_DEPTH} deep")
        if isinstance(value, str):
            window = Window(self._scans)
            text = window.push(value, True)
            self.rules |= window.rules
            return value if text == value else text, window.blocked
        items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        changes = {}
        for name, each in items:
            after, blocked = self._deep(each, depth + 1)
            if blocked:
                return value, blocked
            if after is not each:
                changes[name] = after
        if not changes:
            return value, ""
        copy = value.copy()
        for name, after in changes.items():
            copy[name] = after
        return copy, ""


class Events:
    """A stream of server-sent events. What is not held or changed goes on byte for byte."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self._scans = scans
        self._rest = b""
        """The beginning of an event that has not come to its end."""
        self.windows: dict[Key, Window] = {}
        self._blocked: set[int] = set()
        self._envelope: dict[str, Any] = {}
        """Of the last event, for one that must be made up."""
        self._before: Sequence[bytes] = ()
        """Events made up to stand before the one at hand."""

    def push(self, data: bytes) -> bytes:
        """Raises Filtered, ModelError."""
        whole = self._rest + data if self._rest else data
        out, at = [], 0
        while (match := _EVENT_END.search(whole, at)) is not None:
            out.append(self._event(whole[at : match.end()]))
            at = match.end()
        self._rest = whole[at:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ModelError("an event of the answer is too long to be searched by the filters of this model")
        joined = b"".join(out)
        return data if joined == data else joined

    def finish(self) -> bytes:
        """What has not gone out when the stream ends. Raises Filtered, ModelError."""
        rest, self._rest = self._rest, b""
        return (self._event(rest) if rest else b"") + self._flushed()

    def _event(self, event: bytes) -> bytes:
        lines = event.splitlines()
        data = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        if not data:
            return event
        if data == b"[DONE]":
            return self._flushed() + event
        body = _parsed(data)
        if not isinstance(body, dict):
            return event
        if isinstance(body.get("choices"), list):
            out = self._chunk(body)
        elif isinstance(body.get("text_output"), str):
            out = self._piece(body)
        else:
            return event
        if out is body:
            return event
        if out is None:
            return b""
        others = b"".join(line + b"\n" for line in lines if line and not line.startswith(b"data:"))
        return b"".join((*self._before, others, b"data: ", encoded(out), b"\n\n"))

    def _piece(self, body: dict[str, Any]) -> dict[str, Any]:
        """Of KServe's generate_stream."""
        self._before = ()
        self._envelope = {name: each for name, each in body.items() if name != "text_output"}
        text = self._push((0, "text_output", 0), body["text_output"], False)
        return body if text == body["text_output"] else {**body, "text_output": text}

    def _chunk(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The same object: as it came; None: nothing of it goes out."""
        self._envelope = {name: each for name, each in body.items() if name not in ("choices", "usage")}
        before: list[bytes] = []
        self._before = before
        choices, changed, useful = [], False, bool(body.get("usage")) or not body["choices"]
        for choice in body["choices"]:
            index = choice.get("index", 0) if isinstance(choice, dict) else None
            if not isinstance(index, int):
                raise ModelError("an event of the answer cannot be read by the filters of this model")
            if index in self._blocked:
                changed = True
                continue
            altered, tells = self._altered(choice, index, before)
            changed, useful = changed or altered, useful or tells
            choices.append(choice)
        if not changed and not before:
            return body
        if not useful and not before:
            return None
        return {**body, "choices": choices}

    def _altered(self, choice: dict[str, Any], index: int, before: list[bytes]) -> tuple[bool, bool]:
        """(whether it was changed, in place; whether there is still anything in it)."""
        ends = bool(choice.get("finish_reason"))
        places = list(_places(choice, index))
        altered, empty = False, bool(places)
        for key, container, name in places:
            text = self._push(key, container[name], ends)
            altered |= text != container[name]
            empty &= not text
            container[name] = text
        if ends:
            before += self._made_up(index, {key for key, _, _ in places})
        if any(window.blocked for (choice_index, _, _), window in self.windows.items() if choice_index == index):
            self._blocked.add(index)
            choice["finish_reason"] = "content_filter"
            altered, empty = True, False
        if altered and "logprobs" in choice:
            choice["logprobs"] = None
        return altered, not empty or ends or "role" in choice.get("delta", ())

    def _push(self, key: Key, text: str, last: bool) -> str:
        window = self.windows.get(key)
        if window is None:
            if len(self.windows) >= MAX_TEXTS:
                raise ModelError("an answer of so many texts cannot be searched by the filters of this model")
            window = self.windows[key] = Window(self._scans)
        out = "" if window.blocked else window.push(text, last)
        if window.blocked and key[1] == "text_output":
            raise Filtered(f"a content filter of this server blocks the answer ({window.blocked})", window.blocked, answer=True)
        return out

    def _made_up(self, index: int, told: set[Key]) -> Iterator[bytes]:
        """Events with what was held of a choice's texts, but for those that are told anyway."""
        for key in [key for key in self.windows if key[0] == index and key not in told]:
            if text := self._push(key, "", True):
                yield self._made(key, text)

    def _made(self, key: Key, text: str) -> bytes:
        index, field, number = key
        if field == "text_output":
            return b"data: " + encoded({**self._envelope, "text_output": text}) + b"\n\n"
        choice: dict[str, Any] = {"index": index, "finish_reason": None}
        if field == "text":
            choice["text"] = text
        elif field == "arguments":
            choice["delta"] = {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
        else:
            choice["delta"] = {field: text}
        return b"data: " + encoded({**self._envelope, "choices": [choice]}) + b"\n\n"

    def _flushed(self) -> bytes:
        """What is held of every choice that has not ended."""
        out: list[bytes] = []
        for index in dict.fromkeys(key[0] for key in self.windows):
            if index in self._blocked:
                continue
            out += self._made_up(index, set())
            if any(window.blocked for key, window in self.windows.items() if key[0] == index):
                self._blocked.add(index)
                choice: dict[str, Any] = {"index": index, "delta": {}, "finish_reason": "content_filter"}
                out.append(b"data: " + encoded({**self._envelope, "choices": [choice]}) + b"\n\n")
        return b"".join(out)


def _places(choice: dict[str, Any], index: int) -> Iterator[Place]:
    delta = choice.get("delta")
    for container in (choice, delta):
        if isinstance(container, dict):
            for name in _FIELDS:
                if isinstance(container.get(name), str):
                    yield (index, name, 0), container, name
    calls = delta.get("tool_calls") if isinstance(delta, dict) else None
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            number = call.get("index", 0)
            yield (index, "arguments", number if isinstance(number, int) else 0), function, "arguments"


def _parsed(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ModelError("an answer that is no JSON cannot be searched by the filters of this model") from None
