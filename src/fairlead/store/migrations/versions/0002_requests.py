"""Of the prompts that come in one request, each has a record, and only the first is a request. What was written before counts as one each."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("usage", sa.Column("requests", sa.BigInteger, nullable=False, server_default="1"))
