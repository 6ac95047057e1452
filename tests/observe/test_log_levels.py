"""Which lines of which room are written: the longest name decides, and what was said for a while ends."""

import re
from pathlib import Path

import pytest

from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.observe.log_levels import ROOMS, RoomLevels, check_levels, room_of

SOURCES = Path(__file__).parents[2] / "src" / "fairlead"


def test_the_longest_name_decides() -> None:
    levels = RoomLevels("warning", {"gateway": "debug", "fairlead.gateway.limits": "error"})
    assert [levels.of(room) for room in ("gateway", "gateway.bodies", "gateway.limits.redis", "runtime")] == [
        "debug",
        "debug",
        "error",
        "warning",
    ]
    levels.set({"fairlead": "info"})
    assert (levels.of("runtime"), levels.of("gateway")) == ("info", "debug")


def test_what_was_said_for_a_while_gives_way_to_what_was_before() -> None:
    levels = RoomLevels("info", {"gateway": "error"})
    levels.set({"gateway": "debug", "http": "debug"}, until=100.0)
    levels.set({"http": "error"}, until=50.0)
    assert (levels.of("gateway"), levels.of("http"), levels.next_expiry) == ("debug", "error", 50.0)
    assert levels.expire(49.9) == []
    assert levels.expire(50.0) == ["http"]
    assert (levels.of("gateway"), levels.of("http"), levels.next_expiry) == ("debug", "info", 100.0)
    assert levels.expire(1e9) == ["gateway"]
    assert (levels.of("gateway"), levels.next_expiry) == ("error", None)


def test_what_is_said_for_good_ends_what_was_for_a_while() -> None:
    levels = RoomLevels()
    levels.set({"gateway": "debug"}, until=100.0)
    levels.set({"gateway": "error"})
    assert (levels.of("gateway"), levels.next_expiry) == ("error", None)
    levels.set({"gateway": None})
    assert levels.of("gateway") == "info"


def test_a_room_that_is_none_is_refused_and_nothing_changes() -> None:
    levels = RoomLevels()
    with pytest.raises(InvalidRequest, match="no room 'gatway'"):
        levels.set({"runtime": "debug", "gatway": "debug"})
    assert levels.of("runtime") == "info"
    with pytest.raises(ConfigError, match=r"logs\.levels: there is no room ''"):
        check_levels({"": "debug"})
    check_levels({"sqlalchemy.engine": "info", "fairlead.runtime": "debug"})


def test_every_room_of_ours_is_in_the_table() -> None:
    named = {
        room_of(name).partition(".")[0]
        for path in SOURCES.rglob("*.py")
        for name in re.findall(r'get_logger\("(.+?)"\)', path.read_text())
        if path.parent.name != "demo_models"
    }
    by_module = {path.relative_to(SOURCES).parts[0] for path in SOURCES.rglob("*.py") if "get_logger(__name__)" in path.read_text()}
    assert named | by_module <= set(ROOMS)
