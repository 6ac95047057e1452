"""The JSON bodies of REST as types: decoded by them, described by them in the OpenAPI document.

The body that `infer` takes is the codec's RequestJson.
"""

from typing import Any, NotRequired, TypedDict

from msgspec import Struct, field


class Live(TypedDict):
    live: bool


class Ready(TypedDict):
    ready: bool


class Health(TypedDict):
    live: bool
    ready: bool


class ModelReady(TypedDict):
    name: str
    ready: bool


class Statistics(TypedDict):
    model_stats: list[dict[str, Any]]


class IndexRow(TypedDict):
    name: str
    version: NotRequired[str]
    state: NotRequired[str]
    reason: NotRequired[str]


class IndexRequest(Struct, forbid_unknown_fields=True):
    ready: bool = False
    """Only the models that are ready."""


class LoadRequest(Struct, forbid_unknown_fields=True):
    parameters: dict[str, str] = field(default_factory=dict)
    """`config`: the model's configuration as JSON; `file:VERSION/NAME`: a file's content in base64."""


class UnloadParameters(Struct, forbid_unknown_fields=True):
    unload_dependents: bool = False
    """Of no consequence: no model depends on another here."""


class UnloadRequest(Struct, forbid_unknown_fields=True):
    parameters: UnloadParameters = field(default_factory=UnloadParameters)


class InferOutput(TypedDict):
    name: str
    datatype: str
    shape: list[int]
    parameters: NotRequired[dict[str, int]]
    """`binary_data_size` in place of `data` where the output follows in binary form."""
    data: NotRequired[list[Any]]


class InferResponse(TypedDict):
    id: NotRequired[str]
    model_name: str
    model_version: str
    parameters: NotRequired[dict[str, Any]]
    outputs: list[InferOutput]


class Nothing(TypedDict):
    pass
