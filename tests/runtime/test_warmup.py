"""Warm-up requests are declared, or come with the model; one that does not fit is said at load."""

import numpy as np
import pytest

from fairlead.core.config import read_yaml
from fairlead.core.errors import LoadError
from fairlead.core.specs import ModelSpec
from fairlead.runtime.warmup import samples_of

INPUTS = """
name: m
inputs:
- {name: x, datatype: FP32, shape: [-1, 2]}
- {name: t, datatype: BYTES, shape: [-1, 1], optional: true}
"""


def samples(warmup: str, example: dict | None = None) -> list:
    return samples_of(read_yaml(INPUTS + warmup, ModelSpec, "model.yaml"), example)


def test_without_a_declaration_the_models_example_is_used():
    example = {"x": np.ones((1, 2), np.float32)}
    assert samples("", example) == [example]
    assert samples("") == []


def test_declared_samples_win_and_may_be_zeros_random_or_values():
    made = samples(
        "warmup: [{inputs: {x: {}}}, {inputs: {x: {fill: random, shape: [3, 2]}, t: {shape: [3, 1]}}, count: 2}, {inputs: {x: {data: [[1, 2]]}}}]",
        {"x": np.ones((1, 2), np.float32)},
    )
    assert [sample["x"].shape for sample in made] == [(1, 2), (3, 2), (3, 2), (1, 2)]
    assert not made[0]["x"].any()
    assert made[1]["x"].all()
    assert made[1]["t"].tolist() == [[b""]] * 3
    assert made[3]["x"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        ("{inputs: {y: {}}}", r"warmup\[0\] names an unknown input 'y'; the model has: x, t"),
        ("{inputs: {t: {}}}", r"warmup\[0\]: expected 1 inputs but got 1 inputs for model 'm'.*missing required input\(s\) \['x'\]"),
        ("{inputs: {x: {shape: [1, 3]}}}", r"warmup\[0\]: unexpected shape for input 'x'"),
        ("{inputs: {x: {data: [word]}}}", r"warmup\[0\].inputs.x: could not convert string to float: 'word'"),
        ("{inputs: {x: {data: [1, 2, 3], shape: [1, 2]}}}", r"warmup\[0\].inputs.x: cannot reshape"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(warmup, message):
    with pytest.raises(LoadError, match=message):
        samples(f"warmup: [{warmup}]")
