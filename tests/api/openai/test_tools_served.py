"""OpenAI's own SDK and a small model that was taught to call tools, behind a real server."""

import json
import re
import shutil
from typing import Any

import openai
import pytest
import pytest_asyncio

from fairlead.cli.demo_models.tiny.checks import CHAT
from tests.api.openai.served import engines

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}}
SECONDS = 60.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(CHAT, folder / "assistant" / "1")
    (folder / "assistant" / "model.yaml").write_text("llm: {kernels: torch, max_num_seqs: 4}\n")
    async with (
        engines(folder, fake="llm: {max_model_len: 256}") as running,
        openai.AsyncOpenAI(base_url=f"http://{running.address}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client,
    ):
        yield client


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": text}], "tools": [WEATHER, CLOCK], "temperature": 0.0, **more}


async def test_a_tool_is_called_and_its_result_told(client):
    asked = ask("What is the weather in Oslo?")
    answer = await client.chat.completions.create(**asked)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (choice.message.content, choice.finish_reason, call.type) == (None, "tool_calls", "function")
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 17}'}
    messages = [*asked["messages"], choice.message.model_dump(exclude_none=True), result]
    told = await client.chat.completions.create(**{**asked, "messages": messages})
    assert "17" in told.choices[0].message.content and told.choices[0].finish_reason == "stop"


async def test_a_call_is_streamed(client):
    async with client.chat.completions.stream(**ask("What is the weather in Oslo?"), stream_options={"include_usage": True}) as stream:
        pieces = [event.arguments_delta async for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = await stream.get_final_completion()
    assert len(pieces) > 1 and "".join(pieces) == '{"city": "Oslo"}'
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, final.choices[0].finish_reason) == ("get_weather", "tool_calls")
    assert final.usage.completion_tokens_details.reasoning_tokens == 0


async def test_a_call_is_demanded(client):
    for choice in ("required", {"type": "function", "function": {"name": "get_time"}}):
        answer = await client.chat.completions.create(**ask("What is 2 + 3?", tool_choice=choice, parallel_tool_calls=False))
        (call,) = answer.choices[0].message.tool_calls
        json.loads(call.function.arguments)
        assert choice == "required" or call.function.name == "get_time"


async def test_some_of_the_tools_may_be_called(client):
    def allowed(mode: str, name: str) -> dict[str, Any]:
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": name}}]}}

    free = await client.chat.completions.create(**ask("What is the weather in Oslo?", tool_choice=allowed("auto", "get_weather")))
    assert free.choices[0].message.tool_calls[0].function.name == "get_weather"
    other = await client.chat.completions.create(
        **ask("What is the weather in Oslo?", tool_choice=allowed("auto", "get_time"), max_tokens=40)
    )
    assert {call.function.name for call in other.choices[0].message.tool_calls or ()} <= {"get_time"}
    held = await client.chat.completions.create(
        **ask("What is the weather in Oslo?", tool_choice=allowed("required", "get_time"), max_tokens=40)
    )
    assert {call.function.name for call in held.choices[0].message.tool_calls} == {"get_time"}
    assert free.usage.prompt_tokens == other.usage.prompt_tokens == held.usage.prompt_tokens  # all of them are shown


async def test_a_custom_tool_is_called_with_a_text_of_its_grammar(client):
    grammar = 'start: "SELECT " COLUMN (", " COLUMN){0,2} ";" "\\n"\nCOLUMN: /"[a-z]{1,8}"/'
    query = {"type": "custom", "name": "query", "format": {"type": "grammar", "syntax": "lark", "definition": grammar}}
    asked = {"model": "assistant", "input": "What is the weather in Oslo?", "tools": [query], "temperature": 0.0}
    answer = await client.responses.create(**asked, tool_choice={"type": "custom", "name": "query"})
    (call,) = (item for item in answer.output if item.type == "custom_tool_call")
    assert call.name == "query" and re.fullmatch(r'SELECT "[a-z]{1,8}"(, "[a-z]{1,8}"){0,2};\n', call.input)
    async with client.responses.stream(**asked, tool_choice="required") as stream:
        deltas = [event.delta async for event in stream if event.type == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == call.input
    digits = {**query, "format": {"type": "grammar", "syntax": "regex", "definition": r"^\d{3}$"}}
    answer = await client.responses.create(**{**asked, "tools": [digits]}, tool_choice="required")
    assert re.fullmatch(r"\d{3}", answer.output[-1].input)
    broken = {**query, "format": {"type": "grammar", "syntax": "lark", "definition": "start: nobody"}}
    with pytest.raises(openai.BadRequestError, match="no rule `nobody`") as refused:
        await client.responses.create(**{**asked, "tools": [query | {"name": "other"}, broken]})
    assert refused.value.param == "tools[1].format.definition"


async def test_a_schema_that_no_grammar_can_follow_is_pointed_at(client):
    broken = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(("}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": broken, "strict": True}}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**ask("hi", tools=[WEATHER, tool]))
    assert refused.value.param == "tools[1].function.parameters" and "/properties/a" in refused.value.message


async def test_reasoning_stands_apart(client):
    asked = {"model": "fake", "messages": [{"role": "user", "content": "!reason let me see !answer it is so"}]}
    answer = await client.chat.completions.create(**asked)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("it is so", "let me see ", "let me see ")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3
    stream = await client.chat.completions.create(**asked, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "let me see "
    assert "".join(delta.content or "" for delta in deltas) == "it is so"


async def test_the_fake_engine_calls_as_it_is_told(client):
    said = 'I call !call f {"a": [1, 2]} !call g {}'
    answer = await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": said}])
    calls = [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls]
    assert (answer.choices[0].message.content, calls) == ("I call ", [("f", '{"a": [1, 2]}'), ("g", "{}")])
