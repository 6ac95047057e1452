"""What an incident cost, from samples of the metrics: the same text that a scraper reads."""

from collections.abc import Iterable, Mapping

from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

REQUESTS = "fairlead_requests_total"
REFUSED = "fairlead_gateway_refused_total"
EVENTS = "fairlead_slo_events_total"
BUDGET = "fairlead_slo_budget_ratio"

Series = tuple[str, tuple[tuple[str, str], ...]]
Values = Mapping[Series, float]


class OfModel(Struct):
    requests: int = 0
    failed: int = 0
    refused: int = 0
    versions: tuple[str, ...] = ()


class OfObjective(Struct):
    good: int = 0
    bad: int = 0
    before: float | None = None
    """Share of the budget that was left; None: not known."""
    after: float | None = None


class Impact(Struct):
    models: dict[str, OfModel]
    objectives: dict[str, OfObjective]


def values_of(text: str) -> Values:
    """Those series that matter here. Raises ValueError for what is no exposition."""
    wanted = (REQUESTS, REFUSED, EVENTS, BUDGET)
    lines = (line for line in text.splitlines() if line.startswith(wanted))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families("\n".join(lines) + "\n")
        for sample in family.samples
    }


def grown(samples: Iterable[Values]) -> dict[Series, float]:
    """By how much each counter grew over samples in the order of their times. One that fell began again, with its server."""
    total: dict[Series, float] = {}
    before: Values | None = None
    for values in samples:
        for series, value in values.items():
            if before is not None and not series[0].endswith("_ratio"):
                last = before.get(series, 0.0)
                total[series] = total.get(series, 0.0) + (value - last if value >= last else value)
        before = values
    return total


def impact_of(samples: list[Values]) -> Impact:
    models: dict[str, OfModel] = {}
    objectives: dict[str, OfObjective] = {}
    for (name, pairs), number in grown(samples).items():
        labels, count = dict(pairs), round(number)
        if name == EVENTS:
            objective = objectives.setdefault(labels["slo"], OfObjective())
            setattr(objective, labels["outcome"], count)
            continue
        model = models.setdefault(labels["model"], OfModel())
        if name == REQUESTS:
            model.requests += count
            model.failed += count if labels["outcome"] == "failure" else 0
            if count:
                model.versions = tuple(sorted({*model.versions, labels["version"]}))
        else:
            model.refused += count
    for which, values in (("before", samples[0]), ("after", samples[-1])) if samples else ():
        for (name, pairs), value in values.items():
            if name == BUDGET:
                setattr(objectives.setdefault(dict(pairs)["slo"], OfObjective()), which, value)
    asked = {name: model for name, model in models.items() if model.requests or model.refused}
    return Impact(asked, objectives)
