"""What control asks of the gateway, composed as in a server."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fairlead.api.rollouts import Recording
from fairlead.app_control import ControlPlane
from fairlead.control.deployments import Deployment
from fairlead.core.policy import GatewaySettings
from fairlead.core.rollout import ControlSettings, RegistrySettings
from fairlead.core.routes import Routes
from fairlead.store.registry_rows import ModelRow
from fairlead.store.rows import AuditRow
from tests.gateway.house import WORDS, House, Played, say, until

NOW = 1_790_000_000.0
FIRST, SECOND = Routes({"chat": (("1", 1.0), ("2", 0.0))}), Routes({"chat": (("1", 0.0), ("2", 1.0))})


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[House]:
    """The gateway of a server."""
    made = House(tmp_path, "submit", GatewaySettings(), None, 0, books=True)
    yield made
    await made.check()
    await made.close()


@pytest.fixture
async def plane(front: House, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    assert front.store is not None
    settings = ControlSettings(registry=RegistrySettings(url=str(tmp_path / "registry")))
    made = ControlPlane(settings, store=front.store, gateway=front.gateway, repository=front.repository, counts=front.counts)
    front.store.registry.add_model(ModelRow(name="chat", created=NOW), AuditRow(time=NOW, actor="me", action="model.add", subject="chat"))
    yield made
    await made.stop()


async def test_golden_requests_have_the_champions_answers_whomever_the_traffic_asks(front: House, plane: ControlPlane) -> None:
    candidate = Played("chat", version="2")
    front.repository.serve(candidate)
    plane.follower.deployments = {"chat": Deployment(champion=1, candidate=2, share=0.5)}
    await plane.record("chat", Recording(requests=10, redact=False), "me")

    for routes, model, text in ((SECOND, candidate, "I am the candidate"), (FIRST, front.chat, "by chance")):
        front.dispatch.routes = routes
        client = front.ask(say("who are you?", sampling={"temperature": 1.0}))
        (await model.next()).end(text, usage=WORDS)
        await client.end()
        await until(lambda: not front.gateway.shadows.reading)
    assert plane.recording("chat")["examples"] == 1

    front.dispatch.routes = SECOND
    stopping = asyncio.create_task(plane.stop_recording("chat", "me"))
    (await front.chat.next(2)).end("I am the champion", usage=WORDS)
    await stopping
    assert [each["text"] for each in plane.store.registry.model("chat").checks["golden"]] == ["I am the champion"]
    assert len(candidate.asked) == 1


async def test_golden_requests_of_a_model_that_the_registry_does_not_deploy_are_whatever_serves(front: House, plane: ControlPlane) -> None:
    await plane.record("chat", Recording(requests=1, redact=False), "me")
    client = front.ask(say("who are you?", sampling={"temperature": 0.0}))
    (await front.chat.next()).end("I am", usage=WORDS)
    await client.end()
    await until(lambda: not plane.recording("chat")["running"])
    assert [each["text"] for each in plane.store.registry.model("chat").checks["golden"]] == ["I am"]
