"""OpenAI's batches: files of requests in, files of answers out."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.responses import StreamingResponse

from fairlead.api.line import AccessLine
from fairlead.api.openai.batch_objects import (
    ENDPOINTS,
    BatchList,
    BatchObject,
    FileDeleted,
    FileList,
    FileObject,
    decoded,
    encode,
    file_of,
    new_id,
)
from fairlead.api.openai.batch_runner import DAY
from fairlead.api.openai.errors import BadParameter, Missing, OpenAIError, OpenAIErrors, decode_body
from fairlead.api.openai.responses_bodies import check_metadata
from fairlead.api.openapi import Operation
from fairlead.api.status import INTERNAL
from fairlead.api.web import json_response, read_body
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError
from fairlead.core.policy import BatchSettings
from fairlead.observe.finished import Finished
from fairlead.store.batches import BatchRow, BatchStore, FileRow

DEFAULT_PAGE, MAX_PAGE = 20, 100
MAX_FILES_PAGE = 10_000
MAX_BODY_BYTES = 64 << 10
"""Of a batch's wish."""
FORM_BYTES = 64 << 10
"""What a form has beside the file."""
MAX_NAME_CHARS = 512
JSONL = "application/jsonl"

Serve = Callable[[HttpRequest, AccessLine], Awaitable[HttpResponse]]
Count = Callable[[Caller], AbstractAsyncContextManager[Mapping[str, str]]]
"""Around a request of this caller, which its limits count: what the head of the answer says. Raises FairleadError for one too many."""


class FileBody(Struct, kw_only=True):
    """As multipart/form-data."""

    file: str
    purpose: Literal["batch"]


class ExpiresAfter(Struct, frozen=True, forbid_unknown_fields=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=3600, le=2_592_000)]


