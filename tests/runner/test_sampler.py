"""Sampling against plain references: what may be drawn, how often, and after which penalties."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastqwen.records import SamplingParams
from fastqwen.runner.sampler import gumbel, penalize, sample, top_logprobs


def draw(logits: Tensor, params: list[SamplingParams], seeds: list[int], positions: list[int]) -> list[int]:
    return sample(
        logits.clone(),
        temperature=torch.tensor([0.0 if one.greedy else one.temperature for one in params]),
        top_k=torch.tensor([max(0, one.top_k) for one in params]),
        top_p=torch.tensor([one.top_p for one in params]),
        min_p=torch.tensor([one.min_p for one in params]),
        seed=torch.tensor(seeds),
        position=torch.tensor(positions),
        params=params,
    ).tolist()


def many(logits: list[float], params: SamplingParams, count: int, seed: int = 0) -> list[int]:
    """Draws at ``count`` positions of one seed."""
    rows = torch.tensor(logits).expand(count, -1)
    return draw(rows, [params] * count, [seed] * count, list(range(count)))


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in zip(observed, expected, strict=True))


def critical(freedom: int) -> float:
    """Wilson and Hilferty's approximation of the chi-square value that chance exceeds once in ten million."""
    return freedom * (1 - 2 / (9 * freedom) + 5.2 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("by", ["position", "seed"])
def test_draws_follow_softmax(temperature: float, by: str):
    logits = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]
    count = 40_000
    params = SamplingParams(temperature=temperature)
    seeds = [12345] * count if by == "position" else [random.Random(1).getrandbits(63) + i for i in range(count)]
    positions = list(range(count)) if by == "position" else [17] * count
    drawn = draw(torch.tensor(logits).expand(count, -1), [params] * count, seeds, positions)
    wanted = (torch.tensor(logits) / temperature).softmax(-1) * count
    assert chi_square([drawn.count(token) for token in range(8)], wanted.tolist()) < critical(7)


