"""The batcher on a virtual clock: no loop, no threads, no waiting."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from fairlead.core.errors import QueueFull
from fairlead.core.specs import BatchingSpec, QueuePolicy, TimeoutAction
from fairlead.runtime.batcher import Batch, Batcher, CloseReason, Entry


def entry(rows: int = 1, **fields: object) -> Entry:
    return Entry(rows=rows, **fields)  # type: ignore[arg-type]


def batcher(**fields: object) -> Batcher:
    return Batcher(BatchingSpec(**{"max_batch_size": 8, **fields}))  # type: ignore[arg-type]


def queue(into: Batcher, *entries: Entry, now: float = 0.0) -> list[Entry]:
    for each in entries:
        into.add(each, now)
    return list(entries)


def test_without_a_delay_a_free_instance_takes_what_piled_up():
    b = batcher()
    entries = queue(b, entry(), entry(), entry())
    batch = b.take(0.0)
    assert batch.entries == entries
    assert batch.close_reason is CloseReason.IDLE
    assert b.take(0.0) is None


def test_a_batch_is_full_at_max_batch_size_and_the_rest_waits():
    b = batcher()
    entries = queue(b, *(entry() for _ in range(11)))
    first, second = b.take(0.0), b.take(0.0)
    assert (first.rows, first.close_reason) == (8, CloseReason.FULL)
    assert second.entries == entries[8:]


def test_rows_are_counted_not_requests():
    b = batcher()
    queue(b, entry(3), entry(3), entry(3))
    batch = b.take(0.0)
    assert (len(batch.entries), batch.rows, batch.close_reason) == (2, 6, CloseReason.SIZE)


def test_requests_of_another_shape_wait_for_their_own_batch():
    b = batcher()
    queue(b, entry(signature="a"), entry(signature="a"), entry(signature="b"), entry(signature="a"))
    taken = [b.take(0.0) for _ in range(3)]
    assert [(len(batch.entries), batch.close_reason) for batch in taken] == [(2, "shape"), (1, "shape"), (1, "idle")]


def test_a_model_that_does_not_batch_gets_one_request_at_a_time():
    b = batcher(max_batch_size=0)
    queue(b, entry(), entry())
    assert [b.take(0.0).close_reason for _ in range(2)] == [CloseReason.SINGLE, CloseReason.SINGLE]


def test_a_delay_holds_the_batch_until_the_oldest_has_waited_that_long():
    b = batcher(max_queue_delay=0.010)
    queue(b, entry(), now=1.0)
    queue(b, entry(), now=1.004)
    assert b.take(1.005) is None
    assert b.wake_at(free=True) == pytest.approx(1.010)
    batch = b.take(1.010)
    assert (batch.rows, batch.close_reason) == (2, CloseReason.DELAY)


def test_a_full_batch_does_not_wait_for_the_delay():
    b = batcher(max_queue_delay=1.0)
    queue(b, *(entry() for _ in range(8)))
    assert b.take(0.0).close_reason is CloseReason.FULL


def test_the_largest_preferred_size_that_the_queue_reaches_goes_at_once():
    b = batcher(preferred_batch_sizes=(2, 4), max_queue_delay=1.0)
    queue(b, *(entry() for _ in range(5)))
    batch = b.take(0.0)
    assert (batch.rows, batch.close_reason) == (4, CloseReason.PREFERRED)
    assert b.take(0.0) is None  # one left: not preferred, not late
    assert b.take(1.0).close_reason is CloseReason.DELAY


def test_once_the_delay_is_over_everything_pending_goes_whatever_is_preferred():
    b = batcher(preferred_batch_sizes=(4,), max_queue_delay=0.5)
    queue(b, *(entry() for _ in range(6)))
    assert b.take(0.6).rows == 6


def test_a_waiting_batch_starts_before_a_member_would_time_out():
    b = batcher(max_queue_delay=1.0)
    queue(b, entry(timeout=0.2))
    assert b.take(0.1, predicted=0.05) is None
    wake = b.wake_at(free=True, predicted=0.05)
    assert wake == pytest.approx(0.15)
    assert b.take(wake, predicted=0.05).close_reason is CloseReason.DEADLINE


def test_a_higher_level_goes_first_and_a_lower_one_fills_the_batch():
    b = batcher(priority_levels=2, max_batch_size=3)
    low = queue(b, entry(priority=2), entry(priority=2), entry(priority=2))
    high = queue(b, entry(priority=1))
    assert b.take(0.0).entries == [high[0], low[0], low[1]]


def test_priority_zero_and_beyond_the_levels_mean_the_default():
    b = batcher(priority_levels=3, default_priority=2)
    entries = queue(b, entry(priority=0), entry(priority=9), entry(priority=3))
    assert [e.priority for e in entries] == [2, 2, 3]


def test_a_timed_out_request_is_refused_where_the_policy_says_reject():
    b = batcher(queue_policy=QueuePolicy(default_timeout=1.0))
    (late,) = queue(b, entry())
    (early,) = queue(b, entry(), now=0.5)
    assert b.wake_at(free=False) == 1.0
    assert b.expire(1.0) == [late]
    assert b.take(1.0).entries == [early]
    assert b.num_requests == b.num_rows == 0


def test_a_timed_out_request_goes_to_the_end_of_its_level_where_the_policy_says_delay():
    b = batcher(max_batch_size=1, queue_policy=QueuePolicy(timeout_action=TimeoutAction.DELAY, default_timeout=1.0))
    (late,) = queue(b, entry())
    (early,) = queue(b, entry(), now=0.5)
    assert b.expire(1.2) == []
    assert [b.take(1.2).entries for _ in range(2)] == [[early], [late]]


def test_a_request_may_shorten_its_timeout_or_set_one_where_there_is_none_but_not_lengthen_it():
    policy = QueuePolicy(default_timeout=1.0)
    shortened, lengthened = queue(batcher(queue_policy=policy), entry(timeout=0.1), entry(timeout=9.0))
    assert (shortened.expires, lengthened.expires) == (0.1, 1.0)
    (own,) = queue(batcher(), entry(timeout=9.0))
    assert own.expires == 9.0
    (held,) = queue(batcher(queue_policy=QueuePolicy(default_timeout=1.0, allow_timeout_override=False)), entry(timeout=0.1))
    assert held.expires == 1.0


@pytest.mark.parametrize(
    ("bounds", "fields"),
    [
        ({"queue_policy": QueuePolicy(max_queue_size=2)}, {}),
        ({"max_queue_rows": 9}, {"rows": 4}),
        ({"max_queue_bytes": 100}, {"nbytes": 40}),
    ],
)
def test_the_queue_is_bounded_in_requests_rows_and_bytes(bounds, fields):
    b = batcher(**bounds)
    queue(b, entry(**fields), entry(**fields))
    with pytest.raises(QueueFull, match="Exceeds maximum queue size"):
        b.add(entry(**fields), 0.0)
    b.take(0.0)
    b.add(entry(**fields), 0.0)


def test_a_cancelled_request_is_gone_from_the_queue_but_not_from_a_batch():
    b = batcher()
    first, second = queue(b, entry(), entry())
    assert b.cancel(first)
    assert not b.cancel(first)
    assert b.take(0.0).entries == [second]
    assert not b.cancel(second)


def test_cancelled_requests_do_not_pile_up_behind_one_that_waits():
    b = batcher(max_queue_delay=1e9)
    queue(b, entry())
    for _ in range(10_000):
        (left,) = queue(b, entry())
        b.cancel(left)
    assert len(b.levels[0].queue) < 200


def test_where_order_is_promised_a_faster_batch_waits_for_the_one_before():
    b = batcher(max_batch_size=1, preserve_ordering=True)
    queue(b, entry(), entry(), entry())
    first, second, third = (b.take(0.0) for _ in range(3))
    assert b.finish(third) == []
    assert b.finish(first) == [first]
    assert b.finish(second) == [second, third]


def test_where_order_is_not_promised_a_batch_answers_when_it_is_done():
    b = batcher(max_batch_size=1)
    queue(b, entry(), entry())
    _, second = b.take(0.0), b.take(0.0)
    assert b.finish(second) == [second]


class Story(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, time-outs, batches and answers."""

    waiting = Bundle("waiting")
    running = Bundle("running")

    @initialize(
        max_batch_size=st.integers(0, 6),
        preferred=st.lists(st.integers(1, 6), max_size=2),
        delay=st.sampled_from([0.0, 1.0]),
        ordering=st.booleans(),
        levels=st.integers(0, 3),
        action=st.sampled_from(list(TimeoutAction)),
        timeout=st.sampled_from([0.0, 2.0]),
    )
    def begin(self, max_batch_size, preferred, delay, ordering, levels, action, timeout):
        self.spec = BatchingSpec(
            max_batch_size=max_batch_size,
            preferred_batch_sizes=tuple(size for size in preferred if size <= max_batch_size),
            max_queue_delay=delay,
            preserve_ordering=ordering,
            priority_levels=levels,
            queue_policy=QueuePolicy(timeout_action=action, default_timeout=timeout, max_queue_size=40),
            max_queue_rows=60,
        )
        self.batcher = Batcher(self.spec)
        self.now = 0.0
        self.added: list[Entry] = []
        self.fate: dict[int, str] = {}
        self.answered: list[int] = []

    def settle(self, each: Entry, fate: str) -> None:
        assert id(each) not in self.fate, f"{self.fate[id(each)]} and then {fate}"
        self.fate[id(each)] = fate

    @rule(
        target=waiting,
        rows=st.integers(1, 6),
        shape=st.sampled_from("aab"),
        priority=st.integers(0, 4),
        timeout=st.sampled_from([0.0, 0.5, 5.0]),
    )
    def arrive(self, rows, shape, priority, timeout):
        each = Entry(rows=min(rows, self.spec.max_batch_size) or 1, signature=shape, priority=priority, timeout=timeout)
        self.added.append(each)
        try:
            self.batcher.add(each, self.now)
        except QueueFull:
            self.settle(each, "refused at the door")
        return each

    @rule(each=waiting)
    def leave(self, each):
        if self.batcher.cancel(each):
            self.settle(each, "cancelled")

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds):
        self.now += seconds
        for each in self.batcher.expire(self.now):
            assert each.expires <= self.now
            self.settle(each, "timed out")

    @rule(target=running)
    def an_instance_is_free(self):
        ready = [e for e in self.added if id(e) not in self.fate]
        batch = self.batcher.take(self.now)
        if batch is None:
            assert not ready or self.spec.max_queue_delay > 0, "work-conserving without a delay"
            return Batch([], 0, CloseReason.IDLE, -1)
        assert batch.rows == sum(e.rows for e in batch.entries)
        assert len({e.signature for e in batch.entries}) == 1
        assert batch.rows <= self.spec.max_batch_size or len(batch.entries) == 1
        ahead = [e for e in ready if e not in batch.entries and (e.expires or not self.spec.queue_policy.default_timeout)]
        if not self.spec.priority_levels and self.spec.queue_policy.timeout_action is TimeoutAction.REJECT:
            taken = [self.added.index(e) for e in batch.entries]
            assert taken == sorted(taken)
            assert all(self.added.index(e) > taken[-1] for e in ahead), "first come, first served within a level"
        for each in batch.entries:
            self.settle(each, "batched")
        return batch

    @rule(batch=consumes(running))
    def a_batch_is_done(self, batch):
        if batch.number >= 0:
            self.answered.extend(other.number for other in self.batcher.finish(batch))

    @invariant()
    def the_books_are_right(self):
        if not hasattr(self, "spec"):
            return
        waiting = [e for e in self.added if id(e) not in self.fate]
        assert self.batcher.num_requests == len(waiting)
        assert self.batcher.num_rows == sum(e.rows for e in waiting) <= 60
        assert len(self.answered) == len(set(self.answered))
        if self.spec.preserve_ordering:
            assert self.answered == sorted(self.answered)

    def teardown(self):
        """Nobody starves: with an instance always free and time passing as `wake_at` asks, the queue empties."""
        if not hasattr(self, "spec"):
            return
        for _ in range(3 * len(self.added) + 3):
            for each in self.batcher.expire(self.now):
                self.settle(each, "timed out")
            while (batch := self.batcher.take(self.now)) is not None:
                for each in batch.entries:
                    self.settle(each, "batched")
            wake = self.batcher.wake_at(free=True)
            if wake is None:
                break
            assert wake >= self.now or self.batcher.num_requests == 0
            self.now = max(wake, self.now)
        assert len(self.fate) == len(self.added)


TestStory = Story.TestCase
TestStory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
