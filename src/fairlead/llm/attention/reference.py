"""The oracle: what attention means, in float32, one query of one head at a time. Slow, and meant to be obvious."""

import torch

from fairlead.llm.batch import AttentionSpec, LayerCache, StepBatch


class ReferenceAttention:
    name = "reference"
    fixed = False

    def store(self, k_TKD: torch.Tensor, v_TKE: torch.Tensor, layer: LayerCache, slots_T: torch.Tensor) -> None:
        block_size = layer.k.shape[2]
        for t, slot in enumerate(slots_T.tolist()):
            layer.k[slot // block_size, :, slot % block_size] = k_TKD[t]
            layer.v[slot // block_size, :, slot % block_size] = v_TKE[t]

    def attend(self, q_THD: torch.Tensor, layer: LayerCache, batch: StepBatch, spec: AttentionSpec) -> torch.Tensor:
        """[T, H, Dv], in the dtype of `q_THD`."""
        group = q_THD.shape[1] // layer.k.shape[1]
        block_size = layer.k.shape[2]
        out_THE = q_THD.new_empty(*q_THD.shape[:2], layer.v.shape[3])
        starts = batch.query_starts_S1.tolist()
        for s, context_len in enumerate(batch.context_lens_S.tolist()):
            blocks = batch.block_tables_SB[s, : -(-context_len // block_size)].long()
            k_NKD, v_NKE = (cache[blocks].transpose(1, 2).flatten(0, 1).float() for cache in (layer.k, layer.v))
            for t in range(starts[s], starts[s + 1]):
                last = context_len - starts[s + 1] + t
                first = max(0, last - spec.window + 1) if spec.window else 0
                for h in range(q_THD.shape[1]):
                    k_ND, v_NE = k_NKD[first : last + 1, h // group], v_NKE[first : last + 1, h // group]
                    scores_N = k_ND @ q_THD[t, h].float() * spec.scale
                    if spec.softcap:
                        scores_N = spec.softcap * torch.tanh(scores_N / spec.softcap)
                    if spec.sinks_H is not None:
                        scores_N = torch.cat([scores_N, spec.sinks_H[h : h + 1].float()])
                    out_THE[t, h] = (scores_N.softmax(0)[: len(v_NE)] @ v_NE).to(q_THD.dtype)
        return out_THE
