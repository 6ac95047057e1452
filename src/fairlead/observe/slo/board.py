"""All alerts of one server: which are pending, which fire, and which did."""

from collections import deque
from collections.abc import Iterable
from typing import Literal, NamedTuple

from msgspec import Struct, structs

from fairlead.core.slo import Severity
from fairlead.observe.slo.standing import Standing, step

MAX_ALERTS = 1000
"""That are pending or fire at once: what comes beyond is not looked at."""
MAX_PAST = 200

Key = tuple[str, Severity, str]
"""(name, severity, subject)."""


class Sighting(NamedTuple):
    """What one look found of one alert."""

    name: str
    severity: Severity
    subject: str
    """The objective, the model, the place; "" for the server."""
    summary: str
    active: bool
    holds: bool = False
    pending: float = 0.0
    calm: float = 300.0


class Alert(Struct, frozen=True, kw_only=True):
    """One that is pending, fires, or did."""

    id: str
    """The same from when it begins to fire until it is resolved."""
    name: str
    severity: Severity
    subject: str
    summary: str
    state: Literal["pending", "firing", "resolved"]
    since: float
    """Seconds since 1970, when it began to be in this state."""
    began: float
    """When it began to fire; of a pending one as `since`."""


class Board:
    """`now`: of a clock that only goes on; `wall`: seconds since 1970, for people to read."""

    def __init__(self, server: str) -> None:
        """`server`: its id, so that alerts of several are told apart."""
        self.server = server
        self.past: deque[Alert] = deque(maxlen=MAX_PAST)
        """Resolved ones, the oldest first."""
        self._standing: dict[Key, tuple[Standing, Alert | None]] = {}
        self._number = 0

    def look(self, sightings: Iterable[Sighting], now: float, wall: float) -> list[Alert]:
        """All that one look found; what is not among it is not active. Returns those that began to fire, or are resolved."""
        changed: list[Alert] = []
        seen: set[Key] = set()
        for each in sightings:
            key = (each.name, each.severity, each.subject)
            seen.add(key)
            if key in self._standing or (each.active and len(self._standing) < MAX_ALERTS):
                changed += self._stand(key, each, now, wall)
        for key in [key for key in self._standing if key not in seen]:
            gone = Sighting(*key, summary="", active=False)
            changed += self._stand(key, gone, now, wall)
        return changed

    def _stand(self, key: Key, sighting: Sighting, now: float, wall: float) -> list[Alert]:
        before, alert = self._standing.get(key, (Standing(), None))
        after = step(before, active=sighting.active, holds=sighting.holds, pending=sighting.pending, calm=sighting.calm, now=now)
        if after.state == "inactive":
            self._standing.pop(key, None)
            if before.state != "firing" or alert is None:
                return []
            resolved = structs.replace(alert, state="resolved", since=wall)
            self.past.append(resolved)
            return [resolved]
        if alert is None or after.state != before.state:
            self._number += alert is None
            fresh = Alert(
                id=alert.id if alert else f"{self.server}-{self._number}",
                name=sighting.name,
                severity=sighting.severity,
                subject=sighting.subject,
                summary=sighting.summary,
                state=after.state,
                since=wall,
                began=wall,
            )
            self._standing[key] = (after, fresh)
            return [fresh] if after.state == "firing" else []
        self._standing[key] = (
            after,
            alert if sighting.summary in ("", alert.summary) else structs.replace(alert, summary=sighting.summary),
        )
        return []

    def alerts(self) -> list[Alert]:
        """Those that are pending or fire, what pages first, then the newest."""
        found = [alert for _, alert in self._standing.values() if alert is not None]
        return sorted(found, key=lambda each: (each.state != "firing", each.severity != "page", -each.since, each.name, each.subject))
