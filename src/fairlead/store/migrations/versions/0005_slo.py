"""What came of the requests of each objective, by the hour."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "slo_hours",
        sa.Column("slo", sa.String, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("hour", sa.BigInteger, nullable=False),
        sa.Column("server", sa.String, nullable=False),
        sa.Column("good", sa.BigInteger, nullable=False),
        sa.Column("bad", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("slo", "digest", "hour", "server"),
    )
    op.create_index("slo_hours_hour", "slo_hours", ["hour"])
