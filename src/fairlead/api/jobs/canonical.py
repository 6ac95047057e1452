"""`/v1/jobs`: jobs in our own words."""

import asyncio
import base64
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct, structs
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.admin_bodies import FieldError, Problem
from fairlead.api.jobs.asks import INPUT, asked
from fairlead.api.jobs.face import Face, cursor, decode_named, parted, wait_seconds
from fairlead.api.kserve.codec import to_json
from fairlead.api.line import AccessLine
from fairlead.api.openai.answers import Call, calls_of
from fairlead.api.openapi import Operation
from fairlead.api.problems import Problems
from fairlead.api.status import CLIENT_LEFT
from fairlead.api.web import EventStream, json_response, while_connected
from fairlead.core.errors import FairleadError, InvalidRequest, TooLarge, Unsupported
from fairlead.core.generation import Paint, Usage
from fairlead.core.jobs import ENDED, JobStatus
from fairlead.jobs.desk import Wishes
from fairlead.jobs.stored import unpacked
from fairlead.store.job_rows import JobQuery, JobRow
from fairlead.store.transactions import Conflict

Span = Annotated[float, Meta(gt=0)]
"""Seconds."""
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
MAX_LISTED = 200
RETRYABLE = frozenset({"timeout", "expired", "replica-died", "unavailable", "storage"})
LARGE_INPUT_BYTES = 256 << 10
"""From here on a thread reads what is asked."""

_FIELD = re.compile(r"`([\w.\[\]]+)`")


class WebhookBody(Struct, kw_only=True, forbid_unknown_fields=True):
    url: str
    events: list[JobStatus] = []
    """Statuses that it is called for; []: complete, failed, aborted."""


