"""Fairlead's image engine against diffusers, the same random weights in the same process, in turns; a table at the end.

python bench.py [--quick] [--only MEASURE...] [--device cpu|cuda] [--json]      (the project's environment)

Results are lines of JSON in results/.
"""

import argparse
import json
import queue
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from io import BytesIO
from pathlib import Path
from statistics import fmean, median

warnings.simplefilter("ignore")

import torch  # noqa: E402
from models import SHAPES, save  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from fairlead.backends.diffusion import BACKEND, DiffusionThread  # noqa: E402
from fairlead.core.errors import FairleadError  # noqa: E402
from fairlead.core.generation import Paint  # noqa: E402
from fairlead.core.pictures import check  # noqa: E402
from fairlead.core.specs import DiffusionSpec, InstancesSpec, ModelSpec  # noqa: E402
from fairlead.diffusion.decoder import DecoderHere  # noqa: E402
from fairlead.diffusion.engine import DiffusionEngine  # noqa: E402
from fairlead.diffusion.scheduler import Scheduler  # noqa: E402

HERE = Path(__file__).parent
TARGETS = {
    "together": ("8 at once / one by one, images/s", lambda value: value >= 2.0, "2 or more"),
    "overhead": ("engine over a bare loop at batch 1, %", lambda value: value < 3.0, "under 3"),
    "start": ("steps until a short job behind a long one computes", lambda value: value <= 2, "2 or fewer"),
    "cancel": ("steps until a cancelled job is out of the batch", lambda value: value <= 1, "1 or fewer"),
}
CLIENTS = 8
SECONDS = 600.0
numbers = iter(range(1, 1 << 30))


class Served:
    """The engine on its threads, as a replica process has it."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        spec = ModelSpec(name="bench", diffusion=DiffusionSpec(prompt_cache=0), instances=InstancesSpec(device=device))
        self.engine: DiffusionThread = BACKEND.load_engine(folder, spec, threads)
        self.pipe = self.engine.family.parts.pipe
        self.info = self.engine.info.image
        self._answers: queue.Queue = queue.Queue()

    @contextmanager
    def running(self) -> Iterator[None]:
        def deliver(answers: list) -> None:
            for answer in answers:
                self._answers.put(answer)

        thread = threading.Thread(target=self.engine.run, args=(deliver,))
        thread.start()
        try:
            yield
        finally:
            self.engine.close()
            thread.join()

    def paint(self, paints: list[Paint]) -> float:
        """Seconds until the last picture."""
        started = time.perf_counter()
        works = {next(numbers) for _ in paints}
        for work, paint in zip(works, paints, strict=True):
            self.engine.submit(work, paint, priority=0, arrived=time.perf_counter(), deadline=0.0)
        while works:
            work, answer = self._answers.get(timeout=SECONDS)
            if isinstance(answer, FairleadError):
                raise answer
            if answer.usage is not None:
                works.discard(work)
        return time.perf_counter() - started


def one_by_one(pipe, paints: list[Paint]) -> float:
    """What a script does: the pipeline, called for each."""
    started = time.perf_counter()
    for paint in paints:
        generator = torch.Generator().manual_seed(paint.seed)
        image = pipe(
            paint.text,
            width=paint.width,
            height=paint.height,
            num_inference_steps=paint.num_steps,
            guidance_scale=paint.guidance,
            generator=generator,
        ).images[0]
        image.save(BytesIO(), "PNG", compress_level=4)
    return time.perf_counter() - started


@torch.inference_mode()
def bare(pipe, paint: Paint) -> float:
    """The least that diffusers' parts can be called with."""
    started = time.perf_counter()
    rows, without = pipe.encode_prompt(paint.text, pipe.device, 1, True, negative_prompt="")
    rows = torch.cat([without, rows])
    factor = pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, paint.height // factor, paint.width // factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(paint.seed)).to(pipe.device, pipe.unet.dtype)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(paint.num_steps)
    latents = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        low, high = pipe.unet(inputs, timestep.to(pipe.device), encoder_hidden_states=rows, return_dict=False)[0].chunk(2)
        latents = scheduler.step(low + paint.guidance * (high - low), timestep, latents, return_dict=False)[0]
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    image.save(BytesIO(), "PNG", compress_level=4)
    return time.perf_counter() - started


def paints(count: int, *, size: int, num_steps: int) -> list[Paint]:
    """Texts of their own: no cache of prompts helps."""
    seeds = [next(numbers) for _ in range(count)]
    return [Paint(text=f"a picture of {seed}", seed=seed, width=size, height=size, num_steps=num_steps, guidance=7.5) for seed in seeds]


def together(served: Served, size: int, num_steps: int, rounds: int, say: Callable[[str], None]) -> dict:
    ours, theirs = [], []
    with served.running():
        served.paint(paints(CLIENTS, size=size, num_steps=2))
        one_by_one(served.pipe, paints(1, size=size, num_steps=2))
        for number in range(rounds):
            ours.append(served.paint(paints(CLIENTS, size=size, num_steps=num_steps)))
            theirs.append(one_by_one(served.pipe, paints(CLIENTS, size=size, num_steps=num_steps)))
            say(f"round {number + 1}: {CLIENTS / ours[-1]:.2f} against {CLIENTS / theirs[-1]:.2f} images/s")
    ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
    return {"value": ratio, "images_s": CLIENTS / median(ours), "diffusers_images_s": CLIENTS / median(theirs)}


