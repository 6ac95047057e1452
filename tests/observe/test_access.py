"""One line per finished request, written with its neighbours."""

import io
import json
from collections import Counter

from fairlead.observe.access import FLUSH_LINES, AccessLog, new_request_id


def test_lines_wait_for_their_neighbours_and_lose_nothing():
    stream, counts = io.StringIO(), Counter()
    log = AccessLog(stream, counts)
    log.add("http", "id-1", "", "m", "1", 200, 0.001234567, 2, "")
    log.add("grpc", "id-2", "00-abc-01", "m", "", 3, 0.5, 1, 'wrong "input"\n')
    assert stream.getvalue() == ""
    log.flush()
    good, bad = map(json.loads, stream.getvalue().splitlines())
    assert (good["request_id"], good["status"], good["seconds"], good["level"]) == ("id-1", 200, 0.001235, "info")
    assert "error" not in good
    assert (bad["error"], bad["traceparent"], bad["level"]) == ('wrong "input"\n', "00-abc-01", "warning")
    assert counts == {("http", 200): 1, ("grpc", 3): 1}
    log.flush()
    assert len(stream.getvalue().splitlines()) == 2


def test_many_lines_do_not_wait_for_the_clock():
    stream = io.StringIO()
    log = AccessLog(stream)
    for _ in range(FLUSH_LINES):
        log.add("http", "", "", "m", "1", 200, 0.1, 1, "")
    assert len(stream.getvalue().splitlines()) == FLUSH_LINES


def test_without_a_stream_requests_are_still_counted():
    counts: Counter = Counter()
    log = AccessLog(None, counts)
    log.add("http", "", "", "m", "1", 503, 0.1, 1, "busy")
    log.flush()
    assert counts == {("http", 503): 1}


def test_request_ids_are_all_different():
    assert len({new_request_id() for _ in range(1000)}) == 1000
