"""The OpenAPI 3.1 document, made from the table of operations and the types of their bodies."""

import math
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, TypedDict

import msgspec
from msgspec import Struct

from fairlead import __version__
from fairlead.api.web import Serve
from fairlead.core.policy import Scope
from fairlead.core.specs import ModelSpec, TensorSpec

JSON = "application/json"
BINARY = "application/octet-stream"
EVENTS = "text/event-stream"
FORM = "multipart/form-data"
HEADER_LENGTH = "Inference-Header-Content-Length"

MAX_EXAMPLE_ELEMENTS = 1024
ZEROS: dict[str, Any] = {
    "BOOL": False,
    "BYTES": "",
    "FP32": 0.0,
    "FP64": 0.0,
    **{f"{sign}INT{bits}": 0 for sign in ("", "U") for bits in (8, 16, 32, 64)},
}
"""By datatype; those that have no JSON form are not here."""

TAGS = {
    "health": "Whether the server and its models answer.",
    "models": "What a model is, and what it did.",
    "inference": "Ask a model.",
    "repository": "Load and unload models.",
    "openai": "The OpenAI API: language models and embedders.",
    "anthropic": "Anthropic's Messages API: language models.",
    "images": "Pictures, in the shapes of other services: jobs beneath.",
    "jobs": "Requests that are answered later, their files, and the calls that tell of them.",
    "admin": "Tenants, keys, usage, audit, configuration, models, versions, rollouts.",
    "not offered": "Parts of Triton's protocol that this server answers with 501.",
    "document": "This document.",
}

PARAMETERS: dict[str, dict[str, Any]] = {
    "model": {"description": "The model's name.", "schema": {"type": "string", "minLength": 1}},
    "version": {"description": "One version instead of the default one.", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
    "repository": {"description": "A repository's name.", "schema": {"type": "string", "minLength": 1}},
    "region": {"description": "A shared-memory region's name.", "schema": {"type": "string", "minLength": 1}},
    "tenant": {"description": "The tenant's name.", "schema": {"type": "string", "minLength": 1}},
    "project": {"description": "The project's name.", "schema": {"type": "string", "minLength": 1}},
    "key": {"description": "The key's id, which is public.", "schema": {"type": "string", "minLength": 1}},
    "ref": {"description": "A version's number, or an alias.", "schema": {"type": "string", "minLength": 1}},
    "rollout": {"description": "Its id, or a model's name for the latest one.", "schema": {"type": "string", "minLength": 1}},
    "request": {
        "description": "The request's id (`x-request-id`), its trace id, or the id of a job.",
        "schema": {"type": "string", "minLength": 1},
    },
    "incident": {"description": "Its id.", "schema": {"type": "string", "minLength": 1}},
    "file": {"description": "The file's id.", "schema": {"type": "string", "minLength": 1}},
    "batch": {"description": "The batch's id.", "schema": {"type": "string", "minLength": 1}},
    "response": {"description": "The response's id.", "schema": {"type": "string", "minLength": 1}},
    "alias": {"description": "The alias's name.", "schema": {"type": "string", "minLength": 1}},
    "prediction": {"description": "The job's id.", "schema": {"type": "string", "minLength": 1}},
    "owner": {"description": "Always `fairlead`.", "schema": {"type": "string", "minLength": 1}},
    "version_id": {"description": "`NAME@VERSION`.", "schema": {"type": "string", "minLength": 1}},
    "delivery": {
        "description": "The delivery's id, which its receiver knows as `webhook-id`.",
        "schema": {"type": "string", "minLength": 1},
    },
    "signature": {"description": "Of a signed link.", "schema": {"type": "string"}},
    "expires": {"description": "Of a signed link: until when it is good, in seconds since 1970.", "schema": {"type": "integer"}},
    "name": {"description": "The file's name, as the job's result has it.", "schema": {"type": "string", "minLength": 1}},
    "job": {"description": "The job's id.", "schema": {"type": "string", "minLength": 1}},
    "id": {"description": "The job's id.", "schema": {"type": "string", "minLength": 1}},
}

OPTIONAL: dict[str, dict[str, Any]] = {
    "status": {"in": "query", "description": "Only jobs of these statuses, with commas between.", "schema": {"type": "string"}},
    "of_model": {"in": "query", "name": "model", "description": "Only jobs of this model.", "schema": {"type": "string"}},
    "before": {"in": "query", "description": "Only jobs that are older than this one: `next` of a page.", "schema": {"type": "string"}},
    "cursor": {"in": "query", "description": "As `next` of a page has it.", "schema": {"type": "string"}},
    "limit": {"in": "query", "description": "Of a page.", "schema": {"type": "integer", "minimum": 1}},
    "stream": {"in": "query", "description": "Its events in place of the object.", "schema": {"type": "boolean"}},
    "purpose": {"in": "query", "description": "Only files of this purpose.", "schema": {"type": "string"}},
    "starting_after": {"in": "query", "description": "Only events after this number.", "schema": {"type": "integer", "minimum": 0}},
    "after": {"in": "query", "description": "Only items that follow this one.", "schema": {"type": "string"}},
    "order": {"in": "query", "description": "desc: the newest first.", "schema": {"type": "string", "enum": ["asc", "desc"]}},
    "Prefer": {
        "in": "header",
        "description": "`wait=SECONDS`: answer when the job has ended, or after so long.",
        "schema": {"type": "string"},
    },
    "Idempotency-Key": {
        "in": "header",
        "description": "The same key with the same request gives the same job again.",
        "schema": {"type": "string", "maxLength": 255},
    },
}
"""Parameters that may be there."""

EVENT: dict[str, Any] = {
    "description": "One server-sent event.",
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {"type": "string", "contentMediaType": JSON, "description": 'One answer; or, as the last event, {"error": ...}.'},
    },
}


