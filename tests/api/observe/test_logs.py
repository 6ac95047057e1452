"""Levels at run time and the latest lines, as an administrator's client sees them."""

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
import structlog

from fairlead.api.doorkeeper import CALLER
from fairlead.api.observe.logs import LogOperations
from fairlead.api.problems import Problems
from fairlead.api.web import json_app
from fairlead.core.caller import Caller
from fairlead.core.logs import Levels
from fairlead.observe.logs import configure_logs, journal

SECONDS = 20.0


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logs("info", "json", io.StringIO())
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def told() -> list[Levels]:
    return []


@pytest.fixture
async def client(told: list[Levels]) -> AsyncIterator[httpx2.AsyncClient]:
    async def admit(request: Any, _: Any) -> None:
        request.scope[CALLER] = (Caller(key="ann"), "")

    rooms = LogOperations(journal, told.append)
    app = json_app([(each.method, each.path, each.serve, each.scope) for each in rooms.operations], {"/admin": Problems()}, admit)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
        yield client
    rooms.stop()


async def test_levels_are_shown_set_and_told_to_the_other_processes(client: httpx2.AsyncClient, told: list[Levels]) -> None:
    shown = (await client.get("/admin/logs/levels")).json()
    assert shown["default"] == "info" and shown["rooms"]["gateway"] == {
        "about": "limits, lines, filters, upstreams",
        "level": "info",
        "seconds_left": None,
    }
    body = {"levels": {"gateway": "debug", "sqlalchemy.engine": "info"}}
    shown = (await client.put("/admin/logs/levels", json=body)).json()
    assert (shown["rooms"]["gateway"]["level"], shown["rooms"]["sqlalchemy.engine"]["level"]) == ("debug", "info")
    assert told == [body["levels"]]
    structlog.get_logger("fairlead.gateway").debug("seen")
    found = (await client.get("/admin/logs/recent?room=gateway")).json()
    assert [line["event"] for line in found["lines"]] == ["seen"]
    assert logging.getLogger("sqlalchemy.engine").level == logging.INFO
    await client.put("/admin/logs/levels", json={"levels": {"gateway": None, "sqlalchemy.engine": None}})
    assert told[-1] == {} and logging.getLogger("sqlalchemy.engine").level == logging.NOTSET


async def test_levels_for_a_while_go_back_by_themselves(client: httpx2.AsyncClient, told: list[Levels]) -> None:
    shown = (await client.put("/admin/logs/levels", json={"levels": {"gateway": "debug"}, "seconds": 0.01})).json()
    assert shown["rooms"]["gateway"]["seconds_left"] is not None
    async with asyncio.timeout(SECONDS):
        while len(told) < 2:
            await asyncio.sleep(0)
    assert told == [{"gateway": "debug"}, {}]
    events = [line["event"] for line in (await client.get("/admin/logs/recent")).json()["lines"]]
    assert events == ["log_levels_set", "log_levels_back"]


@pytest.mark.parametrize(
    "body",
    [
        {"levels": {"gatway": "debug"}},
        {"levels": {"gateway": "loud"}},
        {"levels": {}},
        {"levels": {"gateway": "debug"}, "seconds": 0},
        {"levels": {"gateway": "debug"}, "seconds": 1e9},
        {"levels": {"gateway": "debug"}, "for": 5},
    ],
)
async def test_what_is_no_level_and_no_room_is_refused(client: httpx2.AsyncClient, told: list[Levels], body: Any) -> None:
    response = await client.put("/admin/logs/levels", json=body)
    assert response.status_code == 400 and told == []
    assert (await client.get("/admin/logs/levels")).json()["rooms"]["gateway"]["level"] == "info"


async def test_a_reader_goes_on_where_it_stopped(client: httpx2.AsyncClient) -> None:
    log = structlog.get_logger("fairlead.gateway")
    log.info("one", token="abcd")
    log.error("two")
    first = (await client.get("/admin/logs/recent?level=error")).json()
    assert [line["event"] for line in first["lines"]] == ["two"]
    log.error("three")
    then = (await client.get(f"/admin/logs/recent?after={first['latest']}")).json()
    assert [line["event"] for line in then["lines"]] == ["three"]
    nothing = (await client.get(f"/admin/logs/recent?after={then['latest']}")).json()
    assert nothing == {"lines": [], "latest": then["latest"]}
    assert (await client.get("/admin/logs/recent?limit=1&level=debug")).json()["lines"][0]["event"] == "three"
    for wrong in ("level=loud", "limit=0", "limit=2001", "after=-1", "x=1"):
        assert (await client.get(f"/admin/logs/recent?{wrong}")).status_code == 400
