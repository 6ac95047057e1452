"""One JSON line per finished request, whatever its end, and their count.

Lines are encoded and written with their neighbours a moment later.
"""

import os
import re
from collections import Counter
from itertools import count
from time import time
from typing import IO

import msgspec
from msgspec import Struct

SANE_ID = re.compile(rb"[\x21-\x7e]{1,126}")
"""A caller's request id that is taken over; others are replaced by one of ours. Its length fits one byte of HPACK."""
SANE_TRACE = re.compile(rb"[\x21-\x7e]{1,256}")
"""A traceparent that is passed through."""
FLUSH_LINES = 64
FLUSH_SECONDS = 0.2

_encoder = msgspec.json.Encoder()
_prefix = os.urandom(6).hex()
_numbers = count(1)


def new_request_id() -> str:
    """Unique among all processes, cheap: a random prefix per process and a number."""
    return f"{_prefix}-{next(_numbers):x}"


class Line(Struct, omit_defaults=True, gc=False):
    """A finished request, as it is logged."""

    time: float
    level: str
    event: str
    protocol: str
    request_id: str
    model: str
    version: str
    status: int
    seconds: float
    rows: int
    traceparent: str = ""
    error: str = ""


class AccessLog:
    """Collects finished requests; the owner calls `flush` every FLUSH_SECONDS and at the end."""

    def __init__(self, stream: IO[str] | None, responses: Counter[tuple[str, int]] | None = None) -> None:
        """`stream`: None for no lines; `responses`: counts (protocol, status)."""
        self._stream = stream
        self._responses: Counter[tuple[str, int]] = Counter() if responses is None else responses
        self._lines: list[Line] = []

    def add(
        self, protocol: str, request_id: str, trace: str, model: str, version: str, status: int, seconds: float, rows: int, error: str
    ) -> None:
        """`protocol`: http or grpc; `status`: that protocol's number; `error`: "" if all went well."""
        self._responses[protocol, status] += 1
        if self._stream is None:
            return
        level = "warning" if error else "info"
        self._lines.append(
            Line(time(), level, "request", protocol, request_id, model, version, status, round(seconds, 6), rows, trace, error)
        )
        if len(self._lines) >= FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        if not self._lines or self._stream is None:
            return
        lines, self._lines = self._lines, []
        self._stream.write(_encoder.encode_lines(lines).decode())
        self._stream.flush()
