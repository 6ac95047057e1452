"""KServe v2 over HTTP: the table of its operations, and those about the server, its models and its repository."""

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from msgspec.structs import asdict, replace
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.doorkeeper import caller_of, place, see
from fairlead.api.kserve.bodies import (
    Health,
    IndexRequest,
    IndexRow,
    InferResponse,
    Live,
    LoadRequest,
    ModelReady,
    Nothing,
    Ready,
    Statistics,
    UnloadRequest,
)
from fairlead.api.kserve.codec import RequestJson
from fairlead.api.kserve.metadata import ModelMetadata, ServerMetadata, model_config, model_metadata, model_ready, server_metadata
from fairlead.api.kserve.parameters import file_path
from fairlead.api.kserve.streaming import Streaming
from fairlead.api.openapi import Operation
from fairlead.api.web import Serve, decode_json, health_response, json_response, live_response, read_body, ready_response
from fairlead.core.errors import InvalidRequest, Unsupported
from fairlead.core.policy import Scope
from fairlead.core.request import Inference
from fairlead.gateway.identity.identity import may_use
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

T = TypeVar("T")

SMALL_BODY_BYTES = 1 << 20
MODEL_PATHS = (("/v2/models/{model}", "model"), ("/v2/models/{model}/versions/{version}", "modelVersion"))
MEMORY_KINDS = ("systemsharedmemory", "cudasharedmemory")


class Rest:
    """The operations upon one repository."""

    def __init__(self, repository: ModelRepository, gateway: Inference, finished: Finished, max_body_bytes: int) -> None:
        self.repository = repository
        self.max_body_bytes = max_body_bytes
        self.streaming = Streaming(repository, gateway, finished, max_body_bytes)
        self.operations = (*self._health(), *self._models(), *self._inference(), *self._repository(), *_not_offered())

    # The table

    def _health(self) -> Iterator[Operation]:
        for operation in self._health_operations():
            yield replace(operation, scope=None)

    def _health_operations(self) -> Iterator[Operation]:
        runs, works = "Whether the server runs", "Whether the server starts, works or stops, and its models are loaded"
        yield _get("/v2/health/live", "serverLive", "health", runs, self.live, Live)
        yield _get("/v2/health/ready", "serverReady", "health", works, self.ready, Ready, 503)
        yield _get("/healthz", "health", "health", "Live and ready in one", self.health, Health, 503)
        yield _get("/healthz/live", "healthLive", "health", runs, self.live, Live)
        yield _get("/healthz/ready", "healthReady", "health", works, self.ready, Ready, 503)

    def _models(self) -> Iterator[Operation]:
        yield _get("/v2", "serverMetadata", "models", "The server's name and extensions", self.server_metadata, ServerMetadata)
        yield _get("/v2/models/stats", "statistics", "models", "What all models did", self.statistics, Statistics)
        for path, name in MODEL_PATHS:
            yield _get(
                path, f"{name}Metadata", "models", "The model's versions, inputs and outputs", self.model_metadata, ModelMetadata, 404, 503
            )
            yield _get(f"{path}/ready", f"{name}Ready", "health", "Whether the model answers", self.model_ready, ModelReady, 400, 404)
            yield _get(
                f"{path}/config",
                f"{name}Config",
                "models",
                "The configuration, as Triton's ModelConfig",
                self.model_config,
                dict[str, Any],
                404,
                503,
            )
            yield _get(f"{path}/stats", f"{name}Statistics", "models", "What the model did", self.statistics, Statistics, 400, 404)

    def _inference(self) -> Iterator[Operation]:
        streaming, flat, errors = self.streaming, dict[str, Any], (400, 404, 413, 501, 503)
        for path, name in MODEL_PATHS:
            infer = _post(
                f"{path}/infer",
                f"{name}Infer",
                "inference",
                "Tensors in, tensors out",
                streaming.infer,
                RequestJson,
                InferResponse,
                *errors,
            )
            one = _post(
                f"{path}/generate", f"{name}Generate", "inference", "Flat JSON in, flat JSON out", streaming.generate, flat, flat, *errors
            )
            many = _post(
                f"{path}/generate_stream",
                f"{name}GenerateStream",
                "inference",
                "Flat JSON in, a stream of it out",
                streaming.generate_stream,
                flat,
                None,
                *errors,
            )
            yield replace(infer, body_required=True, binary=True, events="also")
            yield replace(one, body_required=True)
            yield replace(many, body_required=True, events="only")

    def _repository(self) -> Iterator[Operation]:
        index = "Every model of the repositories, loaded or not"
        yield _post(
            "/v2/repository/index",
            "repositoryIndex",
            "repository",
            index,
            self.index,
            IndexRequest,
            list[IndexRow],
            400,
            413,
            example={"ready": True},
        )
        path, errors = "/v2/repository/models/{model}", (400, 404, 413, 503)
        yield _post(
            f"{path}/load",
            "modelLoad",
            "repository",
            "Load a model, or load it anew",
            self.load,
            LoadRequest,
            Nothing,
            *errors,
            scope=Scope.REPOSITORY,
        )
        yield _post(
            f"{path}/unload",
            "modelUnload",
            "repository",
            "Unload a model",
            self.unload,
            UnloadRequest,
            Nothing,
            *errors,
            scope=Scope.REPOSITORY,
        )

    # Health

    async def live(self, _: Request) -> Response:
        return live_response()

    async def ready(self, _: Request) -> Response:
        return ready_response(self.repository)

    async def health(self, _: Request) -> Response:
        return health_response(self.repository)

    async def model_ready(self, request: Request) -> Response:
        model, version = place(request)
        if not model_ready(self.repository, model, version):
            raise InvalidRequest("Model version not ready")
        return json_response({"name": model, "ready": True})

    # Models

    async def server_metadata(self, _: Request) -> Response:
        return json_response(server_metadata())

    async def model_metadata(self, request: Request) -> Response:
        return json_response(model_metadata(self.repository, self.repository.find(*place(request))))

    async def model_config(self, request: Request) -> Response:
        return json_response(model_config(self.repository.find(*place(request))))

    async def statistics(self, request: Request) -> Response:
        model, version = place(request) if "model" in request.path_params else ("", "")
        caller, _ = caller_of(request)
        return json_response(
            {"model_stats": [each for each in self.repository.statistics(model, version) if may_use(caller, str(each["name"]))]}
        )

    # Repository

    async def index(self, request: Request) -> Response:
        asked = await _body(request, IndexRequest, SMALL_BODY_BYTES)
        caller, _ = caller_of(request)
        rows = [row for row in self.repository.index(ready=asked.ready) if may_use(caller, row.name)]
        return json_response([{name: value for name, value in asdict(row).items() if value or name == "name"} for row in rows])

    async def load(self, request: Request) -> Response:
        parameters = (await _body(request, LoadRequest, self.max_body_bytes)).parameters
        config = parameters.pop("config", None)
        files = {file_path(name): _file_content(name, content) for name, content in parameters.items()}
        if files and config is None:
            raise InvalidRequest("load parameter 'config' must be given where files are")
        see(caller_of(request)[0], request.path_params["model"])
        await self.repository.load(request.path_params["model"], config, files or None)
        return json_response({})

    async def unload(self, request: Request) -> Response:
        await _body(request, UnloadRequest, SMALL_BODY_BYTES)
        see(caller_of(request)[0], request.path_params["model"])
        await self.repository.unload(request.path_params["model"])
        return json_response({})


