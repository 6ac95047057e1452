"""One life of an engine that this server started: its process, what it prints, how it ends."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from fairlead.core.errors import LoadError
from fairlead.observe.redaction import SECRET, without_secrets
from fairlead.runtime.external import keeper
from fairlead.runtime.external.listener import Owner, began_of, owner_of
from fairlead.runtime.printed import Printed

log = structlog.get_logger("fairlead.runtime")

HOST = "127.0.0.1"
LAST_LINES = 20
"""Of what it printed, that an error tells."""
MAX_LINE_CHARS = 400
LINES_PER_SECOND = 100
"""More are left out of the log, and counted."""
GRACE_SECONDS = 10.0
"""For the keeper itself, beyond what the engine has."""
INHERITED = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "CC", "CXX"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "GLIBC_TUNABLES", "VIRTUAL_ENV", "CONDA_PREFIX"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    )
)
"""What an engine is given of this server's environment. Nothing else is: it may hold anybody's secrets."""
INHERITED_FAMILIES = (
    *("LC_", "XDG_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "MALLOC_"),
    *("CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "NCCL_", "UCX_", "HIP_", "ROCM_", "ROCR_", "HSA_", "GPU_"),
    *("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "XLA_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TIKTOKEN_", "NUMBA_"),
    *("VLLM_", "FLASHINFER_", "LMCACHE_", "NIXL_", "SGLANG_", "SGL_", "TRTLLM_", "TLLM_", "LLAMA_", "GGML_"),
)
"""The same by how a name begins."""
KEPT = ("_API_KEY", "_SECRET", "_PASSWORD")
"""But for what ends so: `NVIDIA_API_KEY`, say, opens a cloud."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Lines(Printed):
    """What it prints, in this server's log: so many lines a second, without the secrets that it was given."""

    def __init__(self, model: str, version: str, secrets: Sequence[str]) -> None:
        super().__init__(model, version)
        self._last: deque[bytes] = deque(maxlen=2 * LAST_LINES)
        self._secrets = [secret.encode() for secret in secrets if secret]
        self._second = 0
        self._num = 0

    def _take_all(self, lines: list[bytes]) -> None:
        room = max(LINES_PER_SECOND - self._num, 0) + LINES_PER_SECOND
        super()._take_all(lines[:room])
        self._num += len(lines[room:])  # a flood costs next to nothing: thousands of lines come in one read
        self._last.extend(lines[room:])

    def _take(self, line: bytes) -> None:
        second = int(time.monotonic())
        if second != self._second:
            if (left_out := self._num - LINES_PER_SECOND) > 0:
                log.warning("lines_left_out", num=left_out, pid=self.pid, **self.about)
            self._second, self._num = second, 0
        self._num += 1
        self._last.append(line)
        if self._num <= LINES_PER_SECOND:
            super()._take(self._without_theirs(line))

    @property
    def last(self) -> list[str]:
        """What it printed last; no empty lines, and few of a flood."""
        texts = [without_secrets(self._without_theirs(line).decode("utf-8", "replace").strip()) for line in self._last]
        return [text[:MAX_LINE_CHARS] for text in texts if text][-LAST_LINES:]

    def _without_theirs(self, line: bytes) -> bytes:
        for secret in self._secrets:
            line = line.replace(secret, SECRET.encode())
        return line


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """What an engine may know of an environment."""
    return {
        name: value
        for name, value in environ.items()
        if name in INHERITED or (name.startswith(INHERITED_FAMILIES) and not name.endswith(KEPT))
    }


class Child:
    def __init__(self, model: str, version: str, command: Sequence[str], environ: Mapping[str, str], secrets: Sequence[str]) -> None:
        self.model = model
        self.command = command
        self.pid: int | None = None
        """The engine's; None before it runs and after its end."""
        self.ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """Its exit code, or the negative number of a signal; None where nobody can tell."""
        self.lines = Lines(model, version, secrets)
        self._environ = environ
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._stop_seconds = 0.0
        self._began = 0.0

    async def start(self, stop_seconds: float) -> None:
        """Raises LoadError."""
        self._stop_seconds = stop_seconds
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", keeper.__file__, str(stop_seconds), *self.command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=self.lines.theirs,
                env=dict(self._environ),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self.lines.close()
            raise LoadError(f"model '{self.model}': {self.command[0]} cannot be started: {error}") from None
        finally:
            self.lines.handed_over()
        self._began = began_of(self._process.pid)
        self._reader = asyncio.get_running_loop().create_task(self._read(self._process), name=f"keeper of {self.model}")

    async def owner_of(self, port: int, *, apart: bool) -> Owner:
        """Whether it is this one, or something that it started, that listens there. `apart`: others may do so on its behalf."""
        assert self._process is not None
        return await asyncio.to_thread(owner_of, HOST, port, self._process.pid, self._began, apart=apart)

    async def stop(self) -> None:
        """SIGTERM to it and all of its group, SIGKILL after a while. Returns when it is gone."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        done, _ = await asyncio.wait({self.ended}, timeout=self._stop_seconds + GRACE_SECONDS)
        if not done:
            with suppress(ProcessLookupError):
                process.kill()
            await asyncio.wait({self.ended}, timeout=GRACE_SECONDS)

    @property
    def last_words(self) -> str:
        """As the end of a sentence."""
        lines = "\n".join(self.lines.last)
        return f"; the last lines of its log:\n{lines}" if lines else "; it printed nothing"

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        code: int | None = None
        group = 0
        try:
            while line := await process.stdout.readline():
                word, _, number = line.decode("ascii", "replace").strip().partition(" ")
                if word == "pid":
                    self.pid = self.lines.pid = group = int(number)
                elif word == "exit" and number:
                    code = int(number)
            await process.wait()
        finally:
            if code is None and group:  # the keeper was killed, and can end nothing any more
                with suppress(OSError):
                    os.killpg(group, signal.SIGKILL)
            self.pid = None
            self.lines.close(after=1.0)
            if not self.ended.done():
                self.ended.set_result(code)


def resolved(command: Sequence[str], environment: str, model: str) -> tuple[list[str], dict[str, str]]:
    """The command with its program's path, and what the environment's own shell would have set. Raises LoadError."""
    program, *arguments = command
    changes: dict[str, str] = {}
    path = os.environ.get("PATH", os.defpath)
    if environment:
        folder = Path(environment).expanduser().absolute()
        if not (folder / "bin").is_dir():
            raise LoadError(f"model '{model}': there is no environment at {folder}, which `engine.environment` names: it has no `bin`")
        path = f"{folder / 'bin'}{os.pathsep}{path}"
        changes = {"PATH": path, "VIRTUAL_ENV": str(folder)}
    elif program == "python":
        return [sys.executable, *arguments], changes
    found = shutil.which(program, path=path)
    if found is None:
        where = f"in {environment}/bin or on the PATH" if environment else "on the PATH: `engine.environment` says where it is installed"
        raise LoadError(f"model '{model}': there is no program `{program}` {where}")
    return [found, *arguments], changes
