"""Versions that sleep: the states, and stories over real replica processes with the fake engine."""

import asyncio
import os
import signal
from contextlib import aclosing

import pytest
import pytest_asyncio

from fairlead.backends import BACKENDS, fake_engine, fake_painter
from fairlead.core.errors import LoadError, QueueFull, ShuttingDown, TimeoutExpired, Unavailable, Unsupported
from fairlead.core.generation import Generate
from fairlead.core.request import Request
from fairlead.core.specs import InstancesSpec, LlmSpec, ModelSpec, SleepSpec
from fairlead.gateway.routing.places import places_of
from fairlead.runtime import sleep as module
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.kv_budget import KvBudget
from fairlead.runtime.loading import load_version
from fairlead.runtime.replicas import replicas_of
from fairlead.runtime.sleep import Sleep, State, due

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECONDS = 60.0
BLOCK_BYTES = fake_engine.BLOCK_BYTES


async def test_what_is_idle_falls_asleep_when_its_time_has_come():
    assert due(100.0, 30.0, 100.0) == 30.0
    assert due(100.0, 30.0, 120.0) == 10.0
    assert due(100.0, 30.0, 131.0) == 0.0


# The states, with processes that do as they are told


class FakeProcess:
    def __init__(self):
        self.did = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure = None

    async def sleep(self):
        self.did.append("sleep")
        await self.gate.wait()

    async def wake(self):
        self.did.append("wake")
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure

    async def close(self):
        self.did.append("close")
        await self.gate.wait()


class Waiting:
    def __init__(self):
        self.ends = []

    def resume(self):
        self.ends.append("resumed")

    def refuse(self, error):
        self.ends.append(error)


class House:
    """One version that sleeps, on a clock of its own."""

    def __init__(self, *, light=True, **spec):
        self.now = 1000.0
        self.process = FakeProcess()
        self.running = asyncio.Event()
        self.running.set()
        self.changes = 0
        self.sleep = Sleep(
            SleepSpec(**spec), "m", [self.process], None, light=light, settle=self._settle, on_change=self._changed, clock=lambda: self.now
        )

    async def _settle(self, timeout):
        await self.running.wait()

    def _changed(self):
        self.changes += 1


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


async def test_two_who_wake_it_at_once_start_it_once():
    house = House()
    await house.sleep.sleep(1.0)
    await house.sleep.sleep(1.0)
    assert house.process.did == ["close"] and house.sleep.state is State.ASLEEP
    await asyncio.gather(house.sleep.wake(), house.sleep.wake())
    await house.sleep.wake()
    assert house.process.did == ["close", "wake"] and (house.sleep.wakes, house.changes) == (1, 2)


async def test_a_request_that_comes_while_it_falls_asleep_waits_and_wakes_it():
    house, request = House(), Waiting()
    house.running.clear()
    falling = asyncio.create_task(house.sleep.sleep(1.0))
    await until(lambda: house.sleep.state is State.FALLING)
    house.sleep.park(request, 0.0)
    assert request.ends == []
    house.running.set()
    await falling
    await until(lambda: request.ends)
    assert request.ends == ["resumed"] and house.process.did == ["close", "wake"]


async def test_wake_manual_refuses_requests_until_somebody_wakes_it():
    house, request = House(wake="manual"), Waiting()
    await house.sleep.sleep(0.0)
    assert not house.sleep.takes_requests
    with pytest.raises(Unavailable, match="is asleep: `fairlead models wake m` wakes it"):
        house.sleep.park(request, 0.0)
    house.process.gate.clear()
    waking = asyncio.create_task(house.sleep.wake())
    await until(lambda: house.sleep.state is State.WAKING)
    house.sleep.park(request, 0.0)
    house.process.gate.set()
    await waking
    await until(lambda: request.ends == ["resumed"])


async def test_what_cannot_be_loaded_refuses_those_that_wait_and_is_not_tried_at_each_request():
    house, first, second = House(), Waiting(), Waiting()
    await house.sleep.sleep(0.0)
    house.process.failure = LoadError("its weights are gone")
    house.sleep.park(first, 0.0)
    await until(lambda: first.ends)
    assert "cannot be woken: its weights are gone" in first.ends[0].message and first.ends[0].retry_after == module.RETRY_SECONDS
    with pytest.raises(Unavailable, match="its weights are gone") as refused:
        house.sleep.park(second, 0.0)
    assert refused.value.retry_after == module.RETRY_SECONDS
    with pytest.raises(LoadError, match="its weights are gone"):
        await house.sleep.wake()
    house.now += module.RETRY_SECONDS
    house.process.failure = None
    house.sleep.park(second, 0.0)
    await until(lambda: second.ends == ["resumed"])
    assert house.sleep.refused == ""


