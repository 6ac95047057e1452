"""The hand-written ModelInfer codec, held against protobuf's."""

import struct

import ml_dtypes
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from fairlead.api.grpc.codec import (
    MAX_STRUCTURE_BYTES,
    Refused,
    decode_request,
    encode_response,
    encode_stream_error,
    encode_stream_response,
)
from fairlead.api.kserve.codec import Form, TooSlow
from fairlead.core.errors import InvalidRequest, ModelError, Unsupported
from fairlead.core.request import Response
from fairlead.core.tensors import DTYPES, decode_bytes, encode_bytes, object_array
from tests.api.grpc.served import request, row

INTEGERS = {
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
}  # fmt: skip
EXPLICIT = INTEGERS | {"BOOL": "bool_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents"}
names = st.text(max_size=6)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw, datatypes=tuple(DTYPES)):
    """(datatype, array of it)"""
    datatype, shape = draw(st.sampled_from(datatypes)), draw(shapes)
    size = int(np.prod(shape))
    dtype = DTYPES[datatype]
    if datatype == "BYTES":
        return datatype, object_array(draw(st.lists(st.binary(max_size=5), min_size=size, max_size=size)), shape)
    if datatype == "BOOL":
        return datatype, np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype).reshape(shape)
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    return datatype, np.frombuffer(raw, dtype).reshape(shape)


parameters = st.dictionaries(
    st.text(min_size=1, max_size=4).map(lambda name: "p" + name),
    st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=4), st.floats(allow_nan=False)),
    max_size=3,
)


@st.composite
def requests(draw):
    """A valid request, and the arrays in it."""
    explicit = draw(st.booleans())
    message = pb.ModelInferRequest(model_name=draw(names), model_version=draw(names), id=draw(names))
    arrays = {}
    for name in draw(st.lists(names, max_size=3, unique=True)):
        datatype, array = draw(tensors(tuple(EXPLICIT) if explicit else tuple(DTYPES)))
        arrays[name] = array
        tensor = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if explicit:
            tensor.contents.SetInParent()
            getattr(tensor.contents, EXPLICIT[datatype]).extend(array.reshape(-1).tolist())
        else:
            message.raw_input_contents.append(encode_bytes(array) if datatype == "BYTES" else array.tobytes())
    for name in draw(st.lists(names, max_size=3, unique=True)):
        output = message.outputs.add(name=name)
        if draw(st.booleans()):
            output.parameters["classification"].int64_param = draw(st.integers(1, 9))
    for name, value in draw(parameters).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    return message, arrays


