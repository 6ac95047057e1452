"""What the store keeps of jobs, one frozen Struct for a row of each table. Times are seconds since 1970 (UTC)."""

from enum import StrEnum
from typing import Any

from msgspec import Struct

from fairlead.core.jobs import JobReason, JobResult, JobStatus


class JobRow(Struct, frozen=True, kw_only=True):
    """One job, all but its input."""

    id: str
    """Sortable: the newest is the greatest."""
    tenant: str
    project: str = "default"
    key: str = ""
    """The id of the key that it was submitted with."""
    qos_class: str = ""
    priority: int = 0
    """The highest goes first."""
    model: str
    version: str = ""
    kind: str = ""
    """What is asked, in usage's words."""
    face: str = ""
    """The protocol that it was submitted by."""
    status: JobStatus = JobStatus.QUEUED
    reason: JobReason = ""
    message: str = ""
    """Why it failed, or waits again, in words that its caller may read."""
    created: float
    not_before: float = 0.0
    """Nobody leases it earlier."""
    started: float | None = None
    """When its first try began."""
    ended: float | None = None
    start_deadline: float
    total_deadline: float
    tries: int = 0
    """Begun, the present one too."""
    max_tries: int = 1
    runner: str = ""
    """Whose it is while it is active or aborting."""
    lease_until: float = 0.0
    step: int = 0
    num_steps: int = 0
    preview: bytes = b""
    """A picture of how far it is, while it runs."""
    cost: float = 0.0
    metadata: dict[str, Any] = {}
    """What its caller, or its face, wants to find again."""
    webhook: str = ""
    """URL that is called; "": none."""
    webhook_events: tuple[str, ...] = ()
    """Statuses that it is called for; (): the three that end a job."""
    webhook_secret: str = ""
    """Signs the calls; "": the tenant's own secrets do."""
    result: JobResult | None = None
    retention_seconds: float
    """How long it is kept once it has ended."""
    expires: float | None = None
    """When it may be removed; None while it has not ended."""
    revision: int = 0
    """Grows with every change of the row."""
    address: str = ""
    request_id: str = ""


class JobQuery(Struct, frozen=True, kw_only=True):
    """Which jobs: of one tenant, in one of some statuses, of one model, of one kind, older than the one with the id `before`."""

    tenant: str | None = None
    statuses: tuple[JobStatus, ...] = ()
    """(): any."""
    model: str | None = None
    kind: str | None = None
    before: str | None = None
    limit: int = 100
    whole: bool = False
    """With previews and results, which may be large; else those fields are empty."""


class Backlog(Struct, frozen=True, kw_only=True):
    """What there is still to do."""

    jobs: dict[tuple[str, str], tuple[int, float]] = {}
    """(model, status) → (how many, when the oldest was submitted)."""
    num_calls: int = 0
    """Of webhooks."""


class DeliveryState(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class DeliveryRow(Struct, frozen=True, kw_only=True):
    """One webhook call that is to be made, or was."""

    id: str
    """What the receiver knows it by, at each try."""
    job: str
    tenant: str
    url: str
    event: str
    """The status that the job came to."""
    face: str = ""
    body: str | None = None
    """None: not written yet."""
    secret: str = ""
    """"": the tenant's own."""
    created: float
    next_at: float
    runner: str = ""
    """Who makes the present try."""
    lease_until: float = 0.0
    tries: int = 0
    """Begun, the present one too."""
    state: DeliveryState = DeliveryState.PENDING
    last_status: int | None = None
    """What the last try was answered with; None: nothing."""
    last_error: str = ""
    ended: float | None = None


class SecretRow(Struct, frozen=True, kw_only=True):
    """A secret of a tenant (webhooks' signatures), or of the server (tenant "": links)."""

    name: str
    tenant: str
    value: str
    created: float
    expires: float | None = None