class Error(TypedDict):
    error: str
    """What went wrong, for a person to read."""


class Operation(Struct, frozen=True, kw_only=True):
    """A row of the table that makes both the app's routes and the document."""

    name: str
    method: str
    path: str
    tag: str
    summary: str
    serve: Serve
    answer: Any = None
    """The type of the JSON body where all went well; None for one that has no answer but errors."""
    body: Any = None
    """The type of the JSON body that it takes; None: none."""
    body_required: bool = False
    example: Any = None
    binary: bool = False
    """Whether the binary tensor extension may be used."""
    media: tuple[str, ...] = ()
    """Content types of a 200 that is a file."""
    query: tuple[str, ...] = ()
    """Parameters that the query must have, of PARAMETERS."""
    optional: tuple[str, ...] = ()
    """Parameters that it may have, of OPTIONAL."""
    ok: tuple[int, ...] = (200,)
    """Statuses of an answer that is none of `errors`."""
    form: bool = False
    """Whether the body is multipart/form-data in place of JSON."""
    uploads: tuple[str, ...] = ()
    """Content types of a file that may be the body in place of it."""
    scope: Scope | None = Scope.INFER
    """What the caller's key must be for; None: anyone may ask, without one too."""
    events: str = ""
    """`also`: server-sent events where the Accept header asks for them; `only`: always."""
    errors: tuple[int, ...] = ()
    error: Any = Error
    """The type of the JSON body of its errors."""

    @property
    def address(self) -> str:
        """The path as documents write it: whether a parameter may hold slashes is the router's business."""
        return self.path.replace(":path}", "}")

    @property
    def statuses(self) -> tuple[int, ...]:
        """Of all its errors: those of who may ask too."""
        more = () if self.scope is None else (400, 401, 403, 404, 503)
        return tuple(sorted({*self.errors, *more}))


