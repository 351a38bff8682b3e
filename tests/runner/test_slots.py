"""What a step changes of the slots arrives where the kernels read it, and nowhere else."""

from __future__ import annotations

import torch

from fastqwen.layers.rotary import inverse_frequencies
from fastqwen.plan.catalog import find_published
from fastqwen.records import Admission, Row, SamplingParams
from fastqwen.runner.slots import ALIGNED_WORDS, Slots

MODEL = find_published("Qwen3-0.6B").model


def make_slots(num_slots: int = 3) -> Slots:
    return Slots(MODEL, num_slots=num_slots, max_model_len=100, block_size=16, device=torch.device("cpu"))


def admission(slot: int, token_ids: list[int], seed: int = 1, **wishes) -> Admission:
    return Admission(
        slot=slot, request_id="", token_ids=token_ids, num_prompt_tokens=len(token_ids), seed=seed, stop_token_ids=[],
        sampling=SamplingParams(**wishes), rope_key="",
    )  # fmt: skip


def row(slot: int, new_blocks: list[int]) -> Row:
    return Row(slot=slot, request_id="", start=0, num_tokens=1, new_blocks=tuple(new_blocks), num_logits=1)


def test_newcomers_and_blocks_in_one_step():
    slots = make_slots()
    first = admission(2, [5, 6, 7], seed=-(2**62) - 3, temperature=0.7, top_k=9, top_p=0.5, min_p=0.25)
    second = admission(0, [8], temperature=0.0)
    slots.update([first, second], [row(2, [11, 12]), row(0, [13])])
    slots.update([], [row(2, [14]), row(0, [])])
    assert slots.token_ids[:, :4].tolist() == [[8, 0, 0, 0], [0] * 4, [5, 6, 7, 0], [0] * 4]
    assert slots.block_tables[:, :4].tolist() == [[13, 0, 0, 0], [0] * 4, [11, 12, 14, 0], [0] * 4]
    assert slots.seed.tolist() == [1, 0, -(2**62) - 3, 0]
    assert slots.temperature.tolist() == torch.tensor([0.0, 0, 0.7, 0]).tolist()
    assert slots.top_k.tolist() == [0, 0, 9, 0]
    assert slots.top_p.tolist() == [1.0, 1, 0.5, 1]
    assert slots.min_p.tolist() == [0, 0, 0.25, 0]
    expected, scale = inverse_frequencies(MODEL.rope, MODEL.head_dim, "")
    assert torch.equal(slots.inverse_frequencies[2], expected) and not slots.inverse_frequencies[1].any()
    assert slots.rope_scale.tolist() == [scale, 0, scale, 0]


def test_a_slot_is_taken_over():
    slots = make_slots()
    slots.update([admission(1, [5, 6, 7])], [row(1, [11, 12])])
    slots.update([admission(1, [9])], [row(1, [13])])
    assert slots.token_ids[1, :1].tolist() == [9]
    assert slots.block_tables[1, :1].tolist() == [13], "its table begins anew"


def test_fields_begin_where_kernels_expect_them():
    for num_slots in (1, 2, 3, 256):
        slots = make_slots(num_slots)
        for field in (
            slots.token_ids, slots.block_tables, slots.inverse_frequencies, slots.rope_scale, slots.wishes, slots.bent,
        ):  # fmt: skip
            assert field.is_contiguous() and len(field) == num_slots + 1
            assert field.data_ptr() % (4 * ALIGNED_WORDS) == 0
