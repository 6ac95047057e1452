"""What sleep gives back and what waking costs, at both levels, with the prefix cache full.

python make_models.py S M; python sleep.py                          (the project's environment, from this folder)
python sleep.py --models models/M-bf16 --device cuda --kv-gib 20

Each model is loaded in a process of its own, as a server does it, and its KV memory is filled with prompts. Then it sleeps and wakes at
each level in turns; what is told is the median of: memory of its process (and of the device), and seconds until it computes, and until
it has answered a prompt of 16 tokens.
"""

import argparse
import asyncio
import time
from collections import defaultdict
from contextlib import aclosing
from pathlib import Path
from random import Random
from statistics import median

import psutil
import torch
from workloads import NUM_SPECIAL, vocab_size_of

from fairlead.core.generation import Generate, Sampling
from fairlead.core.request import Request
from fairlead.core.specs import InstancesSpec, LlmSpec, ModelSpec
from fairlead.runtime.engine_version import EngineVersion
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.loading import load_version

PROMPT = 1000
AT_ONCE = 8


async def ask(version: EngineVersion, ids: list[int]) -> None:
    prompt = Generate(token_ids=ids, sampling=Sampling(max_tokens=1, temperature=0.0))
    async with aclosing(version.infer(Request(model=version.name, prompt=prompt))) as responses:
        async for _ in responses:
            pass


async def fill(version: EngineVersion, random: Random, vocab_size: int) -> None:
    """Every block with some prefix."""
    num = version.info.num_kv_blocks * version.info.block_size // PROMPT + 1
    for begin in range(0, num, AT_ONCE):
        prompts = [[random.randrange(NUM_SPECIAL, vocab_size) for _ in range(PROMPT)] for _ in range(min(AT_ONCE, num - begin))]
        await asyncio.gather(*(ask(version, ids) for ids in prompts))


def memory(version: EngineVersion, device: str) -> tuple[float, float]:
    """MiB of its process, and of the device."""
    (instance,) = version.instances
    process = psutil.Process(instance.pid).memory_info().rss if instance.pid else 0
    free, total = torch.cuda.mem_get_info(device) if device != "cpu" else (0, 0)
    return process / 2**20, (total - free) / 2**20


async def run(model: Path, options: argparse.Namespace, forkserver: ForkServer) -> None:
    random, vocab_size = Random(0), vocab_size_of(model)
    spec = ModelSpec(
        name=model.name,
        instances=InstancesSpec(device=options.device, threads=options.threads),
        llm=LlmSpec(max_model_len=2048, kv_cache_bytes=int(options.kv_gib * 2**30)),
    )
    version = await load_version(spec, "1", model, forkserver)
    assert isinstance(version, EngineVersion)
    found: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    for _ in range(options.turns):
        for level in (1, 2):
            await fill(version, random, vocab_size)
            before = memory(version, options.device)
            began = time.perf_counter()
            await version.sleep.sleep(60.0, level)
            slept = time.perf_counter() - began
            after = memory(version, options.device)
            began = time.perf_counter()
            await version.sleep.wake()
            woken = time.perf_counter() - began
            await ask(version, [random.randrange(NUM_SPECIAL, vocab_size) for _ in range(16)])
            found[level].append((*before, *after, slept, woken, time.perf_counter() - began))
    kv = version.info.num_kv_blocks * version.info.kv_block_bytes / 2**20
    print(f"\n{model.name} on {options.device}, {kv:,.0f} MiB of KV memory, {options.turns} turns\n")
    print("| level | process, awake and full | asleep | device, awake | asleep | seconds to sleep | to wake | to the first answer |")
    print("|---|---|---|---|---|---|---|---|")
    for level, rows in found.items():
        host, device, host_asleep, device_asleep, slept, woken, answered = (median(column) for column in zip(*rows, strict=True))
        sizes = " | ".join(f"{size:,.0f} MiB" for size in (host, host_asleep, device, device_asleep))
        print(f"| {level} | {sizes} | {slept:.3f} | {woken:.3f} | {answered:.3f} |", flush=True)
    await version.drain(5.0)


async def measure(options: argparse.Namespace) -> None:
    forkserver = ForkServer("critical", "json")
    try:
        for model in options.models:
            await run(model, options, forkserver)
    finally:
        await forkserver.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = Path(__file__).parent / "models"
    parser.add_argument("--models", type=Path, nargs="+", default=[models / "S-bf16", models / "M-bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kv-gib", type=float, default=0.25)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    options.models = [model.resolve() for model in options.models]
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
