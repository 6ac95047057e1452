"""Triton kernels over paged KV memory: attention of a mixed batch, of a decode split over its context, and the storing of K and V.

After vLLM's unified kernel (arXiv 2511.11581): the query heads that share a key-value head are rows of one matrix product, grids
depend on sizes that the host knows, so that a CUDA graph can hold them, and a decode is split over its context (FlashDecoding,
Dao et al. 2023) where its sequences alone would not fill the device. Softmax is computed online in base 2 (FlashAttention 2).

Only compiled, or interpreted with TRITON_INTERPRET=1; `triton_attention` calls them.
"""

# Triton's functions read their types off the call, and their names are those of tensors and sizes.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def store(
    k, v, k_cache, v_cache, slots,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, k_stride_block, k_stride_head, v_stride_block, v_stride_head,
    K_SIZE: tl.constexpr, V_SIZE: tl.constexpr, K_PADDED: tl.constexpr, V_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, KV heads)."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    d = tl.arange(0, K_PADDED)
    row = tl.load(k + token * k_stride_t + head * k_stride_h + d, mask=d < K_SIZE)
    tl.store(k_cache + block * k_stride_block + head * k_stride_head + offset * K_SIZE + d, row, mask=d < K_SIZE)
    e = tl.arange(0, V_PADDED)
    row = tl.load(v + token * v_stride_t + head * v_stride_h + e, mask=e < V_SIZE)
    tl.store(v_cache + block * v_stride_block + head * v_stride_head + offset * V_SIZE + e, row, mask=e < V_SIZE)


