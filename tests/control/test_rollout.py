"""Rollouts as stories on a virtual clock: a tick a second, and what is published, promoted, returned and told."""

from collections.abc import Callable
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from fairlead.control.rollout import (
    Action,
    Command,
    FeedbackSum,
    Loaded,
    Measured,
    Member,
    Note,
    Outcome,
    PairCount,
    Phase,
    Promote,
    Publish,
    Reject,
    Release,
    Return,
    Rollout,
    Validated,
    advance,
    begin,
    default_metrics,
    describe,
    standing,
)
from fairlead.core.errors import InvalidRequest
from fairlead.core.rollout import DIRECT, Breakers, MetricRule, RolloutPolicy, ShadowRules, Step
from fairlead.core.window import Window, bucket_of
from fairlead.store.transactions import Conflict
from tests.control.traffic import Fault, Scenario, simulate

ERRORS = (MetricRule(name="error_rate"),)
TWO_STEPS = RolloutPolicy(
    steps=(Step(share=0.1, seconds=20.0, min_requests=100), Step(share=0.5, seconds=20.0, min_requests=500)),
    metrics=ERRORS,
    interval=5.0,
    rollback_seconds=60.0,
    validate=False,
)
FRAUD = Member(model="fraud", champion=6, candidate=7, metrics=ERRORS)


class Story:
    """A rollout, its clock, and a hundred requests a second."""

    def __init__(
        self, policy: RolloutPolicy = TWO_STEPS, *members: Member, kind: Literal["canary", "shadow", "experiment"] = "canary"
    ) -> None:
        self.now = 1000.0
        self.actions: list[Action] = []
        self.rng = np.random.default_rng(0)
        self.rates: dict[tuple[str, int], float] = {}
        self.nonfinite: dict[tuple[str, int], int] = {}
        self.per_second = 100
        self.restarts: dict[str, int] = {}
        self.pairs: dict[str, PairCount] = {}
        self.feedback: dict[str, list[FeedbackSum]] = {}
        self.told(*begin("r1", kind=kind, members=members or [FRAUD], policy=policy, policy_name="p", actor="ada", now=self.now))

    def told(self, rollout: Rollout, actions: tuple[Action, ...]) -> tuple[Action, ...]:
        # whoever decides may die between two ticks: the next one reads this
        self.rollout = msgspec.json.decode(msgspec.json.encode(rollout), type=Rollout)
        assert self.rollout == rollout
        self.actions += actions
        return actions

    def tell(self, event: Validated | Loaded | Measured) -> tuple[Action, ...]:
        return self.told(*advance(self.rollout, event, self.now))

    def say(self, kind: Any, reason: str = "") -> tuple[Action, ...]:
        return self.told(*advance(self.rollout, Command(kind=kind, actor="ada", reason=reason), self.now))

    def loaded(self) -> "Story":
        self.tell(Loaded(True))
        return self

    @property
    def share(self) -> float:
        wanted = standing(self.rollout)
        return wanted.share if isinstance(wanted, Publish) else float(isinstance(wanted, Promote | Release))

    def window(self, member: Member) -> Window:
        window = Window(model=member.model, begin=self.now, end=self.now + 1)
        candidate = int(self.rng.binomial(self.per_second, self.share))
        for version, num in ((member.champion, self.per_second - candidate), (member.candidate, candidate)):
            if not num:
                continue
            tally = window.tally(str(version), "standard")
            tally.requests, tally.nonfinite = num, self.nonfinite.get((member.model, version), 0)
            tally.errors = int(self.rng.binomial(num, self.rates.get((member.model, version), 0.01)))
            if num > tally.errors:
                tally.latency = {bucket_of(0.02): num - tally.errors}
        return window

    def tick(self) -> tuple[Action, ...]:
        windows = {member.model: self.window(member) for member in self.rollout.members}
        self.now += 1
        return self.tell(Measured(windows=windows, restarts=self.restarts, pairs=self.pairs, feedback=self.feedback))

    def until(self, *phases: Phase, most: int = 2000) -> "Story":
        for _ in range(most):
            if self.rollout.phase in phases:
                return self
            self.tick()
        raise AssertionError(f"still {self.rollout.phase}: {self.rollout.reason}")

    @property
    def notes(self) -> list[str]:
        return [action.action for action in self.actions if isinstance(action, Note)]

    @property
    def deeds(self) -> list[Action]:
        return [action for action in self.actions if not isinstance(action, Note)]


