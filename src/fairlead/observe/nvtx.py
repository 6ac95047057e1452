"""Ranges for Nsight: what a device's kernels are for. Off, nothing of it is there; FAIRLEAD_NVTX=1 turns it on for a server's processes."""

import os
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import structlog

log = structlog.get_logger("fairlead.observe")

P = ParamSpec("P")
T = TypeVar("T")
Name = str | Callable[..., str]
"""Of a range, or what makes it of the call's arguments."""
Push = Callable[[str], Any]
Pop = Callable[[], Any]


def asked(environment: dict[str, str] | None = None) -> bool:
    return (os.environ if environment is None else environment).get("FAIRLEAD_NVTX", "") not in ("", "0")


def ranged(name: Name) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Each call is a range of that name, where ranges are asked for; else the function stays what it is."""
    return (lambda call: around(call, name, _torchs)) if asked() else (lambda call: call)


def around(call: Callable[P, T], name: Name, marks: Callable[[], tuple[Push, Pop] | None]) -> Callable[P, T]:
    """`marks`: what begins a range and what ends it; None where there is no such thing."""

    @wraps(call)
    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        found = marks()
        if found is None:
            return call(*args, **kwargs)
        push, pop = found
        push(f"fairlead {name if isinstance(name, str) else name(*args, **kwargs)}")
        try:
            return call(*args, **kwargs)
        finally:
            pop()

    return within


def _torchs() -> tuple[Push, Pop] | None:
    return _of_torch() if "torch" in sys.modules else None


@lru_cache(maxsize=1)
def _of_torch() -> tuple[Push, Pop] | None:
    import torch

    if torch.version.cuda is None:
        log.warning("no_nvtx", note="FAIRLEAD_NVTX is set, and this torch was built without CUDA")
        return None
    return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
