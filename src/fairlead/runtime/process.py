"""An execution slot in a process of its own: for code that holds the GIL, may crash, or must give its memory back."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fairlead.backends.base import Kind as BackendKind
from fairlead.backends.base import RequestContext
from fairlead.core.errors import Cancelled, FairleadError, InvalidRequest, TooLarge
from fairlead.core.request import Request
from fairlead.core.specs import ModelSpec, TensorSpec
from fairlead.core.tensors import Tensors
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.instances import Done, Stream
from fairlead.runtime.lives import Life, ReplicaProcess
from fairlead.runtime.slab import SLAB_BYTES
from fairlead.runtime.wire import Buffer, Frame, Kind, WireError, error_of, pack, unpack


class ProcessInstance(ReplicaProcess):
    """Implements `Instance` on a replica process, which it starts again whenever it dies."""

    def __init__(
        self,
        spec: ModelSpec,
        artefact: Path,
        kind: BackendKind,
        threads: int,
        forkserver: ForkServer,
        on_change: Callable[[], None],
        *,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        """`on_change`: called when `ready` or `down` changes after `start`.

        `slab_bytes`: bound of the memory shared with the process, for each direction; 0 sends everything by the socket.
        """
        super().__init__(spec, artefact, kind, threads, forkserver, on_change, slab_bytes=slab_bytes)
        self.gather_seconds = 0.0
        self.compute_seconds = 0.0
        self.platform = ""
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.batches = self.streams = False
        self.example: Tensors | None = None
        self._work = 0
        self._done: Done | None = None  # of the running batch
        self._stream: Stream | None = None  # the running stream's consumer
        self._cancelled = False

    # Instance

    def run(self, inputs: list[Tensors], outputs: frozenset[str] | None, done: Done, requests: Sequence[Request] = ()) -> None:
        """`requests`: those that `inputs` belong to, for models that look at more than inputs."""
        if not self.ready:
            done(None, self._not_ready())
            return
        started = time.perf_counter()
        self._done = done
        if (error := self._submit(Kind.INFER, inputs, outputs, requests, 0)) is not None:
            self._done = None
            done(None, error)
        self.gather_seconds = time.perf_counter() - started

    def stream(self, request: Request, stream: Stream, credit: int) -> None:
        if not self.ready:
            stream.close(self._not_ready())
            return
        self._stream, self._cancelled = stream, False
        outputs = None if request.outputs is None else frozenset(request.outputs)
        if (error := self._submit(Kind.STREAM, [request.inputs], outputs, (request,), credit)) is not None:
            self._stream = None
            stream.close(error)

    def grant(self, credit: int) -> None:
        if self._stream is not None and self._life is not None:
            self._life.connection.send(Frame(Kind.GRANT, work=self._work, credit=credit, freed=_received(self._life)))

    def cancel(self) -> None:
        if self._stream is not None and self._life is not None and not self._cancelled:
            self._cancelled = True
            self._life.connection.send(Frame(Kind.CANCEL, work=self._work))

    # To and from the process

    def _stop_running(self) -> None:
        self.cancel()

    def _submit(
        self, kind: Kind, inputs: list[Tensors], outputs: frozenset[str] | None, requests: Sequence[Request], credit: int
    ) -> FairleadError | None:
        life = self._life
        assert life is not None
        self._work += 1
        frame = Frame(kind, work=self._work, freed=_received(life), credit=credit)
        if outputs is not None:
            frame.outputs = list(outputs)
        traces = [request.traceparent for request in requests]
        if any(traces) or any(request.id or request.parameters for request in requests):
            frame.requests = [RequestContext(r.id, trace, r.parameters, r.num_rows) for r, trace in zip(requests, traces, strict=True)]
        try:
            frame.tensors, body = pack(inputs, life.requests)
            life.connection.send(frame, body)
        except WireError as error:
            return TooLarge(f"request for model '{self.model}': {error}")
        except (TypeError, ValueError, OverflowError) as error:
            return InvalidRequest(f"request cannot be passed to model '{self.model}': {error}")
        return None

    def _on_frame(self, frame: Frame, body: Buffer) -> None:
        life, done, stream = self._life, self._done, self._stream
        assert life is not None
        if frame.work != self._work or (done is None and stream is None):
            raise WireError(f"{frame.kind.name} for {frame.work}, which does not run")
        if frame.kind is Kind.RESPONSE:
            outputs = unpack(frame.tensors, body, life.responses, copy=True)
            if done is not None:
                self._done = None
                self.compute_seconds = frame.seconds
                done(outputs, None)
            elif stream is not None and not self._cancelled:
                stream.respond(outputs)
        elif frame.kind is Kind.ERROR:
            self._fail_running(error_of(frame.error, frame.message))
        elif frame.kind is Kind.END and stream is not None:
            self._stream = None
            stream.close(Cancelled("request was cancelled") if self._cancelled else None)
        else:
            raise WireError(f"unexpected {frame.kind.name}")

    def _fail_running(self, error: FairleadError) -> None:
        done, stream = self._done, self._stream
        self._done = self._stream = None
        if done is not None:
            done(None, error)
        if stream is not None:
            stream.close(Cancelled("request was cancelled") if self._cancelled else error)

    def _learn(self, life: Life, frame: Frame, body: Buffer) -> None:
        ready = frame.ready
        if ready is None:
            raise WireError("READY without what is ready")
        self.platform, self.batches, self.streams = ready.platform, ready.batches, ready.streams
        self.inputs, self.outputs = ready.inputs, ready.outputs
        example = unpack(frame.tensors, body, life.responses, copy=True)
        self.example = example if ready.has_example else None


def _received(life: Life) -> int:
    return life.responses.received if life.responses is not None else 0
