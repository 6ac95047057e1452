"""A step of FLUX.1-dev's shape, random weights: Fairlead's engine against diffusers' barest loop, eager and compiled; JSON and a table.

python gpu.py [--batches 1 2 4 8] [--layers 19] [--rounds 3] [--json]      (the project's environment, on a CUDA machine)
python gpu.py --tiny --device cpu                                         to try the script itself

Pictures are compared first; where the engine's differ from the loop's, nothing is measured. Results are lines of JSON in results/.
"""

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

warnings.simplefilter("ignore")

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from models import FLUX, FluxShape, flux  # noqa: E402
from msgspec import structs  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from fairlead.core.errors import FairleadError  # noqa: E402
from fairlead.core.generation import Paint  # noqa: E402
from fairlead.core.pictures import check, decode_image  # noqa: E402
from fairlead.core.specs import DiffusionSpec  # noqa: E402
from fairlead.diffusion.decoder import DecoderHere  # noqa: E402
from fairlead.diffusion.engine import DiffusionEngine  # noqa: E402
from fairlead.diffusion.flux import T5_TOKENS, Flux  # noqa: E402
from fairlead.diffusion.load import build  # noqa: E402
from fairlead.diffusion.loras import Loras  # noqa: E402
from fairlead.diffusion.modes import compile_blocks  # noqa: E402
from fairlead.diffusion.scheduler import Scheduler  # noqa: E402

HERE = Path(__file__).parent
TEXT, GUIDANCE = "a picture", 3.5
NEVER, ALWAYS = 1e-9, 0.999
"""Thresholds of the first-block cache: what it costs where it never answers, and what it saves where it always does."""
MIN_PSNR = 30.0
"""Of pictures whose matrix products were summed in another order, in decibels: of other weights they have less than 20."""
NUM_COMPARED, PARITY_STEPS = 3, 4
"""Three, which compiled blocks fill up to four."""

VARIANTS: dict[str, tuple[str, str, float]] = {  # who computes, in which mode, with which threshold of the cache
    "diffusers, eager": ("bare", "exact", 0.0),
    "diffusers, compiled": ("bare", "balanced", 0.0),
    "fairlead, exact": ("engine", "exact", 0.0),
    "fairlead, compiled": ("engine", "balanced", 0.0),
    "fairlead, cache that never answers": ("engine", "turbo", NEVER),
    "fairlead, cache that always answers": ("engine", "turbo", ALWAYS),
}
AGAINST = {
    "fairlead, exact": "diffusers, eager",
    "fairlead, compiled": "diffusers, compiled",
    "fairlead, cache that never answers": "fairlead, compiled",
    "fairlead, cache that always answers": "fairlead, compiled",
}


