"""A repository of small models in memory, computed for real by the runtime, for tests of the protocols."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np

from fairlead.api.http_server import HttpServer
from fairlead.backends import Executable
from fairlead.core.errors import InvalidRequest, NotFound
from fairlead.core.request import Request, Sink
from fairlead.core.specs import BatchingSpec, Execution, ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors
from fairlead.core.timeline import Timeline
from fairlead.observe.finished import Finished
from fairlead.runtime.local import LocalInstance
from fairlead.runtime.version import ModelVersion, Ticket


class Function(Executable):
    """A Python function as a model."""

    def __init__(self, function: Callable[[Tensors], Tensors]) -> None:
        self.function = function

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        return self.function(inputs)


class Gate:
    """A model that computes when the test lets it: `entered` tells that it runs, `open` lets it go on."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.open = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, inputs: Tensors) -> Tensors:
        self._loop.call_soon_threadsafe(self.entered.set)
        if not self.open.wait(20):
            raise TimeoutError("the test never opened the gate")
        return {"output": inputs["input"]}


class Models:
    """What of a ModelRepository the protocols' `infer` needs."""

    def __init__(self) -> None:
        self.versions: dict[str, ModelVersion] = {}
        self.submitted: list[Request] = []

    def add(
        self,
        name: str,
        function: Callable[[Tensors], Tensors],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        max_batch_size: int = 64,
        execution: Execution = Execution.INLINE,
        streams: bool = False,
    ) -> ModelVersion:
        spec = ModelSpec(name=name, inputs=inputs, outputs=outputs, batching=BatchingSpec(max_batch_size=max_batch_size), streams=streams)
        version = ModelVersion(spec, "1", "python", [LocalInstance(Function(function), name, execution)])
        self.versions[name] = version
        return version

    def echo(
        self, name: str, datatype: str, item: tuple[int, ...], *, execution: Execution = Execution.INLINE, labels: tuple[str, ...] = ()
    ) -> ModelVersion:
        """A model that answers `output` with its `input`."""
        return self.add(
            name,
            lambda inputs: {"output": inputs["input"]},
            (TensorSpec(name="input", datatype=datatype, shape=(-1, *item)),),
            (TensorSpec(name="output", datatype=datatype, shape=(-1, *item), labels=labels),),
            execution=execution,
        )

    def gate(self, name: str) -> Gate:
        gate = Gate()
        tensor = {"datatype": "FP32", "shape": (-1, -1)}
        self.add(name, gate, (TensorSpec(name="input", **tensor),), (TensorSpec(name="output", **tensor),), execution=Execution.THREAD)
        return gate

    def submit(self, request: Request, sink: Sink) -> Ticket:
        self.submitted.append(request)
        try:
            return self.find(request.model, request.version).submit(request, sink)
        except NotFound as error:
            sink.close(error)
            return _Nothing()

    def find(self, name: str, version: str = "") -> ModelVersion:
        if name not in self.versions:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if version not in ("", "1"):
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        return self.versions[name]


class _Nothing:
    def cancel(self) -> None:
        pass


def explode(inputs: Tensors) -> Tensors:
    raise ZeroDivisionError("division by zero")


def refuse(inputs: Tensors) -> Tensors:
    raise InvalidRequest("the model does not like it")


def inverse(inputs: Tensors) -> Tensors:
    with np.errstate(divide="ignore"):
        return {"output": 1 / inputs["input"]}


def zoo() -> Models:
    """One echo per datatype (named after it in lower case, any row length), and a few with a character of their own."""
    models = Models()
    for datatype in DTYPES:
        models.echo(datatype.lower(), datatype, (-1,))
    models.echo("identity", "FP32", (16,))
    models.echo("classes", "FP32", (3,), labels=("cat", "dog"))
    tensor = {"datatype": "FP32", "shape": (-1, 2)}
    models.add(
        "pair",
        lambda inputs: {"sum": inputs["a"] + inputs["b"], "difference": inputs["a"] - inputs["b"]},
        (TensorSpec(name="a", **tensor), TensorSpec(name="b", **tensor)),
        (TensorSpec(name="sum", **tensor), TensorSpec(name="difference", **tensor)),
    )
    models.add(
        "vector",
        lambda inputs: {"output": inputs["input"] * 2},
        (TensorSpec(name="input", datatype="INT32", shape=(-1,)),),
        (TensorSpec(name="output", datatype="INT32", shape=(-1,)),),
        max_batch_size=0,
    )
    models.add("broken", explode, (TensorSpec(name="input", **tensor),), (TensorSpec(name="output", **tensor),))
    models.add("picky", refuse, (TensorSpec(name="input", **tensor),), (TensorSpec(name="output", **tensor),))
    models.add(
        "inverse",
        inverse,
        (TensorSpec(name="input", **tensor),),
        (TensorSpec(name="output", **tensor),),
    )
    models.add("streaming", explode, (TensorSpec(name="input", **tensor),), (TensorSpec(name="output", **tensor),), streams=True)
    return models


class Lines(Finished):
    """Finished requests as a list of dicts; `wait(n)` until there are so many."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self._more = asyncio.Event()

    def add(self, timeline: Timeline) -> None:
        names = ("request_id", "model", "version", "status", "rows", "error", "outcome", "reason")
        self.lines.append({name: getattr(timeline, name) for name in names} | {"trace": timeline.traceparent, "timeline": timeline})
        self._more.set()

    async def wait(self, count: int) -> list[dict[str, Any]]:
        async with asyncio.timeout(20):
            while len(self.lines) < count:
                self._more.clear()
                await self._more.wait()
        return self.lines


async def echo_app(scope, receive, send) -> None:
    """The ASGI side: answers with method, path and the body's length; `/raise` fails, `/early` does not wait for the body."""
    if scope["path"] == "/raise":
        raise ZeroDivisionError("division by zero")
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = json.dumps({"method": scope["method"], "path": scope["path"], "size": size}).encode()
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        }
    )
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def until(condition: Callable[[], Any]) -> None:
    """What the server's own loop brings about, within a deadline."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(models: Models, app: Any = echo_app, **limits: Any) -> AsyncIterator[HttpServer]:
    server = HttpServer(models, app, Lines(), **limits)
    await server.listen("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.drain(5.0)


class Wire:
    """A raw connection: what is sent is what the test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        """(status, headers by lower-case name, body) of the next response, 100 Continue included."""
        async with asyncio.timeout(20):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *fields = text.rstrip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
            size = 0 if head else int(headers.get("content-length", 0))
            return int(line.split()[1]), headers, await self.reader.readexactly(size)

    async def ended(self) -> bytes:
        """What is left until the server closes."""
        async with asyncio.timeout(20):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


@asynccontextmanager
async def wire(server: HttpServer, **options: Any) -> AsyncIterator[Wire]:
    connection = Wire(*await asyncio.open_connection("127.0.0.1", server.port, **options))
    try:
        yield connection
    finally:
        await connection.close()


def question(values: list[float] | None = None, request_id: str = "") -> bytes:
    """A JSON body for the models of FP32 rows."""
    values = [1.0, 2.0] if values is None else values
    body: dict[str, Any] = {"inputs": [{"name": "input", "shape": [1, len(values)], "datatype": "FP32", "data": values}]}
    if request_id:
        body["id"] = request_id
    return json.dumps(body).encode()


def post(body: bytes, path: str = "/v2/models/fp32/infer", version: str = "1.1", **headers: str) -> bytes:
    """A whole request; header names with _ for -."""
    fields = {"host": "test", "content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = f"POST {path} HTTP/{version}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{head}\r\n".encode("latin-1") + body
