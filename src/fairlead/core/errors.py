"""Everything that Fairlead tells a user went wrong.

FairleadError
├── InvalidRequest          the caller's input is wrong
│   ├── TooLarge            ... because it exceeds a size limit
│   └── ContextExceeded     ... because prompt and answer are longer than the model's context
├── NotFound                no such model, version or route
├── Unsupported             a valid wish that this server does not grant
├── Unavailable             not now: worth a retry
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


class FairleadError(Exception):
    """The root; `message` is safe to show to the caller."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


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


class Unavailable(FairleadError):
    retry_after = 1.0
    """Seconds after which a retry may succeed."""


class QueueFull(Unavailable):
    pass


class TimeoutExpired(Unavailable):
    pass


class ShuttingDown(Unavailable):
    pass


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
