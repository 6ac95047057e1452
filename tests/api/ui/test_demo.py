"""The page of one model: a link becomes a session that may ask this model, and is worth nothing anywhere else."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from fairlead.api.ui.guests import SESSION_SECONDS, Guests
from fairlead.app import Server
from fairlead.app_demo import Links, demo_settings, lan_address, open_demo
from fairlead.backends import fake_engine, fake_painter
from fairlead.backends.table import BACKENDS
from fairlead.core.errors import ConfigError, Unauthenticated
from tests.api.keyed import SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


def write(folder: Path, name: str, spec: str) -> Path:
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "1" / "weights").touch()
    (folder / name / "model.yaml").write_text(spec)
    return folder / name


async def started(path: Path, folder: Path) -> Server:
    server = Server(demo_settings(str(path), folder))
    await server.start()
    return server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("demo")
    kinds = {kind.name: kind for kind in (fake_engine.KIND, fake_painter.KIND)}
    BACKENDS.update(kinds)
    running = await started(write(folder, "echo", "backend: fake_engine\n"), folder)
    yield running
    await running.stop()
    for name in kinds:
        del BACKENDS[name]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def links(server: Server) -> Links:
    return await open_demo(server, 0, guests=2)


class Guest:
    """A browser: it keeps its cookie and says where its pages come from."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.client = httpx2.AsyncClient(base_url=base, timeout=SECONDS)
        self.csrf = ""

    async def enter(self, token: str, **headers: str) -> httpx2.Response:
        named = {"sec-fetch-site": "same-origin", **{name.replace("_", "-"): each for name, each in headers.items()}}
        answer = await self.client.post("/ui/enter", json={"token": token}, headers=named)
        self.csrf = answer.json().get("csrf", "")
        return answer

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        named = {"x-fairlead-csrf": self.csrf, **{name.replace("_", "-"): each for name, each in headers.items()}}
        return await self.client.post(path, json=body, headers=named)


def parted(link: str) -> tuple[str, str]:
    """(address, token)."""
    base, _, token = link.partition("/#")
    return base, token


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(links: Links) -> AsyncIterator[Guest]:
    base, token = parted(links.url)
    found = Guest(base)
    async with found.client:
        answer = await found.enter(token)
        assert (answer.status_code, answer.json()["model"], answer.json()["scopes"]) == (200, "echo", ["infer"])
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and token not in cookie
        yield found


async def test_a_guest_asks_the_model(guest: Guest) -> None:
    answer = await guest.post("/ui/data/v1/chat/completions", CHAT)
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    found = (await guest.client.get("/ui/playground/models")).json()
    assert [model["name"] for model in found["models"]] == ["echo"]
    assert found["url"].startswith("http://127.0.0.1:")  # for programs of this machine


async def test_a_link_opens_as_often_as_it_was_made_for(links: Links, server: Server) -> None:
    base = parted(links.url)[0]
    shared = parted(links.share)[1]
    for token, status in ((parted(links.url)[1], 401), (shared, 200), (shared, 200), (shared, 401), ("guessed", 401)):
        visitor = Guest(base)
        async with visitor.client:
            assert (await visitor.enter(token)).status_code == status
    assert lan_address() in links.share


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/models"),
        ("GET", "/admin/jobs"),
        ("GET", "/metrics"),
        ("GET", "/ui/live"),
        ("GET", "/ui/models.json"),
        ("GET", "/ui/data/v1/models"),
        ("GET", "/ui/data/v1/jobs"),
        ("GET", "/ui/data/v2/models/stats"),
        ("GET", "/ui/data/openapi.json"),
        ("POST", "/ui/data/v2/repository/models/echo/unload"),
        ("POST", "/ui/data/v2/repository/index"),
        ("POST", "/ui/data/v1/webhooks/secrets"),
        ("POST", "/ui/login"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v2/models/echo"),
    ],
)
async def test_nothing_else_is_there(guest: Guest, method: str, path: str) -> None:
    answer = await guest.client.request(method, path, headers={"x-fairlead-csrf": guest.csrf})
    assert answer.status_code in (404, 405), answer.text


