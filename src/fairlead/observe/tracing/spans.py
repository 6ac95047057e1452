"""From a timeline to the spans that tell it. Names follow OpenTelemetry's conventions: HTTP and RPC 1.44, GenAI as of 2026-10.

    POST /v1/chat/completions        server      the request (CONSUMER of a job)
    |-- read, admit, filters, cache, limits    each where it took BRIEF or longer; else it is an event of the request
    |-- queue                                    the gateway's line
    |-- chat llama                   client      one for each place that was asked; internal where it is this server's own
    |   |-- batch wait
    |   |-- compute                              linked to its batch, which is a trace of its own
    |   `-- engine
    |       `-- waiting, prefill, decode ...     the engine's phases
    `-- encode

Ids of spans are reckoned from the request's own, so that what was sent elsewhere needs to be remembered nowhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Literal
from urllib.parse import quote, urlsplit

from msgspec import Struct, field

from fairlead.core.timeline import MAX_CHARS, BatchNote, Details, Phases, Timeline, parse_traceparent

BRIEF = 1e-4
"""Seconds. A span costs more than such a stage does."""
MAX_LINKS = 128
STAGES = {
    "decoded": "read",
    "admitted": "admit",
    "checked": "filters",
    "reused": "cache",
    "held": "limits",
    "encoded": "encode",
    "stored": "store",
}
"""What an event ends, which began with the event before it."""
OTHERS = 512
"""Numbers of spans from here on are none that was sent."""
GRPC_STATUS = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
OPERATIONS = {"embed": "embeddings", "paint": "generate_content"}
OUTPUT_TYPES = {"generate": "text", "paint": "image"}

Kind = Literal["server", "internal", "client", "consumer"]
Value = str | bool | int | float | tuple[str, ...]


class Told(Struct):
    """Something that happened at one moment of a span. Times of spans are nanoseconds since 1970."""

    name: str
    at: int
    attributes: dict[str, Value]


class Span(Struct):
    name: str
    trace_id: str
    span_id: str
    start: int
    end: int
    parent_id: str = ""
    state: str = ""
    """W3C's tracestate."""
    remote_parent: bool = False
    """The parent is another process's."""
    kind: Kind = "internal"
    attributes: dict[str, Value] = field(default_factory=dict)
    events: list[Told] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    """(trace id, span id)."""
    error: str | None = None
    """None: all went well."""


def spans_of(timeline: Timeline, offset: float, why: str = "") -> list[Span]:
    """The request's own first. `offset`: the wall clock's time at the performance counter's zero; `why`: it is kept."""
    if timeline.protocol == "webhook":
        return [_call(timeline, offset)]
    return list(_Tree(timeline, offset, why).spans())


def batch_span(note: BatchNote, members: Sequence[tuple[str, str]], offset: float) -> Span:
    """`members`: (trace id, span id) of those that are known. The note has its ids."""
    attributes = _clean(
        {
            "fairlead.model": note.model,
            "fairlead.version": note.version,
            **_batch(note),
            "fairlead.batch.gather_seconds": note.gather_seconds,
            "fairlead.batch.compute_seconds": note.compute_seconds,
        },
        zeros=True,
    )
    span = Span(
        name=text(f"batch {note.model}"),
        trace_id=note.trace_id,
        span_id=note.span_id,
        start=_ns(note.began, offset),
        end=_ns(max(note.ended, note.began), offset),
        attributes=attributes,
        links=list(members[:MAX_LINKS]),
    )
    if note.error:
        _fail(span, "batch-failed", note.error)
    return span


def notes_of(timeline: Timeline) -> Iterator[BatchNote]:
    """The batches that it was in."""
    return (details for _, _, details in timeline.events if isinstance(details, BatchNote))


def text(value: object) -> str:
    """As protobuf takes it: no half characters, and no longer than anybody reads."""
    said = value if type(value) is str else str(value)
    if len(said) > MAX_CHARS:
        said = said[:MAX_CHARS]
    return said if said.isascii() else said.encode("utf-8", "replace").decode()


