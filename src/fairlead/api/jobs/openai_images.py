"""OpenAI's images: `generations` and `edits`, answered while the caller waits. Beneath it is a job like any other.

Beside OpenAI's parameters these are taken: `negative_prompt`, `seed`, `num_steps`, `guidance`, `scheduler`, `strength`, `loras`.
A partial image is a preview: smaller than the picture, and a JPEG. There are no tokens to count: `usage` says 0 of them.
"""

import asyncio
import base64
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from io import BytesIO
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta, Struct
from PIL import ImageOps
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from fairlead.api.jobs.asks import LoraBody
from fairlead.api.jobs.face import Face, Shared, image_models, parted
from fairlead.api.line import AccessLine
from fairlead.api.openai.errors import BadParameter, OpenAIError, OpenAIErrors, decode_body, explained
from fairlead.api.openapi import Operation
from fairlead.api.status import CLIENT_LEFT
from fairlead.api.web import EventStream, json_response, while_connected
from fairlead.core.caller import Caller
from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    Forbidden,
    InvalidRequest,
    ModelError,
    Unavailable,
)
from fairlead.core.generation import ImageInfo, Mode, PictureFormat
from fairlead.core.jobs import ENDED, Artifact, JobStatus
from fairlead.core.pictures import decode
from fairlead.jobs.artifacts import Artifacts
from fairlead.jobs.desk import Desk, Wishes
from fairlead.store.job_rows import JobRow

SYNC_SECONDS = 600.0
"""After which a picture that somebody waits for is given up."""
MARGIN_SECONDS = 10.0
"""For the store to say so."""
MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES = 4, 40, 1 << 20

MODES: dict[str, Mode] = {"low": "turbo", "medium": "balanced"}
"""Of the qualities; the others are exact."""

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


class ImagesBody(Struct, kw_only=True, forbid_unknown_fields=True):
    prompt: Annotated[str, Meta(max_length=32_000)]
    model: str | None = None
    """None: the only one that makes pictures."""
    n: Annotated[int, Meta(ge=1, le=10)] | None = None
    size: str | None = None
    quality: Quality | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: PictureFormat | None = None
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Meta(ge=0, le=3)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # beyond OpenAI's
    negative_prompt: str = ""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    num_steps: Annotated[int, Meta(ge=1)] | None = None
    guidance: Annotated[float, Meta(ge=0.0)] | None = None
    scheduler: str = ""
    strength: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    loras: list[LoraBody] = []


Upload = Annotated[bytes, Meta(extra_json_schema={"contentEncoding": "binary"})]


class EditsBody(ImagesBody, kw_only=True, forbid_unknown_fields=True):
    image: Upload
    mask: Upload | None = None
    """Transparent where the picture is painted anew."""


class OpenAIImage(Struct, omit_defaults=True):
    b64_json: str | None = None
    url: str | None = None
    seed: int | None = None


class InputTokens(Struct, frozen=True):
    text_tokens: int = 0
    image_tokens: int = 0


