"""Who looks on while a request is answered, without a say in it."""

from typing import TYPE_CHECKING, Protocol

from fairlead.core.errors import FairleadError
from fairlead.core.request import Request, Response, Sink

if TYPE_CHECKING:
    from fairlead.gateway.routing.trip import Trip


class Onlooker:
    """Looks at one request: a sink before its caller's. Its caller always comes first. Nothing here may raise."""

    __slots__ = ("sink",)

    sink: Sink
    """Set before anything comes, unless the responses go by an iterator."""

    def respond(self, response: Response) -> None:
        self.sink.respond(response)
        self.saw(response)

    def close(self, error: FairleadError | None) -> None:
        self.sink.close(error)
        self.ended(error)

    def saw(self, response: Response) -> None:
        """Before its caller reads it, of an iterator."""
        raise NotImplementedError

    def ended(self, error: FairleadError | None) -> None:
        raise NotImplementedError


class Look(Protocol):
    """Looks at the requests of one model that name no version."""

    def begin(self, request: Request, version: str, trip: "Trip | None") -> Onlooker | None:
        """`version`: that which traffic gave it, or the default. `trip`: None where there is only one place to ask. Returns None for
        a request that is not looked at."""
