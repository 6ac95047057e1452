"""The server as its operator sees it: started, asked, told to stop."""

import concurrent.futures
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fairlead.cli.serve import with_flags
from fairlead.core.settings import Settings
from tests.servers import IDENTITY, serving, write_model

# Answers once somebody writes to the file that it is given by `parameters`: a request in flight for as long as we like.
WAITING = """
import os
import numpy as np

class Model:
    batched = False

    def load(self, context):
        self.gate, self.begun = context.parameters["gate"], context.parameters["begun"]

    def infer(self, inputs):
        open(self.begun, "w").close()
        with open(self.gate) as gate:
            gate.read()
        return {"output": inputs["input"]}
"""
WAITING_SPEC = """
inputs: [{{name: input, datatype: FP32, shape: [1, 1]}}]
outputs: [{{name: output, datatype: FP32, shape: [1, 1]}}]
parameters: {{gate: {gate}, begun: {begun}}}
"""


def run(*arguments: object) -> tuple[int, str]:
    """(exit code, what it said) of a command that is expected to end by itself."""
    done = subprocess.run([sys.executable, "-m", "fairlead", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.strip()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "models"
    write_model(folder, "identity", IDENTITY)
    return folder


def test_a_repository_is_served_on_three_ports(root):
    with serving(root) as server:
        server.begin()
        assert server.infer("identity", [1, 2, 3, 4])[1]["outputs"][0]["data"] == [1, 2, 3, 4]
        assert server.get("/v2/health/ready") == (200, {"ready": True})
        status, metrics = server.get("/metrics", url=server.ops)
        assert status == 200
        assert 'fairlead_requests_total{model="identity",outcome="success",version="1"} 1.0' in metrics
        assert 'fairlead_responses_total{protocol="http",status="200"} 1.0' in metrics
        line = server.wait_for("request")
        assert (line["model"], line["status"], line["protocol"]) == ("identity", 200, "http")
        assert server.terminate() == 0


def test_one_bare_artefact_is_served(tmp_path):
    (tmp_path / "model.py").write_text(IDENTITY)
    with serving(tmp_path / "model.py") as server:
        server.begin()
        assert server.infer("model", [1, 2, 3, 4])[0] == 200


def test_the_callers_request_id_is_in_the_answer_and_in_the_log(root):
    with serving(root) as server:
        server.begin()
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        server.get("/v2/models/identity/infer", body={"inputs": []}, headers={"x-request-id": "abc-1", "traceparent": trace})
        line = server.wait_for("request")
        assert (line["request_id"], line["traceparent"], line["status"]) == ("abc-1", trace, 400)
        assert "missing required input(s) ['input']" in line["error"]


def test_sigterm_lets_a_request_in_flight_finish_and_exits_0(tmp_path):
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    os.mkfifo(gate)
    write_model(tmp_path / "models", "slow", WAITING, spec=WAITING_SPEC.format(gate=gate, begun=begun))
    with serving(tmp_path / "models") as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        server.begin()
        answer = pool.submit(server.infer, "slow", [7])
        _until(begun.exists)
        server.process.terminate()
        server.wait_for("draining")
        assert server.process.poll() is None
        with open(gate, "w") as opened:  # lets the model go on
            opened.write("go")
        assert answer.result(30)[1]["outputs"][0]["data"] == [7]
        assert server.process.wait(30) == 0


def test_a_request_that_outlives_the_drain_timeout_is_refused_and_the_exit_is_still_0(tmp_path):
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    os.mkfifo(gate)
    write_model(tmp_path / "models", "slow", WAITING, spec=WAITING_SPEC.format(gate=gate, begun=begun))
    with serving(tmp_path / "models", "--drain-timeout", "0.2") as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        server.begin()
        answer = pool.submit(lambda: _error(lambda: server.infer("slow", [7])))
        _until(begun.exists)
        server.process.terminate()
        assert answer.result(30) is not None
        assert server.process.wait(30) == 0


def test_no_replica_process_outlives_the_server(tmp_path):
    write_model(tmp_path / "models", "identity", IDENTITY, spec="")
    with serving(tmp_path / "models") as server:
        server.begin()
        assert server.infer("identity", [1, 2, 3, 4])[0] == 200
        pids = _descendants(server.process.pid)
        assert len(pids) >= 2, "a fork server and a replica"
        server.process.kill()
        server.process.wait(30)
        _until(lambda: not any(_alive(pid) for pid in pids))


def test_a_model_that_kills_its_process_fails_its_own_request_and_comes_back(tmp_path):
    code = IDENTITY.replace('return {"output"', 'if inputs["input"][0, 0] == 13: __import__("os").abort()\n        return {"output"')
    write_model(tmp_path / "models", "mortal", code, spec="")
    write_model(tmp_path / "models", "steady", IDENTITY)
    with serving(tmp_path / "models") as server:
        server.begin()
        status, body = server.infer("mortal", [13, 0, 0, 0])
        assert (status, body["error"].split(" while ")[0]) == (500, "model 'mortal' died (signal 6)")
        assert server.infer("steady", [1, 2, 3, 4])[0] == 200
        server.wait_for("replica started again")
        assert server.infer("mortal", [1, 2, 3, 4])[1]["outputs"][0]["data"] == [1, 2, 3, 4]
        assert 'fairlead_instance_restarts_total{model="mortal",version="1"} 1.0' in server.get("/metrics", url=server.ops)[1]


def test_a_port_that_is_taken_is_one_readable_line(root):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = run("serve", root, "--port", port, "--grpc-port", 0, "--ops-port", 0)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use. Choose another port with --port" in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to serve: name a model repository or a model"),
        (("nowhere/at/all",), "there is no model repository at nowhere/at/all"),
        (("x", "--host", "0.0.0.0"), "callers must show a key, and there is none: make one with `fairlead keys create"),
        (("x", "--config", "not-there.yaml"), "cannot read not-there.yaml: No such file or directory"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_readable_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    code, said = run("serve", *arguments, "--port", 0, "--grpc-port", 0, "--ops-port", 0)
    assert code == 2
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


def test_models_are_listed_loaded_and_unloaded_from_the_command_line(root):
    with serving(root, "--control", "explicit") as server:
        server.begin()

        def models(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "fairlead", "models", *words, "--url", server.http]
            return subprocess.run(command, capture_output=True, text=True, timeout=60)

        assert "not loaded" in models("loaded").stdout
        assert models("load", "identity").stdout == "loaded identity\n"
        assert '"state":"READY"' in models("loaded", "--json").stdout
        assert server.infer("identity", [1, 2, 3, 4])[0] == 200
        assert models("unload", "identity").returncode == 0
        failed = models("load", "nothing")
        assert failed.returncode == 2
        assert "failed to load 'nothing'" in failed.stderr
        lost = models("sleep", "identity")  # asks the port that knows no such thing
        assert lost.returncode == 2 and "answers 404. Is it the operations port of `fairlead serve`?" in lost.stderr


def test_flags_win_over_the_file():
    settings = with_flags(Settings(), ("a", "b"), {"port": 9, "log_level": "debug", "triton_metrics": True, "load": (), "open": None})
    assert settings.models.repositories == ("a", "b")
    assert (settings.listen.port, settings.listen.grpc_port) == (9, 8001)
    assert (settings.logs.level, settings.metrics.triton_names) == ("debug", True)


def _until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # between looks at another process's doings


def _error(call) -> object:
    try:
        status, body = call()
    except OSError as error:
        return error
    return body if status != 200 else None


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
