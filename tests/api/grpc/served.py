"""A gRPC port over a repository of small Python models, and those who talk to it."""

import asyncio
import os
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import h2.config
import h2.connection
import h2.events
import numpy as np
from h2.settings import SettingCodes, Settings
from msgspec import Struct
from tritonclient.grpc import service_pb2 as pb

from fairlead.api.grpc.http2 import Limits
from fairlead.api.grpc.server import GrpcServer
from fairlead.core.tensors import DTYPES
from fairlead.core.timeline import Timeline
from fairlead.observe.access import AccessLog
from fairlead.observe.finished import Finished
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import Control, ModelRepository, RepositorySettings

IN_A_THREAD = "instances: {isolation: thread}\n"
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
MODELS = {
    "identity": (
        """
import numpy as np

class Identity:
    example = {"x": np.zeros((1, 4), np.float32)}

    def infer(self, inputs):
        return {"y": inputs["x"]}
""",
        IN_A_THREAD
        + """
inputs: [{name: x, datatype: FP32, shape: [-1, -1]}]
outputs: [{name: y, datatype: FP32, shape: [-1, -1], labels: [ant, bee, cat, dog]}]
""",
    ),
    # Gives back those of its inputs that it gets, one for each datatype; nothing in place of the others.
    "typed": (
        """
import numpy as np
from fairlead.core.tensors import DTYPES

class Typed:
    example = None

    def infer(self, inputs):
        rows = len(next(iter(inputs.values())))
        return {name + "_OUT": inputs.get(name, np.empty((rows, 0), dtype)) for name, dtype in DTYPES.items()}
""",
        IN_A_THREAD
        + "inputs:\n"
        + "".join(f"  - {{name: {name}, datatype: {name}, shape: [-1, -1], optional: true}}\n" for name in DTYPES)
        + "outputs:\n"
        + "".join(f"  - {{name: {name}_OUT, datatype: {name}, shape: [-1, -1]}}\n" for name in DTYPES),
    ),
    "failing": (
        """
import numpy as np

class Failing:
    example = {"x": np.zeros((1, 1), np.float32)}

    def infer(self, inputs):
        if inputs["x"].any():
            raise ValueError("zeros only")
        return {"y": inputs["x"]}
""",
        IN_A_THREAD,
    ),
    # Counts to n, then fails where n is negative; forever where it is 0. Each number comes with `bytes` of ballast.
    # Where `tell` is set it writes into a FIFO, once it is closed, how far it came.
    "count": (
        """
import itertools
import os
import numpy as np

class Count:
    example = {name: np.array([0 if name != "n" else 2], np.int32) for name in ("n", "bytes", "tell")}

    def load(self, context):
        self.closed = context.parameters["closed"]

    def infer(self, inputs):
        n = int(inputs["n"][0])
        i = 0
        try:
            for i in itertools.count() if n == 0 else range(abs(n)):
                yield {"i": np.array([i], np.int32), "ballast": np.zeros(inputs["bytes"][0], np.uint8)}
            if n < 0:
                raise ValueError("no further")
        finally:
            if inputs["tell"][0]:
                with open(self.closed, "w") as fifo:
                    fifo.write(str(i))
""",
        "parameters: {closed: FOLDER/closed}\n",
    ),
    # Answers once its gate is open; zeros pass.
    "gated": (
        """
import numpy as np
from tests.api.grpc.gates import GATES

class Gated:
    example = {"x": np.zeros((1, 1), np.float32)}

    def infer(self, inputs):
        if inputs["x"].any():
            GATES.entered.set()
            if not GATES.opened.wait(20):
                raise TimeoutError("nobody opened the gate")
        return {"y": inputs["x"]}
""",
        "instances: {isolation: thread, execution: thread}\n",
    ),
}


