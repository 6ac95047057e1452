"""A version that is wrong is found by the gate that looks for it, in processes that are gone afterwards."""

import asyncio
import signal
import subprocess
import sys

import psutil
import pytest

from fairlead.control.checks import AccuracyRule, LatencyRule, MemoryRule, Rules
from fairlead.control.gates.plan import Signature
from fairlead.control.gates.report import GATES, Outcome
from fairlead.control.scratch import packed_plan
from fairlead.control.validation import validate
from fairlead.core.specs import TensorSpec
from tests.control.flowers import Iris

SECONDS = 60.0
"""Long enough for anything that happens at all."""
EVERYTHING = Rules(
    accuracy=AccuracyRule(floor=0.9),
    latency=LatencyRule(p99=SECONDS, p50_ratio=1000.0, requests=100),
    memory=MemoryRule(requests=200, growth_bytes=1 << 30),
)


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    return Iris(tmp_path_factory.mktemp("iris"))


async def outcomes(plan):
    """The report, and what each gate said in one word."""
    report = await asyncio.wait_for(validate(plan), SECONDS)
    assert [gate.gate for gate in report.gates] == list(GATES)
    return report, {gate.gate: gate.outcome for gate in report.gates}


def gate(report, name):
    return next(each for each in report.gates if each.gate == name)


async def test_a_good_version_passes_every_gate_and_its_signature_is_known(iris):
    told = []
    report = await asyncio.wait_for(validate(iris.plan(rules=EVERYTHING, against=True), told.append), SECONDS)

    assert report.ok and report.reason == ""
    assert tuple(told) == report.gates
    assert {each.gate: str(each.outcome) for each in told} == dict.fromkeys(GATES, "passed") | {"safety": "skipped"}
    assert report.signature is not None
    assert [each.name for each in report.signature.inputs] == ["x"]
    assert report.signature.outputs == (TensorSpec(name="scores", datatype="FP32", shape=(-1, 3)),)
    assert gate(report, "accuracy").details["accuracy"] == gate(report, "accuracy").details["champion"] > 0.9
    assert gate(report, "memory").details["peak_bytes"] > 1 << 20


async def test_what_is_not_asked_for_is_skipped_with_a_word_why(iris):
    plan = iris.plan()
    report, words = await outcomes(plan)

    assert report.ok
    assert [name for name, outcome in words.items() if outcome is Outcome.SKIPPED] == ["schema", "safety", "memory", "accuracy", "latency"]
    assert all(each.message for each in report.gates)


@pytest.mark.parametrize(
    ("fault", "rules", "culprit", "message"),
    [
        ("NaN", Rules(), "sanity", "hold NaN or infinity, in output 'scores'"),
        ("constant", Rules(), "sanity", "the same answer comes to"),
        ("fails", Rules(), "load", "no flowers today"),
        ("leaks", Rules(memory=MemoryRule(requests=400)), "memory", "in 1,000 requests, more than 1.0 MiB"),
        ("wrong for one class", Rules(accuracy=AccuracyRule(floor=0.5, margin=None)), "accuracy", "of class '1'"),
        ("slow under load", Rules(latency=LatencyRule(p50=0.1, requests=100)), "latency", "with 8 requests under way, its p50 is"),
        ("crashes", Rules(), "warm_up", "its first question is not answered"),
    ],
)
async def test_a_fault_is_found_by_the_gate_that_looks_for_it(iris, fault, rules, culprit, message):
    report, words = await outcomes(iris.plan(fault, rules, against=fault == "wrong for one class", num_golden=0))

    assert not report.ok
    assert words[culprit] is Outcome.FAILED
    assert message in gate(report, culprit).message
    assert report.reason.startswith(culprit)


async def test_another_schema_is_a_failure_unless_it_is_declared(iris):
    before = Signature(
        platform="python",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),),
        outputs=(TensorSpec(name="scores", datatype="FP32", shape=(-1, 3)),),
    )
    plan = iris.plan("flipped", num_golden=0)
    plan = type(plan)(candidate=plan.candidate, checks=plan.checks, signature=before)
    report, words = await outcomes(plan)

    assert words["schema"] is Outcome.FAILED
    assert "output 'scores' is gone" in report.reason

    declared = type(plan)(candidate=plan.candidate, checks=iris.checks(Rules(breaking=True), num_golden=0), signature=before)
    report, words = await outcomes(declared)
    assert words["schema"] is Outcome.PASSED and "breaking, as declared" in gate(report, "schema").message
    assert report.ok


async def test_a_golden_example_that_is_answered_otherwise_is_named(iris):
    report, words = await outcomes(iris.plan("constant"))

    assert words["golden"] is Outcome.FAILED
    assert "4 of 4 examples are answered otherwise, first flower 0: output 'scores' is" in gate(report, "golden").message


async def test_a_champion_that_does_not_load_is_nobodys_success(iris):
    plan = iris.plan(rules=EVERYTHING)
    plan = type(plan)(candidate=plan.candidate, checks=plan.checks, champion=iris.subject("fails"))
    report, words = await outcomes(plan)

    assert not report.ok
    assert words["schema"] is words["accuracy"] is words["latency"] is Outcome.ERROR
    assert "the champion cannot be loaded" in report.reason
    assert words["memory"] is Outcome.PASSED


async def hanging(iris, folder, rules):
    """A validation of a version that hangs on load, and the processes of it, once it hangs."""
    pids = folder / "pids"
    running = asyncio.create_task(validate(iris.plan("hangs on load", rules, pids=str(pids))))
    async with asyncio.timeout(SECONDS):
        while not pids.exists() and not running.done():
            await asyncio.sleep(0.01)
    return running, [psutil.Process(int(pid)) for pid in pids.read_text().split()]


async def gone(processes):
    """Ended; a zombie is, too, which waits for whoever took it over."""
    async with asyncio.timeout(SECONDS):
        for process in processes:
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.01)


async def test_a_version_that_hangs_on_load_is_ended_with_all_that_it_started(iris, tmp_path):
    running, processes = await hanging(iris, tmp_path, Rules(load_seconds=10.0))
    report = await asyncio.wait_for(running, SECONDS)

    assert report.reason == "load: it did not end within 10 s, and was ended"
    assert {each.outcome for each in report.gates[1:]} == {Outcome.SKIPPED}
    assert report.gates[1].message == "`load` ended the validation"
    assert report.signature is None
    await gone(processes)


async def test_a_validation_that_is_cancelled_leaves_nothing_behind(iris, tmp_path):
    running, processes = await hanging(iris, tmp_path, Rules())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, SECONDS)
    await gone(processes)


def test_the_scratch_process_ends_with_who_started_it(iris, tmp_path):
    plan = iris.plan("hangs on load", pids=str(tmp_path / "pids"))
    process = subprocess.Popen(
        [sys.executable, "-m", "fairlead.control.scratch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(packed_plan(plan))
        process.stdin.flush()
        assert b'"began"' in process.stdout.readline()
        process.stdin.close()
        assert process.wait(SECONDS) == -signal.SIGKILL


async def test_a_scratch_process_that_dies_is_the_fault_of_the_gate_that_was_asked(iris, tmp_path):
    running, (replica, asleep) = await hanging(iris, tmp_path, Rules())
    scratch = replica.parent().parent()  # above the fork server
    assert "fairlead.control.scratch" in scratch.cmdline()
    asleep.kill()
    scratch.kill()
    report = await asyncio.wait_for(running, SECONDS)

    assert report.reason == "load: its process ended (signal 9)"
    await gone([replica, asleep])
