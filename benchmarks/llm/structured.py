"""What structured output costs: the same batch with and without schemas, in turns in one process.

python structured.py [tiny] [S] [M] [FOLDER] [--batch 16] [--tokens 128] [--rounds 7] [--threads N] [--temperature 0] [--parts]

tiny is the chat model of `fairlead demo`; S and M are those of make_models.py. The schemas are of lists that have no end, so that the batch
is full as long as it is measured: until its answers have so many tokens each, on average. Its requests have one of four kinds each:
records, free text, numbers, calls. The prompts of all rounds are the same, so that a step does the same in each of them.

Printed are the tokens a second of decoding (medians of the rounds), the median of the rounds' ratios with the least and the greatest, the
ratio of the fastest that each step was in any round, which other work on the machine disturbs less, and that of the least processor time
that it took, which with --threads 1 other work disturbs least; the share of tokens that a grammar left no choice about. Then the time
from a request to its first token: the first request with a schema, which reads the vocabulary; one with a new schema; one with a schema
that is known. --parts adds where the microseconds of a step go, each part's own, again the fastest of any round; they are a little longer
for being timed.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from fairlead.core.generation import Delta, Guide, Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine
from fairlead.llm.grammar import Grammar, Matcher
from fairlead.llm.masks import Masks

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
NOTE = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 60}, "text": {"type": "string", "maxLength": 400}},
    "required": ["title", "text"],
    "additionalProperties": False,
}
READING = {
    "type": "object",
    "properties": {
        "at": {"type": "string", "format": "date-time"},
        "celsius": {"type": "number", "minimum": -90, "maximum": 60},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 3, "maxItems": 6},
        "ok": {"type": "boolean"},
    },
    "required": ["at", "celsius", "counts", "ok"],
    "additionalProperties": False,
}
CALL = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": {
                    "type": "object",
                    "properties": {of: {"type": "string", "maxLength": 20}, "limit": {"type": "integer", "minimum": 1, "maximum": 50}},
                    "required": [of],
                    "additionalProperties": False,
                },
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, of in (("search_documents", "query"), ("get_weather", "city"), ("send_message", "recipient"))
    ]
}
MIX = [{"type": "array", "items": items, "minItems": 10_000} for items in (PERSON, NOTE, READING, CALL)]


def guide(schema: dict) -> Guide:
    return Guide(kind="json", text=json.dumps(schema))


class Bench:
    def __init__(self, folder: Path, *, threads: int, batch: int, tokens: int, temperature: float) -> None:
        spec = LlmSpec(prefix_caching=False, max_model_len=min(1024, 4 * tokens + 128), max_num_seqs=max(16, batch))
        self.engine: Engine
        self.engine, _, info = build_generator(folder, spec, threads=threads)
        self.vocab_size = info.vocab_size
        self.batch, self.tokens, self.temperature = batch, tokens, temperature
        self.next_id = 0

    def add(self, grammar: Grammar | None, max_tokens: int, seed: int) -> None:
        numbers = random.Random(seed)
        prompt = [numbers.randrange(3, self.vocab_size) for _ in range(64)]
        sampling = Sampling(max_tokens=max_tokens, temperature=self.temperature, ignore_eos=True, seed=seed)
        self.engine.add(self.next_id, prompt, sampling, grammar=grammar)
        self.next_id += 1

    def decode(self, grammars: list[Grammar]) -> tuple[list[tuple[float, float]], int, int]:
        """Seconds, and those of processors, of the steps of a whole batch behind its prompts, until it has so many tokens; how many they gave, and how many of
        them were forced."""
        engine = self.engine
        for number in range(self.batch):
            self.add(grammars[number % len(grammars)] if grammars else None, 4 * self.tokens, number)
        while engine.scheduler.num_waiting or any(seq.num_generated == 0 for seq in engine.scheduler.running):
            engine.step()
        before, seconds, num_tokens, num_forced = engine.stats().num_generated_tokens, [], 0, 0
        while num_tokens < self.batch * self.tokens:
            started, cpu = time.perf_counter(), time.process_time()
            answers = engine.step()
            seconds.append((time.perf_counter() - started, time.process_time() - cpu))
            for _, delta in answers:
                if not isinstance(delta, Delta):
                    raise delta
                num_forced += max(len(delta.token_ids) - 1, 0)
            num_tokens = engine.stats().num_generated_tokens - before
        for id in range(self.next_id - self.batch, self.next_id):
            engine.abort(id)
        return seconds, num_tokens, num_forced

    def first_token(self, asked: Guide | None) -> float:
        """Milliseconds from a request to its first token, alone."""
        started = time.perf_counter()
        self.add(None if asked is None else self.engine.grammars.compile(asked), 1, self.next_id)
        while self.engine.has_work:
            self.engine.step()
        return (time.perf_counter() - started) * 1e3


class Parts:
    """Microseconds of what a step calls, without what that calls of the others."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[Counter[str]] = []
        """For each step the fastest that each part was in any round."""
        self.num_calls: Counter[str] = Counter()
        """Of one round."""
        self._round: list[Counter[str]] = [Counter()]
        self._inner = [0.0]
        self._owners: list[tuple[Any, str]] = [
            (Engine, "step"),
            (Engine, "_guided"),
            (engine.runner, "run"),
            (engine.scheduler, "plan"),
            (engine.scheduler, "commit"),
            (engine.sampler, "sample"),
            (Engine, "_advance"),
            (Engine, "_push_forced"),
            (Matcher, "follow"),
            (Matcher, "takes"),
            (Masks, "find"),
        ]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """One round."""
        self.num_calls.clear()
        self._round = []
        now: Counter[str] = Counter()
        kept = [(owner, name, owner.__dict__.get(name)) for owner, name in self._owners]
        for owner, name in self._owners:
            setattr(owner, name, self._wrapped(getattr(owner, name), name, now))
        try:
            yield
        finally:
            for owner, name, was in kept:
                if was is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, was)
        self.steps = [min_of(pair) for pair in zip(self._round, self.steps or self._round, strict=True)]

    def _wrapped(self, call: Callable[..., Any], name: str, now: Counter[str]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*positional: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return call(*positional, **named)
            finally:
                seconds = time.perf_counter() - started
                now[name] += seconds - self._inner.pop()  # type: ignore[assignment]
                self.num_calls[name] += 1
                self._inner[-1] += seconds
                if name == "step":
                    self._round.append(now.copy())
                    now.clear()

        return timed

    def lines(self) -> Iterator[str]:
        num_steps = len(self.steps)
        for name, seconds in sum(self.steps, Counter()).most_common():
            yield f"    {name:13} {seconds / num_steps * 1e6:8.1f} us a step, {self.num_calls[name] / num_steps:5.1f} calls"


def min_of(pair: tuple[Counter[str], Counter[str]]) -> Counter[str]:
    return Counter({name: min(seconds, pair[1][name]) for name, seconds in pair[0].items()})


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    bench = Bench(folder, threads=arguments.threads, batch=arguments.batch, tokens=arguments.tokens, temperature=arguments.temperature)
    bench.first_token(None)
    plain = statistics.median(bench.first_token(None) for _ in range(arguments.rounds))
    cold = bench.first_token(guide(PERSON))
    new = statistics.median(bench.first_token(guide({**PERSON, "title": str(n)})) for n in range(arguments.rounds))
    known = statistics.median(bench.first_token(guide(PERSON)) for _ in range(arguments.rounds))
    grammars = [bench.engine.grammars.compile(guide(schema)) for schema in MIX]
    sides: tuple[list[Grammar], list[Grammar]] = ([], grammars)
    for side in sides:
        bench.decode(side)
    rates: list[list[float]] = [[], []]
    fastest: list[list[tuple[float, float]]] = [[], []]
    shares = [0.0, 0.0]
    for number in range(arguments.rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds, num_tokens, num_forced = bench.decode(sides[which])
            rates[which].append(num_tokens / sum(wall for wall, _ in seconds))
            shares[which] = num_forced / num_tokens
            pairs = zip(seconds, fastest[which] or seconds, strict=True)
            fastest[which] = [(min(one[0], other[0]), min(one[1], other[1])) for one, other in pairs]
    ratios = [with_ / without for without, with_ in zip(*rates, strict=True)]
    without, with_ = map(statistics.median, rates)
    (wall, cpu), (guided_wall, guided_cpu) = ([sum(kind) for kind in zip(*steps, strict=True)] for steps in fastest)
    print(
        f"{name:6} batch {arguments.batch}: {without:8.0f} tok/s without, {with_:8.0f} with schemas: "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), undisturbed {wall / guided_wall:.3f}, of processors {cpu / guided_cpu:.3f}; "
        f"{shares[1]:.0%} forced, {len(fastest[0])} and {len(fastest[1])} steps"
    )
    print(f"{name:6} first token: {plain:.1f} ms without; with a schema {cold:.1f} ms for the first one, {new:.1f} new, {known:.1f} known")
    for title, side in (("without", sides[0]), ("with schemas", sides[1])) if arguments.parts else ():
        parts = Parts(bench.engine)
        for _ in range(arguments.rounds):
            with parts.timed():
                bench.decode(side)
        print(f"{name:6} a step {title}:", *parts.lines(), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["tiny", "M"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        folder = TINY if name == "tiny" else HERE / f"models/{name}-bf16" if len(name) == 1 else Path(name)
        if not folder.is_dir():
            parser.error(f"{folder} is missing: `python make_models.py {name}` makes it")
        measure(name, folder, arguments)


if __name__ == "__main__":
    main()