class Lines(Finished):
    """Finished requests that can be waited for."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(AccessLog(None, metrics.responses))
        self.responses = metrics.responses
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def add(self, timeline: Timeline) -> None:
        super().add(timeline)
        self.flush()
        names = ("protocol", "request_id", "model", "version", "status", "seconds", "rows", "error", "outcome", "reason", "path")
        self.queue.put_nowait({name: getattr(timeline, name) for name in names} | {"trace": timeline.traceparent, "timeline": timeline})

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            return await self.queue.get()


class Served(Struct):
    repository: ModelRepository
    server: GrpcServer
    lines: Lines
    folder: Path
    address: str
    channel: grpc.aio.Channel

    async def infer(self, message: "pb.ModelInferRequest | bytes", path: str = INFER, **options: Any) -> Any:
        """A ModelInfer call by grpcio: its response; or raises its error."""
        data = message if isinstance(message, bytes) else message.SerializeToString()
        call = self.channel.unary_unary(path, None, pb.ModelInferResponse.FromString)
        return await call(data, timeout=options.pop("timeout", 20), **options)

    def stream(self, **options: Any) -> "grpc.aio.StreamStreamCall[Any, Any]":
        """A ModelStreamInfer call by grpcio."""
        method = self.channel.stream_stream(STREAM_INFER, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString)
        return method(**options)

    async def counted(self) -> int:
        """How far `count` came; waits until it is closed."""
        async with asyncio.timeout(10):
            return int(await asyncio.to_thread((self.folder / "closed").read_text))

    async def peer(self, **settings: int) -> "Peer":
        """Somebody who speaks HTTP/2 frame by frame."""
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.server.port))
        await peer.greet(settings)
        return peer


@asynccontextmanager
async def served(
    folder: Path,
    *names: str,
    control: Control = Control.NONE,
    limits: Limits | None = None,
    max_message_bytes: int = 64 << 20,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[Served]:
    """The models of MODELS by these names behind a real port."""
    for name in names:
        code, spec = MODELS[name]
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(code)
        (folder / name / "model.yaml").write_text(spec.replace("FOLDER", str(folder)))
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "closed")
    settings = RepositorySettings(
        sources=(str(folder),),
        control=control,
        load=("*",) if control is Control.EXPLICIT else (),
        cache_folder=folder / ".cache",
        drain_timeout=5.0,
    )
    metrics = Metrics()
    repository, lines = ModelRepository(settings, metrics), Lines(metrics)
    server = GrpcServer(repository, lines, max_message_bytes=max_message_bytes, limits=limits)
    await server.listen("127.0.0.1", 0, ssl=ssl_context)
    await repository.start()
    assert not repository.failures()
    address = f"127.0.0.1:{server.port}"
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
    try:
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            yield Served(repository, server, lines, folder, address, channel)
    finally:
        await server.drain(5.0)
        await repository.stop()


class Peer:
    """A client that is in charge of every frame; `h2` checks what the server sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        config = h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.events: list[h2.events.Event] = []
        self.goodbyes: list[Goodbye] = []
        self.tail = b""

    async def greet(self, settings: dict[str, int]) -> None:
        codes = {"initial_window": SettingCodes.INITIAL_WINDOW_SIZE, "max_frame": SettingCodes.MAX_FRAME_SIZE}
        self.h2.local_settings = Settings(client=True, initial_values={codes[name]: value for name, value in settings.items()})
        self.h2.initiate_connection()
        await self.flush()
        await self.wait_for(h2.events.WindowUpdated)

    async def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())
        await self.writer.drain()

    async def send_raw(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        self.writer.write(len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload)
        await self.writer.drain()

    def headers(self, path: str = INFER, **more: str) -> list[tuple[str, str]]:
        head = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test")]
        fields = {"te": "trailers", "content-type": "application/grpc"} | {name.replace("_", "-"): value for name, value in more.items()}
        return head + list(fields.items())

    async def ask(self, message: bytes, path: str = INFER, *, ended: bool = True, **more: str) -> int:
        """Open a stream with one message on it."""
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, self.headers(path, **more))
        data = framed(message)
        await self.flush()
        while data:
            while not (room := min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)):
                await self.read()
            self.h2.send_data(stream, data[:room])
            data = data[room:]
            await self.flush()
        if ended:
            self.h2.end_stream(stream)
            await self.flush()
        return stream

    async def read(self) -> bool:
        """What the server sends next; False at its end."""
        async with asyncio.timeout(10):
            data = await self.reader.read(1 << 16)
        if not data:
            return False
        data = self.tail + data
        at = 0
        while len(data) - at >= 9 and len(data) - at >= (size := 9 + int.from_bytes(data[at : at + 3], "big")):
            frame, at = data[at : at + size], at + size
            if frame[3] == 7:  # h2 takes GOAWAY for the end of everything
                last, code = struct.unpack_from(">II", frame, 9)
                self.goodbyes.append(Goodbye(last, code, frame[17:].decode()))
            else:
                self.events += self.h2.receive_data(frame)
        self.tail = data[at:]
        await self.flush()
        return True

    async def wait_for(self, kind: type, stream: int | None = None) -> Any:
        """The first event of a kind, of one stream if given."""
        while True:
            for event in self.events:
                if isinstance(event, kind) and (stream is None or event.stream_id == stream):
                    return event
            assert await self.read(), f"the server closed the connection; so far: {self.events}"

    async def answer(self, stream: int, *, give_back: bool = True) -> "Answer":
        """Everything on a stream up to its end."""
        seen = 0
        body, heads = b"", []
        while True:
            while seen < len(self.events):
                event = self.events[seen]
                seen += 1
                if getattr(event, "stream_id", None) != stream:
                    continue
                if isinstance(event, h2.events.DataReceived):
                    body += event.data
                    if give_back and event.flow_controlled_length:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, stream)
                        await self.flush()
                elif isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                    heads.append(dict(event.headers))
                elif isinstance(event, h2.events.StreamReset):
                    return Answer(heads, body, int(event.error_code))
                elif isinstance(event, h2.events.StreamEnded):
                    return Answer(heads, body, None)
            assert await self.read(), "the server closed the connection"

    async def goodbye(self) -> "Goodbye":
        """How the server ends the connection."""
        while not self.goodbyes:
            assert await self.read(), "the server closed the connection"
        return self.goodbyes[-1]

    async def closed(self) -> None:
        while await self.read():
            pass

    def close(self) -> None:
        self.writer.close()