def same(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tolist() == other.tolist() if one.dtype.kind == "O" else one.tobytes() == other.tobytes()


def fields_of(data: bytes) -> list[bytes]:
    """The top-level fields of a message, apart."""
    fields, at = [], 0
    while at < len(data):
        begin = at
        tag, at = varint(data, at)
        assert tag & 7 == 2
        size, at = varint(data, at)
        at += size
        fields.append(data[begin:at])
    return fields


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


UNKNOWN = (
    b"\x98\x06\x96\x01",
    b"\xa2\x06\x03abc",
    b"\xa5\x06\0\0\0\0",
    b"\xa1\x06" + bytes(8),
    b"\x9b\x06\x08\x01\x9c\x06",
    b"\x08\x01",
    b"\x38\x05",
)


@given(requests(), st.data())
@settings(deadline=None, max_examples=120)
def test_it_reads_what_protobuf_writes(made, data):
    message, arrays = made
    wire = message.SerializeToString()
    # Fields may come in any order (those of the same kind in theirs), unknown ones between them.
    fields = fields_of(wire)
    kinds = sorted({field[0] for field in fields})
    order = data.draw(st.permutations(kinds))
    shuffled = b"".join(data.draw(st.sampled_from((b"", *UNKNOWN))) + b"".join(f for f in fields if f[0] == kind) for kind in order)
    expected = pb.ModelInferRequest.FromString(shuffled)
    for form in (wire, memoryview(wire), shuffled):
        read = decode_request(form)
        got = read.request
        assert (got.model, got.version, got.id) == (message.model_name, message.model_version, message.id)
        assert list(got.inputs) == [tensor.name for tensor in expected.inputs] == list(arrays)
        assert all(same(got.inputs[name], array) for name, array in arrays.items())
        assert all(not array.flags.writeable for array in got.inputs.values() if array.dtype.kind != "O" and array.size)
        assert all(array.flags.aligned for array in got.inputs.values())
        assert got.outputs == (tuple(output.name for output in expected.outputs) or None)
        wanted = {o.name: o.parameters["classification"].int64_param for o in expected.outputs if "classification" in o.parameters}
        assert (read.classes or {}) == wanted
        assert got.parameters == {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in expected.parameters.items()}


@given(requests(), st.data())
@settings(deadline=None, max_examples=200)
@example((pb.ModelInferRequest(model_name="m"), {}), None)
def test_whatever_comes_is_read_or_refused(made, data):
    wire = bytearray(made[0].SerializeToString())
    if data is not None:
        for _ in range(data.draw(st.integers(0, 3))):
            if wire:
                wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
        wire = wire[: data.draw(st.integers(0, len(wire)))]
    for form in (bytes(wire), memoryview(bytes(wire))):
        try:
            read = decode_request(form)
        except Refused as refused:
            assert isinstance(refused.error, (InvalidRequest, Unsupported))
        else:
            message = pb.ModelInferRequest.FromString(bytes(wire))
            assert read.request.model == message.model_name
            assert list(read.request.inputs) == [tensor.name for tensor in message.inputs]


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=300)
def test_noise_is_read_or_refused_as_protobuf_does(noise):
    try:
        pb.ModelInferRequest.FromString(noise)
    except DecodeError:
        with pytest.raises(Refused):
            decode_request(noise)
    else:
        try:
            decode_request(noise)
        except Refused as refused:
            assert isinstance(refused.error, (InvalidRequest, Unsupported))


@given(
    st.text(max_size=5),
    st.text(max_size=5),
    st.text(max_size=5),
    st.dictionaries(names, tensors(), max_size=3),
    parameters,
    st.sampled_from((None, True, False)),
)
@settings(deadline=None, max_examples=200)
def test_protobuf_reads_what_it_writes(model, version, id, outputs, parameters, final):
    response = Response(
        model=model, version=version, id=id, outputs={name: array for name, (_, array) in outputs.items()}, parameters=parameters
    )
    wire = b"".join(encode_stream_response(encode_response(response, final=final)))
    read = pb.ModelStreamInferResponse.FromString(wire).infer_response
    assert (read.model_name, read.model_version, read.id) == (model, version, id)
    assert [(t.name, t.datatype, tuple(t.shape)) for t in read.outputs] == [
        (name, kind, array.shape) for name, (kind, array) in outputs.items()
    ]
    for raw, (kind, array) in zip(read.raw_output_contents, outputs.values(), strict=True):
        assert raw == (encode_bytes(array) if kind == "BYTES" else array.tobytes())
    expected = parameters if final is None else parameters | {"triton_final_response": final}
    assert {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in read.parameters.items()} == expected


def test_large_tensors_are_neither_copied_in_nor_out():
    array = np.arange(1 << 16, dtype=np.float32).reshape(1, -1)
    wire = request("m", x=array).SerializeToString()
    whole = bytes(-len(wire) % 16) + wire  # as a message of several pieces is put together
    view = memoryview(whole)[-len(wire) :]
    read = decode_request(view).request.inputs["x"]
    assert np.shares_memory(read, np.frombuffer(whole, np.uint8))
    (*_, raw) = encode_response(Response(model="m", version="1", outputs={"y": read}))
    assert np.shares_memory(np.frombuffer(raw, np.uint8), np.frombuffer(whole, np.uint8))


def test_a_large_tensor_at_an_odd_address_is_aligned():
    array = np.arange(1 << 16, dtype=np.float64)
    wire = request("m", x=array).SerializeToString()
    for shift in range(8):
        read = decode_request(memoryview(bytes(shift) + wire)[shift:]).request.inputs["x"]
        assert read.flags.aligned
        assert not read.flags.writeable
        assert (read == array).all()


