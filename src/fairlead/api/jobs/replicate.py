"""Replicate's predictions. Its Python client works with `base_url`; models are `fairlead/NAME`, versions `NAME@VERSION`.

`Cancel-After`, deployments, trainings, file uploads and `stream` are not offered. Events of output and logs are not told to webhooks.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.jobs.details import Detail, Details
from fairlead.api.jobs.face import PAINT, Face, base64_bytes, cursor, decode_named, wait_seconds
from fairlead.api.line import AccessLine
from fairlead.api.openapi import Operation
from fairlead.api.status import CLIENT_LEFT
from fairlead.api.web import json_response, while_connected
from fairlead.core.errors import InvalidRequest, NotFound
from fairlead.core.generation import ImageInfo
from fairlead.core.jobs import ENDED, JobStatus
from fairlead.jobs.desk import Wishes
from fairlead.store.job_rows import JobQuery, JobRow

OWNER = "fairlead"
PAGE = 100
COG_VERSION = "0.16.0"
"""Of no Cog: of versions before 0.3.9 their client takes a list for something that comes bit by bit."""
MAX_WAIT_SECONDS = 60.0
STEPS_SHOWN = 10
"""Letters of the progress bar in the logs."""

Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]
WEBHOOK_EVENTS: dict[str, tuple[JobStatus, ...]] = {
    "start": (),
    "output": (),
    "logs": (),
    "completed": (JobStatus.COMPLETE, JobStatus.FAILED, JobStatus.ABORTED),
}


class PredictionInput(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """In the words of most image models there."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_outputs: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    scheduler: str = ""
    image: str = ""
    """A data: URL, or base64."""
    mask: str = ""
    prompt_strength: float | None = None
    output_format: Literal["png", "jpg", "jpeg", "webp"] = "png"
    output_quality: int = 90


class PredictionBody(Struct, kw_only=True, forbid_unknown_fields=True):
    input: PredictionInput
    version: str | None = None
    webhook: str | None = None
    webhook_events_filter: list[Literal["start", "output", "logs", "completed"]] | None = None
    webhook_completed: None = None
    stream: Literal[False] | None = None


class Prediction(Struct, kw_only=True):
    id: str
    model: str
    version: str
    status: Status
    input: dict[str, Any] | None
    output: list[str] | None
    """Signed links."""
    logs: str
    error: str | None
    metrics: dict[str, float]
    created_at: str
    started_at: str | None
    completed_at: str | None
    data_removed: bool
    urls: dict[str, str]


class Predictions(Struct):
    next: str | None
    previous: str | None
    results: list[Prediction]


class ModelVersion(Struct):
    id: str
    created_at: str
    cog_version: str
    openapi_schema: dict[str, Any]


class ReplicateModel(Struct, kw_only=True):
    url: str
    owner: str
    name: str
    description: str | None
    visibility: Literal["public", "private"]
    github_url: str | None
    paper_url: str | None
    license_url: str | None
    run_count: int
    cover_image_url: str | None
    default_example: dict[str, Any] | None
    latest_version: ModelVersion | None


