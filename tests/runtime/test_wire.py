import asyncio
import socket
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairlead.core.tensors import DTYPES, object_array
from fairlead.runtime import wire
from fairlead.runtime.slab import Slab, create_slab
from fairlead.runtime.wire import (
    ALIGNMENT,
    BUFFER_BYTES,
    INLINE_BYTES,
    MAGIC,
    PREFIX,
    Connection,
    Frame,
    Kind,
    Receiver,
    TensorPlace,
    WireError,
    encode_frame,
    pack,
    unpack,
)

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(SHAPES)
    count = int(np.prod(shape))
    if dtype.kind == "O":
        return object_array(draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count)), shape)
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype == np.bool_:
        return (np.frombuffer(raw, np.uint8) % 2).astype(bool).reshape(shape)
    return np.frombuffer(raw, dtype).reshape(shape) if count else np.empty(shape, dtype)


def same(left, right):
    """Same dtype, shape and bits (NaNs too)."""
    bits = (lambda array: array.tolist()) if left.dtype == object else (lambda array: array.tobytes())
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def receive(data, cuts=()):
    """Feed bytes to a receiver, cut at the given places."""
    receiver, frames = Receiver(), []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        piece = memoryview(data)[start:end]
        while len(piece):
            room = receiver.buffer()
            num = min(len(room), len(piece))
            assert num > 0
            room[:num] = piece[:num]
            frames += receiver.received(num)
            piece = piece[num:]
    return frames


def slab_pair(nbytes):
    fd = create_slab(nbytes, "test")
    return Slab(fd, writer=True), Slab(fd, writer=False)


@given(st.lists(st.dictionaries(st.text(max_size=5), arrays(), max_size=3), max_size=4), st.data())
def test_frames_arrive_whole_however_the_bytes_are_cut(batches, data):
    stream = b""
    for work, tensors in enumerate(batches):
        places, body = pack([tensors], None)
        stream += b"".join(encode_frame(Frame(Kind.INFER, work=work, tensors=places), body))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    frames = receive(stream, cuts)
    assert [frame.work for frame, _ in frames] == list(range(len(batches)))
    for (frame, body), tensors in zip(frames, batches, strict=True):
        got = unpack(frame.tensors, body, None, copy=False)
        assert list(got) == list(tensors)
        assert all(same(got[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("size", [BUFFER_BYTES // 2, BUFFER_BYTES, 3 * BUFFER_BYTES + 5])
def test_frames_larger_than_the_buffer_between_small_ones(size):
    small, large = {"a": np.arange(5.0)}, {"b": np.arange(size, dtype=np.uint8), "c": np.arange(7)}
    batches = [small, large, large, small]
    stream = bytearray()
    for tensors in batches:
        places, body = pack([tensors], None)
        stream += b"".join(encode_frame(Frame(Kind.INFER, tensors=places), body))
    frames = receive(bytes(stream), range(1, len(stream), 70_001))
    for (frame, body), tensors in zip(frames, batches, strict=True):
        got = unpack(frame.tensors, body, None, copy=False)
        for name, array in tensors.items():
            assert same(got[name], array)
            assert not got[name].flags.writeable
            assert got[name].ctypes.data % min(ALIGNMENT, array.itemsize) == 0


def test_rows_of_a_batch_lie_under_one_another_in_the_body_and_in_the_slab():
    writer, reader = slab_pair(1 << 20)
    rows = [
        {"x": np.full((n, 10_000), n, np.float32), "s": object_array([b"%d" % n] * n, (n,)), "t": np.full((n, 2), n)} for n in (1, 2, 3)
    ]
    places, body = pack(rows, writer)
    assert [place.offset >= 0 for place in places] == [True, False, False]
    got = unpack(places, b"".join(body), reader, copy=False)
    for name in ("x", "s", "t"):
        assert same(got[name], np.concatenate([row[name] for row in rows]))


def test_a_large_tensor_that_finds_no_room_in_the_slab_travels_inline():
    writer, reader = slab_pair(1 << 20)
    large = {"x": np.arange(200_000, dtype=np.float32), "z": np.arange(200_000, dtype=np.float32)[::-1]}
    places, body = pack([large], writer)
    assert [place.offset >= 0 for place in places] == [True, False]
    got = unpack(places, b"".join(body), reader, copy=True)
    assert same(got["x"], large["x"]) and same(got["z"], large["z"])
    writer.ranges.release(places[0].generation)
    assert writer.ranges.num_free_bytes == 1 << 20


@pytest.mark.parametrize(
    "array",
    [
        np.arange(INLINE_BYTES, dtype=np.float32).astype(ml_dtypes.bfloat16),
        object_array([b"x" * 50_000, b"", b"y" * 50_000], (3, 1)),
        np.arange(100_000.0).reshape(100, 1000).T,
    ],
    ids=["BF16", "BYTES", "transposed"],
)
def test_large_tensors_of_every_sort_go_through_the_slab(array):
    writer, reader = slab_pair(1 << 20)
    places, body = pack([{"x": array}], writer)
    assert places[0].offset >= 0 and not body
    assert same(unpack(places, b"", reader, copy=True)["x"], array)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "expected a frame"),
        (PREFIX.pack(MAGIC, 1 << 31, 0), "over the bounds"),
        (PREFIX.pack(MAGIC, 10, 1 << 40), "over the bounds"),
        (PREFIX.pack(MAGIC, 16, 0) + b"\xff" * 16, "not a header"),
        (PREFIX.pack(MAGIC, 1, 0) + b"\x80" + bytes(15), "not a header"),
        (PREFIX.pack(MAGIC, 16, 0) + b"\x81\xa4kind\x63" + bytes(9), "not a header"),
    ],
)
def test_bytes_that_are_no_frame_are_refused(data, reason):
    with pytest.raises(WireError, match=reason):
        receive(data)


@given(st.binary(max_size=200))
def test_arbitrary_headers_are_refused_or_understood(junk):
    with suppress(WireError):
        receive(PREFIX.pack(MAGIC, len(junk), 0) + junk + bytes(-len(junk) % ALIGNMENT))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (TensorPlace("x", "FP128", (1,), 16), "unknown datatype"),
        (TensorPlace("x", "FP32", (4,), 12), "cannot have 12 bytes"),
        (TensorPlace("x", "FP32", (400,), 1600), "after the body"),
        (TensorPlace("x", "FP32", (10**30, 0), 0), "x"),
        (TensorPlace("x", "BYTES", (1,), 16), "incomplete string"),
        (TensorPlace("x", "BYTES", (10**9,), 0), "x"),
        (TensorPlace("x", "FP32", (4,), 16, offset=4096, generation=1), "outside the slab"),
        (TensorPlace("x", "FP32", (4,), 16, offset=0, generation=0), "was seen already"),
        (TensorPlace("x", "FP32", (3,), 12, offset=0, generation=1), "belong to no tensor"),
    ],
)
def test_tensors_that_do_not_add_up_are_refused(place, reason):
    _, reader = slab_pair(4096)
    with pytest.raises(WireError, match=reason):
        unpack([place], b"\xff" * 16, reader, copy=True)


