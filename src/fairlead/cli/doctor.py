"""`fairlead doctor`: what is installed, what this machine gives, and what is wrong with a configuration or a model repository."""

import ast
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Container, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import click
import msgspec
import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fairlead import __version__
from fairlead.backends import BACKENDS, Kind, detect
from fairlead.cli.connections import connections
from fairlead.cli.finding import Finding, Findings, State
from fairlead.core.cgroups import cgroup_cpus, cgroup_memory_bytes
from fairlead.core.errors import FairleadError
from fairlead.core.policy import GatewaySettings
from fairlead.core.settings import Listen, Settings, asks_for_keys, read_settings
from fairlead.gateway.routing.fallbacks import check_fallbacks, unknown_fallbacks
from fairlead.runtime.source import Listing, Source, choose_versions

GIB, MIB = 1 << 30, 1 << 20
FEW_FILES = 4096
SMALL_SHARED_MEMORY_BYTES = 256 * MIB


MARKS = {State.OK: "[green]✓[/]", State.NOTE: "[yellow]–[/]", State.PROBLEM: "[bold red]✗[/]"}


def software() -> Findings:
    yield Finding("software", "fairlead", State.OK, __version__)
    yield Finding("software", "python", State.OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    if _installed("uvloop"):
        yield Finding("software", "event loop", State.OK, f"uvloop {_version('uvloop')}")
    else:
        yield Finding("software", "event loop", State.NOTE, "asyncio's own; uvloop is faster, where it exists (not on Windows)")


def kinds() -> Findings:
    """Each kind of model: served, or what would have to be installed."""
    for kind in BACKENDS.values():
        missing = _missing(kind)
        if missing:
            yield Finding("kinds of model", kind.name, State.NOTE, f"needs {', '.join(missing)}", _install(kind))
        else:
            versions = ", ".join(f"{_distribution(module)} {_version(module)}" for module in kind.requires)
            yield Finding("kinds of model", kind.name, State.OK, versions or "nothing to install")


def kernels() -> Findings:
    """Whether language models compute with our C++ kernels; found by their file, since importing torch takes seconds."""
    if _missing(BACKENDS["llm"]):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fairlead" / "kernels"
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), "")
    if any(cache.glob("*/*.so")):
        yield Finding("language models", "kernels", State.OK, f"built, in {cache}")
    elif compiler:
        advice = "python -m fairlead.llm.kernels builds them ahead"
        yield Finding("language models", "kernels", State.NOTE, f"{compiler} will build them at the first load, in about a minute", advice)
    else:
        detail = "no C++ compiler: torch's own operators compute instead, several times slower"
        yield Finding("language models", "kernels", State.NOTE, detail, "install g++ or clang++")


def machine() -> Findings:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus()
    if quota is not None and quota < usable:
        detail = f"{usable} cores, but this container may use only {quota:g} of them"
        yield Finding("machine", "processor", State.NOTE, detail, "set instances.threads and OMP_NUM_THREADS to match")
    else:
        yield Finding("machine", "processor", State.OK, f"{usable} of {os.cpu_count()} cores")
    memory, limit = psutil.virtual_memory(), cgroup_memory_bytes()
    if limit is not None and limit < memory.total:
        yield Finding("machine", "memory", State.OK, f"this container may use {_gib(limit)} of the machine's {_gib(memory.total)}")
    else:
        yield Finding("machine", "memory", State.OK, f"{_gib(memory.available)} free of {_gib(memory.total)}")
    yield from _shared_memory()
    yield from _open_files()


def _shared_memory() -> Findings:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    usage = shutil.disk_usage(folder)
    detail = f"{_gib(usage.free)} free of {_gib(usage.total)} in {folder}"
    if usage.free < SMALL_SHARED_MEMORY_BYTES:
        advice = "large tensors to process instances need it; in a container: --shm-size=1g"
        yield Finding("machine", "shared memory", State.NOTE, detail, advice)
    else:
        yield Finding("machine", "shared memory", State.OK, detail)


def _open_files() -> Findings:
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FEW_FILES:
        most = "unlimited" if hard < 0 else hard
        yield Finding(
            "machine", "open files", State.NOTE, f"{soft} at once, one for each connection", f"ulimit -n {FEW_FILES} or more (up to {most})"
        )
    else:
        yield Finding("machine", "open files", State.OK, "unlimited" if soft < 0 else f"{soft} at once")


