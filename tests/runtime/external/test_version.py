"""A model that somebody else's engine computes: started or attached to, asked, dying, coming back."""

import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fairlead.backends.external import ENGINES, ExternalEngine
from fairlead.core.errors import FairleadError, InvalidRequest, LoadError, ModelError, ReplicaDied, Unavailable, Unsupported
from fairlead.core.generation import Chat, Delta, Embed, Generate, Message, Sampling, Tokenize
from fairlead.core.request import Raw, Request, Response
from fairlead.core.specs import EngineSpec, InstancesSpec, LlmSpec, ModelSpec
from fairlead.runtime.external import child as child_module
from fairlead.runtime.external import instance as instances
from fairlead.runtime.external.child import free_port
from fairlead.runtime.external.instance import MAX_UNHEALTHY
from fairlead.runtime.external.listener import Owner
from fairlead.runtime.external.version import ExternalVersion
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.loading import load_version
from fairlead.runtime.upstream.fake import Fake, Script, text_of

SECONDS = 60.0
CHAT = "/v1/chat/completions"
PROGRAM = (sys.executable, "-m", "fairlead.runtime.upstream.fake", "--port", "{port}")


def spec(*, task: str = "auto", count: int = 1, backend: str = "openai", **engine: Any) -> ModelSpec:
    llm = msgspec.convert({"task": task}, LlmSpec)
    return ModelSpec(name="far", backend=backend, llm=llm, instances=InstancesSpec(count=count), engine=EngineSpec(**engine))


@asynccontextmanager
async def serving(folder: Path, of: ModelSpec) -> AsyncIterator[ExternalVersion]:
    version = await load_version(of, "3", folder, ForkServer())
    assert isinstance(version, ExternalVersion)
    try:
        yield version
    finally:
        await version.drain(0.0)
        assert all(each.pid is None for each in version.instances)


@asynccontextmanager
async def attached(folder: Path, script: Script, **options: Any) -> AsyncIterator[tuple[Fake, ExternalVersion]]:
    fake = await Fake(script).start()
    try:
        async with serving(folder, spec(url=fake.url, **options)) as version:
            yield fake, version
    finally:
        await fake.stop()


def program(script: Script | None = None, start: str = "") -> tuple[str, ...]:
    told = ("--script", msgspec.json.encode(script).decode()) if script is not None else ()
    return (*PROGRAM, *told, *(("--start", start) if start else ()))


def body(*, stream: bool = False, model: str = "far") -> Request:
    asked = {"model": model, "messages": [{"role": "user", "content": "hello"}]} | ({"stream": True} if stream else {})
    return Request(model="far", raw=Raw(path=CHAT, body=json.dumps(asked).encode(), stream=stream, prompt_chars=5))


async def ask(version: ExternalVersion, request: Request) -> list[Response]:
    async with asyncio.timeout(SECONDS), aclosing(version.infer(request)) as responses:
        return [response async for response in responses]


async def text(version: ExternalVersion, request: Request | None = None) -> str:
    (response,) = await ask(version, request or body())
    told = json.loads(response.raw or b"")
    return str(told["choices"][0]["message"]["content"])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def child_of(version: ExternalVersion) -> int:
    pid = version.instances[0].pid
    assert pid is not None
    return pid


async def test_one_is_started_asked_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "a-key-of-the-engine")
    command = program(Script(chunks=4, models=("far",), key="a-key-of-the-engine"))
    async with serving(tmp_path, spec(command=command, key="${ENGINE_KEY}", health="/health")) as version:
        (response,) = await ask(version, body())
        assert (response.version, response.status) == ("3", 200)
        assert response.usage is not None and response.usage.completion_tokens == 4
        assert await text(version) == text_of(4)
        pieces = await ask(version, body(stream=True))
        assert b"".join(piece.raw or b"" for piece in pieces).endswith(b"data: [DONE]\n\n")
        assert version.metrics.success.count == 3
        assert version.stats.num_generated_tokens == 12
        assert sum(version.stats.time_to_first_token[0]) == 3
        assert version.processes == () and version.info.tasks == ("generate",)
        pid = child_of(version)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_one_that_dies_in_mid_stream_ends_that_stream_and_comes_back(tmp_path: Path) -> None:
    async with serving(tmp_path, spec(command=program(Script(chunks=9, models=("far",), fault="die", pace=0.01)))) as version:
        pid, got = child_of(version), []
        with pytest.raises(ReplicaDied, match="its answer ends here"):
            async with aclosing(version.infer(body(stream=True))) as pieces:
                async for piece in pieces:
                    got += [piece]
        assert got
        await until(lambda: version.instances[0].pid not in (None, pid) and version.ready)
        assert version.metrics.restarts() == 1
        assert (version.metrics.fail.count, version.metrics.success.count) == (1, 0)
        assert json.loads(
            (await ask(version, Request(model="far", raw=Raw(path="/v1/embeddings", body=b'{"model":"far","input":"a"}'))))[0].raw or b""
        )


