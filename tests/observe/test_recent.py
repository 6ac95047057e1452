"""What is remembered of finished requests, and for how long, on a virtual clock."""

from fairlead.core.recent import RequestSettings
from fairlead.core.timeline import MAX_EVENTS, BatchNote, Timeline
from fairlead.observe.recent import FEW, MAX_MODELS, Recent

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Room:
    def __init__(self, **settings: float) -> None:
        self.clock = Clock()
        self.recent = Recent(RequestSettings(**settings), self.clock)  # type: ignore[arg-type]

    def ended(self, id: str, seconds: float = 0.1, *, model: str = "m", outcome: str = "success", **fields: str) -> Timeline:
        timeline = Timeline(id, fields.pop("protocol", "http"), self.clock.now - seconds, model=model, kind="infer", **fields)  # type: ignore[arg-type]
        timeline.end(self.clock.now, 200 if outcome == "success" else 500, "" if outcome == "success" else "no", outcome, "")
        self.recent([timeline])
        return timeline

    def ids(self, kind: str = "recent", **fields: object) -> list[str]:
        return [each.request_id for each in self.recent.listed(kind, **fields)]  # type: ignore[arg-type]


def test_the_last_ones_are_kept_the_newest_first():
    room = Room(keep=3)
    for number in range(5):
        room.ended(f"r{number}", model="ab"[number % 2])
    assert room.ids() == ["r4", "r3", "r2"]
    assert room.ids(model="a") == ["r4", "r2"]
    assert room.ids(limit=1) == ["r4"]
    assert room.recent.find("r0") is not None, "it is among the slow ones still"


def test_failures_outlive_the_crowd_of_those_that_went_well():
    room = Room(keep=2, failed=2, slow=0)
    for number in range(3):
        room.ended(f"bad{number}", outcome="failure")
    for number in range(10):
        room.ended(f"good{number}")
    assert room.ids("failed") == ["bad2", "bad1"]
    assert room.recent.find("bad2") is not None and room.recent.find("bad0") is None


def test_of_each_model_the_slowest_are_kept_for_their_time():
    room = Room(keep=1, slow=2, slow_seconds=600.0)
    for seconds in (0.1, 5.0, 0.2, 3.0):
        room.ended(f"s{seconds}", seconds)
    room.ended("other", 0.01, model="quick")
    assert room.ids("slow") == ["s5.0", "s3.0", "other"]
    assert room.ids("slow", model="quick") == ["other"]
    room.clock.now += 599
    room.ended("late", 1.0)
    assert room.ids("slow", model="m") == ["s5.0", "s3.0", "late"]
    room.clock.now += 2
    assert room.ids("slow") == ["late"], "ten minutes are over for those before it"
    room.clock.now += 100_000
    assert room.ids("slow") == []


def test_a_flood_of_made_up_names_takes_no_models_place():
    room = Room(keep=1)
    for number in range(3 * MAX_MODELS):
        room.ended(f"r{number}", model=f"made-up-{number}", outcome="refused")
    room.ended("real", 1.0)
    assert room.ids("slow") == ["real"]
    for number in range(3 * MAX_MODELS):
        room.ended(f"r{number}", model=f"served-{number}")
    assert len(room.ids("slow", limit=10_000)) == MAX_MODELS


def test_one_is_found_by_its_id_its_trace_or_its_job():
    room = Room()
    traced, plain = room.ended("a", traceparent=TRACE), room.ended("b")
    door = room.ended("c", job="job_1")
    work = room.ended("c", job="job_1", protocol="job")
    room.clock.now += 1
    after = room.ended("c", job="job_1")
    assert room.recent.find("a") == traced and room.recent.find(TRACE.split("-")[1]) == traced
    assert room.recent.find("b") == plain and not plain.traced, "looking for one gives nobody a trace"
    assert room.recent.find("job_1") is work and room.recent.find("c") is work
    assert room.recent.related(work, 10) == [door, after]
    assert room.recent.find("nobody") is None


def test_of_two_with_one_id_the_newer_one_is_meant():
    room = Room()
    room.ended("same")
    room.clock.now += 1
    newer = room.ended("same")
    assert room.recent.find("same") == newer


def test_a_tensor_request_is_packed_and_comes_out_as_it_was():
    room = Room()
    note = BatchNote("m", "1", 7, "full", 32, 9, 0, 999.5, 0.1, 0.2, 999.9)
    whole = Timeline("a", "grpc", 999.0, model="m", version="1", kind="infer", tenant="acme", rows=3)
    whole.note(999.1, "queued", {"ahead": 3, "in_flight": 8})
    whole.note(999.5, "batched", note)
    whole.note(999.9, "computed")
    whole.end(1000.0, 0, "", "success", "")
    room.recent([whole])
    found = room.recent.find("a")
    assert found == whole and found is not whole
    assert isinstance(found.events[1][2], BatchNote)


def test_what_came_of_a_job_after_its_end_is_written_to_it_within_bounds():
    room = Room()
    work = room.ended("c", job="job_1", protocol="job")
    room.recent.afterwards("job_1", 1001.0, "webhook", {"status": 200, "attempt": 1})
    room.recent.afterwards("job_2", 1001.0, "webhook", {"status": 200, "attempt": 1})
    assert [name for _, name, _ in work.events] == ["webhook"]
    for _ in range(2 * MAX_EVENTS):
        room.recent.afterwards("job_1", 1001.0, "webhook", None)
    assert len(work.events) == MAX_EVENTS


def test_what_comes_before_a_jobs_end_was_heard_of_waits_for_it():
    room = Room()
    for number in range(500):
        room.recent.afterwards(f"job_{number}", 1001.0, "webhook", {"status": 200, "attempt": 1})
    assert room.ended("c", job="job_499", protocol="job").events == [(1001.0, "webhook", {"status": 200, "attempt": 1})]
    assert room.ended("c", job="job_0", protocol="job").events == [], "so many are not waited for"


def test_a_median_is_of_the_same_kind_of_request_and_of_enough_of_them():
    room = Room()
    mine = room.ended("mine", 9.0)
    for seconds in (1.0, 2.0, 3.0):
        room.ended("other", seconds)
        room.ended("elsewhere", 100.0, model="n")
        room.ended("failed", 100.0, outcome="failure")
    assert room.recent.median_seconds(mine) is None
    room.ended("another", 4.0)
    assert len(room.ids(model="m")) > FEW
    assert room.recent.median_seconds(mine) == 3.0


def test_nothing_is_kept_where_nothing_is_to_be():
    room = Room(keep=0, failed=0, slow=0)
    room.ended("r", outcome="failure")
    assert room.ids() == room.ids("failed") == room.ids("slow") == []
