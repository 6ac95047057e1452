"""Whether requests are traced, which of them, and where their spans go."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from fairlead.core.policy import Share
from fairlead.core.specs import Positive, Seconds


class TraceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By OpenTelemetry's protocol, OTLP. What is "" or None here, the standard OTEL_* environment variables may say."""

    endpoint: str = ""
    """The collector's, such as http://localhost:4318; "": nothing is traced."""
    protocol: Literal["http/protobuf", "grpc"] | None = None
    headers: dict[str, str] = {}
    """Sent with every export, such as a key."""
    ca: str = ""
    """PEM file of the authorities that the collector's certificate is held against; "": the system's."""
    timeout: Annotated[float, Meta(gt=0)] | None = None
    """Seconds for one export, all its tries together."""
    interval: Annotated[float, Meta(gt=0, le=60)] = 1.0
    """Seconds between two exports."""
    max_queue: Positive = 2048
    """Requests whose spans wait for export; more are dropped, and counted."""
    sample: Share = 1.0
    """Of the requests that came without a decision of their caller's, those kept by chance."""
    slow: Seconds = 0.0
    """A request that took so long is kept whatever chance says; 0: none is."""
    slowest: Annotated[float, Meta(ge=0.0, le=0.1)] = 0.01
    """The share of a model's requests that are kept because they were its slowest; 0: none."""
    max_per_second: Annotated[float, Meta(ge=0)] = 100.0
    """Requests kept, whatever for, over a few seconds; 0: any number. Half of it is for failed and slow ones only."""
    service: str = ""
    """What the traces call this server; "": OTEL_SERVICE_NAME, else fairlead."""
    attributes: dict[str, str] = {}
    """Said of this server with every span, beside those of OTEL_RESOURCE_ATTRIBUTES."""
