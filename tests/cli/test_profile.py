"""`fairlead profile` on a real server with a real language model, while it answers."""

import gzip
import json
import subprocess
import sys
import threading
from pathlib import Path

import fairlead.cli.demo_models
from tests.servers import Serving, serving

CHAT = Path(fairlead.cli.demo_models.__file__).parent / "tiny" / "chat"
ASKED = {"model": "chat", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32, "temperature": 0}


def answer(server: Serving) -> str:
    status, body = server.get("/v1/chat/completions", body=ASKED)
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"])


def profile(server: Serving, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairlead", "profile", "--url", server.ops, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_a_language_model_gives_the_same_tokens_while_it_is_profiled(tmp_path: Path) -> None:
    with serving(CHAT) as server:
        server.begin()
        expected, ended, answers = answer(server), threading.Event(), []

        def load() -> None:
            while not ended.is_set():
                answers.append(answer(server))

        asking = threading.Thread(target=load)
        asking.start()
        try:
            done = profile(server, "chat", "--seconds", "2", "--out", str(tmp_path), "--shapes", "--json")
        finally:
            ended.set()
            asking.join(60)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert set(answers) == {expected} and answer(server) == expected

        layers = {layer["name"]: layer["share"] for layer in found["answer"]["layers"]}
        assert found["answer"]["num_requests"] > 0 and {"prefill", "decode", "answer"} <= layers.keys()
        assert abs(sum(layers.values()) - 1.0) < 1e-6
        assert found["answer"]["bottleneck"] and found["answer"]["advice"]

        here, replica = found["processes"]
        assert here["pid"] == server.process.pid and replica["name"] == "replica 0"
        assert {each["sampler"] for each in found["processes"]} <= {"py-spy", "in-process"}
        assert "Engine.step" in replica["stacks"] and replica["memory"][0][1] > 1 << 20
        assert any(kernel["name"] == "fairlead::linear" or kernel["name"] == "aten::linear" for kernel in replica["kernels"])
        assert any(kernel["shapes"] for kernel in replica["kernels"])
        if replica["sampler"] == "py-spy":
            assert 0.0 < replica["gil_share"] <= 1.0

        assert {Path(path).name for path in found["files"]} == {
            "report.html",
            "profile.json",
            f"stacks-{here['pid']}.txt",
            f"stacks-{replica['pid']}.txt",
            f"trace-{replica['pid']}.json.gz",
        }
        trace = json.loads(gzip.decompress((tmp_path / f"trace-{replica['pid']}.json.gz").read_bytes()))
        assert len(trace["traceEvents"]) > 100
        assert "Content-Security-Policy" in (tmp_path / "report.html").read_text()

        wrong = profile(server, "nobody", "--out", str(tmp_path))
        assert wrong.returncode == 2 and "'nobody' is not found" in wrong.stderr
        wrong = profile(server, "chat", "--kind", "gpu", "--out", str(tmp_path))
        assert wrong.returncode == 2 and "choose from cpu, torch, memory" in wrong.stderr
        shown = profile(server, "chat@1", "--seconds", "1", "--kind", "memory", "--out", str(tmp_path / "other"))
        assert shown.returncode == 0 and "chat@1: 0 requests in 1 s" in shown.stdout and "no request of this model ended" in shown.stdout
