"""Responses in both databases: by tenant, within bounds, ended by somebody whatever becomes of their server."""

from typing import Any

import pytest
import sqlalchemy as sa
from msgspec import structs

from fairlead.store.responses import ResponseRow
from fairlead.store.store import Store
from fairlead.store.tables import responses

MUCH = 1 << 30


def a(id: str, **more: Any) -> ResponseRow:
    row = ResponseRow(
        id=id, tenant="acme", status="completed", created=1.0, ended=2.0, expires=100.0, server="one", body=b"{}", input=b"[]"
    )
    return structs.replace(row, **more)


def running(id: str, **more: Any) -> ResponseRow:
    return a(id, **{"status": "in_progress", "ended": None, "lease_until": 50.0, **more})


def put(store: Store, *rows: ResponseRow, tenant_bytes: int = MUCH) -> None:
    for row in rows:
        store.responses.add(row, [f"item-of-{row.id}"], tenant_bytes=tenant_bytes)


def size_of(store: Store, tenant: str = "acme") -> int:
    return store.responses.size(tenant)


def test_what_is_kept_comes_back_to_its_tenant_alone(store):
    put(store, a("r1", body=b'{"text": "\xc3\xa4"}', input=b"[1]", events=b"e"))
    found = store.responses.get("r1", "acme")
    assert (found.body, found.input, found.events, found.size) == (b'{"text": "\xc3\xa4"}', b"[1]", b"e", 18)
    assert store.responses.get("r1", "other") is None
    assert store.responses.cancel("r1", "other") is None
    assert not store.responses.delete("r1", "other")
    assert store.responses.chain("r1", "other", most=9, most_bytes=MUCH) == ()
    assert store.responses.holders(["item-of-r1"], "other", most_bytes=MUCH) == ()
    assert store.responses.get("r\0", "acme") is None


def test_a_conversation_is_read_from_its_beginning(store):
    put(store, a("r1"), a("r2", previous="r1"), a("r3", previous="r2"), a("side", previous="r1"))
    assert [row.id for row in store.responses.chain("r3", "acme", most=9, most_bytes=MUCH)] == ["r1", "r2", "r3"]
    assert [row.id for row in store.responses.chain("side", "acme", most=9, most_bytes=MUCH)] == ["r1", "side"]


def test_a_conversation_that_is_too_long_is_cut_and_shows_it(store):
    put(store, *(a(f"r{n}", previous=f"r{n - 1}" if n else None) for n in range(20)))
    cut = store.responses.chain("r19", "acme", most=5, most_bytes=MUCH)
    assert ([row.id for row in cut], cut[0].previous) == ([f"r{n}" for n in range(15, 20)], "r14")
    few = store.responses.chain("r19", "acme", most=99, most_bytes=12)  # four bytes each
    assert ([row.id for row in few], few[0].previous) == (["r17", "r18", "r19"], "r16")


def test_a_conversation_whose_beginning_was_deleted_shows_it(store):
    put(store, a("r1"), a("r2", previous="r1"), a("r3", previous="r2"))
    assert store.responses.delete("r1", "acme")
    chain = store.responses.chain("r3", "acme", most=9, most_bytes=MUCH)
    assert ([row.id for row in chain], chain[0].previous) == (["r2", "r3"], "r1")


def test_nobody_goes_on_from_another_tenants_answer(store):
    put(store, a("r1", tenant="other"), a("r2", previous="r1"))
    chain = store.responses.chain("r2", "acme", most=9, most_bytes=MUCH)
    assert ([row.id for row in chain], chain[0].previous) == (["r2"], "r1")


def test_an_item_is_found_by_its_id_in_the_newest_answer(store):
    put(store, a("old", created=1.0), a("new", created=2.0))
    store.responses.add(a("third", created=3.0), ["item-of-old", "item-of-old", "x"], tenant_bytes=MUCH)
    held = store.responses.holders(["item-of-old", "item-of-new", "nobody", "n\0"], "acme", most_bytes=MUCH)
    assert [row.id for row in held] == ["third", "new"]


def test_an_item_that_very_many_answers_hold_is_read_from_one(store):
    for number in range(5):
        store.responses.add(a(f"r{number}", created=float(number), input=b"x" * 100), ["again"], tenant_bytes=MUCH)
    assert [row.id for row in store.responses.holders(["again"], "acme", most_bytes=250)] == ["r4"]


def test_answers_that_hold_items_are_no_more_than_fit(store):
    put(store, *(a(f"r{number}", input=b"x" * 100) for number in range(5)))
    assert len(store.responses.holders([f"item-of-r{number}" for number in range(5)], "acme", most_bytes=250)) == 2


def test_an_answer_ends_once(store):
    put(store, running("r1"))
    assert not store.responses.end(a("r1", server="two"), ["i"], tenant_bytes=MUCH)
    assert store.responses.end(a("r1", body=b"{done}"), ["i"], tenant_bytes=MUCH)
    assert not store.responses.end(a("r1", body=b"{again}"), ["i"], tenant_bytes=MUCH)
    found = store.responses.get("r1", "acme")
    assert (found.status, found.body, size_of(store)) == ("completed", b"{done}", 8)
    assert [row.id for row in store.responses.holders(["i"], "acme", most_bytes=MUCH)] == ["r1"]


