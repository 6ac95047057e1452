"""The wire form of infer requests and responses: what is written can be read, and nothing else is accepted."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairlead.api.kserve.codec import (
    BINARY_FORM,
    JSON_FORM,
    LARGE_JSON_ELEMENTS,
    MANY_STRINGS,
    Pace,
    TooSlow,
    decode,
    decode_raw,
    encode,
    head_size,
    message_of,
    pace,
    with_labels,
)
from fairlead.core.errors import FairleadError, InvalidRequest, QueueFull, Unsupported
from fairlead.core.request import Response
from fairlead.core.specs import BatchingSpec, ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, datatype_of, encode_bytes, object_array

JSON_DATATYPES = [name for name in DTYPES if name not in ("FP16", "BF16")]


def ask(data=None, *, shape=(2,), datatype="FP32", binary=None, own=None, parameters=None, outputs=None, request_id=None, **more):
    """A request of one input called `x`; `own` are the input's own parameters."""
    tensor = {"name": "x", "shape": list(shape), "datatype": datatype, **more}
    if own is not None:
        tensor["parameters"] = own
    if data is not None:
        tensor["data"] = data
    if binary is not None:
        tensor["parameters"] = {"binary_data_size": len(binary)}
    body = {"inputs": [tensor]}
    if parameters is not None:
        body["parameters"] = parameters
    if outputs is not None:
        body["outputs"] = outputs
    if request_id is not None:
        body["id"] = request_id
    text = json.dumps(body).encode()
    return decode(text + (binary or b""), len(text) if binary is not None else None, "m", "")


def answer(array, form=JSON_FORM, **more):
    parts, head = encode(Response(model="m", version="3", outputs={"y": array}, **more), form, None)
    return b"".join(parts), head


def tensors(datatypes=tuple(DTYPES)):
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)

    @st.composite
    def draw_tensor(draw):
        datatype = draw(st.sampled_from(datatypes))
        shape = draw(shapes)
        count = int(np.prod(shape, dtype=np.int64))
        if datatype == "BYTES":
            element = st.binary(max_size=9) if "BF16" in datatypes else st.text(max_size=9).map(str.encode)
            return object_array(draw(st.lists(element, min_size=count, max_size=count)), shape)
        dtype = DTYPES[datatype]
        if datatype == "BF16":
            return draw(hnp.arrays(np.uint16, shape)).view(dtype)
        return draw(hnp.arrays(dtype, shape))

    return draw_tensor()


