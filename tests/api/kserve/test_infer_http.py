"""`infer` over HTTP, asked by Triton's own client and by others."""

import asyncio
import gzip
import json
import zlib

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from fairlead.api.offload import Offload
from tests.api.http_fake import Models, post, question, serving, wire, zoo


@pytest.fixture
async def models():
    return zoo()


@pytest.fixture
async def server(models):
    async with serving(models) as server:
        yield server


def ask(server, model, inputs, **options):
    """One request of tritonclient; `inputs`: name → (array, binary?)."""
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        asked = []
        for name, (array, binary) in inputs.items():
            datatype = {
                "float32": "FP32",
                "float16": "FP16",
                "int32": "INT32",
                "bool": "BOOL",
                "object": "BYTES",
                "float64": "FP64",
                "uint8": "UINT8",
            }[str(array.dtype)]
            tensor = triton.InferInput(name, array.shape, datatype)
            tensor.set_data_from_numpy(array, binary_data=binary)
            asked.append(tensor)
        return client.infer(model, asked, **options)


async def asked(*args, **options):
    return await asyncio.to_thread(ask, *args, **options)


async def exchange(server, request):
    async with wire(server) as connection:
        await connection.send(request)
        return await connection.receive()


# What Triton's client asks


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("outputs", [None, True, False])
@pytest.mark.parametrize(
    "array",
    [
        np.array([[1.5, -2, 3]], np.float32),
        np.array([[True, False]]),
        np.array([[b"a", "é".encode()]], object),
        np.array([[2**31 - 1]], np.int32),
    ],
)
async def test_tritonclient_gets_its_tensor_back(server, array, binary_in, outputs):
    model = {"float32": "fp32", "bool": "bool", "object": "bytes", "int32": "int32"}[str(array.dtype)]
    wanted = None if outputs is None else [triton.InferRequestedOutput("output", binary_data=outputs)]
    result = await asked(server, model, {"input": (array, binary_in)}, outputs=wanted)
    got = result.as_numpy("output").tolist()
    if array.dtype.kind == "O" and outputs is False:  # the client leaves JSON strings as they are
        got = [[text.encode() for text in row] for row in got]
    assert got == array.tolist()
    assert result.get_response()["model_name"] == model
    assert result.get_response()["model_version"] == "1"
    assert "id" not in result.get_response()


async def test_the_id_comes_back_and_the_outputs_in_the_order_asked(server):
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    wanted = [triton.InferRequestedOutput(name) for name in ("sum", "difference")]
    result = await asked(server, "pair", {"a": (a, True), "b": (b, False)}, outputs=wanted, request_id="mine")
    assert result.get_response()["id"] == "mine"
    assert [output["name"] for output in result.get_response()["outputs"]] == ["sum", "difference"]
    assert result.as_numpy("sum").tolist() == [[11, 22]]
    assert result.as_numpy("difference").tolist() == [[-9, -18]]


async def test_only_what_was_asked_comes_back(server):
    a = np.array([[1, 2]], np.float32)
    result = await asked(server, "pair", {"a": (a, True), "b": (a, True)}, outputs=[triton.InferRequestedOutput("difference")])
    assert result.as_numpy("sum") is None


async def test_a_version_can_be_named(server):
    array = np.ones((1, 2), np.float32)
    assert (await asked(server, "fp32", {"input": (array, True)}, model_version="1")).as_numpy("output").tolist() == [[1, 1]]
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'fp32' version 9 is not found"):
        await asked(server, "fp32", {"input": (array, True)}, model_version="9")


