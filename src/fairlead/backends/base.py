"""The contract between a kind of model and the runtime."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Protocol

from msgspec import Struct

from fairlead.core.errors import FairleadError
from fairlead.core.generation import Delta, EngineInfo, EngineStats, KvShare, Prompt
from fairlead.core.specs import DiffusionSpec, Isolation, LlmSpec, ModelSpec, TensorSpec
from fairlead.core.tensors import Tensors


class RequestContext(Struct, frozen=True, omit_defaults=True):
    """What a model may know of a request besides its inputs."""

    id: str = ""
    trace: str = ""
    """A W3C traceparent: of what is computed here, or where nothing is traced, the one that came with it."""
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


Deliver = Callable[[list[tuple[int, Delta | FairleadError]]], None]
"""Takes what one step produced: (work, piece of its answer, or what it failed with). Called from the engine's thread."""


class Engine(Protocol):
    """A loaded model with a loop of its own over the sequences of many requests (continuous batching).

    All methods but `run` are called from the replica's event loop; `run` has a thread to itself. A work is a number that
    the caller chose for one request; it ends with a Delta that carries `usage`, or with an error, exactly once, unless it
    was cancelled.
    """

    info: EngineInfo

    def submit(self, work: int, prompt: Prompt, *, priority: int, arrived: float, deadline: float) -> None:
        """Queue a request; whatever is wrong with it is delivered as its error. Times are of `time.perf_counter`;
        it is given up with TimeoutExpired if it has not started by `deadline` (0: never)."""

    def cancel(self, work: int) -> None:
        """Nothing more is delivered for it, its memory is free after the running step."""

    def run(self, deliver: Deliver) -> None:
        """Compute steps until `close`; wait without computing while there is no work."""

    def stats(self) -> EngineStats: ...

    def step_seconds(self) -> float:
        """How long the running step takes already; 0 between steps."""

    def between_steps(self, work: Callable[[], None]) -> None:
        """Have this done in the thread that computes, before its next step."""

    def sleep(self) -> None:
        """In the thread that computes, where no work is: give KV memory back with all that is cached, and move weights of a CUDA
        device to the host. Asked only of one whose `info` tells of KV blocks."""

    def wake(self) -> None:
        """In the thread that computes: undo that. Raises what the device does where its memory is not there."""

    def close(self) -> None:
        """Make `run` return after its step; requests that are left get ShuttingDown."""


class EngineBackend(ABC):
    """Loads engines of one kind. Stateless."""

    @abstractmethod
    def load_engine(self, artefact: Path, spec: ModelSpec, threads: int, version: str = "", kv: KvShare | None = None) -> Engine:
        """`artefact`: the checkpoint's folder; `version`: as the model's answers name it; `kv`: the KV memory that it may take (None: by
        what is free). Raises LoadError with one readable sentence that names the file."""


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
    engine: bool = False
    """It generates: its backend has `load_engine`, and its requests carry a prompt, not tensors."""
    section: Literal["llm", "diffusion"] = "llm"
    """Of model.yaml, which bounds its engine."""
    external: bool = False
    """Somebody else's engine: a row of `backends.external` says how it is started, and nothing is imported."""
    parameters: bool = False
    """It reads `parameters` of model.yaml."""
    preload: tuple[str, ...] = ()
    """Modules that the fork server imports once for all its processes of this kind."""

    def bounds(self, spec: ModelSpec) -> LlmSpec | DiffusionSpec:
        """`max_num_seqs`, `max_waiting` and `step_timeout` of its engine."""
        return spec.diffusion if self.section == "diffusion" else spec.llm