def test_a_good_candidate_becomes_the_champion_step_by_step():
    story = Story().loaded().until(Phase.PROMOTED)
    assert story.deeds == [Publish(), Publish(0.1), Publish(0.5), Promote()]
    assert story.notes == ["rollout.start", "rollout.step", "rollout.step", "rollout.promote"]
    assert [(past.phase, past.share) for past in story.rollout.history] == [
        (Phase.LOADING, 0.0), (Phase.PROGRESSING, 0.1), (Phase.PROGRESSING, 0.5), (Phase.PROMOTED, 0.0)
    ]  # fmt: skip
    assert 0.1 < story.rollout.exposure["exposure"] < 0.5  # type: ignore[operator]
    promoted_at = story.now
    story.until(Phase.COMPLETE)
    assert story.now == promoted_at + 60 and story.deeds[-1] == Release()
    assert story.rollout.ended == story.now


def test_a_step_takes_its_seconds_and_its_sample():
    story = Story().loaded()
    began = story.now
    while story.rollout.step == 0:
        story.tick()
    assert story.now == began + 20
    story = Story()
    story.per_second = 10  # one in a second for the candidate: a hundred seconds
    story.loaded()
    while story.rollout.step == 0:
        story.tick()
    assert 70 < story.now - began < 140 and (story.now - began) % 5 == 0


def test_a_candidate_with_more_errors_is_returned_and_rejected():
    story = Story()
    story.rates["fraud", 7] = 0.1
    story.loaded().until(Phase.ABORTED)
    assert story.rollout.reason.startswith("error_rate is worse: ")
    assert story.deeds[-2:] == [Return(), Reject("fraud", 7, story.rollout.reason)]
    assert story.notes[-1] == "rollout.abort" and story.rollout.ended == story.now
    assert advance(story.rollout, Measured(windows={}), story.now) == (story.rollout, ())


def test_gates_come_first_where_the_policy_asks_for_them():
    policy = msgspec.structs.replace(TWO_STEPS, validate=True)
    story = Story(policy)
    assert story.rollout.phase is Phase.VALIDATING and story.deeds == [] and standing(story.rollout) == Return()
    assert story.tick() == () and story.tell(Loaded(True)) == ()  # not yet
    story.tell(Validated(True))
    assert story.rollout.phase is Phase.LOADING and story.deeds == [Publish()]

    failed = Story(policy)
    failed.tell(Validated(False, "golden: 3 of 10 answers differ", "fraud"))
    assert failed.rollout.phase is Phase.ABORTED
    assert failed.deeds == [Return(), Reject("fraud", 7, "did not pass its gates: golden: 3 of 10 answers differ")]

    rollout, actions = begin("r", kind="canary", members=[FRAUD], policy=policy, policy_name="p", actor="a", now=0.0, validated=True)
    assert rollout.phase is Phase.LOADING and actions[0] == Publish()


def test_a_candidate_that_cannot_be_loaded_is_rejected_and_one_that_is_late_is_not():
    failed = Story()
    failed.tell(Loaded(False, "no such file: model.onnx"))
    assert failed.deeds[-1] == Reject("fraud", 7, "cannot be loaded: no such file: model.onnx")
    late = Story()
    late.now += 899
    assert late.tell(Loaded(False)) == ()
    late.now += 1
    late.tell(Loaded(False))
    assert late.rollout.phase is Phase.ABORTED and late.deeds[-1] == Return()


def nans(story: Story) -> None:
    story.nonfinite["fraud", 7] = 1


def crashes(story: Story) -> None:
    story.restarts["fraud"] = 3


def fails(story: Story) -> None:
    story.rates["fraud", 7] = 0.9
    story.per_second = 1000


