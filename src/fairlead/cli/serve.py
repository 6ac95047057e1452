"""`fairlead serve PATH`."""

import asyncio
from pathlib import Path
from typing import Any

import click
from msgspec import structs

from fairlead.core.errors import ConfigError
from fairlead.core.settings import Settings, parse_settings, read_text

HELP = """Serve a model repository, or one model.

PATH is a folder of models (`NAME/VERSION/artefact`), one model's folder, or a bare artefact: .onnx, .ubj or .json
(XGBoost), .txt (LightGBM), .cbm, .skops, .pt, .pt2, model.py, a folder of a Hugging Face checkpoint. Several may be given; an fsspec URL such as
s3://bucket/models works too. What is deployed from the registry is served beside them, and alone where no PATH is given. Flags win over
fairlead.yaml.
"""

# flag → where it goes in Settings
FLAGS = {
    "host": "listen",
    "port": "listen",
    "grpc_port": "listen",
    "ops_host": "listen",
    "ops_port": "listen",
    "open": "listen",
    "control": "models",
    "poll_seconds": "models",
    "load": "models",
    "strict_readiness": "models",
    "max_request_bytes": "limits",
    "drain_timeout": "limits",
    "log_level": "logs.level",
    "log_format": "logs.format",
    "log_requests": "logs.requests",
    "triton_metrics": "metrics.triton_names",
    "vllm_metrics": "metrics.vllm_names",
}


@click.command(help=HELP)
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--config", type=click.Path(path_type=Path), help="A fairlead.yaml.")
@click.option("--host", help="Address of the HTTP and gRPC ports.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="HTTP.  [default: 8000; 0: any free one]")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="gRPC.  [default: 8001]")
@click.option("--ops-host", help="Address of the operations port.  [default: 127.0.0.1]")
@click.option("--ops-port", type=click.IntRange(0, 65535), help="Metrics and health.  [default: 8002]")
@click.option("--open", is_flag=True, default=None, help="Ask nobody for keys, not even beyond loopback.")
@click.option("--control", type=click.Choice(["none", "poll", "explicit"]), help="Who decides what is loaded.  [default: none]")
@click.option("--poll-seconds", type=click.FloatRange(0, min_open=True), help="Time between looks, with --control poll.  [default: 15]")
@click.option("--load", multiple=True, help="Model to load at the start, with --control explicit; '*' for all.")
@click.option("--strict-readiness", is_flag=True, default=None, help="Ready only while every model that should be loaded is.")
@click.option("--max-request-bytes", type=click.IntRange(1), help="Largest request, before and after decompression.  [default: 64 MiB]")
@click.option("--drain-timeout", type=click.FloatRange(0), help="Seconds that requests in flight get on shutdown.  [default: 30]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--log-format", type=click.Choice(["auto", "json", "console"]))
@click.option("--log-requests/--no-log-requests", default=None, help="One line per finished request.  [default: on]")
@click.option("--triton-metrics", is_flag=True, default=None, help="Metrics under Triton's nv_inference_* names too.")
@click.option("--vllm-metrics", is_flag=True, default=None, help="Metrics of language models under vLLM's vllm:* names too.")
def serve(paths: tuple[str, ...], config: Path | None, **flags: Any) -> None:
    text = read_text(config) if config else ""
    settings = with_flags(parse_settings(text, str(config)), paths, flags)
    elsewhere = any(policy.upstreams for policy in settings.gateway.models.values())
    if not settings.models.repositories and not elsewhere and not _has_registry(settings):
        raise ConfigError(
            "nothing to serve: name a model repository or a model, e.g. `fairlead serve ./models` (`fairlead demo` builds one),"
            " or add a version to the registry: `fairlead models add PATH --name NAME`"
        )
    from fairlead.observe.log_levels import check_levels
    from fairlead.observe.logs import configure_logs

    check_levels(settings.logs.levels)
    configure_logs(settings.logs.level, settings.logs.format, levels=settings.logs.levels, texts=settings.logs.texts)
    from fairlead.app import serve as run

    try:
        import uvloop
    except ImportError:  # Windows
        asyncio.run(run(settings, config, text))
    else:
        uvloop.run(run(settings, config, text))


def _has_registry(settings: Settings) -> bool:
    """Whether there is a registry with a model in it. Raises ConfigError for a store that cannot be opened."""
    from fairlead.store.database import default_folder, default_url
    from fairlead.store.store import Store

    if not settings.control.enabled or not (settings.store.url or (default_folder() / "fairlead.db").exists()):
        return False
    store = Store.open(settings.store.url or default_url())
    try:
        return bool(store.registry.models())
    finally:
        store.close()


def with_flags(settings: Settings, paths: tuple[str, ...], flags: dict[str, Any]) -> Settings:
    """The settings with the flags that were given laid over them."""
    changes: dict[str, dict[str, Any]] = {}
    if paths:
        changes["models"] = {"repositories": paths}
    for flag, value in flags.items():
        if value is not None and value != ():
            section, _, name = FLAGS[flag].partition(".")
            changes.setdefault(section, {})[name or flag] = value
    sections = {name: structs.replace(getattr(settings, name), **values) for name, values in changes.items()}
    return structs.replace(settings, **sections)
