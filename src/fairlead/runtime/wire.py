"""Frames between the gateway and its replica processes.

    magic, header length, body length (16 bytes) | header: one Frame in msgpack | padding | body: raw tensors

Everything starts at a multiple of 16 bytes, so that tensors can be used where they were received. A tensor lies
in the body, or, if it is large and the peers share memory, in the sender's slab. The same frames go over a Unix
socket or TCP; only the slab needs one host. A peer that breaks these rules is hung up on.

| frame | from | means |
|---|---|---|
| LOAD | gateway | first frame: what to load |
| READY, or ERROR | replica | loaded (with the example's tensors), or why not |
| INFER | gateway | compute one batch; answered by one RESPONSE or ERROR |
| STREAM | gateway | compute one request; answered by RESPONSEs, at most `credit` of them, and END or ERROR |
| GRANT, CANCEL | gateway | more credit for the running stream; stop it (an END or ERROR still follows) |
| GENERATE | gateway | one request to an engine, which has any number at once |
| DELTAS | replica | what one step of the engine gave: pieces of answers, and errors |
| STATS | replica | the engine's counts: now and then while it is busy, and when it has become idle |
| CANCEL | gateway | the caller of an engine's request left: nothing more is said of it |
| LEVELS | gateway | which lines are written from now on; to the fork server, which its replicas inherit it from, and to those that run |
| SLEEP, WAKE | gateway | to an engine without work: give KV memory back, take it again; answered by END or ERROR |
| PROFILE | gateway | look at what this process does for so long; answered by PROFILED, whatever else runs |
| CLOSE | gateway | finish what runs and exit |
| SPAWN, KILL | gateway | to the fork server: a process for these descriptors; end one |
| SPAWNED, EXITED | fork server | its pid; how a process ended |
"""

import asyncio
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from math import prod
from typing import Annotated

import msgspec
import numpy as np
import structlog
from msgspec import Meta, Struct

from fairlead.backends.base import Kind as BackendKind
from fairlead.backends.base import RequestContext
from fairlead.core import errors
from fairlead.core.errors import FairleadError, InvalidRequest, ModelError
from fairlead.core.generation import Delta, EngineInfo, EngineStats, KvShare, Prompt
from fairlead.core.logs import Level
from fairlead.core.specs import ModelSpec, TensorSpec
from fairlead.core.tensors import DATATYPES, DTYPES, Tensors, datatype_of, decode_bytes, encode_bytes, object_array
from fairlead.observe.profile.orders import ProfileOrder, ReplicaProfile
from fairlead.runtime.slab import Slab, StaleRange

log = structlog.get_logger("fairlead.runtime")

PREFIX = struct.Struct("<4sIQ")
MAGIC = b"FLD1"
ALIGNMENT = 16
MAX_HEADER_BYTES = 64 << 20
"""Pictures and the files that they begin from travel in it."""
MAX_BODY_BYTES = 2 << 30
INLINE_BYTES = 64 << 10
"""Larger tensors go through the slab where there is one."""
BUFFER_BYTES = 256 << 10
"""Frames up to this size are received through one lasting buffer, larger ones into memory of their own."""

MAX_MESSAGE_CHARS = 4096
"""Of an error's message."""
HUNG_EXIT = 70
"""How a replica process ends whose engine's step took too long ..."""
BROKEN_EXIT = 71
"""... or whose engine gave itself up."""

Buffer = bytes | memoryview
Count = Annotated[int, Meta(ge=0)]


class WireError(Exception):
    """The peer does not speak the protocol, or we were asked to say what does not fit into it."""


class Kind(IntEnum):
    LOAD = 1
    READY = 2
    INFER = 3
    STREAM = 4
    RESPONSE = 5
    END = 6
    ERROR = 7
    GRANT = 8
    CANCEL = 9
    CLOSE = 10
    GENERATE = 11
    DELTAS = 12
    STATS = 13
    LEVELS = 14
    PROFILE = 15
    PROFILED = 16
    SLEEP = 17
    WAKE = 18
    SPAWN = 20
    SPAWNED = 21
    KILL = 22
    EXITED = 23


class TensorPlace(Struct, array_like=True):
    name: str
    datatype: str
    shape: tuple[Count, ...]
    nbytes: Count
    offset: int = -1
    """In the sender's slab; -1: next in the body."""
    generation: int = 0


class Load(Struct):
    spec: ModelSpec
    artefact: str
    backend: BackendKind
    threads: int
    version: str = ""
    kv: KvShare | None = None
    """Of an engine whose KV memory comes from a budget."""


class Ready(Struct, omit_defaults=True):
    """What the loaded artefact told of itself."""

    platform: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    batches: bool = False
    streams: bool = False
    has_example: bool = False
    engine: EngineInfo | None = None
    """Of an engine, in place of the others."""


class Generation(Struct, omit_defaults=True):
    """A request to an engine. Times are spans: clocks of two processes need not agree."""

    prompt: Prompt
    priority: int = 0
    age: float = 0.0
    """Seconds since it arrived."""
    timeout: float = 0.0
    """Seconds from now within which it must have started; 0: none."""


