"""Attention over paged KV memory: four kernels behind one protocol."""

import importlib.util
from typing import Literal, Protocol

import structlog
import torch

from fairlead.llm import kernels as native_kernels
from fairlead.llm.attention.native import NativeAttention
from fairlead.llm.attention.reference import ReferenceAttention
from fairlead.llm.attention.torch_attention import TorchAttention
from fairlead.llm.attention.triton_attention import TritonAttention
from fairlead.llm.batch import AttentionSpec, LayerCache, StepBatch

__all__ = ["AttentionKernel", "NativeAttention", "ReferenceAttention", "TorchAttention", "TritonAttention", "choose"]

log = structlog.get_logger("fairlead.kernels")


class AttentionKernel(Protocol):
    """All tokens of a step are stored before any of them attends: sequences of one step may share blocks."""

    name: str
    fixed: bool
    """A token's result has the same bits whatever tokens are computed with it."""

    def store(self, k_TKD: torch.Tensor, v_TKE: torch.Tensor, layer: LayerCache, slots_T: torch.Tensor) -> None:
        """Writes the K and V of T tokens to their slots."""
        ...

    def attend(self, q_THD: torch.Tensor, layer: LayerCache, batch: StepBatch, spec: AttentionSpec) -> torch.Tensor:
        """[T, H, Dv]: each token attends to the tokens of its own sequence up to itself."""
        ...


def choose(kernels: Literal["auto", "native", "torch"], device: str | torch.device) -> AttentionKernel:
    """Our own unless they are not wanted: C++ on a CPU, Triton on CUDA; torch's own ops elsewhere, and where ours cannot be had."""
    kind = torch.device(device).type
    if kernels == "torch" or kind not in {"cpu", "cuda"}:
        return TorchAttention()
    if kind == "cuda":
        if importlib.util.find_spec("triton"):
            return TritonAttention()
        log.warning("attention falls back to torch, several times slower", reason="triton is not installed")
        return TorchAttention()
    loaded = native_kernels.load()
    if loaded:
        return NativeAttention()
    log.warning("attention falls back to torch, several times slower", reason=loaded.reason)
    return TorchAttention()
