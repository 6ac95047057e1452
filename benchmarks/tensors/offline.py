"""The physical limit: the bare model in a loop, one thread, by batch size; prints one JSON line per size.

python offline.py --workload w1 [--seconds 1] [--label round0]
"""

import argparse
import json
import time

import numpy as np
from models import SHAPES, predictor, row

SIZES = (1, 8, 64)


def measure(workload: str, size: int, seconds: float) -> dict:
    predict = predictor(workload)
    x = np.repeat(row(workload), size, axis=0)
    predict(x)
    times, until = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        predict(x)
        times.append(time.perf_counter() - started)
    middle = float(np.median(times))
    return {"kind": "offline", "workload": workload, "batch": size, "ms": round(middle * 1e3, 4), "rows_per_s": round(size / middle)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", required=True, choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--label", default="")
    args = parser.parse_args()
    for size in SIZES:
        print(json.dumps(measure(args.workload, size, args.seconds) | {"label": args.label}), flush=True)
