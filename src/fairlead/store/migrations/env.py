"""What Alembic runs: the connection, and its transaction, are the store's."""

from alembic import context

from fairlead.store.database import VERSION_TABLE
from fairlead.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE)
context.run_migrations()
