"""`fairlead models`: what a running server has loaded, over its own HTTP API. FAIRLEAD_API_KEY is shown to one that asks for a key."""

import http.client
import os
import urllib.parse
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from fairlead.cli.admin import bearer, parsed_url
from fairlead.core.errors import FairleadError, Unavailable

url_option = click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's HTTP address.")
json_option = click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
STYLES = {"READY": "green", "UNAVAILABLE": "red", "LOADING": "yellow", "UNLOADING": "yellow"}


@click.group()
def models() -> None:
    """List, load and unload the models of a running server."""


@models.command("list")
@url_option
@json_option
def list_(url: str, as_json: bool) -> None:
    """Every model in the repositories, and its state."""
    index = call(url, "/v2/repository/index")
    if as_json:
        click.echo(msgspec.json.encode(index).decode())
        return
    table = Table("model", "version", "state", "reason")
    for entry in index:
        state = entry.get("state", "")
        table.add_row(
            entry["name"],
            entry.get("version", ""),
            f"[{STYLES[state]}]{state}[/]" if state in STYLES else "not loaded",
            entry.get("reason", ""),
        )
    Console().print(table)


@models.command()
@click.argument("name")
@url_option
def load(name: str, url: str) -> None:
    """Load a model, or load it again (needs `--control explicit`)."""
    call(url, f"/v2/repository/models/{urllib.parse.quote(name, safe='')}/load", timeout=600.0)
    click.echo(f"loaded {name}")


@models.command()
@click.argument("name")
@url_option
def unload(name: str, url: str) -> None:
    """Unload a model once its requests are answered (needs `--control explicit`)."""
    call(url, f"/v2/repository/models/{urllib.parse.quote(name, safe='')}/unload", timeout=600.0)
    click.echo(f"unloaded {name}")


def shown_key() -> dict[str, str]:
    """The header that shows the key of FAIRLEAD_API_KEY, where that is set."""
    key = os.environ.get("FAIRLEAD_API_KEY", "")
    return bearer(key, "FAIRLEAD_API_KEY")


def call(url: str, path: str, *, timeout: float = 30.0) -> Any:
    """POST to a server and decode its JSON. Raises FairleadError with what the server said."""
    parsed = parsed_url(url, "http://127.0.0.1:8000")
    connect = http.client.HTTPSConnection if parsed.scheme == "https" else http.client.HTTPConnection
    connection = connect(str(parsed.hostname), parsed.port, timeout=timeout)
    try:
        connection.request("POST", parsed.path.rstrip("/") + path, headers=shown_key())
        response = connection.getresponse()
        body = response.read()
    except OSError as error:
        raise Unavailable(f"no answer from {url}: {error.strerror or error}. Is `fairlead serve` running there?") from None
    finally:
        connection.close()
    try:
        answer = msgspec.json.decode(body) if body else None
    except msgspec.DecodeError:
        raise FairleadError(f"{url} does not speak KServe v2: {response.status} {response.reason}") from None
    if response.status != 200:
        raise FairleadError(answer.get("error", str(answer)) if isinstance(answer, dict) else f"{response.status} {response.reason}")
    return answer
