"""`fairlead explain`: what became of a request, and where its time went."""

import sys
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fairlead.cli.admin import Asks, ask, server_options, show_json, show_table, target
from fairlead.observe.explain import told

BAR_CHARS = 40


@click.command()
@click.argument("request_id", required=False)
@click.option("--slow", is_flag=True, help="The slowest requests of the last minutes in place of the newest.")
@click.option("--failed", is_flag=True, help="Those that failed through the server's fault.")
@click.option("--model", help="Only those of this model.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@server_options
def explain(asks: Asks, request_id: str | None, slow: bool, failed: bool, model: str | None, limit: int, as_json: bool) -> None:
    """Why one request was slow, or failed: by its request id, its trace id, or the id of its job. Without one: a list."""
    if request_id is not None:
        if slow or failed or model:
            raise click.UsageError("a request's id goes with no option that chooses some")
        found = ask(asks, "GET", target("/admin/requests/{}", request_id))
        if as_json:
            show_json(found)
        else:
            show_explained(found)
        return
    if slow and failed:
        raise click.UsageError("--slow and --failed exclude each other")
    kind = "slow" if slow else "failed" if failed else "recent"
    requests = ask(asks, "GET", target("/admin/requests", kind=kind, model=model, limit=limit))["requests"]
    if as_json:
        show_json(requests)
        return
    columns = {
        "id": lambda each: each["id"],
        "model": lambda each: f"{each['model']}@{each['version']}" if each["version"] else each["model"],
        "kind": lambda each: each["kind"] or each["path"],
        "tenant": lambda each: each["tenant"],
        "outcome": lambda each: each["outcome"] + (f" ({each['reason']})" if each["reason"] not in ("", each["outcome"]) else ""),
        "took": lambda each: told(each["seconds"]),
        "mostly": _mostly,
    }
    show_table(columns, requests, "no such request is remembered")


def _mostly(summary: dict[str, Any]) -> str:
    seconds: dict[str, float] = {}
    for phase in summary["phases"]:
        seconds[phase["name"]] = seconds.get(phase["name"], 0.0) + phase["seconds"]
    if not seconds or not summary["seconds"]:
        return ""
    name = max(seconds, key=lambda each: seconds[each])
    return f"{name} {seconds[name] / summary['seconds']:.0%}"


def show_explained(found: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    request = found["request"]
    model = f"{request['model']}@{request['version']}" if request["version"] else request["model"]
    colour = {"success": "green", "failure": "red", "refused": "yellow"}.get(request["outcome"], "default")
    outcome = f"[{colour}]{request['outcome']}[/]" + (f" ({escape(request['reason'])})" if request["reason"] else "")
    console.print(f"[bold]{escape(request['id'])}[/]  {escape(model)}  {outcome}  {told(request['seconds'])}")
    facts = {
        "kind": request["kind"],
        "path": request["path"],
        "tenant": request["tenant"],
        "class": request["qos_class"],
        "job": request["job"],
        "trace": request["trace_id"],
        "tokens": f"{request['tokens_in']} in, {request['tokens_out']} out" if request["tokens_in"] or request["tokens_out"] else "",
        "rows": request["rows"] or "",
        "first piece": told(request["first_seconds"]) if request["first_seconds"] is not None else "",
        "error": request["error"],
    }
    console.print("  ".join(f"[dim]{name}[/] {escape(str(value))}" for name, value in facts.items() if value))
    console.print()
    _show_bars(console, request["phases"], request["seconds"])
    console.print(f"\n[bold]Why:[/] {escape(found['why'])}\n")
    steps = Table(box=None, show_header=False, pad_edge=False)
    steps.add_column(justify="right", style="dim", no_wrap=True)
    steps.add_column()
    for step in found["steps"]:
        steps.add_row(f"+{told(step['at'])}", escape(step["text"]))
    console.print(steps)
    if found["dropped"]:
        console.print(f"[dim]and {found['dropped']} more steps that were not kept[/]")
    for other in found["related"]:
        console.print(
            f"[dim]see also[/] {escape(other['job'] or other['id'])}: {other['protocol']}, {other['outcome']}, {told(other['seconds'])}"
        )


def _show_bars(console: Console, phases: list[dict[str, Any]], whole: float) -> None:
    """A line for each phase: where on the way it was, and its share."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="dim")
    for phase in phases:
        share = phase["seconds"] / whole if whole > 0 else 0.0
        before = min(round(phase["start"] / whole * BAR_CHARS) if whole > 0 else 0, BAR_CHARS - 1)
        length = max(min(round(share * BAR_CHARS), BAR_CHARS - before), 1)
        table.add_row(escape(phase["name"]), " " * before + "█" * length, told(phase["seconds"]), f"{share:.0%}")
    console.print(table)
