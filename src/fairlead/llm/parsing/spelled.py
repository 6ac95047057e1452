"""Grammars of a text, as grammars of how a call spells it: within a JSON string, or as it is.

They come in Lark, or as one regular expression, and become terminals of llguidance's Lark. A grammar without recursion becomes one automaton:
the lexer never goes back more than a byte, and so could not tell the backslash of an escape that it may read from that of one that ends a lexeme.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import regex

from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Guide

MAX_CHARS = 32 << 10
MAX_SIZE = 20_000
"""Of one automaton, in characters: some 0.1 s and 20 MB."""
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|(?://|\#)[^\n]*|\\\r?\n)
    |(?P<line>\n)
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[a-z]*)
    |(?P<directive>%\w+)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<alias>->)
    |(?P<repeat>\{\d+(?:,\d*)?\})
    |(?P<sign>[:|()\[\]*+?!])""",
    re.VERBOSE,
)
_COMMON = {
    "LF": r'"\n"',
    "CR": r'"\r"',
    "NEWLINE": r"/(\r?\n)+/",
    "WS": r"/[ \t\f\r\n]+/",
    "WS_INLINE": r"/[ \t]+/",
    "DIGIT": "/[0-9]/",
    "HEXDIGIT": "/[0-9a-fA-F]/",
    "INT": "/[0-9]+/",
    "SIGNED_INT": "/[+-]?[0-9]+/",
    "DECIMAL": r"/[0-9]+\.[0-9]*|\.[0-9]+/",
    "FLOAT": r"/[0-9]+([eE][+-]?[0-9]+)|([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?/",
    "NUMBER": r"/([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?/",
    "SIGNED_NUMBER": r"/[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?/",
    "LCASE_LETTER": "/[a-z]/",
    "UCASE_LETTER": "/[A-Z]/",
    "LETTER": "/[A-Za-z]/",
    "WORD": "/[A-Za-z]+/",
    "CNAME": "/[_A-Za-z][_A-Za-z0-9]*/",
    "ESCAPED_STRING": r'/"([^"\\]|\\.)*"/',
}
"""Lark's common terminals."""
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
"""What a JSON string escapes; other control characters are not written."""
_PLAIN = r'[^"\\\x00-\x1f]'
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0", "a": "\a"}
_HEX = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|[xu]\{([0-9a-fA-F]{1,6})\})")
_IMPORT = re.compile(
    r"^[ \t]*%import[ \t]+common[ \t]*(?:\.[ \t]*(\w+)|\.?[ \t]*\(([\w\s,]+)\))(?:[ \t]*->[ \t]*(\w+))?[ \t]*$", re.MULTILINE
)
_CLASS = re.compile(r"\\(?:[dDwWsS]|[pP](?:\{\w+\}|\w))")
_SET = re.compile(r"\[\^?\]?(?:[^\[\]\\&~-]|\\.|-(?!-)|[&~](?![&~]))*\]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?:|\?P?<\w+>)?(?!\?)")
_REPEATED = re.compile(r"\{(?:\d+,)?(\d+)")
_COUNT = re.compile(r"\{\d+(?:,\d*)?\}\??|[*+?]\??")


class _Token(NamedTuple):
    kind: str
    text: str


class _Broken(ValueError):
    """What of a grammar cannot be followed, in words."""


def spelled(guide: Guide, prefix: str, *, quoted: bool) -> tuple[list[str], str]:
    """(lines of a grammar, the name of its beginning) of a text of this guide (`lark` or `regex`). `prefix`: of its names; `quoted`: within a
    JSON string. Raises InvalidRequest."""
    try:
        if len(guide.text) > MAX_CHARS:
            raise _Broken(f"it has more than {MAX_CHARS} characters")
        rules = {"start": [_Token("regex", f"/{_anchored(guide.text)}/")]} if guide.kind == "regex" else _rules(guide.text)
        return _Spelling(rules, prefix, quoted=quoted).lines()
    except (_Broken, RecursionError) as error:
        raise InvalidRequest(f"`{guide.parameter}` cannot be followed: {error or 'it is nested too deeply'}") from None


def _anchored(text: str) -> str:
    """Without the anchors that say what holds anyway: all of it is matched."""
    text = text.removeprefix("^")
    return text[:-1] if text.endswith("$") and not text.endswith("\\$") else text


