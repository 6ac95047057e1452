"""What a failure says: about the place, and about whether another one may do better.

| what came | the place | another place | a fallback model |
|---|---|---|---|
| a died replica, a lost upstream, any other `Unavailable`, a status of 5xx | failed | yes | yes |
| `QueueFull`, `ShuttingDown`, a status of 429 | is busy | yes | yes |
| `ModelError`, `NotFound`, a status of 404 | nothing | no | yes |
| `LimitExceeded`, `Shed`, `TimeoutExpired`, `Cancelled` | nothing | no | no |
| any other error, any other status of 4xx | is well | no | no |

This is of failures before the first byte of an answer. After it there is no second try.
"""

from msgspec import Struct

from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    LimitExceeded,
    ModelError,
    NotFound,
    QueueFull,
    ReplicaDied,
    Shed,
    ShuttingDown,
    TimeoutExpired,
    Unavailable,
)


class Verdict(Struct, frozen=True):
    reason: str
    """A label of the metrics."""
    failed: bool = False
    """The place's fault."""
    well: bool = False
    """The place works: it refused what is wrong."""
    retry: bool = False
    fallback: bool = False


DIED = Verdict("replica-died", failed=True, retry=True, fallback=True)
GONE = Verdict("unavailable", failed=True, retry=True, fallback=True)
UPSTREAM_ERROR = Verdict("upstream-error", failed=True, retry=True, fallback=True)
BUSY = Verdict("busy", retry=True, fallback=True)
MODEL_FAILED = Verdict("model-error", fallback=True)
NOT_THERE = Verdict("not-found", fallback=True)
NOT_ITS_FAULT = Verdict("given-up")
REFUSED = Verdict("refused", well=True)


def verdict_of(error: FairleadError) -> Verdict:
    match error:
        case ReplicaDied():
            return DIED
        case ModelError():
            return MODEL_FAILED
        case NotFound():
            return NOT_THERE
        case QueueFull() | ShuttingDown():
            return BUSY
        case LimitExceeded() | Shed() | TimeoutExpired() | Cancelled():
            return NOT_ITS_FAULT
        case Unavailable():
            return GONE
    return REFUSED


def verdict_of_status(status: int) -> Verdict:
    """Of an upstream's answer of 400 or more."""
    if status == 429:
        return BUSY
    if status >= 500:
        return UPSTREAM_ERROR
    return NOT_THERE if status == 404 else REFUSED
