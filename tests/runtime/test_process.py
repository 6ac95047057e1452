import asyncio
import os
import signal
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import pytest_asyncio
from msgspec import structs

from fairlead.backends import BACKENDS
from fairlead.core.errors import Cancelled, InvalidRequest, LoadError, ModelError, ReplicaDied, ShuttingDown, Unavailable
from fairlead.core.request import Request
from fairlead.core.specs import ModelSpec
from fairlead.core.tensors import object_array
from fairlead.runtime import lives, process
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.lives import restart_delay
from fairlead.runtime.process import ProcessInstance

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODELS = Path(__file__).parent / "process_models"
SECONDS = 20.0
"""Long enough for anything that happens at all."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forkserver():
    server = ForkServer("error", "json")
    yield server
    await server.close()


class Watched(ProcessInstance):
    """An instance whose changes can be waited for."""

    def __init__(self, forkserver, model, kind=BACKENDS["python"], threads=1, slab_bytes=process.SLAB_BYTES, **parameters):
        self.changes: asyncio.Queue[bool] = asyncio.Queue()
        spec = ModelSpec(name=model, parameters={key: str(value) for key, value in parameters.items()})
        artefact = MODELS / model / "model.py"
        super().__init__(spec, artefact, kind, threads, forkserver, lambda: self.changes.put_nowait(self.ready), slab_bytes=slab_bytes)

    async def changed(self):
        return await asyncio.wait_for(self.changes.get(), SECONDS)


@pytest_asyncio.fixture(loop_scope="module")
async def start(forkserver):
    """Starts instances and closes them after the test."""
    started = []

    async def start(model, **options):
        instance = Watched(forkserver, model, **options)
        started.append(instance)
        await instance.start(SECONDS)
        return instance

    yield start
    await asyncio.gather(*(instance.close() for instance in started))


def begin(instance, *inputs, outputs=None, requests=()):
    """One batch; a future of its outputs."""
    answer = asyncio.get_running_loop().create_future()

    def done(result, error):
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

    instance.run(list(inputs), outputs, done, requests)
    return answer


async def ask(instance, *inputs, **options):
    return await asyncio.wait_for(begin(instance, *inputs, **options), SECONDS)


def do(what):
    return {"do": object_array([what], (1,))}


async def heard(fifo):
    """Something was written there."""
    loop, written = asyncio.get_running_loop(), asyncio.Event()
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    loop.add_reader(fd, written.set)
    try:
        await asyncio.wait_for(written.wait(), SECONDS)
    finally:
        loop.remove_reader(fd)
        os.close(fd)


class Answers:
    """A stream's consumer."""

    def __init__(self):
        self.numbers: asyncio.Queue[int] = asyncio.Queue()
        self.closed = asyncio.get_running_loop().create_future()

    def respond(self, outputs):
        assert not self.closed.done()
        self.numbers.put_nowait(int(outputs["number"][0]))
        self.last = outputs

    def close(self, error):
        self.closed.set_result(error)

    async def take(self, num):
        return [await asyncio.wait_for(self.numbers.get(), SECONDS) for _ in range(num)]

    async def end(self):
        return await asyncio.wait_for(self.closed, SECONDS)


def count(instance, upto, credit=1000, **inputs):
    answers = Answers()
    inputs = {"upto": np.array([upto])} | {name: np.array([value]) for name, value in inputs.items()}
    instance.stream(Request(model=instance.model, inputs=inputs), answers, credit)
    return answers


async def exit_of(pid):
    """A future that is done when the process has ended, whoever its parent is."""
    fd = os.pidfd_open(pid)
    ended = asyncio.get_running_loop().create_future()

    def readable():
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        ended.set_result(None)

    asyncio.get_running_loop().add_reader(fd, readable)
    return ended


# Batches


@pytest.mark.parametrize("slab_bytes", [process.SLAB_BYTES, 1 << 20, 0], ids=["slab", "small slab", "no slab"])
async def test_every_datatype_comes_back_as_it_went(start, slab_bytes):
    instance = await start("echo", slab_bytes=slab_bytes)
    inputs = {
        "x": np.arange(3, dtype=np.float32),
        "bool": np.array([[True, False]]),
        **{np.dtype(t).name: np.array([1, 2, 3], dtype=t) for t in (np.uint8, np.uint16, np.uint32, np.uint64)},
        **{np.dtype(t).name: np.array([-1, 2], dtype=t) for t in (np.int8, np.int16, np.int32, np.int64, np.float16, np.float64)},
        "bf16": np.array([1.5, np.nan], dtype=ml_dtypes.bfloat16),
        "bytes": object_array([b"", b"a\0b", "ü".encode()], (3, 1)),
        "scalar": np.array(7.5),
        "text": np.array(b"alone", dtype=object),
        "empty": np.empty((0, 4), np.int16),
        "no text": np.empty((2, 0), object),
        "image": np.random.default_rng(0).random((3, 224, 224), np.float32),
        "large": np.random.default_rng(0).random((2, 100_000)),
        "large text": object_array([bytes([i % 256]) * i for i in range(700)], (700,)),
        "large bf16": np.arange(100_000).astype(ml_dtypes.bfloat16),
    }
    for _ in range(3):  # the slab is given back each time
        outputs = await ask(instance, inputs)
        assert list(outputs) == list(inputs)
        for name, array in inputs.items():
            assert outputs[name].dtype == array.dtype and outputs[name].shape == array.shape, name
            if array.dtype == object:
                assert outputs[name].tolist() == array.tolist()
            else:
                assert outputs[name].tobytes() == array.tobytes(), name


