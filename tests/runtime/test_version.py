"""A version acts on what its batcher decides. Its instance here computes when the test says so."""

import asyncio

import numpy as np
import pytest

from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    InvalidRequest,
    ModelError,
    ReplicaDied,
    ShuttingDown,
    TimeoutExpired,
    Unavailable,
)
from fairlead.core.request import Request, Response
from fairlead.core.specs import BatchingSpec, ModelSpec, QueuePolicy, TensorSpec
from fairlead.core.tensors import Tensors
from fairlead.core.timeline import BatchNote, Timeline
from fairlead.runtime.version import ModelVersion


class SteppedInstance:
    """Doubles its input, one batch at a time, each when `step` is called."""

    ready = True
    down = ""
    restarts = 0
    gather_seconds = compute_seconds = 0.0

    def __init__(self) -> None:
        self.batches: list[list[Tensors]] = []
        self.done = None
        self.closed = False

    def run(self, inputs, outputs, done, requests) -> None:
        assert self.done is None, "one batch at a time"
        self.batches.append(inputs)
        self.done = done

    def step(self, error: FairleadError | None = None) -> None:
        done, self.done = self.done, None
        x = np.concatenate([each["x"] for each in self.batches[-1]])
        if error is None and (x < 0).any():
            error = ModelError("negative")
        if error is not None:
            done(None, error)
        else:
            done({"y": x * 2, "n": np.full((len(x), 1), len(x), np.int64)}, None)

    async def close(self) -> None:
        self.closed = True


class Collected:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.closed: list[FairleadError | None] = []

    def respond(self, response: Response) -> None:
        self.responses.append(response)

    def close(self, error: FairleadError | None) -> None:
        self.closed.append(error)

    @property
    def answer(self) -> list[float]:
        assert self.closed == [None], self.closed
        return self.responses[0].outputs["y"].ravel().tolist()

    @property
    def error(self) -> FairleadError:
        assert not self.responses
        (error,) = self.closed
        assert error is not None
        return error


def version(num_instances: int = 1, **batching: object) -> tuple[ModelVersion, list[SteppedInstance]]:
    spec = ModelSpec(
        name="double",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1)), TensorSpec(name="n", datatype="INT64", shape=(-1, 1))),
        batching=BatchingSpec(**{"max_batch_size": 8, **batching}),  # type: ignore[arg-type]
    )
    instances = [SteppedInstance() for _ in range(num_instances)]
    return ModelVersion(spec, "1", "test", list(instances)), instances


def ask(of: ModelVersion, *values: float, **fields: object) -> Collected:
    sink = Collected()
    sink.ticket = of.submit(Request(model="double", inputs={"x": np.array(values, np.float32).reshape(-1, 1)}, **fields), sink)  # type: ignore[attr-defined,arg-type]
    return sink


