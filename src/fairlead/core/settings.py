"""`fairlead.yaml`: everything about a server that is not about one model."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError
from fairlead.core.logs import Logs
from fairlead.core.policy import (
    ArtifactSettings,
    AuthSettings,
    BatchSettings,
    GatewaySettings,
    JobSettings,
    ResponseSettings,
    StoreSettings,
    TlsSettings,
    WebhookSettings,
)
from fairlead.core.recent import RequestSettings
from fairlead.core.rollout import ControlSettings
from fairlead.core.slo import AlertSettings, IncidentSettings, Objective
from fairlead.core.specs import Count, Positive, Seconds
from fairlead.core.tracing import TraceSettings
from fairlead.core.ui import UiSettings

Port = Annotated[int, Meta(ge=0, le=65535)]


class Listen(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Port = 8000
    """HTTP: the data plane. 0 picks a free port, as for the others."""
    grpc_port: Port = 8001
    ops_host: str = "127.0.0.1"
    ops_port: Port = 8002
    """Metrics and health."""
    open: bool = False
    """Ask nobody for keys, not even beyond loopback."""


class Models(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    repositories: tuple[str, ...] = ()
    """Folders, single artefacts or fsspec URLs."""
    control: Literal["none", "poll", "explicit"] = "none"
    poll_seconds: Annotated[float, Meta(gt=0)] = 15.0
    load: tuple[str, ...] = ()
    """Loaded at the start where `control` is explicit; `*` for all."""
    strict_readiness: bool = False
    """Ready only while every model that should be loaded is, and answers."""
    load_concurrency: Positive = 4
    kv_cache_bytes: dict[Annotated[str, Meta(pattern="^(cpu|cuda(:[0-9]+)?)$")], Positive] = field(default_factory=dict)
    """KV memory of all language models together, by device: `cpu`, `cuda` (each CUDA device) or `cuda:N`. A CPU that is not named
    has half of the memory that is free when the first of them is loaded; of a CUDA device each takes what it needs of what is free."""


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_request_bytes: Positive = 64 << 20
    """One request, before and after decompression."""
    drain_timeout: Seconds = 30.0
    """Seconds that in-flight requests get after SIGTERM, or when their version is replaced."""


class MetricsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    triton_names: bool = False
    """Also under Triton's nv_inference_* names."""
    vllm_names: bool = False
    """Those of language models also under vLLM's vllm:* names."""
    max_tenants: Count = 200
    """Named in metrics, which ask for no key; those that come later are counted together, as `other`."""
    gil: bool = True
    """Measure, ten times a second, how late a thread gets the interpreter."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: Listen = Listen()
    models: Models = Models()
    limits: Limits = Limits()
    logs: Logs = Logs()
    metrics: MetricsSettings = MetricsSettings()
    traces: TraceSettings = TraceSettings()
    requests: RequestSettings = RequestSettings()
    auth: AuthSettings = AuthSettings()
    tls: TlsSettings = TlsSettings()
    store: StoreSettings = StoreSettings()
    gateway: GatewaySettings = GatewaySettings()
    jobs: JobSettings = JobSettings()
    responses: ResponseSettings = ResponseSettings()
    batches: BatchSettings = BatchSettings()
    artifacts: ArtifactSettings = ArtifactSettings()
    webhooks: WebhookSettings = WebhookSettings()
    control: ControlSettings = ControlSettings()
    slos: Annotated[tuple[Objective, ...], Meta(max_length=100)] = ()
    alerts: AlertSettings = AlertSettings()
    incidents: IncidentSettings = IncidentSettings()
    ui: UiSettings = UiSettings()

    def __post_init__(self) -> None:
        names = [each.name for each in self.slos]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"`slos` has two objectives of the name `{twice[0]}`")


def read_settings(path: Path) -> Settings:
    """Parse a `fairlead.yaml`; `${NAME}` stands for an environment variable. Raises ConfigError, naming the line."""
    return parse_settings(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def parse_settings(text: str, source: str) -> Settings:
    """The same of a text; `source` names it in errors."""
    return read_yaml(_fill_in(text, source), Settings, source)


def _fill_in(text: str, source: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            line = text.count("\n", 0, match.start()) + 1
            raise ConfigError(f"{source}:{line}: environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return _VARIABLE.sub(value, text)


_VARIABLE = re.compile(r"\$\{(\w+)\}")


def filled_in(text: str, source: str) -> str:
    """One value with its `${NAME}` filled in. Raises ConfigError."""
    return _fill_in(text, source).strip() if "${" in text else text


def variables(text: str) -> list[str]:
    """The environment variables that a text names."""
    return _VARIABLE.findall(text)


LOOPBACK = ("127.0.0.1", "::1", "localhost")


def asks_for_keys(settings: Settings) -> bool:
    """Whether callers must say who they are: unless told otherwise, where other machines can reach the server.

    Raises ConfigError where it would answer strangers without having been told to.
    """
    listen, required = settings.listen, settings.auth.required
    beyond = [(name, host) for name, host in (("host", listen.host), ("ops_host", listen.ops_host)) if host not in LOOPBACK]
    if listen.open and required:
        raise ConfigError("`listen.open` and `auth.required` contradict each other: leave one out")
    if beyond and required is False and not listen.open:
        name, host = beyond[0]
        raise ConfigError(
            f"{name} {host} is reachable from other machines and `auth.required` is false: pass --open (or `listen: {{open: true}}`) if that is what you want"
        )
    return bool(beyond) and not listen.open if required is None else required
