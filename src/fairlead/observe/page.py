"""What a scrape gets: the text of all metrics, in Prometheus's format 0.0.4 or in OpenMetrics 1.0.

Written here and not by the client library, which takes eight times as long for each line; its parsers check it in the tests.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fairlead.observe.table import TABLE, Metric

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

MANY = 256
"""Samples, or whole histograms, that are joined at a time."""

UNPRINTABLE = dict.fromkeys((*range(0x20), 0x7F, *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}")
ESCAPES = {**UNPRINTABLE, ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}


class Exemplar(NamedTuple):
    """One request of those that a bucket counts."""

    trace_id: str
    value: float
    time: float
    """Seconds since 1970, when it ended."""


def wants_openmetrics(accept: str) -> bool:
    """Whether an Accept header names it, in a version that there is."""
    for offer in accept.split(","):
        kind, *parameters = (part.strip() for part in offer.split(";"))
        if kind == "application/openmetrics-text":
            versions = [each.partition("=")[2].strip('"') for each in parameters if each.startswith("version=")]
            if not versions or versions[0] in ("0.0.1", "1.0.0"):
                return True
    return False


def escaped(value: str) -> str:
    """A label's value. What no text can hold, half characters and control characters, is replaced."""
    if value.isalnum():
        return value
    return value.translate(ESCAPES)


def labels_of(names: Sequence[str], values: Sequence[str]) -> str:
    """In the order of their names."""
    return ",".join([f'{name}="{escaped(value)}"' for name, value in sorted(zip(names, values, strict=True))])


def number(value: float) -> str:
    text = repr(float(value))
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(text, text)


class Page:
    """Filled by metric; only rows of the table can be."""

    def __init__(self, *, openmetrics: bool, hidden: Sequence[str] = ()) -> None:
        """`hidden`: groups of the table that are not shown."""
        self.openmetrics = openmetrics
        self.content_type = OPENMETRICS if openmetrics else PLAIN
        self._lines: dict[str, list[str]] = {name: [] for name, metric in TABLE.items() if metric.group not in hidden}
        self._bounds: dict[str, list[str]] = {}

    def put(self, name: str, value: float, labels: str = "") -> None:
        """`labels`: as `labels_of` makes them."""
        self._lines[name].append(f"{name}{{{labels}}} {number(value)}\n" if labels else f"{name} {number(value)}\n")

    def histogram(
        self, name: str, counts: Sequence[int], total: float, labels: str = "", exemplars: Sequence[Exemplar | None] = ()
    ) -> None:
        """`counts`: of each bucket by itself, () where nobody has begun."""
        ends = self._bounds.get(name)
        if ends is None:
            ends = self._bounds[name] = [f'le="{number(bound)}"}} ' for bound in (*TABLE[name].bounds, float("inf"))]
        lines, begin = list[str](), f"{name}_bucket{{{labels}," if labels else f"{name}_bucket{{"
        num = 0
        for n, end in enumerate(ends):
            if counts:
                num += counts[n]
            exemplar = exemplars[n] if exemplars and self.openmetrics else None
            if exemplar is not None and counts[n]:
                told = f' # {{trace_id="{escaped(exemplar.trace_id)}"}} {number(exemplar.value)} {exemplar.time:.3f}'
                lines.append(f"{begin}{end}{num}.0{told}\n")
            else:
                lines.append(f"{begin}{end}{num}.0\n")
        around = f"{{{labels}}}" if labels else ""
        lines.append(f"{name}_sum{around} {number(total)}\n{name}_count{around} {num}.0\n")
        self._lines[name].append("".join(lines))

    def pieces(self) -> Iterator[bytes]:
        """The text, some of a metric at a time; what was told is gone then."""
        for name in list(self._lines):
            lines = self._lines.pop(name)  # freeing all of them at once would take as long as writing them
            yield self._head(TABLE[name]).encode()
            for begin in range(0, len(lines), MANY):
                yield "".join(lines[begin : begin + MANY]).encode()
        if self.openmetrics:
            yield b"# EOF\n"

    def _head(self, metric: Metric) -> str:
        name = metric.family if self.openmetrics else metric.name
        head = f"# HELP {name} {metric.help}\n# TYPE {name} {metric.kind}\n"
        if self.openmetrics and name.endswith(f"_{metric.unit}"):
            head += f"# UNIT {name} {metric.unit}\n"
        return head
