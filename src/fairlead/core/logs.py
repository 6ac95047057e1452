"""`logs:` of `fairlead.yaml`."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Level = Literal["debug", "info", "warning", "error"]
Levels = dict[str, Level]
"""By room: `gateway` stands for `gateway.limits`, too, `fairlead` for all rooms of ours; other libraries are known by their name."""


class Bodies(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts of requests and answers in the log: of a sample, and of nobody as long as `share` is 0."""

    share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Of the finished requests."""
    models: tuple[str, ...] = ()
    """Of these; none named: of all."""
    max_bytes: Annotated[int, Meta(ge=1, le=1 << 20)] = 4096
    """Of each question, and of each answer."""


class Logs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Level = "info"
    levels: Levels = {}
    """Of single rooms."""
    format: Literal["auto", "json", "console"] = "auto"
    requests: bool = True
    """One line per finished request."""
    texts: bool = False
    """Prompts and other texts stand in lines as they are. Secrets never do."""
    bodies: Bodies = Bodies()
