"""Data ports that keep responses, and take batches, over engines in processes of their own."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx2
import openai
from msgspec import Struct
from starlette.requests import Request as HttpRequest

from fairlead.api.data import data_app, data_operations
from fairlead.api.doorkeeper import CALLER
from fairlead.api.http_server import HttpServer
from fairlead.api.openai.batch_objects import ENDPOINTS
from fairlead.api.openai.batch_runner import BatchRunner
from fairlead.api.openai.batches import Batches, Count
from fairlead.api.openai.responses import Responses
from fairlead.api.openai.responses_kept import Kept
from fairlead.backends import fake_engine
from fairlead.backends.table import BACKENDS
from fairlead.core.caller import Caller
from fairlead.core.policy import BatchSettings, ResponseSettings, Scope
from fairlead.observe.counts import Counts
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import Control, ModelRepository, RepositorySettings
from fairlead.store.batches import BatchRow
from fairlead.store.store import Store
from tests.api.served import Lines

SECONDS = 60.0
Callers = Callable[[BatchRow], Caller]


class NameTags:
    """A doorkeeper who believes what callers say: their key is their tenant's name, and `x-signed-by` who signed."""

    async def admit(self, http: HttpRequest, scope: Scope | None) -> None:
        tenant = http.headers.get("authorization", "").removeprefix("Bearer ")
        http.scope[CALLER] = (Caller(tenant=tenant or "default"), http.headers.get("x-signed-by", ""))


def uncounted(caller: Caller) -> AbstractAsyncContextManager[Mapping[str, str]]:
    return nullcontext({})


class Keeping(Struct):
    """Servers that share a store, and models."""

    store: Store
    repository: ModelRepository
    lines: Lines
    servers: list[HttpServer]
    kepts: list[Kept]

    async def add(self, settings: ResponseSettings | None = None, *, keep: bool = True) -> str:
        """One more of them: its URL."""
        settings = settings or ResponseSettings()
        kept = Kept(self.store.responses, settings) if keep else None
        app = data_app(self.repository, doorkeeper=NameTags(), finished=self.lines, kept=kept, responses=settings)  # type: ignore[arg-type]
        server = HttpServer(None, app, self.lines)
        await server.listen(port=0)
        self.servers.append(server)
        if kept is not None:
            self.kepts.append(kept)
        return f"http://127.0.0.1:{server.port}/v1"

    async def add_batches(self, settings: BatchSettings, callers: Callers, count: Count = uncounted) -> tuple[str, BatchRunner]:
        """One that takes batches; nobody runs its runner but the test. `sealed` is a model that takes signed requests alone."""
        responses = Responses(self.repository, self.repository, self.lines, 1 << 20, None)
        doors = (*data_operations(self.repository, self.repository, self.lines, None, 1 << 20), *responses.operations)
        asked = {each.path: each.serve for each in doors if each.method == "POST" and each.path in ENDPOINTS}
        runner = BatchRunner(self.store.batches, settings, asked, callers, lambda: ("standard", "batch"), "sealed".__eq__, Counts())
        door = Batches(self.store.batches, settings, self.lines, 4 << 20, runner.look, count)
        app = data_app(self.repository, doorkeeper=NameTags(), finished=self.lines, more=door.operations)  # type: ignore[arg-type]
        server = HttpServer(None, app, self.lines)
        await server.listen(port=0)
        self.servers.append(server)
        return f"http://127.0.0.1:{server.port}/v1", runner


@asynccontextmanager
async def keeping(folder: Path, url: str, **specs: str) -> AsyncIterator[Keeping]:
    """`specs`: lines of model.yaml by name."""
    BACKENDS[fake_engine.KIND.name] = fake_engine.KIND
    store = Store.open(url)
    for name, spec in specs.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "nothing").touch()
        (folder / name / "model.yaml").write_text(f"backend: fake_engine\n{spec}\n")
    metrics = Metrics()
    settings = RepositorySettings(
        sources=(str(folder),), control=Control.EXPLICIT, load=("*",), cache_folder=folder / ".cache", drain_timeout=5.0
    )
    repository, lines = ModelRepository(settings, metrics), Lines(metrics)
    running = Keeping(store, repository, lines, [], [])
    try:
        await repository.start()
        yield running
    finally:
        for kept in running.kepts:
            await kept.stop(0.0)
        for server in running.servers:
            await server.drain(5.0)
        await repository.stop()
        store.close()
        del BACKENDS[fake_engine.KIND.name]


@asynccontextmanager
async def client_of(url: str, tenant: str = "acme") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url, api_key=tenant, max_retries=0, timeout=SECONDS) as client:
        yield client


async def posted(url: str, body: Any, tenant: str = "acme") -> tuple[int, Any]:
    """As no client of OpenAI's would."""
    headers = {"authorization": f"Bearer {tenant}"}
    async with httpx2.AsyncClient(timeout=SECONDS) as client:
        answer = await client.post(
            f"{url}/responses", headers=headers, **({"content": body} if isinstance(body, bytes) else {"json": body})
        )
        return answer.status_code, answer.json()
