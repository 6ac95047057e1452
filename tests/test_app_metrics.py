"""What metrics ask of the rooms."""

from fairlead.app_metrics import JobBacklog, _holds, _refusals, rollout_samples
from fairlead.control.rollout import Member, begin
from fairlead.core.errors import Unavailable
from fairlead.core.policy import Unit, rules_of
from fairlead.core.rollout import MetricRule, RolloutPolicy, Step
from fairlead.gateway.limits.ledger import Limiter
from fairlead.gateway.limits.meter import Subject
from fairlead.observe.counts import Counts
from fairlead.store.job_rows import Backlog

NOW = 1_772_366_400.0


def test_what_limits_and_budgets_refused_is_told_by_their_unit():
    counts = Counts()
    for model, reason in (
        ("a", "limit-input-tokens"),
        ("b", "limit-input-tokens"),
        ("a", "budget-money"),
        ("a", "limit-concurrent"),
        ("a", "queue-full"),
    ):
        counts.add("fairlead_gateway_refused_total", model, reason)
    found = {labels: number for _, labels, number in _refusals(counts)}
    assert found == {("limit", "input_tokens"): 2, ("budget", "money"): 1, ("limit", "concurrent"): 1}


def test_of_all_tenants_the_tightest_limit_is_shown_and_what_is_held_of_all_together():
    limiter, holds = Limiter(), []
    for name, tokens in (("acme", 10.0), ("zoo", 90.0)):
        subject = Subject(f"tenant:{name}", rules_of({"tokens_per_day": 100, "tokens_per_minute": 1000, "concurrent": 4}))
        holds.append(limiter.hold((subject,), {Unit.REQUESTS: 1.0, Unit.TOKENS: tokens}, NOW))
    found = {(name, *labels): value for name, labels, value in filter(None, _holds(limiter, NOW))}
    assert found == {
        ("fairlead_limits_held", "tenant", "tokens"): 100.0,
        ("fairlead_limits_held", "tenant", "concurrent"): 2.0,
        ("fairlead_limits_remaining_ratio", "budget", "tokens"): 0.1,
        ("fairlead_limits_remaining_ratio", "limit", "tokens"): 0.91,
        ("fairlead_limits_remaining_ratio", "limit", "concurrent"): 0.75,
    }


def test_a_rollout_is_told_by_its_candidate():
    member = Member(model="fraud", champion=1, candidate=2, metrics=(MetricRule(name="error_rate"),))
    policy = RolloutPolicy(steps=(Step(share=0.1), Step(share=0.5)))
    rollout, _ = begin("r1", kind="canary", members=(member,), policy=policy, policy_name="", actor="me", now=NOW)
    found = {(name, *labels): value for name, labels, value in rollout_samples(lambda: iter([rollout]))}
    assert found["fairlead_rollout_phase", "fraud", "2", "validating"] == 1
    assert found["fairlead_rollout_step", "fraud", "2"] == 0
    assert found["fairlead_rollout_steps", "fraud", "2"] == 2
    assert found["fairlead_rollout_share_ratio", "fraud", "2"] == 0.0


class FakeJobs:
    def __init__(self) -> None:
        self.told: Backlog | None = Backlog(jobs={("m", "queued"): (3, NOW - 40), ("n", "queued"): (1, NOW - 60)}, num_calls=2)

    def backlog(self) -> Backlog:
        if self.told is None:
            raise Unavailable("the store is gone")
        return self.told


async def test_what_jobs_wait_is_as_the_store_said_it_last_and_nothing_while_it_is_gone():
    store = FakeJobs()
    backlog = JobBacklog(store, clock=lambda: NOW)  # type: ignore[arg-type]
    assert list(backlog.samples()) == []
    await backlog.look()
    found = {(name, *labels): value for name, labels, value in backlog.samples()}
    assert found == {
        ("fairlead_unfinished_jobs", "m", "queued"): 3,
        ("fairlead_unfinished_jobs", "n", "queued"): 1,
        ("fairlead_unfinished_jobs_oldest_seconds", "queued"): 60.0,
        ("fairlead_webhooks_pending",): 2,
    }
    store.told = None
    await backlog.look()
    assert list(backlog.samples()) == []
