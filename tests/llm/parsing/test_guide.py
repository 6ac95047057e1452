"""Grammars of calls: what they demand is what the parser reads."""

import json
from itertools import chain

import pytest

from fairlead.cli.demo_models.tiny.checks import CHAT
from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Chat, Generate, Guide, Message, ToolCall, ToolChoice, add_calls
from fairlead.llm.grammar import Grammars
from fairlead.llm.parsing.answers import AnswerFormat
from fairlead.llm.parsing.choose import FORMATS, choose_template, shipped
from fairlead.llm.parsing.guide import guide_of
from fairlead.llm.parsing.parser import ResponseParser
from fairlead.llm.parsing.template import template_of
from fairlead.llm.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}}
RIGHT = {"city": "Oslo", "days": 3, "unit": "C"}
WRONG = {"city": "Oslo", "days": 3, "unit": "K"}
REQUIRED = ToolChoice(mode="required")
CALLING = [name for name in FORMATS if shipped(name)[0].call]
MODES = [
    (name, mode)
    for name in CALLING
    for mode in ("required", "auto")
    if mode == "required" or name not in ("harmony", "deepseek", "mistral-args")
]
"""Calls of these three begin with tokens that this tokenizer lacks: in its texts nothing tells them."""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(CHAT)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, 1536, [2])


@pytest.fixture(scope="module")
def added(tokenizer):
    return {token.content: id for id, token in tokenizer.backend.get_added_tokens_decoder().items()}


def written(template, *calls, before=True):
    """As a model that was taught the format writes calls."""
    texts = []
    for name, arguments in calls:
        shape = template.calls.calls
        inner = json.dumps(arguments)
        if template.argument:
            inner = "".join(
                template.argument.replace("KEY", key).replace("VALUE", value if isinstance(value, str) else json.dumps(value))
                for key, value in arguments.items()
            )
        texts.append(template.call.replace("NAME", json.dumps(name) if shape.name.key else name).replace("ARGUMENTS", inner))
    return template.before + template.between.join(texts) + template.after


def allows(grammars, tokenizer, guide, text):
    """Whether the whole of it may be written, and be all."""
    matcher = grammars.compile(guide).matcher()
    ids = tokenizer.encode(text, add_special_tokens=False)
    if matcher.inner.validate_tokens(ids) < len(ids):
        return False
    matcher.inner.consume_tokens(ids)
    return matcher.inner.is_accepting()


def of(template, added, tools=(WEATHER, NOW), choice=REQUIRED, guide=None, thought=""):
    return guide_of(template, added, tools=tools, choice=choice, guide=guide, thought=thought)


@pytest.mark.parametrize("name", CALLING)
def test_what_is_demanded_is_what_is_read(name, grammars, tokenizer, added):
    template, _ = shipped(name)
    guide = of(template, added)
    text = written(template, ("weather", RIGHT), ("now", {}))
    assert allows(grammars, tokenizer, guide, text)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, NOW)}
    parser = ResponseParser(template, tools=schemas)
    calls: list[ToolCall] = []
    add_calls(calls, [piece.call for piece in chain(parser.push(text), parser.finish()) if piece.call is not None])
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", RIGHT), ("now", {})]
    assert not allows(grammars, tokenizer, guide, written(template, ("weather", WRONG)))
    assert not allows(grammars, tokenizer, guide, written(template, ("else", {})))
    assert not allows(grammars, tokenizer, guide, "It rains.")


@pytest.mark.parametrize("name", CALLING)
def test_tools_and_arguments_may_be_called_as_the_holes_of_a_format(name, grammars, tokenizer, added):
    template, _ = shipped(name)
    tool = {
        "type": "function",
        "function": {"name": "GET_ARGUMENTS", "parameters": {"type": "object", "properties": {"MAX_VALUE": {"type": "integer"}}}},
    }
    guide = of(template, added, tools=(tool,))
    text = written(template, ("get", {"max": 5})).replace("get", "GET_ARGUMENTS").replace("max", "MAX_VALUE")
    assert allows(grammars, tokenizer, guide, text)
    assert not allows(grammars, tokenizer, guide, text.replace("5", "true"))


