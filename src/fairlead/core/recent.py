"""How many finished requests a server remembers."""

from typing import Annotated

from msgspec import Meta, Struct


class RequestSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keep: Annotated[int, Meta(ge=0, le=100_000)] = 2_000
    """The last ones, whatever their end."""
    failed: Annotated[int, Meta(ge=0, le=100_000)] = 500
    """The last ones that failed through the server's fault."""
    slow: Annotated[int, Meta(ge=0, le=200)] = 20
    """Of each model, the slowest of the last `slow_seconds`."""
    slow_seconds: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
