"""How likely the model thought tokens to be, for the rows that ask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastqwen.kernels.limits import MAX_TOLD
from fastqwen.layers.decoder import Decoder
from fastqwen.records import Failure, Row, TokenLogprobs
from fastqwen.runner.choices import Choice
from fastqwen.runner.results import only_this_row
from fastqwen.runner.sampler import top_logprobs
from fastqwen.runner.slots import Slots

LOGITS_AT_ONCE = 256  # rows of logits that prompt log-probabilities keep in memory


class ChosenLogprobs:
    """Made before logits are bent: reported are the model's own probabilities. Keeps the logits of the rows that ask."""

    def __init__(self, logits: Tensor, choices: Sequence[Choice], slots: Slots, *, on_device: bool = False) -> None:
        """logits [choices, vocab]; ``on_device``: what its sampler tells is left out"""
        asked = [
            (index, choice.row, slots.sampling[choice.slot].logprobs or 0)
            for index, choice in enumerate(choices)
            if slots.sampling[choice.slot].logprobs is not None and not (on_device and slots.device_tells[choice.slot])
        ]
        self._asked = [index for index, _, _ in asked]
        self._rows = [row for _, row, _ in asked]
        self._counts = [count for _, _, count in asked]
        named = [slots.sampling[choices[index].slot].logprob_token_ids for index in self._asked]
        self._named = {place: ids for place, ids in enumerate(named) if ids}
        self._raw = logits[self._asked].float() if asked else None

    def of(self, tokens: Sequence[int], errors: dict[int, Failure]) -> dict[int, TokenLogprobs]:
        """By the choice's place, once the tokens are known; a failed row's token may be any number. Rows whose
        probabilities cannot be told are added to ``errors``."""
        if self._raw is None:
            return {}
        chosen = torch.tensor([max(0, tokens[index]) for index in self._asked], device=self._raw.device)
        try:
            return dict(zip(self._asked, top_logprobs(self._raw, chosen, self._counts, self._named), strict=True))
        except Exception:  # one of them: each alone says which
            return self._one_by_one(self._raw, chosen, errors)

    def _one_by_one(self, raw: Tensor, chosen: Tensor, errors: dict[int, Failure]) -> dict[int, TokenLogprobs]:
        found = {}
        for index, (place, row, count) in enumerate(zip(self._asked, self._rows, self._counts, strict=True)):
            with only_this_row(row, errors):
                named = {0: self._named[index]} if index in self._named else None
                [found[place]] = top_logprobs(raw[index : index + 1], chosen[index : index + 1], [count], named)
        return found


class ToldLogprobs:
    """What a device's sampler told, on the host once the step is done."""

    def __init__(self, words: Tensor, choices: Sequence[Choice], slots: Slots) -> None:
        """words int32 [choices, 2 + 2 * MAX_TOLD], as kernels/triton/sampling.py leaves them"""
        self._words = words
        asked = [(index, choice.slot) for index, choice in enumerate(choices) if slots.device_tells[choice.slot]]
        self._places = [index for index, _ in asked]
        self._counts = [slots.sampling[slot].logprobs or 0 for _, slot in asked]

    def of(self, tokens: Sequence[int]) -> dict[int, TokenLogprobs]:
        """By the choice's place."""
        words = self._words.numpy()[self._places]
        values, ids = words[:, 2 : 2 + MAX_TOLD].view(np.float32), words[:, 2 + MAX_TOLD :]
        given = np.arange(MAX_TOLD) < np.array(self._counts)[:, None]
        values = np.where(given & np.isfinite(values), values, -np.inf)  # a small vocabulary has fewer
        order = np.lexsort((ids, -values))[:, : max(self._counts)]
        values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
        counts = np.minimum(self._counts, (values > -np.inf).sum(1)).tolist()
        chosen, ranks = words[:, 0].view(np.float32).tolist(), words[:, 1].tolist()
        rows = zip(self._places, chosen, ranks, ids.tolist(), values.tolist(), counts, strict=True)
        return {
            place: TokenLogprobs(tokens[place], logprob, rank, ids[:count], values[:count])
            for place, logprob, rank, ids, values, count in rows
        }


def prompt_logprobs(row: Row, hidden: Tensor, decoder: Decoder, slots: Slots) -> list[TokenLogprobs]:
    """Of each prompt token that follows one of this row's tokens; hidden [row's tokens, hidden]"""
    count = min(row.num_tokens, slots.num_prompt[row.slot] - 1 - row.start)
    following = slots.token_ids[row.slot, row.start + 1 : row.start + 1 + count].long()
    alternatives = slots.sampling[row.slot].prompt_logprobs or 0
    found = []
    for start in range(0, count, LOGITS_AT_ONCE):
        stop = min(start + LOGITS_AT_ONCE, count)
        logits = decoder.logits(hidden[start:stop])
        found += top_logprobs(logits, following[start:stop], [alternatives] * (stop - start))
    return found
