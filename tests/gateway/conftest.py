"""Gateways over real parts."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from fairlead.core.policy import GatewaySettings
from fairlead.gateway.limits.ledger import Limiter
from tests.gateway.house import House


@pytest.fixture
def form() -> str:
    """How its clients ask: `submit` or `infer`. Tests of both are marked with `both`."""
    return "submit"


@pytest_asyncio.fixture
async def house(tmp_path: Path, form: str) -> AsyncIterator[Callable[..., House]]:
    """Builds gateways. Whatever a test did with one, in the end nothing may be left: no hold, turn, flight or task."""
    built: list[House] = []

    def build(
        settings: GatewaySettings | None = None, *, limits: Limiter | None = None, max_in_flight: int = 0, books: bool = True
    ) -> House:
        folder = tmp_path / str(len(built))
        folder.mkdir()
        built.append(House(folder, form, settings or GatewaySettings(), limits, max_in_flight, books=books))
        return built[-1]

    yield build
    for each in built:
        try:
            await each.check()
        finally:
            await each.close()
