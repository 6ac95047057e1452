"""The contract between a kind of model and the runtime."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from msgspec import Struct

from fairlead.core.specs import Isolation, ModelSpec, TensorSpec
from fairlead.core.tensors import Tensors


class RequestContext(Struct, frozen=True, omit_defaults=True):
    """What a model may know of a request besides its inputs."""

    id: str = ""
    trace: str = ""
    """The W3C traceparent that came with it."""
    parameters: dict[str, Any] = {}
    num_rows: int = 1


requests: ContextVar[tuple[RequestContext, ...]] = ContextVar("requests", default=())
"""In `infer`: the requests of the running batch, in the order of their rows. Empty where none carries anything."""


class Executable(ABC):
    """One loaded artefact, ready to compute. Every instance has its own unless `shareable`."""

    platform: str = ""
    """What `/v2/models/NAME` shows, e.g. `onnxruntime_onnx`."""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    batches: bool = True
    """Whether the first dimension of every input and output is a batch, so that rows can run together."""
    streams: bool = False
    """Whether `infer` yields several responses."""
    shareable: bool = False
    """Whether several threads may call `infer` at once on this one object."""
    example: Tensors | None = None
    """Inputs that work: warm-up and dry run."""

    @abstractmethod
    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Any:
        """Compute `outputs` (None: all) for one batch.

        Returns `Tensors`; an awaitable of them where `infer` is a coroutine function;
        an iterator or async iterator of `Tensors` where `streams`.
        Extra outputs are allowed. Input arrays are read-only and valid only until it returns.
        Any exception fails the batch, not the server; InvalidRequest is shown as the caller's fault.
        """

    def close(self) -> None:  # noqa: B027  # most have nothing to give back
        """Give back what Python's reference counting would not."""


Stream = Iterator[Tensors] | AsyncIterator[Tensors]


class Backend(ABC):
    """Loads artefacts of one kind. Stateless."""

    @abstractmethod
    def load(self, artefact: Path, spec: ModelSpec, threads: int) -> Executable:
        """Load for one instance: `spec.instances.device`, `threads` intra-op threads.

        `spec` is what the operator declared; the executable's inputs and outputs are what the artefact
        tells, with what was declared laid over it. Raises LoadError with one readable sentence; where
        inputs or outputs can neither be detected nor were declared, the sentence shows the lines to write.
        """


class Kind(Struct, frozen=True, kw_only=True):
    """A row of the backends' table: all that can be known of a kind without importing its library."""

    name: str
    module: str
    """Holds `BACKEND`, a Backend."""
    requires: tuple[str, ...]
    """Modules that must be importable."""
    extra: str
    """The extra that installs them: `pip install 'fairlead[EXTRA]'`."""
    isolation: Isolation
    """What `isolation: auto` means for this kind."""
    files: tuple[str, ...]
    """Names or suffixes of its artefacts, by preference."""
    preload: tuple[str, ...] = ()
    """Modules that the fork server imports once for all its processes of this kind."""
