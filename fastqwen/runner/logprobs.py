"""How likely the model thought tokens to be, for the rows that ask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastqwen.layers.decoder import Decoder
from fastqwen.records import Failure, Row, TokenLogprobs
from fastqwen.runner.choices import Choice
from fastqwen.runner.results import only_this_row
from fastqwen.runner.sampler import top_logprobs
from fastqwen.runner.slots import Slots

LOGITS_AT_ONCE = 256  # rows of logits that prompt log-probabilities keep in memory


class ChosenLogprobs:
    """Made before logits are bent: reported are the model's own probabilities. Keeps the logits of the rows that ask."""

    def __init__(self, logits: Tensor, choices: Sequence[Choice], slots: Slots) -> None:
        """logits [choices, vocab]"""
        counts = [slots.sampling[choice.slot].logprobs for choice in choices]
        self._asked = [index for index, count in enumerate(counts) if count is not None]
        self._rows = [choices[index].row for index in self._asked]
        self._counts = [counts[index] or 0 for index in self._asked]
        named = [slots.sampling[choices[index].slot].logprob_token_ids for index in self._asked]
        self._named = {place: ids for place, ids in enumerate(named) if ids}
        self._raw = logits[self._asked].float() if self._asked else None

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
