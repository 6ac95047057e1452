"""`fairlead chat` as somebody at a terminal, or a script, has it."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from click.testing import CliRunner

from fairlead.cli import cli, demo_models
from fairlead.core.errors import FairleadError
from tests.api.openai.served import SECONDS, engines, until

SPECS = {"talker": "", "growing": "", "slow": "parameters: {step_seconds: 0.01}", "mortal": "parameters: {step_seconds: 0.01}"}

TINY = Path(demo_models.__file__).parent / "tiny" / "chat"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    async with engines(tmp_path_factory.mktemp("models"), "identity", **SPECS) as running:
        yield running


@asynccontextmanager
async def chatting(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "fairlead", "chat", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(SECONDS):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run(*arguments: str, typed: str = "") -> tuple[int | None, str, str]:
    """(exit code, what it said, what it complained of)."""
    async with chatting(*arguments) as process:
        out, err = await process.communicate(typed.encode())
    return process.returncode, out.decode(), err.decode()


def url(port) -> str:
    return f"http://{port.address}"


async def test_one_prompt_is_answered_and_that_is_all(port):
    assert await run("talker", "--url", url(port), "--prompt", "to be or not") == (0, "to be or not\n", "")
    assert await run("talker", "--url", url(port) + "/v1/", "--prompt", "as OpenAI has it") == (0, "as OpenAI has it\n", "")


async def test_one_prompt_for_a_script(port):
    code, out, _ = await run("talker", "--url", url(port), "--prompt", "to be or not", "--system", "be brief", "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["content"], answer["stopped"]) == ("to be or not", False)
    assert (answer["prompt_tokens"], answer["tokens"], answer["cached_tokens"]) == (8, 4, 0)
    assert answer["first_token_seconds"] > 0
    assert answer["tokens_per_second"] > 0


async def test_reasoning_and_calls_of_tools_are_told(port):
    ask = '!reason let me see !answer so !call look {"at": 1}'
    assert await run("talker", "--url", url(port), "--prompt", ask) == (0, 'let me see \n\nso \nlook {"at": 1}\n', "")
    _, out, _ = await run("talker", "--url", url(port), "--prompt", ask, "--json")
    answer = json.loads(out)
    assert (answer["content"], answer["reasoning"]) == ("so ", "let me see ")
    assert answer["tool_calls"] == [{"name": "look", "arguments": '{"at": 1}'}]


async def test_sampling_is_passed_on(port):
    _, out, _ = await run(
        "talker", "--url", url(port), "--prompt", "to be or not", "--max-tokens", "2", "--temperature", "0", "--seed", "7"
    )
    assert out == "to be \n"


async def test_a_conversation_grows_and_can_be_forgotten(port):
    typed = "one\ntwo\n/reset\nthree\n/system be brief\nfour\n/nonsense\n\n/exit\nfive\n"
    code, out, err = await run("growing", "--url", url(port), typed=typed)
    assert (code, err) == (0, "")
    assert [line.removeprefix("> ") for line in out.splitlines()[1:]] == [
        "one",
        "two",
        "forgotten",
        "three",
        "a new conversation",
        "four",
        "unknown command: /reset, /system TEXT, /exit",
        "> ",  # an empty line says nothing, and after /exit nobody listens
    ]
    # each turn is its role and its words: one; one, one, two; three; be brief, four
    await until(lambda: port.repository.find("growing").stats.num_prompt_tokens == 2 + 6 + 2 + 5)


async def test_the_end_of_the_input_is_the_end(port):
    code, out, _ = await run("talker", "--url", url(port), typed="one\n")
    assert code == 0
    assert "> one\n" in out


async def test_ctrl_c_stops_the_answer_and_not_the_conversation(port):
    async with chatting("slow", "--url", url(port)) as process:
        process.stdin.write(b"!forever on\n")
        await process.stdout.readuntil(b"on")
        process.send_signal(signal.SIGINT)
        await process.stdout.readuntil(b" ...\n")
        await until(lambda: port.repository.find("slow").stats.finished.get("abort") == 1)
        out, err = await process.communicate(b"/reset\nand you?\n/exit\n")
    assert (process.returncode, err) == (0, b"")
    assert b"and you?\n" in out


async def test_ctrl_c_ends_a_single_prompt_with_what_there_is(port):
    async with chatting("slow", "--url", url(port), "--prompt", "!forever on") as process:
        await process.stdout.readuntil(b"on")
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nobody",), "fairlead: The model 'nobody' does not exist or you do not have access to it.\n"),
        (("identity",), "fairlead: The model 'identity' takes tensors and gives tensors: ask it at /v2/models/identity/infer.\n"),
        (("mortal", "--prompt", "!crash"), "fairlead: model 'mortal' died (exit code 7) while computing this request\n"),
    ],
)
async def test_what_the_server_says_is_one_readable_line(port, arguments, message):
    code, out, err = await run(*arguments, "--url", url(port), *(() if "--prompt" in arguments else ("--prompt", "hello")))
    assert (code, err) == (2, message)
    assert out.strip() == ""


async def test_in_a_conversation_an_error_ends_one_answer_only(port):
    code, out, _ = await run("talker", "--url", url(port), typed="!raise\nhello\n/exit\n")
    assert code == 0
    assert "the model failed on this request: it was asked to" in out
    assert "> hello\n" in out


async def test_a_server_that_is_not_there(unused_tcp_port):
    code, _, err = await run("talker", "--url", f"http://127.0.0.1:{unused_tcp_port}", "--prompt", "hello")
    assert code == 2
    assert err == f"fairlead: no answer from http://127.0.0.1:{unused_tcp_port}: Connection refused. Is `fairlead serve` running there?\n"


async def test_a_server_that_goes_away_in_the_middle():
    async def half(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        chunk = b'data: {"choices": [{"delta": {"content": "half\\u001b[2J"}}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(chunk), chunk))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    async with server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        code, out, err = await run("talker", "--url", address, "--prompt", "hello")
    assert (code, out) == (2, "half[2J"), "and no control character reaches the terminal"
    assert err == "fairlead: the server broke off its answer\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("talker", "--json"), "--json needs --prompt"),
        (("talker", "--url", "localhost:8000", "--prompt", "x"), "--url must look like http://127.0.0.1:8000, not 'localhost:8000'"),
        (("talker", "--url", "http://localhost:no", "--prompt", "x"), "must look like http://127.0.0.1:8000, not 'http://localhost:no'"),
        (("talker", "--temperature", "-1"), "'--temperature'"),
    ],
)
async def test_options_that_make_no_sense(arguments, message):
    code, _, err = await run(*arguments)
    assert code == 2
    assert message in err


@pytest.fixture
def logs_as_they_are(monkeypatch):
    """Computing right here makes the log quieter: not for the tests after it."""
    monkeypatch.setattr(structlog, "configure", lambda **_: None)


async def test_a_checkpoint_is_computed_right_here(logs_as_they_are):
    arguments = ["--prompt", "What is 2 plus 3?", "--temperature", "0", "--max-tokens", "40", "--json"]
    answer = json.loads(CliRunner().invoke(cli, ["chat", str(TINY), *arguments]).stdout)
    assert "5" in answer["content"]
    assert answer["tokens"] > 0


async def test_a_folder_that_is_no_checkpoint(tmp_path, logs_as_they_are):
    said = CliRunner().invoke(cli, ["chat", str(tmp_path), "--prompt", "hello"])
    assert isinstance(said.exception, FairleadError)
    assert said.exception.message.endswith("has no config.json")
