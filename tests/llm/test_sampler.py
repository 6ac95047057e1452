"""What the next token may be, how often it is which, and that nobody's neighbours change it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fairlead.core.generation import Sampling
from fairlead.llm import kernels
from fairlead.llm.sampler import NUM_UNIFORMS, Sampler, SampleRow

V = 50
NUM_DRAWS = 4000


def row(prompt_ids: list[int] | None = None, *, seed: int = 0, index: int = 0, stop_ids: tuple[int, ...] = (), **asked: Any) -> SampleRow:
    return SampleRow(Sampling(**asked).with_defaults({}), prompt_ids or [1, 2, 3], seed=seed, index=index, stop_ids=stop_ids)


def after(it: SampleRow, *tokens: int) -> SampleRow:
    for token_id in tokens:
        it.push(token_id)
    return it


def logits_of(vocab_size: int = V, rows: int = 1, *, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def draw(logits_V: torch.Tensor, count: int = NUM_DRAWS, **asked: Any) -> np.ndarray[Any, Any]:
    """How often each token was drawn over many seeds and positions."""
    sampler, counts = Sampler(len(logits_V)), np.zeros(len(logits_V), int)
    rows = [row(seed=seed, **asked) for seed in range(50)]
    logits = logits_V.expand(len(rows), -1)
    for _ in range(count // len(rows)):
        for it, sampled in zip(rows, sampler.sample(logits, rows), strict=True):
            counts[sampled.token_id] += 1
            it.push(sampled.token_id)
    return counts


def shaped(logits_V: torch.Tensor, **asked: Any) -> np.ndarray[Any, Any]:
    """The probabilities that are sampled from."""
    weights, ids = Sampler(len(logits_V)).shape(logits_V.numpy(), Sampling(**asked).with_defaults({}))
    probabilities = np.zeros(len(logits_V))
    probabilities[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return probabilities


# Greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    # bfloat16 ties often: the first of the largest counts, as torch has it
    logits = logits_of(8192, 40, spread=0.5).to(dtype)
    sampled = Sampler(8192).sample(logits, [row(temperature=0.0) for _ in range(40)])
    assert [one.token_id for one in sampled] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [7, 512, 1000, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_finds_the_likeliest_that_torch_finds(dtype: torch.dtype, vocab_size: int) -> None:
    if not kernels.load():
        pytest.skip(kernels.load().reason)
    # Given rows that tie, that hold no usable number, and masks that allow half of the tokens, or one, or none
    logits = logits_of(vocab_size, 8, spread=0.5).to(dtype)
    logits[1], logits[2, -1], logits[3, 3], logits[4] = 1.0, math.nan, math.inf, -math.inf
    masks = np.random.default_rng(0).integers(-(2**31), 2**31, (9, -(-vocab_size // 32))).astype(np.int32)
    masks[6], masks[7], masks[7, 0] = 0, 0, 1 << 5
    native, plain = Sampler(vocab_size, native=True), Sampler(vocab_size)
    # Then both find the same, of all rows and of some with their masks
    found = native.likeliest(logits)
    assert found == plain.likeliest(logits)
    assert found[0] == logits[0].argmax() and found[1] == 0 and found[2:5] == [-1, -1, -1]
    rows, places = [7, 0, 0, 5, 2, 1], [1, 6, 7, 0, 3, 8]
    allowed = native.likeliest(logits, rows, masks, places)
    assert allowed == plain.likeliest(logits, rows, masks, places)
    assert allowed[1:3] == [-1, 5]


def test_greedy_rows_of_a_mixed_batch_are_argmax_too() -> None:
    logits = logits_of(V, 6).bfloat16()
    rows = [row(temperature=0.0) if n % 2 else row(temperature=1.0, top_p=0.9, seed=n) for n in range(6)]
    sampled = Sampler(V).sample(logits, rows)
    assert [one.token_id for one in sampled[1::2]] == logits[1::2].argmax(-1).tolist()


def test_logits_stay_as_they_were() -> None:
    logits = logits_of(V, 3)
    before = logits.clone()
    rows = [row(temperature=0.7, logit_bias={3: 5.0}, top_k=4), row(temperature=0.0, repetition_penalty=1.5), row(logprobs=2)]
    Sampler(V).sample(logits, rows)
    assert torch.equal(logits, before)


# Distributions


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_tokens_come_as_often_as_their_probability_says(asked: dict[str, Any]) -> None:
    logits_V = logits_of(spread=1.0)[0]
    expected = exact(logits_V, asked) * NUM_DRAWS
    counts = draw(logits_V, **asked)
    assert not counts[expected == 0].any()
    common = expected >= 5  # chi-square wants a few in every cell: the rare ones count as one
    seen, wanted = list(counts[common]), list(expected[common])
    if expected[~common].sum() > 0:
        seen.append(counts[~common].sum())
        wanted.append(expected[~common].sum())
    # the draws are fixed by their seeds, so this passes always or never
    assert stats.chisquare(seen, wanted).pvalue > 0.001


def exact(logits_V: torch.Tensor, asked: dict[str, Any]) -> np.ndarray[Any, Any]:
    """By the definitions, in float64 and without any cleverness."""
    p = (logits_V.double() / asked["temperature"]).softmax(-1).numpy()
    p = np.where(p >= asked.get("min_p", 0.0) * p.max(), p, 0)
    order = np.argsort(-p)
    p[order[asked.get("top_k", len(p)) :]] = 0
    p /= p.sum()
    larger = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    p[order[larger >= asked.get("top_p", 1.0)]] = 0
    return p / p.sum()


def test_wide_vocabularies_are_drawn_from_in_proportion_too() -> None:
    # a flat distribution over many blocks of the sum: every eighth of the vocabulary as often
    counts = draw(torch.zeros(10_001), count=8000, temperature=1.0)
    eighths = np.add.reduceat(counts, np.arange(0, 10_001, 1251))
    assert stats.chisquare(eighths).pvalue > 0.001


@pytest.mark.parametrize("vocab_size", [7, 128, 129, 4096])
@pytest.mark.parametrize(
    ("asked", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
        ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
        ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        (
            {"temperature": 1.3, "min_p": 0.01, "top_k": 6, "top_p": 0.85},
            [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.01), TopKLogitsWarper(6), TopPLogitsWarper(0.85)],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_probabilities_are_those_of_transformers(
    asked: dict[str, Any], warpers: list[Callable[..., torch.Tensor]], vocab_size: int
) -> None:
    for seed in range(10):
        logits = logits_of(vocab_size, seed=seed)
        theirs = logits
        for warper in warpers:
            theirs = warper(torch.tensor([[0]]), theirs)
        expected = theirs.softmax(-1)[0].numpy()
        ours = shaped(logits[0], **{"temperature": 1.0, **asked})
        assert np.array_equal(ours > 0, expected > 0)
        assert np.allclose(ours, expected, atol=1e-6)


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    assert shaped(torch.tensor([3.0, 1.0, 3.0, 3.0]), temperature=1.0, top_k=2) == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_a_token_that_fills_top_p_exactly_is_the_last_one() -> None:
    logits_V = torch.tensor([2.0, 1.0, 1.0]).log()
    assert TopPLogitsWarper(0.5)(torch.tensor([[0]]), logits_V[None]).isfinite().tolist() == [[True, False, False]]
    assert shaped(logits_V, temperature=1.0, top_p=0.5).tolist() == [1.0, 0.0, 0.0]


def test_a_temperature_near_zero_is_greedy() -> None:
    for temperature in (1e-300, 1e-40, 1e-6):
        assert Sampler(V).sample(logits_of(), [row(temperature=temperature)])[0].token_id == logits_of().argmax()


# Randomness


def test_a_seed_gives_the_same_tokens_again_and_another_seed_does_not() -> None:
    def tokens(seed: int, index: int = 0) -> list[int]:
        it = row(seed=seed, index=index, temperature=1.0)
        chosen = []
        for step in range(100):
            chosen.append(Sampler(V).sample(logits_of(seed=step), [it])[0].token_id)
            it.push(chosen[-1])
        return chosen

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(7, index=0) != tokens(7, index=1)
    assert tokens(-1) == tokens(2**64 - 1)


def test_the_uniforms_are_the_philox_stream_of_seed_and_choice() -> None:
    stream = np.random.Generator(np.random.Philox(key=np.array([11, 3], np.uint64))).random(3 * NUM_UNIFORMS)
    it = row(seed=11, index=3)
    for position in range(3 * NUM_UNIFORMS):
        assert it.uniform() == it.uniform() == stream[position]  # a step that is computed again draws the same
        it.push(0)


def test_a_request_gets_the_same_tokens_alone_and_among_others() -> None:
    sampler = Sampler(1000)
    mine = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 5}
    others: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "logprobs": 3}, {"temperature": 0.0, "min_tokens": 9}]
    alone, among = row(**mine), row(**mine)
    beside = [row(seed=n, stop_ids=(4,), **asked) for n, asked in enumerate(others * 3)]
    for step in range(80):
        logits = logits_of(1000, 10, seed=step).bfloat16()
        place = step % 10
        first = sampler.sample(logits[place : place + 1], [alone])[0]
        batch = [*beside[:place], among, *beside[place:]]
        sampled = sampler.sample(logits, batch)
        assert sampled[place] == first
        for it, one in zip(batch, sampled, strict=True):
            it.push(one.token_id)
        alone.push(first.token_id)


# Bias, penalties, min_tokens


def test_bias_forbids_and_forces() -> None:
    logits_V = logits_of()[0]
    likeliest = int(logits_V.argmax())
    assert draw(logits_V, temperature=1.0, logit_bias={likeliest: -100.0})[likeliest] == 0
    assert draw(logits_V, temperature=1.0, logit_bias={17: 100.0})[17] == NUM_DRAWS
    assert Sampler(V).sample(logits_V[None], [row(temperature=0.0, logit_bias={17: 100.0})])[0].token_id == 17


def test_penalties_by_hand() -> None:
    # in the prompt: 0 and 1; generated: 1 once, 2 twice
    it = after(row([0, 0, 1], repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25), 1, 2, 2)
    logits_V = np.array([4.0, -4.0, 4.0, 4.0], np.float32)
    it.adjust(logits_V)
    assert logits_V.tolist() == [2.0, -8.0 - 0.5 - 0.25, 2.0 - 0.5 - 0.5, 4.0]


def test_presence_and_frequency_leave_the_prompt_alone() -> None:
    it = row([0, 1], presence_penalty=1.0, frequency_penalty=1.0)
    logits_V = np.ones(4, np.float32)
    it.adjust(logits_V)
    assert logits_V.tolist() == [1.0] * 4


def test_repetition_is_that_of_transformers() -> None:
    generator = np.random.default_rng(0)
    prompt, generated = generator.integers(0, 500, 60).tolist(), generator.integers(0, 500, 200).tolist()
    logits = logits_of(500)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + generated]), logits.clone())[0]
    ours = logits[0].numpy().copy()
    after(row(prompt, repetition_penalty=1.3), *generated).adjust(ours)
    assert np.allclose(ours, theirs.numpy(), rtol=1e-6)


def test_a_frequency_penalty_ends_a_loop() -> None:
    it, logits = row(temperature=0.0, frequency_penalty=2.0), torch.tensor([[5.0, 2.0, 0.0]])
    chosen = []
    for _ in range(5):
        chosen.append(Sampler(3).sample(logits, [it])[0].token_id)
        it.push(chosen[-1])
    assert chosen == [0, 0, 1, 0, 1]


def test_end_tokens_are_forbidden_until_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0]])
    it = row(temperature=0.0, min_tokens=2, stop_ids=(0, 1, 99))
    assert Sampler(3).sample(logits, [after(it)])[0].token_id == 2
    assert Sampler(3).sample(logits, [after(it, 2)])[0].token_id == 2
    assert Sampler(3).sample(logits, [after(it, 2)])[0].token_id == 0


# Log-probabilities


def test_logprobs_are_of_the_logits_as_the_model_gave_them() -> None:
    logits = logits_of().bfloat16()
    expected = logits[0].double().log_softmax(-1)
    it = row(temperature=0.3, top_k=3, logprobs=5, repetition_penalty=1.5, logit_bias={40: 100.0})
    sampled = Sampler(V).sample(logits, [it])[0]
    assert sampled.token_id == 40
    assert sampled.logprob == pytest.approx(float(expected[40]), abs=1e-5)
    assert sampled.rank == 1 + int((expected > expected[40]).sum())
    best = expected.sort(descending=True, stable=True)
    assert [token_id for token_id, _ in sampled.top] == best.indices[:5].tolist()
    assert [logprob for _, logprob in sampled.top] == pytest.approx(best.values[:5].tolist(), abs=1e-5)


def test_logprobs_of_zero_tell_the_chosen_token_alone() -> None:
    sampled = Sampler(V).sample(logits_of(), [row(temperature=0.0, logprobs=0)])[0]
    assert (sampled.rank, list(sampled.top)) == (1, [])
    assert sampled.logprob == pytest.approx(float(logits_of()[0].log_softmax(-1).max()), abs=1e-5)


def test_of_tokens_that_tie_the_chosen_one_stands_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    sampled = Sampler(5).sample(logits, [row(temperature=0.0, logprobs=2)])[0]
    assert (sampled.token_id, sampled.rank) == (1, 1)
    assert [token_id for token_id, _ in sampled.top] == [1, 2]


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    sampled = Sampler(3).sample(logits_of(3), [row(temperature=0.0, logprobs=20)])[0]
    assert sum(math.exp(logprob) for _, logprob in sampled.top) == pytest.approx(1.0)


def test_prompt_logprobs() -> None:
    logits = logits_of(V, 20)
    next_ids = list(range(20))
    expected = logits.log_softmax(-1)
    for place, told in enumerate(Sampler(V).prompt_logprobs(logits, next_ids, 3)):
        assert told.token_id == place
        assert told.logprob == pytest.approx(float(expected[place, place]), abs=1e-5)
        assert [token_id for token_id, _ in told.top] == expected[place].topk(3).indices.tolist()


# Logits that cannot be used


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("asked", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "logprobs": 1}])
def test_a_broken_row_ends_alone(broken: float, asked: dict[str, Any]) -> None:
    logits = logits_of(V, 3)
    logits[1, 7] = broken
    sampled = Sampler(V).sample(logits, [row(**asked) for _ in range(3)])
    assert [bool(one.error) for one in sampled] == [False, True, False]
    assert "NaN" in sampled[1].error


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_any_token_left_is_an_error(temperature: float) -> None:
    logits = torch.full((1, V), -torch.inf)
    assert Sampler(V).sample(logits, [row(temperature=temperature)])[0].error
    forbids_all = row(temperature=temperature, min_tokens=1, stop_ids=tuple(range(V)))
    assert Sampler(V).sample(logits_of(), [forbids_all])[0].error


def test_tokens_at_minus_infinity_are_never_drawn() -> None:
    logits_V = torch.full((300,), -torch.inf)
    logits_V[[5, 200]] = torch.tensor([0.0, 1.0])
    counts = draw(logits_V, count=1000, temperature=1.0)
    assert counts[5] + counts[200] == 1000
    assert counts[5] > 0
