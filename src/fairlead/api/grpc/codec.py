"""ModelInferRequest and ModelInferResponse on the wire, without protobuf's copies and object trees.

Names of tags are those of the fields in `protos/grpc_service.proto`. What a client repeats from request to request
(an input's name, datatype and shape) is looked up by its bytes.
"""

import struct
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from msgspec import Struct

from fairlead.api.kserve.classification import classify
from fairlead.api.kserve.codec import MANY_STRINGS, MAX_DIMENSIONS, Form, TooSlow, message_of
from fairlead.api.kserve.parameters import NO_WISHES, Wishes, take_parameters
from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, Unsupported
from fairlead.core.request import Request, Response
from fairlead.core.tensors import DATATYPES, DTYPES, Tensors, datatype_of, decode_bytes, encode_bytes, object_array

Buffer = bytes | memoryview

VARINT, FIXED64, LENGTH, GROUP, GROUP_END, FIXED32 = range(6)
INT64_MAX = 2**63 - 1
MAX_GROUP_DEPTH = 100
SMALL_BYTES = 16_384
"""Up to here a copy costs less than keeping the parts of a message apart."""
KNOWN_BYTES = 512
"""Longer descriptions of tensors are not worth remembering."""
MAX_STRUCTURE_BYTES = 1 << 20
"""Of a request, its tensors' values apart: that part is read field by field."""
SLOW_STRUCTURE_BYTES = 16 << 10
SLOW_CONTENTS_BYTES = 256 << 10
SLOW_CLASSES = 1 << 16
"""Elements to be sorted for their classes."""
CHUNK_BYTES = 1 << 20

# Explicit contents: the field for each datatype, and the datatype after which Triton names that field.
CONTENTS = {
    "BOOL": 1, "INT8": 2, "INT16": 2, "INT32": 2, "INT64": 3,
    "UINT8": 4, "UINT16": 4, "UINT32": 4, "UINT64": 5, "FP32": 6, "FP64": 7, "BYTES": 8,
}  # fmt: skip
CONTENTS_DATATYPES = {1: "BOOL", 2: "INT32", 3: "INT64", 4: "UINT32", 5: "UINT64", 6: "FP32", 7: "FP64", 8: "BYTES"}


class InferCall(Struct):
    """A decoded ModelInferRequest: what to compute, and the form that the answer is to have."""

    request: Request
    wishes: Wishes
    classes: dict[str, int] | None = None
    """Outputs wanted as their so many largest values."""


class Refused(FairleadError):
    """A ModelInferRequest that is wrong, and how; `message` names the request as Triton does."""

    def __init__(self, error: FairleadError, id: str) -> None:
        super().__init__(message_of(error, id))
        self.error = error
        self.id = id


class _Input(Struct, frozen=True):
    name: str
    datatype: str
    dtype: np.dtype
    shape: tuple[int, ...]
    num_elements: int
    nbytes: int
    """-1 for BYTES, whose elements have lengths of their own."""
    contents: tuple[tuple[int, int], ...]
    """Where in the block its explicit contents stand (a message in several pieces is legal)."""


class _Output(Struct, frozen=True):
    name: str
    classes: int
    """0: the tensor itself."""


# Reading


def decode_request(data: Buffer, *, patient: bool = False) -> InferCall:
    """Arrays are read-only, and views of `data` where that is a memoryview.

    Raises Refused, or TooSlow where it had better be called in a thread, with `patient`.
    """
    model = version = id = ""
    inputs: list[tuple[_Input, Buffer]] = []
    raws: list[Buffer] = []
    outputs: list[_Output] | None = None
    parameters: dict[str, Any] | None = None
    at = values = 0
    end = len(data)
    try:
        while at < end:
            tag = data[at]
            if tag & 7 != LENGTH or not 0x0A <= tag <= 0x3A:
                at = _skip_field(data, at, end)
            else:
                size = data[at + 1]
                at += 2
                if size > 127:
                    size, at = _varint(data, at - 1)
                start = at
                at += size
                if at > end:
                    raise _truncated()
                if tag == 0x2A:
                    if size <= KNOWN_BYTES:
                        block: Buffer = bytes(data[start:at])
                        spec = _known_input(block)
                    else:
                        block = data[start:at]
                        spec = _read_input(block)
                        values += sum(stop - start for start, stop in spec.contents)
                    inputs.append((spec, block))
                elif tag == 0x3A:
                    raws.append(data[start:at])
                    values += size
                elif tag == 0x0A:
                    model = str(data[start:at], "utf-8")
                elif tag == 0x12:
                    version = str(data[start:at], "utf-8")
                elif tag == 0x1A:
                    id = str(data[start:at], "utf-8")
                elif tag == 0x32:
                    output = _known_output(bytes(data[start:at]))
                    if outputs is None:
                        outputs = []
                    elif any(output.name == other.name for other in outputs):
                        raise InvalidRequest(f"output '{output.name}' already exists in request")
                    outputs.append(output)
                else:
                    name, value = _read_parameter(data[start:at])
                    if parameters is None:
                        parameters = {}
                    parameters[name] = value
            if at - values > SLOW_STRUCTURE_BYTES:
                _check_structure(at - values, patient)
        request = Request(
            model=model,
            version=version,
            id=id,
            inputs=_tensors(model, inputs, raws, patient),
            outputs=tuple([output.name for output in outputs]) if outputs else None,
        )
        wishes = take_parameters(request, parameters) if parameters else NO_WISHES
    except FairleadError as error:
        raise Refused(error, id) from None
    except (IndexError, UnicodeDecodeError) as error:
        raise Refused(_truncated() if isinstance(error, IndexError) else _invalid("a string is not UTF-8"), id) from None
    classes = {output.name: output.classes for output in outputs if output.classes} if outputs else None
    return InferCall(request, wishes, classes)


