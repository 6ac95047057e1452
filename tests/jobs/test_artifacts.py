"""Files of jobs: kept whole or not at all, wherever that is."""

import asyncio
import hashlib
import re
import subprocess
import sys
import threading
import uuid
from errno import ENOSPC
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fairlead.core.errors import ConfigError, NotFound, Unreachable
from fairlead.core.policy import ArtifactSettings
from fairlead.jobs.artifacts import CHUNK_BYTES, NUM_THREADS, Artifacts

JOB = "job_0190c0ffee"
PICTURE = bytes(range(256)) * 41


class Troubled(MemoryFileSystem):
    """One that does what the test says instead of writing."""

    protocol = "troubled"
    cachable = False
    store = {}
    pseudo_dirs = [""]
    gate = threading.Event()
    full = False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if type(self).full:
            super().pipe_file(path, value[:10], **kwargs)
            raise OSError(ENOSPC, "No space left on device")
        assert self.gate.wait(20)


@pytest.fixture
def troubled():
    fsspec.register_implementation("troubled", Troubled, clobber=True)
    Troubled.full = False
    Troubled.gate = threading.Event()
    yield Troubled
    Troubled.gate.set()


async def whole(artifacts, key, start, stop):
    return b"".join([chunk async for chunk in artifacts.read(key, start, stop)])


@pytest.fixture(scope="module")
def s3():
    """A real S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "test", "secret": "test", "endpoint_url": f"http://{host}:{port}", "client_kwargs": {"region_name": "eu-west-1"}}
    shelf = f"shelf-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", skip_instance_cache=True, **options).mkdir(shelf)
    yield ArtifactSettings(url=f"s3://{shelf}/files", options=options)
    server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def artifacts(request, tmp_path):
    settings = {
        "folder": lambda: ArtifactSettings(),
        "memory": lambda: ArtifactSettings(url=f"memory://{uuid.uuid4().hex}"),
        "s3": lambda: request.getfixturevalue("s3"),
    }[request.param]()
    made = Artifacts(settings, tmp_path / "artifacts")
    yield made
    made.close()


async def test_a_file_is_put_read_in_ranges_and_goes_with_its_job(artifacts):
    artifact = await artifacts.put(JOB, PICTURE, "image/png")
    other = await artifacts.put(JOB, b"two", "application/x-new")
    of_another = await artifacts.put("job_2", b"three", "image/webp")
    assert re.fullmatch(rf"{JOB}/[0-9a-f]{{32}}\.png", artifact.key)
    assert other.key.endswith(".bin") and other.key != artifact.key
    assert (artifact.content_type, artifact.num_bytes) == ("image/png", len(PICTURE))
    assert artifact.sha256 == hashlib.sha256(PICTURE).hexdigest()
    assert await whole(artifacts, artifact.key, 0, len(PICTURE)) == PICTURE
    assert await whole(artifacts, artifact.key, 100, 300) == PICTURE[100:300]
    assert await whole(artifacts, artifact.key, 5, 5) == b""

    await artifacts.delete(JOB)
    await artifacts.delete(JOB)
    for gone in (artifact, other):
        with pytest.raises(NotFound):
            await whole(artifacts, gone.key, 0, 1)
    assert await whole(artifacts, of_another.key, 0, 5) == b"three"


async def test_large_files_come_in_chunks(artifacts):
    data = b"0123456789abcdef" * (CHUNK_BYTES // 16) * 2 + b"end"
    artifact = await artifacts.put(JOB, data, "image/png")
    chunks = [chunk async for chunk in artifacts.read(artifact.key, 1, len(data))]
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 2]
    assert b"".join(chunks) == data[1:]


async def test_a_file_that_was_cut_short_is_not_given_for_the_whole(artifacts):
    artifact = await artifacts.put(JOB, PICTURE, "image/png")
    with pytest.raises(Unreachable):
        await whole(artifacts, artifact.key, 0, len(PICTURE) + 1)


async def test_a_folder_holds_whole_files_that_nobody_else_reads(tmp_path):
    artifacts = Artifacts(ArtifactSettings(), tmp_path / "artifacts")
    artifact = await artifacts.put(JOB, PICTURE, "image/jpeg")
    folder = tmp_path / "artifacts" / JOB
    assert [path.name for path in folder.iterdir()] == [artifact.key.partition("/")[2]]
    assert folder.stat().st_mode & 0o077 == 0
    artifacts.close()


FULL = """
import asyncio, resource, sys
from pathlib import Path
from fairlead.core.errors import Unreachable
from fairlead.core.policy import ArtifactSettings
from fairlead.jobs.artifacts import Artifacts

