"""The door over a port, before an engine that the test plays: what is on the wire, and every end that an answer can have."""

import asyncio
import gzip
import json
import socket
from typing import Any

import pytest

from fairlead.core import errors
from fairlead.core.generation import Delta, Detokenize, Embed, Generate, Tokenize
from tests.api.openai.served import SECONDS, Door, door

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def port():
    async with door() as running:
        yield running


def events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    data = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


class Listener:
    """A client that reads byte by byte what comes, when it wants."""

    def __init__(self, port: Door) -> None:
        self.port = port

    async def __aenter__(self) -> "Listener":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def ask(self, path: str = "/chat/completions", **more: Any) -> None:
        about = {"prompt": "hello"} if path == "/completions" else {"messages": HELLO}
        body = json.dumps({"model": "m", "stream": True, **about, **more}).encode()
        self.writer.write(b"POST /v1%s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(body), body))

    async def until(self, marker: bytes) -> bytes:
        async with asyncio.timeout(SECONDS):
            return await self.reader.readuntil(marker)

    def leave(self) -> None:
        self.writer.transport.abort()


# Streams


async def test_a_chat_is_streamed_as_server_sent_events(port):
    asking = port.chat(stream=True, stream_options={"include_usage": True})
    asked = await port.repository.next()
    asked.say("Hel", "lo")
    asked.end("!", prompt=4, completion=3, cached=2)
    answer = await asking
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    *told, closing, done = events(answer.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in told] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in told] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in told)
    assert closing["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in (*told, closing)}) == 1
    assert told[0]["id"] == f"chatcmpl-{answer.headers['x-request-id']}"


async def test_each_piece_is_on_its_way_before_the_next_exists(port):
    async with Listener(port) as client:
        client.ask()
        asked = await port.repository.next()
        asked.say("one")
        assert b'"role":"assistant"' in await client.until(b"\n\n\r\n")
        assert b'"content":"one"' in await client.until(b"\n\n\r\n")
        asked.say("two")
        assert b'"content":"two"' in await client.until(b"\n\n\r\n")
        asked.end()
        assert (await client.until(b"0\r\n\r\n")).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_the_chunks_of_several_prompts_carry_their_index(port):
    asking = asyncio.create_task(port.post("/completions", {"model": "m", "prompt": [[7], [1, 2]], "n": 2, "stream": True}))
    first, second = await port.repository.next(), await port.repository.next()
    assert [(each.prompt.text, each.prompt.token_ids) for each in (first, second)] == [(None, [7]), (None, [1, 2])]
    for asked in (first, second):
        asked.tell(Delta(index=1, text="x", finish_reason="stop"))
        asked.end("y")
    *told, done = events((await asking).text)
    assert done == "[DONE]"
    assert sorted((chunk["choices"][0]["index"], chunk["choices"][0]["text"]) for chunk in told) == [(0, "y"), (1, "x"), (2, "y"), (3, "x")]


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
async def test_an_error_after_the_first_chunk_is_the_last_event(port, path):
    async with Listener(port) as client:
        client.ask(path)
        asked = await port.repository.next()
        asked.say("Hel")
        await client.until(b'"Hel"')
        asked.fail(errors.ReplicaDied("model 'm' died (signal 9) while computing this request"))
        rest = await client.until(b"0\r\n\r\n")
        last = rest.split(b"data: ")[-1].split(b"\n\n")[0]
        assert json.loads(last)["error"] == {
            "message": "model 'm' died (signal 9) while computing this request",
            "type": "server_error",
            "param": None,
            "code": "model_error",
        }
        assert b"[DONE]" not in rest
    line = await port.lines.next()
    assert (line["status"], line["error"]) == (500, "model 'm' died (signal 9) while computing this request")


async def test_an_unforeseen_exception_in_the_middle_says_no_more_than_that(port):
    asking = port.chat(stream=True)
    asked = await port.repository.next()
    asked.say("Hel")
    asked.fail(RuntimeError("a secret"))
    answer = await asking
    assert events(answer.text)[-1]["error"] == {"message": "internal error", "type": "server_error", "param": None, "code": "model_error"}
    assert (await port.lines.next())["status"] == 500


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (errors.ContextExceeded("too long"), 400, "context_length_exceeded", "messages"),
        (errors.InvalidRequest("this model has no chat template"), 400, None, "messages"),
        (errors.InvalidRequest("`stop_token_ids` holds token ids outside the vocabulary"), 400, None, "stop_token_ids"),
        (errors.Unsupported("this model embeds"), 400, "unsupported_model", "model"),
        (errors.QueueFull("8 requests wait already"), 429, "queue_full", None),
        (errors.Unavailable("model 'm' is being started again"), 503, "unavailable", None),
        (errors.ShuttingDown("unloading"), 503, "unavailable", None),
        (errors.TimeoutExpired("Request timeout expired"), 503, "queue_timeout", None),
        (errors.ReplicaDied("died"), 500, "model_error", None),
        (RuntimeError("a secret"), 500, "model_error", None),
    ],
)
async def test_an_error_before_the_first_chunk_has_its_status(port, stream, error, status, code, param):
    asking = port.chat(stream=stream)
    (await port.repository.next()).fail(error)
    answer = await asking
    assert answer.status_code == status
    told = answer.json()["error"]
    assert (told["code"], told["param"]) == (code, param)
    assert told["message"] == (error.message if isinstance(error, errors.FairleadError) else "internal error")
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    line = await port.lines.next()
    assert (line["status"], line["error"], line["model"], line["version"]) == (status, told["message"], "m", "2")
    assert port.lines.queue.empty()


