"""Fairlead's engine, offline: python bench_fairlead.py MODEL [KEY=VALUE of the llm section]...    (the project's environment)"""

import os
import sys
from itertools import count
from pathlib import Path

import msgspec
from workloads import answers, serve_workloads

answer = answers()
from fairlead.core.errors import FairleadError  # noqa: E402
from fairlead.core.generation import Sampling  # noqa: E402
from fairlead.core.specs import LlmSpec  # noqa: E402
from fairlead.llm.build import build_generator  # noqa: E402

folder = Path(sys.argv[1])
spec = msgspec.convert(dict(argument.split("=") for argument in sys.argv[2:]), LlmSpec, strict=False)
engine, _, info = build_generator(folder, spec, threads=len(os.sched_getaffinity(0)))
print(*info.explain, sep="\n", file=sys.stderr)
numbers = count()


def generate(prompts: list[list[int]], output: int) -> list[int]:
    sampling = Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)
    got = {next(numbers): 0 for _ in prompts}
    for number, prompt in zip(got, prompts, strict=True):
        engine.add(number, prompt, sampling, stream=False)
    while engine.has_work:
        for number, delta in engine.step():
            if isinstance(delta, FairleadError):
                raise delta
            got[number] += len(delta.token_ids)
    return list(got.values())


serve_workloads(generate, folder, answer)
