"""Everything that Fairlead tells a user went wrong.

FairleadError
├── InvalidRequest          the caller's input is wrong
│   ├── TooLarge            ... because it exceeds a size limit
│   └── ContextExceeded     ... because prompt and answer are longer than the model's context
├── Filtered                a text of the request, or of its answer, that a filter blocks
├── Unauthenticated         no credentials, or ones that prove nothing
├── Forbidden               the caller is known and may not do that
├── NotFound                no such model, version or route
├── Unsupported             a valid wish that this server does not grant
├── Unavailable             not now: worth a retry
│   ├── LimitExceeded       a limit of the tenant, project, key or model
│   ├── Shed                there are too many requests, and this one is not among those that are served
│   ├── Unreachable         what the server depends on does not answer
│   ├── QueueFull           the model's waiting line is at its bound
│   ├── TimeoutExpired      the request waited longer than it was allowed to
│   └── ShuttingDown        the server or the version is draining
├── Cancelled               the caller left, or asked to stop
├── ModelError              the model's own code failed on this request
│   └── ReplicaDied         the process that computed it is gone
└── ConfigError             a file or option of the operator's is wrong
    └── LoadError           an artefact cannot be loaded

Protocols translate these in one table, `fairlead.api.status`.
"""

from collections.abc import Mapping
from typing import Self


class FairleadError(Exception):
    """The root; `message` is safe to show to the caller."""

    headers: Mapping[str, str] = {}
    """What else the caller is told: rate limits, challenges."""

    def __init__(self, message: str) -> None:
        message = encodable(message)
        super().__init__(message)
        self.message = message

    def saying(self, message: str) -> Self:
        """The same error in other words."""
        message = encodable(message)
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.message = message
        other.args = (message,)
        return other


def encodable(text: str) -> str:
    """Without half characters, such as names of files hold that are not UTF-8: nothing that is sent or logged can."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class InvalidRequest(FairleadError):
    pass


class TooLarge(InvalidRequest):
    pass


class ContextExceeded(InvalidRequest):
    pass


class NotFound(FairleadError):
    pass


class Unsupported(FairleadError):
    pass


class Filtered(FairleadError):
    """`rule` names what it hit, never the text. `answer`: that was the answer, and not the request."""

    def __init__(self, message: str, rule: str, *, answer: bool = False) -> None:
        super().__init__(message)
        self.rule = rule
        self.answer = answer


class Unauthenticated(FairleadError):
    headers = {"WWW-Authenticate": 'Bearer realm="fairlead"'}


class Forbidden(FairleadError):
    pass


class Unavailable(FairleadError):
    retry_after = 1.0
    """Seconds after which a retry may succeed."""
    reason = "unavailable"
    """Why, in one word of the table in docs/gateway.md: a header of the answer and a label of the metrics."""


class LimitExceeded(Unavailable):
    def __init__(self, message: str, *, reason: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class Shed(Unavailable):
    def __init__(self, message: str, *, reason: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class Unreachable(Unavailable):
    """What this depends on does not answer."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class QueueFull(Unavailable):
    reason = "queue-full"


class TimeoutExpired(Unavailable):
    reason = "queue-timeout"


class ShuttingDown(Unavailable):
    reason = "draining"


class Cancelled(FairleadError):
    pass


class ModelError(FairleadError):
    pass


class ReplicaDied(ModelError):
    pass


class ConfigError(FairleadError):
    pass


class LoadError(ConfigError):
    pass
