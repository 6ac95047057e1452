"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
import structlog

os.environ["TRITON_INTERPRET"] = "1"  # kernels for CUDA are computed on the CPU; Triton asks when it is imported, by whomever

structlog.configure(
    processors=[structlog.processors.add_log_level, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
)


@pytest.fixture(scope="session", autouse=True)
def _data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that tests start keep their default store in there, and not in the developer's own data folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield
