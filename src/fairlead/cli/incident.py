"""`fairlead incident`: keep what is to be seen while something is wrong, in one archive."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from fairlead.cli.admin import Asks, ask, checked, server_options, show_done, show_json, show_table, target
from fairlead.core.errors import ConfigError
from fairlead.observe.redaction import printable

STOP_SECONDS = 300.0


@click.group()
def incident() -> None:
    """Keep metrics, requests, logs and changes of an incident; begin its post-mortem."""


@incident.command()
@click.option("--title", default="", help="What it is about, for people.")
@server_options
def start(asks: Asks, title: str, as_json: bool) -> None:
    """From now on, and a while before."""
    told = ask(asks, "POST", "/admin/incidents/start", {"title": title})
    show_done(f"{told['id']} began: end it with `fairlead incident stop`", told, as_json)


@incident.command()
@click.option("--output", type=click.Path(path_type=Path), help="Where its archive goes.  [default: ID.tar.gz]")
@click.option("--leave", is_flag=True, help="Leave the archive on the server.")
@server_options
def stop(asks: Asks, output: Path | None, leave: bool, as_json: bool) -> None:
    """End it, and fetch its archive."""
    told = ask(asks, "POST", "/admin/incidents/stop", timeout=STOP_SECONDS)
    if leave:
        show_done(f"{told['id']} ended: {told['bytes']} bytes, `fairlead incident get {told['id']}`", told, as_json)
        return
    path = _fetch(asks, told["id"], output)
    show_done(f"{told['id']} ended: {path}. Its postmortem.md is filled in as far as it is known", {**told, "path": str(path)}, as_json)


@incident.command("list")
@server_options
def list_(asks: Asks, as_json: bool) -> None:
    """The one that runs, and those that are over."""
    found = ask(asks, "GET", "/admin/incidents")
    if as_json:
        show_json(found)
        return
    columns = {
        "incident": lambda row: row["id"],
        "title": lambda row: printable(row["title"]),
        "began (UTC)": lambda row: _time(row["began"]),
        "ended": lambda row: "runs" if row["ended"] is None else _time(row["ended"]),
        "by": lambda row: printable(row["by"]),
        "bytes": lambda row: row["bytes"] or None,
    }
    show_table(columns, found["incidents"], "no incidents")


@incident.command()
@click.argument("incident")
@click.option("--output", type=click.Path(path_type=Path), help="[default: ID.tar.gz]")
@server_options
def get(asks: Asks, incident: str, output: Path | None, as_json: bool) -> None:
    """Fetch the archive of one that is over."""
    path = _fetch(asks, incident, output)
    show_done(str(path), {"id": incident, "path": str(path)}, as_json)


def _fetch(asks: Asks, id: str, output: Path | None) -> Path:
    """Raises FairleadError."""
    answer = asks.ask("GET", target("/admin/incidents/{}", id), b"", timeout=STOP_SECONDS)
    if answer.status >= 400:
        checked(answer, asks)
    path = output or Path(f"{Path(id).name}.tar.gz")
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
            file.write(answer.body)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; the archive stays on the server: `fairlead incident get {id}`") from None
    return path


def _time(seconds: float) -> Any:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