class Answer(Struct, array_like=True):
    """Of one request: a piece of what it asked for, or why there is none."""

    work: int
    delta: Delta | None = None
    error: str = ""
    """Name of a class of `core.errors`; then there is no delta."""
    message: str = ""


class Frame(Struct, omit_defaults=True):
    kind: Kind
    work: int = 0
    """Number of the batch or stream it belongs to."""
    tensors: list[TensorPlace] = []
    freed: int = 0
    """The sender has no more use for ranges of the receiver's slab up to this generation."""
    credit: Count = 0
    outputs: list[str] | None = None
    requests: list[RequestContext] = []
    seconds: float = 0.0
    """Computing time of a batch."""
    error: str = ""
    """Name of a class of `core.errors`."""
    message: str = ""
    load: Load | None = None
    ready: Ready | None = None
    generation: Generation | None = None
    answers: list[Answer] = []
    stats: EngineStats | None = None
    modules: list[str] = []
    """To import before forking."""
    num_fds: Count = 0
    """Descriptors that travel with the frame."""
    mark: str = ""
    """Then the last of them is for what the process prints, and this stands before lines of its log."""
    levels: dict[str, Level] = {}
    order: ProfileOrder | None = None
    profile: ReplicaProfile | None = None
    pid: int = 0
    status: int = 0
    """Exit code, or the negative number of the signal."""


def name_of(error: FairleadError) -> str:
    """What `error_of` makes the same kind of error of; a model may have classes of its own."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in vars(errors))


def error_of(name: str, message: str) -> FairleadError:
    """An error of the replica's, here."""
    kind = getattr(errors, name, None)
    return (kind if isinstance(kind, type) and issubclass(kind, FairleadError) else ModelError)(message)


ENCODER = msgspec.msgpack.Encoder()
DECODER = msgspec.msgpack.Decoder(Frame)


def encode_frame(frame: Frame, body: Sequence[Buffer] = ()) -> list[Buffer]:
    """What to write, in order. `body` as `pack` made it. Raises WireError where a bound is exceeded."""
    header = ENCODER.encode(frame)
    num_body_bytes = 0
    for part in body:
        num_body_bytes += len(part)
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(header)} bytes is over the bound of {MAX_HEADER_BYTES}")
    if num_body_bytes > MAX_BODY_BYTES:
        raise WireError(f"tensors of {num_body_bytes} bytes are over the bound of {MAX_BODY_BYTES}")
    return [PREFIX.pack(MAGIC, len(header), num_body_bytes), header, bytes(-len(header) % ALIGNMENT), *body]


def pack(batch: Sequence[Tensors], slab: Slab | None) -> tuple[list[TensorPlace], list[Buffer]]:
    """The rows of all elements of `batch` under one another, in the slab or as parts of a body.

    Rows are copied once; a large tensor that finds no room in the slab is sent from where it lies if it is a
    single one. Raises ValueError for a dtype that has no KServe name.
    """
    places: list[TensorPlace] = []
    body: list[Buffer] = []
    single = len(batch) == 1
    for name, first in batch[0].items():
        datatype = DATATYPES.get(first.dtype) or datatype_of(first)
        if single:
            arrays, shape = [first], first.shape
        else:
            arrays = [tensors[name] for tensors in batch]
            shape = (sum(len(array) for array in arrays), *first.shape[1:])
        if datatype == "BYTES":
            data: np.ndarray | bytes = b"".join([encode_bytes(array) for array in arrays])
            nbytes = len(data)
        else:
            nbytes = sum([array.nbytes for array in arrays])
            data = first
        if nbytes > INLINE_BYTES and slab is not None and (found := slab.ranges.allocate(nbytes)) is not None:
            offset, generation = found
            room = slab.memory[offset : offset + nbytes]
            if isinstance(data, bytes):
                room[:] = np.frombuffer(data, np.uint8)
            elif single:
                room.view(first.dtype).reshape(shape)[...] = first
            else:
                np.concatenate(arrays, out=room.view(first.dtype).reshape(shape))
            places.append(TensorPlace(name, datatype, shape, nbytes, offset, generation))
            continue
        places.append(TensorPlace(name, datatype, shape, nbytes))
        if isinstance(data, bytes):
            body.append(data)
        elif nbytes > INLINE_BYTES:
            whole = first if single else np.concatenate(arrays)
            body.append(np.ascontiguousarray(whole).reshape(-1).view(np.uint8).data)
        else:
            body += [array.tobytes() for array in arrays]
        if padding := -nbytes % ALIGNMENT:
            body.append(bytes(padding))
    return places, body


