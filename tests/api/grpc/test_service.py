"""What Triton's own client gets, and what it is told when it asks for the impossible."""

import asyncio

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from fairlead.api.grpc.messages import message_class
from fairlead.core.tensors import DTYPES, encode_bytes, object_array
from fairlead.runtime.repository import Control
from tests.api.grpc.gates import close_gates
from tests.api.grpc.served import Served, count, only, request, row, served

pytestmark = pytest.mark.asyncio(loop_scope="module")
NAMES = ("identity", "typed", "failing", "count", "gated")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    close_gates()
    async with served(tmp_path_factory.mktemp("models") / "m", *NAMES, control=Control.EXPLICIT) as running:
        yield running


async def as_triton(port: Served, ask):
    """What Triton's own client gets, in a thread of its own because it blocks."""

    def talk():
        with tritonclient.grpc.InferenceServerClient(port.address) as client:
            return ask(client)

    return await asyncio.to_thread(talk)


async def refusal(port: Served, ask) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        await as_triton(port, ask)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def tensor(name: str, array: np.ndarray, datatype: str = "FP32") -> tritonclient.grpc.InferInput:
    made = tritonclient.grpc.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


# Inference


async def test_triton_clients_infer(port):
    asked = [tensor("x", row(1, 2, 3))]
    result = await as_triton(port, lambda client: client.infer("identity", asked, request_id="7", model_version="1"))
    assert result.as_numpy("y").tolist() == [[1, 2, 3]]
    answer = result.get_response()
    assert (answer.model_name, answer.model_version, answer.id) == ("identity", "1", "7")
    async with tritonclient.grpc.aio.InferenceServerClient(port.address) as client:
        outputs = [tritonclient.grpc.InferRequestedOutput("y")]
        results = await asyncio.gather(*(client.infer("identity", asked, outputs=outputs, client_timeout=20.0) for _ in range(50)))
        assert all(result.as_numpy("y").tolist() == [[1, 2, 3]] for result in results)


@pytest.mark.parametrize("datatype", DTYPES)
async def test_every_datatype_goes_there_and_back(port, datatype):
    dtype = DTYPES[datatype]
    if datatype == "BYTES":
        array = object_array([b"", b"a", "ä".encode(), b"\0" * 300], (2, 2))
    elif datatype == "BOOL":
        array = np.array([[True, False]])
    else:
        array = np.array([[0, 1], [100, 7]]).astype(dtype)
    result = await as_triton(port, lambda client: client.infer("typed", [tensor(datatype, array, datatype)]))
    back = result.as_numpy(f"{datatype}_OUT")
    assert (back.dtype, back.tolist()) == (dtype, array.tolist())


async def test_explicit_contents_are_answered_raw(port):
    message = pb.ModelInferRequest(model_name="typed")
    message.inputs.add(name="INT8", datatype="INT8", shape=[1, 2]).contents.int_contents.extend([-128, 127])
    message.inputs.add(name="BYTES", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"hi")
    message.inputs.add(name="FP64", datatype="FP64", shape=[1, 1]).contents.fp64_contents.append(0.1)
    answer = await port.infer(message)
    raw = dict(zip((output.name for output in answer.outputs), answer.raw_output_contents, strict=True))
    assert np.frombuffer(raw["INT8_OUT"], np.int8).tolist() == [-128, 127]
    assert (raw["BYTES_OUT"], np.frombuffer(raw["FP64_OUT"]).tolist()) == (b"\2\0\0\0hi", [0.1])


async def test_many_strings_and_many_numbers_are_converted_beside_the_loop(port):
    strings = object_array([str(i).encode() for i in range(20_000)], (1, 20_000))
    message = pb.ModelInferRequest(model_name="typed", raw_input_contents=[encode_bytes(strings)])
    message.inputs.add(name="BYTES", datatype="BYTES", shape=strings.shape)
    message.outputs.add(name="BYTES_OUT")
    assert (await port.infer(message)).raw_output_contents[0] == encode_bytes(strings)
    message = pb.ModelInferRequest(model_name="typed")
    message.inputs.add(name="INT64", datatype="INT64", shape=[1, 100_000]).contents.int64_contents.extend(range(100_000))
    message.outputs.add(name="INT64_OUT")
    assert only(await port.infer(message), np.int64) == list(range(100_000))
    message.inputs[0].shape[1] = 99_999
    with pytest.raises(grpc.aio.AioRpcError, match="input byte size mismatch for input 'INT64'"):
        await port.infer(message)


