"""Traces of one server: which requests are kept, their spans, and their export. A listener of `Finished`."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import structlog
from msgspec import structs

from fairlead.core.errors import ConfigError
from fairlead.core.generation import Generate, Sampling
from fairlead.core.request import Request
from fairlead.core.timeline import BatchNote, Timeline, new_id
from fairlead.core.tracing import TraceSettings
from fairlead.observe.counts import Counts
from fairlead.observe.tracing.encoding import Resource
from fairlead.observe.tracing.exporter import Exporter, Kept
from fairlead.observe.tracing.outlets import Outlet, outlet_of
from fairlead.observe.tracing.sampler import Sampler
from fairlead.observe.tracing.spans import Span, batch_span, notes_of, spans_of
from fairlead.observe.tracing.target import resource_of, target_of

STOP_SECONDS = 5.0

log = structlog.get_logger("fairlead.traces")


class Tracing:
    """Everything but `build` is called in the event loop."""

    def __init__(
        self, settings: TraceSettings, counts: Counts, outlet: Outlet, *, version: str = "", now: Callable[[], float] = time.time
    ) -> None:
        """`version`: this server's; `now`: the wall clock."""
        self.settings = settings
        self.counts = counts
        self.now = now
        self.kept: list[Callable[[Timeline], None]] = []
        """Who wants to know which requests have a trace that can be looked up. Each is called for every one of them."""
        self._sampler = Sampler(settings)
        resource = Resource(resource_of(settings, version), version)
        self._exporter = Exporter(outlet, resource, build, self._ended, max_queue=settings.max_queue, interval=settings.interval)
        self._loop: asyncio.AbstractEventLoop | None = None

    @staticmethod
    def of(settings: TraceSettings, counts: Counts, version: str = "") -> "Tracing | None":
        """None where nobody wants traces. Raises ConfigError."""
        try:
            target = target_of(settings)
            return None if target is None else Tracing(settings, counts, outlet_of(target), version=version)
        except ConfigError as error:
            if settings.endpoint:
                raise
            log.warning("no_traces", error=error.message, note="the environment names a collector, and this is wrong with what it says")
            return None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._exporter.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._exporter.stop, STOP_SECONDS)
        await asyncio.sleep(0)  # what was counted in the thread

    def begin(self, request: Request) -> None:
        """A request on its way: what is asked for it elsewhere belongs to its trace."""
        timeline = request.timeline
        if timeline is not None:
            timeline.sample = self.settings.sample
            if isinstance(request.prompt, Generate):
                timeline.asked = _short(request.prompt.sampling)

    def context(self, timeline: Timeline) -> str:
        """The traceparent of what is asked as this."""
        timeline.sample = self.settings.sample
        return timeline.context()

    def __call__(self, timelines: Sequence[Timeline]) -> None:
        now = time.perf_counter()
        offset, exporter = self.now() - now, self._exporter
        kept, beyond = self._sampler.choose(timelines, now)
        dropped = 0
        for timeline, why in kept:
            timeline.identify()
            if not exporter.offer(Kept(timeline, offset, why)):
                dropped += 1
            elif timeline.protocol != "webhook":  # which is part of a job's
                for listener in self.kept:
                    listener(timeline)
        if beyond:
            self.counts.add("fairlead_traces_total", "rate", by=beyond)
        if dropped:
            self.counts.add("fairlead_traces_total", "dropped", by=dropped)

    def _ended(self, outcome: str, number: int) -> None:
        """From the exporter's thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(lambda: self.counts.add("fairlead_traces_total", outcome, by=number))


def _short(sampling: Sampling) -> Sampling:
    """Without what may be long, or a text of the caller's: timelines are kept for a while."""
    if sampling.logit_bias or sampling.stop or sampling.stop_token_ids:
        return structs.replace(sampling, logit_bias={}, stop=(), stop_token_ids=())
    return sampling


def build(requests: Sequence[Kept]) -> Iterator[list[Span]]:
    """The spans of each request, then those of batches that are met for the first time."""
    batches: dict[str, tuple[BatchNote, float, list[tuple[str, str]]]] = {}
    for kept in requests:
        timeline = kept.timeline
        for note in notes_of(timeline):
            if not note.span_id and note.ended:  # one that lasts is told of by a member that did not leave before its end
                note.trace_id, note.span_id = new_id(128), new_id(64)
                batches[note.span_id] = note, kept.offset, []
            if note.span_id in batches:
                batches[note.span_id][2].append((timeline.trace_id, timeline.span_id))
    for kept in requests:
        yield spans_of(kept.timeline, kept.offset, kept.why)
    for note, offset, members in batches.values():
        yield [batch_span(note, members, offset)]
