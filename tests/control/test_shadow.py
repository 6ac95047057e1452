"""What a shadow found: the report of its pairs."""

import msgspec
import numpy as np
import pytest

from fairlead.control.shadow import MAX_UNLABELLED, NUM_WORST, Comparer, ShadowReport
from fairlead.core.generation import Chat, Delta, Embed, Generate, Message, Paint, Picture, Sampling, Score, Tokenize
from fairlead.core.request import Request, Response
from fairlead.core.rollout import ShadowRules
from fairlead.core.watch import Pair

RULES = ShadowRules()
UNIT = np.full((2, 64), 0.125) * np.where(np.arange(64) % 2, 1.0, -1.0)
"""Two vectors of length 1."""


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def comparer(clock):
    return Comparer(lambda model: RULES, clock=clock)


def pair(champion, candidate=(), *, request=None, prompt=None, error="", candidate_version="8", scores=None, seconds=(0.1, 0.2), **ids):
    return Pair(
        model="fraud",
        request=request or Request(model="fraud", inputs={"x": np.array([[1.0, 2.0]])} if prompt is None else {}, prompt=prompt, **ids),
        champion_version="7",
        candidate_version=candidate_version,
        champion=tuple(champion),
        candidate=tuple(candidate),
        error=error,
        champion_seconds=seconds[0],
        candidate_seconds=seconds[1],
        scores=scores,
    )


def tensors(**outputs):
    return [Response(model="fraud", version="7", outputs={name: np.asarray(each) for name, each in outputs.items()})]


def delta(**fields):
    return [Response(model="fraud", version="7", delta=Delta(**fields))]


def score(value):
    return tensors(score=[[value]])


def again(report):
    return msgspec.json.decode(msgspec.json.encode(report), type=ShadowReport)


# Pairs


def test_pairs_agree_or_not_or_have_no_answer(comparer):
    comparer.add(pair(score(1.0), score(1.001)))
    comparer.add(pair(score(1.0), score(2.0)))
    comparer.add(pair(score(1.0), error="ModelError: out of order"))
    report = comparer.take()["fraud"]
    assert (report.num_pairs, report.num_agree, report.num_failed) == (2, 1, 1)
    assert sum(report.champion_latency.values()) == 3 and sum(report.candidate_latency.values()) == 2
    assert comparer.take() == {}


@pytest.mark.parametrize(
    ("champion", "candidate", "agree", "part"),
    [
        (tensors(y=[[1.0, 5.0]]), tensors(y=[[1.0, 5.0]]), True, "numbers"),
        (tensors(y=[[0.2, 0.8]]), tensors(y=[[0.4, 0.6]]), True, "classes"),
        (tensors(y=[[0.2, 0.8]]), tensors(y=[[0.6, 0.4]]), False, "classes"),
        (tensors(y=[3]), tensors(y=[4]), False, "classes"),
        (tensors(y=np.array([b"cat"], object)), tensors(y=np.array([b"cat"], object)), True, "classes"),
        (tensors(y=np.array([b"x" * 100], object)), tensors(y=np.array([b"y" * 100], object)), False, "exact"),
        (tensors(y=[[1, 2]]), tensors(y=[[1, 3]]), False, "exact"),
        (tensors(y=UNIT), tensors(y=UNIT), True, "vectors"),
        (tensors(y=UNIT), tensors(y=-UNIT), False, "vectors"),
    ],
)
def test_tensors_are_compared_by_what_they_are(comparer, champion, candidate, agree, part):
    comparer.add(pair(champion, candidate))
    report = comparer.take()["fraud"]
    assert (report.num_pairs, report.num_agree) == (1, int(agree))
    assert list(getattr(report, part)) == ["y"]


