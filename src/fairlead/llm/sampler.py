"""The next token of every sequence of a step, from its row of logits.

Which route a step takes is decided on the host before anything is computed: rows that only want the likeliest token share
one argmax over the batch, in the model's dtype; only the others get a float32 copy of their row. What a row yields depends
on its own logits and its own (seed, choice, position), never on the rows beside it.

Order of what shapes a distribution, as in vLLM 1: logit bias and tokens forbidden by `min_tokens`, repetition, frequency and
presence penalties, temperature, min_p, top_k, top_p.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fairlead.core.generation import Sampling

Row = np.ndarray[Any, np.dtype[np.float32]]

MIN_TEMPERATURE = 1e-5
"""Below it float32 cannot divide logits any more; it is as good as greedy."""

ROWS_AT_ONCE = 8
"""Rows whose float32 copies fit a core's cache together."""

NUM_UNIFORMS = 64
"""Made at a time: making a generator costs as much as a thousand of its numbers."""

SUM_SIZE = 128
"""Weights summed in float32 before their sums go on in float64: ten times cheaper than a float64 sum over all."""

NOT_FINITE = "the model's logits hold NaN or infinity, or forbid every token"


@dataclass(slots=True)
class Sampled:
    """One token and, where asked for, how likely it was before anything shaped the distribution."""

    token_id: int
    logprob: float = 0.0
    rank: int = 0
    """1 is the most likely; 0: not asked for."""
    top: Sequence[tuple[int, float]] = ()
    """(token id, log-probability) of the most likely ones, best first; the smaller id goes first where they tie."""
    error: str = ""
    """Why there is no token. The request must end; the others of the batch are unharmed."""


class SampleRow:
    """How one sequence samples, and what it must remember from token to token. It outlives preemption."""

    __slots__ = (
        "_bias",
        "_bias_ids",
        "_counts",
        "_min_tokens",
        "_stop_ids",
        "_uniforms",
        "greedy",
        "index",
        "num_generated",
        "sampling",
        "seed",
    )

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], *, seed: int, index: int = 0, stop_ids: Iterable[int] = ()) -> None:
        """`sampling`: with its defaults filled; `index`: which of the n choices; `stop_ids`: forbidden until `min_tokens`."""
        assert sampling.temperature is not None and sampling.repetition_penalty is not None
        self.sampling = sampling
        self.seed = seed
        self.index = index
        self.num_generated = 0
        self.greedy = sampling.greedy
        self._stop_ids = np.fromiter(stop_ids, np.int64)
        self._min_tokens = sampling.min_tokens if len(self._stop_ids) else 0
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32)
        self._counts: _TokenCounts | None = None
        if sampling.repetition_penalty != 1.0:
            self._counts = _TokenCounts(prompt_ids)
        elif sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = _TokenCounts(())
        self._uniforms: np.ndarray[Any, np.dtype[np.float64]] | None = None

    def push(self, token_id: int) -> None:
        """The token was accepted: the row goes on to its next position."""
        self.num_generated += 1
        if self._counts is not None:
            self._counts.add(token_id)
        if self.num_generated % NUM_UNIFORMS == 0:
            self._uniforms = None

    @property
    def plain(self) -> bool:
        """Its logits are taken as they are."""
        return self._counts is None and not len(self._bias_ids) and self.num_generated >= self._min_tokens

    def uniform(self) -> float:
        """In [0, 1), of this position and no other: element `num_generated` of the Philox stream keyed (seed, index).

        Philox4x64-10 (Salmon et al. 2011) counts instead of remembering, so that a step may be computed again.
        """
        block, place = divmod(self.num_generated, NUM_UNIFORMS)
        if self._uniforms is None:
            key = np.array([self.seed & 0xFFFF_FFFF_FFFF_FFFF, self.index], np.uint64)
            bits = np.random.Philox(key=key, counter=block * (NUM_UNIFORMS // 4))  # four numbers for each count
            self._uniforms = np.random.Generator(bits).random(NUM_UNIFORMS)
        return float(self._uniforms[place])

    def adjust(self, logits_V: Row) -> None:
        """Apply bias, forbidden tokens and penalties in place."""
        if len(self._bias_ids):
            logits_V[self._bias_ids] += self._bias
        if self.num_generated < self._min_tokens:
            logits_V[self._stop_ids[self._stop_ids < len(logits_V)]] = -np.inf
        if self._counts is not None:
            self._counts.penalize(logits_V, self.sampling)


class _TokenCounts:
    """Which tokens a sequence has, and how often it generated each: what penalties need, in memory of the distinct tokens."""

    __slots__ = ("_ids", "_num", "_places", "_times")

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_ids, np.int64))
        self._num = len(distinct)
        self._ids = np.concatenate([distinct, np.empty(64, np.int64)])
        self._times = np.zeros(len(self._ids), np.float32)
        """How often `_ids` were generated; 0: only in the prompt."""
        self._places: dict[int, int] = {token_id: place for place, token_id in enumerate(distinct.tolist())}

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, self._num)
        if place == self._num:
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._times = np.concatenate([self._times, np.zeros_like(self._times)])
            self._ids[place] = token_id
            self._num += 1
        self._times[place] += 1

    def penalize(self, logits_V: Row, sampling: Sampling) -> None:
        """Repetition (Keskar et al. 2019, CTRL) divides positive logits and multiplies negative ones, of prompt and answer;
        frequency and presence (OpenAI) subtract by what was generated."""
        ids, times = self._ids[: self._num], self._times[: self._num]
        logits = logits_V[ids]
        repetition = np.float32(sampling.repetition_penalty or 1.0)
        if repetition != 1.0:
            logits = np.where(logits > 0, logits / repetition, logits * repetition)
        logits -= np.float32(sampling.frequency_penalty) * times + np.float32(sampling.presence_penalty) * (times > 0)
        logits_V[ids] = logits


