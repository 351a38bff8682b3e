"""What a step must choose, and what bends a choice beyond temperature and cuts: bias, penalties, forbidden stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastqwen.records import Row
from fastqwen.runner import sampler
from fastqwen.runner.slots import Slots


class Choice(NamedTuple):
    """One token to be sampled."""

    row: int  # its place in the step
    slot: int
    position: int  # of the token


def choices_of(rows: Sequence[Row]) -> list[Choice]:
    """In the order of the step's logits."""
    return [
        Choice(index, row.slot, position)
        for index, row in enumerate(rows)
        for position in range(row.end - row.num_logits + 1, row.end + 1)
    ]


def adjust(logits: Tensor, choices: Sequence[Choice], slots: Slots) -> None:
    """Bias, penalties and forbidden stops, in place, where a row asks for them: logits float32 [choices, vocab]"""
    for index, (_, slot, num_known) in enumerate(choices):
        sampling, stops = slots.sampling[slot], slots.stop_token_ids[slot]
        if sampling.needs_history:
            sampler.penalize(
                logits[index : index + 1],
                slots.token_ids[slot : slot + 1, :num_known],
                torch.tensor([slots.num_prompt[slot]], device=logits.device),
                torch.tensor([num_known], device=logits.device),
                [sampling],
            )
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
            logits[index, ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        if num_known - slots.num_prompt[slot] < sampling.min_tokens and stops:
            logits[index, stops] = sampler.FORBIDDEN