@pytest.mark.parametrize("child", ["hang", ""])
async def test_a_stranger_at_its_port_is_told_nothing_and_it_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str
) -> None:
    stranger = await Fake(Script(models=("far",))).start()
    ports = iter([stranger.port, free_port()])
    monkeypatch.setattr(instances, "free_port", lambda: next(ports))
    serve = " ".join(map(shlex.quote, program(Script(chunks=3, models=("far",), key="its-own-key"))))
    command = ("sh", "-c", f"test {{port}} = {stranger.port} && exec {'sleep 1000' if child else serve}; exec {serve}")
    async with serving(tmp_path, spec(command=command, key="its-own-key")) as version:
        assert await text(version) == text_of(3)
        assert version.metrics.restarts() == 1
    assert not stranger.received
    await stranger.stop()


async def test_one_whose_ports_are_all_taken_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = await Fake(Script(models=("far",))).start()
    monkeypatch.setattr(instances, "free_port", lambda: stranger.port)
    with pytest.raises(LoadError, match=f"{instances.PORTS} ports in a row were taken by others"):
        await load_version(spec(command=("sleep", "1000")), "3", tmp_path, ForkServer())
    assert not stranger.received
    await stranger.stop()


async def test_one_of_which_the_system_does_not_tell_who_it_is_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(instances.log, "warning", lambda event, **_: said.append(event))
    monkeypatch.setattr(child_module, "owner_of", lambda *_, apart: Owner.UNKNOWN)
    async with serving(tmp_path, spec(command=program(Script(chunks=3, models=("far",))))) as version:
        assert await text(version) == text_of(3)
    assert said == ["engine_listener_unknown"]


async def test_it_is_given_no_secret_of_this_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"FAIRLEAD_API_KEY": "1", "DATABASE_URL": "2", "AWS_SECRET_ACCESS_KEY": "3", "OPENAI_API_KEY": "4", "API_KEY": "5", "HF": "6"}
    given = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": "/hf",
        "LC_ALL": "C",
        "https_proxy": "http://proxy",
        "TMPDIR": "/tmp",
        "OMP_NUM_THREADS": "3",
    }
    for name, value in (secrets | given).items():
        monkeypatch.setenv(name, value)
    engine = {"MINE": "${DATABASE_URL}", "LC_ALL": "C.UTF-8"}
    names = "|".join((*secrets, *given, "MINE"))
    with pytest.raises(LoadError, match=r"\(exit code 9\)") as failed:
        await load_version(spec(command=("sh", "-c", f"env | grep -E '^({names})='; exit 9"), env=engine), "3", tmp_path, ForkServer())
    told = dict(line.split("=", 1) for line in failed.value.message.splitlines() if "=" in line)
    assert not told.keys() & secrets.keys()
    assert given | {"MINE": "2", "LC_ALL": "C.UTF-8"} == {name: told.get(name) for name in (*given, "MINE")}


async def test_while_it_is_started_again_requests_are_told_when_to_come_back(tmp_path: Path) -> None:
    start = f"once:{tmp_path / 'mark'}"
    async with serving(tmp_path, spec(command=program(Script(models=("far",)), start), restarts=1)) as version:
        assert await text(version) == text_of(64)
        os.kill(child_of(version), signal.SIGKILL)
        await until(lambda: not version.ready)
        with pytest.raises(Unavailable, match="is being started again") as refused:
            await ask(version, body())
        assert refused.value.retry_after >= 1.0
        (instance,) = version.instances
        await until(lambda: "could not be kept alive" in instance.down)
        with pytest.raises(Unavailable, match="left down"):
            await ask(version, body())
        assert "exit code 3" in instance.down and "the weights are broken: [SECRET]" in instance.down
        assert version.metrics.restarts() == 1
        assert version.metrics.refused == 2


