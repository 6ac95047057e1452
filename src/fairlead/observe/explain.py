"""What became of one request, step by step, and where its time went. Pure: of a timeline that has ended."""

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any

from msgspec import Struct

from fairlead.core.generation import Phase
from fairlead.core.timeline import BatchNote, Phases, Timeline

REST = "other"
"""Of a request's time, what no phase accounts for."""
MEANINGS = {
    "receive": "its body came in and was read",
    "gateway": "it was let in",
    "filters": "filters read its texts",
    "limits": "it was counted against limits",
    "cache": "a stored answer was looked for",
    "queue": "it waited for its turn in the gateway's line",
    "retry": "a place that did not answer, and the pause before the next try",
    "batch wait": "it waited for its batch",
    "gather": "its batch was put together",
    "compute": "the model computed",
    "hand-over": "between the server and the model's thread or process",
    "engine queue": "it waited in the engine for its first step",
    "prefill": "its prompt was computed",
    "decode": "its answer was generated, token by token",
    "preempted": "the engine had put it aside: others needed its memory",
    "encode prompt": "its prompt was encoded",
    "denoise": "its picture was denoised, step by step",
    "decode picture": "its picture was decoded and written",
    "store": "its result was kept",
    "job": "it waited for its job, which has a timeline of its own",
    "answer": "its answer was written",
    REST: "no part of the server accounts for it",
}
"""Names of phases. Where two overlap, as those of several prompts of one request do, the one that computes counts."""
RANKS = {
    "batch wait": 2,
    "queue": 2,
    "retry": 2,
    "engine queue": 3,
    "preempted": 4,
    "hand-over": 5,
    **dict.fromkeys(("gather", "compute", "prefill", "decode", "encode prompt", "denoise", "decode picture"), 9),
}
"""Others: 1."""
UNTIL = {"checked": "filters", "held": "limits", "reused": "cache", "admitted": "gateway", "refused": "gateway", "stored": "store"}
"""Event → the phase of the time that led up to it."""
ENGINE_NAMES = {"waiting": "engine queue", "encode": "encode prompt"}
CLOSED = {
    "full": "it was full",
    "preferred": "it had a preferred size",
    "size": "the next request's rows would not have fitted",
    "shape": "the next request's shapes differ",
    "delay": "its oldest member had waited as long as the model's `max_queue_delay`",
    "deadline": "waiting longer would have let a member time out",
    "idle": "an instance was free",
    "single": "the model does not batch",
    "retry": "its first batch had failed, and each member got a try of its own",
}
REUSED = {
    "hit": "its answer was stored",
    "semantic": "the answer to a question that means the same was stored",
    "joined": "the same was being computed for another: it shared that answer",
    "stale": "the wait was long, and a stored answer that had expired did",
}


class ShownPhase(Struct, frozen=True):
    name: str
    start: float
    """Seconds since it arrived."""
    seconds: float


class Summary(Struct, frozen=True, kw_only=True):
    """A finished request in a list."""

    id: str
    protocol: str
    path: str
    kind: str
    model: str
    version: str
    tenant: str
    qos_class: str
    status: int
    outcome: str
    reason: str
    error: str
    arrived: float
    """Seconds since 1970."""
    seconds: float
    first_seconds: float | None
    """To the first piece of an answer in pieces."""
    rows: int
    tokens_in: int
    tokens_out: int
    cost: float
    job: str
    trace_id: str
    """"" for one that nobody traces."""
    phases: list[ShownPhase]
    """They add up to `seconds`."""


class Step(Struct, frozen=True, kw_only=True):
    at: float
    """Seconds since it arrived."""
    seconds: float
    """How long it took; 0 for a moment."""
    name: str
    """As `core.timeline.EVENTS`, or of an engine's phase."""
    text: str
    details: dict[str, Any]


class Share(Struct, frozen=True, kw_only=True):
    """Of one phase, all its stretches together."""

    name: str
    meaning: str
    seconds: float
    share: float
    """Of the whole, 0 to 1."""


class Explained(Struct, frozen=True, kw_only=True):
    request: Summary
    why: str
    """The largest share, in a sentence."""
    shares: list[Share]
    """The largest first."""
    median_seconds: float | None
    """Of its model's recent requests; null where there are too few."""
    steps: list[Step]
    dropped: int
    """Steps that were too many to keep."""
    related: list[Summary]
    """Others of the same id or job: the request that handed it in, other tries."""