def test_draws_at_the_edges_of_a_real_vocabulary():
    """Flat over 50,000 tokens: every fiftieth of it gets its share, the first and the last as well."""
    vocab, count = 50_000, 500
    logits = torch.zeros(count, vocab)
    drawn = draw(logits, [SamplingParams()] * count, [7] * count, list(range(count)))
    observed = [0] * 50
    for token in drawn:
        observed[token * 50 // vocab] += 1
    assert chi_square(observed, [count / 50] * 50) < critical(49)


def kept(logits: list[float], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The tokens that may be drawn, in plain Python and double precision. Equal logits stay together."""
    ranked = sorted(logits, reverse=True)
    if top_k > 0:
        ranked = ranked[:top_k]
    total = math.fsum(math.exp(one - ranked[0]) for one in ranked)
    before, last = 0.0, ranked[0]
    for one in ranked:
        if before >= top_p:
            break
        last = one
        before += math.exp(one - ranked[0]) / total
    least = max(last, max(logits) + math.log(min_p) if min_p else -math.inf)
    return {token for token, one in enumerate(logits) if one >= least}


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 1}, {"top_k": 3}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 0.05}, {"top_p": 0.5}, {"top_p": 0.93},
        {"min_p": 0.3}, {"min_p": 0.05}, {"top_k": 6, "top_p": 0.7}, {"top_k": 6, "min_p": 0.2}, {"top_p": 0.9, "min_p": 0.1},
        {"top_k": 7, "top_p": 0.95, "min_p": 0.07},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "logits",
    [
        [3.0, 2.6, 2.1, 1.7, 1.1, 0.4, 0.1, -0.7, -1.2, -2.0],
        [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0],  # ties across every cut
        [0.0] * 10,
        [4.5, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2, -0.3, -0.4, -0.5],
    ],
)
def test_what_the_cuts_keep(logits: list[float], cut: dict[str, Any]):
    """Temperature 3 flattens what is left, so that all of it is seen; the cuts look at the divided logits."""
    params = SamplingParams(temperature=3.0, **cut)
    drawn = set(many([3.0 * one for one in logits], params, 6_000))
    assert drawn == kept(logits, **cut)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-8, 8).map(lambda x: round(x, 2)), min_size=2, max_size=40),
    st.integers(0, 12),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_nothing_outside_the_cuts_is_ever_drawn(logits: list[float], top_k: int, top_p: float, min_p: float):
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    # A hair wider on both sides: the reference sums in another precision.
    allowed = kept(logits, top_k=top_k, top_p=min(1.0, top_p + 1e-5), min_p=max(0.0, min_p - 1e-5))
    assert set(many(logits, params, 300)) <= allowed


def test_a_flat_distribution_over_a_large_vocabulary_is_not_cut_short():
    """top_p 0.9 of 20,000 equal-ish tokens are many more than the candidates that are looked at first."""
    logits = torch.linspace(0.0, 0.01, 20_000).expand(300, -1)
    params = SamplingParams(top_p=0.5)
    drawn = draw(logits, [params] * 300, [3] * 300, list(range(300)))
    assert min(drawn) >= 9_950 and sum(token < 12_500 for token in drawn) > 40


@pytest.mark.parametrize("vocab", [300, 50_000])
def test_a_row_draws_the_same_alone_and_beside_others(vocab: int):
    """Every kind of cut in one batch: other rows must not change a bit of a row's sums."""
    torch.manual_seed(0)
    kinds = [
        {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}, {"top_k": 5}, {"temperature": 0.0}, {"min_p": 0.1}, {},
        {"top_k": vocab, "top_p": 0.99}, {"top_p": 0.5, "temperature": 1.7}, {"top_k": 2000, "temperature": 9.0},
    ]  # fmt: skip
    params = [SamplingParams(**kind) for kind in kinds] * 4
    logits = torch.randn(len(params), vocab) * 2
    seeds, positions = list(range(len(params))), list(range(5, 5 + len(params)))
    together = draw(logits, params, seeds, positions)
    alone = [
        draw(logits[row : row + 1], [params[row]], [seeds[row]], [positions[row]])[0] for row in range(len(params))
    ]
    assert together == alone


@pytest.mark.parametrize("vocab", [300, 50_000])
def test_the_mass_of_a_row_does_not_depend_on_others(vocab: int):
    from fastqwen.runner.sampler import _candidates

    torch.manual_seed(1)
    logits = torch.randn(16, vocab) * 3
    top_k = torch.tensor([0, 7] * 8)
    best, mass = _candidates(logits, top_k, 200)
    for row in range(16):
        for count in (200, 20):
            alone_best, alone_mass = _candidates(logits[row : row + 1], top_k[row : row + 1], count)
            assert torch.equal(alone_best[0], best[row, :count]) and torch.equal(alone_mass[0], mass[row, :count])


def test_a_large_top_k_is_kept_beside_rows_without_one():
    logits = torch.zeros(200, 5000)
    logits[:, 3000:] = -1000.0
    params = [SamplingParams(top_k=3000)] * 199 + [SamplingParams(top_p=0.5)]
    drawn = draw(logits, params, [1] * 200, list(range(200)))
    assert max(drawn) < 3000 and sum(token > 1500 for token in drawn) > 60


def test_top_p_of_one_keeps_what_rounding_would_drop():
    """After two tokens the float sum is 1 already; the third is rare, but was not asked to be cut."""
    logits = torch.tensor([[20.0, 20.0, 0.0]])
    params = SamplingParams(top_k=3, temperature=1.0)
    assert draw(logits, [params], [0], [0])[0] in (0, 1)
    biased = torch.tensor([[0.0, 0.0, -17.5]]).expand(40, -1)
    from fastqwen.runner.sampler import _cut_top

    left = _cut_top(biased, torch.tensor([3] * 40), torch.ones(40), [params] * 40)
    assert left.isfinite().all()


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[1.0, 4.0, 4.0, 4.0], [5.0, 5.0, 1.0, 5.0]])
    greedy = [SamplingParams(temperature=0.0)] * 2
    assert draw(logits, greedy, [1, 2], [3, 4]) == [1, 0]
    mixed = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=1)]
    assert draw(logits, mixed, [1, 2], [3, 4])[0] == 1


# ---- the noise ----


def test_the_noise_is_gumbel():
    noise = gumbel(torch.tensor([5]), torch.tensor([9]), 200_000)[0].double()
    euler, deviation = 0.5772156649, math.pi / math.sqrt(6)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(euler, abs=5 * deviation / math.sqrt(200_000))
    assert noise.std().item() == pytest.approx(deviation, rel=0.02)
    ranked = noise.sort().values
    distribution = torch.exp(-torch.exp(-ranked))
    steps = torch.arange(1, len(ranked) + 1) / len(ranked)
    assert (distribution - steps).abs().max() < 1.95 / math.sqrt(len(ranked)) * 1.5  # Kolmogorov and Smirnov


