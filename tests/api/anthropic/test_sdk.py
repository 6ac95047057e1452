"""Anthropic's own SDK, unchanged, against engines in processes of their own."""

import asyncio
import json

import anthropic
import pytest
import pytest_asyncio
from pydantic import BaseModel

from fairlead.core.errors import ModelError, Unavailable
from tests.api.openai.served import door, engines, until

SAY = [{"role": "user", "content": "to be or not to be"}]
WEATHER = {
    "name": "weather",
    "description": "Of a city, now.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    specs = {
        "talker": "llm: {max_model_len: 64}",
        "slow": "parameters: {step_seconds: 0.01}",
        "embedder": "llm: {task: embed}",
        "plain": "parameters: {chat_template: false}",
    }
    async with engines(tmp_path_factory.mktemp("models"), "identity", **specs) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(port):
    async with anthropic.AsyncAnthropic(base_url=f"http://{port.address}", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def said(content, **more):
    return {"model": "talker", "max_tokens": 40, "messages": [{"role": "user", "content": content}], **more}


# Answers


async def test_a_message(client):
    answer = await client.messages.create(**said("to be or not to be", system="Be brief."))
    (block,) = answer.content
    assert (answer.type, answer.role, answer.model, block.type, block.text) == (
        "message",
        "assistant",
        "talker",
        "text",
        "to be or not to be",
    )
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens, usage.output_tokens) == (10, 0, 0, 6)
    assert answer.id == f"msg_{answer._request_id}"


async def test_a_streamed_message_is_the_same(client):
    whole = await client.messages.create(**said("!reason let me see !answer it is so"))
    kinds = []
    async with client.messages.stream(**said("!reason let me see !answer it is so")) as stream:
        async for event in stream:
            if event.type not in kinds:
                kinds.append(event.type)
        streamed = await stream.get_final_message()
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "thinking",
        "signature",
        "content_block_stop",
        "text",
        "message_delta",
        "message_stop",
    ]
    assert [block.type for block in streamed.content] == ["thinking", "text"]
    assert (streamed.content[0].thinking.strip(), streamed.content[1].text) == ("let me see", "it is so")
    mine, theirs = (each.model_dump(exclude={"id", "usage"}) for each in (whole, streamed))
    assert mine == theirs
    assert streamed.usage.output_tokens_details.thinking_tokens == whole.usage.output_tokens_details.thinking_tokens == 3
    assert streamed.usage.input_tokens == whole.usage.input_tokens > 0


async def test_the_events_of_a_stream_as_they_stand_on_the_wire(port):
    async with port.client.stream("POST", "/v1/messages", json=said("hi", stream=True)) as answer:
        lines = [line async for line in answer.aiter_lines()]
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_a_sync_client(port):
    def ask():
        client = anthropic.Anthropic(base_url=f"http://{port.address}", api_key="none", max_retries=0)
        with client, client.messages.stream(**said("one two three")) as stream:
            return "".join(stream.text_stream), stream.get_final_message().usage.output_tokens

    assert await asyncio.to_thread(ask) == ("one two three", 3)


async def test_where_an_answer_stops(client):
    async def reason(**more):
        answer = await client.messages.create(**said("to be or not to be", **more))
        return answer.content[0].text, answer.stop_reason, answer.stop_sequence

    assert await reason(max_tokens=2) == ("to be ", "max_tokens", None)
    assert await reason(stop_sequences=["so", "not"]) == ("to be or ", "stop_sequence", "not")


async def test_an_answer_that_may_be_longer_than_the_context(client):
    answer = await client.messages.create(**said("!forever on and on", max_tokens=32_000))
    assert answer.stop_reason == "model_context_window_exceeded"
    assert answer.usage.input_tokens + answer.usage.output_tokens == 64


async def test_a_prefix_that_was_computed_before_is_told(client):
    long = "word " * 40
    first = await client.messages.create(**said([{"type": "text", "text": long, "cache_control": {"type": "ephemeral"}}], max_tokens=1))
    second = await client.messages.create(**said(long, max_tokens=1))
    assert first.usage.cache_read_input_tokens == 0
    assert second.usage.cache_read_input_tokens == 32
    assert second.usage.input_tokens + 32 == first.usage.input_tokens
    async with client.messages.stream(**said(long, max_tokens=1)) as stream:
        assert (await stream.get_final_message()).usage.cache_read_input_tokens == 32


