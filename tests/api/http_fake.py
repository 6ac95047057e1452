"""A repository of small models in memory, computed for real by the runtime, for tests of the protocols."""

import asyncio
import threading
from collections.abc import Callable

import numpy as np

from fairlead.backends import Executable
from fairlead.core.errors import InvalidRequest, NotFound
from fairlead.core.request import Request, Sink
from fairlead.core.specs import BatchingSpec, Execution, ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors
from fairlead.observe.metrics import Metrics
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
        version = ModelVersion(spec, "1", "python", [LocalInstance(Function(function), name, execution)], Metrics())
        self.versions[name] = version
        return version

    def echo(self, name: str, datatype: str, item: tuple[int, ...], *, execution: Execution = Execution.INLINE, labels: tuple[str, ...] = ()) -> ModelVersion:
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
        lambda inputs: {"output": 1 / inputs["input"]} if np.geterr() else {},
        (TensorSpec(name="input", **tensor),),
        (TensorSpec(name="output", **tensor),),
    )
    models.add("streaming", explode, (TensorSpec(name="input", **tensor),), (TensorSpec(name="output", **tensor),), streams=True)
    return models