class BatchBody(Struct, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "input_file_id"

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None
    """Of the files that it makes."""


class Batches:
    def __init__(
        self,
        store: BatchStore,
        settings: BatchSettings,
        finished: Finished,
        max_body_bytes: int,
        look: Callable[[], None],
        count: Count,
    ) -> None:
        """`look`: called when there is a new batch."""
        self.count = count
        self.store = store
        self.settings = settings
        self.finished = finished
        self.max_file_bytes = min(settings.max_file_bytes, max_body_bytes)
        self.look = look
        file, batch = "/v1/files/{file}", "/v1/batches/{batch}"
        pages = ("after", "limit")
        self.operations = (
            self._row(
                "POST", "/v1/files", "createFile", "Upload the requests of a batch", self.upload, FileObject, body=FileBody, form=True
            ),
            self._row("GET", "/v1/files", "listFiles", "Files", self.files, FileList, (*pages, "order", "purpose")),
            self._row("GET", file, "getFile", "A file", self.file, FileObject),
            self._row("DELETE", file, "deleteFile", "Remove it", self.delete, FileDeleted),
            self._row("GET", f"{file}/content", "fileContent", "What is in it", self.content, None, media=(JSONL,)),
            self._row("POST", "/v1/batches", "createBatch", "Answer a file of requests later", self.create, BatchObject, body=BatchBody),
            self._row("GET", "/v1/batches", "listBatches", "Batches, the newest first", self.batches, BatchList, pages),
            self._row("GET", batch, "getBatch", "A batch", self.batch, BatchObject),
            self._row("POST", f"{batch}/cancel", "cancelBatch", "Stop it; what was answered stays", self.cancel, BatchObject),
        )

    def _row(
        self,
        method: str,
        path: str,
        name: str,
        summary: str,
        serve: Serve,
        answer: Any,
        optional: tuple[str, ...] = (),
        *,
        body: Any = None,
        form: bool = False,
        media: tuple[str, ...] = (),
    ) -> Operation:
        return Operation(
            name=name,
            method=method,
            path=path,
            tag="openai",
            summary=summary,
            serve=self._logged(serve, optional),
            answer=answer,
            body=body,
            body_required=body is not None,
            form=form,
            media=media,
            optional=optional,
            errors=(400, 404, 429, 500, 503) if body is None else (400, 404, 413, 429, 500, 503),
            error=OpenAIError,
        )

    def _logged(self, serve: Serve, optional: tuple[str, ...]) -> Callable[[HttpRequest], Awaitable[Any]]:
        async def endpoint(http: HttpRequest) -> Any:
            line = AccessLine(self.finished, http)
            try:
                unknown = next((name for name in http.query_params if name not in optional), None)
                if unknown is not None:
                    raise BadParameter(f"Unknown parameter: '{unknown[:64]}'.", unknown[:64], "unknown_parameter")
                async with self.count(line.caller) as told:
                    line.headers.update(told)
                    answer = await serve(http, line)
            except FairleadError as error:
                answer = OpenAIErrors().response(error, line.headers)
                line.end(answer.status_code, error.message)
                return answer
            except HTTPException as error:
                line.end(error.status_code, error.detail)
                raise
            except BaseException:
                line.end(500, INTERNAL.message)
                raise
            line.end(200, "")
            return answer

        return endpoint

    # Files

    async def upload(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        data = await read_body(http, self.max_file_bytes + FORM_BYTES)
        name, content, seconds = await asyncio.to_thread(_form, http, data)
        now = time.time()
        keep = self.settings.retention_days * DAY
        row = FileRow(
            id=new_id("file"),
            tenant=line.caller.tenant,
            name=name,
            purpose="batch",
            size=len(content),
            created=now,
            expires=now + (keep if seconds is None else min(seconds, keep)),
            signed_by=line.signed_by,
        )
        if len(content) > self.max_file_bytes:
            raise BadParameter(f"The file has more than {self.max_file_bytes} bytes.", "file", "file_too_large")
        await asyncio.to_thread(self.store.add_file, row, content, tenant_bytes=self.settings.tenant_bytes)
        return json_response(file_of(row), headers=line.headers)

    async def files(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        limit = _limit(http, MAX_FILES_PAGE, MAX_FILES_PAGE)
        order, after = http.query_params.get("order", "desc"), _after(http)
        if order not in ("asc", "desc"):
            raise BadParameter(f"Invalid value for 'order': {order[:64]!r}. Supported values are: 'asc', 'desc'.", "order", "invalid_value")
        purpose = http.query_params.get("purpose")
        if purpose not in (None, "batch", "batch_output"):
            message = f"Invalid value for 'purpose': {purpose[:64]!r}. Supported values are: 'batch', 'batch_output'."
            raise BadParameter(message, "purpose", "invalid_value")
        newest = order == "desc"
        found = await asyncio.to_thread(self.store.files, line.caller.tenant, purpose=purpose, after=after, limit=limit + 1, newest=newest)
        data = [file_of(row) for row in found[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return json_response(FileList(data=data, first_id=first, last_id=last, has_more=len(found) > limit), headers=line.headers)

    async def file(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        return json_response(file_of(await self._file(http, line)), headers=line.headers)

    async def delete(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        id = http.path_params["file"]
        if not await asyncio.to_thread(self.store.delete_file, id, line.caller.tenant):
            raise _no_such_file(id)
        return json_response(FileDeleted(id=id), headers=line.headers)

    async def content(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        row = await self._file(http, line)
        return StreamingResponse(self._parts(row.id), headers={**line.headers, "content-length": str(row.size)}, media_type=JSONL)

    async def _parts(self, file: str) -> AsyncGenerator[bytes, None]:
        number = 0
        while (part := await asyncio.to_thread(self.store.part, file, number)) is not None:
            yield part
            number += 1

    async def _file(self, http: HttpRequest, line: AccessLine) -> FileRow:
        """Raises Missing."""
        id = http.path_params["file"]
        row = await asyncio.to_thread(self.store.file, id, line.caller.tenant)
        if row is None:
            raise _no_such_file(id)
        return row

    # Batches

    async def create(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        body = decode_body(await read_body(http, MAX_BODY_BYTES), BatchBody)
        check_metadata(body.metadata)
        caller, now = line.caller, time.time()
        row = await asyncio.to_thread(self.store.file, body.input_file_id, caller.tenant)
        if row is None or row.purpose != "batch":
            message = f"Invalid 'input_file_id': there is no file '{body.input_file_id[:128]}' of the purpose 'batch'."
            raise BadParameter(message, "input_file_id", "invalid_value")
        assert body.endpoint in ENDPOINTS
        id = new_id("batch")
        batch = BatchObject(
            id=id,
            endpoint=body.endpoint,
            input_file_id=row.id,
            created_at=int(now),
            expires_at=int(now + self.settings.window_seconds),
            metadata=body.metadata,
        )
        wished = BatchRow(
            id=id,
            tenant=caller.tenant,
            project=caller.project,
            key=caller.key,
            address=caller.address,
            created=now,
            expires=now + self.settings.window_seconds + self.settings.retention_days * DAY,
            output_seconds=None if body.output_expires_after is None else float(body.output_expires_after.seconds),
            signed_by=line.signed_by if row.signed_by else "",
            body=encode(batch),
        )
        settings = self.settings
        bounds = {"tenant_batches": settings.tenant_batches, "tenant_bytes": settings.tenant_bytes}
        await asyncio.to_thread(self.store.add, wished, **bounds)
        self.look()
        return json_response(batch, headers=line.headers)

    async def batches(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        limit = _limit(http, DEFAULT_PAGE, MAX_PAGE)
        found = await asyncio.to_thread(self.store.list, line.caller.tenant, after=_after(http), limit=limit + 1)
        data = [_told(row) for row in found[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return json_response(BatchList(data=data, first_id=first, last_id=last, has_more=len(found) > limit), headers=line.headers)

    async def batch(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        return await self._one(self.store.get, http, line)

    async def cancel(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        answer = await self._one(self.store.cancel, http, line)
        self.look()
        return answer

    async def _one(self, ask: Callable[[str, str], BatchRow | None], http: HttpRequest, line: AccessLine) -> HttpResponse:
        """Raises Missing."""
        id = http.path_params["batch"]
        row = await asyncio.to_thread(ask, id, line.caller.tenant)
        if row is None:
            raise Missing(f"No batch found with id '{id[:128]}'.", None)
        return json_response(_told(row), headers=line.headers)


def _told(row: BatchRow) -> BatchObject:
    batch = decoded(row.body)
    if row.cancelling and row.ended is None:
        batch.status = "cancelling"
    return batch


def _no_such_file(id: str) -> Missing:
    return Missing(f"No such File object: {id[:128]}", "id")


def _after(http: HttpRequest) -> str:
    after = http.query_params.get("after", "")
    if "\0" in after:
        raise BadParameter("Invalid value for 'after'.", "after", "invalid_value")
    return after


def _limit(http: HttpRequest, default: int, most: int) -> int:
    given = http.query_params.get("limit")
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 10 and 1 <= int(given) <= most):
        raise BadParameter(f"Invalid value for 'limit': expected a whole number between 1 and {most}.", "limit", "invalid_value")
    return int(given)


def _form(http: HttpRequest, body: bytes) -> tuple[str, bytes, float | None]:
    """(name, content, seconds to keep it) of a file that is uploaded; for a thread of its own. Raises BadParameter."""
    kind, options = parse_options_header(http.headers.get("content-type", ""))
    if kind.lower() != b"multipart/form-data":
        raise BadParameter("Files are sent as multipart/form-data.", None, "invalid_type")
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):  # others come to characters that nothing can write
        raise BadParameter("The form must be UTF-8.", None, "invalid_value")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def read() -> tuple[str, bytes, float | None]:
        async with HttpRequest(http.scope, receive).form(max_files=1, max_fields=8, max_part_size=FORM_BYTES) as form:
            for name in form:
                if name not in ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]"):
                    raise BadParameter(f"Unknown parameter: '{name[:64]}'.", name[:64], "unknown_parameter")
            file, purpose = form.get("file"), form.get("purpose")
            for name, value in (("file", file), ("purpose", purpose)):
                if value is None:
                    raise BadParameter(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
            if not isinstance(file, UploadFile):
                raise BadParameter("Invalid type for 'file': expected a file.", "file", "invalid_type")
            if purpose != "batch":
                raise BadParameter(
                    f"Invalid value for 'purpose': {str(purpose)[:64]!r}. Supported values are: 'batch'.", "purpose", "invalid_value"
                )
            return (file.filename or "file")[:MAX_NAME_CHARS].replace("\0", ""), await file.read(), _seconds(form)

    try:
        return asyncio.run(read())
    except HTTPException as error:
        raise BadParameter(f"We could not parse the form of your request: {error.detail}", None) from None
    except (MultiPartException, FormParserError, UnicodeError) as error:
        raise BadParameter(f"We could not parse the form of your request: {error}", None) from None


def _seconds(form: Any) -> float | None:
    """Raises BadParameter."""
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at" or not (isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() and 0 < len(seconds) < 10):
        message = "Invalid 'expires_after': expected the anchor 'created_at' and a number of seconds."
        raise BadParameter(message, "expires_after", "invalid_value")
    return float(seconds)
