"""Where requests' time goes: all of it is told, and what most of it goes to is named."""

from typing import Any

import pytest

from fairlead.core.generation import Phase
from fairlead.core.timeline import BatchNote, Phases, Timeline
from fairlead.observe.profile.layers import LAYERS, LayerSums, layers_of


def timeline(*events: Any, ended: float = 1.0, model: str = "m", version: str = "1", outcome: str = "success", **more: Any) -> Timeline:
    made = Timeline("r", "http", 0.0, model=model, version=version, **more)
    for at, name, *details in events:
        made.note(at, name, *details)
    made.ended, made.outcome = ended, outcome
    return made


BATCH = BatchNote("m", "1", 7, "full", 4, 4, 0, began=0.5, gather_seconds=0.05, compute_seconds=0.2, ended=0.8)
TENSORS = timeline(
    (0.1, "decoded"),
    (0.15, "admitted"),
    (0.2, "queued"),
    (0.3, "turn"),
    (0.35, "sent"),
    (0.5, "batched", BATCH),
    (0.8, "computed"),
    (0.9, "encoded"),
)


def test_every_second_of_a_tensor_request_has_a_layer() -> None:
    found = layers_of(TENSORS)
    assert found == pytest.approx({"read": 0.1, "gateway": 0.15, "line": 0.1, "wait": 0.15, "transfer": 0.1, "compute": 0.2, "answer": 0.2})
    assert sum(found.values()) == pytest.approx(TENSORS.seconds)


def test_an_engines_phases_come_after_the_fact_and_are_put_where_they_belong() -> None:
    phases = [Phase("waiting", 0.0, 0.1), Phase("prefill", 0.1, 0.2), Phase("preempted", 0.3, 0.1), Phase("decode", 0.4, 0.3)]
    found = layers_of(timeline((0.1, "decoded"), (0.1, "sent"), (0.4, "first"), (0.1, "engine", Phases("m", "1", 0, phases))))
    assert found == pytest.approx({"read": 0.1, "engine wait": 0.1, "prefill": 0.2, "preempted": 0.1, "decode": 0.3, "answer": 0.2})


def test_of_pictures_the_decoder_is_part_of_the_answer() -> None:
    phases = [Phase("waiting", 0.0, 0.1), Phase("encode", 0.1, 0.1), Phase("denoise", 0.2, 0.4), Phase("decode", 0.6, 0.2)]
    found = layers_of(timeline((0.0, "sent"), (0.0, "engine", Phases("m", "1", 0, phases))))
    assert found == pytest.approx({"engine wait": 0.1, "texts": 0.1, "denoise": 0.4, "answer": 0.4})


def test_what_another_server_computes_and_what_nobody_computes() -> None:
    assert layers_of(timeline((0.1, "decoded"), (0.2, "sent"), (0.9, "first"))) == pytest.approx(
        {"read": 0.1, "gateway": 0.1, "elsewhere": 0.7, "answer": 0.1}
    )
    assert layers_of(timeline((0.1, "decoded"), (0.2, "reused", {"outcome": "hit"}))) == pytest.approx({"read": 0.1, "gateway": 0.9})


def test_the_bottleneck_is_named_with_what_helps() -> None:
    sums = LayerSums("m")
    waits = BatchNote("m", "1", 8, "age", 1, 1, 0, began=7.8, compute_seconds=1.9, ended=9.8)
    sums(
        [
            timeline((0.1, "decoded"), (7.8, "batched", waits), ended=10.0),
            timeline((0.1, "decoded"), (7.8, "batched", waits), ended=10.0, outcome="failure"),
        ]
    )
    answer = sums.answer()
    assert answer.bottleneck.startswith("77% of the time of a request (7.7 s of 10 s) goes to: a free instance")
    assert answer.advice == LAYERS["wait"][1] and "instances.count" in answer.advice
    assert (answer.num_requests, answer.num_failed) == (2, 1)
    assert sum(layer.share for layer in answer.layers) == pytest.approx(1.0)


def test_only_requests_of_that_model_and_version_that_were_let_in_count_and_jobs_only_once() -> None:
    sums = LayerSums("m", "2")
    sums([timeline(), timeline(version="2", outcome="refused"), timeline(model="n", version="2"), timeline(version="2", job="job_1")])
    assert sums.answer().num_requests == 0 and "no request" in sums.answer().bottleneck
    run = Timeline("r", "job", 0.0, model="m", version="2", job="job_1")
    run.ended = 1.0
    sums([run])
    assert sums.answer().num_requests == 1
