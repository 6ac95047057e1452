"""ModelStreamInfer: many requests and many answers on one call."""

import asyncio
import queue

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc
from tritonclient.grpc import service_pb2 as pb

from fairlead.api.grpc import service
from tests.api.grpc.gates import GATES, close_gates, reached
from tests.api.grpc.served import Served, count, only, request, row, served

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    close_gates()
    async with served(tmp_path_factory.mktemp("models") / "m", "identity", "failing", "count", "gated", "typed") as running:
        yield running


async def exchange(port: Served, *requests: pb.ModelInferRequest, **options) -> list[pb.ModelStreamInferResponse]:
    """All answers to some requests on one stream."""
    call = port.stream(timeout=20, **options)
    for message in requests:
        await call.write(message)
    await call.done_writing()
    return [answer async for answer in call]


def final(answer: pb.ModelStreamInferResponse) -> bool:
    return answer.infer_response.parameters["triton_final_response"].bool_param


def number(answer: pb.ModelStreamInferResponse) -> int:
    return int(np.frombuffer(answer.infer_response.raw_output_contents[0], np.int32)[0])


async def test_answers_of_ordinary_models_come_in_the_order_of_their_requests(port):
    close_gates()
    call = port.stream(timeout=20)
    await call.write(request("gated", x=row(1), id="slow"))
    await reached(GATES.entered)
    for i in range(50):
        await call.write(request("identity", x=row(i), id=str(i)))
    await call.write(request("nobody", x=row(1), id="bad"))
    GATES.opened.set()
    await call.done_writing()
    answers = [answer async for answer in call]
    assert [answer.infer_response.id for answer in answers] == ["slow", *map(str, range(50)), "bad"]
    assert [only(answer.infer_response) for answer in answers[1:-1]] == [[i] for i in range(50)]
    assert all(final(answer) for answer in answers)


async def test_errors_are_messages_of_a_stream_that_goes_on(port):
    broken = request("identity", x=row(1), id="1")
    broken.raw_input_contents[0] = b"123"
    answers = await exchange(
        port, broken, request("failing", x=row(1), id="2"), request("identity", x=row(5), parameters={"priority": "high"}, id="3"), request("identity", x=row(5), id="4")
    )  # fmt: skip
    assert [answer.infer_response.id for answer in answers] == ["1", "2", "3", "4"]
    assert answers[0].error_message == "[request id: 1] input byte size mismatch for input 'x' for model 'identity'. Expected 4, got 3"
    assert "zeros only" in answers[1].error_message
    assert "parameter 'priority' must be an unsigned integer" in answers[2].error_message
    assert only(answers[3].infer_response) == [5]


