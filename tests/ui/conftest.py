"""One server with live traffic and one browser, for all tests of the dashboard in a real browser."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec import Struct, field
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from fairlead.cli.demo_models.tiny.checks import CHAT
from fairlead.core.policy import Scope
from fairlead.gateway.identity.keys import NewKey, new_key
from fairlead.store.rows import AuditRow, KeyRow, TenantRow
from fairlead.store.store import Store
from tests.servers import IDENTITY, Serving, serving, write_model

AXE = (Path(__file__).parent / "vendor" / "axe.js").read_text()
SCREENSHOTS = Path(os.environ.get("FAIRLEAD_SCREENSHOTS", Path(__file__).parent / "screenshots"))
HOSTILE = "<img src=x onerror=window.hacked=1>"
"""A model's name."""
FLAKY = IDENTITY.replace("return", "if inputs['input'].max() > 0.9: raise ValueError('<b>too much</b>')\n        return")
SLOW = IDENTITY.replace("return", "import time; time.sleep(0.003)\n        return")
NUM_IDLE = 10_000
"""Models that nobody loads."""
AUDIT = AuditRow(time=1.0, actor="test", action="test", subject="test")
SECONDS = 60_000
"""Milliseconds, for what the page waits for."""
CHANCE = Random(1)
"""Its own: threads use it, and Hypothesis watches the one that all share."""
expect.set_options(timeout=SECONDS)


class House(Struct):
    server: Serving
    store: Store
    key: NewKey
    """With all scopes."""
    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def ops(self) -> str:
        return str(self.server.ops)

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """The operations port, with the key."""
        return self.server.get(path, url=self.ops, body=body, headers=self.headers)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key.secret}", "content-type": "application/json"}

    def new_key(self, *scopes: Scope) -> NewKey:
        return add_key(self.store, *scopes)


def add_key(store: Store, *scopes: Scope) -> NewKey:
    new = new_key()
    row = KeyRow(id=new.id, tenant="ops", digest=new.digest, signing_key=new.signing_key, prefix=new.prefix, scopes=scopes, created=1.0)
    store.add_key(row, AUDIT)
    return new


def write_models(folder: Path) -> None:
    write_model(folder / "models", "scores", SLOW)
    write_model(folder / "models", "flaky", FLAKY)
    write_model(folder / "models", HOSTILE, IDENTITY)
    write_model(folder / "models", "broken", "raise RuntimeError('its weights are missing')\n")
    shutil.copytree(CHAT, folder / "models" / "assistant" / "1")
    for n in range(NUM_IDLE):
        # A file each, for a folder without one is no model.
        version = folder / "idle" / f"idle-{n:05}" / "1"
        version.mkdir(parents=True)
        (version / "model.py").touch()
    for version in ("1", "2"):
        write_model(folder / "trained" / version, "fraud", SLOW if version == "1" else IDENTITY)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("dashboard")
    write_models(folder)
    store = Store.open(f"sqlite:///{folder}/fairlead.db")
    store.add_tenant(TenantRow(name="ops", created=1.0), AUDIT)
    key = add_key(store, *Scope)
    names = json.dumps(["scores", "flaky", HOSTILE, "broken", "assistant"])
    (folder / "fairlead.yaml").write_text(
        f"""
models: {{repositories: ['{folder}/models', '{folder}/idle'], control: explicit, load: {names}}}
auth: {{required: true, revocation_seconds: 0.2}}
store: {{url: 'sqlite:///{folder}/fairlead.db'}}
logs: {{requests: false}}
"""
    )
    with serving("--config", folder / "fairlead.yaml") as server:
        home = House(server.begin(), store, key, folder)
        threads = [threading.Thread(target=ask_again_and_again, args=(home, each), daemon=True) for each in (tensors, words)]
        for thread in threads:
            thread.start()
        register(home)
        yield home
        home.stop.set()
        for thread in threads:
            thread.join(30)
    store.close()
    shutil.rmtree(folder / "idle")  # what pytest leaves lie it looks through later


