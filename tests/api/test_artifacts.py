"""Files by their signed links, as browsers and download tools fetch them: a real port, a real folder."""

import asyncio
import hashlib
import os
from contextlib import asynccontextmanager

import httpx2
import pytest

from fairlead.api.artifacts import ArtifactRoutes, span_of
from fairlead.api.http_server import HttpServer
from fairlead.api.openapi import document
from fairlead.api.problems import Problems
from fairlead.api.web import json_app
from fairlead.core.jobs import JobResult, JobStatus
from fairlead.core.policy import ArtifactSettings
from fairlead.jobs.artifacts import CHUNK_BYTES, Artifacts
from fairlead.jobs.links import Links, link
from fairlead.jobs.secrets import Secrets
from fairlead.observe.finished import Finished
from fairlead.observe.metrics import Metrics
from fairlead.store.job_rows import JobRow
from tests.api.served import Lines
from tests.stores import new_store

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8
SIZE = len(PICTURE)
JOB = "job_1"


class Home:
    """A port with one job of `acme` that made one file."""

    def __init__(self, folder, lines):
        self.clock = 1000.0
        self.store = new_store(folder)
        self.artifacts = Artifacts(ArtifactSettings(), folder / "artifacts")
        self.links = Links(Secrets(self.store.jobs, "links", lambda: "secret", self.now), ArtifactSettings(), self.now)
        self.routes = ArtifactRoutes(self.store.jobs.get, self.artifacts, self.links, lines)
        self.lines = lines

    def now(self):
        return self.clock

    async def made(self, data, content_type="image/png", *, job=JOB, tenant="acme"):
        """The link to a file of a job that ended with it."""
        jobs, now = self.store.jobs, self.clock
        row = JobRow(id=job, tenant=tenant, model="m", created=now, start_deadline=2e9, total_deadline=2e9, retention_seconds=3600.0)
        jobs.submit(row, b"", tenant_queued=9, now=now)
        jobs.lease("r", ["m"], 1, now=now, lease_seconds=2e9, tenant_active=9)
        self.artifact = await self.artifacts.put(job, data, content_type)
        jobs.end(job, "r", status=JobStatus.COMPLETE, result=JobResult(artifacts=(self.artifact,)), now=now)
        return self.links.to(self.artifact, tenant, now)[0]


@pytest.fixture
async def home(tmp_path):
    home = Home(tmp_path, Lines(Metrics()))
    operations = home.routes.operations
    app = json_app([(each.method, each.path, each.serve, each.scope) for each in operations], {"/v1/artifacts": Problems()})
    server = HttpServer(None, app, home.lines)
    await server.listen(port=0)
    home.port = server.port
    await home.links.start()
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:
        home.client = client
        yield home
    await server.drain(5.0)
    home.artifacts.close()
    home.store.close()