@pytest.mark.parametrize("request_algorithm", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_algorithm", [None, "gzip", "deflate"])
async def test_bodies_may_be_compressed_both_ways(server, request_algorithm, response_algorithm):
    array = np.arange(60_000, dtype=np.float32).reshape(1, -1)
    result = await asked(
        server,
        "fp32",
        {"input": (array, True)},
        request_compression_algorithm=request_algorithm,
        response_compression_algorithm=response_algorithm,
    )
    assert np.array_equal(result.as_numpy("output"), array)


async def test_classes_come_with_their_labels(server):
    array = np.array([[0.25, 3, 1]], np.float32)
    for binary in (True, False):
        result = await asked(
            server, "classes", {"input": (array, True)}, outputs=[triton.InferRequestedOutput("output", binary_data=binary, class_count=2)]
        )
        assert [bytes(each) if isinstance(each, bytes) else each.encode() for each in result.as_numpy("output").ravel()] == [
            b"3.000000:1:dog",
            b"1.000000:2",
        ]


async def test_half_precision_goes_binary_or_not_at_all(server):
    array = np.array([[1, 2]], np.float16)
    assert (await asked(server, "fp16", {"input": (array, True)})).as_numpy("output").tolist() == [[1, 2]]
    with pytest.raises(InferenceServerException, match="sending FP16 data via JSON is not supported"):
        await asked(server, "fp16", {"input": (array, True)}, outputs=[triton.InferRequestedOutput("output", binary_data=False)])


@pytest.mark.parametrize(
    ("model", "array", "message"),
    [
        (
            "nobody",
            np.ones((1, 2), np.float32),
            r"^\[404\] Request for unknown model: 'nobody' is not found$|^Request for unknown model: 'nobody' is not found$",
        ),
        (
            "identity",
            np.ones((1, 8), np.float32),
            r"\[request id: <id_unknown>\] unexpected shape for input 'input' for model 'identity'. Expected \[-1,16\], got \[1,8\]",
        ),
        ("identity", np.ones((1, 16), np.int32), "inference input 'input' data-type is 'INT32', but model 'identity' expects 'FP32'"),
        ("identity", np.ones((65, 16), np.float32), "inference request batch-size must be <= 64 for 'identity'"),
        ("broken", np.ones((1, 2), np.float32), "division by zero"),
        ("picky", np.ones((1, 2), np.float32), "the model does not like it"),
        ("streaming", np.ones((1, 2), np.float32), "stream"),
    ],
)
async def test_errors_reach_the_client_as_text(server, model, array, message):
    with pytest.raises(InferenceServerException, match=message):
        await asked(server, model, {"input": (array, True)})


async def test_a_missing_and_an_unknown_input_are_named(server):
    array = np.ones((1, 2), np.float32)
    with pytest.raises(InferenceServerException, match=r"expected 2 inputs but got 1 inputs for model 'pair'"):
        await asked(server, "pair", {"a": (array, True)})
    with pytest.raises(InferenceServerException, match=r"unexpected inference input 'c'"):
        await asked(server, "pair", {"a": (array, True), "b": (array, True), "c": (array, True)})


# What only a raw client can ask


@pytest.mark.parametrize(
    ("model", "status"),
    [("fp32", 200), ("nobody", 404), ("streaming", 501), ("broken", 500), ("picky", 400), ("classes", 400), ("f%70%332", 200)],
)
async def test_the_status_says_what_kind_of_error_it_is(server, model, status):
    got, headers, body = await exchange(server, post(question(), f"/v2/models/{model}/infer"))
    assert got == status
    assert headers["content-type"] == "application/json"
    assert ("error" in json.loads(body)) == (status != 200)


async def test_neither_content_type_nor_its_value_matters(server):
    for headers in ({}, {"content_type": "text/plain"}, {"content_type": "application/json"}):
        assert (await exchange(server, post(question(), **headers)))[0] == 200


async def test_a_raw_binary_request(server):
    data = np.array([5, 6, 7], np.int32)
    status, headers, body = await exchange(server, post(data.tobytes(), "/v2/models/vector/infer", inference_header_content_length="0"))
    head = int(headers["inference-header-content-length"])
    assert status == 200
    assert headers["content-type"] == "application/octet-stream"
    assert json.loads(body[:head])["outputs"] == [
        {"name": "output", "datatype": "INT32", "shape": [3], "parameters": {"binary_data_size": 12}}
    ]
    assert body[head:] == (data * 2).tobytes()


async def test_a_wrong_header_length_is_told(server):
    for value in ("-1", "99999", "1e3", "7"):
        status, _, body = await exchange(server, post(question(), inference_header_content_length=value))
        assert status == 400, body


async def test_not_a_number_in_the_answer_is_bare_and_in_a_request_refused(server):
    status, _, body = await exchange(server, post(question([0.0, -0.0]), "/v2/models/inverse/infer"))
    assert status == 200
    assert b'"data":[Infinity,-Infinity]' in body
    status, _, body = await exchange(server, post(question([1.0, 2.0]).replace(b"2.0", b"NaN")))
    assert status == 400
    assert b"JSON is malformed" in body


async def test_an_unknown_content_encoding_is_told_which_are_known(server):
    status, headers, body = await exchange(server, post(question(), content_encoding="br"))
    assert status == 501
    assert headers["accept-encoding"] == "gzip, deflate"
    assert "br" in json.loads(body)["error"]


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, lambda data: zlib.compress(data, wbits=-15)])
async def test_compressed_json_counts_uncompressed_bytes(server, compress):
    tensor = np.array([[1, 2]], np.float32)
    text = json.dumps({"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}]}).encode()
    encoding = "gzip" if compress is gzip.compress else "deflate"
    request = post(compress(text + tensor.tobytes()), content_encoding=encoding, inference_header_content_length=str(len(text)))
    status, _, body = await exchange(server, request)
    assert status == 200
    assert json.loads(body)["outputs"][0]["data"] == [1.0, 2.0]


async def test_small_answers_are_not_worth_compressing(server):
    _, headers, _ = await exchange(server, post(question(), accept_encoding="gzip, deflate"))
    assert "content-encoding" not in headers
    _, headers, body = await exchange(server, post(question([1.0] * 1000), accept_encoding="gzip;q=0.5, deflate"))
    assert headers["content-encoding"] == "deflate"
    assert json.loads(zlib.decompress(body))["outputs"][0]["shape"] == [1, 1000]


async def test_a_bomb_is_refused_and_the_connection_serves_on(models):
    async with serving(models, max_body_bytes=1 << 20) as server, wire(server) as connection:
        for size in (1 << 21, 1 << 24):
            await connection.send(post(gzip.compress(bytes(size)), content_encoding="gzip"))
            status, _, body = await connection.receive()
            assert status == 413
            assert "after decompression" in json.loads(body)["error"]
        await connection.send(post(question()))
        assert (await connection.receive())[0] == 200


async def test_damaged_compression_is_told(server):
    for body in (gzip.compress(question())[:-5], b"plain text"):
        status, _, answer = await exchange(server, post(body, content_encoding="gzip"))
        assert status == 400
        assert b"decompress" in answer


# What would hold up the loop


async def test_large_json_is_converted_in_a_helper_process_both_ways(models):
    offload = Offload()
    values = [float(i % 1000) + 0.5 for i in range(60_000)]
    async with serving(models, offload=offload) as server, wire(server) as connection:
        for _ in range(2):
            await connection.send(post(question(values, "large")))
            status, _, body = await connection.receive()
            assert status == 200
            assert json.loads(body)["outputs"][0]["data"] == values
        bad = question(values).replace(b"0.5,", b'"x",', 1)
        await connection.send(post(bad))
        status, _, body = await connection.receive()
        assert status == 400
        assert "Unable to parse 'data' of input 'input' as FP32" in json.loads(body)["error"]
        # a helper that dies costs its request, not the server
        (helper,) = offload._processes._processes.values()
        helper.kill()
        await asyncio.to_thread(helper.join)
        await connection.send(post(question(values)))
        status, headers, body = await connection.receive()
        assert status == 503, body
        assert headers["retry-after"] == "1"
        assert offload.num_broken == 1
        await connection.send(post(question(values)))
        assert (await connection.receive())[0] == 200


async def test_too_much_large_json_at_once_is_refused(models):
    async with serving(models, offload=Offload(max_in_flight=0)) as server:
        status, headers, body = await exchange(server, post(question([1.0] * 60_000)))
    assert status == 503
    assert headers["retry-after"] == "1"
    assert "large bodies" in json.loads(body)["error"]


async def test_many_strings_take_a_thread_and_come_back(server):
    array = np.array([[b"s"] * 9000], object)
    result = await asked(server, "bytes", {"input": (array, True)})
    assert result.as_numpy("output").tolist() == array.tolist()
    result = await asked(server, "bytes", {"input": (array, True)}, outputs=[triton.InferRequestedOutput("output", binary_data=False)])
    assert result.as_numpy("output").shape == array.shape


async def test_large_tensors_arrive_aligned_and_whole(server, models):
    array = np.random.default_rng(1).random((4, 3, 224, 224), np.float32)
    for size in (1, 4):
        part = array[:size].reshape(1, -1)
        result = await asked(server, "fp32", {"input": (part, True)}, request_id="x" * size)
        assert np.array_equal(result.as_numpy("output"), part)
        arrived = models.submitted[-1].inputs["input"]
        assert arrived.flags.aligned
        assert arrived.base is not None, "a view on what was received, not a copy"
    assert server.receiving_bytes == 0


async def test_a_model_can_answer_with_a_json_form_only_where_there_is_one():
    models = Models()
    models.echo("bytes", "BYTES", (-1,))
    async with serving(models) as server:
        result = await asked(server, "bytes", {"input": (np.array([[b"\xff"]], object), True)})
        assert result.as_numpy("output").tolist() == [[b"\xff"]]
        with pytest.raises(InferenceServerException, match="not UTF-8"):
            await asked(
                server,
                "bytes",
                {"input": (np.array([[b"\xff"]], object), True)},
                outputs=[triton.InferRequestedOutput("output", binary_data=False)],
            )
