"""Usage: what was written, added up."""

from calendar import timegm
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairlead.store.rows import AuditQuery, AuditRow, Dimension, UsageQuery, UsageRow
from fairlead.store.store import Store

NOON = float(timegm((2026, 10, 3, 12, 0, 0)))


def row(time: float = NOON, **fields: Any) -> UsageRow:
    return UsageRow(**{"time": time, "tenant": "acme", "key": "k", "model": "llama", "outcome": "success", **fields})


def test_a_record_comes_back_as_it_was_written(store: Store) -> None:
    written = UsageRow(
        time=NOON + 0.25, request_id="r1", tenant="acme", project="app", key="k1", model="llama", version="3", qos_class="batch",
        kind="generate", outcome="refused", status=429, reason="tokens_per_minute", input_tokens=1 << 40, cached_tokens=5, output_tokens=7,
        rows=2, megapixels=0.5, compute_seconds=0.125, seconds=1.5, cost=0.0625, cached=True, address="::1",
    )  # fmt: skip
    store.record([written])
    (found,) = store.records(UsageQuery(), 10)
    assert found == UsageRow(**{**{name: getattr(written, name) for name in written.__struct_fields__}, "id": found.id})


def test_sums_by_tenant_day_and_hour(store: Store) -> None:
    store.record([row(NOON - 1, input_tokens=5, cost=0.5), row(NOON, input_tokens=7, cost=0.25)])
    store.record([row(NOON + 1, input_tokens=1, cached=True), row(NOON + 86400, tenant="other", rows=3)])
    by_day = store.usage(UsageQuery(), [Dimension.DAY, Dimension.TENANT])
    assert [(each.group, each.requests, each.input_tokens, each.cost, each.cached, each.rows) for each in by_day] == [
        (("2026-10-03", "acme"), 3, 13, 0.75, 1, 0),
        (("2026-10-04", "other"), 1, 0, 0.0, 0, 3),
    ]
    by_hour = store.usage(UsageQuery(tenant="acme"), [Dimension.HOUR])
    assert [(each.group, each.requests) for each in by_hour] == [(("2026-10-03T11:00Z",), 1), (("2026-10-03T12:00Z",), 2)]


def test_the_prompts_of_one_request_are_one_request_in_every_sum(store: Store) -> None:
    others = [row(requests=0, cached=True, input_tokens=1), row(requests=0, outcome="cancelled", cost=0.5)]
    store.record([row(cached=True, input_tokens=1), *others])
    by_outcome = store.usage(UsageQuery(), [Dimension.OUTCOME])
    assert [(each.group, each.requests, each.cached, each.input_tokens, each.cost) for each in by_outcome] == [
        (("cancelled",), 0, 0, 0, 0.5),
        (("success",), 1, 1, 2, 0.0),
    ]


def test_a_range_is_widened_to_whole_hours(store: Store) -> None:
    store.record([row(NOON - 1), row(NOON), row(NOON + 3599), row(NOON + 3600)])
    (found,) = store.usage(UsageQuery(since=NOON + 5, until=NOON + 10))
    assert found.requests == 2
    assert store.usage(UsageQuery(since=NOON + 7200)) == ()


def test_what_was_spent_since_midnight_can_be_restored_for_each_limit(store: Store) -> None:
    store.record([row(key="a", cost=1.0), row(key="b", cost=2.0, model="small"), row(NOON - 86400, key="a", cost=8.0)])
    spent = store.usage(UsageQuery(since=NOON - 43200), [Dimension.TENANT, Dimension.PROJECT, Dimension.KEY, Dimension.MODEL])
    assert {each.group: each.cost for each in spent} == {("acme", "default", "a", "llama"): 1.0, ("acme", "default", "b", "small"): 2.0}


def test_records_are_paged_from_the_newest_on_even_at_one_moment(store: Store) -> None:
    store.record([row(NOON + n // 3, request_id=str(n)) for n in range(8)])
    seen, after = [], None
    while page := store.records(UsageQuery(), 3, after):
        seen += [each.request_id for each in page]
        after = (page[-1].time, page[-1].id)
    assert seen == ["7", "6", "5", "4", "3", "2", "1", "0"]


def test_records_of_one_tenant_key_model_outcome_and_time(store: Store) -> None:
    store.record([row(), row(tenant="x"), row(key="x"), row(model="x"), row(outcome="failure"), row(NOON - 1), row(NOON + 9)])
    found = store.records(UsageQuery(since=NOON, until=NOON + 9, tenant="acme", key="k", model="llama", outcome="success"), 10)
    assert len(found) == 1


def test_purged_records_stay_in_the_sums_and_the_purge_in_the_audit_log(store: Store) -> None:
    store.record([row(NOON - 5), row(NOON - 4), row(NOON)])
    purge = AuditRow(time=NOON, actor="tester", action="usage.purge", subject="usage")
    assert store.purge(NOON, purge) == 2
    assert len(store.records(UsageQuery(), 10)) == 1
    assert store.usage(UsageQuery())[0].requests == 3
    assert store.audit(AuditQuery(), 1)[0].details == {"records": 2}


requests = st.builds(
    row,
    time=st.floats(0, 10_000),
    tenant=st.sampled_from(["a", "b"]),
    model=st.sampled_from(["m", "n"]),
    outcome=st.sampled_from(["success", "refused"]),
    requests=st.integers(0, 1),
    input_tokens=st.integers(0, 1000),
    cost=st.integers(0, 100).map(lambda n: n / 64),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(requests, min_size=1, max_size=8), max_size=5))
def test_sums_are_those_of_the_records_however_they_were_batched(store: Store, batches: list[list[UsageRow]]) -> None:
    before = {each.group: (each.requests, each.input_tokens, each.cost) for each in store.usage(UsageQuery(), list(Dimension)[:5])}
    for batch in batches:
        store.record(batch)
    expected = dict(before)
    for each in (each for batch in batches for each in batch):
        group = (each.tenant, each.project, each.key, each.model, each.outcome)
        old = expected.get(group, (0, 0, 0.0))
        expected[group] = (old[0] + each.requests, old[1] + each.input_tokens, old[2] + each.cost)
    after = {each.group: (each.requests, each.input_tokens, each.cost) for each in store.usage(UsageQuery(), list(Dimension)[:5])}
    assert after == expected
