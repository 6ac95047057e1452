"""`fairlead ui` as somebody at a terminal has it: a checkpoint becomes a page."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fairlead.cli import cli
from fairlead.core.errors import FairleadError
from tests.servers import IDENTITY, serving, write_model


def asked(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["ui", "--no-browser", *map(str, arguments)])


def test_a_path_becomes_a_page_until_it_is_ended(tmp_path: Path) -> None:
    write_model(tmp_path, "identity", IDENTITY)
    command = [sys.executable, "-m", "fairlead", "ui", str(tmp_path / "identity"), "--port", "0", "--no-browser", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            links = json.loads(process.stdout.readline())
            assert links["model"] == "identity" and not links["share"]
            with urllib.request.urlopen(links["url"].partition("#")[0], timeout=20) as page:
                assert "script-src 'self'" in page.headers["content-security-policy"]
            tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
            body = json.dumps({"inputs": [tensor]}).encode()
            with urllib.request.urlopen(f"{links['api']}/v2/models/identity/infer", body, timeout=20) as answer:
                assert json.loads(answer.read())["outputs"][0]["data"] == [1, 2, 3, 4]
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_name_opens_the_playground_of_a_running_server(tmp_path: Path) -> None:
    write_model(tmp_path, "identity", IDENTITY)
    with serving(tmp_path) as server:
        server.begin()
        found = asked("identity", "--url", server.ops, "--json")
        assert json.loads(found.output) == {"model": "identity", "url": f"{server.ops}/ui/playground?model=identity"}
        assert asked("identity", "--url", server.ops).output == f"identity is at {server.ops}/ui/playground?model=identity\n"
        wrong = asked("nobody", "--url", server.ops)
        assert isinstance(wrong.exception, FairleadError)
        assert wrong.exception.message == f"'nobody' is neither a path here nor a model of {server.ops}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("here", "--guests", "3"), "--guests needs --share-on-lan"),
        (("nobody", "--share-on-lan"), "'nobody' is no path here"),
        (("nobody", "--port", "9000"), "'nobody' is no path here"),
    ],
)
def test_nothing_is_taken_and_then_ignored(arguments: tuple[str, ...], said: str) -> None:
    found = asked(*arguments)
    assert found.exit_code == 2 and said in found.output
