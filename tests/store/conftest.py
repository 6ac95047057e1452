from collections.abc import Iterator
from pathlib import Path

import pytest

from fairlead.store.store import Store
from tests.store.postgres import Postgres, private_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with private_postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of an empty database, of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/fairlead.db"
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    new = postgres.new_database()
    yield new
    postgres.drop(new)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store.open(url)
    yield opened
    opened.close()
