"""What goes down through the rooms, and what comes back up."""

from typing import Any, Protocol

from msgspec import Struct, field

from fairlead.core.errors import FairleadError
from fairlead.core.generation import Delta, Prompt
from fairlead.core.tensors import Tensors


class Request(Struct, kw_only=True):
    """One question to one model.

    Times are seconds on the monotonic clock (`time.perf_counter`).
    """

    model: str
    inputs: Tensors = field(default_factory=dict)
    prompt: Prompt | None = None
    """In place of `inputs`, for models that generate or embed."""
    id: str = ""
    """The caller's id, echoed in the answer; "" when it gave none."""
    version: str = ""
    """"" for the one that the version policy makes the default."""
    outputs: tuple[str, ...] | None = None
    """Names of the outputs wanted; None for all."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the model itself may read; the ones with a meaning of their own are fields here."""
    priority: int = 0
    """1 is the highest level, 0 the model's default."""
    timeout: float = 0.0
    """Seconds that it may wait for its turn; 0 for the model's default."""
    trace: str = ""
    """The W3C traceparent that came with it."""
    arrived: float = 0.0
    num_rows: int = 1
    """Length of the batch dimension; set by the check against the model's spec."""


class Response(Struct, kw_only=True):
    """One answer of one or more."""

    model: str
    version: str
    outputs: Tensors = field(default_factory=dict)
    delta: Delta | None = None
    """In place of `outputs`: a piece of the answer to a `prompt`."""
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Where the answers to one request go: `respond` any number of times, then `close` exactly once.

    Called from the event loop only. Neither may raise.
    """

    def respond(self, response: Response) -> None: ...

    def close(self, error: FairleadError | None) -> None:
        """No more answers: all went well (None), or this went wrong."""