async def turn() -> None:
    """Let the loop act on what was submitted."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_requests_read_in_one_turn_of_the_loop_share_a_batch_and_get_their_own_rows():
    model, (instance,) = version()
    one, two = ask(model, 1.0), ask(model, 2.0, 3.0)
    await turn()
    instance.step()
    assert len(instance.batches) == 1
    assert (one.answer, two.answer) == ([2.0], [4.0, 6.0])
    assert two.responses[0].outputs["n"].ravel().tolist() == [3, 3]


async def test_what_arrives_while_the_instance_is_busy_becomes_the_next_batch():
    model, (instance,) = version()
    ask(model, 1.0)
    await turn()
    late = [ask(model, float(i)) for i in range(3)]
    await turn()
    instance.step()
    await turn()
    instance.step()
    assert [len(batch) for batch in instance.batches] == [1, 3]
    assert [sink.answer for sink in late] == [[0.0], [2.0], [4.0]]


async def test_two_instances_work_at_once():
    model, instances = version(num_instances=2, max_batch_size=1)
    sinks = [ask(model, 1.0), ask(model, 2.0)]
    await turn()
    assert [len(instance.batches) for instance in instances] == [1, 1]
    for instance in reversed(instances):
        instance.step()
    assert [sink.answer for sink in sinks] == [[2.0], [4.0]]


async def test_where_order_is_promised_the_later_answer_waits():
    model, (first, second) = version(num_instances=2, max_batch_size=1, preserve_ordering=True)
    sinks = [ask(model, 1.0), ask(model, 2.0)]
    await turn()
    second.step()
    assert sinks[1].responses == []
    first.step()
    assert [sink.answer for sink in sinks] == [[2.0], [4.0]]


async def test_only_the_outputs_that_were_asked_for_come_back():
    model, (instance,) = version()
    sink = ask(model, 1.0, outputs=("y",))
    await turn()
    instance.step()
    assert list(sink.responses[0].outputs) == ["y"]


async def test_wrong_input_is_refused_before_it_queues():
    model, (instance,) = version()
    sink = ask(model, *range(9))
    assert isinstance(sink.error, InvalidRequest)
    assert "batch-size must be <= 8" in sink.error.message
    await turn()
    assert instance.batches == []


async def test_a_spoiled_row_fails_its_own_request_and_not_its_neighbours():
    model, (instance,) = version()
    good, bad, fine = ask(model, 1.0), ask(model, -1.0), ask(model, 3.0)
    await turn()
    instance.step()
    for _ in range(3):
        await turn()
        instance.step()
    assert (good.answer, fine.answer) == ([2.0], [6.0])
    assert isinstance(bad.error, ModelError)
    assert [len(batch) for batch in instance.batches] == [3, 1, 1, 1]


async def test_where_order_is_promised_a_failed_batch_fails_as_a_whole_and_in_its_place():
    model, (first, second) = version(num_instances=2, max_batch_size=2, preserve_ordering=True)
    spoiled, bad, later = ask(model, 1.0), ask(model, -1.0), ask(model, 3.0)
    await turn()
    second.step()
    assert later.responses == []
    first.step()
    assert [type(sink.error) for sink in (spoiled, bad)] == [ModelError, ModelError]
    assert later.answer == [6.0]


async def test_a_crash_is_not_tried_again_and_fails_only_the_batch_that_ran():
    model, (instance,) = version()
    hit = [ask(model, 1.0), ask(model, 2.0)]
    await turn()
    waiting = ask(model, 3.0)
    instance.step(ReplicaDied("gone"))
    await turn()
    instance.step()
    assert [type(sink.error) for sink in hit] == [ReplicaDied, ReplicaDied]
    assert waiting.answer == [6.0]


async def test_a_model_that_loses_rows_is_an_error_and_not_somebody_elses_answer():
    model, (instance,) = version()
    sink = ask(model, 1.0, 2.0, outputs=("y",))
    await turn()
    done, instance.done = instance.done, None
    done({"y": np.zeros((1, 1), np.float32)}, None)
    assert "gave output 'y' of shape [1, 1] for a batch of 2 rows" in sink.error.message


async def test_a_model_that_forgets_an_output_is_an_error():
    model, (instance,) = version()
    sinks = [ask(model, 1.0, outputs=("y",)), ask(model, 2.0, outputs=("n",))]
    await turn()
    done, instance.done = instance.done, None
    done({"y": np.zeros((2, 1), np.float32)}, None)
    for _ in sinks:
        await turn()
        instance.step()
    assert sinks[0].answer == [2.0]
    assert sinks[1].closed == [None]


async def test_a_queued_request_can_be_cancelled_and_a_running_one_is_answered_at_once():
    model, (instance,) = version(max_batch_size=1)
    running, queued = ask(model, 1.0), ask(model, 2.0)
    await turn()
    queued.ticket.cancel()
    running.ticket.cancel()
    assert isinstance(queued.error, Cancelled)
    assert isinstance(running.error, Cancelled)
    instance.step()
    await turn()
    assert len(instance.batches) == 1
    assert running.responses == []
    assert model.statistics()["inference_count"] == 0


async def test_a_request_that_waits_too_long_is_refused_by_the_clock():
    model, (instance,) = version(max_batch_size=1, queue_policy=QueuePolicy(default_timeout=0.01))
    ask(model, 1.0)
    await turn()
    late = ask(model, 2.0)
    async with asyncio.timeout(5):
        while not late.closed:
            await asyncio.sleep(0.001)
    assert isinstance(late.error, TimeoutExpired)
    assert late.error.message == "Request timeout expired"
    instance.step()


async def test_draining_refuses_new_requests_and_finishes_the_others():
    model, (instance,) = version(max_batch_size=1)
    first, second = ask(model, 1.0), ask(model, 2.0)
    await turn()
    draining = asyncio.create_task(model.drain(5.0))
    await turn()
    assert isinstance(ask(model, 3.0).error, ShuttingDown)
    instance.step()
    await turn()
    instance.step()
    await draining
    assert (first.answer, second.answer) == ([2.0], [4.0])
    assert instance.closed


async def test_a_drain_that_runs_out_of_time_fails_what_is_left():
    model, _ = version(max_batch_size=1)
    running, queued = ask(model, 1.0), ask(model, 2.0)
    await turn()
    await model.drain(0.01)
    assert [type(sink.error) for sink in (running, queued)] == [Unavailable, Unavailable]


async def test_an_instance_that_is_down_gets_nothing_until_it_is_back():
    model, (instance,) = version()
    instance.ready = False
    sink = ask(model, 1.0)
    await turn()
    assert instance.batches == []
    instance.ready = True
    model.instance_changed()
    await turn()
    instance.step()
    assert sink.answer == [2.0]


async def test_a_model_that_cannot_come_back_refuses_instead_of_waiting_for_ever():
    model, (instance,) = version()
    instance.ready = False
    waiting = ask(model, 1.0)
    await turn()
    assert waiting.closed == [], "it may be back in a moment"
    instance.down = "its artefact is gone"
    model.instance_changed()
    await turn()
    later = ask(model, 1.0)
    await turn()
    assert [type(sink.error) for sink in (waiting, later)] == [Unavailable, Unavailable]
    assert later.error.message == "model 'double' is not available: its artefact is gone"


async def test_statistics_count_requests_rows_and_executions():
    model, (instance,) = version()
    ask(model, 1.0), ask(model, 2.0, 3.0)
    await turn()
    instance.step()
    await turn()
    statistics = model.statistics()
    assert (statistics["inference_count"], statistics["execution_count"]) == (3, 1)
    assert statistics["inference_stats"]["success"]["count"] == 2
    assert [each["batch_size"] for each in statistics["batch_stats"]] == [3]


async def test_infer_is_the_same_as_an_async_iterator():
    model, (instance,) = version()

    async def collect() -> list[float]:
        request = Request(model="double", inputs={"x": np.ones((1, 1), np.float32)})
        return [float(response.outputs["y"][0, 0]) async for response in model.infer(request)]

    collecting = asyncio.create_task(collect())
    await turn()
    instance.step()
    assert await collecting == [2.0]


async def test_closing_the_iterator_cancels_the_request():
    model, (instance,) = version(max_batch_size=1)
    blocker = ask(model, 1.0)
    await turn()
    stream = model.infer(Request(model="double", inputs={"x": np.ones((1, 1), np.float32)}))
    pending = asyncio.ensure_future(anext(stream))
    await turn()
    assert model.batcher.num_requests == 1
    pending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pending
    assert model.batcher.num_requests == 0
    instance.step()
    assert blocker.answer == [2.0]


# What it tells of requests


def notes(timeline: Timeline) -> dict[str, object]:
    return {name: details for _, name, details in timeline.events}


async def test_the_members_of_a_batch_share_one_note_of_it():
    model, (instance,) = version()
    one, two = Timeline("one", "http", 0.0), Timeline("two", "http", 0.0)
    instance.gather_seconds, instance.compute_seconds = 0.25, 0.5
    ask(model, 1.0, timeline=one)
    ask(model, 2.0, 3.0, timeline=two)
    ask(model, 4.0)
    await turn()
    note = notes(one)["batched"]
    assert isinstance(note, BatchNote) and note is notes(two)["batched"]
    assert (note.model, note.version, note.close_reason, note.rows, note.num_requests, note.ended) == ("double", "1", "idle", 4, 3, 0.0)
    instance.step()
    assert (note.gather_seconds, note.compute_seconds, note.error) == (0.25, 0.5, "")
    assert note.ended > note.began > 0
    assert list(notes(one)) == ["batched", "computed"]


async def test_a_batch_of_which_nobody_asks_makes_no_note():
    model, (instance,) = version()
    ask(model, 1.0)
    await turn()
    assert model.slots[0].batch is not None and model.slots[0].batch.note is None
    instance.step()


async def test_the_note_of_a_failed_batch_says_so_and_the_try_alone_has_its_own():
    model, (instance,) = version()
    good, bad = Timeline("good", "http", 0.0), Timeline("bad", "http", 0.0)
    ask(model, 1.0, timeline=good)
    ask(model, -1.0, timeline=bad)
    await turn()
    instance.step()
    for _ in range(2):
        await turn()
        instance.step()
    batches = [details for _, name, details in bad.events if name == "batched"]
    assert [(each.close_reason, each.num_requests, each.error) for each in batches] == [("idle", 2, "negative"), ("retry", 1, "negative")]
    assert [(each.close_reason, each.error) for _, name, each in good.events if name == "batched"] == [("idle", "negative"), ("retry", "")]


async def test_one_that_left_while_it_was_computed_knows_its_batch_and_hears_nothing_more():
    model, (instance,) = version()
    timeline = Timeline("left", "http", 0.0)
    sink = ask(model, 1.0, timeline=timeline)
    await turn()
    sink.ticket.cancel()
    timeline.end(1.0, 499, "the client left", "cancelled", "")
    instance.step()
    assert [name for _, name, _ in timeline.events] == ["batched"]