async def test_a_machine_without_descriptors_left_is_no_reason_to_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, spec(command=program(Script(chunks=2, models=("far",))))) as version:
        left = [True, False]
        port = free_port

        def scarce() -> int:
            if left.pop():
                return port()
            left.append(True)
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(instances, "free_port", scarce)
        os.kill(child_of(version), signal.SIGKILL)
        await until(lambda: version.metrics.restarts() == 2 and version.ready)
        assert await text(version) == text_of(2)


async def test_one_that_says_it_is_unwell_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "CHECK_SECONDS", 0.02)
    async with serving(tmp_path, spec(command=program(Script(models=("far",))), health="/health")) as version:
        pid, place = child_of(version), version.instances[0].place
        assert place is not None
        reader, writer = await asyncio.open_connection(place.pool.address.host, place.pool.address.port)
        told = msgspec.json.encode(Script(health=503))
        writer.write(b"PUT /script HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(told) + told)
        await reader.readline()
        writer.close()
        await until(lambda: version.instances[0].pid not in (None, pid) and version.ready)
        assert MAX_UNHEALTHY > 1 and version.metrics.restarts() == 1


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (program(start="die"), {}, r"ended while it started \(exit code 3\); the last lines of its log:\nreading the weights\nthe weights are broken: \[SECRET\]"),
        (("sh", "-c", "echo reading the weights; sleep 1000"), {"start_timeout": 1.0}, r"not ready within 1 s: .*refused.*; the last lines of its log:\nreading the weights"),
        (("no-such-engine",), {}, "no program `no-such-engine` on the PATH"),
        (program(Script(key="other", models=("far",))), {"health": "/health"}, "does not accept `engine.key`: it answers 401"),
        ((), {}, "backend `openai` needs `engine.url`, a server that runs, or `engine.command`"),
    ],
)  # fmt: skip
async def test_one_that_does_not_start_says_why(tmp_path: Path, command: tuple[str, ...], options: Any, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        await load_version(spec(command=command, **options), "1", tmp_path, ForkServer())


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (ModelSpec(name="m", backend="vllm", llm=LlmSpec(max_num_seqs=3)), "heeds nothing but `task`"),
        (spec(url="http://127.0.0.1:1", count=2), "`upstreams` of the gateway"),
        (spec(url="http://127.0.0.1:1/v1"), "leave out /v1"),
        (spec(command=("sh",), key="${NOT_SET_ANYWHERE}"), "environment variable NOT_SET_ANYWHERE is not set"),
        (ModelSpec(name="m", backend="llama_cpp"), "holds no llama_cpp artefact"),
        (ModelSpec(name="m", backend="python", file="model.py", engine=EngineSpec(url="http://x")), "`engine` is for models that somebody else"),
    ],
)  # fmt: skip
async def test_settings_that_mean_nothing_are_refused(tmp_path: Path, of: ModelSpec, message: str) -> None:
    (tmp_path / "model.py").touch()
    with pytest.raises(FairleadError, match=message):
        await load_version(of, "1", tmp_path, ForkServer())
    with pytest.raises(ValueError, match="`args` is for a server that is started"):
        EngineSpec(url="http://x", args=("--more",))


async def test_a_server_that_is_there_is_asked_under_its_own_name(tmp_path: Path) -> None:
    async with attached(tmp_path, Script(chunks=2, models=("theirs", "others")), model="theirs", key="k") as (fake, version):
        assert await text(version) == text_of(2)
        got = fake.received[-1]
        assert json.loads(got.body)["model"] == "theirs" and got.headers["authorization"] == "Bearer k"
        assert version.instances[0].num_in_flight == 0
    async with attached(tmp_path, Script(chunks=2, models=("the-only-one",))) as (fake, version):
        assert (await text(version), json.loads(fake.received[-1].body)["model"]) == (text_of(2), "the-only-one")
    with pytest.raises(LoadError, match="has no model `mine`; `engine.model` must name one of `theirs`"):
        async with attached(tmp_path, Script(models=("theirs",)), model="mine"):
            pass


