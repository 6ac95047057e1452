"""What an archive holds, and who gives it."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from msgspec import Struct


class Span(NamedTuple):
    """Seconds since 1970."""

    begin: float
    end: float


class Happening(Struct, frozen=True):
    """Something that people should see in the post-mortem's timeline."""

    time: float
    text: str
    change: bool = False
    """Somebody, or something, changed how the service is: what came before is worth a look."""


class Rows(Struct, frozen=True):
    """A table that the post-mortem shows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Exhibit(Struct, frozen=True):
    """One file of the archive."""

    content: Any
    """bytes and str as they are, else JSON."""
    happenings: tuple[Happening, ...] = ()
    shown: Rows | None = None


Provider = Callable[[Span], Awaitable[Exhibit]]
Providers = Mapping[str, Provider]
"""By the name of the file."""
