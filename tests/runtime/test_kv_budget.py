"""KV memory of several engines on one device: who gets how much, who is told no, and what comes back."""

import asyncio

import pytest

from fairlead.core.errors import LoadError
from fairlead.core.specs import InstancesSpec, LlmSpec, ModelSpec
from fairlead.runtime.kv_budget import Holding, KvBudget, share_of, to_yield

MIB = 1 << 20


def holdings(**held):
    budget = KvBudget()
    return [Holding(budget, name, "cpu", num_bytes) for name, num_bytes in held.items()]


def spec(device="cpu", count=1, **llm):
    return ModelSpec(name="m", llm=LlmSpec(**llm), instances=InstancesSpec(device=device, count=count))


def test_a_replica_may_take_its_part_of_half_of_what_is_left_and_of_all_of_it_for_one_sequence():
    share = share_of(800, holdings(a=200), device="cpu", count=3, declared=0)
    assert (share.num_bytes, share.most) == (100, 200)
    assert "for 3 instances" in share.why and "others hold a " in share.why


def test_who_holds_what_is_told_where_nothing_is_left():
    share = share_of(5 * MIB, holdings(qwen=3 * MIB, llama=2 * MIB, sleeper=0), device="cpu", count=1, declared=0)
    assert (share.num_bytes, share.most) == (0, 0)
    assert "others hold llama 2.0 MiB, qwen 3.0 MiB" in share.why and "sleeper" not in share.why


def test_what_a_model_declares_is_refused_before_it_is_loaded():
    held = holdings(qwen=3 * MIB)
    share_of(5 * MIB, held, device="cpu", count=2, declared=MIB)
    with pytest.raises(LoadError, match=r"takes 2 x `llm.kv_cache_bytes` of 2.0 MiB, and of .*5.0 MiB, others hold qwen 3.0 MiB"):
        share_of(5 * MIB, held, device="cpu", count=2, declared=2 * MIB)


def test_a_cpu_without_a_budget_has_half_of_what_is_free_when_the_first_engine_comes():
    free = [1000]
    budget = KvBudget(free=lambda: free[0])
    assert budget.share(spec()).num_bytes == 250
    free[0] = 10  # what others use meanwhile is theirs
    assert budget.total("cpu") == 500


def test_a_device_is_found_by_its_number_or_by_its_kind():
    budget = KvBudget({"cuda": 100, "cuda:1": 300})
    assert [budget.total(device) for device in ("cuda:0", "cuda:1", "cuda:2")] == [100, 300, 100]
    assert budget.share(spec("cuda")).most == 100
    budget.hold("a", "cuda", 40)
    assert budget.share(spec("cuda:0")).most == 60 and budget.share(spec("cuda:1")).most == 300
    assert KvBudget().share(spec("cuda")) is None, "its engines look at what the device has left"


def test_the_longest_idle_make_room_and_only_where_that_is_enough():
    idle = [(30.0, 100), (10.0, 50), (20.0, 70)]
    assert to_yield(0, idle) == []
    assert to_yield(50, idle) == [1]
    assert to_yield(51, idle) == [1, 2]
    assert to_yield(220, idle) == [1, 2, 0]
    assert to_yield(221, idle) == []


class Dozing:
    awake = True

    def __init__(self, holding, idle_since):
        self.holding, self.idle_since = holding, idle_since
        holding.sleeper = self

    async def doze(self):
        self.awake, self.holding.num_bytes = False, 0


async def test_what_is_taken_again_may_need_another_to_fall_asleep():
    budget = KvBudget({"cpu": 100})
    busy, old, young, mine = (budget.hold(name, "cpu", num) for name, num in (("busy", 40), ("old", 30), ("young", 30), ("mine", 0)))
    sleepers = [Dozing(busy, None), Dozing(old, 1.0), Dozing(young, 2.0)]
    await mine.take(20)
    assert [each.awake for each in sleepers] == [True, False, True] and budget.left("cpu") == 10
    with pytest.raises(LoadError, match="others hold busy .*mine .*young"):
        await old.take(90)
    young.forget()
    young.forget()
    await old.take(40)
    assert budget.left("cpu") == 0


async def test_who_takes_again_waits_until_it_is_known_what_the_one_that_loads_took():
    budget = KvBudget({"cpu": 100})
    mine = budget.hold("mine", "cpu", 0)
    async with budget.turn("cpu"):
        taking = asyncio.create_task(mine.take(60))
        await asyncio.sleep(0)
        assert not taking.done()
        budget.hold("other", "cpu", 50)
    with pytest.raises(LoadError, match="others hold other"):
        await taking
