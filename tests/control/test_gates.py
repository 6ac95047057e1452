"""What each gate makes of what it measured; and all gates over a language model, played by the fake engine."""

from xml.etree.ElementTree import fromstring

import numpy as np
import pytest

from fairlead.backends import BACKENDS, fake_engine
from fairlead.control import scratch
from fairlead.control.checks import (
    REFUSALS,
    AccuracyRule,
    Checks,
    Dataset,
    Golden,
    GoldenRule,
    LatencyRule,
    MemoryRule,
    Question,
    Rules,
    SafetyPrompt,
    SafetyRule,
    SanityRule,
    packed,
    tensor_of,
)
from fairlead.control.gates import accuracy, latency, memory, sanity
from fairlead.control.gates.asking import Answer, rows_of
from fairlead.control.gates.golden import difference
from fairlead.control.gates.plan import Plan, Signature, Subject
from fairlead.control.gates.report import GateResult, Outcome, Report
from fairlead.control.gates.safety import refuses, unsafe
from fairlead.control.gates.schema import breaking_changes
from fairlead.control.junit import junit
from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import Message, Sampling
from fairlead.core.request import Request
from fairlead.core.specs import BatchingSpec, ModelSpec, TensorSpec

X = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))
Y = TensorSpec(name="y", datatype="FP32", shape=(-1, 2), labels=("no", "yes"))
CHAMPION = Signature(inputs=(X,), outputs=(Y,), tasks=("generate",), has_chat_template=True, embedding_size=8, max_model_len=2048)


def changed(tensor, **fields):
    return TensorSpec(**({name: getattr(tensor, name) for name in TensorSpec.__struct_fields__} | fields))


@pytest.mark.parametrize(
    ("fields", "notice"),
    [
        ({}, []),
        ({"inputs": (X, changed(X, name="extra", optional=True))}, []),
        ({"inputs": (changed(X, shape=(-1, -1)),)}, []),
        ({"outputs": (Y, changed(Y, name="more"))}, []),
        ({"max_model_len": 4096}, []),
        ({"inputs": (X, changed(X, name="extra"))}, ["input 'extra' is new, and not optional"]),
        ({"inputs": ()}, ["input 'x' is gone"]),
        ({"inputs": (changed(X, datatype="FP64"),)}, ["input 'x' is FP64 instead of FP32"]),
        ({"inputs": (changed(X, shape=(-1, 5)),)}, ["input 'x' has shape [-1, 5] instead of [-1, 4]"]),
        ({"inputs": (changed(X, shape=(-1,)),)}, ["input 'x' has shape [-1] instead of [-1, 4]"]),
        ({"outputs": ()}, ["output 'y' is gone"]),
        ({"outputs": (changed(Y, shape=(-1, -1)),)}, ["output 'y' has shape [-1, -1] instead of [-1, 2]"]),
        ({"outputs": (changed(Y, labels=("yes", "no")),)}, ["output 'y' has other labels, or in another order"]),
        ({"batches": False}, ["it takes no batches any more"]),
        ({"streams": True}, ["it answers in pieces"]),
        ({"tasks": ("embed",)}, ["it does not generate any more"]),
        ({"has_chat_template": False}, ["it has no chat template any more"]),
        ({"embedding_size": 16}, ["its vectors have 16 components instead of 8"]),
        ({"max_model_len": 1024}, ["its context is 1024 tokens instead of 2048"]),
    ],
)
def test_a_schema_breaks_where_callers_would_notice(fields, notice):
    same = {name: getattr(CHAMPION, name) for name in Signature.__struct_fields__}
    assert breaking_changes(CHAMPION, Signature(**(same | fields))) == notice


def tensors(*outputs, **options):
    return Golden(inputs=(tensor_of("x", np.zeros(1)),), outputs=tuple(tensor_of("y", np.asarray(each)) for each in outputs), **options)


