"""One request that goes through an HTTP app: who asks, what the access log will say, and what the answer's head does."""

import re
import time

from starlette.requests import Request as HttpRequest

from fairlead.api.doorkeeper import caller_of, envelope_of
from fairlead.api.status import end_of
from fairlead.core.request import Raw, Request, Response
from fairlead.core.timeline import SANE_STATE, Timeline, parse_traceparent
from fairlead.observe.access import SANE_ID, SANE_TRACE, new_request_id
from fairlead.observe.finished import Finished


class AccessLine:
    """`end` says it, once."""

    def __init__(self, finished: Finished, http: HttpRequest, model: str = "", version: str = "") -> None:
        self.finished = finished
        self.http = http
        self.arrived = time.perf_counter()
        self.model, self.version = model, version
        self.asked_version = version
        """"": none was named, and traffic decides which one answers; `version` is then that of whoever it would be without."""
        self.adapter = ""
        """Of the model, where its name names one."""
        self.caller, self.signed_by = caller_of(http)
        self.id = _sane(SANE_ID, http.headers.get("x-request-id", "")) or new_request_id()
        self.trace = _sane(SANE_TRACE, http.headers.get("traceparent", ""))
        self.timeline = Timeline(self.id, "http", self.arrived, method=http.method, path=http.scope.get("fairlead.route", ""))
        if parse_traceparent(self.trace) is not None:
            self.timeline.traceparent = self.trace
            self.timeline.tracestate = _sane(SANE_STATE, http.headers.get("tracestate", ""))
        http.scope["fairlead.line"] = self
        self.request: Request | None = None
        """Once it is decoded."""
        self.raw: Raw | None = None
        """Its body, where that may go on to another server."""
        self.headers = {"x-request-id": self.id}
        """What the answer's head says."""
        if self.trace:
            self.headers["traceparent"] = self.trace

    def complete(self, request: Request) -> Request:
        """The request with all that the HTTP message says beside its body."""
        headers = self.http.headers
        if self.request is None:
            length = headers.get("content-length", "")
            self.timeline.bytes_in = int(length) if length.isascii() and length.isdigit() and len(length) < 16 else 0
            self.timeline.note(time.perf_counter(), "decoded")
        request.arrived, request.trace, request.timeline = self.arrived, self.trace, self.timeline
        request.caller, request.signed_by = self.caller, self.signed_by
        request.qos_class = headers.get("x-fairlead-class", "")
        request.log_id = self.id
        request.session = headers.get("x-fairlead-session", "")
        if "cache-control" in headers:
            request.envelope = envelope_of(self.http)
        self.request = request
        return request

    def answered(self, response: Response) -> None:
        """The first response says which version answers, and what else the head is to say."""
        self.version = response.version
        if response.headers:
            self.headers.update(response.headers)

    def end(self, status: int, error: str) -> None:
        timeline = self.timeline
        if self.request is not None:
            timeline.rows = self.request.num_rows
        timeline.model, timeline.version = self.model, self.version
        timeline.end(time.perf_counter(), status, error, *end_of(status))
        self.finished.add(timeline)


def _sane(pattern: re.Pattern[bytes], value: str) -> str:
    return value if pattern.fullmatch(value.encode("latin-1")) else ""
