"""The tables, as the newest migration leaves them (a test compares)."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TextClause,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

Id = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts up by itself in INTEGER columns only."""
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
"""None is NULL, not JSON's null."""

metadata = MetaData()

revision = Table("revision", metadata, Column("number", BigInteger, nullable=False))
"""One row."""

tenants = Table(
    "tenants",
    metadata,
    Column("name", String, primary_key=True),
    Column("policy", Json),
    Column("created", Double, nullable=False),
    Column("disabled", Boolean, nullable=False),
)

projects = Table(
    "projects",
    metadata,
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("limits", Json, nullable=False),
    Column("created", Double, nullable=False),
    PrimaryKeyConstraint("tenant", "name"),
    ForeignKeyConstraint(["tenant"], ["tenants.name"]),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("project", String, nullable=False),
    Column("name", String, nullable=False),
    Column("digest", String, nullable=False, unique=True),
    Column("signing_key", String, nullable=False),
    Column("public_key", Text),
    Column("prefix", String, nullable=False),
    Column("scopes", Json, nullable=False),
    Column("models", Json),
    Column("qos_class", String),
    Column("limits", Json, nullable=False),
    Column("created", Double, nullable=False),
    Column("created_by", String, nullable=False),
    Column("expires", Double),
    Column("revoked", Double),
    Column("replaces", String),
    ForeignKeyConstraint(["tenant"], ["tenants.name"]),
    Index("keys_tenant", "tenant", "project"),
)

