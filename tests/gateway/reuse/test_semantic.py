"""Nearly the same question of the same tenant, and nothing else."""

import asyncio

import numpy as np
import pytest

from fairlead.core.errors import Unavailable
from fairlead.gateway.reuse import semantic
from fairlead.gateway.reuse.keys import Question, question_of
from fairlead.gateway.reuse.semantic import Semantic, embedded
from tests.gateway.reuse.questions import chat


def asked(text: str, tenant: str = "a", before: tuple[str, ...] = ()) -> Question:
    question = question_of(chat(*before, text, tenant=tenant), "1")
    assert question is not None
    return question


def unit(*values: float) -> np.ndarray:
    vector = np.array(values, np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def test_a_question_near_enough_finds_the_answer():
    store = Semantic()
    store.add(asked("eggs?"), unit(1, 0, 0), b"eggs")
    store.add(asked("ham?"), unit(0, 1, 0), b"ham")
    assert store.find(asked("an egg?"), unit(1, 0.1, 0), 0.95) == b"eggs"
    assert store.find(asked("an egg?"), unit(1, 0.1, 0), 0.999) is None
    assert store.find(asked("both?"), unit(0.4, 0.6, 0), 0.8) == b"ham"
    assert store.find(asked("eggs?"), unit(1, 0, 0), 1.0) == b"eggs"


def test_never_that_of_another_tenant():
    store = Semantic()
    store.add(asked("eggs?", "a"), unit(1, 0), b"of a")
    assert store.find(asked("eggs?", "b"), unit(1, 0), 0.1) is None
    forged = Question("b", asked("eggs?", "a").bucket, "eggs?")  # even with the other's bucket
    assert store.find(forged, unit(1, 0), 0.1) is None


def test_never_after_another_conversation():
    store = Semantic()
    store.add(asked("and then?", before=("a story", "once")), unit(1, 0), b"k")
    assert store.find(asked("and then?", before=("a recipe", "boil")), unit(1, 0), 0.1) is None


def test_a_vector_that_says_nothing_finds_nothing():
    store = Semantic()
    store.add(asked("eggs?"), unit(1, 0), b"k")
    assert store.find(asked("eggs?"), np.array([np.nan, np.nan], np.float32), 0.1) is None


def test_the_oldest_questions_of_a_tenant_are_forgotten_first():
    store = Semantic(max_questions=3)
    for number in range(5):
        store.add(asked("x"), np.eye(5, dtype=np.float32)[number], b"%d" % number)
    found = [store.find(asked("x"), np.eye(5, dtype=np.float32)[number], 0.9) for number in range(5)]
    assert found == [None, None, b"2", b"3", b"4"] and store.num_questions == 3


def test_the_tenant_that_asked_nothing_for_longest_is_forgotten_first():
    store = Semantic(max_together=2)
    store.add(asked("x", "a"), unit(1, 0), b"a")
    store.add(asked("x", "b"), unit(1, 0), b"b")
    assert store.find(asked("x", "a"), unit(1, 0), 0.9) == b"a"
    store.add(asked("x", "c"), unit(1, 0), b"c")
    assert [store.find(asked("x", tenant), unit(1, 0), 0.9) for tenant in "abc"] == [b"a", None, b"c"]
    assert store.num_questions == 2


def test_an_answer_that_is_gone_is_forgotten_and_one_that_is_new_replaces_it():
    store = Semantic()
    question = asked("x")
    store.add(question, unit(1, 0), b"k")
    store.add(question, unit(1, 0), b"k")
    assert store.num_questions == 1
    store.forget(question, b"k")
    store.forget(question, b"k")
    store.forget(asked("x", "stranger"), b"k")
    assert store.num_questions == 0 and store.find(question, unit(1, 0), 0.5) is None


def test_another_embedder_starts_anew():
    store = Semantic()
    store.add(asked("x"), unit(1, 0), b"old")
    assert store.find(asked("x"), unit(1, 0, 0), 0.1) is None
    store.add(asked("x"), unit(1, 0, 0), b"new")
    assert store.find(asked("x"), unit(1, 0, 0), 0.1) == b"new"
    assert store.num_questions == 1


@pytest.mark.parametrize("vector", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], []])
async def test_what_is_no_direction_is_no_vector(vector: list[float]):
    async def embed(_: str) -> np.ndarray:
        return np.array(vector, np.float32)

    assert await embedded(embed, "x") is None


async def test_vectors_are_made_of_length_one():
    async def embed(_: str) -> np.ndarray:
        return np.array([[3.0, 4.0]])

    found = await embedded(embed, "x")
    assert found is not None and found.dtype == np.float32 and found.tolist() == pytest.approx([0.6, 0.8])


async def test_an_embedder_that_fails_or_hangs_is_a_miss(monkeypatch: pytest.MonkeyPatch):
    async def fail(_: str) -> np.ndarray:
        raise Unavailable("down")

    async def hang(_: str) -> np.ndarray:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(semantic, "EMBED_SECONDS", 0.0)
    assert await embedded(fail, "x") is None
    assert await embedded(hang, "x") is None
