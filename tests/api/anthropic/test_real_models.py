"""The whole way with models that compute: tools asked for by Anthropic's SDK, and pairs of texts in the order of their scores."""

import json
import shutil

import anthropic
import pytest
import pytest_asyncio

from fairlead.cli.demo_models.tiny.checks import CHAT, held_out
from tests.api.openai.served import engines

pytest.importorskip("torch")

from tests.llm.test_scoring import cross_encoder, expected

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(CHAT, folder / "tiny" / "1")
    cross_encoder(folder / "judge" / "1")
    async with engines(folder, "identity") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(port):
    async with anthropic.AsyncAnthropic(base_url=f"http://{port.address}", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def asked(number):
    example = held_out("tool_call")[number]
    functions = [tool["function"] for tool in example.tools]
    tools = [{"name": each["name"], "description": each["description"], "input_schema": each["parameters"]} for each in functions]
    greedy = {"extra_body": {"temperature": 0}}
    return example, {"model": "tiny", "max_tokens": 64, "messages": list(example.messages), "tools": tools, **greedy}


async def test_a_model_calls_a_tool_and_reads_its_result(client):
    example, body = asked(0)
    answer = await client.messages.create(**body)
    (call,) = answer.content
    assert ({"name": call.name, "arguments": call.input}, answer.stop_reason) == (example.expected, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"ok": true}'}
    messages = [*body["messages"], {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    last = await client.messages.create(**body | {"messages": messages})
    assert (last.stop_reason, last.content[0].type) == ("end_turn", "text")
    assert last.usage.cache_read_input_tokens > 0


async def test_the_same_call_in_a_stream(client):
    example, body = asked(1)
    async with client.messages.stream(**body) as stream:
        (call,) = (await stream.get_final_message()).content
    assert {"name": call.name, "arguments": call.input} == example.expected


async def test_an_answer_that_follows_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    _, body = asked(0)
    answer = await client.messages.create(**body | {"tools": [], "output_config": {"format": {"type": "json_schema", "schema": schema}}})
    assert list(json.loads(answer.content[0].text)) == ["a"]


async def test_a_conversation_is_counted_as_it_is_computed(client):
    _, body = asked(0)
    count = await client.messages.count_tokens(model="tiny", messages=body["messages"], tools=body["tools"])
    usage = (await client.messages.create(**body)).usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


async def test_texts_in_the_order_of_a_cross_encoders_scores(port):
    query, documents = "two sailors", ["one line", "a buoy in the sea", "sailors pull lines"]
    answer = await port.client.post("/v1/rerank", json={"model": "judge", "query": query, "documents": documents}, timeout=120)
    assert answer.status_code == 200, answer.text
    found = {each["index"]: each["relevance_score"] for each in answer.json()["results"]}
    theirs = expected(port.folder / "judge" / "1", [(query, text) for text in documents])
    assert [found[index] for index in range(3)] == pytest.approx(theirs.tolist(), abs=1e-5)
    assert list(found) == sorted(found, key=lambda index: -found[index])
    refused = await port.client.post("/v1/chat/completions", json={"model": "judge", "messages": [{"role": "user", "content": "x"}]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_model")