@pytest.mark.parametrize("name", CALLING)
def test_one_call_of_one_tool(name, grammars, tokenizer, added):
    template, _ = shipped(name)
    one = of(template, added, choice=ToolChoice(mode="required", parallel=False))
    assert allows(grammars, tokenizer, one, written(template, ("now", {})))
    assert not allows(grammars, tokenizer, one, written(template, ("now", {}), ("now", {})))
    named = of(template, added, choice=ToolChoice(mode="named", name="now"))
    assert allows(grammars, tokenizer, named, written(template, ("now", {})))
    assert not allows(grammars, tokenizer, named, written(template, ("weather", RIGHT)))


def test_strict_tools_are_held_to_their_schemas_and_the_rest_is_free(grammars, tokenizer, added):
    template, _ = shipped("hermes")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    guide = of(template, added, tools=(strict, NOW), choice=ToolChoice())
    assert allows(grammars, tokenizer, guide, "It rains < today >.")
    assert allows(
        grammars, tokenizer, guide, "Wait: " + written(template, ("weather", RIGHT)) + " and " + written(template, ("now", {"a": 1}))
    )
    assert not allows(grammars, tokenizer, guide, "Wait: " + written(template, ("weather", WRONG)))


@pytest.mark.parametrize(
    ("text", "is_free"),
    [
        ("It rains.", True),
        ('{"city": "Oslo"} is what you asked for', True),
        ('{"nam": 1}', True),
        (' {\n"parameters": ', False),
        ('{"name": "else", "parameters": {}}', False),
        ('Here: }; {"name": "weather"', False),
        ("if (x) { a } ; { b }", True),
    ],
)
def test_calls_that_begin_with_nothing_are_told_from_text_by_their_beginning(text, is_free, grammars, tokenizer, added):
    template, _ = shipped("llama3")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    guide = of(template, added, tools=(strict, NOW), choice=ToolChoice())
    assert allows(grammars, tokenizer, guide, text) is is_free
    parser = ResponseParser(template, tools={"weather": {}, "now": {}})
    pieces = [*parser.push(text), *parser.finish()]
    assert not is_free or "".join(piece.text for piece in pieces) == text
    assert allows(grammars, tokenizer, guide, written(template, ("weather", RIGHT), ("now", {"a": 1})))
    assert not allows(grammars, tokenizer, guide, written(template, ("weather", WRONG)))


def test_strict_tools_need_calls_that_can_be_told_from_text(added):
    fields = {"tool_calls": {"open_pattern": r"\A(?=\{)", "content": "json"}, "content": {}}
    template = template_of("x", {"call": '{"name": NAME, "arguments": ARGUMENTS}', "response_template": {"fields": fields}})
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    with pytest.raises(InvalidRequest, match="cannot be `strict`"):
        of(template, added, tools=(strict,), choice=ToolChoice())


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_some_of_the_tools_that_are_shown_may_be_called(mode, name, grammars, tokenizer, added):
    template, _ = shipped(name)
    guide = of(template, added, choice=ToolChoice(mode=mode, allowed=("now",)))
    assert allows(grammars, tokenizer, guide, written(template, ("now", {}), ("now", {})))
    assert not allows(grammars, tokenizer, guide, written(template, ("weather", RIGHT)))
    assert allows(grammars, tokenizer, guide, "It rains.") is (mode == "auto")


GREETING = Guide(kind="lark", text='start: "say " WORD ("\\n" WORD)*\nWORD: /"[a-zé]+"/', parameter="tools[0].format.definition")
TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
CUSTOM = {"type": "function", "function": {"name": "greet", "parameters": TEXT}}


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_the_text_that_a_tool_takes_follows_its_grammar(mode, name, grammars, tokenizer, added):
    template, _ = shipped(name)
    guide = of(template, added, tools=(CUSTOM, NOW), choice=ToolChoice(mode=mode, inputs={"greet": GREETING}))
    said = 'say "hé"\n"you"'
    text = written(template, ("greet", {"input": said})).replace("\\u00e9", "é")
    assert allows(grammars, tokenizer, guide, text)
    parser = ResponseParser(template, tools={"greet": TEXT, "now": {}})
    calls: list[ToolCall] = []
    add_calls(calls, [piece.call for piece in chain(parser.push(text), parser.finish()) if piece.call is not None])
    assert [json.loads(call.arguments) for call in calls] == [{"input": said}]
    assert not allows(grammars, tokenizer, guide, written(template, ("greet", {"input": "say you"})))
    assert allows(grammars, tokenizer, guide, written(template, ("now", {})))


