"""Answers of the Responses API, their items, and how much each tenant keeps."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "responses",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("previous", sa.String),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("ended", sa.Double),
        sa.Column("expires", sa.Double, nullable=False),
        sa.Column("server", sa.String, nullable=False),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.Column("cancelling", sa.Boolean, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("input", sa.LargeBinary, nullable=False),
        sa.Column("events", sa.LargeBinary),
    )
    op.create_index("responses_tenant", "responses", ["tenant", "expires"])
    op.create_index("responses_expires", "responses", ["expires"])
    unended = sa.text("ended IS NULL")
    op.create_index("responses_unended", "responses", ["lease_until"], sqlite_where=unended, postgresql_where=unended)
    op.create_table(
        "response_items",
        sa.Column("item", sa.String, nullable=False),
        sa.Column("response", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("item", "response"),
    )
    op.create_index("response_items_response", "response_items", ["response"])
    op.create_table(
        "response_sizes",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("size", sa.BigInteger, nullable=False),
    )
