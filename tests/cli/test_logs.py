"""`fairlead logs` on a real server: lines of all its processes, levels that reach all of them, texts of a sample."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fairlead.cli.demo_models
from tests.servers import Serving, serving, write_model

CHAT = Path(fairlead.cli.demo_models.__file__).parent / "tiny" / "chat"

TALKS = """
import numpy as np, structlog
log = structlog.get_logger("fairlead.replica")

class Model:
    example = {"input": np.zeros((1, 4), np.float32)}

    def infer(self, inputs):
        log.debug("thinking", prompt="my illness")
        print("printed by the model\\x1b[31m")
        return {"output": inputs["input"]}
"""


def fairlead(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fairlead", *arguments], capture_output=True, text=True, timeout=60)


def logs(server: Serving, *arguments: str) -> list[dict[str, Any]]:
    done = fairlead("logs", "--url", server.ops, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_lines_of_replicas_are_whole_and_levels_reach_them_and_those_that_come_after(tmp_path: Path) -> None:
    write_model(tmp_path / "models", "talks", TALKS, spec="")
    config = tmp_path / "fairlead.yaml"
    config.write_text("logs: {levels: {runtime: warning}}\n")
    with serving(tmp_path / "models", "--config", config) as server:
        server.begin()
        assert server.infer("talks", [1, 2, 3, 4])[0] == 200
        server.wait_for("printed")
        before = logs(server, "--room", "replica")
        assert {line["line"] for line in before} == {"printed by the model\x1b[31m"}
        assert {(line["model"], line["room"], line["level"]) for line in before} == {("talks", "replica.printed", "info")}
        pid = before[0]["pid"]
        assert pid != server.process.pid
        assert not [line for line in logs(server) if line["room"] == "runtime"]  # it says less, as the file wants

        told = fairlead("logs", "levels", "replica=debug", "--for", "10m", "--url", server.ops)
        assert told.returncode == 0 and re.search(r"replica +│ debug +│ (600|59\d) s", told.stdout)
        assert server.infer("talks", [1, 2, 3, 4])[0] == 200
        thought = server.wait_for("thinking")
        assert (thought["pid"], thought["model"], thought["prompt"], thought["level"]) == (pid, "talks", "[TEXT of 10]", "debug")

        subprocess.run(["kill", "-9", str(pid)], check=True)
        again = server.wait_for("thinking")  # another process's warm-up
        assert again["pid"] != pid

        shown = fairlead("logs", "--url", server.ops, "--level", "debug", "--limit", "500")
        assert "thinking" in shown.stdout and "\x1b" not in re.sub(r"\x1b\[\d*m", "", shown.stdout)
        assert "\x1b[31mprinted" not in shown.stdout and "printed by the model\\u001b[31m" in shown.stdout


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path) -> None:
    for arguments, said in (
        (("logs", "levels", "gateway=loud"), "is not ROOM=LEVEL"),
        (("logs", "levels", "--for", "10m"), "--for needs a ROOM=LEVEL"),
        (("logs", "levels", "gateway=debug", "--for", "soon"), "is no span"),
        (("logs", "--url", "http://127.0.0.1:1"), "no answer from"),
    ):
        done = fairlead(*arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    config = tmp_path / "fairlead.yaml"
    config.write_text("logs: {levels: {gatway: debug}}\n")
    write_model(tmp_path / "models", "talks", TALKS)
    failed = fairlead("serve", str(tmp_path / "models"), "--config", str(config), "--port", "0", "--grpc-port", "0", "--ops-port", "0")
    assert failed.returncode == 2 and "logs.levels: there is no room 'gatway'" in failed.stderr


def test_texts_of_a_sample_are_one_line_more_and_no_request_is_different_for_it(tmp_path: Path) -> None:
    write_model(tmp_path / "models", "talks", TALKS)
    config = tmp_path / "fairlead.yaml"
    config.write_text("logs: {bodies: {share: 1.0, models: [chat, talks]}}\n")
    with serving(tmp_path / "models", CHAT, "--config", config) as server:
        server.begin()
        body = {
            "model": "chat",
            "messages": [{"role": "user", "content": "Hello, I am ann@example.com"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        status, answer = server.get("/v1/chat/completions", body=body, headers={"x-request-id": "mine-1"})
        assert status == 200
        line = server.wait_for("body")
        assert (line["request_id"], line["model"], line["version"], line["room"]) == ("mine-1", "chat", "1", "gateway.bodies")
        assert line["asked"] == ["Hello, I am [EMAIL]"]
        assert line["answered"] == answer["choices"][0]["message"]["content"]
        assert server.infer("talks", [1, 2, 3, 4])[1]["outputs"][0]["data"] == [1, 2, 3, 4]
        assert server.terminate() == 0
        assert not [each for each in map(str, server.said) if '"event":"body"' in each and '"model":"talks"' in each]