def same(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.dtype.kind == "O":
        return a.tolist() == b.tolist()
    return a.tobytes() == b.tobytes()


# What is written can be read


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_any_tensor_survives_the_binary_form_both_ways(array):
    body, head = answer(array, BINARY_FORM)
    document = json.loads(body[:head])
    (output,) = document["outputs"]
    assert output["parameters"]["binary_data_size"] == len(body) - head
    request, _ = ask(shape=output["shape"], datatype=output["datatype"], binary=body[head:])
    assert same(request.inputs["x"], array)


@given(tensors(tuple(JSON_DATATYPES)))
@settings(max_examples=150, deadline=None)
def test_any_tensor_survives_json_both_ways(array):
    body, head = answer(array)
    assert head is None
    (output,) = json.loads(body)["outputs"]
    finite = array.dtype.kind != "f" or np.isfinite(array).all()
    if not finite:
        assert same(np.array(output["data"], array.dtype).reshape(array.shape), np.where(np.isnan(array), array.dtype.type(np.nan), array))
        with pytest.raises(InvalidRequest, match="JSON is malformed"):
            ask(output["data"], shape=output["shape"], datatype=output["datatype"])
        return
    request, _ = ask(output["data"], shape=output["shape"], datatype=output["datatype"])
    assert same(request.inputs["x"], array)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_mutated_body_never_causes_anything_but_a_clear_error(data):
    binary = data.draw(st.booleans())
    tensor = np.arange(6, dtype=np.float32)
    document = {
        "id": "7",
        "inputs": [
            {
                "name": "x",
                "shape": [2, 3],
                "datatype": "FP32",
                **({"parameters": {"binary_data_size": 24}} if binary else {"data": tensor.tolist()}),
            },
            {"name": "s", "shape": [2], "datatype": "BYTES", "data": ["a", "\u00e9"]},
            {"name": "u", "shape": [1], "datatype": "UINT64", "data": [18446744073709551615]},
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": True, "classification": 2}}],
        "parameters": {"priority": 1},
    }
    text = json.dumps(document).encode()
    body = bytearray(text + (tensor.tobytes() if binary else b""))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from(("flip", "cut", "insert", "repeat"))):
            case "flip":
                body[at] = data.draw(st.integers(0, 255))
            case "cut":
                del body[at : at + data.draw(st.integers(1, 9))]
            case "insert":
                body[at:at] = data.draw(
                    st.sampled_from((b"[", b"{", b'"', b"-", b"1e999", b"null", b"\\ud800", b"9" * 30, b"\xff", b":", b","))
                )
            case "repeat":
                body[at:at] = body[at : at + 20] * data.draw(st.integers(1, 300))
        if not body:
            return
    size = len(body)
    try:
        request, _ = decode(
            bytes(body),
            data.draw(st.integers(1, size)) if not data.draw(st.booleans()) else min(len(text), size) if binary else None,
            "m",
            "",
        )
    except FairleadError as error:
        assert error.message
    else:
        for array in request.inputs.values():
            assert datatype_of(array) in DTYPES


# Requests


def test_data_may_be_nested_as_deep_as_the_shape_or_otherwise():
    for data in ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]], [[[1], [2, 3]], [[4, 5], [6]]], [[1, 2], [], [3, 4, 5, 6]]):
        request, _ = ask(data, shape=(2, 3))
        assert request.inputs["x"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_strings_become_bytes():
    request, _ = ask([["a", "é"]], shape=(1, 2), datatype="BYTES")
    assert request.inputs["x"].tolist() == [[b"a", "é".encode()]]


def test_binary_tensors_are_aligned_read_only_views():
    tensor = np.arange(4, dtype=np.float64)
    for padding in range(8):
        text = (
            json.dumps({"inputs": [{"name": "x", "shape": [4], "datatype": "FP64", "parameters": {"binary_data_size": 32}}]}).encode()
            + b" " * padding
        )
        request, _ = decode(text + tensor.tobytes(), len(text), "m", "")
        array = request.inputs["x"]
        assert array.tolist() == [0, 1, 2, 3]
        assert array.flags.aligned
        assert not array.flags.writeable


def test_json_and_binary_inputs_mix_in_their_order():
    text = json.dumps(
        {
            "inputs": [
                {"name": "a", "shape": [1], "datatype": "INT32", "parameters": {"binary_data_size": 4}},
                {"name": "b", "shape": [1], "datatype": "INT32", "data": [2]},
                {"name": "c", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 9}},
            ]
        }
    ).encode()
    request, _ = decode(text + struct.pack("<iI1sI", 1, 1, b"x", 0), len(text), "m", "2")
    assert {name: array.tolist() for name, array in request.inputs.items()} == {"a": [1], "b": [2], "c": [b"x", b""]}
    assert request.version == "2"


def test_what_one_request_does_to_its_parameters_does_not_reach_the_next_of_the_same_head():
    first, _ = ask(binary=b"\0" * 8, parameters={"k": 1})
    first.parameters["k"] = 2
    second, _ = ask(binary=b"\0" * 8, parameters={"k": 1})
    assert second.parameters == {"k": 1}


