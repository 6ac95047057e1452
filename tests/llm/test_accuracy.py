"""What the optimisations do to answers that can be checked: the small trained model, with each of them on and off."""

from functools import cache
from typing import Any

import pytest

from fairlead.cli.demo_models.tiny.checks import CHAT, CHECKS, Example, check, held_out
from fairlead.core.errors import FairleadError
from fairlead.core.generation import Chat, Message, Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm.build import build_generator

PER_TASK = 5
FLOOR = 0.85


@cache
def examples() -> list[Example]:
    return [example for task in CHECKS for example in held_out(task)[:PER_TASK]]


def answers(**changes: Any) -> list[str]:
    """The engine's greedy answers to all examples, asked at once."""
    engine, tokenizer, _ = build_generator(CHAT, LlmSpec(**{"dtype": "float32", "max_num_seqs": 32, **changes}))
    texts = {}
    for id, example in enumerate(examples()):
        chat = Chat(messages=[Message(**message) for message in example.messages], tools=example.tools or [])
        engine.add(id, tokenizer.encode_chat(chat), Sampling(temperature=0.0, max_tokens=120), stream=False)
    while engine.has_work:
        for id, answer in engine.step():
            assert not isinstance(answer, FairleadError)
            texts[id] = answer.text
        engine.scheduler.check_integrity()
    return [texts[id] for id in range(len(texts))]


@cache
def plain() -> list[str]:
    """With nothing that makes it fast."""
    return answers(decoder="graph", kernels="torch", prefix_caching=False)


def accuracy(texts: list[str]) -> float:
    return sum(check(example, text) for example, text in zip(examples(), texts, strict=True)) / len(texts)


def test_the_plain_engine_answers_as_the_model_was_taught():
    assert accuracy(plain()) >= FLOOR


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"decoder": "graph", "kernels": "torch"}, id="prefix cache"),
        pytest.param({"decoder": "graph", "kernels": "native"}, id="native attention"),
        pytest.param({"decoder": "lean", "kernels": "torch"}, id="lean decoder"),
        pytest.param({}, id="everything"),
        pytest.param({"max_batch_tokens": 40, "kv_cache_bytes": 3 << 20}, id="small steps, a small pool"),
    ],
)
def test_no_optimisation_changes_an_answer_in_float32(changes):
    assert answers(**changes) == plain()


def test_bfloat16_answers_as_well():
    assert accuracy(answers(dtype="bfloat16")) >= FLOOR


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_answers_as_well(dtype):
    assert accuracy(answers(dtype=dtype, quantization="int8")) >= FLOOR
