"""`fairlead doctor` on real folders, real ports and the libraries that are installed."""

import contextlib
import json
import shutil
import socket
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from fairlead.backends import BACKENDS
from fairlead.cli import cli
from fairlead.cli.demo_models.tiny.checks import CHAT
from fairlead.store.database import HEAD
from fairlead.store.store import Store
from tests.gateway.identity.issuers import LocalIssuer, free_port
from tests.gateway.limits.servers import RedisServer

ECHO = """
class Echo:
    example = {"x": [[1.0]]}

    def infer(self, inputs):
        return {"y": inputs["x"]}
"""


def doctor(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
    result = CliRunner().invoke(cli, ["doctor", "--json", *map(str, arguments)])
    return result.exit_code, json.loads(result.stdout)


def in_words(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["doctor", *map(str, arguments)])


def finding(findings: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = (each for each in findings if each["name"] == name)
    return found


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with two good models."""
    (tmp_path / "models/echo/1").mkdir(parents=True)
    (tmp_path / "models/echo/1/model.py").write_text(ECHO)
    (tmp_path / "models/trees/3").mkdir(parents=True)
    rows = np.random.default_rng(0).random((100, 2))
    booster = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(rows, rows[:, 0]), num_boost_round=2)
    booster.save_model(tmp_path / "models/trees/3/model.txt")
    return tmp_path / "models"


def test_it_tells_the_kinds_of_model_that_can_be_served() -> None:
    code, findings = doctor()
    assert code == 0
    assert {each["name"] for each in findings if each["area"] == "kinds of model"} == set(BACKENDS)
    assert finding(findings, "lightgbm")["detail"] == f"lightgbm {lightgbm.__version__}"


def test_a_library_that_is_not_installed_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)  # Python's own way to make a module absent
    code, findings = doctor()
    assert code == 0
    assert finding(findings, "lightgbm") | {"area": ""} == {
        "area": "",
        "name": "lightgbm",
        "state": "note",
        "detail": "needs lightgbm",
        "advice": "pip install 'fairlead[trees]'",
    }
    code, findings = doctor(models)
    assert code == 1
    assert finding(findings, "trees@3")["state"] == "problem"
    assert finding(findings, "trees@3")["advice"] == "pip install 'fairlead[trees]'"


def test_good_models_are_named_with_their_kinds_and_nothing_is_wrong(models: Path) -> None:
    result = in_words(models)
    assert result.exit_code == 0, result.output
    assert "python: model.py" in result.output
    assert "lightgbm: model.txt" in result.output
    assert "Nothing is wrong." in result.output


def test_language_models_are_told_by_their_folder_and_the_kernels_by_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models/assistant/1"
    shutil.copytree(CHAT, folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, findings = doctor(tmp_path / "models")
    assert finding(findings, "kernels")["state"] == "note" and "no C++ compiler" in finding(findings, "kernels")["detail"]
    assert code == 0 and "llm" in finding(findings, "assistant@1")["detail"]
    (folder / "model.safetensors").write_bytes(b"")
    code, findings = doctor(tmp_path / "models")
    assert code == 1 and "model.safetensors is empty" in finding(findings, "assistant@1")["detail"]


def test_one_bare_artefact_is_a_model_too(models: Path) -> None:
    code, findings = doctor(models / "trees/3/model.txt")
    assert code == 0
    assert finding(findings, "model@1")["detail"].startswith("lightgbm: model.txt")


def test_every_broken_model_is_told_with_its_reason_and_the_good_ones_stay_good(models: Path) -> None:
    def version_of(name: str) -> Path:
        folder = models / name / "1"
        folder.mkdir(parents=True)
        return folder

    (version_of("typo").parent / "model.yaml").write_text("batching:\n  max_batch_sise: 8\n")
    (version_of("syntax") / "model.py").write_text("class Echo:\n    def infer(self inputs): ...\n")
    (version_of("empty") / "model.onnx").touch()
    torch.save({"weight": torch.zeros(2)}, version_of("weights") / "model.pt")
    two = version_of("two")
    (two / "a.onnx").write_bytes(b"\x08")
    (two / "b.onnx").write_bytes(b"\x08")
    version_of("nothing")
    (version_of("old").parent / "model.yaml").write_text("version_policy: {specific: [7]}\n")
    (models / "old/1/model.py").write_text(ECHO)

    code, findings = doctor(models)
    assert code == 1
    told = {each["name"].partition("@")[0]: each for each in findings if each["area"].startswith("models in ")}
    assert {name for name, each in told.items() if each["state"] == "ok"} == {"echo", "trees"}
    assert "model.yaml:2: unknown key `max_batch_sise`" in told["typo"]["detail"]
    assert "syntax/1/model.py:2: " in told["syntax"]["detail"]
    assert told["empty"]["detail"] == "cannot be read: model.onnx is empty"
    assert "weights, not a program" in told["weights"]["detail"]
    assert "holds 2 artefacts" in told["two"]["detail"]
    assert told["nothing"]["detail"] == "no version and no artefact is there"
    assert told["old"]["detail"] == "no version that its version_policy wants is there"

    result = in_words(models)
    assert result.exit_code == 1
    assert "7 problems" in result.output


def test_a_repository_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    code, findings = doctor(tmp_path / "nowhere")
    assert code == 1
    assert findings[-1]["detail"] == f"there is no model repository at {tmp_path / 'nowhere'}"
    (tmp_path / "bare").mkdir()
    code, findings = doctor(tmp_path / "bare")
    assert code == 1
    assert findings[-1]["detail"] == "there is no model"


def test_a_port_that_the_configuration_names_and_someone_holds_is_a_problem(tmp_path: Path) -> None:
    config = tmp_path / "fairlead.yaml"
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        config.write_text(f"listen: {{port: {port}, grpc_port: 0, ops_port: 0}}\n")
        code, findings = doctor("--config", config)
        assert code == 1
        assert finding(findings, "http")["detail"] == f"127.0.0.1:{port}: address already in use"
    code, findings = doctor("--config", config)
    assert code == 0
    assert finding(findings, "http")["detail"] == f"127.0.0.1:{port} is free"


def test_the_configurations_own_repositories_are_looked_at(tmp_path: Path, models: Path) -> None:
    config = tmp_path / "fairlead.yaml"
    config.write_text(f"listen: {{port: 0, grpc_port: 0, ops_port: 0}}\nmodels: {{repositories: ['{models}']}}\n")
    code, findings = doctor("--config", config)
    assert code == 0
    assert finding(findings, "echo@1")["state"] == "ok"


def test_a_fallback_that_nobody_computes_is_noted(tmp_path: Path, models: Path) -> None:
    config = tmp_path / "fairlead.yaml"
    policy = "{routing: {fallback: [trees, tress]}}"
    listen = "listen: {port: 0, grpc_port: 0, ops_port: 0}"
    config.write_text(f"{listen}\nmodels: {{repositories: ['{models}']}}\ngateway: {{models: {{echo: {policy}}}}}\n")
    code, findings = doctor("--config", config)
    told = finding(findings, "gateway.models.echo.routing.fallback")
    assert code == 0 and told["state"] == "note" and "`tress`" in told["detail"]
    _, findings = doctor("--config", config, models / "echo")
    assert all("fallback" not in each["name"] for each in findings), "what else is served was not looked at"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("listen: {prot: 8000}\n", "fairlead.yaml:1: unknown key `prot`"),
        ("listen: {host: 0.0.0.0}\nauth: {required: false}\n", "reachable from other machines"),
        ("listen: {host: '${FAIRLEAD_NOWHERE_SET}'}\n", "environment variable FAIRLEAD_NOWHERE_SET is not set"),
        (None, "No such file or directory"),
    ],
)
def test_a_wrong_configuration_is_told_where(tmp_path: Path, text: str | None, told: str) -> None:
    config = tmp_path / "fairlead.yaml"
    if text is not None:
        config.write_text(text)
    code, findings = doctor("--config", config)
    assert code == 1
    assert told in finding(findings, "fairlead.yaml")["detail"]


# What a configuration leans on


def asked(tmp_path: Path, text: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and (state, detail) of each connection."""
    config = tmp_path / "fairlead.yaml"
    config.write_text(f"listen: {{port: 0, grpc_port: 0, ops_port: 0}}\n{text}")
    code, findings = doctor("--config", config)
    return code, {each["name"]: (each["state"], each["detail"]) for each in findings if each["area"] == "connections"}


def test_without_a_store_redis_and_issuers_there_is_nothing_to_ask(tmp_path: Path) -> None:
    assert asked(tmp_path, "") == (0, {})


def test_a_store_is_looked_at_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "fairlead.db"
    text = f"store: {{url: 'sqlite:///{file}'}}\n"
    assert asked(tmp_path, text) == (0, {"store": ("note", "has no tables yet")})
    assert not file.exists()
    Store.open(f"sqlite:///{file}").close()
    assert asked(tmp_path, text) == (0, {"store": ("ok", f"tables of version {HEAD}, 0 keys")})
    for version, code, state, told in (("0000", 0, "note", "not " + HEAD), ("9999", 1, "problem", "a newer Fairlead")):
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
            database.execute("UPDATE fairlead_version SET version_num = ?", (version,))
        exit_code, found = asked(tmp_path, text)
        assert (exit_code, found["store"][0]) == (code, state) and told in found["store"][1]


def test_a_store_without_a_key_where_callers_must_show_one_is_a_problem(tmp_path: Path) -> None:
    code, found = asked(tmp_path, f"store: {{url: 'sqlite:///{tmp_path}/fairlead.db'}}\nauth: {{required: true}}\n")
    assert code == 1 and "there is none" in found["store"][1]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("sqlite:///{0}/fairlead.yaml", "file is not a database"),
        ("sqlite:///{0}/nowhere/fairlead.db", "no such folder"),
        ("postgresql://ada:hunter2@127.0.0.1:{1}/fairlead", "ada:***@127.0.0.1"),
        ("mysql://127.0.0.1/fairlead", "only sqlite and postgresql"),
    ],
)
def test_a_store_that_does_not_open_is_a_problem_told_without_its_password(tmp_path: Path, url: str, told: str) -> None:
    code, found = asked(tmp_path, f"store: {{url: '{url.format(tmp_path, free_port())}'}}\n")
    state, detail = found["store"]
    assert (code, state) == (1, "problem") and told in detail and "hunter2" not in detail


