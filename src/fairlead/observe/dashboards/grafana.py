"""Dashboards as Grafana reads them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fairlead.observe.dashboards.boards import DASHBOARDS, Dashboard, Look, Panel
from fairlead.observe.dashboards.queries import VARIABLES

WIDTH = 24
"""Of Grafana's grid."""
HEIGHT = 8
SCHEMA_VERSION = 39


def files() -> Mapping[str, str]:
    """Name → content."""
    return {f"{each.name}.json": json.dumps(rendered(each), indent=1, ensure_ascii=False) + "\n" for each in DASHBOARDS}


def rendered(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "title": dashboard.title,
        "uid": f"fairlead-{dashboard.name}",
        "description": dashboard.help,
        "tags": ["fairlead"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "templating": {"list": [_datasource(), *(_variable(name) for name in dashboard.variables)]},
        "annotations": {"list": []},
        "links": [
            {"type": "dashboards", "title": "Fairlead", "tags": ["fairlead"], "asDropdown": True, "includeVars": True, "keepTime": True}
        ],
        "panels": list(_panels(dashboard)),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source", "hide": 0}


SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _variable(label: str) -> dict[str, Any]:
    name, title = VARIABLES[label]
    chosen = '{model=~"$model"}' if label == "version" else ""
    query = f"label_values({name}{chosen}, {label})"
    return {
        "name": label,
        "type": "query",
        "label": title,
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    number = y = 0
    for row in dashboard.rows:
        number += 1
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [], "gridPos": _place(WIDTH, 1, 0, y)}
        x, y = 0, y + 1
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + HEIGHT
            number += 1
            yield _panel(panel, number, _place(panel.width, HEIGHT, x, y))
            x += panel.width
        y += HEIGHT


def _place(w: int, h: int, x: int, y: int) -> dict[str, int]:
    return {"w": w, "h": h, "x": x, "y": y}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.look == "timeseries":
        custom = {"lineWidth": 1, "fillOpacity": 20 if panel.stack else 0, "stacking": {"mode": "normal" if panel.stack else "none"}}
        custom |= {"showPoints": "never", "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"}}
    defaults: dict[str, Any] = {"unit": panel.queries[0].unit, "min": 0, "custom": custom, "thresholds": _thresholds(panel)}
    if panel.queries[0].unit == "percentunit":
        defaults["max"] = 1
    return {
        "id": number,
        "type": panel.look,
        "title": panel.title,
        "description": panel.help,
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel.look),
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": SOURCE, "expr": query.expr, "legendFormat": query.legend}
            for n, query in enumerate(panel.queries)
        ],
    }


def _thresholds(panel: Panel) -> dict[str, Any]:
    if not panel.thresholds:
        return {"mode": "absolute", "steps": [{"color": "green", "value": None}]}
    yellow, red = panel.thresholds
    steps = [("green", None), ("yellow", yellow), ("red", red)] if red > yellow else [("red", None), ("yellow", red), ("green", yellow)]
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}


def _options(look: Look) -> dict[str, Any]:
    if look == "timeseries":
        return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "textMode": "auto", "colorMode": "value"}
