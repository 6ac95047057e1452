"""The gateway's end of an engine's wire. The replica is played by the test."""

import asyncio
import os
import socket

import pytest

from fairlead.backends import fake_engine
from fairlead.core.errors import InvalidRequest, LoadError, QueueFull, ReplicaDied, TooLarge, Unavailable
from fairlead.core.generation import Delta, EngineInfo, EngineStats, Generate, Usage
from fairlead.core.logs import Levels
from fairlead.core.specs import LlmSpec, ModelSpec
from fairlead.runtime.engine_instance import EngineInstance
from fairlead.runtime.forkserver import Process
from fairlead.runtime.wire import Answer, Connection, Frame, Kind, Ready

SECONDS = 20.0
INFO = EngineInfo(tasks=("generate",), max_model_len=64, vocab_size=8)
PROMPT = Generate(text="to be")


class Puppets:
    """A fork server whose processes are ends of sockets that the test holds."""

    def __init__(self) -> None:
        self.spawned: asyncio.Queue[Puppet] = asyncio.Queue()
        self.levels: Levels = {}

    async def spawn(self, descriptors, modules=(), *, mark=""):
        puppet = Puppet(socket.socket(fileno=os.dup(descriptors[0])))
        await asyncio.get_running_loop().create_unix_connection(lambda: puppet.connection, sock=puppet.sock)
        self.spawned.put_nowait(puppet)
        return puppet.process

    def kill(self, process):
        if not process.exited.done():
            process.exited.set_result(-9)
        return True

    async def next(self):
        return await asyncio.wait_for(self.spawned.get(), SECONDS)


class Puppet:
    def __init__(self, sock) -> None:
        self.sock = sock
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.hung_up = asyncio.Event()
        self.connection = Connection("gateway", lambda frame, _: self.frames.put_nowait(frame), self.hung_up.set)
        self.process = Process(1, asyncio.get_running_loop().create_future())

    async def got(self) -> Frame:
        return await asyncio.wait_for(self.frames.get(), SECONDS)

    async def load(self, info=INFO) -> None:
        assert (await self.got()).kind is Kind.LOAD
        self.connection.send(Frame(Kind.READY, ready=Ready(engine=info)))

    def answer(self, *answers: Answer) -> None:
        self.connection.send(Frame(Kind.DELTAS, answers=list(answers)))


class Heard:
    """A consumer."""

    def __init__(self) -> None:
        self.deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self.closed = asyncio.get_running_loop().create_future()

    def respond(self, delta) -> None:
        assert not self.closed.done()
        self.deltas.put_nowait(delta)

    def close(self, error) -> None:
        self.closed.set_result(error)

    async def next(self) -> str:
        return (await asyncio.wait_for(self.deltas.get(), SECONDS)).text

    async def end(self):
        return await asyncio.wait_for(self.closed, SECONDS)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Playing:
    """A started instance and the puppet behind it."""

    def __init__(self, clock, **llm) -> None:
        self.puppets, self.changes = Puppets(), asyncio.Queue()
        spec = ModelSpec(name="m", llm=LlmSpec(**llm))
        self.instance = EngineInstance(
            spec,
            "artefact",
            fake_engine.KIND,
            1,
            self.puppets,
            lambda: self.changes.put_nowait(self.instance.ready),
            clock=clock,
        )

    async def start(self, info=INFO):
        starting = asyncio.ensure_future(self.instance.start(SECONDS))
        self.puppet = await self.puppets.next()
        await self.puppet.load(info)
        await asyncio.wait_for(starting, SECONDS)
        return self

    def ask(self) -> Heard:
        heard = Heard()
        heard.work = self.instance.submit(PROMPT, heard, priority=3, age=0.5, timeout=2.0)
        return heard

    async def changed(self) -> bool:
        return await asyncio.wait_for(self.changes.get(), SECONDS)

    async def told(self, stats: EngineStats) -> None:
        """Frames come in order: what follows STATS has not overtaken it."""
        marker = self.ask()
        self.puppet.connection.send(Frame(Kind.STATS, stats=stats))
        self.puppet.answer(Answer(marker.work, Delta(usage=Usage())))
        await marker.end()


@pytest.fixture
async def play():
    playing = []

    async def play(clock=None, **llm):
        each = Playing(clock or Clock(), **llm)
        playing.append(each)
        return await each.start()

    yield play
    for each in playing:
        closing = asyncio.ensure_future(each.instance.close())
        each.puppet.connection.abort()
        await closing


