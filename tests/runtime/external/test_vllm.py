"""The real one: vLLM for CPUs, started with a tiny model, asked, killed, asked again. Minutes: only where it is asked for."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from fairlead.core.generation import Generate, Sampling
from fairlead.core.request import Raw, Request
from fairlead.core.specs import EngineSpec, ModelSpec
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.loading import load_version

ENVIRONMENT = Path(__file__).parents[3] / ".engines" / "vllm"
MINUTES = 15
SPEC = ModelSpec(
    name="tiny",
    backend="vllm",
    engine=EngineSpec(
        environment=str(ENVIRONMENT),
        args=("--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager", "--dtype", "float32"),
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"},
    ),
)
pytestmark = [
    pytest.mark.skipif(not (ENVIRONMENT / ".installed").exists(), reason="vLLM is not installed: `make engines`"),
    pytest.mark.skipif(not os.environ.get("FAIRLEAD_TEST_ENGINES"), reason="takes minutes: FAIRLEAD_TEST_ENGINES=1"),
]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(MINUTES * 60):
        while not condition():
            await asyncio.sleep(0.1)


def chat(*, stream: bool) -> Request:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    raw = json.dumps(body | ({"stream": True} if stream else {})).encode()
    return Request(model="tiny", raw=Raw(path="/v1/chat/completions", body=raw, stream=stream))


async def test_a_real_one_answers_dies_and_comes_back(tmp_path: Path) -> None:
    from tests.llm.tiny import tiny_checkpoint  # needs torch, which takes a while

    tiny_checkpoint(tmp_path, head_dim=32)
    version = await load_version(SPEC, "1", tmp_path, ForkServer())
    try:

        async def answer(request: Request) -> bytes:
            async with aclosing(version.infer(request)) as pieces:
                return b"".join([piece.raw or b"" async for piece in pieces])

        whole = json.loads(await answer(chat(stream=False)))
        assert whole["model"] == "tiny" and whole["usage"]["completion_tokens"] == 5
        events = [event[6:] for event in (await answer(chat(stream=True))).split(b"\n\n") if event.startswith(b"data: ")]
        assert events[-1] == b"[DONE]"
        pieces = [choice["delta"].get("content") or "" for event in events[:-1] for choice in json.loads(event)["choices"]]
        assert "".join(pieces) == whole["choices"][0]["message"]["content"]
        prompt = Generate(text="once", sampling=Sampling(max_tokens=3, temperature=0.0, ignore_eos=True))
        async with aclosing(version.infer(Request(model="tiny", prompt=prompt))) as deltas:
            (delta,) = [response.delta async for response in deltas]
        assert delta is not None and delta.usage is not None and delta.usage.completion_tokens == 3
        pid = version.instances[0].pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not version.ready)
        await until(lambda: version.ready)
        assert version.metrics.restarts() == 1
        again = json.loads(await answer(chat(stream=False)))
        assert again["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]
    finally:
        await version.drain(5.0)
