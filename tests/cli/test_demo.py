"""`fairlead demo`: the real command, its real models and its real server."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from fairlead.backends import BACKENDS, detect
from fairlead.cli import cli
from fairlead.cli.demo import RECIPES, DemoModel, build, free_ports
from fairlead.cli.demo_models.digits.pictures import PIXELS
from fairlead.core.errors import ConfigError
from fairlead.core.specs import ModelSpec

COMMAND = [sys.executable, "-m", "fairlead", "demo"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DemoModel]]:
    folder = tmp_path_factory.mktemp("demo") / "models"
    return folder, build(folder, lambda name, done, total: None)


@pytest.fixture(scope="module")
def told(built: tuple[Path, list[DemoModel]]) -> dict[str, Any]:
    """What `fairlead demo --json` says."""
    done = subprocess.run([*COMMAND, "--models", built[0], "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


class Terminal:
    """A command attached to a terminal, as a person would run it."""

    def __init__(self, *command: object) -> None:
        self.screen, inside = pty.openpty()
        environment = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
        self.process = subprocess.Popen([*map(str, command)], stdin=inside, stdout=inside, stderr=inside, env=environment)
        os.close(inside)
        self.shown = b""
        self.ended = False
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        while not self.ended:
            try:
                part = os.read(self.screen, 65536)
            except OSError:  # nobody writes to it any more
                part = b""
            with self.changed:
                self.shown += part
                self.ended = not part
                self.changed.notify_all()

    def read_until(self, words: str) -> str:
        """Everything shown so far, once `words` are among it."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or words.encode() in self.shown, timeout=120)
        text = self.shown.decode(errors="ignore").replace("\r\n", "\n")
        assert words in text, text
        return text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
        self.reader.join()
        os.close(self.screen)


@pytest.fixture(scope="module")
def terminal(built: tuple[Path, list[DemoModel]]) -> Iterator[Terminal]:
    terminal = Terminal(*COMMAND, "--models", built[0])
    yield terminal
    terminal.close()


def things_to_try(screen: str) -> dict[str, str]:
    """The blocks under the table: a title, then lines for a shell."""
    blocks = re.findall(r"^# (.+)\n((?:.+\n)+)", screen, re.MULTILINE)
    return dict(blocks)


def test_it_builds_a_repository_of_every_kind_and_each_model_learnt_something(built: tuple[Path, list[DemoModel]]) -> None:
    folder, models = built
    assert [model.name for model in models] == list(RECIPES)
    kinds = {detect(folder / name / "1", ModelSpec(name=name))[0].name for name in RECIPES}
    assert kinds == {kind.name for kind in BACKENDS.values() if not kind.external} - {"torch_export"}
    scores = {model.name: [float(number) for number in re.findall(r"[\d.]+", model.score)] for model in models}
    for name in ("tumour_xgboost", "tumour_lightgbm", "wine_catboost", "digits_onnx"):
        assert scores[name][0] > 90, name
    off, guessing = scores["diabetes_sklearn"]
    assert off < 0.75 * guessing
    assert scores["denoise_torchscript"][0] > 50
    assert scores["search_python"][0] > 60
    assert 85 < scores["confidence_python"][0] <= 100
    assert scores["assistant_llm"][0] > 75
    assert scores["moderation"][0] > 70
    assert scores["picture_moderation"][0] > 95
    assert scores["digits"][0] >= 80


def test_building_again_uses_what_is_there(built: tuple[Path, list[DemoModel]]) -> None:
    folder, models = built
    steps: list[str] = []
    assert build(folder, lambda name, done, total: steps.append(name)) == models
    assert steps == []


def test_it_does_not_touch_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something that is not a demo's"):
        build(tmp_path, lambda name, done, total: None)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_build_only_says_how_to_serve_it(built: tuple[Path, list[DemoModel]]) -> None:
    result = CliRunner().invoke(cli, ["demo", "--build", str(built[0])])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in RECIPES)
    assert f"fairlead serve {built[0]}" in result.output