async def test_errors_are_the_calls_status_for_those_who_ask_so(port):
    while not port.lines.queue.empty():
        port.lines.queue.get_nowait()
    call = port.stream(metadata=[("triton_grpc_error", "true")], timeout=20)
    await call.write(request("identity", x=row(1)))
    assert only((await call.read()).infer_response) == [1]
    await call.write(request("nobody", x=row(1)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'nobody' is not found")
    lines = [await port.lines.next(), await port.lines.next()]
    assert [(line["model"], line["status"]) for line in lines] == [("identity", 0), ("nobody", 5)]
    assert [(line["outcome"], line["reason"]) for line in lines] == [("success", ""), ("refused", "not-found")]
    served, refused = (line["timeline"] for line in lines)
    assert served is not refused and served.request_id == refused.request_id
    assert [name for _, name, _ in served.events] == ["decoded", "batched", "computed"] and served.bytes_in > 0
    assert port.lines.queue.empty()


async def test_a_streaming_model_answers_many_times(port):
    answers = await exchange(port, count(3, id="c"))
    assert [number(answer) for answer in answers] == [0, 1, 2]
    assert {answer.infer_response.id for answer in answers} == {"c"}
    assert not any(final(answer) for answer in answers)
    answers = await exchange(port, count(2, id="c", parameters={"triton_enable_empty_final_response": True}))
    assert [final(answer) for answer in answers] == [False, False, True]
    last = answers[-1].infer_response
    assert (last.id, last.model_name, last.model_version, len(last.outputs)) == ("c", "count", "1", 0)


async def test_a_streaming_model_that_fails_ends_its_answers_only(port):
    answers = await exchange(port, count(-2, id="c"))
    assert [number(answer) for answer in answers[:2]] == [0, 1]
    assert ("no further" in answers[2].error_message, answers[2].infer_response.id, final(answers[2])) == (True, "c", True)
    while not port.lines.queue.empty():
        port.lines.queue.get_nowait()
    assert len(await exchange(port, count(-1), request("identity", x=row(1)))) == 3
    lines = sorted([await port.lines.next(), await port.lines.next()], key=lambda line: line["model"])
    assert [(line["model"], line["status"], bool(line["error"])) for line in lines] == [("count", 13, True), ("identity", 0, False)]
    assert [line["outcome"] for line in lines] == ["failure", "success"]


async def test_a_bug_ends_one_request_which_has_its_line(port, monkeypatch):
    while not port.lines.queue.empty():
        port.lines.queue.get_nowait()
    monkeypatch.setattr(service, "encode_response", lambda *_, **__: 1 / 0)
    (answer,) = await exchange(port, count(3, id="c"))
    assert (answer.error_message, answer.infer_response.id) == ("internal error", "c")
    line = await port.lines.next()
    assert (line["model"], line["outcome"], line["status"]) == ("count", "failure", 13)
    assert port.lines.queue.empty()


async def test_ordinary_and_streaming_answers_interleave(port):
    answers = await exchange(port, count(3, id="c"), request("identity", x=row(1), id="i"), count(3, id="d"))
    by_id = {}
    for answer in answers:
        by_id.setdefault(answer.infer_response.id, []).append(answer)
    assert [number(answer) for answer in by_id["c"]] == [number(answer) for answer in by_id["d"]] == [0, 1, 2]
    assert len(by_id["i"]) == 1


async def test_a_client_that_leaves_stops_the_model(port):
    call = port.stream(timeout=20)
    await call.write(count(0, tell=True))
    assert number(await call.read()) == 0
    call.cancel()
    assert await port.counted() >= 0
    assert [number(answer) for answer in await exchange(port, count(2))] == [0, 1]


async def test_a_deadline_stops_the_model(port):
    call = port.stream(timeout=0.3)
    await call.write(count(0, tell=True))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await port.counted() >= 0


async def test_a_stream_that_is_cancelled_takes_its_waiting_requests_along(port):
    close_gates()
    before = port.repository.statistics("gated")[0]["inference_count"]
    call = port.stream(timeout=20)
    for i in range(1, 4):
        await call.write(request("gated", x=row(i)))
    await reached(GATES.entered)
    call.cancel()
    for _ in range(3):  # each has its line
        while (await port.lines.next())["status"] != 1:
            pass
    GATES.opened.set()
    assert only(await port.infer(request("gated", x=row(9)))) == [9]
    assert port.repository.statistics("gated")[0]["inference_count"] <= before + 4


async def test_many_requests_on_one_stream(port):
    call = port.stream(timeout=20)

    async def write():
        for i in range(1000):
            await call.write(request("identity", x=row(i), id=str(i)))
        await call.done_writing()

    writing = asyncio.create_task(write())
    assert [answer.infer_response.id async for answer in call] == [str(i) for i in range(1000)]
    await writing


async def test_long_strings_go_there_and_back_in_their_turn(port):
    strings = np.empty((1, 10_000), object)
    strings[:] = b"word"
    message = request("identity", x=row(1), id="0")
    long = pb.ModelInferRequest(model_name="typed", id="1", raw_input_contents=[b"\4\0\0\0word" * 10_000])
    long.outputs.add(name="BYTES_OUT")
    long.inputs.add(name="BYTES", datatype="BYTES", shape=strings.shape)
    answers = await exchange(port, long, message)
    assert [answer.infer_response.id for answer in answers] == ["1", "0"]
    assert answers[0].infer_response.raw_output_contents[0] == long.raw_input_contents[0]


async def test_tritonclient_streams(port):
    def talk():
        answers: queue.Queue = queue.Queue()
        with tritonclient.grpc.InferenceServerClient(port.address) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            inputs = []
            for name, value in (("n", 3), ("bytes", 0), ("tell", 0)):
                made = tritonclient.grpc.InferInput(name, [1], "INT32")
                made.set_data_from_numpy(np.array([value], np.int32))
                inputs.append(made)
            client.async_stream_infer("count", inputs, enable_empty_final_response=True, request_id="c")
            got = []
            while True:
                result, error = answers.get(timeout=10)
                assert error is None
                response = result.get_response()
                if response.parameters["triton_final_response"].bool_param:
                    break
                got.append(int(result.as_numpy("i")[0]))
            client.async_stream_infer("nobody", inputs)
            _, error = answers.get(timeout=10)
            client.stop_stream()
        return got, error.message()

    assert await asyncio.to_thread(talk) == ([0, 1, 2], "Request for unknown model: 'nobody' is not found")