def accelerators() -> Findings:
    """NVIDIA's, asked through its own tool; and whether the installed libraries were built for it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        if Path("/dev/nvidiactl").exists():
            yield Finding(
                "accelerators",
                "nvidia",
                State.NOTE,
                "a device is there, but no nvidia-smi to ask about it",
                "install the driver's utilities",
            )
        else:
            yield Finding("accelerators", "none", State.OK, "models run on the processor")
        return
    query = [tool, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("accelerators", "nvidia", State.NOTE, "nvidia-smi does not answer", "look at the driver: dmesg")
        return
    if answer.returncode != 0:
        yield Finding("accelerators", "nvidia", State.NOTE, (answer.stdout or answer.stderr).strip().splitlines()[0], "look at the driver")
        return
    for index, line in enumerate(answer.stdout.strip().splitlines()):
        name, total, free, driver = (part.strip() for part in line.split(","))
        memory = f", {free} of {total} MiB free" if total.isdigit() else ""
        yield Finding("accelerators", f"cuda:{index}", State.OK, f"{name}{memory}, driver {driver}")
    if _installed("torch") and _torch_cuda() is None:
        advice = "install a CUDA build of torch to use `device: cuda`"
        yield Finding("accelerators", "torch", State.NOTE, f"torch {_version('torch')} was built without CUDA", advice)
    if _installed("onnxruntime") and "onnxruntime-gpu" not in _distributions().get("onnxruntime", []):
        yield Finding("accelerators", "onnxruntime", State.NOTE, "is the processor's build", "pip install onnxruntime-gpu in its place")


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read from its files: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"^cuda.*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def ports(listen: Listen, *, asked: bool) -> Findings:
    """asked: the ports were named in a configuration, so one that is taken is a problem."""
    for name, host, port in (
        ("http", listen.host, listen.port),
        ("grpc", listen.host, listen.grpc_port),
        ("operations", listen.ops_host, listen.ops_port),
    ):
        error = _cannot_listen(host, port)
        if error:
            flag = {"http": "--port", "grpc": "--grpc-port", "operations": "--ops-port"}[name]
            state = State.PROBLEM if asked else State.NOTE
            yield Finding("ports", name, state, f"{host}:{port}: {error}", f"choose another with {flag}, or end what listens there")
        else:
            yield Finding("ports", name, State.OK, f"{host}:{port} is free" if port else "any free one")


def _cannot_listen(host: str, port: int) -> str:
    """Why a server could not, or ""."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def configuration(path: Path) -> tuple[Settings | None, list[Finding]]:
    try:
        settings = read_settings(path)
        asks_for_keys(settings)
        check_fallbacks(settings.gateway)
    except FairleadError as error:
        return None, [Finding("configuration", path.name, State.PROBLEM, error.message)]
    return settings, [Finding("configuration", path.name, State.OK, str(path))]


def fallbacks(policies: GatewaySettings, served: Container[str]) -> Findings:
    for option, name in unknown_fallbacks(policies, served.__contains__):
        detail = f"`{name}` is passed over: no repository and no upstream has it"
        yield Finding("configuration", option, State.NOTE, detail, "name a model that is served, or leave it out")


def repository(url: str, cache_folder: Path, served: set[str]) -> Findings:
    """Every model of one source: its kind, found without loading it, or why there is none. Their names are added to `served`."""
    area = f"models in {url}"
    try:
        source = Source(url, cache_folder)
        listings = source.scan()
    except FairleadError as error:
        yield Finding(area, url, State.PROBLEM, error.message)
        return
    if not listings:
        yield Finding(area, url, State.PROBLEM, "there is no model", "a model lies in NAME/VERSION/artefact, e.g. fraud/1/model.onnx")
    served.update(listings)
    for name, listing in sorted(listings.items()):
        yield from _model(area, name, source, listing)


