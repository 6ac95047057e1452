"""Reads one JSON value as its text comes: where keys and values begin and end, and whether it is JSON at all.

Each character costs the same, however long the value is already.
"""

import json
import re
from typing import Literal

Event = Literal["more", "key", "scalar", "open", "close", "broken"]

_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_BARE = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null")
MAX_BARE = 64
"""Characters of a number."""
MAX_DEPTH = 128

_State = Literal["value", "first", "key", "colon", "next", "string", "bare", "done", "broken"]


class JsonScanner:
    """One value. `step` goes to the next event; between two events the caller may start and stop recording."""

    def __init__(self) -> None:
        self.state: _State = "value"
        self.stack: list[str] = []
        self.string: str | None = None
        """The key or scalar that an event tells of, decoded; None for a scalar that is no string."""
        self.is_null = False
        """It is a null."""
        self.recorded: list[str] | None = None
        """While a list: what is read is added to it, as JSON also where control characters stood in strings."""
        self._is_key = False
        self._token: list[str] = []
        self._escape = ""

    @property
    def depth(self) -> int:
        return len(self.stack)

    def step(self, text: str, at: int) -> tuple[int, Event]:
        """Read on from `at`: (where it stopped, what there is). `more`: the text is used up."""
        while at < len(text):
            state = self.state
            if state == "string":
                at, complete = self._read_string(text, at)
                if complete:
                    return at, self._end_string()
                if self.state == "broken":
                    return at, "broken"
                continue
            if state == "bare":
                match = _BARE.match(text, at)
                if match is not None:
                    self._token.append(match[0])
                    self._record(match[0])
                    at = match.end()
                    if sum(map(len, self._token)) > MAX_BARE:
                        return at, self._break()
                    continue
                return at, self._end_bare()
            if state in ("done", "broken"):
                return at, "broken" if state == "broken" else "more"
            space = _SPACE.match(text, at)
            if space is not None and space.end() > at:
                self._record(space[0])
                at = space.end()
                continue
            found = self._punctuation(text[at])
            if found == "broken":
                return at, self._break()
            if self.state != "bare":
                self._record(text[at])
                at += 1
            if found is not None:
                return at, found
        return at, "more"

    def _record(self, text: str) -> None:
        if self.recorded is not None:
            self.recorded.append(text)

    def _break(self) -> Event:
        self.state = "broken"
        return "broken"

    def _punctuation(self, character: str) -> Event | None:
        """One character outside strings. `broken`: it has no place here; None: nothing to tell."""
        state, stack = self.state, self.stack
        if state in ("value", "first") and character in "{[" and not (state == "first" and stack[-1] == "{"):
            if len(stack) == MAX_DEPTH:
                return "broken"
            stack.append(character)
            self.state = "first"
            return "open"
        if state in ("first", "next") and stack and character == ("}" if stack[-1] == "{" else "]"):
            stack.pop()
            self.state = "next" if stack else "done"
            return "close"
        if character == '"' and state in ("value", "first", "key"):
            self._is_key = state == "key" or (state == "first" and stack[-1] == "{")
            self._token, self.state = [], "string"
            return None
        if state == "colon" and character == ":":
            self.state = "value"
            return None
        if state == "next" and character == ",":
            self.state = "key" if stack[-1] == "{" else "value"
            return None
        if (state == "value" or (state == "first" and stack[-1] == "[")) and _BARE.match(character):
            self._token, self.state = [], "bare"
            return None
        return "broken"

    def _read_string(self, text: str, at: int) -> tuple[int, bool]:
        """(where it stopped, whether the string is complete)"""
        if self._escape:
            self._escape += text[at]
            at += 1
            wanted = 6 if self._escape[1] == "u" else 2
            valid = self._escape[1] in '"\\/bfnrt' if wanted == 2 else all(each in "0123456789abcdefABCDEF" for each in self._escape[2:])
            if not valid:
                self._break()
            elif len(self._escape) == wanted:
                self._token.append(self._escape)
                self._record(self._escape)
                self._escape = ""
            return at, False
        plain = _PLAIN.match(text, at)
        if plain is not None:
            self._token.append(plain[0])
            self._record(plain[0])
            return plain.end(), False
        character = text[at]
        if character == "\\":
            self._escape = "\\"
        elif character == '"':
            self._record('"')
            return at + 1, True
        else:  # models write line ends as they are
            escaped = json.dumps(character)[1:-1]
            self._token.append(escaped)
            self._record(escaped)
        return at + 1, False

    def _end_string(self) -> Event:
        # a lone surrogate cannot go out as UTF-8
        self.string = json.loads(f'"{"".join(self._token)}"').encode("utf-8", "replace").decode()
        if self._is_key:
            self.state = "colon"
            return "key"
        self.state = "next" if self.stack else "done"
        return "scalar"

    def _end_bare(self) -> Event:
        bare = "".join(self._token)
        if _SCALAR.fullmatch(bare) is None:
            return self._break()
        self.string, self.is_null = None, bare == "null"
        self.state = "next" if self.stack else "done"
        return "scalar"
