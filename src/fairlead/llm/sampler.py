"""The next token of every sequence of a step, from its row of logits.

Which route a step takes is decided on the host before anything is computed: rows that only want the likeliest token share
one argmax over the batch, in the model's dtype; only the others get a float32 copy of their row. What a row yields depends
on its own logits and its own (seed, choice, position), never on the rows beside it.

Order of what shapes a distribution, as in vLLM 1: logit bias, repetition, frequency and presence penalties, tokens forbidden by a
grammar and by `min_tokens`, temperature, min_p, top_k, top_p.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from fairlead.core.generation import Sampling
from fairlead.llm.grammar import Matcher
from fairlead.llm.masks import Guided, MaskRows, Masks

Row = np.ndarray[Any, np.dtype[np.float32]]

MIN_TEMPERATURE = 1e-5
"""Below it float32 cannot divide logits any more; it is as good as greedy."""

ROWS_AT_ONCE = 8
"""Rows whose float32 copies fit a core's cache together."""

NUM_UNIFORMS = 64
"""Made at a time: making a generator costs as much as a thousand of its numbers."""

SUM_SIZE = 128
"""Weights summed in float32 before their sums go on in float64: ten times cheaper than a float64 sum over all."""

CEILINGS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32(np.inf), -np.float32(np.inf)
)
"""Of the eight tokens that a byte of a mask is about."""

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
        "_masks",
        "_masks_from",
        "_min_tokens",
        "_stop_ids",
        "_uniforms",
        "_uniforms_block",
        "_unshaped",
        "greedy",
        "index",
        "matcher",
        "num_generated",
        "sampling",
        "seed",
    )

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        index: int = 0,
        stop_ids: Iterable[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        """`sampling`: with its defaults filled; `index`: which of the n choices; `stop_ids`: forbidden until `min_tokens`;
        `matcher`: of its grammar, which has come as far as the row has."""
        assert sampling.temperature is not None and sampling.repetition_penalty is not None
        self.sampling = sampling
        self.seed = seed
        self.index = index
        self.num_generated = 0
        self.greedy = sampling.greedy
        self.matcher = matcher
        self._masks: MaskRows | None = None
        self._masks_from = 0
        self._stop_ids = np.fromiter(stop_ids, np.int64)
        self._min_tokens = sampling.min_tokens if len(self._stop_ids) else 0
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32)
        self._counts: _TokenCounts | None = None
        if sampling.repetition_penalty != 1.0:
            self._counts = _TokenCounts(prompt_ids)
        elif sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = _TokenCounts(())
        self._unshaped = self._counts is None and not len(self._bias_ids)
        self._uniforms: np.ndarray[Any, np.dtype[np.float64]] | None = None
        self._uniforms_block = -1

    def push(self, token_id: int) -> None:
        """The token was accepted: the row goes on to its next position."""
        self.num_generated += 1
        if self._counts is not None:
            self._counts.add(token_id)

    def pop(self, token_id: int) -> None:
        """Take back the last `push`, which was of this token."""
        self.num_generated -= 1
        if self._counts is not None:
            self._counts.remove(token_id)

    def allow(self, masks_RW: MaskRows, first: int = 0) -> None:
        """What the grammar allows in the step: row `first` for this position, and the next ones for those that follow."""
        self._masks = masks_RW
        self._masks_from = first - self.num_generated

    @property
    def mask(self) -> tuple[MaskRows, int]:
        """(the step's masks, the row of this position); of a row that `allow` was told of."""
        assert self._masks is not None, "the step has found no masks"
        return self._masks, self._masks_from + self.num_generated

    @property
    def guided(self) -> bool:
        """A grammar forbids tokens."""
        return self.matcher is not None

    @property
    def plain(self) -> bool:
        """Its logits are taken as they are."""
        return not self.guided and self.only_masked

    @property
    def only_masked(self) -> bool:
        """Nothing shapes its logits, but that a grammar may forbid some."""
        return self._unshaped and self.num_generated >= self._min_tokens

    @property
    def takes_likeliest(self) -> bool:
        """Nothing is wanted of its logits but the likeliest token, of those that a grammar allows."""
        return self._unshaped and self.greedy and self.num_generated >= self._min_tokens and self.sampling.logprobs is None

    @property
    def on_device(self) -> bool:
        """Its token can be chosen where the logits are: they are taken as they are, and nothing else of them is told."""
        return self.plain and self.sampling.logprobs is None

    def uniform(self, ahead: int = 0) -> float:
        """In [0, 1), of this position, or of one so many ahead, and no other: element `num_generated` of the Philox stream keyed
        (seed, index).

        Philox4x64-10 (Salmon et al. 2011) counts instead of remembering, so that a step may be computed again.
        """
        block, place = divmod(self.num_generated + ahead, NUM_UNIFORMS)
        if self._uniforms is None or block != self._uniforms_block:
            key = np.array([self.seed & 0xFFFF_FFFF_FFFF_FFFF, self.index], np.uint64)
            bits = np.random.Philox(key=key, counter=block * (NUM_UNIFORMS // 4))  # four numbers for each count
            self._uniforms = np.random.Generator(bits).random(NUM_UNIFORMS)
            self._uniforms_block = block
        return float(self._uniforms[place])

    def adjust(self, logits_V: Row) -> None:
        """Apply bias, forbidden tokens and penalties in place."""
        if len(self._bias_ids):
            logits_V[self._bias_ids] += self._bias
        if self._counts is not None:
            self._counts.penalize(logits_V, self.sampling)
        if self.guided:
            masks_RW, place = self.mask
            np.minimum(logits_V, ceilings(masks_RW[place], len(logits_V)), out=logits_V)
        if self.num_generated < self._min_tokens:
            ids = self._stop_ids[self._stop_ids < len(logits_V)]
            ends = logits_V[ids]
            logits_V[ids] = -np.inf
            if self.guided and logits_V.max() == -np.inf:  # the grammar is complete: nothing else may come
                logits_V[ids] = ends


class _TokenCounts:
    """Which tokens a sequence has, and how often it generated each: what penalties need, in memory of the distinct tokens."""

    __slots__ = ("_ids", "_num", "_num_prompt", "_places", "_times")

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_ids, np.int64))
        self._num = self._num_prompt = len(distinct)
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

    def remove(self, token_id: int) -> None:
        """Undo the last `add`, which was of this token."""
        place = self._places[token_id]
        self._times[place] -= 1
        if place == self._num - 1 and place >= self._num_prompt and not self._times[place]:
            self._num -= 1
            del self._places[token_id]

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

    def __init__(self, vocab_size: int, *, native: bool = False) -> None:
        """`native`: the C++ kernels have been loaded."""
        self.vocab_size = vocab_size
        self.masks = Masks(vocab_size)
        self._native = native
        self._starts = np.arange(0, vocab_size, SUM_SIZE)

    def sample(self, logits_NV: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """A token for each row, in order. A row whose logits are not usable gets an `error` in place of one.

        The caller tells each row what became of its token with `push`. A guided row of which only the likeliest token is wanted needs
        no mask beforehand: its grammar is asked whether it takes that token, and for a mask only where it does not.
        """
        assert logits_NV.shape == (len(rows), self.vocab_size), f"{tuple(logits_NV.shape)} for {len(rows)} rows of {self.vocab_size}"
        own: list[int] = []
        guided: list[tuple[int, Matcher]] = []
        for n, row in enumerate(rows):
            if not row.takes_likeliest:
                own.append(n)
            elif row.matcher is not None:
                guided.append((n, row.matcher))
        if len(own) == len(rows):
            answers = [Sampled(-1)] * len(rows)
        else:
            ids = self.likeliest(logits_NV)
            if refused := [(n, matcher) for n, matcher in guided if ids[n] < 0 or not matcher.takes(ids[n])]:
                at = [n for n, _ in refused]
                found = self.masks.find([Guided(matcher, []) for _, matcher in refused])
                for n, token_id in zip(at, self.likeliest(logits_NV, at, found[0][0], [place for _, place in found]), strict=True):
                    ids[n] = token_id
            answers = [sampled(token_id) for token_id in ids]
        if not own:
            return answers
        # one transfer in the model's dtype, however many rows
        for n, logits_V in zip(own, _on_host(logits_NV if len(own) == len(rows) else logits_NV[own]), strict=True):
            answers[n] = self._sample_row(logits_V, rows[n])
        return answers

    def likeliest(
        self, logits_NV: torch.Tensor, rows: list[int] | None = None, masks_RW: MaskRows | None = None, places: list[int] | None = None
    ) -> list[int]:
        """The first of the largest of these rows (of all, where none are named), of those that the mask at each one's place allows;
        -1 where the largest is not finite."""
        if self._native and logits_NV.dtype in (torch.float32, torch.bfloat16):
            masks = None if masks_RW is None else torch.from_numpy(masks_RW)
            return torch.ops.fairlead.likeliest(logits_NV, rows or [], masks, places or []).tolist()  # type: ignore[no-any-return]
        return _argmax(logits_NV[rows] if rows else logits_NV, None if masks_RW is None else masks_RW[places])

    def choose(self, logits_NV: torch.Tensor, rows: Sequence[SampleRow], ahead: Sequence[int]) -> torch.Tensor:
        """[N] int64, where the logits are: a token for each row, all of them `on_device`; -1 where its logits are not usable.

        `ahead`: how many tokens of each row come before this one that it was not told of yet.
        """
        drawn = [n for n, row in enumerate(rows) if not row.greedy]
        ids = self.likeliest(logits_NV) if len(drawn) < len(rows) else [-1] * len(rows)
        if drawn:
            for n, logits_V in zip(drawn, _on_host(logits_NV if len(drawn) == len(rows) else logits_NV[drawn]), strict=True):
                ids[n] = self._draw(logits_V, rows[n], ahead[n]) if np.isfinite(logits_V.max()) else -1
        return torch.tensor(ids, dtype=torch.int64)

    def verify(self, logits_NV: torch.Tensor, rows: Sequence[SampleRow], drafts: Sequence[Sequence[int]]) -> list[list[Sampled]]:
        """One token or more for each row, in order. `logits_NV` has a row for the next token of each, and then one for what
        follows each token of its draft.

        A token of the draft counts as chosen where it is the very one that is chosen in its place, with all that its own
        position brings; then the next place is looked at. So drafts change how many tokens come, never which.
        """
        assert logits_NV.shape == (len(rows) + sum(map(len, drafts)), self.vocab_size)
        ends = list(accumulate(len(draft) + 1 for draft in drafts))
        unmasked = [n for n, row in enumerate(rows) if row.guided and row.takes_likeliest and not drafts[n]]
        asked = self.sample(logits_NV[[ends[n] - 1 for n in unmasked]], [rows[n] for n in unmasked]) if unmasked else []
        found = dict(zip(unmasked, asked, strict=True))
        answers: list[list[Sampled]] = []
        likeliest: list[int] | None = None
        for n, (row, draft, end) in enumerate(zip(rows, drafts, ends, strict=True)):
            start = end - len(draft) - 1
            if n in found:
                chosen = [found[n]]
            elif not row.takes_likeliest:
                chosen = self._verify_row(logits_NV[start:end], row, draft)
            elif row.guided:
                masks_RW, place = row.mask
                places = list(range(place, place + len(draft) + 1))
                chosen = _verified(self.likeliest(logits_NV, list(range(start, end)), masks_RW, places), draft)
            else:
                if likeliest is None:
                    likeliest = self.likeliest(logits_NV)
                chosen = _verified(likeliest[start:end], draft)
            if chosen[-1].error and len(chosen) > 1:  # it fails, if it does, as the first of the next step
                chosen.pop()
            answers.append(chosen)
        return answers

    def _verify_row(self, logits_PV: torch.Tensor, row: SampleRow, draft: Sequence[int]) -> list[Sampled]:
        """`row` looks ahead, and is as it was when this returns."""
        chosen: list[Sampled] = []
        pushed: list[int] = []
        try:
            for place, logits_V in enumerate(_on_host(logits_PV)):
                chosen.append(self._sample_row(logits_V, row))
                token_id = chosen[-1].token_id
                if place == len(draft) or token_id != draft[place]:
                    break
                row.push(token_id)
                pushed.append(token_id)
        finally:
            for token_id in reversed(pushed):
                row.pop(token_id)
        return chosen

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

    def _draw(self, logits_V: Row, row: SampleRow, ahead: int = 0) -> int:
        """By the inverse of the cumulative distribution at the row's uniform."""
        weights, ids = self.shape(logits_V, row.sampling)
        place = _place(weights, row.uniform(ahead), self._starts if ids is None else None)
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


def _verified(likeliest: Sequence[int], draft: Sequence[int]) -> list[Sampled]:
    """Those of the draft's tokens that are the likeliest in their place, and the one after them."""
    num = next((place for place, token_id in enumerate(draft) if likeliest[place] != token_id), len(draft))
    return [sampled(token_id) for token_id in likeliest[: num + 1]]


def ceilings(mask_W: MaskRows, vocab_size: int) -> Row:
    """[V]: no logit of a token may be above, which is minus infinity where the mask forbids it; of several rows, [N, V]."""
    bytes_W = mask_W.view(np.uint8)
    return CEILINGS.take(bytes_W, axis=0).reshape(*bytes_W.shape[:-1], -1)[..., :vocab_size]


def _argmax(logits_NV: torch.Tensor, mask_NW: MaskRows | None = None) -> list[int]:
    """The first of the largest of each row, of those that the mask allows; -1 where the largest is not finite."""
    if logits_NV.device.type != "cpu":
        if mask_NW is not None:
            ceilings_NV = torch.from_numpy(ceilings(mask_NW, logits_NV.shape[-1])).to(logits_NV.device, logits_NV.dtype)
            logits_NV = torch.minimum(logits_NV, ceilings_NV)
        return likeliest(logits_NV).tolist()  # type: ignore[no-any-return]
    ids: list[int] = []
    for at in range(0, len(logits_NV), ROWS_AT_ONCE):  # torch's argmax takes 5 to 20 times as long on a CPU
        rows = logits_NV[at : at + ROWS_AT_ONCE].float().numpy()
        if mask_NW is not None:
            rows = np.minimum(rows, ceilings(mask_NW[at : at + ROWS_AT_ONCE], rows.shape[-1]))
        chosen = rows.argmax(-1)
        ids += np.where(np.isfinite(rows[np.arange(len(rows)), chosen]), chosen, -1).tolist()
    return ids


def likeliest(logits_NV: torch.Tensor) -> torch.Tensor:
    """[N] int64: the first of the largest of each row; -1 where it is not finite."""
    ids_N = logits_NV.argmax(-1)
    finite_N = logits_NV.gather(-1, ids_N[:, None]).squeeze(-1).isfinite()
    return torch.where(finite_N, ids_N, -1)


def sampled(token_id: int) -> Sampled:
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