def _get(path: str, name: str, tag: str, summary: str, serve: Serve, answer: Any, *errors: int) -> Operation:
    return Operation(name=name, method="GET", path=path, tag=tag, summary=summary, serve=serve, answer=answer, errors=(*errors, 500))


def _post(path: str, name: str, tag: str, summary: str, serve: Serve, body: Any, answer: Any, *errors: int, **more: Any) -> Operation:
    return Operation(
        name=name, method="POST", path=path, tag=tag, summary=summary, serve=serve, body=body, answer=answer, errors=(*errors, 500), **more
    )


def _not_offered() -> Iterator[Operation]:
    """What Triton's clients may ask for and this server says no to, with a reason."""
    memory = "shared-memory regions: it would let clients read the server's memory. Send tensors with the binary extension"
    tracing = "trace settings: traces follow the traceparent header"
    named = "named repositories in paths: use /v2/repository/index and /v2/repository/models/NAME"
    rows = [
        *(("GET", f"/v2/{kind}{region}/status", memory) for kind in MEMORY_KINDS for region in ("", "/region/{region}")),
        *(("POST", f"/v2/{kind}/region/{{region}}/register", memory) for kind in MEMORY_KINDS),
        *(("POST", f"/v2/{kind}{region}/unregister", memory) for kind in MEMORY_KINDS for region in ("", "/region/{region}")),
        *((method, f"{path}/trace/setting", tracing) for path in ("/v2", *(path for path, _ in MODEL_PATHS)) for method in ("GET", "POST")),
        *((method, "/v2/logging", "log settings over HTTP: set them when the server starts") for method in ("GET", "POST")),
        ("POST", "/v2/repository/{repository}/index", named),
        *(("POST", f"/v2/repository/{{repository}}/models/{{model}}/{verb}", named) for verb in ("load", "unload")),
    ]
    for method, path, what in rows:
        name = "".join(part[:1].upper() + part[1:] for part in re.findall(r"\w+", path.removeprefix("/v2")))
        yield Operation(
            name=f"{method.lower()}{name}",
            method=method,
            path=path,
            tag="not offered",
            summary="Not offered",
            serve=_refuse(what),
            errors=(501,),
        )


def _refuse(what: str) -> Serve:
    async def refuse(_: Request) -> Response:
        raise Unsupported(f"this server does not offer {what}")

    return refuse


async def _body(request: Request, type_: type[T], limit: int) -> T:
    """The JSON body; all its fields' defaults where it is empty."""
    return decode_json(await read_body(request, limit) or b"{}", type_)


def _file_content(parameter: str, content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"load parameter '{parameter}' is not base64") from None
