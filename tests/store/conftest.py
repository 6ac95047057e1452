from collections.abc import Iterator
from pathlib import Path

import pytest

from fairlead.store.store import Store
from tests.store.postgres import Postgres, private_postgres
from tests.stores import new_file


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with private_postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a new database of each kind, with all tables."""
    if request.param == "sqlite":
        yield new_file(tmp_path)
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    new = postgres.new_database()
    yield new
    postgres.drop(new)


@pytest.fixture(params=["sqlite", "postgresql"])
def bare_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a database of each kind before anybody has opened it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/fairlead.db"
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    new = postgres.bare_database()
    yield new
    postgres.drop(new)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store.open(url)
    yield opened
    opened.close()
