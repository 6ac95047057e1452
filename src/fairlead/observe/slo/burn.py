"""How fast an error budget burns: the alerts of table 5-8 of the SRE workbook, in proportion to an objective's window.

Burn 1 uses the budget up exactly at the end of its window. Each row looks at two spans: the longer one says that it matters, the
shorter one, a twelfth of it, that it goes on.
"""

from collections.abc import Callable
from typing import NamedTuple

from fairlead.core.slo import DAY, Objective, Severity

HOUR = 3600.0
STANDARD_WINDOW = 30 * DAY
"""That the spans below are for."""
SHORT = 12
HOLD = 0.8
"""Of a row's factor: what fires goes on until it burns less than that, so that it does not flap."""


class Row(NamedTuple):
    severity: Severity
    factor: float
    long: float
    """Seconds."""
    pending: float
    """Seconds that it must be so before it fires ..."""
    calm: float
    """... and must not be so before it is over."""

    @property
    def short(self) -> float:
        return self.long / SHORT


TABLE = (
    Row("page", 14.4, HOUR, 60.0, 300.0),
    Row("page", 6.0, 6 * HOUR, 60.0, 900.0),
    Row("ticket", 1.0, 3 * DAY, 900.0, 3600.0),
)


class Events(NamedTuple):
    good: int = 0
    bad: int = 0

    @property
    def total(self) -> int:
        return self.good + self.bad

    def burn(self, objective: Objective) -> float:
        """0 where nothing came."""
        return self.bad / self.total / objective.budget if self.total else 0.0


Within = Callable[[float], Events]
"""What came in the last so many seconds."""


class Condition(NamedTuple):
    severity: Severity
    active: bool
    """It may begin to fire."""
    holds: bool
    """It goes on where it fires."""
    row: Row
    """That says so; of several the one that burns fastest."""


def rows_of(objective: Objective) -> tuple[Row, ...]:
    scale = objective.window / STANDARD_WINDOW
    return tuple(row._replace(long=row.long * scale) for row in TABLE)


def spans_of(objective: Objective) -> tuple[float, ...]:
    """Seconds, the shortest first."""
    return tuple(sorted({span for row in rows_of(objective) for span in (row.short, row.long)}))


def conditions(objective: Objective, within: Within) -> tuple[Condition, ...]:
    """One for each severity that the objective may raise."""
    found: dict[Severity, Condition] = {}
    for row in rows_of(objective):
        if row.severity not in objective.severities:
            continue
        long, short = within(row.long), within(row.short)
        enough = long.total >= objective.min_events and long.bad >= objective.min_bad
        least = min(long.burn(objective), short.burn(objective))
        condition = Condition(row.severity, enough and least >= row.factor, least >= HOLD * row.factor, row)
        known = found.get(row.severity)
        if known is None or (condition.active, condition.holds) > (known.active, known.holds):
            found[row.severity] = condition
    return tuple(found.values())


def span_name(seconds: float) -> str:
    """As Prometheus writes it: 1h, 5m, 1h10m, 1m10s."""
    left, words = round(seconds), ""
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        number, left = divmod(left, size)
        words += f"{number}{unit}" if number else ""
    return words or "0s"
