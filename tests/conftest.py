"""What all tests share."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import structlog

os.environ["TRITON_INTERPRET"] = "1"  # kernels for CUDA are computed on the CPU; Triton asks when it is imported, by whomever

# Programs that tests start are to end with Ctrl-C, also where the tests run in the background of a shell, which has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

structlog.configure(
    processors=[structlog.processors.add_log_level, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
)


FREEZE, UNFREEZE = gc.freeze, gc.unfreeze


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> Iterator[None]:
    """What pytest has collected is kept from the garbage collector; what tests make is not.

    A repository thaws, collects and freezes the whole heap whenever a model comes or goes: 0.6 s each time where all tests are loaded.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture
def freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of what a repository does with the heap."""
    monkeypatch.setattr(gc, "freeze", FREEZE)
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)


@pytest.fixture(scope="session", autouse=True)
def _data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that tests start keep their default store in there, and not in the developer's own data folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield
