"""Everything HTTP but plain infer, through a real port, over real models."""

import asyncio
import base64
import gzip
import json
import zlib

import httpx2
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.http
from tritonclient.utils import InferenceServerException

from fairlead.api.data import data_app
from fairlead.runtime.repository import Control
from tests.api.served import FOREVER, Served, served

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    async with served(tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.fixture(autouse=True)
def no_lines_of_others(port: Served) -> None:
    while not port.lines.queue.empty():
        port.lines.queue.get_nowait()


@pytest.fixture
def client(port: Served) -> httpx2.AsyncClient:
    return port.client


async def as_triton(port: Served, ask):
    """What Triton's own client gets, in a thread of its own because it blocks."""

    def talk():
        with tritonclient.http.InferenceServerClient(port.address) as client:
            return ask(client)

    return await asyncio.to_thread(talk)


def numbers(n: int) -> dict:
    return {"inputs": [{"name": "n", "shape": [1], "datatype": "INT32", "data": [n]}]}


def row(*values: float) -> dict:
    return {"inputs": [{"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": values}]}


EVENTS = {"Accept": "text/event-stream"}


def events(answer: httpx2.Response) -> list[dict]:
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *parts, rest = answer.text.split("\n\n")
    assert rest == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts]


# The server


async def test_tritons_client_finds_a_live_and_ready_server(port):
    assert await as_triton(port, lambda client: client.is_server_live())
    assert await as_triton(port, lambda client: client.is_server_ready())
    metadata = await as_triton(port, lambda client: client.get_server_metadata())
    assert metadata["name"] == "fairlead"
    assert "binary_tensor_data" in metadata["extensions"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/healthz", {"live": True, "ready": True}),
        ("/healthz/live", {"live": True}),
        ("/healthz/ready", {"ready": True}),
    ],
)
async def test_health_has_a_body_for_kserves_client_and_takes_head(client, path, body):
    answer = await client.get(path)
    assert (answer.status_code, answer.json()) == (200, body)
    head = await client.head(path)
    assert (head.status_code, head.content) == (200, b"")


async def test_a_server_that_stops_is_live_but_not_ready(tmp_path):
    async with served(tmp_path, "identity") as port:
        port.repository.stopping = True
        ready = await port.client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False, "error": "Server exiting"})
        assert (await port.client.get("/v2/health/live")).json() == {"live": True}
        late = await port.client.post("/v2/models/identity/infer", json=row(1, 2, 3, 4), headers=EVENTS)
        assert late.status_code == 503
        assert late.headers["retry-after"] == "1"
        assert late.json()["error"].startswith("Server is stopping")


# Models


async def test_tritons_client_reads_a_model(port):
    assert await as_triton(port, lambda client: client.is_model_ready("identity"))
    assert await as_triton(port, lambda client: client.is_model_ready("identity", "1"))
    metadata = await as_triton(port, lambda client: client.get_model_metadata("identity"))
    assert metadata == {
        "name": "identity",
        "versions": ["1"],
        "platform": "python",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    }
    config = await as_triton(port, lambda client: client.get_model_config("count", "1"))
    assert (config["max_batch_size"], config["model_transaction_policy"]) == (0, {"decoupled": True})