async def test_it_tells_what_it_loaded(start):
    instance = await start("doubler")
    assert instance.ready and instance.batches and not instance.streams and instance.platform == "python"
    assert [(spec.name, spec.datatype, spec.shape) for spec in instance.inputs] == [("x", "FP32", (-1, 4))]
    assert [spec.name for spec in instance.outputs] == ["y", "seen"]
    assert instance.example["x"].shape == (2, 4)


@pytest.mark.parametrize("width", [4, 50_000], ids=["small", "large"])
async def test_rows_of_several_requests_are_computed_together(start, width):
    instance = await start("doubler")
    rows = [{"x": np.full((num, width), num, np.float32)} for num in (1, 3, 2)]
    outputs = await ask(instance, *rows)
    assert outputs["seen"].tolist() == [6] * 6
    assert (outputs["y"] == 2 * np.concatenate([row["x"] for row in rows])).all()
    assert instance.compute_seconds > 0 and instance.gather_seconds > 0


async def test_only_the_wanted_outputs_travel(start):
    instance = await start("doubler")
    assert list(await ask(instance, {"x": np.zeros((1, 4), np.float32)}, outputs=frozenset(["seen"]))) == ["seen"]


async def test_coroutines_are_awaited(start):
    instance = await start("coroutine")
    assert (await ask(instance, {"x": np.array([[1, 2]])}))["y"].tolist() == [[2, 3]]
    with pytest.raises(ModelError, match="ValueError: no negative numbers"):
        await ask(instance, {"x": np.array([[-1, 2]])})
    assert (await ask(instance, {"x": np.array([[1, 2]])}))["y"].tolist() == [[2, 3]]


async def test_a_model_sees_who_asks_and_the_threads_it_may_use(start):
    kind = structs.replace(BACKENDS["python"], preload=("colorsys", "a_module_that_is_not_there"))
    instance = await start("surroundings", kind=kind, threads=2)
    request = Request(model="surroundings", inputs={}, id="a", trace="00-1-2-01", parameters={"tone": "kind"})
    other = Request(model="surroundings", inputs={})
    outputs = await ask(instance, {"x": np.array([1])}, requests=[request, other])
    assert {name: outputs[name].tolist() for name in ("ids", "traces", "tones")} == {
        "ids": [b"a", b""],
        "traces": [b"00-1-2-01", b""],
        "tones": [b"kind", b""],
    }
    assert outputs["preloaded"].tolist() == [True]
    assert outputs["omp"].tolist() == [b"2"] and set(outputs["blas"].tolist()) <= {2}
    assert outputs["comm"].tolist() == [b"fl surroundings"]
    assert (await ask(instance, {"x": np.array([1])}))["ids"].size == 0


async def test_siblings_of_one_fork_server_draw_different_random_numbers(start):
    instances = [await start("surroundings") for _ in range(2)]
    draws = [(await ask(instance, {"x": np.array([1])}))["random"].tolist() for instance in instances]
    assert draws[0] != draws[1]


async def test_parameters_that_cannot_travel_are_the_callers_fault(start):
    instance = await start("echo")
    request = Request(model="echo", inputs={}, parameters={"huge": 1 << 100})
    with pytest.raises(InvalidRequest, match="cannot be passed to model 'echo'"):
        await ask(instance, {"x": np.arange(3, dtype=np.float32)}, requests=[request])
    assert await ask(instance, {"x": np.arange(3, dtype=np.float32)})


