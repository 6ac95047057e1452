"""Jobs, their inputs and idempotency keys, webhook deliveries, secrets."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String, nullable=False)


def long(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False)


def count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False)


def number(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double, nullable=False)


def moment(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double)


def part(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String, primary_key=True),
        *map(text, ("tenant", "project", "key", "qos_class")),
        count("priority"),
        *map(text, ("model", "version", "kind", "face", "status", "reason")),
        long("message"),
        *map(number, ("created", "not_before")),
        *map(moment, ("started", "ended")),
        *map(number, ("start_deadline", "total_deadline")),
        *map(count, ("tries", "max_tries")),
        text("runner"),
        number("lease_until"),
        *map(count, ("step", "num_steps")),
        sa.Column("preview", sa.LargeBinary),
        number("cost"),
        *map(long, ("metadata", "webhook", "webhook_events", "webhook_secret")),
        sa.Column("result", sa.LargeBinary),
        number("retention_seconds"),
        moment("expires"),
        sa.Column("revision", sa.BigInteger, nullable=False),
        *map(text, ("address", "request_id")),
    )
    queued = "status = 'queued'"
    part("jobs_line", "jobs", ["model", "priority", "tenant", "id", "not_before"], queued)
    part("jobs_queued", "jobs", ["tenant"], queued)
    part("jobs_start_deadline", "jobs", ["start_deadline"], queued)
    part("jobs_running", "jobs", ["tenant"], "status IN ('active', 'aborting')")
    part("jobs_total_deadline", "jobs", ["total_deadline"], "ended IS NULL")
    part("jobs_expires", "jobs", ["expires"], "expires IS NOT NULL")
    op.create_index("jobs_tenant", "jobs", ["tenant", "id"])
    op.create_table("job_inputs", sa.Column("job", sa.String, primary_key=True), sa.Column("data", sa.LargeBinary, nullable=False))
    op.create_table(
        "idempotency", *map(text, ("tenant", "key", "digest", "job")), number("expires"), sa.PrimaryKeyConstraint("tenant", "key")
    )
    op.create_index("idempotency_job", "idempotency", ["job"])
    op.create_index("idempotency_expires", "idempotency", ["expires"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String, primary_key=True),
        *map(text, ("job", "tenant")),
        long("url"),
        *map(text, ("event", "face")),
        sa.Column("body", sa.Text),
        long("secret"),
        *map(number, ("created", "next_at")),
        text("runner"),
        number("lease_until"),
        count("tries"),
        text("state"),
        sa.Column("last_status", sa.Integer),
        long("last_error"),
        moment("ended"),
    )
    part("deliveries_due", "deliveries", ["next_at"], "state = 'pending'")
    op.create_index("deliveries_job", "deliveries", ["job"])
    op.create_index("deliveries_ended", "deliveries", ["ended"])
    op.create_table(
        "secrets",
        *map(text, ("name", "tenant")),
        long("value"),
        number("created"),
        moment("expires"),
        sa.PrimaryKeyConstraint("name", "tenant", "value"),
    )