@pytest.mark.parametrize(("trouble", "word"), [(nans, "NaN"), (crashes, "died 3 times"), (fails, "answers are errors")])
@pytest.mark.parametrize("phase", [Phase.PROGRESSING, Phase.PAUSED, Phase.PROMOTED])
def test_a_hard_breaker_acts_in_the_tick_in_which_it_fires(trouble: Callable[[Story], None], word: str, phase: Phase):
    story = Story().loaded()
    story.tick()
    if phase is Phase.PAUSED:
        story.say("pause")
    story.until(phase)
    trouble(story)
    actions = story.tick()
    assert isinstance(actions[0], Return) and isinstance(actions[1], Reject) and word in actions[1].reason
    assert story.rollout.phase is Phase.ABORTED


def test_crashes_while_it_loads_are_enough():
    story = Story()
    story.restarts["fraud"] = 3
    story.tick()
    assert story.rollout.phase is Phase.ABORTED


def test_what_hits_both_at_once_fires_no_breaker():
    story = Story().loaded()
    for version in (6, 7):
        story.rates["fraud", version] = 0.9
        story.nonfinite["fraud", version] = 1
    for _ in range(10):
        story.tick()
    assert story.rollout.phase is Phase.PROGRESSING


def test_a_breaker_does_not_fire_by_chance_where_a_fifth_of_all_requests_fails():
    story = Story(msgspec.structs.replace(TWO_STEPS, metrics=(), breakers=Breakers(min_requests=5)))
    story.rates["fraud", 6] = story.rates["fraud", 7] = 0.2
    story.loaded().until(Phase.PROMOTED)


def test_no_data_is_never_a_success():
    story = Story(msgspec.structs.replace(TWO_STEPS, inconclusive_limit=3)).loaded()
    story.per_second = 0
    story.until(Phase.PAUSED)
    assert story.now == 1000.0 + 3 * 5 and story.share == 0.1
    assert story.rollout.last is Outcome.INCONCLUSIVE and "nothing to compare" in story.rollout.reason
    story.per_second = 100
    for _ in range(5):
        story.tick()
    assert story.rollout.phase is Phase.PROGRESSING and story.notes[-2:] == ["rollout.pause", "rollout.resume"]
    story.until(Phase.PROMOTED)


def test_a_model_that_is_seldom_asked_is_not_paused_for_that():
    """One request a second, 1 in 10 for the candidate: most measurements have nothing of it."""
    story = Story(msgspec.structs.replace(TWO_STEPS, inconclusive_limit=2)).loaded()
    story.per_second = 1
    for _ in range(300):
        story.tick()
    assert story.rollout.phase is Phase.PROGRESSING and "rollout.pause" not in story.notes


def test_who_was_told_to_pause_while_nothing_came_stays_paused():
    story = Story(msgspec.structs.replace(TWO_STEPS, inconclusive_limit=3)).loaded()
    story.per_second = 0
    story.until(Phase.PAUSED)
    story.say("pause", "look at it tomorrow")
    story.per_second = 100
    for _ in range(30):
        story.tick()
    assert story.rollout.phase is Phase.PAUSED


def test_measurements_that_cannot_be_made_abort_and_reject_nobody():
    story = Story().loaded()
    for _ in range(19):
        story.now += 1
        story.tell(Measured(windows=None))
    assert story.rollout.phase is Phase.PROGRESSING and story.rollout.num_errors == 3
    story.now += 1
    story.tell(Measured(windows=None))
    assert story.rollout.phase is Phase.ABORTED and story.deeds[-1] == Return()
    assert "could not be measured 4 times" in story.rollout.reason


def test_failed_measurements_may_be_put_up_with():
    story = Story(msgspec.structs.replace(TWO_STEPS, failure_limit=2))
    story.rates["fraud", 7] = 0.1
    story.loaded().until(Phase.ABORTED)
    other = Story()
    other.rates["fraud", 7] = 0.1
    other.loaded().until(Phase.ABORTED)
    assert story.now == other.now + 10 and story.rollout.num_failed == 3


def test_a_step_without_its_sample_pauses_when_patience_is_over():
    story = Story(msgspec.structs.replace(TWO_STEPS, patience=40.0)).loaded()
    story.per_second = 10
    story.until(Phase.PAUSED)
    assert story.now == 1040.0 and "not done after 40 s" in story.rollout.reason
    story.say("resume")
    for _ in range(39):
        story.tick()
    assert story.rollout.phase is Phase.PROGRESSING
    story.tick()
    assert story.rollout.phase is Phase.PAUSED


