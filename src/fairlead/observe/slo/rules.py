"""The same objectives and alerts as rules for Prometheus: `fairlead slo rules`, deploy/prometheus/alerts.yml."""

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from fairlead.core.slo import Objective
from fairlead.observe.slo.alerts import BURN, RULES, Rule
from fairlead.observe.slo.burn import rows_of, span_name, spans_of

EVENTS = "fairlead_slo_events_total"
RECORD = "fairlead_slo_errors:ratio_rate"
EVERY = "30s"
KEEP = "5m"
"""An alert goes on firing for so long, so that it does not flap."""
HEAD = "# Made by `fairlead slo rules`: do not edit.\n"


def rules_text(objectives: Sequence[Objective], runbooks: str) -> str:
    """YAML for `rule_files`. `runbooks`: the URL of their folder."""
    groups = [*(_group(each, runbooks) for each in objectives), general(runbooks)]
    return HEAD + yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000, allow_unicode=True)


def general(runbooks: str) -> dict[str, Any]:
    return {"name": "fairlead", "rules": [_rule(each, runbooks) for each in RULES]}


def _rule(rule: Rule, runbooks: str) -> dict[str, Any]:
    subject = "/".join(f"{{{{ $labels.{label} }}}}" for label in rule.labels) or "the server"
    summary = rule.summary.replace("{subject}", subject).replace("{value}", "{{ $value | humanize }}")
    return _alert(rule.name, rule.expr, rule.severity, summary, runbooks, pending=rule.pending)


def _alert(name: str, expr: str, severity: str, summary: str, runbooks: str, *, pending: float, **labels: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        **({"for": span_name(pending)} if pending else {}),
        "keep_firing_for": KEEP,
        "labels": {"severity": severity, **labels},
        "annotations": {"summary": summary, "runbook_url": f"{runbooks.rstrip('/')}/{name}.md"},
    }


def _group(objective: Objective, runbooks: str) -> dict[str, Any]:
    name, spans = objective.name, spans_of(objective)
    records = [
        {
            "record": RECORD + span_name(span),
            "expr": f"{_events(name, span, 'bad', 'rate')} / {_events(name, span, '', 'rate')}",
            "labels": {"slo": name},
        }
        for span in spans
    ]
    return {"name": f"fairlead-slo-{name}", "interval": EVERY, "rules": [*records, *_burns(objective, runbooks)]}


def _burns(objective: Objective, runbooks: str) -> Iterable[dict[str, Any]]:
    name = objective.name
    for row in rows_of(objective):
        if row.severity not in objective.severities:
            continue
        limit = f"{row.factor * objective.budget:.10g}"
        expr = " and ".join(
            (
                *(f'{RECORD}{span_name(span)}{{slo="{name}"}} > {limit}' for span in (row.long, row.short)),
                f"{_events(name, row.long, '', 'increase')} >= {objective.min_events}",
                f"{_events(name, row.long, 'bad', 'increase')} >= {objective.min_bad}",
            )
        )
        span = span_name(row.long)
        summary = (
            f"{name}: {{{{ $value | humanizePercentage }}}} of the requests of {span} were bad; the budget is for {objective.budget:.4g}"
        )
        yield _alert(BURN, expr, row.severity, summary, runbooks, pending=row.pending, slo=name, long=span)


def _events(name: str, span: float, outcome: str, function: str) -> str:
    of_outcome = f',outcome="{outcome}"' if outcome else ""
    return f'sum by (slo) ({function}({EVENTS}{{slo="{name}"{of_outcome}}}[{span_name(span)}]))'