def _rules(text: str) -> dict[str, list[_Token]]:
    """What each name stands for. Raises _Broken."""
    rules: dict[str, list[_Token]] = {}
    for match in _IMPORT.finditer(text):
        for name in re.findall(r"\w+", match[2]) if match[2] else [match[1]]:
            if name not in _COMMON:
                raise _Broken(f"there is no common.{name}: {', '.join(_COMMON)}")
            rules[match[3] or name] = [_Token("string" if _COMMON[name].startswith('"') else "regex", _COMMON[name])]
    for statement in _statements(_IMPORT.sub("", text)):
        head, *rest = statement[1:] if statement[0].text in ("?", "!") and len(statement) > 1 else statement
        if head.kind == "directive":
            raise _Broken(f"{head.text} is not supported here")
        if head.kind != "name" or not rest or rest[0].text != ":":
            raise _Broken(f"a rule is written `name: ...`, not {' '.join((head.text, *(token.text for token in rest[:2])))[:64]!r}")
        name, body = head.text, rest[1:]
        if name in rules:
            raise _Broken(f"`{name}` is there twice")
        aliases = {at + step for at, token in enumerate(body) if token.kind == "alias" for step in (0, 1)}
        rules[name] = [token for at, token in enumerate(body) if at not in aliases]
    if "start" not in rules:
        raise _Broken("it has no rule `start`")
    return rules


def _statements(text: str) -> Iterator[list[_Token]]:
    """A line that begins with `|` goes on with the one before, and so does whatever stands in brackets."""
    statement: list[_Token] = []
    ended, depth, at = False, 0, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _Broken(f"{text[at : at + 32]!r} is not understood")
        at, kind = match.end(), match.lastgroup or ""
        if kind == "line":
            ended = depth <= 0
        elif kind != "space":
            if statement and ended and match[0] != "|":
                yield statement
                statement = []
            ended = False
            depth += (match[0] in ("(", "[")) - (match[0] in (")", "]"))
            statement.append(_Token(kind, match[0]))
    if statement:
        yield statement


