"""OpenAI's own SDK, unchanged, against engines in processes of their own."""

import asyncio

import openai
import pytest
import pytest_asyncio

from tests.api.openai.served import engines, until

SAY = [{"role": "user", "content": "to be or not to be"}]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    specs = {
        "talker": "llm: {max_model_len: 64}",
        "embedder": "llm: {task: embed, max_waiting: 100}",
        "plain": "parameters: {chat_template: false, step_seconds: 0.01}",
    }
    async with engines(tmp_path_factory.mktemp("models"), "identity", **specs) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(port):
    async with openai.AsyncOpenAI(base_url=f"http://{port.address}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


# Chats


async def test_a_chat(client):
    answer = await client.chat.completions.create(model="talker", messages=SAY)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "to be or not to be", "stop")
    assert (answer.object, answer.model) == ("chat.completion", "talker")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens == 7 + 6
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer._request_id == answer.id.removeprefix("chatcmpl-")


async def test_a_streamed_chat(client):
    stream = await client.chat.completions.create(model="talker", messages=SAY, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "to be or not to be"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 6)


async def test_the_streaming_helper(client):
    deltas = []
    async with client.chat.completions.stream(
        model="talker", messages=SAY, logprobs=True, top_logprobs=2, stream_options={"include_usage": True}
    ) as stream:
        async for event in stream:
            if event.type == "content.delta":
                deltas += [event.delta]
        whole = await stream.get_final_completion()
    assert "".join(deltas) == whole.choices[0].message.content == "to be or not to be"
    assert [token.token for token in whole.choices[0].logprobs.content] == ["to ", "be ", "or ", "not ", "to ", "be"]
    assert whole.usage.total_tokens == 13


async def test_several_choices(client):
    whole = await client.chat.completions.create(model="talker", messages=SAY, n=3)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(i, "to be or not to be") for i in range(3)]
    texts = ["", "", ""]
    async for chunk in await client.chat.completions.create(model="talker", messages=SAY, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["to be or not to be"] * 3


async def test_where_an_answer_stops(client):
    async def reason(**more):
        (choice,) = (await client.chat.completions.create(model="talker", messages=SAY, **more)).choices
        return choice.message.content, choice.finish_reason, choice.stop_reason

    assert await reason(max_tokens=2) == ("to be ", "length", None)
    assert await reason(max_completion_tokens=1) == ("to ", "length", None)
    assert await reason(stop=["not"]) == ("to be or ", "stop", "not")
    assert await reason(stop="not", extra_body={"include_stop_str_in_output": True}) == ("to be or not", "stop", "not")
    assert (await reason(max_tokens=8, extra_body={"ignore_eos": True}))[1] == "length"


async def test_log_probabilities_of_a_chat(client):
    (choice,) = (await client.chat.completions.create(model="talker", messages=SAY, logprobs=True, top_logprobs=2, max_tokens=2)).choices
    first, second = choice.logprobs.content
    assert (first.token, bytes(first.bytes), first.logprob) == ("to ", b"to ", -0.5)
    assert [other.token for other in second.top_logprobs] == ["be ", "to "]


async def test_the_conversation_is_what_the_template_sees(client):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="plain", messages=SAY)
    assert caught.value.param == "messages"
    assert "no chat template" in caught.value.message


# Completions


async def test_a_completion(client):
    answer = await client.completions.create(model="talker", prompt="one two", max_tokens=5)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.object) == ("one two", "stop", "text_completion")


async def test_completions_of_several_prompts_streamed(client):
    texts = ["", ""]
    usage = None
    async for chunk in await client.completions.create(
        model="talker", prompt=["one two", "three"], stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["one two", "three"]
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 3)


async def test_an_echo_with_log_probabilities(client):
    answer = await client.completions.create(model="talker", prompt="one two", echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "one twoone two"
    assert choice.logprobs.tokens == ["one ", "two", "one ", "two"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 4, 7, 11]
    stream = await client.completions.create(model="talker", prompt="one two", echo=True, logprobs=1, stream=True)
    pieces = [chunk.choices[0] async for chunk in stream]
    assert "".join(piece.text for piece in pieces) == "one twoone two"
    assert [offset for piece in pieces for offset in piece.logprobs.text_offset] == [0, 4, 7, 11]


async def test_token_ids_are_a_prompt_too(client):
    ids = (await client.post("/tokenize", body={"model": "talker", "prompt": "one two"}, cast_to=object))["tokens"]
    assert (await client.completions.create(model="talker", prompt=ids)).choices[0].text == "one two"
    assert (await client.completions.create(model="talker", prompt=[ids, ids[:1]])).choices[1].text == "one "
    text = await client.post("/detokenize", body={"model": "talker", "tokens": ids}, cast_to=object)
    assert text == {"prompt": "one two"}


# Embeddings, models


@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
async def test_embeddings(client, encoding):
    answer = await client.embeddings.create(model="embedder", input=["one two", "three"], encoding_format=encoding)
    assert [each.index for each in answer.data] == [0, 1]
    for each in answer.data:
        vector = each.embedding
        if isinstance(vector, str):  # asked for as such, left as such
            continue
        assert len(vector) == 8
        assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-5)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)


async def test_more_embeddings_than_may_wait(client):
    answer = await client.embeddings.create(model="embedder", input=[f"text {i}" for i in range(2000)], dimensions=2)
    assert len(answer.data) == 2000


async def test_models(client):
    assert [model.id async for model in client.models.list()] == ["embedder", "plain", "talker"]
    assert (await client.models.retrieve("talker")).owned_by == "fairlead"
    assert (await client.chat.completions.create(model="talker@1", messages=SAY)).model == "talker@1"


async def test_the_client_without_async(port):
    def ask() -> None:
        with openai.OpenAI(base_url=f"http://{port.address}/v1", api_key="none", max_retries=0, timeout=20) as client:
            whole = client.chat.completions.create(model="talker", messages=SAY)
            assert whole.choices[0].message.content == "to be or not to be"
            with client.chat.completions.stream(model="talker", messages=SAY) as stream:
                assert stream.get_final_completion().choices[0].message.content == "to be or not to be"
            assert len(client.embeddings.create(model="embedder", input="one").data[0].embedding) == 8
            assert [model.id for model in client.models.list()] == ["embedder", "plain", "talker"]
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("nobody")

    await asyncio.to_thread(ask)


# Errors


@pytest.mark.parametrize(
    ("more", "kind", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"model": "talker@9"}, openai.NotFoundError, "model_not_found"),
        ({"model": "identity"}, openai.BadRequestError, "unsupported_model"),
        ({"model": "embedder"}, openai.BadRequestError, "unsupported_model"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "missing_required_parameter"),
        ({"max_tokens": 1000}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "word " * 100}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "!raise"}]}, openai.InternalServerError, "model_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_sdks_own(client, more, kind, code, stream):
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(**{"model": "talker", "messages": SAY, "stream": stream, **more})
    assert caught.value.code == code
    assert caught.value.message
    assert caught.value.request_id


async def test_a_client_that_leaves_stops_the_engine(client, port):
    stream = await client.completions.create(model="plain", prompt="!forever on", max_tokens=4000, stream=True)
    await anext(stream)
    await stream.close()
    await until(lambda: port.repository.find("plain").stats.finished.get("abort") == 1)
    assert port.repository.find("plain").stats.num_running == 0