async def main():
    artifacts = Artifacts(ArtifactSettings(), Path(sys.argv[1]))
    await artifacts.put("job_1", b"small", "image/png")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        await artifacts.put("job_1", bytes(100_000), "image/png")
    except Unreachable as error:
        print(error.reason, error.retry_after)

asyncio.run(main())
"""


def test_a_disk_that_takes_no_more_leaves_nothing_half_written(tmp_path):
    ran = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "artifact-store 1.0", ran.stderr
    [left] = (path for path in (tmp_path / "job_1").iterdir())
    assert left.read_bytes() == b"small"


async def test_a_full_store_is_worth_a_retry(troubled, tmp_path):
    troubled.full = True
    artifacts = Artifacts(ArtifactSettings(url="troubled://full"), tmp_path)
    with pytest.raises(Unreachable) as refused:
        await artifacts.put(JOB, PICTURE, "image/png")
    assert refused.value.reason == "artifact-store"
    assert "No space" not in refused.value.message
    await artifacts.delete(JOB)
    artifacts.close()


async def test_a_store_that_hangs_costs_its_deadline_and_no_more_than_its_own_threads(troubled, tmp_path):
    artifacts = Artifacts(ArtifactSettings(url="troubled://slow", timeout=0.05), tmp_path)
    tries = [artifacts.put(JOB, PICTURE, "image/png") for _ in range(3 * NUM_THREADS)]
    ends = await asyncio.gather(*tries, return_exceptions=True)
    assert {(type(end), end.reason) for end in ends} == {(Unreachable, "artifact-store")}
    assert sum(thread.name.startswith("artifacts") for thread in threading.enumerate()) <= NUM_THREADS
    assert artifacts._threads._work_queue.qsize() == 0

    troubled.gate.set()
    artifacts.timeout = 20.0
    await artifacts.put(JOB, PICTURE, "image/png")
    artifacts.close()


async def test_a_bucket_that_nobody_answers_for(tmp_path):
    config = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:1", "config_kwargs": config}
    artifacts = Artifacts(ArtifactSettings(url="s3://shelf/files", options=options), tmp_path)
    for work in (artifacts.put(JOB, PICTURE, "image/png"), artifacts.delete(JOB), whole(artifacts, f"{JOB}/{'0' * 32}.png", 0, 1)):
        with pytest.raises(Unreachable):
            await work
    artifacts.close()


async def test_a_bucket_that_is_gone_is_worth_a_retry_too(s3, tmp_path):
    artifacts = Artifacts(ArtifactSettings(url="s3://no-such-shelf/files", options=s3.options), tmp_path)
    with pytest.raises(Unreachable):
        await artifacts.put(JOB, PICTURE, "image/png")
    artifacts.close()


@pytest.mark.parametrize("url", ["gopher://files", "s4://shelf"])
def test_a_kind_of_store_that_there_is_not(url):
    with pytest.raises(ConfigError, match="artifacts.url"):
        Artifacts(ArtifactSettings(url=url), Path("unused"))


async def test_files_that_another_server_put_go_with_the_job_too(s3, tmp_path):
    artifacts = Artifacts(s3, tmp_path)
    await artifacts.put("job_3", b"one", "image/png")
    folder = f"{artifacts.root}/job_3"
    assert len(artifacts.fs.find(folder)) == 1
    other = fsspec.filesystem("s3", skip_instance_cache=True, **s3.options)
    other.pipe_file(f"{folder}/{'0' * 32}.png", b"two")
    await artifacts.delete("job_3")
    other.invalidate_cache()
    assert other.find(folder) == []
    artifacts.close()