def test_people_pause_resume_promote_and_abort():
    story = Story().loaded()
    story.tick()
    story.say("pause", "lunch")
    assert story.rollout.reason == "lunch" and story.share == 0.1
    for _ in range(100):
        story.tick()
    assert story.rollout.phase is Phase.PAUSED and story.rollout.step == 0
    story.say("resume")
    assert story.rollout.phase is Phase.PROGRESSING
    assert story.say("promote", "it is fine")[0] == Promote()
    note = story.actions[-1]
    assert isinstance(note, Note) and (note.action, note.actor, note.reason) == ("rollout.promote", "ada", "it is fine")

    aborted = Story().loaded()
    assert aborted.say("abort")[0] == Return() and aborted.deeds[-1] == Return()  # nobody is rejected
    assert aborted.rollout.reason == "aborted by ada"


def test_within_the_rollback_window_everything_returns_at_once():
    story = Story().loaded().until(Phase.PROMOTED)
    with pytest.raises(Conflict, match="`rollback` returns to the version before"):
        story.say("abort")
    assert story.say("rollback", "complaints")[0] == Return()
    assert story.rollout.phase is Phase.ABORTED and story.rollout.reason == "complaints" and story.notes[-1] == "rollout.rollback"


@pytest.mark.parametrize(
    ("phase", "refused"),
    [
        (Phase.LOADING, ["pause", "resume", "promote"]),
        (Phase.PROGRESSING, ["resume"]),
        (Phase.PAUSED, ["pause"]),
        (Phase.PROMOTED, ["pause", "resume", "promote", "abort"]),
        (Phase.COMPLETE, ["pause", "resume", "promote", "abort", "rollback"]),
    ],
)
def test_a_command_that_the_phase_does_not_admit_is_refused(phase, refused):
    story = Story()
    if phase is not Phase.LOADING:
        story.loaded()
    if phase is Phase.PAUSED:
        story.say("pause")
    story.until(phase)
    for kind in ("pause", "resume", "promote", "abort", "rollback"):
        command = Command(kind=kind, actor="ada")
        if kind in refused:
            with pytest.raises(Conflict, match=f"{phase}: it cannot {kind}"):
                advance(story.rollout, command, story.now)
        else:
            advance(story.rollout, command, story.now)


def test_a_step_that_holds_waits_for_an_approval():
    policy = msgspec.structs.replace(TWO_STEPS, steps=(Step(share=0.1, seconds=10.0, hold=True), Step(share=0.5, seconds=10.0)))
    story = Story(policy).loaded().until(Phase.PAUSED)
    assert "holds" in story.rollout.reason
    for _ in range(50):
        story.tick()
    assert story.share == 0.1
    assert story.say("resume")[0] == Publish(0.5)


def test_the_first_version_of_a_model_gets_everything_as_soon_as_it_is_loaded():
    story = Story(TWO_STEPS, Member(model="fraud", candidate=1, metrics=ERRORS)).loaded()
    assert story.deeds == [Publish(), Promote(), Release()] and story.rollout.phase is Phase.COMPLETE


def test_without_steps_everything_is_given_at_once_and_can_be_taken_back():
    story = Story(msgspec.structs.replace(DIRECT, validate=False)).loaded()
    assert story.deeds == [Publish(), Promote()] and story.rollout.phase is Phase.PROMOTED
    story.rates["fraud", 7] = 0.9
    story.until(Phase.ABORTED, most=2)
    assert story.deeds[-2] == Return()


def test_without_a_rollback_window_a_promotion_is_the_end():
    story = Story(msgspec.structs.replace(TWO_STEPS, rollback_seconds=0.0)).loaded().until(Phase.COMPLETE)
    assert story.deeds[-2:] == [Promote(), Release()]


def test_an_ensemble_and_its_members_go_together():
    parts = [Member(model=name, champion=1, candidate=2, metrics=ERRORS) for name in ("prepare", "score")]
    story = Story(TWO_STEPS, *parts).loaded().until(Phase.PROMOTED)
    assert story.deeds == [Publish(), Publish(0.1), Publish(0.5), Promote()]

    failing = Story(TWO_STEPS, *parts)
    failing.rates["score", 2] = 0.1
    failing.loaded().until(Phase.ABORTED)
    assert failing.deeds[-2:] == [Return(), Reject("score", 2, failing.rollout.reason)]
    assert failing.rollout.reason.startswith("score: error_rate is worse")
    # each of two tests has half of alpha
    assert {test.alpha for tests in failing.rollout.tests.values() for test in tests.values()} == {0.025}


