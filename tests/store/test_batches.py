"""Files and batches in both databases."""

from typing import Any

import pytest
from msgspec import structs

from fairlead.core.errors import LimitExceeded
from fairlead.store import batches
from fairlead.store.batches import PART_BYTES, BatchRow, FileRow, Result

MUCH = 1 << 30


def file(id: str, size: int, **more: Any) -> FileRow:
    return structs.replace(FileRow(id=id, tenant="acme", name="in.jsonl", purpose="batch", size=size, created=1.0, expires=100.0), **more)


def batch(id: str, **more: Any) -> BatchRow:
    row = BatchRow(id=id, tenant="acme", project="default", key="k", address="", created=1.0, expires=100.0, body=b"{}")
    return structs.replace(row, **more)


def content(store: Any, id: str) -> bytes:
    parts, number = [], 0
    while (part := store.batches.part(id, number)) is not None:
        parts.append(part)
        number += 1
    return b"".join(parts)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, 2 * PART_BYTES + 5])
def test_a_file_comes_back_whole(store, size):
    data = (b"\x00\xff line\n" * (size // 8 + 1))[:size]
    store.batches.add_file(file("f", size), data, tenant_bytes=MUCH)
    assert content(store, "f") == data
    assert store.batches.file("f", "other") is None and not store.batches.delete_file("f", "other")
    assert store.batches.delete_file("f", "acme") and content(store, "f") == b""
    assert store.batches.file("f\0", "acme") is None


def test_a_tenants_files_have_a_bound(store):
    store.batches.add_file(file("a", 60), b"x" * 60, tenant_bytes=100)
    with pytest.raises(LimitExceeded):
        store.batches.add_file(file("b", 60), b"x" * 60, tenant_bytes=100)
    store.batches.add_file(file("c", 60, tenant="other"), b"x" * 60, tenant_bytes=100)
    assert [row.id for row in store.batches.files("acme", purpose=None, after="", limit=9, newest=True)] == ["a"]


def test_empty_files_have_a_bound_too(store, monkeypatch):
    monkeypatch.setattr(batches, "MAX_FILES", 2)
    for id in ("a", "b"):
        store.batches.add_file(file(id, 0), b"", tenant_bytes=100)
    with pytest.raises(LimitExceeded):
        store.batches.add_file(file("c", 0), b"", tenant_bytes=100)


def test_files_are_listed_in_both_orders(store):
    for number in range(4):
        store.batches.add_file(file(f"f{number}", 0, purpose="batch" if number else "batch_output"), b"", tenant_bytes=MUCH)

    def listed(**more: Any) -> list[str]:
        return [row.id for row in store.batches.files("acme", **{"purpose": None, "after": "", "limit": 2, "newest": True, **more})]

    assert listed() == ["f3", "f2"]
    assert listed(after="f2") == ["f1", "f0"]
    assert listed(newest=False, after="f1") == ["f2", "f3"]
    assert listed(purpose="batch_output") == ["f0"]


def test_one_server_at_a_time_runs_a_batch(store):
    for id in ("b2", "b1"):
        store.batches.add(batch(id), tenant_batches=9, tenant_bytes=MUCH)
    (mine,) = store.batches.lease("one", 1, now=10.0, lease_until=20.0)
    assert (mine.id, mine.server) == ("b1", "one")
    assert [row.id for row in store.batches.lease("two", 9, now=10.0, lease_until=20.0)] == ["b2"]
    assert store.batches.lease("three", 9, now=10.0, lease_until=20.0) == ()
    assert store.batches.beat("one", ["b1", "b2"], lease_until=40.0) == {"b1": False}
    assert store.batches.cancel("b1", "acme").cancelling and store.batches.cancel("b1", "other") is None
    assert store.batches.beat("one", ["b1"], lease_until=40.0) == {"b1": True}
    assert [row.id for row in store.batches.lease("three", 9, now=30.0, lease_until=50.0)] == ["b2"]
    assert not store.batches.put("b2", "two", b"late")
    assert store.batches.put("b2", "three", b"here")
    store.batches.release("one")
    assert [row.id for row in store.batches.lease("two", 9, now=30.0, lease_until=50.0)] == ["b1"]


def test_results_become_files_in_the_order_of_the_lines(store):
    store.batches.add(batch("b"), tenant_batches=9, tenant_bytes=MUCH)
    store.batches.lease("one", 1, now=10.0, lease_until=20.0)
    numbers = [n * 7 % 501 for n in range(501)]  # more than a page
    assert store.batches.put("b", "one", b"{}", [Result(n, n % 3 > 0, b"%d" % n) for n in numbers])
    assert store.batches.done("b") == {n: n % 3 > 0 for n in range(501)}

    def outputs(good: bool, size: int) -> FileRow | None:
        return file(f"good-{good}", size, purpose="batch_output")

    wanted = {good: b"".join(b"%d\n" % n for n in range(501) if (n % 3 > 0) == good) for good in (True, False)}
    ending = {"now": 30.0, "expires": 99.0, "outputs": outputs, "body": lambda: b"done", "tenant_ended": 9}
    assert not store.batches.end("b", "two", **ending)
    assert store.batches.end("b", "one", **ending)
    assert not store.batches.end("b", "one", **ending)
    for good, data in wanted.items():
        assert (content(store, f"good-{good}"), store.batches.file(f"good-{good}", "acme").size) == (data, len(data))
    row = store.batches.get("b", "acme")
    assert (row.body, row.ended, row.expires, store.batches.done("b")) == (b"done", 30.0, 99.0, {})
    assert not store.batches.cancel("b", "acme").cancelling


def test_a_tenant_has_so_many_batches_that_have_not_ended(store):
    store.batches.add(batch("a"), tenant_batches=1, tenant_bytes=MUCH)
    with pytest.raises(LimitExceeded):
        store.batches.add(batch("b"), tenant_batches=1, tenant_bytes=MUCH)
    store.batches.add(batch("c", tenant="other"), tenant_batches=1, tenant_bytes=MUCH)
    store.batches.lease("one", 9, now=10.0, lease_until=20.0)
    assert ended(store, "a", now=30.0)
    store.batches.add(batch("b"), tenant_batches=1, tenant_bytes=MUCH)
    assert [row.id for row in store.batches.list("acme", after="", limit=9)] == ["b", "a"]
    assert [row.id for row in store.batches.list("acme", after="b", limit=9)] == ["a"]


def ended(store: Any, id: str, *, now: float, tenant_ended: int = 9) -> bool:
    nothing = {"outputs": lambda good, size: None, "body": lambda: b"{}"}
    return store.batches.end(id, "one", now=now, expires=99.0, tenant_ended=tenant_ended, **nothing)


def test_of_the_batches_that_have_ended_the_oldest_go(store):
    for id in ("a", "b", "c", "running"):
        store.batches.add(batch(id), tenant_batches=9, tenant_bytes=MUCH)
    store.batches.add(batch("theirs", tenant="other"), tenant_batches=9, tenant_bytes=MUCH)
    store.batches.lease("one", 9, now=10.0, lease_until=20.0)
    for now, id in ((1.0, "theirs"), (2.0, "c"), (3.0, "b"), (4.0, "a")):
        assert ended(store, id, now=now, tenant_ended=2)
    assert [row.id for row in store.batches.list("acme", after="", limit=9)] == ["running", "b", "a"]
    assert store.batches.get("theirs", "other") is not None


def test_a_tenant_whose_files_are_too_much_hands_in_no_batch(store):
    store.batches.add_file(file("made", 101, purpose="batch_output"), b"x" * 101, tenant_bytes=MUCH)
    with pytest.raises(LimitExceeded, match="delete some"):
        store.batches.add(batch("a"), tenant_batches=9, tenant_bytes=100)
    store.batches.delete_file("made", "acme")
    store.batches.add(batch("a"), tenant_batches=9, tenant_bytes=100)


def test_time_removes_files_and_ended_batches(store):
    store.batches.add_file(file("old", 1, expires=10.0), b"x", tenant_bytes=MUCH)
    store.batches.add_file(file("new", 1), b"x", tenant_bytes=MUCH)
    store.batches.add(batch("running", expires=10.0), tenant_batches=9, tenant_bytes=MUCH)
    store.batches.add(batch("ended", ended=5.0, expires=10.0), tenant_batches=9, tenant_bytes=MUCH)
    assert store.batches.purge(20.0) == 2
    assert (content(store, "old"), content(store, "new")) == (b"", b"x")
    assert [store.batches.get(id, "acme") is None for id in ("running", "ended")] == [False, True]
