"""Replicas, devices and the server's own process, as they are now."""

from collections.abc import Callable, Iterable
from typing import TypedDict

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import NoQuery, query_of
from fairlead.api.admin_route import operation
from fairlead.api.web import json_response
from fairlead.observe.hardware import Device
from fairlead.observe.processes import Key, Usage
from fairlead.runtime.replicas import Replica


class ShownReplica(Replica, frozen=True, kw_only=True):
    rss_bytes: int
    """0 for one inside the server's own process."""
    cpu_percent: float
    """Of one core."""
    cpu_seconds: float
    """Of all its lives."""


class ServerProcess(Struct, frozen=True, kw_only=True):
    """This server's own."""

    pid: int
    rss_bytes: int
    cpu_percent: float
    cpu_seconds: float
    loop_lag_seconds: float
    """The greatest of the last half to whole minute."""
    uptime_seconds: float


class ShownReplicas(TypedDict):
    replicas: list[ShownReplica]
    devices: list[Device]
    process: ServerProcess


NOTHING = Usage()


class ReplicaOperations:
    def __init__(
        self,
        replicas: Callable[[], Iterable[Replica]],
        usages: Callable[[Key], Usage | None],
        devices: Callable[[], Iterable[Device]],
        process: Callable[[], ServerProcess],
    ) -> None:
        self._replicas = replicas
        self._usages = usages
        self._devices = devices
        self._process = process
        self.operations = (
            operation("GET", "/admin/replicas", "adminReplicas", "Replicas, devices and the server's process now", self.show, ShownReplicas),
        )  # fmt: skip

    async def show(self, http: Request) -> Response:
        query_of(http, NoQuery)
        shown: ShownReplicas = {
            "replicas": [self._shown(replica) for replica in self._replicas()],
            "devices": list(self._devices()),
            "process": self._process(),
        }
        return json_response(shown)

    def _shown(self, replica: Replica) -> ShownReplica:
        usage = self._usages((replica.model, replica.version, str(replica.instance))) or NOTHING
        fields = {name: getattr(replica, name) for name in Replica.__struct_fields__}
        return ShownReplica(**fields, rss_bytes=usage.rss_bytes, cpu_percent=round(usage.cpu_percent, 1), cpu_seconds=usage.total_seconds)
