"""Hours of objectives in both databases: each server writes its own, all are added up."""

import pytest

from fairlead.observe.slo.ledger import Hour

HOUR = 3600


def test_each_server_reads_what_the_others_counted(store):
    slos = store.slos
    slos.write("one", [Hour("api", "a", 0, 90, 10), Hour("api", "a", HOUR, 100, 0)])
    slos.write("two", [Hour("api", "a", HOUR, 50, 5), Hour("other", "b", HOUR, 1, 1)])
    slos.write("three", [Hour("api", "a", HOUR, 7, 0)])
    assert set(slos.read(slos=["api"], since=0, but="one")) == {Hour("api", "a", HOUR, 57, 5)}
    assert set(slos.read(slos=["api", "other"], since=0, but="three")) == {
        Hour("api", "a", 0, 90, 10),
        Hour("api", "a", HOUR, 150, 5),
        Hour("other", "b", HOUR, 1, 1),
    }


def test_an_hour_that_is_written_again_replaces_what_was_written_before(store):
    slos = store.slos
    slos.write("one", [Hour("api", "a", 0, 1, 0)])
    slos.write("one", [Hour("api", "a", 0, 5, 2)])
    slos.write("one", [Hour("api", "a", 0, 5, 2)])
    assert slos.read(slos=["api"], since=0, but="") == (Hour("api", "a", 0, 5, 2),)


def test_what_another_definition_counted_is_told_apart(store):
    store.slos.write("one", [Hour("api", "a", 0, 1, 0), Hour("api", "b", 0, 2, 0)])
    assert sorted(store.slos.read(slos=["api"], since=0, but="")) == [Hour("api", "a", 0, 1, 0), Hour("api", "b", 0, 2, 0)]


def test_old_hours_are_neither_read_nor_kept_for_ever(store):
    slos = store.slos
    slos.write("one", [Hour("api", "a", hour * HOUR, 1, 0) for hour in range(10)])
    assert sorted(each.hour // HOUR for each in slos.read(slos=["api"], since=7.5 * HOUR, but="")) == [7, 8, 9]
    assert slos.purge(5 * HOUR) == 5
    assert len(slos.read(slos=["api"], since=0, but="")) == 5


@pytest.mark.parametrize("number", [1, 100, 1000])
def test_any_number_of_hours_is_written_at_once(store, number):
    store.slos.write("one", [Hour("api", "a", hour * HOUR, hour, 1) for hour in range(number)])
    assert len(store.slos.read(slos=["api"], since=0, but="")) == number
