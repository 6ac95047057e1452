"""The dashboard as a browser sees it, on a whole server that asks for keys: who comes in, for how long, and what it is told."""

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from fairlead.api.ui.files import FOLDER, Files
from fairlead.api.ui.live import Live
from fairlead.api.ui.sessions import MAX_ADDRESSES, MAX_TRIES, TRY_SECONDS, Sessions, cookie_name, token_of
from fairlead.app_ui import Dashboard
from fairlead.core.caller import Caller
from fairlead.core.errors import LimitExceeded, Unauthenticated, Unavailable
from fairlead.core.policy import Scope
from fairlead.core.ui import UiSettings
from fairlead.gateway.identity.keys import NewKey
from tests.api.keyed import SECONDS, House, bearer, chat, house, row

pytestmark = pytest.mark.asyncio(loop_scope="module")
BOTH = (Scope.ADMIN, Scope.INFER)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with house(tmp_path_factory.mktemp("house"), extra="ui: {max_viewers: 3}") as found:
        yield found


class Browser:
    """Keeps cookies, and says where its pages come from."""

    def __init__(self, home: House) -> None:
        self.home = home
        self.base = f"http://127.0.0.1:{home.server.ops.port}"
        self.client = httpx2.AsyncClient(base_url=self.base, timeout=SECONDS)
        self.csrf = ""

    async def get(self, path: str, **headers: str) -> httpx2.Response:
        return await self.client.get(path, headers=named(headers))

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        headers = {"origin": self.base, "sec_fetch_site": "same-origin", "x_fairlead_csrf": self.csrf, **headers}
        return await self.client.post(path, json=body, headers=named(headers))

    async def login(self, key: NewKey) -> httpx2.Response:
        answer = await self.post("/ui/login", {"key": key.secret})
        self.csrf = answer.json().get("csrf", "")
        return answer


def dashboard_of(home: House) -> Dashboard:
    assert home.server.dashboard is not None
    return home.server.dashboard


def named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items() if value}


@pytest_asyncio.fixture(loop_scope="module")
async def browser(home: House) -> AsyncIterator[Browser]:
    dashboard_of(home).doorkeeper.sessions._tries.clear()
    found = Browser(home)
    async with found.client:
        yield found


# Files


async def test_every_page_is_the_shell_under_a_strict_policy(browser: Browser) -> None:
    for path in ("/ui", "/ui/overview", "/ui/models/%3Cimg%20src=x%3E", "/ui/no/such/page"):
        answer = await browser.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert "style=" not in answer.text and "onerror" not in answer.text