def unpack(places: list[TensorPlace], body: Buffer, slab: Slab | None, *, copy: bool) -> Tensors:
    """Arrays on the body and on the slab: views, or with `copy` no longer in need of the slab. Raises WireError."""
    tensors: Tensors = {}
    at = 0
    for place in places:
        dtype = DTYPES.get(place.datatype)
        nbytes, shape = place.nbytes, place.shape
        if dtype is None:
            raise WireError(f"unknown datatype {place.datatype!r}")
        if place.offset < 0:
            source, start = memoryview(body), at
            at += nbytes + -nbytes % ALIGNMENT
            if at > len(body):
                raise WireError(f"tensor {place.name!r} ends {at - len(body)} bytes after the body")
        else:
            if slab is None or place.offset + nbytes > slab.memory.size:
                raise WireError(f"tensor {place.name!r} lies outside the slab")
            if place.generation <= slab.received:
                raise WireError(f"tensor {place.name!r} comes from range {place.generation}, but range {slab.received} was seen already")
            slab.received = place.generation
            source, start = slab.memory.data, place.offset
        count = prod(shape)
        try:
            if dtype.kind == "O":
                elements = decode_bytes(source[start : start + nbytes], place.name, count)
                tensors[place.name] = object_array(elements, shape)
                continue
            if count * dtype.itemsize != nbytes:
                raise WireError(f"tensor {place.name!r} of {place.datatype} {list(shape)} cannot have {nbytes} bytes")
            array = np.frombuffer(source, dtype, count, start).reshape(shape) if nbytes else np.empty(shape, dtype)
        except (ValueError, OverflowError, InvalidRequest) as error:
            raise WireError(f"tensor {place.name!r}: {error}") from None
        tensors[place.name] = array.copy() if copy and place.offset >= 0 else array
    if at != len(body):
        raise WireError(f"{len(body) - at} bytes of the body belong to no tensor")
    return tensors


class Receiver:
    """Bytes in, cut anywhere; whole frames out. Knows no socket: read into `buffer()`, then call `received`."""

    def __init__(self) -> None:
        self._small = memoryview(bytearray(BUFFER_BYTES))
        self._buffer = self._small
        self._start = self._end = 0

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._buffer[self._end :]

    def received(self, num: int) -> list[tuple[Frame, Buffer]]:
        """The frames that `num` more bytes complete, each with a body of its own. Raises WireError."""
        self._end += num
        frames: list[tuple[Frame, Buffer]] = []
        while (have := self._end - self._start) >= PREFIX.size:
            magic, num_header_bytes, num_body_bytes = PREFIX.unpack_from(self._buffer, self._start)
            if magic != MAGIC:
                raise WireError(f"expected a frame, got {magic!r}")
            if num_header_bytes > MAX_HEADER_BYTES or num_body_bytes > MAX_BODY_BYTES:
                raise WireError(f"a frame of {num_header_bytes} + {num_body_bytes} bytes is over the bounds")
            body_at = PREFIX.size + num_header_bytes + -num_header_bytes % ALIGNMENT
            size = body_at + num_body_bytes
            if have < size:
                self._make_room(size)
                break
            view = self._buffer[self._start : self._start + size]
            try:
                frame = DECODER.decode(view[PREFIX.size : PREFIX.size + num_header_bytes])
            except (msgspec.MsgspecError, RecursionError) as error:
                raise WireError(f"not a header: {error}") from None
            if self._buffer is self._small:
                frames.append((frame, bytes(view[body_at:])))
                self._start += size
            else:
                frames.append((frame, view[body_at:].toreadonly()))
                self._buffer, self._start, self._end = self._small, 0, 0
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            self._make_room(PREFIX.size)
        return frames

    def _make_room(self, size: int) -> None:
        """For a frame of `size` bytes whose beginning is here."""
        if self._start + size <= len(self._buffer):
            return
        beginning = bytes(self._buffer[self._start : self._end])
        if size > BUFFER_BYTES:
            self._buffer = np.empty(size, np.uint8).data
        self._buffer[: len(beginning)] = beginning
        self._start, self._end = 0, len(beginning)


class Connection(asyncio.BufferedProtocol):
    """One end of the wire in an event loop.

    Writes are not bounded here: both ends have at most one batch, a stream's credit, or an engine's bounded number of
    requests under way.
    """

    def __init__(self, peer: str, on_frame: Callable[[Frame, Buffer], None], on_lost: Callable[[], None]) -> None:
        self.peer = peer
        self.on_frame = on_frame
        """May raise WireError: the peer is hung up on."""
        self.slab: Slab | None = None
        """Where this end allocates: gets back what the peer has freed."""
        self._on_lost = on_lost
        self._receiver = Receiver()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._receiver.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for frame, body in self._receiver.received(nbytes):
                if frame.freed and self.slab is not None:
                    self.slab.ranges.release(frame.freed)
                self.on_frame(frame, body)
        except (WireError, StaleRange) as error:
            log.error("connection closed: malformed frame", peer=self.peer, reason=str(error))
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()

    def send(self, frame: Frame, body: Sequence[Buffer] = ()) -> None:
        """Raises WireError where the frame exceeds a bound."""
        assert self.transport is not None
        parts = encode_frame(frame, body)
        if self.transport.is_closing():
            return
        if sum(map(len, parts)) <= INLINE_BYTES:
            self.transport.write(b"".join(parts))
        else:
            self.transport.writelines(parts)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
