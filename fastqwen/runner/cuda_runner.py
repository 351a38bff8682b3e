"""The executor on an NVIDIA GPU: steps are launched ahead of their results, decode steps as one CUDA graph each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastqwen.engine.executor import StepHandle
from fastqwen.kernels import AttentionBatch
from fastqwen.kernels.triton import step
from fastqwen.layers.decoder import Decoder
from fastqwen.model_config import ModelConfig
from fastqwen.plan import EnginePlan
from fastqwen.records import Row, SampledRow, ScheduledBatch, StepOutput, TokenLogprobs
from fastqwen.runner import sampler
from fastqwen.runner.model_runner import ModelRunner
from fastqwen.runner.packing import pack
from fastqwen.runner.pooling import NOT_FINITE, PooledStep, last_vectors
from fastqwen.runner.structured import StructuredOutput

RESULTS_IN_FLIGHT = 4  # host copies of results; more than steps that may be in flight


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Row counts for which a graph is captured; a step takes the next larger one and pads."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, *range(80, 257, 16), *range(288, 2049, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


# From the sampled tokens, log-probabilities and prompt log-probabilities by row; asked once the tokens are known.
Extras = Callable[[list[int]], tuple[dict[int, TokenLogprobs], dict[int, list[TokenLogprobs]]]]


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # float32 or the model's type [size, vocab]
    tokens: Tensor  # int32 [size]


class PendingStep:
    """A launched step. ``result`` waits for its tokens, not for steps launched after it."""

    def __init__(
        self,
        batch: ScheduledBatch,
        tokens: Tensor,
        done: torch.cuda.Event,
        extras: Extras | None,
        failed: dict[int, str],
    ) -> None:
        self._failed = failed  # by the place among the rows that sample
        self._batch = batch
        self._tokens = tokens  # int32 on the host, one for each row that samples, in order
        self._done = done
        self._extras = extras

    def result(self) -> StepOutput:
        self._done.synchronize()
        tokens = self._tokens.tolist()
        logprobs, prompt_logprobs = self._extras(tokens) if self._extras else ({}, {})
        rows, at = [], 0
        for index, row in enumerate(self._batch.rows):
            if not row.samples:
                rows.append(SampledRow(request_id=row.request_id, prompt_logprobs=prompt_logprobs.get(index)))
                continue
            token, failure = tokens[at], self._failed.get(at)
            at += 1
            if token == step.CORRUPT or failure is not None:
                rows.append(SampledRow(request_id=row.request_id, error=failure or NOT_FINITE))
                continue
            rows.append(
                SampledRow(
                    request_id=row.request_id,
                    token_id=token,
                    logprobs=logprobs.get(index),
                    prompt_logprobs=prompt_logprobs.get(index),
                )
            )
        return StepOutput(step_id=self._batch.step_id, rows=rows)


class CudaRunner(ModelRunner):
    run_ahead = 2

    def __init__(
        self,
        model: ModelConfig,
        decoder: Decoder,
        plan: EnginePlan,
        device: torch.device,
        structured: StructuredOutput | None = None,
    ) -> None:
        super().__init__(model, decoder, plan, device, structured)
        self._untaken: tuple[list[int], Tensor, torch.cuda.Event] | None = None  # slots and tokens of the last step
        self.slots.block_tables[self.slots.spare] = plan.num_blocks  # padding writes into a block of its own
        self._inputs = torch.zeros((2, max(graph_sizes(plan.max_num_seqs))), dtype=torch.int32, device=device)
        self._graphs: dict[int, _Graph] = {}
        self._results = [
            torch.zeros(plan.max_num_seqs, dtype=torch.int32).pin_memory() for _ in range(RESULTS_IN_FLIGHT)
        ]
        self._events = [torch.cuda.Event() for _ in range(RESULTS_IN_FLIGHT)]
        self._num_steps = 0

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Record the decode step for each batch size, the largest first, so that the others fit into its memory."""
        self._warm_up()
        sizes = sorted(graph_sizes(self._plan.max_num_seqs), reverse=True)
        pool = torch.cuda.graph_pool_handle()
        self._inputs[0].fill_(self.slots.spare)
        self._inputs[1].fill_(0)
        for index, size in enumerate(sizes):
            self._decode(size)  # compiles what this size needs, outside of the recording
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits, tokens = self._decode(size)
            self._graphs[size] = _Graph(graph, logits, tokens)
            progress(index + 1, len(sizes))

    def _warm_up(self) -> None:
        """Compile what steps with prompts need, so that no request waits for a compiler: each tile height, with and
        without cached tokens before the prompt, in the spare slot, whose blocks are all the spare one."""
        longest = min(self._plan.max_model_len, self._plan.max_num_batched_tokens)
        for tokens, start in itertools.product((2, 17, 33, 65, 129, 513), (0, 64)):
            if start + tokens <= longest:
                row = Row(
                    slot=self.slots.spare, request_id="", start=start, num_tokens=tokens, new_blocks=[], samples=True
                )
                self._run(ScheduledBatch(step_id=0, admissions=[], rows=[row]))

    @torch.inference_mode()
    def submit(self, batch: ScheduledBatch) -> StepHandle:
        if self._structured is not None:
            self._take_last_step(self._structured)
            self._structured.admit(batch.admissions)
        self.slots.admit(batch.admissions)
        self.slots.extend(batch.rows)
        rows = batch.rows
        if (
            self._graphs
            and len(rows) <= self._inputs.shape[1]
            and all(row.num_tokens == 1 and row.samples for row in rows)
        ):
            hidden, logits, tokens = None, *self._replay(rows)
        else:
            hidden, logits, tokens = self._run(batch)
        extras = None
        failed: dict[int, str] = {}
        if any(self._is_special(row) for row in rows):
            tokens, extras, failed = self._special(rows, hidden, logits, tokens)
        vectors = last_vectors(self._decoder, rows, hidden)
        pending = self._pending(batch, tokens, extras, failed)
        return pending if vectors is None else PooledStep(pending, rows, vectors)

    def _take_last_step(self, structured: StructuredOutput) -> None:
        """A grammar must see a row's last token before it allows the next one: such rows cannot run ahead."""
        if self._untaken is not None:
            slots, tokens, done = self._untaken
            done.synchronize()
            structured.take(slots, tokens.tolist())
            self._untaken = None

    def _replay(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        size = next(size for size in sorted(self._graphs) if size >= len(rows))
        host = np.empty((2, size), dtype=np.int32)
        host[0, : len(rows)] = [row.slot for row in rows]
        host[1, : len(rows)] = [row.start for row in rows]
        host[0, len(rows) :] = self.slots.spare
        host[1, len(rows) :] = 0
        self._inputs[:, :size].copy_(torch.from_numpy(host).pin_memory(), non_blocking=True)
        found = self._graphs[size]
        found.graph.replay()
        return found.logits[: len(rows)], found.tokens[: len(rows)]

    def _decode(self, size: int) -> tuple[Tensor, Tensor]:
        """Logits and next tokens of ``size`` rows of one token each, whose slots and positions stand in ``_inputs``."""
        slots, decoder = self.slots, self._decoder
        row_slots, starts = self._inputs[0, :size], self._inputs[1, :size]
        residual, cos_sin, q_scale = step.prepare(
            row_slots,
            starts,
            token_ids=slots.token_ids,
            frequencies=slots.inverse_frequencies,
            rope_scale=slots.rope_scale,
            embed=decoder.embed,
            logn_len=self._model.logn_len,
        )
        where = AttentionBatch(
            positions=starts,
            cos_sin=cos_sin,
            q_scale=q_scale,
            token_tables=row_slots,
            table_rows=row_slots,
            row_starts=starts,  # only rows of several tokens need the next three
            context_lens=starts,
            block_tables=slots.block_tables,
            cache_slots=starts,
            num_decode_rows=size,
            max_row_tokens=1,
        )
        decoder.advance(residual, where, self.caches)
        logits = decoder.logits(residual)
        return logits, self._next_tokens(logits, row_slots, starts + 1)

    def _run(self, batch: ScheduledBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Any step, launched kernel by kernel: (hidden states, logits and tokens of the rows that sample)"""
        ids, where = pack(batch.rows, self.slots, block_size=self._plan.block_size, logn_len=self._model.logn_len)
        hidden = self._decoder.hidden(ids, where, self.caches)
        sampling = np.array([index for index, row in enumerate(batch.rows) if row.samples], dtype=np.int64)
        if not len(sampling):
            nothing = torch.empty(0, dtype=torch.int32, device=hidden.device)
            return hidden, hidden[:0], nothing
        picked = self.slots.upload(sampling)
        logits = self._decoder.logits(hidden[where.row_starts[1:][picked].long() - 1])
        row_slots, positions = where.table_rows[picked], where.context_lens[picked]
        return hidden, logits, self._next_tokens(logits, row_slots, positions)

    def _next_tokens(self, logits: Tensor, row_slots: Tensor, positions: Tensor) -> Tensor:
        slots = self.slots
        return step.sample(
            logits,
            row_slots,
            positions,
            temperature=slots.temperature,
            top_k=slots.top_k,
            top_p=slots.top_p,
            min_p=slots.min_p,
            seed=slots.seed,
            token_ids=slots.token_ids,
        )

    def _is_special(self, row: Row) -> bool:
        """Whether the row needs more than the graph's sampler does."""
        wish = self.slots.sampling[row.slot]
        return (
            (self._structured is not None and self._structured.constrains(row.slot))
            or wish.needs_history
            or wish.logit_bias is not None
            or wish.logprobs is not None
            or row.prompt_logprobs
            or row.start + row.num_tokens - self.slots.num_prompt[row.slot] < wish.min_tokens
        )

    def _special(
        self, rows: list[Row], hidden: Tensor | None, logits: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Extras, dict[int, str]]:
        """Adjust the logits, sample again, and keep what log-probabilities will be made of; and which rows failed."""
        failed: dict[int, str] = {}
        sampling = [row for row in rows if row.samples]
        wishes = [self.slots.sampling[row.slot] for row in sampling]
        asked = [index for index, wish in enumerate(wishes) if wish.logprobs is not None]
        raw = logits[asked].float() if asked else None
        if sampling:
            adjusted = logits.float()
            self._adjust(adjusted, sampling)
            if self._structured is not None:
                failed = self._structured.mask(adjusted, [row.slot for row in sampling])
            host = np.array([(row.slot, row.start + row.num_tokens) for row in sampling], dtype=np.int32)
            row_slots, positions = self.slots.upload(np.ascontiguousarray(host.T)).unbind(0)
            tokens = self._next_tokens(adjusted, row_slots, positions)
        prompts: dict[int, list[TokenLogprobs]] = {}
        start = 0
        for index, row in enumerate(rows):
            if row.prompt_logprobs and hidden is not None:
                prompts[index] = self._prompt_logprobs(row, hidden[start : start + row.num_tokens])
            start += row.num_tokens
        places = [index for index, row in enumerate(rows) if row.samples]

        def extras(chosen: list[int]) -> tuple[dict[int, TokenLogprobs], dict[int, list[TokenLogprobs]]]:
            if raw is None:
                return {}, prompts
            ids = torch.tensor([max(0, chosen[index]) for index in asked], device=raw.device)
            counts = [wishes[index].logprobs or 0 for index in asked]
            found = sampler.top_logprobs(raw, ids, counts)
            return {places[index]: one for index, one in zip(asked, found, strict=True)}, prompts

        return tokens, extras, failed

    def _pending(
        self, batch: ScheduledBatch, tokens: Tensor, extras: Extras | None, failed: dict[int, str]
    ) -> PendingStep:
        place = self._num_steps % RESULTS_IN_FLIGHT
        self._num_steps += 1
        host, event = self._results[place][: tokens.shape[0]], self._events[place]
        host.copy_(tokens, non_blocking=True)
        event.record()
        slots = [row.slot for row in batch.rows if row.samples]
        if self._structured is not None and any(map(self._structured.constrains, slots)):
            self._untaken = slots, host, event
        return PendingStep(batch, host, event, extras, failed)
