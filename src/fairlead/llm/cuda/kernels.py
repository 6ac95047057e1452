"""Triton kernels for what stands between a layer's projections: norms, rotation with the storing of K and V, the gate of an MLP.

One pass over memory each, where torch's operators would take five to ten. They round where kernels/gemm.cpp and the functions of
`fairlead.llm.decoder` round. Only compiled, or interpreted with TRITON_INTERPRET=1.
"""

# Triton's functions read their types off the call, and their names are those of tensors and sizes.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _normed(x, weight, size, eps, ROUND_FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """RMSNorm of a float32 row that is zero beyond `size`, in DTYPE."""
    wide = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    if ROUND_FIRST:
        return (wide.to(DTYPE).to(tl.float32) * weight).to(DTYPE)
    return (wide * weight).to(DTYPE)


@triton.jit
def add_norm(
    x, y, weight, out, size, eps, scale, HAS_Y: tl.constexpr, ROUND_FIRST: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """x += scale * y in place, out = norm(x). Grid (rows); rows are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PADDED)
    there = c < size
    dtype = x.dtype.element_ty
    x_C = tl.load(x + row * size + c, mask=there, other=0.0).to(tl.float32)
    if HAS_Y:
        y_C = (tl.load(y + row * size + c, mask=there, other=0.0).to(tl.float32) * scale).to(dtype).to(tl.float32)
        x_C = (x_C + y_C).to(dtype)
        tl.store(x + row * size + c, x_C, mask=there)
        x_C = x_C.to(tl.float32)
    w_C = tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * size + c, _normed(x_C, w_C, size, eps, ROUND_FIRST, dtype), mask=there)


@triton.jit
def add_normed(x, y, weight, size, eps, ROUND_FIRST: tl.constexpr, PADDED: tl.constexpr):
    """x += norm(y) in place. Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PADDED)
    there = c < size
    y_C = tl.load(y + row * size + c, mask=there, other=0.0).to(tl.float32)
    w_C = tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    x_C = tl.load(x + row * size + c, mask=there, other=0.0).to(tl.float32)
    x_C += _normed(y_C, w_C, size, eps, ROUND_FIRST, x.dtype.element_ty).to(tl.float32)
    tl.store(x + row * size + c, x_C.to(x.dtype.element_ty), mask=there)


@triton.jit
def _half_norm(a, b, weight, d, half, size, eps, HALF_PADDED: tl.constexpr, ROUND_FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """RMSNorm of a head that is held in two halves."""
    there = d < half
    root = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / size + eps)
    wa = tl.load(weight + d, mask=there, other=0.0).to(tl.float32)
    wb = tl.load(weight + half + d, mask=there, other=0.0).to(tl.float32)
    if ROUND_FIRST:
        a, b = (a * root).to(DTYPE).to(tl.float32) * wa, (b * root).to(DTYPE).to(tl.float32) * wb
    else:
        a, b = a * root * wa, b * root * wb
    return a.to(DTYPE).to(tl.float32), b.to(DTYPE).to(tl.float32)


@triton.jit
def rope_store(
    qkv, positions, slots, cos, sin, k_cache, v_cache, q_norm, k_norm, eps,
    stride_t, k_stride_block, k_stride_head, v_stride_block, v_stride_head,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROTATES: tl.constexpr, NORMS: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """Queries are normed and rotated in place, keys on their way to their slot, values go there as they are.
    Grid (tokens, query heads + 2 * KV heads); heads of `qkv` lie side by side."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = SIZE // 2
    d = tl.arange(0, HALF_PADDED)
    there = d < HALF
    row = qkv + token * stride_t + head * SIZE
    dtype = qkv.dtype.element_ty
    a = tl.load(row + d, mask=there, other=0.0)
    b = tl.load(row + HALF + d, mask=there, other=0.0)
    slot = tl.load(slots + token)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    if head < NUM_HEADS + NUM_KV_HEADS:
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        if NORMS:
            weight = q_norm
            if head >= NUM_HEADS:
                weight = k_norm
            wide_a, wide_b = _half_norm(wide_a, wide_b, weight, d, HALF, SIZE, eps, HALF_PADDED, ROUND_FIRST, dtype)
        if ROTATES:
            position = tl.load(positions + token)
            cos_D = tl.load(cos + position * HALF + d, mask=there, other=0.0)
            sin_D = tl.load(sin + position * HALF + d, mask=there, other=0.0)
            wide_a, wide_b = wide_a * cos_D - wide_b * sin_D, wide_b * cos_D + wide_a * sin_D
        to = row
        if head >= NUM_HEADS:
            to = k_cache + block * k_stride_block + (head - NUM_HEADS) * k_stride_head + offset * SIZE
        tl.store(to + d, wide_a.to(dtype), mask=there)
        tl.store(to + HALF + d, wide_b.to(dtype), mask=there)
    else:
        to = v_cache + block * v_stride_block + (head - NUM_HEADS - NUM_KV_HEADS) * v_stride_head + offset * SIZE
        tl.store(to + d, a, mask=there)
        tl.store(to + HALF + d, b, mask=there)


@triton.jit
def gated(both, out, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out = act(gate) * up, where `both` has gate and up side by side. Grid (rows, ceil(size / BLOCK)). ACTIVATION: 1 silu,
    2 gelu by tanh, 3 gelu."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < size
    gate = tl.load(both + row * 2 * size + n, mask=there, other=0.0)
    up = tl.load(both + row * 2 * size + size + n, mask=there, other=0.0)
    wide = gate.to(tl.float32)
    if ACTIVATION == 1:
        wide = wide / (1.0 + tl.exp(-wide))
    elif ACTIVATION == 2:
        inner = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)  # 2 sqrt(2 / pi): tanh(z) = 1 - 2 / (exp(2z) + 1)
        wide = wide / (1.0 + tl.exp(-inner))
    else:
        wide = 0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476))
    tl.store(out + row * size + n, wide.to(gate.dtype) * up, mask=there)
