"""What happened to one request, from its door to its end.

A door makes it, every room on the way down and back writes into it, the door ends it. It is kept whether or not anything
is traced: `fairlead explain` reads it, and spans, access log lines, exemplars and objectives are made of it once the request
has ended. So that it costs no more than a list's `append`, nothing is decided while it is written.

Times are seconds of `time.perf_counter`.
"""

import re
from collections.abc import Mapping
from random import Random
from typing import Any

from msgspec import Struct, field

from fairlead.core.errors import encodable
from fairlead.core.generation import Phase, Sampling, Usage

MAX_EVENTS = 256
MAX_CHARS = 512
"""Of a name that a caller chose, and of what it was told of an error."""

EVENTS = {
    "decoded": "its body was read and understood",
    "adapted": "its model's name names a LoRA adapter: `adapter`",
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
    "encoded": "its answer is written",
    "lease": "of a job: a runner took it: `attempt`",
    "stored": "of a job: its result is kept: `bytes` of its files",
    "webhook": "of a job: its receiver was called, after its end: `status` (0: no answer), `attempt`, `error`",
    "left": "its client went away",
}
"""Name → what it means, and the names of its details."""

SANE_STATE = re.compile(rb"[ -~]{1,512}")
"""A tracestate that is passed on."""
SPREAD = 0x9E37_79B9_7F4A_7C15
"""Odd, so that no two numbers give the same id."""
TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class BatchNote(Struct, gc=False, array_like=True):
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
    trace_id: str = ""
    span_id: str = ""
    """Given by whoever exports it first: it is a trace of its own, to which those of its members are linked."""


class Phases(Struct, gc=False):
    """What an engine told of a request."""

    model: str
    version: str
    instance: int
    phases: list[Phase]


Details = Mapping[str, Any] | BatchNote | Phases | None
Event = tuple[float, str, Details]


class Timeline(Struct, gc=False):
    """One request. Written in the event loop only."""

    request_id: str
    protocol: str
    """http, grpc, job."""
    arrived: float
    traceparent: str = ""
    """As it came; "" for none that is W3C's."""
    tracestate: str = ""
    """What tools of its caller say beside it."""
    method: str = "POST"
    """Of HTTP."""
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
    bytes_in: int = 0
    """Of its body."""
    bytes_out: int = 0
    """Of its answer's body."""
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
    dropped: int = 0
    """Events beyond MAX_EVENTS."""
    sample: float = -1.0
    """Of traces: the share that is kept by chance; below 0: nothing is traced."""
    asked: Sampling | None = None
    """How its answer was to be generated, where it is traced."""
    finish_reasons: tuple[str, ...] = ()
    """Of what was generated: one for each choice."""
    _trace_id: str = ""
    _span_id: str = ""

    def note(self, at: float, name: str, details: Details = None) -> None:
        """`name`: one of EVENTS. After the end nothing is: others may compute on for those who joined it."""
        if self.ended:
            return
        events = self.events
        if len(events) < MAX_EVENTS:
            events.append((at, name, details))
        else:
            self.dropped += 1

    def used(self, usage: Usage) -> None:
        """By one of its prompts."""
        before = self.usage
        if self.ended:
            return
        self.usage = usage if before is None else added(before, usage)

    def end(self, now: float, status: int, error: str, outcome: str, reason: str) -> None:
        """`outcome`, `reason`: where the gateway has not said."""
        self.ended = now
        self.status = status
        if error:
            self.error = kept(error)
            if self.outcome == "success":
                self.outcome = ""  # the gateway answered, and then it went wrong
        if len(self.model) > MAX_CHARS or not self.model.isascii():
            self.model = kept(self.model)
        if len(self.version) > MAX_CHARS or not self.version.isascii():
            self.version = kept(self.version)
        if not self.outcome:
            self.outcome, self.reason = outcome, reason

    @property
    def seconds(self) -> float:
        return self.ended - self.arrived

    # Its place among the spans of others

    @property
    def trace_id(self) -> str:
        """32 hex digits: its caller's, else its own."""
        if not self._trace_id:
            context = parse_traceparent(self.traceparent)
            self._trace_id = context[0] if context else new_id(128)
        return self._trace_id

    @property
    def traced(self) -> bool:
        """Somebody knows its trace id, or may."""
        return bool(self._trace_id or self.traceparent)

    @property
    def span_id(self) -> str:
        """16 hex digits."""
        if not self._span_id:
            self._span_id = new_id(64)
        return self._span_id

    def identify(self) -> None:
        """Give it its ids: from here on any thread may read them."""
        _ = self.trace_id, self.span_id

    @property
    def parent_id(self) -> str:
        """The caller's span; "" where it sent none."""
        context = parse_traceparent(self.traceparent)
        return context[1] if context else ""

    @property
    def sampled(self) -> bool:
        """Its caller's decision, else that of chance: the same for one trace id wherever the same share is kept."""
        context = parse_traceparent(self.traceparent)
        return context[2] if context else int(self.trace_id[16:], 16) < self.sample * (1 << 64)

    def child_id(self, number: int) -> str:
        """The id of one of its spans, without anybody having to remember it. 0: its own; from 1 on: what was sent, in its order."""
        return f"{(int(self.span_id, 16) + number * SPREAD) % (1 << 64) or 1:016x}"

    def context(self, number: int = 0) -> str:
        """The traceparent of what is done for it elsewhere, as part of that span."""
        return f"00-{self.trace_id}-{self.child_id(number)}-{'01' if self.sampled else '00'}"

    def outgoing(self) -> str:
        """The traceparent for the place that it was sent to just now."""
        return self.context(max(sum([name == "sent" for _, name, _ in self.events]), 1))


def kept(text: str) -> str:
    """As much of what a caller or a model said as is kept, without half characters, which no encoder takes."""
    return encodable(text[:MAX_CHARS])


def added(first: Usage, then: Usage) -> Usage:
    """Of two prompts of one request together."""
    return Usage(**{name: getattr(first, name) + getattr(then, name) for name in Usage.__struct_fields__})


_random = Random().getrandbits
"""Its own: models may seed the one that all share."""


def new_id(bits: int) -> str:
    """Of a trace or a span: hex digits."""
    return f"{_random(bits) or 1:0{bits // 4}x}"


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
