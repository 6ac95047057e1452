"""The latest lines: bounded, and read from where the reader stopped."""

import logging

from fairlead.observe.log_ring import LogRing


def test_it_is_bounded_by_lines_and_by_bytes() -> None:
    ring = LogRing(max_lines=3, max_bytes=100)
    for number in range(5):
        ring.add(logging.INFO, "gateway", f"line {number}")
    assert [kept.line for kept in ring.since()] == ["line 2", "line 3", "line 4"]
    ring.add(logging.INFO, "gateway", "x" * 90)
    assert [kept.line[:6] for kept in ring.since()] == ["line 4", "xxxxxx"]
    ring.add(logging.INFO, "gateway", "x" * 101)
    assert ring.since() == [] and ring.num_bytes == 0 and ring.latest == 7


def test_readers_choose_and_go_on_where_they_stopped() -> None:
    ring = LogRing()
    for level, room in (
        (logging.INFO, "gateway"),
        (logging.ERROR, "gateway.limits"),
        (logging.DEBUG, "http"),
        (logging.WARNING, "gatewayed"),
    ):
        ring.add(level, room, f"{room}")
    assert [kept.line for kept in ring.since(room="gateway")] == ["gateway", "gateway.limits"]
    assert [kept.line for kept in ring.since(level=logging.WARNING)] == ["gateway.limits", "gatewayed"]
    assert [kept.number for kept in ring.since(limit=2)] == [3, 4]
    assert [kept.number for kept in ring.since(3)] == [4]
    assert ring.since(4) == []