def test_known_parameters_become_fields_and_others_reach_the_model():
    request, form = ask([1, 2], parameters={"priority": 2, "timeout": 1500000, "binary_data_output": True, "mine": "x"})
    assert (request.priority, request.timeout, request.parameters) == (2, 1.5, {"mine": "x"})
    assert form.binary


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer", lambda: ask([1], shape=(-1,))),
        ("Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer", lambda: ask([1], shape=(1.5,))),
        ("Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer", lambda: ask([1], shape=("1",))),
        ("length <= 64", lambda: ask([1], shape=(1,) * 65)),
        ("causes total element count to exceed maximum size of 9223372036854775807", lambda: ask([1], shape=(2**62, 4))),
        ("Shape does not match true shape of 'data' field", lambda: ask([1, 2], shape=(2**62,))),
        ("Shape does not match true shape of 'data' field", lambda: ask([1, 2, 3])),
        ("Shape does not match true shape of 'data' field", lambda: ask([[1], []])),
        ("input byte size mismatch for input 'x'. Expected 12, got 8", lambda: ask(binary=b"\0" * 8, shape=(3,))),
        ("byte size overflow for input 'x'", lambda: ask(binary=b"\0" * 8, shape=(2**61, 2))),
        ("But no field is set", ask),
        ("But both 'data' and 'binary_data_size' are set", lambda: ask([1, 2], binary=b"\0" * 8)),
        ("has no Inference-Header-Content-Length header", lambda: ask(own={"binary_data_size": 8})),
        ("must be an unsigned integer", lambda: ask(own={"binary_data_size": -4})),
        ("invalid datatype 'FP8' for input 'x'", lambda: ask([1, 2], datatype="FP8")),
        ("receiving FP16 data via JSON is not supported. Please use the binary data format", lambda: ask([1, 2], datatype="FP16")),
        ("receiving BF16 data via JSON is not supported. Please use the binary data format", lambda: ask([1, 2], datatype="BF16")),
        ("Expected `int` <= 127", lambda: ask([1, 128], datatype="INT8")),
        ("Expected `int` >= 0", lambda: ask([1, -1], datatype="UINT64")),
        ("out of range for UINT64", lambda: ask([1, 2**64], datatype="UINT64")),
        ("Expected `int`, got `float`", lambda: ask([1, 2.0], datatype="INT32")),
        ("Expected `int`, got `bool`", lambda: ask([1, True], datatype="INT32")),
        ("Expected `bool`, got `int`", lambda: ask([True, 1], datatype="BOOL")),
        ("Expected `float`, got `str`", lambda: ask([1, "2"])),
        ("Expected `str`, got `int`", lambda: ask(["a", 2], datatype="BYTES")),
        ("Expected `float` <= 3.4", lambda: ask([1, 3.5e38])),
        ("Expected `float`, got `array`", lambda: ask([1, [2]])),
        ("Expected `array`", lambda: ask(5)),
        ("neither 0 nor 1", lambda: ask(binary=b"\0\2", datatype="BOOL")),
        ("expecting string of length 9", lambda: ask(binary=struct.pack("<I", 9) + b"abc", shape=(1,), datatype="BYTES")),
        ("incomplete string length", lambda: ask(binary=b"\0\0", shape=(1,), datatype="BYTES")),
        ("unexpected number of string elements", lambda: ask(binary=struct.pack("<II", 0, 0), shape=(1,), datatype="BYTES")),
        ("unexpected number of string elements", lambda: ask(binary=struct.pack("<I", 0), shape=(2,), datatype="BYTES")),
        ("unknown field `dta`", lambda: ask([1, 2], dta=[1])),
        ("output 'y' already exists in request", lambda: ask([1, 2], outputs=[{"name": "y"}, {"name": "y"}])),
        (
            "parameter 'binary_data' of output 'y' must be a boolean",
            lambda: ask([1, 2], outputs=[{"name": "y", "parameters": {"binary_data": 1}}]),
        ),
        (
            "parameter 'classification' of output 'y' must be",
            lambda: ask([1, 2], outputs=[{"name": "y", "parameters": {"classification": -1}}]),
        ),
        ("parameter 'priority' must be an unsigned integer", lambda: ask([1, 2], parameters={"priority": "high"})),
        ("is for streams over gRPC", lambda: ask([1, 2], parameters={"triton_enable_empty_final_response": True})),
        ("parameter 'deep' must be a string, a number or a boolean", lambda: ask([1, 2], parameters={"deep": [[[1]]]})),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(message, make):
    with pytest.raises(InvalidRequest) as caught:
        make()
    assert message in caught.value.message
    assert caught.value.message.startswith("[request id: <id_unknown>] ")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "failed to parse the request JSON buffer"),
        (b"{", "failed to parse the request JSON buffer"),
        (b'{"inputs":[]} x', "failed to parse the request JSON buffer"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}', "JSON is malformed"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP64","data":[1e999]}]}', "out of range"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT64","data":[' + b"9" * 5000 + b"]}]}", "out of range"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\\ud800"]}]}', "parse"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\xff"]}]}', "Unable to parse"),
        (
            b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 98 + b"1" + b"]" * 98 + b"}]}",
            "nesting depth exceeds maximum allowed limit (100)",
        ),
        (
            b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 100_000,
            "nesting depth exceeds maximum allowed limit (100)",
        ),
        (b'{"parameters":{"a":' + b'{"a":' * 100_000, "nesting depth exceeds maximum allowed limit (100)"),
    ],
)
def test_what_is_not_the_protocols_json_is_refused(body, message):
    with pytest.raises(InvalidRequest) as caught:
        decode(body, None, "m", "")
    assert message in caught.value.message