def _check_structure(size: int, patient: bool) -> None:
    if size > MAX_STRUCTURE_BYTES:
        raise InvalidRequest(f"the request has more than {MAX_STRUCTURE_BYTES} bytes that are no tensor's values")
    if not patient:
        raise TooSlow


def _tensors(model: str, inputs: list[tuple[_Input, Buffer]], raws: list[Buffer], patient: bool) -> Tensors:
    tensors: Tensors = {}
    num_raws = len(raws)
    for index, (spec, block) in enumerate(inputs):
        name = spec.name
        if name in tensors:
            raise InvalidRequest(f"input '{name}' already exists in request")
        if spec.contents:
            if num_raws:
                raise InvalidRequest(f"contents field must not be specified when using raw_input_contents for '{name}' for model '{model}'")
            blocks = [block[start:stop] for start, stop in spec.contents]
            if not patient and (len(block) > SLOW_CONTENTS_BYTES or (spec.num_elements > MANY_STRINGS and spec.nbytes < 0)):
                raise TooSlow
            tensors[name] = _read_contents(spec, model, blocks)
            continue
        if index >= num_raws:
            raise InvalidRequest(f"unable to find data for input tensor '{name}' for model '{model}' in request.")
        raw = raws[index]
        if len(raw) != spec.nbytes:
            if spec.nbytes >= 0:
                raise _size_mismatch(spec, model, len(raw))
            if not patient and spec.num_elements > MANY_STRINGS:
                raise TooSlow
            elements = decode_bytes(memoryview(raw), name, spec.num_elements)
            tensors[name] = _bytes_array(spec, elements)
            continue
        array = np.ndarray(spec.shape, spec.dtype, raw) if raw else np.empty(spec.shape, spec.dtype)
        if type(raw) is memoryview and not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        tensors[name] = array
    if num_raws > len(inputs):
        raise InvalidRequest(f"request has {num_raws} raw_input_contents for {len(inputs)} inputs for model '{model}'")
    return tensors


def _read_input(block: Buffer) -> _Input:
    name = datatype = ""
    shape: list[int] = []
    contents: list[tuple[int, int]] = []
    parameters: list[str] = []
    values = 0
    at, end = 0, len(block)
    while at < end:
        if at - values > MAX_STRUCTURE_BYTES or len(shape) > MAX_DIMENSIONS:
            break
        tag = block[at]
        if tag == 0x18:
            value, at = _varint(block, at + 1)
            shape.append(_signed(value))
        elif tag in (0x0A, 0x12, 0x1A, 0x22, 0x2A):
            size, start = _varint(block, at + 1)
            at = start + size
            if at > end:
                raise _truncated()
            if tag == 0x0A:
                name = str(block[start:at], "utf-8")
            elif tag == 0x12:
                datatype = str(block[start:at], "utf-8")
            elif tag == 0x1A:
                while start < at and len(shape) <= MAX_DIMENSIONS:
                    value, start = _varint(block, start)
                    shape.append(_signed(value))
                if start != at and len(shape) <= MAX_DIMENSIONS:
                    raise _truncated()
            elif tag == 0x2A:
                contents.append((start, at))
                values += size
            else:
                parameters.append(_read_parameter(block[start:at])[0])
        else:
            at = _skip_field(block, at, end)
    if at - values > MAX_STRUCTURE_BYTES:
        _check_structure(at - values, True)
    if parameters:
        raise _refused_parameter("input", name, parameters[0])
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequest(f"shape of input '{name}' has more than {MAX_DIMENSIONS} dimensions")
    if at != end:
        raise _truncated()
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise InvalidRequest(f"inference input '{name}' data-type is '{datatype}', which is not one of {', '.join(DTYPES)}")
    dims = "[" + ",".join(map(str, shape)) + "]"
    if min(shape, default=0) < 0:
        raise InvalidRequest(f"unexpected shape for input '{name}': {dims} has a negative dimension")
    # A zero hides other dimensions from the product, not from NumPy.
    bound = prod(dim for dim in shape if dim)
    if bound > INT64_MAX:
        raise InvalidRequest(f"shape {dims} of input '{name}' causes total element count to exceed maximum size of {INT64_MAX}")
    if bound * dtype.itemsize > INT64_MAX:
        raise InvalidRequest(f"byte size overflow for input '{name}' of shape {dims}")
    num_elements = bound if 0 not in shape else 0
    nbytes = -1 if dtype.kind == "O" else num_elements * dtype.itemsize
    return _Input(name, datatype, dtype, tuple(shape), num_elements, nbytes, tuple(contents))