def test_redis_answers_or_not_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis = RedisServer(tmp_path)
    text = f"gateway: {{redis_url: '{redis.url}'}}\n"
    redis.start()
    try:
        assert asked(tmp_path, text) == (0, {"redis": ("ok", "answers")})
        monkeypatch.setattr("fairlead.cli.connections.DEADLINE", 0.1)
        redis.freeze()
        assert asked(tmp_path, text) == (1, {"redis": ("problem", "does not answer within 0.1 s")})
    finally:
        redis.kill()
    monkeypatch.undo()
    code, found = asked(tmp_path, text)
    assert (code, found["redis"][0]) == (1, "problem") and "refused" in found["redis"][1]
    code, found = asked(tmp_path, "gateway: {redis_url: 'redis://:hunter2@127.0.0.1:hunter2/0'}\n")
    assert code == 1 and "hunter2" not in found["redis"][1]


@pytest.fixture
def issuer() -> Iterator[LocalIssuer]:
    running = LocalIssuer()
    yield running
    running.close()


def test_an_issuer_is_asked_for_its_documents_and_its_keys_must_fit(tmp_path: Path, issuer: LocalIssuer) -> None:
    name = f"issuer {issuer.url}"
    text = f"auth: {{oidc: [{{issuer: '{issuer.url}', audience: a}}]}}\n"
    assert asked(tmp_path, text) == (0, {name: ("ok", "1 key, for RS256, PS256")})
    code, found = asked(tmp_path, text.replace("audience: a", "audience: a, algorithms: [ES256]"))
    assert code == 1 and "none of its 1 keys is for ES256" in found[name][1]
    issuer.keys.clear()
    assert "no public key" in asked(tmp_path, text)[1][name][1]
    issuer.discovery = {"issuer": "https://elsewhere.test"}
    assert "https://elsewhere.test" in asked(tmp_path, text)[1][name][1]
    issuer.broken = True
    code, found = asked(tmp_path, text)
    assert (code, found[name][0]) == (1, "problem") and "status 503" in found[name][1]