def test_errors_name_the_request_when_it_has_an_id():
    with pytest.raises(InvalidRequest, match=r"^\[request id: seven\] Unable to parse 'data'"):
        ask([1], request_id="seven")
    assert message_of(QueueFull("Exceeds maximum queue size"), "seven") == "[request id: seven] Exceeds maximum queue size"
    assert message_of(Unsupported("no"), "seven") == "no"


def test_the_binary_part_must_be_exactly_as_long_as_announced():
    text = json.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}]}).encode()
    with pytest.raises(InvalidRequest, match="expecting 3 additional bytes for model 'm'"):
        decode(text + b"\0" * 5, len(text), "m", "")
    with pytest.raises(InvalidRequest, match="unexpected additional input data for model 'm'"):
        decode(text + b"\0" * 9, len(text), "m", "")


@pytest.mark.parametrize("header", ["-1", "1.0", "", "x", "²", "9" * 25])
def test_a_header_length_that_is_no_number_is_refused(header):
    with pytest.raises(InvalidRequest, match="Unable to parse Inference-Header-Content-Length"):
        head_size(header, 100)


def test_a_header_length_beyond_the_body_is_refused():
    assert head_size("100", 100) == 100
    with pytest.raises(InvalidRequest, match="inference header size should be in range"):
        head_size("101", 100)


def test_shared_memory_is_refused_with_the_way_out():
    with pytest.raises(Unsupported, match="input 'x' sets 'shared_memory_region'"):
        ask(own={"shared_memory_region": "r"})
    with pytest.raises(Unsupported, match="output 'y' sets 'shared_memory_byte_size'"):
        ask([1, 2], outputs=[{"name": "y", "parameters": {"shared_memory_byte_size": 4}}])


