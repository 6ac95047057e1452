"""Objectives with their error budgets, and alerts, as they stand now."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from msgspec import Struct, field
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import NoQuery, query_of
from fairlead.api.admin_route import operation
from fairlead.api.web import json_response
from fairlead.core.slo import Kind, Severity
from fairlead.observe.slo.board import Alert
from fairlead.observe.slo.burn import span_name
from fairlead.observe.slo.slos import Shown, Slos

Runbook = Callable[[str], str]


class ObjectiveAlert(Struct, frozen=True, kw_only=True):
    severity: Severity
    state: Literal["pending", "firing", "resolved"]
    since: float
    """Seconds since 1970."""


class ShownObjective(Struct, frozen=True, kw_only=True):
    name: str
    model: str
    """A name or a pattern; "": all."""
    qos_class: str = field(name="class")
    """"": all."""
    kind: Kind
    target: float
    threshold: float | None
    """Seconds; null of availability."""
    window: float
    """Seconds."""
    good: int
    bad: int
    """Requests of the window, of all servers that share a store."""
    attained: float | None
    """null: nothing came."""
    budget_left: float
    """From 0 (used up, or more than that) to 1."""
    burn: dict[str, float]
    """Span → how many times as fast as it may the budget burnt in it."""
    alerts: list[ObjectiveAlert]
    enough: bool
    """Whether so much came that an alert may fire."""


class Objectives(Struct, frozen=True, kw_only=True):
    objectives: list[ShownObjective]


class ShownAlert(Struct, frozen=True, kw_only=True):
    id: str
    alert: str
    severity: Severity
    subject: str
    """The objective, or what else it is about; "": the server."""
    summary: str
    state: Literal["pending", "firing", "resolved"]
    began: float
    since: float
    """In this state."""
    runbook: str


class Alerts(Struct, frozen=True, kw_only=True):
    alerts: list[ShownAlert]
    """That are pending or fire: pages first."""
    recent: list[ShownAlert]
    """Resolved, the newest first."""


class SloOperations:
    def __init__(self, slos: Slos) -> None:
        self.slos = slos
        self.operations = (
            operation("GET", "/admin/slo", "adminSlo", "Objectives, what is left of their budgets, and how fast that burns", self.list, Objectives),
            operation("GET", "/admin/alerts", "adminAlerts", "Alerts that are pending, fire, or did", self.alerts, Alerts),
        )  # fmt: skip

    async def list(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(Objectives(objectives=[shown_objective(each) for each in self.slos.shown()]))

    async def alerts(self, http: Request) -> Response:
        query_of(http, NoQuery)
        board, runbook = self.slos.board, self.slos.runbook
        return json_response(Alerts(alerts=shown_alerts(board.alerts(), runbook), recent=shown_alerts([*board.past][::-1], runbook)))


def shown_objective(shown: Shown) -> ShownObjective:
    reading, objective = shown.reading, shown.reading.objective
    return ShownObjective(
        name=objective.name,
        model=objective.model,
        qos_class=objective.qos_class,
        kind=objective.kind,
        target=objective.target,
        threshold=objective.threshold or None,
        window=objective.window,
        good=reading.events.good,
        bad=reading.events.bad,
        attained=reading.attained,
        budget_left=min(max(reading.budget_left, 0.0), 1.0),
        burn={span_name(span): burn for span, burn in reading.burn.items()},
        alerts=[ObjectiveAlert(severity=each.severity, state=each.state, since=each.since) for each in shown.alerts],
        enough=reading.enough,
    )


def shown_alerts(alerts: Sequence[Alert], runbook: Runbook) -> list[ShownAlert]:
    return [shown_alert(each, runbook) for each in alerts]


def shown_alert(alert: Alert, runbook: Runbook) -> ShownAlert:
    return ShownAlert(
        id=alert.id,
        alert=alert.name,
        severity=alert.severity,
        subject=alert.subject,
        summary=alert.summary,
        state=alert.state,
        began=alert.began,
        since=alert.since,
        runbook=runbook(alert.name),
    )


def slo_state(slos: Slos) -> dict[str, Any]:
    """The same two answers, for an incident's archive."""
    return {
        "objectives": [shown_objective(each) for each in slos.shown()],
        "alerts": shown_alerts(slos.board.alerts(), slos.runbook),
    }