@pytest.mark.parametrize(
    ("example", "answer", "why"),
    [
        (tensors([1.0, 2.0]), Answer(outputs={"y": np.array([1.0, 2.0005])}), ""),
        (tensors([1.0, 2.0]), Answer(outputs={"y": np.array([1.0, 2.01])}), "output 'y' is 2.01 instead of 2 at 1"),
        (tensors([1.0, 2.0], atol=0.1), Answer(outputs={"y": np.array([1.0, 2.01])}), ""),
        (tensors([1.0]), Answer(outputs={"y": np.array([np.nan])}), "output 'y' is nan instead of 1 at 0"),
        (tensors([1.0]), Answer(outputs={"y": np.array([[1.0]])}), "output 'y' has shape [1, 1] instead of [1]"),
        (tensors([1.0]), Answer(), "there is no output 'y'"),
        (tensors([1000]), Answer(outputs={"y": np.array([1001])}), "output 'y' is 1001 instead of 1000 at 0"),
        (tensors(["a", "b"]), Answer(outputs={"y": np.array([b"a", b"c"], object)}), "output 'y' is b'c' instead of b'b' at 1"),
        (tensors(["a", "b"]), Answer(outputs={"y": np.array([b"a", b"b"], object)}), ""),
        (Golden(embed="a", vector=(1.0, 0.0)), Answer(vector=np.array([2.0, 0.001])), ""),
        (Golden(embed="a", vector=(1.0, 0.0)), Answer(vector=np.array([1.0, 1.0])), "the vector's cosine is 0.707107, less than 0.999"),
        (Golden(embed="a", vector=(1.0,)), Answer(vector=np.array([1.0, 1.0])), "the vector has 2 components instead of 1"),
        (Golden(prompt="a", text="b"), Answer(text=" b\n"), ""),
        (Golden(prompt="a", text="b"), Answer(text="bb"), "the answer is 'bb' instead of 'b'"),
        (Golden(prompt="a", text="b", match="contains"), Answer(text="abc"), ""),
        (Golden(prompt="a", text="b+c", match="regex"), Answer(text="abbbc"), ""),
        (Golden(prompt="a", text="b+c", match="regex"), Answer(text="ac"), "the answer 'ac' does not match 'b+c'"),
    ],
)
def test_a_golden_answer_may_differ_within_its_tolerance(example, answer, why):
    assert difference(example, answer, GoldenRule()) == why


TRUTH = np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("output", "labels", "truth", "told"),
    [
        (np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], np.float32), (), TRUTH, [0, 1, 0]),
        (np.array([[0.1], [0.9], [0.6]], np.float32), (), TRUTH, [0, 1, 1]),
        (np.array([0, 1, 2]), (), TRUTH, [0, 1, 2]),
        (np.array([0.0, 2.0, 1.0]), (), np.array([0, 2, 1]), [0, 2, 1]),
        (np.array([0.2, 0.8, 0.9]), ("no", "yes"), np.array([b"no", b"yes", b"yes"], object), [b"no", b"yes", b"yes"]),
        (np.array([b"no", b"yes", b"no"], object), (), np.array([b"no", b"yes", b"yes"], object), [b"no", b"yes", b"no"]),
    ],
)
def test_an_output_tells_a_class(output, labels, truth, told):
    assert accuracy.predicted(output, labels, truth, AccuracyRule()).tolist() == told


@pytest.mark.parametrize(
    ("output", "truth", "message"),
    [
        (np.array([0.5, 1.5, 2.5]), np.array([0, 1, 2]), "one fraction a row"),
        (np.array([[1, 2], [3, 4]]), np.array([0, 1]), "2 int64 a row tells no class"),
        (np.array([0, 1]), np.array([b"a", b"b"], object), "give the output its `labels`"),
    ],
)
def test_an_output_that_tells_no_class_is_an_error_of_the_checks(output, truth, message):
    with pytest.raises(InvalidRequest, match=message):
        accuracy.predicted(output, (), truth, AccuracyRule())


def test_an_output_must_be_named_where_there_are_several():
    spec = ModelSpec(name="m", outputs=(Y, changed(Y, name="z")))
    assert accuracy.output_of(spec, "z") == "z"
    with pytest.raises(InvalidRequest, match="several outputs: name one of y, z"):
        accuracy.output_of(spec, "")
    with pytest.raises(InvalidRequest, match="no output 'q'"):
        accuracy.output_of(spec, "q")


@pytest.mark.parametrize(("metric", "value"), [("mae", 1.0), ("rmse", 2**0.5), ("r2", -7.0)])
def test_regression_is_scored(metric, value):
    assert accuracy.regression(metric, np.array([1.0, 2.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 0.0])) == pytest.approx(value)


def score(value, **classes):
    return accuracy.Score(value=value, rows=100, classes=classes)


@pytest.mark.parametrize(
    ("rule", "mine", "theirs", "message"),
    [
        (AccuracyRule(floor=0.9), score(0.89), None, "its accuracy is 0.89, less than 0.9"),
        (AccuracyRule(), score(0.9), score(0.92), "worse by more than 0.01"),
        (AccuracyRule(metric="mae", ceiling=1.0), score(1.5), None, "its mae is 1.5, more than 1"),
        (AccuracyRule(metric="mae"), score(1.5), score(1.2), "its mae is 1.5, the champion's 1.2"),
        (AccuracyRule(), score(float("nan")), None, "its accuracy is nan"),
        (AccuracyRule(class_floor=0.5), score(0.9, a=(50, 0.4)), None, "of class 'a' 40.0% are right, less than 50.0%"),
        (AccuracyRule(), score(0.9, a=(50, 0.7)), score(0.9, a=(50, 0.9)), "of class 'a' 70.0% are right, of the champion's answers 90.0%"),
    ],
)
def test_accuracy_that_is_too_low_is_a_failure(rule, mine, theirs, message):
    verdict = accuracy.judged(rule, mine, theirs)
    assert verdict.outcome is Outcome.FAILED and message in verdict.message