def overhead(served: Served, size: int, num_steps: int, rounds: int, say: Callable[[str], None]) -> dict:
    """In processor time where the processor computes: what other work on the machine takes does not count. On one thread, because
    torch's threads spin while they wait for each other."""
    clock = time.process_time if served.pipe.device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {"ours": [], "theirs": []}

    def timed(name: str, call: Callable[[Paint], float]) -> None:
        (paint,) = paints(1, size=size, num_steps=num_steps)
        started = clock()
        call(paint)
        times[name].append(clock() - started)

    with served.running():
        served.paint(paints(1, size=size, num_steps=2))
        bare(served.pipe, *paints(1, size=size, num_steps=2))
        for number in range(rounds):
            pair = [("ours", lambda paint: served.paint([paint])), ("theirs", lambda paint: bare(served.pipe, paint))]
            for name, call in pair if number % 2 else pair[::-1]:
                timed(name, call)
    ours, theirs = sorted(times["ours"]), sorted(times["theirs"])
    say(f"{rounds} pictures each: {median(ours):.4f} against {median(theirs):.4f} s, at best {ours[0]:.4f} against {theirs[0]:.4f}")
    # the better half of each: a neighbour that empties the cache makes some slower
    best, their_best = (fmean(each[: len(each) // 2]) for each in (ours, theirs))
    return {
        "value": 100 * (best / their_best - 1),
        "of_medians": 100 * (median(ours) / median(theirs) - 1),
        "of_bests": 100 * (ours[0] / theirs[0] - 1),
        "step_ms": 1e3 * best / num_steps,
        "bare_step_ms": 1e3 * their_best / num_steps,
    }


class Stepped:
    """The engine driven step by step, and which requests each forward computed."""

    def __init__(self, served: Served, budget: int) -> None:
        self.family = served.engine.family
        scheduler = Scheduler(max_num_seqs=8, max_batch_tokens=budget, max_waiting=100)
        self.engine = DiffusionEngine(self.family, scheduler, DecoderHere(self.family, "bench"))

    def add(self, work: int, *, size: int, num_steps: int) -> None:
        (paint,) = paints(1, size=size, num_steps=num_steps)
        self.engine.add(work, check(paint, self.family.info))

    def steps_until(self, condition: Callable[[set[int]], bool]) -> int:
        """How many steps it takes until one whose works are as told."""
        for number in range(1, 1000):
            computed = {work for work, answer in self.engine.step() if getattr(answer, "progress", None) is not None}
            if condition(computed):
                return number
        raise RuntimeError("it never came to that")


def starts(served: Served, size: int) -> dict:
    """The short one of the same size, of another, and where a forward has room for one picture only."""
    counts = []
    for budget, other in ((4096, size), (4096, 2 * size), (1, size), (1, 2 * size)):
        it = Stepped(served, budget)
        it.add(1, size=size, num_steps=50)
        it.steps_until(lambda works: 1 in works)
        it.add(2, size=other, num_steps=4)
        counts.append(it.steps_until(lambda works: 2 in works))
    return {"value": max(counts), "each": counts}


def cancels(served: Served, size: int) -> dict:
    it = Stepped(served, 4096)
    it.add(1, size=size, num_steps=50)
    it.add(2, size=size, num_steps=50)
    it.steps_until(lambda works: {1, 2} <= works)
    it.engine.abort(1)
    return {"value": it.steps_until(lambda works: works == {2})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--json", action="store_true", help="lines of JSON in place of the table")
    options = parser.parse_args()
    console = Console(stderr=True)
    results = HERE / "results" / f"{datetime.now():%Y%m%d-%H%M%S}.jsonl"
    results.parent.mkdir(exist_ok=True)
    rounds, few = (2, 6) if options.quick else (7, 30)
    found: dict[str, dict] = {}

    with tempfile.TemporaryDirectory() as home:
        measured: list[tuple[str, str, int, Callable[[Served], dict]]] = [  # 0 threads: as torch has them
            ("together", "S", 0, lambda served: together(served, SHAPES["S"].size, 20, rounds, console.print)),
            ("overhead", "M", 1, lambda served: overhead(served, SHAPES["M"].size, 20, few, console.print)),
            ("start", "S", 0, lambda served: starts(served, SHAPES["S"].size)),
            ("cancel", "S", 0, lambda served: cancels(served, SHAPES["S"].size)),
        ]
        num_threads = torch.get_num_threads()
        for name, shape, threads, measure in measured:
            if name not in options.only:
                continue
            folder = Path(home) / shape
            if not folder.exists():
                save(shape, folder)
            with console.status(f"{name} ({shape})"):
                row = {"name": name, "model": shape, "device": options.device} | measure(
                    Served(folder, options.device, threads or num_threads)
                )
            found[name] = row
            with results.open("a") as out:
                out.write(json.dumps(row) + "\n")

    if options.json:
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in found.values()))
        return
    table = Table("measure", "model", "value", "target", "")
    for name, row in found.items():
        title, reached, target = TARGETS[name]
        table.add_row(title, row["model"], f"{row['value']:.3g}", target, "[green]reached" if reached(row["value"]) else "[red]missed")
    Console().print(table)


if __name__ == "__main__":
    main()