def problem(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"]
    return answer.status_code, answer.json()["detail"]


async def test_a_link_is_all_it_takes(home):
    url = await home.made(PICTURE)
    answer = await home.client.get(url)
    assert (answer.status_code, answer.content) == (200, PICTURE)
    headers = answer.headers
    assert headers["content-type"] == "image/png"
    assert headers["content-length"] == str(SIZE)
    assert headers["etag"] == f'"{hashlib.sha256(PICTURE).hexdigest()}"'
    assert headers["cache-control"] == "private, max-age=600, immutable"
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"]
    assert headers["access-control-allow-origin"] == "*"
    assert headers["content-disposition"] == f'inline; filename="{home.artifact.key.replace("/", "-")}"'
    assert (await home.lines.next())["status"] == 200

    head = await home.client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert {**head.headers, "x-request-id": "", "date": ""} == {**headers, "x-request-id": "", "date": ""}
    head = await home.client.head(url, headers={"range": "bytes=0-1"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(SIZE))


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, SIZE),
        ("bytes=5-9", 5, 10),
        (f"bytes=5-{SIZE + 99}", 5, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        (f"bytes=-{SIZE + 99}", 0, SIZE),
        (f"Bytes= {SIZE - 1}-", SIZE - 1, SIZE),
    ],
)
async def test_a_range(home, header, start, stop):
    answer = await home.client.get(await home.made(PICTURE), headers={"range": header})
    assert (answer.status_code, answer.content) == (206, PICTURE[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize(
    "header", ["bytes=0-1,5-6", "items=0-1", "bytes=9-5", "bytes=-", "bytes=", "bytes=a-b", "0-5", f"bytes={'9' * 30}-"]
)
async def test_what_is_no_range_that_we_know_gives_the_whole(home, header):
    answer = await home.client.get(await home.made(PICTURE), headers={"range": header})
    assert (answer.status_code, answer.content) == (200, PICTURE)


@pytest.mark.parametrize("header", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
async def test_a_range_beyond_the_end(home, header):
    answer = await home.client.get(await home.made(PICTURE), headers={"range": header})
    assert problem(answer) == (416, f"the file has {SIZE} bytes")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert (await home.lines.next())["status"] == 416


def test_of_an_empty_file_there_is_no_range():
    assert span_of("", 0) is None
    for header in ("bytes=0-", "bytes=-5", "bytes=0-0"):
        with pytest.raises(ValueError):
            span_of(header, 0)


async def test_an_empty_file(home):
    answer = await home.client.get(await home.made(b"", "text/plain"))
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


async def test_who_has_it_already_is_told_so(home):
    url = await home.made(PICTURE)
    tag = f'"{home.artifact.sha256}"'
    for known in (tag, f'"other", W/{tag}', "*"):
        answer = await home.client.get(url, headers={"if-none-match": known, "range": "bytes=0-1"})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
        assert answer.headers["cache-control"] == "private, max-age=600, immutable"
    assert (await home.client.get(url, headers={"if-none-match": '"other"'})).status_code == 200


async def test_a_range_of_another_file_is_not_what_was_wanted(home):
    url = await home.made(PICTURE)
    tag = f'"{home.artifact.sha256}"'
    for condition, status in ((tag, 206), ('"other"', 200), (f"W/{tag}", 200), ("Thu, 01 Jan 1970 00:00:00 GMT", 200)):
        answer = await home.client.get(url, headers={"range": "bytes=0-1", "if-range": condition})
        assert answer.status_code == status


# Who may not


async def test_without_a_good_link_nothing_is_told(home):
    url = await home.made(PICTURE)
    path, _, query = url.partition("?")
    for bad in (path, f"{path}?{query}x", f"{path}?{query.replace('acme', 'rival')}", f"/v1/artifacts/job_9/{'0' * 32}.png?{query}"):
        for asked in (home.client.get(bad), home.client.get(bad, headers={"authorization": "Bearer something"})):
            status, detail = problem(await asked)
            assert status == 403 and "not signed" in detail
    head = await home.client.head(path)
    assert (head.status_code, head.content) == (403, b"")


async def test_a_link_that_has_expired(home):
    url = await home.made(PICTURE)
    home.clock = 1599.0
    assert (await home.client.get(url)).headers["cache-control"] == "private, max-age=1, immutable"
    home.clock = 1600.0
    assert problem(await home.client.get(url)) == (403, "this link has expired: ask the job for another one")


async def test_files_that_are_not_there_and_those_of_others_are_the_same(home):
    await home.made(PICTURE)
    name = home.artifact.key.partition("/")[2]

    def signed(key, tenant="acme"):
        return link(key, tenant=tenant, expires=1600, secret="secret")

    answers = [
        await home.client.get(signed(key, tenant))
        for key, tenant in (
            (home.artifact.key, "rival"),
            (f"{JOB}/{'0' * 32}.png", "acme"),
            (f"job_2/{name}", "acme"),
            (f"{JOB}/fairlead.db", "acme"),
            (f"{JOB}/.{name}.partial", "acme"),
        )
    ]
    assert {problem(answer) for answer in answers} == {(404, "there is no such file: it may have been removed with its job")}


@pytest.mark.parametrize(
    "path", ["/v1/artifacts/../../etc/passwd", "/v1/artifacts/..%2f..%2fetc/passwd", f"/v1/artifacts/{JOB}/..%2ffairlead.db"]
)
async def test_paths_that_leave_the_store_lead_nowhere(home, path):
    _, _, query = (await home.made(PICTURE)).partition("?")
    assert (await home.client.get(f"{path}?{query}")).status_code in (403, 404)


async def test_a_file_that_was_removed_with_its_job(home):
    url = await home.made(PICTURE)
    await home.artifacts.delete(JOB)  # the job is still there
    assert problem(await home.client.get(url)) == (404, "there is no such file")
    assert list(home.store.jobs.purge(1e9, 10)) == [JOB]
    assert problem(await home.client.get(url))[0] == 404


async def test_a_store_that_does_not_answer(home, monkeypatch):
    url = await home.made(PICTURE)

    def gone(*_, **__):
        raise OSError("the disk is gone")

    monkeypatch.setattr(home.artifacts.fs, "cat_file", gone)
    answer = await home.client.get(url)
    assert problem(answer) == (503, "the artifact store does not give the file")
    assert (answer.headers["x-fairlead-reason"], answer.headers["retry-after"]) == ("artifact-store", "1")


# Large ones


async def test_a_large_file_comes_whole_and_in_pieces(home):
    data = bytes(range(256)) * (4 * CHUNK_BYTES // 256) + b"end"
    url = await home.made(data)
    answer = await home.client.get(url)
    assert answer.headers["content-length"] == str(len(data)) and answer.content == data
    part = await home.client.get(url, headers={"range": f"bytes={CHUNK_BYTES - 1}-{3 * CHUNK_BYTES}"})
    assert part.content == data[CHUNK_BYTES - 1 : 3 * CHUNK_BYTES + 1]


@asynccontextmanager
async def counted_reads(home, monkeypatch):
    reads, real = [], home.artifacts.fs.cat_file

    def cat_file(*arguments, **options):
        reads.append(options["start"])
        return real(*arguments, **options)

    monkeypatch.setattr(home.artifacts.fs, "cat_file", cat_file)
    yield reads


async def test_of_a_client_that_leaves_no_more_is_read(home, monkeypatch):
    url = await home.made(bytes(64 * CHUNK_BYTES))
    async with counted_reads(home, monkeypatch) as reads:
        async with home.client.stream("GET", url) as answer:
            async for _ in answer.aiter_raw():
                break
        assert (await home.lines.next())["status"] == 499
        assert 0 < len(reads) < 64


async def test_a_file_that_turns_out_short_is_cut_off_and_not_passed_off_as_whole(home):
    data = bytes(3 * CHUNK_BYTES)
    url = await home.made(data)
    os.truncate(f"{home.artifacts.root}/{home.artifact.key}", 2 * CHUNK_BYTES + 5)
    with pytest.raises(httpx2.RemoteProtocolError):
        await home.client.get(url)
    line = await home.lines.next()
    assert line["status"] == 200 and "less of this file" in line["error"]


async def test_two_readers_do_not_wait_for_each_other(home):
    url = await home.made(bytes(8 * CHUNK_BYTES))
    async with home.client.stream("GET", url) as slow:
        quick = await asyncio.wait_for(home.client.get(url, headers={"range": "bytes=0-9"}), 10)
        assert quick.content == bytes(10)
        assert len(await slow.aread()) == 8 * CHUNK_BYTES


def test_the_document_tells_of_it(tmp_path):
    routes = ArtifactRoutes(lambda job, tenant: None, None, None, Finished())
    described = document(routes.operations, {})["paths"]["/v1/artifacts/{job}/{name}"]
    assert set(described) == {"get", "head"}
    assert "image/png" in described["get"]["responses"]["200"]["content"]
    assert {each["name"]: each["in"] for each in described["get"]["parameters"]} == {
        "job": "path",
        "name": "path",
        "tenant": "query",
        "expires": "query",
        "signature": "query",
    }
    assert {"403", "404", "416", "503"} <= set(described["get"]["responses"])