async def test_many_requests_are_under_way_at_once_and_each_hears_its_own(play):
    it = await play()
    one, two = it.ask(), it.ask()
    sent = await it.puppet.got()
    assert (sent.kind, sent.work, sent.generation.prompt) == (Kind.GENERATE, one.work, PROMPT)
    assert (sent.generation.priority, sent.generation.age, sent.generation.timeout) == (3, 0.5, 2.0)
    it.puppet.answer(Answer(one.work, Delta(text="or ")), Answer(two.work, Delta(text="that ")))
    it.puppet.answer(Answer(two.work, Delta(text="is", usage=Usage(completion_tokens=2))))
    assert [await one.next(), await two.next(), await two.next()] == ["or ", "that ", "is"]
    assert await two.end() is None
    assert it.instance.num_in_flight == 1 and not one.closed.done()


async def test_an_error_ends_the_request_that_it_is_about(play):
    it = await play()
    one, two = it.ask(), it.ask()
    it.puppet.answer(Answer(one.work, None, "InvalidRequest", "too long"), Answer(two.work, Delta(text="on")))
    error = await one.end()
    assert isinstance(error, InvalidRequest) and error.message == "too long"
    assert await two.next() == "on"


async def test_who_leaves_hears_nothing_more_and_the_replica_is_told_at_once(play):
    it = await play()
    gone, stays = it.ask(), it.ask()
    await it.puppet.got(), await it.puppet.got()
    it.instance.cancel(gone.work)
    it.instance.cancel(gone.work)
    # What was on its way when the cancellation crossed it
    it.puppet.answer(Answer(gone.work, Delta(text="late")), Answer(stays.work, Delta(text="here")))
    assert await stays.next() == "here"
    cancelled = await it.puppet.got()
    assert (cancelled.kind, cancelled.work) == (Kind.CANCEL, gone.work)
    assert gone.deltas.empty() and not gone.closed.done() and it.puppet.frames.empty()


async def test_more_than_the_engine_can_hold_are_refused_with_the_time_that_places_take_to_free(play):
    clock = Clock()
    it = await play(clock, max_num_seqs=8, max_waiting=8)
    asked = [it.ask() for _ in range(16)]
    with pytest.raises(QueueFull, match="16 requests at once") as refused:
        it.ask()
    assert refused.value.retry_after == 1.0  # nothing has ended yet
    for heard in asked[:3]:
        clock.now += 5.0
        it.puppet.answer(Answer(heard.work, Delta(usage=Usage())))
        await heard.end()
    # Two every ten seconds, and an eighth of sixteen must end
    assert it.instance.retry_after() == pytest.approx(10.0)
    it.puppet.answer(Answer(asked[3].work, None, "QueueFull", "8 requests wait already"))
    error = await asked[3].end()
    assert isinstance(error, QueueFull) and error.retry_after > 1.0
    clock.now += 1e6
    assert it.instance.retry_after() == 60.0
    for heard in asked[4:]:
        it.puppet.answer(Answer(heard.work, Delta(usage=Usage())))
        await heard.end()
    it.ask()
    assert it.instance.retry_after() == 1.0  # another burst: how slow the last one ended says nothing of it


async def test_a_prompt_that_no_frame_holds_is_refused(play, monkeypatch):
    it = await play()
    monkeypatch.setattr("fairlead.runtime.wire.MAX_HEADER_BYTES", 100)
    with pytest.raises(TooLarge, match="request for model 'm'"):
        it.instance.submit(Generate(text="x" * 200), Heard(), priority=0, age=0.0, timeout=0.0)
    assert it.instance.num_in_flight == 0


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.RESPONSE, work=1),
        Frame(Kind.END, work=1),
        Frame(Kind.STATS),
        Frame(Kind.DELTAS, answers=[Answer(2, Delta(text="unasked"))]),
        Frame(Kind.DELTAS, answers=[Answer(-1, Delta(text="unasked"))]),
    ],
    ids=["response", "end", "no stats", "unasked", "negative"],
)
async def test_a_replica_that_speaks_otherwise_is_hung_up_on_and_started_again(play, frame):
    it = await play()
    asked = it.ask()
    it.puppet.connection.send(frame)
    await asyncio.wait_for(it.puppet.hung_up.wait(), SECONDS)
    error = await asked.end()
    assert isinstance(error, ReplicaDied) and "model 'm' died (signal 9)" in error.message
    assert not await it.changed()
    with pytest.raises(Unavailable, match="is being started again"):
        it.ask()
    it.puppet = await it.puppets.next()
    await it.puppet.load()
    assert await it.changed() and it.instance.restarts == 1
    again = it.ask()
    it.puppet.answer(Answer(again.work, Delta(text="back")))
    assert await again.next() == "back"


