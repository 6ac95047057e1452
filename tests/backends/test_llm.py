"""The engine's thread: prompts in from an event loop's side, pieces of answers out, and nothing lost on the way."""

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from fairlead.backends.llm import BACKEND, LlmThread
from fairlead.core.errors import (
    ContextExceeded,
    FairleadError,
    InvalidRequest,
    LoadError,
    NotFound,
    ShuttingDown,
    Unavailable,
    Unsupported,
)
from fairlead.core.generation import Chat, Delta, Detokenize, Embed, Generate, KvShare, Message, Prompt, Sampling, Tokenize
from fairlead.core.specs import InstancesSpec, LlmSpec, ModelSpec
from tests.llm.adapters import tiny_adapter
from tests.llm.tiny import tiny_checkpoint

GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
HELLO = Chat(messages=[Message(role="user", content="hello")])
SPEC = LlmSpec(dtype="float32", kernels="torch")
SECONDS = 30.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


class Running:
    """An engine on its thread, asked as a replica asks it."""

    def __init__(self, engine: LlmThread) -> None:
        self.engine = engine
        self.answers: queue.Queue[tuple[int, Delta | FairleadError]] = queue.Queue()
        self.thread = threading.Thread(target=engine.run, args=(self._deliver,))
        self.thread.start()

    def _deliver(self, answers: list[tuple[int, Delta | FairleadError]]) -> None:
        for answer in answers:
            self.answers.put(answer)

    def submit(self, work: int, prompt: Prompt) -> None:
        self.engine.submit(work, prompt, priority=0, arrived=time.perf_counter(), deadline=0.0)

    def ask(self, prompt: Prompt) -> Any:
        self.submit(1, prompt)
        work, answer = self.answers.get(timeout=SECONDS)
        assert work == 1
        if isinstance(answer, FairleadError):
            raise answer
        return answer

    def ask_past_others(self, work: int, prompt: Prompt) -> Any:
        """The answer to `work`, past what is left of others."""
        self.submit(work, prompt)
        while True:
            other, answer = self.answers.get(timeout=SECONDS)
            if other == work:
                if isinstance(answer, FairleadError):
                    raise answer
                return answer

    def close(self) -> None:
        self.engine.close()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture(params=["off", "on"])
def running(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """With a step in flight when it is closed, or none."""
    spec = structs.replace(SPEC, overlap=request.param)
    running = Running(BACKEND.load_engine(checkpoint, ModelSpec(name="m", llm=spec), 1))
    yield running
    running.close()


def test_each_form_of_prompt_is_answered(running):
    chat = running.ask(Generate(chat=HELLO, sampling=GREEDY))
    ids = running.ask(Tokenize(chat=HELLO)).token_ids
    assert chat.usage.prompt_tokens == len(ids) and len(chat.token_ids) == 6
    assert running.ask(Generate(token_ids=ids, sampling=GREEDY)).text == chat.text
    text = running.ask(Detokenize(token_ids=ids)).text
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert running.ask(Generate(text=text, add_special_tokens=False, sampling=GREEDY)).text == chat.text
    assert running.ask(Tokenize(text="hello")).tokens[0] == "<s>"
    assert running.ask(Tokenize(text="hello", add_special_tokens=False)).token_ids == running.ask(Tokenize(text="hello")).token_ids[1:]


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        (Generate(text="a " * 400), ContextExceeded, "maximum context length is 256"),
        (Generate(token_ids=[]), InvalidRequest, "empty"),
        (Detokenize(token_ids=[9999]), InvalidRequest, "vocabulary of 512"),
        (Embed(text="x"), Unsupported, "does not embed"),
    ],
)
def test_what_is_wrong_comes_back_as_its_error(running, prompt, error, said):
    with pytest.raises(error, match=said):
        running.ask(prompt)
    assert len(running.ask(Generate(chat=HELLO, sampling=GREEDY)).token_ids) == 6


def test_a_cancelled_request_says_nothing_more_and_frees_its_memory(running):
    running.submit(1, Generate(chat=HELLO, sampling=Sampling(max_tokens=200, ignore_eos=True), stream=True))
    running.answers.get(timeout=SECONDS)
    running.engine.cancel(1)
    assert len(running.ask_past_others(2, Generate(chat=HELLO, sampling=GREEDY)).token_ids) == 6
    stats = running.engine.stats()
    assert stats.num_running == 0 and stats.num_free_blocks == stats.num_blocks


def test_a_text_that_takes_long_to_read_holds_up_no_step(running, monkeypatch):
    # Given a text that the tokenizer is not done with
    read, reads, encode = threading.Event(), threading.Event(), running.engine.tokenizer.encode

    def slow(text: str, **options: bool) -> list[int]:
        reads.set()
        assert read.wait(SECONDS)
        return encode(text, **options)

    monkeypatch.setattr(running.engine.tokenizer, "encode", slow)
    long = Sampling(max_tokens=200, ignore_eos=True)
    running.submit(1, Generate(token_ids=[5, 6, 7], sampling=long))
    running.submit(2, Generate(text="a long text", sampling=long))
    assert reads.wait(SECONDS)
    # Then what computes goes on to its end
    work, answer = running.answers.get(timeout=SECONDS)
    assert work == 1 and len(answer.token_ids) == 200
    # When its caller leaves before it was read, it is never computed
    running.engine.cancel(2)
    read.set()
    assert len(running.ask(Generate(text="hello", sampling=GREEDY)).token_ids) == 6
    assert running.engine.stats().finished == {"length": 2}


