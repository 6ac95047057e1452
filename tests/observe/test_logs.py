"""Logs are JSON for machines and readable for people."""

import io
import json
import logging

import pytest
import structlog

from fairlead.observe.logs import configure_logs


@pytest.fixture(autouse=True)
def as_it_was():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_events_and_other_libraries_warnings_are_json_lines():
    stream = io.StringIO()
    configure_logs("info", "json", stream)
    structlog.get_logger("fairlead").info("model loaded", model="m", path=object)
    structlog.get_logger("fairlead").debug("not shown")
    logging.getLogger("somebody.else").warning("disk is %s", "full")
    try:
        raise ValueError("boom")
    except ValueError:
        structlog.get_logger("fairlead").exception("failed")
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["model"], first["level"]) == ("model loaded", "m", "info")
    assert (second["event"], second["level"]) == ("disk is full", "warning")
    assert third["exception"][0]["exc_value"] == "boom"


def test_a_terminal_gets_text():
    stream = io.StringIO()
    configure_logs("info", "console", stream)
    structlog.get_logger("fairlead").info("model loaded", model="m")
    assert "model loaded" in stream.getvalue()
    assert not stream.getvalue().startswith("{")
