"""The operations upon rollouts, as an HTTP client sees them, on a real store."""

import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fairlead.api.doorkeeper import CALLER
from fairlead.api.problems import Problems
from fairlead.api.rollouts import RolloutOperations
from fairlead.api.web import json_app
from fairlead.control.acts import deployment_row
from fairlead.control.deployments import Deployment
from fairlead.control.registry import Actor, Draft, Registry
from fairlead.control.rollouts import Rollouts
from fairlead.core.caller import Caller
from fairlead.core.rollout import ControlSettings, RegistrySettings
from fairlead.store.registry_rows import ExposureRow
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store
from tests.stores import new_store

NOW = 1_790_000_000.0


class Clock:
    """Knows which threads looked at it."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def __call__(self) -> float:
        self.threads.add(threading.get_ident())
        return NOW


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """`fraud@1` is deployed, `fraud@2` is staged."""
    opened = new_store(tmp_path)
    registry = Registry(opened, RegistrySettings())
    for content in ("one", "two"):
        source = tmp_path / content
        source.mkdir()
        (source / "model.py").write_text(f"class Model:\n    '{content}'\n")
        registry.add(str(source), "fraud", Draft(), Actor("me"))
    audit = AuditRow(time=NOW, actor="me", action="deploy", subject="fraud@1")
    row = deployment_row("fraud", Deployment(champion=1), revision=0, actor="me", reason="", now=NOW)
    opened.control.commit(deployments=[row], audits=[audit])
    yield opened
    opened.close()


@pytest.fixture
async def client(store: Store, clock: Clock) -> AsyncIterator[httpx2.AsyncClient]:
    async def admit(request: Any, _: Any) -> None:
        request.scope[CALLER] = (Caller(key="boss", address="10.0.0.9"), "")

    operations = RolloutOperations(Rollouts(store, Registry(store, RegistrySettings()), ControlSettings(), clock=clock)).operations
    app = json_app([(each.method, each.path, each.serve, each.scope) for each in operations], {"/admin": Problems()}, admit)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as asking:
        yield asking


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"kind": "experiment", "share": 0}, "`share` is greater than 0"),
        ({"kind": "experiment", "share": 1}, "less than 1"),
        ({"kind": "shadow", "share": 0}, "`share` is greater than 0"),
        ({"kind": "canary", "share": 0.5}, "a canary's shares are its policy's steps"),
        ({"metrics": [{"name": "error_rate"}, {"name": "error_rate"}]}, "each of `metrics` is named once"),
    ],
)
async def test_a_wish_that_makes_no_sense_is_refused_in_words(client: httpx2.AsyncClient, store: Store, wish: Any, words: str) -> None:
    answer = await client.post("/admin/rollouts", json={"candidates": ["fraud@2"], **wish})
    assert (answer.status_code, words in answer.json()["detail"]) == (400, True), answer.text
    assert store.control.rollouts() == ()


async def test_a_shadow_may_have_everything(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/admin/rollouts", json={"candidates": ["fraud@2"], "kind": "shadow", "share": 1})
    assert answer.status_code == 200, answer.text


async def test_rollouts_are_described_beside_the_event_loop(client: httpx2.AsyncClient, clock: Clock) -> None:
    await client.post("/admin/rollouts", json={"candidates": ["fraud@2"]})
    for path in ("", "/fraud", "/fraud/report"):
        clock.threads.clear()
        answer = await client.get(f"/admin/rollouts{path}")
        assert answer.status_code == 200, answer.text
        assert clock.threads and threading.get_ident() not in clock.threads, path


async def test_feedback_outside_of_its_metrics_range_is_refused_before_any_of_it_is_kept(client: httpx2.AsyncClient, store: Store) -> None:
    metrics = [{"name": "feedback:stars", "low": 1, "high": 5}]
    started = (await client.post("/admin/rollouts", json={"candidates": ["fraud@2"], "metrics": metrics})).json()
    exposure = {"model": "fraud", "version": "2", "rollout": started["id"], "time": NOW}
    store.control.add_exposures([ExposureRow(request_id=f"q{n}", **exposure) for n in range(3)])

    async def give(*pieces: tuple[str, str, float]) -> httpx2.Response:
        feedback = [{"request_id": id, "name": name, "score": score} for id, name, score in pieces]
        return await client.post("/admin/feedback", json={"feedback": feedback})

    for value in (0.9, 5.1, -1e9):
        answer = await give(("q0", "stars", 4), ("q1", "stars", value))
        assert (answer.status_code, "is not from 1 to 5" in answer.text, "feedback.1" in answer.text) == (400, True, True), answer.text
    assert store.control.feedback_sums(started["id"]) == ()
    answer = await give(("q0", "stars", 1), ("q1", "stars", 5), ("q2", "seconds", 900), ("nobody", "stars", 900))
    assert answer.json()["taken"] == ["taken", "taken", "taken", "unknown"]