@pytest.mark.parametrize(
    ("candidate", "note"),
    [
        (tensors(z=[[1.0]]), "no output 'y'"),
        (tensors(y=[[1.0, 2.0]]), "shape [1, 2] instead of [1, 1]"),
        (tensors(y=[[1]]), "int64 instead of float64"),
        (tensors(y=[[1.0]]) * 2, "2 responses instead of 1"),
        ([], "0 responses instead of 1"),
    ],
)
def test_an_answer_of_another_form_is_another_answer(comparer, candidate, note):
    comparer.add(pair(tensors(y=[[1.0]]), candidate))
    report = comparer.take()["fraud"]
    assert report.num_agree == 0 and note in report.worst[0].note


def test_all_outputs_must_agree(comparer):
    comparer.add(pair(tensors(label=[1], y=[[1.0]]), tensors(label=[1], y=[[1.0]])))
    comparer.add(pair(tensors(label=[1], y=[[1.0]]), tensors(label=[1], y=[[3.0]])))
    report = comparer.take()["fraud"]
    assert (report.num_pairs, report.num_agree) == (2, 1) and report.worst[0].note == "'y': 3 instead of 1"


def test_prompts_are_compared_by_what_they_ask(comparer):
    vector = np.ones(4, "<f4").tobytes()
    comparer.add(pair(delta(vector=vector), delta(vector=vector), prompt=Embed(text="hi")))
    comparer.add(pair(delta(tokens=["a", "b"]), delta(tokens=["ab"]), prompt=Tokenize(text="ab")))
    one, other = (np.array([score], "<f4").tobytes() for score in (1.0, 0.2))
    comparer.add(pair(delta(vector=one), delta(vector=other), prompt=Score(text="hi", pair="you")))
    no_picture = Picture(data=b"x", content_type="image/png", width=1, height=1, seed=1, num_steps=1, guidance=0.0, scheduler="")
    another = msgspec.structs.replace(no_picture, data=b"y")
    comparer.add(pair(delta(picture=no_picture), delta(picture=another), prompt=Paint(text="a cat")))
    report = comparer.take()["fraud"]
    assert (report.num_pairs, report.num_agree) == (4, 1)
    assert (
        report.vectors["vector"].num == report.numbers["score"].num == 1 and report.exact == {"tokens": (1, 0)} and report.pictures.num == 1
    )
    assert "a file that is no picture" in {each.note for each in report.worst}


def test_sampled_texts_that_nobody_scored_are_not_counted_as_pairs(comparer):
    sampled = Generate(text="hi", sampling=Sampling(temperature=1.0))
    comparer.add(pair(delta(text="a"), delta(text="b"), prompt=sampled))
    report = comparer.take()["fraud"]
    assert (report.num_pairs, report.num_untold) == (0, 1) and report.decision(RULES) == "not enough"


# The decision


def reported(num_agree, num_pairs, num_failed=0):
    return ShadowReport(
        model="m", champion="1", candidate="2", begin=0.0, end=1.0, num_pairs=num_pairs, num_agree=num_agree, num_failed=num_failed
    )


@pytest.mark.parametrize(
    ("report", "decision"),
    [
        (reported(0, 0), "not enough"),
        (reported(10, 10), "not enough"),
        (reported(1000, 1000), "agree"),
        (reported(960, 1000), "not enough"),
        (reported(800, 1000), "disagree"),
        (reported(1000, 1000, num_failed=200), "disagree"),
    ],
)
def test_the_bound_decides_and_not_the_mean(report, decision):
    assert report.decision(ShadowRules(min_agreement=0.95)) == decision


def test_looking_often_does_not_make_it_agree():
    """Where the versions agree in just the share that is asked for, at most 5% of all shadows are ever found to; where they agree more
    often, nearly all are."""
    random = np.random.default_rng(11)
    rules = ShadowRules(min_agreement=0.9)

    def found(rate):
        agree = np.cumsum(random.random(600) < rate)
        return any(reported(int(agree[n - 1]), n).decision(rules) == "agree" for n in range(30, 601, 30))

    assert sum(found(0.9) for _ in range(200)) <= 10
    assert sum(found(0.97) for _ in range(50)) >= 45


# What is shown