# What goes wrong in a batch


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (b"raise", ModelError, "model 'trouble' failed: ZeroDivisionError: 7 / 0"),
        (b"leave", ModelError, "model 'trouble' failed: SystemExit: 3"),
        (b"refuse", InvalidRequest, "input 'do' is not nice"),
        (b"overheat", InvalidRequest, "too hot"),
        (b"complain at length", ModelError, "model 'trouble' failed: ValueError: xxx"),
        (b"answer with a number", ModelError, "must return a dict"),
        (b"answer with dates", ModelError, "datetime64"),
    ],
)
async def test_an_exception_fails_the_batch_and_not_the_process(start, what, error, message):
    instance = await start("trouble")
    pid = instance.pid
    with pytest.raises(error, match=message) as raised:
        await ask(instance, do(what))
    assert type(raised.value) is error and len(raised.value.message) < 10_000
    assert (await ask(instance, do(b"nothing")))["done"].tolist() == [b"nothing"]
    assert instance.pid == pid and instance.restarts == 0


async def test_a_killed_process_fails_only_its_own_batch_and_is_started_again(start, tmp_path):
    began = tmp_path / "began"
    os.mkfifo(began)
    instance, neighbour = await asyncio.gather(start("trouble", began=began), start("doubler"))
    doomed = begin(instance, do(b"hang"))
    await heard(began)  # it computes
    pid = instance.pid
    os.kill(pid, signal.SIGKILL)
    assert not await instance.changed()
    with pytest.raises(Unavailable, match="being started again"):
        await ask(instance, do(b"nothing"))
    with pytest.raises(ReplicaDied, match=r"model 'trouble' died \(signal 9\) while computing this request"):
        await asyncio.wait_for(doomed, SECONDS)
    assert await instance.changed()
    assert instance.restarts == 1 and instance.pid != pid
    assert (await ask(instance, do(b"nothing")))["done"].tolist() == [b"nothing"]
    assert neighbour.ready and (await ask(neighbour, {"x": np.ones((1, 4), np.float32)}))["seen"].tolist() == [1]


async def test_an_exit_of_the_models_own_is_told(start):
    instance = await start("trouble")
    with pytest.raises(ReplicaDied, match=r"exit code 7"):
        await ask(instance, do(b"die"))


async def test_a_process_that_babbles_is_hung_up_on_and_replaced(start):
    instance = await start("trouble")
    with pytest.raises(ReplicaDied):
        await ask(instance, do(b"babble"))
    assert [await instance.changed(), await instance.changed()] == [False, True]
    assert (await ask(instance, do(b"nothing")))["done"].tolist() == [b"nothing"]


async def test_it_is_tried_again_until_it_loads_again(start, tmp_path):
    broken = tmp_path / "broken"
    instance = await start("trouble", broken=broken)
    os.mkfifo(broken)
    with pytest.raises(ReplicaDied):
        await ask(instance, do(b"die"))
    assert not await instance.changed()
    await heard(broken)  # the first attempt fails
    broken.unlink()
    assert not await instance.changed()
    assert "broken meanwhile" in instance.down
    assert await instance.changed() and instance.restarts == 2
    assert await ask(instance, do(b"nothing"))


async def test_the_delay_before_a_restart_doubles_and_a_healthy_minute_forgives():
    delays, delay = [], 0.0
    for _ in range(11):
        delay = restart_delay(delay, lived=1.0)
        delays.append(delay)
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0])
    assert restart_delay(30.0, lived=60.0) == 0.1


async def test_ctrl_c_in_the_terminal_does_not_reach_it(start):
    instance = await start("doubler")
    os.kill(instance.pid, signal.SIGINT)
    assert await ask(instance, {"x": np.ones((1, 4), np.float32)})
    assert instance.restarts == 0


# Loading


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("fails_to_load", "`load` failed: FileNotFoundError: weights.bin"),
        ("exits_at_import", r"its process ended while loading it \(exit code 5\)"),
        ("no_such_model", "no_such_model"),
    ],
)
async def test_a_model_that_cannot_be_loaded_says_why(forkserver, model, message):
    instance = Watched(forkserver, model)
    with pytest.raises(LoadError, match=message):
        await instance.start(SECONDS)
    assert not instance.ready and instance.pid is None
    await instance.close()


async def test_a_load_that_hangs_ends_at_its_deadline(forkserver):
    instance = Watched(forkserver, "hangs_on_load")
    with pytest.raises(LoadError, match=r"did not load within 0.3 s"):
        await instance.start(0.3)


async def test_closing_while_it_loads_ends_the_load(forkserver, tmp_path):
    began = tmp_path / "began"
    os.mkfifo(began)
    instance = Watched(forkserver, "hangs_on_load", began=began)
    starting = asyncio.ensure_future(instance.start(SECONDS))
    await heard(began)
    ended = await exit_of(instance.pid)
    await instance.close()
    with pytest.raises(LoadError):
        await asyncio.wait_for(starting, SECONDS)
    await asyncio.wait_for(ended, SECONDS)


# Streams


