"""Bodies and queries of the administration's operations: what is taken in is checked here, once."""

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, TypedDict, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field
from starlette.requests import Request

from fairlead.core.errors import InvalidRequest
from fairlead.core.policy import DEFAULT_TENANT, Limits, Scope, TenantPolicy, rules_of
from fairlead.store.rows import ConfigRow, Dimension, KeyRow, ProjectRow, TenantRow
from fairlead.store.store import said

T = TypeVar("T")

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@:+-]*$(?!\n)", max_length=128)]
Label = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)", max_length=200)]
Pattern = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)", max_length=200)]
MAX_PAGE = 10_000


class BadField(InvalidRequest):
    """`field` says which, as a path: `policy.limits`."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class FieldError(Struct, frozen=True):
    field: str
    detail: str


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """RFC 9457."""

    content_type: ClassVar[str] = "application/problem+json"

    title: str
    status: int
    detail: str
    errors: tuple[FieldError, ...] = ()
    """Which fields are wrong."""


# Tenants


class NewTenant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    policy: TenantPolicy | None = None
    disabled: bool = False


class TenantChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A merge patch (RFC 7396): what is not named stays, null takes away."""

    policy: dict[str, Any] | UnsetType | None = UNSET
    disabled: bool | UnsetType = UNSET


class Tenant(Struct, frozen=True, kw_only=True):
    name: str
    policy: dict[str, Any] | None
    """What its policy says; null: what fairlead.yaml says of it, or of `default`."""
    created: datetime
    disabled: bool


class Tenants(TypedDict):
    tenants: list[Tenant]


class NewProject(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    limits: Limits = {}


class Project(Struct, frozen=True, kw_only=True):
    tenant: str
    name: str
    limits: Limits
    created: datetime


class Projects(TypedDict):
    projects: list[Project]


# Keys


class NewKeyBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tenant: Name = "default"
    project: Name = "default"
    name: Label = ""
    """For people to know it by."""
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] = (Scope.INFER,)
    models: Annotated[tuple[Pattern, ...], Meta(min_length=1)] | None = None
    """Patterns; null: all that the tenant may use."""
    qos_class: Label | None = field(default=None, name="class")
    limits: Limits = {}
    expires: Annotated[datetime, Meta(tz=True)] | None = None
    public_key: str | None = None
    """Ed25519, in PEM."""


class Rotation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    overlap_seconds: Annotated[float, Meta(ge=0, le=366 * 86400)] = 3600.0
    """How long the old key works beside the new one."""


class Revocation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    force: bool = False
    """Even the last key with the admin scope."""


class Key(Struct, frozen=True, kw_only=True):
    id: str
    tenant: str
    project: str
    name: str
    prefix: str
    state: str
    """live, expired, revoked."""
    scopes: tuple[Scope, ...]
    models: tuple[str, ...] | None
    qos_class: str | None = field(name="class")
    limits: Limits
    public_key: str | None
    created: datetime
    created_by: str
    expires: datetime | None
    revoked: datetime | None
    replaces: str | None


class Keys(TypedDict):
    keys: list[Key]


class SecretKey(Struct, frozen=True, kw_only=True):
    key: Key
    secret: str
    """Shown this once."""


# Usage, audit, configuration


class Ranged(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a query: dates (`2026-10-01`: its midnight) or times of RFC 3339; UTC where no offset is given."""

    since: str = field(default="", name="from")
    until: str = field(default="", name="to")


class OfWhom(Ranged, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tenant: str | None = None
    project: str | None = None
    key: str | None = None
    model: str | None = None
    outcome: str | None = None
    format: str = ""
    """`csv` or `json`, whatever the Accept header says."""


class SumsQuery(OfWhom, frozen=True, kw_only=True, forbid_unknown_fields=True):
    by: str = ""
    """With commas: tenant, project, key, model, outcome, day, hour."""


Limit = Annotated[int, Meta(ge=1, le=MAX_PAGE)]


class RecordsQuery(OfWhom, frozen=True, kw_only=True, forbid_unknown_fields=True):
    limit: Limit = 100
    cursor: str = ""


class EntriesQuery(Ranged, frozen=True, kw_only=True, forbid_unknown_fields=True):
    actor: str | None = None
    action: str | None = None
    subject: str | None = None
    limit: Limit = 100
    cursor: str = ""


class KeysQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tenant: str | None = None
    project: str | None = None
    state: str | None = None


class Forced(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    force: bool = False


class Before(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    before: str


class NoQuery(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Sums(TypedDict):
    groups: list[dict[str, Any]]


class Records(TypedDict):
    records: list[dict[str, Any]]
    next: str | None
    """The cursor of the next page."""


class Entries(TypedDict):
    entries: list[dict[str, Any]]
    next: str | None


class Deleted(TypedDict):
    deleted: int


class ConfigVersion(Struct, frozen=True, kw_only=True):
    version: int
    time: datetime
    actor: str
    active: bool


class ActionInForce(TypedDict):
    tenant: str
    action: str
    score: float
    reasons: dict[str, float]
    since: datetime
    until: datetime


class Actions(TypedDict):
    actions: list[ActionInForce]


class Config(TypedDict):
    version: int
    text: str
    versions: list[ConfigVersion]


class Version(TypedDict):
    version: int


# Taking in


def decoded(body: bytes, type_: type[T]) -> T:
    """Raises BadField. An empty body is an empty object."""
    try:
        value = msgspec.json.decode(body or b"{}", type=type_)
        if b"\\u0000" in body:
            storable("", msgspec.json.decode(body))
    except msgspec.ValidationError as error:
        raise bad_field(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    return value


def storable(field: str, value: Any) -> None:
    """Raises BadField for a text that PostgreSQL can neither keep nor be asked for."""
    match value:
        case str() if "\0" in value:
            raise BadField("has a NUL character in it", field)
        case dict():
            for name, each in value.items():
                storable(field, name)
                storable(f"{field}.{name}".lstrip("."), each)
        case list():
            for each in value:
                storable(field, each)


def query_of(request: Request, type_: type[T]) -> T:
    """Raises BadField."""
    pairs = request.query_params.multi_items()
    for name in {name for name, _ in pairs}:
        if sum(name == other for other, _ in pairs) > 1:
            raise BadField("is given twice", name)
    try:
        return msgspec.convert(dict(pairs), type_, strict=False)
    except msgspec.ValidationError as error:
        raise bad_field(error) from None


def bad_field(error: msgspec.ValidationError, prefix: str = "") -> BadField:
    """What msgspec says of a place such as `$.policy.limits`."""
    message, _, place = str(error).partition(" - at ")
    named = [part for part in (prefix, place.strip("`").removeprefix("$").removeprefix(".")) if part]
    for kind in ("unknown field", "required field"):
        if kind in message and message.endswith("`"):
            named.append(message.split("`")[1])
            message = "is not known" if kind == "unknown field" else "is missing"
    return BadField(message, ".".join(named))


def moment(text: str, field: str) -> float:
    """Raises BadField."""
    try:
        parsed = datetime.fromisoformat(text)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadField(f"{text!r} is no date such as 2026-10-01, nor a time such as 2026-10-01T12:00:00Z", field) from None


def span(query: Ranged) -> tuple[float, float | None]:
    """Raises BadField."""
    since = moment(query.since, "from") if query.since else 0.0
    until = moment(query.until, "to") if query.until else None
    if until is not None and until <= since:
        raise BadField("is not after `from`", "to")
    return since, until


def dimensions(by: str) -> tuple[Dimension, ...]:
    """Raises BadField."""
    found = tuple(name.strip() for name in by.split(",")) if by else ()
    for name in found:
        if name not in set(Dimension):
            raise BadField(f"{name!r} is none of {', '.join(Dimension)}", "by")
    return tuple(dict.fromkeys(map(Dimension, found)))


def merged(document: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(document) if isinstance(document, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def policy_of(document: dict[str, Any]) -> TenantPolicy:
    """Raises BadField."""
    try:
        return msgspec.convert(document, TenantPolicy)
    except msgspec.ValidationError as error:
        raise bad_field(error, "policy") from None


def check_limits(limits: Limits) -> None:
    """Raises BadField."""
    try:
        rules_of(limits)
    except ValueError as error:
        raise BadField(str(error), "limits") from None


def check_public_key(pem: str) -> None:
    """Raises BadField for what is no Ed25519 public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if "PRIVATE KEY" in pem:
        raise BadField("is a private key: keep it to yourself, and give its public one (openssl pkey -in KEY.pem -pubout)", "public_key")
    try:
        good = isinstance(load_pem_public_key(pem.encode()), Ed25519PublicKey)
    except Exception:
        good = False
    if not good:
        raise BadField("is no Ed25519 public key in PEM", "public_key")


# Giving out


def when(time: float) -> datetime:
    return datetime.fromtimestamp(time, UTC)


def tenant_of(row: TenantRow) -> Tenant:
    policy = None if row.policy is None else said(row.policy, DEFAULT_TENANT)
    return Tenant(name=row.name, policy=policy, created=when(row.created), disabled=row.disabled)


def project_of(row: ProjectRow) -> Project:
    return Project(tenant=row.tenant, name=row.name, limits=row.limits, created=when(row.created))


def key_of(row: KeyRow, now: float) -> Key:
    return Key(
        id=row.id,
        tenant=row.tenant,
        project=row.project,
        name=row.name,
        prefix=row.prefix,
        state="revoked" if row.revoked is not None else "live" if row.live(now) else "expired",
        scopes=row.scopes,
        models=row.models,
        qos_class=row.qos_class,
        limits=row.limits,
        public_key=row.public_key,
        created=when(row.created),
        created_by=row.created_by,
        expires=None if row.expires is None else when(row.expires),
        revoked=None if row.revoked is None else when(row.revoked),
        replaces=row.replaces,
    )


def config_version(row: ConfigRow) -> ConfigVersion:
    return ConfigVersion(version=row.version, time=when(row.time), actor=row.actor, active=row.active)
