"""Tiny pipelines on disk, each written once."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, where they are imported
    import diffusers
    import torch
    import transformers

    from tests.diffusion import tiny

Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    torch.set_num_threads(1)  # threads wait for each other longer than they compute, at these sizes
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    home = tmp_path_factory.mktemp("pipelines")

    def folder(name: str) -> Path:
        return home / name if (home / name).exists() else tiny.save(name, home / name)

    return folder
