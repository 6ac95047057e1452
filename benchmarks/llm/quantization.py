"""What int8 does: answers of the small trained model with `llm.quantization` off and int8, and the speed of both in one run.

python make_models.py M; python quantization.py                    (the project's environment, from this folder)
python quantization.py --model models/S-bf16 --turns 5 --skip-accuracy

Both engines are loaded at once and take turns, workload by workload; what is told of speed is the median of the turns' ratios.
"""

import argparse
import os
import time
from itertools import count
from pathlib import Path
from statistics import median

import psutil
from workloads import WORKLOADS, measure, vocab_size_of

from fairlead.cli.demo_models.tiny.checks import CHAT, CHECKS, check, held_out
from fairlead.core.errors import FairleadError
from fairlead.core.generation import Chat, EngineInfo, Message, Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm.build import build_generator

WAYS = ("off", "int8")
NUMBERS = count()


class Engine:
    """One way of serving a checkpoint."""

    def __init__(self, folder: Path, spec: LlmSpec) -> None:
        began, before = time.perf_counter(), psutil.Process().memory_info().rss
        self.engine, self.tokenizer, self.info = build_generator(folder, spec, threads=len(os.sched_getaffinity(0)))
        self.seconds, self.memory = time.perf_counter() - began, psutil.Process().memory_info().rss - before

    def generate(self, prompts: list[list[int]], output: int) -> list[int]:
        sampling = Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)
        return [len(answer) for answer in self._answers(prompts, sampling)]

    def texts(self, chats: list[Chat]) -> list[str]:
        answers = self._answers([self.tokenizer.encode_chat(chat) for chat in chats], Sampling(max_tokens=128, temperature=0.0))
        return [self.tokenizer.decode(answer) for answer in answers]

    def _answers(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        got: dict[int, list[int]] = {next(NUMBERS): [] for _ in prompts}
        for number, prompt in zip(got, prompts, strict=True):
            self.engine.add(number, prompt, sampling, stream=False)
        while self.engine.has_work:
            for number, delta in self.engine.step():
                if isinstance(delta, FairleadError):
                    raise delta
                got[number] += delta.token_ids
        return list(got.values())


def accuracy(options: argparse.Namespace) -> None:
    examples = [example for task in CHECKS for example in held_out(task)]
    chats = [Chat(messages=[Message(**message) for message in one.messages], tools=one.tools or []) for one in examples]
    right: dict[str, list[bool]] = {}
    for way in WAYS:
        engine = Engine(options.accuracy_model, LlmSpec(quantization=way, dtype=options.dtype))
        tell(engine.info, way)
        right[way] = [check(one, text) for one, text in zip(examples, engine.texts(chats), strict=True)]
    print(f"\n| task | questions | {' | '.join(WAYS)} |\n|---|---|{'---|' * len(WAYS)}")
    for task in CHECKS:
        of_task = [i for i, one in enumerate(examples) if one.task == task]
        print(f"| {task} | {len(of_task)} | {' | '.join(f'{sum(right[way][i] for i in of_task) / len(of_task):.1%}' for way in WAYS)} |")
    shares = [sum(right[way]) / len(examples) for way in WAYS]
    print(f"| all | {len(examples)} | {' | '.join(f'{share:.2%}' for share in shares)} |")
    print(f"\npoints lost: {100 * (shares[0] - shares[1]):.2f}")


def speed(options: argparse.Namespace) -> None:
    spec = {"max_model_len": 2048, "kv_cache_bytes": 1 << 30}
    engines = {way: Engine(options.model, LlmSpec(quantization=way, **spec)) for way in WAYS}
    for way, engine in engines.items():
        tell(engine.info, way)
        print(f"{way}: loaded in {engine.seconds:.1f} s, {engine.memory / 2**20:.0f} MiB resident")
    vocab_size = vocab_size_of(options.model)
    print(f"\n| workload | {' | '.join(WAYS)} | times |\n|---|---|---|---|")
    for name in options.workloads:
        turns = []
        for turn in range(options.turns):
            # who goes first changes from turn to turn
            order = WAYS if turn % 2 else WAYS[::-1]
            turns.append({way: measure(engines[way].generate, name, vocab_size, seed=7919 * turn + 1) for way in order})
        ratios = [turn["off"] / turn["int8"] if WORKLOADS[name].lower_is_better else turn["int8"] / turn["off"] for turn in turns]
        medians = " | ".join(f"{median(turn[way] for turn in turns):.1f}" for way in WAYS)
        print(f"| {WORKLOADS[name].title} ({WORKLOADS[name].unit}) | {medians} | {median(ratios):.2f} |", flush=True)


def tell(info: EngineInfo, way: str) -> None:
    print(f"{way}: {'; '.join(line for line in info.explain if line.startswith(('quantization', 'decoder')))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "models" / "M-bf16", help="whose speed is measured")
    parser.add_argument("--accuracy-model", type=Path, default=CHAT)
    parser.add_argument("--dtype", default="auto", help="of the accuracy model's computations")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workloads", nargs="*", default=["single", "batch32", "prefill"], choices=list(WORKLOADS))
    parser.add_argument("--skip-accuracy", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    options = parser.parse_args()
    if not options.skip_accuracy:
        accuracy(options)
    if not options.skip_speed:
        speed(options)


if __name__ == "__main__":
    main()