async def test_statistics_count_what_was_asked(port):
    def asked(statistics):
        return {each["name"]: each["inference_stats"]["success"]["count"] for each in statistics["model_stats"]}

    before = asked(await as_triton(port, lambda client: client.get_inference_statistics()))
    assert (await port.client.post("/v2/models/shout/generate", json={"text": "hi"})).status_code == 200
    await port.lines.next()
    assert asked(await as_triton(port, lambda client: client.get_inference_statistics("shout", "1"))) == {"shout": before["shout"] + 1}
    after = asked(await as_triton(port, lambda client: client.get_inference_statistics()))
    assert after == {**before, "shout": before["shout"] + 1}


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/v2/models/nobody", 404, "Request for unknown model: 'nobody' is not found"),
        ("/v2/models/nobody/ready", 404, "Request for unknown model: 'nobody' is not found"),
        ("/v2/models/nobody/config", 404, "Request for unknown model: 'nobody' is not found"),
        ("/v2/models/nobody/stats", 400, "requested model 'nobody' is not available"),
        ("/v2/models/a%20b%25", 404, "Request for unknown model: 'a b%' is not found"),
        ("/v2/models/identity/versions/9", 404, "Request for unknown model: 'identity' version 9 is not found"),
        ("/v2/models/identity/versions/9/ready", 404, "Request for unknown model: 'identity' version 9 is not found"),
        ("/v2/models/broken/ready", 400, "Model version not ready"),
        ("/v2/models/broken/versions/1/ready", 400, "Model version not ready"),
        ("/v2/models/broken", 404, "Request for unknown model: 'broken' has no available versions"),
    ],
)
async def test_a_model_that_does_not_answer_is_told_in_tritons_words(client, path, status, error):
    answer = await client.get(path)
    assert (answer.status_code, answer.json()) == (status, {"error": error})


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v2/",
        "/v3",
        "/v2/models",
        "/v2/models/",
        "/v2/models//ready",
        "/v2/models/identity/",
        "/v2/models/identity/ready/",
        "/v2/models/identity/versions",
        "/v2/models/identity/versions/",
        "/v2/models/identity/versions/one",
        "/v2/models/identity/versions/-1/config",
        "/v2/models/identity/versions/%D9%A3",
        "/v2/models/identity/other",
        "/v2/health",
    ],
)
async def test_an_unknown_path_is_404(client, path):
    answer = await client.get(path)
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2"),
        ("DELETE", "/v2/models/identity"),
        ("POST", "/v2/models/stats"),
        ("GET", "/v2/models/identity/infer"),
        ("GET", "/v2/models/identity/generate"),
        ("GET", "/v2/repository/index"),
        ("PUT", "/v2/repository/models/identity/load"),
        ("POST", "/healthz"),
    ],
)
async def test_a_wrong_verb_is_405(client, method, path):
    answer = await client.request(method, path)
    assert (answer.status_code, answer.json()) == (405, {"error": "Method Not Allowed"})
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/systemsharedmemory/status"),
        ("GET", "/v2/cudasharedmemory/region/r/status"),
        ("POST", "/v2/systemsharedmemory/region/r/register"),
        ("POST", "/v2/cudasharedmemory/unregister"),
        ("POST", "/v2/cudasharedmemory/region/r/unregister"),
        ("GET", "/v2/trace/setting"),
        ("POST", "/v2/models/identity/versions/1/trace/setting"),
        ("GET", "/v2/logging"),
        ("POST", "/v2/logging"),
        ("POST", "/v2/repository/mine/index"),
        ("POST", "/v2/repository/mine/models/identity/load"),
    ],
)
async def test_what_is_not_offered_says_so(client, method, path):
    answer = await client.request(method, path)
    assert answer.status_code == 501
    assert answer.json()["error"].startswith("this server does not offer ")


# The repository


async def test_the_index_lists_what_is_loaded_and_what_is_not(port):
    index = {row["name"]: row for row in await as_triton(port, lambda client: client.get_model_repository_index())}
    assert index["identity"] == {"name": "identity", "version": "1", "state": "READY"}
    assert (index["broken"]["state"], "not today" in index["broken"]["reason"]) == ("UNAVAILABLE", True)
    ready = await port.client.post("/v2/repository/index", json={"ready": True})
    assert "broken" not in {row["name"] for row in ready.json()}


async def test_tritons_client_unloads_and_loads(port):
    await as_triton(port, lambda client: client.unload_model("spare", unload_dependents=True))
    assert not await as_triton(port, lambda client: client.is_model_ready("spare"))
    await as_triton(port, lambda client: client.load_model("spare"))
    assert await as_triton(port, lambda client: client.is_model_ready("spare"))


async def test_a_load_may_bring_its_own_config_and_files(port):
    code = b"import numpy as np\nclass Twice:\n    example = {'x': np.zeros((1, 1), np.float32)}\n    def infer(self, inputs):\n        return {'twice': 2 * inputs['x']}\n"
    config = json.dumps({"instances": {"isolation": "thread"}, "batching": {"max_batch_size": 3}})
    body = {"parameters": {"config": config, "file:7/model.py": base64.b64encode(code).decode()}}
    try:
        answer = await port.client.post("/v2/repository/models/spare/load", json=body)
        assert (answer.status_code, answer.json()) == (200, {})
        loaded = (await port.client.get("/v2/models/spare/config")).json()
        assert (loaded["max_batch_size"], [output["name"] for output in loaded["output"]]) == (3, ["twice"])
        assert (await port.client.get("/v2/models/spare")).json()["versions"] == ["7"]
    finally:
        await port.client.post("/v2/repository/models/spare/unload")
        await port.client.post("/v2/repository/models/spare/load")


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("index", b'{"ready": 1}', 400, "Expected `bool`, got `int` - at `$.ready`"),
        ("index", b'{"raedy": true}', 400, "unknown field `raedy`"),
        ("index", b"[]", 400, "Expected `object`"),
        ("index", b"{", 400, "not JSON"),
        ("index", b"[" * 100_000 + b"]" * 100_000, 400, ""),
        ("index", b" " * (1 << 20) + b"{}", 413, "exceeds the limit of 1048576 bytes"),
        ("models/spare/load", b'{"parameters": {"confg": "{}"}}', 400, "unrecognized load parameter 'confg'"),
        ("models/spare/load", b'{"parameters": {"config": {}}}', 400, "Expected `str`"),
        ("models/spare/load", b'{"parameters": {"config": "{"}}', 400, "config"),
        ("models/spare/load", b'{"parameters": {"config": "{\\"wrong\\": 1}"}}', 400, "`wrong`"),
        ("models/spare/load", b'{"parameters": {"file:1/model.py": ""}}', 400, "'config' must be given"),
        ("models/spare/load", b'{"parameters": {"config": "{}", "file:1/model.py": "*"}}', 400, "'file:1/model.py' is not base64"),
        ("models/spare/load", b'{"parameters": {"config": "{}", "file:1/../../x": ""}}', 400, "inside a version's folder"),
        ("models/spare/load", b'{"parameters": {"config": "{}", "file:/etc/x": ""}}', 400, "unrecognized load parameter"),
        ("models/spare/load", b'{"parameters": {"config": "{}", "file:model.py": ""}}', 400, "unrecognized load parameter"),
        ("models/spare/load", b'{"options": {}}', 400, "unknown field `options`"),
        ("models/nobody/load", b"", 404, "failed to load 'nobody'"),
        ("models/broken/load", b"", 400, "not today"),
        ("models/nobody/unload", b"", 404, "'nobody' is not found"),
        ("models/spare/unload", b'{"parameters": {"unload_dependents": "yes"}}', 400, "Expected `bool`"),
        ("models/spare/unload", b'{"parameters": {"force": true}}', 400, "unknown field `force`"),
    ],
)
async def test_a_wrong_wish_to_the_repository_is_refused_by_name(port, path, body, status, error):
    answer = await port.client.post(f"/v2/repository/{path}", content=body)
    assert (answer.status_code, error in answer.json()["error"]) == (status, True), answer.text
    assert (await port.client.get("/v2/models/spare/ready")).status_code == 200


async def test_a_bomb_is_small_when_it_comes_and_is_not_let_grow(client):
    bomb = gzip.compress(b" " * (64 << 20))
    answer = await client.post("/v2/repository/index", content=bomb, headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()) == (413, {"error": "request body is larger than 1048576 bytes after decompression"})
    small = await client.post("/v2/repository/index", content=zlib.compress(b'{"ready": true}'), headers={"Content-Encoding": "deflate"})
    assert small.status_code == 200


async def test_an_encoding_that_is_not_ours_is_told_which_are(client):
    answer = await client.post("/v2/repository/index", content=b"{}", headers={"Content-Encoding": "zstd"})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (501, "gzip, deflate")
    assert "'zstd' is not supported" in answer.json()["error"]


async def test_a_repository_that_is_not_explicit_takes_no_orders(tmp_path):
    async with served(tmp_path, "identity", control=Control.NONE) as port:
        with pytest.raises(InferenceServerException, match="explicit model load / unload is not allowed"):
            await as_triton(port, lambda client: client.unload_model("identity"))
        assert (await port.client.post("/v2/repository/models/identity/load")).status_code == 503


# Events


