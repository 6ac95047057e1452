"""What is wanted of a model becomes traffic only as far as it is loaded."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from fairlead.control import deployments
from fairlead.control.acts import deployment_in, deployment_row, deployments_of, rollout_of
from fairlead.control.deployments import Deployment, Deployments, Follower, plan
from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError, ShuttingDown, Unavailable
from fairlead.core.routes import Routes, Shares
from fairlead.core.specs import ModelSpec
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import Hosted, ModelRepository, RepositorySettings
from fairlead.store.registry_rows import DeploymentRow, RolloutRow
from tests.control.house import IN_A_THREAD, MODEL, Clock

NOTHING = Routes()


def test_a_candidate_gets_its_share_once_it_is_loaded():
    wanted = {"fraud": Deployment(champion=6, candidate=7, share=0.05)}
    first = plan(wanted, {"fraud": (6,)}, NOTHING)
    assert first.load == (("fraud", 7),)
    assert first.routes.shares == {"fraud": (("6", 1.0),)}
    then = plan(wanted, {"fraud": (6, 7)}, first.routes)
    assert then.load == ()
    assert then.routes.shares == {"fraud": (("6", 0.95), ("7", 0.05))}


def test_a_candidate_is_not_loaded_before_its_champion_so_that_it_never_answers_alone():
    found = plan({"fraud": Deployment(champion=6, candidate=7, share=0.05)}, {}, NOTHING)
    assert found.load == (("fraud", 6),)
    assert found.routes.shares == {}


def test_the_old_version_serves_until_the_new_one_is_there():
    before = plan({"fraud": Deployment(champion=6)}, {"fraud": (6,)}, NOTHING).routes
    direct = {"fraud": Deployment(champion=7, keep=(6,))}
    meanwhile = plan(direct, {"fraud": (6,)}, before)
    assert meanwhile.routes.shares == {"fraud": (("6", 1.0),)}
    assert meanwhile.load == (("fraud", 7),)
    after = plan(direct, {"fraud": (6, 7)}, meanwhile.routes)
    assert after.routes.shares == {"fraud": (("7", 1.0),)}
    assert after.release == ()


def test_what_answers_is_not_released_although_nobody_wants_it_any_more():
    before = plan({"fraud": Deployment(champion=6)}, {"fraud": (6,)}, NOTHING).routes
    without = {"fraud": Deployment(champion=7)}
    meanwhile = plan(without, {"fraud": (6,)}, before)
    assert (meanwhile.routes.shares["fraud"], meanwhile.release) == ((("6", 1.0),), ())
    after = plan(without, {"fraud": (6, 7)}, meanwhile.routes)
    assert (after.routes.shares["fraud"], after.release) == ((("7", 1.0),), (("fraud", 6),))


def test_going_back_gives_everything_to_the_champion_and_releases_the_candidate():
    wanted = {"fraud": Deployment(champion=6, candidate=7, share=0.25)}
    during = plan(wanted, {"fraud": (6, 7)}, NOTHING)
    back = plan({"fraud": Deployment(champion=6)}, {"fraud": (6, 7)}, during.routes)
    assert back.routes.shares == {"fraud": (("6", 1.0),)}
    assert back.release == (("fraud", 7),)


def test_after_a_restart_a_kept_version_answers_while_the_champion_cannot():
    wanted = {"fraud": Deployment(champion=7, keep=(6,))}
    found = plan(wanted, {"fraud": (6,)}, NOTHING)
    assert found.routes.shares == {"fraud": (("6", 1.0),)}
    assert found.load == (("fraud", 7),)


def test_a_model_that_is_not_wanted_any_more_goes():
    found = plan({}, {"fraud": (6, 7)}, Routes(shares={"fraud": (("6", 1.0),)}))
    assert found.routes.shares == {}
    assert found.release == (("fraud", 6), ("fraud", 7))


def test_two_models_change_sides_in_one_snapshot():
    wanted = {"features": Deployment(champion=2, candidate=3, share=0.1), "fraud": Deployment(champion=6, candidate=7, share=0.1)}
    found = plan(wanted, {"features": (2, 3), "fraud": (6, 7)}, NOTHING)
    assert found.routes.shares == {"features": (("2", 0.9), ("3", 0.1)), "fraud": (("6", 0.9), ("7", 0.1))}
    assert found.routes.sticky == {"features": "session", "fraud": "session"}


class Server:
    """A follower, a real repository, and a store that can be told what to say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.wanted: Deployments = {}
        self.blip: Exception | None = None
        """Why a version's row cannot be read."""
        self.published: Mapping[str, Shares] = {}
        self.repository = ModelRepository(RepositorySettings(sources=(), drain_timeout=5.0, cache_folder=folder), Metrics())
        self.follower = Follower(
            read=lambda: self.wanted,
            hosted=self.hosted,
            repository=self.repository,
            publish=self.publish,
            poll_seconds=1.0,
            clock=self.clock,
        )

    def hosted(self, model: str, number: int) -> Hosted:
        if self.blip is not None:
            raise self.blip
        folder = self.folder / f"{model}-{number}"
        folder.mkdir(exist_ok=True)
        (folder / "model.py").write_text(MODEL.format(add=number))
        return Hosted(read_yaml(IN_A_THREAD, ModelSpec, "spec").replace(name=model), lambda: folder, str(number))

    def publish(self, routes: Routes, _: Deployments) -> None:
        self.published = routes.shares

    async def follow(self, seconds: float = 0.0) -> None:
        self.clock.now += seconds
        await self.follower.begin()


