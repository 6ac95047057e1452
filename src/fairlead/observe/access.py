"""One JSON line per finished request, whatever its end, and their count.

A line is kept as a tuple and encoded with its neighbours a moment later: formatting each at once
would cost more than parsing the request.
"""

import os
import time
from collections import Counter
from itertools import count
from typing import IO

import msgspec

ENCODER = msgspec.json.Encoder()
FLUSH_LINES = 512
FLUSH_SECONDS = 0.2

_prefix = os.urandom(6).hex()
_numbers = count(1)


def new_request_id() -> str:
    """Unique among all processes, cheap: a random prefix per process and a number."""
    return f"{_prefix}-{next(_numbers):x}"


class AccessLog:
    """Collects finished requests; the owner calls `flush` every FLUSH_SECONDS and at the end."""

    def __init__(self, stream: IO[str] | None, responses: Counter[tuple[str, int]] | None = None) -> None:
        """`stream`: None for no lines; `responses`: counts (protocol, status)."""
        self._stream = stream
        self._responses: Counter[tuple[str, int]] = Counter() if responses is None else responses
        self._lines: list[tuple[float, str, str, str, str, str, int, float, int, str]] = []

    def add(
        self, protocol: str, request_id: str, trace: str, model: str, version: str, status: int, seconds: float, rows: int, error: str
    ) -> None:
        """`protocol`: http or grpc; `status`: that protocol's number; `error`: "" if all went well."""
        self._responses[protocol, status] += 1
        if self._stream is None:
            return
        self._lines.append((time.time(), protocol, request_id, trace, model, version, status, seconds, rows, error))
        if len(self._lines) >= FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        if not self._lines or self._stream is None:
            return
        lines, self._lines = self._lines, []
        parts = []
        for at, protocol, request_id, trace, model, version, status, seconds, rows, error in lines:
            line: dict[str, object] = {
                "time": round(at, 6),
                "level": "info" if not error else "warning",
                "event": "request",
                "protocol": protocol,
                "request_id": request_id,
                "model": model,
                "version": version,
                "status": status,
                "seconds": round(seconds, 6),
                "rows": rows,
            }
            if trace:
                line["traceparent"] = trace
            if error:
                line["error"] = error
            parts.append(ENCODER.encode(line))
        parts.append(b"")
        self._stream.write(b"\n".join(parts).decode())
        self._stream.flush()
