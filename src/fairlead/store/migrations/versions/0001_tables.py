"""Tenants, projects, keys, usage, audit, configurations."""

import time

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String, nullable=False)


def count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False)


def number(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double, nullable=False)


def flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False)


def upgrade() -> None:
    revision_table = op.create_table("revision", count("number"))
    op.bulk_insert(revision_table, [{"number": 1}])
    tenants = op.create_table(
        "tenants", sa.Column("name", sa.String, primary_key=True), sa.Column("policy", JSON), number("created"), flag("disabled")
    )
    op.bulk_insert(tenants, [{"name": "default", "policy": None, "created": time.time(), "disabled": False}])
    op.create_table(
        "projects",
        text("tenant"),
        text("name"),
        sa.Column("limits", JSON, nullable=False),
        number("created"),
        sa.PrimaryKeyConstraint("tenant", "name"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"]),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String, primary_key=True),
        text("tenant"),
        text("project"),
        text("name"),
        sa.Column("digest", sa.String, nullable=False, unique=True),
        text("signing_key"),
        sa.Column("public_key", sa.Text),
        text("prefix"),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("models", JSON),
        sa.Column("qos_class", sa.String),
        sa.Column("limits", JSON, nullable=False),
        number("created"),
        text("created_by"),
        sa.Column("expires", sa.Double),
        sa.Column("revoked", sa.Double),
        sa.Column("replaces", sa.String),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"]),
    )
    op.create_index("keys_tenant", "keys", ["tenant", "project"])
    op.create_table(
        "usage",
        sa.Column("id", ID, primary_key=True),
        number("time"),
        *map(text, ("request_id", "tenant", "project", "key", "model", "version", "qos_class", "kind", "outcome")),
        sa.Column("status", sa.Integer, nullable=False),
        text("reason"),
        *map(count, ("input_tokens", "cached_tokens", "output_tokens", "rows")),
        *map(number, ("megapixels", "compute_seconds", "seconds", "cost")),
        flag("cached"),
        text("address"),
    )
    op.create_index("usage_time", "usage", ["time", "id"])
    op.create_index("usage_tenant_time", "usage", ["tenant", "time", "id"])
    op.create_table(
        "usage_hours",
        count("hour"),
        *map(text, ("tenant", "project", "key", "model", "outcome")),
        *map(count, ("requests", "input_tokens", "cached_tokens", "output_tokens", "rows")),
        *map(number, ("megapixels", "compute_seconds", "seconds", "cost")),
        count("cached"),
        sa.PrimaryKeyConstraint("hour", "tenant", "project", "key", "model", "outcome"),
    )
    op.create_table(
        "audit",
        sa.Column("id", ID, primary_key=True),
        number("time"),
        *map(text, ("actor", "action", "subject")),
        sa.Column("details", JSON, nullable=False),
        text("address"),
    )
    op.create_index("audit_time", "audit", ["time"])
    op.create_index("audit_subject", "audit", ["subject"])
    for statement in APPEND_ONLY[op.get_bind().dialect.name]:
        op.execute(statement)
    op.create_table(
        "configs",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        number("time"),
        text("actor"),
        sa.Column("text", sa.Text, nullable=False),
        flag("active"),
    )


APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER audit_no_{verb} BEFORE {verb} ON audit BEGIN SELECT RAISE(ABORT, 'audit rows are never changed'); END"
        for verb in ("update", "delete")
    ],
    "postgresql": [
        "CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'audit rows are never changed'; END $$",
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()",
    ],
}
