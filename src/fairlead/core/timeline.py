"""What happened to one request, from its door to its end.

A door makes it, every room on the way down and back writes into it, the door ends it. It is kept whether or not anything
is traced: `fairlead explain` reads it, and spans, access log lines, exemplars and objectives are made of it once the request
has ended. So that it costs no more than a list's `append`, nothing is decided while it is written.

Times are seconds of `time.perf_counter`.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from fairlead.core.generation import Phase, Usage

EVENTS = {
    "decoded": "its body was read and understood: `bytes`",
    "refused": "the gateway did not let it pass: `reason`",
    "admitted": "its caller may: `class`, `priority`",
    "checked": "filters read its texts: `flagged`, the rules that found something",
    "reused": "its answer was stored, or is being computed for another: `outcome` (hit, semantic, joined, stale)",
    "held": "limits had room: `limits`, the number of those that count it",
    "degraded": "it is given less, because the wait is long: `what`",
    "queued": "it stands in the gateway's line: `ahead`, requests that wait already, and `in_flight`, those being computed",
    "turn": "it was let through",
    "sent": "to a place that computes: `place`, `version`, `attempt`",
    "failed": "that place did not answer: `place`, `error`",
    "retried": "it is sent once more: `reason`",
    "fallback": "another model is asked: `model`",
    "hedged": "a second place is asked too: `place`",
    "batched": "its batch began to compute: a BatchNote",
    "computed": "its batch's answer is here",
    "engine": "what an engine did for it: its Phases, from this moment on",
    "first": "the first piece of its answer left",
    "filtered": "a filter found something in its answer: `rules`",
    "encoded": "its answer is written: `bytes`",
    "lease": "of a job: a runner took it: `attempt`",
    "stored": "of a job: its result is kept: `bytes`",
    "webhook": "of a job: its receiver was called: `status`, `attempt`",
    "left": "its client went away",
}
"""Name → what it means, and the names of its details."""

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class BatchNote(Struct):
    """A batch, as each of its members knows it."""

    model: str
    version: str
    number: int
    close_reason: str
    """Why it was closed: the batcher's table tells them."""
    rows: int
    num_requests: int
    instance: int
    began: float
    gather_seconds: float = 0.0
    """To lay the members' rows side by side, and to bring them to the replica."""
    compute_seconds: float = 0.0
    """The model's own."""
    ended: float = 0.0
    error: str = ""
    span_id: str = ""
    """Given by whoever exports it first."""


class Phases(Struct):
    """What an engine told of a request."""

    model: str
    version: str
    instance: int
    phases: list[Phase]


Details = Mapping[str, Any] | BatchNote | Phases | None
Event = tuple[float, str, Details]


class Timeline(Struct):
    """One request. Written in the event loop only."""

    request_id: str
    protocol: str
    """http, grpc, job."""
    arrived: float
    traceparent: str = ""
    """As it came; "" for none that is W3C's."""
    path: str = ""
    """The route that it took, such as /v2/models/{model}/infer."""
    kind: str = ""
    """infer, generate, embed, tokenize, paint; "" where nothing was asked of a model."""
    model: str = ""
    """As it was asked for."""
    version: str = ""
    """Which answered."""
    tenant: str = ""
    key: str = ""
    qos_class: str = ""
    rows: int = 0
    usage: Usage | None = None
    cost: float = 0.0
    job: str = ""
    """The id of the job that it computes."""
    status: int = 0
    """The protocol's number."""
    error: str = ""
    """"" where all went well."""
    outcome: str = ""
    """success, failure (ours), refused (limits, queues, filters, a client's fault), cancelled."""
    reason: str = ""
    """Of what was refused, or failed: the label of `fairlead_gateway_refused_total`."""
    first_at: float = 0.0
    """When the first piece of an answer in pieces left; 0 for others."""
    ended: float = 0.0
    events: list[Event] = field(default_factory=list)
    _trace_id: str = ""
    _span_id: str = ""

    def note(self, at: float, name: str, details: Details = None) -> None:
        """`name`: one of EVENTS."""
        self.events.append((at, name, details))

    @property
    def seconds(self) -> float:
        return self.ended - self.arrived

    # Its place among the spans of others

    @property
    def trace_id(self) -> str:
        """32 hex digits: its caller's, else its own."""
        if not self._trace_id:
            context = parse_traceparent(self.traceparent)
            self._trace_id = context[0] if context else os.urandom(16).hex()
        return self._trace_id

    @property
    def span_id(self) -> str:
        """16 hex digits."""
        if not self._span_id:
            self._span_id = os.urandom(8).hex()
        return self._span_id

    @property
    def parent_id(self) -> str:
        """The caller's span; "" where it sent none."""
        context = parse_traceparent(self.traceparent)
        return context[1] if context else ""


def parse_traceparent(text: str) -> tuple[str, str, bool] | None:
    """(trace id, span id, sampled) of a W3C traceparent; None for what is none, which starts a new trace.

    https://www.w3.org/TR/trace-context-2/#traceparent-header
    """
    match = TRACEPARENT.fullmatch(text)
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    if not match[2].strip("0") or not match[3].strip("0"):
        return None
    return match[2], match[3], bool(int(match[4], 16) & 1)
