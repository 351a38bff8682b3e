"""One device's executor: packs a scheduled batch, runs the decoder, samples, and hands out the result."""

from __future__ import annotations

import torch
from torch import Tensor

from fastqwen.engine.executor import StepHandle
from fastqwen.kernels import LayerCache
from fastqwen.layers.decoder import Decoder
from fastqwen.model_config import ModelConfig
from fastqwen.plan import EnginePlan
from fastqwen.records import Failure, Row, SampledRow, ScheduledBatch, StepOutput, TokenLogprobs
from fastqwen.runner import sampler
from fastqwen.runner.device import TORCH_DTYPES
from fastqwen.runner.packing import pack
from fastqwen.runner.pooling import NOT_FINITE, PooledStep, last_vectors
from fastqwen.runner.slots import Slots
from fastqwen.runner.structured import StructuredOutput

LOGITS_AT_ONCE = 256  # rows of logits that prompt log-probabilities keep in memory


class FinishedStep:
    def __init__(self, output: StepOutput) -> None:
        self._output = output

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
        structured: StructuredOutput | None = None,
    ) -> None:
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
        # One block more than the plan's: what only pads a batch is written there.
        shape = (plan.num_blocks + 1, model.num_kv_heads, plan.block_size, model.head_dim)
        dtype = TORCH_DTYPES[plan.dtype]
        self.caches = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(model.num_layers)
        ]

    @torch.inference_mode()
    def submit(self, batch: ScheduledBatch) -> StepHandle:
        self.slots.update(batch.admissions, batch.rows)
        if self._structured is not None:
            self._structured.admit(batch.admissions)
        ids, where = pack(batch.rows, self.slots, block_size=self._plan.block_size, logn_len=self._model.logn_len)
        hidden = self._decoder.hidden(ids, where, self.caches)
        assert where.rows is not None
        ends = where.rows.starts[1:].long() - 1
        sampling = [index for index, row in enumerate(batch.rows) if row.samples]
        tokens, logprobs, errors = self._sample([batch.rows[i] for i in sampling], hidden[ends[sampling]])
        results = dict(zip(sampling, zip(tokens, logprobs, errors, strict=True), strict=True))
        starts = where.rows.starts.tolist()
        vectors = last_vectors(self._decoder, batch.rows, hidden)
        output = StepOutput(
            step_id=batch.step_id,
            rows=[
                self._result(row, results.get(index), hidden[starts[index] : starts[index + 1]])
                for index, row in enumerate(batch.rows)
            ],
        )
        step = FinishedStep(output)
        return step if vectors is None else PooledStep(step, batch.rows, vectors)

    def _result(
        self, row: Row, sampled: tuple[int, TokenLogprobs | None, Failure | None] | None, hidden: Tensor
    ) -> SampledRow:
        token, logprobs, error = sampled or (None, None, None if bool(torch.isfinite(hidden).all()) else NOT_FINITE)
        if error is not None:
            return SampledRow(request_id=row.request_id, error=error)
        prompt_logprobs = self._prompt_logprobs(row, hidden) if row.prompt_logprobs else None
        return SampledRow(request_id=row.request_id, token_id=token, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _sample(
        self, rows: list[Row], hidden: Tensor
    ) -> tuple[list[int], list[TokenLogprobs | None], list[Failure | None]]:
        """The next token of each row, its log-probabilities if asked for, and why it cannot have one."""
        if not rows:
            return [], [], []
        slots = self.slots
        logits = self._decoder.logits(hidden).float()
        lowest, highest = logits.aminmax(dim=-1)
        finite = (torch.isfinite(lowest) & torch.isfinite(highest)).tolist()
        errors: list[Failure | None] = [None if fine else NOT_FINITE for fine in finite]
        params = [slots.sampling[row.slot] for row in rows]
        row_slots = torch.tensor([row.slot for row in rows])
        positions = torch.tensor([row.start + row.num_tokens for row in rows])
        asked = [index for index, one in enumerate(params) if one.logprobs is not None]
        raw = logits[asked] if asked else None  # a copy: reported are the model's own probabilities
        self._adjust(logits, rows)
        if self._structured is not None:
            for index, failure in self._structured.mask(logits, [row.slot for row in rows]).items():
                errors[index] = errors[index] or failure
        tokens = sampler.sample(
            logits,
            temperature=slots.temperature[row_slots],
            top_k=slots.top_k[row_slots],
            top_p=slots.top_p[row_slots],
            min_p=slots.min_p[row_slots],
            seed=slots.seed[row_slots],
            position=positions,
            params=params,
        )
        slots.token_ids[row_slots, positions] = tokens.int()
        if self._structured is not None:
            self._structured.take([row.slot for row in rows], tokens.tolist())
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        if raw is not None:
            counts = [params[index].logprobs or 0 for index in asked]
            for index, found in zip(asked, sampler.top_logprobs(raw, tokens[asked], counts), strict=True):
                logprobs[index] = found
        return tokens.tolist(), logprobs, errors

    def _adjust(self, logits: Tensor, rows: list[Row]) -> None:
        """Bias, penalties and forbidden stops, in place, where a row asks for them."""
        slots = self.slots
        for index, row in enumerate(rows):
            sampling = slots.sampling[row.slot]
            num_known = row.start + row.num_tokens
            if sampling.needs_history:
                sampler.penalize(
                    logits[index : index + 1],
                    slots.token_ids[row.slot : row.slot + 1, :num_known],
                    torch.tensor([slots.num_prompt[row.slot]], device=logits.device),
                    torch.tensor([num_known], device=logits.device),
                    [sampling],
                )
            if sampling.logit_bias:
                ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
                logits[index, ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
            if num_known - slots.num_prompt[row.slot] < sampling.min_tokens and slots.stop_token_ids[row.slot]:
                logits[index, slots.stop_token_ids[row.slot]] = sampler.FORBIDDEN

    def _prompt_logprobs(self, row: Row, hidden: Tensor) -> list[TokenLogprobs]:
        """How likely the model thought each prompt token that follows one of this row's tokens."""
        slots = self.slots
        count = min(row.num_tokens, slots.num_prompt[row.slot] - 1 - row.start)
        following = slots.token_ids[row.slot, row.start + 1 : row.start + 1 + count].long()
        alternatives = slots.sampling[row.slot].prompt_logprobs or 0
        found = []
        for start in range(0, count, LOGITS_AT_ONCE):
            stop = min(start + LOGITS_AT_ONCE, count)
            logits = self._decoder.logits(hidden[start:stop])
            found += sampler.top_logprobs(logits, following[start:stop], [alternatives] * (stop - start))
        return found
