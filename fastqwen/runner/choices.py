"""What a step must choose, and what bends a choice beyond temperature and cuts: bias, penalties, forbidden tokens, words
and stops."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastqwen.records import Failure, Row
from fastqwen.runner import sampler
from fastqwen.runner.results import only_this_row
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


def taken(choices: Sequence[Choice], tokens: Sequence[int], late: Collection[int]) -> tuple[list[int], list[int]]:
    """Slots and tokens of the choices that hold: not those of rows that stepped aside."""
    held = [(choice.slot, token) for choice, token in zip(choices, tokens, strict=True) if choice.row not in late]
    return [slot for slot, _ in held], [token for _, token in held]


def adjust(logits: Tensor, choices: Sequence[Choice], slots: Slots, errors: dict[int, Failure]) -> None:
    """Bias, penalties and forbidden tokens, in place, where a row asks for them: logits float32 [choices, vocab]"""
    for index, choice in enumerate(choices):
        if slots.sampling[choice.slot].needs_more(choice.position - slots.num_prompt[choice.slot]):
            with only_this_row(choice.row, errors):
                _adjust_row(logits[index], choice, slots)
                forbid(logits[index], choice, slots)


def _adjust_row(logits: Tensor, choice: Choice, slots: Slots) -> None:
    """What a device's sampler does itself (kernels/wishes.py): logits float32 [vocab]"""
    _, slot, num_known = choice
    sampling, stops = slots.sampling[slot], slots.stop_token_ids[slot]
    if sampling.needs_history:
        sampler.penalize(
            logits[None],
            slots.token_ids[slot : slot + 1, :num_known],
            torch.tensor([slots.num_prompt[slot]], device=logits.device),
            torch.tensor([num_known], device=logits.device),
            [sampling],
        )
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    if num_known - slots.num_prompt[slot] < sampling.min_tokens and stops:
        logits[stops] = sampler.FORBIDDEN


def forbid(logits: Tensor, choice: Choice, slots: Slots) -> None:
    """All but the tokens that are allowed, and ends of words that must not be said, in place: logits float32 [vocab]"""
    _, slot, num_known = choice
    sampling = slots.sampling[slot]
    if sampling.allowed_token_ids is not None:
        kept = torch.tensor(sampling.allowed_token_ids, device=logits.device)
        logits.copy_(torch.full_like(logits, sampler.FORBIDDEN).index_copy_(0, kept, logits[kept]))
    if sampling.bad_word_ids:
        _forbid_words(logits, sampling.bad_word_ids, slots.token_ids[slot, slots.num_prompt[slot] : num_known])


def _forbid_words(logits: Tensor, words: Sequence[Sequence[int]], said: Tensor) -> None:
    """The last token of each word of which all others were just said, in place: logits float32 [vocab], said int [tokens].

    Nothing is read back: the host need not have seen what was said.
    """
    for *before, last in words:
        if len(before) <= len(said):
            tail = said[len(said) - len(before) :]
            hit = (tail == torch.tensor(before, dtype=said.dtype, device=said.device)).all()
            logits[last] = torch.where(hit, sampler.FORBIDDEN, logits[last])
