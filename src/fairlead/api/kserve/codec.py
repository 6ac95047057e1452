"""Infer requests and responses on the wire: JSON, and JSON followed by raw tensors (the binary extension).

Pure functions. What may take long is told apart: see `LARGE_JSON_BYTES`, `TooSlow` and `pace`.
"""

import json
import math
import re
from enum import Enum
from functools import cache, lru_cache
from itertools import chain
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field, structs

from fairlead.api.kserve.classification import classify
from fairlead.api.kserve.parameters import NO_WISHES, take_parameters
from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, QueueFull, TimeoutExpired, TooLarge, Unsupported
from fairlead.core.request import Request, Response
from fairlead.core.specs import ModelSpec
from fairlead.core.tensors import DATATYPES, DTYPES, Tensors, datatype_of, decode_bytes, encode_bytes, nbytes_of, object_array

Data = bytes | bytearray | memoryview

LARGE_JSON_BYTES = 256 << 10
"""JSON beyond this holds the GIL for longer than other requests should wait: parse it in another process."""
LARGE_JSON_ELEMENTS = 1 << 14
"""The same for a tensor to be written as JSON."""
MANY_STRINGS = 1 << 13
"""BYTES elements are taken apart one by one; beyond this do it in a thread."""
COPY_BYTES = 1 << 14
"""Smaller tensors are cheaper copied into one buffer with their head than written beside it."""
KNOWN_HEAD_BYTES = 1 << 12
MAX_DEPTH = 100
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**63 - 1

Dimensions = Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_ELEMENTS)], ...], Meta(max_length=MAX_DIMENSIONS)]


class InputJson(Struct, forbid_unknown_fields=True):
    name: str
    shape: Dimensions
    datatype: str
    parameters: dict[str, Any] | None = None
    data: Raw | UnsetType = UNSET


class OutputJson(Struct, forbid_unknown_fields=True):
    name: str
    parameters: dict[str, Any] | None = None


class RequestJson(Struct, forbid_unknown_fields=True):
    inputs: list[InputJson]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[OutputJson] | None = None


class TensorJson(Struct):
    """One output of a response; its keys in Triton's order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] | UnsetType = UNSET
    data: list[Any] | UnsetType = UNSET


class ResponseJson(Struct):
    id: str | UnsetType
    model_name: str
    model_version: str
    parameters: dict[str, Any] | UnsetType
    outputs: list[TensorJson]


class Form(Struct, frozen=True):
    """How the caller wants its answer written."""

    binary: bool = False
    """What holds for outputs that say nothing themselves."""
    binaries: dict[str, bool] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    """Output → how many classes (the classification extension)."""
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    batches: bool = False


JSON_FORM = Form()
BINARY_FORM = Form(binary=True)


class TooSlow(Exception):
    """The request decodes, but not in the event loop: call `decode` again from a thread with `patient=True`."""


class Pace(Enum):
    """Where to encode a response so that the event loop does not wait."""

    LOOP = "loop"
    THREAD = "thread"
    PROCESS = "process"


_request_decoder = msgspec.json.Decoder(RequestJson)
_encoder = msgspec.json.Encoder()


def message_of(error: FairleadError, request_id: str) -> str:
    """What the caller reads; Triton names the request where the error is about it."""
    about_it = isinstance(error, (InvalidRequest, QueueFull, TimeoutExpired)) and not isinstance(error, TooLarge)
    if not about_it or error.message.startswith("[request id: "):
        return error.message
    return f"[request id: {request_id or '<id_unknown>'}] {error.message}"


# Requests


class _Shaped(Struct):
    shape: list[int] = []


class _Shapes(Struct):
    inputs: list[_Shaped] = []


_shapes_decoder = msgspec.json.Decoder(_Shapes)


def num_rows(body: Data, head_bytes: int | None) -> int:
    """The first input's first dimension, of a body that nothing else is read of; 1 where it does not say."""
    try:
        inputs = _shapes_decoder.decode(body if head_bytes is None else memoryview(body)[:head_bytes]).inputs
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 1
    return max(inputs[0].shape[0], 1) if inputs and inputs[0].shape else 1


