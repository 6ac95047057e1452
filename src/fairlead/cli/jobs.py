"""`fairlead jobs`: what was handed in, how far it is, and how it ended."""

import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

import click
import msgspec
from rich.console import Console
from rich.table import Column, Table

from fairlead.cli.asking import answer, asked, events

URL = click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's HTTP address.")
JSON = click.option("--json", "as_json", is_flag=True)


@click.group()
def jobs() -> None:
    """Requests that are answered later.

    A server that wants a key takes it from FAIRLEAD_API_KEY.
    """


@jobs.command("list")
@URL
@click.option("--status", multiple=True, help="queued, active, aborting, aborted, failed, complete; may come several times.")
@click.option("--model")
@click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True)
@JSON
def list_jobs(url: str, status: tuple[str, ...], model: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs of the key's tenant."""
    query = [("limit", str(limit)), *(("status", each) for each in status), *([("model", model)] if model else [])]
    found = asked(url, "GET", "/v1/jobs?" + urlencode(query))
    if as_json:
        return _print(found)
    table = Table(Column("job", no_wrap=True), "model", "status", "progress", "created", "took", "cost")
    for job in found["jobs"]:
        table.add_row(
            job["id"],
            job["model"],
            job["status"] + (f" ({job['error']['reason']})" if job["error"] else ""),
            _progress(job),
            datetime.fromtimestamp(job["created"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
            _took(job),
            f"{job['cost']:g}",
        )
    Console().print(table)


@jobs.command()
@click.argument("job")
@URL
@JSON
def show(job: str, url: str, as_json: bool) -> None:
    """One job."""
    _tell(asked(url, "GET", _path(job)), as_json)


@jobs.command()
@click.argument("job")
@URL
@JSON
def cancel(job: str, url: str, as_json: bool) -> None:
    """Cancel a job. One that has ended stays as it is."""
    _tell(asked(url, "POST", _path(job) + "/cancel"), as_json)


@jobs.command()
@click.argument("job")
@URL
@JSON
def watch(job: str, url: str, as_json: bool) -> None:
    """A line at each change, until it has ended. With --json, a job in each line."""
    with answer(url, "GET", _path(job) + "/events") as response:
        for told in events(response):
            if as_json:
                _print(told)
            else:
                click.echo(f"{time.strftime('%H:%M:%S')} {told['status']} {_progress(told)}".rstrip())


def _tell(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return _print(job)
    lines = [
        ("status", job["status"]),
        ("model", job["model"]),
        ("progress", _progress(job)),
        ("took", _took(job)),
        ("cost", f"{job['cost']:g}"),
    ]
    if job["error"]:
        lines.append(("error", f"{job['error']['message']} ({job['error']['reason']})"))
    result = job["result"] or {}
    lines += [("picture", f"{each['width']}x{each['height']}, seed {each['seed']}: {each['url']}") for each in result.get("pictures", ())]
    lines += [("text", each.get("text", "")) for each in result.get("choices", ())]
    for name, value in lines:
        if value:
            click.echo(f"{name:10}{value}")


def _path(job: str) -> str:
    return "/v1/jobs/" + quote(job, safe="")


def _progress(job: dict[str, Any]) -> str:
    if job["status"] == "queued":
        return f"{job['position']} before it" if job["position"] else ""
    progress = job["progress"]
    return f"{progress['step']}/{progress['num_steps']}" if progress else ""


def _took(job: dict[str, Any]) -> str:
    if job["started"] is None:
        return ""
    return f"{(job['ended'] or time.time()) - job['started']:.1f} s"


def _print(value: Any) -> None:
    click.echo(msgspec.json.encode(value).decode())
