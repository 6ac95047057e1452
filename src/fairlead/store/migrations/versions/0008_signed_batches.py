"""Who signed a file and a batch, and how long a batch's own files are kept."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("files", sa.Column("signed_by", sa.String, nullable=False, server_default=""))
    op.add_column("batches", sa.Column("signed_by", sa.String, nullable=False, server_default=""))
    op.add_column("batches", sa.Column("output_seconds", sa.Double))
