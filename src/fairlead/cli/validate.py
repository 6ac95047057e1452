"""`fairlead models validate`: the gates, on this machine, without a server."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
from msgspec import structs
from rich.console import Console
from rich.markup import escape

from fairlead.cli.admin import Asks, Remote, ask, target, user
from fairlead.control.artefacts import CHECKS_FOLDER
from fairlead.control.checks import Checks
from fairlead.control.checks_folder import read_checks
from fairlead.control.gates.plan import Plan, Signature, Subject
from fairlead.control.gates.report import GATES, GateResult, Outcome, Report
from fairlead.control.junit import junit
from fairlead.control.validation import OnGate
from fairlead.control.validation import validate as validated
from fairlead.core.errors import ConfigError, InvalidRequest, NotFound, Unavailable
from fairlead.core.versions import CHAMPION, Ref, Stage, parse_ref
from fairlead.runtime.repository import RepositorySettings
from fairlead.runtime.source import Source, choose_versions

STDOUT = "-"
SERVER_SECONDS = 7200.0
"""For a server that validates."""
STYLES = {Outcome.PASSED: "green", Outcome.FAILED: "red", Outcome.SKIPPED: "dim", Outcome.ERROR: "yellow"}


@click.command()
@click.argument("version", metavar="PATH_OR_REF")
@click.option("--checks", type=click.Path(path_type=Path), help="A folder of checks.  [default: `checks` in the model's folder]")
@click.option("--champion", metavar="PATH_OR_REF", help="The version that it is held against.")
@click.option("--breaking", is_flag=True, help="It is meant that callers must change: other inputs or outputs are no failure.")
@click.option("--junit", "junit_file", metavar="FILE", help="JUnit XML; - for the standard output.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
@click.option("--log", is_flag=True, help="Show what the version's processes wrote.")
@click.option("--config", type=click.Path(path_type=Path), help="Of a REF: the fairlead.yaml that says where the store is.")
@click.option("--url", envvar="FAIRLEAD_ADMIN_URL", help="Of a REF: let this server do it, e.g. http://127.0.0.1:8002.")
@click.option("--key", envvar="FAIRLEAD_ADMIN_KEY", help="With --url: a key with the scope admin. Better in FAIRLEAD_ADMIN_KEY.")
def validate(
    version: str,
    checks: Path | None,
    champion: str | None,
    *,
    breaking: bool,
    junit_file: str | None,
    as_json: bool,
    log: bool,
    config: Path | None,
    url: str | None,
    key: str | None,
) -> None:
    """Hold a version against its checks: exit code 1 where a gate fails.

    PATH_OR_REF is a model's folder, an artefact or any fsspec URL, or a version of the registry such as fraud@7: that one is held
    against the registry's checks of its model and against its champion, and what comes of it decides upon its stage.
    """
    if as_json and junit_file == STDOUT:
        raise click.UsageError("--json and --junit - both write to the standard output")
    console = Console(stderr=as_json or junit_file == STDOUT, width=None if sys.stdout.isatty() else 10_000)
    if is_path(version):
        plan = plan_of(version, checks=checks, champion=champion, breaking=breaking)
        name = f"{plan.candidate.spec.name}@{plan.candidate.version}"
        report = _shown(name, lambda on_gate: asyncio.run(validated(plan, on_gate)), console)
    else:
        if checks is not None or champion is not None or breaking:
            raise click.UsageError(f"{version} is the registry's: its checks are those of `fairlead models checks`, its champion serves")
        ref = parse_ref(version)
        if url:
            remote = Remote(url, key or "")
            report = _shown(version, lambda on_gate: _asked(remote, ref, on_gate), console)
        else:
            report = _shown(version, lambda on_gate: _registered(ref, config, on_gate), console)
    if log and report.log:
        console.print(escape(report.log.rstrip()), style="dim", highlight=False)
    if junit_file == STDOUT:
        click.echo(junit(report), nl=False)
    elif junit_file:
        try:
            Path(junit_file).write_bytes(junit(report))
        except OSError as error:
            raise ConfigError(f"cannot write {junit_file}: {error.strerror}") from None
    if as_json:
        click.echo(msgspec.json.encode({"ok": report.ok, "reason": report.reason, **msgspec.to_builtins(report)}))
    if not report.ok:
        sys.exit(1)


def plan_of(version: str, *, checks: Path | None, champion: str | None, breaking: bool) -> Plan:
    """Raises FairleadError."""
    candidate = subject_of(version)
    return Plan(
        candidate=candidate,
        champion=None if champion is None else structs.replace(subject_of(champion), version="champion"),
        checks=_declared(checks_for(version, checks), breaking=breaking),
    )


def checks_for(version: str, folder: Path | None) -> Checks:
    """Raises ConfigError."""
    if folder is not None:
        return read_checks(folder)
    usual = Path(version) / CHECKS_FOLDER
    return read_checks(usual) if usual.is_dir() else Checks()


def _declared(checks: Checks, *, breaking: bool) -> Checks:
    return structs.replace(checks, rules=structs.replace(checks.rules, breaking=True)) if breaking else checks


def is_path(text: str) -> bool:
    return "://" in text or "/" in text or Path(text).exists()


def subject_of(text: str) -> Subject:
    """Raises FairleadError."""
    if not is_path(text):
        raise InvalidRequest(f"there is no model at {text!r}; write a path, such as ./{text}")
    return subject_at(text)


def subject_at(url: str) -> Subject:
    """The newest version of the model in a folder, or the one in a file. Raises FairleadError."""
    source = Source(url, RepositorySettings(sources=(url,)).cache_folder)
    listings = source.scan()
    if len(listings) != 1:
        raise ConfigError(f"{url} holds {len(listings)} models ({', '.join(sorted(listings)) or 'none'}): name the folder of one")
    (listing,) = listings.values()
    spec = source.spec(listing)
    wanted = choose_versions(list(listing.versions()), spec.version_policy)
    if not wanted:
        raise ConfigError(f"{url} holds no version of '{listing.name}' that its version_policy wants")
    return Subject(spec=spec, folder=str(source.fetch(listing, wanted[-1])), version=str(wanted[-1]))


def _shown(name: str, run: Callable[[OnGate], Report], console: Console) -> Report:
    """Validate, and write a line for each gate as it ends."""
    width = max(map(len, GATES))
    with console.status(f"{GATES[0]} ...") as status:

        def line(result: GateResult) -> None:
            word = f"[{STYLES[result.outcome]}]{result.outcome:<7}[/]"
            console.print(
                f"{word} {result.gate:<{width}} {result.seconds:>7.2f} s  {escape(result.message)}", highlight=False, soft_wrap=True
            )
            after = GATES.index(result.gate) + 1
            status.update(f"{GATES[after]} ..." if after < len(GATES) else "ending ...")

        report = run(line)
    style, words = ("green", "may serve") if report.ok else ("red", f"must not serve: {report.reason}")
    console.print(f"[{style}]{escape(name)} {escape(words)}[/]", highlight=False, soft_wrap=True)
    return report


# Versions of the registry


def _registered(ref: Ref, config: Path | None, on_gate: OnGate) -> Report:
    """Here, and written into the store. Raises FairleadError."""
    from fairlead.control.registry import Registry
    from fairlead.control.validations import Validations
    from fairlead.core.settings import Settings, read_settings
    from fairlead.store.database import default_url
    from fairlead.store.store import Store

    settings = Settings() if config is None else read_settings(config)
    store = Store.open(settings.store.url or default_url())
    try:
        row = store.registry.resolve(ref)
        validations = Validations(store, Registry(store, settings.control.registry))
        return asyncio.run(validations.run(row.model, row.number, f"cli:{user()}", on_gate))
    finally:
        store.close()


def _asked(asks: Asks, ref: Ref, on_gate: OnGate) -> Report:
    """By a server. Raises FairleadError."""
    began = time.time()
    started = ask(asks, "POST", target("/admin/models/{}/versions/{}/validate", ref.model, end_of(asks, ref)))
    model, number = started["model"], str(started["version"])
    while time.time() - began < SERVER_SECONDS:
        told = ask(asks, "GET", target("/admin/models/{}/versions/{}", model, number))
        gates = tuple(_gate(each) for each in told["gates"] if each["run"] == started["run"])
        if gates:
            for gate in gates:
                on_gate(gate)
            signature = msgspec.convert(told["schema"], Signature) if told["schema"] else None
            return Report(model=model, version=number, gates=gates, signature=signature, began=began, seconds=time.time() - began)
        time.sleep(0.5)
    raise Unavailable(f"{asks.place} has said nothing of {ref} for {SERVER_SECONDS:g} s: its log says why")


def end_of(asks: Asks, ref: Ref) -> str:
    """What comes after the `@`; of a bare name as `RegistryStore.resolve` has it. Raises FairleadError."""
    if ref.version or ref.alias:
        return str(ref.version or ref.alias)
    if CHAMPION in ask(asks, "GET", target("/admin/models/{}", ref.model))["aliases"]:
        return CHAMPION
    versions = ask(asks, "GET", target("/admin/models/{}/versions", ref.model))["versions"]
    usable = [each for each in versions if each["stage"] not in (Stage.RETIRED, Stage.REJECTED)]
    if not usable:
        raise NotFound(f"model `{ref.model}` has no version that is neither retired nor rejected")
    return str(usable[0]["version"])


def _gate(told: dict[str, Any]) -> GateResult:
    details = dict(told["details"])
    return GateResult(
        gate=told["gate"], outcome=Outcome(told["outcome"]), message=details.pop("message", ""), seconds=told["seconds"], details=details
    )
