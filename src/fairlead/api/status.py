"""One table: what each kind of error is called in HTTP and in gRPC; and what has no kind."""

from enum import IntEnum

from fairlead.core import errors


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


STATUS: dict[type[errors.FairleadError], tuple[int, GrpcStatus]] = {
    errors.TooLarge: (413, GrpcStatus.RESOURCE_EXHAUSTED),
    errors.InvalidRequest: (400, GrpcStatus.INVALID_ARGUMENT),
    errors.NotFound: (404, GrpcStatus.NOT_FOUND),
    errors.Unsupported: (501, GrpcStatus.UNIMPLEMENTED),
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


def _entry(error: errors.FairleadError) -> tuple[int, GrpcStatus]:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def http_status(error: errors.FairleadError) -> int:
    return _entry(error)[0]


def grpc_status(error: errors.FairleadError) -> GrpcStatus:
    return _entry(error)[1]
