"""The device's prepare and sample against their plain torch twins."""

from __future__ import annotations

import pytest
import torch

import tests.kernels.test_triton as setup
from fastqwen.kernels.limits import LISTED
from fastqwen.kernels.triton import sampling, step
from fastqwen.layers.rotary import logn_scale
from fastqwen.records import SamplingParams
from fastqwen.runner import sampler
from fastqwen.runner.packing import cos_sin

DEVICE = setup.DEVICE


def test_prepare_gathers_what_the_layers_need():
    tokens = torch.randint(0, 50, (5, 30), dtype=torch.int32, device=DEVICE)
    frequencies, scale = torch.rand(5, 12, device=DEVICE), torch.rand(5, device=DEVICE)
    embed = torch.randn(50, 1100, device=DEVICE)
    slots = torch.tensor([4, 0, 2], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([29, 3, 17], dtype=torch.int32, device=DEVICE)
    residual, angles, q_scale = step.prepare(
        slots, starts, token_ids=tokens, frequencies=frequencies, rope_scale=scale, embed=embed, logn_len=8
    )
    assert torch.equal(residual, embed[tokens[slots.long(), starts.long()].long()])
    torch.testing.assert_close(
        angles, cos_sin(starts, frequencies[slots.long()], scale[slots.long()]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(q_scale, logn_scale(starts, 8))


def wishes() -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.6),
        SamplingParams(temperature=0.9, top_k=50, top_p=0.9),
        SamplingParams(temperature=1.0, min_p=0.2),
        SamplingParams(temperature=2.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-6),
    ]


@pytest.mark.parametrize("listed", [1, 4, LISTED], ids=["nothing is listed", "little is", "as usual"])
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0], ids=["flat", "usual", "peaked"])
def test_samples_are_those_of_the_plain_sampler(listed: int, spread: float):
    """Whether the list suffices, or all logits must be looked at again."""
    params = wishes()
    count, vocab = len(params), 5000

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(one, name) for one in params], dtype=dtype, device=DEVICE)

    state = {
        "temperature": column("temperature", torch.float32),
        "top_k": column("top_k", torch.int32),
        "top_p": column("top_p", torch.float32),
        "min_p": column("min_p", torch.float32),
        "seed": torch.randint(-(2**62), 2**62, (count,), device=DEVICE),
    }
    order = torch.randperm(count, device=DEVICE)
    for round_number in range(2):
        logits = torch.randn(count, vocab, device=DEVICE) * spread
        logits[:, 3::7] = logits[:, 2:-1:7]  # many are equal
        logits[0, 17] = logits[0, 4321] = 50.0  # a tie: the lowest id wins
        token_ids = torch.zeros((count, 16), dtype=torch.int32, device=DEVICE)
        positions = torch.randint(0, 16, (count,), dtype=torch.int32, device=DEVICE)
        found = sampling.sample(
            logits[order], order.int(), positions[order], token_ids=token_ids, listed=listed, **state
        )
        expected = sampler.sample(logits, **state, position=positions, params=params)
        assert found.tolist() == expected[order].tolist(), f"round {round_number}"
        assert token_ids[torch.arange(count), positions.long()].tolist() == expected.tolist()


def test_a_row_that_is_not_finite_is_marked_and_the_others_are_not():
    logits = torch.randn(3, 9000, device=DEVICE)
    expected = logits.argmax(-1).tolist()
    logits[1, 8500] = float("nan")
    slots = torch.arange(3, dtype=torch.int32, device=DEVICE)
    zeros, ones = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    token_ids = torch.zeros((3, 4), dtype=torch.int32, device=DEVICE)
    found = sampling.sample(
        logits,
        slots,
        slots,
        temperature=zeros,
        top_k=slots,
        top_p=ones,
        min_p=zeros,
        seed=torch.zeros(3, dtype=torch.int64, device=DEVICE),
        token_ids=token_ids,
    )
    assert found.tolist() == [expected[0], sampling.CORRUPT, expected[2]]
