"""Tokens drawn by the device's operators, here on the CPU, are those that the host draws."""

import pytest
import torch

from fairlead.core.generation import Sampling
from fairlead.llm.cuda.sampler import CudaSampler, draw
from fairlead.llm.sampler import NOT_FINITE, Sampler, SampleRow

VOCAB = 3000
WAYS = {
    "plain": {},
    "cold": {"temperature": 0.05},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 5},
    "one": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "many": {"top_k": 2000},
}


def row(seed: int, **sampling: object) -> SampleRow:
    return SampleRow(Sampling(**{"temperature": 1.0, **sampling}).with_defaults({}), [1, 2, 3], seed=seed)


def logits(num: int) -> torch.Tensor:
    return torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(num)) * 3


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_the_same_token_on_device_and_host(way):
    rows = [row(seed, **WAYS[way]) for seed in range(200)]
    logits_NV = logits(200)

    ours, theirs = draw(logits_NV, rows).tolist(), [each.token_id for each in Sampler(VOCAB).sample(logits_NV, rows)]

    # where a uniform falls upon the border of two tokens, rounding decides
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 198
    assert len(set(ours)) > 20


def test_rows_of_every_kind_share_a_step():
    rows = [
        row(1),
        row(2, temperature=0.0),
        row(3, top_p=0.5),
        row(4, presence_penalty=1.0),
        row(5, logprobs=2),
        row(6, top_k=3),
        row(7, temperature=0.0, logprobs=0),
    ]
    logits_NV = logits(len(rows))

    ours, theirs = CudaSampler(VOCAB).sample(logits_NV, rows), Sampler(VOCAB).sample(logits_NV, rows)

    assert ours == theirs


def test_a_row_without_usable_logits_fails_alone():
    logits_NV = logits(3)
    logits_NV[1] = float("nan")

    first, second, third = CudaSampler(VOCAB).sample(logits_NV, [row(1), row(2), row(3, top_p=0.5)])

    assert (first.error, second.error, third.error) == ("", NOT_FINITE, "")
    assert min(first.token_id, third.token_id) >= 0


def test_a_token_without_weight_is_never_drawn():
    logits_NV = torch.full((64, VOCAB), -float("inf"))
    logits_NV[:, 17] = 0.0
    logits_NV[:, 29] = 1.0

    drawn = draw(logits_NV, [row(seed) for seed in range(64)]).tolist()

    assert set(drawn) == {17, 29}


@pytest.mark.parametrize("temperatures", [(0.0, 1.0, 0.0, 0.7), (0.0, 0.0), (1.0, 0.6, 1.3)])
def test_tokens_that_stay_on_the_device_are_those_that_are_told(temperatures):
    rows = [row(seed, temperature=temperature) for seed, temperature in enumerate(temperatures)]
    logits_NV = logits(len(rows))
    logits_NV[1] = float("nan")
    sampler = CudaSampler(VOCAB)

    chosen = sampler.choose(logits_NV, rows, [0] * len(rows))

    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [each.token_id for each in sampler.sample(logits_NV, rows)] and chosen[1] == -1


@pytest.mark.parametrize("sampler", [Sampler(VOCAB), CudaSampler(VOCAB)])
def test_a_row_that_is_ahead_draws_with_the_number_of_its_place(sampler):
    logits_NV = logits(1)
    told = row(7)
    one_after_another = []
    for _ in range(70):
        [each] = sampler.sample(logits_NV, [told])
        told.push(each.token_id)
        one_after_another.append(each.token_id)

    untold = row(7)
    assert [int(sampler.choose(logits_NV, [untold], [ahead])) for ahead in range(70)] == one_after_another
    assert untold.num_generated == 0 and len(set(one_after_another)) > 20
