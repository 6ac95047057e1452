"""`fairlead dashboards`: Grafana's dashboards as files."""

from pathlib import Path

import click
import msgspec
from rich.console import Console

from fairlead.core.errors import ConfigError
from fairlead.observe.dashboards.grafana import files


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The folder that they are written to; it is made where it is missing."
)
@click.option("--json", "as_json", is_flag=True, help="The files' names as JSON, for scripts.")
def dashboards(out: Path, *, as_json: bool) -> None:
    """Write the dashboards for Grafana: overview, language models, tensors, images, tenants and cost, rollout."""
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files().items():
            path = out / name
            path.write_text(content, encoding="utf-8")
            written.append(str(path))
    except OSError as error:
        raise ConfigError(f"cannot write dashboards to {out}: {error.strerror}") from None
    if as_json:
        click.echo(msgspec.json.encode({"written": written}).decode())
        return
    console = Console(highlight=False)
    for each in written:
        console.print(each, markup=False, soft_wrap=True)
    console.print("Import them in Grafana (Dashboards, New, Import) and choose your Prometheus: docs/metrics.md says how.")
