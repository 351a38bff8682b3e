"""The device's prepare and sample against their plain torch twins."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
import torch

import tests.kernels.test_triton as setup
from fastqwen.kernels.limits import LISTED
from fastqwen.kernels.triton import sampling, step
from fastqwen.kernels.wishes import COLUMN
from fastqwen.layers.rotary import logn_scale
from fastqwen.plan.catalog import find_published
from fastqwen.records import Admission, SamplingParams
from fastqwen.runner import sampler
from fastqwen.runner.choices import Choice, adjust
from fastqwen.runner.logprobs import ToldLogprobs
from fastqwen.runner.packing import cos_sin
from fastqwen.runner.slots import Slots
from fastqwen.runner.wishes import counts_of

DEVICE = setup.DEVICE
MODEL = find_published("Qwen3-0.6B").model


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


def cuts() -> list[dict]:
    return [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
    ]


VOCAB, LENGTH = 5000, 40


def make_slots(params: list[SamplingParams], known: list[list[int]], num_prompt: int) -> tuple[Slots, torch.Tensor]:
    """Slots that have just been taken, and their counts."""
    slots = Slots(
        msgspec.structs.replace(MODEL, vocab_size=VOCAB), num_slots=len(params), max_model_len=LENGTH, block_size=16,
        device=torch.device(DEVICE),
    )  # fmt: skip
    counts = torch.zeros((len(params) + 1, VOCAB), dtype=torch.int16, device=DEVICE)
    admissions = [
        Admission(
            slot=slot, request_id="", token_ids=known[slot], num_prompt_tokens=num_prompt, sampling=one,
            seed=one.seed or 0, stop_token_ids=[7, 8], rope_key="",
        )
        for slot, one in enumerate(params)
    ]  # fmt: skip
    slots.update(admissions, [], dict(enumerate(counts)))
    for one in admissions:
        ids, found = counts_of(one, VOCAB)
        counts[one.slot, torch.from_numpy(ids).to(DEVICE)] = torch.from_numpy(found).to(DEVICE)
    return slots, counts


def sampled(logits: torch.Tensor, row_slots: torch.Tensor, positions: torch.Tensor, slots: Slots, **more):
    return sampling.sample(
        logits,
        row_slots,
        positions,
        wishes=slots.wishes,
        bent=slots.bent,
        token_ids=slots.token_ids,
        **more,
    )


def expected_of(logits: torch.Tensor, choices: list[Choice], slots: Slots) -> list[int]:
    """The plain sampler's tokens. What it is given, it may change."""
    errors: dict = {}
    logits = logits.clone()
    adjust(logits, choices, slots, errors)
    assert not errors
    rows = [one.slot for one in choices]
    return sampler.sample(
        logits, temperature=slots.temperature[rows], top_k=slots.top_k[rows], top_p=slots.top_p[rows],
        min_p=slots.min_p[rows], seed=slots.seed[rows], params=[slots.sampling[slot] for slot in rows],
        position=torch.tensor([one.position for one in choices], device=logits.device),
    ).tolist()  # fmt: skip


@pytest.mark.parametrize("listed", [1, LISTED], ids=["little is listed", "as usual"])
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0], ids=["flat", "usual", "peaked"])
def test_samples_are_those_of_the_plain_sampler(listed: int, spread: float):
    """Whether the list suffices, or all logits must be looked at again."""
    params = [SamplingParams(**one, seed=random.randrange(2**62)) for one in cuts()]
    slots, _counts = make_slots(params, [[1] * 9] * len(params), 9)
    order = torch.randperm(len(params), device=DEVICE)
    for position in (9, 10)[: 1 if listed == 1 or spread < 1 else 2]:
        logits = torch.randn(len(params), VOCAB, device=DEVICE) * spread
        logits[:, 3::7] = logits[:, 2:-1:7]  # many are equal
        logits[0, 17] = logits[0, 4321] = 50.0  # a tie: the lowest id wins
        expected = expected_of(logits, [Choice(slot, slot, position) for slot in range(len(params))], slots)
        where = torch.full((len(params),), position, dtype=torch.int32, device=DEVICE)
        found, _ = sampled(logits[order], order.int(), where, slots, listed=listed)
        assert found.tolist() == [expected[slot] for slot in order.tolist()]
        assert slots.token_ids[: len(params), position].tolist() == expected


BENT = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.6, "logit_bias": {3: 2.0, 4999: 100.0, 17: -100.0}},
    {"min_tokens": 3, "logit_bias": {7: 5.0, 8: 5.5}},
    {},
]


@pytest.mark.parametrize(
    ("listed", "positions", "kinds"), [(1, 2, 1), (LISTED, 6, 4)], ids=["little is listed", "as usual"]
)
def test_what_bends_logits_is_kept_on_the_device(listed: int, positions: int, kinds: int):
    """Penalties know each token that was sampled meanwhile, once, however often a step is sampled; early ends do not come."""
    wishes = [
        {**one, **cut} for one in BENT[: kinds + 2] for cut in (cuts()[4], cuts()[0], cuts()[1], cuts()[5])[:kinds]
    ]
    params = [SamplingParams(**one, seed=random.randrange(2**62)) for one in wishes]
    known = [[random.randrange(20) for _ in range(12)] for _ in params]
    slots, counts = make_slots(params, known, 9)
    row_slots = torch.arange(len(params), dtype=torch.int32, device=DEVICE)
    before = counts[:-1].long().sum()
    for position in range(12, 12 + positions):
        logits = torch.randn(len(params), VOCAB, device=DEVICE) * 3
        logits[:, :20] += 10.0  # the same tokens come again and again
        expected = expected_of(logits, [Choice(slot, slot, position) for slot in range(len(params))], slots)
        where = torch.full_like(row_slots, position)
        for _ in range(2):
            found, _ = sampled(logits, row_slots, where, slots, listed=listed)
            assert found.tolist() == expected, position
    counted = sum(one.needs_history for one in params) * (positions - 1)
    assert counts[:-1].long().sum() - before == counted


