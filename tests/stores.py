"""Stores for tests: tables are made once, by the migrations, and copied from then on."""

import tempfile
from functools import cache
from pathlib import Path

from fairlead.store.store import Store


@cache
def _file_with_tables() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fairlead.db")
        Store.open(f"sqlite:///{path}").close()
        return path.read_bytes()


def new_file(folder: Path) -> str:
    """The URL of SQLite's file `fairlead.db`, new in that folder, with all tables."""
    path = folder / "fairlead.db"
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(_file_with_tables())
    return f"sqlite:///{path}"


def new_store(folder: Path) -> Store:
    """One in such a file."""
    return Store.open(new_file(folder))
