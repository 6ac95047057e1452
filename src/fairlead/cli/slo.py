"""`fairlead slo`: promises, what is left of their error budgets, and rules for Prometheus."""

import http.client
import sys
from pathlib import Path
from typing import Any

import click
import yaml
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fairlead.cli.admin import Asks, ask, fields, parsed_url, server_options, show_json, show_table
from fairlead.core.errors import FairleadError, Unavailable
from fairlead.core.settings import Settings, read_settings
from fairlead.observe.redaction import printable

BAR = 20
SCRAPE_SECONDS = 30.0
STYLES = {"firing": "bold red", "pending": "yellow", "resolved": "green"}


@click.group()
def slo() -> None:
    """What the service promises, and what is left of its error budgets."""


@slo.command("list")
@server_options
def list_(asks: Asks, as_json: bool) -> None:
    """All objectives of a running server."""
    found = ask(asks, "GET", "/admin/slo")
    if as_json:
        show_json(found)
        return
    if not found["objectives"]:
        click.echo("no objectives: `fairlead slo suggest` says how to begin", err=True)
        return
    table = Table("objective", "of", "target", "attained", "budget left", "", "burn", "alerts", box=SIMPLE_HEAD)
    for each in found["objectives"]:
        left = each["budget_left"]
        color = "red" if left < 0.1 else "yellow" if left < 0.5 else "green"
        table.add_row(
            Text(printable(each["name"])),
            Text(printable(_of(each))),
            f"{each['target']:.4g}",
            _attained(each),
            Bar(1.0, 0.0, left, width=BAR, color=color),
            f"{left:.1%}",
            "  ".join(f"{span} {burn:.3g}" for span, burn in each["burn"].items()),
            _alerts(each["alerts"]),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@slo.command()
@click.argument("name")
@server_options
def show(asks: Asks, name: str, as_json: bool) -> None:
    """One objective."""
    found = next((each for each in ask(asks, "GET", "/admin/slo")["objectives"] if each["name"] == name), None)
    if found is None:
        raise FairleadError(f"there is no objective {name!r}: `fairlead slo list` shows those that there are")
    if as_json:
        show_json(found)
        return
    rows = {
        "objective": printable(found["name"]),
        "of": printable(_of(found)),
        "target": f"{found['target']:.6g} in {found['window'] / 86400:g} days",
        "attained": _attained(found),
        "requests": f"{found['good']} good, {found['bad']} bad",
        "budget left": f"{found['budget_left']:.1%}",
        **{f"burn over {span}": f"{burn:.3g}" for span, burn in found["burn"].items()},
        "alerts": ", ".join(f"{each['severity']} {each['state']} since {_time(each['since'])}" for each in found["alerts"]) or "none",
    }
    table = Table(show_header=False, box=None)
    for key, value in rows.items():
        table.add_row(key, Text(value))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@slo.command()
@server_options
def alerts(asks: Asks, as_json: bool) -> None:
    """Alerts that are pending, fire, or did."""
    found = ask(asks, "GET", "/admin/alerts")
    if as_json:
        show_json(found)
        return
    columns = {
        **fields("state", "severity", "alert"),
        "about": lambda row: printable(row["subject"]),
        "since": lambda row: _time(row["since"]),
        "summary": lambda row: printable(row["summary"]),
        **fields("runbook"),
    }
    show_table(columns, [*found["alerts"], *found["recent"]], "no alerts")


@slo.command()
@click.option(
    "--config", type=click.Path(path_type=Path), help="A fairlead.yaml with `slos`.  [default: the alerts beside objectives only]"
)
@click.option("--runbooks", help="The URL of the folder that runbooks are in.  [default: alerts.runbooks]")
@click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
def rules(config: Path | None, runbooks: str | None, as_json: bool) -> None:
    """Recording rules and alerts for Prometheus, to be named in its `rule_files`."""
    from fairlead.observe.slo.rules import rules_text

    settings = Settings() if config is None else read_settings(config)
    text = rules_text(settings.slos, runbooks or settings.alerts.runbooks)
    if as_json:
        show_json(yaml.safe_load(text))
    else:
        click.echo(text, nl=False)


@slo.command()
@click.option("--url", envvar="FAIRLEAD_ADMIN_URL", default="http://127.0.0.1:8002", show_default=True, help="A server's operations port.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
def suggest(url: str, as_json: bool) -> None:
    """Objectives to begin with: a little less than what a server has attained since it started."""
    from fairlead.observe.slo.suggest import suggested

    found = suggested(_metrics(url))
    if as_json:
        show_json({"slos": found})
        return
    if not found:
        raise FairleadError("too few requests were answered to suggest anything: come back when there were some hundreds")
    click.echo("# What this server attained since it started, and a little room. Put it into fairlead.yaml, and change it.")
    click.echo(yaml.safe_dump({"slos": found}, sort_keys=False, allow_unicode=True), nl=False)


def _metrics(url: str) -> str:
    """Raises FairleadError."""
    parsed = parsed_url(url, "http://127.0.0.1:8002")
    connect = http.client.HTTPSConnection if parsed.scheme == "https" else http.client.HTTPConnection
    connection = connect(str(parsed.hostname), parsed.port, timeout=SCRAPE_SECONDS)
    try:
        connection.request("GET", parsed.path.rstrip("/") + "/metrics")
        response = connection.getresponse()
        text = response.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"no answer from {url}: {getattr(error, 'strerror', None) or error}. Is `fairlead serve` running there?"
        ) from None
    finally:
        connection.close()
    if response.status != 200 or "fairlead_" not in text:
        raise FairleadError(f"{url} is not Fairlead's operations port: it has no metrics of ours")
    return text


def _of(objective: dict[str, Any]) -> str:
    where = objective["model"] if objective["model"] not in ("", "*") else "all models"
    of_class = f", class {objective['class']}" if objective["class"] else ""
    within = f" within {objective['threshold']:g} s" if objective["threshold"] else ""
    return f"{objective['kind'].replace('_', ' ')}{within} of {where}{of_class}"


def _attained(objective: dict[str, Any]) -> str:
    return "no requests" if objective["attained"] is None else f"{objective['attained']:.4%}" + ("" if objective["enough"] else " (few)")


def _alerts(alerts: list[dict[str, Any]]) -> Text:
    text = Text()
    for each in alerts:
        text.append(f"{each['severity']} {each['state']} ", STYLES.get(each["state"], ""))
    return text


def _time(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
