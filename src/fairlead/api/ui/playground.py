"""What the playground must know of the models: which there are, what each speaks, what it takes."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import urlsplit

from msgspec import Meta, Struct, structs
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import query_of
from fairlead.api.admin_route import operation
from fairlead.api.doorkeeper import caller_of
from fairlead.api.kserve.codec import to_json
from fairlead.api.openapi import Operation
from fairlead.api.web import Serve, json_response
from fairlead.core.caller import Caller
from fairlead.core.errors import InvalidRequest, NotFound
from fairlead.core.generation import EngineInfo, ImageInfo
from fairlead.core.policy import Scope
from fairlead.core.settings import Settings
from fairlead.core.specs import TensorSpec
from fairlead.core.tensors import Tensors, datatype_of
from fairlead.gateway.identity.identity import may_use
from fairlead.runtime.repository import ModelRepository
from fairlead.runtime.version import ModelVersion, Version
from fairlead.runtime.warmup import samples_of

MAX_EXAMPLE_VALUES = 20_000
"""Of one tensor."""

EVERYWHERE = ("0.0.0.0", "::", "")

Speaks = Literal["chat", "completions", "embeddings", "pictures", "tensors"]


class Remote(Protocol):
    """Which models other servers compute."""

    def remote(self, model: str) -> bool: ...

    def remote_models(self) -> list[str]: ...


class Playable(Struct, frozen=True):
    name: str
    speaks: list[Speaks]
    """What it can be asked, the likeliest first."""
    versions: list[str]
    """Loaded, ascending; [] where another server computes it."""


class Found(Struct, frozen=True):
    models: list[Playable]
    total: int
    """That match, shown or not."""
    url: str
    """Of the data port, as programs reach it."""
    keys: bool
    """Whether programs must show a key there."""


class PlayableTensor(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool
    labels: tuple[str, ...]


class ExampleTensor(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]


class PlayableModel(Playable, frozen=True, kw_only=True):
    """One of them, as one version of it is."""

    version: str
    """Which that is; "" where another server knows."""
    platform: str = ""
    max_model_len: int = 0
    """Tokens of prompt and answer together; 0: not told."""
    picture: ImageInfo | None = None
    inputs: list[PlayableTensor] = []
    outputs: list[PlayableTensor] = []
    example: list[ExampleTensor] | None = None
    """Inputs that work: its first warm-up request."""
    tools: bool = False
    """Whether `tools` may be sent; another server sees for itself."""
    structured_output: bool = False
    """The same of `response_format`."""


class ModelsQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    find: str = ""
    """Part of a name."""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class ModelQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: str = ""


class Playground:
    """The operations upon one repository."""

    def __init__(self, repository: ModelRepository, elsewhere: Remote, url: Callable[[Request], str], *, keys: bool) -> None:
        """`url`: of the data port, for whoever asks; `keys`: whether it asks for them."""
        self.repository = repository
        self.elsewhere = elsewhere
        self.url = url
        self.keys = keys
        all, one = "/ui/playground/models", "/ui/playground/models/{model}"
        self.routes: tuple[tuple[str, Serve], ...] = ((all, self.models), (one, self.model))
        """(path, serve), where it is no part of an administration."""
        self.operations = (
            _get(all, "playgroundModels", "Models that can be tried, and how", self.models, Found),
            _get(one, "playgroundModel", "What one takes", self.model, PlayableModel, 404),
        )

    async def models(self, http: Request) -> Response:
        query = query_of(http, ModelsQuery)
        caller, wanted = caller_of(http)[0], query.find.casefold()
        here = (entry.name for entry in self.repository.index(ready=True) if self.repository.versions(entry.name))
        names = sorted({*here, *self.elsewhere.remote_models()})
        fitting = [name for name in names if wanted in name.casefold() and may_use(caller, name)]
        shown = [self._playable(name) for name in fitting[: query.limit]]
        return json_response(Found(shown, len(fitting), self.url(http), self.keys))

    async def model(self, http: Request) -> Response:
        query, name = query_of(http, ModelQuery), http.path_params["model"]
        version = query.version
        if version and not (version.isascii() and version.isdigit()):
            raise InvalidRequest("`version` is a number")
        return json_response(self._described(caller_of(http)[0], name, version))

    def _playable(self, name: str) -> Playable:
        versions = self.repository.versions(name)
        return Playable(name, speaks(self.repository.engine_info(name) if versions else None, remote=not versions), versions)

    def _described(self, caller: Caller, name: str, version: str) -> PlayableModel:
        """Raises NotFound."""
        if not may_use(caller, name):
            raise NotFound(f"there is no model `{name}`")
        if self.elsewhere.remote(name):
            return PlayableModel(name=name, speaks=speaks(None, remote=True), versions=[], version="", tools=True, structured_output=True)
        found, info = self.repository.find(name, version), self.repository.engine_info(name, version)
        described = PlayableModel(
            name=name,
            speaks=speaks(info),
            versions=self.repository.versions(name),
            version=found.version,
            platform=found.platform or found.spec.backend,
            max_model_len=0 if info is None else info.max_model_len,
            picture=None if info is None else info.image,
            inputs=[_tensor(tensor) for tensor in found.spec.inputs] if info is None else [],
            outputs=[_tensor(tensor) for tensor in found.spec.outputs] if info is None else [],
            example=_example(found),
            tools=info is not None and info.tools,
            structured_output=info is not None and info.structured_output,
        )
        return described


def data_url(settings: Settings, port: int, host: str) -> str:
    """Where programs reach the data port. `host`: what whoever asks has for this machine, which counts where the port listens on every address."""
    if settings.artifacts.public_url:
        return settings.artifacts.public_url.rstrip("/")
    known = settings.listen.host
    if known in EVERYWHERE:
        known = urlsplit(f"//{host}").hostname or "127.0.0.1"
    scheme = "https" if settings.tls.certificate else "http"
    return f"{scheme}://{f'[{known}]' if ':' in known else known}:{port}"


def speaks(info: EngineInfo | None, *, remote: bool = False) -> list[Speaks]:
    """`info`: None for a model of tensors; and for one of another server, which says nothing of itself."""
    if remote:
        return ["chat", "completions", "embeddings"]
    if info is None:
        return ["tensors"]
    found: list[Speaks] = []
    if "generate" in info.tasks:
        found += ["chat", "completions"] if info.has_chat_template else ["completions"]
    if "embed" in info.tasks:
        found.append("embeddings")
    if info.image is not None:
        found.append("pictures")
    return found


def _tensor(spec: TensorSpec) -> PlayableTensor:
    return PlayableTensor(spec.name, spec.datatype, spec.shape, spec.optional, spec.labels)


def _example(version: Version) -> list[ExampleTensor] | None:
    """None where there is none, or none that a page can show."""
    if not isinstance(version, ModelVersion):
        return None
    samples = samples_of(version.spec, version.example)
    if not samples or any(array.size > MAX_EXAMPLE_VALUES for array in samples[0].values()):
        return None
    try:
        return _shown(samples[0])
    except InvalidRequest:  # bytes, or half precision: no JSON
        return None


def _shown(sample: Tensors) -> list[ExampleTensor]:
    """Raises InvalidRequest."""
    found = []
    for name, array in sample.items():
        datatype = datatype_of(array)
        found.append(ExampleTensor(name, datatype, array.shape, to_json(array, name, datatype)))
    return found


def _get(path: str, name: str, summary: str, serve: Serve, answer: Any, *errors: int) -> Operation:
    """As of the administration, for whoever may ask a model."""
    return structs.replace(operation("GET", path, name, summary, serve, answer, None, *errors), scope=Scope.INFER, tag="models")
