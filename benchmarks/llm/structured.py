"""What structured output costs: the same batch with and without a schema, in turns in one process.

python structured.py [tiny] [S] [M] [FOLDER] [--batch 16] [--tokens 128] [--rounds 7] [--threads N] [--temperature 0]

tiny is the chat model of `fairlead demo`; S and M are those of make_models.py. Every answer has exactly so many tokens: the schema is
of a list that has no end. Printed are tokens a second and the median of the rounds' ratios, and the time from a request to its first
token: the first request with a schema, which reads the vocabulary; one with a new schema; one with a schema that is known.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

from fairlead.core.generation import Guide, Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine
from fairlead.llm.grammar import Grammar

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "src/fairlead/cli/demo_models/tiny/chat"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "email": {"type": "string", "pattern": "^[a-z]{2,8}@[a-z]{2,8}[.]org$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "editor", "reader"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 30}, "city": {"type": "string", "maxLength": 20}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "email", "age", "role", "tags", "address"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 10_000}


def guide(schema: dict) -> Guide:
    return Guide(kind="json", text=json.dumps(schema))


class Bench:
    def __init__(self, folder: Path, *, threads: int, batch: int, tokens: int, temperature: float) -> None:
        spec = LlmSpec(prefix_caching=False, max_model_len=min(1024, tokens + 128), max_num_seqs=max(16, batch))
        self.engine: Engine
        self.engine, _, info = build_generator(folder, spec, threads=threads)
        self.vocab_size = info.vocab_size
        self.batch, self.tokens, self.temperature = batch, tokens, temperature
        self.random = random.Random(0)
        self.next_id = 0

    def add(self, grammar: Grammar | None, max_tokens: int) -> None:
        prompt = [self.random.randrange(3, self.vocab_size) for _ in range(64)]
        sampling = Sampling(max_tokens=max_tokens, temperature=self.temperature, ignore_eos=True, seed=self.next_id)
        self.engine.add(self.next_id, prompt, sampling, grammar=grammar)
        self.next_id += 1

    def decode(self, grammar: Grammar | None) -> float:
        """Tokens a second, of a whole batch behind its prompts."""
        for _ in range(self.batch):
            self.add(grammar, self.tokens)
        while self.engine.scheduler.num_waiting or any(seq.num_generated == 0 for seq in self.engine.scheduler.running):
            self.engine.step()
        before, started = self.engine.stats().num_generated_tokens, time.perf_counter()
        while self.engine.has_work:
            for _, delta in self.engine.step():
                if isinstance(delta, Exception):
                    raise delta
        return (self.engine.stats().num_generated_tokens - before) / (time.perf_counter() - started)

    def first_token(self, asked: Guide | None) -> float:
        """Milliseconds from a request to its first token, alone."""
        started = time.perf_counter()
        self.add(None if asked is None else self.engine.grammars.compile(asked), 1)
        while self.engine.has_work:
            self.engine.step()
        return (time.perf_counter() - started) * 1e3


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    bench = Bench(folder, threads=arguments.threads, batch=arguments.batch, tokens=arguments.tokens, temperature=arguments.temperature)
    bench.first_token(None)
    plain = statistics.median(bench.first_token(None) for _ in range(arguments.rounds))
    cold = bench.first_token(guide(PERSON))
    new = statistics.median(bench.first_token(guide({**PERSON, "title": str(n)})) for n in range(arguments.rounds))
    known = statistics.median(bench.first_token(guide(PERSON)) for _ in range(arguments.rounds))
    grammar = bench.engine.grammars.compile(guide(ENDLESS))
    bench.decode(None)
    bench.decode(grammar)
    rounds = []
    for number in range(arguments.rounds):
        turns = (None, grammar) if number % 2 else (grammar, None)
        rates = {turn is None: bench.decode(turn) for turn in turns}
        rounds.append((rates[True], rates[False]))
    without, with_ = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    ratios = [b / a for a, b in rounds]
    print(
        f"{name:6} batch {arguments.batch}: {without:8.0f} tok/s without, {with_:8.0f} with a schema: "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    print(f"{name:6} first token: {plain:.1f} ms without; with a schema {cold:.1f} ms for the first one, {new:.1f} new, {known:.1f} known")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["tiny", "M"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    for name in arguments.models:
        folder = TINY if name == "tiny" else HERE / f"models/{name}-bf16" if len(name) == 1 else Path(name)
        if not folder.is_dir():
            parser.error(f"{folder} is missing: `python make_models.py {name}` makes it")
        measure(name, folder, arguments)


if __name__ == "__main__":
    main()
