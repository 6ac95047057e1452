"""Where files that jobs make are kept: a folder, or any fsspec file system.

`<job>/<128 random bits>.<suffix>`: nobody guesses a key, and all files of a job go with its folder, those of a try that died too.
"""

import asyncio
import hashlib
import os
import re
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import fsspec
import structlog
from fsspec.implementations.local import LocalFileSystem

from fairlead.core.errors import ConfigError, NotFound, Unreachable
from fairlead.core.jobs import Artifact
from fairlead.core.policy import ArtifactSettings

T = TypeVar("T")

KEY = re.compile(r"([A-Za-z0-9_-]{1,64})/([0-9a-f]{32}\.[a-z0-9]{1,5})")
"""(job, name)."""
SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "application/json": "json", "text/plain": "txt"}
"""By content type; other files are `.bin`."""
CHUNK_BYTES = 1 << 20
NUM_THREADS = 8
"""Operations at a time. They are the store's own threads: where it hangs, nothing else does."""

log = structlog.get_logger("fairlead.jobs")


class Artifacts:
    """Lives in the event loop; the file system is asked in threads, and each answer has a deadline."""

    def __init__(self, settings: ArtifactSettings, default_folder: Path) -> None:
        """Raises ConfigError where there is no such kind of file system, or its library is not installed."""
        self.url = settings.url or str(default_folder)
        self.timeout = settings.timeout
        try:
            self.fs, self.root = fsspec.url_to_fs(self.url, **settings.options)
        except ImportError as error:
            extra = " (pip install 'fairlead[s3]')" if self.url.startswith("s3:") else ""
            raise ConfigError(f"`artifacts.url` {self.url}: {error}{extra}") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"`artifacts.url` {self.url}: {error}") from None
        self.local = isinstance(self.fs, LocalFileSystem)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="artifacts")
        self._slots = asyncio.Semaphore(NUM_THREADS)

    async def put(self, job: str, data: bytes, content_type: str) -> Artifact:
        """A new file, whole or not at all. Raises Unreachable."""
        name = f"{secrets.token_hex(16)}.{SUFFIXES.get(content_type, 'bin')}"
        key = f"{job}/{name}"
        assert KEY.fullmatch(key), key

        def write() -> str:
            try:
                if self.local:
                    _write_file(Path(self.root) / job, name, data)
                else:
                    self.fs.pipe_file(self._path(key), data)
                if abandoned.is_set():
                    raise TimeoutError("nobody waits for this file any longer")
            except BaseException:
                with suppress(Exception):
                    self.fs.rm_file(self._path(key))
                raise
            return hashlib.sha256(data).hexdigest()

        abandoned = threading.Event()
        try:
            sha256 = await self._within("take", key, write)
        except BaseException:
            abandoned.set()
            raise
        return Artifact(key=key, content_type=content_type, num_bytes=len(data), sha256=sha256)

    async def read(self, key: str, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Bytes `start` to `stop`, in chunks; nothing stays open between two of them.

        Raises NotFound, and Unreachable: also where the file is shorter than that.
        """
        path = self._path(key)
        while start < stop:
            end = min(start + CHUNK_BYTES, stop)
            chunk = await self._within("give", key, partial(self._chunk, path, start, end))
            if len(chunk) != end - start:
                log.error("artifact_cut", key=key, num_bytes=start + len(chunk))
                raise Unreachable("the artifact store gives less of this file than it was given", reason="artifact-store")
            yield chunk
            start = end

    async def remove(self, key: str) -> None:
        """One file, if it is there. Raises Unreachable."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self._path(key))

        await self._within("remove", key, remove)

    async def delete(self, job: str) -> None:
        """All files of a job, if it has any. Raises Unreachable."""
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", job), job

        def remove() -> None:
            # Other processes write too: what this one has seen of a folder is not all of it.
            self.fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self.fs.rm(self._path(job), recursive=True)

        await self._within("remove", job, remove)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _chunk(self, path: str, start: int, end: int) -> bytes:
        """Blocks. Raises NotFound."""
        try:
            return bytes(self.fs.cat_file(path, start=start, end=end))
        except FileNotFoundError:
            raise NotFound("there is no such file") from None

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}"

    async def _within(self, verb: str, key: str, work: Callable[[], T]) -> T:
        """Raises NotFound, Unreachable."""
        loop = asyncio.get_running_loop()

        def free(_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._slots.release)

        try:
            async with asyncio.timeout(self.timeout):
                await self._slots.acquire()
                future = self._threads.submit(work)
                # A caller that waits no longer does not make the thread free.
                future.add_done_callback(free)
                return await asyncio.wrap_future(future)
        except NotFound:
            raise
        except TimeoutError:
            log.error("artifact_store", key=key, error=f"no answer within {self.timeout:g} seconds")
            raise Unreachable(f"the artifact store did not {verb} the file in time", reason="artifact-store") from None
        except Exception as error:  # file systems of all kinds have errors of all kinds
            log.error("artifact_store", key=key, error=f"{type(error).__name__}: {error}")
            raise Unreachable(f"the artifact store does not {verb} the file", reason="artifact-store") from None


def _write_file(folder: Path, name: str, data: bytes) -> None:
    """A reader, or a crash, finds all of it or nothing. What is left of a crash goes with the folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = folder / f".{name}.partial"
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / name)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(folder)


def _sync(folder: Path) -> None:
    """The name is on the disk too: the job that tells of it will be."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
