"""Rooms of jobs on each kind of store."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from fairlead.core.caller import Caller
from fairlead.core.policy import GatewaySettings
from fairlead.store.job_rows import JobRow
from fairlead.store.store import Store
from tests.jobs.room import Room, Rooms, hurry
from tests.store.conftest import postgres, store, url

__all__ = ["postgres", "store", "url"]


@pytest_asyncio.fixture
async def rooms(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rooms]:
    """Builds one room. Whatever a test did in it, its gateway is left with no hold, turn, flight or task."""
    hurry(monkeypatch)
    built: list[Room] = []

    def build(settings: GatewaySettings | None = None, callers: Callable[[JobRow], Caller] | None = None) -> Room:
        built.append(Room(tmp_path, store, settings or GatewaySettings(), callers))
        return built[-1]

    yield build
    for room in built:
        await room.close()


@pytest_asyncio.fixture
async def room(rooms: Rooms) -> Room:
    return rooms()
