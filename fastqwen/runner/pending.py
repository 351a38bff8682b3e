"""A step that was launched on a GPU and not yet read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastqwen.kernels.triton.sampling import CORRUPT
from fastqwen.layers.decoder import Decoder
from fastqwen.records import Failure, Row, ScheduledBatch, StepOutput, TokenLogprobs
from fastqwen.runner.choices import Choice, forbid
from fastqwen.runner.logprobs import ChosenLogprobs, ToldLogprobs, prompt_logprobs
from fastqwen.runner.results import NOT_FINITE, only_this_row, step_output
from fastqwen.runner.slots import Slots
from fastqwen.runner.structured import Constraints


class Extras:
    """What some rows of a step ask beyond the device's sampler, which is recorded with the model."""

    def __init__(
        self, rows: Sequence[Row], choices: Sequence[Choice], again: list[int], hidden: Tensor, logits: Tensor,
        decoder: Decoder, slots: Slots,
    ) -> None:  # fmt: skip
        """hidden [tokens, hidden], logits [choices, vocab] as the model left them; ``again``: the places of choices that are
        made again, since the host knows what must not come"""
        self.errors: dict[int, Failure] = {}
        self.late: set[int] = set()
        self.places = again
        self.choices = [choices[place] for place in again]
        self.logprobs = ChosenLogprobs(logits, choices, slots, on_device=True)
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self._slots = slots
        start = 0
        for index, row in enumerate(rows):
            if row.prompt_logprobs:
                with only_this_row(index, self.errors):
                    part = hidden[start : start + row.num_tokens]
                    self.prompt_logprobs[index] = prompt_logprobs(row, part, decoder, slots)
            start += row.num_tokens

    def forbid(self, logits: Tensor, structured: Constraints | None) -> Tensor | None:
        """logits float32 [choices made again, vocab], in place -> a bit for each token that may come, int32
        [choices, vocab / 32]; rows whose grammar fails become ``errors``"""
        for index, choice in enumerate(self.choices):
            if self._slots.host_forbids[choice.slot]:
                with only_this_row(choice.row, self.errors):
                    forbid(logits[index], choice, self._slots)
        if structured is None:
            return None
        self.late, allowed = structured.bits(self.choices, logits.shape[1], self.errors)
        return self._slots.upload(allowed)


class PendingStep:
    """``result`` waits for the step's tokens, not for steps launched after it."""

    def __init__(
        self,
        batch: ScheduledBatch,
        tokens: Tensor,
        told: ToldLogprobs | None,
        done: torch.cuda.Event,
        extras: Extras | None,
    ) -> None:
        self._batch = batch
        self._tokens = tokens  # int32 on the host, one for each of the step's logits, in order
        self._told = told
        self._done = done
        self._extras = extras

    @property
    def late(self) -> list[str]:
        rows = self._batch.rows
        return [] if self._extras is None else [rows[index].request_id for index in sorted(self._extras.late)]

    def result(self) -> StepOutput:
        self._done.synchronize()
        tokens, extras = self._tokens.tolist(), self._extras
        errors = dict(extras.errors) if extras is not None else {}
        if CORRUPT in tokens:
            owners = (index for index, row in enumerate(self._batch.rows) for _ in range(row.num_logits))
            for index, token in zip(owners, tokens, strict=True):
                if token == CORRUPT:
                    errors.setdefault(index, NOT_FINITE)
        logprobs = {} if extras is None else extras.logprobs.of(tokens, errors)
        if self._told is not None:
            logprobs |= self._told.of(tokens)
        reported = {} if extras is None else extras.prompt_logprobs
        late = () if extras is None else extras.late
        return step_output(self._batch, tokens, logprobs=logprobs, prompt_logprobs=reported, errors=errors, late=late)
