"""What all faces of jobs share: who asks, what a model takes, links to files, and how errors are told."""

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.line import AccessLine
from fairlead.api.status import CLIENT_LEFT, INTERNAL
from fairlead.api.web import ErrorShape, Serve, Shape, read_body
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError, InvalidRequest, NotFound, Unsupported
from fairlead.core.generation import ImageInfo, Paint
from fairlead.core.jobs import Artifact
from fairlead.core.pictures import check
from fairlead.core.request import Request
from fairlead.gateway.identity.identity import may_use
from fairlead.jobs.desk import Desk, Wishes, unknown
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository
from fairlead.store.job_rows import JobRow

T = TypeVar("T")
PAINT = "paint"
"""As `JobRow.kind` has it."""
log = structlog.get_logger(__name__)

JOB_ID = re.compile(r"job_[0-9a-f]{32}")

_PLACE = re.compile(r" - at `\$\.?(.*?)`$")
_FIELD = re.compile(r"(?:unknown|required) field `(.+?)`")
_PICTURE_TYPES = re.compile(r"data:image/(?:png|jpe?g|webp);base64", re.IGNORECASE)

Links = Callable[[Artifact, str, float], tuple[str, float]]
"""(artifact, tenant, now) → path and query of a signed link, and until when it is good."""


class Errors(Shape, ErrorShape, Protocol):
    """How it says that something went wrong, in answers and in events."""


Answer = Callable[[HttpRequest, AccessLine], Awaitable[Any]]


class Remote(Protocol):
    """What of the gateway is asked beside requests."""

    def remote(self, model: str) -> bool:
        """Only other servers compute it."""


class Shared(Struct, frozen=True):
    """What every face is given."""

    desk: Desk
    repository: ModelRepository
    remote: Remote
    finished: Finished
    links: Links
    check_webhook: Callable[[str, str], None]
    """(URL, the field that it stands in). Raises InvalidRequest for a URL that will not be called."""
    max_body_bytes: int
    public_url: str = ""
    """"" for the address that the request came to."""


class Face:
    """Base of the faces: reads, checks, hands in."""

    name: str
    """As `JobRow.face` has it."""
    errors: Errors
    words: Mapping[str, str]
    """What its callers call the fields of a Paint, where that is another name."""
    webhook_field = "webhook"

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.desk = shared.desk

    def endpoint(self, serve: Answer) -> Serve:
        """With its line in the access log and its errors in the face's shape, whatever happens."""

        async def answer(http: HttpRequest) -> Any:
            line = AccessLine(self.shared.finished, http)
            try:
                response = await serve(http, line)
            except FairleadError as error:
                response = self.errors.response(error, line.headers)
                line.end(response.status_code, error.message)
                return response
            except HTTPException as error:
                line.end(error.status_code, error.detail)
                raise
            except ClientDisconnect:
                line.end(CLIENT_LEFT, "the client left")
                return HttpResponse(status_code=CLIENT_LEFT)
            except asyncio.CancelledError:
                line.end(503, "the server stopped")
                raise
            except Exception:
                log.exception("request_failed", method=http.method, path=http.url.path)
                line.end(500, INTERNAL.message)
                return self.errors.response(INTERNAL, line.headers)
            if isinstance(response, HttpResponse):
                line.end(response.status_code, "the client left" if response.status_code == CLIENT_LEFT else "")
            return response

        return answer

    async def body(self, http: HttpRequest) -> bytes:
        """Raises TooLarge."""
        return await read_body(http, self.shared.max_body_bytes)

    def image_info(self, caller: Caller, model: str, version: str) -> ImageInfo:
        """Raises NotFound, or InvalidRequest for a model that makes no pictures."""
        repository = self.shared.repository
        if not repository.known(model) or not may_use(caller, model):
            raise NotFound(f"there is no model `{model}`")
        info = repository.engine_info(model, version)
        if info is None or info.image is None:
            raise InvalidRequest(f"`model`: '{model}' makes no pictures")
        return info.image

    def only_image_model(self, caller: Caller) -> str:
        """The one model that makes pictures, for those who name none. Raises InvalidRequest where there are none or several."""
        found = image_models(self.shared.repository, caller)
        if len(found) != 1:
            raise InvalidRequest(f"`model` must be one of {', '.join(found)}" if found else "`model`: none here makes pictures")
        return found[0]

    def painted(self, line: AccessLine, fields: Mapping[str, Any]) -> Request:
        """A request for pictures whose every value is good for the model of the line. `fields`: of a Paint.

        Raises InvalidRequest and Unsupported in the face's words, NotFound.
        """
        info = self.image_info(line.caller, line.model, line.version)
        try:
            paint = check(paint_of(fields), info)
        except (InvalidRequest, Unsupported) as error:
            message = error.message
            for ours, theirs in self.words.items():
                message = message.replace(f"`{ours}`", f"`{theirs}`")
            raise error.saying(message) from None
        return line.complete(Request(model=line.model, version=line.version, prompt=paint, id=line.id))

    async def hand_in(self, request: Request, wishes: Wishes) -> tuple[JobRow, bool]:
        if wishes.webhook:
            self.shared.check_webhook(wishes.webhook, self.webhook_field)
        row, new = await self.desk.submit(request, wishes)
        if request.timeline is not None:
            request.timeline.job = row.id
        return row, new

    async def pictures(self, id: str, caller: Caller) -> JobRow:
        """A job that makes pictures, whichever face it came by. Raises NotFound."""
        row = await self.desk.get(id, caller)
        if row.kind != PAINT:
            raise unknown(id)
        return row

    def url(self, http: HttpRequest | None, path: str) -> str:
        base = self.shared.public_url or ("" if http is None else str(http.base_url))
        return base.rstrip("/") + path

    def file_url(self, http: HttpRequest | None, row: JobRow, artifact: Artifact) -> tuple[str, float]:
        path, until = self.shared.links(artifact, row.tenant, time.time())
        return self.url(http, path), until


