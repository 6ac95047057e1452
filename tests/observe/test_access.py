"""One line per finished request, written with its neighbours."""

import io
import json
import time
from collections import Counter

from fairlead.core.generation import Usage
from fairlead.core.timeline import Timeline
from fairlead.observe.access import AccessLog, new_request_id
from fairlead.observe.finished import FLUSH_REQUESTS, Finished

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def finished(id: str = "id", status: int = 200, error: str = "", *, protocol: str = "http", seconds: float = 0.1) -> Timeline:
    """One that ended just now."""
    now = time.perf_counter()
    timeline = Timeline(id, protocol, now - seconds, model="m", version="1", rows=1)
    timeline.end(now, status, error, "failure" if error else "success", "model-error" if error else "")
    return timeline


def test_lines_wait_for_their_neighbours_and_lose_nothing():
    stream, counts = io.StringIO(), Counter()
    requests = Finished(AccessLog(stream, counts))
    requests.add(finished("id-1", seconds=0.001234567))
    requests.add(finished("id-2", 3, 'wrong "input"\n', protocol="grpc"))
    assert stream.getvalue() == ""
    requests.flush()
    good, bad = map(json.loads, stream.getvalue().splitlines())
    assert (good["request_id"], good["status"], good["seconds"], good["level"]) == ("id-1", 200, 0.001235, "info")
    assert (good["outcome"], bad["outcome"], bad["reason"]) == ("success", "failure", "model-error")
    assert not {"error", "tenant", "class", "reason", "tokens_in", "tokens_out", "cost", "traceparent", "trace_id", "job"} & good.keys()
    assert (bad["error"], bad["level"]) == ('wrong "input"\n', "warning")
    assert counts == {("http", 200): 1, ("grpc", 3): 1}
    requests.flush()
    assert len(stream.getvalue().splitlines()) == 2


def test_a_line_says_whose_it_was_and_what_it_took():
    stream = io.StringIO()
    timeline = finished()
    timeline.tenant, timeline.qos_class, timeline.cost, timeline.job = "acme", "batch", 0.25, "job_1"
    timeline.usage = Usage(prompt_tokens=7, completion_tokens=3)
    timeline.traceparent = TRACE
    AccessLog(stream)([timeline])
    line = json.loads(stream.getvalue())
    assert (line["tenant"], line["class"], line["cost"], line["job"]) == ("acme", "batch", 0.25, "job_1")
    assert (line["tokens_in"], line["tokens_out"]) == (7, 3)
    assert (line["traceparent"], line["trace_id"]) == (TRACE, TRACE.split("-")[1])


def test_its_time_is_when_it_ended_however_late_it_is_written():
    stream = io.StringIO()
    before = time.time()
    timeline = finished(seconds=60.0)
    timeline.ended -= 30.0
    AccessLog(stream)([timeline])
    assert before - 31 < json.loads(stream.getvalue())["time"] < time.time() - 29


def test_many_lines_do_not_wait_for_the_clock():
    stream = io.StringIO()
    requests = Finished(AccessLog(stream))
    for _ in range(FLUSH_REQUESTS):
        requests.add(finished())
    assert len(stream.getvalue().splitlines()) == FLUSH_REQUESTS


def test_without_a_stream_requests_are_still_counted():
    counts: Counter = Counter()
    AccessLog(None, counts)([finished("", 503, "busy")])
    assert counts == {("http", 503): 1}


def test_what_a_job_computes_has_a_line_and_is_no_answer_of_a_door():
    stream, counts = io.StringIO(), Counter()
    AccessLog(stream, counts)([finished("job_1", protocol="job")])
    assert json.loads(stream.getvalue())["protocol"] == "job"
    assert counts == {}


def test_request_ids_are_all_different():
    assert len({new_request_id() for _ in range(1000)}) == 1000


def test_a_name_cannot_forge_a_line_and_an_error_holds_no_secret():
    stream = io.StringIO()
    timeline = Timeline("id-1", "http", 0.0, model='m\n{"status":200}\u2028\x9b31m\u202e')
    timeline.end(1.0, 500, "redis://:hunter2@there is down", "failure", "model-error")
    AccessLog(stream)([timeline])
    assert len(stream.getvalue().splitlines()) == 1 and stream.getvalue().isascii()
    line = json.loads(stream.getvalue())
    assert (line["model"], line["error"]) == (timeline.model, "redis://:[SECRET]@there is down")