def summary_of(timeline: Timeline, since: float) -> Summary:
    """`since`: the wall clock's time at the performance counter's zero."""
    usage = timeline.usage
    return Summary(
        id=timeline.request_id,
        protocol=timeline.protocol,
        path=timeline.path,
        kind=timeline.kind,
        model=timeline.model,
        version=timeline.version,
        tenant=timeline.tenant,
        qos_class=timeline.qos_class,
        status=timeline.status,
        outcome=timeline.outcome,
        reason=timeline.reason,
        error=timeline.error,
        arrived=timeline.arrived + since,
        seconds=timeline.seconds,
        first_seconds=timeline.first_at - timeline.arrived if timeline.first_at else None,
        rows=timeline.rows,
        tokens_in=0 if usage is None else usage.prompt_tokens,
        tokens_out=0 if usage is None else usage.completion_tokens,
        cost=timeline.cost,
        job=timeline.job,
        trace_id=timeline.trace_id if timeline.traced else "",
        phases=phases_of(timeline),
    )


def explained(timeline: Timeline, since: float, *, median: float | None = None, related: tuple[Timeline, ...] = ()) -> Explained:
    """`since`: as above; `median`: seconds of its model's recent requests."""
    summary = summary_of(timeline, since)
    shares = shares_of(summary.phases, summary.seconds)
    return Explained(
        request=summary,
        why=why(shares, summary.seconds, median),
        shares=shares,
        median_seconds=median,
        steps=sorted(_steps(timeline), key=lambda step: step.at),
        dropped=timeline.dropped,
        related=[summary_of(each, since) for each in related],
    )


# Where its time went

Stretch = tuple[float, float, str]
"""(start, stop, name), of the performance counter."""


def phases_of(timeline: Timeline) -> list[ShownPhase]:
    """Without gaps from its arrival to its end: each moment is of the highest rank of those that claim it."""
    first, last = timeline.arrived, timeline.ended
    stretches = [(max(start, first), min(stop, last), name) for start, stop, name in _stretches(timeline)]
    stretches = sorted([each for each in stretches if each[1] > each[0]], key=lambda each: (RANKS.get(each[2], 1), each[0], each[2]))
    waiting = sorted(range(len(stretches)), key=lambda number: -stretches[number][0])
    """Stretches that have not begun, the next one last."""
    claims: list[int] = []
    """A heap of those that have, the strongest first; some are over."""
    edges = sorted({first, last, *(start for start, _, _ in stretches), *(stop for _, stop, _ in stretches)})
    found: list[ShownPhase] = []
    for start, stop in pairwise(edges):
        while waiting and stretches[waiting[-1]][0] <= start:
            heappush(claims, -waiting.pop())
        while claims and stretches[-claims[0]][1] <= start:
            heappop(claims)
        name = stretches[-claims[0]][2] if claims else REST
        if found and found[-1].name == name:
            found[-1] = ShownPhase(name, found[-1].start, stop - first - found[-1].start)
        else:
            found.append(ShownPhase(name, start - first, stop - start))
    return found


def _stretches(timeline: Timeline) -> Iterator[Stretch]:
    """What claims a part of its time; they may overlap."""
    before = timeline.arrived
    ready = timeline.arrived
    """When it could have been given to the model."""
    queued = sent = failed = computed = 0.0
    for at, name, details in timeline.events:
        match name:
            case "decoded":
                yield timeline.arrived, at, "receive"
            case "queued":
                queued = at
            case "turn":
                yield queued or before, at, "queue" if queued else "gateway"
                queued = 0.0
            case "sent":
                if failed:
                    yield failed, at, "retry"
                sent, failed = at, 0.0
            case "failed":
                yield sent, at, "retry"
                failed = at
            case "batched" if isinstance(details, BatchNote):
                yield ready, at, "batch wait"
                computed = details.ended or timeline.ended
                yield from _of_batch(details, computed)
            case "engine" if isinstance(details, Phases):
                computed = timeline.ended
                for phase in details.phases:
                    computed = at + phase.start + phase.seconds
                    yield at + phase.start, computed, _engine_name(details, phase)
                if not details.phases:
                    yield at, computed, "compute"
            case "computed":
                computed = at
            case _ if name in UNTIL:
                yield before, at, UNTIL[name]
        before = max(before, at)
        if name not in ("computed", "encoded", "batched", "engine"):
            ready = at
    if queued:
        yield queued, timeline.ended, "queue"
    elif computed:
        yield computed, timeline.ended, "answer"
    elif not timeline.events:
        yield timeline.arrived, timeline.ended, "receive"
    elif timeline.job and timeline.protocol != "job" and timeline.status != 202:
        yield before, timeline.ended, "job"
    elif timeline.reason == "queue-timeout":
        yield ready, timeline.ended, "batch wait"
    else:
        yield before, timeline.ended, "answer"