def test_adapters_take_turns_in_a_budget_for_one(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path)
    for seed, name in enumerate(("one", "two")):
        tiny_adapter(checkpoint, name, seed=seed, r=4, target_modules=["q_proj"])
    spec = ModelSpec(name="m", llm=structs.replace(SPEC, lora_bytes=2 * 4 * (64 + 64) * 4))
    running = Running(BACKEND.load_engine(checkpoint, spec, 1))
    try:
        # Each finds room once the other's request has ended, however it has
        for name in ("one", "two", "one"):
            assert len(running.ask(Generate(chat=HELLO, sampling=GREEDY, adapter=name)).token_ids) == 6
        running.submit(2, Generate(chat=HELLO, sampling=Sampling(max_tokens=200, ignore_eos=True), stream=True, adapter="one"))
        running.answers.get(timeout=SECONDS)
        with pytest.raises(Unavailable, match="finds no room"):
            running.ask_past_others(3, Generate(chat=HELLO, sampling=GREEDY, adapter="two"))
        running.engine.cancel(2)
        running.ask_past_others(4, Generate(chat=HELLO, sampling=GREEDY))
        with pytest.raises(ContextExceeded):
            running.ask(Generate(chat=HELLO, sampling=Sampling(max_tokens=999), adapter="one"))
        assert running.ask(Generate(chat=HELLO, sampling=GREEDY, adapter="two")).usage.completion_tokens == 6
        with pytest.raises(NotFound):
            running.ask(Generate(chat=HELLO, sampling=GREEDY, adapter="three"))
        stats = running.engine.stats()
        assert (stats.num_adapters, stats.num_adapter_loads, stats.num_adapter_evictions) == (1, 4, 3)
    finally:
        running.close()


def test_closing_ends_what_is_left(running):
    for work in range(3):
        running.submit(work, Generate(chat=HELLO, sampling=Sampling(max_tokens=200, ignore_eos=True)))
    running.close()
    ends = [running.answers.get_nowait() for _ in range(3)]
    assert {work for work, _ in ends} == {0, 1, 2} and all(isinstance(answer, ShuttingDown) for _, answer in ends)


def test_what_the_engine_was_built_of_is_told(running):
    info = running.engine.info
    assert (info.tasks, info.max_model_len, info.vocab_size, info.has_chat_template) == (("generate", "tokenize"), 256, 512, True)
    assert any("torch kernels" in line for line in info.explain) and any("KV memory" in line for line in info.explain)


def test_kv_memory_that_holds_no_sequence_is_refused(checkpoint):
    with pytest.raises(LoadError, match="cannot hold one sequence of 200 tokens"):
        BACKEND.load_engine(checkpoint, ModelSpec(name="m", llm=LlmSpec(kv_cache_bytes=20_000, max_model_len=200)), 1)
    small = BACKEND.load_engine(checkpoint, ModelSpec(name="m", llm=LlmSpec(kv_cache_bytes=60_000, dtype="float32", kernels="torch")), 1)
    assert small.info.max_model_len == 96 and any("bounded to 96" in line for line in small.info.explain)


def test_instances_divide_the_free_memory_of_the_container(checkpoint, monkeypatch):
    # Given a container that has less left than the machine
    monkeypatch.setattr("fairlead.llm.build.cgroup_free_bytes", lambda: 4 << 20)
    blocks = {}
    for count in (1, 4):
        spec = ModelSpec(name="m", llm=SPEC, instances=InstancesSpec(count=count))
        blocks[count] = BACKEND.load_engine(checkpoint, spec, 1).info.num_kv_blocks
    # Then a quarter of it, 1 MiB, is theirs together: blocks of 32 tokens in 2 layers of 2 heads of 16 float32 for K and for V
    assert blocks == {1: (1 << 20) // (32 * 2 * 2 * 2 * 16 * 4), 4: (1 << 18) // (32 * 2 * 2 * 2 * 16 * 4)}


def test_what_the_server_leaves_to_it_is_all_that_it_takes(checkpoint):
    block = 32 * 2 * 2 * 2 * 16 * 4

    def load(kv, **llm):
        spec = ModelSpec(name="m", llm=LlmSpec(**{"dtype": "float32", "kernels": "torch", **llm}))
        return BACKEND.load_engine(checkpoint, spec, 1, kv=kv).info

    assert load(KvShare(20 * block + 1, 90 * block, "half")).num_kv_blocks == 20
    # One sequence of 256 tokens takes 8 blocks, and may have more than its share
    whole = load(KvShare(3 * block, 8 * block, "half of what is left"))
    assert (whole.num_kv_blocks, whole.max_model_len) == (8, 256)
    assert any("(half of what is left)" in line for line in whole.explain)
    assert load(KvShare(3 * block, 3 * block, "half")).max_model_len == 96
    with pytest.raises(LoadError, match=r"KV memory of 0 bytes \(others hold qwen 3 MiB\) cannot hold one sequence of 200 tokens"):
        load(KvShare(0, 0, "others hold qwen 3 MiB"), max_model_len=200)


def test_a_device_that_would_not_be_used_is_refused(checkpoint):
    with pytest.raises(LoadError, match="`instances.device: cuda` cannot be heeded"):
        BACKEND.load_engine(checkpoint, ModelSpec(name="m", llm=SPEC, instances=InstancesSpec(device="cuda")), 1)
