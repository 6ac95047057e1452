"""`fairlead models validate` as somebody at a terminal, or a script, has it; and the example for CI, run as CI would."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree.ElementTree import fromstring, parse

import pytest
import yaml
from click.testing import CliRunner

from fairlead.cli.admin import Local
from fairlead.cli.validate import end_of, subject_of, validate
from fairlead.control.registry import Actor, Draft, Registry
from fairlead.core.errors import ConfigError, FairleadError
from fairlead.core.rollout import RegistrySettings
from fairlead.core.settings import Settings
from fairlead.core.versions import Ref, Stage
from fairlead.store.database import default_url
from fairlead.store.store import Store
from tests.control.flowers import Iris

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "ci"
SECONDS = 120.0


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "iris"
    (folder / "1").mkdir(parents=True)
    return Iris(folder / "1")


@pytest.fixture
def model(iris, tmp_path):
    """A model's folder, with a fault."""

    def model(fault=""):
        folder = tmp_path / "iris"
        shutil.copytree(iris.folder.parent, folder)
        (folder / "model.yaml").write_text(f"parameters: {{fault: {json.dumps(fault)}}}\n")
        return folder

    return model


def run(*arguments):
    return CliRunner().invoke(validate, [str(each) for each in arguments])


def test_a_good_version_leaves_with_zero(model, tmp_path):
    folder = model()
    (folder / "checks").mkdir()
    (folder / "checks" / "checks.yaml").write_text("memory: {max_bytes: 10000000000, growth_bytes: 100000000, requests: 100}\n")
    result = run(folder, "--champion", folder, "--junit", tmp_path / "report.xml")

    assert result.exit_code == 0, result.output
    assert "passed  memory" in result.output and "passed  schema" in result.output
    assert "iris@1 may serve" in result.output
    assert parse(tmp_path / "report.xml").getroot()[0].get("failures") == "0"


def test_a_bad_version_leaves_with_one_and_says_why_as_json(model):
    result = run(model("fails"), "--json")

    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False and "no flowers today" in report["reason"]
    assert report["gates"][0]["outcome"] == "failed" and report["gates"][1]["outcome"] == "skipped"
    assert "must not serve: load: " in result.stderr


def test_junit_goes_to_the_standard_output_alone(model):
    result = run(model("fails"), "--junit", "-")
    assert result.exit_code == 1
    assert fromstring(result.stdout)[0].get("failures") == "1"


def test_another_schema_may_be_declared(model, iris):
    folder = model("flipped")
    assert run(folder, "--champion", iris.folder.parent).exit_code == 1
    assert run(folder, "--champion", iris.folder.parent, "--breaking").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fraud"], "there is no model `fraud` in the registry"),
        (["./fraud", "--champion", "fraud"], "there is no model repository at ./fraud"),
        (["./nowhere"], "there is no model repository at ./nowhere"),
        (["./fraud@7@8"], "there is no model repository"),
    ],
)
def test_what_is_no_version_is_an_error(arguments, message):
    result = run(*arguments)
    assert isinstance(result.exception, FairleadError) and message in str(result.exception)


def test_a_version_of_the_registry_gets_its_stage_from_its_gates(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("FAIRLEAD_ADMIN_URL", raising=False)
    (tmp_path / "data").mkdir()
    store = Store.open(default_url())
    registry = Registry(store, RegistrySettings())
    for fault in ("", "fails"):
        registry.add(str(model(fault)), "iris", Draft(), Actor("me"))
        shutil.rmtree(tmp_path / "iris")

    good, bad = run("iris@1", "--json"), run("iris@2")

    assert (good.exit_code, bad.exit_code) == (0, 1), bad.output
    assert json.loads(good.stdout)["signature"]["inputs"]
    rows = {row.number: row for row in store.registry.versions("iris")}
    assert (rows[1].stage, rows[2].stage) == (Stage.VALIDATED, Stage.REJECTED)
    assert rows[2].reason in bad.output and rows[1].signature
    assert [gate.outcome for gate in store.registry.gates("iris", 1) if gate.gate == "load"] == ["passed"]
    assert "its checks are those of" in run("iris@1", "--checks", tmp_path).output
    store.close()


def test_a_bare_name_is_the_same_version_for_a_server(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    store = Store.open(default_url())
    registry = Registry(store, RegistrySettings())
    for fault in ("", "fails", "flipped"):
        registry.add(str(model(fault)), "iris", Draft(), Actor("me"))
        shutil.rmtree(tmp_path / "iris")
    local, did = Local(Settings(), classes_known=False), registry.did(Actor("me"), "version.stage", "iris@3")

    store.registry.move("iris", 3, Stage.REJECTED, "", did)
    assert end_of(local, Ref("iris")) == "2" == str(store.registry.resolve(Ref("iris")).number)
    store.registry.move_all([], aliases={("iris", "champion"): 1}, audits=[did])
    assert end_of(local, Ref("iris")) == "champion" and store.registry.resolve(Ref("iris")).number == 1
    assert (end_of(local, Ref("iris", version=2)), end_of(local, Ref("iris", alias="best"))) == ("2", "best")
    with pytest.raises(FairleadError, match="no model `roses`"):
        end_of(local, Ref("roses"))
    store.close()


def test_a_folder_of_several_models_is_an_error(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds 2 models \(a, b\): name the folder of one"):
        subject_of(str(tmp_path))


def test_the_newest_version_of_a_folder_is_meant(model):
    folder = model()
    shutil.copytree(folder / "1", folder / "12")
    assert subject_of(str(folder)).version == "12"


def workflow():
    return yaml.safe_load((EXAMPLE / "model-release.yml").read_text())


def test_the_example_for_ci_trains_a_model_that_passes(tmp_path):
    copy = shutil.copytree(EXAMPLE, tmp_path / "examples" / "ci")
    checks = (copy / "checks.yaml").read_text()
    (copy / "checks.yaml").write_text(re.sub(r"p99: \S+", "p99: 60.0", checks))  # how fast this machine is is no matter here
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    steps = {step.get("name"): step for step in workflow()["jobs"]["release"]["steps"]}
    for name in ("train", "validate"):
        command = steps[name]["run"].replace("fairlead models validate", "python -m fairlead models validate")
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (suite,) = parse(tmp_path / "build" / "validation.xml").getroot()
    assert suite.get("failures") == suite.get("errors") == "0"


def test_the_actions_of_the_example_are_pinned_and_secrets_are_no_part_of_a_script():
    steps = workflow()["jobs"]["release"]["steps"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and [each for each in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", each)] == []
    assert [step["run"] for step in steps if "${{" in step.get("run", "")] == []
