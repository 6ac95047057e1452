"""What the registry's operations take in and give out."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from fairlead.api.admin_bodies import Limit, when
from fairlead.control.registry import Draft, Label, Registry, Tags
from fairlead.core.versions import Stage
from fairlead.store.registry_rows import AliasRow, GateRow, ModelRow, VersionRow

Description = Annotated[str, Meta(max_length=10_000)]
TagChanges = dict[Annotated[str, Meta(min_length=1, max_length=128)], Label | None]


class NewModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    description: Description = ""
    tags: Tags = {}


class ModelChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is not named stays; a tag that is null is taken away."""

    description: Description | UnsetType = UNSET
    tags: TagChanges = {}


class NewVersion(Draft, frozen=True, kw_only=True, forbid_unknown_fields=True):
    uri: Annotated[str, Meta(min_length=1)]
    """Path or fsspec URL, read by the server."""


class VersionChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is not named stays; a tag that is null is taken away."""

    tags: TagChanges = {}
    metrics: dict[str, float] = {}


class Retirement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: Label = ""


class VersionSignature(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    signature: str
    """Ed25519, in base64."""
    public_key: str
    """In PEM."""


class AliasTarget(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1)]


class UploadQuery(Struct, frozen=True, forbid_unknown_fields=True):
    about: str = "{}"
    """What is said of an uploaded version: as the JSON body of one that the server reads, without its `uri`."""


class VersionsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    stage: Stage | None = None


class DiffQuery(Struct, frozen=True, forbid_unknown_fields=True, rename={"old": "from", "new": "to"}):
    old: str
    """A version's number, or an alias."""
    new: str


class EventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    limit: Limit = 100
    cursor: str = ""


class LoadedVersion(TypedDict):
    version: str
    state: str
    reason: str


class Model(Struct, frozen=True, kw_only=True):
    name: str
    registered: bool
    """false: it is in a model repository of the server alone."""
    description: str = ""
    tags: dict[str, str] = {}
    created: datetime | None = None
    versions: int = 0
    """How many there are."""
    newest: int | None = None
    aliases: dict[str, int] = {}
    loaded: list[LoadedVersion] | None = None
    """By this server; null where none runs."""


class Models(TypedDict):
    models: list[Model]


class ModelVersion(Struct, frozen=True, kw_only=True):
    model: str
    version: int
    stage: Stage
    reason: str
    """Why it is in this stage."""
    digest: str
    bytes: int
    backend: str
    aliases: list[str]
    tags: dict[str, str]
    provenance: dict[str, Any]
    location: str
    signed_by: str
    trusted: bool
    """One of `control.registry.trusted_keys` signed it."""
    created: datetime
    moved: datetime
    """When it came to its stage."""


class File(TypedDict):
    path: str
    bytes: int
    sha256: str


class Gate(TypedDict):
    run: str
    gate: str
    outcome: str
    seconds: float
    details: dict[str, Any]
    time: datetime


class WholeVersion(ModelVersion, frozen=True, kw_only=True):
    spec: str
    files: list[File]
    schema: dict[str, Any]
    """Inputs and outputs as the gates found them."""
    gates: list[Gate]
    """Of the latest run."""


class ModelVersions(TypedDict):
    versions: list[ModelVersion]


class Added(TypedDict):
    new: bool
    """false: the same content was there already, and nothing of it was changed."""
    version: ModelVersion


def model_of(row: ModelRow, numbers: list[int], aliases: Mapping[str, int], loaded: list[LoadedVersion] | None) -> Model:
    return Model(
        name=row.name,
        registered=True,
        description=row.description,
        tags=row.tags,
        created=when(row.created),
        versions=len(numbers),
        newest=max(numbers, default=None),
        aliases=dict(aliases),
        loaded=loaded,
    )


def version_of(row: VersionRow, aliases: tuple[AliasRow, ...], registry: Registry) -> ModelVersion:
    return ModelVersion(**_fields(row, aliases, registry))


def whole_version(row: VersionRow, aliases: tuple[AliasRow, ...], gates: tuple[GateRow, ...], registry: Registry) -> WholeVersion:
    return WholeVersion(
        **_fields(row, aliases, registry),
        spec=row.spec,
        files=[File(path=path, bytes=size, sha256=sha256) for path, (size, sha256) in sorted(row.files.items())],
        schema=row.signature,
        gates=[
            Gate(run=each.run, gate=each.gate, outcome=each.outcome, seconds=each.seconds, details=each.details, time=when(each.time))
            for each in gates
        ],
    )


def _fields(row: VersionRow, aliases: tuple[AliasRow, ...], registry: Registry) -> dict[str, Any]:
    return {
        "model": row.model,
        "version": row.number,
        "stage": row.stage,
        "reason": row.reason,
        "digest": row.digest,
        "bytes": row.bytes,
        "backend": row.backend,
        "aliases": [each.alias for each in aliases if each.model == row.model and each.number == row.number],
        "tags": row.tags,
        "provenance": row.provenance,
        "location": registry.location(row),
        "signed_by": row.signed_by,
        "trusted": registry.signed_by(row) is not None,
        "created": when(row.created),
        "moved": when(row.moved),
    }


def draft_of(body: NewVersion) -> Draft:
    return msgspec.convert({name: getattr(body, name) for name in Draft.__struct_fields__}, Draft)
