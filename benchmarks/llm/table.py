"""Markdown from a run's results: medians of the undisturbed turns.  python table.py RESULTS.jsonl..."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from workloads import WORKLOADS

DISTURBED_CORES = 0.25
"""Taken by other work on the machine while an engine was measured."""
VLLM = ("vllm", "vllm-2")
MEASURED = {"offline": ("value",), "served": ("tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")}

TARGETS = {
    "S": (
        # title, workload, field, against, must, good; against engines: how many times better than the best of them
        ("start to ready, s", "start", "seconds", None, 6.0, 3.0),
        ("memory, GB", "end", "memory_bytes", None, 0.6, 0.45),
        ("single stream / best of vLLM's settings", "single", "value", VLLM, 1.5, 2.0),
        ("batch 32 / the same", "batch32", "value", VLLM, 1.1, 1.4),
        ("prefill 1 x 1024 / the same", "prefill", "value", VLLM, 1.0, 1.3),
        ("shared prefix / the same", "shared", "value", VLLM, 1.0, 1.3),
        ("HTTP, 8 clients / the same", "http", "tok_s", VLLM, 1.3, 1.8),
        ("HTTP, 8 clients: TTFT p50, ms", "http", "ttft_p50_ms", None, 80.0, 50.0),
        ("batch 32 / transformers' continuous batching", "batch32", "value", ("transformers-cb",), 3.0, 4.0),
        ("prefix cache on / off, 8 requests to their first token", "first", "value", ("fairlead-noprefix",), 3.0, 5.0),
    ),
    "M": (
        ("single stream, share of the bandwidth roofline", "single", "value", "single_tok_s", 0.65, 0.85),
        ("prefill 1 x 1024, share of the GEMM rate", "prefill", "value", "prefill_tok_s", 0.45, 0.65),
        ("batch 32 / vLLM on both cores", "batch32", "value", ("vllm-2",), 1.0, 1.3),
    ),
}
LOWER_IS_BETTER = {("start", "seconds"), ("end", "memory_bytes"), ("http", "ttft_p50_ms"), ("shared", "value"), ("first", "value")}


class Results:
    """Of one model; of each engine and workload the undisturbed turns, or the least disturbed one where there are none."""

    def __init__(self, path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        self.model = rows[0]["model"]
        self.limits = max((row for row in rows if row["kind"] == "limits"), key=lambda row: row["single_tok_s"])
        groups: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
        for row in rows:
            if row["kind"] != "limits":
                workload = "http" if row["workload"].startswith("http") else row["workload"]
                groups[row["kind"], row["engine"], workload].append(row)
        self.groups = {key: least_disturbed(group) for key, group in groups.items()}
        self.num_turns, self.num_used = len(rows), sum(map(len, self.groups.values()))
        self.num_disturbed = sum(disturbed(row) for group in self.groups.values() for row in group)

    def engines(self, kind: str) -> list[str]:
        return list(dict.fromkeys(engine for of, engine, _ in self.groups if of == kind))

    def get(self, engine: str, workload: str, field: str, kind: str | None = None) -> float | None:
        """None where it was not measured."""
        rows = self.groups.get((kind or ("served" if workload == "http" else "offline"), engine, workload), ())
        return median(row[field] for row in rows) if rows else None

    def medians(self) -> dict:
        told: dict = {"model": self.model, "limits": self.limits, "offline": {}, "served": {}}
        for (kind, engine, workload), rows in self.groups.items():
            fields = [field for field in ("value", "seconds", "memory_bytes", *MEASURED["served"]) if field in rows[0]]
            of = told[kind].setdefault(engine, {})
            of[workload] = {field: round(median(row[field] for row in rows), 3) for field in fields} | {"turns": len(rows)}
        return told


def disturbed(row: dict) -> bool:
    """An engine that goes before other work leaves it only the cores that it does not use."""
    return not row.get("preceded") and row.get("other_cores", 0) > DISTURBED_CORES


def least_disturbed(group: list[dict]) -> list[dict]:
    return [row for row in group if not disturbed(row)] or [min(group, key=lambda row: row["other_cores"])]


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def offline(results: Results) -> Iterator[str]:
    """What each engine does, and how many times what vLLM's better setting does it at."""
    names = [name for name in WORKLOADS if any(key[2] == name for key in results.groups)]
    heads = [f"{WORKLOADS[name].title}, {WORKLOADS[name].unit} | x vLLM" for name in names]
    yield "| offline | start s | memory GB | " + " | ".join(heads) + " |"
    yield "|---|--:|--:|" + "--:|" * 2 * len(names)
    for engine in results.engines("offline"):
        memory = results.get(engine, "end", "memory_bytes") or results.get(engine, "start", "memory_bytes")
        cells = [number(results.get(engine, "start", "seconds")), number(memory / 1e9 if memory else None)]
        for name in names:
            value = results.get(engine, name, "value")
            cells += [number(value), number(times_better(results, value, VLLM, name, "value"))]
        yield f"| {engine} | " + " | ".join(cells) + " |"