class ImagesUsage(Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()


class ImagesAnswer(Struct):
    created: int
    data: list[OpenAIImage]
    background: str
    output_format: PictureFormat
    quality: str
    size: str
    usage: ImagesUsage


class ImageEvent(Struct, kw_only=True, omit_defaults=True):
    type: str
    b64_json: str
    created_at: int
    size: str
    quality: str
    background: str
    output_format: str
    partial_image_index: int | None = None
    usage: ImagesUsage | None = None


class ImageModel(Struct):
    name: str
    info: ImageInfo


class ImageModels(Struct):
    models: list[ImageModel]


class OpenAIImages(Face):
    name = "images"
    errors = OpenAIErrors("prompt")
    words = {
        "text": "prompt",
        "negative": "negative_prompt",
        "width` times `height": "size",
        "width": "size",
        "height": "size",
        "preview_steps": "partial_images",
        "quality": "output_compression",
        "mode": "quality",
        "format": "output_format",
    }

    def __init__(self, shared: Shared, files: Artifacts) -> None:
        super().__init__(shared)
        self.files = files

    @property
    def operations(self) -> Iterator[Operation]:
        for path, name, summary, serve, body in (
            ("/v1/images/generations", "openaiImages", "Make pictures from a text", self.generate, ImagesBody),
            ("/v1/images/edits", "openaiImageEdits", "Make pictures from a picture and a text", self.edit, EditsBody),
        ):
            yield Operation(
                name=name,
                method="POST",
                path=path,
                tag="openai",
                summary=summary,
                serve=self.endpoint(serve),
                body=body,
                body_required=True,
                form=body is EditsBody,
                answer=ImagesAnswer,
                events="also",
                errors=(400, 404, 413, 429, 500, 501, 503),
                error=OpenAIError,
            )

        yield Operation(
            name="imageModels",
            method="GET",
            path="/v1/images/models",
            tag="images",
            summary="Models that make pictures, and what they take",
            serve=self.endpoint(self.models),
            answer=ImageModels,
            errors=(500,),
            error=OpenAIError,
        )

    async def models(self, http: HttpRequest, line: AccessLine) -> HttpResponse:
        names = image_models(self.shared.repository, line.caller)
        return json_response(
            ImageModels([ImageModel(name, self.image_info(line.caller, name, "")) for name in names]), headers=line.headers
        )

    async def generate(self, http: HttpRequest, line: AccessLine) -> Any:
        return await self._make(http, line, decode_body(await self.body(http), ImagesBody), b"", b"", "image_generation")

    async def edit(self, http: HttpRequest, line: AccessLine) -> Any:
        fields = await read_form(http, await self.body(http))
        try:
            body = msgspec.convert(fields, EditsBody, strict=False, builtin_types=(bytes,))
        except msgspec.ValidationError as error:
            raise explained(str(error), EditsBody) from None
        for name, data in (("image", body.image), ("mask", body.mask)):
            if data == b"":
                raise BadParameter(f"'{name}' is empty.", name, "invalid_value")
        mask = await asyncio.to_thread(painted_where_transparent, body.mask) if body.mask else b""
        return await self._make(http, line, body, body.image, mask, "image_edit")

    async def _make(self, http: HttpRequest, line: AccessLine, body: ImagesBody, image: bytes, mask: bytes, event: str) -> Any:
        line.model, line.version = parted(body.model or self.only_image_model(line.caller))
        info = self.image_info(line.caller, line.model, line.version)
        fields = _fields(body, info, image, mask)
        row, _ = await self.hand_in(self.painted(line, fields), Wishes(face=self.name, total_seconds=SYNC_SECONDS))
        line.headers["x-fairlead-job"] = row.id
        wait = Wait(self.desk, row.id, line.caller)
        if body.stream:
            return PictureStream(wait, self._events(wait, body, event), line, self.errors)
        try:
            ended = await while_connected(http.scope, http.receive, wait.end())
        finally:
            await wait.over()
        if ended is None:
            return HttpResponse(status_code=CLIENT_LEFT)
        artifacts = _artifacts(ended)
        data = []
        for artifact in artifacts:
            if body.response_format == "url":
                data.append(OpenAIImage(None, self.file_url(http, ended, artifact)[0], artifact.seed))
            else:
                data.append(OpenAIImage(await self._base64(artifact), None, artifact.seed))
        first = artifacts[0]
        return json_response(
            ImagesAnswer(int(time.time()), data, "opaque", _format(body), _quality(body), f"{first.width}x{first.height}", ImagesUsage()),
            headers=line.headers,
        )

    async def _events(self, wait: "Wait", body: ImagesBody, event: str) -> AsyncGenerator[bytes, None]:
        """Previews as they come, and the picture."""
        index, last = 0, b""
        async with aclosing(wait.changes()) as rows:
            async for row in rows:
                if row.status in ENDED:
                    artifact = _artifacts(row)[0]
                    yield _event(f"{event}.completed", await self._base64(artifact), _format(body), body, row, None)
                elif row.preview and row.preview != last and index < (body.partial_images or 0):
                    last = row.preview
                    yield _event(f"{event}.partial_image", base64.b64encode(last).decode(), "jpeg", body, row, index)
                    index += 1

    async def _base64(self, artifact: Artifact) -> str:
        async with aclosing(self.files.read(artifact.key, 0, artifact.num_bytes)) as chunks:
            data = b"".join([chunk async for chunk in chunks])
        return base64.b64encode(data).decode()


class Wait:
    """Somebody's, for a job that is nobody else's: it is cancelled when they leave."""

    def __init__(self, desk: Desk, job: str, caller: Caller) -> None:
        self.desk = desk
        self.job = job
        self.caller = caller
        self.ended = False

    async def end(self) -> JobRow:
        row = await self.desk.wait(self.job, self.caller, SYNC_SECONDS + MARGIN_SECONDS)
        self.ended = row.status in ENDED
        return row

    async def changes(self) -> AsyncGenerator[JobRow, None]:
        async with aclosing(self.desk.watch(self.job, self.caller)) as rows:
            async for row in rows:
                self.ended = row.status in ENDED
                yield row

    async def over(self) -> None:
        """Nobody waits any longer. A store that is away now leaves the job to its deadline."""
        if not self.ended:
            with suppress(Unavailable):
                await self.desk.cancel(self.job, self.caller)


class PictureStream(EventStream):
    """The wait is over with it, also where the client had left before it began."""

    def __init__(self, wait: Wait, events: AsyncGenerator[bytes, None], line: AccessLine, errors: OpenAIErrors) -> None:
        super().__init__(events, line.end, line.headers, errors)
        self.wait = wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.wait.over()


def _fields(body: ImagesBody, info: ImageInfo, image: bytes, mask: bytes) -> dict[str, Any]:
    """Of a Paint. Raises InvalidRequest."""
    if body.stream and (body.n or 1) > 1:
        raise BadParameter("'n' must be 1 where 'stream' is true.", "n", "invalid_value")
    if body.stream and body.response_format == "url":
        raise BadParameter("Events carry the picture itself: 'response_format' must be b64_json.", "response_format", "invalid_value")
    if body.partial_images is not None and not body.stream:
        raise BadParameter("'partial_images' is for 'stream'.", "partial_images", "invalid_value")
    if body.output_compression is not None and _format(body) == "png":
        raise BadParameter("'output_compression' is for jpeg and webp.", "output_compression", "invalid_value")
    width, height = _size(body.size)
    mode = MODES.get(body.quality or "", "exact")
    if mode not in info.modes:
        raise BadParameter(
            f"Quality '{body.quality}' computes in mode {mode}, which this model does not have: use 'high' or 'auto'.",
            "quality",
            "unsupported_value",
        )
    previews = body.partial_images or 0
    return {
        "text": body.prompt,
        "negative": body.negative_prompt,
        "width": width,
        "height": height,
        "n": body.n or 1,
        "seed": body.seed,
        "num_steps": body.num_steps,
        "guidance": body.guidance,
        "scheduler": body.scheduler,
        "image": image,
        "mask": mask,
        "strength": body.strength,
        "loras": [{"name": lora.name, "scale": lora.scale} for lora in body.loras],
        "mode": mode,
        "preview_steps": max((body.num_steps or info.num_steps) // (previews + 1), 1) if previews else 0,
        "format": _format(body),
        "quality": max(100 if body.output_compression is None else body.output_compression, 1),
    }


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None or text == "auto":
        return None, None
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if match is None:
        raise BadParameter(f"Invalid value for 'size': '{text[:32]}'. Expected 'auto' or WIDTHxHEIGHT.", "size", "invalid_value")
    return int(match[1]), int(match[2])


def _format(body: ImagesBody) -> PictureFormat:
    return body.output_format or "png"


def _quality(body: ImagesBody) -> str:
    return {"low": "low", "medium": "medium"}.get(body.quality or "", "high")


def _event(kind: str, data: str, format: str, body: ImagesBody, row: JobRow, index: int | None) -> bytes:
    artifact = row.result.artifacts[0] if row.result and row.result.artifacts else None
    event = ImageEvent(
        type=kind,
        b64_json=data,
        created_at=int(time.time()),
        size=f"{artifact.width}x{artifact.height}" if artifact else body.size or "auto",
        quality=_quality(body),
        background="opaque",
        output_format=format,
        partial_image_index=index,
        usage=ImagesUsage() if index is None else None,
    )
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _artifacts(row: JobRow) -> tuple[Artifact, ...]:
    """Of a complete job. Raises what others failed with."""
    if row.status is JobStatus.COMPLETE and row.result is not None:
        return row.result.artifacts
    _refuse(row)


def _refuse(row: JobRow) -> NoReturn:
    message = row.message
    match row.reason:
        case "moderated-input" | "moderated-output":
            raise BadParameter(message, "prompt", "moderation_blocked")
        case "invalid":
            raise InvalidRequest(message)
        case "forbidden":
            raise Forbidden(message)
        case "model-error" | "replica-died":
            raise ModelError(message)
        case "cancelled":
            raise Cancelled(message)
    error: FairleadError = Unavailable(message or "the picture was not ready in time")
    raise error


async def read_form(http: HttpRequest, body: bytes) -> dict[str, Any]:
    """Fields (texts) and files (bytes) of multipart/form-data. Raises BadParameter."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise BadParameter("Edits are sent as multipart/form-data.", None, "invalid_type")
    fields: dict[str, Any] = {}
    again = HttpRequest(http.scope, receive)
    try:
        async with again.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            for name, value in form.multi_items():
                name = name.removesuffix("[]")
                if name in fields:
                    raise BadParameter(f"'{name}' comes twice, and one is taken.", name, "invalid_value")
                fields[name] = await value.read() if isinstance(value, UploadFile) else value
    except HTTPException as error:
        raise BadParameter(f"We could not parse the form of your request: {error.detail}", None) from None
    except (MultiPartException, FormParserError, UnicodeError) as error:
        raise BadParameter(f"We could not parse the form of your request: {error}", None) from None
    if isinstance(fields.get("loras"), str):
        try:
            fields["loras"] = msgspec.json.decode(fields["loras"])
        except (msgspec.DecodeError, RecursionError):
            raise BadParameter("'loras' is no JSON.", "loras", "invalid_type") from None
    return fields


def painted_where_transparent(mask: bytes) -> bytes:
    """OpenAI's masks are transparent where the picture is painted anew; ours are white there. Raises InvalidRequest."""
    image = decode(mask, "mask")
    if image.mode != "RGBA":
        raise InvalidRequest("`mask` must be transparent where the picture is to be painted anew, and it has no transparency")
    out = BytesIO()
    ImageOps.invert(image.getchannel("A")).save(out, "PNG")
    return out.getvalue()