async def test_of_several_prompts_one_that_fails_ends_all(port):
    asking = asyncio.create_task(port.post("/completions", {"model": "m", "prompt": ["a", "b"]}))
    first, second = await port.repository.next(), await port.repository.next()
    second.fail(errors.InvalidRequest("the prompt is empty: it must have at least one token"))
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert first.closed.is_set()


# Clients that leave, or do not read


@pytest.mark.parametrize(("path", "more"), [("/chat/completions", {}), ("/completions", {}), ("/completions", {"prompt": ["a", "b"]})])
async def test_a_client_that_leaves_in_the_middle_cancels_at_once(port, path, more):
    async with Listener(port) as client:
        client.ask(path, **more)
        asked = await port.repository.next()
        asked.say("Hel")
        await client.until(b"\n\n\r\n")
        client.leave()
        async with asyncio.timeout(SECONDS):
            await asked.closed.wait()
    line = await port.lines.next()
    assert (line["status"], line["error"], line["model"]) == (499, "the client left", "m")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_cancels_at_once(port, stream):
    async with Listener(port) as client:
        client.ask(stream=stream)
        asked = await port.repository.next()
        client.leave()
        async with asyncio.timeout(SECONDS):
            await asked.closed.wait()
    assert (await port.lines.next())["status"] == 499


async def test_a_client_that_leaves_while_it_sends_is_logged_once(port):
    async with Listener(port) as client:
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
        await client.writer.drain()
        client.writer.close()
        line = await port.lines.next()
    assert line["status"] == 499
    assert port.repository.asked.empty()


async def test_nothing_is_taken_from_the_engine_for_a_client_that_does_not_read(port):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port.port))
        body = json.dumps({"model": "m", "messages": HELLO, "stream": True}).encode()
        await loop.sock_sendall(
            client, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )
        asked = await port.repository.next()
        total, piece = 0, "x" * 10_000
        async with asyncio.timeout(SECONDS):
            while asked.num_waiting == 0 or total < 100:  # the first hundred fit into buffers, or they do not
                asked.say(piece)
                total += 1
                for _ in range(20):
                    await asyncio.sleep(0)
                assert total < 10_000, "a megabyte of buffers would be plenty"
        asked.say(piece)
        for _ in range(100):
            await asyncio.sleep(0)
        assert asked.num_waiting > 0
    async with asyncio.timeout(SECONDS):
        await asked.closed.wait()


# Whole answers


