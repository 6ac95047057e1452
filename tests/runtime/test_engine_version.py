"""A language model's version over real replica processes, in which the fake engine repeats what it is told."""

import asyncio
import json
import os
import signal
import time
from contextlib import aclosing

import numpy as np
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families as parse

from fairlead.backends import BACKENDS, fake_engine
from fairlead.core.errors import (
    Cancelled,
    ContextExceeded,
    InvalidRequest,
    LoadError,
    ModelError,
    NotFound,
    QueueFull,
    ReplicaDied,
    ShuttingDown,
    TimeoutExpired,
    Unavailable,
    Unsupported,
)
from fairlead.core.generation import (
    Chat,
    Delta,
    Detokenize,
    Embed,
    Generate,
    Message,
    Phase,
    Sampling,
    Tokenize,
    TokenLogprob,
    ToolCall,
    Usage,
)
from fairlead.core.request import Request
from fairlead.core.specs import BatchingSpec, InstancesSpec, Isolation, LlmSpec, ModelSpec, Sample, TensorSpec, WarmupSpec
from fairlead.core.tensors import object_array
from fairlead.core.timeline import Phases, Timeline
from fairlead.observe.metrics import Metrics
from fairlead.runtime.engine_version import joined, since
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.loading import load_version
from fairlead.runtime.repository import ModelRepository, RepositorySettings

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECONDS = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forkserver():
    server = ForkServer("critical", "json")
    yield server
    await server.close()


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(BACKENDS, fake_engine.KIND.name, fake_engine.KIND)


@pytest_asyncio.fixture(loop_scope="module")
async def load(forkserver, tmp_path):
    """Loads versions, and drains them after the test."""
    loaded = []

    async def load(llm=None, step_seconds=0.001, **fields):
        parameters = {"step_seconds": step_seconds, "max_model_len": 1 << 16} | fields.pop("parameters", {})
        spec = ModelSpec(name="echo", backend="fake_engine", parameters=parameters, llm=LlmSpec(**(llm or {})), **fields)
        version = await load_version(spec, "1", tmp_path, forkserver)
        loaded.append(version)
        return version

    yield load
    await asyncio.gather(*(version.drain(0.0) for version in loaded))


def prompt(text, *, stream=True, **sampling):
    return Request(model="echo", id="7", prompt=Generate(text=text, stream=stream, sampling=Sampling(**sampling)))


async def deltas(version, request):
    async with asyncio.timeout(SECONDS), aclosing(version.infer(request)) as responses:
        return [response.delta async for response in responses]


async def answer(version, text, **sampling):
    return "".join(delta.text for delta in await deltas(version, prompt(text, **sampling)))


async def outputs(version, parameters=None, **inputs):
    request = Request(model="echo", inputs=inputs, parameters=parameters or {})
    async with asyncio.timeout(SECONDS), aclosing(version.infer(request)) as responses:
        return [response.outputs["text_output"].tolist() async for response in responses]


