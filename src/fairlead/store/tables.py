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
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
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
    Index("usage_time", "time", "id"),
    Index("usage_tenant_time", "tenant", "time", "id"),
)
"""One row a request, until it is purged."""

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
    Index("audit_subject", "subject"),
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