def _of_batch(note: BatchNote, ended: float) -> Iterator[Stretch]:
    gathered = note.began + note.gather_seconds
    computed = gathered + note.compute_seconds if note.compute_seconds else ended
    yield note.began, gathered, "gather"
    yield gathered, computed, "compute"
    yield computed, ended, "hand-over"


def _engine_name(engine: Phases, phase: Phase) -> str:
    if phase.name == "decode" and any(each.name == "denoise" for each in engine.phases):
        return "decode picture"
    return ENGINE_NAMES.get(phase.name, phase.name)


def shares_of(phases: list[ShownPhase], whole: float) -> list[Share]:
    seconds: dict[str, float] = {}
    for phase in phases:
        seconds[phase.name] = seconds.get(phase.name, 0.0) + phase.seconds
    shares = [
        Share(name=name, meaning=MEANINGS.get(name, ""), seconds=each, share=each / whole if whole > 0 else 0.0)
        for name, each in seconds.items()
    ]
    return sorted(shares, key=lambda share: -share.seconds)


def why(shares: list[Share], whole: float, median: float | None) -> str:
    if not shares:
        return ""
    most = shares[0]
    said = f"{most.share:.0%} of its {told(whole)} ({told(most.seconds)}): {most.meaning or most.name}"
    if median:
        times = whole / median
        said += (
            f"; that is {times:.1f} times its model's median of {told(median)}"
            if times >= 1.1
            else f"; its model's median is {told(median)}"
        )
    return said


# Step by step


def _steps(timeline: Timeline) -> Iterator[Step]:
    first = timeline.arrived
    queued = 0.0
    yield _step(0.0, 0.0, "arrived", f"it came by {timeline.protocol}" + (f" to {timeline.path}" if timeline.path else ""))
    for at, name, details in timeline.events:
        offset = at - first
        if isinstance(details, BatchNote):
            yield _batched(offset, details, timeline.ended)
        elif isinstance(details, Phases):
            yield from _engine(offset, details)
        else:
            more = dict(details or {})
            seconds = 0.0
            if name == "queued":
                queued = at
            elif name == "turn" and queued:
                seconds, queued = at - queued, 0.0
            yield _step(offset - seconds, seconds, name, _sentence(name, more, timeline, seconds), more)
    if timeline.first_at:
        yield _step(timeline.first_at - first, 0.0, "first", "the first piece of its answer left")
    end = f"it ended: {timeline.outcome}" + (f" ({timeline.reason})" if timeline.reason else "") + f", status {timeline.status}"
    yield _step(timeline.seconds, 0.0, "ended", end + (f": {timeline.error}" if timeline.error else ""))


def _step(at: float, seconds: float, name: str, text: str, details: Mapping[str, Any] | None = None) -> Step:
    return Step(at=at, seconds=seconds, name=name, text=text, details=dict(details or {}))