def document(operations: Iterable[Operation], examples: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`examples`: bodies that work, by operation and model."""
    operations = tuple(operations)
    types = [type_ for operation in operations for type_ in (operation.answer, operation.body, operation.error) if type_ is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = {repr(type_): schema for type_, schema in zip(types, schemas, strict=True)}
    tags = {operation.tag for operation in operations}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.address, {})[operation.method.lower()] = _operation(
            operation, schema_of, examples.get(operation.name, {})
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fairlead",
            "version": __version__,
            "summary": "KServe v2 (Open Inference Protocol) with Triton's extensions, the OpenAI API, jobs and pictures.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": description} for name, description in TAGS.items() if name in tags],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {
                _response_name(status, error): {
                    "description": _phrase(status),
                    "content": {getattr(error, "content_type", JSON): {"schema": schema_of[repr(error)]}},
                }
                for operation in operations
                for status, error in ((status, operation.error) for status in operation.statuses)
            },
        },
    }


def examples_of(specs: Iterable[ModelSpec]) -> dict[str, dict[str, Any]]:
    """For each operation that asks a model: by model, a body of zeros and empty strings that it answers."""
    found: dict[str, dict[str, Any]] = {}
    for spec in specs:
        inputs = [tensor for tensor in spec.inputs if not tensor.optional]
        values = {tensor.name: [ZEROS.get(tensor.datatype)] * math.prod(_smallest(tensor)) for tensor in inputs}
        if not inputs or any(not zeros or None in zeros or len(zeros) > MAX_EXAMPLE_ELEMENTS for zeros in values.values()):
            continue
        tensors = [{"name": t.name, "datatype": t.datatype, "shape": _smallest(t), "data": values[t.name]} for t in inputs]
        flat = {name: zeros[0] if len(zeros) == 1 else zeros for name, zeros in values.items()}
        for place in ("model", "modelVersion"):
            found.setdefault(f"{place}Infer", {})[spec.name] = {"inputs": tensors}
            found.setdefault(f"{place}GenerateStream", {})[spec.name] = flat
            if not spec.streams:
                found.setdefault(f"{place}Generate", {})[spec.name] = flat
    return found


def _smallest(tensor: TensorSpec) -> list[int]:
    return [1 if dim == -1 else dim for dim in tensor.shape]


def _phrase(status: int) -> str:
    return "Overloaded" if status == 529 else HTTPStatus(status).phrase


def _response_name(status: int, error: Any) -> str:
    phrase = _phrase(status).title().replace(" ", "")
    return f"{error.__name__}{phrase}"


def _operation(operation: Operation, schema_of: dict[str, Any], examples: dict[str, Any]) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": place, "required": True, **PARAMETERS[name]}
        for place, names in (("path", re.findall(r"{(\w+)}", operation.address)), ("query", operation.query))
        for name in names
    ]
    parameters += [{"name": name, "required": False, **OPTIONAL[name]} for name in operation.optional]
    if operation.binary:
        parameters.append(
            {
                "name": HEADER_LENGTH,
                "in": "header",
                "description": "Bytes of the JSON at the head of a binary body; the tensors follow. 0: the whole body is the one input. Absent: JSON only.",
                "schema": {"type": "integer", "minimum": 0},
            }
        )
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {
            **(
                {str(status): _answer(operation, schema_of, status) for status in operation.ok}
                if operation.answer is not None or operation.events or operation.media
                else {}
            ),
            **{str(status): {"$ref": f"#/components/responses/{_response_name(status, operation.error)}"} for status in operation.statuses},
        },
    }
    if operation.body is not None:
        described["requestBody"] = _request_body(operation, schema_of, examples)
    return described


def _request_body(operation: Operation, schema_of: dict[str, Any], examples: dict[str, Any]) -> dict[str, Any]:
    media: dict[str, Any] = {"schema": schema_of[repr(operation.body)]}
    if examples:
        media["examples"] = {model: {"summary": f"For the model {model}", "value": example} for model, example in examples.items()}
    elif operation.example is not None:
        media["example"] = operation.example
    content = {FORM if operation.form else JSON: media}
    if operation.binary:
        content[BINARY] = {
            "schema": {
                "description": f"JSON of {HEADER_LENGTH} bytes, then the tensors, little-endian and row-major, in the order of the inputs."
            }
        }
    content |= {media: {} for media in operation.uploads}
    return {"required": operation.body_required, "content": content}


def _answer(operation: Operation, schema_of: dict[str, Any], status: int) -> dict[str, Any]:
    content: dict[str, Any] = {}
    described: dict[str, Any] = {"description": _phrase(status)}
    if operation.media:
        content = {media: {} for media in operation.media}
    elif operation.events != "only":
        content[JSON] = {"schema": schema_of[repr(operation.answer)]}
    if operation.binary:
        content[BINARY] = {"schema": {"description": "JSON, then the tensors in the order of the outputs."}}
        described["headers"] = {
            HEADER_LENGTH: {"description": "Bytes of the JSON at the head of a binary body.", "schema": {"type": "integer", "minimum": 0}}
        }
    if operation.events:
        content[EVENTS] = {"schema": EVENT}
    return {**described, "content": content}