def head_size(header: str, size: int) -> int:
    """The JSON's length from the Inference-Header-Content-Length header of a body of `size` bytes."""
    if not (header.isascii() and header.isdigit() and len(header) < 20):
        raise InvalidRequest(f"Unable to parse Inference-Header-Content-Length header value: '{header[:100]}' is not an unsigned integer")
    head = int(header)
    if head > size:
        raise InvalidRequest(f"inference header size should be in range (0, {size}], got: {head}")
    return head


def decode(body: Data, head_bytes: int | None, model: str, version: str, patient: bool = False) -> tuple[Request, Form]:
    """The request that a body holds; its first `head_bytes` are JSON, all of it where None.

    Tensors of the binary part are read-only views on the body. Raises FairleadError whose message names the
    request, and TooSlow unless `patient`. A form that asks for classes still needs `with_labels`.
    """
    view = memoryview(body)
    if head_bytes is None:
        plan = _plan(view)
    elif head_bytes <= KNOWN_HEAD_BYTES:
        plan = _known_plan(bytes(view[:head_bytes]))
    else:
        plan = _plan(view[:head_bytes])
    try:
        inputs = _tensors(plan, view, head_bytes, model, patient)
    except InvalidRequest as error:
        raise _about(error, plan.id) from None
    request = Request(
        model=model, version=version, inputs=inputs, id=plan.id, outputs=plan.outputs, priority=plan.priority, timeout=plan.timeout
    )
    if plan.parameters:
        request.parameters = dict(plan.parameters)
    return request, plan.form


def decode_raw(body: Data, model: str, version: str, spec: ModelSpec) -> tuple[Request, Form]:
    """A raw binary request: the whole body is the model's one input, batch 1, and all outputs come back binary."""
    try:
        return Request(model=model, version=version, inputs=_raw_input(memoryview(body), model, spec)), BINARY_FORM
    except InvalidRequest as error:
        raise _about(error, "") from None


def with_labels(form: Form, spec: ModelSpec) -> Form:
    """The form, knowing how the model's outputs are to be classified."""
    labels = {output.name: output.labels for output in spec.outputs if output.name in form.classes}
    return structs.replace(form, labels=labels, batches=spec.batches)


class _Plan(Struct, frozen=True):
    """All that a request's JSON says, checked, but for the tensors' data."""

    id: str
    inputs: list[tuple[InputJson, np.dtype, int, int | None]]
    """(input, dtype, number of elements, size in the binary part or None)"""
    outputs: tuple[str, ...] | None
    form: Form
    priority: int
    timeout: float
    parameters: dict[str, Any]


def _plan(head: Data) -> _Plan:
    message = _parse(head)
    request_id = message.id or ""
    try:
        inputs: dict[str, tuple[InputJson, np.dtype, int, int | None]] = {}
        for tensor in message.inputs:
            name, datatype = tensor.name, tensor.datatype
            if name in inputs:
                raise InvalidRequest(f"input '{name}' already exists in request")
            try:
                dtype = DTYPES[datatype]
            except KeyError:
                raise InvalidRequest(f"invalid datatype '{datatype}' for input '{name}', expecting one of {', '.join(DTYPES)}") from None
            count = math.prod(tensor.shape)
            if count > MAX_ELEMENTS:
                raise InvalidRequest(f"shape for input '{name}' causes total element count to exceed maximum size of {MAX_ELEMENTS}")
            size = _binary_size(tensor) if tensor.parameters else None
            if size is None:
                if tensor.data is UNSET:
                    raise InvalidRequest(f"{_ONE_SOURCE} But no field is set for input '{name}'")
            elif tensor.data is not UNSET:
                raise InvalidRequest(f"{_ONE_SOURCE} But both 'data' and 'binary_data_size' are set for input '{name}'")
            inputs[name] = tensor, dtype, count, size
        wanted = Request(model="", inputs={})
        wishes = take_parameters(wanted, message.parameters) if message.parameters else NO_WISHES
        if wishes.empty_final_response:
            raise InvalidRequest("parameter 'triton_enable_empty_final_response' is for streams over gRPC")
        binary = wishes.binary_data_output
        form = _form(wanted, message.outputs, binary) if message.outputs else BINARY_FORM if binary else JSON_FORM
    except InvalidRequest as error:
        raise _about(error, request_id) from None
    return _Plan(request_id, list(inputs.values()), wanted.outputs, form, wanted.priority, wanted.timeout, wanted.parameters)


