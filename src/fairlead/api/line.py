"""One request that goes through an HTTP app: who asks, what the access log will say, and what the answer's head does."""

import re
import time

from starlette.requests import Request as HttpRequest

from fairlead.api.doorkeeper import caller_of, envelope_of
from fairlead.core.request import Raw, Request, Response
from fairlead.observe.access import SANE_ID, SANE_TRACE, AccessLog, new_request_id


class AccessLine:
    """`end` says it, once."""

    def __init__(self, access_log: AccessLog, http: HttpRequest, model: str = "", version: str = "") -> None:
        self.access_log = access_log
        self.http = http
        self.arrived = time.perf_counter()
        self.model, self.version = model, version
        self.asked_version = version
        """"": none was named, and traffic decides which one answers; `version` is then that of whoever it would be without."""
        self.caller, self.signed_by = caller_of(http)
        self.id = _sane(SANE_ID, http.headers.get("x-request-id", "")) or new_request_id()
        self.trace = _sane(SANE_TRACE, http.headers.get("traceparent", ""))
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
        request.arrived, request.trace = self.arrived, self.trace
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
        rows = self.request.num_rows if self.request else 0
        seconds = time.perf_counter() - self.arrived
        self.access_log.add("http", self.id, self.trace, self.model, self.version, status, seconds, rows, error)


def _sane(pattern: re.Pattern[bytes], value: str) -> str:
    return value if pattern.fullmatch(value.encode("latin-1")) else ""
