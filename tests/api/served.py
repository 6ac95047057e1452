"""A data port over a repository of small Python models, for the tests of everything HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from msgspec import Struct

from fairlead.api.data import data_app
from fairlead.api.http_server import HttpServer
from fairlead.core.timeline import Timeline
from fairlead.observe.access import AccessLog
from fairlead.observe.finished import Finished
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import Control, ModelRepository, RepositorySettings

FOREVER = 9999
IN_A_THREAD = "instances: {isolation: thread}\n"
MODELS = {
    "identity": (
        """
import numpy as np

class Identity:
    example = {"x": np.zeros((2, 4), np.float32)}

    def infer(self, inputs):
        return {"y": inputs["x"]}
""",
        IN_A_THREAD + "outputs:\n  - {name: y, datatype: FP32, shape: [-1, 4], labels: [ant, bee, cat, dog]}\n",
    ),
    "shout": (
        """
import numpy as np

class Shout:
    example = {"text": np.array([["hello"]], object)}

    def infer(self, inputs):
        return {"loud": np.array([[s.decode().upper() for s in row] for row in inputs["text"]], object)}
""",
        IN_A_THREAD,
    ),
    "failing": (
        """
import numpy as np

class Failing:
    example = {"x": np.zeros((1, 1), np.float32)}

    def infer(self, inputs):
        if inputs["x"].any():
            raise ValueError("zeros only")
        return {"y": inputs["x"]}
""",
        IN_A_THREAD,
    ),
    # Counts to n, then fails where n is negative; FOREVER is without end.
    "count": (
        """
import itertools
import numpy as np

class Count:
    example = {"n": np.array([2], np.int32)}

    def infer(self, inputs):
        n = int(inputs["n"][0])
        for i in itertools.count() if n == 9999 else range(abs(n)):
            yield {"i": np.array([i], np.int32)}
        if n < 0:
            raise ValueError("no further")
""",
        "",
    ),
    "spare": (
        """
import numpy as np

class Spare:
    example = {"x": np.zeros((1, 1), np.float32)}

    def infer(self, inputs):
        return {"y": inputs["x"] + 1}
""",
        IN_A_THREAD,
    ),
    "broken": ("raise RuntimeError('not today')\n", IN_A_THREAD),
}


class Lines(Finished):
    """Finished requests that can be waited for."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(AccessLog(None, metrics.responses))
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def add(self, timeline: Timeline) -> None:
        super().add(timeline)
        self.flush()
        names = ("protocol", "request_id", "model", "version", "status", "seconds", "rows", "error", "outcome", "reason", "path")
        self.queue.put_nowait({name: getattr(timeline, name) for name in names} | {"trace": timeline.traceparent, "timeline": timeline})

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            return await self.queue.get()


class Served(Struct):
    repository: ModelRepository
    server: HttpServer
    client: httpx2.AsyncClient
    lines: Lines
    folder: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@asynccontextmanager
async def served(folder: Path, *names: str, control: Control = Control.EXPLICIT, max_body_bytes: int = 4 << 20) -> AsyncIterator[Served]:
    """The models of MODELS by these names, or all, behind a real port."""
    for name in names or MODELS:
        code, spec = MODELS[name]
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(code)
        (folder / name / "model.yaml").write_text(spec)
    settings = RepositorySettings(
        sources=(str(folder),),
        control=control,
        load=("*",) if control is Control.EXPLICIT else (),
        cache_folder=folder / ".cache",
        drain_timeout=5.0,
    )
    metrics = Metrics()
    repository, lines = ModelRepository(settings, metrics), Lines(metrics)
    server = HttpServer(repository, data_app(repository, finished=lines, max_body_bytes=max_body_bytes), lines)
    await server.listen(port=0)
    try:
        await repository.start()
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:
            yield Served(repository, server, client, lines, folder)
    finally:
        await server.drain(5.0)
        await repository.stop()
