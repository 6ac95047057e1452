"""The kernels are compiled once for what they depend on, whoever asks; what goes wrong is one sentence."""

import ctypes
import functools
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fairlead.llm.attention import choose
from fairlead.llm.kernels import __main__, build
from fairlead.llm.kernels.build import BuildError

COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "counting $VERSION" && exit
for argument; do [ "$argument" = -c ] && echo compiled >> {log}; done
exec {compiler} "$@"
"""


class Workshop:
    """A folder of sources, a place for libraries, and a compiler that counts."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.sources, self.cache, self.log = folder / "sources", folder / "cache", folder / "compiled"
        self.sources.mkdir()
        self.write("one.cpp", 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
        self.compiler = folder / "c++"
        self.compiler.write_text(COMPILER.format(log=self.log, compiler=compiler))
        self.compiler.chmod(0o755)

    def write(self, name: str, text: str) -> None:
        (self.sources / name).write_text(text)

    def build(self) -> Path:
        return build.build(self.sources, self.cache)

    @property
    def num_compiled(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    try:
        compiler = shlex.join(build.find_compiler().command)
    except BuildError as error:
        pytest.skip(str(error))
    workshop = Workshop(tmp_path, compiler)
    monkeypatch.setenv("CXX", str(workshop.compiler))
    monkeypatch.setenv("VERSION", "1")
    return workshop


@pytest.fixture
def not_loaded():
    """As a process that has not asked for the kernels yet."""
    build.load.cache_clear()
    yield
    build.load.cache_clear()


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_a_library_is_compiled_once(workshop):
    library = workshop.build()

    assert answer(library) == 42
    assert workshop.build() == library
    assert workshop.num_compiled == 1
    assert sorted(file.name for file in library.parent.iterdir()) == [build.LIBRARY, "lock"]


def test_every_source_goes_into_one_library(workshop):
    workshop.write("two.cpp", '#include "two.h"\nextern "C" __attribute__((visibility("default"))) int other() { return OTHER; }')
    workshop.write("two.h", "#define OTHER 7")

    library = ctypes.CDLL(str(workshop.build()))

    assert (library.answer(), library.other()) == (42, 7)
    assert workshop.num_compiled == 2


def test_what_it_depends_on_makes_another(workshop, monkeypatch):
    libraries = [workshop.build()]

    workshop.write("one.cpp", 'extern "C" __attribute__((visibility("default"))) int answer() { return 43; }')
    libraries.append(workshop.build())
    assert answer(libraries[-1]) == 43

    workshop.write("new.h", "// a header")
    libraries.append(workshop.build())
    monkeypatch.setenv("VERSION", "2")
    libraries.append(workshop.build())
    monkeypatch.setattr(build.torch, "__version__", "9.9")
    libraries.append(workshop.build())
    monkeypatch.setattr(build, "_cpu_flags", lambda: "flags: abacus")
    libraries.append(workshop.build())
    monkeypatch.setenv("CXXFLAGS", "-O0")
    libraries.append(workshop.build())

    assert len(set(libraries)) == workshop.num_compiled == 7


def test_those_who_ask_at_once_wait_for_one(workshop):
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: workshop.build(), range(4)))

    assert len(set(libraries)) == 1
    assert workshop.num_compiled == 1


def test_what_was_built_is_used_without_a_compiler(workshop, monkeypatch):
    library = workshop.build()
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert workshop.build() == library


def test_an_error_in_a_source_is_named(workshop):
    workshop.write("bad.cpp", "int broken( { }")

    with pytest.raises(BuildError, match=r"failed with status 1: .*bad\.cpp:1:\d+: error: "):
        workshop.build()
    assert not list(workshop.cache.glob(f"*/{build.LIBRARY}"))
    (workshop.sources / "bad.cpp").unlink()
    assert answer(workshop.build()) == 42


def test_a_place_that_cannot_be_written_is_named(workshop):
    workshop.cache.write_text("a file, not a folder")

    with pytest.raises(BuildError, match="cache/.* cannot be written: Not a directory"):
        workshop.build()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler -m64", "no C++ compiler: CXX=no-such-compiler -m64 not found"), ("false", "false failed with status 1")],
)
def test_without_a_compiler_the_engine_falls_back(tmp_path, monkeypatch, not_loaded, capsys, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    loaded = build.load()
    __main__.main()

    assert not loaded
    assert reason in loaded.reason
    assert choose("auto", "cpu").name == "torch"
    assert reason in capsys.readouterr().err


def test_a_library_that_does_not_load_is_a_reason(workshop, monkeypatch, not_loaded):
    broken = workshop.cache / "broken.so"
    workshop.cache.mkdir()
    broken.write_text("not a library")
    monkeypatch.setattr(build, "build", lambda progress: broken)

    assert "broken.so" in build.load().reason


def test_at_install_every_step_is_a_line(workshop, monkeypatch, capsys):
    monkeypatch.setattr(build, "build", functools.partial(build.build, workshop.sources, workshop.cache))
    __main__.main()

    output = capsys.readouterr()
    assert "kernels: compiling one.cpp with " in output.err
    assert "kernels: compiled one.cpp (" in output.err
    assert output.out.strip().endswith(build.LIBRARY)
