"""What counting costs on the hot path, and what a scrape costs with many loaded versions.

    python benchmarks/observe/metrics.py [--versions 1 100 1000]

Prints JSON lines: nanoseconds of one observation of each kind; for each number of versions the text's size, how long a scrape takes in a
loop that has nothing else to do, and the longest time that another task of the loop
waited for its turn.
"""

import argparse
import asyncio
import json
import time
import timeit
from collections.abc import Callable

from fairlead.core.generation import EngineStats, Phase, Usage
from fairlead.core.timeline import BatchNote, Phases, Timeline
from fairlead.observe.counts import Counts
from fairlead.observe.metrics import Histogram, Metrics, ModelMetrics
from fairlead.observe.table import SECONDS
from fairlead.observe.traffic import Traffic

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
REPEAT, NUMBER = 5, 20_000


def timed(act: Callable[[], object]) -> float:
    """Nanoseconds of one call: the best of some."""
    return min(timeit.repeat(act, repeat=REPEAT, number=NUMBER)) / NUMBER * 1e9


def tensors() -> Timeline:
    made = Timeline(request_id="r", protocol="http", arrived=1.0, kind="infer", model="m", version="1", tenant="acme", outcome="success")
    note = BatchNote("m", "1", 1, "idle", 1, 1, 0, 1.1)
    made.ended, made.events = (
        2.0,
        [(1.1, "decoded", {"bytes": 100}), (1.2, "batched", note), (1.3, "computed", None), (1.4, "encoded", None)],
    )
    return made


def generation() -> Timeline:
    made = Timeline(
        request_id="r", protocol="http", arrived=1.0, kind="generate", model="chat", version="1", tenant="acme", outcome="success"
    )
    made.usage, made.cost, made.ended = Usage(prompt_tokens=100, completion_tokens=20), 0.01, 2.0
    made.events = [(1.1, "queued", {"ahead": 1}), (1.2, "turn", None), (1.9, "engine", Phases("chat", "1", 0, [Phase("decode", 0.1, 0.5)]))]
    return made


def observations() -> dict[str, float]:
    """By what is counted."""
    histogram, counts, model = Histogram(SECONDS), Counts(), ModelMetrics("m", "1", queue=lambda: (0, 0), restarts=lambda: 0)
    traffic, one, chat = Traffic(), [tensors()], [generation()]
    empty = timed(lambda: None)
    return {
        "histogram": timed(lambda: histogram.observe(0.003)) - empty,
        "counter": timed(lambda: counts.add("fairlead_gateway_refused_total", "m", "queue-full")) - empty,
        "batch": timed(lambda: model.batch(8, "full", 0.001, 0.01, 0.001)) - empty,
        "finished request of tensors, off the hot path": timed(lambda: traffic(one)) - empty,
        "finished generation, off the hot path": timed(lambda: traffic(chat)) - empty,
    }


def loaded(versions: int) -> Metrics:
    """Half of them tensor models, half engines."""
    metrics = Metrics()
    stats = EngineStats(finished={"stop": 1}, num_blocks=100, num_free_blocks=50, step_time=([1] * 18, 3.0))
    for number in range(versions):
        model = ModelMetrics(
            f"model-{number}", "1", queue=lambda: (0, 0), restarts=lambda: 0, engine=(lambda: stats) if number % 2 else None
        )
        model.latency.observe(0.003)
        metrics.models[model.model, "1"] = model
    return metrics


async def scraped(versions: int) -> dict[str, object]:
    metrics, late = loaded(versions), [0.0]

    async def watch() -> None:
        while True:
            began = time.thread_time()  # of this thread: what else the machine does is not ours
            await asyncio.sleep(0)
            late[0] = max(late[0], time.thread_time() - began)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        _, text = await metrics.scrape(OPENMETRICS)
        seconds.append(time.perf_counter() - began)
    watching.cancel()
    began = time.perf_counter()
    metrics.text(OPENMETRICS)
    at_once = time.perf_counter() - began
    return {
        "versions": versions,
        "series": text.count(b"\n") - text.count(b"\n# "),
        "bytes": len(text),
        "seconds": round(min(seconds), 4),
        "seconds_without_slices": round(at_once, 4),
        "longest_wait_of_others_ms": round(late[0] * 1000, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, nargs="+", default=[1, 100, 1000])
    for name, nanoseconds in observations().items():
        print(json.dumps({"observation": name, "nanoseconds": round(nanoseconds)}))
    for versions in parser.parse_args().versions:
        print(json.dumps(asyncio.run(scraped(versions))))


if __name__ == "__main__":
    main()
