"""What becomes of a job whose try went wrong: a pure decision.

| error | then |
|---|---|
| a limit, a full line; the model is not there any more, or starts again | again when there may be room; that is no try |
| what it needs is away: its server, a classifier, the artifact store | again, later each time, until the tries are used up |
| the replica died | the same: it may have been the job's fault |
| the model's own code failed; the request is wrong; it is filtered | failed at once: it would fail again |
| the runner is stopping | again at once, by another runner; that is no try |
"""

from typing import NamedTuple

from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    Filtered,
    Forbidden,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    QueueFull,
    ReplicaDied,
    Shed,
    ShuttingDown,
    TimeoutExpired,
    Unauthenticated,
    Unavailable,
    Unreachable,
    Unsupported,
)
from fairlead.core.jobs import JobReason

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
LONGEST_LIMIT_SECONDS = 300.0
"""A budget of a month may be raised tomorrow."""
ARTIFACT_STORE = "artifact-store"
"""Reason of the Unreachable that says that results cannot be stored."""


class Again(NamedTuple):
    """Another try."""

    seconds: float
    """From now."""
    counted: bool


class Failed(NamedTuple):
    reason: JobReason


def backoff(tries: int) -> float:
    """Seconds before the next try, after so many."""
    return min(FIRST_SECONDS * 2.0 ** min(max(tries - 1, 0), 60), LONGEST_SECONDS)


def decide(error: FairleadError, *, tries: int, max_tries: int, served: bool, chance: float) -> Again | Failed:
    """`tries`: begun, this one too. `served`: its model can be asked now. `chance` in [0, 1): spreads those that failed together."""
    if isinstance(error, (LimitExceeded, QueueFull, Shed, TimeoutExpired)):
        return Again(_spread(min(max(error.retry_after, FIRST_SECONDS), LONGEST_LIMIT_SECONDS), chance), counted=False)
    if isinstance(error, (ShuttingDown, Cancelled)) or (isinstance(error, (NotFound, Unavailable)) and not served):
        return Again(_spread(FIRST_SECONDS, chance), counted=False)
    if isinstance(error, (Unavailable, ReplicaDied)):
        if tries < max_tries:
            return Again(_spread(max(backoff(tries), getattr(error, "retry_after", 0.0)), chance), counted=True)
        if isinstance(error, ReplicaDied):
            return Failed("replica-died")
        return Failed("storage" if isinstance(error, Unreachable) and error.reason == ARTIFACT_STORE else "unavailable")
    if isinstance(error, Filtered):
        return Failed("moderated-output" if error.answer else "moderated-input")
    if isinstance(error, (Unauthenticated, Forbidden)):
        return Failed("forbidden")
    if isinstance(error, (InvalidRequest, Unsupported, NotFound)):
        return Failed("invalid")
    return Failed("model-error")


def _spread(seconds: float, chance: float) -> float:
    return seconds * (1.0 + 0.25 * chance)