@pytest.fixture
async def server(tmp_path):
    made = Server(tmp_path)
    await made.repository.start()
    yield made
    await made.follower.stop()
    await made.repository.stop()


async def test_a_server_that_starts_does_not_wait_for_ever_for_a_candidate_that_hangs(server, monkeypatch):
    monkeypatch.setattr(deployments, "BEGIN_SECONDS", 0.05)
    over = threading.Event()
    real = server.hosted

    def hosted(model: str, number: int) -> Hosted:
        if number == 2:
            over.wait(30)
        return real(model, number)

    monkeypatch.setattr(server.follower, "_hosted", hosted)
    server.wanted = {"add": Deployment(champion=1, candidate=2, share=0.5)}
    try:
        async with asyncio.timeout(20):
            await server.follower.begin()
        assert server.published == {"add": (("1", 1.0),)}
        assert server.follower.state()["add"]["2"].state == "loading"
    finally:
        over.set()


@pytest.mark.parametrize("error", [Unavailable("the store does not answer"), ShuttingDown("Server is stopping")])
async def test_a_candidate_that_could_not_be_tried_is_still_loading_and_is_tried_again(server, error):
    server.wanted = {"add": Deployment(champion=1)}
    await server.follow()
    server.wanted = {"add": Deployment(champion=1, candidate=2, share=0.5)}
    server.blip = error
    await server.follow()
    state = server.follower.state()["add"]["2"]
    assert (state.state, state.reason) == ("loading", error.message)
    server.blip = None
    await server.follow(1.0)
    assert server.follower.state()["add"]["2"].state == "loading", "not at once: the store has enough to do"
    await server.follow(5.0)
    assert server.follower.state()["add"]["2"].state == "ready"
    assert server.published["add"] == (("1", 0.5), ("2", 0.5))


async def test_a_champion_that_failed_stays_failed_while_the_store_is_gone(server):
    server.wanted = {"add": Deployment(champion=1)}
    server.blip = OSError("no such file")
    await server.follow()
    server.blip = Unavailable("the store does not answer")
    await server.follow(60.0)
    state = server.follower.state()["add"]["1"]
    assert (state.state, state.reason) == ("failed", "OSError: no such file")


def row(model: str, deployment: Deployment) -> DeploymentRow:
    return deployment_row(model, deployment, revision=1, actor="x", reason="", now=1.0)


def of_another_release(model: str) -> DeploymentRow:
    return DeploymentRow(model=model, state={"champion": "the best"}, revision=1, updated=1.0, actor="x")


async def test_a_row_of_another_release_leaves_its_model_as_it_is_and_the_others_go_on(server):
    server.wanted = deployments_of([row("add", Deployment(champion=1)), row("other", Deployment(champion=1))])
    await server.follow()
    server.wanted = deployments_of([of_another_release("add"), row("other", Deployment(champion=2))])
    await server.follow()
    assert server.published == {"add": (("1", 1.0),), "other": (("2", 1.0),)}
    assert server.repository.versions("add") == ["1"]


def test_what_cannot_be_read_is_told_in_words():
    with pytest.raises(ConfigError, match=r"the deployment of `add` cannot be read, is it of another release\? .*champion"):
        deployment_in(of_another_release("add"))
    rollout = RolloutRow(id="ro_1", model="add", status="dancing", state='{"phase": "dancing"}', created=1.0, updated=1.0)
    with pytest.raises(ConfigError, match="rollout ro_1 cannot be read, is it of another release"):
        rollout_of(rollout)