class _Tree:
    """The spans of one request, in the making."""

    def __init__(self, timeline: Timeline, offset: float, why: str) -> None:
        self.timeline = timeline
        self.offset = offset
        self.events = sorted(timeline.events, key=lambda event: event[0])
        self.root = _root(timeline, offset, why)
        self.others: list[Span] = []
        self.attempts: list[Span] = []
        self.open: list[Span] = []
        """Attempts that have not ended."""
        self.over = timeline.ended
        """When its answer was there."""
        self.until = 0.0
        """What an engine told of ends then; it need not tell."""
        self.model = timeline.model

    def spans(self) -> Iterator[Span]:
        timeline, before, queued = self.timeline, self.timeline.arrived, None
        for at, name, details in self.events:
            if name == "queued":
                queued = self._child("queue", at, timeline.ended, self.root, _told(details))
            elif name == "turn" and queued is not None:
                queued.end, queued = _ns(at, self.offset), None
            elif name in STAGES and at - before >= BRIEF:
                self._child(STAGES[name], before, at, self.root, _told(details))
            elif name == "sent":
                self._attempt(at, _told(details))
            else:
                self._also(at, name, details, before)
            if name in ("encoded", "stored"):
                self.over = min(before, at)
            before = max(before, at, self.until)
        self._close()
        yield self.root
        yield from self.attempts
        yield from self.others

    def _also(self, at: float, name: str, details: Details, before: float) -> None:
        if isinstance(details, BatchNote):
            self._computed(details, at, before)
        elif isinstance(details, Phases):
            self._engine(details, at, before)
        elif name == "computed":
            self.over = at
        else:
            if name == "failed":
                self._failed(at, _told(details))
            elif name == "fallback" and isinstance(details, Mapping):
                self.model = str(details.get("model", self.model))
            self.root.events.append(Told(name, _ns(at, self.offset), _told(details)))

    # Where it was sent

    def _attempt(self, at: float, told: dict[str, Value]) -> Span:
        timeline = self.timeline
        number = len(self.attempts) + 1
        operation = operation_of(timeline)
        place = str(told.get("fairlead.place", ""))
        remote = place.startswith(("http://", "https://"))
        attributes: dict[str, Value] = {"fairlead.model": text(self.model), "fairlead.attempt": number, **told}
        if remote:
            attributes |= _address(place)
        if operation:
            attributes |= _asked(timeline, operation, self.model)
        span = self._child(
            f"{operation or timeline.kind or 'infer'} {self.model}", at, timeline.ended, self.root, attributes, number=number
        )
        span.kind = "client" if remote else "internal"
        self.open.append(span)
        return span

    def _failed(self, at: float, told: dict[str, Value]) -> None:
        place = told.get("fairlead.place")
        found = next((each for each in self.open if each.attributes.get("fairlead.place") == place), None)
        if found is not None:
            self.open.remove(found)
            found.end = max(_ns(at, self.offset), found.start)
            _fail(found, str(told.get("fairlead.error", "failed")), "")

    def _place(self, before: float) -> Span:
        """The attempt that an event belongs to. Of what only one place could have answered nothing was noted."""
        return self.attempts[-1] if self.attempts else self._attempt(before, {})

    def _close(self) -> None:
        """All that are open end with the answer."""
        timeline = self.timeline
        for span in self.open:
            span.end = max(_ns(self.over, self.offset), span.start)
        if not self.open:
            return
        answered = self.open[-1]
        operation = operation_of(timeline)
        if operation and timeline.outcome == "success":
            answered.attributes |= _answered(timeline)
        if timeline.outcome == "failure":
            _fail(answered, timeline.reason or str(timeline.status), timeline.error)

    # What was computed

    def _computed(self, note: BatchNote, at: float, before: float) -> None:
        place = self._place(before)
        began = note.began or at
        waited = place.start / 1e9 - self.offset
        if began - waited >= BRIEF:
            self._child("batch wait", waited, began, place, {})
        end = next((then for then, name, _ in self.events if name == "computed" and then >= began), note.ended or began)
        span = self._child("compute", began, end, place, _clean(_batch(note), zeros=True))
        if note.span_id:
            span.links.append((note.trace_id, note.span_id))
        if note.error:
            _fail(span, "batch-failed", note.error)

    def _engine(self, told: Phases, at: float, before: float) -> None:
        place = self._place(min(before, at))
        end = max((phase.start + phase.seconds for phase in told.phases), default=0.0)
        self.until = max(self.until, at + end) if told.phases else inf
        engine = self._child(
            "engine",
            at,
            at + end,
            place,
            _clean({"fairlead.model": told.model, "fairlead.version": told.version, "fairlead.instance": str(told.instance)}),
        )
        for phase in told.phases:
            said = {
                "fairlead.steps": phase.num_steps,
                "fairlead.tokens": phase.num_tokens,
                "fairlead.step.most_together": phase.max_seqs,
                "fairlead.step.slowest_seconds": phase.slowest,
            }
            self._child(phase.name, at + phase.start, at + phase.start + phase.seconds, engine, _clean(said))

    def _child(self, name: str, start: float, end: float, parent: Span, attributes: dict[str, Value], number: int = 0) -> Span:
        span = Span(
            name=text(name),
            trace_id=self.root.trace_id,
            span_id=self.timeline.child_id(number or OTHERS + len(self.others)),
            start=_ns(start, self.offset),
            end=max(_ns(end, self.offset), _ns(start, self.offset)),
            parent_id=parent.span_id,
            state=parent.state,
            attributes=attributes,
        )
        (self.attempts if number else self.others).append(span)
        return span