async def test_requests_wait_so_long_and_so_many(monkeypatch):
    monkeypatch.setattr(module, "MAX_PARKED", 2)
    house, hasty, patient = House(wait_seconds=0.02), Waiting(), Waiting()
    await house.sleep.sleep(0.0)
    house.process.gate.clear()
    house.sleep.park(hasty, 0.001)
    house.sleep.park(patient, 0.0)
    with pytest.raises(QueueFull):
        house.sleep.park(Waiting(), 0.0)
    await until(lambda: hasty.ends and patient.ends)
    assert isinstance(hasty.ends[0], TimeoutExpired)
    assert "did not wake within 0.02 s" in patient.ends[0].message and patient.ends[0].retry_after > 0
    house.process.gate.set()
    await until(lambda: house.sleep.awake)
    assert len(hasty.ends) == len(patient.ends) == 1


async def test_one_that_left_is_not_resumed():
    house, gone = House(), Waiting()
    await house.sleep.sleep(0.0)
    house.sleep.park(gone, 0.0)
    house.sleep.leave(gone)
    await until(lambda: house.sleep.awake)
    assert gone.ends == []


async def test_unloading_ends_what_goes_on():
    house, request = House(), Waiting()
    await house.sleep.sleep(0.0)
    house.process.gate.clear()
    house.sleep.park(request, 0.0)
    waking = asyncio.create_task(house.sleep.wake())
    await until(lambda: house.sleep.state is State.WAKING)
    closing = asyncio.create_task(house.sleep.close())
    await asyncio.sleep(0)
    house.process.gate.set()
    await closing
    assert isinstance(request.ends[0], ShuttingDown)
    with pytest.raises(ShuttingDown):
        await waking
    with pytest.raises(ShuttingDown):
        await house.sleep.sleep(0.0)


async def test_unloading_ends_what_falls_asleep():
    house = House()
    house.running.clear()
    falling = asyncio.create_task(house.sleep.sleep(1.0))
    await until(lambda: house.sleep.state is State.FALLING)
    await house.sleep.close()
    with pytest.raises(ShuttingDown):
        await falling
    assert house.process.did == []


async def test_at_level_1_its_processes_stay_and_it_can_sleep_deeper():
    house = House(level=1)
    await house.sleep.sleep(1.0)
    assert house.process.did == ["sleep"] and house.sleep.level == 1
    await house.sleep.sleep(1.0, 2)
    assert house.process.did == ["sleep", "close"] and house.sleep.level == 2
    await house.sleep.sleep(1.0, 1)
    await house.sleep.wake()
    assert house.process.did == ["sleep", "close", "wake"] and house.sleep.level == 0


async def test_processes_that_stayed_and_cannot_be_woken_end():
    house = House()
    await house.sleep.sleep(1.0, 1)
    house.process.failure = LoadError("others have the memory of its device")
    with pytest.raises(LoadError):
        await house.sleep.wake()
    assert house.process.did == ["sleep", "wake", "close"]
    assert (house.sleep.state, house.sleep.level) == (State.ASLEEP, 2)


async def test_level_1_is_of_those_that_have_kv_memory():
    house = House(light=False)
    with pytest.raises(Unsupported, match="cannot sleep at `level` 1: it has no KV memory"):
        await house.sleep.sleep(1.0, 1)
    assert house.sleep.awake
    await house.sleep.sleep(1.0, 2)


async def test_it_falls_asleep_by_itself_unless_a_request_came_first():
    house = House(idle_seconds=0.01)
    house.sleep.busy()
    house.sleep.idle()
    house.sleep.busy()
    house.now += 1.0
    await house.sleep.doze()
    assert house.sleep.awake, "a request runs"
    house.sleep.idle()
    house.now += 1.0
    await until(lambda: house.sleep.state is State.ASLEEP)
    await house.sleep.close()


