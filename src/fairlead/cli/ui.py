"""`fairlead ui MODEL`: a page to try one model on."""

import asyncio
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import msgspec

from fairlead.core.errors import InvalidRequest

OPS_URL = "http://127.0.0.1:8002"


@click.command()
@click.argument("model", metavar="MODEL_OR_PATH")
@click.option("--port", type=click.IntRange(0, 65535), default=8003, show_default=True, help="Of the page; 0: any free one.")
@click.option("--share-on-lan", is_flag=True, help="Let others of the local network try it, by a link with a token.")
@click.option("--guests", type=click.IntRange(1, 1000), help="With --share-on-lan: browsers that may come by the link.  [default: 1]")
@click.option("--url", help=f"A running server's operations port.  [default, for a model's name: {OPS_URL}]")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option("--json", "as_json", is_flag=True, help="The addresses as JSON.")
@click.pass_context
def ui(
    context: click.Context, model: str, port: int, share_on_lan: bool, guests: int | None, url: str | None, no_browser: bool, as_json: bool
) -> None:
    """A page to try a model on: chat, pictures or a form of its tensors.

    A path (whatever `fairlead serve` takes: a checkpoint's folder, an .onnx file, ...) is served for it, on loopback, until Ctrl-C. A name is
    of a model that a running server has: its playground is opened.
    """
    if guests is not None and not share_on_lan:
        raise click.UsageError("--guests needs --share-on-lan")
    if url is None and (Path(model).exists() or "://" in model):
        _serve(model, port, guests=(guests or 1) if share_on_lan else 0, browser=not no_browser, as_json=as_json)
        return
    if share_on_lan or context.get_parameter_source("port") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(
            f"--port and --share-on-lan are for what this command serves itself, and {model!r} is no path here: "
            "a running server listens where its settings say"
        )
    address = _running(url or OPS_URL, model)
    _say({"model": model, "url": address}, as_json=as_json)
    if not no_browser:
        webbrowser.open(address)


def _serve(path: str, port: int, *, guests: int, browser: bool, as_json: bool) -> None:
    from fairlead.app import Server, serve
    from fairlead.app_demo import demo_settings, open_demo
    from fairlead.observe.logs import configure_logs

    async def then(server: Server) -> None:
        links = await open_demo(server, port, guests=guests)
        _say(msgspec.to_builtins(links), as_json=as_json)
        if browser:
            await asyncio.to_thread(webbrowser.open, links.url)

    if not as_json:
        click.echo(f"Loading {path} ...", err=True)
    with tempfile.TemporaryDirectory(prefix="fairlead-ui-") as folder:
        settings = demo_settings(path, Path(folder))
        configure_logs(settings.logs.level, settings.logs.format)
        try:
            import uvloop
        except ImportError:  # Windows
            asyncio.run(serve(settings, then=then))
        else:
            uvloop.run(serve(settings, then=then))


def _running(url: str, model: str) -> str:
    """The address of a running server's playground. Raises FairleadError where there is no server, or it has no such model."""
    from fairlead.cli.asking import asked

    base = url.rstrip("/")
    if not asked(base, "GET", "/ui/session")["required"]:  # else who opens the page logs in there first
        known = asked(base, "GET", f"/ui/playground/models?find={quote(model, safe='')}&limit=1000")
        if not any(each["name"] == model for each in known["models"]):
            raise InvalidRequest(f"{model!r} is neither a path here nor a model of {base}")
    return f"{base}/ui/playground?model={quote(model, safe='')}"


def _say(links: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(links).decode())
    else:
        click.echo(f"{links['model']} is at {links['url']}")
        if links.get("share"):
            click.echo(f"For others in this network: {links['share']}")
        if links.get("api"):
            click.echo(f"For programs of this machine: {links['api']}\nCtrl-C ends it.")
    sys.stdout.flush()
