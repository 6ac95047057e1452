"""What is behind the methods of `inference.GRPCInferenceService` and `grpc.health.v1.Health`."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import structlog

from fairlead.api.doorkeeper import see
from fairlead.api.grpc.calls import Awaited, Call, Method, Streaming, Unary
from fairlead.api.grpc.codec import (
    Buffer,
    InferCall,
    Refused,
    decode_request,
    empty_final_response,
    encode_response,
    encode_stream_error,
    encode_stream_response,
    is_slow,
)
from fairlead.api.grpc.messages import from_dict, message_class, parse
from fairlead.api.kserve.codec import Form, TooSlow, message_of, with_labels
from fairlead.api.kserve.metadata import model_config, model_metadata, model_ready, server_metadata
from fairlead.api.kserve.parameters import file_path
from fairlead.api.status import INTERNAL, GrpcStatus, grpc_end_of, grpc_status
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, NotFound, ShuttingDown, Unsupported
from fairlead.core.policy import Scope
from fairlead.core.request import Inference, Request, Response, Ticket
from fairlead.core.timeline import Timeline
from fairlead.gateway.ends import ended
from fairlead.gateway.identity.identity import may_use
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

log = structlog.get_logger("fairlead.grpc")

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
MAX_STREAM_REQUESTS = 128
"""Requests of one ModelStreamInfer call under way at once."""
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
NOT_OFFERED = {
    "shared-memory regions: they would let clients read the server's memory. Send tensors in the request": (
        *(f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")),
    ),
    "trace settings: traces follow the traceparent metadata": ("TraceSetting",),
    "log settings over gRPC: set them when the server starts": ("LogSettings",),
}


def methods_of(repository: ModelRepository, gateway: Inference, finished: Finished) -> dict[bytes, Method]:
    """The table of methods by path."""
    service = Service(repository, gateway, finished)
    answers: dict[str, tuple[type, Callable[[Any, Caller], Any]]] = {
        name: (message_class(f"inference.{name}Request"), getattr(service, method))
        for name, method in {
            "ServerMetadata": "server_metadata",
            "ModelReady": "model_ready",
            "ModelMetadata": "model_metadata",
            "ModelConfig": "model_config",
            "ModelStatistics": "model_statistics",
            "RepositoryIndex": "repository_index",
        }.items()
    }
    methods: dict[str, Method] = {f"/{INFERENCE}/{name}": _answering(kind, answer) for name, (kind, answer) in answers.items()}
    methods |= {
        f"/{INFERENCE}/ModelInfer": Unary(service.model_infer),
        f"/{INFERENCE}/ModelStreamInfer": Streaming(service.model_stream_infer),
        f"/{INFERENCE}/RepositoryModelLoad": Awaited(service.load, Scope.REPOSITORY),
        f"/{INFERENCE}/RepositoryModelUnload": Awaited(service.unload, Scope.REPOSITORY),
        f"/{INFERENCE}/ServerLive": _answering(message_class("inference.ServerLiveRequest"), service.server_live, None),
        f"/{INFERENCE}/ServerReady": _answering(message_class("inference.ServerReadyRequest"), service.server_ready, None),
        f"/{HEALTH}/Check": _answering(service.HealthRequest, service.health_check, None),
        f"/{HEALTH}/Watch": Streaming(service.health_watch, None),
    }
    methods |= {f"/{INFERENCE}/{name}": _refusing(what) for what, names in NOT_OFFERED.items() for name in names}
    return {path.encode(): method for path, method in methods.items()}


def _answering(kind: Any, answer: Callable[[Any, Caller], Any], scope: Scope | None = Scope.INFER) -> Unary:
    """A method that needs no waiting: message in, message out."""

    def start(call: Call, message: Buffer) -> None:
        request = parse(kind, message)
        call.model = getattr(request, "name", "")
        call.version = getattr(request, "version", "")
        assert call.caller is not None
        if call.model:
            see(call.caller, call.model)
        call.finish([answer(request, call.caller).SerializeToString()])

    return Unary(start, scope)


def _refusing(what: str) -> Unary:
    def start(call: Call, _: Buffer) -> None:
        raise Unsupported(f"this server does not offer {what}")

    return Unary(start)


class Service:
    """The operations upon one repository."""

    HealthRequest = message_class("grpc.health.v1.HealthCheckRequest")
    HealthResponse = message_class("grpc.health.v1.HealthCheckResponse")
    ServerLiveResponse = message_class("inference.ServerLiveResponse")
    ServerReadyResponse = message_class("inference.ServerReadyResponse")
    ServerMetadataResponse = message_class("inference.ServerMetadataResponse")
    ModelReadyResponse = message_class("inference.ModelReadyResponse")
    ModelMetadataResponse = message_class("inference.ModelMetadataResponse")
    ModelConfigResponse = message_class("inference.ModelConfigResponse")
    ModelStatisticsResponse = message_class("inference.ModelStatisticsResponse")
    RepositoryIndexResponse = message_class("inference.RepositoryIndexResponse")
    LoadRequest = message_class("inference.RepositoryModelLoadRequest")
    UnloadRequest = message_class("inference.RepositoryModelUnloadRequest")

    def __init__(self, repository: ModelRepository, gateway: Inference, finished: Finished) -> None:
        self.repository = repository
        self.gateway = gateway
        self.finished = finished

    # Inference

    def model_infer(self, call: Call, message: Buffer) -> None:
        call.timeline.bytes_in = len(message)
        try:
            infer = decode_request(message)
        except Refused as refused:
            call.fail(grpc_status(refused.error), refused.message)
        except TooSlow:
            self._decode_in_thread(call, message)
        else:
            self._submit(call, infer)

    def _submit(self, call: Call, infer: InferCall) -> None:
        request = infer.request
        call.model, call.version = request.model, request.version
        complete(request, call, call.timeline)
        form = None if not infer.classes else self.form_of(infer)
        ticket = self.gateway.submit(request, _Answer(self, call, infer, form))
        if not call.done:
            call.cancel = ticket.cancel

    def _decode_in_thread(self, call: Call, message: Buffer) -> None:
        def decoded(future: asyncio.Future[InferCall]) -> None:
            if future.cancelled() or call.done:
                return
            call.cancel = None
            try:
                self._submit(call, future.result())
            except Refused as refused:
                call.fail(grpc_status(refused.error), refused.message)
            except Exception as error:
                call.fail_with(error)

        future = call.in_thread(decode_request, message, patient=True)
        future.add_done_callback(decoded)
        call.cancel = future.cancel

    async def model_stream_infer(self, call: Call) -> None:
        await _InferStream(self, call).run()

    def form_of(self, infer: InferCall) -> Form | None:
        """How outputs are to be classified; None if the model is unknown, which it will hear soon enough."""
        try:
            see(infer.request.caller, infer.request.model)
            spec = self.repository.find(infer.request.model, infer.request.version).spec
        except FairleadError:
            return None
        return with_labels(Form(classes=infer.classes or {}), spec)

    # The server and its models

    def server_live(self, _: Any, caller: Caller) -> Any:
        return self.ServerLiveResponse(live=True)

    def server_ready(self, _: Any, caller: Caller) -> Any:
        return self.ServerReadyResponse(ready=self.repository.ready)

    def server_metadata(self, _: Any, caller: Caller) -> Any:
        return self.ServerMetadataResponse(**server_metadata())

    def model_ready(self, request: Any, caller: Caller) -> Any:
        return self.ModelReadyResponse(ready=model_ready(self.repository, request.name, request.version))

    def model_metadata(self, request: Any, caller: Caller) -> Any:
        version = self.repository.find(request.name, request.version)
        return self.ModelMetadataResponse(**model_metadata(self.repository, version))

    def model_config(self, request: Any, caller: Caller) -> Any:
        version = self.repository.find(request.name, request.version)
        return from_dict(self.ModelConfigResponse, {"config": model_config(version)})

    def model_statistics(self, request: Any, caller: Caller) -> Any:
        found = self.repository.statistics(request.name, request.version)
        return from_dict(self.ModelStatisticsResponse, {"model_stats": [each for each in found if may_use(caller, str(each["name"]))]})

    # The repository

    def repository_index(self, request: Any, caller: Caller) -> Any:
        _refuse_named(request)
        entries = [entry for entry in self.repository.index(ready=request.ready) if may_use(caller, entry.name)]
        rows = [{"name": entry.name, "version": entry.version, "state": str(entry.state), "reason": entry.reason} for entry in entries]
        return self.RepositoryIndexResponse(models=rows)

    async def load(self, call: Call, message: Buffer) -> bytes:
        request = parse(self.LoadRequest, message)
        call.model = request.model_name
        assert call.caller is not None
        see(call.caller, call.model)
        _refuse_named(request)
        config: str | None = None
        files: dict[str, bytes] = {}
        for name, parameter in request.parameters.items():
            kind = parameter.WhichOneof("parameter_choice")
            if name == "config":
                if kind != "string_param":
                    raise InvalidRequest("load parameter 'config' must be a string_param")
                config = parameter.string_param
            else:
                path = file_path(name)
                if kind != "bytes_param":
                    raise InvalidRequest(f"load parameter '{name}' must be a bytes_param")
                files[path] = parameter.bytes_param
        if files and config is None:
            raise InvalidRequest("load parameter 'config' must be given where files are")
        await self.repository.load(request.model_name, config, files or None)
        return b""

    async def unload(self, call: Call, message: Buffer) -> bytes:
        request = parse(self.UnloadRequest, message)
        call.model = request.model_name
        assert call.caller is not None
        see(call.caller, call.model)
        _refuse_named(request)
        for name, parameter in request.parameters.items():
            # No model depends on another here, so both wishes come to the same.
            if name != "unload_dependents" or parameter.WhichOneof("parameter_choice") != "bool_param":
                raise InvalidRequest(f"unload parameter '{name}' is not 'unload_dependents' as a bool_param")
        await self.repository.unload(request.model_name)
        return b""

    # Health

    def health_check(self, request: Any, caller: Caller) -> Any:
        status = self._health(request.service)
        if status == SERVICE_UNKNOWN:
            raise NotFound(f"unknown service '{request.service}'")
        return self.HealthResponse(status=status)

    async def health_watch(self, call: Call) -> None:
        message = await call.next_message()
        if message is None:
            raise InvalidRequest("Watch needs a HealthCheckRequest")
        service = parse(self.HealthRequest, message).service
        last = 0
        while not call.leaving:
            changed = self.repository.readiness_changed
            status = self._health(service)
            if status != last:
                await call.send([self.HealthResponse(status=status).SerializeToString()])
                last = status
            await call.pause(changed)
        await call.send([self.HealthResponse(status=NOT_SERVING).SerializeToString()])

    def _health(self, service: str) -> int:
        if service not in ("", INFERENCE, HEALTH):
            return SERVICE_UNKNOWN
        return SERVING if self.repository.ready else NOT_SERVING


def complete(request: Request, call: Call, timeline: Timeline) -> None:
    """Add what the call's metadata says to a request."""
    assert call.caller is not None
    timeline.note(time.perf_counter(), "decoded")
    request.arrived, request.trace, request.timeline, request.caller = timeline.arrived, call.trace, timeline, call.caller
    request.log_id = call.request_id
    metadata = call.metadata
    if b"x-fairlead-class" in metadata:
        request.qos_class = metadata[b"x-fairlead-class"].decode("latin-1")
    if b"x-fairlead-session" in metadata:
        request.session = metadata[b"x-fairlead-session"].decode("latin-1")


