"""A server with a few small models, some traffic, and a browser that looks at its dashboard."""

import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, sync_playwright

from tests.servers import IDENTITY, Serving, serving, write_model

MODELS = ("scores", "ranks", "labels")


@contextmanager
def served() -> Iterator[Serving]:
    with TemporaryDirectory() as folder:
        for name in MODELS:
            write_model(Path(folder) / "models", name, IDENTITY)
        settings = Path(folder) / "fairlead.yaml"
        settings.write_text(
            f"models: {{repositories: ['{folder}/models']}}\nstore: {{url: 'sqlite:///{folder}/fairlead.db'}}\nlogs: {{requests: false}}\n"
        )
        with serving("--config", settings) as server:
            server.begin()
            over = threading.Event()
            asking = threading.Thread(target=ask, args=(server, over))
            asking.start()
            try:
                yield server
            finally:
                over.set()
                asking.join()


def ask(server: Serving, over: threading.Event) -> None:
    while not over.wait(0.02):
        server.infer(random.choice(MODELS), [random.random() for _ in range(4)])


@contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("there is no chromium: apt-get install chromium")
    with sync_playwright() as playing:
        browser = playing.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()
