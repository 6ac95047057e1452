"""The part of the composition root that batches are: their doors, and who answers them."""

from collections.abc import Callable, Collection, Iterable

from fairlead.api.openai.batch_objects import ENDPOINTS
from fairlead.api.openai.batch_runner import BatchRunner
from fairlead.api.openai.batches import Batches, Count
from fairlead.api.openapi import Operation
from fairlead.core.caller import Caller
from fairlead.core.policy import BatchSettings
from fairlead.gateway.identity.identity import Identity
from fairlead.observe.counts import Counts
from fairlead.observe.finished import Finished
from fairlead.store.batches import BatchRow, BatchStore

Begin = Callable[..., None]


class BatchWork:
    def __init__(
        self,
        settings: BatchSettings,
        *,
        store: BatchStore,
        identity: Identity,
        classes: Callable[[], Collection[str]],
        signed_only: Callable[[str], bool],
        count: Count,
        counts: Counts,
        finished: Finished,
        doors: Iterable[Operation],
        max_body_bytes: int,
    ) -> None:
        """`doors`: those that answer the lines among them."""
        self.settings = settings
        self.identity = identity
        asked = {each.path: each.serve for each in doors if each.method == "POST" and each.path in ENDPOINTS}
        self.runner = BatchRunner(store, settings, asked, self._caller, classes, signed_only, counts)
        self.operations = Batches(store, settings, finished, max_body_bytes, self.runner.look, count).operations

    def start(self, begin: Begin) -> None:
        if self.settings.run:
            begin("batches", self.runner.run)

    async def stop(self, seconds: float) -> None:
        await self.runner.stop(seconds)

    def _caller(self, row: BatchRow) -> Caller:
        return self.identity.stored(tenant=row.tenant, project=row.project, key=row.key, address=row.address)
