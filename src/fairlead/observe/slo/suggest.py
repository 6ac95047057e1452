"""Objectives to begin with, from a page of metrics: a little less than what was attained."""

from collections import defaultdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

MIN_REQUESTS = 200
"""Of a model, below which nothing can be said of it."""
MAX_MODELS = 30
TARGETS = (0.9999, 0.999, 0.995, 0.99, 0.95, 0.9)
SPEED_TARGET = 0.99
ROOM = 1.25
"""A threshold is so many times what 99% attained."""
HISTOGRAMS = {
    "fairlead_request_seconds": "latency",
    "fairlead_time_to_first_token_seconds": "time_to_first_token",
    "fairlead_inter_token_seconds": "inter_token",
}

Buckets = dict[float, float]


def suggested(page: str) -> list[dict[str, Any]]:
    """As `slos` of fairlead.yaml."""
    wanted = ("fairlead_requests_total", *HISTOGRAMS)
    lines = "\n".join(line for line in page.splitlines() if line.startswith(wanted)) + "\n"
    outcomes: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    buckets: dict[tuple[str, str], Buckets] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            labels = sample.labels
            kind = HISTOGRAMS.get(sample.name.removesuffix("_bucket"))
            if kind is not None and "le" in labels:
                buckets[labels["model"], kind][float(labels["le"])] += sample.value
            elif sample.name == "fairlead_requests_total":
                outcomes[labels["model"]][labels["outcome"]] += sample.value
    busiest = sorted(outcomes, key=lambda model: (-sum(outcomes[model].values()), model))[:MAX_MODELS]
    found: dict[str, dict[str, Any]] = {}
    for model in busiest:
        speeds = {kind: buckets[model, kind] for kind in HISTOGRAMS.values() if (model, kind) in buckets}
        for objective in _of_model(model, outcomes[model], speeds):
            found.setdefault(objective["name"], objective)  # names that differ in odd characters only are one
    return list(found.values())


def _of_model(model: str, outcomes: dict[str, float], speeds: dict[str, Buckets]) -> list[dict[str, Any]]:
    good, bad = outcomes.get("success", 0.0), outcomes.get("failure", 0.0)
    if good + bad < MIN_REQUESTS:
        return []
    name = _name(model)
    target = next((each for each in TARGETS if good / (good + bad) >= each), TARGETS[-1])
    # three nines cannot be seen in a few hundred requests
    target = min(target, 0.999 if good + bad >= 10_000 else 0.99)
    found: list[dict[str, Any]] = [{"name": f"{name}-available", "model": model, "kind": "availability", "target": target}]
    generates = sum(speeds.get("time_to_first_token", {}).values()) > 0
    for kind, buckets in speeds.items():
        if kind == "latency" and generates:
            continue  # a long answer takes long
        threshold = _threshold(buckets)
        if threshold is not None:
            shown = kind.replace("_", "-")
            found.append({"name": f"{name}-{shown}", "model": model, "kind": kind, "target": SPEED_TARGET, "threshold": threshold})
    return found


def _threshold(buckets: Buckets) -> float | None:
    """The edge of the bucket that 99% are in, and some room; None where there are too few, or they are beyond the last edge."""
    edges = sorted(buckets)
    total = buckets[edges[-1]] if edges else 0.0
    if total < MIN_REQUESTS:
        return None
    edge = next(each for each in edges if buckets[each] >= SPEED_TARGET * total)
    return None if edge == float("inf") else float(f"{edge * ROOM:.3g}")


def _name(model: str) -> str:
    name = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in model).strip("._-")
    return name[:40] or "model"
