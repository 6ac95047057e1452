"""The several prompts of one request, asked together."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

Q = TypeVar("Q")
T = TypeVar("T")

AT_ONCE = 64
"""Prompts of one request that are under way: a long list must not fill the waiting line by itself."""


async def each(ask: Callable[[Q], Coroutine[Any, Any, T]], questions: Sequence[Q]) -> list[T]:
    """The answers in the order of the questions. Raises the first error; what is still under way is cancelled."""
    if len(questions) == 1:
        return [await ask(questions[0])]
    turn = asyncio.Semaphore(AT_ONCE)

    async def in_turn(question: Q) -> T:
        async with turn:
            return await ask(question)

    tasks = [asyncio.create_task(in_turn(question)) for question in questions]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def interleaved(ask: Callable[[Q], AsyncGenerator[T, None]], questions: Sequence[Q]) -> AsyncGenerator[tuple[int, T], None]:
    """(number of the question, piece of its answer) as they come. Raises the first error; closing it closes all."""
    if len(questions) == 1:
        async with aclosing(ask(questions[0])) as only:
            async for piece in only:
                yield 0, piece
        return
    turn = asyncio.Semaphore(AT_ONCE)
    # one place: an answer that nobody reads yet is not piled up here
    ready: asyncio.Queue[tuple[int, list[T], Exception | None]] = asyncio.Queue(maxsize=1)

    async def pump(number: int, question: Q) -> None:
        error = None
        try:
            async with turn, aclosing(ask(question)) as pieces:
                async for piece in pieces:
                    await ready.put((number, [piece], None))
        except Exception as failure:
            error = failure
        await ready.put((number, [], error))

    tasks = [asyncio.create_task(pump(number, question)) for number, question in enumerate(questions)]
    try:
        num_open = len(tasks)
        while num_open:
            number, pieces, error = await ready.get()
            if error is not None:
                raise error
            if not pieces:
                num_open -= 1
            for piece in pieces:
                yield number, piece
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
