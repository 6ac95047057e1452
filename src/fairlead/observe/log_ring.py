"""The latest lines, for those who ask."""

from collections import deque
from threading import Lock
from typing import NamedTuple

from fairlead.observe.log_levels import OURS

MAX_LINES = 2000
MAX_BYTES = 1 << 20


class Kept(NamedTuple):
    number: int
    level: int
    room: str
    line: str
    """JSON."""


class LogRing:
    """Bounded by lines and by bytes, whichever comes first. Written from all threads."""

    def __init__(self, max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES) -> None:
        self.max_lines = max_lines
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.latest = 0
        """Number of the latest line; the first one is 1."""
        self._lines: deque[Kept] = deque()
        self._lock = Lock()

    def add(self, level: int, room: str, line: str) -> None:
        with self._lock:
            self.latest += 1
            self._lines.append(Kept(self.latest, level, room, line))
            self.num_bytes += len(line)
            while self._lines and (len(self._lines) > self.max_lines or self.num_bytes > self.max_bytes):
                self.num_bytes -= len(self._lines.popleft().line)

    def since(self, after: int = 0, *, level: int = 0, room: str = "", limit: int = MAX_LINES) -> list[Kept]:
        """The latest `limit` lines that are newer than number `after`, of that level or above and of that room; the oldest first."""
        found: list[Kept] = []
        with self._lock:
            for kept in reversed(self._lines):
                if kept.number <= after or len(found) == limit:
                    break
                if kept.level >= level and (room in ("", OURS, kept.room) or kept.room.startswith(f"{room}.")):
                    found.append(kept)
        return found[::-1]