def test_every_model_answers_its_question(built: tuple[Path, list[DemoModel]], told: dict[str, Any]) -> None:
    answers = {row["name"]: row for row in told["models"]}
    assert list(answers) == list(RECIPES)
    for name in ("tumour_xgboost", "tumour_lightgbm", "wine_catboost", "digits_onnx", "moderation", "picture_moderation"):
        assert answers[name]["answer"].startswith(answers[name]["truth"] + " ("), answers[name]
    assert abs(float(answers["diabetes_sklearn"]["answer"].split()[-1]) - float(answers["diabetes_sklearn"]["truth"])) < 150
    assert "SimpleImputer" in answers["search_python"]["answer"]
    assert answers["confidence_python"]["answer"].endswith("in 8 responses")
    assert answers["embed_minilm"]["answer"].startswith(answers["embed_minilm"]["truth"])
    assert json.loads(answers["assistant_llm"]["answer"]).keys() == json.loads(answers["assistant_llm"]["truth"]).keys()
    with Image.open(answers["digits"]["picture"]) as picture:
        assert picture.size == (PIXELS, PIXELS)
    assert all(0 < row["latency"] < 60 for row in told["models"])


def test_without_a_terminal_it_ends_and_leaves_no_server_behind(told: dict[str, Any]) -> None:
    host, port = told["http"].split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0


TOOLS = (
    "image",
    "chat",
    "curl, a chat",
    "OpenAI's SDK",
    "curl",
    "curl, a stream",
    "tritonclient, HTTP",
    "tritonclient, gRPC",
    "Python",
    "why the slowest requests were slow",
    "the gates of a version",
)


@pytest.mark.parametrize("tool", TOOLS)
def test_what_it_says_to_try_works_as_it_stands(terminal: Terminal, tool: str) -> None:
    lines = things_to_try(terminal.read_until("Ctrl-C ends it"))[tool]
    done = subprocess.run(["sh", "-c", lines], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    match tool:
        case "image":
            file = Path(done.stdout.split()[0])
            with Image.open(file) as picture:
                assert picture.size == (PIXELS, PIXELS)
            file.unlink()
        case "why the slowest requests were slow":
            assert "digits" in done.stdout
        case "the gates of a version":
            assert done.stdout.strip().endswith("diabetes_sklearn@1 may serve")
        case "chat":
            assert done.stdout.strip().endswith("579")
        case "curl, a chat":
            chunks = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: {")]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            assert text.endswith("42") and done.stdout.strip().endswith("data: [DONE]")
        case "OpenAI's SDK":
            assert done.stdout.strip() == "3, 7, 19, 42"
        case "curl":
            (output,) = json.loads(done.stdout)["outputs"]
            assert output["shape"] == [1]
            assert 25 < output["data"][0] < 350
        case "curl, a stream":
            events = [json.loads(line.removeprefix("data: ")) for line in done.stdout.splitlines() if line]
            assert [event["num_resamples"] for event in events] == [250 * n for n in range(1, 9)]
        case "Python":
            assert "DBSCAN" in done.stdout
        case _:
            # the hundredth digit is a four, by the classification extension: value:index:label
            assert re.match(r"\[\[b'0\.9\d+:4:4' b'0\.0\d+:\d:\d' b'0\.0\d+:\d:\d'\]\]", done.stdout)


def test_run_once_it_still_shows_what_to_try(built: tuple[Path, list[DemoModel]]) -> None:
    done = subprocess.run([*COMMAND, "--models", built[0], "--once"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"fairlead serve {built[0]}" in done.stdout
    assert things_to_try(done.stdout).keys() == set(TOOLS)
    assert "curl -s http://127.0.0.1:8000/v2/models/diabetes_sklearn/infer" in done.stdout


def test_ctrl_c_drains_the_server_and_ends_well(terminal: Terminal) -> None:
    text = terminal.read_until("Ctrl-C ends it")
    found = re.search(r"Serving at http://([\d.]+):(\d+)", text)
    assert found
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(60) == 0
    with socket.socket() as probe:
        assert probe.connect_ex((found[1], int(found[2]))) != 0


def test_a_second_demo_takes_other_ports_where_the_usual_ones_are_taken() -> None:
    holders = []
    for port in (8000, 8001, 8002):
        try:
            holders.append(socket.create_server(("127.0.0.1", port)))
        except OSError:  # taken already, which is as good
            continue
        break
    assert free_ports() == (0, 0, 0)
    for holder in holders:
        holder.close()
