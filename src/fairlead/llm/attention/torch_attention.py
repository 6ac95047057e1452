"""Attention by torch's own ops: K and V are gathered from their blocks, then `scaled_dot_product_attention`.

Query heads that share a key-value head become rows of one query, because on a CPU `enable_gqa=True` costs four times as much.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F

from fairlead.llm.batch import AttentionSpec, LayerCache, StepBatch


class TorchAttention:
    name = "torch"
    fixed = False

    def store(self, k_TKD: torch.Tensor, v_TKE: torch.Tensor, layer: LayerCache, slots_T: torch.Tensor) -> None:
        block_size = layer.k.shape[2]
        blocks_T, offsets_T = slots_T // block_size, slots_T % block_size
        layer.k[blocks_T, :, offsets_T] = k_TKD
        layer.v[blocks_T, :, offsets_T] = v_TKE

    def attend(self, q_THD: torch.Tensor, layer: LayerCache, batch: StepBatch, spec: AttentionSpec) -> torch.Tensor:
        """[T, H, Dv], in the dtype of `q_THD`."""
        starts, lens = batch.query_starts_S1.tolist(), batch.context_lens_S.tolist()
        out_THE = q_THD.new_empty(*q_THD.shape[:2], layer.v.shape[3])
        # Decodes of one power of two are padded to the longest among them: one long context does not blow up the short ones.
        decodes: dict[int, list[int]] = defaultdict(list)
        for s, context_len in enumerate(lens):
            start, end = starts[s], starts[s + 1]
            if end - start == 1:
                decodes[context_len.bit_length()].append(s)
            elif end > start:
                out_THE[start:end] = self._prefill(q_THD[start:end], layer, batch.block_tables_SB[s], context_len, spec)
        for sequences in decodes.values():
            chosen_R = torch.tensor(sequences, device=q_THD.device)
            rows_R = batch.query_starts_S1[chosen_R].long()
            longest = max(lens[s] for s in sequences)
            out_THE[rows_R] = self._decode(
                q_THD[rows_R], layer, batch.block_tables_SB[chosen_R], batch.context_lens_S[chosen_R], longest, spec
            )
        return out_THE

    def _decode(
        self,
        q_RHD: torch.Tensor,
        layer: LayerCache,
        tables_RB: torch.Tensor,
        lens_R: torch.Tensor,
        longest: int,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        num_kv_heads = layer.k.shape[1]
        k_RKND, v_RKNE = _gather(layer, tables_RB, longest)
        positions_N = torch.arange(longest, device=q_RHD.device)
        seen_RN = positions_N < lens_R[:, None]
        if spec.window:
            seen_RN &= positions_N >= lens_R[:, None] - spec.window
        q_RKGD = q_RHD.unflatten(1, (num_kv_heads, -1))
        sinks_KG = None if spec.sinks_H is None else spec.sinks_H.view(num_kv_heads, -1)
        out_RKGE = _attention(q_RKGD, k_RKND, v_RKNE, seen_RN[:, None, None], False, spec, sinks_KG)
        return out_RKGE.flatten(1, 2)

    def _prefill(
        self, q_LHD: torch.Tensor, layer: LayerCache, table_B: torch.Tensor, context_len: int, spec: AttentionSpec
    ) -> torch.Tensor:
        num_kv_heads, query_len = layer.k.shape[1], len(q_LHD)
        k_1KND, v_1KNE = _gather(layer, table_B[None], context_len)
        # Here a group's heads are a batch whose K and V have stride 0: a causal mask needs its rows to be tokens.
        q_GKLD = q_LHD.unflatten(1, (num_kv_heads, -1)).permute(2, 1, 0, 3)
        group = q_GKLD.shape[0]
        k_GKND, v_GKNE = k_1KND.expand(group, -1, -1, -1), v_1KNE.expand(group, -1, -1, -1)
        seen_LN = None
        if spec.window or query_len < context_len or spec.softcap or spec.sinks_H is not None:
            positions_L1 = torch.arange(context_len - query_len, context_len, device=q_LHD.device)[:, None]
            positions_N = torch.arange(context_len, device=q_LHD.device)
            seen_LN = positions_N <= positions_L1
            if spec.window:
                seen_LN &= positions_N > positions_L1 - spec.window
        sinks_GK1 = None if spec.sinks_H is None else spec.sinks_H.view(num_kv_heads, -1).T[..., None]
        out_GKLE = _attention(q_GKLD, k_GKND, v_GKNE, seen_LN, seen_LN is None, spec, sinks_GK1)
        return out_GKLE.permute(2, 1, 0, 3).flatten(1, 2)


def _gather(layer: LayerCache, tables_RB: torch.Tensor, context_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the first `context_len` tokens, [R, K, context_len, D]."""
    blocks_RB = tables_RB[:, : -(-context_len // layer.k.shape[2])].long()
    k, v = (cache[blocks_RB].transpose(1, 2).flatten(2, 3)[:, :, :context_len] for cache in (layer.k, layer.v))
    return k, v


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [.., .., M, D], k [.., .., N, D], v [.., .., N, Dv]; seen: bool, broadcast to [.., .., M, N]; sinks: broadcast to [.., .., M]."""
    if not spec.softcap and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=spec.scale)
    scores = (q @ k.transpose(-1, -2)).float() * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(scores.shape[:-1])[..., None]], -1)
    return scores.softmax(-1)[..., : k.shape[-2]].to(v.dtype) @ v