async def test_a_streaming_model_answers_with_an_event_for_each_response(port):
    answer = await port.client.post("/v2/models/count/infer", json={"id": "me", **numbers(3)}, headers={**EVENTS, "X-Request-Id": "abc"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "abc"
    assert events(answer) == [
        {
            "id": "me",
            "model_name": "count",
            "model_version": "1",
            "outputs": [{"name": "i", "datatype": "INT32", "shape": [1], "data": [i]}],
        }
        for i in range(3)
    ]
    line = await port.lines.next()
    assert (line["request_id"], line["model"], line["version"], line["status"], line["error"]) == ("abc", "count", "1", 200, "")


async def test_events_come_one_by_one_and_stop_when_the_client_leaves(port):
    async with (
        httpx2.AsyncClient(base_url=f"http://{port.address}", timeout=20) as leaving,
        leaving.stream("POST", "/v2/models/count/infer", json=numbers(FOREVER), headers=EVENTS) as answer,
    ):
        lines = answer.aiter_lines()
        for i in range(3):
            assert json.loads((await anext(lines)).removeprefix("data: "))["outputs"][0]["data"] == [i]
            assert await anext(lines) == ""
    line = await port.lines.next()
    assert (line["model"], line["status"], line["error"]) == ("count", 499, "the client left")
    # The one instance is free again: nobody computes for nobody.
    answer = await port.client.post("/v2/models/count/infer", json=numbers(1), headers=EVENTS)
    assert len(events(answer)) == 1
    await port.lines.next()


async def test_an_ordinary_model_answers_with_one_event(port):
    body = {**row(1, 2, 3, 4), "outputs": [{"name": "y", "parameters": {"classification": 2}}]}
    answer = await port.client.post("/v2/models/identity/versions/1/infer", json=body, headers=EVENTS)
    (event,) = events(answer)
    assert event["outputs"] == [{"name": "y", "datatype": "BYTES", "shape": [1, 2], "data": ["4.000000:3:dog", "3.000000:2:cat"]}]
    assert (await port.lines.next())["status"] == 200


@pytest.mark.parametrize("compress", [None, ("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_an_event_stream_takes_the_binary_extension(port, compress):
    head = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}]}).encode()
    body = head + np.arange(4, dtype=np.float32).tobytes()
    headers = {**EVENTS, "Inference-Header-Content-Length": str(len(head))}
    if compress:
        encoding, function = compress
        headers["Content-Encoding"], body = encoding, function(body)
    answer = await port.client.post("/v2/models/identity/infer", content=body, headers=headers)
    assert events(answer)[0]["outputs"][0]["data"] == [0, 1, 2, 3]
    raw = await port.client.post(
        "/v2/models/identity/infer", content=np.ones(4, np.float32).tobytes(), headers={**EVENTS, "Inference-Header-Content-Length": "0"}
    )
    assert events(raw)[0]["outputs"][0]["data"] == [1, 1, 1, 1]
    assert [(await port.lines.next())["status"] for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    ("model", "body", "headers", "status", "error"),
    [
        ("nobody", {}, {}, 404, "unknown model: 'nobody'"),
        ("identity", {}, {}, 400, "missing required field `inputs`"),
        ("identity", row(1, 2), {}, 400, "unexpected shape for input 'x'"),
        ("identity", {**row(1, 2, 3, 4), "outputs": [{"name": "z"}]}, {}, 400, "unexpected inference output 'z'"),
        ("identity", {**row(1, 2, 3, 4), "parameters": {"binary_data_output": True}}, {}, 400, "events are text"),
        ("identity", row(1, 2, 3, 4), {"Inference-Header-Content-Length": "9999"}, 400, "inference header size should be in range"),
        ("identity", row(1, 2, 3, 4), {"Inference-Header-Content-Length": "x"}, 400, "not an unsigned integer"),
        ("identity", row(1, 2, 3, 4), {"Content-Encoding": "gzip"}, 400, "does not decompress"),
        ("identity", row(1, 2, 3, 4), {"Content-Encoding": "br"}, 501, "Content-Encoding 'br' is not supported"),
        ("identity", row(*[0.0] * 300_000), {}, 413, "send its tensors with the binary extension"),
        ("failing", row(1), {}, 500, "zeros only"),
    ],
)
async def test_an_error_before_the_first_event_is_an_ordinary_answer(port, model, body, headers, status, error):
    answer = await port.client.post(f"/v2/models/{model}/infer", json=body, headers={**EVENTS, **headers})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert error in answer.json()["error"]
    line = await port.lines.next()
    assert (line["status"], error in line["error"]) == (status, True)


async def test_an_error_after_the_first_event_is_the_last_event(port):
    answer = await port.client.post("/v2/models/count/infer", json=numbers(-2), headers=EVENTS)
    assert answer.status_code == 200
    *counted, last = events(answer)
    assert [event["outputs"][0]["data"] for event in counted] == [[0], [1]]
    assert "no further" in last["error"]
    line = await port.lines.next()
    assert (line["status"], line["error"]) == (500, last["error"])


async def test_streams_that_do_not_end_are_cut_off_when_the_server_stops(tmp_path):
    async with served(tmp_path, "count") as port:
        async with port.client.stream("POST", "/v2/models/count/infer", json=numbers(FOREVER), headers=EVENTS) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            await port.server.drain(0.0)
            with pytest.raises(httpx2.HTTPError):
                async for _ in lines:
                    pass
        assert (await port.lines.next())["status"] in {499, 503}


async def test_every_answer_is_counted_by_its_status(port):
    before = port.repository.metrics.responses["http", 404]
    await port.client.post("/v2/models/nobody/generate", json={})
    assert port.repository.metrics.responses["http", 404] == before + 1
    await port.lines.next()


# Generate


async def test_generate_answers_flat_json_with_flat_json(port):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = await port.client.post(
        "/v2/models/shout/generate", json={"text": "hi", "id": "7", "volume": 11}, headers={"traceparent": trace}
    )
    assert answer.json() == {"id": "7", "model_name": "shout", "model_version": "1", "loud": "HI"}
    assert answer.headers["traceparent"] == trace
    line = await port.lines.next()
    assert (line["trace"], line["rows"], line["status"]) == (trace, 1, 200)


async def test_generate_wants_exactly_one_response(port):
    assert (await port.client.post("/v2/models/count/generate", json={"n": 1})).json()["i"] == 0
    many = await port.client.post("/v2/models/count/versions/1/generate", json={"n": FOREVER})
    assert many.status_code == 400
    assert "generate expects model to produce exactly 1 response" in many.json()["error"]
    # ... and stopped the one that had more to say.
    stream = await port.client.post("/v2/models/count/generate_stream", json={"n": 2})
    assert [event["i"] for event in events(stream)] == [0, 1]
    assert [(await port.lines.next())["status"] for _ in range(3)] == [200, 400, 200]


async def test_a_client_that_leaves_generate_leaves_the_queue(port):
    # One stream holds the only instance; another request waits behind it, and its client leaves.
    async with port.client.stream("POST", "/v2/models/count/generate_stream", json={"n": FOREVER}) as first:
        lines = first.aiter_lines()
        assert json.loads((await anext(lines)).removeprefix("data: "))["i"] == 0
        _, writer = await asyncio.open_connection("127.0.0.1", port.server.port)
        writer.write(b'POST /v2/models/count/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n{"n": 1}')
        await writer.drain()
        writer.close()
        left = await port.lines.next()
        assert (left["status"], left["error"]) == (499, "the client left")
        assert port.repository.find("count").batcher.num_requests == 0
        assert await anext(lines) == ""
        assert json.loads((await anext(lines)).removeprefix("data: "))["i"] == 1
    assert (await port.lines.next())["status"] == 499


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("nobody/generate", {}, 404, "unknown model: 'nobody'"),
        ("shout/generate", {}, 400, "missing required input(s) ['text']"),
        ("shout/generate", {"text": 5}, 400, "input 'text'"),
        ("identity/generate", {"x": [1, 2]}, 400, "2 values do not fill the shape [-1, 4] of input 'x'"),
        ("failing/generate", {"x": 1}, 500, "zeros only"),
        ("failing/generate_stream", {"x": 1}, 500, "zeros only"),
        ("shout/generate", {"text": "long" * 300_000}, 413, "exceeds the limit of 1048576 bytes"),
    ],
)
async def test_a_wrong_generate_is_refused_in_json(port, path, body, status, error):
    answer = await port.client.post(f"/v2/models/{path}", json=body)
    assert (answer.status_code, error in answer.json()["error"]) == (status, True), answer.text
    assert (await port.lines.next())["status"] == status


# In process


async def test_the_app_runs_without_a_port_and_keeps_its_surprises_to_itself(port):
    class Broken:
        ready = stopping = property(lambda self: 1 / 0)

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(data_app(port.repository)), base_url="http://here") as here:
        assert (await here.get("/v2/models/identity")).json()["name"] == "identity"
        plain = await here.post("/v2/models/identity/infer", json=row(1, 2, 3, 4))
        assert plain.status_code == 406
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(data_app(Broken())), base_url="http://here") as here:
        answer = await here.get("/v2/health/ready")
        assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})
