"""A small model that was taught to call tools, asked as the doors ask it."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from fairlead.backends.llm import BACKEND
from fairlead.cli.demo_models.tiny import checks
from fairlead.core.errors import FairleadError, InvalidRequest, LoadError
from fairlead.core.generation import Chat, Delta, Generate, Guide, Message, Sampling, ToolCall, ToolChoice, add_calls
from fairlead.core.specs import LlmSpec, ModelSpec
from tests.backends.test_llm import SECONDS, Running

NUM_ASKED = 12
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
ZONE = {"type": "object", "properties": {"zone": {"enum": ["utc", "local"]}}, "required": ["zone"], "additionalProperties": False}
ASK = "What is the weather in Oslo?"


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": f"the {name}", "parameters": parameters, **more}}


WEATHER, CLOCK = tool("get_weather", CITY), tool("get_time", ZONE)


def load(folder: Path, **spec: Any) -> Running:
    return Running(BACKEND.load_engine(folder, ModelSpec(name="m", backend="llm", llm=LlmSpec(kernels="torch", **spec)), 1))


@pytest.fixture(scope="module")
def running():
    engine = load(checks.CHAT)
    yield engine
    engine.engine.close()
    engine.thread.join(SECONDS)


def asked(text: str = ASK, *, tools: Any = (WEATHER, CLOCK), messages: Any = None, max_tokens: int = 80, **more: Any) -> Generate:
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, **{key: more.pop(key) for key in ("n", "stop") if key in more})
    chat = Chat(messages=messages or [Message(role="user", content=text)], tools=list(tools))
    return Generate(chat=chat, sampling=sampling, **{"parsed": True, **more})


def streamed(running: Running, prompt: Generate) -> list[Delta]:
    running.submit(7, structs.replace(prompt, stream=True))
    deltas: list[Delta] = []
    while not deltas or deltas[-1].usage is None:
        _, answer = running.answers.get(timeout=SECONDS)
        assert not isinstance(answer, FairleadError), answer
        deltas.append(answer)
    return deltas


def calls_of(*deltas: Delta) -> list[tuple[str, str]]:
    calls: list[ToolCall] = []
    add_calls(calls, itertools.chain(*(delta.tool_calls for delta in deltas)))
    return [(call.name, call.arguments) for call in calls]


def test_a_call_is_the_same_streamed_and_whole(running):
    whole = running.ask(asked())
    pieces = streamed(running, asked())
    assert calls_of(whole) == calls_of(*pieces) == [("get_weather", '{"city": "Oslo"}')]
    assert (whole.text, whole.finish_reason) == ("", "tool_calls") and pieces[-1].finish_reason == "tool_calls"
    assert sum(len(delta.tool_calls) for delta in pieces) > 2  # as they were written
    first = next(call for delta in pieces for call in delta.tool_calls)
    assert first.id.startswith("call_") and first.id != whole.tool_calls[0].id
    assert whole.usage.completion_tokens == pieces[-1].usage.completion_tokens


def test_each_of_several_answers_has_its_own_calls(running):
    both = streamed(running, asked(n=2))
    ids = {delta.index: call.id for delta in both for call in delta.tool_calls if call.id}
    assert ids.keys() == {0, 1} and ids[0] != ids[1]


def test_a_question_that_needs_no_tool_is_answered(running):
    answer = running.ask(asked("What is 2 + 3?"))
    assert (calls_of(answer), answer.finish_reason) == ([], "stop") and answer.text


def test_what_is_not_parsed_is_text(running):
    answer = running.ask(asked(parsed=False))
    assert answer.text.startswith("<tool_call>") and (answer.tool_calls, answer.finish_reason) == ([], "stop")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (ToolChoice(mode="required"), {"get_weather", "get_time"}),
        (ToolChoice(mode="required", parallel=False), {"get_weather", "get_time"}),
        (ToolChoice(mode="named", name="get_time"), {"get_time"}),
    ],
)
def test_a_call_can_be_demanded(running, choice, names):
    answer = running.ask(asked("What is 2 + 3?", tool_choice=choice))
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
    for name, arguments in calls_of(answer):
        assert name in names
        (value,) = json.loads(arguments).items()
        assert value[0] == ("city" if name == "get_weather" else "zone")
        assert name == "get_weather" or value[1] in ("utc", "local")
    assert choice.parallel or len(answer.tool_calls) == 1


def test_a_strict_tool_is_called_as_its_schema_says_or_not_at_all(running):
    strict = tool("get_weather", {**CITY, "properties": {"city": {"enum": ["Lima", "Rome"]}}}, strict=True)
    ((name, arguments),) = calls_of(running.ask(asked(tools=[strict, CLOCK])))
    assert name == "get_weather" and json.loads(arguments)["city"] in ("Lima", "Rome")
    answer = running.ask(asked("What is 2 + 3?", tools=[strict]))
    assert answer.text and not answer.tool_calls


def test_a_guide_takes_long_until_it_is_compiled_in_the_form_that_the_answer_follows(running):
    guide = Guide(kind="choice", text='["first", "asked"]', parameter="f")
    prompt = asked(tools=(), guide=guide)
    # Known alone or behind reasoning: either answers a chat
    assert running.engine.takes_long(prompt) and len(running.engine.engine.answers.forms(prompt)) == 3
    running.ask(prompt)
    assert not running.engine.takes_long(prompt)
    assert running.engine.takes_long(asked(guide=guide))
    assert running.engine.takes_long(structs.replace(prompt, guide=structs.replace(guide, text="5")))


def test_beside_tools_the_text_follows_its_guide(running):
    guide = Guide(kind="json", text='{"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}', parameter="f")
    answer = running.ask(asked("What is 2 + 3?", tools=[CLOCK], guide=guide, tool_choice=ToolChoice()))
    assert calls_of(answer) or isinstance(json.loads(answer.text)["sum"], int)


def test_a_call_that_is_cut_off_ends_with_length(running):
    answer = running.ask(asked(max_tokens=17))
    ((name, arguments),) = calls_of(answer)
    assert (name, answer.finish_reason) == ("get_weather", "length") and '{"city": "Oslo"}'.startswith(arguments)


def test_stop_strings_are_looked_for_in_the_text_alone(running):
    assert calls_of(running.ask(asked(stop=("Oslo",)))) == [("get_weather", '{"city": "Oslo"}')]


def test_the_result_of_a_tool_comes_back_in(running):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        Message(role="user", content=ASK),
        Message(role="assistant", tool_calls=[call]),
        Message(role="tool", tool_call_id="call_1", content='{"temperature": 17}'),
    ]
    answer = running.ask(asked(messages=messages))
    assert "17" in answer.text and answer.finish_reason == "stop"


def test_a_schema_that_cannot_be_followed_is_pointed_at(running):
    broken = tool("broken", {"type": "object", "properties": {"a": {"type": "string", "pattern": "(("}}, "required": ["a"]})
    with pytest.raises(InvalidRequest, match=r"`tools\[1\].function.parameters` cannot be followed: /properties/a"):
        running.ask(asked(tools=[WEATHER, broken], tool_choice=ToolChoice(mode="required")))
    assert running.ask(asked(tools=[WEATHER, broken])).tool_calls  # nothing has to follow it


@pytest.mark.parametrize("style", ["hermes", "qwen3-xml"])
def test_the_schema_of_a_tool_may_contain_itself(style):
    running = load(checks.CHAT, response_template=style)
    tree = tool("tree", {"type": "object", "properties": {"leaf": {"type": "boolean"}, "left": {"$ref": "#"}}, "required": ["leaf"]})
    for choice in (ToolChoice(mode="named", name="tree"), ToolChoice(mode="required")):
        assert running.ask(asked(tools=[WEATHER, tree], tool_choice=choice)).token_ids
    running.engine.close()
    running.thread.join(SECONDS)


def test_a_degree_of_reasoning_that_the_template_does_not_know_is_refused(running):
    prompt = asked()
    with pytest.raises(InvalidRequest, match="`reasoning_effort` cannot be heeded"):
        running.ask(structs.replace(prompt, chat=structs.replace(prompt.chat, reasoning_effort="low")))


def test_held_out_questions_are_answered_as_well_as_before(running):
    examples = [example for task in ("tool_call", "tool_result") for example in checks.held_out(task)[:NUM_ASKED]]
    right = dict.fromkeys((True, False), 0)
    for work, (example, parsed) in enumerate(itertools.product(examples, right)):
        messages = [Message(**message) for message in example.messages]
        running.submit(work, asked(messages=messages, tools=example.tools or (), max_tokens=60, parsed=parsed))
    for _ in range(2 * len(examples)):
        work, answer = running.answers.get(timeout=SECONDS)
        assert isinstance(answer, Delta), answer
        told = "\n".join([answer.text, *(checks.tool_call_text(name, json.loads(arguments)) for name, arguments in calls_of(answer))])
        right[work % 2 == 0] += checks.check(examples[work // 2], told)
    assert right[True] >= right[False] > 0.8 * len(examples)


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(checks.CHAT, folder / "model"))


def test_a_model_of_no_known_format_says_how_to_tell_it(tmp_path):
    plain = load(checks.CHAT, response_template="off")
    try:
        assert any(line.startswith("response template: off") for line in plain.engine.info.explain)
        with pytest.raises(InvalidRequest, match="set `response_template` in the `llm` section"):
            plain.ask(asked())
        assert plain.ask(asked("What is 2 + 3?", tools=())).text
    finally:
        plain.engine.close()
        plain.thread.join(SECONDS)
    with pytest.raises(LoadError, match="is neither auto, off nor one of harmony"):
        load(checks.CHAT, response_template="morse")


def test_a_file_says_how_answers_are_parted(tmp_path):
    folder = copied(tmp_path)
    fields = {"tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "content": "json"}, "content": {}}
    (folder / "mine.json").write_text(json.dumps({"start_anchor": "assistant", "fields": fields}))
    mine = load(folder, response_template="mine.json")
    try:
        assert calls_of(mine.ask(asked())) == [("get_weather", '{"city": "Oslo"}')]
        assert calls_of(mine.ask(asked(tool_choice=ToolChoice(mode="named", name="get_time"))))[0][0] == "get_time"
    finally:
        mine.engine.close()
        mine.thread.join(SECONDS)
