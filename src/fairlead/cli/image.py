"""`fairlead image PROMPT`: a picture from a running server."""

import base64
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from typing import Any

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fairlead.cli.asking import answer, asked, events
from fairlead.core.errors import FairleadError, InvalidRequest

ENDED = ("complete", "failed", "aborted")
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
FORMATS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
PREVIEWS = 12
"""In the time that a picture takes."""
SHOWN_COLUMNS, SHOWN_ROWS = 48, 24
"""Of the terminal, at most; a row shows two of pixels."""
STOPPED_EXIT = 130
CANCEL_SECONDS = 10.0
"""For each of the requests that cancelling takes."""
HALF = "▀"


@click.command()
@click.argument("prompt")
@click.option("--model", help="A model that makes pictures.  [default: the only one]")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's HTTP address.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to: .png, .jpg or .webp.  [default: the model's name]"
)
@click.option("--negative", default="", help="What it should not show.")
@click.option("--width", type=click.IntRange(1))
@click.option("--height", type=click.IntRange(1))
@click.option("-n", "--number", type=click.IntRange(1, 16), default=1, show_default=True, help="How many pictures.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.")
@click.option("--guidance", type=click.FloatRange(0.0), help="How closely it follows the prompt.")
@click.option("--seed", type=click.IntRange(0), help="Makes the same picture again.")
@click.option("--scheduler", default="")
@click.option("--mode", type=click.Choice(["exact", "balanced", "turbo"]), default="exact", show_default=True)
@click.option("--image", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A picture to begin from.")
@click.option("--mask", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="White where --image is painted anew.")
@click.option("--strength", type=click.FloatRange(0.0, 1.0, min_open=True), help="How far from --image it may go.")
@click.option("--lora", multiple=True, help="NAME or NAME=SCALE; may come several times.")
@click.option("--json", "as_json", is_flag=True, help="The finished job as JSON, and no pictures of it here.")
def image(
    prompt: str,
    model: str | None,
    url: str,
    out: Path | None,
    negative: str,
    width: int | None,
    height: int | None,
    number: int,
    steps: int | None,
    guidance: float | None,
    seed: int | None,
    scheduler: str,
    mode: str,
    image: Path | None,
    mask: Path | None,
    strength: float | None,
    lora: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a picture of PROMPT.

    A server that wants a key takes it from FAIRLEAD_API_KEY. Ctrl-C cancels.
    """
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise InvalidRequest(f"--out must end with {', '.join(SUFFIXES)}, and {out.name!r} does not")
    if out is not None and not out.parent.is_dir():
        raise InvalidRequest(f"there is no folder {out.parent}")
    model = model or _only_model(url)
    shows = sys.stdout.isatty() and not as_json
    wanted = {
        "prompt": prompt,
        "negative_prompt": negative,
        "width": width,
        "height": height,
        "n": number,
        "num_steps": steps,
        "guidance": guidance,
        "seed": seed,
        "scheduler": scheduler,
        "mode": mode,
        "image": _base64(image),
        "mask": _base64(mask),
        "strength": strength,
        "loras": [_lora(each) for each in lora],
        "format": SUFFIXES[out.suffix.lower()] if out is not None else "png",
    }
    given = {name: value for name, value in wanted.items() if value not in (None, "", [])}
    job = _made(url, {"model": model, "input": given}, previews=shows)
    if job["status"] != "complete":
        raise FairleadError(f"no picture: {job['error']['message']} ({job['error']['reason']})")
    files = _saved(url, job, out)
    if as_json:
        click.echo(msgspec.json.encode({**job, "files": [str(file) for file in files]}).decode())
        return
    for file, picture in zip(files, job["result"]["pictures"], strict=True):
        if shows:
            Console().print(drawn(file.read_bytes()))
        click.echo(f"{file}  {picture['width']}x{picture['height']}, seed {picture['seed']}")


def _only_model(url: str) -> str:
    """Raises InvalidRequest where there are none, or several."""
    names = [model["name"] for model in asked(url, "GET", "/v1/images/models")["models"]]
    if len(names) == 1:
        return str(names[0])
    raise InvalidRequest(f"--model must say which: {', '.join(names)}" if names else f"no model at {url} makes pictures")


def _made(url: str, body: dict[str, Any], *, previews: bool) -> dict[str, Any]:
    """The job when it has ended, with a bar while it goes on; cancelled by Ctrl-C, whenever that comes."""
    key, job = token_hex(16), None
    try:
        job = _submitted(url, body, key, previews=previews)
        with answer(url, "GET", f"/v1/jobs/{job['id']}/events") as response, _Watching(previews) as watching:
            for job in events(response):
                watching.show(job)
    except KeyboardInterrupt:
        _cancel(url, body, key, job)
        raise SystemExit(STOPPED_EXIT) from None
    if job["status"] not in ENDED:
        raise FairleadError(f"the server broke off its answer; job {job['id']} may go on")
    return dict(job)


def _submitted(url: str, body: dict[str, Any], key: str, *, previews: bool) -> dict[str, Any]:
    """`body` is left as it was sent last."""
    if previews:
        body["input"]["preview_steps"] = 1
    try:
        return dict(asked(url, "POST", "/v1/jobs", body, {"idempotency-key": key}))
    except FairleadError as error:
        if not previews or "preview_steps" not in error.message:
            raise
    del body["input"]["preview_steps"]  # a model without previews
    return dict(asked(url, "POST", "/v1/jobs", body, {"idempotency-key": key}))


def _cancel(url: str, body: dict[str, Any], key: str, job: dict[str, Any] | None) -> None:
    """`job`: None where it was not told yet whether there is one. Asked again with the same key, the server tells of the same one."""
    try:
        if job is None:
            job = asked(url, "POST", "/v1/jobs", body, {"idempotency-key": key}, CANCEL_SECONDS)
        asked(url, "POST", f"/v1/jobs/{job['id']}/cancel", timeout=CANCEL_SECONDS)
    except FairleadError as error:
        what = "it is not known whether it was submitted" if job is None else f"job {job['id']} may go on"
        click.echo(f"not cancelled: {what}: {error.message}", err=True)
    else:
        click.echo("cancelled", err=True)


class _Watching:
    """A bar, with what the picture looks like by now over it."""

    def __init__(self, previews: bool) -> None:
        self.previews = previews
        self.console = Console(stderr=True)
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=self.console)
        self.task = self.bar.add_task("queued", total=None)
        self.live = Live(self.bar, console=self.console, transient=True)
        self.preview = ""

    def __enter__(self) -> "_Watching":
        self.live.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.live.__exit__(*failure)

    def show(self, job: dict[str, Any]) -> None:
        progress, position = job.get("progress"), job.get("position")
        if job["status"] == "queued":
            self.bar.update(self.task, description=f"queued, {position} before it" if position else "queued")
        elif progress is not None:
            self.bar.update(self.task, description="denoising", completed=progress["step"], total=progress["num_steps"])
            self.preview = progress.get("preview", "") or self.preview
        if self.previews and self.preview:
            with suppress(OSError, ValueError):
                self.live.update(Group(drawn(base64.b64decode(self.preview.partition(",")[2])), self.bar))


def drawn(data: bytes) -> Text:
    """A picture in half blocks, two of its rows in each of the terminal's."""
    from PIL import Image

    with Image.open(BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    scale = min(SHOWN_COLUMNS / picture.width, 2 * SHOWN_ROWS / picture.height)
    width, height = max(int(picture.width * scale), 1), max(int(picture.height * scale) // 2 * 2, 2)
    pixels = picture.resize((width, height)).load()
    assert pixels is not None
    text = Text()
    for row in range(0, height, 2):
        for column in range(width):
            upper, lower = pixels[column, row], pixels[column, row + 1]
            text.append(HALF, style=f"rgb({','.join(map(str, upper))}) on rgb({','.join(map(str, lower))})")  # type: ignore[arg-type]
        text.append("\n")
    return text


def _saved(url: str, job: dict[str, Any], out: Path | None) -> list[Path]:
    """Beside each other where there are several: `seven-2.png`."""
    pictures = job["result"]["pictures"]
    files = []
    for number, picture in enumerate(pictures, 1):
        first = out or Path(job["model"]).with_suffix(FORMATS.get(picture["content_type"], ".bin"))
        file = first if len(pictures) == 1 else first.with_stem(f"{first.stem}-{number}")
        path = picture["url"][picture["url"].index("/v1/artifacts/") :]
        with answer(url, "GET", path) as response:
            file.write_bytes(response.read())
        files.append(file)
    return files


def _base64(file: Path | None) -> str:
    return "" if file is None else base64.b64encode(file.read_bytes()).decode()


def _lora(text: str) -> dict[str, Any]:
    name, equals, scale = text.partition("=")
    try:
        return {"name": name, "scale": float(scale)} if equals else {"name": name}
    except ValueError:
        raise InvalidRequest(f"--lora {text!r}: the scale is no number") from None
