"""Compiles the C++ of this folder into one library with the machine's own compiler, keeps it, and loads it.

The library lies under `$XDG_CACHE_HOME/fairlead/kernels/<sources, torch, CPU>-<compiler>/`: what would make another library
makes another folder. No compiler, no room, no luck: a sentence that says why, and the engine computes with torch's own ops.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from filelock import FileLock

log = structlog.get_logger("fairlead.kernels")

SOURCES = Path(__file__).parent
LIBRARY = "libfairlead_kernels.so"
TORCH = Path(torch.__file__).parent
NUM_JOBS = 2
COMPILE_TIMEOUT = 900.0

# Sums may be reordered so that they vectorise. Not -ffast-math: a masked score is an infinity, which it assumes away, and linking
# with it turns off denormals for the whole process. 512-bit vectors, which gcc avoids by default, pay off in kernels of only FMAs.
FLAGS = ["-std=gnu++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")


class BuildError(Exception):
    """Why there is no library, in one sentence."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """True if the ops are there; else `reason` says why not."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


@functools.cache
def load() -> Loaded:
    """Makes `torch.ops.fairlead` available to this process, compiling first (a minute) if nobody has yet. Never raises."""
    try:
        library = build(progress=lambda line: log.info("building kernels", step=line))
        torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        return Loaded(reason=str(error))
    return Loaded()


def build(sources: Path = SOURCES, cache: Path | None = None, progress: Callable[[str], None] = lambda line: None) -> Path:
    """The library of `sources`, compiled unless it lies in `cache`; processes that ask at once compile it once. Raises BuildError."""
    cache = cache or cache_folder()
    key = _key(sources)
    try:
        compiler = find_compiler()
    except BuildError:
        # An image may have been built with a compiler and run without one.
        for library in sorted(cache.glob(f"{key}-*/{LIBRARY}")):
            return library
        raise
    library = cache / f"{key}-{_digest(compiler.version)}" / LIBRARY
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.parent / "lock"):
            if not library.exists():
                _compile(compiler, sources, library, progress)
    except OSError as error:
        raise BuildError(f"{library.parent} cannot be written: {error.strerror or error}") from error
    return library


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fairlead" / "kernels"


@dataclass(frozen=True, slots=True)
class Compiler:
    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """`$CXX`, else the first of g++, clang++ and c++. Raises BuildError."""
    wanted = os.environ.get("CXX")
    commands = [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]
    for command in commands:
        if shutil.which(command[0]):
            return Compiler(tuple(command), _run([*command, "--version"]))
    raise BuildError(f"no C++ compiler: {'CXX=' + wanted if wanted else 'g++, clang++ and c++'} not found")


def _compile(compiler: Compiler, sources: Path, library: Path, progress: Callable[[str], None]) -> None:
    files = sorted(sources.glob("*.cpp"))
    start = time.monotonic()
    includes = [f"-isystem{TORCH / 'include'}", f"-isystem{TORCH / 'include/torch/csrc/api/include'}"]
    flags = [*_flags(), *includes]
    # A folder beside the library: its last step is a rename, and another process sees all of the file or none.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, ThreadPoolExecutor(NUM_JOBS) as jobs:

        def compile_one(source: Path) -> str:
            output = Path(scratch) / f"{source.stem}.o"
            _run([*compiler.command, *flags, "-c", str(source), "-o", str(output)])
            progress(f"compiled {source.name}")
            return str(output)

        progress(f"compiling {', '.join(file.name for file in files)} with {compiler.command[0]}")
        objects = list(jobs.map(compile_one, files))
        made = Path(scratch) / LIBRARY
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
        _run([*compiler.command, *_flags(), "-shared", *objects, *libraries, "-o", str(made)])
        made.replace(library)
    log.info("kernels built", seconds=round(time.monotonic() - start, 1), library=str(library))


def _flags() -> list[str]:
    """The user's own come last and win."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    return [*FLAGS, abi, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {errors[0].strip()}")
    return done.stdout


def _key(sources: Path) -> str:
    texts = [part for file in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]) for part in (file.name, file.read_text())]
    return _digest(*texts, torch.__version__, platform.machine(), _cpu_flags(), *_flags())


def _cpu_flags() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
