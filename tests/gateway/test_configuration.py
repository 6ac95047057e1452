"""Other policies while requests are under way: what is replaced, what goes on, and what a wrong text changes (nothing)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from fairlead.app import Server
from fairlead.core.errors import ConfigError, Filtered, InvalidRequest, LimitExceeded, NotFound, Unauthenticated, Unavailable
from fairlead.core.request import Raw
from fairlead.core.settings import parse_settings
from fairlead.gateway.configuration import FIXED
from fairlead.runtime.upstream.fake import Fake, Script
from tests.gateway.house import Client, asking, caller, turns, until

FIRST = """\
store: {{url: "sqlite:///{folder}/fairlead.db"}}
gateway:
  tenants:
    acme: {{limits: {{requests_per_day: 2}}}}
  models:
    far:
      upstreams: [{{url: "{url}"}}]
      queue: {{max_in_flight: 1}}
"""
BODY = b'{"model":"far","messages":[{"role":"user","content":"hello"}],"stream":true}'


class Front:
    """A server that listens to nobody: what it is asked comes from here."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.path = folder / "fairlead.yaml"
        self.text = FIRST.format(folder=folder, url=url)
        self.path.write_text(self.text)
        self.server = Server(parse_settings(self.text, str(self.path)), self.path, self.text)
        self.configuration = self.server.configuration

    def ask(self, *, content: str = "hello", tenant: str = "acme") -> Client:
        body = BODY.replace(b"hello", content.encode())
        raw = Raw(path="/v1/chat/completions", body=body, stream=True)
        who = caller(tenant, policy=self.server.keyring.snapshot.policy(tenant))
        return Client(self.server.gateway, asking("far", raw=raw, caller=who), "submit")

    async def put(self, *changes: tuple[str, str]) -> int:
        text = self.text
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return await self.configuration.put(text, "somebody")


@pytest_asyncio.fixture
async def far() -> AsyncIterator[Fake]:
    server = await Fake(Script(chunks=3)).start()
    yield server
    await server.stop()


@pytest_asyncio.fixture
async def front(tmp_path: Path, far: Fake) -> AsyncIterator[Front]:
    built = Front(tmp_path, far.url)
    yield built
    with capture_logs():
        await built.server.stop()


@pytest.fixture(autouse=True)
def _quiet():
    with capture_logs():
        yield


LIMIT = ("requests_per_day: 2", "requests_per_day: 100")


async def test_other_policies_count_from_the_next_request_on_and_what_was_used_stays_used(front):
    for _ in range(2):
        await front.ask().answer()
    assert isinstance((await front.ask().end()).error, LimitExceeded)
    assert await front.put(LIMIT) == 1 == front.configuration.version
    client = await front.ask().end()
    assert client.error is None and client.headers["x-ratelimit-remaining-requests"] == "97"


async def test_a_filter_of_a_new_text_searches_the_next_request(front):
    await front.put(("queue: {max_in_flight: 1}", "filters: {deny: [bomb]}"))
    assert isinstance((await front.ask(content="a bomb").end()).error, Filtered)


async def test_what_was_changed_last_can_be_taken_back_step_by_step(front):
    await front.put(LIMIT)
    await front.put(("requests_per_day: 2", "requests_per_day: 0"))
    assert isinstance((await front.ask().end()).error, LimitExceeded)
    assert await front.configuration.rollback("somebody") == 3
    assert (await front.ask().end()).headers["x-ratelimit-limit-requests"] == "100"
    assert await front.configuration.rollback("somebody") == 4
    assert front.configuration.text() == front.text
    assert (await front.ask().end()).headers["x-ratelimit-limit-requests"] == "2"
    with pytest.raises(InvalidRequest, match="nothing to take back"):
        await front.configuration.rollback("somebody")
    rows = front.server.store.configs()
    assert [(row.version, row.active) for row in rows] == [(4, True), (3, False), (2, False), (1, False)]
    assert rows[0].text == front.text and {row.actor for row in rows} == {"somebody"}