def operation_of(timeline: Timeline) -> str:
    """In the words of the GenAI conventions; "": they have none for it."""
    if timeline.kind == "generate":
        return "chat" if "chat" in timeline.path else "text_completion"
    return OPERATIONS.get(timeline.kind, "")


def _root(timeline: Timeline, offset: float, why: str) -> Span:
    said: dict[str, object] = {
        "fairlead.request_id": timeline.request_id,
        "fairlead.model": timeline.model,
        "fairlead.version": timeline.version,
        "fairlead.tenant": timeline.tenant,
        "fairlead.class": timeline.qos_class,
        "fairlead.job": timeline.job,
        "fairlead.outcome": timeline.outcome,
        "fairlead.reason": timeline.reason,
        "fairlead.cost": timeline.cost,
        "fairlead.rows": timeline.rows,
        "fairlead.kept": why,
        "http.request.body.size": timeline.bytes_in,
        "http.response.body.size": timeline.bytes_out,
        "fairlead.dropped_events": timeline.dropped,
    }
    name, kind = f"job {timeline.model}", "consumer"
    if timeline.protocol == "http":
        name, kind = f"{timeline.method} {timeline.path}".rstrip(), "server"
        said |= {
            "http.request.method": timeline.method,
            "http.route": timeline.path,
            "http.response.status_code": timeline.status,
            "url.path": timeline.path.replace("{model}", quote(text(timeline.model), safe="")),
        }
    elif timeline.protocol == "grpc":
        name, kind = timeline.path.strip("/") or "grpc", "server"
        status = GRPC_STATUS[timeline.status] if 0 <= timeline.status < len(GRPC_STATUS) else str(timeline.status)
        said |= {"rpc.system.name": "grpc", "rpc.method": timeline.path.strip("/"), "rpc.response.status_code": status}
    context = parse_traceparent(timeline.traceparent)
    span = Span(
        name=text(name),
        trace_id=timeline.trace_id,
        span_id=timeline.span_id,
        start=_ns(timeline.arrived, offset),
        end=max(_ns(timeline.ended, offset), _ns(timeline.arrived, offset)),
        parent_id=context[1] if context else "",
        state=timeline.tracestate,
        remote_parent=context is not None,
        kind="consumer" if kind == "consumer" else "server",
        attributes=_clean(said),
    )
    if timeline.outcome == "failure":
        _fail(span, timeline.reason or str(timeline.status), timeline.error)
    elif timeline.outcome != "success":
        span.attributes["error.type"] = text(timeline.reason or timeline.outcome or timeline.status)
    return span


