"""What looks into a server that runs: its log, and what its processes do."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fairlead.api.observe.logs import LogOperations
from fairlead.api.observe.profile import ProfileOperations
from fairlead.api.openapi import Operation
from fairlead.core.settings import Settings
from fairlead.gateway.bodies import Bodies
from fairlead.gateway.gateway import Gateway
from fairlead.observe.finished import Finished
from fairlead.observe.logs import journal
from fairlead.runtime.profiler import Profiler
from fairlead.runtime.repository import ModelRepository

Begin = Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None]


class Inspection:
    """Of one server."""

    def __init__(self, settings: Settings, *, repository: ModelRepository, gateway: Gateway, finished: Finished) -> None:
        self.logs = LogOperations(journal, repository.set_log_levels)
        if settings.logs.bodies.share > 0:
            gateway.bodies = Bodies(settings.logs.bodies)
        self.bodies = gateway.bodies
        self.profiles = ProfileOperations(Profiler(repository, finished))

    @property
    def operations(self) -> Iterator[Operation]:
        """Of the ops port."""
        yield from self.logs.operations
        yield from self.profiles.operations

    def start(self, begin: Begin) -> None:
        """What goes on for ever."""
        if self.bodies is not None:
            begin("bodies", self.bodies.follow)

    async def stop(self) -> None:
        self.logs.stop()
        if self.bodies is not None:
            await asyncio.to_thread(self.bodies.flush)
