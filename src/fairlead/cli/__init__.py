"""The `fairlead` command. Each subcommand's module is imported only when it is used."""

import importlib
import sys
from typing import Any

import click

from fairlead import __version__
from fairlead.core.errors import FairleadError

COMMANDS = {
    "serve": "fairlead.cli.serve:serve",
    "chat": "fairlead.cli.chat:chat",
    "image": "fairlead.cli.image:image",
    "ui": "fairlead.cli.ui:ui",
    "jobs": "fairlead.cli.jobs:jobs",
    "models": "fairlead.cli.models:models",
    "rollout": "fairlead.cli.rollout:rollout",
    "keys": "fairlead.cli.keys:keys",
    "tenants": "fairlead.cli.tenants:tenants",
    "usage": "fairlead.cli.usage:usage",
    "audit": "fairlead.cli.audit:audit",
    "explain": "fairlead.cli.explain:explain",
    "logs": "fairlead.cli.logs:logs",
    "profile": "fairlead.cli.profile:profile",
    "slo": "fairlead.cli.slo:slo",
    "incident": "fairlead.cli.incident:incident",
    "demo": "fairlead.cli.demo:demo",
    "dashboards": "fairlead.cli.dashboards:dashboards",
    "doctor": "fairlead.cli.doctor:doctor",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """One server for every kind of model."""


def main(**kwargs: Any) -> None:
    """Run the command line; an error of ours is one readable line and exit code 2."""
    try:
        cli(**kwargs)
    except FairleadError as error:
        click.echo(f"fairlead: {error.message}", err=True)
        sys.exit(2)