def test_explicit_contents_may_be_packed_or_not_and_come_in_pieces():
    unpacked = b"".join(b"\x35" + struct.pack("<f", value) for value in (1, 2))
    packed = b"\x32\x08" + struct.pack("<2f", 3, 4)
    contents = b"\x2a" + bytes((len(unpacked),)) + unpacked + b"\x2a" + bytes((len(packed),)) + packed
    head = b"\x0a\x01x\x12\x04FP32\x1a\x01\x01\x18\x04"
    wire = b"\x2a" + bytes((len(head + contents),)) + head + contents
    assert list(pb.ModelInferRequest.FromString(wire).inputs[0].contents.fp32_contents) == [1, 2, 3, 4]
    assert decode_request(wire).request.inputs["x"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("datatype", INTEGERS)
def test_the_ends_of_every_integer_range_survive(datatype):
    info = np.iinfo(DTYPES[datatype])
    values = [info.min, -1 if info.min else 1, 0, 127, 128 if info.max > 127 else 5, info.max] * 40
    message = pb.ModelInferRequest()
    getattr(message.inputs.add(name="x", datatype=datatype, shape=[len(values)]).contents, INTEGERS[datatype]).extend(values)
    assert decode_request(message.SerializeToString()).request.inputs["x"].tolist() == values


def test_varints_cross_the_chunks_in_which_they_are_read(monkeypatch):
    monkeypatch.setattr("fairlead.api.grpc.codec.CHUNK_BYTES", 16)
    values = [2**shift for shift in range(64)] * 3
    message = pb.ModelInferRequest()
    message.inputs.add(name="x", datatype="UINT64", shape=[len(values)]).contents.uint64_contents.extend(values)
    assert decode_request(message.SerializeToString()).request.inputs["x"].tolist() == values


def broken(change) -> pb.ModelInferRequest:
    message = request("m", id="7", x=row(1, 2), z=row(3, 4))
    change(message)
    return message


def explicit(datatype: str, field: str, *values, shape=(1,)):
    def change(message):
        del message.raw_input_contents[:]
        del message.inputs[:]
        getattr(message.inputs.add(name="x", datatype=datatype, shape=shape).contents, field).extend(values)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.raw_input_contents.__setitem__(0, b"123"), "input byte size mismatch for input 'x' for model 'm'. Expected 8, got 3"),
        (lambda m: m.inputs[0].shape.append(-1), "unexpected shape for input 'x': [1,2,-1] has a negative dimension"),
        (lambda m: m.inputs[0].shape.extend([2**40, 2**40]), "causes total element count to exceed maximum size of"),
        (lambda m: m.inputs[0].shape.extend([2**61, 0]), "byte size overflow for input 'x'"),
        (lambda m: m.inputs[0].shape.extend([1] * 65), "shape of input 'x' has more than 64 dimensions"),
        (lambda m: setattr(m.inputs[0], "datatype", "FP12"), "data-type is 'FP12', which is not one of BOOL"),
        (lambda m: setattr(m.inputs[1], "name", "x"), "input 'x' already exists in request"),
        (lambda m: m.raw_input_contents.pop(), "unable to find data for input tensor 'z' for model 'm' in request."),
        (lambda m: m.raw_input_contents.append(b""), "request has 3 raw_input_contents for 2 inputs"),
        (lambda m: m.inputs[0].contents.fp32_contents.append(1), "contents field must not be specified when using raw_input_contents for 'x' for model 'm'"),
        (lambda m: m.outputs.extend([m.outputs.add(name="y")]), "output 'y' already exists in request"),
        (lambda m: setattr(m.parameters["timeout"], "string_param", "soon"), "parameter 'timeout' must be an unsigned integer"),
        (lambda m: setattr(m.parameters["triton_x"], "bool_param", True), "parameter 'triton_x' is reserved"),
        (lambda m: m.parameters["empty"].SetInParent(), "parameter 'empty' must be a string, a number or a boolean"),
        (lambda m: setattr(m.inputs[0].parameters["content_type"], "string_param", "np"), "unknown parameter 'content_type' of input 'x'"),
        (lambda m: setattr(m.outputs.add(name="y").parameters["style"], "bool_param", True), "unknown parameter 'style' of output 'y'"),
        (lambda m: setattr(m.outputs.add(name="y").parameters["classification"], "int64_param", -1), "'classification' of output 'y' must be an unsigned integer"),
        (explicit("FP32", "fp64_contents", 1.0), "unexpected explicit tensor data for input tensor 'x' for model 'm' of type 'FP64', expected datatype 'FP32'"),
        (explicit("FP16", "fp32_contents", 1.0), "of type 'FP32', expected datatype 'FP16'"),
        (explicit("INT8", "int_contents", 128), "a value of input 'x' is out of range for data-type 'INT8'"),
        (explicit("UINT16", "uint_contents", 65536), "out of range for data-type 'UINT16'"),
        (explicit("INT64", "int64_contents", 1, 2), "input byte size mismatch for input 'x' for model 'm'. Expected 8, got 16"),
        (explicit("BYTES", "bytes_contents", b"a", b"b"), "unexpected number of string elements 2 for inference input 'x', expecting 1"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(change, says):
    with pytest.raises(Refused) as caught:
        decode_request(broken(change).SerializeToString())
    assert says in caught.value.message
    assert isinstance(caught.value.error, InvalidRequest)
    assert caught.value.message.startswith("[request id: 7] ")
    assert caught.value.id == "7"


def test_shared_memory_is_not_offered():
    message = broken(lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "r"))
    with pytest.raises(Refused, match="input 'x' is in shared memory") as caught:
        decode_request(message.SerializeToString())
    assert isinstance(caught.value.error, Unsupported)