async def test_files_are_served_for_ever_under_the_name_of_their_content(browser: Browser) -> None:
    shell = (await browser.get("/ui")).text
    sources = re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', shell)
    assert any(source.endswith("app.js") for source in sources)
    for source in sources:
        answer = await browser.get(source)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
        assert (await browser.get(source, if_none_match=answer.headers["etag"])).status_code == 304
    plain = await browser.client.get(sources[0], headers={"accept-encoding": "identity"})
    zipped = await browser.client.get(sources[0], headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers and zipped.headers["content-encoding"] == "gzip" and plain.content == zipped.content


@pytest.mark.parametrize(
    "name", ["../__init__.py", "..%2f__init__.py", "%2e%2e/%2e%2e/core/settings.py", "README.md", "tsconfig.json", "", "lib", "lib/"]
)
async def test_nothing_but_the_dashboards_own_files_is_there(browser: Browser, name: str) -> None:
    build = dashboard_of(browser.home)._routes.files.build
    assert (await browser.get(f"/ui/static/{build}/{name}")).status_code == 404


async def test_another_builds_file_is_not_there(browser: Browser) -> None:
    assert (await browser.get("/ui/static/000000000000/app.js")).status_code == 404


async def test_the_first_page_is_small() -> None:
    files = Files()
    scripts = [file for name, file in files.by_name.items() if name.endswith(".js")]
    assert sum(len(file.zipped) for file in scripts) < 250 * 1024
    assert gzip.decompress(files.by_name["app.js"].zipped) == (FOLDER / "app.js").read_bytes()


# Logging in


async def test_a_stranger_is_told_only_that_somebody_must_log_in(browser: Browser) -> None:
    told = (await browser.get("/ui/session")).json()
    assert told.pop("required") is True and not any(told.values())
    for path in ("/ui/history", "/ui/live", "/ui/models.json", "/admin/models"):
        answer = await browser.get(path)
        assert answer.status_code == 401 and answer.headers["content-type"] == "application/problem+json"


async def test_an_admin_key_begins_a_session_and_logging_out_ends_it(home: House, browser: Browser) -> None:
    key = home.new_key(*BOTH)
    answer = await browser.login(key)
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Secure" not in cookie
    assert key.secret not in cookie and key.secret not in answer.text
    told = (await browser.get("/ui/session")).json()
    assert (told["who"], told["required"], told["scopes"]) == (key.id, False, ["admin", "infer"])
    assert "models" in told["features"] and "load" in told["features"]
    assert (await browser.get("/admin/models")).status_code == 200
    token = dict(browser.client.cookies)
    assert (await browser.post("/ui/logout", {})).status_code == 200
    browser.client.cookies.update(token)  # kept by somebody
    assert (await browser.get("/admin/models")).status_code == 401


async def test_the_cookie_is_for_tls_only_where_the_browser_speaks_it(home: House, browser: Browser) -> None:
    answer = await browser.post("/ui/login", {"key": home.new_key(*BOTH).secret}, x_forwarded_proto="https")
    assert "Secure" in answer.headers["set-cookie"]


async def test_a_key_without_the_scope_admin_does_not_come_in(home: House, browser: Browser) -> None:
    answer = await browser.login(home.new_key(Scope.INFER))
    assert answer.status_code == 403 and "set-cookie" not in answer.headers


@pytest.mark.parametrize("body", [{}, {"key": ""}, {"key": 1}, {"key": "x" * 5000}, {"key": "fl_no_such"}, {"key": "a.b.c"}, []])
async def test_what_is_no_key_begins_nothing(browser: Browser, body: Any) -> None:
    answer = await browser.post("/ui/login", body)
    assert answer.status_code in (400, 401, 413) and "set-cookie" not in answer.headers


async def test_who_guesses_must_wait_and_locks_nobody_out(home: House, browser: Browser) -> None:
    for _ in range(MAX_TRIES):
        assert (await browser.post("/ui/login", {"key": "fl_guess"})).status_code == 401
    refused = await browser.post("/ui/login", {"key": "fl_guess"})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    assert (await browser.login(home.new_key(*BOTH))).status_code == 200


@pytest.mark.parametrize("origin", ["http://[", "http://a]b", "null", "//"])
async def test_what_is_no_origin_is_another_site(home: House, browser: Browser, origin: str) -> None:
    assert (await browser.post("/ui/login", {"key": home.new_key(*BOTH).secret}, origin=origin)).status_code == 403
    await browser.login(home.new_key(*BOTH))
    assert (await browser.get("/admin/models", origin=origin)).status_code == 403
    assert (await browser.post("/ui/data/v2/models/identity/infer", row(), origin=origin)).status_code == 403


async def test_another_sites_page_cannot_log_anybody_in(home: House, browser: Browser) -> None:
    for headers in ({"origin": "https://elsewhere.example"}, {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}):
        answer = await browser.post("/ui/login", {"key": home.new_key(*BOTH).secret}, **headers)
        assert answer.status_code == 403 and "set-cookie" not in answer.headers


# What a session may


async def test_changing_something_takes_the_sessions_token_from_our_own_page(home: House, browser: Browser) -> None:
    await browser.login(home.new_key(*BOTH))
    new = {"name": "made-by-hand"}
    assert (await browser.post("/admin/models", new, x_fairlead_csrf="")).status_code == 403
    assert (await browser.post("/admin/models", new, x_fairlead_csrf="wrong")).status_code == 403
    assert (await browser.post("/admin/models", new, origin="https://elsewhere.example")).status_code == 403
    assert (await browser.post("/admin/models", new, sec_fetch_site="cross-site")).status_code == 403
    assert (await browser.get("/admin/models", sec_fetch_site="same-site")).status_code == 403
    assert (await browser.post("/admin/models", new)).status_code == 200
    entries = (await browser.get("/admin/audit")).json()["entries"]
    assert entries[0]["action"] == "model.add"


async def test_a_session_ends_with_its_key(home: House, browser: Browser) -> None:
    key = home.new_key(*BOTH)
    await browser.login(key)
    assert (await browser.get("/ui/history")).status_code == 200
    home.revoke(key)
    assert (await browser.get("/ui/history")).status_code == 401
    assert (await browser.get("/ui/session")).json()["required"] is True


async def test_a_key_in_a_header_counts_more_than_a_cookie(home: House, browser: Browser) -> None:
    await browser.login(home.new_key(*BOTH))
    assert (await browser.client.get("/admin/models", headers=bearer(home.new_key(Scope.INFER)))).status_code == 403
    answer = await browser.client.post("/admin/models", json={"name": "by-key"}, headers=bearer(home.new_key(*BOTH)))
    assert answer.status_code == 200


async def test_the_data_plane_beneath_the_dashboard_asks_as_its_own_port_does(home: House, browser: Browser) -> None:
    infer, models = "/ui/data/v2/models/identity/infer", "/ui/data/v1/models"
    assert (await browser.post(infer, row())).status_code == 401
    assert (await browser.get(models)).status_code == 401
    await browser.login(home.new_key(Scope.ADMIN))
    refused = await browser.post(infer, row())
    assert refused.status_code == 403 and "infer" in refused.text
    assert (await browser.post("/ui/data/v1/chat/completions", chat())).status_code == 403

    await browser.login(home.new_key(*BOTH))
    assert (await browser.post(infer, row())).json()["outputs"][0]["data"] == [1.0] * 4
    assert (await browser.post(infer, row(), x_fairlead_csrf="")).status_code == 403
    assert "some" in (await browser.post("/ui/data/v1/chat/completions", chat())).json()["choices"][0]["message"]["content"]
    assert (await browser.post("/ui/data/v1/chat/completions", chat(stream=True))).text.rstrip().endswith("[DONE]")
    assert (await browser.get("/ui/data/v2/models/secret")).status_code == 404
    told = (await browser.get(models)).headers
    assert "sandbox" in told["content-security-policy"] and told["x-content-type-options"] == "nosniff"
    assert (await browser.post("/v2/models/identity/infer", row())).status_code == 404
    assert home.count("fairlead_gateway_refused_total", "identity", "forbidden") == 0


async def test_a_cookie_is_worth_nothing_on_the_data_port(home: House, browser: Browser) -> None:
    await browser.login(home.new_key(*BOTH))
    cookie = "; ".join(f"{name}={value}" for name, value in dict(browser.client.cookies).items())
    answer = await home.http.post("/v2/models/identity/infer", json=row(), headers={"cookie": cookie, "x-fairlead-csrf": browser.csrf})
    assert answer.status_code == 401


# Numbers


async def test_the_live_feed_tells_all_viewers_the_same_and_lets_so_many_in(home: House, browser: Browser) -> None:
    await browser.login(home.new_key(*BOTH))
    live = dashboard_of(home).live

    async def first(client: httpx2.AsyncClient) -> dict[str, Any]:
        async with client.stream("GET", "/ui/live") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    return dict(json.loads(line[6:]))
        raise AssertionError

    for snapshot in await asyncio.gather(*(first(browser.client) for _ in range(3))):
        assert snapshot["models"]["loaded"] > 0 and set(snapshot["totals"]) >= {"requests", "p99", "kv", "rss"}
    async with asyncio.timeout(SECONDS):
        while live.num_viewers:  # that they left is known a moment later
            await asyncio.sleep(0.005)
    live.num_viewers = 3
    refused = await browser.get("/ui/live")
    live.num_viewers = 0
    assert refused.status_code == 503 and "max_viewers" in refused.text


async def test_models_are_found_sorted_and_cut_by_the_server(home: House, browser: Browser) -> None:
    await browser.login(home.new_key(*BOTH))
    found = (await browser.get("/ui/models.json?search=secret&limit=2&sort=name&descending=true")).json()
    assert found["total"] == 3 and [each["name"] for each in found["models"]] == ["secret-spare", "secret-chat"]
    assert found["counts"]["ready"] == 3 and found["models"][0]["state"] == "ready"
    assert [each["name"] for each in (await browser.get("/ui/models.json?name=secret")).json()["models"]] == ["secret"]
    assert (await browser.get("/ui/models.json?search=nothing-has-that")).json()["models"] == []
    assert (await browser.get("/ui/models.json?limit=501")).status_code == 400
    assert (await browser.get("/ui/models.json?unknown=1")).status_code == 400


async def test_the_hour_of_a_model_nobody_knows_is_empty(home: House, browser: Browser) -> None:
    await browser.login(home.new_key(*BOTH))
    assert (await browser.get("/ui/history?model=%3Cscript%3E")).json()["at"] == []


async def test_a_server_that_asks_nobody_lets_its_own_pages_in_and_no_others(tmp_path: Path) -> None:
    async with house(tmp_path, auth="required: false") as home:
        browser = Browser(home)
        async with browser.client:
            assert (await browser.get("/ui/session")).json()["required"] is False
            assert (await browser.post("/ui/data/v2/models/identity/infer", row())).status_code == 200
            assert (await browser.post("/ui/login", {"key": "fl_x"})).status_code == 400
            for headers in (
                {"origin": "https://elsewhere.example"},
                {"host": "rebound.example:80"},
                {"sec_fetch_site": "cross-site", "origin": ""},
                {"origin": "http://["},
                {"host": "["},
            ):
                assert (await browser.get("/ui/models.json", **headers)).status_code == 403
                assert (await browser.post("/ui/data/v2/models/identity/infer", row(), **headers)).status_code == 403
                assert (await browser.post("/ui/data/v2/repository/models/identity/unload", {}, **headers)).status_code == 403


async def test_a_server_may_do_without_it(tmp_path: Path) -> None:
    async with house(tmp_path, extra="ui: {enabled: false}") as home:
        assert (await home.ops.get("/ui")).status_code == 404
        assert (await home.ops.get("/ui/data/v1/models", headers=bearer(home.new_key(*BOTH)))).status_code == 404
        assert (await home.ops.post("/v2/models/identity/infer", json=row(), headers=bearer(home.new_key(*BOTH)))).status_code == 404


# Sessions and the live feed by themselves


class Keys:
    """Knows who is good."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()

    def again(self, caller: Caller, now: float) -> Caller:
        if caller.key in self.revoked:
            raise Unauthenticated("revoked")
        return caller


def sessions(**settings: Any) -> tuple[Sessions, Keys]:
    keys = Keys()
    return Sessions(UiSettings(**settings), keys), keys  # type: ignore[arg-type]


async def test_a_session_ends_when_it_is_idle_and_when_it_is_old() -> None:
    kept, _ = sessions(session_hours=1, idle_minutes=10)
    token, session = kept.begin(Caller(key="k"), 0.0)
    for now in range(0, 3600, 300):
        assert kept.find(token, float(now)) is session
    with pytest.raises(Unauthenticated):
        kept.find(token, 3600.0)
    token, _ = kept.begin(Caller(key="k"), 0.0)
    with pytest.raises(Unauthenticated):
        kept.find(token, 600.0)
    with pytest.raises(Unauthenticated):  # and does not come back
        kept.find(token, 0.0)


async def test_the_session_that_was_idle_longest_makes_room() -> None:
    kept, _ = sessions(max_sessions=2)
    first, second = kept.begin(Caller(key="a"), 0.0)[0], kept.begin(Caller(key="b"), 1.0)[0]
    kept.find(first, 2.0)
    third = kept.begin(Caller(key="c"), 3.0)[0]
    assert kept.find(first, 4.0).caller.key == "a" and kept.find(third, 4.0).caller.key == "c"
    with pytest.raises(Unauthenticated):
        kept.find(second, 4.0)


async def test_those_who_guess_are_counted_by_address_and_forgotten() -> None:
    kept, _ = sessions()
    for _ in range(MAX_TRIES):
        kept.failed("a", 1000.0)
    with pytest.raises(LimitExceeded):
        kept.failed("a", 1001.0)
    kept.failed("b", 1001.0)
    kept.failed("a", 1000.0 + TRY_SECONDS)
    for _ in range(MAX_TRIES):
        kept.failed("c", 5000.0)
    kept.failed("c", 2000.0)  # the clock was set back
    for n in range(1000):
        kept.failed(f"10.0.0.{n}", 5000.0)
    assert len(kept._tries) <= MAX_ADDRESSES


@pytest.mark.parametrize(
    ("cookies", "token"),
    [
        ("fairlead-session-8002=abc", "abc"),
        ("a=b; fairlead-session-8002=abc; c=d", "abc"),
        ("fairlead-session-9000=abc", ""),
        ("", ""),
        (";;=;", ""),
    ],
)
async def test_each_port_has_a_cookie_of_its_own(cookies: str, token: str) -> None:
    headers = {b"host": b"localhost:8002", b"cookie": cookies.encode()}
    assert cookie_name(headers) == "fairlead-session-8002" and token_of(headers) == token


async def test_a_snapshot_is_made_once_for_all_and_not_for_nobody() -> None:
    live = Live(lambda: {"n": live.num_snapshots}, max_viewers=2)
    live.publish()
    assert live.num_snapshots == 0
    async with aclosing(live.view(lambda: None)) as one, aclosing(live.view(lambda: None)) as other:
        await anext(one), await anext(other)
        nexts = [asyncio.ensure_future(anext(each)) for each in (one, other)]
        await asyncio.sleep(0)
        before = live.num_snapshots
        live.publish()
        assert live.num_snapshots == before + 1
        first, second = await asyncio.gather(*nexts)
        assert first == second
        with pytest.raises(Unavailable):
            await anext(live.view(lambda: None))
    assert live.num_viewers == 0


async def test_a_viewer_who_may_not_look_any_more_is_told_so_and_sees_nothing_more() -> None:
    live, good = Live(lambda: {}, max_viewers=2), [True]

    def allowed() -> None:
        if not good[0]:
            raise Unauthenticated("revoked")

    stream = live.view(allowed)
    await anext(stream)
    pending = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    good[0] = False
    live.publish()
    assert b"event: over" in await pending
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_server_that_stops_ends_every_stream() -> None:
    live = Live(lambda: {}, max_viewers=2)
    stream = live.view(lambda: None)
    await anext(stream)
    pending = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    live.stop()
    with pytest.raises(StopAsyncIteration):
        await pending