def _sentence(name: str, of: dict[str, Any], timeline: Timeline, seconds: float) -> str:
    match name:
        case "decoded":
            return (
                f"its body of {timeline.bytes_in:,} bytes was read and understood"
                if timeline.bytes_in
                else "its body was read and understood"
            )
        case "adapted":
            return f"its model's name names the LoRA adapter {of['adapter']}"
        case "refused":
            return f"it was refused: {of['reason']}"
        case "admitted":
            return f"its caller may: class {of['class']}, priority {of['priority']}"
        case "checked":
            found = of["flagged"]
            return "filters read its texts" + (f" and found {', '.join(found)}" if found else " and found nothing")
        case "reused":
            return REUSED.get(of["outcome"], "its answer was there already")
        case "held":
            return f"{_many(of['limits'], 'limit')} had room for it"
        case "degraded":
            return f"the wait was long, and it was given less: {of['what']}"
        case "queued":
            return f"it stood in line behind {_many(of['ahead'], 'request')}, while {_many(of['in_flight'], 'other')} {_were(of['in_flight'])} computed"
        case "turn":
            return f"it had waited {told(seconds)} for its turn" if seconds else "it had its turn at once"
        case "sent":
            again = f", attempt {of['attempt']}" if of["attempt"] > 1 else ""
            return f"it was sent to {of['place']}{again}"
        case "failed":
            return f"{of['place']} did not answer: {of['error']}"
        case "retried":
            return f"it was to be sent once more: {of['reason']}"
        case "fallback":
            return f"{of['model']} was asked in place of its model"
        case "hedged":
            return f"it took long: {of['place']} was asked too"
        case "computed":
            return "its batch's answer was here"
        case "filtered":
            return f"a filter found something in its answer: {', '.join(of['rules'])}"
        case "encoded":
            return f"its answer of {timeline.bytes_out:,} bytes was written" if timeline.bytes_out else "its answer was written"
        case "lease":
            return f"a runner took the job: attempt {of['attempt']}"
        case "stored":
            return f"its result was kept: {of['bytes']:,} bytes of files"
        case "webhook":
            said = f"status {of['status']}" if of["status"] else of.get("error") or "no answer"
            return f"its receiver was called, attempt {of['attempt']}: {said}"
        case "left":
            return "its client went away"
        case _:
            return name


def _batched(offset: float, note: BatchNote, ended: float) -> Step:
    label = f"batch {note.number} of {note.model}@{note.version}" if note.number >= 0 else f"a batch of {note.model}@{note.version}"
    reason = CLOSED.get(note.close_reason, note.close_reason)
    rows = f"{_many(note.rows, 'row')} of {_many(note.num_requests, 'request')}"
    text = f"{label} closed because {reason}: {rows}, on instance {note.instance}"
    if note.error:
        text += f"; it failed: {note.error}"
    elif note.ended:
        text += f"; gathered in {told(note.gather_seconds)}, computed in {told(note.compute_seconds)}"
    details = {
        "number": note.number,
        "close_reason": note.close_reason,
        "rows": note.rows,
        "requests": note.num_requests,
        "instance": note.instance,
        "gather_seconds": note.gather_seconds,
        "compute_seconds": note.compute_seconds,
    }
    return _step(offset, (note.ended or ended) - note.began, "batched", text, details)


def _engine(offset: float, engine: Phases) -> Iterator[Step]:
    where = f"{engine.model}@{engine.version}, replica {engine.instance}"
    yield _step(offset, 0.0, "engine", f"it was sent to the engine of {where}", {"instance": engine.instance})
    for phase in engine.phases:
        name = _engine_name(engine, phase)
        details = {"num_steps": phase.num_steps, "num_tokens": phase.num_tokens, "max_seqs": phase.max_seqs, "slowest": phase.slowest}
        yield _step(offset + phase.start, phase.seconds, name, _phase(name, phase), details)


def _phase(name: str, phase: Phase) -> str:
    took = told(phase.seconds)
    match name:
        case "engine queue":
            return f"it waited {took} for its first step"
        case "prefill":
            text = f"{_many(phase.num_tokens, 'token')} of its prompt were computed in {_many(phase.num_steps, 'step')}"
        case "decode":
            text = f"{_many(phase.num_tokens, 'token')} were generated in {_many(phase.num_steps, 'step')}"
        case "preempted":
            return f"it was put aside for {took}: others needed its memory"
        case "encode prompt":
            return f"its prompt was encoded in {took}"
        case "denoise":
            text = _many(phase.num_steps, "denoising step")
        case "decode picture":
            return f"its picture was decoded and written in {took}"
        case _:
            return f"{name} took {took}"
    if phase.max_seqs > 1:
        text += f", shared by up to {phase.max_seqs}"
    if phase.slowest and phase.num_steps > 1:
        text += f", the slowest {told(phase.slowest)}"
    return f"{text}, in {took}"


def told(seconds: float) -> str:
    """As people say it."""
    if seconds < 0.000_9995:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f} ms"
    return f"{seconds:.2f} s" if seconds < 99.995 else f"{seconds:.0f} s"


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"
