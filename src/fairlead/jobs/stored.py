"""Requests and results in the form that the store keeps."""

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct, structs

from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, QueueFull, Unavailable
from fairlead.core.generation import Delta, Prompt, Usage
from fairlead.core.jobs import Artifact, JobResult, PackedTensor
from fairlead.core.request import Raw, Request, Response
from fairlead.core.tensors import DTYPES, Tensors, datatype_of, decode_bytes, encode_bytes, object_array


class StoredRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a Request asks, without who asks it: that stands in the job's own row."""

    model: str
    version: str = ""
    prompt: Prompt | None = None
    inputs: tuple[PackedTensor, ...] = ()
    raw: dict[str, Any] | None = None
    outputs: tuple[str, ...] | None = None
    parameters: dict[str, Any] = {}
    qos_class: str = ""
    session: str = ""
    signed_by: str = ""
    priority: int = 0
    trace: str = ""


class _Traced(Struct, frozen=True):
    trace: str = ""


ENCODER = msgspec.msgpack.Encoder()
DECODER = msgspec.msgpack.Decoder(StoredRequest)
TRACE_DECODER = msgspec.msgpack.Decoder(_Traced)


def pack(request: Request, trace: str = "") -> bytes:
    """`trace`: the W3C traceparent of what submitted it."""
    raw = request.raw
    return ENCODER.encode(
        StoredRequest(
            model=request.model,
            version=request.version,
            prompt=request.prompt,
            inputs=packed(request.inputs),
            raw=None if raw is None else {**structs.asdict(raw), "body": bytes(raw.body)},
            outputs=request.outputs,
            parameters=request.parameters,
            qos_class=request.qos_class,
            session=request.session,
            signed_by=request.signed_by,
            priority=request.priority,
            trace=trace,
        )
    )


def trace_of(data: bytes) -> str:
    """Without reading the rest."""
    return TRACE_DECODER.decode(data).trace


def unpack(data: bytes) -> Request:
    stored = DECODER.decode(data)
    return Request(
        model=stored.model,
        version=stored.version,
        prompt=stored.prompt,
        inputs=unpacked(stored.inputs),
        raw=None if stored.raw is None else Raw(**stored.raw),
        outputs=stored.outputs,
        parameters=stored.parameters,
        qos_class=stored.qos_class,
        session=stored.session,
        signed_by=stored.signed_by,
        priority=stored.priority,
        trace=stored.trace,
    )


def packed(tensors: Tensors) -> tuple[PackedTensor, ...]:
    return tuple(
        PackedTensor(name, datatype_of(array), array.shape, encode_bytes(array) if array.dtype.kind == "O" else array.tobytes())
        for name, array in tensors.items()
    )


def unpacked(tensors: Iterable[PackedTensor]) -> Tensors:
    return {each.name: _array(each) for each in tensors}


def _array(tensor: PackedTensor) -> np.ndarray:
    if tensor.datatype == "BYTES":
        return object_array(decode_bytes(memoryview(tensor.data), tensor.name), tensor.shape)
    return np.frombuffer(tensor.data, DTYPES[tensor.datatype]).reshape(tensor.shape)


class Collected:
    """The responses to one request, as they come, towards its result."""

    def __init__(self) -> None:
        self.choices: dict[int, Delta] = {}
        self.artifacts: dict[int, Artifact] = {}
        self.outputs: tuple[PackedTensor, ...] = ()
        self.raw = b""
        self.status = 200
        """Of another server's answer."""
        self.parameters: dict[str, Any] = {}
        self.usage: Usage | None = None
        self.version = ""

    def take(self, response: Response) -> None:
        """All but pictures, which become artifacts first. Raises ModelError."""
        self.version = response.version
        self.usage = response.usage or self.usage
        self.parameters.update(response.parameters)
        if response.raw is not None:
            self.status = response.status
            self.raw += response.raw
        elif response.delta is None:
            if self.outputs:
                raise ModelError(f"model '{response.model}' answers with several responses, which a job does not keep")
            self.outputs = packed(response.outputs)
        else:
            delta = response.delta
            self.usage = delta.usage or self.usage
            if delta.progress is None and delta.picture is None:
                self.choices[delta.index] = delta

    def result(self) -> JobResult:
        """Raises FairleadError where another server's answer is an error."""
        if self.status >= 400:
            raise refusal(self.status, self.raw)
        return JobResult(
            artifacts=tuple(self.artifacts[index] for index in sorted(self.artifacts)),
            choices=tuple(self.choices[index] for index in sorted(self.choices)),
            outputs=self.outputs,
            raw=self.raw,
            parameters=self.parameters,
            usage=self.usage,
            version=self.version,
        )


def refusal(status: int, body: bytes) -> FairleadError:
    """Another server's error as one of ours: whether another try may do better is what matters."""
    message = f"the model's server answers {status}: {body[:1000].decode('utf-8', 'replace')}"
    if status == 429:
        return QueueFull(message)
    if status in {502, 503, 504}:
        return Unavailable(message)
    return ModelError(message) if status >= 500 else InvalidRequest(message)