def test_a_bytes_tensor_must_add_up():
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[encode_bytes(object_array([b"a", b"b"], (2,)))])
    message.inputs.add(name="x", datatype="BYTES", shape=[3])
    with pytest.raises(Refused, match="unexpected number of string elements 2 for inference input 'x', expecting 3"):
        decode_request(message.SerializeToString())


def test_what_takes_long_to_read_is_left_to_a_thread():
    strings = object_array([b""] * 10_000, (10_000,))
    many = pb.ModelInferRequest(raw_input_contents=[encode_bytes(strings)])
    many.inputs.add(name="x", datatype="BYTES", shape=[10_000])
    numbers = pb.ModelInferRequest()
    numbers.inputs.add(name="x", datatype="INT32", shape=[300_000]).contents.int_contents.extend([1] * 300_000)
    fields = pb.ModelInferRequest(model_name="m").SerializeToString() + b"\x80\x01\x01" * 50_000
    for wire in (many.SerializeToString(), numbers.SerializeToString(), fields):
        with pytest.raises(TooSlow):
            decode_request(wire)
        assert decode_request(wire, patient=True).request is not None


def test_a_request_of_nothing_but_structure_is_refused():
    inner = b"\x80\x01\x01" * (MAX_STRUCTURE_BYTES // 3 + 2)
    nested = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32").SerializeToString() + inner
    for wire in (inner, b"\x2a" + encode_varint(len(nested)) + nested):
        with pytest.raises(Refused, match="bytes that are no tensor's values"):
            decode_request(wire, patient=True)


def encode_varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def test_outputs_come_as_asked_for_and_classified():
    outputs = {"p": np.array([[0.1, 0.7, 0.2]], np.float32), "q": np.array([1.0], ml_dtypes.bfloat16)}
    form = Form(classes={"p": 2}, labels={"p": ("ant", "bee")}, batches=True)
    read = pb.ModelInferResponse.FromString(b"".join(encode_response(Response(model="m", version="1", outputs=outputs), ("q", "p"), form)))
    assert [(o.name, o.datatype, list(o.shape)) for o in read.outputs] == [("q", "BF16", [1]), ("p", "BYTES", [1, 2])]
    assert decode_bytes(memoryview(read.raw_output_contents[1])) == [b"0.700000:1:bee", b"0.200000:2"]
    with pytest.raises(ModelError, match="model 'm' gave no output 'r'"):
        encode_response(Response(model="m", version="1", outputs=outputs), ("r",))


def test_an_error_within_a_stream_names_its_request():
    read = pb.ModelStreamInferResponse.FromString(encode_stream_error("no such thing", "7"))
    assert (read.error_message, read.infer_response.id) == ("no such thing", "7")
    assert read.infer_response.parameters["triton_final_response"].bool_param
