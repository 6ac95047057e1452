"""What keeps everybody waiting is measured."""

import asyncio
import gc
import time

import pytest

from fairlead.observe.lag import RECENT_SECONDS, GcPauses, GilWait, LoopLag


async def test_whoever_holds_the_event_loop_is_seen():
    lag = LoopLag()
    task = asyncio.create_task(lag.run())
    try:
        while not sum(lag.histogram.counts):
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_soon(time.sleep, 0.3)
        while lag.latest < 0.15:  # the timer stood for at least two thirds of that behind it
            await asyncio.sleep(0.01)
    finally:
        task.cancel()
    assert lag.histogram.sum >= 0.15


def test_the_greatest_lag_is_forgotten_after_a_while():
    lag = LoopLag(clock=lambda: 0.0)
    lag.note(0.5, 1.0)
    assert lag.latest == 0.5
    lag.note(0.1, 1.0 + RECENT_SECONDS)
    assert lag.latest == 0.5
    lag.note(0.1, 1.0 + 2 * RECENT_SECONDS)
    assert lag.latest == 0.1


def test_the_interpreter_is_asked_for_until_it_is_stopped():
    wait = GilWait()
    wait.start()
    deadline = time.monotonic() + 30
    while not sum(wait.histogram.counts) and time.monotonic() < deadline:
        time.sleep(0.01)
    wait.stop()
    seen = sum(wait.histogram.counts)
    assert seen and not wait._thread.is_alive()


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_a_collection_is_counted_by_its_generation(generation):
    pauses = GcPauses()
    pauses.start()
    try:
        gc.collect(generation)
    finally:
        pauses.stop()
    counted = sum(pauses.histograms[generation].counts)
    gc.collect(generation)
    assert counted >= 1 and sum(pauses.histograms[generation].counts) == counted
    assert {labels for _, labels, _ in pauses.samples()} == {("0",), ("1",), ("2",)}
