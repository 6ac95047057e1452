"""Texts that wait are embedded together; one that cannot be computed harms no other."""

import numpy as np
import pytest

from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, QueueFull, TimeoutExpired
from fairlead.core.generation import Delta
from fairlead.llm.embedder import EmbeddingEngine


class Model:
    """A model of one rule: a text's vector is [its length, its first token, 0]; token 13 it cannot compute."""

    dimensions = 3

    def __init__(self) -> None:
        self.batches: list[int] = []

    def check(self, ids: list[int]) -> None:
        if not ids:
            raise InvalidRequest("the input is empty")

    def embed(self, texts: list[list[int]]) -> np.ndarray:
        self.batches.append(len(texts))
        if any(13 in ids for ids in texts):
            raise RuntimeError("unlucky")
        return np.array([[len(ids), np.nan if 14 in ids else ids[0], 0.0] for ids in texts], np.float32)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def engine_of(model: Model, clock: Clock | None = None, **changes: int) -> EmbeddingEngine:
    return EmbeddingEngine(model, **{"max_batch_tokens": 10, "max_waiting": 8, **changes}, clock=clock or Clock())  # type: ignore[arg-type]


def finish(engine: EmbeddingEngine) -> dict[int, Delta | FairleadError]:
    answers: dict[int, Delta | FairleadError] = {}
    while engine.has_work:
        answers.update(engine.step())
    return answers


def vector(answer: Delta | FairleadError) -> list[float]:
    assert isinstance(answer, Delta)
    return np.frombuffer(answer.vector, "<f4").tolist()  # type: ignore[no-any-return]


def test_as_many_as_the_budget_holds_compute_together():
    model = Model()
    engine = engine_of(model)
    for id in range(5):
        engine.add(id, [id + 1] * 4, None)
    answers = finish(engine)
    assert model.batches == [2, 2, 1]
    assert [vector(answers[id]) for id in range(5)] == [[4.0, id + 1, 0.0] for id in range(5)]
    usages = [answer.usage for answer in answers.values() if isinstance(answer, Delta)]
    assert all(usage is not None and usage.prompt_tokens == 4 for usage in usages)


def test_priority_goes_first_and_what_waited_too_long_is_given_up():
    clock, model = Clock(), Model()
    engine = engine_of(model, clock, max_batch_tokens=3)
    engine.add(1, [1, 1, 1], None, priority=2)
    engine.add(2, [2, 2, 2], None, priority=1)
    engine.add(3, [3, 3, 3], None, priority=3, deadline=5.0)
    assert [id for id, _ in engine.step()] == [2]
    clock.now = 6.0
    left = dict(engine.step())
    assert vector(left[1]) == [3.0, 1.0, 0.0] and isinstance(left[3], TimeoutExpired)


@pytest.mark.parametrize(("unlucky", "said"), [(13, "unlucky"), (14, "not finite")])
def test_a_text_that_cannot_be_computed_fails_alone(unlucky, said):
    engine = engine_of(Model(), max_batch_tokens=100)
    for id in range(6):
        engine.add(id, [unlucky if id == 4 else 1], None)
    answers = finish(engine)
    failed = answers.pop(4)
    assert isinstance(failed, ModelError) and said in failed.message
    assert [vector(answer) for answer in answers.values()] == [[1.0, 1.0, 0.0]] * 5
    assert engine.stats().num_quarantined == 1


def test_fewer_dimensions_are_normalised_again():
    engine = engine_of(Model())
    engine.add(1, [4, 4, 4], 2)
    assert vector(finish(engine)[1]) == pytest.approx([0.6, 0.8])
    with pytest.raises(InvalidRequest, match="at most 3"):
        engine.add(1, [1], 4)


def test_the_line_is_bounded_and_who_leaves_makes_room():
    engine = engine_of(Model())
    for id in range(8):
        engine.add(id, [1], None)
    with pytest.raises(QueueFull):
        engine.add(8, [1], None)
    engine.abort(0)
    engine.abort(99)
    engine.add(8, [1], None)
    assert set(finish(engine)) == set(range(1, 9))


def test_it_tells_how_long_a_text_waited_and_with_whom_it_was_computed():
    clock = Clock()
    engine = engine_of(Model(), clock)
    engine.add(1, [1, 2], None, arrived=-3.0)
    engine.add(2, [1], None)
    answer = finish(engine)[1]
    assert isinstance(answer, Delta)
    waiting, prefill = answer.phases
    assert (waiting.name, waiting.start, waiting.seconds) == ("waiting", 0.0, clock.now + 3.0)
    assert (prefill.name, prefill.start, prefill.num_tokens, prefill.max_seqs) == ("prefill", clock.now + 3.0, 2, 2)