def register(home: House) -> None:
    """Two versions of `fraud`, the first of which serves."""
    for version in ("1", "2"):
        body = {
            "uri": str(home.folder / "trained" / version / "fraud"),
            "trusted": True,
            "notes": "<b>retrained</b>",
            "metrics": {"auc": 0.9},
        }
        status, answer = home.ask("/admin/models/fraud/versions", body)
        assert status == 200, answer
    assert home.ask("/admin/rollouts", {"candidates": ["fraud@1"], "policy": "direct"})[0] == 200


def ask_again_and_again(home: House, ask: Any) -> None:
    while not home.stop.is_set():
        try:
            ask(home)
        except OSError:
            return
        home.stop.wait(0.02)


def tensors(home: House) -> None:
    for model in ("scores", "scores", "flaky", "fraud", "%3Cimg%20src=x%20onerror=window.hacked=1%3E", "nobody-has-this"):
        tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [CHANCE.random() for _ in range(4)]}
        home.server.get(f"/v2/models/{model}/infer", body={"inputs": [tensor]}, headers=home.headers)


def words(home: House) -> None:
    body = {"model": "assistant", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 32}
    home.server.get("/v1/chat/completions", body=body, headers=home.headers)
    home.stop.wait(0.3)


# The browser


def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "-o", "DPkg::Lock::Timeout=600", "chromium"], check=True, capture_output=True)
    return found or "/usr/bin/chromium"


@pytest.fixture(scope="module")  # while it runs, no test of another module can have an event loop
def playing() -> Iterator[Playwright]:
    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="module")
def browser(playing: Playwright) -> Iterator[Browser]:
    # Chromium's sandbox wants a user that is not root.
    found = playing.chromium.launch(executable_path=chromium(), args=["--no-sandbox"] if os.getuid() == 0 else [])
    yield found
    found.close()


class Visit(Struct):
    """A tab of somebody who is logged in, and what went wrong in it."""

    page: Page
    house: House
    wrong: list[str] = field(default_factory=list)
    """Errors on the console, broken content security policies, exceptions."""

    def go(self, path: str) -> None:
        self.page.goto(self.house.ops + path)
        self.page.locator("main h1").first.wait_for(timeout=SECONDS)

    def dark(self, dark: bool) -> None:
        self.page.evaluate(
            "(theme) => dispatchEvent(new CustomEvent('fairlead-choose-theme', {detail: theme}))", "dark" if dark else "light"
        )

    def shot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def barriers(self) -> list[str]:
        """What axe finds serious or critical."""
        if not self.page.evaluate("typeof axe === 'object'"):
            self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((each) => each.violations)")
        return [
            f"{each['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"][:3]
        ]


def new_visit(browser: Browser, house: House, *, width: int = 1360, height: int = 860) -> Visit:
    context = browser.new_context(
        base_url=house.ops, viewport={"width": width, "height": height}, color_scheme="light", reduced_motion="reduce"
    )
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    visit = Visit(page, house)
    page.on("console", lambda message: visit.wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.wrong.append(str(error)))
    return visit


def login(visit: Visit, key: NewKey) -> None:
    visit.page.goto(f"{visit.house.ops}/ui")
    visit.page.get_by_label("Key").fill(key.secret)
    visit.page.get_by_role("button", name="Log in").click()
    visit.page.get_by_role("heading", name="Overview", level=1).wait_for()
    # Who is not logged in is told so with a 401, which browsers put on the console.
    visit.wrong[:] = [each for each in visit.wrong if "401" not in each]


@pytest.fixture(scope="module")
def _visit(browser: Browser, house: House) -> Iterator[Visit]:
    found = new_visit(browser, house)
    login(found, house.key)
    yield found
    found.page.context.close()


@pytest.fixture
def visit(_visit: Visit) -> Iterator[Visit]:
    """The tab, at its usual size and in light colours, in which nothing may go wrong."""
    _visit.page.set_viewport_size({"width": 1360, "height": 860})
    _visit.dark(False)
    _visit.wrong.clear()
    yield _visit
    _visit.page.unroute_all()
    assert _visit.wrong == []
    assert _visit.page.evaluate("window.hacked") is None
