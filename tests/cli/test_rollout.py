"""`fairlead rollout` on the store itself: what is asked for, and how it is shown. What becomes of it with a server: test_serve_rollout.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from fairlead.cli import cli
from fairlead.cli.rollout import number, picture
from fairlead.control.acts import deployment_row
from fairlead.control.deployments import Deployment
from fairlead.control.registry import Actor, Draft, Registry
from fairlead.core.errors import FairleadError
from fairlead.core.rollout import RegistrySettings
from fairlead.core.versions import Stage
from fairlead.store.database import default_url
from fairlead.store.registry_rows import Move
from fairlead.store.rows import AuditQuery, AuditRow
from fairlead.store.store import Store

NOW = 1_790_000_000.0


@pytest.fixture
def store(tmp_path, monkeypatch):
    """`fraud@1` serves, `fraud@2` is staged."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in ("FAIRLEAD_ADMIN_KEY", "FAIRLEAD_ADMIN_URL"):
        monkeypatch.delenv(name, raising=False)
    opened = Store.open(default_url())
    registry = Registry(opened, RegistrySettings())
    for content in ("one", "two"):
        source = tmp_path / content
        source.mkdir()
        (source / "model.py").write_text(f"class Model:\n    '{content}'\n")
        registry.add(str(source), "fraud", Draft(), Actor("me"))
    audit = AuditRow(time=NOW, actor="me", action="version.stage", subject="fraud@1")
    opened.registry.move("fraud", 1, Stage.VALIDATED, "", audit)
    serving = deployment_row("fraud", Deployment(champion=1), revision=0, actor="me", reason="", now=NOW)
    opened.control.commit(deployments=[serving], moves=[Move("fraud", 1, Stage.SERVING)], audits=[audit])
    yield opened
    opened.close()


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, ["rollout", *map(str, arguments)])
    if isinstance(result.exception, FairleadError):
        raise result.exception
    return result


def asked(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_a_rollout_is_asked_for_told_what_to_do_and_shown(store):
    started = asked("start", "fraud@2", "--policy", "quick", "--reason", "a trial")
    assert (started["phase"], started["policy"], started["members"][0]["champion"]) == ("validating", "quick", 1)
    assert "fraud@2" in run("list").output
    assert "fraud@2" in run("show", "fraud").output
    with pytest.raises(FairleadError, match=f"runs already: {started['id']}"):
        run("start", "fraud@2")
    assert run("abort", "fraud", "--reason", "not now").output.startswith("fraud@2 aborted")
    assert asked("list", "--running")["rollouts"] == []
    entries = [(row.action, row.details["reason"]) for row in store.audit(AuditQuery(subject="fraud@2"), 10) if "rollout" in row.action]
    assert entries == [("rollout.abort", "not now"), ("rollout.start", "a trial")]
    assert run("watch", "fraud").exit_code == 1


def test_a_policy_can_be_a_file(store, tmp_path):
    policy = tmp_path / "mine.yaml"
    policy.write_text("steps: [{share: 0.2, seconds: 1, min_requests: 5}]\nalpha: 0.01\n")
    assert asked("start", "fraud@2", "--policy", policy)["steps"] == 1
    run("abort", "fraud")
    policy.write_text("steps: [{share: 0.2, shadow: 0.1}]\n")
    with pytest.raises(FairleadError, match="either a `share` or a `shadow`"):
        run("start", "fraud@2", "--policy", policy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start", "fraud@1"], "serves already"),
        (["start", "fraud@3"], "no version 3|there is no"),
        (["start", "fraud@2", "fraud@1"], "names a model twice"),
        (["start", "fraud@2", "--policy", "brave"], "no policy `brave`"),
        (["start", "fraud@@"], "names no version"),
        (["experiment", "fraud@2", "--metric", "beauty"], "no metric"),
        (["experiment", "fraud@2", "--metric", "error_rate", "--metric", "error_rate"], "is named once"),
        (["show", "nothing"], "no rollout of `nothing`"),
        (["promote", "fraud"], "no rollout of `fraud`"),
        (["undeploy", "other"], "no version of `other` is deployed"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(store, arguments, message):
    with pytest.raises(FairleadError, match=message) as failure:
        run(*arguments)
    assert "\n" not in failure.value.message


def test_what_is_wanted_is_shown_and_can_be_taken_away(store):
    (shown,) = asked("deployments")["deployments"]
    assert (shown["model"], shown["wanted"]["champion"]) == ("fraud", 1)
    assert "fraud" in run("deployments").output
    assert "not deployed any more" in run("undeploy", "fraud").output
    assert asked("deployments")["deployments"] == []
    assert store.registry.version("fraud", 1).stage is Stage.VALIDATED


def test_the_picture_shows_both_sides_in_their_units():
    interval = {"value": 0.02, "low": 0.01, "high": 0.03}
    metric = {"champion": interval, "candidate": interval, "difference": interval, "tolerance": 0.1}
    told = {
        "id": "ro_1",
        "kind": "canary",
        "phase": "progressing",
        "reason": "",
        "share": 0.05,
        "shadow": 0.0,
        "step": 2,
        "steps": 4,
        "hold": False,
        "least_answers": 1000,
        "least_seconds": 300.0,
        "step_seconds": 30.0,
        "eta_seconds": 4000.0,
        "requests": 2000,
        "candidate_requests": 100,
        "exposure": 0.05,
        "members": [
            {
                "model": "fraud",
                "champion": 6,
                "candidate": 7,
                "step_answers": 100,
                "metrics": [
                    {"name": "error_rate", "evidence": 0.7, "verdict": "holds", **metric},
                    {"name": "latency_p99", "evidence": 1.0, "verdict": "worse", **metric},
                ],
            }
        ],
    }
    console = Console(width=140, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(picture(told))
    console.file.close()
    text = console.export_text()
    for words in ("fraud@6 champion", "95.0%", "5.0%", "step 2 of 4", "100/1,000 answers", "1 h 6 min left", "2.00%", "20 ms", "worse"):
        assert words in text, text


def test_values_have_units():
    assert number("error_rate", 0.0123) == "1.23%"
    assert number("latency_p99", 0.0123, True) == "+12.3 ms"
    assert number("feedback:clicks", 0.5) == "0.5"