def test_the_worst_are_shown_redacted_without_ids_or_tenants(clock):
    comparer = Comparer(lambda model: RULES, redact=lambda text: text.replace("ann@example.com", "[EMAIL]"), clock=clock)
    prompt = Generate(
        chat=Chat(messages=[Message(role="user", content="mail ann@example.com")]),
        sampling=Sampling(temperature=0.0),
    )
    comparer.add(pair(delta(text="to ann@example.com"), delta(text="no"), prompt=prompt, log_id="the-id", id="own-id"))
    report = comparer.take()["fraud"]
    (shown,) = report.worst
    assert (shown.asked, shown.champion, shown.candidate) == ("user: mail [EMAIL]", "to [EMAIL]", "no")
    data = msgspec.json.encode(report) + msgspec.json.encode(report.describe(RULES))
    assert b"ann@" not in data and b"the-id" not in data and b"own-id" not in data


def test_texts_are_withheld_where_nobody_says_what_may_be_shown(comparer):
    text = np.array([[b"secret"]], object)
    request = Request(model="fraud", inputs={"x": text})
    comparer.add(pair(tensors(y=text), tensors(y=np.array([[b"secreT"]], object)), request=request))
    comparer.add(pair(tensors(y=text), error="ModelError: cannot read 'secret'"))
    report = comparer.take()["fraud"]
    assert b"secre" not in msgspec.json.encode([report.worst, report.errors])


def test_a_text_is_redacted_before_it_is_cut(clock):
    secret = "0123456789" * 4
    comparer = Comparer(lambda model: RULES, redact=lambda text: text.replace(secret, "[SECRET]"), clock=clock)
    text = "x" * 380 + secret
    comparer.add(pair(delta(text=text), delta(text="no"), prompt=Generate(text="hi", sampling=Sampling(temperature=0.0))))
    assert "0123" not in comparer.take()["fraud"].worst[0].champion


def test_of_a_long_text_the_beginning_is_redacted_and_nobody_waits_for_it(clock):
    secret, looked_at = "0123456789" * 10, []

    def redact(text):
        assert not comparer._lock.locked()
        looked_at.append(len(text))
        return text.replace(secret, "[SECRET]")

    comparer = Comparer(lambda model: RULES, redact=redact, clock=clock)
    prompt = Generate(text="hi", sampling=Sampling(temperature=0.0))
    # many secrets, the last of them cut in two: what stands for them is short, and its end would be among what is shown
    comparer.add(pair(delta(text=f"{secret} " * 10_000), delta(text="no"), prompt=prompt))
    comparer.add(pair(delta(text="x" * 1_000_000), delta(text="no"), prompt=prompt))
    comparer.add(pair(delta(text="x"), error="E: " + secret * 100_000))
    report = comparer.take()["fraud"]
    assert max(looked_at) < 2000
    assert b"0123" not in msgspec.json.encode(report)
    assert "x" * 400 + "..." in [each.champion for each in report.worst]


def test_a_report_that_is_taken_while_a_text_is_redacted_is_whole_with_the_next(clock):
    taken = []

    def redact(text):
        taken.append(comparer.take())
        return text

    comparer = Comparer(lambda model: RULES, redact=redact, clock=clock)
    comparer.add(pair(delta(text="a"), delta(text="b"), prompt=Generate(text="hi", sampling=Sampling(temperature=0.0))))
    report, later = taken[0]["fraud"], comparer.take()["fraud"]
    assert (report.num_pairs, report.worst, later.num_pairs, len(later.worst)) == (1, [], 0, 1)
    report.merge(later)
    assert (report.num_pairs, [each.champion for each in report.worst]) == (1, ["a"])


def test_only_the_worst_are_kept(comparer):
    for n in range(100):
        comparer.add(pair(score(1.0), score(2.0 + n)))
    worst = comparer.take()["fraud"].worst
    assert len(worst) == NUM_WORST and [each.note for each in worst[:2]] == ["'score': 101 instead of 1", "'score': 100 instead of 1"]