def test_the_noise_is_the_hash_that_it_says():
    """Computed here with Python's whole numbers: negative seeds, seeds of 63 bits, late positions, all words of the hash."""
    low32 = 2**32 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B & low32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & low32
        return x ^ (x >> 16)

    def expected(seed: int, position: int, token: int) -> float:
        low = mix(seed & low32)
        key = mix(mix(seed >> 32 & low32 ^ low) ^ position * 0x9E3779B1 & low32)
        bits = mix(mix(token * 0x85EBCA77 & low32 ^ key) + low & low32)
        return -math.log(-math.log(((bits >> 9) + 0.5) * 2.0**-23))

    seeds, positions = [0, -1, 2**63 - 1, -(2**63), 0xC2B2AE35], [0, 1, 2**31 - 1, 70_000, 5]
    noise = gumbel(torch.tensor(seeds), torch.tensor(positions), 300)
    wanted = [[expected(*pair, token) for token in range(300)] for pair in zip(seeds, positions, strict=True)]
    torch.testing.assert_close(noise, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["positions", "seeds", "high seeds", "tokens"])
def test_neighbours_are_not_correlated(what: str):
    """Seeds and positions are small counters in practice; their noise must look independent all the same."""
    rows, vocab = 400, 500
    steps = torch.arange(rows)
    zeros = torch.zeros(rows, dtype=torch.int64)
    seed, position = {
        "positions": (zeros + 42, steps),
        "seeds": (steps, zeros + 42),
        "high seeds": (steps << 40, zeros + 42),
        "tokens": (steps * 7919, steps),
    }[what]
    noise = gumbel(seed, position, vocab).double()
    noise = (noise - noise.mean()) / noise.std()
    size = 5.5 / math.sqrt(rows * vocab)  # of a mean of independent products
    for lag in (1, 2, 3, 7, 64, 128, 256):
        if what == "tokens":
            assert (noise[:, lag:] * noise[:, :-lag]).mean().abs() < size * 1.5
        else:
            assert (noise[lag:] * noise[:-lag]).mean().abs() < 5.5 / math.sqrt((rows - lag) * vocab)
            shifted = noise[lag:, lag:] * noise[:-lag, :-lag]
            assert shifted.mean().abs() < 5.5 / math.sqrt(shifted.numel())


def test_pairs_of_draws_at_neighbouring_positions_are_independent():
    count = 60_000
    drawn = many([0.0] * 6, SamplingParams(), count, seed=99)
    observed = [0] * 36
    for first, second in itertools.pairwise(drawn):
        observed[6 * first + second] += 1
    assert chi_square(observed, [(count - 1) / 36] * 36) < critical(35)


# ---- penalties, bias and what is reported ----


def penalized(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    found = []
    for token, one in enumerate(logits):
        if token in prompt or token in output:
            one = one / params.repetition_penalty if one > 0 else one * params.repetition_penalty
        one -= params.frequency_penalty * output.count(token)
        one -= params.presence_penalty * (token in output)
        found.append(one)
    return found


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=12),
    st.data(),
    st.floats(0.5, 2.0),
    st.floats(-2.0, 2.0),
    st.floats(-2.0, 2.0),
)
def test_penalties(logits: list[float], data: st.DataObject, repetition: float, presence: float, frequency: float):
    tokens = st.lists(st.integers(0, len(logits) - 1), max_size=9)
    prompt, output = data.draw(tokens.filter(bool)), data.draw(tokens)
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, max_tokens=99
    )
    found = torch.tensor([logits])
    known = torch.tensor([[*prompt, *output, 0, 0]])  # a slot's row is longer than what is known
    penalize(found, known, torch.tensor([len(prompt)]), torch.tensor([len(prompt) + len(output)]), [params])
    expected = penalized(logits, prompt, output, params)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_logprobs_and_ranks():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    first, second = top_logprobs(logits, torch.tensor([2, 4]), [3, 0])
    exact = logits.double().log_softmax(-1)
    assert first.token_id == 2 and first.rank == 3
    assert first.logprob == pytest.approx(exact[0, 2].item(), abs=1e-6)
    assert sorted(first.top_ids) == [1, 2, 3] and first.top_ids[2] == 2
    assert first.top_logprobs == pytest.approx(exact[0, [1, 3, 2]].tolist(), abs=1e-6)
    assert (second.rank, second.top_ids) == (1, [])