def test_one_that_is_queued_begins(store):
    put(store, running("r1", status="queued"), a("r2"))
    store.responses.begun("r1", "two")
    assert store.responses.get("r1", "acme").status == "queued"
    for id in ("r1", "r2"):
        store.responses.begun(id, "one")
    assert [store.responses.get(id, "acme").status for id in ("r1", "r2")] == ["in_progress", "completed"]


def test_its_server_is_told_of_a_cancellation_and_keeps_the_others(store):
    put(store, running("r1"), running("r2"), running("theirs", server="two"), a("ended"))
    assert store.responses.cancel("r1", "acme").cancelling
    assert not store.responses.cancel("ended", "acme").cancelling
    held = store.responses.beat("one", ["r1", "r2", "theirs", "ended", "gone"], lease_until=99.0)
    assert held == {"r1": True, "r2": False}
    assert store.responses.get("r2", "acme").lease_until == 99.0
    assert store.responses.get("theirs", "acme").lease_until == 50.0
    assert store.responses.beat("one", [], lease_until=99.0) == {}


def test_what_a_dead_server_left_is_ended_once(store):
    put(store, running("r1"), running("r2", lease_until=200.0), a("ended"))

    def lost(row: ResponseRow) -> ResponseRow:
        return structs.replace(row, status="failed", ended=60.0, body=b"{failed}")

    assert store.responses.sweep(40.0, lost) == 0
    assert store.responses.sweep(60.0, lost) == 1
    assert store.responses.sweep(60.0, lost) == 0
    assert (store.responses.get("r1", "acme").status, store.responses.get("r2", "acme").status) == ("failed", "in_progress")
    assert size_of(store) == 10 + 4 + 4


def test_time_removes_answers_with_their_items_but_none_that_is_computed(store):
    put(store, a("r1", expires=10.0), a("r2", expires=30.0), running("r3", expires=10.0))
    assert store.responses.purge(20.0) == 1
    assert store.responses.purge(20.0) == 0
    assert [store.responses.get(id, "acme") is not None for id in ("r1", "r2", "r3")] == [False, True, True]
    assert store.responses.holders(["item-of-r1"], "acme", most_bytes=MUCH) == ()
    assert size_of(store) == 8


def test_a_conversation_that_goes_on_is_kept_for_longer(store):
    put(store, a("r1", expires=10.0), a("r2", expires=90.0))
    store.responses.keep(["r1", "r2"], 50.0)
    assert [store.responses.get(id, "acme").expires for id in ("r1", "r2")] == [50.0, 90.0]


def test_a_tenant_that_keeps_too_much_loses_what_it_has_not_used_for_longest(store):
    rows = [a(f"r{n}", body=b"x" * 98, expires=100.0 + n) for n in range(10)]
    put(store, running("busy", body=b"x" * 98, expires=1.0), *rows[:4], tenant_bytes=500)
    put(store, a("theirs", tenant="other", body=b"x" * 98, expires=1.0))
    store.responses.keep(["r0"], 900.0)
    put(store, *rows[4:6], tenant_bytes=500)
    left = [id for id in ("busy", *(row.id for row in rows[:6])) if store.responses.get(id, "acme") is not None]
    assert (left, size_of(store)) == (["busy", "r0", "r3", "r4", "r5"], 500)
    assert size_of(store, "other") == 100


def test_room_is_not_waited_for_where_another_holds_it(store):
    """Who removes an answer counts it then: two that waited for each other would both fail."""
    transactions = store.responses._transactions
    if transactions.is_sqlite:
        pytest.skip("one write at a time")
    put(store, a("r1", body=b"x" * 98), a("r2", body=b"x" * 98))
    with transactions.writes() as another:
        another.execute(sa.select(responses.c.id).where(responses.c.id == "r1").with_for_update())
        with transactions.writes() as connection:
            connection.execute(sa.text("SET LOCAL lock_timeout = '5s'"))
            store.responses._grow(connection, "acme", 100, 200)
    assert [store.responses.get(id, "acme") is not None for id in ("r1", "r2")] == [True, False]


def test_room_that_can_be_had_from_nobody_is_taken_all_the_same(store):
    put(store, running("busy", body=b"x" * 98), tenant_bytes=10)
    assert size_of(store) == 100


@pytest.mark.parametrize("number", [0, 1, 300])
def test_any_number_of_items_is_found_again(store, number):
    ids = [f"i{n}" for n in range(number)]
    store.responses.add(a("r1"), ids, tenant_bytes=MUCH)
    assert len(store.responses.holders(ids, "acme", most_bytes=MUCH)) == min(number, 1)
    assert store.responses.delete("r1", "acme")
    assert store.responses.holders(ids, "acme", most_bytes=MUCH) == ()
    assert size_of(store) == 0
