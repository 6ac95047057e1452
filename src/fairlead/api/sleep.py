"""Putting models to sleep and waking them, under `/admin/models`."""

import time
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import NoQuery, decoded, query_of
from fairlead.api.admin_route import actor_of, body_of, operation
from fairlead.api.doorkeeper import caller_of
from fairlead.api.web import json_response
from fairlead.core.errors import LoadError, Unavailable
from fairlead.runtime.engine_version import EngineVersion
from fairlead.runtime.repository import ModelRepository
from fairlead.store.rows import AuditRow

VersionName = Annotated[str, Meta(max_length=20)]


class SleepOrder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: VersionName = ""
    """"": all that are loaded."""
    timeout: Annotated[float, Meta(ge=0, le=3600)] = 30.0
    """Seconds in which what runs may end."""
    level: Literal[1, 2] | None = None
    """1: KV memory is given back, and weights of a GPU move to the host; 2: the process ends. None: as `sleep.level` of the model says."""


class WakeOrder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: VersionName = ""
    """"": all that are loaded."""


class Sleeping(Struct, frozen=True, kw_only=True):
    version: str
    state: str
    level: int
    """At which it sleeps; 0: it does not."""
    wakes: int
    """Since it was loaded."""


class SleepState(Struct, frozen=True, kw_only=True):
    model: str
    versions: list[Sleeping]


class SleepOperations:
    def __init__(self, repository: ModelRepository, record: Callable[[AuditRow], None]) -> None:
        """`record`: keeps who did it, where something is kept."""
        self.repository = repository
        self.record = record
        model = "/admin/models/{model}"
        self.operations = (
            operation("POST", f"{model}/sleep", "adminSleepModel", "Give back the memory of a model with an engine", self.sleep, SleepState, SleepOrder, 404, 501),
            operation("POST", f"{model}/wake", "adminWakeModel", "Have it compute again", self.wake, SleepState, WakeOrder, 404, 501),
        )  # fmt: skip

    async def sleep(self, http: Request) -> Response:
        query_of(http, NoQuery)
        order = decoded(await body_of(http) or b"{}", SleepOrder)
        versions = await self.repository.sleep(http.path_params["model"], order.version, order.timeout, order.level or 0)
        return self._done(http, "model.sleep", versions)

    async def wake(self, http: Request) -> Response:
        query_of(http, NoQuery)
        order = decoded(await body_of(http) or b"{}", WakeOrder)
        name = http.path_params["model"]
        try:
            return self._done(http, "model.wake", await self.repository.wake(name, order.version))
        except LoadError as error:
            raise Unavailable(f"model '{name}' cannot be woken: {error.message}") from None

    def _done(self, http: Request, action: str, versions: Iterable[EngineVersion]) -> Response:
        name = http.path_params["model"]
        shown = [
            Sleeping(version=each.version, state=each.sleep.state, level=each.sleep.level, wakes=each.sleep.wakes) for each in versions
        ]
        address = caller_of(http)[0].address or (http.client.host if http.client else "")
        details = {"versions": [each.version for each in shown], "levels": [each.level for each in shown]}
        self.record(AuditRow(time=time.time(), actor=actor_of(http), action=action, subject=name, details=details, address=address))
        return json_response(SleepState(model=name, versions=shown))