def _read_output(block: bytes) -> _Output:
    name = ""
    classes = 0
    parameters: list[tuple[str, Any]] = []
    at, end = 0, len(block)
    while at < end:
        tag = block[at]
        if tag not in (0x0A, 0x12):
            at = _skip_field(block, at, end)
            continue
        size, start = _varint(block, at + 1)
        at = start + size
        if at > end:
            raise _truncated()
        if tag == 0x0A:
            name = str(block[start:at], "utf-8")
        else:
            parameters.append(_read_parameter(block[start:at]))
    for parameter, value in parameters:
        if parameter == "classification":
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise InvalidRequest(f"parameter 'classification' of output '{name}' must be an unsigned integer")
            classes = value
        elif parameter != "binary_data":  # Tensors are always binary here.
            raise _refused_parameter("output", name, parameter)
    return _Output(name, classes)


_known_input = lru_cache(4096)(_read_input)
_known_output = lru_cache(4096)(_read_output)


def _read_parameter(block: Buffer) -> tuple[str, Any]:
    """One entry of a `map<string, InferParameter>`; an unset value is None."""
    name = ""
    value: Any = None
    at, end = 0, len(block)
    while at < end:
        tag = block[at]
        if tag not in (0x0A, 0x12):
            at = _skip_field(block, at, end)
            continue
        size, start = _varint(block, at + 1)
        at = start + size
        if at > end:
            raise _truncated()
        if tag == 0x0A:
            name = str(block[start:at], "utf-8")
        else:
            value = _read_parameter_value(block[start:at], value)
    return name, value


def _read_parameter_value(block: Buffer, value: Any) -> Any:
    at, end = 0, len(block)
    while at < end:
        tag = block[at]
        if tag in (0x08, 0x10, 0x28):
            number, at = _varint(block, at + 1)
            value = bool(number) if tag == 0x08 else _signed(number) if tag == 0x10 else number
        elif tag == 0x1A:
            size, start = _varint(block, at + 1)
            at = start + size
            if at > end:
                raise _truncated()
            value = str(block[start:at], "utf-8")
        elif tag == 0x21:
            at += 9
            if at > end:
                raise _truncated()
            value = struct.unpack("<d", block[at - 8 : at])[0]
        else:
            at = _skip_field(block, at, end)
    if at != end:
        raise _truncated()
    return value


