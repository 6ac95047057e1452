"""Grammars of a text, as grammars of how a call spells it."""

import json
import re

import pytest

from fairlead.cli.demo_models.tiny.checks import CHAT
from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Guide
from fairlead.llm.grammar import Grammars
from fairlead.llm.parsing.spelled import spelled
from fairlead.llm.tokenizer import Tokenizer

PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
"""As Codex describes its tool `apply_patch`."""
SUM = """
start: expr
expr: term (SP "+" SP term)* -> add
    | term
term: INT | "(" expr ")"
SP: " "
%import common (INT, WS)
"""


@pytest.fixture(scope="module")
def allows():
    tokenizer = Tokenizer.load(CHAT)
    grammars = Grammars(tokenizer, 1536, [2])

    def allows(guide: Guide, text: str, *, quoted: bool) -> bool:
        lines, start = spelled(guide, "fl_text", quoted=quoted)
        body = f'start: "\\"" {start} "\\""' if quoted else f"start: {start}"
        matcher = grammars.compile(Guide(kind="lark", text="\n".join((body, *lines, "")), parameter="p")).matcher()
        written = json.dumps(text, ensure_ascii=False) if quoted else text
        ids = tokenizer.encode(written, add_special_tokens=False)
        if matcher.inner.validate_tokens(ids) < len(ids):
            return False
        matcher.inner.consume_tokens(ids)
        return matcher.inner.is_accepting()

    return allows


def lark(text: str) -> Guide:
    return Guide(kind="lark", text=text, parameter="tools[0].format.definition")


def expression(text: str) -> Guide:
    return Guide(kind="regex", text=text, parameter="tools[0].format.definition")


@pytest.mark.parametrize("quoted", [True, False])
def test_a_patch(allows, quoted):
    patch = '*** Begin Patch\n*** Update File: a "b"\\c.py\n@@ def f():\n-\told = "\\n"\n+\tnew/é\n*** End Patch'
    assert allows(lark(PATCH), patch, quoted=quoted) and allows(lark(PATCH), f"{patch}\n", quoted=quoted)
    for before, after in (("+", "*"), ("*** End", "** End"), ("Update", "Copy"), ("\n@@", "\n\n@@")):
        assert not allows(lark(PATCH), patch.replace(before, after), quoted=quoted)


@pytest.mark.parametrize("quoted", [True, False])
def test_a_rule_that_contains_itself(allows, quoted):
    assert allows(lark(SUM), "(4 + 4) + 12", quoted=quoted)
    assert not allows(lark(SUM), "(4 + 4 + 12", quoted=quoted)


@pytest.mark.parametrize("quoted", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [
        r"a/b\/c",
        r'^say "\w+"$',
        r"[^a]+",
        r"\S+\s\S+",
        r"(?:x|y){2,3}z?",
        r"\x41\u0042\t",
        r"(?P<q>[\"\'])x",
        r"\.\\\d+",
        r"C:\\dir",
        "a.b",
        "é+",
    ],
)
def test_a_regular_expression_means_the_same_spelled_or_not(allows, pattern, quoted):
    words = (
        "a/b/c",
        'say "you"',
        "say you",
        'bc"\\',
        "a",
        "b\nc",
        "xy",
        "xyxyz",
        "xxz",
        "AB\t",
        "AB",
        '"x',
        "'x",
        ".\\7",
        "C:\\dir",
        "a\nb",
        "a\tb",
        'a"b',
        "ééé",
        " ",
    )
    for word in words:
        assert allows(expression(pattern), word, quoted=quoted) is (re.fullmatch(pattern, word) is not None), word


@pytest.mark.parametrize("quoted", [True, False])
def test_what_lark_allows_to_be_written(allows, quoted):
    grammar = lark('// a comment\n?start: a?b  # another\n!a: "x"\n  | "y"\nb: ("z"\n  "z")+ [A]\nA: "."')
    for text, right in (("zz", True), ("xzzzz.", True), ("yzz", True), ("xy", False), ("z", False)):
        assert allows(grammar, text, quoted=quoted) is right, text


@pytest.mark.parametrize("quoted", [True, False])
def test_flags(allows, quoted):
    assert allows(lark('start: "Say"i /[a-z]+é/i /./s'), "sAYxYÉ\n", quoted=quoted)
    assert not allows(lark('start: "Say" /[a-z]+é/ /./'), "Sayxé\n", quoted=quoted)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('start: "(" start ")" | /[^x]/', "`start` contains itself"),
        ('start: "a" b', "no rule `b`"),
        ('begin: "a"', "no rule `start`"),
        ("start: /(?=a)b/", "not supported"),
        ("start: /a\\b/", "not supported"),
        ('start: "x"\n%ignore " "', "%ignore"),
        ("start: <tok>", "not understood"),
        ('start: A\nA: "x" & "y"', "not understood"),
        ("start: /[[a]b]/", "not supported"),
        ("%import common.FOO\nstart: FOO", "common.FOO"),
        ('start: "a"\nstart: "b"', "there twice"),
        ('start "a"', "a rule is written"),
        ("start: /a/x", "flags"),
        ("start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(30)) + 'a30: "a"', "too large"),
        ('start: b{1000}\nb: c{2,1000}\nc: "a"', "too large"),
        ("start: /((a{100}){100}){100}/", "too large"),
        ("start: " + '"a" ' * 10_000, "characters"),
        ('start: a\na: b\nb: "x" | "(" c ")"\nc: a /[^x]/', "contains itself"),
    ],
)
def test_what_cannot_be_followed_is_named(allows, text, says):
    with pytest.raises(InvalidRequest, match=r"`tools\[0\].format.definition`") as refused:
        allows(lark(text), "", quoted=True)
    assert says in refused.value.message
