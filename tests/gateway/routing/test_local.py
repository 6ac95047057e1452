"""Places of this server: versions of a real repository, and replicas of the fake engine in processes of their own."""

import asyncio
import os
import signal
import socket
from collections import Counter
from contextlib import aclosing

import numpy as np
import pytest
import pytest_asyncio

from fairlead.backends import BACKENDS, fake_engine
from fairlead.core.errors import NotFound, ReplicaDied
from fairlead.core.generation import Generate, Sampling
from fairlead.core.policy import Breaker, GatewaySettings, ModelPolicy, RoutingSettings, Upstream
from fairlead.core.request import Raw, Request
from fairlead.core.routes import Routes
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.routing.fake import FakePlace, VirtualTime
from fairlead.observe.counts import Counts
from fairlead.observe.metrics import Metrics
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.repository import ModelRepository, RepositorySettings
from fairlead.runtime.upstream.place import UpstreamPlace
from tests.servers import IDENTITY, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECONDS = 20.0
ENGINE = """
backend: fake_engine
instances: {count: 2}
parameters: {step_seconds: 0.001}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    kind, BACKENDS[fake_engine.KIND.name] = BACKENDS.get(fake_engine.KIND.name), fake_engine.KIND
    spec = "instances: {isolation: thread}\nversion_policy: {latest: 3}\n"
    for version in (1, 2):
        write_model(folder, "same", IDENTITY, spec=spec, version=version)
    (folder / "echo").mkdir()
    (folder / "echo" / "model.yaml").write_text(ENGINE)
    (folder / "echo" / "words.txt").write_text("none")
    settings = RepositorySettings(sources=(str(folder),), cache_folder=folder / ".cache")
    repository = ModelRepository(settings, Metrics(), ForkServer("critical", "json"))
    await repository.start()
    assert repository.failures() == {}
    yield repository
    await repository.stop(0.0)
    if kind is None:
        del BACKENDS[fake_engine.KIND.name]


class House:
    def __init__(self, repository, upstreams=(), **policies) -> None:
        self.settings = GatewaySettings(models=policies)
        self.counts = Counts()
        upstreams = dict(upstreams)
        self.dispatch = Dispatch(
            repository, lambda: self.settings, lambda model: upstreams.get(model, ()), self.counts, allowed=lambda caller, model: True
        )

    async def ask(self, request):
        async with asyncio.timeout(SECONDS), aclosing(self.dispatch.infer(request)) as responses:
            return [response async for response in responses]


@pytest.fixture
def house(repository):
    return lambda upstreams=(), **policies: House(repository, upstreams, **policies)


class Sink:
    def __init__(self) -> None:
        self.responses = []
        self.closed = asyncio.get_running_loop().create_future()

    def respond(self, response) -> None:
        self.responses.append(response)

    def close(self, error) -> None:
        self.closed.set_result(error)


async def submit(house, request):
    sink = Sink()
    house.dispatch.submit(request, sink)
    assert await asyncio.wait_for(sink.closed, SECONDS) is None
    return sink.responses


def same(**fields):
    return Request(model="same", inputs={"input": np.zeros((1, 4), np.float32)}, **fields)


def prompt(text, **sampling):
    return Request(model="echo", prompt=Generate(text=text, stream=True, sampling=Sampling(**sampling)))


def text_of(responses):
    return "".join(response.delta.text for response in responses)


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


# Versions


async def test_without_traffic_the_default_version_answers_and_nothing_is_in_between(house, repository):
    front = house()
    (response,) = await submit(front, same())
    assert response.version == "2" and response.headers == {}
    assert (await front.ask(same(version="1")))[0].version == "1"
    assert front.dispatch._known["same"].direct
    with pytest.raises(NotFound):
        await front.ask(same(version="9"))


async def test_traffic_is_split_over_versions_and_a_session_stays_with_its_own(house):
    front = house(same=ModelPolicy(traffic={"1": 0.5, "2": 0.5}))
    counted = Counter([(await submit(front, same()))[0].version for _ in range(100)])
    assert set(counted) == {"1", "2"} and min(counted.values()) > 20
    assert len({(await submit(front, same(session="mine")))[0].version for _ in range(20)}) == 1
    assert {(await submit(front, same(version="2")))[0].version for _ in range(20)} == {"2"}


async def test_published_routes_go_before_the_settings_and_the_previous_ones_are_a_rollback(house):
    front = house(same=ModelPolicy(traffic={"2": 1.0}))
    before = front.dispatch.routes
    front.dispatch.routes = Routes({"same": (("1", 1.0), ("2", 0.0))})
    assert {(await submit(front, same()))[0].version for _ in range(10)} == {"1"}
    front.dispatch.routes = before
    assert {(await submit(front, same()))[0].version for _ in range(10)} == {"2"}


async def test_the_share_of_a_version_that_is_not_loaded_goes_to_the_others(house):
    front = house(same=ModelPolicy(traffic={"1": 0.1, "9": 0.9}))
    assert {(await submit(front, same()))[0].version for _ in range(10)} == {"1"}
    front = house(same=ModelPolicy(traffic={"9": 1.0}))
    assert (await submit(front, same()))[0].version == "2"


async def test_a_model_here_stands_in_for_another_server_that_is_gone(house):
    (away,) = [FakePlace(VirtualTime(), "away")]
    away.ready = False
    front = house({"away": [away]}, away=ModelPolicy(routing=RoutingSettings(fallback=("same",))))
    request = same()
    request.model = "away"
    (response,) = await submit(front, request)
    assert (response.model, response.headers) == ("same", {"x-fairlead-fallback": "same"})


# Replicas of an engine


async def test_prompts_that_begin_alike_meet_in_one_replicas_prefix_cache(house, repository):
    front = house(echo=ModelPolicy(routing=RoutingSettings(temperature=0.01)))
    instances = repository.find("echo").instances
    begun = [f"conversation {n} has words " * 40 for n in range(8)]
    for text in begun:
        await front.ask(prompt(text, max_tokens=1))
    cached = []
    for text in begun:
        usage = (await front.ask(prompt(text + "and more ", max_tokens=1)))[-1].delta.usage
        cached.append(usage.cached_tokens)
    assert all(number >= 144 for number in cached), "of 160 words, in blocks of 16"
    assert len(instances) == 2 and not front.dispatch._known["echo"].direct


async def test_replicas_share_what_is_under_way(house, repository):
    front = house()
    streams = [front.dispatch.infer(prompt(f"{n} !forever ")) for n in range(6)]
    async with asyncio.timeout(SECONDS):
        for stream in streams:
            await anext(stream)
        assert [instance.num_in_flight for instance in repository.find("echo").instances] == [3, 3]
        for stream in streams:
            await stream.aclose()
    assert all(not each.load.in_flight for each in front.dispatch._known["echo"].choices.all())


async def test_a_replica_that_dies_before_the_first_word_costs_its_callers_nothing(house, repository):
    front = house(echo=ModelPolicy(routing=RoutingSettings(retry_budget=1.0)))
    instances = repository.find("echo").instances
    doomed = instances[0]
    os.kill(doomed.pid, signal.SIGSTOP)  # so that nothing is answered before it dies
    asked = [asyncio.ensure_future(front.ask(prompt(f"request {n} "))) for n in range(12)]
    await until(lambda: doomed.num_in_flight >= 5)
    os.kill(doomed.pid, signal.SIGKILL)
    answers = await asyncio.gather(*asked)
    assert [text_of(each) for each in answers] == [f"request {n} " for n in range(12)]
    retried = sum("x-fairlead-attempts" in each[0].headers for each in answers)
    assert retried == front.counts.get("fairlead_gateway_retries_total", "echo", "replica-died") >= 5
    # one death is one failure, however many it hit: as soon as the replica is back, it is used
    await until(lambda: doomed.ready)
    assert front.counts.get("fairlead_gateway_breaker_opened_total", "echo", "echo@1#0", "failures") == 0


async def test_a_request_that_kills_is_not_handed_round(house, repository):
    front = house(echo=ModelPolicy(routing=RoutingSettings(retries=5, retry_budget=1.0)))
    instances = repository.find("echo").instances
    restarts = sum(instance.restarts for instance in instances)
    with pytest.raises(ReplicaDied):
        await front.ask(prompt("!crash "))
    await until(lambda: all(instance.ready for instance in instances))
    assert sum(instance.restarts for instance in instances) == restarts + 2
    assert text_of(await front.ask(prompt("again "))) == "again "


# Other servers


async def test_a_server_that_is_gone_costs_its_callers_nothing_while_another_answers(house):
    asked = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])))
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        urls = [f"http://127.0.0.1:{port}" for port in (closed.getsockname()[1], server.sockets[0].getsockname()[1])]
        policy = ModelPolicy(routing=RoutingSettings(retry_budget=1.0, breaker=Breaker(failures=3)))
        upstreams = [UpstreamPlace("gpt", Upstream(url=url)) for url in urls]
        front = house({"gpt": upstreams}, gpt=policy)
        raw = Raw(path="/v1/chat/completions", body=b'{"model":"gpt","messages":[]}')
        answers = [(await submit(front, Request(model="gpt", raw=raw)))[0] for _ in range(20)]
        assert [each.status for each in answers] == [200] * 20 and len(asked) == 20
        retried = sum("x-fairlead-attempts" in each.headers for each in answers)
        assert retried == front.counts.get("fairlead_gateway_retries_total", "gpt", "unavailable") == 3
        assert front.counts.get("fairlead_gateway_breaker_opened_total", "gpt", urls[0], "failures") == 1
        for upstream in upstreams:
            await upstream.close()
    server.close()
    await server.wait_closed()
