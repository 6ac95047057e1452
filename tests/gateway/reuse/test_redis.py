"""Answers in a real Redis, which is killed, frozen and lied to."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from redis import Redis

from fairlead.core.errors import ConfigError
from fairlead.core.generation import TokenLogprob
from fairlead.core.policy import CacheSettings
from fairlead.core.request import Response
from fairlead.gateway.reuse import redis as module
from fairlead.gateway.reuse.redis import PREFIX, RedisResponses
from fairlead.gateway.reuse.response_cache import Recorder, Stored
from fairlead.observe.counts import Counts
from tests.gateway.limits.servers import RedisServer
from tests.gateway.reuse.questions import delta, told

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder: Path = tmp_path_factory.mktemp("redis")
    running = RedisServer(folder)
    running.start()
    yield running
    running.kill()


@pytest.fixture
async def answers(server: RedisServer) -> AsyncIterator[RedisResponses]:
    server.flush()
    opened = RedisResponses(server.url, Counts(), deadline=5.0)
    yield opened
    await opened.close()


def stored(*responses: Response, ttl: float = 60.0) -> Stored:
    recorder = Recorder("m", "1", 64 << 20)
    for response in responses or (told("hi"),):
        recorder.add(response)
    found = recorder.finish(time.time(), CacheSettings(mode="deterministic", ttl=ttl, stale_seconds=1.0))
    assert found is not None
    return found


async def sent(answers: RedisResponses) -> None:
    while answers._puts:
        await asyncio.wait(set(answers._puts))


async def test_an_answer_of_one_gateway_is_found_by_another(server: RedisServer, answers: RedisResponses):
    logprob = TokenLogprob(token_id=1, token="a", data=b"\xff", logprob=-0.5, rank=1, top=[])
    answer = stored(delta("one", index=1, finish_reason="length"), told("two", token_ids=[1, 2], logprobs=[logprob]))
    answers.put(KEY, answer, time.time())
    await sent(answers)
    other = RedisResponses(server.url, Counts(), deadline=5.0)
    assert await other.get(KEY) == answer
    assert await other.get(bytes(32)) is None
    await other.close()


async def test_tensors_of_every_kind_come_back_bit_for_bit(answers: RedisResponses):
    outputs = {
        "f": np.array([[0.0, -0.0, np.nan]], np.float32),
        "b": np.array([1.5], ml_dtypes.bfloat16),
        "o": np.array([[b"a", b""], [b"\x00", "é".encode()]], object),
        "t": np.array([True, False]),
        "s": np.array(7, np.int64),
        "e": np.zeros((0, 3), np.uint8),
    }
    answers.put(KEY, stored(Response(model="m", version="1", outputs=outputs, parameters={"p": 1})), time.time())
    await sent(answers)
    found = await answers.get(KEY)
    assert found is not None
    (response,) = found.replay()
    assert response.parameters == {"p": 1}
    for name, array in outputs.items():
        back = response.outputs[name]
        assert (back.dtype, back.shape, back.flags.writeable) == (array.dtype, array.shape, False)
        assert back.tolist() == array.tolist() if name == "o" else back.tobytes() == array.tobytes()


async def test_bytes_of_an_upstream_come_back(answers: RedisResponses):
    answers.put(KEY, stored(Response(model="m", version="1", raw=b'{"a":1}', headers={"content-type": "x/y"})), time.time())
    await sent(answers)
    found = await answers.get(KEY)
    assert found is not None and next(found.replay()).raw == b'{"a":1}'


async def test_it_forgets_when_even_a_degraded_request_would_not_take_it(server: RedisServer, answers: RedisResponses):
    answers.put(KEY, stored(ttl=100.0), time.time())
    await sent(answers)
    with Redis.from_url(server.url) as client:
        assert 99_000 < client.pttl(PREFIX + KEY) <= 101_000
    answers.put(KEY, stored(), time.time() + 1000.0)  # it is too old already
    await sent(answers)


async def test_what_is_too_large_is_not_sent(answers: RedisResponses, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_VALUE_BYTES", 1000)
    answers.put(KEY, stored(told("x" * 2000)), time.time())
    await sent(answers)
    assert await answers.get(KEY) is None


@pytest.mark.parametrize("value", [b"", b"junk", b"\x80", b"\x93\x01\x02\x03"])
async def test_what_is_no_answer_is_a_miss(server: RedisServer, answers: RedisResponses, value: bytes):
    with Redis.from_url(server.url) as client:
        client.set(PREFIX + KEY, value)
    assert await answers.get(KEY) is None
    assert answers._counts.get("fairlead_cache_redis_failures_total", "get") == 1


async def test_not_too_many_are_on_their_way(answers: RedisResponses, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_PUTS", 2)
    for number in range(5):
        answers.put(b"%d" % number, stored(), time.time())
    await sent(answers)
    assert answers._counts.get("fairlead_cache_redis_failures_total", "put") == 3


async def test_a_redis_that_hangs_or_is_gone_is_a_miss_and_not_asked_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = RedisServer(tmp_path)
    own.start()
    counts = Counts()
    answers = RedisResponses(own.url, counts, deadline=0.05)
    try:
        answers.put(KEY, stored(), time.time())
        await sent(answers)
        assert await answers.get(KEY) is not None
        own.freeze()
        assert await answers.get(KEY) is None
        own.thaw()
        assert await answers.get(KEY) is None  # for a moment it is left alone
        answers.put(KEY, stored(), time.time())
        assert counts.get("fairlead_cache_redis_failures_total", "get") == 2
        assert counts.get("fairlead_cache_redis_failures_total", "put") == 1
        monkeypatch.setattr(answers, "_deadline", 5.0)
        answers._ask_again = 0.0
        assert await answers.get(KEY) is not None
        own.kill()
        answers._ask_again = 0.0
        assert await answers.get(KEY) is None
    finally:
        own.kill()
        await answers.close()


def test_an_address_that_is_none_is_told_at_the_start():
    with pytest.raises(ConfigError, match="redis_url"):
        RedisResponses("http://localhost", Counts())
