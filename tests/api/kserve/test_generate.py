"""The generate extension's translation, both ways."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

from fairlead.api.kserve.generate import decode_flat, encode_flat, pad
from fairlead.core.errors import InvalidRequest, Unsupported
from fairlead.core.request import Response
from fairlead.core.specs import ModelSpec, TensorSpec

CHAT = ModelSpec(
    name="chat",
    inputs=(
        TensorSpec(name="text", datatype="BYTES", shape=(-1, 1)),
        TensorSpec(name="seed", datatype="INT64", shape=(-1, 1), optional=True),
        TensorSpec(name="bias", datatype="FP32", shape=(-1, -1), optional=True),
    ),
    outputs=(TensorSpec(name="said", datatype="BYTES", shape=(-1, 1)),),
)


def decoded(body: object):
    return decode_flat(json.dumps(body).encode(), "chat", "2", CHAT)


def refused(body: bytes) -> str:
    with pytest.raises(InvalidRequest) as error:
        decode_flat(body, "chat", "", CHAT)
    return error.value.message


def answer(**outputs: np.ndarray) -> Response:
    return Response(model="chat", version="2", outputs=outputs)


def test_a_key_that_is_an_input_is_a_tensor_and_any_other_a_parameter():
    request = decoded({"text": "hi", "seed": 3, "bias": [0.5, 1], "id": "7", "temperature": 0.1, "parameters": {"stop": "."}})
    assert (request.model, request.version, request.id) == ("chat", "2", "7")
    assert request.inputs["text"].tolist() == [[b"hi"]]
    assert request.inputs["seed"].tolist() == [[3]]
    assert request.inputs["bias"].tolist() == [[0.5, 1.0]]
    assert request.parameters == {"temperature": 0.1, "stop": "."}


def test_parameters_with_a_meaning_keep_it():
    request = decoded({"text": "hi", "priority": 2, "parameters": {"timeout": 5000}})
    assert (request.priority, request.timeout, request.parameters) == (2, 0.005, {})


@pytest.mark.parametrize(
    ("shape", "count", "padded"),
    [
        ((-1, 1), 1, (1, 1)),
        ((-1, 1), 5, (5, 1)),
        ((-1, -1), 5, (1, 5)),
        ((-1, 4), 8, (2, 4)),
        ((-1, 4, -1), 8, (1, 4, 2)),
        ((2, 2), 4, (2, 2)),
        ((-1,), 0, (0,)),
        ((), 1, ()),
    ],
)
def test_values_fill_the_last_variable_dimension(shape, count, padded):
    assert pad(TensorSpec(name="x", datatype="FP32", shape=shape), count) == padded


@pytest.mark.parametrize(("shape", "count"), [((-1, 4), 3), ((2, 2), 8), ((2, 2), 2), ((), 2), ((4,), 0)])
def test_values_that_do_not_fill_the_shape_are_refused(shape, count):
    with pytest.raises(InvalidRequest, match=f"{count} values do not fill the shape .* of input 'x'"):
        pad(TensorSpec(name="x", datatype="FP32", shape=shape), count)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not JSON"),
        (b"[1]", "Expected `object`"),
        (b'{"text": "hi"', "not JSON"),
        (b'{"text": 5}', "input 'text' as BYTES"),
        (b'{"text": null}', "input 'text' as BYTES"),
        (b'{"text": {"a": 1}}', "input 'text' as BYTES"),
        (b'{"text": "hi", "seed": 1.5}', "input 'seed' as INT64"),
        (b'{"text": "hi", "bias": [[1, 2], [3]]}', "input 'bias'"),
        (b'{"text": "hi", "id": 5}', "id"),
        (b'{"text": "hi", "parameters": 5}', "Expected `object`"),
        (b'{"text": "hi", "tools": [1]}', "parameter 'tools' must be a string, a number or a boolean"),
        (b'{"text": "hi", "k": 1, "parameters": {"k": 2}}', "parameter 'k' stands in the request and in its 'parameters'"),
        (b'{"text": "hi", "triton_x": 1}', "parameter 'triton_x' is reserved"),
        (b'{"text": "hi", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nesting"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nesting"),
        (b'{"text": "\xff"}', "input 'text' as BYTES"),
    ],
)
def test_a_wrong_body_is_refused_by_name(body, why):
    assert why in refused(body)


def test_sequences_are_not_offered():
    with pytest.raises(Unsupported, match="sequence_id"):
        decoded({"text": "hi", "sequence_id": 5})


def test_one_element_is_unwrapped_and_more_are_a_flat_list():
    response = Response(
        model="chat",
        version="2",
        id="7",
        parameters={"final": True},
        outputs={"said": np.array([[b"oh"]], object), "odds": np.array([[1, 2], [3, 4]], np.int8)},
    )
    assert json.loads(encode_flat(response)) == {
        "id": "7",
        "model_name": "chat",
        "model_version": "2",
        "final": True,
        "said": "oh",
        "odds": [1, 2, 3, 4],
    }


def test_numbers_that_are_none_are_bare_tokens_as_in_infer():
    text = encode_flat(answer(x=np.array([math.nan, math.inf, -math.inf], np.float32)))
    assert text == b'{"model_name":"chat","model_version":"2","x":[NaN,Infinity,-Infinity]}'


def test_what_has_no_json_form_says_so():
    with pytest.raises(InvalidRequest, match="output 'x'"):
        encode_flat(answer(x=np.zeros(1, ml_dtypes.bfloat16)))
    with pytest.raises(InvalidRequest, match="output 'x' holds BYTES that are not UTF-8"):
        encode_flat(answer(x=np.array([b"\xff"], object)))