def test_a_token_is_counted_no_further_than_there_is_room():
    params = [SamplingParams(temperature=0.0, presence_penalty=0.1)]
    slots, counts = make_slots(params, [[1, 2, 3]], 2)
    counts[0, 3] = torch.tensor(0x7FFF | -0x8000, dtype=torch.int16)  # of the prompt as well
    slots.wishes[0, COLUMN["num_counted"]] = 2
    one = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    sampled(torch.randn(1, VOCAB, device=DEVICE), one * 0, one, slots)
    assert counts[0, 3].item() == -1 and slots.wishes[0, COLUMN["num_counted"]].item() == 3


def test_only_what_a_mask_allows_comes():
    params = [SamplingParams(**one) for one in cuts()]
    slots, _counts = make_slots(params, [[1, 2, 3]] * len(params), 3)
    row_slots = torch.arange(len(params), dtype=torch.int32, device=DEVICE)
    logits = torch.randn(len(params), VOCAB, device=DEVICE)
    allowed = torch.rand(len(params), VOCAB) < 0.01
    allowed[0] = False
    allowed[0, 4999] = True
    packed = np.packbits(np.pad(allowed.numpy(), ((0, 0), (0, -VOCAB % 32))), axis=1, bitorder="little").view(np.int32)
    expected = expected_of(
        logits.masked_fill(~allowed.to(DEVICE), sampler.FORBIDDEN),
        [Choice(slot, slot, 3) for slot in range(len(params))],
        slots,
    )
    bits = torch.from_numpy(packed).to(DEVICE)
    found, _ = sampled(logits, row_slots, torch.full_like(row_slots, 3), slots, allowed=bits)
    assert found.tolist() == expected and found[0] == 4999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_told_are_the_models_own_probabilities(dtype: torch.dtype):
    """Of logits that were bent since, and of many that are equal."""
    numbers = [None, 0, 1, 5, 20, 32, 5, 5]
    params = [SamplingParams(**one, logprobs=number) for one, number in zip(cuts(), numbers, strict=True)]
    params.append(SamplingParams(temperature=0.0, logprobs=5, logit_bias={77: 100.0}))
    slots, _counts = make_slots(params, [[1, 2, 3]] * len(params), 3)
    row_slots = torch.arange(len(params), dtype=torch.int32, device=DEVICE)
    raw = (torch.randn(len(params), VOCAB, device=DEVICE) * 3).to(dtype)
    raw[6] = 1.0
    bent = raw.float()
    bent[7, :100] = sampler.FORBIDDEN
    found, told = sampled(bent, row_slots, torch.full_like(row_slots, 3), slots, raw=raw)
    choices = [Choice(slot, slot, 3) for slot in range(len(params))]
    tokens = found.tolist()
    got = ToldLogprobs(told.cpu(), choices, slots).of(tokens)
    assert sorted(got) == list(range(1, len(params)))
    for place, one in got.items():
        [expected] = sampler.top_logprobs(
            raw[place : place + 1], found[place : place + 1].long(), [params[place].logprobs or 0]
        )
        assert one.token_id == tokens[place] and one.logprob == pytest.approx(expected.logprob, abs=2e-6)
        assert one.top_logprobs == pytest.approx(expected.top_logprobs, abs=2e-6)
        logprobs = raw[place].float().log_softmax(-1)
        assert [logprobs[token].item() for token in one.top_ids] == pytest.approx(expected.top_logprobs, abs=2e-6)
        assert len(set(one.top_ids)) == len(one.top_ids)
        if dtype == torch.float32:
            assert one.rank == expected.rank
    assert tokens[8] == 77 and got[8].rank > 1


def test_a_small_vocabulary_tells_all_it_has():
    slots, _counts = make_slots([SamplingParams(temperature=0.0, logprobs=20)], [[1]], 1)
    one = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    logits = torch.randn(1, 9, device=DEVICE)
    found, told = sampled(logits, one * 0, one, slots)
    [got] = ToldLogprobs(told.cpu(), [Choice(0, 0, 1)], slots).of(found.tolist()).values()
    assert got.top_ids == logits[0].argsort(descending=True).tolist()


def test_a_row_that_is_not_finite_is_marked_and_the_others_are_not():
    slots, _counts = make_slots([SamplingParams(temperature=0.0)] * 3, [[1]] * 3, 1)
    logits = torch.randn(3, VOCAB, device=DEVICE)
    expected = logits.argmax(-1).tolist()
    logits[1, 4500] = float("nan")
    rows = torch.arange(3, dtype=torch.int32, device=DEVICE)
    found, _ = sampled(logits, rows, torch.ones_like(rows), slots)
    assert found.tolist() == [expected[0], sampling.CORRUPT, expected[2]]
