"""`fairlead audit`: who did what to what."""

import click

from fairlead.cli.admin import Asks, ask, fields, place_options, short_time, show_json, show_table, target, time_of


@click.command()
@click.option("--from", "since", help="A span (7d: so long ago), a date or a time.")
@click.option("--to", "until", help="As --from.")
@click.option("--actor", help="The id of a key, or cli:USER.")
@click.option("--action", help="E.g. key.revoke.")
@click.option("--subject", help="The id of a key, the name of a tenant, ...")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
@place_options
def audit(
    asks: Asks, since: str | None, until: str | None, actor: str | None, action: str | None, subject: str | None, limit: int, as_json: bool
) -> None:
    """The audit log, the newest first."""
    query = {"from_": since and time_of(since), "to": until and time_of(until), "actor": actor, "action": action, "subject": subject}
    entries = ask(asks, "GET", target("/admin/audit", limit=limit, **query))["entries"]
    if as_json:
        show_json(entries)
        return
    columns = {
        "time": lambda entry: short_time(entry["time"]),
        **fields("actor", "action", "subject"),
        "details": lambda entry: {name: value for name, value in entry["details"].items() if value not in (None, [], {}, "")},
        **fields("address"),
    }
    show_table(columns, entries, "nothing in that time")
