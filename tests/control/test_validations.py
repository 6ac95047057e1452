"""Validations that a server was asked for: whoever waits for their gates hears of something."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fairlead.control.acts import deployment_row
from fairlead.control.deployments import Deployment
from fairlead.control.registry import Actor, Draft, Registry
from fairlead.control.validations import MAX_BEGUN, Validations
from fairlead.core.errors import Unavailable
from fairlead.core.rollout import RegistrySettings
from fairlead.core.versions import Stage
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store
from tests.stores import new_store

SECONDS = 20.0
NOW = 1_790_000_000.0
DID = AuditRow(time=NOW, actor="me", action="test", subject="fraud")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Of `fraud@1`, the champion, a file was changed."""
    opened = new_store(tmp_path)
    registry = Registry(opened, RegistrySettings(url=str(tmp_path / "registry")))
    for content in ("one", "two"):
        source = tmp_path / content
        source.mkdir()
        (source / "model.py").write_text(f"class Model:\n    '{content}'\n")
        registry.add(str(source), "fraud", Draft(), Actor("me"))
    row = deployment_row("fraud", Deployment(champion=1), revision=0, actor="me", reason="", now=NOW)
    opened.control.commit(deployments=[row], audits=[DID])
    (damaged,) = (tmp_path / "registry" / "fraud" / "1").glob("model.py")
    damaged.chmod(0o600)
    damaged.write_text("something else")
    yield opened
    opened.close()


def validations(store: Store, tmp_path: Path) -> Validations:
    return Validations(store, Registry(store, RegistrySettings(url=str(tmp_path / "registry")), cache_folder=tmp_path / "cache"))


async def ended(validations: Validations) -> None:
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*validations._begun)


@pytest.mark.parametrize(
    ("checks", "words"), [({}, "fraud@1 is not what was added"), ({"rules": {"gate_seconds": "soon"}}, "Expected `float`")]
)
async def test_a_run_that_fails_says_so_where_its_gates_are_looked_for(store: Store, tmp_path: Path, checks: object, words: str) -> None:
    store.registry.change_model("fraud", DID, checks=checks)  # type: ignore[arg-type]
    begun = validations(store, tmp_path)
    run = begun.begin("fraud", 2, "me")
    await ended(begun)
    (gate,) = store.registry.gates("fraud", 2, run)
    assert (gate.gate, gate.outcome) == ("load", "error") and words in gate.details["message"]
    assert store.registry.version("fraud", 2).stage is Stage.STAGED, "it is not the version's fault"


async def test_so_many_validations_wait_and_no_more(store: Store, tmp_path: Path) -> None:
    begun = validations(store, tmp_path)
    for _ in range(MAX_BEGUN):
        begun.begin("fraud", 2, "me")
    with pytest.raises(Unavailable, match=f"{MAX_BEGUN} validations run or wait"):
        begun.begin("fraud", 2, "me")
    await ended(begun)
    begun.begin("fraud", 2, "me")
    await begun.stop()
