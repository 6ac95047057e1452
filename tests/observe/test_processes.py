"""CPU and memory of replica processes, life after life."""

import os
import subprocess
import sys

import pytest

from fairlead.observe.processes import Processes, Reading, read_process

KEY = ("m", "1", "0")


class House:
    """Processes that somebody made up."""

    def __init__(self) -> None:
        self.pid: int | None = 7
        self.readings: dict[int, Reading] = {7: Reading(1.0, 2.0, 100)}
        self.now = 0.0
        self.processes = Processes(lambda: [(KEY, self.pid)], self.readings.get, lambda: self.now)

    async def look(self) -> dict[str, float]:
        self.now += 2.0
        await self.processes.look()
        return {name: value for name, labels, value in self.processes.samples() if labels == KEY}


async def test_what_a_replica_used_before_it_died_stays_counted():
    house = House()
    assert await house.look() == {"fairlead_replica_cpu_seconds_total": 2.0, "fairlead_replica_resident_memory_bytes": 100}
    house.readings[7] = Reading(1.0, 5.0, 120)
    assert (await house.look())["fairlead_replica_cpu_seconds_total"] == 5.0
    assert house.processes.replicas[KEY].cpu_percent == 150.0
    del house.readings[7]
    assert await house.look() == {"fairlead_replica_cpu_seconds_total": 5.0}  # it died: it has no memory now
    house.pid = None
    assert await house.look() == {"fairlead_replica_cpu_seconds_total": 5.0}
    house.pid, house.readings[8] = 8, Reading(9.0, 0.5, 90)
    assert await house.look() == {"fairlead_replica_cpu_seconds_total": 5.5, "fairlead_replica_resident_memory_bytes": 90}


async def test_replicas_that_come_while_a_page_is_written_do_not_break_it_off():
    keys = [KEY]
    processes = Processes(lambda: [(key, 7) for key in keys], lambda pid: Reading(1.0, 2.0, 100))
    await processes.look()
    samples = processes.samples()
    while next(samples)[1] != KEY:
        pass
    keys.append(("m", "1", "1"))
    await processes.look()
    assert [name for name, _, _ in samples] == ["fairlead_replica_resident_memory_bytes"]


async def test_a_new_process_with_an_old_ones_number_is_another_life():
    house = House()
    await house.look()
    house.readings[7] = Reading(50.0, 0.5, 80)
    assert (await house.look())["fairlead_replica_cpu_seconds_total"] == 2.5


async def test_a_replica_that_was_unloaded_has_no_series():
    house = House()
    await house.look()
    house.processes._pids = lambda: []
    assert await house.look() == {}


async def test_the_servers_own_process_is_read():
    processes = Processes(lambda: [])
    await processes.look()
    found = {name: value for name, _, value in processes.samples()}
    assert found["process_resident_memory_bytes"] > 1 << 20
    assert found["process_cpu_seconds_total"] > 0
    assert found["process_open_fds"] > 2


def test_a_real_process_is_read_until_it_is_gone():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        reading = read_process(child.pid)
        assert reading is not None and reading.rss_bytes > 0
        child.communicate(b"\n")
    assert read_process(child.pid) is None
    own = read_process(os.getpid())
    assert own is not None and own.created == pytest.approx(read_process(os.getpid()).created)
