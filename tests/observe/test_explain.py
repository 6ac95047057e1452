"""Where a request's time went: stories of timelines, and the phases of each add up to the whole."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.core.generation import Phase, Usage
from fairlead.core.timeline import EVENTS, BatchNote, Phases, Timeline
from fairlead.observe.explain import CLOSED, MEANINGS, RANKS, REST, _stretches, explained, phases_of, told
from fairlead.runtime.batcher import CloseReason

SINCE = 1_700_000_000.0


def request(**fields) -> Timeline:
    return Timeline("r1", "http", 10.0, model="m", version="1", kind="infer", path="/v2/models/{model}/infer", **fields)


def done(timeline: Timeline, at: float, outcome: str = "success", **fields):
    timeline.end(at, fields.pop("status", 200), fields.pop("error", ""), outcome, fields.pop("reason", ""))
    said = explained(timeline, SINCE, **fields)
    assert sum(phase.seconds for phase in said.request.phases) == pytest.approx(timeline.seconds)
    assert sum(share.share for share in said.shares) == pytest.approx(1.0 if timeline.seconds else 0.0)
    assert [step.at for step in said.steps] == sorted(step.at for step in said.steps)
    return said


def spent(said) -> dict[str, float]:
    return {share.name: round(share.seconds, 6) for share in said.shares}


def texts(said) -> list[str]:
    return [step.text for step in said.steps]


def batched(timeline: Timeline, began: float, gather: float, compute: float, ended: float, **fields) -> None:
    note = BatchNote("m", "1", 812, fields.pop("reason", "full"), 32, 9, 0, began, gather, compute, ended, **fields)
    timeline.note(began, "batched", note)
    timeline.note(ended, "computed")


def test_a_row_in_a_batch_with_others():
    timeline = request(bytes_in=70)
    timeline.note(10.001, "decoded")
    batched(timeline, 10.013, 0.001, 0.005, 10.020)
    timeline.note(10.0205, "encoded")
    said = done(timeline, 10.021, median=0.007)
    assert spent(said) == {"receive": 0.001, "batch wait": 0.012, "gather": 0.001, "compute": 0.005, "hand-over": 0.001, "answer": 0.001}
    assert (
        "batch 812 of m@1 closed because it was full: 32 rows of 9 requests, on instance 0; gathered in 1.00 ms, computed in 5.00 ms"
        in texts(said)
    )
    assert said.why == "57% of its 21.0 ms (12.0 ms): it waited for its batch; that is 3.0 times its model's median of 7.00 ms"
    assert said.request.arrived == SINCE + 10.0


def test_a_chat_that_queued_and_was_preempted():
    timeline = request(first_at=13.0, usage=Usage(prompt_tokens=500, completion_tokens=20))
    timeline.note(10.0, "decoded")
    timeline.note(10.0, "admitted", {"class": "batch", "priority": 3})
    timeline.note(10.0, "held", {"limits": 2})
    timeline.note(10.0, "queued", {"ahead": 3, "in_flight": 8})
    timeline.note(11.0, "turn")
    phases = [
        Phase("waiting", 0.0, 0.5),
        Phase("prefill", 0.5, 1.5, 2, 500, 5),
        Phase("decode", 2.0, 1.0, 10, 10, 5, 0.3),
        Phase("preempted", 3.0, 4.0),
        Phase("prefill", 7.0, 0.25, 1, 510, 1),
        Phase("decode", 7.25, 0.75, 10, 10, 1),
    ]
    timeline.note(11.0, "engine", Phases("m", "1", 1, phases))
    said = done(timeline, 19.5)
    assert spent(said) == {"preempted": 4.0, "decode": 1.75, "prefill": 1.75, "queue": 1.0, "engine queue": 0.5, "answer": 0.5}
    assert said.why == "42% of its 9.50 s (4.00 s): the engine had put it aside: others needed its memory"
    assert said.request.first_seconds == 3.0
    for text in (
        "it stood in line behind 3 requests, while 8 others were computed",
        "it had waited 1.00 s for its turn",
        "it was sent to the engine of m@1, replica 1",
        "500 tokens of its prompt were computed in 2 steps, shared by up to 5, in 1.50 s",
        "10 tokens were generated in 10 steps, shared by up to 5, the slowest 300 ms, in 1.00 s",
        "it was put aside for 4.00 s: others needed its memory",
    ):
        assert text in texts(said)


def test_a_picture():
    timeline = request()
    timeline.note(10.0, "decoded")
    phases = [Phase("waiting", 0.0, 1.0), Phase("encode", 1.0, 0.5), Phase("denoise", 1.5, 6.0, 20, 0, 4, 0.4), Phase("decode", 7.5, 0.5)]
    timeline.note(10.0, "engine", Phases("art", "3", 0, phases))
    said = done(timeline, 18.0)
    assert spent(said) == {"denoise": 6.0, "engine queue": 1.0, "encode prompt": 0.5, "decode picture": 0.5}
    assert "20 denoising steps, shared by up to 4, the slowest 400 ms, in 6.00 s" in texts(said)


def test_one_that_was_refused():
    timeline = request()
    timeline.note(10.001, "decoded")
    timeline.note(10.002, "refused", {"reason": "tokens_per_minute"})
    said = done(timeline, 10.003, "refused", status=429, error="too many tokens", reason="tokens_per_minute")
    assert spent(said) == {"receive": 0.001, "gateway": 0.001, "answer": 0.001}
    assert texts(said)[-2:] == ["it was refused: tokens_per_minute", "it ended: refused (tokens_per_minute), status 429: too many tokens"]


def test_one_whose_client_left_while_it_waited_in_line():
    timeline = request()
    timeline.note(10.0, "queued", {"ahead": 1, "in_flight": 1})
    timeline.note(15.0, "left")
    said = done(timeline, 15.0, "cancelled", status=499, reason="cancelled")
    assert spent(said) == {"queue": 5.0}
    assert "it stood in line behind 1 request, while 1 other was computed" in texts(said)


def test_one_whose_client_left_while_it_was_computed():
    timeline = request()
    timeline.note(10.5, "decoded")
    timeline.note(11.0, "batched", BatchNote("m", "1", 1, "idle", 1, 1, 0, 11.0))
    assert spent(done(timeline, 13.0, "cancelled")) == {"compute": 2.0, "receive": 0.5, "batch wait": 0.5}


def test_an_engine_that_told_nothing_before_its_request_was_given_up():
    timeline = request()
    timeline.note(11.0, "engine", Phases("m", "1", 0, []))
    assert spent(done(timeline, 13.0, "cancelled"))["compute"] == 2.0


def test_a_place_that_failed_and_another_that_answered():
    timeline = request()
    timeline.note(10.0, "decoded")
    timeline.note(10.0, "sent", {"place": "one", "version": "", "attempt": 1})
    timeline.note(12.0, "failed", {"place": "one", "error": "unavailable"})
    timeline.note(12.0, "retried", {"reason": "unavailable"})
    timeline.note(12.5, "sent", {"place": "two", "version": "", "attempt": 2})
    said = done(timeline, 13.0)
    assert spent(said) == {"retry": 2.5, "answer": 0.5}
    assert texts(said)[2:6] == [
        "it was sent to one",
        "one did not answer: unavailable",
        "it was to be sent once more: unavailable",
        "it was sent to two, attempt 2",
    ]


def test_a_bad_body():
    said = done(request(), 10.001, "refused", status=400, error="not JSON", reason="invalid-request")
    assert spent(said) == {"receive": 0.001}


def test_the_answer_of_another_is_shared():
    timeline = request()
    timeline.note(10.0, "decoded")
    timeline.note(11.0, "reused", {"outcome": "joined"})
    said = done(timeline, 12.0)
    assert spent(said) == {"cache": 1.0, "answer": 1.0}
    assert "the same was being computed for another: it shared that answer" in texts(said)


def test_two_prompts_of_one_request_are_computed_side_by_side():
    timeline = request()
    timeline.note(10.0, "engine", Phases("m", "1", 0, [Phase("waiting", 0.0, 1.0), Phase("decode", 1.0, 3.0, 3, 3)]))
    timeline.note(10.0, "engine", Phases("m", "1", 0, [Phase("waiting", 0.0, 4.0), Phase("decode", 4.0, 1.0, 3, 3)]))
    assert spent(done(timeline, 15.0)) == {"decode": 4.0, "engine queue": 1.0}


def test_a_batch_that_failed_and_the_try_of_its_own():
    timeline = request()
    batched(timeline, 11.0, 0.0, 0.0, 12.0, error="negative")
    timeline.note(13.0, "batched", BatchNote("m", "1", -1, "retry", 1, 1, 0, 13.0, 0.0, 1.0, 14.0))
    said = done(timeline, 14.0)
    assert "; it failed: negative" in texts(said)[1]
    assert texts(said)[-2].startswith("a batch of m@1 closed because its first batch had failed, and each member got a try of its own")


def test_a_job_and_what_came_after_its_end():
    timeline = Timeline("r1", "job", 10.0, model="art", kind="paint", job="job_1")
    timeline.note(10.0, "lease", {"attempt": 2})
    timeline.note(11.0, "engine", Phases("art", "1", 0, [Phase("denoise", 0.0, 4.0, 4)]))
    timeline.note(16.0, "stored", {"bytes": 12345})
    timeline.end(16.0, 200, "", "success", "")
    timeline.events.append((17.0, "webhook", {"status": 0, "attempt": 1, "error": "no answer within 10 s"}))
    said = explained(timeline, SINCE)
    assert {"a runner took the job: attempt 2", "its result was kept: 12,345 bytes of files"} <= set(texts(said))
    assert texts(said)[-1] == "its receiver was called, attempt 1: no answer within 10 s"
    assert sum(phase.seconds for phase in said.request.phases) == pytest.approx(6.0)


@pytest.mark.parametrize(("status", "last"), [(200, "job"), (202, "answer")])
def test_a_request_that_is_answered_by_a_job_waited_for_it_unless_it_only_handed_it_in(status: int, last: str):
    timeline = Timeline("r1", "http", 10.0, model="art", kind="paint", job="job_1")
    timeline.note(10.5, "admitted", {"class": "", "priority": 0})
    timeline.end(14.0, status, "", "success", "")
    assert [phase.name for phase in explained(timeline, SINCE).request.phases] == ["gateway", last]


def test_it_says_which_steps_were_too_many():
    timeline = request()
    for at in range(1000):
        timeline.note(10.0 + at, "encoded")
    assert done(timeline, 2000.0).dropped == 1000 - 256


def test_every_close_reason_and_every_phase_has_words():
    assert CLOSED.keys() == {str(reason) for reason in CloseReason}
    assert all(MEANINGS.values())


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from(sorted(EVENTS))), max_size=30), st.floats(0, 100))
def test_whatever_was_noted_in_whatever_order_the_phases_add_up(noted, seconds):
    timeline = request()
    for at, name in noted:
        details = {
            "batched": BatchNote("m", "1", 1, "full", 1, 1, 0, 10 + at, 0.5, 1.0, 10 + at + 2),
            "engine": Phases("m", "1", 0, [Phase("waiting", 0.0, 0.5), Phase("decode", 0.5, 2.0)]),
        }.get(name)
        timeline.events.append((10 + at, name, details))
    timeline.end(10.0 + seconds, 200, "", "success", "")
    phases = phases_of(timeline)
    assert sum(phase.seconds for phase in phases) == pytest.approx(timeline.seconds)
    for before, after in itertools.pairwise(phases):
        assert before.start + before.seconds == pytest.approx(after.start)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 µs"),
        (0.000_0421, "42 µs"),
        (0.001234, "1.23 ms"),
        (0.0999, "99.9 ms"),
        (0.25, "250 ms"),
        (3.14159, "3.14 s"),
        (250.0, "250 s"),
    ],
)
def test_spans_as_people_say_them(seconds, words):
    assert told(seconds) == words


SPANS = st.lists(st.tuples(*[st.integers(0, 20)] * 3), max_size=12)


@given(SPANS)
def test_of_what_overlaps_each_moment_is_of_the_strongest_claim(spans):
    timeline = request()
    for start, waited, computed in spans:
        phases = [Phase("waiting", 0.0, float(waited)), Phase("prefill", float(waited), float(computed))]
        timeline.note(11.0 + start, "engine", Phases("m", "1", 0, phases))
    timeline.end(80.0, 200, "", "success", "")
    claims = [each for each in _stretches(timeline) if each[1] > each[0]]
    for phase in phases_of(timeline):
        for moment in (10.0 + phase.start + 0.5, 10.0 + phase.start + phase.seconds - 0.5):
            here = [(RANKS.get(name, 1), begin, name) for begin, end, name in claims if begin <= moment < end]
            assert phase.name == (max(here)[2] if here else REST)
