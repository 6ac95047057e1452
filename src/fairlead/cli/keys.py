"""`fairlead keys`: who may come in."""

from pathlib import Path
from typing import Any

import click

from fairlead.cli.admin import (
    Asks,
    ask,
    fields,
    force_option,
    key_id,
    limit_option,
    limits_of,
    place_options,
    seconds_of,
    short_time,
    show_done,
    show_fields,
    show_json,
    show_table,
    target,
    time_of,
)
from fairlead.core.policy import Scope

ID = click.argument("id", metavar="KEY_ID", callback=key_id)


@click.group()
def keys() -> None:
    """Make, list, rotate and revoke API keys.

    Works on the store itself (that of --config, or the default one), or on a running server with --url.
    """


@keys.command()
@click.option("--tenant", default="default", show_default=True)
@click.option("--project", default="default", show_default=True)
@click.option("--name", default="", help="For people to know it by.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([each.value for each in Scope]),
    help="What it is for. Repeatable.  [default: infer]",
)
@click.option("--model", "models", multiple=True, help="A pattern of models that it may use. Repeatable.  [default: all of its tenant's]")
@click.option("--class", "qos_class", help="Class of service.  [default: its tenant's]")
@limit_option
@click.option("--expires", help="A span (30d), a date or a time.  [default: never]")
@click.option("--public-key", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Ed25519 in PEM, for signed requests.")
@place_options
def create(
    asks: Asks,
    tenant: str,
    project: str,
    name: str,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    qos_class: str | None,
    limits: tuple[str, ...],
    expires: str | None,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """A new key. Its secret is shown this once."""
    body: dict[str, Any] = {"tenant": tenant, "project": project, "name": name, "limits": limits_of(limits)}
    optional = {
        "scopes": scopes,
        "models": models,
        "class": qos_class,
        "expires": time_of(expires, ahead=True) if expires else None,
        "public_key": public_key.read_text() if public_key else None,
    }
    body |= {field: value for field, value in optional.items() if value}
    _show_secret(asks, ask(asks, "POST", "/admin/keys", body), as_json)


@keys.command("list")
@click.option("--tenant")
@click.option("--project")
@click.option("--state", type=click.Choice(["live", "expired", "revoked"]), help="Only these.")
@place_options
def list_(asks: Asks, tenant: str | None, project: str | None, state: str | None, as_json: bool) -> None:
    """All keys, without their secrets."""
    found = ask(asks, "GET", target("/admin/keys", tenant=tenant, project=project, state=state))["keys"]
    if as_json:
        show_json(found)
        return
    columns = {
        **fields("id", "name", "tenant", "project", "state", "scopes"),
        "models": lambda key: key["models"] or "*",
        **fields("class", "limits"),
        "created": lambda key: short_time(key["created"]),
        "expires": lambda key: short_time(key["expires"]),
    }
    show_table(columns, found, "no keys yet: `fairlead keys create` makes one")


@keys.command()
@ID
@place_options
def show(asks: Asks, id: str, as_json: bool) -> None:
    """One key."""
    key = ask(asks, "GET", target("/admin/keys/{}", id))
    if as_json:
        show_json(key)
    else:
        show_fields(key)


@keys.command()
@ID
@click.option("--overlap", default="1h", show_default=True, help="How long the old one works beside the new one; 0s: not at all.")
@place_options
def rotate(asks: Asks, id: str, overlap: str, as_json: bool) -> None:
    """A new key in the place of another, with the same rights. Its secret is shown this once."""
    answer = ask(asks, "POST", target("/admin/keys/{}/rotate", id), {"overlap_seconds": seconds_of(overlap)})
    _show_secret(asks, answer, as_json)


@keys.command()
@ID
@force_option
@place_options
def revoke(asks: Asks, id: str, force: bool, as_json: bool) -> None:
    """Refuse a key from now on, on every gateway."""
    key = ask(asks, "POST", target("/admin/keys/{}/revoke", id), {"force": force})
    show_done(f"revoked {id}", key, as_json)


def _show_secret(asks: Asks, answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(answer)
        return
    key, secret = answer["key"], answer["secret"]
    click.echo(secret)
    # The secret alone goes to stdout, so that KEY=$(fairlead keys create) works.
    click.echo(
        f"\nThis is the only time that it is shown. Key {key['id']} of tenant {key['tenant']}, in {asks.place}. Use it as\n"
        f"  curl -H 'Authorization: Bearer {key['prefix']}_...' http://127.0.0.1:8000/v1/models\n"
        f"  OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='{key['prefix']}_...')",
        err=True,
    )
