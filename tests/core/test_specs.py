"""A request is held against its model's spec; the words are Triton's."""

import numpy as np
import pytest

from fairlead.core.errors import InvalidRequest
from fairlead.core.request import Request
from fairlead.core.specs import BatchingSpec, InputCheck, ModelSpec, TensorSpec

F32 = np.float32


def check(inputs: dict, *, max_batch_size: int = 4, outputs: tuple[str, ...] | None = None) -> Request:
    spec = ModelSpec(
        name="m",
        inputs=(
            TensorSpec(name="a", datatype="FP32", shape=(-1, 2)),
            TensorSpec(name="b", datatype="INT64", shape=(-1, -1), optional=True),
        ),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1)),),
        batching=BatchingSpec(max_batch_size=max_batch_size),
    )
    request = Request(model="m", inputs=inputs, outputs=outputs)
    InputCheck(spec)(request)
    return request


def test_a_good_request_learns_how_many_rows_it_has():
    assert check({"a": np.zeros((3, 2), F32)}).num_rows == 3
    assert check({"a": np.zeros((3, 2), F32), "b": np.zeros((3, 7), np.int64)}).num_rows == 3
    assert check({"a": np.zeros((9, 2), F32)}, max_batch_size=0).num_rows == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {},
            "expected 1 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing required input(s) ['a']. Please provide all required input(s).",
        ),
        ({"a": np.zeros((1, 2), F32), "c": np.zeros(1, F32)}, "unexpected inference input 'c' for model 'm', allowed inputs are: a, b"),
        ({"a": np.zeros((1, 2), np.float64)}, "inference input 'a' data-type is 'FP64', but model 'm' expects 'FP32'"),
        (
            {"a": np.zeros((1, 3), F32)},
            "unexpected shape for input 'a' for model 'm'. Expected [-1,2], got [1,3]. NOTE: Setting a non-zero max_batch_size",
        ),
        ({"a": np.zeros((), F32)}, "unexpected shape for input 'a' for model 'm'. Expected [-1,2], got []"),
        ({"a": np.zeros((5, 2), F32)}, "inference request batch-size must be <= 4 for 'm'"),
        ({"a": np.zeros((0, 2), F32)}, "inference request for 'm' has an empty batch dimension"),
        ({"a": np.zeros((2, 2), F32), "b": np.zeros((1, 2), np.int64)}, "input 'b' batch size does not match other inputs for 'm'"),
    ],
)
def test_what_is_wrong_is_said_in_tritons_words(inputs, message):
    with pytest.raises(InvalidRequest) as error:
        check(inputs)
    assert error.value.message.startswith(message)


def test_an_output_that_the_model_does_not_have_is_refused():
    with pytest.raises(InvalidRequest, match="unexpected inference output 'z' for model 'm', allowed outputs are: y"):
        check({"a": np.zeros((1, 2), F32)}, outputs=("z",))
