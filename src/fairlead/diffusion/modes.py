"""How much a picture may lose for speed, and what of that this device has to offer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fairlead.core.generation import Mode
from fairlead.core.specs import DiffusionSpec

TURBO_THRESHOLD = 0.08
COMPILE_CACHE = Path("~/.cache/fairlead/inductor")
MAX_KERNELS = 64
"""Of each kind of block: other shapes, other LoRAs and other neighbours need others. Beyond it, what is new runs as it is written."""


class Modes:
    """Of one model: exact computes in the weights' precision, operation by operation."""

    def __init__(
        self, spec: DiffusionSpec, *, reduced: torch.dtype | None, compiled: list[tuple[Any, Any]], caches: bool, device: str
    ) -> None:
        self.device = torch.device(device)
        self.vain = spec.compile and not compiled
        """`compile` is asked for, and has no effect."""
        self.reduced = reduced
        """What `balanced` multiplies in, where the weights are float32 and the device is faster with less."""
        self.compiled = compiled
        """Blocks of the model, and what calls each when it is compiled."""
        self.thresholds: dict[Mode, float] = {"exact": 0.0, "balanced": 0.0, "turbo": 0.0}
        """Of the first-block cache; 0: off."""
        if caches:
            self.thresholds |= {"balanced": spec.first_block_threshold, "turbo": spec.first_block_threshold or TURBO_THRESHOLD}

    @property
    def offered(self) -> tuple[Mode, ...]:
        """Those that differ."""
        balanced = self.reduced is not None or self.compiled or self.thresholds["balanced"] > 0
        turbo = self.thresholds["turbo"] != self.thresholds["balanced"]
        return ("exact", *(("balanced",) if balanced else ()), *(("turbo",) if turbo else ()))

    @property
    def explain(self) -> str:
        vain = f"; `compile` has no effect on this model on {self.device.type}" if self.vain else ""
        if self.offered == ("exact",):
            return f"modes: exact only; nothing that is faster differs for this model on {self.device.type}{vain}"
        ways = [
            *([f"multiplication in {str(self.reduced).removeprefix('torch.')}"] if self.reduced is not None else []),
            *(["compiled blocks"] if self.compiled else []),
        ]
        caches = [f"{mode} with a first-block cache at {self.thresholds[mode]:g}" for mode in self.offered if self.thresholds[mode]]
        return (
            f"modes: {', '.join(self.offered)}"
            + (f"; faster by {' and '.join(ways)}" if ways else "")
            + "".join(f"; {one}" for one in caches)
            + vain
        )

    @contextmanager
    def entered(self, mode: Mode) -> Iterator[None]:
        for block, call in self.compiled:
            block._compiled_call_impl = call if mode != "exact" else None
        with torch.autocast(self.device.type, dtype=self.reduced, enabled=self.reduced is not None and mode != "exact"):
            yield

    def num_rows(self, rows: int, mode: Mode) -> int:
        """To compute for so many: compiled kernels are kept for few sizes, so a batch is filled up to the next power of two."""
        return 1 << (rows - 1).bit_length() if self.compiled and mode != "exact" else rows


def choose_modes(spec: DiffusionSpec, model: Any, *, device: str, caches: bool) -> Modes:
    cuda = device.startswith("cuda")
    reduced = torch.bfloat16 if cuda and model.dtype == torch.float32 else None
    compiled = compile_blocks(model) if cuda and spec.compile else []
    return Modes(spec, reduced=reduced, compiled=compiled, caches=caches, device=device)


def compile_blocks(model: Any, backend: Any = "inductor") -> list[tuple[Any, Any]]:
    """Block by block: as fast as the whole model, and ready in a fraction of the time. Each is compiled at its first call."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILE_CACHE.expanduser()))
    names = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ()
    blocks = [block for block in model.modules() if type(block).__name__ in names]
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_KERNELS)
    for block in blocks:
        block.compile(backend=backend)  # no `fullgraph`, which fails a request where there are too many kernels
    return [(block, block._compiled_call_impl) for block in blocks]