class Sampler:
    """Chooses tokens. Holds nothing between steps."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._starts = np.arange(0, vocab_size, SUM_SIZE)

    def sample(self, logits_NV: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """A token for each row, in order. A row whose logits are not usable gets an `error` in place of one.

        The caller tells each row what became of its token with `push`.
        """
        assert logits_NV.shape == (len(rows), self.vocab_size), f"{tuple(logits_NV.shape)} for {len(rows)} rows of {self.vocab_size}"
        own = [n for n, row in enumerate(rows) if not (row.greedy and row.plain) or row.sampling.logprobs is not None]
        if not own:
            return [_sampled(token_id) for token_id in _argmax(logits_NV)]
        answers = [Sampled(-1)] * len(rows) if len(own) == len(rows) else [_sampled(token_id) for token_id in _argmax(logits_NV)]
        # one transfer in the model's dtype, however many rows
        for n, logits_V in zip(own, _on_host(logits_NV if len(own) == len(rows) else logits_NV[own]), strict=True):
            answers[n] = self._sample_row(logits_V, rows[n])
        return answers

    def _sample_row(self, logits_V: Row, row: SampleRow) -> Sampled:
        """`logits_V` is not changed."""
        shaped = logits_V
        if not row.plain:
            shaped = logits_V.copy()
            row.adjust(shaped)
        likeliest = int(shaped.argmax())
        if not np.isfinite(shaped[likeliest]):
            return Sampled(-1, error=NOT_FINITE)
        token_id = likeliest if row.greedy else self._draw(shaped, row)
        if row.sampling.logprobs is None:
            return Sampled(token_id)
        return _told(logits_V, token_id, row.sampling.logprobs)

    def _draw(self, logits_V: Row, row: SampleRow) -> int:
        """By the inverse of the cumulative distribution at the row's uniform."""
        weights, ids = self.shape(logits_V, row.sampling)
        place = _place(weights, row.uniform(), self._starts if ids is None else None)
        return place if ids is None else int(ids[place])

    def shape(self, logits_V: Row, sampling: Sampling) -> tuple[Row, np.ndarray[Any, np.dtype[np.int64]] | None]:
        """Weights in proportion to the probabilities after temperature, min_p, top_k and top_p, and the ids of those
        that are left, ascending; None: all of them. Tokens that tie with the last one kept are kept as well."""
        temperature, top_k, top_p, min_p = sampling.temperature, sampling.top_k or 0, sampling.top_p, sampling.min_p or 0.0
        assert temperature is not None and top_p is not None
        with np.errstate(over="ignore", under="ignore"):
            weights = logits_V - logits_V.max()
            weights /= np.float32(max(temperature, MIN_TEMPERATURE))
            np.exp(weights, out=weights)
        # Every filter keeps the weights from some threshold on, and the largest weight is 1.
        threshold = np.float32(min_p)
        if 0 < top_k < len(weights):
            threshold = max(threshold, np.partition(weights, len(weights) - top_k)[len(weights) - top_k])
        if top_p < 1.0:
            threshold = max(threshold, _nucleus(weights, threshold, top_p))
        if threshold <= 0:
            return weights, None
        ids = np.flatnonzero(weights >= threshold)
        return weights[ids], ids

    def prompt_logprobs(self, logits_PV: torch.Tensor, next_ids: Sequence[int], count: int) -> list[Sampled]:
        """For each position of a prompt, how likely the token was that follows it, with the `count` likeliest beside it."""
        return [
            _told(logits_V, token_id, count)
            for at in range(0, len(next_ids), ROWS_AT_ONCE)
            for logits_V, token_id in zip(_on_host(logits_PV[at : at + ROWS_AT_ONCE]), next_ids[at : at + ROWS_AT_ONCE], strict=True)
        ]