async def test_classification(port):
    outputs = [tritonclient.grpc.InferRequestedOutput("y", class_count=2)]
    result = await as_triton(port, lambda client: client.infer("identity", [tensor("x", row(0.5, 3, 1))], outputs=outputs))
    assert result.as_numpy("y").tolist() == [[b"3.000000:1:bee", b"1.000000:2:cat"]]


@pytest.mark.parametrize(
    ("message", "code", "says"),
    [
        (request("nobody", x=row(1)), "NOT_FOUND", "Request for unknown model: 'nobody' is not found"),
        (request("identity", x=row(1), version="9"), "NOT_FOUND", "Request for unknown model: 'identity' version 9 is not found"),
        (request("identity", id="7"), "INVALID_ARGUMENT", "[request id: 7] expected 1 inputs but got 0 inputs for model 'identity'"),
        (request("identity", x=np.zeros((1, 1), np.int32)), "INVALID_ARGUMENT", "data-type is 'INT32', but model 'identity' expects 'FP32'"),
        (request("identity", x=np.zeros(3, np.float32)), "INVALID_ARGUMENT", "unexpected shape for input 'x' for model 'identity'. Expected [-1,-1], got [3]"),
        (request("identity", x=row(1), z=row(1)), "INVALID_ARGUMENT", "unexpected inference input 'z' for model 'identity'"),
        (request("identity", x=row(1), parameters={"sequence_id": 1}), "UNIMPLEMENTED", "parameter 'sequence_id' is not supported"),
        (request("failing", x=row(1)), "INTERNAL", "zeros only"),
        (count(3), "UNIMPLEMENTED", "model 'count' answers with several responses"),
    ],
)  # fmt: skip
async def test_what_goes_wrong_has_its_code_and_words(port, message, code, says):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await port.infer(message)
    assert caught.value.code() is grpc.StatusCode[code]
    assert says in caught.value.details()


async def test_one_bad_request_does_not_spoil_those_beside_it(port):
    good = [port.infer(request("failing", x=row(0))) for _ in range(5)]
    bad = [port.infer(request("failing", x=row(1))) for _ in range(5)]
    answers = await asyncio.gather(*good, *bad, return_exceptions=True)
    assert [only(answer) for answer in answers[:5]] == [[0]] * 5
    assert all(isinstance(answer, grpc.aio.AioRpcError) for answer in answers[5:])


# The server and its models


async def test_health(port):
    assert await as_triton(port, lambda client: (client.is_server_live(), client.is_server_ready())) == (True, True)
    assert await as_triton(port, lambda client: client.is_model_ready("identity", "1"))
    code, message = await refusal(port, lambda client: client.is_model_ready("nobody"))
    assert (code, message) == ("NOT_FOUND", "Request for unknown model: 'nobody' is not found")


async def test_metadata(port):
    server = await as_triton(port, lambda client: client.get_server_metadata())
    assert server.name == "fairlead"
    assert "classification" in server.extensions
    model = await as_triton(port, lambda client: client.get_model_metadata("identity"))
    assert (model.name, list(model.versions), model.platform) == ("identity", ["1"], "python")
    assert [(i.name, i.datatype, list(i.shape)) for i in model.inputs] == [("x", "FP32", [-1, -1])]
    assert (await refusal(port, lambda client: client.get_model_metadata("nobody")))[0] == "NOT_FOUND"


async def test_config(port):
    config = (await as_triton(port, lambda client: client.get_model_config("identity"))).config
    assert (config.name, config.max_batch_size, config.input[0].name) == ("identity", 64, "x")
    assert config.input[0].data_type == tritonclient.grpc.model_config_pb2.TYPE_FP32
    assert (await as_triton(port, lambda client: client.get_model_config("count"))).config.model_transaction_policy.decoupled


async def test_statistics(port):
    await port.infer(request("identity", x=row(1)))
    await port.infer(request("identity", x=row(1)))
    stats = (await as_triton(port, lambda client: client.get_inference_statistics("identity"))).model_stats
    assert (stats[0].name, stats[0].version) == ("identity", "1")
    assert stats[0].inference_count >= 2
    assert stats[0].inference_stats.success.count >= 2
    assert len((await as_triton(port, lambda client: client.get_inference_statistics())).model_stats) == len(NAMES)
    assert (await refusal(port, lambda client: client.get_inference_statistics("nobody")))[0] == "INVALID_ARGUMENT"


# The repository


async def test_the_index_lists_what_there_is(port):
    index = await as_triton(port, lambda client: client.get_model_repository_index())
    assert {(model.name, model.version, model.state) for model in index.models} == {(name, "1", "READY") for name in NAMES}