@pytest.mark.parametrize("ballast", [0, 100_000], ids=["small", "large"])
async def test_a_stream_has_many_answers_and_an_end(start, ballast):
    instance = await start("counter")
    assert instance.streams
    for _ in range(2):
        answers = count(instance, 10, ballast=ballast)
        assert await answers.end() is None
        assert await answers.take(10) == list(range(10))
        assert (answers.last["ballast"] == 9).all() and answers.last["ballast"].size == ballast


async def test_the_producer_stops_where_its_credit_ends(start, tmp_path):
    closed_at = tmp_path / "closed_at"
    instance = await start("counter", closed_at=closed_at)
    answers = count(instance, 12, credit=3, ballast=100_000)
    assert await answers.take(3) == [0, 1, 2]
    instance.grant(2)
    assert await answers.take(2) == [3, 4]
    instance.cancel()
    assert type(await answers.end()) is Cancelled
    assert answers.numbers.empty() and closed_at.read_text() == "5"
    assert await count(instance, 1).end() is None


async def test_cancelling_closes_a_generator_that_never_pauses(start, tmp_path):
    closed_at = tmp_path / "closed_at"
    instance = await start("async_counter", closed_at=closed_at)
    answers = count(instance, 1_000_000_000, credit=1_000_000_000)
    await answers.take(1)
    instance.cancel()
    instance.cancel()
    assert type(await answers.end()) is Cancelled
    assert closed_at.read_text() == "closed"


async def test_cancelling_closes_a_generator_that_waits(start, tmp_path):
    closed_at = tmp_path / "closed_at"
    instance = await start("async_counter", closed_at=closed_at)
    answers = count(instance, 3)
    assert await answers.take(3) == [0, 1, 2]
    instance.cancel()
    assert type(await answers.end()) is Cancelled
    assert closed_at.read_text() == "closed"


@pytest.mark.parametrize("model", ["counter", "async_counter"])
async def test_cancelling_before_the_first_answer_ends_the_stream_too(start, model):
    instance = await start(model)
    for _ in range(20):
        answers = count(instance, 10)
        instance.cancel()
        assert type(await answers.end()) is Cancelled
    assert await count(instance, 0).end() is None


async def test_an_exception_in_a_stream_comes_after_the_answers_before_it(start):
    instance = await start("counter")
    answers = count(instance, 20)
    error = await answers.end()
    assert type(error) is ModelError and "ValueError: unlucky" in error.message
    assert await answers.take(13) == list(range(13))
    assert await count(instance, 1).end() is None


async def test_a_killed_process_fails_its_stream(start):
    instance = await start("async_counter")
    answers = count(instance, 1)
    await answers.take(1)
    os.kill(instance.pid, signal.SIGKILL)
    assert type(await answers.end()) is ReplicaDied
    assert [await instance.changed(), await instance.changed()] == [False, True]
    assert await count(instance, 0).end() is None


async def test_a_plain_model_asked_for_a_stream_gives_one_answer(start):
    instance = await start("echo")
    answers = Answers()
    inputs = {"x": np.arange(3, dtype=np.float32), "number": np.array([5])}
    instance.stream(Request(model="echo", inputs=inputs), answers, 1)
    assert await answers.take(1) == [5]
    instance.grant(1)
    assert await answers.end() is None


async def test_a_streaming_model_asked_for_one_answer_refuses(start):
    instance = await start("counter")
    with pytest.raises(ModelError):
        await ask(instance, {"upto": np.array([1])})
    assert await count(instance, 1).end() is None


# The end


async def test_closing_ends_the_process_and_stops_its_stream(start):
    instance = await start("async_counter")
    ended = await exit_of(instance.pid)
    answers = count(instance, 1)
    await answers.take(1)
    await instance.close()
    assert type(await answers.end()) is Cancelled
    await asyncio.wait_for(ended, SECONDS)
    assert not instance.ready and instance.pid is None
    with pytest.raises(ShuttingDown):
        await ask(instance, {"upto": np.array([1])})
    await instance.close()  # once more does no harm


async def test_closing_kills_what_does_not_end(start, tmp_path, monkeypatch):
    monkeypatch.setattr(lives, "CLOSE_SECONDS", 0.2)
    began = tmp_path / "began"
    os.mkfifo(began)
    instance = await start("trouble", began=began)
    doomed = begin(instance, do(b"hang"))
    await heard(began)
    ended = await exit_of(instance.pid)
    await instance.close()
    with pytest.raises(ShuttingDown):
        await doomed
    await asyncio.wait_for(ended, SECONDS)


async def test_nothing_is_left_open(start):
    descriptors = set(os.listdir("/proc/self/fd"))
    instances = [await start("doubler") for _ in range(3)]
    await asyncio.gather(*(instance.close() for instance in instances))
    await asyncio.sleep(0)
    assert set(os.listdir("/proc/self/fd")) <= descriptors
