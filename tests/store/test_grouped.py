"""Calls of many threads at once, done together."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from fairlead.core.errors import InvalidRequest, Unavailable
from fairlead.store.grouped import Grouped


class Writer:
    """Doubles numbers; a group can be held up, so that others gather."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.entered = threading.Event()
        self.free = threading.Event()
        self.free.set()

    def __call__(self, items: Sequence[int]) -> Sequence[int | Exception]:
        self.groups.append(list(items))
        self.entered.set()
        assert self.free.wait(20)
        if 13 in items:
            raise ZeroDivisionError
        if 99 in items:
            raise Unavailable("gone")
        return [InvalidRequest("negative") if item < 0 else 2 * item for item in items]


def held(writer: Writer, grouped: Grouped[int, int], threads: ThreadPoolExecutor, items: Sequence[int]) -> list[int | Exception]:
    """One is being written, and the others wait until all are there."""
    writer.free.clear()
    first = threads.submit(grouped, 0)
    assert writer.entered.wait(20)
    others = [threads.submit(grouped, item) for item in items]
    while len(grouped._waiting) < len(items):
        threading.Event().wait(0.001)
    writer.free.set()
    assert first.result(20) == 0
    return [other.exception(20) or other.result() for other in others]  # type: ignore[misc]


@pytest.fixture
def writer() -> Writer:
    return Writer()


def test_whoever_comes_while_others_are_written_is_written_together(writer: Writer) -> None:
    grouped = Grouped(writer, most=4, seconds=20)
    with ThreadPoolExecutor(16) as threads:
        assert held(writer, grouped, threads, range(1, 11)) == [2 * item for item in range(1, 11)]
    assert [len(group) for group in writer.groups] == [1, 4, 4, 2]


def test_one_that_is_wrong_fails_alone(writer: Writer) -> None:
    grouped = Grouped(writer, most=64, seconds=20)
    with ThreadPoolExecutor(16) as threads:
        answers = dict(zip([1, -1, 13, 2], held(writer, grouped, threads, [1, -1, 13, 2]), strict=True))
    assert (answers[1], answers[2], type(answers[-1]), type(answers[13])) == (2, 4, InvalidRequest, ZeroDivisionError)


def test_all_hear_that_the_store_is_gone_and_the_next_is_tried_again(writer: Writer) -> None:
    grouped = Grouped(writer, most=64, seconds=20)
    with ThreadPoolExecutor(16) as threads:
        answers = held(writer, grouped, threads, [1, 99, 2])
    assert [str(answer) for answer in answers] == ["gone"] * 3
    assert len({id(answer) for answer in answers}) == 3
    assert grouped(3) == 6


def test_who_waits_too_long_is_told_and_is_not_written(writer: Writer) -> None:
    grouped = Grouped(writer, most=64, seconds=0.01)
    writer.free.clear()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(grouped, 1)
        assert writer.entered.wait(20)
        with pytest.raises(Unavailable, match="others write"):
            grouped(2)
        writer.free.set()
        assert first.result(20) == 2
    assert grouped(3) == 6
    assert writer.groups == [[1], [3]]


def test_an_interrupted_leader_leaves_nobody_waiting() -> None:
    def act(items: Sequence[int]) -> Sequence[int]:
        if 0 in items:
            raise KeyboardInterrupt
        return items

    grouped = Grouped[int, int](act, most=64, seconds=20)
    with pytest.raises(KeyboardInterrupt):
        grouped(0)
    assert grouped(1) == 1