class Replicate(Face):
    name = "replicate"
    errors = Details()
    words = {
        **{name: f"input.{name}" for name in ("width", "height", "seed", "scheduler", "image", "mask")},
        "text": "input.prompt",
        "negative": "input.negative_prompt",
        "n": "input.num_outputs",
        "num_steps": "input.num_inference_steps",
        "guidance": "input.guidance_scale",
        "strength": "input.prompt_strength",
        "format": "input.output_format",
        "quality": "input.output_quality",
    }

    @property
    def operations(self) -> Iterator[Operation]:
        base, model = "/v1/predictions", "/v1/models/{owner}/{model}"
        for method, path, name, summary, serve, answer in (
            ("POST", base, "replicateCreate", "Replicate's shape: make pictures later", self.create, Prediction),
            ("POST", f"{model}/predictions", "replicateCreateOf", "The same of a model by its name", self.create, Prediction),
            ("GET", base, "replicateList", "The tenant's predictions, newest first", self.list, Predictions),
            ("GET", base + "/{prediction}", "replicateGet", "One prediction", self.get, Prediction),
            ("POST", base + "/{prediction}/cancel", "replicateCancel", "Cancel a prediction", self.cancel, Prediction),
            ("GET", model, "replicateModel", "A model and its newest version", self.model, ReplicateModel),
            ("GET", f"{model}/versions/{{version_id}}", "replicateVersion", "One version", self.version, ModelVersion),
        ):
            yield Operation(
                name=name,
                method=method,
                path=path,
                tag="images",
                summary=summary,
                serve=self.endpoint(serve),
                answer=answer,
                body=PredictionBody if serve == self.create else None,
                body_required=serve == self.create,
                ok=(201,) if serve == self.create else (200,),
                optional=("Prefer", "Idempotency-Key") if serve == self.create else ("cursor",) if serve == self.list else (),
                errors=(400, 404, 413, 422, 429, 500, 501, 503),
                error=Detail,
            )

    async def create(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        if "cancel-after" in http.headers:
            raise InvalidRequest("the header Cancel-After is not offered: jobs of /v1/jobs have `total_seconds`")
        body = decode_named(await self.body(http), PredictionBody)
        name = http.path_params.get("model")
        if name is None:
            if not body.version:
                raise InvalidRequest(f"`version` of the model is missing: {OWNER}/NAME, or {OWNER}/NAME:NAME@VERSION")
            line.model, line.version = _of_version(body.version)
        else:
            _check_owner(http)
            line.model, line.version = name, ""
        asked = body.input
        fields = {
            "text": asked.prompt,
            "negative": asked.negative_prompt,
            "width": asked.width,
            "height": asked.height,
            "n": asked.num_outputs,
            "num_steps": asked.num_inference_steps,
            "guidance": asked.guidance_scale,
            "seed": asked.seed,
            "scheduler": asked.scheduler,
            "image": base64_bytes(asked.image, "input.image"),
            "mask": base64_bytes(asked.mask, "input.mask"),
            "strength": asked.prompt_strength,
            "format": "jpeg" if asked.output_format == "jpg" else asked.output_format,
            "quality": asked.output_quality,
        }
        shown = {name: value for name, value in msgspec.to_builtins(asked).items() if name not in ("image", "mask")}
        events = body.webhook_events_filter or ["completed"]
        if "completed" not in events:
            raise InvalidRequest("`webhook_events_filter` must have `completed`: the other events are not told")
        if body.webhook_events_filter and not body.webhook:
            raise InvalidRequest("`webhook_events_filter` needs a `webhook`")
        wishes = Wishes(
            face=self.name,
            metadata={"input": json.dumps(shown)},
            webhook=body.webhook or "",
            webhook_events=WEBHOOK_EVENTS["completed"],
            idempotency_key=http.headers.get("idempotency-key", ""),
        )
        seconds = wait_seconds(http, min(self.desk.settings.max_wait_seconds, MAX_WAIT_SECONDS))
        row, _ = await self.hand_in(self.painted(line, fields), wishes)
        if seconds is not None:
            waited = await while_connected(http.scope, http.receive, self.desk.wait(row.id, line.caller, seconds))
            if waited is None:
                return HttpResponse(status_code=CLIENT_LEFT)
            row = waited
        told = self.told(row, http)
        if row.status not in ENDED:
            told.status = "starting"  # their client takes whatever else it is for the end
        return json_response(told, 201, {**line.headers, "Location": self.url(http, f"/v1/predictions/{row.id}")})

    async def get(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        return json_response(self.told(await self.pictures(http.path_params["prediction"], line.caller), http), headers=line.headers)

    async def cancel(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        row = await self.pictures(http.path_params["prediction"], line.caller)
        return json_response(self.told(await self.desk.cancel(row.id, line.caller), http), headers=line.headers)

    async def list(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        before = cursor(http.query_params.get("cursor"), "cursor")
        rows = await self.desk.list(JobQuery(tenant=line.caller.tenant, kind=PAINT, before=before, limit=PAGE, whole=True))
        following = self.url(http, f"/v1/predictions?cursor={rows[-1].id}") if len(rows) == PAGE else None
        return json_response(Predictions(following, None, [self.told(row, http) for row in rows]), headers=line.headers)

    async def model(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        _check_owner(http)
        name = http.path_params["model"]
        info = self.image_info(line.caller, name, "")
        version = self.shared.repository.find(name).version
        return json_response(
            ReplicateModel(
                url=self.url(http, f"/v1/models/{OWNER}/{name}"),
                owner=OWNER,
                name=name,
                description=None,
                visibility="private",
                github_url=None,
                paper_url=None,
                license_url=None,
                run_count=0,
                cover_image_url=None,
                default_example=None,
                latest_version=_version(name, version, info),
            ),
            headers=line.headers,
        )

    async def version(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        _check_owner(http)
        model, version = _of_version(http.path_params["version_id"])
        if model != http.path_params["model"]:
            raise NotFound(f"model `{OWNER}/{http.path_params['model'][:64]}` has no such version")
        info = self.image_info(line.caller, model, version)
        version = self.shared.repository.find(model, version).version
        return json_response(_version(model, version, info), headers=line.headers)

    def told(self, row: JobRow, http: HttpRequest | None) -> Prediction:
        base = self.url(http, f"/v1/predictions/{row.id}")
        output = None
        if row.result is not None:
            output = [self.file_url(http, row, artifact)[0] for artifact in row.result.artifacts]
        metrics = {}
        if row.started is not None and row.ended is not None:
            metrics = {"predict_time": round(row.ended - row.started, 6), "total_time": round(row.ended - row.created, 6)}
        version = row.result.version if row.result else row.version
        return Prediction(
            id=row.id,
            model=f"{OWNER}/{row.model}",
            version=f"{row.model}@{version}" if version else row.model,
            status=status_of(row),
            input=json.loads(row.metadata["input"]) if row.face == self.name else None,
            output=output,
            logs=_logs(row),
            error=_error(row),
            metrics=metrics,
            created_at=_time(row.created),
            started_at=None if row.started is None else _time(row.started),
            completed_at=None if row.ended is None else _time(row.ended),
            data_removed=False,
            urls={"get": base, "cancel": f"{base}/cancel"},
        )


def status_of(row: JobRow) -> Status:
    match row.status:
        case JobStatus.QUEUED:
            return "starting"
        case JobStatus.ACTIVE | JobStatus.ABORTING:
            return "processing"
        case JobStatus.COMPLETE:
            return "succeeded"
        case JobStatus.ABORTED:
            return "canceled"
    return "failed"


def _error(row: JobRow) -> str | None:
    if row.status not in ENDED or row.status is JobStatus.COMPLETE:
        return None
    if row.reason.startswith("moderated"):
        return f"NSFW content detected: {row.message}"
    return f"{row.reason}: {row.message}"


def _logs(row: JobRow) -> str:
    """As tqdm writes it, which their client reads the progress from."""
    if not row.num_steps:
        return ""
    step = row.num_steps if row.status is JobStatus.COMPLETE else row.step
    done = step * STEPS_SHOWN // row.num_steps
    return f"{100 * step // row.num_steps:3d}%|{'█' * done}{' ' * (STEPS_SHOWN - done)}| {step}/{row.num_steps}\n"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _of_version(text: str) -> tuple[str, str]:
    """(model, version) of `NAME@VERSION`, `NAME`, `fairlead/NAME`, `fairlead/NAME:VERSION`."""
    owner, slash, rest = text.partition("/")
    if slash and owner != OWNER:
        raise NotFound(f"there is no model of `{owner[:64]}` here: owners are all `{OWNER}`")
    name, colon, version = (rest if slash else text).partition(":")
    text = (version if "@" in version else f"{name}@{version}") if colon else name
    name, _, version = text.partition("@")
    return name, version


def _check_owner(http: HttpRequest) -> None:
    if http.path_params["owner"] != OWNER:
        raise NotFound(f"there is no model of `{http.path_params['owner'][:64]}` here: owners are all `{OWNER}`")


def _version(model: str, version: str, info: ImageInfo) -> ModelVersion:
    (schema,), components = msgspec.json.schema_components([PredictionInput], ref_template="#/components/schemas/{name}")
    del schema
    properties = components["PredictionInput"]["properties"]
    properties["num_inference_steps"]["default"] = info.num_steps
    properties["guidance_scale"]["default"] = info.guidance
    schemas = {
        "Input": {**components["PredictionInput"], "title": "Input"},
        "Output": {"title": "Output", "type": "array", "items": {"type": "string", "format": "uri"}},
    }
    document = {"openapi": "3.1.0", "info": {"title": model, "version": version}, "components": {"schemas": schemas}}
    return ModelVersion(f"{model}@{version}", _time(0.0), COG_VERSION, document)
