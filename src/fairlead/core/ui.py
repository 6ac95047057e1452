"""The dashboard: who may look at it, and for how long."""

from typing import Annotated

from msgspec import Meta, Struct


class UiSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: bool = True
    """At /ui on the ops port."""
    session_hours: Annotated[float, Meta(gt=0, le=24 * 30)] = 12.0
    """After which one has to log in again."""
    idle_minutes: Annotated[float, Meta(gt=0, le=24 * 60)] = 60.0
    """Without a request, after which a session ends."""
    max_sessions: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """The one that was idle for the longest ends where there would be more."""
    max_viewers: Annotated[int, Meta(ge=1, le=10_000)] = 50
    """Tabs that get live numbers at once."""
