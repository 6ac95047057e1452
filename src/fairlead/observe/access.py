"""One JSON line per finished request, whatever its end, and their count.

It reads timelines, some together and a moment after they ended.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import count
from time import perf_counter, time
from typing import IO

import msgspec
from msgspec import Struct, field

from fairlead.core.timeline import Timeline
from fairlead.observe.redaction import plain_json, without_secrets

SANE_ID = re.compile(rb"[\x21-\x7e]{1,126}")
"""A caller's request id that is taken over; others are replaced by one of ours. Its length fits one byte of HPACK."""
SANE_TRACE = re.compile(rb"[\x21-\x7e]{1,256}")
"""A traceparent that is passed through."""

_encoder = msgspec.json.Encoder()
_prefix = os.urandom(6).hex()
_numbers = count(1)


def new_request_id() -> str:
    """Unique among all processes, cheap: a random prefix per process and a number."""
    return f"{_prefix}-{next(_numbers):x}"


class Line(Struct, omit_defaults=True, gc=False):
    """A finished request, as it is logged."""

    time: float
    """When it ended."""
    level: str
    event: str
    protocol: str
    request_id: str
    model: str
    version: str
    status: int
    seconds: float
    rows: int
    outcome: str
    reason: str = ""
    tenant: str = ""
    qos_class: str = field(default="", name="class")
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    job: str = ""
    traceparent: str = ""
    trace_id: str = ""
    error: str = ""


class AccessLog:
    """A listener of `Finished`."""

    def __init__(self, stream: IO[str] | None, responses: Counter[tuple[str, int]] | None = None) -> None:
        """`stream`: None for no lines; `responses`: counts (protocol, status)."""
        self.stream = stream
        self._responses: Counter[tuple[str, int]] = Counter() if responses is None else responses

    def __call__(self, timelines: Sequence[Timeline]) -> None:
        for timeline in timelines:
            if timeline.protocol != "job":  # which nobody was answered at a door
                self._responses[timeline.protocol, timeline.status] += 1
        if self.stream is None:
            return
        since = time() - perf_counter()
        self.stream.write(plain_json(_encoder.encode_lines([line_of(timeline, since) for timeline in timelines]).decode()))
        self.stream.flush()


def line_of(timeline: Timeline, since: float) -> Line:
    """`since`: the wall clock's time at the performance counter's zero."""
    usage, trace = timeline.usage, timeline.traceparent
    return Line(
        timeline.ended + since,
        "warning" if timeline.error else "info",
        "request",
        timeline.protocol,
        timeline.request_id,
        timeline.model,
        timeline.version,
        timeline.status,
        round(timeline.ended - timeline.arrived, 6),
        timeline.rows,
        timeline.outcome,
        timeline.reason,
        timeline.tenant,
        timeline.qos_class,
        0 if usage is None else usage.prompt_tokens,
        0 if usage is None else usage.completion_tokens,
        timeline.cost or None,
        timeline.job,
        trace,
        timeline.trace_id if timeline.traced else "",
        without_secrets(timeline.error),
    )
