"""What LoRA adapters cost: a batch of the base model and the same batch with its sequences spread over several adapters, in turns.

python make_models.py S M; python lora.py                          (the project's environment, from this folder)
python lora.py --models models/S-bf16 --ranks 16 --turns 5

Adapters have random weights for all seven projections of every layer: speed does not ask what they say. One engine computes all of
it: in each turn every kind of batch is computed right before or after one of the base model alone, and what is told is the median of
these ratios of tokens a second. On a machine that others use, `--threads 1` counts the process's own processor time instead.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from workloads import NUM_SPECIAL, vocab_size_of

from fairlead.core.errors import FairleadError
from fairlead.core.generation import Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm.adapters import CONFIG, PREFIX, WEIGHTS
from fairlead.llm.build import build_generator
from fairlead.llm.engine import Engine
from fairlead.llm.lora import Part

NUMBERS = count()
PROMPT, OUTPUT = 128, 64


def write_adapter(folder: Path, parts: list[Part], rank: int, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = {}
    for part in parts:
        tensors[f"{PREFIX}{part.name}.lora_A.weight"] = (torch.randn(rank, part.num_inputs) * 0.02).to(dtype)
        tensors[f"{PREFIX}{part.name}.lora_B.weight"] = (torch.randn(part.num_outputs, rank) * 0.02).to(dtype)
    save_file(tensors, folder / WEIGHTS)


def tokens_a_second(engine: Engine, names: list[str], prompt: int, output: int, vocab_size: int, options: argparse.Namespace) -> float:
    """`names`: the adapter of each sequence, "" for none."""
    assert engine.adapters is not None
    prompts = torch.randint(NUM_SPECIAL, vocab_size, (len(names), prompt)).tolist()
    uses = [engine.adapters.take(name) if name else None for name in names]
    sampling = Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    began = clock()
    for ids, use in zip(prompts, uses, strict=True):
        engine.add(next(NUMBERS), ids, sampling, adapter=use, stream=False)
    while engine.has_work:
        for _, delta in engine.step():
            if isinstance(delta, FairleadError):
                raise delta
    return len(names) * output / (clock() - began)


def run(model: Path, rank: int, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    vocab_size = vocab_size_of(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for file in model.resolve().iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
        spec = LlmSpec(
            max_model_len=1024, kv_cache_bytes=1 << 30, lora_bytes=8 << 30, decoder=options.decoder, quantization=options.quantization
        )
        engine, _, _ = build_generator(folder, spec, threads=options.threads)
        assert engine.adapters is not None
        layout = engine.adapters.layout
        names = [f"bench-{i}" for i in range(options.adapters)]
        for name in names:
            write_adapter(folder / spec.loras / name, list(layout.parts.values()), rank, layout.dtype)
        kinds = {
            "base": [""] * options.batch,
            "one adapter": names[:1] * options.batch,
            f"{len(names)} adapters": [names[i % len(names)] for i in range(options.batch)],
            f"{len(names)} adapters and base": [["", *names][i % (len(names) + 1)] for i in range(options.batch)],
            f"{len(names)} adapters, every second row base": [names[i // 2 % len(names)] * (i % 2) for i in range(options.batch)],
        }
        for mix in kinds.values():
            tokens_a_second(engine, mix, 16, 4, vocab_size, options)
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        ratios: dict[str, list[float]] = {kind: [] for kind in kinds if kind != "base"}
        for turn in range(options.turns):
            for kind, mine in ratios.items():
                found = {
                    each: tokens_a_second(engine, kinds[each], options.prompt, options.output, vocab_size, options)
                    for each in (("base", kind) if turn % 2 else (kind, "base"))
                }
                mine.append(found[kind] / found["base"])
                for each, speed in found.items():
                    speeds[each].append(speed)
        size = engine.stats().adapter_bytes / len(names) / 2**20
        title = f"{model.name}, {options.decoder} decoder, {options.batch} x ({options.prompt} -> {options.output}), rank {rank}, {size:.1f} MiB each"
        print(f"\n{title}, {options.turns} turns\n\n| batch | tok/s | of the base model's |\n|---|---|---|")
        print(f"| base | {median(speeds['base']):,.0f} | |")
        for kind, mine in ratios.items():
            print(f"| {kind} | {median(speeds[kind]):,.0f} | {median(mine):.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = Path(__file__).parent / "models"
    parser.add_argument("--models", type=Path, nargs="+", default=[models / "S-bf16", models / "M-bf16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--output", type=int, default=OUTPUT)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--decoder", default="auto", choices=("auto", "lean", "graph"))
    parser.add_argument("--quantization", default="off", choices=("off", "int8"))
    options = parser.parse_args()
    for model in options.models:
        for rank in options.ranks:
            run(model, rank, options)


if __name__ == "__main__":
    main()