async def test_other_models_are_unknown_and_nobody_is_called_back(guest: Guest) -> None:
    assert (await guest.post("/ui/data/v1/chat/completions", {**CHAT, "model": "other"})).status_code == 404
    assert (await guest.client.get("/ui/playground/models/other")).status_code == 404
    job = {"model": "echo", "input": {"prompt": "hello"}, "webhook": {"url": "https://example.com/"}}
    answer = await guest.post("/ui/data/v1/jobs", job)
    assert answer.status_code == 501 and "webhooks.enabled" in answer.json()["detail"]


async def test_a_class_of_service_cannot_be_chosen(guest: Guest) -> None:
    assert (await guest.post("/ui/data/v1/chat/completions", CHAT, x_fairlead_class="interactive")).status_code in (400, 403)


async def test_strangers_and_pages_of_other_sites_are_refused(guest: Guest, links: Links) -> None:
    stranger = Guest(guest.base)
    async with stranger.client:
        assert (await stranger.client.get("/")).status_code == 200  # the page, which tells nothing
        assert (await stranger.client.get("/ui/session")).json()["required"] is True
        assert (await stranger.post("/ui/data/v1/chat/completions", CHAT)).status_code == 401
        assert (await stranger.client.get("/ui/playground/models")).status_code == 401
        assert (await stranger.enter("x", sec_fetch_site="cross-site")).status_code == 403
    assert (await guest.post("/ui/data/v1/chat/completions", CHAT, x_fairlead_csrf="")).status_code == 403
    assert (await guest.post("/ui/data/v1/chat/completions", CHAT, sec_fetch_site="cross-site")).status_code == 403


async def test_it_may_stand_behind_a_proxy_that_speaks_tls(server: Server) -> None:
    base, token = parted((await open_demo(server, 0, guests=0)).url)
    visitor = Guest(base)
    proxied = {"host": "demo.example", "origin": "https://demo.example", "x-forwarded-proto": "https"}
    async with visitor.client:
        cookie = (await visitor.enter(token, **proxied)).headers["set-cookie"]
        assert "; Secure" in cookie and visitor.csrf
        shown = {"host": "demo.example", "cookie": cookie.partition(";")[0]}
        for path in ("/ui/session", "/ui/playground/models", "/ui/playground/models/echo"):
            assert "echo" in (await visitor.client.get(path, headers=shown)).text
        assert (await visitor.post("/ui/data/v1/chat/completions", CHAT, **shown)).status_code == 200


async def test_sessions_end(server: Server) -> None:
    guests = Guests("echo")
    cookie, _ = guests.enter(guests.invite(), now=0.0)
    http = _asking(cookie)
    assert guests.visit(http, SESSION_SECONDS - 1) is not None
    assert guests.visit(http, SESSION_SECONDS) is None
    assert guests.visit(http, 0.0) is None
    with pytest.raises(Unauthenticated, match="used already"):
        guests.enter("", now=0.0)


def _asking(cookie: str) -> Any:
    from starlette.requests import Request

    headers = [(b"host", b"127.0.0.1:8003"), (b"cookie", f"fairlead-session-8003={cookie}".encode())]
    return Request({"type": "http", "method": "GET", "headers": headers})


async def test_one_model_is_what_it_is_for(server: Server, tmp_path: Path) -> None:
    several, none = tmp_path / "several", tmp_path / "broken"
    for name in ("a", "b"):
        write(several, name, "backend: fake_engine\n")
    (none / "a" / "1").mkdir(parents=True)
    (none / "a" / "1" / "model.py").write_text("raise RuntimeError('no weights')\n")
    for number, (path, said) in enumerate(((several, "2 models"), (none, "no weights"))):
        folder = tmp_path / f"kept{number}"
        folder.mkdir()
        running = await started(path, folder)
        try:
            with pytest.raises(ConfigError, match=said):
                await open_demo(running, 0, guests=0)
        finally:
            await running.stop()