# Stories over real processes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forkserver():
    server = ForkServer("critical", "json")
    yield server
    await server.close()


@pytest_asyncio.fixture(loop_scope="module")
async def load(forkserver, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, fake_engine.KIND.name, fake_engine.KIND)
    loaded, budget = [], KvBudget({"cpu": 8 * BLOCK_BYTES})

    async def load(name="echo", blocks=8, **fields):
        llm = LlmSpec(**fields.pop("llm", {}))
        spec = ModelSpec(name=name, backend="fake_engine", parameters={"num_blocks": blocks}, llm=llm, **fields)
        version = await load_version(spec, "1", tmp_path, forkserver, budget)
        loaded.append(version)
        return version

    load.budget = budget
    yield load
    await asyncio.gather(*(version.drain(0.0) for version in loaded))


async def answer(version, text="a b c ", place=None):
    request = Request(model=version.name, prompt=Generate(text=text, stream=True))
    async with asyncio.timeout(SECONDS), aclosing((place or version).infer(request)) as responses:
        return "".join([response.delta.text async for response in responses])


async def test_engines_share_a_budget_and_one_that_does_not_fit_is_told_who_holds_it(load):
    budget, first, second = load.budget, await load("first"), await load("second")
    assert [version.info.num_kv_blocks for version in (first, second)] == [4, 2], "half of what is left, each"
    with pytest.raises(LoadError, match=r"`llm.kv_cache_bytes` of .*others hold first@1 .*, second@1"):
        await load("third", llm={"kv_cache_bytes": 4 * BLOCK_BYTES})
    assert budget.left("cpu") == 2 * BLOCK_BYTES, "one that failed holds nothing"
    await first.drain(SECONDS)
    third = await load("third", llm={"kv_cache_bytes": 3 * BLOCK_BYTES}, instances=InstancesSpec(count=2))
    assert budget.left("cpu") == 0 and third.holding.num_bytes == 6 * BLOCK_BYTES


async def test_those_that_are_loaded_at_once_do_not_promise_the_same_bytes_twice(load):
    versions = await asyncio.gather(*(load(name) for name in "abc"))
    assert sorted(version.info.num_kv_blocks for version in versions) == [1, 2, 4]
    assert load.budget.left("cpu") == BLOCK_BYTES


async def test_a_request_wakes_a_model_that_sleeps_and_is_answered(load):
    version = await load(instances=InstancesSpec(count=2))
    (place, _) = places_of(version)
    assert await answer(version) == "a b c "
    pids = {instance.pid for instance in version.instances}
    held = version.holding.num_bytes
    await version.sleep.sleep(SECONDS)
    assert {instance.pid for instance in version.instances} == {None}
    assert [replica.state for replica in replicas_of(version)] == ["asleep", "asleep"]
    assert version.holding.num_bytes == version.metrics.kv_bytes == 0 and version.ready and place.ready
    assert await answer(version, place=place) == "a b c "
    assert not pids & {instance.pid for instance in version.instances}
    assert version.holding.num_bytes == version.metrics.kv_bytes == held and version.metrics.wakes == 1
    assert version.stats.num_generated_tokens >= 3, "what was counted before it slept stays"


async def test_at_level_1_a_model_gives_its_kv_memory_to_others_and_keeps_its_processes(load):
    version, budget = await load(instances=InstancesSpec(count=2), sleep=SleepSpec(level=1)), load.budget
    assert await answer(version) == "a b c "
    pids, held = [instance.pid for instance in version.instances], version.holding.num_bytes
    await version.sleep.sleep(SECONDS)
    assert [instance.pid for instance in version.instances] == pids and None not in pids
    assert [replica.state for replica in replicas_of(version)] == ["asleep", "asleep"]
    assert version.holding.num_bytes == version.metrics.kv_bytes == 0 and budget.left("cpu") == budget.total("cpu")
    assert await answer(version) == "a b c "
    assert [instance.pid for instance in version.instances] == pids and version.holding.num_bytes == held
    # Where others took that memory meanwhile, it stays asleep, with its processes
    await version.sleep.sleep(SECONDS)
    other = await load("other", llm={"kv_cache_bytes": 6 * BLOCK_BYTES})
    with pytest.raises(Unavailable, match="others hold other@1"):
        await answer(version)
    assert version.sleep.level == 1 and [instance.pid for instance in version.instances] == pids
    await other.drain(SECONDS)
    await version.sleep.wake()
    assert await answer(version) == "a b c "