# Clients of the binary extension send the same JSON again and again.
_known_plan = lru_cache(maxsize=256)(_plan)


def _parse(head: Data) -> RequestJson:
    try:
        return _request_decoder.decode(head)
    except RecursionError:
        why = f"JSON nesting depth exceeds maximum allowed limit ({MAX_DEPTH})"
    except msgspec.ValidationError as error:
        if ".shape" in str(error) and "length" not in str(error):
            why = "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer"
        else:
            why = f"failed to parse the request JSON buffer: {error}"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        why = f"failed to parse the request JSON buffer: {error}"
    raise _about(InvalidRequest(why), "")


def _about(error: InvalidRequest, request_id: str) -> InvalidRequest:
    return type(error)(message_of(error, request_id))


def _tensors(plan: _Plan, body: memoryview, head_bytes: int | None, model: str, patient: bool) -> Tensors:
    end = len(body)
    at = end if head_bytes is None else head_bytes
    inputs = {}
    for tensor, dtype, count, size in plan.inputs:
        name = tensor.name
        if size is None:
            inputs[name] = _from_json(tensor, dtype, count)
            continue
        if head_bytes is None:
            raise InvalidRequest(f"input '{name}' has 'binary_data_size' but the request has no Inference-Header-Content-Length header")
        if size > end - at:
            raise InvalidRequest(f"unexpected size for input '{name}', expecting {size - (end - at)} additional bytes for model '{model}'")
        inputs[name] = _from_binary(body[at : at + size], name, dtype, tensor.shape, count, patient)
        at += size
    if at != end:
        raise InvalidRequest(
            f"unexpected additional input data for model '{model}': {end - at} bytes more than the inputs' binary_data_size"
        )
    return inputs


_ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', 'shared_memory_region' in 'parameters'."
)


def _no_shared_memory(kind: str, name: str, parameters: dict[str, Any]) -> None:
    for key in parameters:
        if key.startswith("shared_memory_"):
            raise Unsupported(
                f"{kind} '{name}' sets '{key}': shared-memory regions are not supported, send tensors with the binary extension"
            )


def _binary_size(tensor: InputJson) -> int | None:
    parameters = tensor.parameters
    assert parameters is not None
    size = parameters.get("binary_data_size")
    if len(parameters) > (size is not None):
        _no_shared_memory("input", tensor.name, parameters)
    if size is None and "binary_data_size" not in parameters:
        return None
    if type(size) is not int or size < 0:
        raise InvalidRequest(f"parameter 'binary_data_size' of input '{tensor.name}' must be an unsigned integer")
    return size


def _form(request: Request, outputs: list[OutputJson], binary: bool) -> Form:
    names: list[str] = []
    binaries = {}
    classes = {}
    for output in outputs:
        name, parameters = output.name, output.parameters
        if name in binaries:
            raise InvalidRequest(f"output '{name}' already exists in request")
        wish = binary
        if parameters:
            _no_shared_memory("output", name, parameters)
            wish = parameters.get("binary_data", binary)
            if type(wish) is not bool:
                raise InvalidRequest(f"parameter 'binary_data' of output '{name}' must be a boolean")
            if "classification" in parameters:
                count = parameters["classification"]
                if type(count) is not int or count < 0:
                    raise InvalidRequest(f"parameter 'classification' of output '{name}' must be an unsigned integer")
                if count:
                    classes[name] = count
        names.append(name)
        binaries[name] = wish
    request.outputs = tuple(names)
    if not classes:
        if all(binaries.values()):
            return BINARY_FORM
        if not any(binaries.values()):
            return JSON_FORM
        return Form(binaries=binaries)
    return Form(binaries=binaries, classes=classes)


