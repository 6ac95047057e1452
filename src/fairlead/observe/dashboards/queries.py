"""What dashboards ask of Prometheus. A query is made of rows of the table: the metric is there, with those labels, and has its unit."""

from msgspec import Struct

from fairlead.observe.table import TABLE, Metric

WINDOW = "$__rate_interval"
"""Grafana fills it in, and `$model` and the like."""
VARIABLES = {
    "model": ("fairlead_requests_total", "Model"),
    "version": ("fairlead_requests_total", "Version"),
    "tenant": ("fairlead_tenant_requests_total", "Tenant"),
}
"""Label → where its values come from, and what it is called."""
UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "percentunit", "watts": "watt", "celsius": "celsius"}
"""The table's → Grafana's. Others are plain numbers."""


class Query(Struct, frozen=True):
    expr: str
    legend: str
    unit: str
    """Grafana's."""


def _metric(name: str, *labels: str) -> Metric:
    """What a query may ask for. A wrong one is a bug here."""
    metric = TABLE[name]
    assert set(labels) <= set(metric.labels), f"{name} has no {set(labels) - set(metric.labels)}"
    return metric


def _selected(metric: Metric, suffix: str = "", **labels: str) -> str:
    """`labels`: what else they must be, each a regular expression."""
    _metric(metric.name, *labels)
    chosen = [f'{label}=~"${label}"' for label in metric.labels if label in VARIABLES and label not in labels]
    chosen += [f'{label}=~"{value}"' for label, value in labels.items()]
    return f"{metric.name}{suffix}{{{','.join(chosen)}}}" if chosen else f"{metric.name}{suffix}"


def _by(by: tuple[str, ...]) -> str:
    return f" by ({', '.join(by)})" if by else ""


def _legend(by: tuple[str, ...], text: str = "") -> str:
    return " ".join([*([text] if text else []), *(f"{{{{{label}}}}}" for label in by)]) or "all"


def _unit(metric: Metric, *, per_second: bool = False) -> str:
    if not per_second:
        return UNITS.get(metric.unit, "short")
    return "reqps" if metric.unit == "requests" else f"suffix: {metric.unit}/s"


def rate(name: str, *by: str, text: str = "", unit: str = "", **labels: str) -> Query:
    """Of a counter, per second."""
    metric = _metric(name, *by)
    assert metric.kind == "counter"
    expr = f"sum{_by(by)} (rate({_selected(metric, **labels)}[{WINDOW}]))"
    return Query(expr, _legend(by, text), unit or _unit(metric, per_second=True))


def quantile(q: float, name: str, *by: str, **labels: str) -> Query:
    metric = _metric(name, *by)
    assert metric.kind == "histogram"
    expr = f"histogram_quantile({q:g}, sum by ({', '.join(('le', *by))}) (rate({_selected(metric, '_bucket', **labels)}[{WINDOW}])))"
    return Query(expr, _legend(by, f"p{q * 100:g}"), _unit(metric))


def mean(name: str, *by: str, text: str = "mean") -> Query:
    """Of a histogram."""
    metric = _metric(name, *by)
    assert metric.kind == "histogram"
    total, count = (f"sum{_by(by)} (rate({_selected(metric, suffix)}[{WINDOW}]))" for suffix in ("_sum", "_count"))
    return Query(f"{total} / {count}", _legend(by, text), _unit(metric))


def now(name: str, *by: str, how: str = "sum", text: str = "", **labels: str) -> Query:
    """Of a gauge."""
    metric = _metric(name, *by)
    assert metric.kind == "gauge"
    return Query(f"{how}{_by(by)} ({_selected(metric, **labels)})", _legend(by, text), _unit(metric))


def ratio(part: Query, whole: Query, legend: str) -> Query:
    """Nothing of nothing is nothing: no line where nobody asked."""
    return Query(f"{part.expr} / ({whole.expr} > 0)", legend, "percentunit")


def quantiles(name: str, *by: str) -> tuple[Query, ...]:
    return tuple(quantile(q, name, *by) for q in (0.5, 0.95, 0.99))


def errors(*by: str) -> Query:
    """The part of the requests that failed, refusals and those who left aside."""
    failed = rate("fairlead_requests_total", *by, outcome="failure")
    return ratio(failed, rate("fairlead_requests_total", *by, outcome="success|failure"), _legend(by, "failed"))


def batch_rows(*by: str) -> Query:
    metric = _metric("fairlead_batch_rows", *by)
    return Query(f"sum{_by(by)} (rate({_selected(metric, '_sum')}[{WINDOW}]))", _legend(by), _unit(metric, per_second=True))


def plain(query: Query) -> Query:
    """As a number: a ratio that may be greater than 1."""
    return Query(query.expr, query.legend, "short")


def hourly(per_second: Query) -> Query:
    return Query(f"3600 * {per_second.expr}", per_second.legend, "short")
