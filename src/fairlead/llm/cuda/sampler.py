"""Tokens drawn on the device: what comes back to the host is a number for each sequence, not its logits.

Rows draw as `fairlead.llm.sampler` draws them, by the inverse of the cumulative distribution at the same uniform number of their seed and
position, so that a seed gives the same answer on either, up to the rounding of sums. Rows with penalties, bias, a grammar or
log-probabilities go the host's way.
"""

from collections.abc import Sequence

import torch

from fairlead.llm.sampler import MIN_TEMPERATURE, Sampled, Sampler, SampleRow, likeliest, sampled

MAX_TOP_K = 1024
"""Above it the whole row is sorted."""


class CudaSampler(Sampler):
    def sample(self, logits_NV: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        drawn = [n for n, row in enumerate(rows) if row.on_device and not row.greedy]
        if not drawn:
            return super().sample(logits_NV, rows)
        ids = iter(draw(logits_NV if len(drawn) == len(rows) else logits_NV[drawn], [rows[n] for n in drawn]).tolist())
        at = set(drawn)
        others = [n for n in range(len(rows)) if n not in at]
        rest = iter(super().sample(logits_NV[others], [rows[n] for n in others]) if others else ())
        return [sampled(next(ids)) if n in at else next(rest) for n in range(len(rows))]

    def choose(self, logits_NV: torch.Tensor, rows: Sequence[SampleRow], ahead: Sequence[int]) -> torch.Tensor:
        drawn = [n for n, row in enumerate(rows) if not row.greedy]
        if drawn and len(drawn) == len(rows):
            return draw(logits_NV, rows, ahead)
        ids_N = likeliest(logits_NV)
        if drawn:
            at_D = _on(logits_NV.device, drawn, torch.int64)
            ids_D = draw(logits_NV.index_select(0, at_D), [rows[n] for n in drawn], [ahead[n] for n in drawn])
            ids_N = ids_N.index_copy(0, at_D, ids_D)
        return ids_N


def _on(device: torch.device, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """On its way from memory that the device reads by itself: a copy from any other would wait for what the device has to do.
    Torch keeps such memory until it is read."""
    pinned = device.type != "cpu"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def draw(logits_NV: torch.Tensor, rows: Sequence[SampleRow], ahead: Sequence[int] = ()) -> torch.Tensor:
    """[N] int64: a token for each row; -1 where its logits are not usable. `ahead`: as `choose` takes it; (): 0 for each."""

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return _on(logits_NV.device, values, dtype)[:, None]

    samplings = [row.sampling for row in rows]
    temperature_N1 = column([max(sampling.temperature or 0.0, MIN_TEMPERATURE) for sampling in samplings])
    wide_NV = logits_NV.float()
    largest_N1 = wide_NV.max(-1, keepdim=True).values
    weights_NV = ((wide_NV - largest_N1) / temperature_N1).exp_()
    # Every filter keeps the weights from some threshold on, and the largest weight is 1.
    threshold_N1 = column([sampling.min_p or 0.0 for sampling in samplings])
    vocab_size = logits_NV.shape[1]
    top_ks = [min(top_k, vocab_size) if (top_k := sampling.top_k or 0) > 0 else vocab_size for sampling in samplings]
    top_ps = [1.0 if sampling.top_p is None else sampling.top_p for sampling in samplings]
    most = max((top_k for top_k in top_ks if top_k < vocab_size), default=0)
    ordered_NK = None
    if any(top_p < 1.0 for top_p in top_ps) or most > MAX_TOP_K:
        ordered_NK = weights_NV.sort(-1, descending=True).values
    elif most:
        ordered_NK = weights_NV.topk(most, -1).values
    if ordered_NK is not None and most:
        last_N1 = column([min(top_k, ordered_NK.shape[1]) - 1 for top_k in top_ks], torch.int64)
        kept_N1 = column([top_k < vocab_size for top_k in top_ks], torch.bool)
        threshold_N1 = torch.where(kept_N1, torch.maximum(threshold_N1, ordered_NK.gather(1, last_N1)), threshold_N1)
    if ordered_NK is not None and any(top_p < 1.0 for top_p in top_ps):
        top_p_N1 = column(top_ps, torch.float64)
        sums_NV = torch.where(ordered_NK >= threshold_N1, ordered_NK, 0.0).cumsum(-1, dtype=torch.float64)
        # the fewest tokens that hold `top_p` of what is left (Holtzman et al. 2020)
        place_N1 = torch.searchsorted(sums_NV, top_p_N1 * sums_NV[:, -1:]).clamp_(max=vocab_size - 1)
        nucleus_N1 = ordered_NK.gather(1, place_N1)
        threshold_N1 = torch.where(top_p_N1 < 1.0, torch.maximum(threshold_N1, nucleus_N1), threshold_N1)
    weights_NV = torch.where(weights_NV >= threshold_N1, weights_NV, 0.0)
    sums_NV = weights_NV.cumsum(-1, dtype=torch.float64)
    uniforms = [row.uniform(num) for row, num in zip(rows, ahead or [0] * len(rows), strict=True)]
    target_N1 = column(uniforms, torch.float64) * sums_NV[:, -1:]
    ids_N = torch.searchsorted(sums_NV, target_N1, right=True).squeeze(1)
    last_N = vocab_size - 1 - (weights_NV > 0).flip(-1).int().argmax(-1)  # what rounding leads past the end
    return torch.where(largest_N1.squeeze(1).isfinite(), torch.minimum(ids_N, last_N), -1)
