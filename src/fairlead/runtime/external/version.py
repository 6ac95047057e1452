"""One loaded version of a model that somebody else's engine computes: bodies go on as they came, other prompts are translated."""

import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from fairlead.core.errors import Cancelled, FairleadError, InvalidRequest, ShuttingDown, Unavailable, Unsupported
from fairlead.core.generation import Usage
from fairlead.core.request import Request, Response, Sink
from fairlead.core.specs import ModelSpec
from fairlead.runtime.engine_version import EngineTicket, EngineVersion
from fairlead.runtime.external.instance import ExternalInstance
from fairlead.runtime.lives import ReplicaProcess
from fairlead.runtime.upstream.place import UpstreamTicket, responses_of


class PassedTicket:
    """A body on its way through another engine: the sink of the place that it is sent to, and the ticket of who asked."""

    __slots__ = ("arrived", "begun", "done", "instance", "owner", "sink", "status", "ticket", "usage")

    def __init__(self, owner: "ExternalVersion", instance: ExternalInstance, sink: Sink, arrived: float) -> None:
        self.owner = owner
        self.instance = instance
        self.sink = sink
        self.arrived = arrived
        self.ticket: UpstreamTicket | None = None
        self.usage: Usage | None = None
        self.begun = False
        self.done = False
        self.status = 200

    def cancel(self) -> None:
        """The caller left. Its sink is closed with Cancelled unless it was already closed."""
        if self.ticket is not None:
            self.ticket.cancel()

    def pause(self) -> None:
        if self.ticket is not None:
            self.ticket.pause()

    def resume(self) -> None:
        if self.ticket is not None:
            self.ticket.resume()

    # From the place

    def respond(self, response: Response) -> None:
        if not self.begun:
            self.begun = True
            self.status = response.status
            if response.status < 400:
                self.instance.began(time.perf_counter() - self.arrived)
        self.usage = response.usage
        response.version = self.owner.version
        self.sink.respond(response)

    def close(self, error: FairleadError | None) -> None:
        self.ticket = None  # each knows the other: only the garbage collector would free them
        self.done = True
        self.instance.softened(error)
        self.owner.passed(self, error)
        self.sink.close(error)


class ExternalVersion(EngineVersion):
    """States as an EngineVersion's."""

    instances: Sequence[ExternalInstance]  # type: ignore[assignment]

    def __init__(self, spec: ModelSpec, version: str, platform: str, instances: Sequence[ExternalInstance]) -> None:
        super().__init__(spec, version, platform, instances)  # type: ignore[arg-type]
        self._passed: set[PassedTicket] = set()

    @property
    def processes(self) -> Sequence[ReplicaProcess]:
        """None: whose code runs there is nobody's here."""
        return ()

    def submit(self, request: Request, sink: Sink, instance: ExternalInstance | None = None) -> EngineTicket | PassedTicket:  # type: ignore[override]
        """As EngineVersion's; a body goes on as it came."""
        if request.raw is None:
            return super().submit(request, sink, instance)  # type: ignore[arg-type]
        return self._pass(request, instance, sink)

    def infer(self, request: Request, instance: ExternalInstance | None = None) -> AsyncGenerator[Response, None]:  # type: ignore[override]
        if request.raw is None:
            return super().infer(request, instance)  # type: ignore[arg-type]
        return responses_of(partial(self._pass, request, instance))

    def _pass(self, request: Request, instance: ExternalInstance | None, sink: Sink) -> PassedTicket:
        chosen = instance or self._least_loaded()
        assert isinstance(chosen, ExternalInstance)
        ticket = PassedTicket(self, chosen, sink, request.arrived or time.perf_counter())
        self._passed.add(ticket)
        self._idle.clear()
        try:
            if self.draining:
                raise ShuttingDown(
                    f"model '{self.name}' version {self.version} is unloading, it has stopped accepting new inference requests"
                )
            sent = chosen.pass_on(request, ticket)
        except FairleadError as error:
            ticket.close(error)
            return ticket
        if not ticket.done:
            ticket.ticket = sent
        return ticket

    def passed(self, ticket: PassedTicket, error: FairleadError | None) -> None:
        """It is over."""
        metrics, seconds = self.metrics, time.perf_counter() - ticket.arrived
        refused = isinstance(error, (InvalidRequest, Unsupported, Unavailable)) or (error is None and 400 <= ticket.status < 500)
        if isinstance(error, Cancelled):
            metrics.cancelled += 1
        elif refused:
            metrics.refused += 1
        else:
            metrics.latency.observe(seconds)
            if error is None and ticket.status < 400:
                metrics.success.add(seconds)
                metrics.rows += 1
                metrics.last_inference_ms = int(time.time() * 1000)
            else:
                metrics.fail.add(seconds)
        if ticket.usage is not None:
            ticket.instance.used(ticket.usage)
        self._passed.discard(ticket)
        self._settle()

    def _settle(self) -> None:
        if not self._tickets and not self._passed:
            self._idle.set()