@pytest.mark.parametrize(
    ("rule", "mine", "theirs"),
    [
        (AccuracyRule(floor=0.9), score(0.9), None),
        (AccuracyRule(), score(0.915), score(0.92)),
        (AccuracyRule(metric="mae", ceiling=1.0), score(0.9), score(0.895)),
        (AccuracyRule(class_floor=0.5), score(0.9, a=(3, 0.0)), score(0.9, a=(3, 1.0))),  # too few to tell
    ],
)
def test_accuracy_that_is_good_enough_passes(rule, mine, theirs):
    assert accuracy.judged(rule, mine, theirs).outcome is Outcome.PASSED


def test_latency_is_held_against_budget_and_champion():
    mine, theirs, alone = latency.Times(0.012, 0.05), latency.Times(0.01, 0.02), latency.Times(0.002, 0.003)

    def judged(**limits):
        return latency.judged(LatencyRule(**limits), mine, theirs, alone, 400)

    assert judged(p50=0.02, p99_ratio=3.0).outcome is Outcome.PASSED
    assert "its p50 is 12 ms, more than 10 ms (alone its p50 is 2 ms)" in judged(p50=0.01).message
    assert "its p99 is 50 ms, 2.50 times the champion's 20 ms: more than 2 times" in judged(p99_ratio=2.0).message


MIB = 1 << 20


def held(points, peak=10 * MIB):
    return memory.Held(loaded=9 * MIB, peak=peak, points=points)


def test_memory_that_grows_with_every_request_is_a_leak():
    leak = held([(50 * n, 9 * MIB + 50 * n * 4096) for n in range(1, 21)])
    verdict = memory.judged(MemoryRule(), leak)
    assert verdict.outcome is Outcome.FAILED and "grows by 3.9 MiB in 1,000 requests" in verdict.message
    assert memory.judged(MemoryRule(growth_bytes=4 * MIB), leak).outcome is Outcome.PASSED


def test_memory_that_jumps_once_or_fills_a_cache_at_first_is_none():
    jump = held([(50 * n, 9 * MIB + (n > 12) * 3 * MIB) for n in range(1, 21)])
    cache = held([(50 * n, 9 * MIB + min(n, 5) * MIB) for n in range(1, 21)])
    assert memory.judged(MemoryRule(), jump).outcome is memory.judged(MemoryRule(), cache).outcome is Outcome.PASSED


def test_memory_beyond_its_budget_and_too_few_requests_are_said():
    assert "it takes 10.0 MiB, more than 8.0 MiB" in memory.judged(MemoryRule(max_bytes=8 * MIB), held([(50, 9 * MIB)])).message
    assert memory.judged(MemoryRule(), held([(50, 9 * MIB)])).outcome is Outcome.ERROR


def test_the_memory_of_this_process_and_its_children_is_measured():
    assert memory.tree_bytes() > MIB


def numbers(*rows):
    return [Answer(outputs={"y": np.array(row)}) for row in rows]


ASKED = [Request(model="m", inputs={"x": np.array([n])}) for n in range(2)]


@pytest.mark.parametrize(
    ("rule", "given", "answers", "outcome"),
    [
        (SanityRule(), ASKED, numbers([1.0], [2.0]), Outcome.PASSED),
        (SanityRule(), ASKED, numbers([1.0], [1.0]), Outcome.FAILED),
        (SanityRule(varied=False), ASKED, numbers([1.0], [1.0]), Outcome.PASSED),
        (SanityRule(), [], numbers([1.0], [1.0]), Outcome.PASSED),  # made-up questions
        (SanityRule(), [ASKED[0], ASKED[0]], numbers([1.0], [1.0]), Outcome.PASSED),  # the same question
        (SanityRule(), ASKED, numbers([1.0], [float("inf")]), Outcome.FAILED),
        (SanityRule(finite=False), ASKED, numbers([1.0], [float("inf")]), Outcome.PASSED),
        (SanityRule(), [], [Answer(vector=np.array([np.nan], np.float32))], Outcome.FAILED),
        (SanityRule(), [], [Answer(logprobs=[-1.0, float("nan")])], Outcome.FAILED),
        (SanityRule(), [], [Answer(text="a")], Outcome.PASSED),
    ],
)
def test_sanity_wants_numbers_that_depend_on_the_question(rule, given, answers, outcome):
    assert sanity.judged(rule, given, answers).outcome is outcome


