"""The requests that a fresh version answers before anybody else's."""

import numpy as np

from fairlead.core.errors import InvalidRequest, LoadError
from fairlead.core.request import Request
from fairlead.core.specs import InputCheck, ModelSpec, Sample, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors, canonical, object_array


def samples_of(spec: ModelSpec, example: Tensors | None) -> list[Tensors]:
    """The declared samples, else the model's example, else none. Raises LoadError where a sample does not fit the model."""
    if not spec.warmup:
        return [] if example is None else [example]
    check = InputCheck(spec)
    samples: list[Tensors] = []
    for index, declared in enumerate(spec.warmup):
        inputs: Tensors = {}
        for name, sample in declared.inputs.items():
            tensor = spec.input(name)
            if tensor is None:
                raise LoadError(f"warmup[{index}] names an unknown input '{name}'; the model has: {', '.join(s.name for s in spec.inputs)}")
            try:
                inputs[name] = _array(sample, tensor)
            except (ValueError, TypeError, OverflowError) as error:
                raise LoadError(f"warmup[{index}].inputs.{name}: {error}") from None
        try:
            check(Request(model=spec.name, inputs=inputs))
        except InvalidRequest as error:
            raise LoadError(f"warmup[{index}]: {error.message}") from None
        samples.extend([inputs] * declared.count)
    return samples


def _array(sample: Sample, tensor: TensorSpec) -> np.ndarray:
    dtype = DTYPES[tensor.datatype]
    shape = sample.shape or tuple(1 if length == -1 else length for length in tensor.shape)
    if sample.data is not None:
        values = canonical(np.asarray(sample.data, dtype=None if dtype.kind == "O" else dtype))
        return values.reshape(sample.shape) if sample.shape else values
    if dtype.kind == "O":
        return object_array([b""] * int(np.prod(shape)), shape)
    if sample.fill == "random":
        return np.random.default_rng(0).random(shape).astype(dtype)
    return np.zeros(shape, dtype)
