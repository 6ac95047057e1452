"""Data ports for the tests of the OpenAI door: over engines in processes of their own, and over one that the test plays."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from fairlead.api.data import data_app
from fairlead.api.http_server import HttpServer
from fairlead.backends import fake_engine
from fairlead.backends.table import BACKENDS
from fairlead.core.errors import FairleadError, NotFound
from fairlead.core.generation import Delta, EngineInfo, Usage
from fairlead.core.request import Request, Response
from fairlead.observe.metrics import Metrics
from tests.api.served import Lines, Served, served

SECONDS = 20.0
INFO = EngineInfo(tasks=("generate", "embed", "tokenize"), max_model_len=4096, vocab_size=1000)


@asynccontextmanager
async def engines(folder: Path, *names: str, **specs: str) -> AsyncIterator[Served]:
    """Models with the fake engine (`specs`: lines of model.yaml by name) beside tensor models."""
    BACKENDS[fake_engine.KIND.name] = fake_engine.KIND
    try:
        for name, spec in specs.items():
            (folder / name / "1").mkdir(parents=True)
            (folder / name / "1" / "nothing").touch()
            (folder / name / "model.yaml").write_text(f"backend: fake_engine\n{spec}\n")
        async with served(folder, *names) as running:
            yield running
    finally:
        del BACKENDS[fake_engine.KIND.name]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


class Asked:
    """A request that has reached the engine; the test answers it."""

    def __init__(self, request: Request) -> None:
        assert request.prompt is not None
        self.request = request
        self.prompt: Any = request.prompt
        self.closed = asyncio.Event()
        self._pieces: asyncio.Queue[Delta | FairleadError | Exception | None] = asyncio.Queue()

    def say(self, *texts: str, **fields: Any) -> None:
        for text in texts:
            self._pieces.put_nowait(Delta(text=text, **fields))

    def tell(self, *deltas: Delta) -> None:
        for delta in deltas:
            self._pieces.put_nowait(delta)

    def end(self, text: str = "", *, prompt: int = 1, completion: int = 1, cached: int = 0, **fields: Any) -> None:
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)
        self._pieces.put_nowait(Delta(text=text, usage=usage, **{"finish_reason": "stop", **fields}))
        self._pieces.put_nowait(None)

    def fail(self, error: Exception) -> None:
        self._pieces.put_nowait(error)

    @property
    def num_waiting(self) -> int:
        """Pieces that nobody has taken yet."""
        return self._pieces.qsize()

    async def next(self) -> Delta | None:
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece


class Played:
    """The in-memory twin of a model repository with one language model, `m`, and one tensor model, `t`."""

    ready = True
    stopping = False

    def __init__(self) -> None:
        self.asked: asyncio.Queue[Asked] = asyncio.Queue()
        self.trouble: FairleadError | None = None
        """Why no version is there."""

    def known(self, name: str) -> bool:
        return name in ("m", "t")

    def versions(self, name: str) -> list[str]:
        return ["1", "2"] if self.known(name) else []

    def find(self, name: str, version: str = "") -> Any:
        if self.trouble is not None:
            raise self.trouble
        if version not in ("", "1", "2"):
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        return type("Version", (), {"version": version or "2"})

    def engine_info(self, name: str, version: str = "") -> EngineInfo | None:
        self.find(name, version)
        return INFO if name == "m" else None

    def adapters(self, name: str, version: str = "") -> tuple[str, ...]:
        return ()

    def index(self, *, ready: bool = False) -> list[Any]:
        return [type("Entry", (), {"name": name}) for name in ("t", "m", "m")]

    async def infer(self, request: Request) -> AsyncIterator[Response]:
        asked = Asked(request)
        self.asked.put_nowait(asked)
        try:
            while (delta := await asked.next()) is not None:
                yield Response(model=request.model, version=request.version or "2", delta=delta, id=request.id)
        finally:
            asked.closed.set()

    async def next(self) -> Asked:
        async with asyncio.timeout(SECONDS):
            return await self.asked.get()


class Door:
    def __init__(self, repository: Played, client: httpx2.AsyncClient, lines: Lines, port: int) -> None:
        self.repository = repository
        self.client = client
        self.lines = lines
        self.port = port

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(f"/v1{path}", content=content, headers={"content-type": "application/json", **headers})

    def chat(self, **more: Any) -> "asyncio.Task[httpx2.Response]":
        """Under way: the test plays the engine."""
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}
        return asyncio.create_task(self.post("/chat/completions", body))


@asynccontextmanager
async def door(*, max_body_bytes: int = 1 << 20) -> AsyncIterator[Door]:
    metrics = Metrics()
    repository, lines = Played(), Lines(metrics)
    app = data_app(repository, finished=lines, max_body_bytes=max_body_bytes)  # type: ignore[arg-type]
    server = HttpServer(None, app, lines)
    await server.listen(port=0)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=SECONDS) as client:
            yield Door(repository, client, lines, server.port)
    finally:
        await server.drain(5.0)
