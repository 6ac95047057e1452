"""Which errors are worth another try."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.core import errors
from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    Filtered,
    Forbidden,
    InvalidRequest,
    LimitExceeded,
    ModelError,
    NotFound,
    QueueFull,
    ReplicaDied,
    Shed,
    ShuttingDown,
    TimeoutExpired,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unreachable,
    Unsupported,
)
from fairlead.jobs.retry import LONGEST_LIMIT_SECONDS, LONGEST_SECONDS, Again, Failed, backoff, decide


def decided(error: FairleadError, *, tries: int = 1, served: bool = True, chance: float = 0.0) -> Again | Failed:
    return decide(error, tries=tries, max_tries=3, served=served, chance=chance)


@pytest.mark.parametrize("tries", [1, 3])
@pytest.mark.parametrize(
    "error",
    [
        LimitExceeded("no", reason="requests", retry_after=7.0),
        Shed("no", reason="overload", retry_after=7.0),
        QueueFull("no"),
        TimeoutExpired("no"),
        ShuttingDown("no"),
        Cancelled("no"),
    ],
)
def test_waiting_is_no_try(error: Any, tries: int) -> None:
    again = decided(error, tries=tries)
    assert isinstance(again, Again) and not again.counted
    assert again.seconds == (7.0 if isinstance(error, (LimitExceeded, Shed)) else 1.0)


def test_nobody_waits_for_a_limit_longer_than_a_while() -> None:
    for seconds in (86_400.0 * 30, float("inf")):
        again = decided(LimitExceeded("no", reason="budget", retry_after=seconds), chance=0.99)
        assert isinstance(again, Again) and again.seconds < LONGEST_LIMIT_SECONDS * 1.25


def test_what_may_help_is_tried_so_often_and_then_given_up() -> None:
    for error, reason in (
        (Unavailable("away"), "unavailable"),
        (ReplicaDied("gone"), "replica-died"),
        (Unreachable("full", reason="artifact-store"), "storage"),
        (Unreachable("gone", reason="redis"), "unavailable"),
    ):
        assert [decided(error, tries=tries) for tries in (1, 2, 3)] == [Again(1.0, True), Again(2.0, True), Failed(reason)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Filtered("no", "deny"), "moderated-input"),
        (Filtered("no", "deny", answer=True), "moderated-output"),
        (Unauthenticated("no"), "forbidden"),
        (Forbidden("no"), "forbidden"),
        (InvalidRequest("no"), "invalid"),
        (TooLarge("no"), "invalid"),
        (Unsupported("no"), "invalid"),
        (NotFound("no such version"), "invalid"),
        (ModelError("no"), "model-error"),
    ],
)
def test_what_would_fail_again_fails_at_once(error: FairleadError, reason: str) -> None:
    assert decided(error) == Failed(reason)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [NotFound("unloaded meanwhile"), Unavailable("it starts again")])
def test_a_model_that_is_away_is_waited_for(error: FairleadError) -> None:
    assert decided(error, tries=3, served=False) == Again(1.0, counted=False)


def test_a_replica_that_died_counts_though_its_model_is_away_then() -> None:
    assert decided(ReplicaDied("gone"), tries=3, served=False) == Failed("replica-died")


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_waits_grow_and_stay_bounded(some: int, more: int) -> None:
    assert 1.0 <= backoff(min(some, more)) <= backoff(max(some, more)) <= LONGEST_SECONDS


def test_every_error_of_ours_is_decided() -> None:
    def kinds(kind: type[FairleadError]) -> Any:
        yield kind
        for each in kind.__subclasses__():
            yield from kinds(each)

    for kind in kinds(FairleadError):
        if kind.__module__ == errors.__name__:
            error = kind.__new__(kind)
            FairleadError.__init__(error, "no")
            error.__dict__.update(reason="r", retry_after=1.0, rule="r", answer=False)
            assert isinstance(decided(error), (Again, Failed))