# Adding up


def fill(comparer, numbers):
    random = np.random.default_rng(3)
    values = random.normal(size=200)
    for n in numbers:
        comparer.add(pair(score(values[n]), score(values[n] + (0.5 if n % 9 == 0 else 0.0)), seconds=(0.01 * n, 0.02 * n)))
    comparer.add(pair(score(1.0), error="ModelError: broken"))


def test_reports_of_servers_add_up_and_survive_json(clock):
    def comparer():
        return Comparer(lambda model: RULES, clock=clock)

    whole, first, second = comparer(), comparer(), comparer()
    fill(whole, range(200))
    whole.add(pair(score(1.0), error="ModelError: broken"))
    fill(first, range(70))
    clock.now = 2000.0
    fill(second, range(70, 200))
    one, other, all_of_them = (again(each.take()["fraud"]) for each in (first, second, whole))
    one.merge(other)
    assert (one.begin, one.end) == (1000.0, 2000.0)
    assert (one.num_pairs, one.num_agree, one.num_failed) == (200, 177, 2)
    assert one.numbers["score"].champion == all_of_them.numbers["score"].champion
    assert one.errors == all_of_them.errors and one.candidate_latency == all_of_them.candidate_latency
    assert [each.distance for each in one.worst] == pytest.approx([each.distance for each in all_of_them.worst])
    assert one.describe(RULES)["agreement"] == all_of_them.describe(RULES)["agreement"]


def test_pairs_of_another_candidate_are_another_report(comparer, clock):
    comparer.add(pair(score(1.0), score(1.0)))
    old = comparer.take()["fraud"]
    clock.now += 1.0
    comparer.add(pair(score(1.0), score(1.0)))
    comparer.add(pair(score(1.0), score(9.0), candidate_version="9"))
    new = comparer.take()["fraud"]
    assert (new.candidate, new.num_pairs, new.num_agree) == ("9", 1, 0)
    late = again(old)
    late.merge(new)
    assert (late.candidate, late.num_pairs) == ("9", 1)
    new.merge(old)
    assert (new.candidate, new.num_pairs) == ("9", 1)


# What was true


def test_feedback_says_which_version_is_better_calibrated(comparer):
    for n in range(50):
        truth = float(n % 2)
        wrong = n % 10 < 2
        champion = tensors(p=[[0.3, 0.7] if bool(truth) != wrong else [0.7, 0.3]])
        comparer.add(pair(champion, tensors(p=[[0.05, 0.95] if truth else [0.95, 0.05]]), log_id=f"r{n}"))
    assert all(comparer.label(f"r{n}", float(n % 2)) for n in range(50))
    assert not comparer.label("r0", 1.0) and not comparer.label("nobody", 1.0)
    ours, theirs = again(comparer.take()["fraud"]).describe(RULES)["labelled"]["p"]
    assert (ours["labels"], ours["accuracy"], theirs["accuracy"]) == (50, 0.8, 1.0)
    assert ours["calibration_error"] == pytest.approx(0.1) and theirs["mean_square"] < ours["mean_square"]


def test_feedback_may_come_after_the_report_was_taken_but_not_after_the_candidate_changed(comparer):
    comparer.add(pair(score(0.9), score(0.8), log_id="a"))
    comparer.add(pair(score(0.9), score(0.8), log_id="b"))
    comparer.take()
    assert comparer.label("a", 1.0)
    assert comparer.take()["fraud"].labelled["score"][0].num == 1
    comparer.add(pair(score(0.9), score(0.8), log_id="c", candidate_version="9"))
    assert not comparer.label("b", 1.0)


def test_answers_that_wait_for_feedback_are_bounded(comparer):
    for n in range(MAX_UNLABELLED + 1):
        comparer.add(pair(score(0.9), score(0.9), log_id=f"r{n}"))
    assert not comparer.label("r0", 1.0) and comparer.label("r1", 1.0)