def image_models(repository: ModelRepository, caller: Caller) -> list[str]:
    names = {entry.name for entry in repository.index(ready=True) if repository.versions(entry.name)}
    return sorted(name for name in names if may_use(caller, name) and (info := repository.engine_info(name)) is not None and info.image)


def cursor(id: str | None, field: str) -> str | None:
    """A job that a list goes on after. Raises InvalidRequest for what is no id."""
    if id is not None and not JOB_ID.fullmatch(id):
        raise InvalidRequest(f"`{field}` must be as the list before this one had it")
    return id


def parted(model: str) -> tuple[str, str]:
    """(name, version) of `name` or `name@version`."""
    name, _, version = model.partition("@")
    return name, version


def paint_of(fields: Mapping[str, Any]) -> Paint:
    """Every bound of a Paint holds. Raises InvalidRequest, naming the field."""
    try:
        return msgspec.convert({"type": "paint", **fields}, Paint)
    except msgspec.ValidationError as error:
        raise InvalidRequest(named(str(error))) from None


def decode_named(body: bytes, type_: type[T], within: str = "") -> T:
    """Raises InvalidRequest that begins with the field; `within`: where in the whole body this stands."""
    try:
        return msgspec.json.decode(body, type=type_)
    except RecursionError:
        raise InvalidRequest("the request's JSON is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(named(str(error), within)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def named(message: str, within: str = "") -> str:
    """What msgspec says, after the field that it says it of."""
    place, field = _PLACE.search(message), _FIELD.search(message)
    name = ".".join(part for part in (within, place[1] if place else "", field[1] if field else "") if part)
    said = message[: place.start()] if place else message
    return said if not name or said.startswith("`") else f"`{name}`: {said}"


def base64_bytes(text: str, field: str) -> bytes:
    """Of base64, or of a `data:` URL of a picture in base64; of "" nothing. Raises InvalidRequest, naming the field."""
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not _PICTURE_TYPES.fullmatch(head):
            raise InvalidRequest(f"`{field}` is a data: URL that is no PNG, JPEG or WebP picture in base64")
    elif scheme.startswith(("http://", "https://")):
        raise InvalidRequest(f"`{field}` is a URL, which this server does not fetch: send the picture itself, in base64")
    elif not text:
        return b""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"`{field}` is not base64") from None
    if not data:
        raise InvalidRequest(f"`{field}` is empty")
    return data


def wait_seconds(http: HttpRequest, longest: float) -> float | None:
    """What the `Prefer` headers (RFC 7240) ask for: seconds to wait for the end, None where they do not. Raises InvalidRequest."""
    for each in ",".join(http.headers.getlist("prefer")).split(","):
        name, _, value = each.partition(";")[0].strip().partition("=")
        if name.strip().lower() != "wait":
            continue
        try:
            seconds = float(value.strip().strip('"')) if value else longest
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= 86_400:
            raise InvalidRequest("`Prefer: wait=` takes a number of seconds")
        return min(seconds, longest)
    return None