class Bench:
    def __init__(self, shape: FluxShape, device: str, *, compiled: bool, num_steps: int, most: int) -> None:
        self.shape, self.device, self.num_steps = shape, device, num_steps
        self.dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.pipe = flux(shape, device=device, dtype=self.dtype)
        self.num_tokens = (shape.size // 16) ** 2
        spec = DiffusionSpec(width=shape.size, height=shape.size, max_batch_tokens=most * self.num_tokens)
        self.spec = spec
        self.family = build(self.pipe, "flux", Flux, spec, Loras({}, []), device)
        self.modes = self.family.parts.modes
        self.modes.compiled = compile_blocks(self.family.parts.model) if compiled else []
        self.family.info = structs.replace(self.family.info, modes=("exact", "balanced", "turbo"))

    def sync(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def paint(self, seed: int, mode: str, num_steps: int) -> Paint:
        asked = Paint(text=TEXT, seed=seed, num_steps=num_steps, guidance=GUIDANCE, mode=mode)
        return check(asked, self.family.info)

    def engine(self) -> DiffusionEngine:
        scheduler = Scheduler(max_num_seqs=64, max_batch_tokens=self.spec.max_batch_tokens, max_waiting=64)
        return DiffusionEngine(self.family, scheduler, DecoderHere(self.family, "bench"))

    # The barest loop

    @torch.inference_mode()
    def begun(self, seeds: list[int], num_steps: int) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
        """A scheduler, latents, and what else the model takes: as FluxPipeline prepares them."""
        pipe, count, side = self.pipe, len(seeds), self.shape.size
        text, pooled, text_ids = pipe.encode_prompt(TEXT, device=self.device, max_sequence_length=T5_TOKENS)
        drawn = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            latents, where = pipe.prepare_latents(1, 16, side, side, self.dtype, torch.device(self.device), generator)
            drawn.append(latents)
        given = {
            "guidance": torch.full([count], GUIDANCE, device=self.device, dtype=torch.float32),
            "pooled_projections": pooled.repeat(count, 1),
            "encoder_hidden_states": text.repeat(count, 1, 1),
            "txt_ids": text_ids,
            "img_ids": where,
        }
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        shift = diffusers.pipelines.flux.pipeline_flux.calculate_shift(self.num_tokens, 256, 4096, 0.5, 1.15)
        scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=shift)
        scheduler.set_begin_index(0)
        return scheduler, torch.cat(drawn), given

    @torch.inference_mode()
    def walk(self, scheduler: Any, latents: torch.Tensor, given: dict[str, torch.Tensor], timesteps: torch.Tensor) -> torch.Tensor:
        for timestep in timesteps:
            at = timestep.expand(len(latents)).to(latents.dtype) / 1000
            predicted = self.pipe.transformer(hidden_states=latents, timestep=at, return_dict=False, **given)[0]
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        return latents

    @torch.inference_mode()
    def bare_picture(self, seed: int, mode: str) -> np.ndarray:
        scheduler, latents, given = self.begun([seed], PARITY_STEPS)
        with self.modes.entered(mode):
            latents = self.walk(scheduler, latents, given, scheduler.timesteps)
        pipe, config = self.pipe, self.pipe.vae.config
        latents = pipe._unpack_latents(latents, self.shape.size, self.shape.size, pipe.vae_scale_factor)
        pixels = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return (pipe.image_processor.postprocess(pixels, output_type="np")[0] * 255).round().astype(np.uint8)

    def bare_step(self, count: int, mode: str) -> float:
        scheduler, latents, given = self.begun(list(range(count)), self.num_steps + 1)
        with self.modes.entered(mode):
            latents = self.walk(scheduler, latents, given, scheduler.timesteps[:1])
            self.sync()
            started = time.perf_counter()
            self.walk(scheduler, latents, given, scheduler.timesteps[1:])
            self.sync()
        return (time.perf_counter() - started) / self.num_steps

    # The engine

    def engine_pictures(self, seeds: list[int], mode: str) -> list[np.ndarray]:
        engine, found = self.engine(), {}
        for seed in seeds:
            engine.add(seed, self.paint(seed, mode, PARITY_STEPS))
        while engine.has_work:
            for work, answer in engine.step():
                if isinstance(answer, FairleadError):
                    raise answer
                if answer.picture is not None:
                    found[work] = decode_image(answer.picture.data, "picture", self.shape.size, self.shape.size)
        return [found[seed] for seed in seeds]

    def engine_step(self, count: int, mode: str) -> float:
        """Admission, prompts and the first step come before, the decoder after."""
        engine = self.engine()
        for seed in range(count):
            engine.add(seed, self.paint(seed, mode, self.num_steps + 2))
        computed = self._computed(engine)
        assert computed == count, f"{computed} of {count} pictures in a step"
        self.sync()
        started = time.perf_counter()
        for _ in range(self.num_steps):
            assert self._computed(engine) == count
        self.sync()
        seconds = (time.perf_counter() - started) / self.num_steps
        for seed in range(count):
            engine.abort(seed)
        return seconds

    def _computed(self, engine: DiffusionEngine) -> int:
        answers = engine.step()
        for _, answer in answers:
            if isinstance(answer, FairleadError):
                raise answer
        return sum(answer.progress is not None for _, answer in answers)

    def step(self, variant: str, count: int) -> float:
        who, mode, threshold = VARIANTS[variant]
        self.modes.thresholds["turbo"] = threshold
        return self.bare_step(count, mode) if who == "bare" else self.engine_step(count, mode)


# What is compared with


def flops(shape: FluxShape, count: int) -> float:
    """Of one step of so many pictures: two for each multiplication with a weight, and attention over all tokens (text and picture)."""
    width, image, text = shape.width, (shape.size // 16) ** 2, T5_TOKENS
    tokens = image + text
    # a block has 12 width^2 weights for a token: 4 of attention, 8 of the layers behind it; attention adds two products of tokens^2
    block = 2 * 12 * width**2 * tokens + 4 * tokens**2 * width
    blocks = 3 * shape.layers * block
    modulation = 2 * width**2 * (shape.layers * 2 * 6 + 2 * shape.layers * 3 + 2)
    ends = 2 * width * (2 * 64 * image + shape.text * text)
    times = 2 * (2 * (256 * width + width**2) + shape.pooled * width + width**2)
    return count * (blocks + modulation + ends + times)


def matmul_peak(device: str, dtype: torch.dtype, sizes: list[int]) -> tuple[float, int]:
    """FLOP/s of the fastest square product, and its side."""
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best = (0.0, 0)
    for side in sizes:
        one, two = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            one @ two
        for _ in range(5):
            wait()
            started = time.perf_counter()
            for _ in range(10):
                one @ two
            wait()
            best = max(best, (10 * 2 * side**3 / (time.perf_counter() - started), side))
    return best


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures, in decibels; 99 where they are equal."""
    error = np.mean((one.astype(float) - two) ** 2)
    return float(min(10 * np.log10(255**2 / error), 99.0)) if error else 99.0


def compare(bench: Bench, count: int, compiled: bool) -> dict[str, float]:
    """The engine's pictures against those of the loop. Raises SystemExit where they differ."""
    expected = [bench.bare_picture(seed, "exact") for seed in range(count)]
    if min(picture.std() for picture in expected) < 1 or psnr(expected[0], expected[-1]) > MIN_PSNR:
        raise SystemExit("these weights paint nothing that could be compared")
    alone = int(np.abs(bench.engine_pictures([0], "exact")[0].astype(int) - expected[0]).max())
    if alone > 1:
        raise SystemExit(f"alone, the engine's picture differs from the loop's by {alone} levels")
    found = {"alone_levels": alone}
    for name, mode in (("together", "exact"), *((("compiled", "balanced"),) if compiled else ())):
        pictures = bench.engine_pictures(list(range(count)), mode)
        found[f"{name}_psnr"] = min(psnr(one, two) for one, two in zip(pictures, expected, strict=True))
        if found[f"{name}_psnr"] < MIN_PSNR:
            raise SystemExit(f"{name}, the engine's pictures differ from the loop's: {found[f'{name}_psnr']:.1f} dB")
    return found


def memory(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else None


def measure(bench: Bench, variants: list[str], count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """All variants in turns, each time the other way round; the first round is not counted (kernels are compiled and chosen)."""
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    rows: dict[str, dict[str, Any]] = {}
    for number in range(rounds + 1):
        for variant in variants if number % 2 else variants[::-1]:
            gc.collect()
            if bench.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            before = bench.family.num_cached
            seconds = bench.step(variant, count)
            answered = (bench.family.num_cached - before) / (count * (bench.num_steps + 1))
            rows[variant] = {"memory_gb": memory(bench.device), "answered_by_cache": answered}
            if number:
                times[variant].append(seconds)
    for variant in variants:
        row = rows[variant]
        row |= {"step_ms": 1e3 * median(times[variant]), "least_ms": 1e3 * min(times[variant]), "most_ms": 1e3 * max(times[variant])}
        if (other := AGAINST.get(variant)) in times:
            row["over_percent"] = 100 * (median(a / b for a, b in zip(times[variant], times[other], strict=True)) - 1)
            row["against"] = other
    return {variant: rows[variant] for variant in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, which a processor can compute")
    parser.add_argument("--layers", type=int, default=0, help="blocks with two streams, and twice as many with one (19)")
    parser.add_argument("--size", type=int, default=0, help="of pictures, in pixels (1024)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", action="store_true", help="lines of JSON in place of the table")
    options = parser.parse_args()
    console = Console(stderr=True)
    diffusers.utils.logging.set_verbosity_error()
    shape = FLUX["tiny" if options.tiny else "dev"]
    shape = replace(shape, layers=options.layers or shape.layers, size=options.size or shape.size)
    compiled, most = not options.no_compile, max(*options.batches, NUM_COMPARED)
    variants = [name for name, (_, mode, _) in VARIANTS.items() if compiled or not name.endswith("compiled")]
    results = HERE / "results" / f"gpu-{datetime.now():%Y%m%d-%H%M%S}.jsonl"
    results.parent.mkdir(exist_ok=True)
    found: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        found.append(row)
        with results.open("a") as out:
            out.write(json.dumps(row) + "\n")

    with console.status("loading"):
        bench = Bench(shape, options.device, compiled=compiled, num_steps=options.steps, most=most)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    dtype = str(bench.dtype).removeprefix("torch.")
    with console.status("matrix products"):
        peak, side = matmul_peak(options.device, bench.dtype, [512, 1024] if options.tiny else [4096, 8192, 16384])
    keep(
        {
            "name": "machine",
            "device": name,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "dtype": dtype,
            "peak_tflops": peak / 1e12,
            "peak_side": side,
            "layers": shape.layers,
            "width": shape.width,
            "size": shape.size,
            "billions_of_weights": sum(each.numel() for each in bench.pipe.transformer.parameters()) / 1e9,
        }
    )
    console.print(f"{name}, {dtype}: {peak / 1e12:.2f} TFLOP/s in products of {side}x{side}")
    with console.status("comparing pictures"):
        keep({"name": "parity"} | compare(bench, NUM_COMPARED, compiled))
    console.print(f"pictures agree: {found[-1]}")
    for count in options.batches:
        with console.status(f"batch of {count}"):
            for variant, row in measure(bench, variants, count, options.rounds).items():
                work = flops(shape, count)
                row["tflop"] = work / 1e12
                row["roofline_percent"] = None if row["answered_by_cache"] else 100 * work / peak / (row["step_ms"] / 1e3)
                row["images_s_of_50_steps"] = count / (50 * row["step_ms"] / 1e3)
                keep({"name": "step", "variant": variant, "batch": count} | row)

    if options.json:
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in found))
        return
    table = Table("step of", "batch", "ms", "over, %", "of matmul peak, %", "peak memory, GB", "answered by cache, %")
    for row in found[2:]:
        told = [
            (row["step_ms"], "{:.2f}"),
            (row.get("over_percent"), "{:+.1f}"),
            (row["roofline_percent"], "{:.1f}"),
            (row["memory_gb"], "{:.1f}"),
            (100 * row["answered_by_cache"], "{:.0f}"),
        ]
        table.add_row(row["variant"], str(row["batch"]), *("" if value is None else form.format(value) for value, form in told))
    Console().print(table)


if __name__ == "__main__":
    main()
