"""Protobuf's text format, read without a schema."""

import re
from typing import NoReturn

from msgspec import Struct

from fairlead.core.errors import ConfigError


class Field(Struct, frozen=True):
    """One field as it is written. Identifiers (enum values, `inf`) are strings; repeated fields are as many Fields."""

    name: str
    value: "Value"
    line: int


Value = str | int | float | bool | list[Field]


def parse(text: str, source: str) -> list[Field]:
    """The fields of a message in their order. Raises ConfigError as `source:line: what is wrong`."""
    return _Reader(text, source).message(end="", depth=0)


_MAX_DEPTH = 64
_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
    |(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    |(?P<number>-?\s*(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fF]?)(?![\w.]))
    |(?P<word>-?\s*[A-Za-z_]\w*)
    |(?P<mark>[{}<>\[\]:,;])""",
    re.X,
)
_ESCAPE = re.compile(r"\\(?:[xX]([0-9a-fA-F]{1,2})|([0-7]{1,3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.S)
_ESCAPED = {
    "n": b"\n",
    "t": b"\t",
    "r": b"\r",
    "a": b"\a",
    "b": b"\b",
    "f": b"\f",
    "v": b"\v",
    "?": b"?",
    "\\": b"\\",
    "'": b"'",
    '"': b'"',
}


_BOOLEANS: dict[str, bool] = {"true": True, "True": True, "t": True, "false": False, "False": False, "f": False}


class _Token(Struct, frozen=True):
    kind: str | None
    text: str
    line: int


class _Reader:
    """A recursive descent over the tokens."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.tokens: list[_Token] = []
        self.at = 0
        position, line = 0, 1
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise ConfigError(f"{source}:{line}: unexpected {text[position]!r}")
            if match.lastgroup != "space":
                self.tokens.append(_Token(match.lastgroup, match[0], line))
            line += match[0].count("\n")
            position = match.end()
        self.tokens.append(_Token("end", "", line))

    def message(self, end: str, depth: int) -> list[Field]:
        """Fields up to the closing mark; `end` is "" for the whole text."""
        if depth > _MAX_DEPTH:
            self.fail("messages are nested too deep")
        fields: list[Field] = []
        while True:
            token = self.tokens[self.at]
            if end and self.take(end):
                return fields
            if token.kind == "end":
                if end:
                    self.fail(f"expected {end!r}")
                return fields
            if token.kind != "word" or token.text.startswith("-"):
                self.fail("expected a field name")
            self.at += 1
            colon = self.take(":")
            if self.take("["):
                while not self.take("]"):
                    line = self.tokens[self.at].line
                    fields.append(Field(token.text, self.value(colon, depth), line))
                    if self.take(","):
                        if self.tokens[self.at].text == "]":
                            self.fail("expected a value")
                    elif self.tokens[self.at].text != "]":
                        self.fail("expected ',' or ']'")
            else:
                fields.append(Field(token.text, self.value(colon, depth), token.line))
            if not self.take(","):
                self.take(";")

    def value(self, colon: bool, depth: int) -> Value:
        if self.take("{"):
            return self.message("}", depth + 1)
        if self.take("<"):
            return self.message(">", depth + 1)
        if not colon:
            self.fail("expected ':' or '{'")
        token = self.tokens[self.at]
        if token.kind == "string":
            return self.string()
        value: Value
        if token.kind == "number":
            value = self.number(re.sub(r"\s", "", token.text))
        elif token.kind == "word":
            text = re.sub(r"\s", "", token.text)
            value = _BOOLEANS.get(text, text)
        else:
            self.fail("expected a value")
        self.at += 1
        return value

    def string(self) -> str:
        """Adjacent strings are one."""
        content = b""
        while (token := self.tokens[self.at]).kind == "string":
            content += self.unescape(token.text[1:-1])
            self.at += 1
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{self.source}:{token.line}: a string is not UTF-8") from None

    def unescape(self, text: str) -> bytes:
        parts, at = [], 0
        for match in _ESCAPE.finditer(text):
            parts.append(text[at : match.start()].encode())
            at = match.end()
            hexadecimal, octal, short, long, character = match.groups()
            if character is not None and character not in _ESCAPED:
                self.fail(f"unknown escape \\{character}")
            code = int(hexadecimal or short or long or "0", 16) if octal is None else int(octal, 8)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000 or (octal and code > 255):
                self.fail(f"{match[0]} is no character")
            parts.append(_ESCAPED[character] if character else chr(code).encode() if short or long else bytes([code]))
        parts.append(text[at:].encode())
        return b"".join(parts)

    def number(self, text: str) -> int | float:
        digits = text.lstrip("-")
        sign = -1 if text.startswith("-") else 1
        if digits[:2] in ("0x", "0X"):
            return sign * int(digits, 16)
        if not digits.isdecimal():
            return sign * float(digits.rstrip("fF"))
        if digits.startswith("0") and len(digits) > 1:
            if not set(digits) <= set("01234567"):
                self.fail("a number with a leading 0 is octal")
            return sign * int(digits, 8)
        if len(digits) > 20:
            self.fail("the number is too large")
        return sign * int(digits)

    def take(self, mark: str) -> bool:
        token = self.tokens[self.at]
        if token.kind == "mark" and token.text == mark:
            self.at += 1
            return True
        return False

    def fail(self, message: str) -> NoReturn:
        token = self.tokens[self.at]
        raise ConfigError(
            f"{self.source}:{token.line}: {message}, got {token.text!r}"
            if token.text
            else f"{self.source}:{token.line}: {message}, but the text ends"
        )
