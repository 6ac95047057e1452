"""One table: what each kind of error is called in HTTP and in gRPC; and what has no kind."""

import math
from enum import IntEnum

from fairlead.core import errors
from fairlead.gateway.reuse.response_cache import NotStored


class GrpcStatus(IntEnum):
    """https://grpc.github.io/grpc/core/md_doc_statuscodes.html"""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class LongHead(errors.InvalidRequest):
    """Request line and headers are longer than what is read of them."""


class LateRequest(errors.InvalidRequest):
    """It does not come to its end in time."""


STATUS: dict[type[errors.FairleadError], tuple[int, GrpcStatus]] = {
    errors.TooLarge: (413, GrpcStatus.RESOURCE_EXHAUSTED),
    LongHead: (431, GrpcStatus.RESOURCE_EXHAUSTED),
    LateRequest: (408, GrpcStatus.DEADLINE_EXCEEDED),
    errors.InvalidRequest: (400, GrpcStatus.INVALID_ARGUMENT),
    errors.Filtered: (400, GrpcStatus.INVALID_ARGUMENT),
    errors.Unauthenticated: (401, GrpcStatus.UNAUTHENTICATED),
    errors.Forbidden: (403, GrpcStatus.PERMISSION_DENIED),
    errors.NotFound: (404, GrpcStatus.NOT_FOUND),
    errors.Unsupported: (501, GrpcStatus.UNIMPLEMENTED),
    NotStored: (504, GrpcStatus.UNAVAILABLE),
    errors.LimitExceeded: (429, GrpcStatus.RESOURCE_EXHAUSTED),
    errors.Shed: (429, GrpcStatus.RESOURCE_EXHAUSTED),
    errors.Unavailable: (503, GrpcStatus.UNAVAILABLE),
    errors.Cancelled: (400, GrpcStatus.CANCELLED),
    errors.ModelError: (500, GrpcStatus.INTERNAL),
    errors.ConfigError: (400, GrpcStatus.INVALID_ARGUMENT),
    errors.FairleadError: (500, GrpcStatus.INTERNAL),
}

CLIENT_LEFT = 499
"""What HTTP's access log says where nobody waited for the answer."""
INTERNAL = errors.ModelError("internal error")
"""All that a caller reads of a bug of ours."""


ENDS: dict[int, tuple[str, str]] = {
    401: ("refused", "unauthenticated"),
    403: ("refused", "forbidden"),
    404: ("refused", "not-found"),
    405: ("refused", "not-found"),
    429: ("refused", "unavailable"),
    CLIENT_LEFT: ("cancelled", "cancelled"),
    501: ("refused", "unsupported"),
    503: ("refused", "unavailable"),
    529: ("refused", "unavailable"),
}
GRPC_ENDS: dict[int, tuple[str, str]] = {
    GrpcStatus.OK: ("success", ""),
    GrpcStatus.CANCELLED: ("cancelled", "cancelled"),
    GrpcStatus.DEADLINE_EXCEEDED: ("cancelled", "deadline"),
    GrpcStatus.NOT_FOUND: ("refused", "not-found"),
    GrpcStatus.PERMISSION_DENIED: ("refused", "forbidden"),
    GrpcStatus.UNAUTHENTICATED: ("refused", "unauthenticated"),
    GrpcStatus.UNIMPLEMENTED: ("refused", "unsupported"),
    GrpcStatus.UNAVAILABLE: ("refused", "unavailable"),
    GrpcStatus.INVALID_ARGUMENT: ("refused", "invalid-request"),
    GrpcStatus.RESOURCE_EXHAUSTED: ("refused", "invalid-request"),
}


def end_of(status: int) -> tuple[str, str]:
    """(outcome, reason) of an HTTP answer, where nothing more is known of it."""
    if status < 400:
        return "success", ""
    return ENDS.get(status) or (("refused", "invalid-request") if status < 500 else ("failure", "model-error"))


def grpc_end_of(status: int) -> tuple[str, str]:
    return GRPC_ENDS.get(status, ("failure", "model-error"))


def _entry(error: errors.FairleadError) -> tuple[int, GrpcStatus]:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def told(error: errors.FairleadError) -> dict[str, str]:
    """What the answer's head says of an error."""
    headers = dict(error.headers)
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
        headers["X-Fairlead-Reason"] = error.reason
    return headers


def http_status(error: errors.FairleadError) -> int:
    return _entry(error)[0]


def grpc_status(error: errors.FairleadError) -> GrpcStatus:
    return _entry(error)[1]
