"""Several prompts of one request."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from fairlead.api.openai.together import AT_ONCE, each, interleaved


class Engine:
    """Answers when it is let to."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.most = 0
        self.gates: dict[int, asyncio.Event] = {}
        self.failing: set[int] = set()

    async def ask(self, number: int) -> int:
        async with aclosing(self.stream(number)) as pieces:
            return [piece async for piece in pieces][-1]

    async def stream(self, number: int) -> AsyncGenerator[int, None]:
        self.running.add(number)
        self.most = max(self.most, len(self.running))
        try:
            yield 10 * number
            if number in self.gates:
                await self.gates[number].wait()
            if number in self.failing:
                raise ValueError(f"{number} fails")
            yield 10 * number + 1
        finally:
            self.running.discard(number)


async def test_answers_come_in_the_order_of_the_questions():
    assert await each(Engine().ask, [3, 1, 2]) == [31, 11, 21]


async def test_a_long_list_is_asked_piece_by_piece():
    engine = Engine()
    assert len(await each(engine.ask, list(range(5 * AT_ONCE)))) == 5 * AT_ONCE
    assert engine.most <= AT_ONCE
    pieces = [piece async for piece in interleaved(engine.stream, list(range(5 * AT_ONCE)))]
    assert len(pieces) == 10 * AT_ONCE
    assert engine.most <= AT_ONCE


async def test_one_failure_ends_all():
    engine = Engine()
    engine.gates[1] = asyncio.Event()
    engine.failing.add(2)
    with pytest.raises(ValueError, match="2 fails"):
        await each(engine.ask, [1, 2])
    assert engine.running == set()
    with pytest.raises(ValueError, match="2 fails"):
        async with aclosing(interleaved(engine.stream, [1, 2])) as pieces:
            async for _ in pieces:
                pass
    assert engine.running == set()


async def test_pieces_come_as_they_are_ready():
    engine = Engine()
    engine.gates[0] = asyncio.Event()
    async with aclosing(interleaved(engine.stream, [0, 1])) as pieces:
        told = [await anext(pieces) for _ in range(3)]
        assert sorted(told) == [(0, 0), (1, 10), (1, 11)]
        engine.gates[0].set()
        assert [piece async for piece in pieces] == [(0, 1)]


async def test_closing_it_closes_all():
    engine = Engine()
    engine.gates = {number: asyncio.Event() for number in range(3)}
    pieces = interleaved(engine.stream, [0, 1, 2])
    for _ in range(3):
        await anext(pieces)
    assert engine.running == {0, 1, 2}
    await pieces.aclose()
    assert engine.running == set()


@pytest.mark.parametrize("numbers", [[4], [4, 5]])
async def test_cancelling_the_reader_cancels_what_it_waits_for(numbers):
    engine = Engine()
    engine.gates = {number: asyncio.Event() for number in numbers}
    reading = asyncio.create_task(each(engine.ask, numbers))
    while engine.running != set(numbers):
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert engine.running == set()