class Goodbye(Struct):
    last_stream: int
    code: int
    reason: str


class Answer(Struct):
    heads: list[dict[str, str]]
    body: bytes
    reset: int | None

    @property
    def status(self) -> str:
        return self.heads[-1]["grpc-status"]

    @property
    def message(self) -> str:
        return self.heads[-1]["grpc-message"]

    @property
    def response(self) -> "pb.ModelInferResponse":
        flag, size = struct.unpack_from(">BI", self.body)
        assert (flag, size) == (0, len(self.body) - 5)
        return pb.ModelInferResponse.FromString(self.body[5:])


def framed(message: bytes, flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(message)) + message


def request(
    model: str, *, id: str = "", version: str = "", parameters: dict[str, Any] | None = None, **inputs: np.ndarray
) -> "pb.ModelInferRequest":
    """A ModelInferRequest with raw contents."""
    message = pb.ModelInferRequest(model_name=model, id=id, model_version=version)
    for name, array in inputs.items():
        datatype = next(datatype for datatype, dtype in DTYPES.items() if dtype == array.dtype)
        message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    for name, value in (parameters or {}).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    return message


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


def count(n: int, *, ballast: int = 0, tell: bool = False, **more: Any) -> "pb.ModelInferRequest":
    numbers = {"n": n, "bytes": ballast, "tell": int(tell)}
    return request("count", **{name: np.array([value], np.int32) for name, value in numbers.items()}, **more)


def only(response: "pb.ModelInferResponse", dtype: Any = np.float32) -> list[Any]:
    """The values of a response's one output."""
    (raw,) = response.raw_output_contents
    return np.frombuffer(raw, dtype).tolist()
