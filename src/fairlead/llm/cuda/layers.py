"""What stands between a layer's projections, on CUDA devices: the kernels with the arguments of `torch.ops.fairlead`."""

from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = {"silu": 1, "gelu_tanh": 2, "gelu": 3}
GATE_BLOCK = 1024


class TritonLayers:
    """float32, bfloat16 and float16; rows are contiguous."""

    def __init__(self) -> None:
        from fairlead.llm.cuda import kernels  # Triton is there where CUDA is

        self.kernels: Any = kernels

    def add_norm(self, x_TC: Tensor, y_TC: Tensor | None, weight: Tensor, eps: float, scale: float, round_first: bool) -> Tensor:
        """x += scale * y in place, then the norm of x."""
        out_TC = torch.empty_like(x_TC)
        size = x_TC.shape[1]
        self.kernels.add_norm[(len(x_TC),)](
            x_TC, x_TC if y_TC is None else y_TC, weight, out_TC, size, eps, scale,
            HAS_Y=y_TC is not None, ROUND_FIRST=round_first, PADDED=next_power(size), num_warps=_warps(size),
        )  # fmt: skip
        return out_TC

    def add_normed(self, x_TC: Tensor, y_TC: Tensor, weight: Tensor, eps: float, round_first: bool) -> None:
        """x += norm(y) in place."""
        size = x_TC.shape[1]
        self.kernels.add_normed[(len(x_TC),)](
            x_TC, y_TC, weight, size, eps, ROUND_FIRST=round_first, PADDED=next_power(size), num_warps=_warps(size)
        )

    def rope_store(
        self,
        qkv: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        cos_LD: Tensor | None,
        sin_LD: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        num_heads: int,
        eps: float,
        round_first: bool,
    ) -> None:
        """Queries of `qkv` in place, keys and values to their slots. `q_norm`, `k_norm`: [D], both or none."""
        num_kv_heads, block_size, size = k_cache.shape[1:]
        assert (q_norm is None) == (k_norm is None)
        assert q_norm is None or q_norm.numel() == size, "a norm over a whole projection"
        self.kernels.rope_store[(len(qkv), num_heads + 2 * num_kv_heads)](
            qkv, positions_T, slots_T, qkv if cos_LD is None else cos_LD, qkv if sin_LD is None else sin_LD, k_cache, v_cache,
            qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, eps,
            qkv.stride(0), *k_cache.stride()[:2], *v_cache.stride()[:2],
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, SIZE=size, HALF_PADDED=next_power(size // 2), BLOCK_SIZE=block_size,
            ROTATES=cos_LD is not None, NORMS=q_norm is not None, ROUND_FIRST=round_first, num_warps=1,
        )  # fmt: skip

    def gated(self, both_TN: Tensor, activation: str) -> Tensor:
        """act(gate) * up of [T, 2 N]."""
        size = both_TN.shape[1] // 2
        out_TN = both_TN.new_empty(len(both_TN), size)
        self.kernels.gated[(len(both_TN), -(-size // GATE_BLOCK))](
            both_TN, out_TN, size, ACTIVATION=ACTIVATIONS[activation], BLOCK=GATE_BLOCK, num_warps=4
        )
        return out_TN


def next_power(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _warps(size: int) -> int:
    return min(16, max(1, next_power(size) // 256))
