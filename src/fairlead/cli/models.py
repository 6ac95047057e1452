"""`fairlead models`: the registry, and what a running server has loaded.

What asks the registry works on the store itself (that of --config, or the default one), or on a server's operations port with
--url. `loaded`, `load` and `unload` ask a server's data port, where FAIRLEAD_API_KEY is shown to one that asks for a key.
"""

import http.client
import importlib
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from fairlead.cli.admin import (
    Asks,
    Remote,
    ask,
    bearer,
    checked,
    fields,
    parsed_url,
    place_options,
    server_options,
    short_time,
    show_done,
    show_fields,
    show_json,
    show_table,
    target,
)
from fairlead.core.errors import ConfigError, FairleadError, InvalidRequest, Unavailable
from fairlead.core.versions import Ref, parse_ref

ADD_SECONDS = 3600.0
"""For a server that reads, writes and digests a version."""
url_option = click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's HTTP address.")
json_option = click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
STYLES = {"READY": "green", "UNAVAILABLE": "red", "LOADING": "yellow", "UNLOADING": "yellow"}


ELSEWHERE = {"record": "fairlead.cli.record", "validate": "fairlead.cli.validate"}
"""Commands in files of their own, imported only when they are used: `validate` brings all that loads models."""


class _Models(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *ELSEWHERE]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command = getattr(importlib.import_module(ELSEWHERE[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Models)
def models() -> None:
    """The registry of models and their versions; what a running server has loaded."""


def _ref(_: click.Context, __: click.Parameter, text: str) -> Ref:
    try:
        return parse_ref(text)
    except InvalidRequest as error:
        raise click.BadParameter(error.message) from None


def _version_ref(ctx: click.Context, parameter: click.Parameter, text: str) -> Ref:
    ref = _ref(ctx, parameter, text)
    if not ref.version and not ref.alias:
        raise click.BadParameter(f"say which version: {ref.model}@7 or {ref.model}@champion")
    return ref


def _pairs(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
        found[name] = value
    return found


def _numbers(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in _pairs(ctx, parameter, texts).items()}
    except ValueError as error:
        raise click.BadParameter(f"{error}: metrics are numbers") from None


REF = click.argument("ref", metavar="MODEL[@VERSION]", callback=_ref)
VERSION = click.argument("ref", metavar="MODEL@VERSION", callback=_version_ref)
key_option = click.Path(exists=True, dir_okay=False, path_type=Path)


# The registry


@models.command()
@click.argument("source", metavar="PATH_OR_URL")
@click.option("--name", required=True, help="The model that it is a version of.")
@click.option("--spec", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A model.yaml, in place of the source's own.")
@click.option("--trusted", is_flag=True, help="You vouch for artefacts whose loading runs code (pickles).")
@click.option("--flavour", default="", help="Of an MLflow model: onnx, sklearn, ..., python_function.  [default: the best one]")
@click.option("--in-place", is_flag=True, help="Leave the files where they are; they are verified at every load all the same.")
@click.option("--git-commit", envvar=["FAIRLEAD_GIT_COMMIT", "GITHUB_SHA", "CI_COMMIT_SHA"], default="", help="Of what it was trained by.")
@click.option("--parent", default="", help="The version that it was made of, e.g. fraud@6.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=NUMBER", callback=_numbers, help="What training told. Repeatable.")
@click.option("--licence", default="")
@click.option("--framework", default="", help="What it was trained with.")
@click.option("--notes", default="")
@click.option("--tag", "tags", multiple=True, metavar="NAME=VALUE", callback=_pairs, help="Repeatable.")
@click.option("--sign", "key_file", type=key_option, metavar="KEY.pem", help="Sign it with this Ed25519 private key, which stays here.")
@place_options
def add(
    asks: Asks,
    source: str,
    name: str,
    spec: Path | None,
    trusted: bool,
    flavour: str,
    in_place: bool,
    key_file: Path | None,
    as_json: bool,
    **about: Any,
) -> None:
    """A new version of a model: a folder, a file, an fsspec URL or an MLflow model folder.

    Its files are copied into the registry. With --url a path of this machine is uploaded, and a URL is read by the server.
    """
    about |= {"spec": _text(spec) if spec else "", "trusted": trusted, "flavour": flavour, "in_place": in_place}
    if isinstance(asks, Remote) and "://" not in source and not in_place:
        answer = _uploaded(asks, source, name, about, key_file)
    else:
        local = not isinstance(asks, Remote) and "://" not in source
        body = {**about, "uri": str(Path(source).absolute()) if local else source}
        with Console(stderr=True).status(f"adding {source}"):
            answer = ask(asks, "POST", target("/admin/models/{}/versions", name), body, timeout=ADD_SECONDS)
        version = answer["version"]
        if key_file is not None and not (version["signed_by"] and not answer["new"]):
            answer["version"] = _sign(asks, version, key_file)
    if as_json:
        show_json(answer)
        return
    version = answer["version"]
    click.echo(f"{name}@{version['version']}")
    signed = f", signed by {version['signed_by']}" if version["signed_by"] else ""
    told = "is new" if answer["new"] else f"is the same content: nothing was added or changed; it is {version['stage']}"
    size = f"{version['bytes'] / 1e6:.1f} MB" if version["bytes"] >= 1e5 else f"{version['bytes']} bytes"
    click.echo(f"{told}: {version['backend'] or 'model'}, {size}, {version['digest'][:12]}{signed}, in {asks.place}", err=True)


@models.command("list")
@place_options
def list_(asks: Asks, as_json: bool) -> None:
    """Every model of the registry; with --url also those of the server's repositories, and what it has loaded."""
    found = ask(asks, "GET", "/admin/models")["models"]
    if as_json:
        show_json(found)
        return
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "model": lambda model: model["name"],
        "versions": lambda model: model["versions"] if model["registered"] else "in a repository",
        "newest": lambda model: model["newest"],
        **fields("aliases", "tags"),
    }
    if any(model["loaded"] is not None for model in found):
        columns["loaded"] = lambda model: [f"{each['version']} {each['state']}".strip() for each in model["loaded"] or () if each["state"]]
    columns["description"] = lambda model: model["description"]
    show_table(columns, found, "no models yet: `fairlead models add PATH --name NAME` adds a version")


@models.command()
@REF
@place_options
def show(asks: Asks, ref: Ref, as_json: bool) -> None:
    """A model and its versions, or one version."""
    if ref.version or ref.alias:
        version = _version(asks, ref)
        if as_json:
            show_json(version)
            return
        gates = {each["gate"]: each["outcome"] for each in version["gates"]}
        shown = {name: value for name, value in version.items() if name not in ("files", "gates", "spec", "schema", "loaded")}
        schema = {part: [_tensor(each) for each in version["schema"].get(part, ())] for part in ("inputs", "outputs")}
        show_fields({**shown, **schema, "loaded": _states(version.get("loaded")), "gates": gates})
        show_table(fields("path", "bytes", "sha256"), version["files"], "")
        if version["spec"].strip() != "{}":
            click.echo(f"\n{version['spec'].rstrip()}")
        return
    model = ask(asks, "GET", target("/admin/models/{}", ref.model))
    versions = ask(asks, "GET", target("/admin/models/{}/versions", ref.model))["versions"]
    if as_json:
        show_json({**model, "versions": versions})
        return
    told = {name: value for name, value in model.items() if name not in ("registered", "versions", "loaded")}
    told["loaded"] = _states(model.get("loaded"))
    show_fields({name: value for name, value in told.items() if value not in (None, {}, "", [])})
    columns = {
        **fields("version", "stage", "aliases", "backend"),
        "metrics": lambda version: version["provenance"].get("metrics", {}),
        "git_commit": lambda version: version["provenance"].get("git_commit", "")[:12],
        "signed_by": lambda version: version["signed_by"],
        "digest": lambda version: version["digest"][:12],
        "created": lambda version: short_time(version["created"]),
        **fields("tags", "reason"),
    }
    show_table(columns, versions, "no versions yet: `fairlead models add PATH --name " + ref.model + "` adds one")


@models.command()
@click.argument("old", metavar="MODEL@VERSION", callback=_version_ref)
@click.argument("new", metavar="MODEL@VERSION", callback=_version_ref)
@place_options
def diff(asks: Asks, old: Ref, new: Ref, as_json: bool) -> None:
    """What differs between two versions: files, spec, schema, metrics, provenance, gates."""
    if old.model != new.model:
        raise click.UsageError("the two are versions of different models")
    found = ask(asks, "GET", target("/admin/models/{}/diff", old.model, from_=_end(old), to=_end(new)))
    if as_json:
        show_json(found)
        return
    if found["same_content"]:
        click.echo("the same files and spec", err=True)
    rows = [{"of": "files", "what": each["path"], "old": each["bytes"][0], "new": each["bytes"][1]} for each in found["files"]]
    for part in ("spec", "schema", "metrics", "provenance", "gates"):
        changes = found[part].items()
        if part in ("schema", "gates") and changes and any(all(pair[side] is None for _, pair in changes) for side in (0, 1)):
            unknown = [all(pair[side] is None for _, pair in changes) for side in (0, 1)]
            rows.append(
                {
                    "of": part,
                    "what": "",
                    **{name: "not validated" if each else "" for name, each in zip(("old", "new"), unknown, strict=True)},
                }
            )
            continue
        rows += [{"of": part, "what": place, "old": before, "new": after} for place, (before, after) in found[part].items()]
    first, second = found["versions"]
    columns = {**fields("of", "what"), first: lambda row: row["old"], second: lambda row: row["new"]}
    show_table(columns, rows, f"nothing differs between {first} and {second}")


@models.command()
@VERSION
@click.option("--reason", default="", help="For those who wonder later.")
@place_options
def retire(asks: Asks, ref: Ref, reason: str, as_json: bool) -> None:
    """A version will not serve again. Refused while it serves or is tried."""
    version = ask(asks, "POST", target("/admin/models/{}/versions/{}/retire", ref.model, _end(ref)), {"reason": reason})
    show_done(f"retired {ref.model}@{version['version']}", version, as_json)


@models.command()
@VERSION
@place_options
def delete(asks: Asks, ref: Ref, as_json: bool) -> None:
    """Delete a version that is retired, rejected or was never used, with its files in the registry."""
    answer = ask(asks, "DELETE", target("/admin/models/{}/versions/{}", ref.model, _end(ref)))
    show_done(f"deleted {ref}", answer, as_json)


@models.command()
@REF
@click.argument("tags", nargs=-1, required=True, metavar="NAME=VALUE...", callback=_pairs)
@place_options
def tag(asks: Asks, ref: Ref, tags: dict[str, str], as_json: bool) -> None:
    """Set tags of a model, or of a version; `NAME=` takes one away."""
    changes = {name: value or None for name, value in tags.items()}
    place = target("/admin/models/{}/versions/{}", ref.model, _end(ref)) if _end(ref) else target("/admin/models/{}", ref.model)
    show_done(f"tagged {ref}", ask(asks, "PATCH", place, {"tags": changes}), as_json)


@models.command()
@REF
@click.argument("alias")
@click.option("--drop", is_flag=True, help="Let it name none.")
@place_options
def alias(asks: Asks, ref: Ref, alias: str, drop: bool, as_json: bool) -> None:
    """Let an alias name a version: fairlead models alias fraud@7 blue."""
    place = target("/admin/models/{}/aliases/{}", ref.model, alias)
    if drop:
        if _end(ref):
            raise click.UsageError(f"to drop an alias, name the model alone: {ref.model}")
        show_done(f"{ref.model}@{alias} names none", ask(asks, "DELETE", place), as_json)
        return
    if not _end(ref):
        raise click.UsageError(f"say which version: {ref.model}@7")
    version = ref.version or _version(asks, ref)["version"]
    show_done(f"{ref.model}@{alias} is {ref.model}@{version}", ask(asks, "PUT", place, {"version": version}), as_json)


@models.command()
@VERSION
@click.option("--private-key", "key_file", type=key_option, required=True, help="Ed25519 in PEM; it stays on this machine.")
@place_options
def sign(asks: Asks, ref: Ref, key_file: Path, as_json: bool) -> None:
    """Vouch for a version: sign its digest, which covers all its files and its spec."""
    version = _sign(asks, _version(asks, ref), key_file)
    show_done(f"signed {ref.model}@{version['version']} as {version['signed_by']}", version, as_json)


@models.command()
@click.argument("name")
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@place_options
def checks(asks: Asks, name: str, folder: Path | None, as_json: bool) -> None:
    """What the gates ask of a model's versions: show it, or replace it by a folder of checks."""
    place = target("/admin/models/{}/checks", name)
    if folder is None:
        found = ask(asks, "GET", place)
        if as_json:
            show_json(found)
            return
        counts = {"golden": len(found["golden"]), "safety": len(found["safety"]), "dataset": bool(found["dataset"])}
        show_fields({**counts, **found["rules"]})
        return
    from fairlead.control.checks_folder import read_checks

    show_done(f"checks of {name} replaced", ask(asks, "PUT", place, read_checks(folder).to_json()), as_json)


@models.command()
@click.argument("name")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
@place_options
def events(asks: Asks, name: str, limit: int, as_json: bool) -> None:
    """What happened to a model and its versions, the newest first."""
    found = ask(asks, "GET", target("/admin/models/{}/events", name, limit=limit))["entries"]
    if as_json:
        show_json(found)
        return
    columns = {
        "time": lambda entry: entry["time"][:19].replace("T", " "),
        **fields("actor", "action", "subject"),
        "details": lambda entry: {
            name: str(value)[:12] if name == "digest" else value
            for name, value in entry["details"].items()
            if value not in ("", {}, [], None)
        },
    }
    show_table(columns, found, f"nothing happened to {name} yet")


def _tensor(told: dict[str, Any]) -> str:
    """`X FP32 [-1, 8]`."""
    return f"{told['name']} {told['datatype']} {told['shape']}"


def _states(loaded: Any) -> Any:
    """Of what a server has loaded; None where none was asked."""
    if isinstance(loaded, list):
        return [f"@{each['version']} {each['state']} {each['reason']}".rstrip() for each in loaded]
    return loaded if loaded is None else f"{loaded['state']} {loaded['reason']}".rstrip()


def _end(ref: Ref) -> str:
    """As paths of the API have it; "" of a bare model."""
    return str(ref.version) if ref.version else ref.alias


def _version(asks: Asks, ref: Ref) -> dict[str, Any]:
    found: dict[str, Any] = ask(asks, "GET", target("/admin/models/{}/versions/{}", ref.model, _end(ref)))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _signed(model: str, digest: str, key_file: Path) -> dict[str, str]:
    from fairlead.control.signing import pem_of, private_key
    from fairlead.control.signing import sign as signature_of

    key = private_key(key_file.read_bytes(), str(key_file), lambda: click.prompt("passphrase", hide_input=True, err=True))
    return {"signature": signature_of(key, model, digest), "public_key": pem_of(key.public_key())}


def _sign(asks: Asks, version: dict[str, Any], key_file: Path) -> dict[str, Any]:
    place = target("/admin/models/{}/versions/{}/signature", version["model"], str(version["version"]))
    signed: dict[str, Any] = ask(asks, "PUT", place, _signed(version["model"], version["digest"], key_file))
    return signed


def _uploaded(asks: Remote, source: str, model: str, about: dict[str, Any], key_file: Path | None) -> Any:
    """A path of this machine, as a tar. What is signed is what was read here, whatever the server says."""
    from fairlead.api.registry import TAR
    from fairlead.control.artefacts import find
    from fairlead.control.digest import digest_of
    from fairlead.control.tar import packed
    from fairlead.runtime.source import default_cache

    artefacts = find(
        source,
        model,
        cache_folder=default_cache(),
        max_bytes=sys.maxsize,
        spec=about["spec"],
        trusted=about["trusted"],
        flavour=about["flavour"],
    )
    said = {name: value for name, value in about.items() if value and name not in ("spec", "trusted", "flavour", "in_place")}
    said = {"framework": artefacts.provenance.get("framework", ""), "source": source, **said}
    # Who may not do it, or may not do it here, is told so before gigabytes are sent.
    ask(asks, "GET", "/admin/models")
    if key_file is not None:
        with _progress(f"reading {source}", artefacts.num_bytes) as advance:
            digest = digest_of(artefacts.hashed(advance), artefacts.spec)
        said |= _signed(model, digest, key_file)
    place = target("/admin/models/{}/versions", model, about=msgspec.json.encode(said).decode())
    with _progress(f"sending {source}", artefacts.num_bytes) as advance:
        answer = asks.upload(place, TAR, _told(packed(artefacts), advance), timeout=ADD_SECONDS)
    return msgspec.json.decode(checked(answer, asks).body)


def _told(chunks: Iterator[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        advance(len(chunk))


@contextmanager
def _progress(words: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(words, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


# What a server has loaded


def _ref_of_version(_: click.Context, __: click.Parameter, text: str) -> tuple[str, str]:
    """`NAME` or `NAME@VERSION`."""
    name, _at, version = text.partition("@")
    return name, version


@models.command()
@url_option
@json_option
def loaded(url: str, as_json: bool) -> None:
    """Every model that a server knows, and the state of its versions."""
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


@models.command()
@click.argument("name", callback=_ref_of_version)
@click.option("--timeout", default=30.0, show_default=True, type=click.FloatRange(0, 3600), help="Seconds in which what runs may end.")
@click.option(
    "--level",
    type=click.IntRange(1, 2),
    help="1: its process stays without KV memory; 2: it ends. Without: as the model's `sleep.level` says.",
)
@server_options
def sleep(asks: Asks, name: tuple[str, str], timeout: float, level: int | None, as_json: bool) -> None:
    """Give back the memory of a model with an engine: NAME or NAME@VERSION. A request wakes it again."""
    model, version = name
    body = {"version": version, "timeout": timeout, "level": level}
    answer = ask(asks, "POST", target("/admin/models/{}/sleep", model), body, timeout=timeout + 60.0)
    show_done(_slept(answer), answer, as_json)


@models.command()
@click.argument("name", callback=_ref_of_version)
@server_options
def wake(asks: Asks, name: tuple[str, str], as_json: bool) -> None:
    """Wake what sleeps: NAME or NAME@VERSION."""
    model, version = name
    answer = ask(asks, "POST", target("/admin/models/{}/wake", model), {"version": version}, timeout=600.0)
    show_done(_slept(answer), answer, as_json)


def _slept(answer: dict[str, Any]) -> str:
    return ", ".join(
        f"{answer['model']}@{each['version']} is {each['state']}" + (f" at level {each['level']}" if each["level"] else "")
        for each in answer["versions"]
    )


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