def _refuse_named(request: Any) -> None:
    if request.repository_name:
        raise Unsupported("this server does not offer named repositories: leave 'repository_name' empty")


class _Answer:
    """The sink of a ModelInfer call."""

    __slots__ = ("answered", "call", "form", "request", "service")

    def __init__(self, service: Service, call: Call, infer: InferCall, form: Form | None) -> None:
        self.service = service
        self.call = call
        self.request = infer.request
        self.form = form
        self.answered = False

    def respond(self, response: Response) -> None:
        call, request, form = self.call, self.request, self.form
        self.answered = True
        call.cancel = None
        call.version = response.version
        call.num_rows = request.num_rows
        if call.done:
            return
        if response.headers:
            call.tell(response.headers)
        try:
            if is_slow(response, form):
                future = call.in_thread(encode_response, response, request.outputs, form)
                future.add_done_callback(self._encoded)
            else:
                call.finish(encode_response(response, request.outputs, form))
        except Exception as error:
            call.fail_with(error)

    def _encoded(self, future: asyncio.Future[list[Buffer]]) -> None:
        try:
            self.call.finish(future.result())
        except Exception as error:
            self.call.fail_with(error)

    def close(self, error: FairleadError | None) -> None:
        call = self.call
        call.cancel = None
        if error is not None:
            call.refuse(error, message_of(error, self.request.id))
        elif not self.answered:
            call.fail(GrpcStatus.INTERNAL, f"model '{self.request.model}' gave no response")