def _raw_input(body: memoryview, model: str, spec: ModelSpec) -> Tensors:
    if len(spec.inputs) != 1:
        raise InvalidRequest(f"a raw binary request needs a model of exactly one input, but model '{model}' has {len(spec.inputs)}")
    (tensor,) = spec.inputs
    name = tensor.name
    if tensor.datatype == "BYTES":
        # the body is the one element, with no length before it
        return {name: object_array([bytes(body)], (1, 1) if spec.batches and len(tensor.shape) > 1 else (1,))}
    shape = _raw_shape(tensor.shape, tensor.datatype, len(body), name, batches=spec.batches)
    return {name: _from_binary(body, name, DTYPES[tensor.datatype], shape, math.prod(shape), patient=True)}


def _raw_shape(shape: tuple[int, ...], datatype: str, size: int, name: str, *, batches: bool) -> tuple[int, ...]:
    dims = (1, *shape[1:]) if batches else shape
    if dims.count(-1) > 1:
        raise InvalidRequest(
            f"raw binary request: input '{name}' has more than one dimension of variable length, use a request with a JSON header"
        )
    known = math.prod(dim for dim in dims if dim != -1) * DTYPES[datatype].itemsize
    if -1 not in dims:
        return dims
    if not known or size % known:
        raise InvalidRequest(f"raw binary request: {size} bytes do not divide into elements of {known} bytes for input '{name}'")
    return tuple(size // known if dim == -1 else dim for dim in dims)


def _from_binary(data: memoryview, name: str, dtype: np.dtype, shape: tuple[int, ...], count: int, patient: bool) -> np.ndarray:
    kind = dtype.kind
    if kind == "O":
        if count > MANY_STRINGS and not patient:
            raise TooSlow
        elements = decode_bytes(data, name, limit=count)
        if len(elements) != count:
            raise InvalidRequest(f"unexpected number of string elements {len(elements)} for inference input '{name}', expecting {count}")
        return object_array(elements, shape)
    size = count * dtype.itemsize
    if size != len(data):
        if size > MAX_ELEMENTS:
            raise InvalidRequest(f"byte size overflow for input '{name}'")
        raise InvalidRequest(f"input byte size mismatch for input '{name}'. Expected {size}, got {len(data)}")
    if kind == "b" and size and np.frombuffer(data, np.uint8).max() > 1:
        raise InvalidRequest(f"BOOL input '{name}' holds a byte that is neither 0 nor 1")
    # not frombuffer, which refuses empty buffers
    array: np.ndarray = np.ndarray(shape, dtype, data)
    if not array.flags.aligned:
        # native libraries may assume it
        array = array.copy()
        array.flags.writeable = False
    return array


# A double beyond this rounds to infinity in single precision.
_FLOAT_LIMIT = math.nextafter(2.0**128 - 2.0**103, 0.0)


def _integer(bits: int, *, signed: bool) -> Any:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    # msgspec's bounds are 64-bit signed; NumPy itself refuses what exceeds 64 bits
    return Annotated[int, Meta(ge=low)] if high >= 2**63 else Annotated[int, Meta(ge=low, le=high)]


_ELEMENTS: dict[str, Any] = {
    "BOOL": bool,
    **{f"INT{bits}": _integer(bits, signed=True) for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": _integer(bits, signed=False) for bits in (8, 16, 32, 64)},
    "FP32": Annotated[float, Meta(ge=-_FLOAT_LIMIT, le=_FLOAT_LIMIT)],
    "FP64": float,
    "BYTES": str,
}
_flat_decoders = {datatype: msgspec.json.Decoder(list[element]) for datatype, element in _ELEMENTS.items()}  # type: ignore[valid-type]
_BRACKETS = re.compile(rb"[\s\[]*")


@cache
def _nested_decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    type_ = _ELEMENTS[datatype]
    for _ in range(depth):
        type_ = list[type_]  # type: ignore[valid-type]
    return msgspec.json.Decoder(type_)


def _from_json(tensor: InputJson, dtype: np.dtype, count: int) -> np.ndarray:
    name, datatype, shape, data = tensor.name, tensor.datatype, tensor.shape, tensor.data
    decoder = _flat_decoders.get(datatype)
    if decoder is None:
        raise InvalidRequest(f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input '{name}'")
    assert isinstance(data, Raw)
    try:
        values: list[Any] = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        values = _nested(data, name, datatype, error)
    if len(values) != count:
        raise InvalidRequest(
            f"Unable to parse 'data': Shape does not match true shape of 'data' field: input '{name}' has shape {list(shape)} and {len(values)} elements"
        )
    if datatype == "BYTES":
        return object_array([value.encode() for value in values], shape)
    try:
        return np.array(values, dtype).reshape(shape)
    except OverflowError:
        raise InvalidRequest(f"Unable to parse 'data' of input '{name}': a number is out of range for {datatype}") from None


def _nested(data: Raw, name: str, datatype: str, error: Exception) -> list[Any]:
    """The elements of nested lists, all of one depth."""
    brackets = _BRACKETS.match(data)
    depth = brackets.group().count(b"[") if brackets else 0
    if depth > MAX_DEPTH - 3:  # the document, `inputs` and the input are around it
        raise InvalidRequest(f"Unable to parse 'data' of input '{name}': JSON nesting depth exceeds maximum allowed limit ({MAX_DEPTH})")
    if depth > 1:
        try:
            values = _nested_decoder(datatype, depth).decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as nested_error:
            error = nested_error
        else:
            for _ in range(depth - 1):
                values = list(chain.from_iterable(values))
            return values  # type: ignore[no-any-return]
    raise InvalidRequest(f"Unable to parse 'data' of input '{name}' as {datatype}: {error}")


# Responses


def pace(response: Response, form: Form) -> Pace:
    """Where `encode` should run."""
    slowest = Pace.LOOP
    for name, array in response.outputs.items():
        binary = form.binaries.get(name, form.binary)
        if array.dtype.kind == "O":
            if array.size > MANY_STRINGS or (not binary and nbytes_of(array) > LARGE_JSON_BYTES):
                # copying many strings to another process takes as long as encoding them
                return Pace.THREAD
        elif array.size > LARGE_JSON_ELEMENTS and not binary:
            slowest = Pace.PROCESS
    return slowest


def encode(response: Response, form: Form, names: tuple[str, ...] | None) -> tuple[list[Data], int | None]:
    """(the body in parts, the length of its JSON where tensors follow it).

    Raises InvalidRequest for what has no JSON form.
    """
    arrays = response.outputs
    outputs = []
    tensors: list[Data] = []
    binary = False
    for name in names or arrays:
        try:
            array = arrays[name]
        except KeyError:
            raise ModelError(f"model '{response.model}' gave no output '{name}'") from None
        if form.classes and name in form.classes:
            array = classify(array, form.classes[name], form.labels.get(name, ()), batches=form.batches)
        datatype = DATATYPES.get(array.dtype) or datatype_of(array)
        if form.binaries.get(name, form.binary) if form.binaries else form.binary:
            binary = True
            data = _to_binary(array)
            outputs.append(TensorJson(name, datatype, array.shape, {"binary_data_size": len(data)}))
            tensors.append(data)
        else:
            outputs.append(TensorJson(name, datatype, array.shape, UNSET, to_json(array, name, datatype)))
    message = ResponseJson(response.id or UNSET, response.model, response.version, response.parameters or UNSET, outputs)
    head = _encoder.encode(message)
    if b"null" in head and not all(_is_finite(arrays[name]) for name in (names or arrays)):
        # msgspec writes null for NaN and the infinities, the protocol wants them bare
        head = json.dumps(msgspec.to_builtins(message), separators=(",", ":"), ensure_ascii=False).encode()
    if not binary:
        return [head], None
    return [head, *tensors], len(head)


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _to_binary(array: np.ndarray) -> Data:
    if array.dtype.kind == "O":
        return encode_bytes(array)
    if array.nbytes > COPY_BYTES and array.flags.c_contiguous:
        # through uint8, because NumPy exports no buffer of BF16
        return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return array.tobytes()


def to_json(array: np.ndarray, name: str, datatype: str) -> list[Any]:
    """The elements, flat. Raises InvalidRequest for what has no JSON form."""
    if datatype in _ELEMENTS:
        values: list[Any] = array.ravel().tolist()
        if datatype != "BYTES":
            return values
        try:
            return [value.decode() for value in values]
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"output '{name}' holds BYTES that are not UTF-8 and so have no JSON form. Please use the binary data format for it"
            ) from None
    raise InvalidRequest(f"sending {datatype} data via JSON is not supported. Please use the binary data format for output '{name}'")