def _read_contents(spec: _Input, model: str, blocks: list[Buffer]) -> np.ndarray:
    """An array out of InferTensorContents, each of whose fields may be packed, or not, or come in pieces."""
    wanted = CONTENTS.get(spec.datatype, 0)
    pieces: list[np.ndarray] = []
    elements: list[bytes] = []
    num_elements = 0
    for block in blocks:
        at, end = 0, len(block)
        while at < end:
            tag = block[at]
            field, kind = tag >> 3, tag & 7
            one = FIXED32 if field == 6 else FIXED64 if field == 7 else VARINT
            begin = at + 1
            at = _skip_field(block, at, end)
            if not 1 <= field <= 8 or not (kind == LENGTH or (kind == one and field != 8)):
                continue
            if kind == LENGTH:
                _, begin = _varint(block, begin)
                if begin == at and field != 8:
                    continue
            if field != wanted:
                raise InvalidRequest(
                    f"unexpected explicit tensor data for input tensor '{spec.name}' for model '{model}' of type '{CONTENTS_DATATYPES[field]}', expected datatype '{spec.datatype}'"
                )
            if field == 8:
                elements.append(bytes(block[begin:at]))
                num_elements += 1
            elif field in (6, 7):
                if (at - begin) % (4 if field == 6 else 8):
                    raise _truncated()
                pieces.append(np.frombuffer(block[begin:at], "<f4" if field == 6 else "<f8"))
                num_elements += len(pieces[-1])
            else:
                pieces += [_narrowed(spec, chunk) for chunk in _varints(block[begin:at])]
                num_elements += sum(map(len, pieces)) if kind == LENGTH else 1
            if num_elements > spec.num_elements:
                break
    if wanted == 8:
        return _bytes_array(spec, elements)
    flat = np.concatenate(pieces) if pieces else np.empty(0, spec.dtype)
    if len(flat) != spec.num_elements:
        raise _size_mismatch(spec, model, len(flat) * spec.dtype.itemsize)
    array = flat.reshape(spec.shape)
    array.flags.writeable = False
    return array


def _narrowed(spec: _Input, flat: np.ndarray) -> np.ndarray:
    """Varints as elements of a tensor. Protobuf keeps 32 bits of what it calls int32 or uint32."""
    if spec.datatype == "BOOL":
        wide = flat != 0
    elif spec.dtype.itemsize == 8:
        wide = flat.view(spec.dtype)
    else:
        wide = flat.astype(np.uint32).view(np.int32 if spec.dtype.kind == "i" else np.uint32)
    array: np.ndarray = wide.astype(spec.dtype)
    if spec.dtype.itemsize < 4 and (array != wide).any():
        raise InvalidRequest(f"a value of input '{spec.name}' is out of range for data-type '{spec.datatype}'")
    return array


def _varints(block: Buffer) -> Iterator[np.ndarray]:
    """Packed varints as uint64, many at once."""
    data = np.frombuffer(block, np.uint8)
    if data.size and data[-1] > 0x7F:
        raise _truncated()
    begin = 0
    while begin < data.size:
        chunk = data[begin : begin + CHUNK_BYTES]
        ends = np.flatnonzero(chunk < 0x80)
        if not ends.size:
            raise _too_long()
        chunk = chunk[: ends[-1] + 1]
        begin += chunk.size
        starts = np.concatenate(([0], ends[:-1] + 1))
        lengths = ends - starts + 1
        if lengths.max() > 10:
            raise _too_long()
        places = (np.arange(chunk.size) - np.repeat(starts, lengths)).astype(np.uint64)
        yield np.bitwise_or.reduceat((chunk & 0x7F).astype(np.uint64) << (7 * places), starts)


def _bytes_array(spec: _Input, elements: list[bytes]) -> np.ndarray:
    if len(elements) != spec.num_elements:
        raise InvalidRequest(
            f"unexpected number of string elements {len(elements)} for inference input '{spec.name}', expecting {spec.num_elements}"
        )
    return object_array(elements, spec.shape)


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    """A varint's value modulo 2**64 and where it ends. Raises IndexError or InvalidRequest."""
    byte = data[at]
    at += 1
    if byte < 0x80:
        return byte, at
    value, shift = byte & 0x7F, 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > 63:
            raise _too_long()


def _signed(value: int) -> int:
    return value - 2**64 if value > INT64_MAX else value


def _skip_field(data: Buffer, at: int, end: int, depth: int = 0) -> int:
    """Where the field that begins at `at` ends: one that this schema does not have, or has with another type."""
    tag, begin = _varint(data, at)
    kind = tag & 7
    if not 8 <= tag <= 0xFFFF_FFFF or kind in (6, 7) or (tag < 0x80 and begin > at + 1):
        raise _invalid("it has an impossible tag")
    at = begin
    if kind == VARINT:
        _, at = _varint(data, at)
    elif kind == LENGTH:
        size, at = _varint(data, at)
        at += size
    elif kind == FIXED32:
        at += 4
    elif kind == FIXED64:
        at += 8
    elif kind == GROUP and depth < MAX_GROUP_DEPTH:
        while at < end and data[at] & 7 != GROUP_END:
            at = _skip_field(data, at, end, depth + 1)
        closing, at = _varint(data, at)
        if closing != tag + 1:
            raise _invalid("a group does not end")
    else:
        raise _invalid("a group does not begin, or too many do")
    if at > end:
        raise _truncated()
    return at


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(f"the request is not a valid ModelInferRequest: {why}")


def _truncated() -> InvalidRequest:
    return _invalid("it is truncated")


