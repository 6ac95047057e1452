"""How requests end: in one word, and in HTTP's numbers."""

from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    Filtered,
    Forbidden,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    ReplicaDied,
    Shed,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from fairlead.gateway.reuse.response_cache import NotStored

REASONS: dict[type[FairleadError], str] = {
    Filtered: "filtered",
    Unauthenticated: "unauthenticated",
    Forbidden: "forbidden",
    NotFound: "not-found",
    NotStored: "not-stored",
    InvalidRequest: "invalid-request",
    Unsupported: "unsupported",
}

CALLERS_FAULT = tuple(REASONS)

STATUSES: dict[type[FairleadError], int] = {
    Cancelled: 499,
    Unauthenticated: 401,
    Forbidden: 403,
    NotFound: 404,
    NotStored: 504,
    InvalidRequest: 400,
    Filtered: 400,
    Unsupported: 501,
    LimitExceeded: 429,
    Shed: 429,
    Unavailable: 503,
}


def ended(error: FairleadError | None) -> tuple[str, str]:
    """(outcome, reason) of a request that ended so."""
    if error is None:
        return "success", ""
    if isinstance(error, Cancelled):
        return "cancelled", "cancelled"
    for kind, reason in REASONS.items():
        if isinstance(error, kind):
            return "refused", reason
    if isinstance(error, Unavailable):
        return "refused", error.reason
    return "failure", "replica-died" if isinstance(error, ReplicaDied) else "model-error"


def status_of(error: FairleadError | None) -> int:
    """The kind of end, in HTTP's numbers, whatever the protocol."""
    if error is None:
        return 200
    for kind, status in STATUSES.items():
        if isinstance(error, kind):
            return status
    return 500