class _InferStream:
    """One ModelStreamInfer call.

    Answers of ordinary models leave in the order of their requests; those of a streaming model as they come.
    """

    def __init__(self, service: Service, call: Call) -> None:
        self.service = service
        self.call = call
        self.in_band = call.metadata.get(b"triton_grpc_error", b"").lower() != b"true"
        """Errors of a request are messages of the stream, which goes on."""
        self.turns: deque[_Turn] = deque()
        self.relays: set[asyncio.Task[None]] = set()
        self.changed: asyncio.Future[None] | None = None
        self.told = False
        call.quiet = True

    async def run(self) -> None:
        try:
            try:
                while (message := await self.call.next_message()) is not None:
                    await self._fewer_than(MAX_STREAM_REQUESTS)
                    await self._begin(message)
            except ShuttingDown:
                await self._fewer_than(1)
                raise
            await self._fewer_than(1)
        finally:
            for turn in tuple(self.turns):  # one that is cancelled leaves
                turn.cancel()
            relays = tuple(self.relays)
            for relay in relays:
                relay.cancel()
            if relays:
                await asyncio.wait(relays)

    async def _fewer_than(self, number: int) -> None:
        """Wait until so few requests are under way, and the client has taken what was answered."""
        while len(self.turns) + len(self.relays) >= number:
            self.changed = asyncio.get_running_loop().create_future()
            await self.changed
        await self.call.room()

    async def _begin(self, message: Buffer) -> None:
        turn = _Turn(self)
        turn.timeline.bytes_in = len(message)
        try:
            try:
                infer = decode_request(message)
            except TooSlow:
                infer = await self.call.in_thread(decode_request, message, patient=True)
            self.call.ask_again()
            request = turn.take(infer)
            see(request.caller, request.model)
            version = self.service.repository.find(request.model, request.version)
            if infer.classes:
                turn.form = with_labels(Form(classes=infer.classes), version.spec)
        except (Refused, FairleadError) as error:
            refused = error if isinstance(error, Refused) else Refused(error, turn.id)
            turn.id = refused.id
            self.turns.append(turn)
            turn.close(refused.error)
            return
        if version.spec.streams:
            turn.version = version.version
            relay = asyncio.get_running_loop().create_task(self._relay(infer, turn))
            self.relays.add(relay)
            relay.add_done_callback(self._relayed)
        else:
            self.turns.append(turn)
            turn.ticket = self.service.gateway.submit(request, turn)

    def tell(self, response: Response) -> None:
        """Of the first answer, what the head is to say of it."""
        if response.headers and not self.told:
            self.told = True
            self.call.tell(response.headers)

    def advance(self) -> None:
        """Send the answers whose turn it is."""
        while self.turns and self.turns[0].complete:
            turn = self.turns.popleft()
            if turn.error is not None:
                self.error(turn, turn.error)
            else:
                self.call.write(encode_stream_response(turn.parts))
                self.log(turn, GrpcStatus.OK, "")
        if self.changed is not None and not self.changed.done():
            self.changed.set_result(None)

    def error(self, turn: "_Turn", error: FairleadError) -> None:
        """What went wrong with one request."""
        message, status = message_of(error, turn.id), grpc_status(error)
        call, timeline = self.call, turn.timeline
        if not timeline.outcome:
            timeline.outcome, timeline.reason = ended(error)
        if self.in_band or call.done:
            self.log(turn, status, message)
            call.write([encode_stream_error(message, turn.id)])
        else:
            call.model, call.version, call.num_rows = turn.model, turn.version, turn.num_rows
            call.timeline = timeline
            call.refuse(error, message)

    async def _relay(self, infer: InferCall, turn: "_Turn") -> None:
        """The responses of a streaming model, at the pace of the client's reading."""
        request, call = infer.request, self.call
        try:
            async with aclosing(self.service.gateway.infer(request)) as responses:
                async for response in responses:
                    self.tell(response)
                    if not turn.timeline.first_at:
                        turn.timeline.first_at = time.perf_counter()
                    if is_slow(response, turn.form):
                        parts = await call.in_thread(encode_response, response, request.outputs, turn.form, final=False)
                    else:
                        parts = encode_response(response, request.outputs, turn.form, final=False)
                    await call.send(encode_stream_response(parts))
            if infer.wishes.empty_final_response:
                await call.send(encode_stream_response(empty_final_response(request.model, turn.version, request.id)))
            self.log(turn, GrpcStatus.OK, "")
        except FairleadError as error:
            self.error(turn, error)
        except asyncio.CancelledError:
            self.log(turn, GrpcStatus.CANCELLED, "the call ended before the model did")
            raise
        except Exception:
            log.exception("request_failed", request_id=call.request_id, model=request.model)
            self.error(turn, INTERNAL)

    def _relayed(self, relay: asyncio.Task[None]) -> None:
        self.relays.discard(relay)
        if not relay.cancelled() and (error := relay.exception()) is not None:
            assert isinstance(error, Exception)
            self.call.fail_with(error)
        self.advance()

    def log(self, turn: "_Turn", status: GrpcStatus, error: str) -> None:
        timeline = turn.timeline
        timeline.model, timeline.version, timeline.rows = turn.model, turn.version, turn.num_rows
        timeline.end(time.perf_counter(), status, error, *grpc_end_of(status))
        self.service.finished.add(timeline)