def _too_long() -> InvalidRequest:
    return _invalid("a varint is longer than 10 bytes")


def _size_mismatch(spec: _Input, model: str, got: int) -> InvalidRequest:
    return InvalidRequest(f"input byte size mismatch for input '{spec.name}' for model '{model}'. Expected {spec.nbytes}, got {got}")


def _refused_parameter(what: str, name: str, parameter: str) -> InvalidRequest | Unsupported:
    if parameter.startswith("shared_memory_"):
        return Unsupported(f"{what} '{name}' is in shared memory, which this server does not support: send it in the message")
    return InvalidRequest(f"unknown parameter '{parameter}' of {what} '{name}'")


# Writing


def is_slow(response: Response, form: Form | None) -> bool:
    """Whether `encode_response` had better be called in a thread."""
    for name, array in response.outputs.items():
        if array.dtype.kind == "O":
            if array.size > MANY_STRINGS:
                return True
        elif form is not None and name in form.classes and array.size > SLOW_CLASSES:
            return True
    return False


def encode_response(
    response: Response, names: tuple[str, ...] | None = None, form: Form | None = None, *, final: bool | None = None
) -> list[Buffer]:
    """A ModelInferResponse with the outputs `names`, large tensors as they lie in memory.

    `final` is the parameter `triton_final_response`. Raises ModelError for what the model did not give,
    InvalidRequest for what cannot be classified.
    """
    parts: list[Buffer] = [_answer_head(response.model, response.version)]
    if response.id:
        parts.append(_field(0x1A, response.id.encode()))
    if final is not None:
        parts.append(_FINAL if final else _NOT_FINAL)
    for name, value in response.parameters.items():
        parts.append(_field(0x22, _field(0x0A, name.encode()) + _field(0x12, _parameter_value(value))))
    raws: list[Buffer] = []
    outputs = response.outputs
    for name in names or outputs:
        try:
            array = outputs[name]
        except KeyError:
            raise ModelError(f"model '{response.model}' gave no output '{name}'") from None
        if form is not None and name in form.classes:
            array = classify(array, form.classes[name], form.labels.get(name, ()), batches=form.batches)
        parts.append(_output_head(name, DATATYPES.get(array.dtype) or datatype_of(array), array.shape))
        raw = _raw(array)
        raws.append(_length_head(0x32, len(raw)))
        raws.append(raw)
    return parts + raws


def encode_stream_response(parts: list[Buffer]) -> list[Buffer]:
    """A ModelInferResponse inside a ModelStreamInferResponse."""
    return [_length_head(0x12, sum(map(len, parts))), *parts]


def encode_stream_error(message: str, id: str) -> bytes:
    """An error inside a stream that goes on: the client tells by the id which request it was."""
    return _field(0x0A, message.encode(errors="replace")) + _field(0x12, (_field(0x1A, id.encode()) if id else b"") + _FINAL)


def empty_final_response(model: str, version: str, id: str) -> list[Buffer]:
    return [_answer_head(model, version), _field(0x1A, id.encode()) if id else b"", _FINAL]


def _raw(array: np.ndarray) -> Buffer:
    if array.dtype.kind == "O":
        return encode_bytes(array)
    if array.nbytes <= SMALL_BYTES or not array.flags.c_contiguous:
        return array.tobytes()
    return array.reshape(-1).view(np.uint8).data


@lru_cache(1024)
def _answer_head(model: str, version: str) -> bytes:
    return _field(0x0A, model.encode()) + _field(0x12, version.encode())


@lru_cache(4096)
def _output_head(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    dims = _field(0x1A, b"".join(map(_encode_varint, shape))) if shape else b""
    return _field(0x2A, _field(0x0A, name.encode()) + _field(0x12, datatype.encode()) + dims)


@lru_cache(1024)
def _length_head(tag: int, size: int) -> bytes:
    return bytes((tag,)) + _encode_varint(size)


def _field(tag: int, value: bytes) -> bytes:
    return bytes((tag,)) + _encode_varint(len(value)) + value


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _parameter_value(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"\x08\x01" if value else b"\x08\x00"
    if isinstance(value, int):
        return (b"\x28" if value > INT64_MAX else b"\x10") + _encode_varint(value & 0xFFFF_FFFF_FFFF_FFFF)
    if isinstance(value, float):
        return b"\x21" + struct.pack("<d", value)
    return _field(0x1A, str(value).encode(errors="replace"))


_FINAL, _NOT_FINAL = (
    _field(0x22, _field(0x0A, b"triton_final_response") + _field(0x12, _parameter_value(value))) for value in (True, False)
)
