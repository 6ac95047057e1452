"""What a server writes down: which lines, and the latest of them."""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import msgspec
import structlog
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import NoQuery, decoded, query_of
from fairlead.api.admin_route import actor_of, body_of, operation
from fairlead.api.web import json_response
from fairlead.core.logs import Level, Levels
from fairlead.observe.log_levels import OURS, ROOMS, number_of, room_of
from fairlead.observe.log_ring import MAX_LINES
from fairlead.observe.logs import Journal

log = structlog.get_logger("fairlead.observe")

MAX_SECONDS = 86_400.0


class NewLevels(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    levels: Annotated[dict[Annotated[str, Meta(min_length=1, max_length=100)], Level | None], Meta(min_length=1, max_length=100)]
    """null: as if nothing had been said of the room."""
    seconds: Annotated[float, Meta(gt=0, le=MAX_SECONDS)] | None = None
    """Then they are what they were."""


class ShownRoom(TypedDict):
    about: str
    level: str
    seconds_left: float | None
    """null: until it is changed again, or the server restarts."""


class ShownLevels(TypedDict):
    default: str
    rooms: dict[str, ShownRoom]


class RecentQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Level = "debug"
    """And above."""
    room: Annotated[str, Meta(max_length=100)] = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_LINES)] = 200
    after: Annotated[int, Meta(ge=0)] = 0
    """`latest` of the answer before."""


class RecentLines(TypedDict):
    lines: list[dict[str, Any]]
    """The oldest first."""
    latest: int
    """The number of the server's latest line, whether or not it is among these."""


class LogOperations:
    """Called from the event loop only."""

    def __init__(self, journal: Callable[[], Journal], tell: Callable[[Levels], None], clock: Callable[[], float] = time.monotonic) -> None:
        """`tell`: takes the levels to the server's other processes."""
        self.journal = journal
        self.tell = tell
        self.clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self.operations = (
            operation("GET", "/admin/logs/levels", "adminLogLevels", "Which lines of which room are written", self.levels, ShownLevels),
            operation("PUT", "/admin/logs/levels", "adminSetLogLevels", "Write more or less, for good or for a while", self.set_levels, ShownLevels, NewLevels),
            operation("GET", "/admin/logs/recent", "adminRecentLogs", "The latest lines", self.recent, RecentLines),
        )  # fmt: skip

    async def levels(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(self._shown())

    async def set_levels(self, http: Request) -> Response:
        body = decoded(await body_of(http), NewLevels)
        until = None if body.seconds is None else self.clock() + body.seconds
        self.journal().levels.set(body.levels, until=until)
        log.info("log_levels_set", levels=body.levels, seconds=body.seconds, actor=actor_of(http))
        self._changed()
        return json_response(self._shown())

    async def recent(self, http: Request) -> Response:
        query, ring = query_of(http, RecentQuery), self.journal().ring
        latest = ring.latest
        found = ring.since(query.after, level=number_of(query.level), room=room_of(query.room), limit=query.limit)
        return json_response(
            {"lines": [msgspec.Raw(kept.line.encode()) for kept in found], "latest": found[-1].number if found else latest}
        )

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _changed(self) -> None:
        journal = self.journal()
        journal.levels_changed()
        self.tell(journal.levels.said())
        self.stop()
        at = journal.levels.next_expiry
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(max(at - self.clock(), 0.0), self._expire)

    def _expire(self) -> None:
        self._timer = None
        over = self.journal().levels.expire(self.clock())
        self._changed()
        if over:
            log.info("log_levels_back", rooms=over)

    def _shown(self) -> ShownLevels:
        levels, now = self.journal().levels, self.clock()
        rooms: dict[str, ShownRoom] = {}
        for room in dict.fromkeys((*ROOMS, *levels.said())):
            until = levels.passing[room][1] if room in levels.passing else None
            rooms[room] = {
                "about": ROOMS.get(room, ""),
                "level": levels.of(room),
                "seconds_left": None if until is None else round(max(until - now, 0.0), 1),
            }
        return {"default": levels.said().get(OURS, levels.default), "rooms": rooms}
