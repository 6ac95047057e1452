"""One loaded version of a model with an engine: which replica takes a request, and the way of its answer to the caller."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path

from msgspec import Struct, structs

from fairlead.core.adapters import adapter_names
from fairlead.core.errors import Cancelled, FairleadError, InvalidRequest, ShuttingDown, TimeoutExpired, Unavailable, Unsupported
from fairlead.core.generation import Delta, EngineInfo, EngineStats, Phase, Prompt, Usage, add_calls
from fairlead.core.request import Request, Response, Sink
from fairlead.core.specs import InputCheck, ModelSpec
from fairlead.core.tensors import Tensors
from fairlead.core.timeline import Phases
from fairlead.observe.metrics import ModelMetrics, add_stats
from fairlead.runtime.engine_instance import EngineInstance
from fairlead.runtime.kv_budget import Holding
from fairlead.runtime.lives import ReplicaProcess
from fairlead.runtime.sleep import Sleep
from fairlead.runtime.text_tensors import TextForm, tensor_specs, text_form
from fairlead.runtime.version import WARMUP_SECONDS

UNRANKED = 1 << 31
"""The priority of a request that names none, where the model declares no levels."""


class EngineTicket:
    """A request on its way through an engine. `cancel` stops it at any stage."""

    __slots__ = ("age", "arrived", "done", "form", "instance", "note", "owner", "parked", "reader", "timeline", "work")

    def __init__(self, owner: "EngineVersion", request: Request, reader: "_ToSink | _Merging") -> None:
        self.owner = owner
        self.reader = reader
        self.arrived = request.arrived or time.perf_counter()
        self.done = False
        self.form: TextForm | None = None
        """Of a request with tensors."""
        self.instance: EngineInstance | None = None
        self.work = 0
        self.parked: _Parked | None = None
        """While its model wakes for it."""
        self.timeline = request.timeline
        self.note: Phases | None = None
        """In its timeline: what its engine did."""
        self.age = 0.0
        """Seconds since it arrived, when it was sent to the engine."""

    def cancel(self) -> None:
        """The caller left. Its sink is closed with Cancelled unless it was already closed."""
        if not self.done:
            self.owner.cancel(self)

    # From the instance

    def respond(self, delta: Delta) -> None:
        if delta.finish_reason and self.timeline is not None and not self.timeline.ended:
            self.timeline.finish_reasons += (delta.finish_reason,)
        if delta.usage is not None:
            self._told(delta, delta.usage)
        self.reader.respond(delta)

    def _told(self, delta: Delta, usage: Usage) -> None:
        """The last piece says what the engine did: for the timeline alone, which is nobody's who is given the same answer later."""
        phases, delta.phases = delta.phases, []
        if self.timeline is not None and self.note is not None and not self.timeline.ended:
            self.note.phases = [since(phase, self.age) for phase in phases]
            self.timeline.used(usage)

    def close(self, error: FairleadError | None) -> None:
        self.owner.ended(self, error)


