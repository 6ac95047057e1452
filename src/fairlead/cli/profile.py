"""`fairlead profile`: what a model of a running server does for some seconds, and where its requests' time goes."""

import sys
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fairlead.cli.admin import Asks, ask, server_options, show_json
from fairlead.core.errors import FairleadError
from fairlead.observe.profile.report import report
from fairlead.observe.profile.result import KINDS, Profile
from fairlead.observe.redaction import printable

SLACK_SECONDS = 240.0
"""Beyond the time that is asked for: a server reads symbols before, and traces after."""
BAR = 40
TOP = 8


@click.command()
@click.argument("model", metavar="MODEL[@VERSION]")
@click.option("--seconds", type=click.FloatRange(1, 60), default=10.0, show_default=True)
@click.option("--kind", "kinds", default=",".join(KINDS), show_default=True, help="What to look at, with commas between.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the report and its raw data.  [default: profile-MODEL]"
)
@click.option("--rate", type=click.IntRange(1, 500), default=100, show_default=True, help="Samples of stacks in a second.")
@click.option("--native", is_flag=True, help="Functions of C and C++, too. Slows the processes down much more.")
@click.option("--shapes", is_flag=True, help="Shapes of the operators' inputs.")
@server_options
def profile(
    asks: Asks, model: str, seconds: float, kinds: str, out: Path | None, rate: int, native: bool, shapes: bool, as_json: bool
) -> None:
    """Look at a model that serves: stacks of all its processes, torch's kernels, memory, and the bottleneck by layer.

    Writes report.html (which needs no network), stacks-PID.txt for flame graph tools, trace-PID.json.gz for Perfetto, and profile.json.
    """
    chosen = tuple(kind for kind in kinds.replace(" ", "").split(",") if kind)
    if not chosen or set(chosen) - set(KINDS):
        raise click.BadParameter(f"{kinds!r}: choose from {', '.join(KINDS)}", param_hint="--kind")
    body = {"model": model, "seconds": seconds, "kinds": chosen, "rate": rate, "native": native, "shapes": shapes}
    told = ask(asks, "POST", "/admin/profile", body, timeout=seconds + SLACK_SECONDS)
    found = msgspec.convert(told, Profile)
    folder = out or Path("profile-" + "".join(each if each.isalnum() or each in "-_." else "_" for each in found.model))
    files = write(found, folder)
    if as_json:
        show_json({**told, "files": [str(path) for path in files]})
        return
    Console(width=None if sys.stdout.isatty() else 140).print(picture(found))
    click.echo(f"{files[0]}: open it in a browser. Beside it: {', '.join(path.name for path in files[1:])}")


def write(found: Profile, folder: Path) -> list[Path]:
    """The report first. Raises FairleadError."""
    files = {"report.html": report(found).encode()}
    for each in found.processes:
        if each.stacks:
            files[f"stacks-{each.pid}.txt"] = each.stacks.encode()
        if each.trace:
            files[f"trace-{each.pid}.json.gz"] = each.trace
    files["profile.json"] = msgspec.json.encode(found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise FairleadError(f"cannot write {folder}: {error.strerror}") from None
    return [folder / name for name in files]


def picture(found: Profile) -> Group:
    answer = found.answer
    parts: list[Any] = [
        Text(printable(f"{found.model}@{found.version}: {answer.num_requests} requests in {found.seconds:g} s"), style="bold")
    ]
    layers = Table.grid(padding=(0, 1))
    for layer in answer.layers:
        bar = Bar(1.0, 0.0, layer.share, width=BAR, color="cyan", bgcolor="grey23")
        layers.add_row(layer.name, bar, f"{layer.share:.1%}", f"{layer.seconds * 1e3:.3g} ms", Text(layer.about, style="dim"))
    parts += [layers, Text(answer.bottleneck, style="bold yellow"), Text(answer.advice)]
    processes = Table("process", "stacks by", "samples", "holds the lock", "hottest", box=SIMPLE_HEAD)
    for each in found.processes:
        hot = "\n".join(f"{own:.0%} {name}" for name, own, _ in each.top[:TOP])
        share = "" if each.gil_share is None else f"{each.gil_share:.0%}"
        processes.add_row(f"{each.name} ({each.pid})", each.sampler, str(each.num_samples), share, Text(printable(hot, lines=True)))
    parts.append(processes)
    for each in found.processes:
        if each.kernels:
            table = Table(
                "", "calls", "own time", "share", box=SIMPLE_HEAD, title=f"{each.name}: what torch recorded in {each.kernel_seconds:.2g} s"
            )
            for kernel in each.kernels[: 2 * TOP]:
                table.add_row(Text(printable(kernel.name)[:60]), str(kernel.calls), f"{kernel.seconds * 1e3:.3g} ms", f"{kernel.share:.1%}")
            parts.append(table)
    parts += [Text(printable(f"note: {note}"), style="dim") for note in found.notes]
    return Group(*parts)