def test_requests_that_were_split_by_the_step_before_are_not_compared():
    story = Story().loaded()
    window = Window(model="fraud", begin=story.now - 1, end=story.now)
    window.tally("6", "standard").requests = window.tally("7", "standard").requests = 100
    story.now += 1
    story.tell(Measured(windows={"fraud": window}))
    counted, test = story.rollout.counted["fraud"], story.rollout.tests["fraud"]["error_rate"]
    assert counted.requests == 200 and counted.step_answers == 0 and not test.known


def test_the_beginning_of_a_step_may_be_left_out():
    story = Story(msgspec.structs.replace(TWO_STEPS, initial_delay=10.0)).loaded()
    for _ in range(10):
        story.tick()
    assert story.rollout.counted["fraud"].step_answers == 0
    story.tick()
    assert story.rollout.counted["fraud"].step_answers > 0


SHADOW = RolloutPolicy(
    steps=(Step(shadow=0.2, seconds=20.0, min_requests=200),),
    metrics=ERRORS,
    interval=5.0,
    shadow=ShadowRules(min_agreement=0.9),
    validate=False,
)


def test_a_shadow_ends_with_a_finding_and_the_champion_stays():
    story = Story(SHADOW, kind="shadow").loaded()
    assert standing(story.rollout) == Publish(0.0, 0.2)
    story.pairs["fraud"] = PairCount(20, 20)
    story.until(Phase.COMPLETE)
    assert story.rollout.reason == "the outputs agree" and story.deeds[-1] == Return()
    assert story.rollout.exposure["candidate_requests"] == 0

    other = Story(SHADOW, kind="shadow").loaded()
    other.pairs["fraud"] = PairCount(18, 10, num_failed=2)
    other.until(Phase.COMPLETE)
    assert "its outputs are others: 50.0% of" in other.rollout.reason and other.deeds[-1] == Return()  # not rejected


def test_a_shadow_that_agrees_barely_is_watched_for_longer():
    story = Story(SHADOW, kind="shadow").loaded()
    story.pairs["fraud"] = PairCount(50, 46)
    for _ in range(25):
        story.tick()
    assert story.rollout.phase is Phase.PROGRESSING and story.rollout.counted["fraud"].step_answers >= 200
    story.until(Phase.COMPLETE)


def test_a_canary_may_begin_in_the_shadow():
    story = Story(msgspec.structs.replace(SHADOW, steps=(*SHADOW.steps, *TWO_STEPS.steps))).loaded()
    story.pairs["fraud"] = PairCount(50, 50)
    story.until(Phase.PROMOTED)
    assert story.deeds == [Publish(), Publish(0.0, 0.2), Publish(0.1), Publish(0.5), Promote()]
    other = Story(msgspec.structs.replace(SHADOW, steps=(*SHADOW.steps, *TWO_STEPS.steps))).loaded()
    other.pairs["fraud"] = PairCount(50, 20)
    other.until(Phase.ABORTED)
    assert isinstance(other.deeds[-1], Reject)


def test_copies_that_fail_fire_the_breaker():
    story = Story(SHADOW, kind="shadow").loaded()
    story.tick()
    story.pairs["fraud"] = PairCount(0, 0, num_failed=30)
    story.tick()
    assert story.rollout.phase is Phase.ABORTED and "30 of its last 30 answers are errors" in story.rollout.reason


def test_an_experiment_reports_and_leaves_the_decision_to_people():
    policy = msgspec.structs.replace(TWO_STEPS, steps=(Step(share=0.5, seconds=10.0, hold=True),))
    story = Story(policy, kind="experiment").loaded()
    story.rates["fraud", 7] = 0.05
    for _ in range(300):
        story.tick()
    assert story.rollout.phase is Phase.PROGRESSING and story.rollout.last is Outcome.SUCCESSFUL
    (member,) = describe(story.rollout, story.now)["members"]  # type: ignore[misc]
    (metric,) = member["metrics"]
    assert metric["verdict"] == "worse" and metric["difference"]["low"] > 0.01
    story.restarts["fraud"] = 3
    story.tick()
    assert story.rollout.phase is Phase.ABORTED