async def test_how_long_a_conversation_is(client):
    asked = {name: value for name, value in said("one two", system="Be brief.").items() if name != "max_tokens"}
    count = await client.messages.count_tokens(**asked)
    assert count.input_tokens == (await client.messages.create(**asked, max_tokens=1)).usage.input_tokens


# Tools


async def test_a_loop_of_tools(client):
    tools = {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    messages = [{"role": "user", "content": 'Well !call weather {"city": "Bern"}'}]
    answer = await client.messages.create(**said("", **tools) | {"messages": messages})
    text, call = answer.content
    assert (answer.stop_reason, text.text.strip(), call.name, call.input) == ("tool_use", "Well", "weather", {"city": "Bern"})
    messages.append({"role": "assistant", "content": answer.content})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "18 degrees"}]}
    messages.append({"role": "user", "content": [result]})
    last = await client.messages.create(**said("", tools=[WEATHER]) | {"messages": messages})
    assert (last.stop_reason, last.content[0].text) == ("end_turn", "18 degrees")


async def test_several_calls_in_a_stream(client):
    asked = said('!call weather {"city": "Bern"} !call weather {"city": "Ulm"}', tools=[WEATHER])
    async with client.messages.stream(**asked) as stream:
        parts = [event.partial_json async for event in stream if event.type == "input_json"]
        answer = await stream.get_final_message()
    assert [(block.type, block.input) for block in answer.content] == [("tool_use", {"city": "Bern"}), ("tool_use", {"city": "Ulm"})]
    assert "".join(parts) == '{"city": "Bern"}{"city": "Ulm"}'
    assert len({block.id for block in answer.content}) == 2
    assert answer.stop_reason == "tool_use"


async def test_the_sdks_own_loop_of_tools(client):
    @anthropic.beta_async_tool
    async def weather(city: str) -> str:
        """Of a city, now."""
        return f"18 degrees in {city}"

    runner = client.beta.messages.tool_runner(**said('!call weather {"city": "Bern"}'), tools=[weather])
    assert (await runner.until_done()).content[0].text == "18 degrees in Bern"


# Errors


async def test_what_is_wrong_is_named(client):
    async def refused(**more):
        with pytest.raises(anthropic.BadRequestError) as caught:
            await client.messages.create(**said("x") | more)
        assert (caught.value.status_code, caught.value.type) == (400, "invalid_request_error")
        assert caught.value.request_id == caught.value.body["request_id"]
        return caught.value.api_message

    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}
    assert "'messages[0].content[0].type': this model reads text only" in await refused(messages=[{"role": "user", "content": [image]}])
    assert "Unknown parameter: 'container_id'" in await refused(extra_body={"container_id": "x"})
    assert "'temperature'" in await refused(extra_body={"temperature": 1.5})
    assert "'max_tokens'" in await refused(max_tokens=0)
    assert "'tools[0].type'" in await refused(tools=[{"type": "web_search_20250305", "name": "web_search"}])
    assert "'tools[0].input_schema' at '/properties/x/type'" in await refused(
        tools=[{"name": "a", "input_schema": {"type": "object", "properties": {"x": {"type": "thing"}}}}]
    )
    assert "'tools[1].name'" in await refused(tools=[WEATHER, WEATHER])
    assert "no tool of 'tools' is called" in await refused(tools=[WEATHER], tool_choice={"type": "tool", "name": "other"})
    assert "no chat template" in await refused(model="plain")
    assert "embeds" in await refused(model="embedder")
    assert "/v2/models/identity/infer" in await refused(model="identity")
    assert "maximum context length is 64" in await refused(messages=[{"role": "user", "content": "a " * 70}])
    assert "anthropic-version" in await refused(extra_headers={"anthropic-version": "1999-01-01"})


async def test_a_model_that_is_not_there(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        await client.messages.create(**said("x", model="nobody"))
    assert caught.value.type == "not_found_error"


async def test_a_model_that_fails(client):
    with pytest.raises(anthropic.InternalServerError) as caught:
        await client.messages.create(**said("!raise", stream=True))
    assert caught.value.type == "api_error"


async def test_an_error_in_mid_stream_is_its_last_event():
    async with door() as played:
        asking = asyncio.create_task(played.post("/messages", said("hi", model="m", stream=True)))
        asked = await played.repository.next()
        asked.say("a")
        asked.fail(ModelError("it broke"))
        answer = await asking
    name, data = answer.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "error": {"type": "api_error", "message": "it broke"},
        "request_id": answer.headers["request-id"],
        "type": "error",
    }