async def test_a_process_that_dies_in_light_sleep_is_loaded_anew_by_a_request(load):
    version = await load(sleep=SleepSpec(level=1))
    (instance,) = version.instances
    await version.sleep.sleep(SECONDS)
    pid = instance.pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: instance.pid is None)
    assert [replica.state for replica in replicas_of(version)] == ["asleep"]
    assert await answer(version) == "a b c "
    assert instance.pid not in (None, pid) and instance.restarts == 0


async def test_one_in_light_sleep_can_be_unloaded(load):
    version, budget = await load(), load.budget
    await version.sleep.sleep(SECONDS, 1)
    await version.drain(SECONDS)
    assert budget.left("cpu") == budget.total("cpu") and version.instances[0].pid is None


async def test_what_runs_ends_before_it_sleeps_and_what_takes_too_long_is_cut_off(load):
    version = await load()
    running = asyncio.create_task(answer(version, "!forever "))
    await until(lambda: version.sleep.idle_since is None)
    await version.sleep.sleep(0.0)
    with pytest.raises(Unavailable, match="was put to sleep before it answered"):
        await running


async def test_a_model_that_cannot_have_its_memory_back_says_who_has_it(load):
    sleeper = await load("sleeper")
    await sleeper.sleep.sleep(SECONDS)
    other = await load("other", llm={"kv_cache_bytes": 6 * BLOCK_BYTES})
    with pytest.raises(Unavailable, match="cannot be woken: there is no KV memory for it.* others hold other@1"):
        await answer(sleeper)
    await other.drain(SECONDS)
    await sleeper.sleep.wake()
    assert await answer(sleeper) == "a b c "


async def test_an_idle_one_that_may_sleep_makes_room_for_one_that_wakes(load):
    first = await load("first", sleep=SleepSpec(idle_seconds=3600.0))
    await first.sleep.sleep(SECONDS)
    second = await load("second", llm={"kv_cache_bytes": 6 * BLOCK_BYTES}, sleep=SleepSpec(idle_seconds=3600.0))
    assert await answer(first) == "a b c "
    assert second.sleep.state is State.ASLEEP
    assert await answer(second) == "a b c "
    assert first.sleep.state is State.ASLEEP


async def test_one_whose_process_is_dead_sleeps_and_wakes(load):
    version = await load()
    with pytest.raises(Exception, match="died"):
        await answer(version, "!crash ")
    await version.sleep.sleep(SECONDS)
    assert version.sleep.state is State.ASLEEP
    assert await answer(version) == "a b c "


async def test_it_can_be_unloaded_while_it_sleeps_and_while_it_wakes(load):
    version, budget = await load(), load.budget
    await version.sleep.sleep(SECONDS)
    request = asyncio.create_task(answer(version))
    await until(lambda: version.sleep.state is State.WAKING)
    await version.drain(SECONDS)
    with pytest.raises(ShuttingDown):
        await request
    assert budget.left("cpu") == budget.total("cpu") and {instance.pid for instance in version.instances} == {None}


async def test_light_sleep_is_of_those_that_have_kv_memory(forkserver, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, fake_painter.KIND.name, fake_painter.KIND)
    with pytest.raises(LoadError, match="`sleep.level` is 1, and this model has no KV memory"):
        await load_version(ModelSpec(name="art", backend="fake_painter", sleep=SleepSpec(level=1)), "1", tmp_path, forkserver)
    version = await load_version(ModelSpec(name="art", backend="fake_painter"), "1", tmp_path, forkserver)
    with pytest.raises(Unsupported, match="`level` 2 ends its process"):
        await version.sleep.sleep(SECONDS, 1)
    await version.sleep.sleep(SECONDS)
    assert version.sleep.level == 2
    await version.drain(SECONDS)


async def test_sleep_is_of_engines_alone(forkserver, tmp_path):
    (tmp_path / "model.py").write_text("class M:\n    def infer(self, inputs):\n        return inputs\n")
    with pytest.raises(LoadError, match="`sleep` is for models with an engine of Fairlead's own"):
        await load_version(ModelSpec(name="m", sleep=SleepSpec(idle_seconds=1.0)), "1", tmp_path, forkserver)