def served(results: Results) -> Iterator[str]:
    yield "| HTTP, 8 clients | start s | memory GB | tok/s | x vLLM | TTFT p50 ms | p99 | ITL p50 ms | gap p99 ms |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for engine in results.engines("served"):
        start = results.get(engine, "start", "seconds", "served")
        memory = results.get(engine, "end", "memory_bytes", "served") or results.get(engine, "start", "memory_bytes", "served")
        rate, *latencies = (results.get(engine, "http", field) for field in MEASURED["served"])
        ratio = times_better(results, rate, VLLM, "http", "tok_s")
        cells = [start, memory / 1e9 if memory else None, rate, ratio, *latencies]
        yield f"| {engine} | " + " | ".join(map(number, cells)) + " |"


def times_better(results: Results, value: float | None, than: tuple[str, ...], workload: str, field: str) -> float | None:
    """Above 1 is better, whichever way the measure points."""
    others = [other for engine in than if (other := results.get(engine, workload, field)) is not None]
    if value is None or not others:
        return None
    return min(others) / value if (workload, field) in LOWER_IS_BETTER else value / max(others)


def targets(results: Results) -> Iterator[str]:
    yield "| Fairlead | must | good | measured | |"
    yield "|---|--:|--:|--:|---|"
    for title, workload, field, against, must, good in TARGETS[results.model]:
        value = results.get("fairlead", workload, field)
        if value is not None and isinstance(against, str):
            value /= results.limits[against]
        elif against:
            value = times_better(results, value, against, workload, field)
        elif value is not None and field == "memory_bytes":
            value /= 1e9
        sign = -1 if not against and (workload, field) in LOWER_IS_BETTER else 1
        mark = "not measured"
        if value is not None:
            mark = "good" if sign * value >= sign * good else "must" if sign * value >= sign * must else "**missed**"
        yield f"| {title} | {must:g} | {good:g} | {number(value)} | {mark} |"


def rooflines(results: Results) -> Iterator[str]:
    limits = results.limits
    threads = ", ".join(f"{rate:.1f} GB/s on {count}" for count, rate in limits["gb_per_s"].items())
    yield f"Reading {limits['weight_bytes'] / 1e6:,.0f} MB of weights: {threads} thread(s), so at most {limits['single_tok_s']:,.0f} tok/s of one stream."
    yield f"GEMM: bf16 {limits['bf16_gflops']}, float32 {limits['fp32_gflops']} GFLOP/s, so at most {limits['prefill_tok_s']:,} prompt tok/s.\n"
    yield "| share of the roofline | single stream | prefill |"
    yield "|---|--:|--:|"
    for engine in results.engines("offline"):
        single, prefill = results.get(engine, "single", "value"), results.get(engine, "prefill", "value")
        shares = [single / limits["single_tok_s"] if single else None, prefill / limits["prefill_tok_s"] if prefill else None]
        yield f"| {engine} | " + " | ".join("" if share is None else f"{share:.0%}" for share in shares) + " |"


def markdown(results: Results) -> Iterator[str]:
    yield f"### {results.model}\n"
    yield from offline(results)
    yield ""
    yield from served(results)
    yield ""
    yield from rooflines(results)
    if "fairlead" in results.engines("offline"):
        yield ""
        yield from targets(results)
    yield (
        f"\nMedians of the turns in which other work took at most {DISTURBED_CORES} of a core, or of the least disturbed one:"
        f" {results.num_disturbed} of the {results.num_used} measurements used were disturbed, of {results.num_turns} taken."
    )


def main() -> None:
    for name in sys.argv[1:]:
        print(*markdown(Results(Path(name))), sep="\n")


if __name__ == "__main__":
    main()