def test_reasoning_comes_before_what_is_demanded(grammars, tokenizer, added):
    template, _ = shipped("hermes")
    call = written(template, ("now", {}))
    may, must = (of(template, added, thought=thought) for thought in ("may", "open"))
    assert allows(grammars, tokenizer, may, f"<think>\nhm <b>\n</think>\n\n{call}") and allows(grammars, tokenizer, may, call)
    assert allows(grammars, tokenizer, must, f"hm\n</think>\n\n{call}")
    assert not allows(grammars, tokenizer, must, call) and not allows(grammars, tokenizer, may, f"hm {call}")


@pytest.mark.parametrize(
    ("guide", "right", "wrong"),
    [
        (Guide(kind="json", text='{"type": "integer"}', parameter="p"), "12", "twelve"),
        (Guide(kind="regex", text=r"a/b\/\d+", parameter="p"), "a/b/7", "a/b"),
        (Guide(kind="choice", text='["yes", "no"]', parameter="p"), "no", "maybe"),
        (Guide(kind="lark", text='start: WORD ", " WORD\nWORD: /[a-z]+/', parameter="p"), "to, be", "to be"),
    ],
)
def test_a_guide_holds_behind_reasoning_and_beside_calls(guide, right, wrong, grammars, tokenizer, added):
    template, _ = shipped("hermes")
    thinking = of(template, added, tools=(), guide=guide, thought="open")
    assert allows(grammars, tokenizer, thinking, f"well\n</think>\n\n{right}") and not allows(grammars, tokenizer, thinking, right)
    either = of(template, added, choice=ToolChoice(), guide=guide)
    assert allows(grammars, tokenizer, either, right) and not allows(grammars, tokenizer, either, wrong)
    assert allows(grammars, tokenizer, either, written(template, ("now", {})))
    assert of(template, added, tools=(), guide=guide) is guide


def test_a_grammar_that_names_its_start_cannot_stand_beside_others(added):
    guide = Guide(kind="lark", text="start: a\na: start?", parameter="structured_outputs.grammar")
    with pytest.raises(InvalidRequest, match=r"`structured_outputs.grammar` cannot stand beside"):
        of(shipped("hermes")[0], added, guide=guide, choice=ToolChoice())


def test_a_template_that_says_only_how_calls_are_read_gives_no_grammar(added):
    fields = {"tool_calls": {"open_pattern": r"<c(?:all)?>", "close": "</c>", "content": "json"}}
    with pytest.raises(InvalidRequest, match="does not tell how calls are written"):
        of(template_of("x", {"fields": fields}), added)


def test_whether_a_prompt_has_begun_to_reason_is_seen(tokenizer):
    template, _ = shipped("hermes")
    answers = AnswerFormat(template, tokenizer)
    asked = Generate(
        chat=Chat(messages=[Message(role="user", content="x")]), guide=Guide(kind="json", text="{}", parameter="p"), parsed=True
    )
    _, guide = answers.read(asked, "<|im_start|>assistant\n<think>\n")
    assert guide.kind == "lark"
    _, guide = answers.read(asked, "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert guide is asked.guide
    _, guide = answers.read(asked, "<|im_start|>assistant\n")
    assert guide is asked.guide  # its chat template knows nothing of reasoning


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{{ \'<tool_call>\' }} "name" "arguments" <think>', "hermes"),
        ("<tool_call> <function=x> <parameter=y>", "qwen3-xml"),
        ('<|start_header_id|> {"name": , "parameters": }', "llama3"),
        ("[TOOL_CALLS] [/INST]", "mistral"),
        ("[TOOL_CALLS] [ARGS] [/INST]", "mistral-args"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜> <think>", "deepseek"),
        ("<|channel|>analysis<|message|> functions", "harmony"),
        ("content.split('</think>')", "think"),
    ],
)
def test_a_format_is_told_by_the_chat_template(text, name, tmp_path):
    template, why = choose_template("auto", tmp_path, None, [text])
    assert template is shipped(name)[0] and why.startswith(name)


def test_what_is_told_where_none_is_known(tmp_path):
    assert choose_template("auto", tmp_path, None, ["{{ messages }}"]) == (
        None,
        "none: no known format in the chat template, so that answers are text",
    )
    own = {"fields": {"thinking": {"open": "<t>", "close": "</t>"}, "content": {}}}
    template, why = choose_template("auto", tmp_path, own, ["<tool_call>"])
    assert template.reasoning is not None and why == "the tokenizer's own"
    template, why = choose_template("auto", tmp_path, {"fields": {"mood": {"open": "x"}}}, [])
    assert template is None and "the tokenizer's own cannot be used: its field 'mood'" in why