async def test_a_chat_that_is_not_streamed(port):
    asking = port.chat(n=2, temperature=0, user="me")
    asked = await port.repository.next()
    assert isinstance(asked.prompt, Generate)
    assert (asked.prompt.stream, asked.prompt.sampling.n, asked.prompt.sampling.temperature) == (False, 2, 0.0)
    asked.tell(Delta(index=1, text="b", finish_reason="length"))
    asked.end("a", prompt=5, completion=2)
    answer = await asking
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "b"]
    assert body["usage"]["total_tokens"] == 7
    line = await port.lines.next()
    assert (line["status"], line["model"], line["version"], line["request_id"]) == (200, "m", "2", answer.headers["x-request-id"])


async def test_where_no_version_is_named_traffic_decides_which_one_answers(port):
    asking = port.chat()
    asked = await port.repository.next()
    assert (asked.request.model, asked.request.version) == ("m", "")
    asked.end("a")
    await asking
    assert (await port.lines.next())["version"] == "2"


async def test_the_version_after_the_name_is_asked(port):
    asking = port.chat(model="m@1", priority=2)
    asked = await port.repository.next()
    assert (asked.request.model, asked.request.version, asked.request.priority) == ("m", "1", 2)
    asked.end("a")
    assert (await asking).json()["model"] == "m@1"
    assert (await port.lines.next())["version"] == "1"


async def test_the_callers_request_id_and_trace_are_kept(port):
    body = json.dumps({"model": "m", "messages": HELLO}).encode()
    headers = {"x-request-id": "mine-7", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    asking = asyncio.create_task(port.client.post("/v1/chat/completions", content=body, headers=headers))
    asked = await port.repository.next()
    assert (asked.request.id, asked.request.trace) == ("mine-7", headers["traceparent"])
    asked.end("a")
    answer = await asking
    assert (answer.json()["id"], answer.headers["x-request-id"]) == ("chatcmpl-mine-7", "mine-7")


async def test_an_echo_of_token_ids_asks_for_their_text_first(port):
    asking = asyncio.create_task(port.post("/completions", {"model": "m", "prompt": [5, 6], "echo": True, "max_tokens": 0}))
    spelled = await port.repository.next()
    assert spelled.prompt == Detokenize(token_ids=[5, 6])
    spelled.end("five six")
    generated = await port.repository.next()
    assert (generated.prompt.token_ids, generated.prompt.sampling.max_tokens) == ([5, 6], 0)
    generated.end("", finish_reason="length")
    (choice,) = (await asking).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("five six", "length")


async def test_embeddings_of_a_list(port):
    asking = asyncio.create_task(port.post("/embeddings", {"model": "m", "input": ["a", "b"], "dimensions": 2}))
    for expected in ("a", "b"):
        asked = await port.repository.next()
        assert asked.prompt == Embed(text=expected, dimensions=2)
        asked.end(vector=b"\0\0\x80\x3f" + b"\0" * 4, prompt=3)
    body = (await asking).json()
    assert [each["embedding"] for each in body["data"]] == [[1.0, 0.0]] * 2
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}


async def test_tokens_and_back(port):
    asking = asyncio.create_task(port.post("/tokenize", {"model": "m", "prompt": "to be", "return_token_strs": True}))
    asked = await port.repository.next()
    assert asked.prompt == Tokenize(text="to be")
    asked.end(token_ids=[4, 9], tokens=["to", " be"])
    assert (await asking).json() == {"count": 2, "max_model_len": 4096, "tokens": [4, 9], "token_strs": ["to", " be"]}

    asking = asyncio.create_task(port.post("/tokenize", {"model": "m", "messages": HELLO, "add_generation_prompt": False}))
    asked = await port.repository.next()
    assert asked.prompt.chat.messages[0].content == "hello"
    assert not asked.prompt.chat.add_generation_prompt
    asked.end(token_ids=[4])
    assert (await asking).json()["token_strs"] is None

    asking = asyncio.create_task(port.post("/detokenize", {"model": "m", "tokens": [4, 9]}))
    asked = await port.repository.next()
    assert asked.prompt == Detokenize(token_ids=[4, 9])
    asked.end("to be")
    assert (await asking).json() == {"prompt": "to be"}


