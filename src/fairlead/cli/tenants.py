"""`fairlead tenants`: who there is, and what they may."""

from typing import Any

import click

from fairlead.cli.admin import (
    Asks,
    ask,
    fields,
    force_option,
    limit_option,
    limits_of,
    place_options,
    short_time,
    show_done,
    show_fields,
    show_json,
    show_table,
    target,
)

NAME = click.argument("name")


@click.group()
def tenants() -> None:
    """Make, list, change and delete tenants and their projects.

    Works on the store itself (that of --config, or the default one), or on a running server with --url.
    """


def _policy_options(command: Any) -> Any:
    for option in (
        click.option("--require-signature/--no-require-signature", default=None, help="Requests must be signed (RFC 9421)."),
        click.option("--weight", type=float, help="Its share of turns against others of its class."),
        click.option("--model", "models", multiple=True, help="A pattern of the models that it may use. Repeatable: replaces the list."),
        limit_option,
        click.option(
            "--may-ask", "classes", multiple=True, help="A further class that its requests may ask for. Repeatable: replaces the list."
        ),
        click.option("--class", "qos_class", help="Class of service."),
    ):
        command = option(command)
    return command


def _policy(
    limits: dict[str, float | None],
    qos_class: str | None,
    classes: tuple[str, ...],
    models: tuple[str, ...],
    weight: float | None,
    require_signature: bool | None,
) -> dict[str, Any]:
    """What was said."""
    said = {
        "class": qos_class,
        "classes": classes or None,
        "limits": limits or None,
        "models": models or None,
        "weight": weight,
        "require_signature": require_signature,
    }
    return {name: value for name, value in said.items() if value is not None}


@tenants.command()
@NAME
@_policy_options
@place_options
def create(asks: Asks, name: str, limits: tuple[str, ...], as_json: bool, **policy: Any) -> None:
    """A new tenant. Without a policy of its own it may what fairlead.yaml says of it, or of `default`."""
    body = {"name": name, "policy": _policy(limits_of(limits), **policy) or None}
    tenant = ask(asks, "POST", "/admin/tenants", body)
    show_done(f"created {name}", tenant, as_json)


@tenants.command("list")
@place_options
def list_(asks: Asks, as_json: bool) -> None:
    """All tenants."""
    found = ask(asks, "GET", "/admin/tenants")["tenants"]
    if as_json:
        show_json(found)
        return
    columns = {
        **fields("name"),
        "policy": lambda tenant: "as in fairlead.yaml" if tenant["policy"] is None else tenant["policy"],
        "created": lambda tenant: short_time(tenant["created"]),
        "": lambda tenant: "disabled" if tenant["disabled"] else "",
    }
    show_table(columns, found, "no tenants")


@tenants.command()
@NAME
@place_options
def show(asks: Asks, name: str, as_json: bool) -> None:
    """One tenant and its projects."""
    tenant = ask(asks, "GET", target("/admin/tenants/{}", name))
    projects = ask(asks, "GET", target("/admin/tenants/{}/projects", name))["projects"]
    if as_json:
        show_json({**tenant, "projects": projects})
        return
    show_fields(tenant)
    if projects:
        show_table({"project": lambda project: project["name"], "limits": lambda project: project["limits"]}, projects, "")


@tenants.command("set")
@NAME
@_policy_options
@click.option("--disable/--enable", "disabled", default=None, help="Refuse all of its keys, or no longer.")
@click.option("--default-policy", is_flag=True, help="No policy of its own any more: what fairlead.yaml says.")
@force_option
@place_options
def set_(
    asks: Asks, name: str, limits: tuple[str, ...], disabled: bool | None, default_policy: bool, force: bool, as_json: bool, **policy: Any
) -> None:
    """Change what a tenant may; what is not named stays. `--limit NAME=` takes a limit away."""
    said = _policy(limits_of(limits, removable=True), **policy)
    if default_policy and said:
        raise click.UsageError("--default-policy excludes all that says something of the policy")
    body: dict[str, Any] = {} if disabled is None else {"disabled": disabled}
    if said or default_policy:
        body["policy"] = said or None
    if not body:
        raise click.UsageError("nothing to change: see --help")
    tenant = ask(asks, "PATCH", target("/admin/tenants/{}", name, force="true" if force else None), body)
    show_done(f"changed {name}", tenant, as_json)


@tenants.command()
@NAME
@force_option
@place_options
def delete(asks: Asks, name: str, force: bool, as_json: bool) -> None:
    """Delete a tenant with its projects and keys. Its usage stays."""
    show_done(f"deleted {name}", ask(asks, "DELETE", target("/admin/tenants/{}", name, force="true" if force else None)), as_json)


@tenants.command()
@NAME
@click.argument("project")
@limit_option
@place_options
def project(asks: Asks, name: str, project: str, limits: tuple[str, ...], as_json: bool) -> None:
    """Make a project of a tenant, or set its limits anew."""
    made = ask(asks, "PUT", target("/admin/tenants/{}/projects/{}", name, project), {"limits": limits_of(limits)})
    show_done(f"project {project} of {name} is set", made, as_json)


@tenants.command("delete-project")
@NAME
@click.argument("project")
@place_options
def delete_project(asks: Asks, name: str, project: str, as_json: bool) -> None:
    """Delete a project of a tenant."""
    show_done(f"deleted project {project} of {name}", ask(asks, "DELETE", target("/admin/tenants/{}/projects/{}", name, project)), as_json)