def _on_host(logits_NV: torch.Tensor) -> Iterable[Row]:
    """Its rows as float32, converted a few at a time."""
    logits_NV = logits_NV.cpu()
    for at in range(0, len(logits_NV), ROWS_AT_ONCE):
        yield from logits_NV[at : at + ROWS_AT_ONCE].float().numpy()


def _argmax(logits_NV: torch.Tensor) -> list[int]:
    """The first of the largest of each row; -1 where the largest is not finite."""
    if logits_NV.device.type != "cpu":
        ids_N = logits_NV.argmax(-1)
        finite_N = logits_NV.gather(-1, ids_N[:, None]).squeeze(-1).isfinite()
        return torch.where(finite_N, ids_N, -1).tolist()  # type: ignore[no-any-return]
    ids: list[int] = []
    for at in range(0, len(logits_NV), ROWS_AT_ONCE):  # torch's argmax takes 5 to 20 times as long on a CPU
        rows = logits_NV[at : at + ROWS_AT_ONCE].float().numpy()
        chosen = rows.argmax(-1)
        ids += np.where(np.isfinite(rows[np.arange(len(rows)), chosen]), chosen, -1).tolist()
    return ids


def _sampled(token_id: int) -> Sampled:
    return Sampled(token_id) if token_id >= 0 else Sampled(-1, error=NOT_FINITE)


def _nucleus(weights: Row, threshold: np.float32, top_p: float) -> np.float32:
    """The least weight of the fewest tokens that hold `top_p` of what `threshold` leaves (Holtzman et al. 2020)."""
    if threshold > 0:
        weights = weights[np.flatnonzero(weights >= threshold)]
    total = float(weights.sum(dtype=np.float64))
    # all tokens below the mean of what may be cut away hold less than that together, so that none of them is needed
    heavy = np.sort(weights[np.flatnonzero(weights >= (1.0 - top_p) * total / len(weights))])[::-1]
    # a token that makes the share exactly full is the last one
    return np.float32(heavy[_place(heavy, math.nextafter(top_p, 0.0), total=total)])


def _place(weights: Row, share: float, starts: np.ndarray[Any, Any] | None = None, *, total: float = 0.0) -> int:
    """The first place where the sum of the weights so far exceeds `share` of the total (0: of their own), or the last one
    that weighs anything. `starts`: where the summed blocks begin, if it is known."""
    if starts is None:
        starts = np.arange(0, len(weights), SUM_SIZE)
    sums = np.add.reduceat(weights, starts).cumsum(dtype=np.float64)
    end = float(sums[-1])
    target = min(share * (total or end), math.nextafter(end, 0.0))
    block = int(sums.searchsorted(target, side="right"))
    start = int(starts[block])
    within = weights[start : start + SUM_SIZE].cumsum(dtype=np.float64)
    # what float32 rounded in the block's sum must not lead past its end, nor to a token of no weight
    rest = min(target - (float(sums[block - 1]) if block else 0.0), math.nextafter(float(within[-1]), 0.0))
    return start + int(within.searchsorted(rest, side="right"))


def _told(logits_V: Row, token_id: int, count: int) -> Sampled:
    """The token's log-probability and rank and the `count` most likely tokens, of the logits as the model gave them."""
    largest = logits_V.max()
    if not np.isfinite(largest):
        return Sampled(token_id, error=NOT_FINITE)
    with np.errstate(under="ignore"):
        normalizer = float(largest) + float(np.log(np.exp(logits_V - largest).sum(dtype=np.float64)))
    top: list[tuple[int, float]] = []
    if count:
        count = min(count, len(logits_V))
        least = np.partition(logits_V, len(logits_V) - count)[len(logits_V) - count]
        ids = np.flatnonzero(logits_V >= least)
        ids = ids[np.argsort(-logits_V[ids], kind="stable")][:count]
        top = [(int(one), float(logits_V[one]) - normalizer) for one in ids]
    rank = 1 + int(np.count_nonzero(logits_V > logits_V[token_id]))
    return Sampled(token_id, float(logits_V[token_id]) - normalizer, rank, top)
