"""Logs are JSON for machines and readable for people; which lines are written can change at any moment."""

import io
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from fairlead.observe.logs import LogFormat, configure_logs, journal


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("somebody").setLevel(logging.NOTSET)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_events_and_other_libraries_warnings_are_json_lines() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream)
    structlog.get_logger("fairlead").info("model loaded", model="m", path=object)
    structlog.get_logger("fairlead").debug("not shown")
    logging.getLogger("somebody.else").warning("disk is %s", "full")
    logging.getLogger("somebody.else").info("not shown")
    try:
        raise ValueError("boom")
    except ValueError:
        structlog.get_logger("fairlead.gateway").exception("failed", request_id="r1")
    first, second, third = lines(stream)
    assert (first["event"], first["model"], first["level"], first["room"]) == ("model loaded", "m", "info", "fairlead")
    assert (second["event"], second["level"], second["room"]) == ("disk is full", "warning", "somebody.else")
    assert (third["room"], third["request_id"], third["exception"][0]["exc_value"]) == ("gateway", "r1", "boom")
    assert all(each["pid"] == os.getpid() and each["time"] > 1e9 for each in (first, second, third))


def test_a_terminal_gets_text() -> None:
    stream = io.StringIO()
    configure_logs("info", "console", stream)
    structlog.get_logger("fairlead").info("model loaded", model="m")
    assert "model loaded" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


@pytest.mark.parametrize("style", ["json", "console"])
def test_neither_secrets_nor_texts_nor_forged_lines_get_through(style: LogFormat) -> None:
    stream = io.StringIO()
    configure_logs("info", style, stream)
    log = structlog.get_logger("fairlead.gateway")
    log.info("seen", model='m\n{"level":"error"}\x1b[31m', prompt="my illness", headers={"Cookie": "crumbs1"}, surrogate="\udc80")
    try:
        raise ValueError("redis://:hunter2@there said my\n\x1b[31mforged 12:00:00 [error] line")
    except ValueError:
        log.exception("failed")
    said = stream.getvalue()
    for hidden in ("my illness", "crumbs1", "hunter2", "\x1b[31m"):
        assert hidden not in said
    if style == "json":
        assert [each["event"] for each in lines(stream)] == ["seen", "failed"]
    else:
        assert [line for line in said.splitlines() if not line.startswith("    ")] == [said.splitlines()[0], said.splitlines()[1]]


def test_texts_stand_there_where_the_operator_wants_them_and_secrets_never() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream, texts=True)
    structlog.get_logger("fairlead").info("seen", prompt="my illness", token="abcd")
    assert (lines(stream)[0]["prompt"], lines(stream)[0]["token"]) == ("my illness", "[SECRET]")


def test_levels_of_rooms_change_at_once_those_of_other_libraries_too() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream, levels={"fairlead.gateway": "error"})
    gateway, limits, runtime = (structlog.get_logger(f"fairlead.{name}") for name in ("gateway", "gateway.limits", "runtime"))
    somebody = logging.getLogger("somebody")
    for each in (gateway, limits, runtime, somebody):
        each.info("one")
    journal().levels.set({"gateway.limits": "debug", "somebody": "info"})
    journal().levels_changed()
    for each in (gateway, limits, runtime, somebody):
        each.debug("two")
        each.info("three")
    journal().levels.set({"gateway.limits": None, "gateway": None, "somebody": None, "fairlead": "error"})
    journal().levels_changed()
    for each in (gateway, limits, runtime, somebody):
        each.info("four")
    assert [(each["event"], each["room"]) for each in lines(stream)] == [
        ("one", "runtime"),
        ("two", "gateway.limits"),
        ("three", "gateway.limits"),
        ("three", "runtime"),
        ("three", "somebody"),
    ]


def test_the_latest_lines_are_kept_as_json_whatever_the_stream_shows() -> None:
    stream = io.StringIO()
    configure_logs("info", "console", stream)
    structlog.get_logger("fairlead.gateway").info("seen", prompt="my illness")
    try:
        raise ValueError("boom")
    except ValueError:
        structlog.get_logger("fairlead.http").exception("failed")
    seen, failed = (json.loads(kept.line) for kept in journal().ring.since())
    assert (seen["room"], seen["prompt"]) == ("gateway", "[TEXT of 10]")
    assert failed["exception"][0]["exc_value"] == "boom"


def test_an_exception_of_another_process_is_shown_on_a_terminal_too_and_cannot_forge_a_line() -> None:
    stream = io.StringIO()
    configure_logs("info", "console", stream)
    exception = {
        "exc_type": "ValueError",
        "exc_value": "boom\n12:00:00 [error] \x1b[31mforged",
        "frames": [{"filename": "a.py", "lineno": 3, "name": "f"}],
    }
    journal().pass_on(
        {"time": 1.0, "level": "error", "event": "model failed", "room": "replica", "pid": 7, "exception": [exception, "odd"]}
    )
    first, *rest = stream.getvalue().splitlines()
    assert "model failed" in first
    assert rest == ["    a.py:3 in f", "    ValueError: boom\\n12:00:00 [error] \\u001b[31mforged", "    odd"]


def test_a_level_that_only_another_library_knows_is_no_reason_to_lose_the_line() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream)
    logging.getLogger("somebody").log(37, "odd")
    assert (lines(stream)[0]["event"], lines(stream)[0]["level"]) == ("odd", "level 37")