def _model(area: str, name: str, source: Source, listing: Listing) -> Findings:
    try:
        spec = source.spec(listing)
        versions = choose_versions(list(listing.versions()), spec.version_policy)
    except FairleadError as error:
        yield Finding(area, name, State.PROBLEM, error.message)
        return
    if not versions:
        what = "no version that its version_policy wants" if listing.versions() else "no version and no artefact"
        yield Finding(area, name, State.PROBLEM, f"{what} is there")
    for version in versions:
        place = f"{name}@{version}"
        try:
            kind, artefact = detect(source.fetch(listing, version), spec)
            _readable(kind, artefact)
        except FairleadError as error:
            yield Finding(area, place, State.PROBLEM, error.message)
        except SyntaxError as error:
            yield Finding(area, place, State.PROBLEM, f"{error.filename}:{error.lineno}: {error.msg}")
        except OSError as error:
            yield Finding(area, place, State.PROBLEM, f"cannot be read: {error.strerror or error}")
        else:
            missing = _missing(kind)
            if missing:
                yield Finding(area, place, State.PROBLEM, f"{kind.name}: needs {', '.join(missing)}", _install(kind))
            else:
                yield Finding(area, place, State.OK, f"{kind.name}: {artefact.name}, {_size(artefact)}")


def _readable(kind: Kind, artefact: Path) -> None:
    """Raises SyntaxError for a model.py that is not Python, OSError for a file that is empty or cannot be opened."""
    for file_of in sorted(artefact.glob("*.safetensors")) if artefact.is_dir() else [artefact]:
        _not_empty(file_of)
    if kind.name == "python":
        ast.parse(artefact.read_bytes(), filename=str(artefact))


def _not_empty(artefact: Path) -> None:
    with artefact.open("rb") as file:
        if not file.read(1):
            raise OSError(f"{artefact.name} is empty")


def _size(artefact: Path) -> str:
    size = sum(file.stat().st_size for file in artefact.iterdir() if file.is_file()) if artefact.is_dir() else artefact.stat().st_size
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size / 1024:.1f} KiB"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _missing(kind: Kind) -> list[str]:
    return [module for module in kind.requires if not _installed(module)]


def _install(kind: Kind) -> str:
    return f"pip install 'fairlead[{kind.extra}]'"


def _distribution(module: str) -> str:
    """The package that a module came with: xgboost may be xgboost-cpu."""
    return _distributions().get(module, [module])[0]


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Read from every installed package, which takes a second."""
    return metadata.packages_distributions()


def _version(module: str) -> str:
    try:
        return metadata.version(_distribution(module))
    except metadata.PackageNotFoundError:
        return "of unknown version"


def examine(urls: tuple[str, ...], config: Path | None) -> list[Finding]:
    findings = [*software(), *kinds(), *kernels(), *machine(), *accelerators()]
    settings: Settings | None = Settings()
    if config is not None:
        settings, found = configuration(config)
        findings += found
    if settings is not None:
        findings += ports(settings.listen, asked=config is not None)
        if config is not None:
            findings += connections(settings, config)
        urls = urls or settings.models.repositories
    served: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="fairlead-doctor-") as copies:
        for url in urls:
            findings += repository(url, Path(copies), served)
    if settings is not None and config is not None and urls == settings.models.repositories:
        findings += fallbacks(settings.gateway, served)
    return findings


def show(console: Console, findings: list[Finding]) -> None:
    for area in dict.fromkeys(finding.area for finding in findings):
        console.print(f"\n[bold]{escape(area)}[/]")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for finding in findings:
            if finding.area == area:
                advice = f"\n[dim]{escape(finding.advice)}[/]" if finding.advice else ""
                table.add_row(f"  {MARKS[finding.state]}", escape(finding.name), escape(finding.detail) + advice)
        console.print(table)
    num_problems = sum(finding.state is State.PROBLEM for finding in findings)
    console.print(f"\n[bold red]{num_problems} problem{'s' * (num_problems > 1)}[/]" if num_problems else "\n[green]Nothing is wrong.[/]")


@click.command()
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--config", type=click.Path(path_type=Path), help="A fairlead.yaml to check.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
def doctor(paths: tuple[str, ...], config: Path | None, as_json: bool) -> None:
    """What is installed, what this machine gives, and what is wrong with the models at PATH.

    With --config also whether the store, Redis and the issuers of tokens that it names answer. Nothing is loaded or changed. Exits with 1 where what was asked about has a problem.
    """
    findings = examine(paths, config)
    if as_json:
        click.echo(msgspec.json.encode(findings).decode())
    else:
        show(Console(), findings)
    if any(finding.state is State.PROBLEM for finding in findings):
        sys.exit(1)
