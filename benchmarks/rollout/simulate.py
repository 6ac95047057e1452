"""A thousand rollouts of each scenario, on the virtual clock: how often a good candidate is sent back, and how soon a bad one.

PYTHONPATH=. python benchmarks/rollout/simulate.py [--runs 1000] [--only errors] [--processes 2]
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.control.traffic import Fault, Kind, Ran, Scenario, simulate

BATCH = 10
CLASSES = (
    Kind(name="interactive", part=0.7, errors=0.002, median=0.02),
    Kind(name="batch", part=0.3, errors=0.03, median=0.2, sigma=0.8),
)

SCENARIOS = (
    # No difference: what is rolled back is rolled back wrongly.
    Scenario("same-10", rate=10.0),
    Scenario("same-100"),
    Scenario("same-1000", rate=1000.0),
    Scenario("same-drift", drift=0.9),
    Scenario("same-classes", kinds=CLASSES, drift=0.5),
    Scenario("same-errors-20%", kinds=(Kind(errors=0.2),)),
    Scenario("same-labels", labels=0.2),
    # The same, but requests are not independent of each other: outside of what the tests promise.
    Scenario("tenants-1000", tenants=1000),
    Scenario("tenants-100", tenants=100, limit=4 * 3600.0),
    Scenario("stalls-0.3%", stalls=0.003),
    Scenario("stalls-1%", stalls=0.01),
    # Worse.
    Scenario("errors-x2-10", rate=10.0, fault=Fault(errors=2.0)),
    Scenario("errors-x2-100", fault=Fault(errors=2.0)),
    Scenario("errors-x2-1000", rate=1000.0, fault=Fault(errors=2.0)),
    Scenario("errors-x2-drift", fault=Fault(errors=2.0), drift=0.9),
    Scenario("errors-x2-late", fault=Fault(errors=2.0, from_share=0.25)),
    Scenario("errors-x3-one-class", kinds=CLASSES, fault=Fault(errors=3.0, only="batch")),
    Scenario("errors-x10", fault=Fault(errors=10.0)),
    Scenario("errors-x100", tick=1.0, fault=Fault(errors=100.0)),
    Scenario("p99+38%", fault=Fault(latency=1.38)),
    Scenario("p99+38%-wide", kinds=(Kind(sigma=1.0),), fault=Fault(latency=1.38)),
    Scenario("p99+38%-10", rate=10.0, fault=Fault(latency=1.38)),
    Scenario("p99+38%-1000", rate=1000.0, fault=Fault(latency=1.38)),
    Scenario("p99+38%-tail", fault=Fault(tail=1.38)),
    Scenario("p99+38%-tail-wide", kinds=(Kind(sigma=1.0),), fault=Fault(tail=1.38)),
    Scenario("crash-10s", tick=1.0, fault=Fault(deaths_per_second=0.1)),
    Scenario("nan-1%", tick=1.0, fault=Fault(nonfinite=0.01)),
    Scenario("labels-0.90-0.80", labels=0.2, fault=Fault(score=-0.1)),
    Scenario("labels-0.90-0.85", labels=0.2, fault=Fault(score=-0.05)),
)


def batch(scenario: Scenario, seeds: Sequence[int]) -> list[Ran]:
    return [simulate(scenario, seed) for seed in seeds]


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def summary(scenario: Scenario, runs: Sequence[Ran]) -> dict[str, object]:
    back = [run for run in runs if run.rolled_back]
    of = back or runs
    return {
        "scenario": scenario.name,
        "runs": len(runs),
        "rolled_back": len(back) / len(runs),
        "promoted": sum(run.promoted for run in runs) / len(runs),
        "under_5": sum(run.rolled_back and run.exposure < 0.05 for run in runs) / len(runs),
        "exposure_median": statistics.median(run.exposure for run in of),
        "exposure_95": quantile([run.exposure for run in of], 0.95),
        "seconds_median": statistics.median(run.seconds for run in of),
        "seconds_95": quantile([run.seconds for run in of], 0.95),
        "reasons": {name: sum(run.reason.split(" ")[0] == name for run in back) for name in {run.reason.split(" ")[0] for run in back}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--only", default="", help="scenarios whose name begins so")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    scenarios = [scenario for scenario in SCENARIOS if scenario.name.startswith(asked.only)]
    console = Console(width=130)
    rows = []
    with ProcessPoolExecutor(asked.processes) as pool, Progress(console=console, transient=True) as progress:
        bar = progress.add_task("rollouts", total=asked.runs * len(scenarios))
        for scenario in scenarios:
            began, runs = time.perf_counter(), []
            progress.update(bar, description=scenario.name)
            seeds = [range(first, min(first + BATCH, asked.runs)) for first in range(0, asked.runs, BATCH)]
            for ran in pool.map(partial(batch, scenario), seeds):
                runs += ran
                progress.advance(bar, len(ran))
            rows.append(summary(scenario, runs) | {"wall_seconds": round(time.perf_counter() - began, 1)})
    table = Table(*("scenario", "rolled back", "with < 5% exposed", "exposure median", "95%", "until then, median", "95%", "took"))
    for row in rows:
        table.add_row(
            str(row["scenario"]),
            f"{row['rolled_back']:.1%}",
            f"{row['under_5']:.1%}",
            f"{row['exposure_median']:.2%}",
            f"{row['exposure_95']:.2%}",
            f"{row['seconds_median']:.0f} s",
            f"{row['seconds_95']:.0f} s",
            f"{row['wall_seconds']} s",
        )
    console.print(table)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{asked.only or 'all'}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