def test_a_key_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    code, found = asked(tmp_path, f"tls: {{certificate: '{tmp_path}/nowhere.pem'}}\n")
    assert (code, found["tls"][0]) == (1, "problem") and "cannot read" in found["tls"][1]


@pytest.mark.parametrize(
    ("says", "code", "told"),
    [
        ("NVIDIA H200, 143771, 143160, 570.86.15", 0, {"cuda:0": "NVIDIA H200, 143160 of 143771 MiB free, driver 570.86.15"}),
        ("NVIDIA GB10, [N/A], [N/A], 580.95.05", 0, {"cuda:0": "NVIDIA GB10, driver 580.95.05"}),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, {"nvidia": "NVIDIA-SMI has failed"}),
    ],
)
def test_accelerators_are_told_as_their_tool_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int, told: dict[str, str]
) -> None:
    tool = tmp_path / "nvidia-smi"  # a stand-in that says what the real one does on such machines
    tool.write_text(f'#!/bin/sh\necho "{says}"\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    exit_code, findings = doctor()
    assert exit_code == 0
    for name, detail in told.items():
        assert finding(findings, name)["detail"].startswith(detail)
    if code == 0 and torch.version.cuda is None:
        assert finding([each for each in findings if each["area"] == "accelerators"], "torch")["state"] == "note"
