"""Where the last tokens stood before."""

import random
import tracemalloc
from itertools import pairwise

import pytest

from fairlead.llm.speculation.ngram import LONG, MAX_PLACES, MAX_RUN, SHORT, Repeats, agreement_class


def repeats_of(token_ids: list[int]) -> Repeats:
    repeats = Repeats(token_ids)
    repeats.catch_up()
    return repeats


def test_what_followed_before_is_guessed():
    repeats = repeats_of([1, 2, 3, 4, 5, 6, 7, 8, 2, 3])
    assert repeats.guess(3) == [4, 5, 6] and repeats.run == 2


def test_nothing_is_guessed_where_nothing_stood_before():
    assert repeats_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).place == 0
    assert repeats_of([]).place == repeats_of([7]).place == repeats_of([7, 7]).place == 0


def test_a_place_moves_along_while_the_tokens_are_its_own_and_is_left_when_they_are_not():
    ids = [*range(20, 60), 1, 2, 30, 31]
    repeats = repeats_of(ids)
    assert repeats.guess(2) == [32, 33]
    ids += [32, 33, 34]
    repeats.catch_up()
    assert repeats.guess(2) == [35, 36] and repeats.run == 5
    ids.append(99)
    repeats.catch_up()
    assert repeats.place == 0
    ids += [50, 51]
    repeats.catch_up()
    assert repeats.guess(3) == [52, 53, 54]


def test_the_place_that_agrees_for_longer_is_preferred_to_one_nearer():
    ids = [1, 2, 3, 4, 50, 60, 70, 80, 9, 3, 4, 77, 78, 79, 1, 2, 3, 4]
    assert repeats_of(ids).guess(1) == [50]


def test_a_repetition_goes_on_beyond_the_end():
    assert repeats_of([9, 8, 5, 6, 5, 6, 5, 6]).guess(5) == [5, 6, 5, 6, 5]
    assert repeats_of([4] * 12).guess(8) == [4] * 8


def test_the_better_the_agreement_the_better_its_class():
    assert [agreement_class(run) for run in (SHORT, LONG - 1, LONG, MAX_RUN - 1, MAX_RUN)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_what_it_finds_stands_there_and_what_stands_there_it_finds(seed):
    # Given a text of few different tokens, looked at now and then, as an engine does
    numbers = random.Random(seed)
    ids = [numbers.randrange(4) for _ in range(numbers.randrange(60))]
    repeats = Repeats(ids)
    for _ in range(120):
        ids += [numbers.randrange(4) for _ in range(numbers.choice([1, 1, 1, 2, 5, 30]))]
        repeats.catch_up()
        place, run = repeats.place, repeats.run
        if place:
            assert SHORT <= run <= MAX_RUN and place < len(ids)
            assert ids[place - run : place] == ids[len(ids) - run :]
            assert len(repeats.guess(8)) == 8
        else:
            assert tuple(ids[-SHORT:]) not in pairwise(ids[:-1])


def test_the_memory_of_a_long_text_is_bounded():
    numbers = random.Random(0)
    ids = [numbers.randrange(1000) for _ in range(3 * MAX_PLACES)]
    tracemalloc.start()
    repeats = Repeats(ids)
    repeats.catch_up()
    for _ in range(2 * MAX_PLACES):
        ids.append(numbers.randrange(1000))
        repeats.catch_up()
        assert len(repeats._long) <= MAX_PLACES and len(repeats._short) <= MAX_PLACES
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 16 << 20
