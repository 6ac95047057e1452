"""The post-mortem's first draft: what is known is filled in, what only people know is left to them."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from msgspec import Struct

from fairlead.observe.incidents.exhibits import Happening, Rows
from fairlead.observe.incidents.impact import Impact

MAX_HAPPENINGS = 200
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~])")


class Facts(Struct, frozen=True, kw_only=True):
    id: str
    title: str
    server: str
    release: str
    """Of Fairlead."""
    began: float
    ended: float
    impact: Impact
    happenings: Sequence[Happening]
    shown: Sequence[Rows] = ()
    versions: Sequence[tuple[str, str, str]]
    """(model, version, digest) of what served."""
    alerts: Sequence[tuple[str, str, str, float]]
    """(name, severity, subject, when it began to fire)."""
    files: Sequence[str]
    missing: Sequence[tuple[str, str]]
    """(file, why it is not there)."""


def postmortem(facts: Facts) -> str:
    lines = [
        f"# Post-mortem: {plain(facts.title) or facts.id}",
        "",
        *_table(
            ("", ""),
            [
                ("Incident", facts.id),
                ("Status", "draft"),
                ("Began (UTC)", moment(facts.began)),
                ("Ended (UTC)", moment(facts.ended)),
                ("Lasted", lasted(facts.ended - facts.began)),
                ("Server", f"{facts.server}, Fairlead {facts.release}"),
                ("Models", ", ".join(sorted(facts.impact.models)) or "none was asked"),
                ("Requests that failed", sum(each.failed for each in facts.impact.models.values())),
                ("Requests that were refused", sum(each.refused for each in facts.impact.models.values())),
                ("Authors", ""),
            ],
        ),
        "",
        "## Summary",
        "_What happened, in three sentences for somebody who was not there._",
        "",
        "## Impact",
        *_impact(facts.impact),
        *_shown(facts.shown),
        "",
        "## Timeline",
        "All times are UTC.",
        "",
        *_timeline(facts),
        "",
        "## What changed before",
        *_changes(facts),
        "",
        "## Versions that served",
        *(_table(("model", "version", "digest"), facts.versions) if facts.versions else ["None are known."]),
        "",
        "## Cause",
        "_What had to be so for this to happen? Ask why until the answer is about the system and not about a person._",
        "",
        "## How it was found, and how it ended",
        "_Who or what noticed, after how long? What was tried, what helped?_",
        "",
        "## What went well, what went badly, where we were lucky",
        "* ",
        "",
        "## Action items",
        *_table(("what", "kind (prevent, detect, mitigate)", "who", "until", "issue"), [("", "", "", "", "")]),
        "",
        "## In this archive",
        *(f"* `{name}`" for name in facts.files),
        *(f"* `{name}` is missing: {plain(why)}" for name, why in facts.missing),
    ]
    return "\n".join(lines) + "\n"


def _impact(impact: Impact) -> list[str]:
    if not impact.models and not impact.objectives:
        return ["No requests came, or no metrics were kept."]
    rows = [
        (name, each.requests, each.failed, _share(each.failed, each.requests), each.refused, ", ".join(each.versions))
        for name, each in sorted(impact.models.items(), key=lambda item: (-item[1].failed, item[0]))
    ]
    budgets = [
        (name, each.good, each.bad, _percent(each.before), _percent(each.after), _burnt(each.before, each.after))
        for name, each in sorted(impact.objectives.items())
    ]
    return [
        *(_table(("model", "requests", "failed", "share", "refused by the gateway", "versions"), rows) if rows else []),
        *([""] if rows and budgets else []),
        *(_table(("objective", "good", "bad", "budget before", "budget after", "burnt"), budgets) if budgets else []),
    ]


def _shown(tables: Sequence[Rows]) -> list[str]:
    return [line for each in tables if each.rows for line in ("", f"### {each.title}", *_table(each.head, each.rows))]


def _timeline(facts: Facts) -> list[str]:
    during = [each for each in facts.happenings if facts.began <= each.time <= facts.ended]
    alerts = [
        Happening(began, f"{name} ({severity}) fires{f' for {subject}' if subject else ''}")
        for name, severity, subject, began in facts.alerts
    ]
    ends = [Happening(facts.began, "the incident was begun"), Happening(facts.ended, "the incident was ended")]
    return _happenings([*during, *alerts, *ends])


def _changes(facts: Facts) -> list[str]:
    changes = [each for each in facts.happenings if each.change and each.time < facts.began]
    return _happenings(changes) if changes else ["Nothing that is recorded. What about the hosts, the network, the callers?"]


def _happenings(happenings: Sequence[Happening]) -> list[str]:
    ordered = sorted(happenings, key=lambda each: each.time)
    shown, left = ordered[-MAX_HAPPENINGS:], max(len(ordered) - MAX_HAPPENINGS, 0)
    rows = [(moment(each.time), each.text) for each in shown]
    return [*([f"{left} earlier ones are in the archive only.", ""] if left else []), *_table(("when", "what"), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [f"| {' | '.join(plain(str(cell)) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *cells]


def plain(text: str) -> str:
    """One line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def lasted(seconds: float) -> str:
    hours, rest = divmod(max(round(seconds), 0), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _burnt(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{max(before - after, 0.0):.1%}"