async def until(condition):
    """What the replica tells now and then has come to be so."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def text(value):
    return object_array([value], (1,))


class Sink:
    def __init__(self) -> None:
        self.responses = []
        self.closed = asyncio.get_running_loop().create_future()

    def respond(self, response) -> None:
        assert not self.closed.done()
        self.responses.append(response)

    def close(self, error) -> None:
        self.closed.set_result(error)

    async def end(self):
        return await asyncio.wait_for(self.closed, SECONDS)


# Streams


async def test_a_prompt_is_answered_piece_by_piece(load):
    version = await load()
    assert version.info.architecture == "FakeEngine" and version.platform == "fake_engine" and version.ready
    async with aclosing(version.infer(prompt("to be or "))) as stream:
        response = await anext(stream)
        assert (response.model, response.version, response.id) == ("echo", "1", "7")
        pieces = [response.delta, *[response.delta async for response in stream]]
    assert "".join(piece.text for piece in pieces) == "to be or "
    assert pieces[-1].finish_reason == "stop" and pieces[-1].usage == Usage(prompt_tokens=3, completion_tokens=3)


async def test_many_streams_run_at_once_each_with_its_own_words(load):
    version = await load()
    answers = await asyncio.gather(*(answer(version, f"I am number {n} !forever ", max_tokens=40) for n in range(50)))
    assert answers == [f"I am number {n} " * 10 for n in range(50)]
    await until(lambda: version.stats.num_generated_tokens == 2000)
    # One after another they would have taken as many steps as tokens
    assert version.stats.num_steps < 1000


async def test_what_is_not_streamed_comes_as_one_delta_for_each_choice(load):
    version = await load()
    found = await deltas(version, prompt("to be ", stream=False, n=3, max_tokens=1))
    assert sorted((each.index, each.text, each.finish_reason) for each in found) == [(n, "to ", "length") for n in range(3)]
    assert [each.usage for each in found] == [None, None, Usage(prompt_tokens=2, completion_tokens=3)]


async def test_the_other_prompts_are_answered_too(load):
    version = await load()
    (tokens,) = await deltas(version, Request(model="echo", prompt=Tokenize(text="to be to ")))
    assert tokens.tokens == ["to ", "be ", "to "] and tokens.token_ids == [0, 1, 0]
    (words,) = await deltas(version, Request(model="echo", prompt=Detokenize(token_ids=[1, 0])))
    assert words.text == "be to "
    (vector,) = await deltas(version, Request(model="echo", prompt=Embed(text="to be")))
    assert np.linalg.norm(np.frombuffer(vector.vector, "<f4")) == pytest.approx(1.0)
    chat = Generate(chat=Chat(messages=[Message(role="user", content="hello you")]))
    assert [each.text for each in await deltas(version, Request(model="echo", prompt=chat))] == ["hello you"]


async def test_log_probabilities_survive_the_wire(load):
    version = await load()
    found = await deltas(version, prompt("to be ", logprobs=1, prompt_logprobs=0))  # one or two: those that wait are joined
    top = TokenLogprob(0, "to ", b"to ", -0.5, 1)
    told = [each for delta in found for each in delta.logprobs or []]
    assert (len(told), told[0]) == (2, TokenLogprob(0, "to ", b"to ", -0.5, 1, [top]))
    assert [delta.prompt_logprobs for delta in found if delta.prompt_logprobs] == [[None, TokenLogprob(1, "be ", b"be ", -0.5, 1)]]


async def test_stop_strings_and_stop_tokens_end_an_answer(load):
    version = await load()
    cut = await deltas(version, prompt("one two three ", stop=("wo",)))
    assert "".join(each.text for each in cut) == "one t" and (cut[-1].finish_reason, cut[-1].stop_reason) == ("stop", "wo")
    ended = await deltas(version, prompt("one two three ", stop_token_ids=(1,)))
    assert "".join(each.text for each in ended) == "one " and ended[-1].stop_reason == 1


# Leaving


async def test_who_leaves_gives_the_blocks_back(load):
    version = await load(parameters={"num_blocks": 4})
    async with asyncio.timeout(SECONDS):
        async with aclosing(version.infer(prompt("on and on !forever "))) as stream:
            await anext(stream)
        await until(lambda: version.stats.finished.get("abort") == 1)
    assert (version.stats.num_running, version.stats.num_free_blocks) == (0, 4)
    assert version.metrics.cancelled == 1


async def test_a_ticket_cancels_and_its_sink_is_told(load):
    version = await load()
    sink = Sink()
    ticket = version.submit(prompt("on !forever "), sink)
    ticket.cancel()
    ticket.cancel()
    assert isinstance(await sink.end(), Cancelled)
    assert ticket.done


async def test_a_reader_that_is_slow_finds_all_it_missed_in_one_piece(load):
    version = await load()
    async with (
        asyncio.timeout(SECONDS),
        aclosing(version.infer(prompt("a b c d ", ignore_eos=True, max_tokens=200, logprobs=0))) as stream,
    ):
        first = (await anext(stream)).delta
        await until(lambda: version.metrics.success.count == 1)
        (rest,) = [response.delta async for response in stream]
    assert first.text + rest.text == "a b c d " * 50
    assert len(first.token_ids + rest.token_ids) == len(first.logprobs + rest.logprobs) == 200
    assert rest.finish_reason == "length" and rest.usage.completion_tokens == 200


async def test_choices_wait_apart_and_usage_comes_last(load):
    version = await load()
    async with asyncio.timeout(SECONDS), aclosing(version.infer(prompt("a b c ", n=3))) as stream:
        first = (await anext(stream)).delta
        await until(lambda: version.metrics.success.count == 1)
        rest = [response.delta async for response in stream]
    texts = {n: "".join(each.text for each in (first, *rest) if each.index == n) for n in range(3)}
    assert texts == dict.fromkeys(range(3), "a b c ")
    assert len(rest) == 3 and [each.usage is not None for each in rest] == [False, False, True]


async def test_joining_keeps_everything_of_both():
    one = Delta(text="a", reasoning="h", token_ids=[1], prompt_logprobs=[None], tool_calls=[ToolCall(index=0, id="c", name="f")])
    calls = [ToolCall(index=0, arguments="{}"), ToolCall(index=1, id="d", name="g")]
    two = Delta(
        text="b", reasoning="m", tool_calls=calls, token_ids=[2], finish_reason="stop", stop_reason="x", usage=Usage(prompt_tokens=1)
    )
    whole = joined(joined(one, two), Delta(tokens=["t"], vector=b"1234"))
    assert whole == Delta(
        text="ab",
        reasoning="hm",
        tool_calls=[ToolCall(index=0, id="c", name="f", arguments="{}"), ToolCall(index=1, id="d", name="g")],
        token_ids=[1, 2],
        prompt_logprobs=[None],
        finish_reason="stop",
        stop_reason="x",
        usage=Usage(prompt_tokens=1),
        tokens=["t"],
        vector=b"1234",
    )


# Refusals


async def test_what_the_engine_refuses_is_the_callers_error_and_nobody_elses(load):
    version = await load(parameters={"max_model_len": 8, "chat_template": False})
    beside = asyncio.ensure_future(answer(version, "a b c "))
    with pytest.raises(ContextExceeded, match="maximum context length is 8"):
        await deltas(version, prompt("w " * 9))
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        await deltas(version, prompt(""))
    with pytest.raises(InvalidRequest, match="no chat template"):
        await deltas(version, Request(model="echo", prompt=Generate(chat=Chat(messages=[Message(role="user", content="x")]))))
    with pytest.raises(InvalidRequest, match="one of the two"):
        await deltas(version, Request(model="echo", prompt=Generate(text="x"), inputs={"text_input": text(b"x")}))
    with pytest.raises(ModelError, match="asked to"):
        await deltas(version, prompt("!raise "))
    assert await beside == "a b c "
    assert version.metrics.refused == 4 and version.metrics.fail.count == 1
    await until(lambda: version.stats.num_quarantined == 1)


async def test_more_than_may_wait_are_refused_with_a_time_to_come_back(load):
    version = await load(llm={"max_num_seqs": 1, "max_waiting": 2})
    streams = [version.infer(prompt("on !forever ")) for _ in range(3)]
    await asyncio.wait_for(anext(streams[0]), SECONDS)  # it runs, so that two may wait
    waiting = [asyncio.ensure_future(anext(stream)) for stream in streams[1:]]
    await until(lambda: version.instances[0].num_in_flight == 3)
    with pytest.raises(QueueFull, match="3 requests at once") as refused:
        await deltas(version, prompt("one more"))
    assert refused.value.retry_after >= 1.0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await streams[0].aclose()
    assert await answer(version, "now ") == "now "


async def test_a_request_that_has_not_started_in_time_is_given_up(load):
    version = await load(llm={"max_num_seqs": 1})
    async with asyncio.timeout(SECONDS), aclosing(version.infer(prompt("on !forever "))) as stream:
        await anext(stream)
        late = prompt("late")
        late.timeout = 0.02
        with pytest.raises(TimeoutExpired, match="Request timeout expired"):
            await deltas(version, late)


async def test_the_higher_priority_goes_first(load):
    version = await load(llm={"max_num_seqs": 1}, batching=BatchingSpec(priority_levels=3))
    done = []

    async def ask(name, priority):
        request = prompt(name)
        request.priority = priority
        await deltas(version, request)
        done.append(name)

    async with asyncio.timeout(SECONDS):
        async with aclosing(version.infer(prompt("first !forever "))) as stream:
            await anext(stream)
            asked = [asyncio.ensure_future(ask(*each)) for each in (("last", 3), ("default", 0), ("best", 1))]
            await until(lambda: version.instances[0].num_in_flight == 4)
        await asyncio.gather(*asked)
    assert done == ["best", "default", "last"]


# Deaths


async def test_a_crash_fails_what_was_under_way_and_the_next_life_answers(load):
    version = await load()
    await answer(version, "some words ")
    await until(lambda: version.stats.num_generated_tokens == 2)
    pid = version.instances[0].pid
    beside = asyncio.ensure_future(deltas(version, prompt("on !forever ")))
    with pytest.raises(ReplicaDied, match=r"model 'echo' died \(exit code 7\) while computing this request"):
        await deltas(version, prompt("!crash "))
    with pytest.raises(ReplicaDied):
        await beside
    assert not version.ready
    with pytest.raises(Unavailable, match="is being started again"):
        await deltas(version, prompt("too early"))
    await until(lambda: version.ready)
    assert version.instances[0].pid != pid and version.instances[0].restarts == 1
    assert await answer(version, "again ") == "again "
    # What was counted before the death still counts
    await until(lambda: version.stats.num_generated_tokens >= 3)


@pytest.mark.parametrize("how", ["!hang", "!seize"])
async def test_a_step_that_hangs_ends_its_process(load, how):
    version = await load(llm={"step_timeout": 1.0})
    with pytest.raises(ReplicaDied, match="a step took longer than `llm.step_timeout`"):
        await deltas(version, prompt(how))
    await until(lambda: version.ready)
    assert await answer(version, "again ") == "again "


async def test_a_process_that_was_stopped_longer_than_a_step_may_take_goes_on(load):
    version = await load(llm={"step_timeout": 0.4}, step_seconds=0.02)
    pid = version.instances[0].pid
    async with aclosing(version.infer(prompt("on !forever "))) as stream, asyncio.timeout(SECONDS):
        await anext(stream)
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.2)  # the machine's time, not the test's: as long as a debugger, or a freezer, takes
        os.kill(pid, signal.SIGCONT)
        for _ in range(30):
            await anext(stream)
    await asyncio.sleep(0)
    assert version.ready and version.instances[0].pid == pid and version.instances[0].restarts == 0


async def test_an_engine_that_gives_up_is_started_again(load):
    version = await load()
    with pytest.raises(ReplicaDied, match="step after step failed"):
        await deltas(version, prompt("!break "))
    await until(lambda: version.ready)


async def test_replicas_share_the_load_and_one_that_died_gets_none(load):
    version = await load(instances=InstancesSpec(count=2))
    streams = [version.infer(prompt("on !forever ")) for _ in range(4)]
    async with asyncio.timeout(SECONDS):
        for stream in streams:
            await anext(stream)
        assert [instance.num_in_flight for instance in version.instances] == [2, 2]
        os.kill(version.instances[0].pid, signal.SIGKILL)
        for stream in streams[::2]:  # those of the first replica
            with pytest.raises(ReplicaDied):
                while True:
                    await anext(stream)
        for stream in streams[1::2]:
            await anext(stream)
        assert await answer(version, "still ") == "still "
        assert version.ready
        for stream in streams:
            await stream.aclose()


# The end


async def test_drain_finishes_the_streams_and_refuses_new_ones(load):
    version = await load(step_seconds=0.01)
    async with asyncio.timeout(SECONDS), aclosing(version.infer(prompt("a b c d e f "))) as stream:
        said = (await anext(stream)).delta.text
        pid = os.pidfd_open(version.instances[0].pid)
        draining = asyncio.ensure_future(version.drain(SECONDS))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown, match="is unloading"):
            await deltas(version, prompt("too late"))
        async for response in stream:
            said += response.delta.text
        assert said == "a b c d e f "
        await draining
    assert not version.ready and version.instances[0].pid is None
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(pid, 0)
    os.close(pid)


async def test_what_drain_cuts_off_is_told_so(load):
    version = await load()
    sink = Sink()
    version.submit(prompt("on !forever "), sink)
    await version.drain(0.05)
    error = await sink.end()
    assert isinstance(error, Unavailable) and "was unloaded before it answered" in error.message


# Tensors in place of a prompt, as for Triton's vLLM backend


async def test_tensors_are_answered_by_one_response_with_the_prompt_before_it(load):
    version = await load()
    assert await outputs(version, text_input=text(b"to be ")) == [[b"to be to be "]]
    assert await outputs(version, {"max_tokens": 1, "exclude_input_in_output": True}, text_input=text(b"to be ")) == [[b"to "]]
    sampling = text(json.dumps({"max_tokens": 1, "n": 2, "temperature": 0}).encode())
    assert await outputs(version, text_input=text(b"to be "), sampling_parameters=sampling) == [[b"to be to ", b"to be to "]]


async def test_tensors_with_stream_are_answered_piece_by_piece(load):
    version = await load()
    pieces = await outputs(version, text_input=text(b"to be "), stream=np.array([True]))
    assert "".join(piece.decode() for (piece,) in pieces) == "to be "
    assert b"".join(piece for (piece,) in await outputs(version, {"stream": True}, text_input=text(b"to be "))) == b"to be "


async def test_one_response_goes_to_a_sink(load):
    version = await load()
    sink = Sink()
    version.submit(Request(model="echo", id="9", inputs={"text_input": text(b"to ")}), sink)
    assert await sink.end() is None
    (response,) = sink.responses
    assert (response.id, response.version, response.outputs["text_output"].tolist()) == ("9", "1", [b"to to "])
    streaming = Sink()
    version.submit(Request(model="echo", inputs={"text_input": text(b"to "), "stream": np.array([True])}), streaming)
    assert isinstance(await streaming.end(), Unsupported)


@pytest.mark.parametrize(
    ("parameters", "inputs", "says"),
    [
        ({}, {}, "expected 1 inputs but got 0"),
        ({}, {"text_input": object_array([b"a", b"b"], (2,))}, "unexpected shape for input 'text_input'"),
        ({}, {"text_input": text(b"\xff")}, "is not UTF-8"),
        ({"beams": 4}, {"text_input": text(b"x")}, "unknown sampling parameter 'beams'"),
        ({"temperature": -1}, {"text_input": text(b"x")}, "temperature"),
        ({"stream": "yes"}, {"text_input": text(b"x")}, "'stream' must be a boolean"),
        ({}, {"text_input": text(b"x"), "sampling_parameters": text(b"[1]")}, "not a JSON object"),
        ({"stream": True, "exclude_input_in_output": False}, {"text_input": text(b"x")}, "when streaming"),
    ],
)
async def test_wrong_tensors_are_refused_in_words(load, parameters, inputs, says):
    version = await load()
    with pytest.raises(InvalidRequest, match=says):
        await outputs(version, parameters, **inputs)
    assert version.metrics.refused == 1


async def test_an_embedder_answers_text_with_a_vector(load):
    version = await load(llm={"task": "embed"})
    sink = Sink()
    version.submit(Request(model="echo", inputs={"text_input": text(b"to be")}), sink)
    assert await sink.end() is None
    assert sink.responses[0].outputs["embedding"].shape == (8,)
    with pytest.raises(Unsupported, match="does not generate"):
        await deltas(version, prompt("to be"))


async def test_declared_warm_up_runs_before_anybody_waits(load):
    sample = {"text_input": Sample(data=["warm me up"], shape=(1,))}
    version = await load(warmup=(WarmupSpec(inputs=sample, count=2),), instances=InstancesSpec(count=2))
    assert version.metrics.success.count == 4
    with pytest.raises(LoadError, match="warm-up failed: the model failed on this request"):
        await load(warmup=(WarmupSpec(inputs={"text_input": Sample(data=["!raise"], shape=(1,))}),))


# Loading


async def test_what_cannot_be_of_an_engine_is_refused(load):
    with pytest.raises(LoadError, match="an engine runs in a process of its own"):
        await load(instances=InstancesSpec(isolation=Isolation.THREAD))
    with pytest.raises(LoadError, match="leave `inputs` and `outputs` out"):
        await load(inputs=(TensorSpec(name="x", datatype="FP32", shape=(1,)),))


async def test_a_repository_serves_it_beside_models_of_tensors(tmp_path, forkserver):
    (tmp_path / "echo").mkdir()
    (tmp_path / "echo" / "model.yaml").write_text("backend: fake_engine\nllm: {max_num_seqs: 2}\n")
    (tmp_path / "echo" / "words.txt").write_text("none")
    (tmp_path / "double").mkdir()
    (tmp_path / "double" / "model.py").write_text(
        "import numpy as np\nclass M:\n    example = {'x': np.zeros((1, 1))}\n    def infer(self, inputs):\n        return {'y': 2 * inputs['x']}\n"
    )
    (tmp_path / "double" / "model.yaml").write_text("instances: {isolation: thread}\n")
    metrics = Metrics(vllm_names=True)
    repository = ModelRepository(RepositorySettings(sources=(str(tmp_path),), cache_folder=tmp_path / ".cache"), metrics, forkserver)
    try:
        await repository.start()
        assert repository.failures() == {}
        assert [each.text for each in await deltas(repository, prompt("hello "))] == ["hello "]
        assert repository.engine_info("echo").max_model_len == 4096
        assert repository.engine_info("double") is None
        with pytest.raises(NotFound):
            repository.engine_info("nobody")
        with pytest.raises(Unsupported, match="model 'double' computes tensors: it takes no prompt"):
            await deltas(repository, Request(model="double", prompt=Generate(text="x")))
        await until(lambda: repository.find("echo").stats.num_generated_tokens == 1)
        (told,) = repository.statistics("echo")
        assert told["inference_count"] == 1 and told["inference_stats"]["queue"]["count"] == 1
        assert told["execution_count"] == told["inference_stats"]["compute_infer"]["count"] >= 1
        told = {(s.name, *s.labels.values()): s.value for family in parse(metrics.text()[1].decode()) for s in family.samples}
        assert told["fairlead_generated_tokens_total", "echo", "1"] == 1
        assert told["vllm:generation_tokens_total", "echo"] == 1
    finally:
        await repository.stop(0.0)


# What it tells of requests


async def test_the_timeline_gets_what_the_engine_did_and_nobody_else_does(load):
    version = await load(step_seconds=0.005)
    request = prompt("a b c ")
    request.arrived = time.perf_counter() - 1.0
    request.timeline = timeline = Timeline("7", "http", request.arrived)
    pieces = await deltas(version, request)
    ((at, name, told),) = timeline.events
    assert name == "engine" and 1.0 <= at - request.arrived < SECONDS
    assert isinstance(told, Phases) and (told.model, told.version, told.instance) == ("echo", "1", 0)
    assert [phase.name for phase in told.phases] == ["waiting", "prefill", "decode"]
    assert told.phases[0].start == 0.0 and told.phases[0].seconds < 1.0, "what was before it was sent is not the engine's"
    assert timeline.usage == pieces[-1].usage
    assert not any(piece.phases for piece in pieces), "an answer that is stored would tell of another's time"


async def test_a_timeline_that_has_ended_is_left_as_it_is(load):
    version = await load(step_seconds=0.005)
    request = prompt("a b c ")
    request.timeline = timeline = Timeline("7", "http", time.perf_counter())
    timeline.end(time.perf_counter(), 499, "the client left", "cancelled", "cancelled")
    await deltas(version, request)
    assert (timeline.events, timeline.usage, timeline.finish_reasons) == ([], None, ())


async def test_a_timeline_of_what_was_given_up_says_that_the_engine_had_it(load):
    version = await load(step_seconds=0.01)
    request = prompt("a ", ignore_eos=True)
    request.timeline = Timeline("7", "http", time.perf_counter())
    async with asyncio.timeout(SECONDS), aclosing(version.infer(request)) as stream:
        await anext(stream)
    assert [(name, details.phases) for _, name, details in request.timeline.events] == [("engine", [])]


@pytest.mark.parametrize(
    ("start", "seconds", "age", "expected"), [(0.0, 2.0, 0.5, (0.0, 1.5)), (2.0, 1.0, 0.5, (1.5, 1.0)), (0.0, 0.2, 0.5, (0.0, 0.0))]
)
async def test_times_count_from_when_it_was_sent(start, seconds, age, expected):
    phase = since(Phase("waiting", start, seconds), age)
    assert (phase.start, phase.seconds) == expected
