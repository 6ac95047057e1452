"""Calls of many threads at once, done together: one transaction for all that wait while the one before is written."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

from fairlead.core.errors import FairleadError, Unavailable

T = TypeVar("T")
R = TypeVar("R")


class _Call(Generic[T, R]):
    __slots__ = ("answer", "item", "leads", "woken")

    def __init__(self, item: T) -> None:
        self.item = item
        self.answer: tuple[R | Exception] | None = None
        """Of one, once it is there."""
        self.leads = False
        """Whether its thread is to do what waits."""
        self.woken = Lock()
        """Held until there is an answer, or the thread is to lead."""
        self.woken.acquire()


class Grouped(Generic[T, R]):
    """`act` does many, all or none, and answers each with a result or with the error of that one alone.

    Nobody waits for company: the first thread does its own at once, and whoever comes meanwhile is done together by the first of them. Where
    `act` itself fails on account of one, each is tried alone.
    """

    def __init__(self, act: Callable[[Sequence[T]], Sequence[R | Exception]], *, most: int, seconds: float) -> None:
        self._act = act
        self._most = most
        self._seconds = seconds
        self._lock = Lock()
        self._led = False
        self._waiting: list[_Call[T, R]] = []

    def __call__(self, item: T) -> R:
        """Raises Unavailable where its turn does not come in time: it was not done then."""
        call = _Call[T, R](item)
        with self._lock:
            self._waiting.append(call)
            if not self._led:
                self._led = call.leads = True
        if not call.leads:
            self._wait(call)
        if call.leads:
            self._lead()
        assert call.answer is not None
        answer = call.answer[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _wait(self, call: _Call[T, R]) -> None:
        if call.woken.acquire(timeout=self._seconds):
            return
        with self._lock:
            if call in self._waiting and not call.leads:
                self._waiting.remove(call)
                raise Unavailable("the store does not answer: others write for too long")
        # It is being done.
        call.woken.acquire()

    def _lead(self) -> None:
        """Do what waits, the leader's own first; then the next in line leads."""
        with self._lock:
            calls, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        answers: Sequence[R | Exception] = [Unavailable("the store was interrupted") for _ in calls]
        try:
            answers = self._answers([call.item for call in calls])
        finally:
            for call, answer in zip(calls, answers, strict=True):
                call.answer = (answer,)
            with self._lock:
                self._led = bool(self._waiting)
                if self._waiting:
                    self._waiting[0].leads = True
                    self._waiting[0].woken.release()
            for call in calls:
                if not call.leads:
                    call.woken.release()

    def _answers(self, items: Sequence[T]) -> Sequence[R | Exception]:
        try:
            return self._act(items)
        except FairleadError as error:
            return [error.saying(error.message) for _ in items]
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [answer for item in items for answer in self._answers([item])]
