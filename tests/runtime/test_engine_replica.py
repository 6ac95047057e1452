"""The replica's end of an engine's wire. The gateway is played by the test; the engine is the fake one, in this process."""

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest

from fairlead.backends.fake_engine import FakeEngine
from fairlead.core.generation import Embed, Generate, Sampling
from fairlead.core.specs import ModelSpec
from fairlead.runtime import engine_replica, wire
from fairlead.runtime.engine_replica import EngineReplica
from fairlead.runtime.wire import BROKEN_EXIT, Connection, Frame, Generation, Kind

SECONDS = 20.0
FOREVER = Generate(text="!forever on ", stream=True)


class Gateway:
    def __init__(self) -> None:
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.hung_up = asyncio.Event()
        self.connection = Connection("replica", lambda frame, _: self.frames.put_nowait(frame), self.hung_up.set)

    def ask(self, work, text="", **fields) -> None:
        self.send(Kind.GENERATE, work=work, generation=Generation(fields.pop("prompt", Generate(text=text, stream=True)), **fields))

    def send(self, kind, **fields) -> None:
        self.connection.send(Frame(kind, **fields))

    async def next(self, kind) -> Frame:
        """The next frame of that kind."""
        while True:
            frame = await asyncio.wait_for(self.frames.get(), SECONDS)
            if frame.kind is kind:
                return frame

    async def answers(self, num):
        """(work, text or error) of so many."""
        found = []
        while len(found) < num:
            found += [(a.work, a.delta.text if a.delta else a.error) for a in (await self.next(Kind.DELTAS)).answers]
        return found

    async def idle(self):
        """STATS of an engine that has nothing to do."""
        while (frame := await self.next(Kind.STATS)).stats.num_running or frame.stats.num_waiting:
            pass
        return frame.stats

    async def ended(self) -> int:
        return await asyncio.wait_for(asyncio.shield(self.running), SECONDS)


@asynccontextmanager
async def replica(**parameters):
    ours, theirs = socket.socketpair()
    engine = FakeEngine(ModelSpec(name="m", parameters={"step_seconds": 0.001} | parameters))
    gateway = Gateway()
    gateway.running = asyncio.ensure_future(EngineReplica("m", engine, 30.0).run(theirs))
    await asyncio.get_running_loop().create_unix_connection(lambda: gateway.connection, sock=ours)
    try:
        yield gateway
    finally:
        gateway.connection.abort()
        await gateway.ended()


async def test_one_frame_carries_what_one_step_gave():
    async with replica() as gateway:
        gateway.ask(1, prompt=FOREVER)
        gateway.ask(2, prompt=FOREVER)
        while len((frame := await gateway.next(Kind.DELTAS)).answers) == 1:
            pass  # the first came a step earlier
        assert sorted(answer.work for answer in frame.answers) == [1, 2]


async def test_a_cancelled_work_is_silent_at_once_and_its_memory_is_free():
    async with replica(num_blocks=4) as gateway:
        gateway.ask(1, prompt=FOREVER)
        assert await gateway.answers(1) == [(1, "on ")]
        gateway.send(Kind.CANCEL, work=1)
        gateway.send(Kind.CANCEL, work=1)
        stats = await gateway.idle()
        assert (stats.num_free_blocks, stats.finished) == (4, {"abort": 1})
        while not gateway.frames.empty():
            gateway.frames.get_nowait()
        gateway.ask(2, "after ")
        assert await gateway.answers(1) == [(2, "after ")]


async def test_close_lets_what_runs_end():
    async with replica(step_seconds=0.01) as gateway:
        gateway.ask(1, "one two three ")
        await gateway.answers(1)
        gateway.send(Kind.CLOSE)
        assert await gateway.answers(2) == [(1, "two "), (1, "three ")]
        assert await gateway.ended() == 0


async def test_a_gateway_that_is_gone_ends_it_whatever_runs():
    async with replica() as gateway:
        gateway.ask(1, prompt=FOREVER)
        await gateway.answers(1)
        gateway.connection.abort()
        assert await gateway.ended() == 0


async def test_an_engine_that_gives_up_ends_the_process():
    async with replica() as gateway:
        gateway.ask(1, "!break ")
        assert await gateway.ended() == BROKEN_EXIT


@pytest.mark.parametrize(
    "frames",
    [
        [Frame(Kind.INFER, work=1)],
        [Frame(Kind.GENERATE, work=1)],
        [Frame(Kind.GENERATE, work=1, generation=Generation(FOREVER))] * 2,
        [Frame(Kind.DELTAS)],
    ],
    ids=["infer", "no prompt", "twice", "deltas"],
)
async def test_a_gateway_that_speaks_otherwise_is_hung_up_on(frames):
    async with replica() as gateway:
        for frame in frames:
            gateway.connection.send(frame)
        await asyncio.wait_for(gateway.hung_up.wait(), SECONDS)
        assert await gateway.ended() == 0


async def test_a_request_that_arrived_long_ago_is_given_up_by_its_own_time():
    async with replica(step_seconds=0.01) as gateway:
        gateway.ask(1, "late ", age=5.0, timeout=1e-9)
        assert await gateway.answers(1) == [(1, "TimeoutExpired")]


async def test_an_embedding_is_its_vector():
    async with replica() as gateway:
        gateway.ask(1, prompt=Embed(text="to be", dimensions=4))
        (answer,) = (await gateway.next(Kind.DELTAS)).answers
        assert len(answer.delta.vector) == 4 * 4 and answer.delta.usage.prompt_tokens == 2


async def test_answers_that_one_frame_does_not_hold_go_in_several(monkeypatch):
    async with replica() as gateway:
        monkeypatch.setattr(wire, "MAX_HEADER_BYTES", 400)
        texts = {work: chr(96 + work) * 90 for work in range(1, 9)}
        for work, text in texts.items():
            gateway.ask(work, text)
        assert sorted(await gateway.answers(8)) == sorted(texts.items())
        gateway.ask(9, "x " * 100)
        await gateway.answers(100)
        gateway.ask(10, prompt=Generate(text="y " * 100, sampling=Sampling(logprobs=1)))
        assert await gateway.answers(1) == [(10, "ModelError")]


async def test_counts_are_told_while_it_is_busy(monkeypatch):
    monkeypatch.setattr(engine_replica, "STATS_SECONDS", 0.01)
    async with replica() as gateway:
        gateway.ask(1, prompt=FOREVER)
        first, second = await gateway.next(Kind.STATS), await gateway.next(Kind.STATS)
        assert first.stats.num_running + second.stats.num_running > 0
        assert second.stats.num_generated_tokens > first.stats.num_generated_tokens


async def test_an_engine_sleeps_and_wakes_between_requests(monkeypatch):
    async with replica() as gateway:
        words = "one two three four " * 5
        for work in (1, 2):
            gateway.ask(work, words)
            await gateway.answers(20)
        assert (await gateway.idle()).num_prefix_hit_tokens == 16
        gateway.send(Kind.SLEEP)
        await gateway.next(Kind.END)
        gateway.send(Kind.WAKE)
        await gateway.next(Kind.END)
        gateway.ask(3, words)
        await gateway.answers(20)
        assert (await gateway.idle()).num_prefix_hit_tokens == 16, "what the cache knew is gone"

        def full(engine):
            raise MemoryError("no memory left")

        monkeypatch.setattr(FakeEngine, "wake", full)
        gateway.send(Kind.WAKE)
        assert (await gateway.next(Kind.ERROR)).message == "MemoryError: no memory left"