async def test_the_file_is_read_again_when_asked_to(front):
    front.path.write_text(front.text.replace(*LIMIT))
    await front.server.reload()  # SIGHUP
    assert (await front.ask().end()).headers["x-ratelimit-limit-requests"] == "100"
    assert "100" in front.configuration.text()


async def test_a_server_without_a_file_has_none_to_read_again(tmp_path):
    server = Server(parse_settings("", "flags"))
    with pytest.raises(InvalidRequest, match="--config"):
        await server.configuration.reload("somebody")
    assert await server.configuration.put("gateway: {classes: {gold: 1, standard: 0}}", "somebody") == 1
    assert server.gateway.settings.classes == {"gold": 1, "standard": 0}
    await server.stop()


WRONG = {
    "no YAML": ("gateway:", "gateway: [", r"configuration:\d+: not YAML"),
    "an unknown key": (
        "queue: {max_in_flight",
        "queue: {max_in_fligth",
        r"configuration:8: unknown key `max_in_fligth` \(at gateway.models.far.queue\)",
    ),
    "a wrong value": ("requests_per_day: 2", "requests_per_day: many", r"configuration:4: "),
    "an unknown limit": ("requests_per_day", "requests_per_eon", r"configuration:4: .*`requests_per_eon` is no limit"),
    "an unknown class": ("limits: {requests", "class: gold, limits: {requests", r"class `gold` of tenant `acme` is not one"),
    "a pattern that is none": ("queue: {max_in_flight: 1}", 'filters: {deny_patterns: ["("]}', r"deny_patterns"),
    "a fallback to itself": ("queue: {max_in_flight: 1}", "routing: {fallback: [far]}", r"names the model itself"),
    "a degradation to itself": (
        "queue: {max_in_flight: 1}",
        "queue: {max_in_flight: 1, degrade: [{wait_above: 1, model: far}]}",
        r"names the model itself",
    ),
    "an upstream that is none": ("http://", "gopher://", r"gopher|url"),
    "a variable of others": ("max_in_flight: 1", "max_in_flight: ${HOME}", r"HOME"),
    "another section": ("gateway:", "logs: {level: debug}\ngateway:", r"`logs` can only change with a restart"),
    "the store": ("fairlead.db", "another.db", r"`store` can only change with a restart"),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_text_that_is_wrong_changes_nothing_and_says_where(front, wrong):
    old, new, message = WRONG[wrong]
    before, places = front.server.gateway.settings, front.server.upstreams("far")
    with pytest.raises(ConfigError, match=message):
        await front.put((old, new))
    assert front.server.gateway.settings is before is front.server.policies and front.server.upstreams("far") == places
    assert front.configuration.version == 0 and front.server.store.configs() == ()
    assert (await front.ask().end()).headers["x-ratelimit-limit-requests"] == "2"


async def test_a_fallback_that_nobody_computes_is_told_in_the_log(front):
    with capture_logs() as logs:
        await front.put(("queue: {max_in_flight: 1}", "routing: {fallback: [nowhere]}"))
    (line,) = [line for line in logs if line["event"] == "unknown_fallback"]
    assert (line["option"], line["model"]) == ("gateway.models.far.routing.fallback", "nowhere")


@pytest.mark.parametrize("fixed", FIXED)
async def test_what_connections_were_made_for_stays_until_a_restart(front, fixed):
    value = {"redis_url": "redis://127.0.0.1:1/0", "limits": "{output_tokens: 5}", "reuse": "{max_bytes: 5}"}[fixed]
    with pytest.raises(ConfigError, match=f"`gateway.{fixed}` can only change with a restart"):
        await front.put(("gateway:\n", f"gateway:\n  {fixed}: {value}\n"))


async def test_a_file_that_is_wrong_or_gone_is_told_in_the_log_and_changes_nothing(front):
    for breaks in (lambda: front.path.write_text("gateway: {modles: {}}"), front.path.unlink):
        breaks()
        with capture_logs() as logs:
            await front.server.reload()
        (line,) = [line for line in logs if line["event"] == "not_configured"]
        assert str(front.path) in line["error"]
    assert front.configuration.version == 0


async def test_a_store_that_does_not_answer_keeps_the_policies_as_they_are(front, monkeypatch):
    def gone(text: str, audit: object) -> None:
        raise Unavailable("the store does not answer")

    monkeypatch.setattr(front.server.store, "add_config", gone)
    with pytest.raises(Unavailable):
        await front.put(LIMIT)
    assert front.configuration.version == 0
    assert (await front.ask().end()).headers["x-ratelimit-limit-requests"] == "2"


async def test_changes_at_the_same_time_come_one_after_the_other(front):
    texts = [front.text.replace("requests_per_day: 2", f"requests_per_day: {number}") for number in range(10, 15)]
    numbers = await asyncio.gather(*(front.configuration.put(text, "somebody") for text in texts))
    assert sorted(numbers) == [1, 2, 3, 4, 5] and front.configuration.version == 5
    assert front.configuration.text() == front.server.store.configs()[0].text
    limit = front.server.gateway.settings.tenants["acme"].limits["requests_per_day"]
    assert f"requests_per_day: {limit:g}" in front.configuration.text()


async def test_who_asked_for_a_change_may_leave_in_the_middle_of_it(front):
    task = asyncio.create_task(front.put(LIMIT))
    await turns(1)
    task.cancel()
    await asyncio.wait({task})
    await until(lambda: front.configuration.version == 1)
    assert len(front.server.store.configs()) == 1 and front.server.gateway.settings.tenants["acme"].limits == {"requests_per_day": 100.0}


async def test_whoever_waits_goes_on_waiting_and_has_its_turn(front, far):
    far.script = Script(fault="hang", times=1)
    running = front.ask(tenant="other")
    waiting = [front.ask() for _ in range(2)]
    await until(lambda: far.num_open)
    queue = front.server.courses.queues["far"]
    assert (queue.num_in_flight, queue.num_waiting) == (1, 2)
    await front.put(LIMIT)
    assert (queue.num_in_flight, queue.num_waiting) == (1, 2) and front.server.courses.queues["far"] is queue
    running.ticket.cancel()
    assert [(await client.end()).error for client in waiting] == [None, None]
    assert (queue.num_in_flight, queue.num_waiting) == (0, 0)


async def test_more_room_lets_those_in_who_wait(front, far):
    far.script = Script(fault="hang", times=1)
    running = front.ask(tenant="other")
    waiting = front.ask()
    await until(lambda: far.num_open)
    await front.put(("max_in_flight: 1", "max_in_flight: 2"))
    assert (await waiting.end()).error is None
    running.ticket.cancel()


async def test_an_upstream_that_is_not_named_any_more_finishes_what_it_has(front, far, monkeypatch):
    monkeypatch.setattr("fairlead.gateway.upstreams.LINGER_SECONDS", 0.001)
    far.script = Script(chunks=15, pace=0.03)
    client = front.ask()
    await until(lambda: client.responses)
    (place,) = front.server.upstreams("far")
    await front.put(('upstreams: [{url: "' + far.url + '"}]', "price: {per_request: 1}"))
    assert not client.ended.is_set() and front.server.upstreams("far") == ()
    assert isinstance((await front.ask(tenant="other").end()).error, NotFound)
    assert (await client.end()).error is None and b"[DONE]" in client.responses[-1].raw
    await until(lambda: not front.server.upstreams._closing)
    assert place.in_flight == 0


async def test_a_model_can_begin_to_want_signatures(front):
    await front.put(("queue: {max_in_flight: 1}", "require_signature: true"))
    assert isinstance((await front.ask().end()).error, Unauthenticated)
