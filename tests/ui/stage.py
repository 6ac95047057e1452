"""A whole server in this process with one model of each kind, and a real browser that looks at it."""

import asyncio
import io
import json
import logging
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from fairlead.app import Server
from fairlead.backends import fake_engine, fake_painter
from fairlead.backends.table import BACKENDS
from fairlead.cli.demo_models import digits, tiny
from fairlead.core.settings import parse_settings
from fairlead.observe.logs import configure_logs

T = TypeVar("T")

SECONDS = 20.0
AXE = (Path(__file__).parent / "vendor" / "axe.js").read_text()
PHONE = {"width": 390, "height": 844}

BRIGHT = '''
import numpy as np
import structlog

class Model:
    """How bright a small picture is, and the picture upside down."""

    def infer(self, inputs):
        image = inputs["image"]
        mean = image.mean(axis=(1, 2, 3))
        return {"light": np.stack([1 - mean, mean], 1).astype(np.float32), "turned": image[:, :, ::-1].copy()}
'''
BRIGHT_SPEC = """
inputs: [{name: image, datatype: FP32, shape: [-1, 1, 8, 8]}]
outputs: [{name: light, datatype: FP32, shape: [-1, 2], labels: [dark, bright]}, {name: turned, datatype: FP32, shape: [-1, 1, 8, 8]}]
instances: {isolation: thread}
"""
SHOUT = """
import numpy as np
import structlog

class Model:
    def infer(self, inputs):
        return {"loud": np.array([[value.upper() for value in row] for row in inputs["text"]], object)}
"""
SHOUT_SPEC = """
inputs: [{name: text, datatype: BYTES, shape: [-1, 1]}]
outputs: [{name: loud, datatype: BYTES, shape: [-1, 1]}]
instances: {isolation: thread}
"""


def assistant(root: Path) -> None:
    """The small language model, twice."""
    for version in ("1", "2"):
        shutil.copytree(Path(tiny.__file__).parent / "chat", root / "assistant" / version)
    (root / "assistant" / "model.yaml").write_text("version_policy: {all: true}\nllm: {max_num_seqs: 4}\n")


def painter(root: Path) -> None:
    """The small image model: digits."""
    shutil.copytree(Path(digits.__file__).parent / "digits", root / "painter")


def iris(root: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    flowers = load_iris()
    model = LogisticRegression(max_iter=500).fit(flowers.data.astype(np.float32), flowers.target)
    graph = to_onnx(model, flowers.data[:1].astype(np.float32), options={"zipmap": False}, target_opset=17)
    (root / "iris" / "1").mkdir(parents=True)
    (root / "iris" / "1" / "model.onnx").write_bytes(graph.SerializeToString())
    (root / "iris" / "model.yaml").write_text("warmup: [{inputs: {X: {data: [[5.1, 3.5, 1.4, 0.2]]}}}]\n")


def python(name: str, code: str, spec: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.py").write_text(code)
        (root / name / "model.yaml").write_text(spec)

    return write


def fake(name: str, spec: str) -> Callable[[Path], None]:
    """Of a backend that ships with the package: `fake_engine` says back what it is told, `fake_painter` paints what nobody asked for."""

    def write(root: Path) -> None:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "weights").touch()
        (root / name / "model.yaml").write_text(spec)

    return write


bright, shout = python("bright", BRIGHT, BRIGHT_SPEC), python("shout", SHOUT, SHOUT_SPEC)
echo = fake("echo", "backend: fake_engine\nparameters: {step_seconds: 0.01}\n")
slow_painter = fake(
    "slow", "backend: fake_painter\nparameters: {num_steps: 200, size: 32, step_seconds: 0.2}\ndiffusion: {max_steps: 200}\n"
)


class Stage:
    """A running server, in a thread with an event loop of its own."""

    def __init__(self, server: Server, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        """`wait`: for a coroutine that runs in the server's loop."""
        self.server = server
        self.wait = wait
        self.ops = f"http://127.0.0.1:{server.ops.port}"
        self.http = f"http://127.0.0.1:{server.http.port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.ops + path, timeout=SECONDS) as answer:
            return json.loads(answer.read())

    def ended(self, model: str) -> list[dict[str, Any]]:
        """Its requests that have ended, once there is one."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if found := self.get(f"/admin/requests?model={model}")["requests"]:
                return list(found)
            time.sleep(0.02)
        raise TimeoutError(f"no request of {model} has ended")


@contextmanager
def stage(folder: Path, *models: Callable[[Path], None], extra: str = "") -> Iterator[Stage]:
    """`models`: what writes them. `extra`: sections of fairlead.yaml."""
    root = folder / "models"
    root.mkdir()
    for write in models:
        write(root)
    text = f"""
listen: {{port: 0, grpc_port: 0, ops_port: 0}}
models: {{repositories: ['{root}']}}
logs: {{requests: false}}
limits: {{drain_timeout: 3}}
{extra.format(folder=folder)}
"""
    file = folder / "fairlead.yaml"
    file.write_text(text)
    kinds = {kind.name: kind for kind in (fake_engine.KIND, fake_painter.KIND)}
    BACKENDS.update(kinds)
    logger, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    configure_logs("info", "json", io.StringIO())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(120)

    async def start() -> Server:
        server = Server(parse_settings(text, str(file)), file, text)
        await server.start()
        return server

    try:
        server = wait(start())
        try:
            yield Stage(server, wait)
        finally:
            wait(server.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
        for name in kinds:
            BACKENDS.pop(name, None)
        structlog.reset_defaults()
        logger.handlers[:] = handlers


class Tab:
    """A page, and what its console complained of."""

    def __init__(self, page: Page, base: str) -> None:
        self.page = page
        self.base = base
        self.complaints: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _heard(self, message: ConsoleMessage) -> None:
        # a refusal that the page shows in its own words is in the console too
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def open(self, path: str) -> Page:
        self.page.goto(self.base + path)
        return self.page

    def barriers(self) -> list[str]:
        """What axe finds serious or critical."""
        if not self.page.evaluate("typeof axe === 'object'"):
            self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((each) => each.violations)")
        return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found if each["impact"] in ("serious", "critical")]


@contextmanager
def tab(browser: Browser, base: str, **options: Any) -> Iterator[Tab]:
    """One that must not complain, and where nothing that somebody wrote may run."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options})
    context.set_default_timeout(SECONDS * 1000)
    expect.set_options(timeout=SECONDS * 1000)
    opened = Tab(context.new_page(), base)
    try:
        yield opened
        assert opened.page.evaluate("window.hit") is None
        assert not opened.complaints, opened.complaints
    finally:
        context.close()
