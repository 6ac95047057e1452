"""Attention by Triton kernels on CUDA devices; under Triton's interpreter on the CPU, too, where tests hold it against the oracle."""

from dataclasses import dataclass
from typing import Any

import torch

from fairlead.llm.batch import AttentionSpec, LayerCache, StepBatch
from fairlead.llm.cuda.layers import next_power

MAX_PARTS = 32
"""Of one sequence's context, in a decode."""
TILES_OF_PART = 2
"""A part of fewer costs more to merge than it saves."""
PROGRAMS_OF_DEVICE = 2
"""For each multiprocessor, of a decode: with fewer the device is not full."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes that change the time and not the result. The defaults are those of the published kernel for 16-bit heads of 128."""

    prefill_rows: int = 64
    """Queries times the heads that share keys, of one program."""
    prefill_tile: int = 64
    """Keys that are read at a time."""
    prefill_warps: int = 4
    prefill_stages: int = 3
    decode_tile: int = 64
    decode_warps: int = 4
    decode_stages: int = 3


class TritonAttention:
    """float32, bfloat16 and float16. `num_processors` 0: the device's own number of multiprocessors."""

    name = "triton"
    fixed = False

    def __init__(self, tuning: Tuning | None = None, *, num_processors: int = 0) -> None:
        from fairlead.llm.attention import triton_kernels  # Triton is there where CUDA is

        self.kernels: Any = triton_kernels
        self.tuning = tuning or Tuning()
        self.num_processors = num_processors or torch.cuda.get_device_properties().multi_processor_count

    def store(self, k_TKD: torch.Tensor, v_TKE: torch.Tensor, layer: LayerCache, slots_T: torch.Tensor) -> None:
        (num_tokens, num_heads, k_size), v_size = k_TKD.shape, v_TKE.shape[2]
        self.kernels.store[(num_tokens, num_heads)](
            k_TKD, v_TKE, layer.k, layer.v, slots_T,
            *k_TKD.stride()[:2], *v_TKE.stride()[:2], *layer.k.stride()[:2], *layer.v.stride()[:2],
            K_SIZE=k_size, V_SIZE=v_size, K_PADDED=next_power(k_size), V_PADDED=next_power(v_size), BLOCK_SIZE=layer.k.shape[2], num_warps=1,
        )  # fmt: skip

    def attend(self, q_THD: torch.Tensor, layer: LayerCache, batch: StepBatch, spec: AttentionSpec) -> torch.Tensor:
        """[T, H, Dv], in the dtype of `q_THD`; only its last dimension must be contiguous."""
        out_THE = q_THD.new_empty(*q_THD.shape[:2], layer.v.shape[3])
        if batch.max_query_len == 1:
            self._decode(out_THE, q_THD, layer, batch, spec)
        else:
            self._mixed(out_THE, q_THD, layer, batch, spec)
        return out_THE

    def _mixed(self, out_THE: torch.Tensor, q_THD: torch.Tensor, layer: LayerCache, batch: StepBatch, spec: AttentionSpec) -> None:
        tuning, group, num_seqs = self.tuning, q_THD.shape[1] // layer.k.shape[1], len(batch.context_lens_S)
        num_rows = max(next_power(group), tuning.prefill_rows)
        num_queries = num_rows // group
        self.kernels.attend[(len(q_THD) // num_queries + num_seqs, layer.k.shape[1])](
            out_THE, q_THD, layer.k, layer.v, batch.block_tables_SB, batch.query_starts_S1, batch.context_lens_S,
            q_THD if spec.sinks_H is None else spec.sinks_H, spec.scale, spec.softcap, spec.window, num_seqs,
            *q_THD.stride()[:2], *out_THE.stride()[:2], batch.block_tables_SB.stride(0), *layer.k.stride()[:2], *layer.v.stride()[:2],
            **_sizes(group, layer, spec), BLOCK_Q=num_queries, BLOCK_M=num_rows, TILE=tuning.prefill_tile,
            HAS_SINKS=spec.sinks_H is not None, num_warps=tuning.prefill_warps, num_stages=tuning.prefill_stages,
        )  # fmt: skip

    def _decode(self, out_THE: torch.Tensor, q_THD: torch.Tensor, layer: LayerCache, batch: StepBatch, spec: AttentionSpec) -> None:
        tuning, (num_heads, num_kv_heads) = self.tuning, (q_THD.shape[1], layer.k.shape[1])
        group, num_seqs = num_heads // num_kv_heads, len(batch.context_lens_S)
        num_parts = self.num_parts(num_seqs * num_kv_heads, batch.max_context_len)
        sizes = _sizes(group, layer, spec)
        parts = q_THD.new_empty(num_seqs, num_heads, num_parts, sizes["V_PADDED"], dtype=torch.float32)
        maxima, sums = (q_THD.new_empty(num_seqs, num_heads, num_parts, dtype=torch.float32) for _ in range(2))
        self.kernels.attend_part[(num_seqs, num_kv_heads, num_parts)](
            parts, maxima, sums, q_THD, layer.k, layer.v, batch.block_tables_SB, batch.query_starts_S1, batch.context_lens_S,
            spec.scale, spec.softcap, spec.window,
            *q_THD.stride()[:2], batch.block_tables_SB.stride(0), *layer.k.stride()[:2], *layer.v.stride()[:2],
            **sizes, NUM_HEADS=num_heads, BLOCK_M=max(16, next_power(group)), TILE=tuning.decode_tile, NUM_PARTS=num_parts,
            num_warps=tuning.decode_warps, num_stages=tuning.decode_stages,
        )  # fmt: skip
        self.kernels.merge_parts[(num_seqs, num_heads)](
            out_THE, parts, maxima, sums, batch.query_starts_S1, q_THD if spec.sinks_H is None else spec.sinks_H, *out_THE.stride()[:2],
            NUM_HEADS=num_heads, V_SIZE=sizes["V_SIZE"], V_PADDED=sizes["V_PADDED"], NUM_PARTS=num_parts,
            HAS_SINKS=spec.sinks_H is not None, num_warps=1,
        )  # fmt: skip

    def num_parts(self, num_programs: int, max_context_len: int) -> int:
        """A power of two, from what the host knows: a captured step keeps it."""
        wanted = -(-PROGRAMS_OF_DEVICE * self.num_processors // num_programs)
        most = max_context_len // (self.tuning.decode_tile * TILES_OF_PART)
        return next_power(max(1, min(wanted, most, MAX_PARTS)) + 1) // 2


def _sizes(group: int, layer: LayerCache, spec: AttentionSpec) -> dict[str, Any]:
    k_size, v_size = layer.k.shape[3], layer.v.shape[3]
    return {
        "GROUP": group,
        "K_SIZE": k_size,
        "V_SIZE": v_size,
        "K_PADDED": max(16, next_power(k_size)),
        "V_PADDED": max(16, next_power(v_size)),
        "BLOCK_SIZE": layer.k.shape[2],
        "HAS_SOFTCAP": spec.softcap != 0.0,
        "HAS_WINDOW": spec.window != 0,
    }