class JobBody(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str
    """`name` or `name@version`."""
    input: msgspec.Raw
    """What the model takes: of pictures `prompt` and so on; of language models the OpenAI bodies; of tensors KServe's."""
    webhook: WebhookBody | None = None
    metadata: Metadata = {}
    """The caller's own notes."""
    start_seconds: Span | None = None
    """It is aborted (`expired`) where it has not started by then."""
    total_seconds: Span | None = None
    """It fails (`timeout`) where it has not ended by then."""
    retention_seconds: Span | None = None
    """How long it is kept once it has ended."""


class JobFailure(Struct):
    reason: str
    message: str
    retryable: bool


class JobProgress(Struct, omit_defaults=True):
    step: int
    num_steps: int
    fraction: float
    preview: str = ""
    """A small JPEG, as a data: URL."""


class JobPicture(Struct):
    url: str
    """Good without a key until `url_expires`."""
    url_expires: float
    content_type: str
    num_bytes: int
    sha256: str
    width: int
    height: int
    seed: int | None
    mode: str


class JobChoice(Struct, omit_defaults=True):
    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[Call] = []
    finish_reason: str = ""
    embedding: list[float] = []


class JobTensor(Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]


class JobAnswer(Struct, omit_defaults=True):
    """What of it is there depends on the model."""

    pictures: list[JobPicture] = []
    choices: list[JobChoice] = []
    outputs: list[JobTensor] = []
    answer: Any = None
    """Of another server's model, its answer as it came."""


class JobUrls(Struct):
    get: str
    cancel: str
    events: str


class Job(Struct, kw_only=True):
    id: str
    model: str
    version: str
    kind: str
    status: JobStatus
    position: int | None
    """How many of its model go before it, while it is queued."""
    progress: JobProgress | None
    result: JobAnswer | None
    error: JobFailure | None
    usage: Usage | None
    cost: float
    tries: int
    qos_class: str
    metadata: dict[str, Any]
    created: float
    started: float | None
    ended: float | None
    expires: float | None
    """When it and its files are removed. Times are seconds since 1970."""
    urls: JobUrls


class Jobs(Struct):
    jobs: list[Job]
    """Without results and previews: each job has its own."""
    next: str | None
    """`before` of the page that follows."""


class JobProblems(Problems):
    """Implements `web.Shape` and `web.ErrorShape`."""

    def content(self, error: FairleadError) -> tuple[int, str, bytes]:
        status, media_type, body = super().content(error)
        if isinstance(error, Conflict):  # an idempotency key that came with another request
            status = 422
            body = msgspec.json.encode(Problem(title="Unprocessable Content", status=status, detail=error.message))
        elif isinstance(error, (InvalidRequest, Unsupported)) and (field := _FIELD.match(error.message)) is not None:
            problem = msgspec.json.decode(body, type=Problem)
            body = msgspec.json.encode(structs.replace(problem, errors=(FieldError(field[1], error.message),)))
        return status, media_type, body

    def response(self, error: FairleadError, headers: Mapping[str, str]) -> HttpResponse:
        more = {"Connection": "close"} if isinstance(error, TooLarge) else {}
        return super().response(error, {**headers, **more})

    def event(self, error: FairleadError) -> bytes:
        return self.content(error)[2]


class Canonical(Face):
    name = "jobs"
    errors = JobProblems()
    webhook_field = "webhook.url"
    words = {field.name: f"{INPUT}.{field.name}" for field in structs.fields(Paint)} | {
        "text": f"{INPUT}.prompt",
        "negative": f"{INPUT}.negative_prompt",
    }

    @property
    def operations(self) -> Iterator[Operation]:
        for method, path, name, summary, serve, more in (
            (
                "POST",
                "/v1/jobs",
                "jobSubmit",
                "Hand in a request that is answered later",
                self.submit,
                {"body": JobBody, "body_required": True, "ok": (200, 202), "optional": ("Prefer", "Idempotency-Key")},
            ),
            (
                "GET",
                "/v1/jobs",
                "jobList",
                "The tenant's jobs, newest first",
                self.list,
                {"answer": Jobs, "optional": ("status", "of_model", "before", "limit")},
            ),
            ("GET", "/v1/jobs/{job}", "jobGet", "One job", self.get, {}),
            ("POST", "/v1/jobs/{job}/cancel", "jobCancel", "Cancel a job", self.cancel, {}),
            ("GET", "/v1/jobs/{job}/events", "jobEvents", "A job at each change, until it has ended", self.events, {"events": "only"}),
        ):
            yield Operation(
                name=name,
                method=method,
                path=path,
                tag="jobs",
                summary=summary,
                serve=self.endpoint(serve),
                answer=more.pop("answer", Job),
                errors=(400, 404, 409, 413, 422, 429, 500, 501, 503),
                error=Problem,
                **more,
            )

    async def submit(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        """202, or 200 for one that has ended: where `Prefer: wait` waited for it, or the key of an earlier one came again."""
        body = decode_named(await self.body(http), JobBody)
        line.model, line.version = parted(body.model)
        data = bytes(body.input)
        request = asked(self, line, data) if len(data) < LARGE_INPUT_BYTES else await asyncio.to_thread(asked, self, line, data)
        webhook = body.webhook
        wishes = Wishes(
            face=self.name,
            idempotency_key=http.headers.get("idempotency-key", ""),
            metadata=body.metadata,
            webhook=webhook.url if webhook else "",
            webhook_events=tuple(webhook.events) if webhook else (),
            start_seconds=body.start_seconds,
            total_seconds=body.total_seconds,
            retention_seconds=body.retention_seconds,
        )
        seconds = wait_seconds(http, self.desk.settings.max_wait_seconds)
        row, new = await self.hand_in(request, wishes)
        headers = {**line.headers, "Location": f"/v1/jobs/{row.id}"}
        if not new:
            headers["Idempotent-Replayed"] = "true"
        if seconds is not None:
            headers["Preference-Applied"] = f"wait={seconds:g}"
            waited = await while_connected(http.scope, http.receive, self.desk.wait(row.id, line.caller, seconds))
            if waited is None:
                return HttpResponse(status_code=CLIENT_LEFT)
            row = waited
        return json_response(await self.job(row, http), 200 if row.status in ENDED else 202, headers)

    async def get(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        return json_response(await self.job(await self.desk.get(http.path_params["job"], line.caller), http), headers=line.headers)

    async def list(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        query = http.query_params
        for name in query:
            if name not in {"status", "model", "before", "limit"}:
                raise InvalidRequest(f"'{name[:64]}' is no parameter of this list: status, model, before, limit")
        wanted = [each for value in query.getlist("status") for each in value.split(",")]
        if any(each not in set(JobStatus) for each in wanted):
            raise InvalidRequest(f"`status` must be of {', '.join(JobStatus)}")
        limit = query.get("limit", "50")
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:6]) <= MAX_LISTED:
            raise InvalidRequest(f"`limit` must be a number from 1 to {MAX_LISTED}")
        rows = await self.desk.list(
            JobQuery(
                tenant=line.caller.tenant,
                statuses=tuple(map(JobStatus, wanted)),
                model=query.get("model"),
                before=cursor(query.get("before"), "before"),
                limit=int(limit),
            )
        )
        jobs = [await self.job(row, http, listed=True) for row in rows]
        return json_response(Jobs(jobs, rows[-1].id if len(rows) == int(limit) else None), headers=line.headers)

    async def cancel(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        """As it is then; one that had ended stays as it was."""
        return json_response(await self.job(await self.desk.cancel(http.path_params["job"], line.caller), http), headers=line.headers)

    async def events(self, http: HttpRequest, line: AccessLine) -> EventStream:
        async def told() -> AsyncGenerator[bytes, None]:
            async with aclosing(self.desk.watch(http.path_params["job"], line.caller)) as rows:
                async for row in rows:
                    data = msgspec.json.encode(await self.job(row, http))
                    yield b"event: " + row.status.encode() + b"\ndata: " + data + b"\n\n"

        return EventStream(told(), line.end, line.headers, self.errors)

    async def job(self, row: JobRow, http: HttpRequest | None, *, listed: bool = False) -> Job:
        """`http`: the request that links are made for; None: for nobody in particular."""
        queued = row.status is JobStatus.QUEUED
        failed = row.status in ENDED and row.status is not JobStatus.COMPLETE
        base = f"/v1/jobs/{row.id}"
        return Job(
            id=row.id,
            model=row.model,
            version=row.result.version if row.result else row.version,
            kind=row.kind,
            status=row.status,
            position=await self.desk.position(row) if queued and not listed else None,
            progress=_progress(row),
            result=None if row.result is None else self._answer(row, http),
            error=JobFailure(row.reason, row.message, row.reason in RETRYABLE) if failed else None,
            usage=row.result.usage if row.result else None,
            cost=row.cost,
            tries=row.tries,
            qos_class=row.qos_class,
            metadata=row.metadata,
            created=row.created,
            started=row.started,
            ended=row.ended,
            expires=row.expires,
            urls=JobUrls(*(self.url(http, path) for path in (base, f"{base}/cancel", f"{base}/events"))),
        )

    def _answer(self, row: JobRow, http: HttpRequest | None) -> JobAnswer:
        result = row.result
        assert result is not None
        pictures = []
        for artifact in result.artifacts:
            url, until = self.file_url(http, row, artifact)
            pictures.append(
                JobPicture(
                    url,
                    until,
                    artifact.content_type,
                    artifact.num_bytes,
                    artifact.sha256,
                    artifact.width,
                    artifact.height,
                    artifact.seed,
                    artifact.mode,
                )
            )
        choices = [
            JobChoice(
                index=choice.index,
                text=choice.text,
                reasoning=choice.reasoning,
                tool_calls=calls_of(choice),
                finish_reason=choice.finish_reason,
                embedding=np.frombuffer(choice.vector, "<f4").tolist(),
            )
            for choice in result.choices
        ]
        arrays = unpacked(result.outputs)
        outputs = [
            JobTensor(each.name, each.datatype, each.shape, to_json(arrays[each.name], each.name, each.datatype)) for each in result.outputs
        ]
        return JobAnswer(pictures, choices, outputs, _json(result.raw))


def _json(answer: bytes) -> Any:
    """Another server's: as a text where it is no JSON."""
    try:
        return msgspec.json.decode(answer) if answer else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return answer.decode("utf-8", "replace")


def _progress(row: JobRow) -> JobProgress | None:
    usage = row.result.usage if row.result else None
    if usage is not None:  # a short one was over before the store heard of its steps
        return JobProgress(usage.num_steps, usage.num_steps, 1.0) if usage.num_steps else None
    if not row.num_steps or row.status is JobStatus.QUEUED:
        return None
    preview = "data:image/jpeg;base64," + base64.b64encode(row.preview).decode() if row.preview else ""
    return JobProgress(row.step, row.num_steps, round(row.step / row.num_steps, 4), preview)
