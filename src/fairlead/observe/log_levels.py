"""Which lines of which room are written. A pure table: time is an argument."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping

from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.core.logs import Level, Levels

OURS = "fairlead"
ROOMS = {
    "fairlead": "all of ours; its own lines are those of the server as a whole",
    "alerts": "alerts that were sent",
    "api": "the doors' routes: what failed in them",
    "configuration": "policies: read, changed, refused",
    "control": "rollouts, deployments, validation",
    "diffusion": "engines that make pictures",
    "engine": "threads of engines",
    "gateway": "limits, lines, filters, upstreams",
    "grpc": "the gRPC door",
    "http": "the HTTP door",
    "identity": "keys and tokens",
    "incidents": "what was kept of an incident",
    "jobs": "jobs, their runners and files",
    "kernels": "compiled kernels of language models",
    "llm": "engines of language models",
    "observe": "metrics, traces, objectives, and this",
    "registry": "models and versions",
    "replica": "processes that compute; `replica.printed` is what their models print",
    "repository": "loading and unloading",
    "routing": "versions, places, retries",
    "runtime": "instances, batches, the fork server",
    "slo": "objectives",
    "traces": "spans, and where they go",
    "webhooks": "deliveries",
}
"""Other libraries' rooms are their loggers' names: `uvicorn`, `sqlalchemy.engine`."""


class RoomLevels:
    """The longest name decides: `gateway.limits`, then `gateway`, then `fairlead`, then the default."""

    def __init__(self, default: Level = "info", levels: Mapping[str, Level] | None = None) -> None:
        self.default: Level = default
        self.lasting: Levels = {room_of(name): level for name, level in (levels or {}).items()}
        self.passing: dict[str, tuple[Level, float]] = {}
        """Level, and until when."""

    def set(self, changes: Mapping[str, Level | None], *, until: float | None = None) -> None:
        """None: as if nothing had been said of the room. `until`: then it is what it was. Raises InvalidRequest for a room that is none."""
        for name in changes:
            check_room(name)
        for name, level in changes.items():
            room = room_of(name)
            self.passing.pop(room, None)
            if level is None:
                self.lasting.pop(room, None)
            elif until is None:
                self.lasting[room] = level
            else:
                self.passing[room] = level, until

    def expire(self, now: float) -> list[str]:
        """The rooms whose time is over."""
        over = [room for room, (_, until) in self.passing.items() if until <= now]
        for room in over:
            del self.passing[room]
        return over

    @property
    def next_expiry(self) -> float | None:
        return min((until for _, until in self.passing.values()), default=None)

    def said(self) -> Levels:
        """What holds now, by room."""
        return {**self.lasting, **{room: level for room, (level, _) in self.passing.items()}}

    def of(self, room: str) -> Level:
        said = self.said()
        return next((said[name] for name in _above(room) if name in said), said.get(OURS, self.default))


def number_of(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def room_of(logger: str) -> str:
    """`fairlead.gateway` is the gateway."""
    return logger.removeprefix(f"{OURS}.")


def check_room(name: str) -> None:
    """Raises InvalidRequest."""
    top = room_of(name).partition(".")[0]
    try:
        known = top in ROOMS or name in logging.root.manager.loggerDict or (bool(top) and importlib.util.find_spec(top) is not None)
    except ValueError:  # of a module that was made by hand
        known = True
    if not known:
        raise InvalidRequest(f"there is no room {name!r}: {', '.join(ROOMS)}, and other libraries by the name of their logger")


def check_levels(levels: Levels) -> None:
    """Those of `fairlead.yaml`. Raises ConfigError."""
    try:
        for name in levels:
            check_room(name)
    except InvalidRequest as error:
        raise ConfigError(f"logs.levels: {error.message}") from None


def _above(room: str) -> Iterator[str]:
    while room:
        yield room
        room = room.rpartition(".")[0]
