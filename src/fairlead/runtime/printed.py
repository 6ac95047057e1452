"""What a replica process prints: whole lines of the server's log, whoever printed them and however it ended."""

import asyncio
import os
from contextlib import suppress

import msgspec
import structlog

from fairlead.observe.logs import journal

log = structlog.get_logger("fairlead.replica.printed")

READ_BYTES = 64 << 10
MAX_LINE_BYTES = 64 << 10
"""Of a line that has no end yet: it is cut there."""


class Printed:
    """The reading end of a pipe that is a process's standard output and standard error.

    Lines of its log come through it as JSON, behind a mark that nobody knows but the two processes: what a model prints is never taken for
    one of them.
    """

    def __init__(self, model: str, version: str = "") -> None:
        self.about = {"model": model} | ({"version": version} if version else {})
        self.mark = os.urandom(8).hex()
        self.pid = 0
        self._begins = self.mark.encode()
        self._rest = b""
        self._fd, self.theirs = os.pipe()
        os.set_blocking(self._fd, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def handed_over(self) -> None:
        """The other process has its end."""
        os.close(self.theirs)

    def close(self, after: float = 0.0) -> None:
        """`after` so many seconds, if it is not at its end by then: grandchildren may hold the pipe open."""
        if self._fd >= 0:
            self._loop.call_later(after, self._end) if after else self._end()

    def _read(self) -> None:
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._take_all(lines)
        if len(self._rest) > MAX_LINE_BYTES:
            self._take(self._rest)
            self._rest = b""

    def _end(self) -> None:
        if self._fd < 0:
            return
        with suppress(OSError):  # its last words, where it was closed from here
            self._rest += os.read(self._fd, READ_BYTES)
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        lines, self._rest = self._rest.split(b"\n"), b""
        for line in lines:
            self._take(line)

    def _take_all(self, lines: list[bytes]) -> None:
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        printed, _, ours = line.partition(self._begins)
        if printed.strip():
            log.info("printed", line=printed.decode("utf-8", "replace"), pid=self.pid, **self.about)
        if ours:
            try:
                event = msgspec.json.decode(ours, type=dict[str, object])
            except msgspec.DecodeError:  # cut off by the process's end
                log.warning("printed", line=ours.decode("utf-8", "replace"), pid=self.pid, **self.about)
            else:
                journal().pass_on({**event, **self.about})
