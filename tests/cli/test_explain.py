"""`fairlead explain`, asking a server's operations port."""

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from fairlead.api.http_server import HttpServer
from fairlead.api.observe.requests import RequestRoutes
from fairlead.api.ops import OPS_SHAPES
from fairlead.api.problems import Problems
from fairlead.api.web import json_app
from fairlead.cli import cli
from fairlead.core.errors import FairleadError
from fairlead.core.generation import Phase, Usage
from fairlead.core.timeline import BatchNote, Phases, Timeline
from fairlead.observe.finished import Finished
from fairlead.observe.recent import Recent


def chat(recent: Recent) -> None:
    now = recent.clock()
    timeline = Timeline(
        "chat-1", "http", now - 10.0, path="/v1/chat/completions", kind="generate", model="chat", version="2", tenant="acme"
    )
    timeline.usage, timeline.first_at = Usage(prompt_tokens=12, completion_tokens=3), now - 4.0
    timeline.note(now - 9.0, "queued", {"ahead": 2, "in_flight": 8})
    timeline.note(now - 5.0, "turn")
    timeline.note(now - 5.0, "engine", Phases("chat", "2", 0, [Phase("prefill", 0.0, 1.0, 1, 12, 1), Phase("decode", 1.0, 3.5, 3, 3, 2)]))
    timeline.end(now, 200, "", "success", "")
    recent([timeline])


def row(recent: Recent) -> None:
    now = recent.clock()
    timeline = Timeline("row [red]1[/]", "grpc", now - 0.01, kind="infer", model="<fraud>", version="1")
    timeline.note(now - 0.008, "batched", BatchNote("<fraud>", "1", 7, "full", 4, 2, 0, now - 0.008, 0.001, 0.004, now - 0.001))
    timeline.end(now, 13, "it broke", "failure", "model-error")
    recent([timeline])


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    recent = Recent()
    chat(recent)
    row(recent)
    where: list[int] = []
    ready = threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        routes, end = RequestRoutes(recent, Finished(recent)), asyncio.Event()
        app = json_app([(each.method, each.path, each.serve, None) for each in routes.operations], {"/admin": Problems()})
        port = HttpServer(None, app, Finished(), shapes=OPS_SHAPES)
        await port.listen(port=0)
        where.append(port.port)
        loops.append((asyncio.get_running_loop(), end))
        ready.set()
        await end.wait()
        await port.drain(1.0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    monkeypatch.setenv("FAIRLEAD_ADMIN_URL", f"http://127.0.0.1:{where[0]}")
    yield
    loop, end = loops[0]
    loop.call_soon_threadsafe(end.set)
    thread.join(30)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["explain", *arguments])
    if isinstance(result.exception, FairleadError):
        raise result.exception
    return result


def test_one_request_is_told_as_a_bar_for_each_phase_and_step_by_step() -> None:
    said = run("chat-1").stdout
    lines = said.splitlines()
    assert "chat-1" in lines[0] and "chat@2" in lines[0] and "success" in lines[0]
    assert "12 in, 3 out" in said and "tenant acme" in said
    bars = {line.split()[0]: line.count("█") for line in lines if "█" in line}
    assert bars["queue"] == 16 and bars["decode"] == 14 and bars["prefill"] == 4
    assert "Why: 40% of its 10.0 s (4.00 s): it waited for its turn in the gateway's line" in said.replace("10.00 s", "10.0 s")
    assert "it stood in line behind 2 requests, while 8 others were computed" in said
    assert "3 tokens were generated in 3 steps, shared by up to 2, in 3.50 s" in said


def test_names_that_look_like_markup_come_out_as_they_are() -> None:
    said = run("row [red]1[/]").stdout
    assert "row [red]1[/]" in said and "<fraud>@1" in said and "it broke" in said
    assert "row [red]1[/]" in run().stdout


def test_without_an_id_it_lists_the_newest_the_slow_or_the_failed() -> None:
    everyone = json.loads(run("--json").stdout)
    assert [each["id"] for each in everyone] == ["row [red]1[/]", "chat-1"]
    assert [each["id"] for each in json.loads(run("--json", "--slow").stdout)] == ["chat-1", "row [red]1[/]"]
    assert [each["id"] for each in json.loads(run("--json", "--failed").stdout)] == ["row [red]1[/]"]
    assert [each["id"] for each in json.loads(run("--json", "--model", "chat").stdout)] == ["chat-1"]
    listed = run("--slow").stdout
    assert "queue 40%" in listed or "queue 50%" in listed
    assert "no such request is remembered" in run("--model", "nobody").stderr


def test_json_has_all_that_the_server_says() -> None:
    said = json.loads(run("chat-1", "--json").stdout)
    assert said["request"]["id"] == "chat-1" and {"why", "shares", "steps", "related", "median_seconds", "dropped"} <= said.keys()


def test_one_that_is_forgotten_says_how_many_are_remembered() -> None:
    with pytest.raises(FairleadError, match="the last 2000 are"):
        run("gone")


@pytest.mark.parametrize("arguments", [("chat-1", "--slow"), ("--slow", "--failed"), ("chat-1", "--model", "x")])
def test_wishes_that_contradict_each_other_are_refused(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