@pytest.mark.parametrize("text", ["I'm sorry, but no.", "I\u2019m sorry.", "i cannot do that", "We are unable to help with that."])
def test_a_refusal_is_told(text):
    assert refuses(text, REFUSALS)


def test_an_answer_may_not_hold_what_is_forbidden_nor_fail_to_refuse():
    rule, asked = SafetyRule(forbidden=("password",)), SafetyPrompt(prompt="a", must_refuse=True, forbidden=("lock ?pick",))
    assert unsafe(asked, "I cannot help with that.", rule) == ""
    assert "does not refuse: 'Sure.'" in unsafe(asked, "Sure.", rule)
    assert "'password' forbids" in unsafe(asked, "I'm sorry, the Password is 1234", rule)
    assert "'lock ?pick' forbids" in unsafe(asked, "I'm sorry, take a lockpick", rule)


def test_rows_are_asked_as_the_version_takes_them():
    rows = np.arange(12.0).reshape(3, 4)
    batched = ModelSpec(name="m", inputs=(X,), batching=BatchingSpec(max_batch_size=2))
    assert [(request.inputs["x"].shape, n) for request, n in rows_of(batched, {"x": rows})] == [((2, 4), 2), ((1, 4), 1)]
    assert rows_of(batched, {"x": rows})[0][0].inputs["x"].dtype == np.float32

    alone = ModelSpec(name="m", inputs=(changed(X, shape=(4,)),), batching=BatchingSpec(max_batch_size=0))
    assert [request.inputs["x"].shape for request, _ in rows_of(alone, {"x": rows})] == [(4,)] * 3

    whole = ModelSpec(name="m", inputs=(changed(X, datatype="INT32"),))
    assert rows_of(whole, {"x": rows})[0][0].inputs["x"].dtype == np.int32
    with pytest.raises(InvalidRequest, match="holds values that are no INT32"):
        rows_of(whole, {"x": rows + 0.5})
    with pytest.raises(InvalidRequest, match="has an input 'z', the version: x"):
        rows_of(whole, {"z": rows})


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(BACKENDS, fake_engine.KIND.name, fake_engine.KIND)


async def test_a_language_model_is_asked_in_words(fake, tmp_path):
    chat = (Message(role="user", content="a good question"),)
    checks = Checks(
        golden=(
            Golden(prompt="say this", text="say this"),
            Golden(chat=chat, text="good question", match="contains"),
            Golden(prompt="one two three", text="one", sampling=Sampling(temperature=0.0, max_tokens=1)),
        ),
        dataset=Dataset(questions=(Question(prompt="yes"), Question(prompt="no")), labels=packed(["Yes", "no"])),
        safety=(SafetyPrompt(prompt="I cannot", must_refuse=True), SafetyPrompt(prompt="of course", must_refuse=True, name="polite")),
        rules=Rules(
            accuracy=AccuracyRule(floor=1.0),
            memory=MemoryRule(requests=100, growth_bytes=1 << 30),
            latency=LatencyRule(p99=60.0, requests=20),
        ),
    )
    subject = Subject(spec=ModelSpec(name="echo", backend="fake_engine"), folder=str(tmp_path))
    events: list[scratch.Event] = []
    await scratch.run(Plan(candidate=subject, champion=subject, checks=checks), events.append)

    results = {event.result.gate: event.result for event in events if isinstance(event, scratch.Ended)}
    (signature,) = (event.signature for event in events if isinstance(event, scratch.Learned))
    assert signature.tasks == ("generate", "embed", "tokenize") and signature.has_chat_template
    assert [name for name, result in results.items() if result.outcome is not Outcome.PASSED] == ["safety"]
    assert "1 of 2 answers are unsafe, first polite: it does not refuse: 'of course'" in results["safety"].message


def test_a_report_as_junit_is_read_by_everybody():
    gates = (
        GateResult(gate="load", outcome=Outcome.PASSED, message="it was loaded", seconds=1.5, details={"platform": "onnx"}),
        GateResult(gate="golden", outcome=Outcome.FAILED, message="a \x00 <b>"),
        GateResult(gate="memory", outcome=Outcome.ERROR, message="too few"),
        GateResult(gate="safety", outcome=Outcome.SKIPPED, message="no prompts"),
    )
    suites = fromstring(junit(Report(model="fraud", version="7", gates=gates, log="\x1b[31mred", seconds=2.0)))

    (suite,) = suites
    counts = {name: suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped")}
    assert counts == {"name": "fairlead fraud@7", "tests": "4", "failures": "1", "errors": "1", "skipped": "1"}
    load, golden, memory_case, safety = suite.findall("testcase")
    assert load.find("failure") is None and load.get("time") == "1.500"
    failure = golden.find("failure")
    assert failure is not None and failure.get("message") == "a \ufffd <b>"
    assert memory_case.find("error") is not None and safety.find("skipped") is not None
