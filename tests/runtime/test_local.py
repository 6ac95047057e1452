"""Inline or in a thread: the same answers."""

import asyncio
import threading

import numpy as np
import pytest

from fairlead.backends import Executable
from fairlead.core.errors import InvalidRequest, LoadError, ModelError
from fairlead.core.specs import Execution
from fairlead.core.tensors import Tensors
from fairlead.runtime.local import INLINE_BELOW, THREAD_ABOVE, LocalInstance, choose_inline


class Doubling(Executable):
    def __init__(self) -> None:
        self.threads: set[str] = set()

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        self.threads.add(threading.current_thread().name)
        if inputs["x"][0, 0] == 13:
            raise ZeroDivisionError("unlucky")
        if inputs["x"][0, 0] == 14:
            raise InvalidRequest("14 is not a number we like")
        return {"y": inputs["x"] * 2}


async def run(instance: LocalInstance, *values: float) -> object:
    ended: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    inputs = [{"x": np.array([[value]], np.float32)} for value in values]
    instance.run(inputs, None, lambda outputs, error: ended.set_result(error or outputs["y"].ravel().tolist()), ())
    async with asyncio.timeout(5):
        return await ended


@pytest.mark.parametrize("execution", [Execution.INLINE, Execution.THREAD])
async def test_both_ways_give_the_same_rows_and_errors(execution):
    executable = Doubling()
    instance = LocalInstance(executable, "m", execution)
    assert await run(instance, 1, 2, 3) == [2, 4, 6]
    error = await run(instance, 13)
    assert isinstance(error, ModelError)
    assert error.message == "model 'm' failed: ZeroDivisionError: unlucky"
    assert isinstance(await run(instance, 14), InvalidRequest)
    assert await run(instance, 5) == [10]
    where = {"MainThread"} if execution is Execution.INLINE else {"fairlead-m"}
    assert executable.threads == where
    await instance.close()
    assert "fairlead-m" not in {thread.name for thread in threading.enumerate()}


def test_a_fast_model_moves_inline_and_a_slow_one_away_but_neither_flutters():
    between = (INLINE_BELOW + THREAD_ABOVE) / 2
    assert choose_inline(False, INLINE_BELOW / 2)
    assert not choose_inline(False, between)
    assert choose_inline(True, between)
    assert not choose_inline(True, THREAD_ABOVE * 2)


async def test_an_asynchronous_model_is_told_that_it_needs_a_process():
    class Asynchronous(Executable):
        async def infer(self, inputs, outputs):
            return inputs

    with pytest.raises(LoadError, match="needs `isolation: process`"):
        LocalInstance(Asynchronous(), "m", Execution.AUTO)
