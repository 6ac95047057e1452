"""What a client such as Codex does with the Responses API, case by case: the test plays the model, OpenAI's own SDK is the client.

Every event is held against the SDK's types, strictly.
"""

import asyncio
import json
from typing import Any

import msgspec
import openai
import pytest
import pytest_asyncio
from openai.types.responses import Response as SdkResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from fairlead.api.openai.responses_items import MAX_SEALED_BYTES, sealed
from fairlead.core.errors import ContextExceeded, InvalidRequest, ModelError, QueueFull
from fairlead.core.generation import Delta, Guide, Message, TokenLogprob, ToolCall, ToolChoice, Usage
from tests.api.openai.served import Asked, Door, door

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SHELL = {
    "type": "function",
    "name": "shell",
    "description": "Runs a command",
    "strict": False,
    "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Applies a patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" /.+/'},
}
DOCS = {
    "type": "namespace",
    "name": "mcp__docs__",
    "description": "Documentation",
    "tools": [{"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}}],
}
CODEX: dict[str, Any] = {
    "model": "m",
    "instructions": "You are a coding agent.",
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0198c0de",
    "client_metadata": {"x-codex-installation-id": "1"},
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list the files"}]}],
    "tools": [SHELL],
}
"""All that it says in each of its requests."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model():
    async with door() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(model: Door):
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{model.port}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


class Told:
    """A whole stream, checked: numbered without a gap, of the SDK's types, its items the final object's."""

    def __init__(self, lines: list[str]) -> None:
        self.events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert names == self.kinds
        assert [event["sequence_number"] for event in self.events] == list(range(len(self.events)))
        for event in self.events:
            EVENT.validate_python(event)
        self.final = self.events[-1]["response"]
        assert {event["response"]["id"] for event in self.events if "response" in event} == {self.final["id"]}
        assert [event["item"] for event in self.of("output_item.done")] == self.final["output"]
        for event in self.events:
            if "item_id" in event:
                assert event["item_id"] == self.final["output"][event["output_index"]]["id"]

    @property
    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == f"response.{kind}"]

    def text(self, kind: str) -> str:
        return "".join(event["delta"] for event in self.of(f"{kind}.delta"))


def asking(model: Door, /, **more: Any) -> "asyncio.Task[Any]":
    """Under way: the test plays the model."""
    return asyncio.create_task(model.post("/responses", {**CODEX, **more}))


async def told(model: Door, /, *deltas: Delta, **more: Any) -> tuple[Asked, Told]:
    """What the model is asked, and the stream of its answer."""
    task = asking(model, **more)
    asked = await model.repository.next()
    last = Delta(finish_reason="stop", usage=Usage(prompt_tokens=9, completion_tokens=5, cached_tokens=4, reasoning_tokens=2))
    asked.tell(*(deltas if any(delta.finish_reason for delta in deltas) else (*deltas, last)))
    asked._pieces.put_nowait(None)
    answer = await task
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), answer.text
    return asked, Told(answer.text.splitlines())


async def shown(model: Door, /, *items: Any, **more: Any) -> list[Message]:
    """What the model sees of these items, after the instructions."""
    asked, _ = await told(model, Delta(text="ok"), input=list(items), **more)
    messages = asked.prompt.chat.messages
    assert messages[0] == Message(role="system", content=messages[0].content)
    return messages[1:]


async def refused(model: Door, /, **more: Any) -> tuple[int, str | None, str | None]:
    """(status, param, code)."""
    answer = await model.post("/responses", {**CODEX, **more})
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    return answer.status_code, error["param"], error["code"]


def call(index: int, name: str = "", arguments: str = "", id: str = "") -> Delta:
    return Delta(tool_calls=[ToolCall(index=index, id=id, name=name, arguments=arguments)])


USER = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list the files"}]}


# What comes out


async def test_01_a_text_has_all_its_events_in_order(model):
    asked, answer = await told(model, Delta(text="two "), Delta(text="files"))
    assert answer.kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert answer.text("output_text") == "two files" == answer.of("output_text.done")[0]["text"]
    assert [answer.final[name] for name in ("object", "status", "error", "incomplete_details", "model", "store")] == [
        "response",
        "completed",
        None,
        None,
        "m",
        False,
    ]
    assert answer.of("created")[0]["response"]["status"] == "in_progress"
    assert [message.content for message in asked.prompt.chat.messages] == ["You are a coding agent.", "list the files"]
    assert (asked.prompt.parsed, asked.prompt.stream, asked.request.session) == (True, True, "0198c0de")


async def test_02_the_same_answer_whole(model, client):
    body = {name: value for name, value in CODEX.items() if name not in ("stream", "client_metadata")}
    task = asyncio.create_task(client.responses.create(**body))
    asked = await model.repository.next()
    assert not asked.prompt.stream
    asked.end("two files", reasoning="hm", tool_calls=[ToolCall(index=0, id="call_1", name="shell", arguments="{}")])
    answer = await task
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert (answer.output_text, answer.output[2].call_id, answer.status) == ("two files", "call_1", "completed")
    SdkResponse.model_validate(answer.model_dump(by_alias=True), strict=False)


async def test_03_usage_tells_of_cached_and_reasoning_tokens(model):
    _, answer = await told(model, Delta(text="x"))
    assert answer.final["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 14,
    }


async def test_04_reasoning_is_an_item_of_its_own(model):
    _, answer = await told(model, Delta(reasoning="let me "), Delta(reasoning="see"), Delta(text="two files"))
    assert answer.kinds[2:9] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    reasoning, message = answer.final["output"]
    assert (reasoning["type"], reasoning["content"], reasoning["summary"]) == (
        "reasoning",
        [{"type": "reasoning_text", "text": "let me see"}],
        [],
    )
    assert (message["type"], message["content"][0]["text"]) == ("message", "two files")
    assert reasoning["id"].startswith("rs_") and message["id"].startswith("msg_")


async def test_05_a_call_streams_its_arguments_and_always_says_that_they_are_done(model):
    _, answer = await told(model, call(0, "shell", id="call_1"), call(0, arguments='{"command":'), call(0, arguments=' "ls"}'))
    assert answer.kinds[2:7] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert answer.of("output_item.added")[0]["item"]["arguments"] == ""
    (item,) = answer.final["output"]
    assert (item["type"], item["call_id"], item["name"], item["arguments"], item["status"]) == (
        "function_call",
        "call_1",
        "shell",
        '{"command": "ls"}',
        "completed",
    )


async def test_06_a_call_without_arguments(model):
    _, answer = await told(model, call(0, "shell", id="call_1"))
    assert answer.of("function_call_arguments.done")[0]["arguments"] == ""


async def test_07_calls_at_once_are_items_of_their_own(model):
    _, answer = await told(
        model,
        Delta(reasoning="both"),
        Delta(text="\n\n"),  # between the thinking and the calls: no message
        call(0, "shell", '{"command": "ls"}', "call_1"),
        call(1, "shell", '{"command":', "call_2"),
        call(1, arguments=' "pwd"}'),
        parallel_tool_calls=True,
    )
    assert [item["type"] for item in answer.final["output"]] == ["reasoning", "function_call", "function_call"]
    assert [(item["call_id"], item["arguments"]) for item in answer.final["output"][1:]] == [
        ("call_1", '{"command": "ls"}'),
        ("call_2", '{"command": "pwd"}'),
    ]


async def test_08_pieces_that_came_together_are_told_apart(model):
    """What a slow reader has not taken is merged."""
    merged = Delta(
        reasoning="hm", text="yes", tool_calls=[ToolCall(index=n, id=f"call_{n}", name="shell", arguments="{}") for n in range(2)]
    )
    _, answer = await told(model, merged)
    assert [item["type"] for item in answer.final["output"]] == ["reasoning", "message", "function_call", "function_call"]


async def test_09_leading_white_space_of_a_text_stays(model):
    _, answer = await told(model, Delta(text="\n"), Delta(text="  x"))
    assert answer.text("output_text") == "\n  x" == answer.final["output"][0]["content"][0]["text"]


async def test_10_an_answer_of_nothing_is_an_empty_message(model):
    _, answer = await told(model)
    assert answer.final["output"][0]["content"][0]["text"] == ""


async def test_11_the_sdks_own_stream_puts_it_together(model, client):
    async def read() -> Any:
        async with client.responses.stream(model="m", input="x", tools=[SHELL], store=False) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_response()

    task = asyncio.create_task(read())
    asked = await model.repository.next()
    asked.tell(Delta(reasoning="hm"), Delta(text="look"), call(0, "shell", id="call_1"), call(0, arguments='{"command": "ls"}'))
    asked.end(finish_reason="tool_calls")
    final = await task
    assert final.output_text == "look"
    assert final.output[2].parsed_arguments is None  # of a tool that is not strict
    assert final.output[2].arguments == '{"command": "ls"}'


# Tools


async def test_12_a_custom_tool_is_shown_as_a_function_and_called_with_a_text(model):
    patch = "*** Begin Patch\n*** End Patch"
    arguments = json.dumps({"input": patch})
    asked, answer = await told(model, call(0, "apply_patch", arguments[:9], "call_1"), call(0, arguments=arguments[9:]), tools=[PATCH])
    (tool,) = asked.prompt.chat.tools
    assert tool["function"]["parameters"]["required"] == ["input"]
    assert PATCH["format"]["definition"] in tool["function"]["description"]
    (item,) = answer.final["output"]
    assert (item["type"], item["name"], item["input"], item["call_id"]) == ("custom_tool_call", "apply_patch", patch, "call_1")
    assert answer.text("custom_tool_call_input") == patch == answer.of("custom_tool_call_input.done")[0]["input"]
    assert answer.final["tools"] == [PATCH]


async def test_13_a_call_of_a_custom_tool_comes_back(model):
    items = [
        USER,
        {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "a\n'b'", "status": "completed"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "Done"},
    ]
    _, assistant, tool = await shown(model, *items, tools=[PATCH])
    assert json.loads(assistant.tool_calls[0]["function"]["arguments"]) == {"input": "a\n'b'"}
    assert (tool.role, tool.content, tool.tool_call_id, tool.name) == ("tool", "Done", "c", "apply_patch")


async def test_14_tools_of_a_namespace_are_shown_under_both_names(model):
    asked, answer = await told(model, call(0, "mcp__docs__search", "{}", "call_1"), tools=[SHELL, DOCS])
    assert [tool["function"]["name"] for tool in asked.prompt.chat.tools] == ["shell", "mcp__docs__search"]
    (item,) = answer.final["output"]
    assert (item["type"], item["namespace"], item["name"]) == ("function_call", "mcp__docs__", "search")
    output = {
        "type": "function_call_output",
        "call_id": "call_1",
        "output": [{"type": "input_text", "text": "found "}, {"type": "input_text", "text": "it"}],
    }
    _, assistant, tool = await shown(model, USER, item, output, tools=[DOCS])
    assert assistant.tool_calls[0]["function"]["name"] == "mcp__docs__search"
    assert tool.content == "found it"


async def test_15_tools_that_come_among_the_items(model):
    more = {"type": "additional_tools", "role": "developer", "tools": [DOCS]}
    asked, _ = await told(model, Delta(text="ok"), input=[more, USER])
    assert [tool["function"]["name"] for tool in asked.prompt.chat.tools] == ["shell", "mcp__docs__search"]


@pytest.mark.parametrize(
    ("choice", "wanted", "num_shown"),
    [
        ("auto", ToolChoice(parallel=False), 2),
        ("none", ToolChoice(mode="none", parallel=False), 0),
        ("required", ToolChoice(mode="required", parallel=False), 2),
        ({"type": "function", "name": "shell"}, ToolChoice(mode="named", name="shell", parallel=False), 2),
        ({"type": "custom", "name": "apply_patch"}, ToolChoice(mode="named", name="apply_patch", parallel=False), 2),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "shell"}]},
            ToolChoice(mode="required", allowed=("shell",), parallel=False),
            2,
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "apply_patch"}]},
            ToolChoice(allowed=("apply_patch",), parallel=False),
            2,
        ),
    ],
)
async def test_16_which_tools_may_be_called(model, choice, wanted, num_shown):
    asked, answer = await told(model, Delta(text="ok"), tools=[SHELL, PATCH], tool_choice=choice)
    assert (msgspec.structs.replace(asked.prompt.tool_choice, inputs={}), len(asked.prompt.chat.tools)) == (wanted, num_shown)
    grammar = Guide(kind="lark", text=PATCH["format"]["definition"], parameter="tools[1].format.definition")
    assert asked.prompt.tool_choice.inputs == ({"apply_patch": grammar} if num_shown else {})
    assert answer.final["tool_choice"] == choice


async def test_17_no_tools_and_a_free_choice(model):
    asked, _ = await told(model, Delta(text="ok"), tools=[])
    assert asked.prompt.chat.tools == []


async def test_18_tools_that_only_openai_runs_are_refused_by_name(model):
    assert await refused(model, tools=[SHELL, {"type": "web_search"}]) == (400, "tools[1].type", "unsupported_value")
    assert await refused(model, tool_choice={"type": "web_search"}) == (400, "tool_choice.type", "unsupported_value")


# What comes in again


async def test_19_a_turn_with_reasoning_and_calls_is_one_message(model):
    """As Codex sends it: without ids, `content` null where there is none."""
    items = [
        USER,
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "let me see"}], "encrypted_content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Looking."}], "phase": "commentary"},
        {"type": "function_call", "name": "shell", "arguments": '{"command": "ls"}', "call_id": "a"},
        {"type": "function_call", "name": "shell", "arguments": '{"command": "pwd"}', "call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": "x.py"},
        {"type": "function_call_output", "call_id": "b", "output": "/"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One file."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "thanks"}]},
    ]
    _, turn, first, second, said, thanks = await shown(model, *items)
    assert (turn.role, turn.content, turn.reasoning) == ("assistant", "Looking.", "let me see")
    assert [each["id"] for each in turn.tool_calls] == ["a", "b"]
    assert [(tool.tool_call_id, tool.content) for tool in (first, second)] == [("a", "x.py"), ("b", "/")]
    assert (said.content, said.tool_calls, said.reasoning, thanks.content) == ("One file.", None, None, "thanks")


async def test_20_an_answer_can_be_sent_back_as_it_came(model):
    _, answer = await told(model, Delta(reasoning="hm"), Delta(text="Looking."), call(0, "shell", '{"command": "ls"}', "call_1"))
    output = {"type": "function_call_output", "call_id": "call_1", "output": ""}
    _, turn, tool = await shown(model, USER, *answer.final["output"], output)
    assert (turn.content, turn.reasoning, turn.tool_calls[0]["id"], tool.content) == ("Looking.", "hm", "call_1", "")


async def test_21_reasoning_that_is_kept_sealed_alone(model):
    _, answer = await told(model, Delta(reasoning="größer\n" * 50), Delta(text="ok"))
    reasoning = answer.final["output"][0]
    bare = {"type": "reasoning", "id": reasoning["id"], "summary": [], "content": None, "encrypted_content": reasoning["encrypted_content"]}
    _, turn = await shown(model, USER, bare, {"role": "assistant", "content": "ok"})
    assert turn.reasoning == "größer\n" * 50
    _, plain = await told(model, Delta(reasoning="hm"), include=[])
    assert plain.final["output"][0]["encrypted_content"] is None


@pytest.mark.parametrize("token", ["gAAAAABo", "fairlead1.", "fairlead1.!!", "fairlead1.eJwDAAAAAAE", ""])
async def test_22_reasoning_that_another_server_sealed(model, token):
    item = {"type": "reasoning", "summary": [], "encrypted_content": token}
    assert await refused(model, input=[USER, item]) == (400, "input[1].encrypted_content", "invalid_encrypted_content")


async def test_22_a_few_bytes_that_stand_for_very_many(model):
    item = {"type": "reasoning", "summary": [], "encrypted_content": sealed("a" * (MAX_SEALED_BYTES // 2))}
    assert await refused(model, input=[USER, item, item, item]) == (400, "input[3].encrypted_content", "string_above_max_length")


async def test_23_what_developers_say_stands_at_the_head(model):
    """Most chat templates refuse system messages in another place."""
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandboxed."}]},
        USER,
        {"type": "message", "role": "developer", "content": "No network."},
        {"type": "message", "role": "system", "content": "Be brief."},
    ]
    asked, _ = await told(model, Delta(text="ok"), input=items)
    assert [(message.role, message.content) for message in asked.prompt.chat.messages] == [
        ("system", "You are a coding agent.\n\nSandboxed.\n\nNo network.\n\nBe brief."),
        ("user", "list the files"),
    ]


async def test_24_an_assistant_that_said_nothing(model):
    for content in ([], "", [{"type": "output_text", "text": ""}]):
        messages = await shown(model, USER, {"type": "message", "role": "assistant", "content": content}, USER)
        assert [message.role for message in messages] == ["user", "user"]


async def test_25_arguments_that_are_no_json_are_shown_as_a_text(model):
    items = [USER, {"type": "function_call", "name": "shell", "arguments": '{"a": 1} extra', "call_id": "a"}]
    output = {"type": "function_call_output", "call_id": "a", "output": "bad arguments"}
    _, turn, _ = await shown(model, *items, output)
    assert json.loads(turn.tool_calls[0]["function"]["arguments"]) == {"input": '{"a": 1} extra'}


# Options


async def test_26_a_schema_for_the_text(model):
    form = {"type": "json_schema", "name": "thing", "schema": {"type": "object"}, "strict": True}
    asked, answer = await told(model, Delta(text="{}"), text={"format": form, "verbosity": "medium"})
    assert asked.prompt.guide == Guide(kind="json", text='{"type":"object"}', parameter="text.format.schema")
    assert answer.final["text"]["format"] == form


async def test_27_how_much_to_think_is_told_to_the_template(model):
    asked, answer = await told(model, Delta(text="ok"), reasoning={"effort": "high", "summary": "auto"})
    assert asked.prompt.chat.reasoning_effort == "high"
    assert answer.final["reasoning"] == {"effort": "high", "summary": None}
    asked, _ = await told(model, Delta(text="ok"), reasoning=None, chat_template_kwargs={"x": 1})
    assert (asked.prompt.chat.reasoning_effort, asked.prompt.chat.template_kwargs) == ("", {"x": 1})
    task = asking(model)
    (await model.repository.next()).fail(InvalidRequest("`reasoning_effort` cannot be heeded"))
    assert (await task).json()["error"]["param"] == "reasoning.effort"


async def test_28_log_probabilities_of_the_text_are_in_its_deltas_and_in_the_object(model):
    token = TokenLogprob(1, "ok", b"ok", -0.5, 1, [TokenLogprob(1, "ok", b"ok", -0.5, 1)])
    delta = Delta(text="ok", logprobs=[token])
    asked, answer = await told(model, delta, include=["message.output_text.logprobs"], top_logprobs=1)
    assert asked.prompt.sampling.logprobs == 1
    (told_so,) = answer.of("output_text.delta")[0]["logprobs"]
    assert answer.final["output"][0]["content"][0]["logprobs"] == [told_so] == answer.of("output_text.done")[0]["logprobs"]
    assert (told_so["token"], told_so["logprob"], told_so["bytes"]) == ("ok", -0.5, [111, 107])


@pytest.mark.parametrize(("reason", "said"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
async def test_29_an_answer_that_is_cut(model, reason, said):
    asked, answer = await told(
        model, Delta(text="one"), Delta(text=" tw", finish_reason=reason, usage=Usage(completion_tokens=2)), max_output_tokens=2
    )
    assert asked.prompt.sampling.max_tokens == 2
    assert (answer.kinds[-1], answer.final["status"], answer.final["incomplete_details"]) == (
        "response.incomplete",
        "incomplete",
        {"reason": said},
    )
    assert answer.final["output"][0]["status"] == "incomplete"


async def test_30_a_call_that_is_cut(model):
    _, answer = await told(model, call(0, "shell", '{"comm', "call_1"), Delta(finish_reason="length", usage=Usage(completion_tokens=2)))
    assert [(item["type"], item["status"], item["arguments"]) for item in answer.final["output"]] == [
        ("function_call", "incomplete", '{"comm')
    ]


# What goes wrong


@pytest.mark.parametrize(
    ("error", "status", "code"), [(ContextExceeded("too long"), 400, "context_length_exceeded"), (QueueFull("full"), 429, "queue_full")]
)
async def test_31_what_fails_before_it_begins_is_an_ordinary_error(model, error, status, code):
    task = asking(model)
    (await model.repository.next()).fail(error)
    answer = await task
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_32_what_fails_in_mid_stream_is_told_by_the_last_event(model):
    task = asking(model)
    asked = await model.repository.next()
    asked.say("one ")
    asked.fail(ModelError("the model failed"))
    answer = Told((await task).text.splitlines())
    assert (answer.kinds[-1], answer.final["status"]) == ("response.failed", "failed")
    assert answer.final["error"] == {"code": "server_error", "message": "the model failed"}
    assert answer.final["output"][0]["status"] == "incomplete"
    while (line := await model.lines.next())["error"] != "the model failed":
        pass
    assert line["status"] == 500


async def test_33_a_client_that_leaves_stops_the_model(model):
    async def look_in() -> None:
        async with model.client.stream("POST", "/v1/responses", json=CODEX) as answer:
            await anext(answer.aiter_lines())

    task = asyncio.create_task(look_in())
    asked = await model.repository.next()
    asked.say("one ")
    await task
    async with asyncio.timeout(60):
        await asked.closed.wait()


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"input": []}, "input", "empty_array"),
        ({"input": 3}, "input", "invalid_type"),
        ({"input": [3]}, "input[0]", "invalid_type"),
        ({"input": [{}]}, "input[0].type", "invalid_value"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", "invalid_value"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"role": "user", "content": 1}]}, "input[0].content", "invalid_type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "unsupported_value",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "missing_required_parameter"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "input[0].content[0].type", "invalid_value"),
        ({"input": [{"role": "user", "content": "x", "id": 3}]}, "input[0].id", "invalid_type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id", "invalid_value"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "input[0].arguments", "missing_required_parameter"),
        ({"input": [{"type": "additional_tools"}]}, "input[0].tools", "invalid_type"),
        ({"input": [{"type": "additional_tools", "tools": [{"type": "mcp"}]}]}, "input[0].tools[0].type", "unsupported_value"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id", "item_not_found"),
        ({"tools": [3]}, "tools[0]", "invalid_type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
        ({"tools": [SHELL, SHELL]}, "tools[1].name", "invalid_value"),
        ({"tools": [{**SHELL, "parameters": {"type": "array"}}]}, "tools[0].parameters", "invalid_value"),
        ({"tools": [{**DOCS, "tools": [DOCS]}]}, "tools[0].tools[0].type", "unsupported_value"),
        ({"tools": [{**PATCH, "format": {"type": "grammar"}}]}, "tools[0].format.syntax", "missing_required_parameter"),
        ({"tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice.name", "invalid_value"),
        ({"tool_choice": "always"}, "tool_choice", "invalid_value"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"include": ["web_search_call.results", "web_search_call.all"]}, "include[1]", "invalid_value"),
        ({"top_logprobs": 2, "include": []}, "top_logprobs", "invalid_value"),
        ({"truncation": "auto"}, "truncation", "unsupported_value"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing_required_parameter"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema", "invalid_value"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "unsupported_value"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unknown_parameter"),
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"metadata": {"k" * 65: ""}}, "metadata", "string_above_max_length"),
        ({"stream": False, "stream_options": {}}, "stream_options", "invalid_value"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"model": "t"}, "model", "unsupported_model"),
        ({"chat_template_kwargs": {"x": 1 << 70}}, "chat_template_kwargs", "invalid_value"),
    ],
)
async def test_34_what_is_wrong_is_named(model, more, param, code):
    assert await refused(model, **more) == (400, param, code)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"model": "m"}', b"\xff", b'{"model": "m", "input": ' + b"[" * 5000 + b"]" * 5000 + b"}"]
)
async def test_35_bodies_that_are_no_requests(model, body):
    answer = await model.post("/responses", body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_36_a_model_that_is_not_there(model):
    answer = await model.post("/responses", {**CODEX, "model": "nobody"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