def test_what_users_post_is_compared_too():
    rule = MetricRule(name="feedback:thumbs", tolerance=0.05)
    story = Story(TWO_STEPS, msgspec.structs.replace(FRAUD, metrics=(rule,))).loaded()
    for seconds in range(1, 200):
        num = 20 * seconds
        story.feedback["fraud"] = [
            FeedbackSum("6", "thumbs", num, 0.9 * num, 0.9 * num),
            FeedbackSum("7", "thumbs", num, 0.6 * num, 0.6 * num),
            FeedbackSum("7", "other", num, 0.0, 0.0),
        ]
        story.tick()
        if story.rollout.phase is Phase.ABORTED:
            break
    assert story.rollout.reason == "feedback:thumbs is worse: 0.6, the champion's 0.9"


def test_a_rollout_is_described_for_people():
    story = Story(TWO_STEPS, msgspec.structs.replace(FRAUD, metrics=default_metrics(False))).loaded()
    for _ in range(10):
        story.tick()
    told = describe(story.rollout, story.now)
    assert msgspec.json.decode(msgspec.json.encode(told))  # it is JSON
    assert (told["phase"], told["step"], told["steps"], told["share"], told["step_seconds"]) == ("progressing", 1, 2, 0.1, 10.0)
    # 10 seconds of this step, then 20 more, since 500 answers come in 10
    assert told["eta_seconds"] == pytest.approx(30.0)
    (member,) = told["members"]  # type: ignore[misc]
    by_name = {metric["name"]: metric for metric in member["metrics"]}
    assert by_name["error_rate"]["verdict"] == "holds" and 0.0 <= by_name["error_rate"]["evidence"] < 1.0
    low, value, high = (by_name["error_rate"]["champion"][key] for key in ("low", "value", "high"))
    assert low < value < high and by_name["latency_p99"]["champion"]["value"] == pytest.approx(0.02, rel=0.03)
    story.until(Phase.PROMOTED)
    story.now += 10
    told = describe(story.rollout, story.now)
    assert told["share"] == 1.0 and told["eta_seconds"] == 50.0


def test_language_models_are_measured_by_their_tokens():
    assert [rule.name for rule in default_metrics(True)] == ["error_rate", "nonfinite_rate", "ttft_p99", "tpot_p99"]


@pytest.mark.parametrize(
    ("kind", "policy", "member", "words"),
    [
        ("shadow", TWO_STEPS, FRAUD, "all steps of a shadow"),
        ("experiment", TWO_STEPS, FRAUD, "an experiment has one step"),
        ("canary", TWO_STEPS, Member(model="m", champion=7, candidate=7), "is the champion already"),
        ("shadow", SHADOW, Member(model="m", candidate=7), "no champion"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(kind, policy, member, words):
    with pytest.raises(InvalidRequest, match=words):
        begin("r", kind=kind, members=[member], policy=policy, policy_name="p", actor="ada", now=0.0)


def test_a_rollout_of_a_model_twice_is_refused():
    with pytest.raises(InvalidRequest, match="each named once"):
        begin("r", kind="canary", members=[FRAUD, FRAUD], policy=TWO_STEPS, policy_name="p", actor="ada", now=0.0)


# What the standard policy promises, in small: benchmarks/rollout has it in full.


def test_simulated_rollouts_of_candidates_that_are_no_worse_are_promoted():
    runs = [simulate(Scenario("same", rate=200.0, drift=0.9), seed) for seed in range(20)]
    assert sum(run.promoted for run in runs) >= 19


@pytest.mark.parametrize("fault", [Fault(errors=2.0), Fault(latency=1.38)], ids=["errors", "latency"])
def test_simulated_rollouts_of_bad_candidates_are_rolled_back_before_they_have_seen_5_percent(fault):
    runs = [simulate(Scenario("worse", rate=200.0, fault=fault), seed) for seed in range(20)]
    assert all(run.rolled_back for run in runs)
    assert sum(run.exposure < 0.05 for run in runs) >= 19