usage = Table(
    "usage",
    metadata,
    Column("id", Id, primary_key=True),
    Column("time", Double, nullable=False),
    Column("request_id", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("project", String, nullable=False),
    Column("key", String, nullable=False),
    Column("model", String, nullable=False),
    Column("version", String, nullable=False),
    Column("qos_class", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("outcome", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("reason", String, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("megapixels", Double, nullable=False),
    Column("compute_seconds", Double, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("cost", Double, nullable=False),
    Column("cached", Boolean, nullable=False),
    Column("address", String, nullable=False),
    Column("requests", BigInteger, nullable=False, server_default="1"),
    Index("usage_time", "time", "id"),
    Index("usage_tenant_time", "tenant", "time", "id"),
)
"""One row a request, or a prompt of one, until it is purged."""

usage_hours = Table(
    "usage_hours",
    metadata,
    Column("hour", BigInteger, nullable=False),
    Column("tenant", String, nullable=False),
    Column("project", String, nullable=False),
    Column("key", String, nullable=False),
    Column("model", String, nullable=False),
    Column("outcome", String, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("megapixels", Double, nullable=False),
    Column("compute_seconds", Double, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("cost", Double, nullable=False),
    Column("cached", BigInteger, nullable=False),
    PrimaryKeyConstraint("hour", "tenant", "project", "key", "model", "outcome"),
)
"""The same requests added up by the hour (its first second): what sums are read from, and what purging leaves."""

audit = Table(
    "audit",
    metadata,
    Column("id", Id, primary_key=True),
    Column("time", Double, nullable=False),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("details", Json, nullable=False),
    Column("address", String, nullable=False),
    Index("audit_time", "time"),
    # That it also finds what begins with a text.
    Index("audit_subject", "subject", postgresql_ops={"subject": "text_pattern_ops"}),
)
"""Triggers refuse to change or delete its rows."""

configs = Table(
    "configs",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("time", Double, nullable=False),
    Column("actor", String, nullable=False),
    Column("text", Text, nullable=False),
    Column("active", Boolean, nullable=False),
)

QUEUED = text("status = 'queued'")
RUNNING = text("status IN ('active', 'aborting')")
NOT_ENDED = text("ended IS NULL")
KEPT = text("expires IS NOT NULL")
PENDING = text("state = 'pending'")


def _part(name: str, *columns: str, where: TextClause) -> Index:
    """An index of some of the rows; queries must say the same words to use it."""
    return Index(name, *columns, sqlite_where=where, postgresql_where=where)


jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("project", String, nullable=False),
    Column("key", String, nullable=False),
    Column("qos_class", String, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("model", String, nullable=False),
    Column("version", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("face", String, nullable=False),
    Column("status", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("message", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("start_deadline", Double, nullable=False),
    Column("total_deadline", Double, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("max_tries", Integer, nullable=False),
    Column("runner", String, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("step", Integer, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("preview", LargeBinary),
    Column("cost", Double, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("webhook", Text, nullable=False),
    Column("webhook_events", Text, nullable=False),
    Column("webhook_secret", Text, nullable=False),
    Column("result", LargeBinary),
    Column("retention_seconds", Double, nullable=False),
    Column("expires", Double),
    Column("revision", BigInteger, nullable=False),
    Column("address", String, nullable=False),
    Column("request_id", String, nullable=False),
    _part("jobs_line", "model", "priority", "tenant", "id", "not_before", where=QUEUED),
    _part("jobs_queued", "tenant", where=QUEUED),
    _part("jobs_start_deadline", "start_deadline", where=QUEUED),
    _part("jobs_running", "tenant", where=RUNNING),
    _part("jobs_total_deadline", "total_deadline", where=NOT_ENDED),
    _part("jobs_expires", "expires", where=KEPT),
    Index("jobs_tenant", "tenant", "id"),
)
"""`metadata` and `webhook_events` are JSON, `result` is MessagePack. `lease_until` is in no index, so that a beat rewrites none."""

job_inputs = Table("job_inputs", metadata, Column("job", String, primary_key=True), Column("data", LargeBinary, nullable=False))
"""Apart from their jobs, which are rewritten with every step."""

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", String, nullable=False),
    Column("key", String, nullable=False),
    Column("digest", String, nullable=False),
    Column("job", String, nullable=False),
    Column("expires", Double, nullable=False),
    PrimaryKeyConstraint("tenant", "key"),
    Index("idempotency_job", "job"),
    Index("idempotency_expires", "expires"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String, primary_key=True),
    Column("job", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("url", Text, nullable=False),
    Column("event", String, nullable=False),
    Column("face", String, nullable=False),
    Column("body", Text),
    Column("secret", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("next_at", Double, nullable=False),
    Column("runner", String, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("last_status", Integer),
    Column("last_error", Text, nullable=False),
    Column("ended", Double),
    _part("deliveries_due", "next_at", where=PENDING),
    Index("deliveries_job", "job"),
    Index("deliveries_ended", "ended"),
)
"""Webhook calls: to be made, and their log."""

secrets = Table(
    "secrets",
    metadata,
    Column("name", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("value", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double),
    PrimaryKeyConstraint("name", "tenant", "value"),
)

models = Table(
    "models",
    metadata,
    Column("name", String, primary_key=True),
    Column("created", Double, nullable=False),
    Column("description", Text, nullable=False),
    Column("tags", Json, nullable=False),
    Column("checks", Json, nullable=False),
    Column("next_version", Integer, nullable=False),
)

reservations = Table(
    "reservations",
    metadata,
    Column("model", String, nullable=False),
    Column("number", Integer, nullable=False),
    PrimaryKeyConstraint("model", "number"),
    ForeignKeyConstraint(["model"], ["models.name"]),
)
"""Numbers that were given to versions which are not there yet."""

versions = Table(
    "versions",
    metadata,
    Column("model", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("spec", Text, nullable=False),
    Column("files", Json, nullable=False),
    Column("location", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("backend", String, nullable=False),
    Column("signature", Json, nullable=False),
    Column("stage", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("provenance", Json, nullable=False),
    Column("tags", Json, nullable=False),
    Column("signed_by", String, nullable=False),
    Column("signature_text", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("moved", Double, nullable=False),
    PrimaryKeyConstraint("model", "number"),
    ForeignKeyConstraint(["model"], ["models.name"]),
    Index("versions_digest", "model", "digest", unique=True),
)

aliases = Table(
    "aliases",
    metadata,
    Column("model", String, nullable=False),
    Column("alias", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("updated", Double, nullable=False),
    Column("actor", String, nullable=False),
    PrimaryKeyConstraint("model", "alias"),
    ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
)

gates = Table(
    "gates",
    metadata,
    Column("id", Id, primary_key=True),
    Column("model", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("run", String, nullable=False),
    Column("gate", String, nullable=False),
    Column("outcome", String, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("details", Json, nullable=False),
    Column("time", Double, nullable=False),
    ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
    Index("gates_version", "model", "number"),
)

deployments = Table(
    "deployments",
    metadata,
    Column("model", String, primary_key=True),
    Column("state", Json, nullable=False),
    Column("versions", Json, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("updated", Double, nullable=False),
    Column("actor", String, nullable=False),
    Column("reason", Text, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("status", String, nullable=False),
    Column("state", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Column("ended", Double),
    Column("revision", BigInteger, nullable=False),
    Index("rollouts_created", "created", "id"),
    _part("rollouts_running", "created", "id", where=NOT_ENDED),
)

rollout_members = Table(
    "rollout_members",
    metadata,
    Column("model", String, nullable=False),
    Column("rollout", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("running", Boolean, nullable=False),
    PrimaryKeyConstraint("model", "rollout"),
    ForeignKeyConstraint(["rollout"], ["rollouts.id"]),
    Index("rollout_members_running", "model", unique=True, sqlite_where=text("running"), postgresql_where=text("running")),
    Index("rollout_members_rollout", "rollout"),
)
"""A model is in one rollout at a time."""

reports = Table("reports", metadata, Column("rollout", String, primary_key=True), Column("data", Text, nullable=False))
"""What shadows found."""

leases = Table(
    "leases",
    metadata,
    Column("name", String, primary_key=True),
    Column("holder", String, nullable=False),
    Column("until", Double, nullable=False),
)

servers = Table(
    "servers",
    metadata,
    Column("id", String, primary_key=True),
    Column("seen", Double, nullable=False),
    Column("state", Json, nullable=False),
)

windows = Table(
    "windows",
    metadata,
    Column("id", Id, primary_key=True),
    Column("server", String, nullable=False),
    Column("model", String, nullable=False),
    Column("time", Double, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
"""On their way from the servers to the one that decides."""

exposures = Table(
    "exposures",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("version", String, nullable=False),
    Column("rollout", String, nullable=False),
    Column("time", Double, nullable=False),
    Index("exposures_time", "time"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", Id, primary_key=True),
    Column("request_id", String, nullable=False),
    Column("name", String, nullable=False),
    Column("value", Double, nullable=False),
    Column("time", Double, nullable=False),
    Column("model", String, nullable=False),
    Column("version", String, nullable=False),
    Column("rollout", String, nullable=False),
    Column("actor", String, nullable=False),
    Index("feedback_request", "request_id", "name", unique=True),
    Index("feedback_rollout", "rollout", "id"),
    Index("feedback_time", "time"),
)

feedback_sums = Table(
    "feedback_sums",
    metadata,
    Column("rollout", String, nullable=False),
    Column("model", String, nullable=False),
    Column("version", String, nullable=False),
    Column("name", String, nullable=False),
    Column("num", BigInteger, nullable=False),
    Column("sum", Double, nullable=False),
    Column("squares", Double, nullable=False),
    PrimaryKeyConstraint("rollout", "model", "version", "name"),
)
"""The same feedback added up: what is asked at every decision, and what purging leaves."""

slo_hours = Table(
    "slo_hours",
    metadata,
    Column("slo", String, nullable=False),
    Column("digest", String, nullable=False),
    Column("hour", BigInteger, nullable=False),
    Column("server", String, nullable=False),
    Column("good", BigInteger, nullable=False),
    Column("bad", BigInteger, nullable=False),
    PrimaryKeyConstraint("slo", "digest", "hour", "server"),
    Index("slo_hours_hour", "hour"),
)
"""Each server writes its own rows. `hour` is its first second; of `digest` another one means that something else was counted."""

responses = Table(
    "responses",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("previous", String),
    Column("status", String, nullable=False),
    Column("created", Double, nullable=False),
    Column("ended", Double),
    Column("expires", Double, nullable=False),
    Column("server", String, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("cancelling", Boolean, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Column("events", LargeBinary),
    Index("responses_tenant", "tenant", "expires"),
    Index("responses_expires", "expires"),
    _part("responses_unended", "lease_until", where=NOT_ENDED),
)

response_items = Table(
    "response_items",
    metadata,
    Column("item", String, nullable=False),
    Column("response", String, nullable=False),
    PrimaryKeyConstraint("item", "response"),
    Index("response_items_response", "response"),
)
"""Where an item is that a later request refers to."""

response_sizes = Table("response_sizes", metadata, Column("tenant", String, primary_key=True), Column("size", BigInteger, nullable=False))
"""Of all responses of a tenant together."""

files = Table(
    "files",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("purpose", String, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Column("signed_by", String, nullable=False),
    Index("files_tenant", "tenant", "id"),
    Index("files_expires", "expires"),
)

file_parts = Table(
    "file_parts",
    metadata,
    Column("file", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    PrimaryKeyConstraint("file", "number"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("project", String, nullable=False),
    Column("key", String, nullable=False),
    Column("address", String, nullable=False),
    Column("created", Double, nullable=False),
    Column("ended", Double),
    Column("expires", Double, nullable=False),
    Column("server", String, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("cancelling", Boolean, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("signed_by", String, nullable=False),
    Column("output_seconds", Double),
    Index("batches_tenant", "tenant", "id"),
    Index("batches_expires", "expires"),
    _part("batches_unended", "lease_until", where=NOT_ENDED),
)

batch_results = Table(
    "batch_results",
    metadata,
    Column("batch", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("good", Boolean, nullable=False),
    Column("data", LargeBinary, nullable=False),
    PrimaryKeyConstraint("batch", "number"),
)
"""Of the lines of a batch that runs: what need not be asked again."""
