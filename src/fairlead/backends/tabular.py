"""Rows in, labels and scores out: what the tree libraries and scikit-learn have in common."""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from fairlead.backends.overlay import lines, overlay
from fairlead.core.errors import LoadError
from fairlead.core.specs import Datatype, ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors

Matrix = Callable[[Tensors], np.ndarray]
"""Makes the matrix [rows, features] that a library takes of a request's tensors."""


class Table(Struct, frozen=True):
    """How the features arrive: as one matrix, or as one column for each feature."""

    inputs: tuple[TensorSpec, ...]
    columns: bool
    """One input per feature, in the artefact's order."""

    def matrix(self, keep: frozenset[str], other: type[np.floating] = np.float32) -> Matrix:
        """keep: the NumPy type strings (`<f4`) that the library takes as they are; the rest becomes `other`."""
        if self.columns:
            names = [spec.name for spec in self.inputs]
            common = np.result_type(*(_number(DTYPES[spec.datatype]) for spec in self.inputs))
            dtype = common if common.str in keep else np.dtype(other)
            return lambda inputs: np.stack([inputs[name].reshape(-1) for name in names], axis=1, dtype=dtype, casting="unsafe")
        (spec,) = self.inputs
        name = spec.name
        if DTYPES[spec.datatype].str in keep:
            return lambda inputs: inputs[name]
        return lambda inputs: inputs[name].astype(other)


def zeros(inputs: Sequence[TensorSpec]) -> Tensors:
    """One row that any model of numbers takes: what it is asked first, at load."""
    return {spec.name: np.zeros((1, *spec.shape[1:]), DTYPES[spec.datatype]) for spec in inputs}


def table(spec: ModelSpec, num_features: int, names: Sequence[str] | None, datatype: Datatype = "FP32") -> Table:
    """What a model of `num_features` numbers takes: as declared, else one matrix named `input`.

    names: of the features, where the artefact has them; declared columns are matched with them.
    """
    if num_features < 1:
        raise LoadError("the artefact has no features")
    matrix = (TensorSpec(name="input", datatype=datatype, shape=(-1, num_features)),)
    words = [declared.name for declared in spec.inputs if declared.datatype == "BYTES"]
    if words:
        raise LoadError(f"`inputs` declares {words[0]!r} as BYTES, but the model takes numbers")
    if is_columns(spec.inputs):
        names = names or [declared.name for declared in spec.inputs]
        if len(names) != num_features:
            raise LoadError(
                f"`inputs` declares {len(names)} columns, but the artefact has {num_features} features:"
                f" declare as many, or one matrix:\n{lines('inputs', matrix)}"
            )
        return Table(columns_of(spec.inputs, names, [TensorSpec(name=name, datatype=datatype, shape=(-1,)) for name in names]), True)
    return Table(overlay(matrix, spec.inputs, "inputs", named=False, convertible=True), False)


def is_columns(declared: Sequence[TensorSpec]) -> bool:
    """Whether one input per feature is declared: shapes [-1] or [-1, 1]."""
    return len(declared) > 1 or (len(declared) == 1 and len(declared[0].shape) == 1)


def columns_of(declared: Sequence[TensorSpec], names: Sequence[str], detected: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The declared columns in the artefact's order. Raises LoadError."""
    own = {column.name: column for column in declared}
    if len(declared) != len(names) or own.keys() != set(names):
        raise LoadError(f"`inputs` declares other columns than the artefact's features, which are:\n{lines('inputs', detected)}")
    for column in declared:
        if column.shape not in ((-1,), (-1, 1)):
            raise LoadError(f"`inputs` declares the column {column.name!r} with shape {list(column.shape)}; a column has [-1] or [-1, 1]")
    return tuple(own[name] for name in names)


def predict_specs(
    spec: ModelSpec, predict: Datatype, proba: Datatype | None, classes: Sequence[object] = (), targets: int = 0
) -> tuple[TensorSpec, ...]:
    """The specs of `predict` and, for a classifier, `predict_proba`; what was declared (labels) is laid over them.

    targets: of a model that predicts several numbers a row; 0 for one number.
    """
    labels = tuple(map(label, classes))
    if labels == tuple(map(str, range(len(labels)))):
        labels = ()  # the index says as much
    found = [TensorSpec(name="predict", datatype=predict, shape=(-1, targets) if targets else (-1,))]
    if proba:
        found.append(TensorSpec(name="predict_proba", datatype=proba, shape=(-1, len(classes)), labels=labels))
    return overlay(found, spec.outputs, "outputs")


def label(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def require_cpu(spec: ModelSpec, library: str) -> None:
    if spec.instances.device != "cpu":
        raise LoadError(f"{library} models compute on the CPU; `device: {spec.instances.device}` is not possible")


def reason(error: BaseException) -> str:
    """The first line of a library's error, without its stack trace."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _number(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.kind in "iuf" and dtype.itemsize > 2 else np.dtype(np.float32)