@triton.jit
def _attend_tiles(
    q_MD, k_cache, v_cache, table, kv_head, position_M, first_tile, end_tile, limit, scale, softcap, window, m_M, l_M, acc_ME,
    k_stride_block, k_stride_head, v_stride_block, v_stride_head,
    K_SIZE: tl.constexpr, V_SIZE: tl.constexpr, K_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Tiles `first_tile : end_tile` of the keys before `limit`, into the running maximum, sum and output of each row."""
    d, e = tl.arange(0, K_PADDED), tl.arange(0, V_PADDED)
    for tile in range(first_tile, end_tile):
        n = tile * TILE + tl.arange(0, TILE)
        there = n < limit
        block_N = tl.load(table + n // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        offset_N = n % BLOCK_SIZE
        k_DN = tl.load(
            k_cache + block_N[None, :] * k_stride_block + kv_head * k_stride_head + offset_N[None, :] * K_SIZE + d[:, None],
            mask=there[None, :] & (d[:, None] < K_SIZE),
            other=0.0,
        )
        scores_MN = tl.dot(q_MD, k_DN, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            ratio_MN = scores_MN / softcap
            fall_MN = tl.exp2(tl.abs(ratio_MN) * (-2.0 * LOG2E))  # tanh, which Triton has not on every device
            tanh_MN = (1.0 - fall_MN) / (1.0 + fall_MN)
            scores_MN = softcap * tl.where(ratio_MN < 0, -tanh_MN, tanh_MN)
        seen_MN = there[None, :] & (n[None, :] <= position_M[:, None])
        if HAS_WINDOW:
            seen_MN = seen_MN & (n[None, :] > position_M[:, None] - window)
        scores_MN = tl.where(seen_MN, scores_MN * LOG2E, float("-inf"))
        new_M = tl.maximum(m_M, tl.max(scores_MN, 1))
        pivot_M = tl.where(new_M == float("-inf"), 0.0, new_M)  # nothing seen yet
        p_MN = tl.exp2(scores_MN - pivot_M[:, None])
        kept_M = tl.exp2(m_M - pivot_M)
        l_M = l_M * kept_M + tl.sum(p_MN, 1)
        v_NE = tl.load(
            v_cache + block_N[:, None] * v_stride_block + kv_head * v_stride_head + offset_N[:, None] * V_SIZE + e[None, :],
            mask=there[:, None] & (e[None, :] < V_SIZE),
            other=0.0,
        )
        acc_ME = acc_ME * kept_M[:, None] + tl.dot(p_MN.to(v_NE.dtype), v_NE, input_precision="ieee")
        m_M = new_M
    return m_M, l_M, acc_ME


@triton.jit
def attend(
    out, q, k_cache, v_cache, tables, starts, lens, sinks, scale, softcap, window, num_seqs,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h, table_stride,
    k_stride_block, k_stride_head, v_stride_block, v_stride_head,
    GROUP: tl.constexpr, K_SIZE: tl.constexpr, V_SIZE: tl.constexpr, K_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Any mixed batch. Grid (at least sum of ceil(queries / BLOCK_Q), KV heads): a program has BLOCK_Q queries of one sequence and
    the GROUP heads that share a key-value head as its rows."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    low, high = 0, num_seqs
    while low < high:  # whose block it is: sequence s has those from starts[s] // BLOCK_Q + s on
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    start = tl.load(starts + seq)
    num_queries = tl.load(starts + seq + 1) - start
    first = (block - start // BLOCK_Q - seq) * BLOCK_Q
    if first < num_queries:
        context_len = tl.load(lens + seq)
        row = tl.arange(0, BLOCK_M)
        query_M = first + row // GROUP
        head_M = kv_head * GROUP + row % GROUP
        real_M = (row // GROUP < BLOCK_Q) & (query_M < num_queries)
        position_M = context_len - num_queries + query_M
        d, e = tl.arange(0, K_PADDED), tl.arange(0, V_PADDED)
        q_MD = tl.load(
            q + (start + query_M).to(tl.int64)[:, None] * q_stride_t + head_M[:, None] * q_stride_h + d[None, :],
            mask=real_M[:, None] & (d[None, :] < K_SIZE),
            other=0.0,
        )
        if HAS_SINKS:
            m_M = tl.load(sinks + head_M, mask=real_M, other=0.0).to(tl.float32) * LOG2E
            l_M = tl.full([BLOCK_M], 1.0, tl.float32)
        else:
            m_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l_M = tl.zeros([BLOCK_M], tl.float32)
        acc_ME = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
        limit = context_len - num_queries + tl.minimum(first + BLOCK_Q, num_queries)
        first_tile = 0
        if HAS_WINDOW:
            first_tile = tl.maximum(context_len - num_queries + first - window + 1, 0) // TILE
        m_M, l_M, acc_ME = _attend_tiles(
            q_MD, k_cache, v_cache, tables + seq * table_stride, kv_head, position_M, first_tile, tl.cdiv(limit, TILE), limit,
            scale, softcap, window, m_M, l_M, acc_ME, k_stride_block, k_stride_head, v_stride_block, v_stride_head,
            K_SIZE, V_SIZE, K_PADDED, V_PADDED, BLOCK_SIZE, TILE, HAS_SOFTCAP, HAS_WINDOW,
        )  # fmt: skip
        acc_ME = acc_ME / tl.where(l_M == 0.0, 1.0, l_M)[:, None]  # of no row that is kept
        tl.store(
            out + (start + query_M).to(tl.int64)[:, None] * out_stride_t + head_M[:, None] * out_stride_h + e[None, :],
            acc_ME.to(out.dtype.element_ty),
            mask=real_M[:, None] & (e[None, :] < V_SIZE),
        )


@triton.jit
def attend_part(
    parts, maxima, sums, q, k_cache, v_cache, tables, starts, lens, scale, softcap, window,
    q_stride_t, q_stride_h, table_stride, k_stride_block, k_stride_head, v_stride_block, v_stride_head,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, K_SIZE: tl.constexpr, V_SIZE: tl.constexpr, K_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, NUM_PARTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One query a sequence, over one of the NUM_PARTS of its context. Grid (sequences, KV heads, parts); `parts` [S, H, NUM_PARTS, V_PADDED],
    `maxima` and `sums` [S, H, NUM_PARTS], all float32."""
    seq, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(lens + seq)
    first_tile = 0
    if HAS_WINDOW:
        first_tile = tl.maximum(context_len - window, 0) // TILE
    num_tiles = tl.cdiv(tl.cdiv(context_len, TILE) - first_tile, NUM_PARTS)
    first_tile += part * num_tiles
    end_tile = tl.minimum(first_tile + num_tiles, tl.cdiv(context_len, TILE))
    row = tl.arange(0, BLOCK_M)
    head_M = kv_head * GROUP + row
    real_M = row < GROUP
    d, e = tl.arange(0, K_PADDED), tl.arange(0, V_PADDED)
    q_MD = tl.load(
        q + tl.load(starts + seq).to(tl.int64) * q_stride_t + head_M[:, None] * q_stride_h + d[None, :],
        mask=real_M[:, None] & (d[None, :] < K_SIZE),
        other=0.0,
    )
    m_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    acc_ME = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    position_M = tl.zeros([BLOCK_M], tl.int32) + context_len - 1
    m_M, l_M, acc_ME = _attend_tiles(
        q_MD, k_cache, v_cache, tables + seq * table_stride, kv_head, position_M, first_tile, end_tile, context_len,
        scale, softcap, window, m_M, l_M, acc_ME, k_stride_block, k_stride_head, v_stride_block, v_stride_head,
        K_SIZE, V_SIZE, K_PADDED, V_PADDED, BLOCK_SIZE, TILE, HAS_SOFTCAP, HAS_WINDOW,
    )  # fmt: skip
    at_M = (seq.to(tl.int64) * NUM_HEADS + head_M) * NUM_PARTS + part
    tl.store(maxima + at_M, m_M, mask=real_M)
    tl.store(sums + at_M, l_M, mask=real_M)
    tl.store(parts + at_M[:, None] * V_PADDED + e[None, :], acc_ME, mask=real_M[:, None] & (e[None, :] < V_PADDED))


@triton.jit
def merge_parts(
    out, parts, maxima, sums, starts, sinks, out_stride_t, out_stride_h,
    NUM_HEADS: tl.constexpr, V_SIZE: tl.constexpr, V_PADDED: tl.constexpr, NUM_PARTS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, query heads)."""
    seq, head = tl.program_id(0), tl.program_id(1)
    at = (seq.to(tl.int64) * NUM_HEADS + head) * NUM_PARTS
    p, e = tl.arange(0, NUM_PARTS), tl.arange(0, V_PADDED)
    m_P = tl.load(maxima + at + p)
    largest = tl.max(m_P, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        largest = tl.maximum(largest, sink)
    kept_P = tl.exp2(m_P - largest)
    total = tl.sum(tl.load(sums + at + p) * kept_P, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - largest)
    acc_PE = tl.load(parts + (at + p)[:, None] * V_PADDED + e[None, :])
    acc_E = tl.sum(acc_PE * kept_P[:, None], 0) / total
    token = tl.load(starts + seq).to(tl.int64)
    tl.store(out + token * out_stride_t + head * out_stride_h + e, acc_E.to(out.dtype.element_ty), mask=e < V_SIZE)