class _Turn:
    """A request of a stream, and the sink of its one answer."""

    __slots__ = ("complete", "encoding", "error", "form", "id", "model", "parts", "request", "stream", "ticket", "timeline", "version")

    def __init__(self, stream: _InferStream) -> None:
        self.stream = stream
        self.timeline = stream.call.new_timeline(time.perf_counter())
        self.id = self.model = self.version = ""
        self.request: Request | None = None
        self.form: Form | None = None
        self.ticket: Ticket | None = None
        self.parts: list[Buffer] = []
        self.error: FairleadError | None = None
        self.encoding = False
        """A thread writes the answer."""
        self.complete = False

    @property
    def num_rows(self) -> int:
        return self.request.num_rows if self.request is not None else 0

    def take(self, infer: InferCall) -> Request:
        request = self.request = infer.request
        complete(request, self.stream.call, self.timeline)
        self.id, self.model, self.version = request.id, request.model, request.version
        return request

    def respond(self, response: Response) -> None:
        assert self.request is not None
        self.version = response.version
        self.stream.tell(response)
        arguments = response, self.request.outputs, self.form
        try:
            if is_slow(response, self.form):
                self.encoding = True
                self.stream.call.in_thread(encode_response, *arguments, final=True).add_done_callback(self._encoded)
            else:
                self.parts = encode_response(*arguments, final=True)
        except FairleadError as error:
            self.encoding = False
            self.error = error
        except Exception as error:
            self.stream.call.fail_with(error)

    def _encoded(self, future: asyncio.Future[list[Buffer]]) -> None:
        self.encoding = False
        try:
            self.parts = future.result()
        except FairleadError as error:
            self.error = error
        except Exception as error:
            self.stream.call.fail_with(error)
        self.close(None)

    def close(self, error: FairleadError | None) -> None:
        if self.encoding or self.complete:
            return
        self.complete = True
        self.error = self.error or error
        if self.error is None and not self.parts:
            self.error = ModelError(f"model '{self.model}' gave no response")
        self.stream.advance()

    def cancel(self) -> None:
        if self.ticket is not None:
            self.ticket.cancel()
