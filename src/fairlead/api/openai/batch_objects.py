"""Files and batches as OpenAI's API tells of them, and the lines of a batch's input."""

import time
from secrets import token_hex
from typing import Any, Literal

import msgspec
from msgspec import Struct

from fairlead.core.errors import InvalidRequest
from fairlead.store.batches import FileRow

MAX_ID_CHARS = 512
MAX_LINE_BYTES = 16 << 20
"""Its body would be too large for a request."""
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]


class FileObject(Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Struct, kw_only=True):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class FileDeleted(Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchError(Struct):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(Struct):
    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def missing(self) -> int:
        return self.total - self.completed - self.failed


class CachedTokens(Struct):
    cached_tokens: int = 0


class ReasoningTokens(Struct):
    reasoning_tokens: int = 0


class BatchUsage(Struct):
    """Of the lines that this server, or the one before it, had answered when it was last told."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: CachedTokens = msgspec.field(default_factory=CachedTokens)
    output_tokens_details: ReasoningTokens = msgspec.field(default_factory=ReasoningTokens)

    def add(self, input: int, output: int, cached: int, reasoning: int) -> None:
        self.input_tokens += input
        self.output_tokens += output
        self.total_tokens += input + output
        self.input_tokens_details.cached_tokens += cached
        self.output_tokens_details.reasoning_tokens += reasoning


class BatchObject(Struct, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    """Of its first line."""
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str = "24h"
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None
    usage: BatchUsage = msgspec.field(default_factory=BatchUsage)


class BatchList(Struct, kw_only=True):
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


encode = msgspec.json.Encoder().encode
decoded = msgspec.json.Decoder(BatchObject).decode


def new_id(prefix: str) -> str:
    """Ids of later ones are greater."""
    return f"{prefix}_{time.time_ns() // 1000:014x}{token_hex(12)}"


def file_of(row: FileRow) -> FileObject:
    return FileObject(
        id=row.id, bytes=row.size, created_at=int(row.created), expires_at=int(row.expires), filename=row.name, purpose=row.purpose
    )


class Line(Struct, forbid_unknown_fields=True):
    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


_line = msgspec.json.Decoder(Line).decode


def checked_line(line: bytes, endpoint: str) -> Line:
    """Raises InvalidRequest."""
    if len(line) > MAX_LINE_BYTES:
        raise InvalidRequest(f"this line has more than {MAX_LINE_BYTES} bytes")
    try:
        asked = _line(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"this line is no request: {error}") from None
    if not 0 < len(asked.custom_id) <= MAX_ID_CHARS:
        raise InvalidRequest(f"`custom_id` must have 1 to {MAX_ID_CHARS} characters")
    if asked.url != endpoint:
        raise InvalidRequest(f"`url` must be the batch's endpoint, {endpoint}, not {asked.url[:64]!r}")
    for name in ("stream", "background"):
        if asked.body.get(name):
            raise InvalidRequest(f"`body.{name}` must be false in a batch: its answers are whole, and come when they are there")
    return asked
