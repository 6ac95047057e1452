"""Tensors are NumPy arrays by name; the array's dtype says its KServe datatype.

BYTES is an object array of `bytes`; BF16 is `ml_dtypes.bfloat16`.
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from fairlead.core.errors import InvalidRequest

Tensors = dict[str, np.ndarray]

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BYTES": np.dtype(np.object_),
}
DATATYPES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def datatype_of(array: np.ndarray) -> str:
    """The KServe name of an array's element type; ValueError for one that has none (complex, dates, ...)."""
    try:
        return DATATYPES[array.dtype]
    except KeyError:
        if array.dtype.kind in "SU":
            return "BYTES"
        raise ValueError(f"NumPy dtype {array.dtype} has no KServe datatype; use one of {', '.join(DTYPES)}") from None


def canonical(value: object) -> np.ndarray:
    """A C-contiguous array with a KServe datatype: strings become object arrays of bytes.

    Raises ValueError where the dtype has no KServe name.
    """
    array = np.asarray(value)
    if array.dtype.kind == "U" or array.dtype.kind == "S":
        array = array.astype(object)
    if array.dtype.kind == "O":
        return to_bytes_array(array)
    datatype_of(array)
    # ascontiguousarray would make a 0-d array 1-d
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def to_bytes_array(array: np.ndarray) -> np.ndarray:
    """An object array whose elements are all bytes; str is encoded as UTF-8."""
    out = np.empty(array.shape, dtype=object)
    flat, source = out.reshape(-1), array.reshape(-1)
    for i, element in enumerate(source):
        if isinstance(element, str):
            element = element.encode()
        elif not isinstance(element, bytes):
            if not isinstance(element, (bytearray, memoryview)):
                raise ValueError(f"a BYTES tensor holds str or bytes, not {type(element).__name__}")
            element = bytes(element)
        flat[i] = element
    return out


def encode_bytes(array: np.ndarray) -> bytes:
    """The binary form of a BYTES tensor: each element as a 4-byte little-endian length and its bytes."""
    parts = []
    for element in array.reshape(-1):
        parts.append(len(element).to_bytes(4, "little"))
        parts.append(element)
    return b"".join(parts)


def decode_bytes(buffer: memoryview, name: str = "", limit: int | None = None) -> list[bytes]:
    """The elements of a BYTES tensor in its binary form. Raises InvalidRequest if the lengths do not add up.

    `limit`: the number of elements that the shape promises; more are an error before they are built.
    """
    elements: list[bytes] = []
    at, end = 0, len(buffer)
    while at < end:
        start = at + 4
        if start > end:
            raise InvalidRequest(
                f"incomplete string length indicator for inference input '{name}', expecting 4 bytes but only {end - at} left"
            )
        at = start + int.from_bytes(buffer[at:start], "little")
        if at > end:
            raise InvalidRequest(
                f"incomplete string data for inference input '{name}', expecting string of length {at - start} but only {end - start} bytes left"
            )
        elements.append(bytes(buffer[start:at]))
        if limit is not None and len(elements) > limit:
            raise InvalidRequest(f"unexpected number of string elements for inference input '{name}', expecting {limit}")
    return elements


def object_array(elements: Sequence[object], shape: tuple[int, ...]) -> np.ndarray:
    """An object array of the given shape from a flat list (np.array would look inside equal-length elements)."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def nbytes_of(array: np.ndarray) -> int:
    """Bytes that the elements hold; for BYTES the sum of the elements' binary forms."""
    if array.dtype.kind == "O":
        return sum(len(element) + 4 for element in array.reshape(-1))
    return array.nbytes
