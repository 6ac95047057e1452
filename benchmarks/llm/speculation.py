"""What speculative decoding gives and costs: python benchmarks/llm/speculation.py [--only NAME...] [--rounds N] [--batch N...]

Two engines of one process take turns at every request (or few that are asked together): one with speculation, one without, each
first every other time. Such a pair shares what else the machine does. Printed is how many times as fast the first is, by the
clock and by the processor's time: of each request the median of its pairs, all requests together as long as they take; and
within what limits nine of ten such runs would find it (bootstrap over the pairs). Where the machine is busy with other work the
processor's time is the one to trust. The small chat model and its draft that ship with the package compute everything.

| workload | answers | |
|---|---|---|
| `copy` | passages of the prompt with small changes between them, as when code is edited | n-gram: 1.5 at least |
| `new` | tokens of which no two stand together twice | n-gram: 0.97 at least |
| `tasks` | what the model says: sums, lists, JSON, tool calls | n-gram: 0.97 at least; draft: 1.3 at least at batch 1 |

No small model edits code: `copy` and `new` are scripted. The model computes every token as always, then the token of the
script gets the largest logit. Both engines do so.
"""

import argparse
import gc
import random
import statistics
import time
from pathlib import Path

import torch

from fairlead.cli.demo_models.tiny import checks
from fairlead.core.errors import FairleadError
from fairlead.core.generation import Chat, Message, Sampling
from fairlead.core.specs import LlmSpec, SpeculationSpec
from fairlead.llm.batch import LayerCache, StepBatch
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine
from fairlead.llm.load import Decoder
from fairlead.llm.tokenizer import Tokenizer

FOLDER = Path(checks.__file__).parent
METHODS = {
    "off": SpeculationSpec(),
    "ngram": SpeculationSpec(method="ngram"),
    "draft": SpeculationSpec(method="draft", draft="draft"),
}
RUNS = (("copy", "ngram"), ("new", "ngram"), ("tasks", "ngram"), ("tasks", "draft"), ("new", "draft"))
PROMPT, ANSWER = 320, 192
Request = tuple[list[int], int]
Times = tuple[float, float]
"""By the clock, by the processor."""
Pair = tuple[Times, Times]
"""Without speculation, and with."""


class Scripted:
    """A decoder whose likeliest token is that of the script at each position."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.script = torch.zeros(0, dtype=torch.int64)

    def __getattr__(self, name: str) -> object:
        return getattr(self.decoder, name)

    def __call__(self, batch: StepBatch, cache: list[LayerCache]) -> torch.Tensor:
        logits_NV = self.decoder(batch, cache)
        if len(self.script):
            next_N = self.script[batch.positions_T[batch.logit_rows_N] + 1]
            logits_NV[torch.arange(len(logits_NV)), next_N] = 1000.0
        return logits_NV


def copied(numbers: random.Random, vocab: int) -> list[int]:
    """A prompt, and an answer that takes over 12 to 48 tokens at a time and changes one or two after them."""
    ids = [numbers.randrange(300, vocab) for _ in range(PROMPT)]
    place = numbers.randrange(40)
    while len(ids) < PROMPT + ANSWER:
        run = numbers.randrange(12, 48)
        ids += ids[place : place + run] + [numbers.randrange(300, vocab) for _ in range(numbers.randrange(1, 3))]
        place = (place + run + 1) % (PROMPT - 48)
    return ids


def never_twice(numbers: random.Random, vocab: int) -> list[int]:
    pairs: set[tuple[int, int]] = set()
    ids = [numbers.randrange(vocab)]
    while len(ids) < PROMPT + ANSWER + 2:
        one = numbers.randrange(vocab)
        if (ids[-1], one) not in pairs:
            pairs.add((ids[-1], one))
            ids.append(one)
    return ids


def units_of(workload: str, tokenizer: Tokenizer, batch: int) -> list[tuple[list[int], list[Request]]]:
    """Requests that are asked together, each with its script."""
    if workload == "tasks":
        examples = [example for task in checks.CHECKS for example in checks.held_out(task)[:4]]
        random.Random(0).shuffle(examples)
        chats = [Chat(messages=[Message(**message) for message in example.messages], tools=example.tools or []) for example in examples]
        asked = [(tokenizer.encode_chat(chat), 0) for chat in chats]
        return [([], asked[at : at + batch]) for at in range(0, len(asked), batch)]
    scripts = [(copied if workload == "copy" else never_twice)(random.Random(seed), tokenizer.vocab_size) for seed in range(3)]
    return [([*ids, 0], [(ids[:PROMPT], ANSWER)] * batch) for ids in scripts]


def answer(engine: Engine, script: list[int], requests: list[Request]) -> tuple[float, float, list[list[int]]]:
    """(seconds, processor seconds, tokens)"""
    engine.runner.decoder.script = torch.tensor(script, dtype=torch.int64)  # type: ignore[attr-defined]
    tokens: list[list[int]] = [[] for _ in requests]
    seconds, processor = time.perf_counter(), time.process_time()
    for number, (ids, num_tokens) in enumerate(requests):
        engine.add(number, ids, Sampling(temperature=0.0, max_tokens=num_tokens or 120, ignore_eos=bool(num_tokens)), stream=False)
    while engine.has_work:
        for number, delta in engine.step():
            if isinstance(delta, FairleadError):
                raise delta
            tokens[number] += delta.token_ids
    return time.perf_counter() - seconds, time.process_time() - processor, tokens


def times_as_fast(units: list[list[tuple[float, float]]]) -> float:
    """`units`: of each, pairs of seconds without and with. What all of them take together, by the median of each one's pairs."""
    before = [statistics.median(off for off, _ in pairs) for pairs in units]
    after = [seconds / statistics.median(off / on for off, on in pairs) for seconds, pairs in zip(before, units, strict=True)]
    return sum(before) / sum(after)


