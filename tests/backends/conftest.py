"""Small real models, trained once for all tests, and the way every test loads them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fairlead.backends import Executable, detect, load_backend
from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError
from fairlead.core.specs import ModelSpec

Load = Callable[..., Executable]
Why = Callable[..., str]


@pytest.fixture(scope="session")
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)


@pytest.fixture(scope="session")
def classes(features: np.ndarray) -> np.ndarray:
    """Three classes, learnable."""
    return (features[:, 0] > 0).astype(np.int64) + (features[:, 1] > 0)


@pytest.fixture(scope="session")
def load() -> Load:
    """Detect and load like the server does, with the lines of a model.yaml."""

    def load(path: Path, yaml: str = "") -> Executable:
        spec = read_yaml(yaml, ModelSpec, "model.yaml").replace(name="fraud")
        kind, artefact = detect(path, spec)
        return load_backend(kind.name).load(artefact, spec, 1)

    return load


@pytest.fixture(scope="session")
def why(load: Load) -> Why:
    """The sentence with which a model is refused."""

    def why(path: Path, yaml: str = "") -> str:
        with pytest.raises(ConfigError) as refused:
            load(path, yaml)
        return refused.value.message

    return why


@pytest.fixture(scope="session")
def yaml_lines() -> Callable[[str], str]:
    """The lines that an error tells to write."""
    return lambda message: message.partition("\n")[2]
