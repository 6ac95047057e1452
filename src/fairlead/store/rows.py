"""What the store keeps, one frozen Struct for a row of each table. Times are seconds since 1970 (UTC)."""

from enum import StrEnum
from typing import Any

from msgspec import Struct

from fairlead.core.policy import Limits, Scope, TenantPolicy


class TenantRow(Struct, frozen=True, kw_only=True):
    name: str
    policy: TenantPolicy | None = None
    """None: what fairlead.yaml says of it, or of `default`."""
    created: float
    disabled: bool = False
    """All of its keys are refused."""


class ProjectRow(Struct, frozen=True, kw_only=True):
    """A part of a tenant with limits of its own. `default` needs no row."""

    tenant: str
    name: str
    limits: Limits = {}
    created: float


class KeyRow(Struct, frozen=True, kw_only=True):
    id: str
    tenant: str
    project: str = "default"
    name: str = ""
    digest: str
    """SHA-256 of the secret, in hex."""
    signing_key: str
    """In hex: derived from the secret, for the HMAC of signed requests."""
    public_key: str | None = None
    """Ed25519, in PEM: verifies signed requests of those who keep their private key to themselves."""
    prefix: str
    """How the secret begins, shown in lists."""
    scopes: tuple[Scope, ...] = (Scope.INFER,)
    models: tuple[str, ...] | None = None
    """Patterns of the models that it may use; None: all that its tenant may."""
    qos_class: str | None = None
    """None: its tenant's."""
    limits: Limits = {}
    created: float
    created_by: str = ""
    expires: float | None = None
    revoked: float | None = None
    replaces: str | None = None
    """The id of the key that it was rotated from."""

    def live(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


class UsageRow(Struct, frozen=True, kw_only=True, gc=False):
    """One request; of several prompts in one, each."""

    time: float
    """When it ended."""
    request_id: str = ""
    tenant: str
    project: str = "default"
    key: str = ""
    model: str
    version: str = ""
    qos_class: str = ""
    kind: str = ""
    """What was asked: infer, generate, embed, ...: the same words wherever it is computed."""
    outcome: str
    """success, failure, cancelled, refused."""
    status: int = 200
    """As the protocol's door told it, in HTTP's numbers."""
    reason: str = ""
    """Why it was refused or failed, in one word."""
    requests: int = 1
    """As limits count them: of the prompts that came in one request, the first is one and the others are none."""
    input_tokens: int = 0
    cached_tokens: int = 0
    """Of the input, found in the prefix cache."""
    output_tokens: int = 0
    rows: int = 0
    megapixels: float = 0.0
    compute_seconds: float = 0.0
    seconds: float = 0.0
    """From arrival to the end of the answer."""
    cost: float = 0.0
    cached: bool = False
    """Answered from the response cache."""
    address: str = ""
    id: int = 0
    """Given by the store."""


class AuditRow(Struct, frozen=True, kw_only=True):
    """Somebody did something to somebody. Never changed, never deleted."""

    time: float
    actor: str
    """A key's id, `cli`, `gateway`, ..."""
    action: str
    """What: `key.create`, `tenant.update`, `abuse.throttle`, ..."""
    subject: str
    """To what: a key's id, a tenant's name, ..."""
    details: dict[str, Any] = {}
    address: str = ""
    id: int = 0
    """Given by the store."""


class ConfigRow(Struct, frozen=True, kw_only=True):
    """One version of the policies that the server runs with."""

    version: int
    time: float
    actor: str
    text: str
    active: bool


class Dimension(StrEnum):
    """What usage can be added up by."""

    TENANT = "tenant"
    PROJECT = "project"
    KEY = "key"
    MODEL = "model"
    OUTCOME = "outcome"
    DAY = "day"
    HOUR = "hour"


class UsageQuery(Struct, frozen=True, kw_only=True):
    """Which requests: `since` <= time < `until`, and those of one tenant, project, key, model, outcome."""

    since: float = 0.0
    until: float | None = None
    tenant: str | None = None
    project: str | None = None
    key: str | None = None
    model: str | None = None
    outcome: str | None = None


class AuditQuery(Struct, frozen=True, kw_only=True):
    """Which entries: `since` <= time < `until`, by whom, what, to what; or to a model and any of its versions."""

    since: float = 0.0
    until: float | None = None
    actor: str | None = None
    action: str | None = None
    subject: str | None = None
    model: str | None = None


class UsageSum(Struct, frozen=True, kw_only=True):
    """What the requests of one group used together."""

    group: tuple[str, ...]
    """In the order of the query's `by`; days are `2026-01-31`, hours `2026-01-31T23:00Z`."""
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    rows: int
    megapixels: float
    compute_seconds: float
    seconds: float
    cost: float
    cached: int
    """Requests answered from the response cache."""
