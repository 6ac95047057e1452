"""`fairlead models record`: golden requests from live traffic."""

import time
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.progress import Progress

from fairlead.cli.admin import Asks, ask, place_options, seconds_of, show_done, target
from fairlead.core.errors import ConfigError

LOOK_SECONDS = 0.5


@click.command()
@click.argument("model")
@click.option("--requests", type=click.IntRange(1, 10_000), default=100, show_default=True, help="So many different ones.")
@click.option("--for", "span", default="1h", show_default=True, help="At most so long: 90s, 30m, 12h.")
@click.option("--every", type=click.IntRange(1), default=1, show_default=True, help="Each n-th of the requests that come.")
@click.option("--no-redact", is_flag=True, help="Keep texts as they are, personal data and all.")
@click.option("--stop", is_flag=True, help="End a recording now, and keep what there is.")
@click.option("--no-wait", is_flag=True, help="Begin, and leave.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write them to this golden.jsonl, too.")
@place_options
def record(
    asks: Asks,
    model: str,
    requests: int,
    span: str,
    every: int,
    no_redact: bool,
    stop: bool,
    no_wait: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Record requests and the champion's answers as the golden requests of a model's gates.

    Needs a running server (--url). Who asked is not kept; personal data in texts is replaced, and the champion is asked once more.
    """
    place = target("/admin/models/{}/recording", model)
    if stop:
        told = ask(asks, "DELETE", place, timeout=300.0)
    else:
        wanted = {"requests": requests, "seconds": seconds_of(span), "every": every, "redact": not no_redact}
        told = ask(asks, "POST", place, wanted)
        if no_wait:
            show_done(f"{model}: recording {requests} requests", told, as_json)
            return
        told = _waited(asks, place, told)
    if output is not None:
        _write(output, ask(asks, "GET", target("/admin/models/{}/checks", model)))
    show_done(f"{model}: {told['examples']} golden requests are kept", told, as_json)


def _waited(asks: Asks, place: str, told: dict[str, Any]) -> dict[str, Any]:
    with Progress(transient=True) as progress:
        task = progress.add_task(f"recording {told['model']}", total=told["wanted"])
        while told["running"]:
            time.sleep(LOOK_SECONDS)
            told = ask(asks, "GET", place)
            progress.update(task, completed=told["examples"])
    return told


def _write(path: Path, checks: dict[str, Any]) -> None:
    try:
        path.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in checks.get("golden", ())))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
