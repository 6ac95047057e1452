"""Attention by the C++ kernel of `fairlead.llm.kernels`, which reads K and V where they lie."""

import torch

from fairlead.llm.batch import AttentionSpec, LayerCache, StepBatch


class NativeAttention:
    """Float32 and bfloat16 on a CPU. The kernels must have been loaded."""

    name = "native"

    def __init__(self, *, fixed: bool = False) -> None:
        self.fixed = fixed
        """A token's result has the same bits whatever tokens are computed with it."""

    def store(self, k_TKD: torch.Tensor, v_TKE: torch.Tensor, layer: LayerCache, slots_T: torch.Tensor) -> None:
        torch.ops.fairlead.store(k_TKD, v_TKE, layer.k, layer.v, slots_T)

    def attend(self, q_THD: torch.Tensor, layer: LayerCache, batch: StepBatch, spec: AttentionSpec) -> torch.Tensor:
        """[T, H, Dv], in the dtype of `q_THD`; only its last dimension must be contiguous."""
        out_THE: torch.Tensor = torch.ops.fairlead.attend(
            q_THD,
            layer.k,
            layer.v,
            batch.query_starts_S1,
            batch.context_lens_S,
            batch.block_tables_SB,
            spec.scale,
            spec.window,
            spec.softcap,
            spec.sinks_H,
            None,
            self.fixed,
        )
        return out_THE