def test_a_frame_beyond_the_bounds_is_not_sent(monkeypatch):
    monkeypatch.setattr(wire, "MAX_BODY_BYTES", 100)
    with pytest.raises(WireError, match="over the bound"):
        encode_frame(Frame(Kind.INFER), [bytes(101)])
    with pytest.raises(WireError, match="over the bound"):
        encode_frame(Frame(Kind.ERROR, message="x" * wire.MAX_HEADER_BYTES))


async def connect():
    """Two connections on one socket pair, each with the frames it got and an event for its end."""
    ends = []
    for sock in socket.socketpair():
        frames: asyncio.Queue = asyncio.Queue()
        lost = asyncio.Event()
        connection = Connection("test", lambda frame, body, frames=frames: frames.put_nowait((frame, body)), lost.set)
        await asyncio.get_running_loop().create_unix_connection(lambda connection=connection: connection, sock=sock)
        ends.append((connection, frames, lost))
    return ends


async def test_two_connections_exchange_frames_small_and_large():
    (left, _, left_lost), (right, arrived, right_lost) = await connect()
    for size in (10, 10 * BUFFER_BYTES):
        tensors = {"x": np.arange(size)}
        places, body = pack([tensors], None)
        left.send(Frame(Kind.INFER, tensors=places), body)
        frame, body = await asyncio.wait_for(arrived.get(), 10)
        assert same(unpack(frame.tensors, body, None, copy=False)["x"], tensors["x"])
    left.abort()
    await asyncio.wait_for(asyncio.gather(left_lost.wait(), right_lost.wait()), 10)
    right.send(Frame(Kind.CLOSE))  # into the void


@pytest.mark.parametrize("freed", [0, 7])
async def test_a_peer_that_breaks_the_rules_is_hung_up_on(freed):
    (left, _, left_lost), (right, arrived, right_lost) = await connect()
    right.slab = slab_pair(4096)[0]
    if freed:
        left.send(Frame(Kind.RESPONSE, freed=freed))
    else:
        left.transport.write(b"hello" * 10)
    await asyncio.wait_for(asyncio.gather(left_lost.wait(), right_lost.wait()), 10)
    assert arrived.empty()
