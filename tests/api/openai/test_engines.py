"""The door before engines that are full, die, or come back, and before clients that are many or slow."""

import asyncio
import json
import socket
from collections import Counter
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from tests.api.openai.served import SECONDS, engines, until
from tests.api.served import Served

MODELS = {
    "crowd": "llm: {max_num_seqs: 1, max_waiting: 200}\nparameters: {step_seconds: 0.001}",
    "mortal": "parameters: {step_seconds: 0.005}",
    "leaving": "parameters: {step_seconds: 0.005}",
    "single": "llm: {max_num_seqs: 1}\nparameters: {step_seconds: 0.005}",
    "wordy": "llm: {max_model_len: 1000000}",
}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory):
    async with engines(tmp_path_factory.mktemp("models"), "identity", **MODELS) as port:
        yield port


@pytest.fixture
def port(running):
    while not running.lines.queue.empty():
        running.lines.queue.get_nowait()
    return running


def chat(model: str, text: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


async def ask(port: Served, body: dict[str, Any]) -> httpx2.Response:
    return await port.client.post("/v1/chat/completions", json=body)


def told(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def http(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(content), content)


def aborted(port: Served, model: str) -> int:
    return port.repository.find(model).stats.finished.get("abort", 0)


async def test_of_a_thousand_at_once_each_gets_an_answer_or_429(port):
    refused: Counter[int] = Counter()
    all_refused = asyncio.Event()

    async def one(number: int) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.server.port)
        writer.write(http(chat("crowd", f"number {number}", stream=number % 2 == 0)))
        answer = await reader.read(-1)
        writer.close()
        status = int(answer[9:12])
        refused[status] += 1
        if refused[429] == 800:
            all_refused.set()
        return status, answer

    async with (
        asyncio.timeout(60),
        port.client.stream("POST", "/v1/chat/completions", json=chat("crowd", "!forever on", stream=True)) as blocker,
    ):
        await anext(blocker.aiter_lines())
        asking = [asyncio.create_task(one(number)) for number in range(1000)]
        await all_refused.wait()
    answers = await asyncio.gather(*asking)
    assert Counter(status for status, _ in answers) == {200: 200, 429: 800}
    for number, (status, answer) in enumerate(answers):
        if status == 200:
            assert str(number).encode() in answer
        else:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"retry-after: " in head.lower()
            assert json.loads(body)["error"]["type"] == "rate_limit_error"
    assert Counter([(await port.lines.next())["status"] for _ in range(1001)]) == {200: 200, 429: 800, 499: 1}


async def test_a_process_that_dies_fails_its_requests_and_comes_back(port):
    async with port.client.stream("POST", "/v1/chat/completions", json=chat("mortal", "!forever on", stream=True)) as answer:
        lines = answer.aiter_lines()
        assert "assistant" in await anext(lines)
        waiting = asyncio.create_task(ask(port, chat("mortal", "!crash")))
        *_, last = [line async for line in lines if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "model_error")
    assert error["message"] == "model 'mortal' died (exit code 7) while computing this request"
    assert told(await waiting) == (500, "model_error")
    assert sorted([(await port.lines.next())["status"] for _ in range(2)]) == [500, 500]
    async with asyncio.timeout(SECONDS):
        while (answer := await ask(port, chat("mortal", "hello"))).status_code != 200:
            assert told(answer) == (503, "unavailable")
            assert int(answer.headers["retry-after"]) >= 1


async def test_a_model_that_is_unloaded_finishes_what_runs_and_refuses_the_rest(port):
    version = port.repository.find("leaving")
    body = chat("leaving", "!forever on", stream=True, max_tokens=300)
    async with port.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        unloading = asyncio.create_task(port.repository.unload("leaving"))
        await until(lambda: version.draining)
        assert (await ask(port, chat("leaving", "hello"))).status_code in (404, 503)
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    await unloading
    assert told(await ask(port, chat("leaving", "hello"))) == (404, "model_not_found")
    assert "leaving" not in [model["id"] for model in (await port.client.get("/v1/models")).json()["data"]]


async def test_a_client_that_leaves_before_its_turn_is_forgotten(port):
    first = asyncio.create_task(ask(port, chat("single", "!forever on")))
    second = asyncio.create_task(ask(port, chat("single", "!forever on")))
    await until(lambda: (stats := port.repository.find("single").stats).num_running + stats.num_waiting == 2)
    second.cancel()
    await until(lambda: aborted(port, "single") == 1)
    first.cancel()
    await until(lambda: aborted(port, "single") == 2)
    for _ in range(2):
        assert (await port.lines.next())["status"] == 499


async def test_a_reader_that_is_too_slow_is_cut_off_and_its_request_ends(port, monkeypatch):
    monkeypatch.setattr(port.server, "write_timeout", 0.2)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port.server.port))
        await loop.sock_sendall(client, http(chat("wordy", "!forever " + "w" * 2000, stream=True)))
        line = await port.lines.next()
    assert (line["status"], line["error"], line["model"]) == (499, "the client left", "wordy")
    await until(lambda: aborted(port, "wordy") == 1)


async def test_kserve_asks_the_same_models(port):
    one = await port.client.post("/v2/models/single/generate", json={"text_input": "to be", "parameters": {"max_tokens": 1}})
    assert one.json()["text_output"] == "to beto "
    many = await port.client.post("/v2/models/single/generate_stream", json={"text_input": "to be", "stream": True})
    pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in many.text.splitlines() if line]
    assert "".join(pieces) == "to be"
    tensors = [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["to be"]}]
    whole = await port.client.post("/v2/models/single/infer", json={"inputs": tensors})
    assert whole.json()["outputs"][0]["data"] == ["to beto be"]
