"""What the access log will say of one request that goes through an HTTP app."""

import re
import time

from starlette.requests import Request as HttpRequest

from fairlead.core.request import Request
from fairlead.observe.access import SANE_ID, SANE_TRACE, AccessLog, new_request_id


class AccessLine:
    """`end` says it, once."""

    def __init__(self, access_log: AccessLog, http: HttpRequest, model: str = "", version: str = "") -> None:
        self.access_log = access_log
        self.arrived = time.perf_counter()
        self.model, self.version = model, version
        self.id = _sane(SANE_ID, http.headers.get("x-request-id", "")) or new_request_id()
        self.trace = _sane(SANE_TRACE, http.headers.get("traceparent", ""))
        self.request: Request | None = None
        """Once it is decoded."""

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says of it."""
        return {"x-request-id": self.id} | ({"traceparent": self.trace} if self.trace else {})

    def end(self, status: int, error: str) -> None:
        rows = self.request.num_rows if self.request else 0
        seconds = time.perf_counter() - self.arrived
        self.access_log.add("http", self.id, self.trace, self.model, self.version, status, seconds, rows, error)


def _sane(pattern: re.Pattern[bytes], value: str) -> str:
    return value if pattern.fullmatch(value.encode("latin-1")) else ""
