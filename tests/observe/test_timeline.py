"""What a timeline takes, and when it takes no more."""

import json
from io import StringIO

import pytest

from fairlead.core.generation import Usage
from fairlead.core.timeline import EVENTS, MAX_CHARS, MAX_EVENTS, Timeline, parse_traceparent
from fairlead.observe.access import AccessLog
from fairlead.observe.finished import FLUSH_REQUESTS, Finished

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_to_which_no_end_of_things_happens_takes_a_bounded_place():
    timeline = Timeline("id", "http", 0.0)
    for at in range(MAX_EVENTS + 7):
        timeline.note(float(at), "sent", {"place": "m@1"})
    assert (len(timeline.events), timeline.dropped) == (MAX_EVENTS, 7)


def test_what_comes_after_its_end_is_not_written():
    timeline = Timeline("id", "http", 0.0)
    timeline.end(1.0, 499, "the client left", "cancelled", "cancelled")
    timeline.note(2.0, "computed")
    timeline.used(Usage(completion_tokens=5))
    assert (timeline.events, timeline.usage) == ([], None)


def test_what_the_gateway_said_of_its_end_counts_more_than_what_the_status_says():
    timeline = Timeline("id", "http", 0.0, outcome="refused", reason="tokens_per_minute")
    timeline.end(1.0, 429, "too many", "refused", "unavailable")
    assert (timeline.outcome, timeline.reason) == ("refused", "tokens_per_minute")
    answered = Timeline("id", "http", 0.0, outcome="success")
    answered.end(1.0, 500, "the answer could not be written", "failure", "model-error")
    assert (answered.outcome, answered.reason) == ("failure", "model-error")


def test_a_callers_words_are_cut():
    timeline = Timeline("id", "grpc", 0.0, model="m" * 5000, version="1" * 5000)
    timeline.end(1.0, 404, "x" * 5000, "refused", "not-found")
    assert len(timeline.model) == len(timeline.version) == len(timeline.error) == MAX_CHARS


def test_half_characters_do_not_keep_others_from_the_log():
    log = StringIO()
    finished = Finished(AccessLog(log))
    for error in ("", "no such file: \udcff\ud800", ""):
        timeline = Timeline("id", "http", 0.0, model="m\ud800")
        timeline.end(1.0, 500, error, "failure", "model-error")
        finished.add(timeline)
    finished.flush()
    assert [json.loads(line)["error"] for line in log.getvalue().splitlines() if "error" in json.loads(line)] == ["no such file: ??"]
    assert len(log.getvalue().splitlines()) == 3


def test_several_prompts_of_one_request_add_up():
    timeline = Timeline("id", "http", 0.0)
    for _ in range(3):
        timeline.used(Usage(prompt_tokens=2, completion_tokens=1))
    assert timeline.usage == Usage(prompt_tokens=6, completion_tokens=3)


def test_it_takes_its_place_in_its_callers_trace_or_begins_one():
    theirs, ours = Timeline("a", "http", 0.0, traceparent=TRACE), Timeline("b", "http", 0.0)
    assert (theirs.trace_id, theirs.parent_id, theirs.traced) == (TRACE.split("-")[1], TRACE.split("-")[2], True)
    assert not ours.traced
    assert len(ours.trace_id) == 32 and ours.trace_id == ours.trace_id and ours.traced and ours.parent_id == ""


@pytest.mark.parametrize(
    "text",
    ["", "00-aa-bb-01", TRACE + "-more", "ff" + TRACE[2:], TRACE.upper(), "00-" + "0" * 32 + "-b7ad6b7169203331-01", TRACE[:-2] + "zz"],
)
def test_what_is_no_traceparent_starts_a_new_trace(text):
    assert parse_traceparent(text) is None


def test_a_listener_that_fails_keeps_nobody_else_from_hearing():
    heard: list[Timeline] = []

    def broken(_):
        raise RuntimeError("it was asked to")

    finished = Finished(broken, heard.extend)
    for number in range(FLUSH_REQUESTS + 1):
        finished.add(Timeline(str(number), "http", 0.0))
    assert len(heard) == FLUSH_REQUESTS
    finished.flush()
    assert [each.request_id for each in heard] == [str(number) for number in range(FLUSH_REQUESTS + 1)]


def test_every_event_has_a_meaning():
    assert all(EVENTS.values())
