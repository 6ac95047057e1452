"""A collector for tests: a real server on loopback that understands OTLP, and does with it what it was told."""

import gzip
import ssl
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Event, Thread

from msgspec import Struct
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

KINDS = {2: "server", 1: "internal", 3: "client", 5: "consumer"}


class Seen(Struct, frozen=True):
    """A span as it came."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    start: float
    end: float
    attributes: dict[str, object]
    events: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    error: str | None
    resource: dict[str, object]


class FakeCollector:
    """A context. `statuses`: what exports are answered with, the last one for all that follow; `hangs`: none is, before `release`."""

    def __init__(self, *statuses: int, hangs: bool = False, tls: ssl.SSLContext | None = None) -> None:
        self.statuses = list(statuses or (200,))
        self.headers: list[dict[str, str]] = []
        """Of each export, names in lower case."""
        self._spans: list[Seen] = []
        self._changed = Condition()
        self._answer = Event()
        if not hangs:
            self._answer.set()
        collector = self

        class Door(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = collector._take(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                collector._answer.wait(60.0)
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self._server.daemon_threads = True
        self._scheme = "http" if tls is None else "https"
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeCollector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10.0)

    def release(self) -> None:
        """Answer those that hang."""
        self._answer.set()

    @property
    def spans(self) -> list[Seen]:
        with self._changed:
            return list(self._spans)

    def until(self, condition: Callable[[list[Seen]], bool], seconds: float = 30.0) -> list[Seen]:
        """Wait for spans to have come. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self._spans), seconds):
                raise TimeoutError(f"these came: {[span.name for span in self._spans]}")
            return list(self._spans)

    def _take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        """The status of the answer."""
        data = gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body
        with self._changed:
            status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            self.headers.append({":path": path, **headers})
            if status < 300:
                self._spans += spans_in(data)
            self._changed.notify_all()
        return status


def spans_in(data: bytes) -> list[Seen]:
    """Of one export."""
    return [
        _seen(span, {each.key: _value(each.value) for each in resource.resource.attributes})
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _seen(span: trace_pb2.Span, resource: dict[str, object]) -> Seen:
    return Seen(
        name=span.name,
        kind=KINDS.get(span.kind, str(span.kind)),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        state=span.trace_state,
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        attributes={each.key: _value(each.value) for each in span.attributes},
        events=tuple(event.name for event in span.events),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        error=span.status.message if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR else None,
        resource=resource,
    )


def _value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return None if kind is None else getattr(value, kind)
