"""Where spans go, and what is said of this server with them: the settings, and where those say nothing, the environment.

https://opentelemetry.io/docs/specs/otel/protocol/exporter/
"""

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit
from uuid import uuid4

from msgspec import Struct

from fairlead.core.errors import ConfigError
from fairlead.core.tracing import TraceSettings

PATH = "/v1/traces"
TIMEOUT = 10.0
HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Target(Struct, frozen=True, kw_only=True):
    """A collector."""

    url: str
    grpc: bool = False
    headers: dict[str, str] = {}
    timeout: float = TIMEOUT
    """Seconds for one export, all its tries together."""
    gzip: bool = False
    ca: str = ""
    """PEM files."""
    certificate: str = ""
    private_key: str = ""


def target_of(settings: TraceSettings, environment: Mapping[str, str] = os.environ) -> Target | None:
    """None where neither names a collector. Raises ConfigError."""

    def said(name: str) -> str:
        return environment.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or environment.get(f"OTEL_EXPORTER_OTLP_{name}") or ""

    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none"
    url = settings.endpoint or ("" if off else said("ENDPOINT"))
    if not url:
        return None
    protocol = settings.protocol or said("PROTOCOL") or "http/protobuf"
    if protocol not in ("http/protobuf", "grpc"):
        raise ConfigError(f"traces go out by http/protobuf or grpc; OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}")
    whole = not settings.endpoint and bool(environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
    timeout = said("TIMEOUT")
    if timeout and not timeout.isdecimal():
        raise ConfigError(f"OTEL_EXPORTER_OTLP_TIMEOUT must be a number of milliseconds, not {timeout!r}")
    target = Target(
        url=_address(url) if protocol == "grpc" or whole else with_path(url),
        grpc=protocol == "grpc",
        headers=settings.headers or pairs(said("HEADERS")),
        timeout=settings.timeout or int(timeout or 0) / 1000 or TIMEOUT,
        gzip=said("COMPRESSION") == "gzip",
        ca=settings.ca or said("CERTIFICATE"),
        certificate=said("CLIENT_CERTIFICATE"),
        private_key=said("CLIENT_KEY"),
    )
    for name, value in target.headers.items():
        if not (HEADER.fullmatch(name) and value.isascii() and value.isprintable()):
            raise ConfigError(f"`traces.headers`: {name!r} is no header, or its value has characters that headers may not have")
    for path in (target.ca, target.certificate, target.private_key):
        if path and not Path(path).is_file():
            raise ConfigError(f"`traces`: there is no file {path}")
    return target


def resource_of(settings: TraceSettings, version: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`version`: this server's."""
    named = pairs(environment.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    service = settings.service or environment.get("OTEL_SERVICE_NAME") or named.get("service.name") or "fairlead"
    ours = {"service.version": version, "service.instance.id": str(uuid4()), "host.name": socket.gethostname()}
    return {**ours, **named, **settings.attributes, "service.name": service}


def with_path(url: str) -> str:
    """Of a collector's address, where it takes traces. Raises ConfigError."""
    parts = urlsplit(_address(url))
    path = parts.path.rstrip("/")
    return urlunsplit(parts._replace(path=path if path.endswith(PATH) else path + PATH))


def _address(url: str) -> str:
    """Raises ConfigError."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if valid and "@" in parts.netloc:
        raise ConfigError("a collector's endpoint holds no user and password: `traces.headers` says who asks")
    if not valid:
        raise ConfigError(f"a collector's endpoint must be a URL such as http://localhost:4318, not {url!r}")
    return url


def pairs(text: str) -> dict[str, str]:
    """`a=1,b=two%20words`."""
    parted = (each.partition("=") for each in text.split(",") if "=" in each)
    return {name.strip(): unquote(value.strip()) for name, _, value in parted}
