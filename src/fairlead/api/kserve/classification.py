"""The classification extension: an output's largest values as `value:index[:label]` strings."""

import numpy as np

from fairlead.core.errors import InvalidRequest
from fairlead.core.tensors import object_array


def classify(array: np.ndarray, count: int, labels: tuple[str, ...], *, batches: bool) -> np.ndarray:
    """The `count` largest of each row (of the whole tensor where `batches` is false), as a BYTES tensor.

    Shape [rows, n] or [n] with n = min(count, elements). Values print as C++ `std::to_string` does.
    Raises InvalidRequest for BYTES tensors.
    """
    if array.dtype.kind == "O":
        raise InvalidRequest("class result not available for output due to unsupported type 'BYTES'")
    rows = array.reshape(array.shape[0] if array.shape else 1, -1) if batches else array.reshape(1, -1)
    n = min(count, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :n]
    integer = array.dtype.kind in "iub"
    elements = []
    for row, indices in zip(rows, order, strict=True):
        for index in indices.tolist():
            text = f"{int(row[index])}" if integer else f"{float(row[index]):.6f}"
            label = f":{labels[index]}" if index < len(labels) else ""
            elements.append(f"{text}:{index}{label}".encode())
    return object_array(elements, (len(rows), n) if batches else (n,))