class EngineVersion:
    """States: serving → draining → closed; while it serves it may sleep (`runtime.sleep`). Everything is called from the event loop."""

    def __init__(
        self,
        spec: ModelSpec,
        version: str,
        platform: str,
        instances: Sequence[EngineInstance],
        *,
        folder: Path | None = None,
        holding: Holding | None = None,
    ) -> None:
        """`instances`: loaded. `folder`: their checkpoint's. `holding`: their KV memory, of the budget."""
        self.folder = folder
        self.holding = holding
        info = instances[0].info
        assert info is not None
        inputs, outputs = tensor_specs(info)
        self.spec = spec.replace(inputs=inputs, outputs=outputs)
        self.name = spec.name
        self.version = version
        self.platform = platform
        self.info: EngineInfo = info
        self.instances = instances
        self.check = InputCheck(self.spec)
        self.draining = False
        self._tickets: set[EngineTicket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.metrics = ModelMetrics(
            spec.name,
            version,
            queue=lambda: (self.stats.num_waiting, self.stats.num_waiting),
            restarts=lambda: sum(instance.restarts for instance in self.instances),
            engine=lambda: self.stats,
            kv_bytes=len(instances) * info.num_kv_blocks * info.kv_block_bytes,
        )
        self._kv_bytes = self.metrics.kv_bytes
        self.sleep = Sleep(
            spec.sleep, spec.name, instances, holding, light=info.num_kv_blocks > 0, settle=self._let_end, on_change=self._slept
        )

    @property
    def ready(self) -> bool:
        return any(self.takes(instance) for instance in self.instances)

    def takes(self, instance: EngineInstance) -> bool:
        """Requests go there now, or wake it."""
        if self.draining:
            return False
        return instance.ready and not instance.recovering if self.sleep.awake else self.sleep.takes_requests

    @property
    def processes(self) -> Sequence[ReplicaProcess]:
        return self.instances

    @property
    def stats(self) -> EngineStats:
        """Of all replicas together; the counts are those of all their lives."""
        total = EngineStats()
        for instance in self.instances:
            total = add_stats(total, instance.stats)
        return total

    def adapters(self) -> tuple[str, ...]:
        """LoRA adapters that lie beside the weights now. Blocks."""
        if self.folder is None or "generate" not in self.info.tasks or not self.spec.llm.lora_bytes:
            return ()
        return adapter_names(self.folder / self.spec.llm.loras)

    def statistics(self) -> dict[str, object]:
        return self.metrics.statistics()

    # From the caller

    def submit(self, request: Request, sink: Sink, instance: EngineInstance | None = None) -> EngineTicket:
        """Queue a request, at `instance` (None: the least loaded). The pieces of the answer to a prompt go to the sink as they
        come; tensors are answered by one response. Errors go to the sink, possibly before this returns."""
        reader = _ToSink(self, request, sink)
        ticket = EngineTicket(self, request, reader)
        reader.ticket = ticket
        self._enqueue(ticket, request, whole=True, instance=instance)
        return ticket

    async def infer(self, request: Request, instance: EngineInstance | None = None) -> AsyncGenerator[Response, None]:
        """The pieces of the answer, computed at `instance` (None: at the least loaded). Those that a slow reader has not taken
        yet are joined. Closing the iterator cancels."""
        reader = _Merging()
        ticket = EngineTicket(self, request, reader)
        self._enqueue(ticket, request, instance=instance)
        try:
            form = ticket.form
            if form is None or form.streams:
                while (delta := await reader.next()) is not None:
                    yield self.response(request, form, [delta])
            else:
                choices = []
                while (delta := await reader.next()) is not None:
                    choices.append(delta)
                yield self.response(request, form, choices)
        finally:
            ticket.cancel()

    def response(self, request: Request, form: TextForm | None, deltas: list[Delta]) -> Response:
        """One response: a Delta, or the tensors of `deltas` in a form."""
        answer = Response(model=self.name, version=self.version, id=request.id)
        if form is None:
            (answer.delta,) = deltas
        else:
            answer.outputs = form.tensors(deltas)
        return answer

    def cancel(self, ticket: EngineTicket) -> None:
        if ticket.instance is not None:
            ticket.instance.cancel(ticket.work)
        elif ticket.parked is not None:
            self.sleep.leave(ticket.parked)
        self.metrics.cancelled += 1
        self._close(ticket, Cancelled("request was cancelled"))

    def _enqueue(self, ticket: EngineTicket, request: Request, *, whole: bool = False, instance: EngineInstance | None = None) -> None:
        """`whole`: the caller takes one response only."""
        try:
            prompt = self._prompt(ticket, request)
            if whole and ticket.form is not None and ticket.form.streams:
                raise Unsupported(
                    f"model '{self.name}' answers with several responses: ask for them as a stream (gRPC ModelStreamInfer, or HTTP generate_stream)"
                )
            if self.draining:
                raise ShuttingDown(
                    f"model '{self.name}' version {self.version} is unloading, it has stopped accepting new inference requests"
                )
            if self.sleep.awake:
                self._send(ticket, request, prompt, instance)
            else:
                ticket.parked = _Parked(ticket, request, prompt, instance)
                self.sleep.park(ticket.parked, self._left(ticket, request)[1])
        except FairleadError as error:
            self.refuse(ticket, error)

    def resume(self, parked: "_Parked") -> None:
        """It is awake."""
        try:
            self._send(parked.ticket, parked.request, parked.prompt, parked.instance)
        except FairleadError as error:
            self.refuse(parked.ticket, error)

    def refuse(self, ticket: EngineTicket, error: FairleadError) -> None:
        self.metrics.refused += 1
        self._close(ticket, error)

    def _left(self, ticket: EngineTicket, request: Request) -> tuple[float, float]:
        """(its age, seconds that it may still wait for its start; 0: any). Raises TimeoutExpired."""
        age, timeout = time.perf_counter() - ticket.arrived, self._timeout(request)
        if timeout and timeout <= age:
            raise TimeoutExpired("Request timeout expired")
        return age, timeout - age if timeout else 0.0

    def _send(self, ticket: EngineTicket, request: Request, prompt: Prompt, instance: EngineInstance | None) -> None:
        """To an instance. Raises FairleadError."""
        age, left = self._left(ticket, request)
        chosen = instance or self._least_loaded()
        ticket.work = chosen.submit(prompt, ticket, priority=self._priority(request), age=age, timeout=left)
        ticket.instance = chosen
        if ticket.timeline is not None:
            ticket.age = age
            ticket.note = Phases(self.name, self.version, self.instances.index(chosen), [])
            ticket.timeline.note(ticket.arrived + age, "engine", ticket.note)
        self._tickets.add(ticket)
        self._idle.clear()
        self.sleep.busy()

    def _prompt(self, ticket: EngineTicket, request: Request) -> Prompt:
        """Raises InvalidRequest or Unsupported."""
        if request.prompt is None:
            self.check(request)
            ticket.form = text_form(request, self.info)
            return ticket.form.prompt
        if request.inputs:
            raise InvalidRequest(f"request for model '{self.name}' has a prompt and tensors: one of the two")
        return request.prompt

    def _timeout(self, request: Request) -> float:
        """Seconds that it may wait for its start, as for models that batch; 0: any."""
        policy = self.spec.batching.queue_policy
        wanted, default = request.timeout, policy.default_timeout
        allowed = policy.allow_timeout_override and wanted > 0 and (not default or wanted < default)
        return wanted if allowed else default

    def _priority(self, request: Request) -> int:
        """Smaller goes first."""
        levels = self.spec.batching.priority_levels
        if levels and not 1 <= request.priority <= levels:
            return self.spec.batching.default_priority or (levels + 1) // 2
        return request.priority or UNRANKED

    def _least_loaded(self) -> EngineInstance:
        """Of those that are ready; any where none is, which says why."""
        ready = [instance for instance in self.instances if instance.ready]
        return min(ready or self.instances, key=lambda instance: instance.num_in_flight)

    def _slept(self) -> None:
        """Or woke."""
        self.metrics.kv_bytes = self._kv_bytes if self.sleep.awake else 0
        self.metrics.wakes = self.sleep.wakes

    # From the instances

    def instance_changed(self) -> None:
        """An instance became ready or stopped being so: nothing waits here for that."""

    def ended(self, ticket: EngineTicket, error: FairleadError | None) -> None:
        if ticket.done:
            return
        metrics, seconds = self.metrics, time.perf_counter() - ticket.arrived
        if error is None:
            metrics.latency.observe(seconds)
            metrics.success.add(seconds)
            metrics.rows += 1
            metrics.last_inference_ms = int(time.time() * 1000)
        elif isinstance(error, (InvalidRequest, Unsupported, Unavailable)):
            metrics.refused += 1
        else:
            metrics.latency.observe(seconds)
            metrics.fail.add(seconds)
        self._close(ticket, error)

    def _close(self, ticket: EngineTicket, error: FairleadError | None) -> None:
        ticket.done = True
        self._tickets.discard(ticket)
        self._settle()
        ticket.reader.close(error)

    def _settle(self) -> None:
        if not self._tickets:
            self._idle.set()
            self.sleep.idle()

    # The end

    async def warm_up(self, samples: list[Tensors]) -> None:
        """Run samples through every replica before anybody waits for an answer. Raises what the model raises."""
        for instance in self.instances:
            for sample in samples:
                reader = _Merging()
                request = Request(model=self.name, inputs=sample)
                ticket = EngineTicket(self, request, reader)
                self._enqueue(ticket, request, instance=instance)
                async with asyncio.timeout(WARMUP_SECONDS):
                    while await reader.next() is not None:
                        pass

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, finish those that are here (those that `timeout` cuts off fail), release everything."""
        self.draining = True
        await self.sleep.close()
        await self._let_end(timeout)
        await asyncio.gather(*(instance.close() for instance in self.instances))
        if self.holding is not None:
            self.holding.forget()

    async def _let_end(self, timeout: float) -> None:
        """Return when no request runs; those that `timeout` cuts off fail."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        for ticket in list(self._tickets):
            assert ticket.instance is not None
            ticket.instance.cancel(ticket.work)
            what = "unloaded" if self.draining else "put to sleep"
            self._close(ticket, Unavailable(f"model '{self.name}' version {self.version} was {what} before it answered"))


class _Parked(Struct, eq=False):
    """A request whose model wakes for it."""

    ticket: EngineTicket
    request: Request
    prompt: Prompt
    instance: EngineInstance | None

    def resume(self) -> None:
        self.ticket.owner.resume(self)

    def refuse(self, error: FairleadError) -> None:
        self.ticket.owner.refuse(self.ticket, error)


class _ToSink:
    """Passes the pieces of an answer to a sink; of tensors all at once."""

    ticket: EngineTicket

    def __init__(self, version: EngineVersion, request: Request, sink: Sink) -> None:
        self.version = version
        self.request = request
        self.sink = sink
        self.choices: list[Delta] = []

    def respond(self, delta: Delta) -> None:
        if self.ticket.form is None:
            self.sink.respond(self.version.response(self.request, None, [delta]))
        else:
            self.choices.append(delta)

    def close(self, error: FairleadError | None) -> None:
        if error is None and self.choices:
            self.sink.respond(self.version.response(self.request, self.ticket.form, self.choices))
        self.sink.close(error)


class _Merging:
    """What an async iterator reads. Pieces that wait are joined, so that it holds no more than the answer itself."""

    def __init__(self) -> None:
        self._waiting: dict[int, Delta] = {}
        """By choice, in the order in which they began to wait."""
        self._closed = False
        self._error: FairleadError | None = None
        self._changed = asyncio.Event()

    def respond(self, delta: Delta) -> None:
        waiting = self._waiting.pop(delta.index, None) if delta.usage is not None else self._waiting.get(delta.index)
        self._waiting[delta.index] = delta if waiting is None else joined(waiting, delta)  # usage comes last, behind the other choices
        self._changed.set()

    def close(self, error: FairleadError | None) -> None:
        self._closed, self._error = True, error
        self._changed.set()

    async def next(self) -> Delta | None:
        """The next piece, None at the end. Raises what the request failed with."""
        while not self._waiting:
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.pop(next(iter(self._waiting)))


def joined(first: Delta, then: Delta) -> Delta:
    """Two pieces of one choice, or of one picture, as one: `first`, extended."""
    first.text += then.text
    first.reasoning += then.reasoning
    add_calls(first.tool_calls, then.tool_calls)
    first.token_ids += then.token_ids
    if then.logprobs is not None:
        first.logprobs = [*first.logprobs, *then.logprobs] if first.logprobs is not None else then.logprobs
    if then.prompt_logprobs is not None:
        first.prompt_logprobs = then.prompt_logprobs
    if then.finish_reason:
        first.finish_reason, first.stop_reason = then.finish_reason, then.stop_reason
    if then.usage is not None:
        first.usage = then.usage
    if then.vector:
        first.vector = then.vector
    if then.tokens is not None:
        first.tokens = then.tokens
    if then.progress is not None:
        seen = first.progress.preview if first.progress is not None else b""
        first.progress = then.progress if then.progress.preview or not seen else structs.replace(then.progress, preview=seen)
    if then.picture is not None:
        first.picture = then.picture
    if then.phases:
        first.phases = then.phases
    return first


def since(phase: Phase, age: float) -> Phase:
    """As counted from when a request of this age was sent, of one that an engine counts from its arrival."""
    start = phase.start - age
    if start < 0:
        phase.seconds = max(phase.seconds + start, 0.0)
    phase.start = max(start, 0.0)
    return phase
