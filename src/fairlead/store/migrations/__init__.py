"""How a database of any earlier version becomes one of today's: Alembic's scripts, applied when a store is opened."""
