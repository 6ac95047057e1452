"""Models and their versions; deployments, rollouts, and what they are decided from."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"

id_type = sa.BigInteger().with_variant(sa.Integer, "sqlite")
json_type = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String, nullable=False)


def long(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False)


def count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False)


def number(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double, nullable=False)


def json(name: str) -> sa.Column[object]:
    return sa.Column(name, json_type, nullable=False)


def large(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False)


def key(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String, primary_key=True)


def counted() -> sa.Column[int]:
    return sa.Column("id", id_type, primary_key=True)


def of_a_version() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"])


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.drop_index("audit_subject", "audit")
        op.create_index("audit_subject", "audit", ["subject"], postgresql_ops={"subject": "text_pattern_ops"})
    op.create_table("models", key("name"), number("created"), long("description"), json("tags"), json("checks"), count("next_version"))
    op.create_table(
        "reservations",
        text("model"),
        count("number"),
        sa.PrimaryKeyConstraint("model", "number"),
        sa.ForeignKeyConstraint(["model"], ["models.name"]),
    )
    op.create_table(
        "versions",
        text("model"),
        count("number"),
        text("digest"),
        long("spec"),
        json("files"),
        long("location"),
        large("bytes"),
        text("backend"),
        json("signature"),
        text("stage"),
        long("reason"),
        json("provenance"),
        json("tags"),
        text("signed_by"),
        long("signature_text"),
        *map(number, ("created", "moved")),
        sa.PrimaryKeyConstraint("model", "number"),
        sa.ForeignKeyConstraint(["model"], ["models.name"]),
    )
    op.create_index("versions_digest", "versions", ["model", "digest"], unique=True)
    op.create_table(
        "aliases",
        *map(text, ("model", "alias")),
        count("number"),
        number("updated"),
        text("actor"),
        sa.PrimaryKeyConstraint("model", "alias"),
        of_a_version(),
    )
    op.create_table(
        "gates",
        counted(),
        text("model"),
        count("number"),
        *map(text, ("run", "gate", "outcome")),
        number("seconds"),
        json("details"),
        number("time"),
        of_a_version(),
    )
    op.create_index("gates_version", "gates", ["model", "number"])
    op.create_table(
        "deployments",
        key("model"),
        *map(json, ("state", "versions")),
        large("revision"),
        number("updated"),
        text("actor"),
        long("reason"),
    )
    op.create_table(
        "rollouts",
        key("id"),
        *map(text, ("model", "status")),
        long("state"),
        *map(number, ("created", "updated")),
        sa.Column("ended", sa.Double),
        large("revision"),
    )
    not_ended = sa.text("ended IS NULL")
    op.create_index("rollouts_created", "rollouts", ["created", "id"])
    op.create_index("rollouts_running", "rollouts", ["created", "id"], sqlite_where=not_ended, postgresql_where=not_ended)
    op.create_table(
        "rollout_members",
        *map(text, ("model", "rollout")),
        count("number"),
        sa.Column("running", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("model", "rollout"),
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.id"]),
    )
    running = sa.text("running")
    op.create_index("rollout_members_running", "rollout_members", ["model"], unique=True, sqlite_where=running, postgresql_where=running)
    op.create_index("rollout_members_rollout", "rollout_members", ["rollout"])
    op.create_table("reports", key("rollout"), long("data"))
    op.create_table("leases", key("name"), text("holder"), number("until"))
    op.create_table("servers", key("id"), number("seen"), json("state"))
    op.create_table(
        "windows", counted(), *map(text, ("server", "model")), number("time"), sa.Column("data", sa.LargeBinary, nullable=False)
    )
    op.create_table("exposures", key("request_id"), *map(text, ("model", "version", "rollout")), number("time"))
    op.create_index("exposures_time", "exposures", ["time"])
    op.create_table(
        "feedback",
        counted(),
        *map(text, ("request_id", "name")),
        *map(number, ("value", "time")),
        *map(text, ("model", "version", "rollout", "actor")),
    )
    op.create_index("feedback_request", "feedback", ["request_id", "name"], unique=True)
    op.create_index("feedback_rollout", "feedback", ["rollout", "id"])
    op.create_index("feedback_time", "feedback", ["time"])
    op.create_table(
        "feedback_sums",
        *map(text, ("rollout", "model", "version", "name")),
        large("num"),
        *map(number, ("sum", "squares")),
        sa.PrimaryKeyConstraint("rollout", "model", "version", "name"),
    )