def told_of(units: list[list[tuple[float, float]]], *, num_samples: int = 1000) -> str:
    """The ratio, and where nine of ten runs like this one would find it."""
    numbers = random.Random(0)
    found = sorted(times_as_fast([numbers.choices(pairs, k=len(pairs)) for pairs in units]) for _ in range(num_samples))
    return f"{times_as_fast(units):.2f} ({found[num_samples // 20]:.2f} to {found[-num_samples // 20]:.2f})"


def built(method: str, threads: int, args: argparse.Namespace) -> Engine:
    engine = build_generator(FOLDER / "chat", LlmSpec(speculation=METHODS[method], dtype=args.dtype), threads=threads)[0]
    engine.runner.decoder = Scripted(engine.runner.decoder)  # type: ignore[assignment]
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="workload or workload/method")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], help="requests at once")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--explain", action="store_true", help="what the engine measured")
    args = parser.parse_args()
    gc.disable()
    print(
        "| workload | method | at once | times as fast | by processor time | accepted of drafted | other tokens |\n|---|---|---|---|---|---|---|"
    )
    for workload, method in RUNS:
        if args.only and not {workload, f"{workload}/{method}"} & set(args.only):
            continue
        for batch in args.batch:
            engines = {name: built(name, args.threads, args) for name in ("off", method)}
            units = units_of(workload, engines["off"].tokenizer, batch)
            pairs: list[list[Pair]] = [[] for _ in units]
            differing = 0
            for number in range(args.rounds + 1):
                gc.collect()
                for at, (script, requests) in enumerate(units):
                    told = {}
                    for name in list(engines)[:: 1 if (number + at) % 2 else -1]:
                        told[name] = answer(engines[name], script, requests)
                    if number:  # the first is a rehearsal
                        pairs[at].append((told["off"][:2], told[method][:2]))
                    differing += sum(one != other for one, other in zip(told["off"][2], told[method][2], strict=True))
            clock, processor = (told_of([[(off[by], on[by]) for off, on in unit] for unit in pairs]) for by in (0, 1))
            speculation = engines[method].speculation
            assert speculation is not None
            share = speculation.num_accepted / max(speculation.num_drafted, 1)
            print(
                f"| {workload} | {method} | {batch} | {clock} | {processor} | {share:.0%} of {speculation.num_drafted} | {differing} |",
                flush=True,
            )
            if args.explain:
                for bucket, size in speculation.pace._sizes.items():
                    told = f"price {size.price:.2f}, a step {size.plain.median * 1e6:.0f} us, a draft's token {size.cost * 1e6:.0f} us"
                    print(
                        f"    size {bucket}: {told}, {size.plain.num} and {size.extra.num} steps; rates {[round(rate.value, 2) for rate in speculation._rates]}"
                    )


if __name__ == "__main__":
    main()