class _Spelling:
    def __init__(self, rules: Mapping[str, list[_Token]], prefix: str, *, quoted: bool) -> None:
        self.rules = rules
        self.prefix = prefix
        self.quoted = quoted
        self.escapes = False
        """Whether a regular expression has matched what a string escapes."""

    def lines(self) -> tuple[list[str], str]:
        order = self._used()
        flat = self._flat(order)
        recursive = next((name for name in order if name not in flat), "")
        if not recursive:
            self._check_size(flat)
        names = {name: f"{self.prefix}_{name}".lower() if recursive else f"{self.prefix}_{name}".upper() for name in order}
        if len(set(names.values())) < len(names):
            names = {name: f"{each}_{number}" for number, (name, each) in enumerate(names.items())}
        lines = [f"{names[name]}: {' '.join(self._token(token, names) for token in self.rules[name])}" for name in order]
        if recursive and self.escapes:
            raise _Broken(
                f"the rule `{recursive}` contains itself, and regular expressions match quotation marks, backslashes or control characters: "
                "only one of the two can be followed within a call"
            )
        return lines, names["start"]

    def _used(self) -> list[str]:
        """The rules that `start` leads to."""
        order, known = ["start"], {"start"}
        for name in order:
            for token in self.rules[name]:
                if token.kind == "name" and token.text not in known:
                    if token.text not in self.rules:
                        raise _Broken(f"there is no rule `{token.text}`")
                    known.add(token.text)
                    order.append(token.text)
        return order

    def _flat(self, order: list[str]) -> dict[str, None]:
        """Those that do not lead to themselves, each behind all that it leads to."""
        leads = {name: {token.text for token in self.rules[name] if token.kind == "name"} for name in order}
        waiting_for = {name: len(others) for name, others in leads.items()}
        within: dict[str, list[str]] = {name: [] for name in order}
        for name, others in leads.items():
            for other in others:
                within[other].append(name)
        flat = [name for name, number in waiting_for.items() if not number]
        for name in flat:
            for outer in within[name]:
                waiting_for[outer] -= 1
                if not waiting_for[outer]:
                    flat.append(outer)
        return dict.fromkeys(flat)

    def _check_size(self, flat: Iterable[str]) -> None:
        """Of the automaton, about, with what each rule leads to written out. Raises _Broken."""
        sizes: dict[str, int] = {}
        for name in flat:
            sizes[name] = min(self._size(name, sizes), MAX_SIZE + 1)
        if sizes["start"] > MAX_SIZE:
            raise _Broken("written out it is too large: its rules contain, or repeat, each other too often")

    def _size(self, name: str, sizes: Mapping[str, int]) -> int:
        outer: list[int] = []
        total = last = 0  # of what is in the brackets so far, and of its last part
        for kind, text in self.rules[name]:
            counts = [int(count[:9]) for count in _REPEATED.findall(text)] if kind in ("repeat", "regex") else []
            if kind == "repeat":
                total += last * max(counts[0] - 1, 0)
                continue
            if text in ("(", "["):
                outer.append(total)
                total = last = 0
            elif text in (")", "]"):
                last = total
                total += outer.pop() if outer else 0
            else:
                repeated = prod(map(max, counts, [1] * len(counts))) if "){" in text else 1  # perhaps one within the other
                last = sizes[text] if kind == "name" else len(text) * repeated + sum(counts)
                total += last
        return total + sum(outer)

    def _token(self, token: _Token, names: Mapping[str, str]) -> str:
        match token.kind:
            case "name":
                return names[token.text]
            case "string":
                return self._string(token.text)
            case "regex":
                body, _, flags = token.text[1:].rpartition("/")
                return self._expression(body.replace("\\/", "/"), flags)
        return token.text

    def _string(self, text: str) -> str:
        body, _, flags = text[1:].rpartition('"')
        try:
            literal = json.loads(f'"{body}"')
        except ValueError:
            raise _Broken(f"{text[:64]} is no string") from None
        if flags:
            return self._expression(re.escape(literal), "i")
        return json.dumps(self._spell(literal), ensure_ascii=False)

    def _spell(self, literal: str) -> str:
        return json.dumps(literal, ensure_ascii=False)[1:-1] if self.quoted else literal

    # Regular expressions

    def _expression(self, text: str, flags: str) -> str:
        if set(flags) - set("isu"):
            raise _Broken(f"the flags {flags!r} of a regular expression are not supported")
        inner = "".join(self._parts(text, "i" in flags, "s" in flags))
        return "/" + inner.replace("/", r"\/") + "/"

    def _parts(self, text: str, any_case: bool, dot_all: bool) -> Iterator[str]:
        at = 0
        while at < len(text):
            for pattern in (_HEX, _CLASS, _SET, _GROUP, _COUNT):
                if (match := pattern.match(text, at)) is not None:
                    break
            else:
                match = re.compile(r"\\.|.", re.DOTALL).match(text, at)
                assert match is not None
                pattern = None
            at, part = match.end(), match[0]
            if pattern is _HEX:
                yield self._literal(chr(int(match[1] or match[2] or match[3], 16)), any_case)
            elif pattern in (_CLASS, _SET):
                yield self._set(part, any_case)
            elif pattern is _GROUP:
                yield "(?:"
            elif pattern is _COUNT or part in ("|", ")"):
                yield part
            elif part == ".":
                yield self._set(r"[\s\S]" if dot_all else r"[^\n]", any_case=False)
            elif part in ("(", "[", "{", "^", "$") or (part[0] == "\\" and part[1:].isalnum() and part[1] not in _ESCAPES):
                raise _Broken(f"{text[max(at - 1, 0) : at + 15]!r} of a regular expression is not supported here")
            else:
                yield self._literal(_ESCAPES.get(part[1], part[1]) if part[0] == "\\" else part, any_case)

    def _literal(self, character: str, any_case: bool) -> str:
        spelled = re.escape(self._spell(character))
        return f"(?i:{spelled})" if any_case and character.isalpha() else f"(?:{spelled})" if len(spelled) > 2 else spelled

    def _set(self, text: str, any_case: bool) -> str:
        """One character of a set."""
        shown = f"(?i:{text})" if any_case else text
        if not self.quoted:
            return shown
        try:
            has = regex.compile(shown).fullmatch
        except regex.error as error:
            raise _Broken(f"{text[:64]!r} is no set of characters: {error}") from None
        if not any(has(chr(code)) for code in (*range(0x20), 0x22, 0x5C)):
            return shown
        self.escapes = True
        plain = f"[{text}&&{_PLAIN}]"
        short = "".join(each[1] if each[1] != "\\" else "\\\\" for character, each in _SHORT.items() if has(character))
        parts = [f"(?i:{plain})" if any_case else plain, *([rf"\\[{short}]"] if short else ())]
        return f"(?:{'|'.join(parts)})"