async def test_models_come_and_go(port):
    await as_triton(port, lambda client: client.unload_model("failing"))
    assert not await as_triton(port, lambda client: client.is_model_ready("failing"))
    with pytest.raises(grpc.aio.AioRpcError, match="has no available versions"):
        await port.infer(request("failing", x=row(0)))
    await as_triton(port, lambda client: client.load_model("failing"))
    assert await as_triton(port, lambda client: client.is_model_ready("failing"))
    code, message = await refusal(port, lambda client: client.load_model("nobody"))
    assert (code, message) == ("NOT_FOUND", "failed to load 'nobody', failed to poll from model repository")


async def test_a_model_may_come_with_its_files(port):
    code = (port.folder / "identity" / "1" / "model.py").read_bytes().replace(b'inputs["x"]', b'inputs["x"] + 1')
    config = '{"instances": {"isolation": "thread"}, "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]}'
    await as_triton(port, lambda client: client.load_model("plus", config=config, files={"file:1/model.py": code}))
    assert only(await port.infer(request("plus", x=row(1)))) == [2]
    await as_triton(port, lambda client: client.unload_model("plus", unload_dependents=True))


@pytest.mark.parametrize(
    ("method", "fields", "says"),
    [
        ("Load", {"repository_name": "r"}, "named repositories"),
        ("Unload", {"repository_name": "r"}, "named repositories"),
        ("Load", {"parameters": {"config": {"bool_param": True}}}, "load parameter 'config' must be a string_param"),
        ("Load", {"parameters": {"config": {"string_param": ""}, "file:1/a": {"string_param": ""}}}, "load parameter 'file:1/a' must be a bytes_param"),
        ("Load", {"parameters": {"file:1/a": {"bytes_param": b""}}}, "load parameter 'config' must be given where files are"),
        ("Load", {"parameters": {"speed": {"bool_param": True}}}, "unrecognized load parameter 'speed'"),
        ("Load", {"parameters": {"file:1/../../a": {"bytes_param": b""}}}, "must name a file inside a version's folder"),
        ("Unload", {"parameters": {"softly": {"bool_param": True}}}, "unload parameter 'softly'"),
        ("Unload", {"parameters": {"unload_dependents": {"int64_param": 1}}}, "unload parameter 'unload_dependents'"),
    ],
)  # fmt: skip
async def test_wishes_about_the_repository_that_are_not_granted(port, method, fields, says):
    message = message_class(f"inference.RepositoryModel{method}Request")(model_name="identity", **fields)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await port.infer(message.SerializeToString(), f"/inference.GRPCInferenceService/RepositoryModel{method}")
    assert says in caught.value.details()
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.get_system_shared_memory_status(),
        lambda client: client.register_system_shared_memory("r", "/k", 8),
        lambda client: client.unregister_cuda_shared_memory(),
        lambda client: client.get_trace_settings(),
        lambda client: client.update_log_settings({"log_info": True}),
    ],
)
async def test_what_is_not_offered_says_so(port, ask):
    code, message = await refusal(port, ask)
    assert code == "UNIMPLEMENTED"
    assert message.startswith("this server does not offer ")


async def test_a_message_of_another_kind_is_refused(port):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await port.infer(b"\xff\xff", "/inference.GRPCInferenceService/ModelReady")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the request is not a valid inference.ModelReadyRequest message"


# grpc.health.v1

HealthRequest = message_class("grpc.health.v1.HealthCheckRequest")
HealthResponse = message_class("grpc.health.v1.HealthCheckResponse")


async def check(port: Served, service: str) -> int:
    method = port.channel.unary_unary("/grpc.health.v1.Health/Check", HealthRequest.SerializeToString, HealthResponse.FromString)
    return (await method(HealthRequest(service=service))).status


async def test_grpc_health_checks(port):
    assert await check(port, "") == await check(port, "inference.GRPCInferenceService") == HealthResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(port, "other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_whoever_watches_health_sees_it_change(port):
    method = port.channel.unary_stream("/grpc.health.v1.Health/Watch", HealthRequest.SerializeToString, HealthResponse.FromString)
    watch = method(HealthRequest(service=""))
    assert (await watch.read()).status == HealthResponse.SERVING
    port.repository.stopping = True
    assert (await watch.read()).status == HealthResponse.NOT_SERVING
    assert await check(port, "") == HealthResponse.NOT_SERVING
    port.repository.stopping = False
    assert (await watch.read()).status == HealthResponse.SERVING
    watch.cancel()
    unknown = method(HealthRequest(service="other"))
    assert (await unknown.read()).status == HealthResponse.SERVICE_UNKNOWN
    unknown.cancel()
