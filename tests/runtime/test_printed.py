"""What a replica process prints becomes whole lines of the server's log, and none of them can pass for another's."""

import asyncio
import io
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import structlog

from fairlead.observe.logs import configure_logs, journal
from fairlead.runtime.printed import MAX_LINE_BYTES, Printed

SECONDS = 20.0


@pytest.fixture(autouse=True)
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logs("info", "json", stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


async def lines(number: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(SECONDS):
        while journal().ring.latest < number:
            await asyncio.sleep(0)
    return [json.loads(kept.line) for kept in journal().ring.since()]


@pytest.fixture
async def printed() -> AsyncIterator[Printed]:
    printed = Printed("m", "3")
    printed.pid = 77
    yield printed
    printed.close()


async def test_lines_are_whole_however_they_are_cut(printed: Printed) -> None:
    for part in (b"hel", b"lo\nwor", b"ld\n\n"):
        os.write(printed.theirs, part)
    found = await lines(2)
    assert [(each["line"], each["model"], each["version"], each["pid"], each["room"]) for each in found] == [
        ("hello", "m", "3", 77, "replica.printed"),
        ("world", "m", "3", 77, "replica.printed"),
    ]
    printed.handed_over()


async def test_a_line_of_its_log_is_taken_for_what_it_says_and_one_that_looks_like_it_is_not(printed: Printed) -> None:
    event = b'{"time":1.5,"level":"error","event":"model failed","room":"replica","pid":77,"token":"abcd"}'
    os.write(printed.theirs, b"no end " + printed.mark.encode() + event + b"\n" + event.replace(b"77", b"1") + b"\n")
    before, ours, forged = await lines(3)
    assert (before["line"], before["room"]) == ("no end ", "replica.printed")
    assert (ours["event"], ours["room"], ours["level"], ours["model"], ours["token"]) == (
        "model failed",
        "replica",
        "error",
        "m",
        "[SECRET]",
    )
    assert (forged["event"], forged["room"], forged["level"], forged["pid"]) == ("printed", "replica.printed", "info", 77)
    printed.handed_over()


async def test_last_words_are_heard_and_a_line_without_end_is_bounded(printed: Printed) -> None:
    os.write(printed.theirs, b"x" * (MAX_LINE_BYTES // 2))
    os.write(printed.theirs, b"y" * 100)
    while len(printed._rest) < MAX_LINE_BYTES // 2 + 100:
        await asyncio.sleep(0)
    os.write(printed.theirs, b"z" * (MAX_LINE_BYTES // 2))
    assert (await lines(1))[0]["event"] == "printed"
    os.write(printed.theirs, b"Fatal error")
    printed.handed_over()  # the process is gone
    assert (await lines(2))[-1]["line"].endswith("Fatal error")
    assert printed._fd < 0


async def test_a_grandchild_that_holds_it_open_does_not_keep_it_for_ever(printed: Printed) -> None:
    os.write(printed.theirs, b"words")
    printed.close()
    assert (await lines(1))[0]["line"] == "words"
    printed.handed_over()