def _call(timeline: Timeline, offset: float) -> Span:
    """Of a receiver of webhooks. Its path may be a secret."""
    context = parse_traceparent(timeline.traceparent)
    said = {"http.request.method": "POST", "http.response.status_code": timeline.status, "fairlead.job": timeline.job}
    said |= {"fairlead.webhook": timeline.request_id, **_address(timeline.path)}
    span = Span(
        name="POST",
        trace_id=timeline.trace_id,
        span_id=timeline.span_id,
        start=_ns(timeline.arrived, offset),
        end=_ns(timeline.ended, offset),
        parent_id=context[1] if context else "",
        kind="client",
        attributes=_clean(said),
    )
    if timeline.error:
        _fail(span, str(timeline.status or "no-answer"), timeline.error)
    return span


def _asked(timeline: Timeline, operation: str, model: str) -> dict[str, Value]:
    said: dict[str, object] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "fairlead",
        "gen_ai.request.model": model,
        "gen_ai.output.type": OUTPUT_TYPES.get(timeline.kind),
        "gen_ai.request.stream": True if timeline.first_at else None,
    }
    asked = timeline.asked
    if asked is not None:
        said |= {
            "gen_ai.request.max_tokens": asked.max_tokens,
            "gen_ai.request.temperature": asked.temperature,
            "gen_ai.request.top_p": asked.top_p,
            "gen_ai.request.top_k": asked.top_k,
            "gen_ai.request.seed": asked.seed,
            "gen_ai.request.frequency_penalty": asked.frequency_penalty or None,
            "gen_ai.request.presence_penalty": asked.presence_penalty or None,
            "gen_ai.request.choice.count": asked.n if asked.n > 1 else None,
        }
    return _clean(said, zeros=True)


def _answered(timeline: Timeline) -> dict[str, Value]:
    said: dict[str, object] = {
        "gen_ai.response.id": timeline.request_id,
        "gen_ai.response.model": f"{timeline.model}@{timeline.version}" if timeline.version else timeline.model,
        "gen_ai.response.finish_reasons": timeline.finish_reasons or None,
        "gen_ai.response.time_to_first_chunk": timeline.first_at - timeline.arrived if timeline.first_at else None,
    }
    usage = timeline.usage
    if usage is not None:
        said |= {
            "gen_ai.usage.input_tokens": None if usage.num_pictures else usage.prompt_tokens,
            "gen_ai.usage.output_tokens": None if usage.num_pictures else usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens or None,
            "fairlead.pictures": usage.num_pictures or None,
            "fairlead.denoising_steps": usage.num_steps or None,
        }
    return _clean(said, zeros=True)


def _batch(note: BatchNote) -> dict[str, object]:
    return {
        "fairlead.batch.number": note.number,
        "fairlead.batch.rows": note.rows,
        "fairlead.batch.requests": note.num_requests,
        "fairlead.batch.close_reason": note.close_reason,
        "fairlead.instance": str(note.instance),
    }


def _address(url: str) -> dict[str, Value]:
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return {}
    return {"server.address": text(parts.hostname or ""), "server.port": port}


def _told(details: Details) -> dict[str, Value]:
    """What was noted, under names of ours."""
    return _clean({f"fairlead.{name}": value for name, value in details.items()}, zeros=True) if isinstance(details, Mapping) else {}


def _clean(said: Mapping[str, object], *, zeros: bool = False) -> dict[str, Value]:
    """Only what says something, in types that OTLP has."""
    return {name: _value(value) for name, value in said.items() if value is not None and value != "" and (zeros or value)}


def _value(value: object) -> Value:
    kind = type(value)
    if kind is str:
        return text(value)
    if kind is bool or kind is float:
        return value  # type: ignore[return-value]
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else text(value)  # type: ignore[operator, return-value]
    if isinstance(value, (list, tuple)):
        return tuple([text(each) for each in value])
    return text(value)


def _fail(span: Span, type_: str, message: str) -> None:
    span.attributes["error.type"] = text(type_)
    span.error = text(message)


def _ns(at: float, offset: float) -> int:
    return max(round(at * 1e9) + round(offset * 1e9), 0)
