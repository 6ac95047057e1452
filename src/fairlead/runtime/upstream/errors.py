"""What goes wrong with another server, told so that the router knows whether a second try makes sense.

UpstreamGone and UpstreamFull come before anything was passed on: another place may be tried. UpstreamCut comes after: never.
What the server itself answers, 429 and 5xx too, is no exception but a Response with that status.
"""

from fairlead.core.errors import QueueFull, ReplicaDied, Unavailable


class UpstreamGone(Unavailable):
    """No answer: not reachable, hung up, silent for too long, no HTTP, or not ours to use."""

    reason = "upstream-gone"

    def __init__(self, message: str, detail: str = "") -> None:
        """`detail` is for the operator, who may read the upstream's address."""
        super().__init__(message)
        self.detail = detail or message


class UpstreamFull(QueueFull):
    """As many requests are under way there as `max_in_flight` allows."""

    reason = "upstream-full"


class UpstreamCut(ReplicaDied):
    """The answer broke off after some of it had been passed on."""
