"""One loaded version of a model: its queue, its instances, and the loop that acts on what the batcher decides."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Hashable, Sequence
from contextlib import suppress
from typing import Protocol

import structlog

from fairlead.core.errors import Cancelled, FairleadError, ModelError, ReplicaDied, ShuttingDown, TimeoutExpired, Unavailable, Unsupported
from fairlead.core.request import Request, Response, Sink
from fairlead.core.specs import InputCheck, ModelSpec
from fairlead.core.tensors import Tensors, nbytes_of
from fairlead.core.timeline import MAX_CHARS, BatchNote, Timeline
from fairlead.observe.metrics import ModelMetrics
from fairlead.runtime.batcher import Batch, Batcher, CloseReason, Entry
from fairlead.runtime.instances import Instance
from fairlead.runtime.lives import ReplicaProcess

log = structlog.get_logger("fairlead.runtime")

CREDIT = 16
"""Responses that a streaming model may be ahead of its client."""
WARMUP_SECONDS = 120.0
"""How long one warm-up request may take."""


class Ticket(Protocol):
    """A request on its way through a version."""

    done: bool

    def cancel(self) -> None:
        """The caller left. Its sink is closed with Cancelled unless it was already closed."""


class Version(Protocol):
    """One loaded version of a model, whatever computes it. Everything is called from the event loop."""

    spec: ModelSpec
    name: str
    version: str
    platform: str
    metrics: ModelMetrics

    @property
    def ready(self) -> bool: ...

    @property
    def processes(self) -> Sequence[ReplicaProcess]:
        """Those that compute for it; none where this one does."""

    def statistics(self) -> dict[str, object]:
        """One entry of Triton's `model_stats`."""

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Queue a request that has one response. Errors go to the sink, possibly before this returns."""

    def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        """One response, or as many as there are. Closing the iterator cancels the request."""

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, finish those that are here (those that `timeout` cuts off fail), release everything."""


class BatchTicket(Entry):
    """A request on its way through the batcher. `cancel` stops it at any stage."""

    __slots__ = ("done", "owner", "request", "sink", "slot")

    def __init__(self, owner: "ModelVersion", request: Request, sink: Sink) -> None:
        # Entry's fields, set here because this runs on every request
        self.rows = 1
        self.nbytes = 0
        self.signature: Hashable = None
        self.priority = request.priority
        self.expires = request.timeout
        self.arrived = 0.0
        self.waiting = False
        self.owner = owner
        self.request = request
        self.sink = sink
        self.done = False
        self.slot: _Slot | None = None

    def cancel(self) -> None:
        """The caller left. Its sink is closed with Cancelled unless it was already closed."""
        if not self.done:
            self.owner.cancel(self)


class _Slot:
    __slots__ = ("batch", "instance", "number")

    def __init__(self, instance: Instance, number: int) -> None:
        self.instance = instance
        self.number = number
        self.batch: Batch | None = None


