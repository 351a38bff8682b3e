"""A step that was launched on a GPU and not yet read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastqwen.kernels.triton.sampling import CORRUPT
from fastqwen.layers.decoder import Decoder
from fastqwen.records import Failure, Row, ScheduledBatch, StepOutput, TokenLogprobs
from fastqwen.runner.choices import Choice, adjust
from fastqwen.runner.logprobs import ChosenLogprobs, prompt_logprobs
from fastqwen.runner.results import NOT_FINITE, only_this_row, step_output
from fastqwen.runner.slots import Slots
from fastqwen.runner.structured import Constraints


class Extras:
    """What some rows of a step ask beyond the sampler that is recorded with the model: logits bent, probabilities told."""

    def __init__(
        self,
        rows: Sequence[Row],
        choices: list[Choice],
        hidden: Tensor,
        logits: Tensor,
        decoder: Decoder,
        slots: Slots,
    ) -> None:
        """hidden [tokens, hidden], logits [choices, vocab] as the model left them"""
        self.errors: dict[int, Failure] = {}
        self.late: set[int] = set()
        self.choices = choices
        self.logprobs = ChosenLogprobs(logits, choices, slots)
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self._slots = slots
        start = 0
        for index, row in enumerate(rows):
            if row.prompt_logprobs:
                with only_this_row(index, self.errors):
                    part = hidden[start : start + row.num_tokens]
                    self.prompt_logprobs[index] = prompt_logprobs(row, part, decoder, slots)
            start += row.num_tokens

    def bent(self, logits: Tensor, structured: Constraints | None) -> Tensor:
        """float32 [choices, vocab]; rows that cannot be bent, or whose grammar fails, become ``errors``"""
        adjusted = logits.to(torch.float32, copy=True)
        adjust(adjusted, self.choices, self._slots, self.errors)
        if structured is not None:
            self.late = structured.mask(adjusted, self.choices, self.errors)
        return adjusted


class PendingStep:
    """``result`` waits for the step's tokens, not for steps launched after it."""

    def __init__(self, batch: ScheduledBatch, tokens: Tensor, done: torch.cuda.Event, extras: Extras | None) -> None:
        self._batch = batch
        self._tokens = tokens  # int32 on the host, one for each of the step's logits, in order
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
        reported = {} if extras is None else extras.prompt_logprobs
        late = () if extras is None else extras.late
        return step_output(self._batch, tokens, logprobs=logprobs, prompt_logprobs=reported, errors=errors, late=late)
