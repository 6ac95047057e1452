"""`fairlead usage`: what was used, by whom, for how much."""

import sys
from typing import Any

import click

from fairlead.cli.admin import (
    Asks,
    ask,
    checked,
    fields,
    key_id,
    place_options,
    short_time,
    show_done,
    show_json,
    show_table,
    target,
    time_of,
)

PAGE = 5000


@click.command()
@click.option("--by", default="tenant,model", show_default=True, help="Of tenant, project, key, model, outcome, day, hour.")
@click.option("--from", "since", help="A span (7d: so long ago), a date or a time.")
@click.option("--to", "until", help="As --from.")
@click.option("--tenant")
@click.option("--project")
@click.option("--key-id", metavar="KEY_ID", callback=key_id)
@click.option("--model")
@click.option("--outcome", help="success, failure, cancelled, refused.")
@click.option("--records", type=click.IntRange(min=0), help="So many single requests in place of sums, the newest first; 0: all.")
@click.option("--csv", "as_csv", is_flag=True, help="For spreadsheets.")
@click.option("--purge-before", metavar="TIME", help="Forget single requests older than this; their sums stay.")
@place_options
def usage(
    asks: Asks,
    by: str,
    since: str | None,
    until: str | None,
    key_id: str | None,
    records: int | None,
    as_csv: bool,
    as_json: bool,
    purge_before: str | None,
    **of_whom: str | None,
) -> None:
    """What was used: sums over whole hours, or single requests."""
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    if purge_before is not None:
        if since or until or key_id or records is not None or as_csv or any(of_whom.values()):
            raise click.UsageError("--purge-before forgets the requests of everybody: it goes with no option that chooses some")
        deleted = ask(asks, "DELETE", target("/admin/usage/records", before=time_of(purge_before)))
        show_done(f"forgot {deleted['deleted']} records", deleted, as_json)
        return
    query: dict[str, Any] = {**of_whom, "key": key_id, "from_": since and time_of(since), "to": until and time_of(until)}
    if records is not None:
        _show_records(asks, query, records or sys.maxsize, as_csv, as_json)
    elif as_csv:
        click.echo(checked(asks.ask("GET", target("/admin/usage", by=by, format="csv", **query), b""), asks).body, nl=False)
    else:
        groups = ask(asks, "GET", target("/admin/usage", by=by, **query))["groups"]
        if as_json:
            show_json(groups)
        else:
            show_table(_used(groups), groups, "no usage in that time")


def _show_records(asks: Asks, query: dict[str, Any], wanted: int, as_csv: bool, as_json: bool) -> None:
    """Page by page; JSON is one record a line."""
    cursor: str | None = None
    first = True
    while wanted > 0:
        size = min(wanted, PAGE)
        page = {**query, "limit": size, "cursor": cursor}
        if as_csv:
            answer = checked(asks.ask("GET", target("/admin/usage/records", format="csv", **page), b""), asks)
            body, cursor = answer.body, answer.headers.get("x-next-cursor")
            click.echo(body if first else body.partition(b"\r\n")[2], nl=False)
        else:
            found = ask(asks, "GET", target("/admin/usage/records", **page))
            rows, cursor = found["records"], found["next"]
            if as_json:
                for row in rows:
                    show_json(row)
            else:
                rows = [{**row, "time": short_time(row["time"])} for row in rows]
                show_table(_used(rows), rows, "no records in that time")
        wanted, first = wanted - size, False
        if cursor is None:
            return


def _used(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Without the columns that say nothing: no terminal is wide enough for rows of images beside tokens."""
    return fields(*(name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)))
