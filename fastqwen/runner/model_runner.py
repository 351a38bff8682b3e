"""One device's executor: packs a scheduled batch, runs the decoder, samples, and hands out the result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastqwen.engine.executor import StepHandle
from fastqwen.kernels import StateRoom
from fastqwen.layers.decoder import Decoder
from fastqwen.model_config import ModelConfig
from fastqwen.plan import EnginePlan
from fastqwen.records import Failure, ScheduledBatch, StepOutput, TokenLogprobs
from fastqwen.runner import sampler
from fastqwen.runner.choices import Choice, adjust, choices_of, taken
from fastqwen.runner.device import CACHE_DTYPES
from fastqwen.runner.logprobs import ChosenLogprobs, prompt_logprobs
from fastqwen.runner.packing import pack
from fastqwen.runner.pooling import PooledStep, last_vectors
from fastqwen.runner.results import NOT_FINITE, only_this_row, step_output
from fastqwen.runner.slots import Slots
from fastqwen.runner.states import States
from fastqwen.runner.structured import Constraints, mask


class FinishedStep:
    def __init__(self, output: StepOutput) -> None:
        self._output = output

    @property
    def late(self) -> list[str]:
        return [row.request_id for row in self._output.rows if row.stepped_aside]

    def result(self) -> StepOutput:
        return self._output


class ModelRunner:
    """Computes each step at once, so there is nothing to run ahead of; the CPU's executor."""

    run_ahead = 1

    def __init__(
        self,
        model: ModelConfig,
        decoder: Decoder,
        plan: EnginePlan,
        device: torch.device,
        structured: Constraints | None = None,
        check_weights: Callable[[], None] = lambda: None,
    ) -> None:
        """``check_weights`` raises where a mapped file was changed: then a step's tokens are worth nothing."""
        self._check_weights = check_weights
        self._model = model
        self._decoder = decoder
        self._plan = plan
        self._structured = structured
        self.slots = Slots(
            model,
            num_slots=plan.max_num_seqs,
            max_model_len=plan.max_model_len,
            block_size=plan.block_size,
            device=device,
        )
        # One block and one slot more than the plan's: what only pads a batch is written there.
        num_slots = plan.max_num_seqs + 1
        room = StateRoom(
            num_blocks=plan.num_blocks + 1,
            block_size=plan.block_size,
            num_slots=num_slots + plan.max_state_snapshots,
            cache_dtype=CACHE_DTYPES[plan.kv_cache_dtype],
            device=device,
        )
        self.states = States(decoder.make_states(room), first_kept=num_slots)

    @torch.inference_mode()
    def submit(self, batch: ScheduledBatch) -> StepHandle:
        """The model is in ``Decoder.hidden``, which advances all layers' states by the step's tokens, and in
        ``Decoder.logits``; around it stand packing and sampling."""
        self.slots.update(batch.admissions, batch.rows)
        if self._structured is not None:
            self._structured.admit(batch.admissions)
        ids, step = pack(batch.rows, self.slots, logn_len=self._model.logn_len)
        self.states.before(batch.admissions, batch.rows)
        hidden = self._decoder.hidden(ids, step, self.states.layers)
        self.states.after(batch.rows)
        done = FinishedStep(self._finish(batch, hidden))
        vectors = last_vectors(self._decoder, batch.rows, hidden)
        self._check_weights()
        return done if vectors is None else PooledStep(done, batch.rows, vectors, self._decoder.classifier)

    def is_late(self, slot: int) -> bool | None:
        return self._structured is not None and self._structured.is_late(slot)

    def _finish(self, batch: ScheduledBatch, hidden: Tensor) -> StepOutput:
        """Sample, and look for rows that failed: hidden [tokens, hidden], row after row"""
        choices, start = choices_of(batch.rows), 0
        places: list[int] = []
        errors: dict[int, Failure] = {}
        reported: dict[int, list[TokenLogprobs]] = {}
        for index, row in enumerate(batch.rows):
            part = hidden[start : start + row.num_tokens]
            start += row.num_tokens
            places += range(start - row.num_logits, start)
            if not row.num_logits and not bool(torch.isfinite(part).all()):
                errors[index] = NOT_FINITE
            elif row.prompt_logprobs:
                with only_this_row(index, errors):
                    reported[index] = prompt_logprobs(row, part, self._decoder, self.slots)
        if not choices:
            return step_output(batch, [], logprobs={}, prompt_logprobs=reported, errors=errors)
        logits = self._decoder.logits(hidden[places]).float()
        lowest, highest = logits.aminmax(dim=-1)
        finite = torch.isfinite(lowest) & torch.isfinite(highest)
        for place, (choice, fine) in enumerate(zip(choices, finite.tolist(), strict=True)):
            if not fine:
                errors[choice.row] = NOT_FINITE
                logits[place] = 0.0  # what is done to all rows at once must not meet it
        logprobs = ChosenLogprobs(logits, choices, self.slots)
        tokens, late = self._sample(logits, choices, errors)
        told = logprobs.of(tokens, errors)
        return step_output(batch, tokens, logprobs=told, prompt_logprobs=reported, errors=errors, late=late)

    def _sample(self, logits: Tensor, choices: list[Choice], errors: dict[int, Failure]) -> tuple[list[int], set[int]]:
        """Tokens, and rows that step aside. logits float32 [choices, vocab], changed in place; rows that cannot be sampled
        are added to ``errors``."""
        adjust(logits, choices, self.slots, errors)
        late: set[int] = set()
        if self._structured is not None and any(self._structured.constrains(choice.slot) for choice in choices):
            late = mask(self._structured, logits, choices, errors)
        try:
            chosen = self._draw(logits, choices)
        except Exception:  # one of them: each alone says which
            chosen = [0] * len(choices)
            for place, choice in enumerate(choices):
                with only_this_row(choice.row, errors):
                    [chosen[place]] = self._draw(logits[place : place + 1], [choice])
        told = torch.tensor(chosen, dtype=torch.int32)
        self._decoder.embed.world.broadcast(told)
        self.slots.token_ids[_slots_of(choices), _positions_of(choices)] = told
        if self._structured is not None:
            self._structured.take(*taken(choices, chosen, late))
        return chosen, late

    def _draw(self, logits: Tensor, choices: list[Choice]) -> list[int]:
        slots, row_slots = self.slots, _slots_of(choices)
        tokens = sampler.sample(
            logits,
            temperature=slots.temperature[row_slots],
            top_k=slots.top_k[row_slots],
            top_p=slots.top_p[row_slots],
            min_p=slots.min_p[row_slots],
            seed=slots.seed[row_slots],
            position=_positions_of(choices),
            params=[slots.sampling[choice.slot] for choice in choices],
        )
        return tokens.tolist()


def _slots_of(choices: list[Choice]) -> Tensor:
    return torch.tensor([choice.slot for choice in choices])


def _positions_of(choices: list[Choice]) -> Tensor:
    return torch.tensor([choice.position for choice in choices])
