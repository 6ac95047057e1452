"""Execution slots: where a batch computes."""

from collections.abc import Callable, Sequence
from typing import Protocol

from fairlead.core.errors import FairleadError
from fairlead.core.request import Request
from fairlead.core.tensors import Tensors

Done = Callable[[Tensors | None, FairleadError | None], None]
"""Takes a batch's outputs, or what went wrong. Called once, from the event loop."""


class Stream(Protocol):
    """The consumer of a streaming request's responses. Called from the event loop only."""

    def respond(self, outputs: Tensors) -> None: ...

    def close(self, error: FairleadError | None) -> None: ...


class Instance(Protocol):
    """One execution slot of a loaded version; runs one batch, or one stream, at a time.

    All methods are called from the event loop. Streams have credit: an instance may be `credit` responses
    ahead of the consumer, which gives more with `grant`.
    """

    ready: bool
    """False while its process is being started again."""
    down: str
    """Why its process cannot be started again; "" while nothing failed."""
    restarts: int
    gather_seconds: float
    """Time that the last batch took to be put together ..."""
    compute_seconds: float
    """... and to be computed by the model."""

    def run(self, inputs: list[Tensors], outputs: frozenset[str] | None, done: Done, requests: Sequence[Request]) -> None:
        """Compute one batch: the rows of all `inputs` together, in order (one element: as it is).

        `requests`: those that they belong to, for models that look at more than inputs.
        """

    def stream(self, request: Request, stream: Stream, credit: int) -> None:
        """Compute one request that may have many responses."""

    def grant(self, credit: int) -> None:
        """The consumer of the running stream has room for so many more."""

    def cancel(self) -> None:
        """Stop the running stream if there is one: its `close` is still called. Batches run to their end."""

    async def close(self) -> None:
        """Finish or fail what runs, release everything."""