async def test_counts_outlive_the_replica_and_what_was_true_of_it_does_not(play):
    it = await play()
    counts = EngineStats(num_running=2, num_blocks=9, num_generated_tokens=7, finished={"stop": 3}, step_time=([1, 2], 0.5))
    await it.told(counts)
    assert it.instance.stats == counts
    it.puppet.connection.abort()
    assert not await it.changed()
    it.puppet = await it.puppets.next()
    await it.puppet.load()
    assert await it.changed()
    assert it.instance.stats == EngineStats(num_generated_tokens=7, finished={"stop": 3}, step_time=([1, 2], 0.5))
    await it.told(EngineStats(num_blocks=9, num_generated_tokens=1, finished={"stop": 1, "length": 1}, step_time=([0, 1], 0.25)))
    assert it.instance.stats == EngineStats(
        num_blocks=9, num_generated_tokens=8, finished={"stop": 4, "length": 1}, step_time=([1, 3], 0.75)
    )


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (70, "a step took longer than `llm.step_timeout`"),
        (-27, "a step took longer than `llm.step_timeout`"),
        (71, "step after step failed"),
        (9, "exit code 9"),
    ],
)
async def test_the_exit_code_tells_the_callers_what_happened(play, code, says):
    it = await play()
    asked = it.ask()
    it.puppet.process.exited.set_result(code)
    it.puppet.connection.abort()
    assert (await asked.end()).message == f"model 'm' died ({says}) while computing this request"


async def test_a_replica_without_an_engine_is_not_taken_for_one():
    it = Playing(Clock())
    with pytest.raises(LoadError, match="READY without what is ready"):
        await it.start(info=None)


# Sleep


async def test_it_sleeps_and_wakes_in_its_process(play):
    it = await play()
    sleeping = asyncio.ensure_future(it.instance.sleep())
    assert (await it.puppet.got()).kind is Kind.SLEEP and not it.instance.ready
    it.puppet.connection.send(Frame(Kind.END))
    await sleeping
    with pytest.raises(Unavailable):
        it.ask()
    waking = asyncio.ensure_future(it.instance.wake())
    assert (await it.puppet.got()).kind is Kind.WAKE
    it.puppet.connection.send(Frame(Kind.END))
    await waking
    again = it.ask()
    assert (await it.puppet.got()).work == again.work
    assert it.instance.restarts == 0 and it.puppets.spawned.empty()
    # and a death is followed by another life, as ever
    it.puppet.connection.abort()
    assert not await it.changed()
    it.puppet = await it.puppets.next()
    await it.puppet.load()
    assert await it.changed()


async def test_a_process_that_dies_asleep_is_started_when_it_is_woken_and_not_before(play):
    it = await play()
    sleeping = asyncio.ensure_future(it.instance.sleep())
    await it.puppet.got()
    it.puppet.connection.send(Frame(Kind.END))
    await sleeping
    it.puppet.connection.abort()
    async with asyncio.timeout(SECONDS):
        await it.puppet.process.exited
    assert it.instance.pid is None and it.puppets.spawned.empty()
    waking = asyncio.ensure_future(it.instance.wake())
    it.puppet = await it.puppets.next()
    await it.puppet.load()
    await waking
    assert it.instance.ready and it.instance.restarts == 0


async def test_one_that_does_not_do_as_it_is_told_is_ended(play, monkeypatch):
    # It says that it cannot sleep: it sleeps without a process
    it = await play()
    sleeping = asyncio.ensure_future(it.instance.sleep())
    await it.puppet.got()
    it.puppet.connection.send(Frame(Kind.ERROR, message="RuntimeError: no"))
    assert (await it.puppet.got()).kind is Kind.CLOSE
    it.puppet.connection.abort()
    await sleeping
    assert it.instance.pid is None
    # It gives no answer: the same
    waking = asyncio.ensure_future(it.instance.wake())
    it.puppet = await it.puppets.next()
    await it.puppet.load()
    await waking
    monkeypatch.setattr("fairlead.runtime.engine_instance.SLEEP_SECONDS", 0.01)
    sleeping = asyncio.ensure_future(it.instance.sleep())
    assert [(await it.puppet.got()).kind, (await it.puppet.got()).kind] == [Kind.SLEEP, Kind.CLOSE]
    it.puppet.connection.abort()
    await sleeping


async def test_why_it_cannot_be_woken_is_told(play):
    it = await play()
    sleeping = asyncio.ensure_future(it.instance.sleep())
    await it.puppet.got()
    it.puppet.connection.send(Frame(Kind.END))
    await sleeping
    waking = asyncio.ensure_future(it.instance.wake())
    await it.puppet.got()
    it.puppet.connection.send(Frame(Kind.ERROR, message="OutOfMemoryError: CUDA out of memory"))
    with pytest.raises(LoadError, match="CUDA out of memory"):
        await waking
    waking = asyncio.ensure_future(it.instance.wake())
    await it.puppet.got()
    it.puppet.connection.abort()
    with pytest.raises(LoadError, match="its process died"):
        await waking
