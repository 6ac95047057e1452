"""`fairlead logs`: the latest lines of a running server, and which ones it writes."""

import time
from typing import Any

import click

from fairlead.cli.admin import Asks, ask, seconds_of, server_options, show_json, show_table, target
from fairlead.observe.log_ring import MAX_LINES
from fairlead.observe.redaction import printable

LEVELS = ("debug", "info", "warning", "error")
COLORS = {"debug": "bright_black", "info": "green", "warning": "yellow", "error": "red", "critical": "red"}
FOLLOW_SECONDS = 1.0


@click.group(invoke_without_command=True)
@click.option("--follow", "-f", is_flag=True, help="Stay, and show lines as they come.")
@click.option("--level", type=click.Choice(LEVELS), default="debug", help="And above.")
@click.option("--room", default="", help="Only of this room, such as gateway, replica, uvicorn.")
@click.option("--limit", type=click.IntRange(1, MAX_LINES), default=200, show_default=True)
@server_options
@click.pass_context
def logs(context: click.Context, asks: Asks, follow: bool, level: str, room: str, limit: int, as_json: bool) -> None:
    """The latest lines of a running server, the oldest first."""
    if context.invoked_subcommand is not None:
        return
    after = 0
    while True:
        found = ask(asks, "GET", target("/admin/logs/recent", level=level, room=room, limit=limit, after=after))
        for line in found["lines"]:
            if as_json:
                show_json(line)
            else:
                click.echo(_picture(line))
        if not follow:
            return
        after, limit = found["latest"], MAX_LINES
        time.sleep(FOLLOW_SECONDS)


@logs.command("levels")
@click.argument("changes", nargs=-1, metavar="[ROOM=LEVEL...]")
@click.option("--for", "span", help="Then they are what they were: 90s, 10m, 2h.")
@server_options
def levels_(asks: Asks, changes: tuple[str, ...], span: str | None, as_json: bool) -> None:
    """Which lines of which room are written; with ROOM=LEVEL others from now on, until the server restarts.

    The room `fairlead` stands for all of ours; `ROOM=` takes back what was said of one.
    """
    if span and not changes:
        raise click.UsageError("--for needs a ROOM=LEVEL")
    if changes:
        body = {"levels": dict(map(_change, changes)), "seconds": None if span is None else seconds_of(span)}
        told = ask(asks, "PUT", "/admin/logs/levels", body)
    else:
        told = ask(asks, "GET", "/admin/logs/levels")
    if as_json:
        show_json(told)
        return
    rows = [{"room": room, **shown} for room, shown in told["rooms"].items()]
    columns = {
        "room": lambda row: row["room"],
        "level": lambda row: row["level"],
        "for": lambda row: None if row["seconds_left"] is None else f"{row['seconds_left']:.0f} s",
        "of": lambda row: row["about"],
    }
    show_table(columns, rows, "no rooms")


def _change(text: str) -> tuple[str, str | None]:
    room, equals, level = text.partition("=")
    if not (room and equals) or level not in ("", *LEVELS):
        raise click.BadParameter(f"{text!r} is not ROOM=LEVEL, e.g. gateway=debug; levels are {', '.join(LEVELS)}")
    return room, level or None


def _picture(line: dict[str, Any]) -> str:
    """As on the server's own terminal. Nothing in it can move the cursor."""
    shown = dict(line)
    at = time.strftime("%H:%M:%S", time.localtime(shown.pop("time", 0)))
    level, event, room = (str(shown.pop(name, "")) for name in ("level", "event", "room"))
    rest = " ".join(f"{printable(name)}={_plain(value)}" for name, value in shown.items())
    head = click.style(f"{level:8}", fg=COLORS.get(level))
    return f"{at} {head} {click.style(printable(room), fg='cyan')} {click.style(printable(event), bold=True)} {rest}"


def _plain(value: Any) -> str:
    return printable(value) if isinstance(value, str) else repr(value)