@pytest.mark.parametrize("fields", [{}, {"prompt": "a", "messages": HELLO}])
async def test_tokenize_takes_a_text_or_a_conversation(port, fields):
    answer = await port.post("/tokenize", {"model": "m", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


# Models


async def test_the_models_that_generate_or_embed_are_listed(port):
    listed = (await port.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(each["id"], each["object"], each["max_model_len"]) for each in listed["data"]] == [("m", "model", 4096)]
    assert (await port.client.get("/v1/models/m")).json() == listed["data"][0]
    assert (await port.client.get("/v1/models/m@1")).json()["id"] == "m@1"


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("nobody", 404, "The model 'nobody' does not exist or you do not have access to it."),
        ("m@9", 404, "Request for unknown model: 'm' version 9 is not found"),
        ("t", 400, "The model 't' takes tensors and gives tensors: ask it at /v2/models/t/infer."),
    ],
)
async def test_a_model_that_cannot_be_asked_here(port, name, status, message):
    retrieved = await port.client.get(f"/v1/models/{name}")
    asked = await port.post("/chat/completions", {"model": name, "messages": HELLO})
    for answer in (retrieved, asked):
        assert answer.status_code == status
        assert (answer.json()["error"]["message"], answer.json()["error"]["param"]) == (message, "model")
    line = await port.lines.next()
    assert (line["status"], line["model"], line["error"]) == (status, name.partition("@")[0], message)


async def test_a_model_that_is_loading_says_so_and_when_to_come_back(port):
    port.repository.trouble = errors.Unavailable("Request for unknown model: 'm' is still loading")
    retrieved = await port.client.get("/v1/models/m")
    asked = await port.post("/chat/completions", {"model": "m", "messages": HELLO})
    for answer in (retrieved, asked):
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "unavailable", "1")
    assert (await port.lines.next())["status"] == 503


# What never reaches an operation


async def test_an_unknown_path(port):
    answer = await port.post("/chat/completion", {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert "POST /v1/chat/completion" in answer.json()["error"]["message"]


async def test_a_method_that_the_path_does_not_have(port):
    answer = await port.client.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"] == {
        "message": "Not allowed to GET on /v1/chat/completions: its methods are POST.",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_supported",
    }


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit(port, chunked):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * (1 << 20)}]}).encode()

    async def pieces():
        yield body

    answer = await port.client.post("/v1/chat/completions", content=pieces() if chunked else body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    line = await port.lines.next()
    assert line["status"] == 413


async def test_wrong_json_is_logged_with_what_is_wrong(port):
    answer = await port.post("/chat/completions", b'{"model": "m", "messages": [], "temperature": NaN}')
    assert answer.status_code == 400
    line = await port.lines.next()
    assert (line["status"], line["error"]) == (400, answer.json()["error"]["message"])


async def test_a_compressed_body_is_read_and_an_unknown_compression_refused(port):
    body = gzip.compress(json.dumps({"model": "m", "messages": HELLO}).encode())
    asking = asyncio.create_task(port.post("/chat/completions", body, **{"content-encoding": "gzip"}))
    (await port.repository.next()).end("a")
    assert (await asking).status_code == 200
    answer = await port.post("/chat/completions", body, **{"content-encoding": "br"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (501, "invalid_request_error")


async def test_what_is_not_v1_keeps_its_own_shape(port):
    assert (await port.client.get("/v2/nowhere")).json() == {"error": "Not Found"}


async def test_a_stream_that_ends_without_a_word_is_done(port):
    """Nothing but the usage: max_tokens was 0."""
    asking = asyncio.create_task(port.post("/completions", {"model": "m", "prompt": "a", "echo": True, "max_tokens": 0, "stream": True}))
    asked = await port.repository.next()
    asked.end(finish_reason="length")
    chunk, done = events((await asking).text)
    assert (chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"], done) == ("a", "length", "[DONE]")