class ModelVersion:
    """States: serving → draining → closed. Everything is called from the event loop."""

    def __init__(self, spec: ModelSpec, version: str, platform: str, instances: list[Instance]) -> None:
        self.spec = spec
        self.name = spec.name
        self.version = version
        self.platform = platform
        self.batcher = Batcher(spec.batching)
        self.check = InputCheck(spec)
        self.slots = [_Slot(instance, number) for number, instance in enumerate(instances)]
        self.example: Tensors | None = None
        """Inputs that work, where the artefact tells some."""
        self.draining = False
        self._variable = spec.batches and any(-1 in item for item in self.check.items.values())
        self._optional = any(s.optional for s in spec.inputs)
        self._batches = spec.batches
        self._loop = asyncio.get_running_loop()
        self._pumping = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._retries: deque[BatchTicket] = deque()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.metrics = ModelMetrics(
            spec.name,
            version,
            queue=lambda: (self.batcher.num_requests, self.batcher.num_rows),
            restarts=lambda: sum(slot.instance.restarts for slot in self.slots),
            max_batch_size=spec.batching.max_batch_size,
        )

    @property
    def ready(self) -> bool:
        return not self.draining and any(slot.instance.ready for slot in self.slots)

    @property
    def processes(self) -> Sequence[ReplicaProcess]:
        return [slot.instance for slot in self.slots if isinstance(slot.instance, ReplicaProcess)]

    def statistics(self) -> dict[str, object]:
        return self.metrics.statistics()

    # From the caller

    def submit(self, request: Request, sink: Sink) -> BatchTicket:
        """Queue a request that has one response. Errors go to the sink, possibly before this returns."""
        if self.spec.streams:
            sink.close(
                Unsupported(
                    f"model '{self.name}' answers with several responses: ask for them as a stream (gRPC ModelStreamInfer, or HTTP with Accept: text/event-stream)"
                )
            )
            ticket = BatchTicket(self, request, sink)
            ticket.done = True
            return ticket
        return self._enqueue(request, sink)

    async def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        """One response, or as many as the model has. Closing the iterator cancels the request."""
        channel = _Channel()
        ticket = self._enqueue(request, channel)
        try:
            while (response := await channel.next()) is not None:
                yield response
                if ticket.slot is not None and not ticket.done:
                    ticket.slot.instance.grant(1)
        finally:
            ticket.cancel()

    def cancel(self, ticket: BatchTicket) -> None:
        queued = self.batcher.cancel(ticket)
        self.metrics.cancelled += 1
        self._close(ticket, Cancelled("request was cancelled"))
        if queued:
            self._schedule()
        elif ticket.slot is not None and self.spec.streams:
            ticket.slot.instance.cancel()

    def _enqueue(self, request: Request, sink: Sink) -> BatchTicket:
        ticket = BatchTicket(self, request, sink)
        now = time.perf_counter()
        try:
            if request.prompt is not None:
                raise Unsupported(f"model '{self.name}' computes tensors: it takes no prompt (ask it at /v2/models/{self.name}/infer)")
            self.check(request)
            if self.draining:
                raise ShuttingDown(
                    f"model '{self.name}' version {self.version} is unloading, it has stopped accepting new inference requests"
                )
            ticket.rows = request.num_rows
            nbytes = 0
            for array in request.inputs.values():
                nbytes += array.nbytes if array.dtype.kind != "O" else nbytes_of(array)
            ticket.nbytes = nbytes
            if self._variable:
                ticket.signature = tuple((name, array.shape[1:]) for name, array in sorted(request.inputs.items()))
            elif self._optional:
                ticket.signature = frozenset(request.inputs)
            self.batcher.add(ticket, now)
        except FairleadError as error:
            self.metrics.refused += 1
            self._close(ticket, error)
            return ticket
        self._idle.clear()
        self._schedule()
        return ticket

    # The loop that acts

    def _schedule(self) -> None:
        """Act at the end of this turn of the loop, so that every request already read joins the batch."""
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def instance_changed(self) -> None:
        """An instance became ready or stopped being so."""
        self._schedule()

    def _pump(self) -> None:
        self._pumping = False
        batcher = self.batcher
        now = time.perf_counter()
        for entry in batcher.expire(now):
            assert isinstance(entry, BatchTicket)
            self.metrics.refused += 1
            self._close(entry, TimeoutExpired("Request timeout expired"))
        free = False
        for slot in self.slots:
            if slot.batch is not None or not slot.instance.ready:
                continue
            batch = self._next_batch(now, slot)
            if batch is None:
                free = True
                break
            self._start(slot, batch, now)
        if batcher.num_requests and (down := self._down()):
            for entry in batcher.drop_all():
                assert isinstance(entry, BatchTicket)
                self.metrics.refused += 1
                self._close(entry, Unavailable(f"model '{self.name}' is not available: {down}"))
        if batcher.num_requests:
            self._arm(batcher.wake_at(free=free, predicted=self.slots[0].instance.compute_seconds))
        elif not self._running and not self._retries:
            self._idle.set()

    def _down(self) -> str:
        """Why nobody will take a batch soon: no instance is ready, and each failed to come back when it was last tried."""
        reasons = [slot.instance.down for slot in self.slots if not slot.instance.ready]
        return reasons[0] if len(reasons) == len(self.slots) and all(reasons) else ""

    def _next_batch(self, now: float, slot: _Slot) -> Batch | None:
        while self._retries:
            ticket = self._retries.popleft()
            if not ticket.done:
                return Batch([ticket], ticket.rows, CloseReason.RETRY, -1)
        return self.batcher.take(now, slot.instance.compute_seconds)

    def _arm(self, at: float | None) -> None:
        if self._timer is not None:
            if at == self._timer_at:
                return
            self._timer.cancel()
            self._timer = None
        if at is not None:
            self._timer_at = at
            self._timer = self._loop.call_later(max(at - time.perf_counter(), 0.0), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._schedule()

    def _start(self, slot: _Slot, batch: Batch, now: float) -> None:
        slot.batch = batch
        batch.started = now
        self._running += 1
        tickets: list[BatchTicket] = batch.entries  # type: ignore[assignment]
        if self.spec.streams:
            ticket = tickets[0]
            ticket.slot = slot
            self._note(slot, batch, ticket.request.timeline)
            slot.instance.stream(ticket.request, _StreamSink(self, slot, ticket), CREDIT)
            return
        outputs: set[str] | None = set()
        inputs = []
        requests = []
        for ticket in tickets:
            request = ticket.request
            if request.timeline is not None:
                self._note(slot, batch, request.timeline)
            requests.append(request)
            inputs.append(request.inputs)
            if request.outputs is None:
                outputs = None
            elif outputs is not None:
                outputs.update(request.outputs)
        batch.wanted = None if outputs is None else frozenset(outputs)
        slot.instance.run(inputs, batch.wanted, lambda result, error: self._done(slot, result, error), requests)

    def _note(self, slot: _Slot, batch: Batch, timeline: Timeline | None) -> None:
        """All members share one note."""
        if timeline is None:
            return
        note = batch.note
        if note is None:
            reason, number = batch.close_reason.value, len(batch.entries)
            note = BatchNote(self.name, self.version, batch.number, reason, batch.rows, number, slot.number, batch.started)
            batch.note = note
        timeline.note(batch.started, "batched", note)

    def _done(self, slot: _Slot, outputs: Tensors | None, error: FairleadError | None) -> None:
        batch = slot.batch
        assert batch is not None
        slot.batch = None
        self._running -= 1
        now = time.perf_counter()
        if outputs is not None and (error := self._wrong(batch, outputs)) is not None:
            outputs = None
        note = batch.note
        if note is not None:
            note.ended = now
            if error is None:
                note.gather_seconds, note.compute_seconds = slot.instance.gather_seconds, slot.instance.compute_seconds
            else:
                note.error = error.message[:MAX_CHARS]
        if error is not None and len(batch.entries) > 1 and not isinstance(error, ReplicaDied) and not self.batcher.preserve_ordering:
            # One request's values may have spoiled its neighbours': each gets a try of its own. Not where order is
            # promised: the tries would overtake, or hold up, what came after.
            self._retries.extend(batch.entries)  # type: ignore[arg-type]
            batch.entries = []
        batch.outputs, batch.error = outputs, error
        finished = self.batcher.finish(batch) if batch.number >= 0 else [batch]
        for other in finished:
            self._deliver(other, now)
        if error is None:
            self.metrics.batch(
                batch.rows, batch.close_reason, slot.instance.gather_seconds, slot.instance.compute_seconds, time.perf_counter() - now
            )
        self._schedule()

    def _wrong(self, batch: Batch, outputs: Tensors) -> ModelError | None:
        """What the model did wrong that splitting its answer would turn into somebody else's rows."""
        if not outputs.keys() >= (batch.wanted or self.check.outputs):
            missing = sorted((batch.wanted or self.check.outputs) - outputs.keys())
            return ModelError(f"model '{self.name}' gave no output '{missing[0]}'")
        if self._batches:
            for name, array in outputs.items():
                if array.ndim == 0 or array.shape[0] != batch.rows:
                    return ModelError(
                        f"model '{self.name}' gave output '{name}' of shape {list(array.shape)} for a batch of {batch.rows} rows"
                    )
        return None

    def _deliver(self, batch: Batch, now: float) -> None:
        outputs, error = batch.outputs, batch.error
        metrics = self.metrics
        started = batch.started
        name, version = self.name, self.version
        total = waited = 0.0
        num = at = rows = 0
        single = len(batch.entries) == 1
        tickets: list[BatchTicket] = batch.entries  # type: ignore[assignment]
        for ticket in tickets:
            begin = at
            at += ticket.rows
            if ticket.done:
                continue
            ticket.done = True
            request = ticket.request
            if (timeline := request.timeline) is not None and not timeline.ended:
                timeline.events.append((now, "computed", None))
            sink = ticket.sink
            arrived = ticket.arrived
            num += 1
            rows += ticket.rows
            total += now - arrived
            waited += started - arrived
            metrics.latency.observe(now - arrived)
            metrics.queued.observe(started - arrived)
            if outputs is None:
                sink.close(error)
                continue
            wanted = request.outputs
            if single:
                mine = outputs if wanted is None else {key: outputs[key] for key in wanted}
            else:
                mine = {key: outputs[key][begin:at] for key in (outputs if wanted is None else wanted)}
            sink.respond(Response(model=name, version=version, outputs=mine, id=request.id))
            sink.close(None)
        if error is None:
            metrics.success.add(total, num)
            metrics.queue_time.add(waited, num)
            metrics.rows += rows
            metrics.last_inference_ms = int(time.time() * 1000)
        else:
            metrics.fail.add(total, num)

    def stream_ended(self, slot: _Slot, ticket: BatchTicket, error: FairleadError | None) -> None:
        batch = slot.batch
        assert batch is not None
        slot.batch = None
        ticket.slot = None
        self._running -= 1
        now = time.perf_counter()
        if (note := batch.note) is not None:
            note.ended, note.compute_seconds, note.error = now, now - batch.started, "" if error is None else error.message[:MAX_CHARS]
            if ticket.request.timeline is not None:
                ticket.request.timeline.note(now, "computed")
        self.batcher.finish(batch)
        if not ticket.done:
            self.metrics.latency.observe(now - ticket.arrived)
            self.metrics.queued.observe(batch.started - ticket.arrived)
            if error is None:
                self.metrics.success.add(now - ticket.arrived)
                self.metrics.queue_time.add(batch.started - ticket.arrived)
                self.metrics.rows += ticket.rows
                self.metrics.batch(batch.rows, batch.close_reason, 0.0, now - batch.started, 0.0)
                self.metrics.last_inference_ms = int(time.time() * 1000)
            else:
                self.metrics.fail.add(now - ticket.arrived)
        self._close(ticket, error)
        self._schedule()

    def _close(self, ticket: BatchTicket, error: FairleadError | None) -> None:
        if not ticket.done:
            ticket.done = True
            ticket.sink.close(error)

    # The end

    async def warm_up(self, samples: list[Tensors]) -> None:
        """Run samples through every instance before anybody waits for an answer. Raises what the model raises."""
        for slot in self.slots:
            for sample in samples:
                ended: asyncio.Future[FairleadError | None] = self._loop.create_future()
                if self.spec.streams:
                    request = Request(model=self.name, inputs=sample, arrived=time.perf_counter())
                    slot.instance.stream(request, _WarmupStream(slot.instance, ended), CREDIT)
                else:
                    slot.instance.run([sample], None, lambda _, error, ended=ended: ended.done() or ended.set_result(error), ())  # type: ignore[misc]
                async with asyncio.timeout(WARMUP_SECONDS):
                    error = await ended
                if error is not None:
                    raise error

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, finish those that are here (those that `timeout` cuts off fail), release everything."""
        self.draining = True
        self._schedule()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        if self._timer is not None:
            self._timer.cancel()
        left = [*self.batcher.drop_all(), *self._retries]
        self._retries.clear()
        for slot in self.slots:
            if slot.batch is not None:
                left.extend(slot.batch.entries)
        for entry in left:
            assert isinstance(entry, BatchTicket)
            self._close(entry, Unavailable(f"model '{self.name}' version {self.version} was unloaded before it answered"))
        await asyncio.gather(*(slot.instance.close() for slot in self.slots))


class _StreamSink:
    """From an instance's stream to the ticket's sink."""

    def __init__(self, owner: ModelVersion, slot: _Slot, ticket: BatchTicket) -> None:
        self.owner = owner
        self.slot = slot
        self.ticket = ticket

    def respond(self, outputs: Tensors) -> None:
        ticket = self.ticket
        if not ticket.done:
            wanted = ticket.request.outputs
            mine = outputs if wanted is None else {key: outputs[key] for key in wanted if key in outputs}
            ticket.sink.respond(Response(model=self.owner.name, version=self.owner.version, outputs=mine, id=ticket.request.id))

    def close(self, error: FairleadError | None) -> None:
        self.owner.stream_ended(self.slot, self.ticket, error)


class _WarmupStream:
    """Takes everything and keeps nothing."""

    def __init__(self, instance: Instance, ended: "asyncio.Future[FairleadError | None]") -> None:
        self.instance = instance
        self.ended = ended

    def respond(self, outputs: Tensors) -> None:
        self.instance.grant(1)

    def close(self, error: FairleadError | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


class _Channel:
    """A sink that an async iterator reads. Bounded by the stream's credit: CREDIT responses at most wait here."""

    def __init__(self) -> None:
        self._responses: deque[Response] = deque()
        self._closed = False
        self._error: FairleadError | None = None
        self._changed = asyncio.Event()

    def respond(self, response: Response) -> None:
        self._responses.append(response)
        self._changed.set()

    def close(self, error: FairleadError | None) -> None:
        self._closed, self._error = True, error
        self._changed.set()

    async def next(self) -> Response | None:
        """The next response, None at the end. Raises what the request failed with."""
        while not self._responses:
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._responses.popleft()