async def test_a_server_that_is_not_there_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "ATTACH_SECONDS", 0.05)
    monkeypatch.setattr(instances, "CHECK_SECONDS", 0.02)
    fake = await Fake(Script(models=("far",))).start()
    port = fake.port
    await fake.stop()
    async with serving(tmp_path, spec(url=fake.url)) as version:
        assert not version.ready and "refused" in version.instances[0].down
        with pytest.raises(Unavailable, match="the server that computes it does not answer"):
            await ask(version, body())
        back = await Fake(Script(chunks=1, models=("far",))).start(port)
        await until(lambda: version.ready)
        assert await text(version) == text_of(1)
        await back.stop()
        await until(lambda: not version.ready)


@pytest.mark.parametrize(
    ("fault", "stream", "error"),
    [
        ("garbage", False, Unavailable),
        ("text", False, Unavailable),
        ("reset", True, Unavailable),
        ("hang", False, Unavailable),
        ("stall", True, ReplicaDied),
        ("cut", True, ReplicaDied),
    ],
)
async def test_what_goes_wrong_in_one_answer_is_its_alone(tmp_path: Path, fault: Any, stream: bool, error: type[FairleadError]) -> None:
    script = Script(chunks=5, models=("far",), fault=fault, times=2 if fault == "reset" else 1, after=2)
    async with attached(tmp_path, script, timeout=0.5 if fault in ("hang", "stall") else 600.0) as (_, version):
        with pytest.raises(error):
            await ask(version, body(stream=stream))
        assert await text(version) == text_of(5)
        assert version.ready


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """(url, what came after each request) of a server that answers every POST with these bytes, and leaves the end to who asked."""
    after: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        else:
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split()[1]))
            writer.write(answer)
            after.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", after
    finally:
        server.close()


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (b'data: {"choices":[{"index":7,"delta":{"content":"a"}}]}\n\n', "choice 7 of 1"),
        (b'data: {"choices":[{"index":-1,"delta":{"content":"a"}}]}\n\n', "choice -1 of 1"),
        (b"data: {never\n\n", "none of OpenAI's protocol"),
        (b'data: {"error":{"message":"out of memory"}}\n\n', "failed: out of memory"),
    ],
)
async def test_an_answer_that_is_none_is_not_read_to_an_end_that_may_never_come(tmp_path: Path, event: bytes, message: str) -> None:
    async with answering(STREAM + b"%x\r\n%s\r\n" % (len(event), event)) as (url, after), serving(tmp_path, spec(url=url)) as version:
        with pytest.raises(ModelError, match=message):
            await ask(version, Request(model="far", prompt=Generate(text="a", stream=True)))
        await until(lambda: after == [b""])  # it hung up
        assert version.instances[0].num_in_flight == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [("whole", "in one piece where a stream was asked for"), ("endless", "an event longer than"), ("headers", "too long headers")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_answered_with_something_else_fails_alone(tmp_path: Path, fault: Any, message: str, *, stream: bool) -> None:
    async with attached(tmp_path, Script(chunks=2, models=("far",), fault=fault, times=1)) as (_, version):
        with pytest.raises((ModelError, Unavailable), match=message):
            await ask(version, Request(model="far", prompt=Generate(text="a", stream=stream)))
        assert version.instances[0].num_in_flight == 0
        assert await text(version) == text_of(2)


async def test_a_stream_that_ends_twice_ends_once_for_its_caller(tmp_path: Path) -> None:
    async with attached(tmp_path, Script(chunks=3, models=("far",), fault="twice")) as (_, version):
        deltas = [each.delta for each in await ask(version, Request(model="far", prompt=Generate(text="a", stream=True)))]
        assert "".join(each.text for each in deltas if each is not None) == text_of(3)
        assert [each.finish_reason for each in deltas if each is not None and each.finish_reason] == ["stop"]


@pytest.mark.parametrize(("told", "seconds"), [(b"\xb2", 1.0), (b"9" * 400, 3600.0), (b"soon", 1.0)])
async def test_no_engine_sends_callers_away_for_ever(tmp_path: Path, told: bytes, seconds: float) -> None:
    answer = b"HTTP/1.1 503 Busy\r\nretry-after: %s\r\ncontent-length: 0\r\n\r\n" % told
    async with answering(answer) as (url, _), serving(tmp_path, spec(url=url)) as version:
        with pytest.raises(Unavailable, match="it answers 503") as refused:
            await ask(version, Request(model="far", prompt=Generate(text="a")))
        assert refused.value.retry_after == seconds


async def test_one_that_is_full_says_so(tmp_path: Path) -> None:
    async with attached(tmp_path, Script(fault="hang", times=1, models=("far",)), max_in_flight=1) as (fake, version):
        waiting = asyncio.ensure_future(ask(version, body()))
        await fake.until(lambda: fake.num_open > 0 and bool(version.instances[0].num_in_flight))
        with pytest.raises(Unavailable, match="is busy with 1 requests"):
            await ask(version, body())
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await fake.until(lambda: fake.num_left == 1)
        assert version.metrics.cancelled == 1


async def test_prompts_of_other_doors_are_told_in_its_words(tmp_path: Path) -> None:
    async with attached(tmp_path, Script(chunks=6, models=("far",))) as (fake, version):
        chat = Chat(messages=[Message(role="user", content="hello")])
        sampling = Sampling(max_tokens=3, temperature=0.0)
        (whole,) = await ask(version, Request(model="far", prompt=Generate(chat=chat, sampling=sampling)))
        delta = whole.delta
        assert delta is not None and delta.usage is not None
        assert (delta.text, delta.finish_reason, delta.usage.completion_tokens) == (text_of(3), "length", 3)
        sent = json.loads(fake.received[-1].body)
        assert sent == {
            "model": "far",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 3,
            "temperature": 0.0,
            "messages": [{"role": "user", "content": "hello"}],
        }
        deltas = [each.delta for each in await ask(version, Request(model="far", prompt=Generate(text="once", stream=True)))]
        assert "".join(each.text for each in deltas if each is not None) == text_of(6)
        assert isinstance(deltas[-1], Delta) and deltas[-1].usage is not None
        assert fake.received[-1].target == "/v1/completions" and json.loads(fake.received[-1].body)["max_tokens"] is None
        (vector,) = await ask(version, Request(model="far", prompt=Embed(text="a")))
        assert vector.delta is not None and len(vector.delta.vector) == 8
        with pytest.raises(Unsupported, match="is not asked for `tokenize` here: /v1/chat/completions, /v1/completions and /v1/embeddings"):
            await ask(version, Request(model="far", prompt=Tokenize(text="a")))
        with pytest.raises(Unsupported, match="`top_k`"):
            await ask(version, Request(model="far", prompt=Generate(text="a", sampling=Sampling(top_k=3))))
        fake.script = Script(fault="status", status=404)
        with pytest.raises(InvalidRequest, match="refuses: told to answer 404"):
            await ask(version, Request(model="far", prompt=Generate(text="a")))
        fake.script = Script(fault="status", status=503, retry_after="7")
        with pytest.raises(Unavailable, match="cannot answer: told to answer 503") as refused:
            await ask(version, Request(model="far", prompt=Generate(text="a")))
        assert refused.value.retry_after == 7.0
        fake.script = Script(fault="cut")
        with pytest.raises(ModelError):
            await ask(version, Request(model="far", prompt=Generate(text="a", stream=True)))


@pytest.mark.parametrize("row", [row for row in ENGINES.values() if row.command], ids=lambda row: row.name)
async def test_every_engine_is_told_what_to_load_and_where_to_listen(tmp_path: Path, row: ExternalEngine) -> None:
    (tmp_path / "bin").mkdir()
    for program in (row.command[0], "sh"):
        (tmp_path / "bin" / program).write_text(
            "#!/bin/sh\necho $0 $*; echo key ${%s:-none}; exit 9\n" % (row.key_variable or "NO_SUCH_KEY")
        )
        (tmp_path / "bin" / program).chmod(0o755)
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(LoadError, match=r"\(exit code 9\)") as failed:
        await load_version(spec(backend=row.name, environment=str(tmp_path), args=("--more",)), "1", tmp_path, ForkServer())
    message = failed.value.message
    loaded = f"{tmp_path}/weights.gguf" if row.files else str(tmp_path)
    assert f"{tmp_path}/bin/{row.command[0]} " in message and f" {loaded} " in message and message.count("127.0.0.1") == 1
    assert "--more" in message and "{" not in message
    assert ("key [SECRET]" in message) == bool(row.key_variable)
