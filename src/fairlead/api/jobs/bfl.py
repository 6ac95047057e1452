"""Black Forest Labs' shape: `POST /v1/{model}` with `x-key`, then its polling URL.

What their API takes and this server does not have (`prompt_upsampling`, `raw`, `aspect_ratio`, further input images) is refused
unless it asks for nothing. How strict filters are is the server's policy, so of `safety_tolerance` only the laxest is taken.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.jobs.details import Detail, Details
from fairlead.api.jobs.face import Face, base64_bytes, decode_named, parted
from fairlead.api.line import AccessLine
from fairlead.api.openapi import Operation
from fairlead.api.web import JSON, json_response
from fairlead.core.errors import FairleadError, InvalidRequest, NotFound, Unauthenticated
from fairlead.core.generation import Paint
from fairlead.core.jobs import JobStatus
from fairlead.gateway.identity.identity import may_use
from fairlead.jobs.desk import Wishes
from fairlead.store.job_rows import JobRow

PREVIEWS = 10
"""In the time that a picture takes."""

State = Literal["Pending", "Generating", "Ready", "Error", "Request Moderated", "Content Moderated", "Task not found"]


class FluxBody(Struct, kw_only=True, forbid_unknown_fields=True):
    prompt: str
    width: int | None = None
    height: int | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None
    steps: int | None = None
    guidance: float | None = None
    input_image: str | None = None
    """Base64."""
    mask: str | None = None
    strength: float | None = None
    output_format: Literal["jpeg", "png", "webp"] = "jpeg"
    webhook_url: str | None = None
    webhook_secret: str | None = None
    safety_tolerance: Literal[5, 6] | None = None
    prompt_upsampling: Literal[False] | None = None
    raw: Literal[False] | None = None


class Submitted(Struct, omit_defaults=True):
    """Their AsyncResponse; with a webhook, their AsyncWebhookResponse."""

    id: str
    polling_url: str
    output_mp: float
    status: State | None = None
    webhook_url: str | None = None


class Sample(Struct, omit_defaults=True):
    sample: str
    """A signed link."""
    prompt: str
    seed: int | None
    duration: float
    """Seconds."""
    start_time: float
    end_time: float
    samples: list[str] = []
    """Of several pictures, all."""


class ResultResponse(Struct):
    id: str
    status: State
    result: Sample | None
    progress: float | None
    details: dict[str, Any] | None
    preview: dict[str, Any] | None


class BlackForestErrors(Details):
    def content(self, error: FairleadError) -> tuple[int, str, bytes]:
        if isinstance(error, Unauthenticated):
            return 401, JSON, msgspec.json.encode({"detail": "Not authenticated"})
        return super().content(error)


class BlackForest(Face):
    name = "bfl"
    errors = BlackForestErrors()
    webhook_field = "webhook_url"
    words = {"text": "prompt", "num_steps": "steps", "image": "input_image", "format": "output_format"}

    @property
    def operations(self) -> Iterator[Operation]:
        yield Operation(
            name="bflResult",
            method="GET",
            path="/v1/get_result",
            tag="images",
            summary="Black Forest Labs' polling URL",
            serve=self.endpoint(self.result),
            answer=ResultResponse,
            query=("id",),
            errors=(404, 422, 500, 503),
            error=Detail,
        )
        yield Operation(
            name="bflSubmit",
            method="POST",
            path="/v1/{model}",
            tag="images",
            summary="Black Forest Labs' shape: make a picture later",
            serve=self.endpoint(self.submit),
            body=FluxBody,
            body_required=True,
            answer=Submitted,
            optional=("Idempotency-Key",),
            errors=(400, 404, 413, 422, 429, 500, 501, 503),
            error=Detail,
        )

    async def submit(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        model, version = parted(http.path_params["model"])
        if not self.shared.repository.known(model) or not may_use(line.caller, model):
            raise HTTPException(404)  # nothing says that a model was meant
        line.model, line.version = model, version
        body = decode_named(await self.body(http), FluxBody)
        info = self.image_info(line.caller, model, version)
        num_steps = body.steps or info.num_steps
        fields = {
            "text": body.prompt,
            "width": body.width,
            "height": body.height,
            "seed": body.seed,
            "num_steps": body.steps,
            "guidance": body.guidance,
            "image": base64_bytes(body.input_image or "", "input_image"),
            "mask": base64_bytes(body.mask or "", "mask"),
            "strength": body.strength,
            "format": body.output_format,
            "preview_steps": max(num_steps // PREVIEWS, 1) if info.previews else 0,
        }
        if body.webhook_secret and not body.webhook_url:
            raise InvalidRequest("`webhook_secret` needs a `webhook_url`")
        wishes = Wishes(
            face=self.name,
            metadata={"prompt": body.prompt},
            webhook=body.webhook_url or "",
            webhook_secret=body.webhook_secret or "",
            idempotency_key=http.headers.get("idempotency-key", ""),
        )
        request = self.painted(line, fields)
        paint = request.prompt
        assert isinstance(paint, Paint) and paint.width is not None and paint.height is not None
        row, _ = await self.hand_in(request, wishes)
        polling_url = self.url(http, f"/v1/get_result?id={row.id}")
        answer = Submitted(row.id, polling_url, round(paint.n * paint.width * paint.height / 1e6, 4))
        if body.webhook_url:
            answer.status, answer.webhook_url = "Pending", body.webhook_url
        return json_response(answer, headers=line.headers)

    async def result(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        id = http.query_params.get("id", "")
        if not id:
            raise InvalidRequest("`id` of the task is missing")
        try:
            row = await self.pictures(id, line.caller)
        except NotFound:
            return json_response(ResultResponse(id[:64], "Task not found", None, None, None, None), 404, line.headers)
        line.model, line.version = row.model, row.version
        return json_response(self.told(row, http), headers=line.headers)

    def told(self, row: JobRow, http: HttpRequest | None) -> ResultResponse:
        result, details = None, None
        if row.result is not None and row.result.artifacts:
            urls = [self.file_url(http, row, artifact)[0] for artifact in row.result.artifacts]
            started, ended = row.started or row.created, row.ended or row.created
            result = Sample(
                urls[0],
                row.metadata["prompt"] if row.face == self.name else "",
                row.result.artifacts[0].seed,
                round(ended - started, 3),
                started,
                ended,
                urls if len(urls) > 1 else [],
            )
        if row.reason:
            details = {"reason": row.reason, "message": row.message}
        progress = 1.0 if result else round(row.step / row.num_steps, 4) if row.num_steps else None
        preview = {"content_type": "image/jpeg", "data": msgspec.to_builtins(row.preview)} if row.preview and result is None else None
        return ResultResponse(row.id, state_of(row), result, progress, details, preview)


def state_of(row: JobRow) -> State:
    match row.status:
        case JobStatus.QUEUED:
            return "Pending"
        case JobStatus.ACTIVE | JobStatus.ABORTING:
            return "Generating"
        case JobStatus.COMPLETE:
            return "Ready"
    match row.reason:
        case "moderated-input":
            return "Request Moderated"
        case "moderated-output":
            return "Content Moderated"
    return "Error"
