"""What is asked of every engine, and the loop in which an engine's process answers. Standard library only: it runs in every environment.

An offline driver loads its engine and calls `serve_workloads(generate, model)`: a line of JSON comes in on stdin with the name of a
workload and a seed, a line with the number measured goes out. So all engines can be loaded at once and take turns.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Generate = Callable[[list[list[int]], int], list[int]]
"""(prompts, number of tokens to generate for each, greedily, without stopping earlier) -> how many tokens each got."""

NUM_SPECIAL = 300
"""Token ids below are special ones and single bytes; prompts are made of the others."""


class Workload(NamedTuple):
    """`num` prompts of `shared` common and then `own` tokens, `output` tokens generated for each."""

    title: str
    unit: str
    num: int
    shared: int
    own: int
    output: int
    warm: bool = False
    """Whether a prompt with the common tokens has been answered before the clock starts."""
    lower_is_better: bool = False


WORKLOADS = {
    "single": Workload("single stream, decode", "tok/s", 1, 0, 128, 64),
    "batch32": Workload("batch 32 x (128 -> 64)", "tok/s", 32, 0, 128, 64),
    "prefill": Workload("prefill 1 x 1024", "tok/s", 1, 0, 1024, 1),
    "shared": Workload("8 x (512 shared + 64) -> 16", "s", 8, 512, 64, 16, lower_is_better=True),
    "first": Workload("the same, prefix known -> 1", "s", 8, 512, 64, 1, warm=True, lower_is_better=True),
}


def prompts(workload: Workload, vocab_size: int, seed: int) -> list[list[int]]:
    """Other tokens with every seed, so that no prefix cache knows them from an earlier run."""
    draw = random.Random(seed)
    shared = draw.choices(range(NUM_SPECIAL, vocab_size), k=workload.shared)
    return [shared + draw.choices(range(NUM_SPECIAL, vocab_size), k=workload.own) for _ in range(workload.num)]


def measure(generate: Generate, name: str, vocab_size: int, seed: int) -> float:
    """Tokens a second, or seconds."""

    def seconds(asked: list[list[int]], output: int) -> float:
        started = time.perf_counter()
        got = generate(asked, output)
        took = time.perf_counter() - started
        assert got == [output] * len(asked), f"{output} tokens asked for {len(asked)} times, got {got}"
        return took

    workload = WORKLOADS[name]
    draw = random.Random(-seed)
    asked = prompts(workload, vocab_size, seed)
    seconds([draw.choices(range(NUM_SPECIAL, vocab_size), k=16)], 2)  # awake
    if name == "single":  # without the prompt's share
        other = prompts(workload, vocab_size, seed + 500_000)
        return (workload.output - 1) / (seconds(asked, workload.output) - seconds(other, 1))
    if name == "prefill":
        return workload.own / seconds(asked, 1)
    if workload.warm:
        seconds([asked[0][: workload.shared] + draw.choices(range(NUM_SPECIAL, vocab_size), k=workload.own)], 1)
    took = seconds(asked, workload.output)
    return took if workload.lower_is_better else workload.num * workload.output / took


def vocab_size_of(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["vocab_size"]


def answers() -> Callable[..., None]:
    """A function that writes one line for bench.py. What libraries print goes to stderr from here on."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=out, flush=True)

    return answer


def serve_workloads(generate: Generate, model: Path, answer: Callable[..., None]) -> None:
    """Ready when one prompt has been answered; ends with stdin."""
    vocab_size = vocab_size_of(model)
    generate([[NUM_SPECIAL, NUM_SPECIAL + 1]], 2)
    answer(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer(value=measure(generate, request["workload"], vocab_size, request["seed"]))
