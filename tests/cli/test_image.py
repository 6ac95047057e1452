"""`fairlead image` and `fairlead jobs` as somebody at a terminal, or a script, has them."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog
from click.testing import CliRunner
from PIL import Image

from fairlead.app import Server
from fairlead.backends.fake_painter import KIND
from fairlead.backends.table import BACKENDS
from fairlead.cli import asking, cli, image
from fairlead.cli.image import drawn
from fairlead.core.errors import FairleadError, Unavailable
from fairlead.core.logs import Logs
from fairlead.core.policy import StoreSettings
from fairlead.core.settings import Listen, Models, Settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECONDS = 30.0
PAINTERS = {"painter": "{step_seconds: 0.01, num_steps: 4, size: 16}", "slow": "{step_seconds: 0.05, num_steps: 1000, size: 16}"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("served")
    for name, parameters in PAINTERS.items():
        version = folder / "models" / name / "1"
        version.mkdir(parents=True)
        (version / "weights").touch()
        (version.parent / "model.yaml").write_text(f"backend: fake_painter\nparameters: {parameters}\ndiffusion: {{max_steps: 1000}}\n")
    BACKENDS[KIND.name] = KIND
    settings = Settings(
        listen=Listen(port=0, grpc_port=0, ops_port=0),
        models=Models(repositories=(str(folder / "models"),)),
        logs=Logs(requests=False),
        store=StoreSettings(url=f"sqlite:///{folder}/fairlead.db"),
    )
    with structlog.testing.capture_logs():  # what a command prints is looked at in this process
        running = Server(settings)
        await running.start()
        yield f"http://127.0.0.1:{running.http.port}"
        await running.stop()
    del BACKENDS[KIND.name]


async def started(*arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "fairlead", *map(str, arguments), stdout=PIPE, stderr=PIPE)


async def run(*arguments: object) -> tuple[int, str, str]:
    """(exit code, what it said, what it complained of), as `main` has it."""
    result = await asyncio.to_thread(CliRunner().invoke, cli, list(map(str, arguments)))
    if isinstance(result.exception, FairleadError):
        return 2, result.stdout, f"{result.exception.message}\n"
    return result.exit_code, result.stdout, result.stderr


async def test_a_picture_is_where_it_was_asked_to_be(server, tmp_path: Path):
    code, out, err = await run("image", "a seven", "--url", server, "--model", "painter", "--seed", 7, "-o", tmp_path / "seven.png")
    assert (code, out) == (0, f"{tmp_path}/seven.png  16x16, seed 7\n"), err
    with Image.open(tmp_path / "seven.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (16, 16))


async def test_several_pictures_lie_side_by_side_in_the_format_of_their_name(server, tmp_path: Path):
    code, out, _ = await run(
        "image", "x", "--url", server, "--model", "painter", "-n", 2, "--seed", 1, "--width", 24, "-o", tmp_path / "a.jpg", "--json"
    )
    told = json.loads(out)
    assert code == 0 and told["files"] == [f"{tmp_path}/a-1.jpg", f"{tmp_path}/a-2.jpg"]
    assert [picture["seed"] for picture in told["result"]["pictures"]] == [1, 2]
    with Image.open(tmp_path / "a-2.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (24, 16))


async def test_a_picture_may_begin_from_another(server, tmp_path: Path):
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "from.png")
    code, _, err = await run(
        "image", "x", "--url", server, "--model", "painter", "--image", tmp_path / "from.png", "--strength", 0.5, "-o", tmp_path / "to.webp"
    )
    assert code == 0, err
    assert Image.open(tmp_path / "to.webp").format == "WEBP"


async def test_what_is_wrong_is_said_in_one_line(server, tmp_path: Path):
    where = ("--url", server, "-o", tmp_path / "no.png")
    for arguments, said in (
        (("--model", "painter", "--width", 17), "width` must be a multiple of 8"),
        (("--model", "painter", "--scheduler", "best"), "scheduler` 'best' is unknown"),
        (("--model", "nobody"), "nobody"),
        ((), "--model must say which: painter, slow"),
        (("--model", "painter", "--lora", "ink=a lot"), "the scale is no number"),
    ):
        code, out, err = await run("image", "x", *arguments, *where)
        assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1, err
    code, _, err = await run("image", "x !raise", "--model", "painter", *where)
    assert code == 2 and "no picture" in err and "model-error" in err
    assert not (tmp_path / "no.png").exists()


async def test_a_name_that_is_no_pictures_is_refused_before_anything_is_painted(server, tmp_path: Path):
    code, _, err = await run("image", "x", "--url", server, "-o", tmp_path / "x.gif")
    assert code == 2 and ".png, .jpg, .jpeg, .webp" in err
    code, _, err = await run("image", "x", "--url", server, "-o", tmp_path / "nowhere" / "x.png")
    assert code == 2 and "there is no folder" in err


async def test_control_c_cancels_the_job(server, tmp_path: Path):
    process = await started("image", "for long", "--url", server, "--model", "slow", "-o", tmp_path / "long.png")
    async with asyncio.timeout(SECONDS):
        while not (active := await listed(server, "--status", "active", "--model", "slow")):
            await asyncio.sleep(0.05)  # between looks at another process's doings
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert process.returncode == 130 and "cancelled" in err.decode()
        while (job := await shown(server, active[0]["id"]))["status"] not in ("aborted", "complete"):
            await asyncio.sleep(0.05)
    assert job["status"] == "aborted" and job["error"]["reason"] == "cancelled"


@pytest.mark.parametrize("taken", [True, False])
async def test_control_c_before_the_answer_to_its_submission_cancels_the_job_too(server, tmp_path: Path, monkeypatch, taken: bool):
    """`taken`: the server had it already."""
    submitted: list[dict[str, str]] = []

    def interrupted(
        url: str, method: str, target: str, body: Any = None, headers: Any = None, timeout: float = asking.TIMEOUT_SECONDS
    ) -> Any:
        first = target == "/v1/jobs" and not submitted
        if target == "/v1/jobs":
            submitted.append(headers)
        if taken or not first:
            told = asking.asked(url, method, target, body, headers, timeout)
        if first:
            raise KeyboardInterrupt
        return told

    monkeypatch.setattr(image, "asked", interrupted)
    before = {job["id"] for job in await listed(server, "--model", "slow")}
    code, _, err = await run("image", "for long", "--url", server, "--model", "slow", "-o", tmp_path / "long.png")
    assert (code, err) == (130, "cancelled\n") and submitted[0] == submitted[1]
    (made,) = (job["id"] for job in await listed(server, "--model", "slow") if job["id"] not in before)
    async with asyncio.timeout(SECONDS):
        while (job := await shown(server, made))["status"] != "aborted":
            await asyncio.sleep(0.05)  # between looks at what the server does
    assert job["error"]["reason"] == "cancelled"


async def test_control_c_where_nothing_can_be_cancelled_says_so(server, tmp_path: Path, monkeypatch):
    def interrupted(
        url: str, method: str, target: str, body: Any = None, headers: Any = None, timeout: float = asking.TIMEOUT_SECONDS
    ) -> Any:
        if timeout < asking.TIMEOUT_SECONDS:
            raise Unavailable(f"no answer from {url} within {timeout:g} s")
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "asked", interrupted)
    code, _, err = await run("image", "x", "--url", server, "--model", "painter", "-o", tmp_path / "x.png")
    assert code == 130 and err.startswith("not cancelled: it is not known whether it was submitted: no answer")


async def test_jobs_are_listed_shown_watched_and_cancelled(server, tmp_path: Path):
    code, _, err = await run("image", "listed", "--url", server, "--model", "painter", "-o", tmp_path / "listed.png")
    assert code == 0, err
    newest = (await listed(server, "--status", "complete", "--model", "painter"))[0]
    code, out, _ = await run("jobs", "list", "--url", server)
    assert code == 0 and newest["id"] in out
    code, out, _ = await run("jobs", "show", newest["id"], "--url", server)
    assert code == 0 and out.startswith("status    complete\n") and "/v1/artifacts/" in out
    code, out, _ = await run("jobs", "watch", newest["id"], "--url", server)
    assert code == 0 and out.strip().endswith("complete 4/4")
    code, out, _ = await run("jobs", "cancel", newest["id"], "--url", server, "--json")
    assert code == 0 and json.loads(out)["status"] == "complete"
    code, _, err = await run("jobs", "show", "job_0", "--url", server)
    assert (code, err) == (2, "there is no job `job_0`\n")


async def listed(server: str, *arguments: str) -> list[dict]:
    code, out, err = await run("jobs", "list", "--url", server, "--json", *arguments)
    assert code == 0, err
    return json.loads(out)["jobs"]


async def shown(server: str, job: str) -> dict:
    code, out, err = await run("jobs", "show", job, "--url", server, "--json")
    assert code == 0, err
    return json.loads(out)


async def test_a_picture_is_drawn_with_two_of_its_rows_in_each_of_the_terminals():
    picture = Image.new("RGB", (4, 4), "black")
    for column in range(4):
        picture.putpixel((column, 0), (255, 0, 0))
    file = BytesIO()
    picture.save(file, "PNG")
    text = drawn(file.getvalue())
    lines = text.plain.splitlines()
    assert len(set(map(len, lines))) == 1 and len(lines) * 2 == len(lines[0])
    styles = [str(span.style) for span in text.spans]
    assert styles[0].startswith("rgb(255,0,0)") and styles[-1] == "rgb(0,0,0) on rgb(0,0,0)"
