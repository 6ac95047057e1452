"""Calls of many threads at once, done together: one transaction for all that wait while the one before is written."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

from fairlead.core.errors import FairleadError, Unavailable

T = TypeVar("T")
R = TypeVar("R")


class _Call(Generic[T, R]):
    __slots__ = ("answer", "item")

    def __init__(self, item: T) -> None:
        self.item = item
        self.answer: tuple[R | Exception] | None = None
        """Of one, once it is there."""


class Grouped(Generic[T, R]):
    """`act` does many, all or none, and answers each with a result or with the error of that one alone.

    Nobody waits for company: the first thread does its own at once, and whoever comes meanwhile is done together by the next. Where `act`
    itself fails on account of one of them, each is tried alone.
    """

    def __init__(self, act: Callable[[Sequence[T]], Sequence[R | Exception]], *, most: int, seconds: float) -> None:
        self._act = act
        self._most = most
        self._seconds = seconds
        self._turn = Lock()
        self._lock = Lock()
        self._waiting: list[_Call[T, R]] = []

    def __call__(self, item: T) -> R:
        """Raises Unavailable where its turn does not come in time: it was not done then."""
        call = _Call[T, R](item)
        with self._lock:
            self._waiting.append(call)
        if not self._turn.acquire(timeout=self._seconds):
            with self._lock:
                if call in self._waiting:
                    self._waiting.remove(call)
                    raise Unavailable("the store does not answer: others write for too long")
            # Somebody is doing it.
            self._turn.acquire()
        try:
            while call.answer is None:
                self._do()
        finally:
            self._turn.release()
        answer = call.answer[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _do(self) -> None:
        with self._lock:
            calls, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        try:
            answers = self._answers([call.item for call in calls])
        except BaseException:
            # This thread is interrupted, and the others must not wait for it.
            answers = [Unavailable("the store was interrupted") for _ in calls]
            raise
        finally:
            for call, answer in zip(calls, answers, strict=True):
                call.answer = (answer,)

    def _answers(self, items: Sequence[T]) -> Sequence[R | Exception]:
        try:
            return self._act(items)
        except FairleadError as error:
            return [error.saying(error.message) for _ in items]
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [answer for item in items for answer in self._answers([item])]