def test_many_strings_are_left_to_a_patient_caller():
    array = object_array([b"x"] * (MANY_STRINGS + 1), (MANY_STRINGS + 1,))
    data = encode_bytes(array)
    text = json.dumps(
        {"inputs": [{"name": "x", "shape": array.shape, "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}]}
    ).encode()
    with pytest.raises(TooSlow):
        decode(text + data, len(text), "m", "")
    request, _ = decode(text + data, len(text), "m", "", patient=True)
    assert request.inputs["x"].tolist() == array.tolist()


# Raw binary requests


def spec(*inputs, batches=True, outputs=()):
    return ModelSpec(name="m", inputs=inputs, outputs=outputs, batching=BatchingSpec(max_batch_size=8 if batches else 0))


def tensor(datatype, *shape, name="x", labels=()):
    return TensorSpec(name=name, datatype=datatype, shape=shape, labels=labels)


def test_a_raw_request_is_the_one_input_with_its_shape_inferred():
    data = np.arange(6, dtype=np.float32).tobytes()
    for model, shape in (
        (spec(tensor("FP32", -1, -1)), (1, 6)),
        (spec(tensor("FP32", -1, 2, -1)), (1, 2, 3)),
        (spec(tensor("FP32", -1, 6)), (1, 6)),
        (spec(tensor("FP32", -1), batches=False), (6,)),
    ):
        request, form = decode_raw(data, "m", "", model)
        assert request.inputs["x"].shape == shape
        assert form.binary
    request, _ = decode_raw(b"any text", "m", "", spec(tensor("BYTES", -1, 1)))
    assert request.inputs["x"].tolist() == [[b"any text"]]
    request, _ = decode_raw(b"any text", "m", "", spec(tensor("BYTES", -1), batches=False))
    assert request.inputs["x"].tolist() == [b"any text"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (spec(tensor("FP32", -1, 2), tensor("FP32", -1, 2, name="z")), "exactly one input"),
        (spec(tensor("FP32", -1, -1, -1)), "more than one dimension of variable length"),
        (spec(tensor("FP32", -1, 4)), "Expected 16, got 10"),
        (spec(tensor("FP32", -1, -1)), "10 bytes do not divide into elements of 4 bytes"),
    ],
)
def test_a_raw_request_that_does_not_fit_is_refused(model, message):
    with pytest.raises(InvalidRequest, match=message):
        decode_raw(b"0123456789", "m", "", model)


# Responses


def test_the_keys_of_a_response_stand_in_tritons_order():
    body, head = answer(np.array([[1.5, 2]], np.float32), id="9", parameters={"p": 1})
    assert head is None
    assert (
        body
        == b'{"id":"9","model_name":"m","model_version":"3","parameters":{"p":1},"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[1.5,2.0]}]}'
    )
    body, head = answer(np.array([1], np.int8), BINARY_FORM)
    assert (
        body[:head]
        == b'{"model_name":"m","model_version":"3","outputs":[{"name":"y","datatype":"INT8","shape":[1],"parameters":{"binary_data_size":1}}]}'
    )
    assert body[head:] == b"\1"


def test_not_a_number_and_infinity_are_bare_tokens():
    body, _ = answer(np.array([np.nan, np.inf, -np.inf, 1]))
    assert b'"data":[NaN,Infinity,-Infinity,1.0]' in body
    body, _ = answer(object_array([b"null"], (1,)))
    assert b'"data":["null"]' in body


def test_each_output_comes_in_the_form_and_order_that_was_asked():
    request, form = ask([1, 2], outputs=[{"name": "b", "parameters": {"binary_data": True}}, {"name": "a"}])
    assert request.outputs == ("b", "a")
    response = Response(model="m", version="1", outputs={"a": np.array([1]), "c": np.array([9]), "b": np.array([2])})
    parts, head = encode(response, form, request.outputs)
    body = b"".join(parts)
    assert [(output["name"], "data" in output) for output in json.loads(body[:head])["outputs"]] == [("b", False), ("a", True)]
    assert body[head:] == np.array([2]).tobytes()


def test_the_default_form_holds_where_an_output_says_nothing():
    _, form = ask(
        [1, 2], parameters={"binary_data_output": True}, outputs=[{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}]
    )
    assert form.binaries == {"a": True, "b": False}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_has_no_json_form(dtype):
    with pytest.raises(InvalidRequest, match=r"sending (FP16|BF16) data via JSON is not supported\. Please use the binary data format"):
        answer(np.zeros(2, dtype))
    body, head = answer(np.ones(2, dtype), BINARY_FORM)
    assert body[head:] == np.ones(2, dtype).tobytes()


def test_bytes_that_are_no_text_have_no_json_form():
    with pytest.raises(InvalidRequest, match=r"output 'y' holds BYTES that are not UTF-8"):
        answer(object_array([b"\xff"], (1,)))


def test_an_output_can_be_asked_as_classes():
    model = spec(tensor("FP32", -1, 3), outputs=(tensor("FP32", -1, 3, name="y", labels=("cat", "dog")),))
    _, form = ask([1, 2], outputs=[{"name": "y", "parameters": {"classification": 2}}])
    body, _ = answer(np.array([[0.5, 2, 1], [3, 1, 2]], np.float32), with_labels(form, model))
    (output,) = json.loads(body)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["2.000000:1:dog", "1.000000:2", "3.000000:0:cat", "2.000000:2"]


def test_large_answers_are_encoded_elsewhere():
    large = np.zeros(LARGE_JSON_ELEMENTS + 1, np.float32)
    strings = object_array([b""] * (MANY_STRINGS + 1), (MANY_STRINGS + 1,))

    def where(array, form):
        return pace(Response(model="m", version="1", outputs={"y": array}), form)

    assert where(large, JSON_FORM) is Pace.PROCESS
    assert where(large, BINARY_FORM) is Pace.LOOP
    assert where(strings, BINARY_FORM) is Pace.THREAD
    assert where(object_array([b"x" * 300_000], (1,)), JSON_FORM) is Pace.THREAD
    assert where(np.zeros(16), JSON_FORM) is Pace.LOOP