async def test_what_the_server_cannot_take_now_is_worth_a_retry():
    async with door() as played, anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{played.port}", api_key="x", max_retries=0) as client:
        played.repository.trouble = Unavailable("the model is loading")
        with pytest.raises(anthropic.InternalServerError) as caught:
            await client.messages.create(**said("hi", model="m"))
    assert (caught.value.status_code, caught.value.type) == (529, "overloaded_error")
    assert (caught.value.response.headers["retry-after"], caught.value.response.headers["x-fairlead-reason"]) == ("1", "unavailable")
    line = await played.lines.next()
    assert (line["status"], line["outcome"], line["reason"]) == (529, "refused", "unavailable")


async def test_unknown_paths_and_methods(port):
    wrong = await port.client.post("/v1/messages/batches", json={})
    assert (wrong.status_code, wrong.json()["type"], wrong.json()["error"]["type"]) == (404, "error", "not_found_error")
    assert wrong.headers["request-id"] == wrong.json()["request_id"]
    wrong = await port.client.get("/v1/messages")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    wrong = await port.client.post("/v1/messages", content=b"{")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_client_that_leaves_stops_the_engine(port, client):
    stream = await client.messages.create(**said("!forever on", model="slow", max_tokens=4000, stream=True))
    async for event in stream:
        if event.type == "content_block_delta":
            break
    version = port.repository.find("slow")
    await stream.close()
    await until(lambda: version.stats.finished == {"abort": 1})


# Structured output and thinking


class City(BaseModel):
    name: str


async def test_what_the_engine_is_asked(port):
    """The words of the API that the fake engine does not obey still reach it."""
    answer = await port.client.post("/v1/messages", json=said("x", thinking={"type": "enabled"}))
    assert "thinking.budget_tokens" in answer.json()["error"]["message"]
    for more in (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"thinking": {"type": "disabled"}},
        {"output_config": {"effort": "max"}},
        {"service_tier": "auto", "metadata": {"user_id": "someone"}, "top_k": 3, "top_p": 0.5},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
    ):
        answer = await port.client.post("/v1/messages", json=said("x", **more))
        assert answer.status_code == 200, answer.text


async def test_thinking_that_shall_not_be_shown(client):
    asked = said("!reason let me see !answer so", thinking={"type": "adaptive", "display": "omitted"})
    answer = await client.messages.create(**asked)
    assert (answer.content[0].thinking, answer.content[1].text) == ("", "so")
    async with client.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    assert (streamed.content[0].thinking, streamed.content[1].text) == ("", "so")


async def test_models_as_this_sdk_lists_them(client):
    assert "talker" in [model.id async for model in client.models.list()]


CACHED = {
    "/v1/chat/completions": ("usage", "prompt_tokens_details", "cached_tokens"),
    "/v1/completions": ("usage", "prompt_tokens_details", "cached_tokens"),
    "/v1/responses": ("usage", "input_tokens_details", "cached_tokens"),
    "/v1/messages": ("usage", "cache_read_input_tokens"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", CACHED)
async def test_every_protocol_tells_what_was_cached(port, path, stream):
    text = f"{path} {stream} " + "word " * 40
    prompt = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
        "/v1/completions": {"prompt": text, "max_tokens": 1},
        "/v1/responses": {"input": text, "max_output_tokens": 1, "store": False},
        "/v1/messages": {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
    }[path]
    if stream:
        prompt |= {"stream": True} | ({"stream_options": {"include_usage": True}} if path.endswith("completions") else {})
    found = []
    for _ in range(2):
        answer = await port.client.post(path, json={"model": "slow", **prompt})
        assert answer.status_code == 200, answer.text
        if stream:
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            told = [event.get("response") or event for event in events if (event.get("response") or event).get("usage")][-1]
        else:
            told = answer.json()
        for key in CACHED[path]:
            told = told[key]
        found.append(told)
    assert found == [0, 32]
